/* ref_test.h: arrays in the reference device's memory, for tests that call its entries by hand. An element is reached
 * by its number in logical order, and only through upload and download, so that tests run under the guard as well. */
#ifndef OREPA_TESTS_REF_TEST_H
#define OREPA_TESTS_REF_TEST_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "device.h"
#include "dtype.h"
#include "error.h"
#include "guarded.h"

/* ---- the device, a context, and all blocks of a test, which its teardown gives back */

static const orepa_device *ref;
static device_context context;

enum { MOST_BLOCKS = 512 };
static struct {
  void *memory;
  size_t bytes;
} blocks[MOST_BLOCKS];
static int block_count;

static void *block_new(size_t bytes) {
  assert_true(block_count < MOST_BLOCKS);
  void *memory = ref->allocate(&context, bytes);
  assert_non_null(memory);
  blocks[block_count].memory = memory;
  blocks[block_count++].bytes = bytes;
  return memory;
}

static void *workspace(device_context *of, size_t bytes) {
  of->workspace_memory = block_new(bytes);
  of->workspace_bytes = bytes;
  return of->workspace_memory;
}

static int begin(void **state) {
  (void)state;
  ref = ref_device();
  context = (device_context){.device = ref, .workspace = workspace, .offence_position = -1};
  block_count = 0;
  return 0;
}

static int end(void **state) {
  (void)state;
  while (block_count--)
    ref->deallocate(&context, blocks[block_count].memory, blocks[block_count].bytes);
  return 0;
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, begin, end)

/* ---- arrays */

#define LIST(type, ...)                                                                                                \
  (int)(sizeof((type[]){__VA_ARGS__}) / sizeof(type)), (type[]) {                                                      \
    __VA_ARGS__                                                                                                        \
  }
#define SHAPE(...) LIST(int64_t, __VA_ARGS__)
#define VALUES(...) LIST(double, __VA_ARGS__)
#define SCALAR 0, NULL

static inline int64_t count_of(const device_array *a) {
  int64_t count = 1;
  for (int d = 0; d < a->rank; d++)
    count *= a->shape[d];
  return count;
}

/* Any strides; memory lies between the first and the last element, whatever the sign of a stride. */
static inline device_array strided(orepa_dtype dtype, int rank, const int64_t *shape, const int64_t *strides) {
  device_array a = {.dtype = dtype, .rank = rank};
  int64_t low = 0, high = 0, size = (int64_t)orepa_dtype_size(dtype);
  for (int d = 0; d < rank; d++) {
    a.shape[d] = shape[d];
    a.strides[d] = strides[d];
    if (shape[d] > 0)
      *(strides[d] < 0 ? &low : &high) += (shape[d] - 1) * strides[d];
  }
  a.data = (char *)block_new((size_t)((high - low + 1) * size)) - low * size;
  return a;
}

/* Channels-last for rank 4, else row-major. */
static inline device_array dense(orepa_dtype dtype, int rank, const int64_t *shape) {
  static const int last[4] = {1, 3, 2, 0};
  int64_t strides[OREPA_MAX_RANK], step = 1;
  for (int k = 0; k < rank; k++) {
    int d = rank == 4 ? last[k] : rank - 1 - k;
    strides[d] = step;
    step *= shape[d];
  }
  return strided(dtype, rank, shape, strides);
}

static inline device_array like(const device_array *a) {
  return dense(a->dtype, a->rank, a->shape);
}

/* ---- elements */

static inline char *place(const device_array *a, int64_t k) {
  int64_t offset = 0;
  for (int d = a->rank; d-- > 0; k /= a->shape[d])
    offset += k % a->shape[d] * a->strides[d];
  return (char *)a->data + offset * (int64_t)orepa_dtype_size(a->dtype);
}

/* The element's bytes at the low end of a word, as they are on a little-endian machine. */
static inline uint64_t take_bits(const device_array *a, int64_t k) {
  uint64_t bits = 0;
  assert_int_equal(ref->download(&context, &bits, place(a, k), orepa_dtype_size(a->dtype)), DEVICE_DONE);
  return bits;
}

