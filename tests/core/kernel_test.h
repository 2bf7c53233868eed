/* kernel_test.h: arrays of any type and layout on the heap, to compare a device's kernels with those of ref. A test
 * makes its sources with test_new and a test_fill, a copy of them for the other device with test_copy, calls both
 * kernels on their `.a`, then asks test_error or test_same about the results and test_clean about the bytes around
 * them. */
#ifndef OREPA_TESTS_KERNEL_TEST_H
#define OREPA_TESTS_KERNEL_TEST_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "cpu/features.h"
#include "device.h"
#include "dtype.h"
#include "error.h"

/* Of so many random cases, fewer where every access is checked and takes its time. */
#ifdef __SANITIZE_ADDRESS__
#define RANDOM_CASES(count) ((count) / 3)
#else
#define RANDOM_CASES(count) (count)
#endif

/* ---- devices ---- */

/* for_each_isa(device) { ... }: the cpu's table for each instruction set that this machine has. */
#define for_each_isa(device)                                                                                           \
  for (int isa_ = 0; isa_ < CPU_ISAS; isa_++)                                                                          \
    for (const orepa_device *device = cpu_device_for((cpu_isa)isa_); device; device = NULL)

static inline void *test_workspace(device_context *context, size_t bytes) {
  if (bytes > context->workspace_bytes) {
    free(context->workspace_memory);
    context->workspace_memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    context->workspace_bytes = context->workspace_memory ? bytes : 0;
  }
  return context->workspace_memory;
}

static inline device_context test_context(const orepa_device *device) {
  return (device_context){.device = device, .workspace = test_workspace, .offence_position = -1};
}

static inline void test_context_free(device_context *context) {
  free(context->workspace_memory);
  context->workspace_memory = NULL;
  context->workspace_bytes = 0;
}

/* ---- arrays ---- */

typedef enum {
  LAYOUT_DENSE,     /* the engine's own: channels-last for rank 4, else row-major */
  LAYOUT_ROW_MAJOR, /* also for rank 4 */
  LAYOUT_PERMUTED,  /* dense, axes in the reverse order */
  LAYOUT_GAPS,      /* row-major, every second element of every axis unused */
  LAYOUT_CHANNELS,  /* axis 1 dense, every other axis repeats */
  LAYOUT_REPEATED,  /* row-major with the last axis repeating */
  LAYOUTS
} test_layout;

enum { TEST_SENTINEL = 0xA5, TEST_MARGIN = 128 };

/* An array with a margin on both sides. Bytes that belong to no element hold TEST_SENTINEL. */
typedef struct {
  device_array a;
  uint8_t *block;
  size_t bytes;
} test_array;

static inline int64_t test_count(const device_array *a) {
  int64_t count = 1;
  for (int d = 0; d < a->rank; d++)
    count *= a->shape[d];
  return count;
}

/* Element k in logical order: its position in elements from `data`. */
static inline int64_t test_offset(const device_array *a, int64_t k) {
  int64_t offset = 0;
  for (int d = a->rank - 1; d >= 0; d--) {
    offset += k % a->shape[d] * a->strides[d];
    k /= a->shape[d];
  }
  return offset;
}

/* Any strides, also negative ones; elements are zero at first. */
static inline test_array test_new_strided(orepa_dtype dtype, int rank, const int64_t *shape, const int64_t *strides) {
  test_array t = {.a = {.dtype = dtype, .rank = rank}};
  int64_t low = 0, high = 0; /* positions of the first and the last element in memory */
  for (int d = 0; d < rank; d++) {
    t.a.shape[d] = shape[d];
    t.a.strides[d] = strides[d];
    if (shape[d] > 0)
      *(strides[d] < 0 ? &low : &high) += (shape[d] - 1) * strides[d];
  }
  size_t size = orepa_dtype_size(dtype);
  t.bytes = (size_t)(high - low + 1) * size + 2 * TEST_MARGIN;
  t.block = aligned_alloc(64, (t.bytes + 63) / 64 * 64);
  assert_non_null(t.block);
  memset(t.block, TEST_SENTINEL, t.bytes);
  t.a.data = t.block + TEST_MARGIN + (size_t)-low * size;
  for (int64_t k = 0; k < test_count(&t.a); k++)
    memset((char *)t.a.data + test_offset(&t.a, k) * (int64_t)size, 0, size);
  return t;
}

static inline test_array test_new(orepa_dtype dtype, test_layout layout, int rank, const int64_t *shape) {
  static const int channels_last[4] = {1, 3, 2, 0};
  int64_t strides[OREPA_MAX_RANK] = {0}, step = layout == LAYOUT_GAPS ? 2 : 1;
  for (int n = 0; n < rank; n++) { /* from the innermost axis outwards */
    int d = rank - 1 - n;
    if (layout == LAYOUT_PERMUTED)
      d = n;
    else if (layout == LAYOUT_DENSE && rank == 4)
      d = channels_last[n];
    bool repeats = (layout == LAYOUT_CHANNELS && d != 1) || (layout == LAYOUT_REPEATED && d == rank - 1);
    strides[d] = repeats ? 0 : step;
    if (!repeats)
      step *= (shape[d] > 1 ? shape[d] : 1) * (layout == LAYOUT_GAPS ? 2 : 1);
  }
  return test_new_strided(dtype, rank, shape, strides);
}

/* The same type, layout and contents in memory of its own. */
static inline test_array test_copy(const test_array *t) {
  test_array copy = *t;
  copy.block = aligned_alloc(64, (t->bytes + 63) / 64 * 64);
  assert_non_null(copy.block);
  memcpy(copy.block, t->block, t->bytes);
  copy.a.data = copy.block + ((uint8_t *)t->a.data - t->block);
  return copy;
}

