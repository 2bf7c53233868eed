/* conv_gathered.c: the weight gradient of bfloat16 maps as one product on tiles: the patches under the kernel become
 * the rows of a matrix, and its turned product with the result's gradient is the kernel's gradient as it lies in
 * memory. oneDNN's own weight gradient reaches half of a product's speed where the kernel is large beside the map, and
 * what it gives has to be unpacked. */
#include "cpu/conv.h"
#include "cpu/onednn.h"

enum { MOST_BYTES = 1 << 24 }; /* of a matrix of patches: larger ones leave the caches for too long */

bool conv_gathered_suits(conv_direction direction, const conv_geometry *g) {
  if (direction != CONV_BACKWARD_WEIGHT || g->dtype != OREPA_BFLOAT16 || g->groups != 1 || conv_is_point(g))
    return false;
  int64_t rows = conv_rows(g), depth = conv_depth(g), bytes = rows * depth * (int64_t)sizeof(uint16_t);
  return g->out >= 64 && rows <= depth && bytes <= MOST_BYTES && onednn_has_tiles();
}

static onednn_matmul_shape product_of(const conv_geometry *g) {
  return (onednn_matmul_shape){.dtype = g->dtype,
                               .result = g->kernel_dtype,
                               .batch = 1,
                               .m = g->out,
                               .n = conv_depth(g),
                               .k = conv_rows(g),
                               .a_strides = {0, 1, g->out},
                               .b_strides = {0, conv_depth(g), 1}};
}

static size_t patches_bytes(const conv_geometry *g) {
  return ((size_t)(conv_rows(g) * conv_depth(g)) * sizeof(uint16_t) + 63) / 64 * 64;
}

device_status conv_gathered_scratch(const conv_geometry *g, size_t *bytes) {
  onednn_matmul_shape shape = product_of(g);
  device_status status = onednn_matmul_scratch(&shape, false, bytes);
  *bytes += patches_bytes(g);
  return status;
}

device_status conv_gathered(const conv_geometry *g, const void *x, void *dw, void *dy, void *scratch) {
  onednn_matmul_shape shape = product_of(g);
  conv_gather(g, sizeof(uint16_t), x, 0, g->batch * g->result[0], conv_depth(g), scratch);
  return onednn_matmul(&shape, dy, scratch, NULL, dw, (char *)scratch + patches_bytes(g));
}
