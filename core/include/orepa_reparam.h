/* orepa_reparam.h: blocks of linear layers and their squeezing into one kernel (Hu et al., Online Convolutional
 * Re-parameterization, CVPR 2022). Include it beside orepa.h, whose rules for references and errors hold here too.
 *
 * A description is one tree of five forms:
 *
 *   leaf    a parameter or a constant: a kernel (c', c/n, KH, KW) in n groups, from c channels to c'
 *   chain   layers, the first is applied first
 *   scale   a child's output channels multiplied by a row of a parameter
 *   sum     branches added, each centred in the sum's kernel
 *   nest    a sum used as a layer of a chain
 *
 * Tensors stand outside the tree: a leaf or a scale names a slot, and squeezing is given one tensor for each slot. The
 * result is a kernel (O, I/G, KH, KW) in the block's G groups. Squeezing is one node of the graph; no tensor of a slot
 * is changed. */
#ifndef OREPA_REPARAM_H
#define OREPA_REPARAM_H

#include "orepa.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct orepa_tree orepa_tree;

typedef enum {
  OREPA_LEAF_PARAMETER, /* slot: (out, in/groups, KH, KW) */
  OREPA_LEAF_PATTERN,   /* slot: a constant (KH, KW) or (in, KH, KW), depthwise; out == in == groups */
  OREPA_LEAF_IDENTITY   /* no slot: depthwise 1x1 of ones */
} orepa_leaf_kind;

typedef struct {
  orepa_leaf_kind kind;
  int slot;
  int64_t in, out, groups, kernel[2];
  bool plus_identity; /* parameter + E: E[t,i,centre] = 1 where i == t mod (in/groups); odd kernels only */
  bool interleave;    /* kernel row o is the parameter's row (o mod out/groups)*groups + floor(o/(out/groups)) */
} orepa_leaf;

/* Constructors take over the trees that they are given, also when they fail; one that is part of another tree already
 * is copied. `groups` are the block's. */
OREPA_API orepa_tree *orepa_tree_leaf(const orepa_leaf *leaf);
/* With `correlate` the kernel of every layer but the first is turned by 180 degrees before it is composed. */
OREPA_API orepa_tree *orepa_tree_chain(int count, orepa_tree *const *layers, int64_t groups, bool correlate);
/* Row `row` of the slot's tensor (rows, out), or (rows, 1) for one factor for all channels. */
OREPA_API orepa_tree *orepa_tree_scale(orepa_tree *child, int slot, int64_t row);
OREPA_API orepa_tree *orepa_tree_sum(int count, orepa_tree *const *branches, int64_t groups, const int64_t kernel[2]);

OREPA_API orepa_tree *orepa_tree_retain(orepa_tree *tree);
OREPA_API void orepa_tree_release(orepa_tree *tree); /* NULL is allowed */

OREPA_API const int64_t *orepa_tree_kernel(const orepa_tree *tree); /* height and width */

/* Whether sums of recognised shapes are squeezed in one fused pass where the device has one (true at first). Tests
 * compare. */
OREPA_API void orepa_tree_set_fast(orepa_tree *tree, bool fast);

/* The squeezed kernel. slots: float32 or float64, all of one type and device; contiguous. taps: those that will be
 * used, NULL for all; others may be left zero, and their gradient must be. */
OREPA_API orepa_tensor *orepa_squeeze(orepa_tree *tree, int count, orepa_tensor *const *slots, const orepa_taps *taps);
/* The kernel that one branch of a sum adds: scaled and centred. No graph is recorded. */
OREPA_API orepa_tensor *orepa_tree_branch(orepa_tree *sum, int branch, int count, orepa_tensor *const *slots);

/* The frequency prior of the OREPA block, (channels, KH, KW): cos(pi*(u + 0.5)*f/K), where the first half of the
 * channels runs along the height and the rest along the width. */
OREPA_API orepa_tensor *orepa_frequency_prior(orepa_dtype dtype, const orepa_device *device, int64_t channels,
                                              const int64_t kernel[2]);
/* E of `plus_identity`: (rows, columns, KH, KW) with 1 at [t, t mod columns, centre]. */
OREPA_API orepa_tensor *orepa_identity_kernel(orepa_dtype dtype, const orepa_device *device, int64_t rows,
                                              int64_t columns, const int64_t kernel[2]);

#ifdef __cplusplus
}
#endif
#endif
