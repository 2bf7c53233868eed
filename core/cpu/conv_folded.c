/* conv_folded.c: the weight gradient of a first layer, bfloat16: few channels and a stride, for which tiles are mostly
 * empty. Cells of stride by stride pixels become pixels of more channels, which a kernel without stride meets: 7x7 over
 * 3 channels with stride 2 is 4x4 over 12. */
#include <string.h>

#include "cpu/conv.h"
#include "cpu/onednn.h"

enum {
  MOST_CHANNELS = 4,       /* above, tiles are full enough */
  MOST_CELL_CHANNELS = 32, /* of a cell: a tile's */
  PARALLEL_FROM = 1 << 16, /* elements */
};

bool conv_folded_suits(conv_direction direction, const conv_geometry *g) {
  int64_t cell = pixels(g->stride);
  return direction == CONV_BACKWARD_WEIGHT && g->dtype == OREPA_BFLOAT16 && g->groups == 1 && g->in <= MOST_CHANNELS &&
         cell > 1 && cell * g->in <= MOST_CELL_CHANNELS && g->dilation[0] == 1 && g->dilation[1] == 1 &&
         g->kernel[0] > g->stride[0] && g->kernel[1] > g->stride[1] && onednn_has_tiles();
}

/* The padding in whole cells may begin before the padding in pixels: the kernel's first taps are then not used. */
static int64_t padding_cells(const conv_geometry *g, int axis) {
  return (g->padding[axis] + g->stride[axis] - 1) / g->stride[axis];
}
static int64_t unused_taps(const conv_geometry *g, int axis) {
  return padding_cells(g, axis) * g->stride[axis] - g->padding[axis];
}

static conv_geometry of_cells(const conv_geometry *g) {
  conv_geometry cells = *g;
  cells.in = g->in * pixels(g->stride);
  for (int axis = 0; axis < 2; axis++) {
    int64_t step = g->stride[axis];
    cells.padding[axis] = padding_cells(g, axis);
    cells.kernel[axis] = (unused_taps(g, axis) + g->kernel[axis] + step - 1) / step;
    cells.stride[axis] = 1;
    int64_t met = g->result[axis] - 1 + cells.kernel[axis] - cells.padding[axis];
    int64_t size = (g->size[axis] + step - 1) / step;
    cells.size[axis] = size < met ? size : met;
  }
  return cells;
}

/* Pieces of scratch: the map in cells, the gradient of its kernel, the library's own. */
typedef struct {
  size_t kernel, own;
} folded_places;

static size_t rounded(int64_t elements, int64_t dtype) {
  return ((size_t)elements * orepa_dtype_size((orepa_dtype)dtype) + 63) / 64 * 64;
}

static folded_places places_of(const conv_geometry *cells) {
  size_t map = rounded(cells->batch * pixels(cells->size) * cells->in, cells->dtype);
  return (folded_places){map, map + rounded(cells->out * pixels(cells->kernel) * cells->in, cells->kernel_dtype)};
}

device_status conv_folded_scratch(const conv_geometry *g, size_t *bytes) {
  conv_geometry cells = of_cells(g);
  onednn_needs needs = {0};
  device_status status = onednn_conv_prepare(CONV_BACKWARD_WEIGHT, &cells, 0, &needs);
  *bytes = needs.scratch;
  *bytes += places_of(&cells).own;
  return status;
}

/* Row `row` of every cell in a line of cells, from line h of the map; zeros where that has ended. */
static void fold_line(const conv_geometry *g, const conv_geometry *cells, const uint16_t *image, int64_t h, int64_t row,
                      uint16_t *to) {
  int64_t run = g->stride[1] * g->in, end = h < g->size[0] ? g->size[1] * g->in : 0;
  const uint16_t *from = image + h * g->size[1] * g->in;
  to += row * run;
  for (int64_t c = 0; c < cells->size[1]; c++, to += cells->in) {
    int64_t left = end - c * run, count = left < 0 ? 0 : left < run ? left : run;
    for (int64_t k = 0; k < count; k++)
      to[k] = from[c * run + k];
    for (int64_t k = count; k < run; k++)
      to[k] = 0;
  }
}

static void fold(const conv_geometry *g, const conv_geometry *cells, const uint16_t *x, uint16_t *to) {
  int64_t lines = cells->batch * cells->size[0], line_length = cells->size[1] * cells->in;
#pragma omp parallel for schedule(static) if (lines * line_length >= PARALLEL_FROM)
  for (int64_t line = 0; line < lines; line++) {
    const uint16_t *image = x + line / cells->size[0] * pixels(g->size) * g->in;
    for (int64_t row = 0; row < g->stride[0]; row++)
      fold_line(g, cells, image, line % cells->size[0] * g->stride[0] + row, row, to + line * line_length);
  }
}

/* The taps that the kernel has, of those of the cells' kernel. */
static void unfold_kernel(const conv_geometry *g, const conv_geometry *cells, char *dw, const char *from) {
  size_t size = orepa_dtype_size((orepa_dtype)g->kernel_dtype), tap = (size_t)g->in * size;
  int64_t taps = pixels(g->kernel);
  for (int64_t k = 0; k < g->out * taps; k++, dw += tap) {
    int64_t h = k % taps / g->kernel[1] + unused_taps(g, 0), w = k % g->kernel[1] + unused_taps(g, 1);
    int64_t cell = (k / taps * cells->kernel[0] + h / g->stride[0]) * cells->kernel[1] + w / g->stride[1];
    int64_t within = h % g->stride[0] * g->stride[1] + w % g->stride[1];
    memcpy(dw, from + (size_t)(cell * cells->in + within * g->in) * size, tap);
  }
}

device_status conv_folded(const conv_geometry *g, const void *x, void *dw, void *dy, void *scratch) {
  conv_geometry cells = of_cells(g);
  folded_places places = places_of(&cells);
  char *memory = scratch;
  fold(g, &cells, x, scratch);
  device_status status =
      onednn_conv(CONV_BACKWARD_WEIGHT, &cells, memory, memory + places.kernel, dy, NULL, NULL, memory + places.own);
  if (status == DEVICE_DONE)
    unfold_kernel(g, &cells, dw, memory + places.kernel);
  return status;
}
