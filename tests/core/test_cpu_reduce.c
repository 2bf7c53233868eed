/* test_cpu_reduce.c: reductions and sums of squares on the cpu, for each instruction set, against ref: kinds, types,
 * layouts, every set of axes, NaN, nothing to reduce, any number of threads. */
#include <omp.h>

#include "kernel_test.h"

static const char *const kinds[OREPA_REDUCTIONS] = {"sum", "mean", "max", "min", "argmax", "argmin", "all", "any"};

typedef struct {
  int rank;
  int64_t shape[OREPA_MAX_RANK];
} test_shape;

static const test_shape shapes[] = {
    {0, {0}},
    {1, {1}},
    {1, {7}},
    {1, {5000}},
    {2, {3, 700}},
    {2, {40, 3}},
    {3, {3, 0, 2}},
    {4, {2, 3, 4, 5}},
    {4, {2, 35, 3, 9}},
    {4, {1, 520, 2, 1}},
    {5, {3, 1, 2, 4, 3}},
    {6, {2, 1, 3, 1, 2, 5}},
};

enum { SHAPES = sizeof shapes / sizeof *shapes };

static orepa_dtype result_type(orepa_reduction kind, orepa_dtype dtype) {
  if (kind == OREPA_ALL || kind == OREPA_ANY)
    return OREPA_BOOL;
  if (kind == OREPA_ARGMAX || kind == OREPA_ARGMIN)
    return OREPA_INT64;
  return kind == OREPA_SUM && !orepa_dtype_is_float(dtype) ? OREPA_INT64 : dtype;
}

/* Sums of float32 have runs in float, others are exact or in double but in another order. */
static double tolerance_of(orepa_reduction kind, orepa_dtype dtype) {
  if (kind != OREPA_SUM)
    return 0;
  switch (dtype) {
  case OREPA_FLOAT32:
    return 1e-6;
  case OREPA_FLOAT64:
    return 1e-13;
  case OREPA_BFLOAT16:
    return 8e-3;
  case OREPA_FLOAT16:
    return 1e-3;
  default:
    return 0;
  }
}

static test_array result_of(orepa_reduction kind, const test_array *src, unsigned axes, test_layout layout) {
  int64_t shape[OREPA_MAX_RANK] = {0};
  for (int d = 0; d < src->a.rank; d++)
    shape[d] = axes >> d & 1 ? 1 : src->a.shape[d];
  return test_new(result_type(kind, src->a.dtype), layout, src->a.rank, shape);
}

static void fill(test_array *t, uint64_t seed) {
  if (orepa_dtype_is_float(t->a.dtype)) {
    if (seed % 3)
      test_fill_normal(t, seed, 0.25, 1);
    else
      test_fill_integers(t, seed, 0, 3); /* equals, zeros */
    if (seed % 6 == 0)
      test_sprinkle(t, seed);
  } else {
    test_fill_integers(t, seed, seed % 2 ? -1000 : 0, seed % 2 ? 1000 : 2);
  }
}

/* The sums of the elements' magnitudes, which errors of sums are measured by: what is left of a sum may be small. */
static test_array magnitudes_of(const test_array *src, const test_array *dst) {
  device_context context = test_context(ref_device());
  test_array magnitudes = test_copy(src), sums = test_copy(dst);
  for (int64_t k = 0; k < test_count(&src->a); k++)
    test_set(&magnitudes.a, k, fabs(test_get(&src->a, k)));
  assert_int_equal(ref_device()->reduce(&context, OREPA_SUM, &sums.a, &magnitudes.a), DEVICE_DONE);
  test_release(&magnitudes);
  return sums;
}

static bool is_close(orepa_reduction kind, const test_array *src, const test_array *got, const test_array *wanted) {
  double tolerance = tolerance_of(kind, src->a.dtype);
  if (tolerance == 0)
    return test_error(&got->a, &wanted->a) == 0; /* a zero of either sign is a minimum */
  test_array sums = magnitudes_of(src, wanted);
  bool close = true;
  for (int64_t k = 0; k < test_count(&wanted->a); k++) {
    double x = test_get(&got->a, k), y = test_get(&wanted->a, k);
    close = close && (x == y || (isnan(x) && isnan(y)) || fabs(x - y) <= tolerance * test_get(&sums.a, k));
  }
  test_release(&sums);
  return close;
}

static void compare(const orepa_device *device, orepa_reduction kind, const test_array *src, unsigned axes,
                    test_layout layout) {
  device_context context = test_context(device);
  test_array got = result_of(kind, src, axes, layout), wanted = test_copy(&got);
  device_status status = ref_device()->reduce(&context, kind, &wanted.a, &src->a);
  assert_int_equal(device->reduce(&context, kind, &got.a, &src->a), status);
  if (!is_close(kind, src, &got, &wanted))
    fail_msg("%s over axes %x of %s %s: error %g", kinds[kind], axes, orepa_dtype_name(src->a.dtype),
             shape_text(src->a.rank, src->a.shape), test_error(&got.a, &wanted.a));
  assert_true(test_clean(&got));
  test_release(&got);
  test_release(&wanted);
  test_context_free(&context);
}

static void test_every_kind(void **state) {
  (void)state;
  uint64_t seed = 1;
  for_each_isa(device) for (int dtype = 0; dtype < OREPA_DTYPES;
                            dtype++) for (int s = 0; s < SHAPES; s++) for (test_layout layout = LAYOUT_DENSE;
                                                                           layout < LAYOUTS; layout++) {
    test_array src = test_new(dtype, layout, shapes[s].rank, shapes[s].shape);
    fill(&src, seed++);
    for (int kind = 0; kind < OREPA_REDUCTIONS; kind++)
      for (unsigned axes = 0; axes < 1u << shapes[s].rank; axes++)
        if (kind != OREPA_MEAN)
          compare(device, kind, &src, axes, seed % 2 ? LAYOUT_DENSE : LAYOUT_GAPS);
    test_release(&src);
  }
}

