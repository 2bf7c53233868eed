/* ref.h: the reference device from the inside: plain loops over elements that are read and written one by one, by type
 * and strides. Every other device is compared with it, so floats are computed in double and rounded once, integers in
 * int64. Arrays may have any strides everywhere. */
#ifndef OREPA_CORE_REF_H
#define OREPA_CORE_REF_H

#include <math.h>

#include "device.h"
#include "dtype.h"
#include "error.h"

/* The entries of the table; each is ref_<entry>. The others are NULL. */
/* clang-format off */
#define REF_ENTRIES(ENTRY)                                                                                             \
  ENTRY(allocate) ENTRY(deallocate) ENTRY(available) ENTRY(upload) ENTRY(download) ENTRY(copy) ENTRY(fill)             \
  ENTRY(random) ENTRY(gather) ENTRY(scatter) ENTRY(sort) ENTRY(running_sum) ENTRY(elementwise) ENTRY(reduce) ENTRY(square_sums) ENTRY(matmul) ENTRY(conv_fusion) ENTRY(conv_forward)                  \
  ENTRY(conv_backward_data) ENTRY(conv_backward_weight) ENTRY(norm_moments) ENTRY(norm_finalize) ENTRY(norm_apply)     \
  ENTRY(norm_backward) ENTRY(max_pool_forward) ENTRY(max_pool_backward) ENTRY(avg_pool_forward)                        \
  ENTRY(avg_pool_backward) ENTRY(interpolate_forward) ENTRY(interpolate_backward) ENTRY(group_norm_forward) ENTRY(group_norm_backward) ENTRY(softmax_forward) ENTRY(softmax_backward) ENTRY(cross_entropy_forward)                 \
  ENTRY(cross_entropy_backward) ENTRY(sgd) ENTRY(compose) ENTRY(compose_backward_after) ENTRY(compose_backward_before)
/* clang-format on */

#define REF_DECLARE(entry) __typeof__(*((orepa_device *)0)->entry) ref_##entry;
REF_ENTRIES(REF_DECLARE)
#undef REF_DECLARE

/* ---- memory.c: with OREPA_REF_GUARD=1 device memory can be touched inside entries only, each of which therefore
 * begins with REF_ENTRY. Entries may call each other. */
int ref_open(void);
void ref_close(int *opened);
#define REF_ENTRY __attribute__((cleanup(ref_close), unused)) int ref_opened = ref_open()

/* ---- norm.c: what convolutions and pools need of it */
void ref_moments_of(const device_array *moments, const device_array *x);
/* scale*x + shift in the arithmetic that devices share to the bit: one fused multiply-add in float, or double for a
 * float64 map, rounded to the map's type. */
double ref_affine(orepa_dtype map, double scale, double x, double shift);
double ref_activated(double z, bool relu);
/* An element of a map as a prologue leaves it; the prologue may be NULL. */
double ref_after_prologue(const device_array *x, int64_t at, int64_t channel, const device_prologue *prologue);

/* ---- where an element is, in elements from `data` */

static inline int64_t ref_count(const device_array *a) {
  int64_t count = 1;
  for (int d = 0; d < a->rank; d++)
    count *= a->shape[d];
  return count;
}

/* Element k in logical order. */
static inline int64_t ref_at(const device_array *a, int64_t k) {
  int64_t at = 0;
  for (int d = a->rank; d-- > 0; k /= a->shape[d])
    at += k % a->shape[d] * a->strides[d];
  return at;
}

/* Element (n, c, h, w) of a map or (o, i, h, w) of a kernel. */
static inline int64_t ref_at4(const device_array *a, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * a->strides[0] + c * a->strides[1] + h * a->strides[2] + w * a->strides[3];
}

