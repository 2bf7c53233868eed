/* engine_test.h: tensors made and looked at through orepa.h alone, on both devices: for tests of the engine's heart. */
#ifndef OREPA_TESTS_ENGINE_TEST_H
#define OREPA_TESTS_ENGINE_TEST_H

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "dtype.h"
#include "guarded.h"
#include "orepa.h"

static inline const orepa_device *device_called(const char *name) {
  const orepa_device *device = orepa_device_by_name(name);
  assert_non_null(device);
  return device;
}

#define CPU device_called("cpu")
#define REF device_called("ref")

/* for_each_device(device) { ... } */
#define for_each_device(device)                                                                                        \
  for (int device_ = 0; device_ < 2; device_++)                                                                        \
    for (const orepa_device *device = device_called(device_ ? "cpu" : "ref"); device; device = NULL)

/* ---- making: f(..., SHAPE(2, 3), ...) passes rank and sizes */

#define SHAPE(...)                                                                                                     \
  (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (const int64_t[]) {                                       \
    __VA_ARGS__                                                                                                        \
  }
#define SCALAR 0, NULL
#define AXES(...) ((const int[]){__VA_ARGS__})

/* A call gave a tensor; what went wrong otherwise. */
static inline orepa_tensor *must(orepa_tensor *t) {
  if (!t)
    fail_msg("%s", orepa_error());
  return t;
}

static inline void done(int status) {
  if (status)
    fail_msg("%s", orepa_error());
}

static inline orepa_tensor *sum_of(orepa_tensor *t) {
  return must(orepa_reduce(OREPA_SUM, t, 0, NULL, false));
}

static inline void release_all(int count, orepa_tensor *const *tensors) {
  for (int k = 0; k < count; k++)
    orepa_release(tensors[k]);
}

#define RELEASE(...)                                                                                                   \
  release_all((int)(sizeof((orepa_tensor *[]){__VA_ARGS__}) / sizeof(orepa_tensor *)), (orepa_tensor *[]){__VA_ARGS__})

static inline size_t count_in(int rank, const int64_t *shape) {
  size_t count = 1;
  for (int d = 0; d < rank; d++)
    count *= (size_t)shape[d];
  return count;
}

/* float32 first, first + 1, ... in logical order. */
static inline orepa_tensor *numbered(const orepa_device *device, int rank, const int64_t *shape, float first) {
  size_t count = count_in(rank, shape);
  float *values = malloc(count * sizeof *values + 1);
  assert_non_null(values);
  for (size_t k = 0; k < count; k++)
    values[k] = first + (float)k;
  orepa_tensor *t = must(orepa_from_host(OREPA_FLOAT32, device, rank, shape, values));
  free(values);
  return t;
}

static inline orepa_tensor *full(const orepa_device *device, int rank, const int64_t *shape, double value) {
  return must(orepa_full(OREPA_FLOAT32, device, rank, shape, value));
}

/* The same, and it asks for a gradient. */
static inline orepa_tensor *wanting(orepa_tensor *t) {
  done(orepa_set_requires_grad(t, true));
  return t;
}

/* ---- looking */

enum { MOST_VALUES = 4096 };

/* Element k of host memory of a type, converted here and not by the engine. */
static inline double value_at(orepa_dtype dtype, const void *data, size_t k) {
  switch (dtype) {
  case OREPA_FLOAT32:
    return ((const float *)data)[k];
  case OREPA_BFLOAT16:
    return bfloat16_to_float(((const uint16_t *)data)[k]);
  case OREPA_FLOAT16:
    return float16_to_float(((const uint16_t *)data)[k]);
  case OREPA_FLOAT64:
    return ((const double *)data)[k];
  case OREPA_INT64:
    return (double)((const int64_t *)data)[k];
  case OREPA_INT32:
    return ((const int32_t *)data)[k];
  default:
    return ((const uint8_t *)data)[k];
  }
}

static inline void read_values(orepa_tensor *t, double *values) {
  static char memory[MOST_VALUES * sizeof(double)];
  size_t count = (size_t)orepa_count(t);
  assert_true(count <= MOST_VALUES);
  done(orepa_to_host(t, memory, count * orepa_dtype_size(orepa_tensor_dtype(t))));
  for (size_t k = 0; k < count; k++)
    values[k] = value_at(orepa_tensor_dtype(t), memory, k);
}

static inline void expect_values(orepa_tensor *t, size_t count, const double *wanted, double tolerance, int line) {
  double found[MOST_VALUES];
  if (!t)
    fail_msg("line %d: no tensor: %s", line, orepa_error());
  if ((size_t)orepa_count(t) != count)
    fail_msg("line %d: %d elements, not %d", line, (int)orepa_count(t), (int)count);
  read_values(t, found);
  for (size_t k = 0; k < count; k++)
    if (found[k] != wanted[k] && !(fabs(found[k] - wanted[k]) <= tolerance))
      fail_msg("line %d: element %d is %.17g, not %.17g", line, (int)k, found[k], wanted[k]);
}

#define VALUES(...)                                                                                                    \
  sizeof((double[]){__VA_ARGS__}) / sizeof(double), (const double[]) {                                                 \
    __VA_ARGS__                                                                                                        \
  }
/* Elements in logical order, exactly. */
#define assert_values(t, ...) expect_values(t, VALUES(__VA_ARGS__), 0, __LINE__)
#define assert_near(t, tolerance, ...) expect_values(t, VALUES(__VA_ARGS__), tolerance, __LINE__)

static inline void expect_sizes(const char *what, const orepa_tensor *t, const int64_t *found, int rank,
                                const int64_t *wanted, int line) {
  if (!t)
    fail_msg("line %d: no tensor: %s", line, orepa_error());
  if (orepa_rank(t) != rank)
    fail_msg("line %d: rank %d, not %d", line, orepa_rank(t), rank);
  for (int d = 0; d < rank; d++)
    if (found[d] != wanted[d])
      fail_msg("line %d: %s %d is %lld, not %lld", line, what, d, (long long)found[d], (long long)wanted[d]);
}

#define assert_shape(t, ...) expect_sizes("size", t, orepa_shape(t), SHAPE(__VA_ARGS__), __LINE__)
#define assert_strides(t, ...) expect_sizes("stride", t, orepa_strides(t), SHAPE(__VA_ARGS__), __LINE__)

/* A call failed, and its message has `words` in it. */
static inline void expect_message(bool failed, const char *words, int line) {
  if (!failed)
    fail_msg("line %d: no failure, where \"%s\" was expected", line, words);
  if (!strstr(orepa_error(), words))
    fail_msg("line %d: the message is \"%s\", without \"%s\"", line, orepa_error(), words);
}

#define assert_refused(call, words) expect_message((call) != 0, words, __LINE__)
#define assert_no_tensor(call, words) expect_message(!(call), words, __LINE__)

/* ---- leaks: the setup and the teardown of a test that leaves no tensor behind */

static size_t live_before;

static inline int remember_live(void **unused) {
  (void)unused;
  live_before = orepa_memory(CPU).live;
  return 0;
}

/* Scratch of this thread may grow. */
static inline int nothing_leaks(void **unused) {
  (void)unused;
  return orepa_memory(CPU).live <= live_before + (1 << 20) ? 0 : -1;
}

#endif
