/* test_cpu_elementwise.c: every function and derivative of elementwise.h on the cpu, for each instruction set, against
 * ref: types, layouts, numbers, odd and empty shapes, results written over a source, any number of threads. */
#include <omp.h>

#include "elementwise.h"
#include "kernel_test.h"

static const struct {
  const char *name;
  int operands, types;
} functions[FUNCTION_COUNT] = {
#define ROW(name, operands, types, ...) [FUNCTION_##name] = {#name, operands, ELEMENTWISE_##types},
    ELEMENTWISE_ROWS(ROW)
#undef ROW
};

/* More than one rounding, so another device's last bit may differ: by function and derivative. */
static bool rounds_often(int function, int derivative) {
  switch (function) {
  case FUNCTION_pow:
  case FUNCTION_sigmoid:
  case FUNCTION_tanh:
  case FUNCTION_softplus:
  case FUNCTION_silu:
  case FUNCTION_gelu:
  case FUNCTION_hardswish:
  case FUNCTION_xlogy:
    return true;
  case FUNCTION_exp:
  case FUNCTION_log:
  case FUNCTION_multiply_add:
    return derivative == 0;
  case FUNCTION_sin:
  case FUNCTION_cos:
    return derivative <= 1;
  case FUNCTION_div:
    return derivative == 2;
  default:
    return false;
  }
}

static double tolerance_of(orepa_dtype dtype) {
  switch (dtype) {
  case OREPA_FLOAT64:
    return 1e-14;
  case OREPA_FLOAT32:
    return 1e-6;
  case OREPA_FLOAT16:
    return 1e-3;
  default:
    return 8e-3;
  }
}

typedef struct {
  int rank;
  int64_t shape[OREPA_MAX_RANK];
} test_shape;

static const test_shape shapes[] = {
    {0, {0}},
    {1, {1}},
    {1, {0}},
    {1, {7}},
    {1, {1200}},
    {2, {3, 700}},
    {2, {40, 3}},
    {3, {3, 0, 2}},
    {4, {2, 3, 4, 5}},
    {4, {1, 6, 1, 1}},
    {4, {2, 65, 3, 3}},
    {4, {2, 5, 1, 7}},
    {5, {3, 1, 2, 4, 3}},
    {6, {2, 1, 3, 1, 2, 5}},
};

enum { SHAPES = sizeof shapes / sizeof *shapes, SOURCES = ELEMENTWISE_MAX_SOURCES };

/* One call's arguments; those of the other device are copies. */
typedef struct {
  test_array dst, sources[SOURCES];
  device_array given[SOURCES];
  device_number numbers[SOURCES];
  int count;
} arguments;

static void fill(test_array *t, uint64_t seed) {
  if (orepa_dtype_is_float(t->a.dtype)) {
    test_fill_normal(t, seed, 0, 2);
    test_sprinkle(t, seed + 1);
  } else {
    test_fill_integers(t, seed, -9, 9);
  }
}

static arguments make(int function, int derivative, orepa_dtype dtype, const test_shape *s, test_layout layout,
                      uint64_t seed) {
  arguments made = {.count = derivative ? SOURCES : functions[function].operands};
  bool compare = functions[function].types == ELEMENTWISE_COMPARE && !derivative;
  made.dst = test_new(compare ? OREPA_BOOL : dtype, layout, s->rank, s->shape);
  for (int k = 0; k < made.count; k++) {
    uint64_t choice = test_random(&seed);
    if (k > 0 && choice % 5 == 0) {
      made.numbers[k] = (device_number){choice % 7 / 2.0 - 1, (int64_t)(choice % 7) - 3};
      continue;
    }
    made.sources[k] = test_new(dtype, choice / 8 % LAYOUTS, s->rank, s->shape);
    fill(&made.sources[k], choice);
    made.given[k] = made.sources[k].a;
  }
  return made;
}

static arguments copy_of(const arguments *given) {
  arguments copy = *given;
  copy.dst = test_copy(&given->dst);
  for (int k = 0; k < given->count; k++)
    if (given->given[k].data) {
      copy.sources[k] = test_copy(&given->sources[k]);
      copy.given[k] = copy.sources[k].a;
    }
  return copy;
}

static void release(arguments *made) {
  test_release(&made->dst);
  for (int k = 0; k < made->count; k++)
    test_release(&made->sources[k]);
}

static device_status call(const orepa_device *device, int function, int derivative, const device_array *dst,
                          const arguments *given) {
  device_context context = test_context(device);
  device_status status = device->elementwise(&context, function, derivative, dst, given->given, given->numbers);
  test_context_free(&context);
  return status;
}

static void check(int function, int derivative, const device_array *got, const device_array *wanted) {
  bool grows = function == FUNCTION_pow || function == FUNCTION_gelu; /* an exponent's rounding */
  double tolerance = tolerance_of(got->dtype) * (grows ? 4 : 1);
  bool good = rounds_often(function, derivative) ? test_error(got, wanted) <= tolerance : test_same(got, wanted);
  if (!good)
    fail_msg("%s, derivative %d, %s %s: error %g", functions[function].name, derivative, orepa_dtype_name(got->dtype),
             shape_text(got->rank, got->shape), test_error(got, wanted));
}

