/* conv.h: one convolution's sizes, and the ways to compute it beside oneDNN's and Winograd's. conv_ways.c chooses. */
#ifndef OREPA_CORE_CPU_CONV_H
#define OREPA_CORE_CPU_CONV_H

#include "cpu/cpu.h"

typedef enum { CONV_FORWARD, CONV_BACKWARD_DATA, CONV_BACKWARD_WEIGHT } conv_direction;

/* x (batch, groups*in, size), w (groups*out, in, kernel), y (batch, groups*out, result), all channels-last. Pairs are
 * height and width. All members are of one type, so that geometries compare as bytes. */
typedef struct {
  int64_t dtype, kernel_dtype;    /* of the maps; of w: float32 beside bfloat16 maps in the weight gradient only */
  int64_t batch, groups, in, out; /* channels of one group */
  int64_t size[2], kernel[2], result[2], stride[2], padding[2], dilation[2];
} conv_geometry;

/* Taps first ... last-1 of the kernel meet the map at output o; tap `first` meets position `at`. */
typedef struct {
  int64_t first, last, at;
} conv_window;

static inline conv_window conv_window_at(const conv_geometry *g, int axis, int64_t o) {
  int64_t start = o * g->stride[axis] - g->padding[axis], step = g->dilation[axis], room = g->size[axis] - start;
  int64_t first = start < 0 ? (step - 1 - start) / step : 0, last = room > 0 ? (room + step - 1) / step : 0;
  first = first < g->kernel[axis] ? first : g->kernel[axis];
  last = last < g->kernel[axis] ? last : g->kernel[axis];
  return (conv_window){first, last > first ? last : first, start + first * step};
}

static inline int64_t pixels(const int64_t size[2]) {
  return size[0] * size[1];
}

static inline bool conv_is_point(const conv_geometry *g) {
  return g->kernel[0] == 1 && g->kernel[1] == 1;
}

/* A 1x1 that sees every pixel once: the map is the matrix of its patches. */
static inline bool conv_is_matrix(const conv_geometry *g) {
  return conv_is_point(g) && g->stride[0] == 1 && g->stride[1] == 1 && !g->padding[0] && !g->padding[1];
}

/* The matrix of patches under one group's kernel: a row for each output pixel, a number for each tap and channel. */
static inline int64_t conv_rows(const conv_geometry *g) {
  return g->batch * pixels(g->result);
}
static inline int64_t conv_depth(const conv_geometry *g) {
  return pixels(g->kernel) * g->in;
}

/* What follows the forward pass: act(y + bias + residual), dense, of the map's type; NULL: absent. Ways differ in how
 * much of it they do, a set of FOLLOWED_BY_*. The ReLU of NaN may be 0. */
typedef struct {
  const void *bias, *residual;
  bool relu;
} conv_epilogue;

enum { FOLLOWED_BY_BIAS = 1, FOLLOWED_BY_RESIDUAL = 2, FOLLOWED_BY_RELU = 4 };

static inline int conv_follows(const conv_epilogue *e) {
  return (e->bias ? FOLLOWED_BY_BIAS : 0) | (e->residual ? FOLLOWED_BY_RESIDUAL : 0) | (e->relu ? FOLLOWED_BY_RELU : 0);
}

/* What one of the ways works on: float32. Forward writes y, the other directions x or w; bias (dense) may be NULL. */
typedef struct {
  const conv_geometry *g;
  float *x, *w, *y;
  const float *bias;
} conv_operands;

/* ---- by positions, for maps so small that most of a kernel hangs over their edge: one product over the batch for each
 * output position and kernel row, of the taps that meet the map, read where they lie. */
bool conv_positions_suit(conv_direction direction, const conv_geometry *g);
size_t conv_positions_scratch(conv_direction direction, const conv_geometry *g);
device_status conv_by_positions(conv_direction direction, const conv_operands *operands, void *scratch);

/* ---- by lowering: the patches under the kernel become rows of a matrix, a few thousand at a time. Any geometry. */
size_t conv_lowered_scratch(const conv_geometry *g);
device_status conv_lowered(conv_direction direction, const conv_operands *operands, void *scratch);

/* The rows of that matrix for lines first ... last-1, where line n * result[0] + p is one line of outputs: the patch
 * under the kernel at each output, (kh, kw, i), of the group at whose first channel x points. Elements have `element`
 * bytes; rows begin `step` elements apart. */
void conv_gather(const conv_geometry *g, size_t element, const void *x, int64_t first, int64_t last, int64_t step,
                 void *matrix);

/* ---- by gathering: the weight gradient of bfloat16 maps as one product of all patches, float32 or bfloat16. */
bool conv_gathered_suits(conv_direction direction, const conv_geometry *g);
device_status conv_gathered_scratch(const conv_geometry *g, size_t *bytes);
device_status conv_gathered(const conv_geometry *g, const void *x, void *dw, void *dy, void *scratch);

/* ---- by folding: the weight gradient of bfloat16 maps of few channels with a stride, as one without. */
bool conv_folded_suits(conv_direction direction, const conv_geometry *g);
device_status conv_folded_scratch(const conv_geometry *g, size_t *bytes);
device_status conv_folded(const conv_geometry *g, const void *x, void *dw, void *dy, void *scratch);

/* ---- strided points: a 1x1 convolution with stride or padding sees some pixels only. x (batch, channels, size) to or
 * from points (batch, channels, result), elements of `bytes` bytes; spreading leaves zeros between. */
void conv_take_points(const conv_geometry *g, size_t bytes, void *points, const void *x);
void conv_spread_points(const conv_geometry *g, size_t bytes, void *x, const void *points);

#endif