/* The array without one of its axes: where that position is 0. */
static inline device_array ref_without(const device_array *a, int axis) {
  device_array rest = *a;
  rest.rank--;
  for (int d = axis; d < rest.rank; d++) {
    rest.shape[d] = rest.shape[d + 1];
    rest.strides[d] = rest.strides[d + 1];
  }
  return rest;
}

/* ---- one element */

static inline int64_t ref_get_integer(const device_array *a, int64_t at) {
  switch (a->dtype) {
  case OREPA_INT64:
    return ((const int64_t *)a->data)[at];
  case OREPA_INT32:
    return ((const int32_t *)a->data)[at];
  case OREPA_UINT8:
    return ((const uint8_t *)a->data)[at];
  default: /* OREPA_BOOL */
    return ((const uint8_t *)a->data)[at] != 0;
  }
}

static inline double ref_get(const device_array *a, int64_t at) {
  switch (a->dtype) {
  case OREPA_FLOAT32:
    return ((const float *)a->data)[at];
  case OREPA_BFLOAT16:
    return bfloat16_to_float(((const uint16_t *)a->data)[at]);
  case OREPA_FLOAT16:
    return float16_to_float(((const uint16_t *)a->data)[at]);
  case OREPA_FLOAT64:
    return ((const double *)a->data)[at];
  default:
    return (double)ref_get_integer(a, at);
  }
}

/* To float, rounded to odd: a second rounding, to a short float, then gives what a single one would have given. */
static inline float ref_to_odd(double value) {
  float nearest = (float)value;
  if ((double)nearest == value || value != value)
    return nearest;
  uint32_t bits;
  memcpy(&bits, &nearest, sizeof bits);
  if (fabs((double)nearest) > fabs(value))
    bits--; /* the neighbour toward zero */
  bits |= 1;
  memcpy(&nearest, &bits, sizeof bits);
  return nearest;
}

/* Saturates where the type is smaller. */
static inline void ref_set_integer(const device_array *a, int64_t at, int64_t value) {
  switch (a->dtype) {
  case OREPA_FLOAT32:
    ((float *)a->data)[at] = (float)value;
    break;
  case OREPA_BFLOAT16:
    ((uint16_t *)a->data)[at] = float_to_bfloat16(ref_to_odd((double)value));
    break;
  case OREPA_FLOAT16:
    ((uint16_t *)a->data)[at] = float_to_float16(ref_to_odd((double)value));
    break;
  case OREPA_FLOAT64:
    ((double *)a->data)[at] = (double)value;
    break;
  case OREPA_INT64:
    ((int64_t *)a->data)[at] = value;
    break;
  case OREPA_INT32:
    ((int32_t *)a->data)[at] = int64_to_int32(value);
    break;
  case OREPA_UINT8:
    ((uint8_t *)a->data)[at] = int64_to_uint8(value);
    break;
  default: /* OREPA_BOOL */
    ((uint8_t *)a->data)[at] = value != 0;
  }
}

static inline void ref_set(const device_array *a, int64_t at, double value) {
  switch (a->dtype) {
  case OREPA_FLOAT32:
    ((float *)a->data)[at] = (float)value;
    break;
  case OREPA_BFLOAT16:
    ((uint16_t *)a->data)[at] = float_to_bfloat16(ref_to_odd(value));
    break;
  case OREPA_FLOAT16:
    ((uint16_t *)a->data)[at] = float_to_float16(ref_to_odd(value));
    break;
  case OREPA_FLOAT64:
    ((double *)a->data)[at] = value;
    break;
  case OREPA_BOOL:
    ((uint8_t *)a->data)[at] = value != 0;
    break;
  default:
    ref_set_integer(a, at, double_to_int64(value));
  }
}

/* What is left of a value that was stored as this type. */
static inline double ref_rounded(orepa_dtype dtype, double value) {
  _Alignas(double) char memory[sizeof(double)];
  device_array one = {.data = memory, .dtype = dtype};
  ref_set(&one, 0, value);
  return ref_get(&one, 0);
}

#endif