static inline void put_bits(const device_array *a, int64_t k, uint64_t bits) {
  assert_int_equal(ref->upload(&context, place(a, k), &bits, orepa_dtype_size(a->dtype)), DEVICE_DONE);
}

static inline int64_t take_integer(const device_array *a, int64_t k) {
  uint64_t bits = take_bits(a, k);
  return a->dtype == OREPA_INT32 ? (int32_t)(uint32_t)bits : (int64_t)bits;
}

static inline double take(const device_array *a, int64_t k) {
  uint64_t bits = take_bits(a, k);
  float single;
  double value;
  memcpy(&single, &bits, sizeof single);
  memcpy(&value, &bits, sizeof value);
  switch (a->dtype) {
  case OREPA_FLOAT32:
    return single;
  case OREPA_FLOAT64:
    return value;
  case OREPA_BFLOAT16:
    return bfloat16_to_float((uint16_t)bits);
  case OREPA_FLOAT16:
    return float16_to_float((uint16_t)bits);
  default:
    return (double)take_integer(a, k);
  }
}

static inline void put(const device_array *a, int64_t k, double value) {
  uint64_t bits = 0;
  float single = (float)value;
  if (a->dtype == OREPA_FLOAT32)
    memcpy(&bits, &single, sizeof single);
  else if (a->dtype == OREPA_FLOAT64)
    memcpy(&bits, &value, sizeof value);
  else if (a->dtype == OREPA_BFLOAT16)
    bits = float_to_bfloat16(single);
  else if (a->dtype == OREPA_FLOAT16)
    bits = float_to_float16(single);
  else
    bits = (uint64_t)(int64_t)value;
  put_bits(a, k, bits);
}

static inline void put_all(const device_array *a, int count, const double *values) {
  assert_int_equal(count, count_of(a));
  for (int k = 0; k < count; k++)
    put(a, k, values[k]);
}

static inline device_array vector(orepa_dtype dtype, int count, const double *values) {
  int64_t size = count;
  device_array a = dense(dtype, 1, &size);
  put_all(&a, count, values);
  return a;
}

/* ---- contents: integers from -4 to 4, so that sums of products are exact; or numbers between -1 and 1 */

static uint64_t random_state = 1;

static inline uint64_t next_random(void) {
  uint64_t z = random_state += 0x9E3779B97F4A7C15u; /* splitmix64 */
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

static inline void put_integers(const device_array *a) {
  for (int64_t k = 0; k < count_of(a); k++)
    put(a, k, (double)(next_random() % 9) - 4);
}

static inline void put_fractions(const device_array *a) {
  for (int64_t k = 0; k < count_of(a); k++)
    put(a, k, (double)(next_random() >> 11) * 0x1p-52 - 1);
}

/* ---- questions */

static inline bool near(double x, double y, double tolerance) {
  return x == y || (isnan(x) && isnan(y)) || fabs(x - y) <= tolerance * (1 + fabs(y));
}

#define ASSERT_NEAR(x, y, tolerance)                                                                                   \
  do {                                                                                                                 \
    double x_ = (x), y_ = (y);                                                                                         \
    if (!near(x_, y_, tolerance))                                                                                      \
      fail_msg("%s is %.17g, not %.17g", #x, x_, y_);                                                                  \
  } while (0)

#define ASSERT_DONE(status) assert_int_equal(status, DEVICE_DONE)

/* NaN equals NaN. */
static inline void check_values(const device_array *a, double tolerance, int count, const double *values) {
  assert_int_equal(count, count_of(a));
  for (int k = 0; k < count; k++)
    if (!near(take(a, k), values[k], tolerance))
      fail_msg("element %d is %.17g, not %.17g", k, take(a, k), values[k]);
}

static inline void check_same(const device_array *a, const device_array *b, double tolerance) {
  assert_int_equal(count_of(a), count_of(b));
  for (int64_t k = 0; k < count_of(a); k++)
    if (!near(take(a, k), take(b, k), tolerance))
      fail_msg("element %d is %.17g, not %.17g", (int)k, take(a, k), take(b, k));
}

static inline double inner_product(const device_array *a, const device_array *b) {
  double sum = 0;
  for (int64_t k = 0; k < count_of(a); k++)
    sum += take(a, k) * take(b, k);
  return sum;
}

#endif