/* dst apart, then dst over the first source, where that has room for it. */
static void compare(const orepa_device *device, int function, int derivative, orepa_dtype dtype, const test_shape *s,
                    test_layout layout, uint64_t seed) {
  arguments here = make(function, derivative, dtype, s, layout, seed), there = copy_of(&here);
  assert_int_equal(call(ref_device(), function, derivative, &there.dst.a, &there), DEVICE_DONE);
  assert_int_equal(call(device, function, derivative, &here.dst.a, &here), DEVICE_DONE);
  check(function, derivative, &here.dst.a, &there.dst.a);
  assert_true(test_clean(&here.dst));
  bool repeats = false;
  for (int d = 0; d < s->rank; d++)
    repeats = repeats || (here.given[0].strides[d] == 0 && s->shape[d] != 1);
  if (!repeats && here.dst.a.dtype == dtype) {
    assert_int_equal(call(device, function, derivative, &here.given[0], &here), DEVICE_DONE);
    check(function, derivative, &here.given[0], &there.dst.a);
    assert_true(test_clean(&here.sources[0]));
  }
  release(&here);
  release(&there);
}

static bool is_supported(int function, int derivative, orepa_dtype dtype) {
  return orepa_dtype_is_float(dtype) || (!derivative && functions[function].types != ELEMENTWISE_REAL);
}

static void test_every_function(void **state) {
  (void)state;
  uint64_t seed = 1;
  for_each_isa(device) for (int f = 0; f < FUNCTION_COUNT;
                            f++) for (int derivative = 0; derivative <= functions[f].operands;
                                      derivative++) for (int dtype = 0; dtype < OREPA_DTYPES; dtype++) {
    if (!is_supported(f, derivative, dtype))
      continue;
    for (int s = 0; s < SHAPES; s++)
      for (test_layout layout = LAYOUT_DENSE; layout <= LAYOUT_GAPS; layout++)
        compare(device, f, derivative, dtype, &shapes[s], layout, seed++);
  }
}

static void test_unsupported(void **state) {
  (void)state;
  const test_shape one = {1, {3}};
  for_each_isa(device) {
    for (int f = 0; f < FUNCTION_COUNT; f++)
      for (int derivative = 0; derivative < 4; derivative++)
        for (int dtype = 0; dtype < OREPA_DTYPES; dtype++) {
          if (is_supported(f, derivative, dtype))
            continue;
          arguments given = make(f, derivative, dtype, &one, LAYOUT_DENSE, 1);
          test_array before = test_copy(&given.dst);
          assert_int_equal(call(device, f, derivative, &given.dst.a, &given), DEVICE_UNSUPPORTED);
          assert_true(test_same(&given.dst.a, &before.a));
          test_release(&before);
          release(&given);
        }
  }
}

/* Large enough for threads: a flat add, and a map times a number for each channel. */
static void test_threads(void **state) {
  (void)state;
  const int64_t shape[4] = {3, 24, 31, 32};
  int before = omp_get_max_threads();
  for_each_isa(device) for (test_layout layout = LAYOUT_DENSE; layout < LAYOUTS; layout++) {
    arguments given = {.count = 2, .dst = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, shape)};
    given.sources[0] = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, shape);
    given.sources[1] = test_new(OREPA_FLOAT32, layout, 4, shape);
    for (int k = 0; k < 2; k++) {
      fill(&given.sources[k], (uint64_t)k + 1);
      given.given[k] = given.sources[k].a;
    }
    arguments wanted = copy_of(&given);
    assert_int_equal(call(ref_device(), FUNCTION_mul, 0, &wanted.dst.a, &wanted), DEVICE_DONE);
    for (int threads = 1; threads <= 3; threads++) {
      omp_set_num_threads(threads);
      memset(given.dst.a.data, 0xFF, sizeof(float) * (size_t)test_count(&given.dst.a));
      assert_int_equal(call(device, FUNCTION_mul, 0, &given.dst.a, &given), DEVICE_DONE);
      assert_true(test_same(&given.dst.a, &wanted.dst.a));
    }
    release(&given);
    release(&wanted);
  }
  omp_set_num_threads(before);
}

/* Strides below zero, and a dst whose axes are in no order of its own. */
static void test_any_strides(void **state) {
  (void)state;
  const int64_t shape[3] = {5, 4, 30}, backward[3] = {120, -30, -1}, apart[3] = {1, 300, 7};
  for_each_isa(device) {
    arguments given = {.count = 2, .dst = test_new_strided(OREPA_FLOAT32, 3, shape, apart)};
    given.sources[0] = test_new_strided(OREPA_FLOAT32, 3, shape, backward);
    given.sources[1] = test_new_strided(OREPA_FLOAT32, 3, shape, apart);
    for (int k = 0; k < 2; k++) {
      fill(&given.sources[k], (uint64_t)k + 1);
      given.given[k] = given.sources[k].a;
    }
    arguments wanted = copy_of(&given);
    assert_int_equal(call(ref_device(), FUNCTION_sub, 0, &wanted.dst.a, &wanted), DEVICE_DONE);
    assert_int_equal(call(device, FUNCTION_sub, 0, &given.dst.a, &given), DEVICE_DONE);
    assert_true(test_same(&given.dst.a, &wanted.dst.a));
    assert_true(test_clean(&given.dst));
    release(&given);
    release(&wanted);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_function),
      cmocka_unit_test(test_unsupported),
      cmocka_unit_test(test_threads),
      cmocka_unit_test(test_any_strides),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
