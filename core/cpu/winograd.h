/* winograd.h: convolution by 3x3 kernels in fewer multiplications: F(4x4, 3x3) of Winograd and of Lavin and Gray (arXiv
 * 1509.09308), float32, channels-last. A tile of 6x6 inputs, transformed, times a transformed kernel of 36 numbers,
 * transformed back, is a tile of 4x4 outputs: 36 multiplications where the direct way needs 144. What stands between is
 * 36 matrix products over channels.
 *
 * The points of interpolation are 0, +-5/8, +-3/2 and infinity; the textbook's +-1, +-2 lose ten times as much. A tile
 * of 3 outputs leaves out the point -3/2 and shares the kernel's other 5 numbers, so that any size is cut into tiles of
 * 4 and 3 with little or nothing hanging over.
 *
 * With stride 2 the kernel's taps fall into those that meet odd and those that meet even pixels: four convolutions
 * without stride and 81 multiplications (kernels/winograd_strided.h). */
#ifndef OREPA_CORE_CPU_WINOGRAD_H
#define OREPA_CORE_CPU_WINOGRAD_H

#include "cpu/conv.h"
#include "cpu/features.h"

/* What is done on the way: to x while it is read, act(scale*x + shift), per channel, where scale is not NULL (padding
 * is zeros of the result); to y before it is written what follows it; and the moments of what was written (device.h),
 * where moments is not NULL. Backward data takes none, backward weight what concerns x. The kernel may be transformed
 * already, or kept (device.h) in the forward direction. */
typedef struct {
  const conv_geometry *g;
  float *x, *w, *y;
  const float *scale, *shift;
  bool relu_x;
  conv_epilogue after;
  float *moments;
  const device_packed *packed;
} winograd_operands;

/* Whether it computes such a convolution at all, and whether it is the fastest way to; `kept`: the transformed kernel
 * is. */
bool winograd_can(const conv_geometry *g);
bool winograd_suits(conv_direction direction, const conv_geometry *g, bool kept);

/* Whether a scale and shift of x give norm_apply's bits; else they are not to be asked for. */
bool winograd_fuses_prologue(void);

/* Bytes of the transformed kernel of the forward direction. */
size_t winograd_packed(const conv_geometry *g);
size_t winograd_scratch(conv_direction direction, const conv_geometry *g);
void winograd_conv(conv_direction direction, const winograd_operands *operands, void *scratch);

/* The kernels of one instruction set: kernels/winograd_*.c. Scratch in bytes, for so many threads. */
typedef struct {
  size_t (*packed)(const conv_geometry *g);
  size_t (*forward_scratch)(conv_direction direction, const conv_geometry *g, int threads);
  void (*forward)(conv_direction direction, const winograd_operands *operands, int threads, void *scratch);
  size_t (*weight_scratch)(const conv_geometry *g, int threads);
  void (*weight)(const winograd_operands *operands, int threads, void *scratch);
  bool rounds_once; /* scale*x + shift, as norm_apply does */
} winograd_kernels;

extern const winograd_kernels cpu_base_winograd, cpu_avx2_winograd, cpu_avx512_winograd;

/* NULL where this build or this machine has none. */
const winograd_kernels *winograd_kernels_for(cpu_isa isa);

#endif
