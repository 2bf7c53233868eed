/* onednn.h: what core/cpu uses of oneDNN, without its types. Primitives are made when they are first asked for and
 * kept, a few hundred of them. */
#ifndef OREPA_CORE_CPU_ONEDNN_H
#define OREPA_CORE_CPU_ONEDNN_H

#include "cpu/conv.h"

/* "2.6.3" */
const char *onednn_version(void);

/* Whether convolutions and products run on AMX tiles: without them bfloat16 is slower than float32. */
bool onednn_has_tiles(void);

/* float32, row-major, as cpu_product in matmul.h; straight to the library. */
device_status onednn_product(bool turn_a, bool turn_b, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                             const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

/* What a convolution needs: scratch, aligned to 64 bytes; and of its kernel packed, as device.h's conv_packed says (the
 * forward pass; 0 bytes: it is read as it is). */
typedef struct {
  size_t scratch, packed;
  int64_t mark;
} onednn_needs;

/* A convolution and what follows it, a set of FOLLOWED_BY_*. Unsupported: the library has no such convolution, or only
 * a slow one that others do better; 1x1 with a stride, whose weight gradient overwrites memory in the library, is
 * never given to it. */
device_status onednn_conv_prepare(conv_direction direction, const conv_geometry *g, int follows, onednn_needs *needs);
/* epilogue and packed may be NULL, and are read by forward alone. */
device_status onednn_conv(conv_direction direction, const conv_geometry *g, void *x, void *w, void *y,
                          const conv_epilogue *epilogue, const device_packed *packed, void *scratch);
/* The library's name for the implementation; "" where there is none. */
const char *onednn_conv_implementation(conv_direction direction, const conv_geometry *g, int follows);

/* c (batch, m, n) = a (batch, m, k) . b (batch, k, n) + bias (n). Strides count elements, a batch's may be 0; c is
 * dense. */
typedef struct {
  int64_t dtype, result; /* types of both factors and of c */
  int64_t batch, m, n, k;
  int64_t a_strides[3], b_strides[3];
} onednn_matmul_shape;

device_status onednn_matmul_scratch(const onednn_matmul_shape *shape, bool has_bias, size_t *bytes);
device_status onednn_matmul(const onednn_matmul_shape *shape, void *a, void *b, const void *bias, void *c,
                            void *scratch);

#endif