static void test_mean_is_not_asked_for(void **state) {
  (void)state;
  const int64_t shape[1] = {3};
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array src = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, shape), dst = test_copy(&src);
    assert_int_equal(device->reduce(&context, OREPA_MEAN, &dst.a, &src.a), DEVICE_UNSUPPORTED);
    test_release(&src);
    test_release(&dst);
  }
}

/* Rows, columns, everything, and positions, large enough for threads and for several chunks: right, and the same bits
 * with any number of threads. */
static void test_threads(void **state) {
  (void)state;
  const test_shape large[] = {{2, {70000, 3}}, {2, {3, 70001}}, {4, {4, 24, 27, 29}}, {2, {900, 600}}};
  int before = omp_get_max_threads();
  for_each_isa(device) {
    device_context context = test_context(device);
    for (size_t s = 0; s < sizeof large / sizeof *large; s++)
      for (unsigned axes = 1; axes < 1u << large[s].rank; axes++)
        for (int kind = 0; kind < OREPA_REDUCTIONS; kind++) {
          if (kind == OREPA_MEAN || (large[s].rank == 4 && axes != 13 && axes != 2 && axes != 15))
            continue;
          test_array src = test_new(OREPA_FLOAT32, LAYOUT_DENSE, large[s].rank, large[s].shape);
          test_fill_normal(&src, axes, 0, 1);
          omp_set_num_threads(1);
          compare(device, kind, &src, axes, LAYOUT_DENSE);
          test_array one = result_of(kind, &src, axes, LAYOUT_DENSE), more = test_copy(&one);
          assert_int_equal(device->reduce(&context, kind, &one.a, &src.a), DEVICE_DONE);
          for (int threads = 2; threads <= 3; threads++) {
            omp_set_num_threads(threads);
            assert_int_equal(device->reduce(&context, kind, &more.a, &src.a), DEVICE_DONE);
            assert_true(test_same(&more.a, &one.a));
          }
          test_release(&src);
          test_release(&one);
          test_release(&more);
        }
    test_context_free(&context);
  }
  omp_set_num_threads(before);
}

/* A sum far from zero keeps its digits: double across runs. */
static void test_long_sum(void **state) {
  (void)state;
  const int64_t shape[2] = {3000000, 1}, one[2] = {1, 1};
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array src = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, shape),
               dst = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, one);
    assert_int_equal(device->fill(&context, &src.a, (device_number){1.1, 1}), DEVICE_DONE);
    assert_int_equal(device->reduce(&context, OREPA_SUM, &dst.a, &src.a), DEVICE_DONE);
    assert_true(fabs(test_get(&dst.a, 0) / (3000000 * (double)1.1f) - 1) < 1e-6);
    test_release(&src);
    test_release(&dst);
    test_context_free(&context);
  }
}

static void check_squares(const orepa_device *device, int count, const device_array *arrays, int threads) {
  const int64_t shape[1] = {count};
  device_context context = test_context(device);
  test_array one = test_new(OREPA_FLOAT64, LAYOUT_GAPS, 1, shape), more = test_copy(&one), wanted = test_copy(&one);
  omp_set_num_threads(1);
  assert_int_equal(ref_device()->square_sums(&context, &wanted.a, count, arrays), DEVICE_DONE);
  assert_int_equal(device->square_sums(&context, &one.a, count, arrays), DEVICE_DONE);
  omp_set_num_threads(threads);
  assert_int_equal(device->square_sums(&context, &more.a, count, arrays), DEVICE_DONE);
  assert_true(test_error(&one.a, &wanted.a) < 1e-13);
  assert_true(test_same(&more.a, &one.a));
  assert_true(test_clean(&one));
  test_release(&one);
  test_release(&more);
  test_release(&wanted);
  test_context_free(&context);
}

static void test_square_sums(void **state) {
  (void)state;
  enum { ARRAYS = SHAPES * LAYOUTS + 1 };
  const int64_t large[4] = {64, 65, 5, 5};
  int before = omp_get_max_threads();
  for_each_isa(device) for (int dtype = 0; dtype < OREPA_DTYPES; dtype++) {
    test_array tests[ARRAYS];
    device_array arrays[ARRAYS];
    for (int n = 0; n < ARRAYS; n++) {
      const test_shape *s = &shapes[n % SHAPES];
      tests[n] = n == ARRAYS - 1 ? test_new(dtype, LAYOUT_DENSE, 4, large)
                                 : test_new(dtype, (test_layout)(n / SHAPES), s->rank, s->shape);
      test_fill_normal(&tests[n], (uint64_t)n, 0.1, n % 2 ? 1 : 1e-6); /* squares below what float16 or float hold */
      arrays[n] = tests[n].a;
    }
    check_squares(device, ARRAYS, arrays, 2);
    check_squares(device, ARRAYS, arrays, 3);
    check_squares(device, 0, arrays, 2);
    if (orepa_dtype_is_float(dtype)) {
      test_set(&tests[ARRAYS - 1].a, 777, NAN);
      test_set(&tests[3].a, 4999, INFINITY);
      check_squares(device, ARRAYS, arrays, 2);
    }
    for (int n = 0; n < ARRAYS; n++)
      test_release(&tests[n]);
  }
  omp_set_num_threads(before);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_kind), cmocka_unit_test(test_mean_is_not_asked_for), cmocka_unit_test(test_threads),
      cmocka_unit_test(test_long_sum),   cmocka_unit_test(test_square_sums),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
