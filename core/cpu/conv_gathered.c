/* conv_gathered.c: the weight gradient of bfloat16 maps as one product on tiles: the patches under the kernel become
 * the rows of a matrix, and its turned product with the result's gradient is the kernel's gradient as it lies in
 * memory. oneDNN's own weight gradient reaches half of a product's speed where the kernel is large beside the map, and
 * what it gives has to be unpacked. */
#include <string.h>

#include "cpu/conv.h"
#include "cpu/onednn.h"

enum {
  MOST_BYTES = 1 << 24,    /* of a matrix of patches: larger ones leave the caches for too long */
  PARALLEL_FROM = 1 << 16, /* bytes */
};

static int64_t rows_of(const conv_geometry *g) {
  return g->batch * pixels(g->result);
}

static int64_t depth_of(const conv_geometry *g) {
  return pixels(g->kernel) * g->in;
}

bool conv_gathered_suits(conv_direction direction, const conv_geometry *g) {
  if (direction != CONV_BACKWARD_WEIGHT || g->dtype != OREPA_BFLOAT16 || g->groups != 1 || conv_is_point(g))
    return false;
  int64_t rows = rows_of(g), depth = depth_of(g), bytes = rows * depth * (int64_t)sizeof(uint16_t);
  return g->out >= 64 && rows <= depth && bytes <= MOST_BYTES && onednn_has_tiles();
}

static onednn_matmul_shape product_of(const conv_geometry *g) {
  return (onednn_matmul_shape){.dtype = g->dtype,
                               .result = g->kernel_dtype,
                               .batch = 1,
                               .m = g->out,
                               .n = depth_of(g),
                               .k = rows_of(g),
                               .a_strides = {0, 1, g->out},
                               .b_strides = {0, depth_of(g), 1}};
}

static size_t patches_bytes(const conv_geometry *g) {
  return ((size_t)(rows_of(g) * depth_of(g)) * sizeof(uint16_t) + 63) / 64 * 64;
}

device_status conv_gathered_scratch(const conv_geometry *g, size_t *bytes) {
  onednn_matmul_shape shape = product_of(g);
  device_status status = onednn_matmul_scratch(&shape, false, bytes);
  *bytes += patches_bytes(g);
  return status;
}

/* The patch at output (p, q), by kernel rows; zeros where it hangs over the edge. */
static void gather_patch(const conv_geometry *g, conv_window down, conv_window across, const uint16_t *image,
                         uint16_t *row) {
  int64_t line = g->kernel[1] * g->in, taps = across.last - across.first;
  memset(row, 0, (size_t)(down.first * line) * sizeof *row);
  memset(row + down.last * line, 0, (size_t)((g->kernel[0] - down.last) * line) * sizeof *row);
  for (int64_t kh = down.first; kh < down.last; kh++) {
    const uint16_t *from = image + ((down.at + (kh - down.first) * g->dilation[0]) * g->size[1] + across.at) * g->in;
    uint16_t *to = row + kh * line;
    memset(to, 0, (size_t)(across.first * g->in) * sizeof *to);
    memset(to + across.last * g->in, 0, (size_t)((g->kernel[1] - across.last) * g->in) * sizeof *to);
    to += across.first * g->in;
    int64_t runs = g->dilation[1] == 1 ? taps > 0 : taps, length = g->dilation[1] == 1 ? taps * g->in : g->in;
    for (int64_t r = 0; r < runs; r++, from += g->dilation[1] * g->in, to += g->in)
      memcpy(to, from, (size_t)length * sizeof *to);
  }
}

static void gather(const conv_geometry *g, const uint16_t *x, uint16_t *patches) {
  int64_t lines = g->batch * g->result[0], width = g->result[1], depth = depth_of(g);
#pragma omp parallel for schedule(static) if (lines * width * depth >= PARALLEL_FROM)
  for (int64_t line = 0; line < lines; line++) {
    conv_window down = conv_window_at(g, 0, line % g->result[0]);
    const uint16_t *image = x + line / g->result[0] * pixels(g->size) * g->in;
    for (int64_t q = 0; q < width; q++)
      gather_patch(g, down, conv_window_at(g, 1, q), image, patches + (line * width + q) * depth);
  }
}

device_status conv_gathered(const conv_geometry *g, const void *x, void *dw, void *dy, void *scratch) {
  onednn_matmul_shape shape = product_of(g);
  gather(g, x, scratch);
  return onednn_matmul(&shape, dy, scratch, NULL, dw, (char *)scratch + patches_bytes(g));
}