static inline void test_release(test_array *t) {
  free(t->block);
  *t = (test_array){.block = NULL};
}

/* ---- elements, by their number in logical order ---- */

static inline double test_get(const device_array *a, int64_t k) {
  int64_t n = test_offset(a, k);
  switch (a->dtype) {
  case OREPA_FLOAT32:
    return ((const float *)a->data)[n];
  case OREPA_BFLOAT16:
    return bfloat16_to_float(((const uint16_t *)a->data)[n]);
  case OREPA_FLOAT16:
    return float16_to_float(((const uint16_t *)a->data)[n]);
  case OREPA_FLOAT64:
    return ((const double *)a->data)[n];
  case OREPA_INT64:
    return (double)((const int64_t *)a->data)[n];
  case OREPA_INT32:
    return ((const int32_t *)a->data)[n];
  default:
    return ((const uint8_t *)a->data)[n];
  }
}

static inline void test_set(const device_array *a, int64_t k, double x) {
  int64_t n = test_offset(a, k);
  switch (a->dtype) {
  case OREPA_FLOAT32:
    ((float *)a->data)[n] = (float)x;
    break;
  case OREPA_BFLOAT16:
    ((uint16_t *)a->data)[n] = float_to_bfloat16((float)x);
    break;
  case OREPA_FLOAT16:
    ((uint16_t *)a->data)[n] = float_to_float16((float)x);
    break;
  case OREPA_FLOAT64:
    ((double *)a->data)[n] = x;
    break;
  case OREPA_INT64:
    ((int64_t *)a->data)[n] = double_to_int64(x);
    break;
  case OREPA_INT32:
    ((int32_t *)a->data)[n] = int64_to_int32(double_to_int64(x));
    break;
  case OREPA_UINT8:
    ((uint8_t *)a->data)[n] = int64_to_uint8(double_to_int64(x));
    break;
  default:
    ((bool *)a->data)[n] = x != 0;
  }
}

/* ---- contents: the same at every call with the same seed ---- */

static inline uint64_t test_random(uint64_t *state) {
  uint64_t z = *state += 0x9E3779B97F4A7C15u; /* splitmix64 */
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

/* Roughly normal, at most 6 in magnitude: the sum of twelve uniform numbers. */
static inline double test_random_normal(uint64_t *state) {
  double sum = -6;
  for (int k = 0; k < 12; k++)
    sum += (double)(test_random(state) >> 11) * 0x1p-53;
  return sum;
}

static inline void test_fill_normal(test_array *t, uint64_t seed, double mean, double deviation) {
  for (int64_t k = 0; k < test_count(&t->a); k++)
    test_set(&t->a, k, mean + deviation * test_random_normal(&seed));
}

/* Integers low ... high, in any type. */
static inline void test_fill_integers(test_array *t, uint64_t seed, int64_t low, int64_t high) {
  for (int64_t k = 0; k < test_count(&t->a); k++)
    test_set(&t->a, k, (double)(low + (int64_t)(test_random(&seed) % (uint64_t)(high - low + 1))));
}

/* Overwrites about one element in eight by NaN, an infinity or a zero of either sign. */
static inline void test_sprinkle(test_array *t, uint64_t seed) {
  static const double special[] = {NAN, INFINITY, -INFINITY, 0.0, -0.0};
  for (int64_t k = 0; k < test_count(&t->a); k++) {
    uint64_t random = test_random(&seed);
    if (random % 8 == 0)
      test_set(&t->a, k, special[random / 8 % 5]);
  }
}

/* ---- questions ---- */

/* The largest difference of two arrays of one shape, relative to the largest finite magnitude in b (or absolute where b
 * is all zero). NaN equals NaN and an infinity itself; anything else beside one of them is an infinite error. */
static inline double test_error(const device_array *a, const device_array *b) {
  double difference = 0, magnitude = 0;
  for (int64_t k = 0; k < test_count(b); k++) {
    double x = test_get(a, k), y = test_get(b, k);
    if (isfinite(y) && fabs(y) > magnitude)
      magnitude = fabs(y);
    if (x == y || (isnan(x) && isnan(y)))
      continue;
    if (!isfinite(x) || !isfinite(y))
      return INFINITY;
    if (fabs(x - y) > difference)
      difference = fabs(x - y);
  }
  return magnitude > 0 ? difference / magnitude : difference;
}

/* Every element has the same bits; any NaN equals any other. */
static inline bool test_same(const device_array *a, const device_array *b) {
  size_t size = orepa_dtype_size(a->dtype);
  for (int64_t k = 0; k < test_count(b); k++) {
    const char *x = (const char *)a->data + test_offset(a, k) * (int64_t)size;
    const char *y = (const char *)b->data + test_offset(b, k) * (int64_t)size;
    if (memcmp(x, y, size) && !(isnan(test_get(a, k)) && isnan(test_get(b, k))))
      return false;
  }
  return true;
}

/* Nothing was written outside the array's elements. */
static inline bool test_clean(const test_array *t) {
  size_t size = orepa_dtype_size(t->a.dtype);
  uint8_t *inside = calloc(t->bytes, 1);
  assert_non_null(inside);
  for (int64_t k = 0; k < test_count(&t->a); k++)
    memset(inside + ((uint8_t *)t->a.data - t->block) + test_offset(&t->a, k) * (int64_t)size, 1, size);
  bool clean = true;
  for (size_t n = 0; n < t->bytes; n++)
    clean = clean && (inside[n] || t->block[n] == TEST_SENTINEL);
  free(inside);
  return clean;
}

#endif
