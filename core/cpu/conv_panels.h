/* conv_panels.h: convolutions by a kernel that is kept in panels: as one product of the patches under the kernel, for
 * maps that are too small for oneDNN's kernels to be fast. The forward pass of float32, without groups. */
#ifndef OREPA_CORE_CPU_CONV_PANELS_H
#define OREPA_CORE_CPU_CONV_PANELS_H

#include "cpu/conv.h"

/* `kept`: the kernel is, in panels. */
bool conv_panels_suit(conv_direction direction, const conv_geometry *g, bool kept);
size_t conv_panels_packed(const conv_geometry *g);
size_t conv_panels_scratch(const conv_geometry *g);
void conv_panels(const conv_geometry *g, const float *x, const float *w, float *y, const conv_epilogue *after,
                 const device_packed *packed, void *scratch);

/* Rows of the result: y[row][column] = act(a[row] . kernel's column + bias + residual). */
typedef struct {
  int64_t rows, depth, step; /* of a, in floats */
  int64_t out, channels;     /* columns of the kernel; from row to row of y and the residual */
  const float *a, *kernel;
  float *y;
  conv_epilogue after;
} panel_product;

/* The kernels of one instruction set: kernels/panels.c. */
typedef struct {
  int64_t width, lanes; /* columns of a panel, of a vector: what `out` is a multiple of */
  void (*pack)(const float *w, int64_t out, int64_t depth, int64_t panel, float *to);
  void (*multiply)(const panel_product *product, int64_t panel);
} panel_kernels;

extern const panel_kernels cpu_base_panels, cpu_avx2_panels, cpu_avx512_panels;

#endif
