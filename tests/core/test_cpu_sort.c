/* test_cpu_sort.c: order and running sums on the cpu, for each instruction set, against ref: types, layouts, axes, all
 * of a row and its first few, equals, NaN and both zeros, any number of threads. */
#include "kernel_test.h"

#include <omp.h>

typedef struct {
  int axis, rank;
  int64_t shape[OREPA_MAX_RANK];
} sort_case;

static const sort_case cases[] = {
    {0, 1, {1}},           {0, 1, {0}},           {0, 1, {7}},         {0, 1, {48}},
    {0, 1, {49}},          {0, 1, {257}},         {0, 1, {3000}},      {0, 2, {50, 9}},
    {1, 2, {9, 50}},       {1, 2, {40, 700}},     {2, 3, {3, 2, 200}}, {1, 3, {2, 130, 5}},
    {1, 4, {2, 60, 3, 2}}, {3, 4, {2, 3, 2, 90}}, {0, 2, {5, 0}},      {5, 6, {2, 1, 2, 1, 2, 70}},
};

enum { CASES = sizeof cases / sizeof *cases };

static const orepa_dtype types[] = {OREPA_FLOAT32, OREPA_FLOAT64, OREPA_BFLOAT16, OREPA_FLOAT16,
                                    OREPA_INT64,   OREPA_INT32,   OREPA_UINT8,    OREPA_BOOL};

/* Of kind 0 all differ, of kind 1 most are equal, of kind 2 some are NaN, infinite or a zero of either sign. */
static void fill(test_array *t, int kind, uint64_t seed) {
  bool real = orepa_dtype_is_float(t->a.dtype), wide = t->a.dtype == OREPA_INT64 || t->a.dtype == OREPA_INT32;
  if (real && kind != 1)
    test_fill_normal(t, seed, 0, 2);
  else if (t->a.dtype == OREPA_BOOL)
    test_fill_integers(t, seed, 0, 1);
  else
    test_fill_integers(t, seed, real || wide ? (kind ? -3 : -100000) : 0, kind ? 3 : real || wide ? 100000 : 255);
  if (!real || kind != 2)
    return;
  static const double odd[] = {NAN, -0.0, 0.0, INFINITY, -INFINITY};
  for (int64_t k = 0; k < test_count(&t->a); k += 3)
    test_set(&t->a, k, odd[k / 3 % 5]);
}

static void compare(const orepa_device *device, const sort_case *c, orepa_dtype dtype, int64_t wanted, int kind,
                    uint64_t seed) {
  device_context ref = test_context(ref_device()), cpu = test_context(device);
  int64_t shape[OREPA_MAX_RANK];
  memcpy(shape, c->shape, sizeof shape);
  shape[c->axis] = wanted < shape[c->axis] ? wanted : shape[c->axis];
  test_array x = test_new(dtype, seed % LAYOUT_CHANNELS, c->rank, c->shape);
  fill(&x, kind, seed);
  for (int descending = 0; descending < 2; descending++) {
    test_array right = test_new(OREPA_INT64, seed / 2 % LAYOUT_CHANNELS, c->rank, shape), found = test_copy(&right);
    assert_int_equal(ref.device->sort(&ref, c->axis, descending, &right.a, &x.a), DEVICE_DONE);
    assert_int_equal(cpu.device->sort(&cpu, c->axis, descending, &found.a, &x.a), DEVICE_DONE);
    assert_true(test_same(&found.a, &right.a));
    assert_true(test_clean(&found));
    test_release(&right);
    test_release(&found);
  }
  test_release(&x);
  test_context_free(&ref);
  test_context_free(&cpu);
}

static void positions_are_those_of_ref(void **unused) {
  (void)unused;
  static const int64_t wanted[] = {1 << 20, 1, 5, 60};
  for_each_isa(device) for (int k = 0; k < CASES; k++) for (size_t type = 0; type < sizeof types / sizeof *types;
                                                            type++) for (int kind = 0; kind < 3;
                                                                         kind++) for (size_t w = 0; w < 4; w++)
      compare(device, &cases[k], types[type], wanted[w], kind, 31 * type + 7 * w + k);
}

/* Keys that differ in one byte alone, each byte in turn. */
static void every_byte_counts(void **unused) {
  (void)unused;
  const int64_t shape[] = {200};
  for_each_isa(device) for (int byte = 0; byte < 8; byte++) {
    device_context context = test_context(device);
    test_array x = test_new(OREPA_INT64, LAYOUT_DENSE, 1, shape), found = test_new(OREPA_INT64, LAYOUT_DENSE, 1, shape);
    for (int64_t n = 0; n < shape[0]; n++)
      ((int64_t *)x.a.data)[n] = (int64_t)((uint64_t)(n * 37 % 200) << 8 * byte);
    assert_int_equal(device->sort(&context, 0, false, &found.a, &x.a), DEVICE_DONE);
    const int64_t *values = x.a.data, *at = found.a.data;
    for (int64_t n = 1; n < shape[0]; n++)
      assert_true(values[at[n - 1]] < values[at[n]]);
    test_release(&x);
    test_release(&found);
    test_context_free(&context);
  }
}

static void threads_change_nothing(void **unused) {
  (void)unused;
  const int64_t shape[] = {300, 200};
  for_each_isa(device) {
    test_array all[3];
    for (int k = 0; k < 3; k++) {
      device_context context = test_context(device);
      test_array x = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, shape);
      all[k] = test_new(OREPA_INT64, LAYOUT_DENSE, 2, shape);
      fill(&x, 1, 9);
      omp_set_num_threads(k + 1);
      assert_int_equal(device->sort(&context, 1, true, &all[k].a, &x.a), DEVICE_DONE);
      assert_true(test_same(&all[k].a, &all[0].a));
      test_release(&x);
      test_context_free(&context);
    }
    for (int k = 0; k < 3; k++)
      test_release(&all[k]);
  }
  omp_set_num_threads(2);
}

static void running_sums_are_those_of_ref(void **unused) {
  (void)unused;
  static const orepa_dtype summed[] = {OREPA_FLOAT32, OREPA_FLOAT64, OREPA_INT64};
  for_each_isa(device) for (int k = 0; k < CASES; k++) for (size_t type = 0; type < 3; type++) for (int back = 0;
                                                                                                    back < 2; back++) {
    device_context ref = test_context(ref_device()), cpu = test_context(device);
    test_array x = test_new(summed[type], k % LAYOUT_CHANNELS, cases[k].rank, cases[k].shape);
    test_array right = test_new(summed[type], k / 2 % LAYOUT_CHANNELS, cases[k].rank, cases[k].shape);
    test_array found = test_copy(&right);
    fill(&x, 0, 5 + k);
    assert_int_equal(ref.device->running_sum(&ref, cases[k].axis, back, &right.a, &x.a), DEVICE_DONE);
    assert_int_equal(cpu.device->running_sum(&cpu, cases[k].axis, back, &found.a, &x.a), DEVICE_DONE);
    assert_true(test_same(&found.a, &right.a));
    assert_true(test_clean(&found));
    test_release(&x);
    test_release(&right);
    test_release(&found);
    test_context_free(&ref);
    test_context_free(&cpu);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(positions_are_those_of_ref),
      cmocka_unit_test(every_byte_counts),
      cmocka_unit_test(threads_change_nothing),
      cmocka_unit_test(running_sums_are_those_of_ref),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
