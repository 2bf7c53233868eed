/* conv_ways.h: the ways to compute a convolution, which of them is the fastest, and the call of it.
 *
 * For float32: by positions on small maps; Winograd's for 3x3; oneDNN's kernels; by lowering; by panels of a kernel
 * that is kept. For bfloat16: oneDNN's kernels; for some weight gradients by gathering or by folding. The choice was
 * measured. OREPA_CONV=winograd|direct forces Winograd's way wherever it exists, or never. */
#ifndef OREPA_CORE_CPU_CONV_WAYS_H
#define OREPA_CORE_CPU_CONV_WAYS_H

#include "cpu/conv.h"

typedef enum { BY_POSITIONS, BY_LOWERING, BY_ONEDNN, BY_WINOGRAD, BY_PANELS, BY_GATHERING, BY_FOLDING } conv_way;

/* What is chosen for beside the geometry. */
typedef struct {
  bool accurate;
  bool kept; /* the kernel as the way wants it */
} conv_wish;

/* How a convolution is computed. */
typedef struct {
  conv_way way;
  int follows;   /* what the way does afterwards, a set of FOLLOWED_BY_* */
  size_t bytes;  /* of scratch */
  size_t packed; /* of the kernel; 0: there is nothing to keep */
  int64_t mark;
} conv_choice;

/* What a way is given. Of what follows it does what its choice says; where the choice does not fuse (conv_way_fuses)
 * there is no scale, shift or moments. */
typedef struct {
  conv_direction direction;
  const conv_geometry *g;
  void *x, *w, *y;
  conv_epilogue after;
  const float *scale, *shift; /* of the input, NULL: as it is */
  bool relu;                  /* of the input */
  float *moments;
  const device_packed *packed;
  void *scratch;
} conv_call;

/* Whichever is the fastest where it exists: the choice is the same or one that oneDNN leaves. */
conv_way conv_preferred(conv_direction direction, const conv_geometry *g, conv_wish wish);
/* Unsupported: bfloat16 that no way computes. `follows`: all that is wanted, a set of FOLLOWED_BY_*. */
device_status conv_choose(conv_direction direction, const conv_geometry *g, int follows, conv_wish wish,
                          conv_choice *choice);
device_conv_fusion conv_way_fuses(conv_way way);
device_status conv_run(const conv_choice *choice, const conv_call *call);

#endif
