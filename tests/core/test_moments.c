/* test_moments.c: the statistics that a convolution takes of its result and the next norm uses: where they come from,
 * and that they are not used for anything but the map that they were taken of. */
#include "engine_test.h"

#include "fusing_device.h"
#include "tensor/tensor.h"

static const orepa_conv same_size = {{1, 1}, {1, 1}, {1, 1}, 1};
static const orepa_norm training = {1e-5, 0.1, true};

/* x (2, 3, 5, 7) around a mean. */
static orepa_tensor *map(const orepa_device *device, double mean) {
  enum { COUNT = 2 * 3 * 5 * 7 };
  float values[COUNT];
  for (int k = 0; k < COUNT; k++)
    values[k] = (float)(mean + sin(k * 1.7) * 1.4142135);
  return must(orepa_from_host(OREPA_FLOAT32, device, SHAPE(2, 3, 5, 7), values));
}

static orepa_tensor *kernel(const orepa_device *device) {
  static const float values[4 * 3 * 3 * 3] = {0.5f, 0, 1, [40] = -1, [77] = 2};
  return must(orepa_from_host(OREPA_FLOAT32, device, SHAPE(4, 3, 3, 3), values));
}

static orepa_tensor *norm(orepa_tensor *y) {
  orepa_tensor *z = must(orepa_batch_norm(y, NULL, NULL, NULL, NULL, &training));
  done(tensor_materialize(z));
  return z;
}

static void expect_same(orepa_tensor *a, orepa_tensor *b) {
  double left[MOST_VALUES], right[MOST_VALUES];
  read_values(a, left);
  read_values(b, right);
  assert_memory_equal(left, right, (size_t)orepa_count(a) * sizeof *left);
}

/* The norm of a copy, whose statistics it has to take itself. */
static orepa_tensor *norm_of_copy(orepa_tensor *y) {
  orepa_tensor *copy = must(orepa_clone(y)), *z = norm(copy);
  orepa_release(copy);
  return z;
}

static orepa_tensor *convolved(const orepa_device *device) {
  orepa_tensor *x = map(device, 0), *w = kernel(device), *y = must(orepa_conv2d(x, w, NULL, &same_size));
  orepa_release(x);
  orepa_release(w);
  return y;
}

static void a_norm_uses_what_the_convolution_measured(void **unused) {
  (void)unused;
  orepa_tensor *y = convolved(fusing_device());
  asked.moments = 0;
  orepa_tensor *z = norm(y), *again = norm(y);
  assert_int_equal(asked.moments, 0);
  orepa_tensor *wanted = norm_of_copy(y);
  assert_int_equal(asked.moments, 1);
  expect_same(z, wanted);
  expect_same(again, wanted);
  orepa_tensor *all[] = {y, z, again, wanted};
  for (int k = 0; k < 4; k++)
    orepa_release(all[k]);
}

static void a_write_ends_their_use(void **unused) {
  (void)unused;
  orepa_tensor *y = convolved(fusing_device());
  orepa_operand operands[] = {{.tensor = y}, {.number = 2}};
  int add = orepa_function_by_name("add");
  done(orepa_apply_in_place(add, operands));
  asked.moments = 0;
  orepa_tensor *z = norm(y);
  assert_int_equal(asked.moments, 1);
  orepa_tensor *wanted = norm_of_copy(y);
  expect_same(z, wanted);
  orepa_release(y);
  orepa_release(z);
  orepa_release(wanted);
}

/* A part of the map, or the map in another order, has other statistics. */
static void a_view_is_measured_itself(void **unused) {
  (void)unused;
  orepa_tensor *y = convolved(fusing_device());
  orepa_tensor *views[] = {must(orepa_slice(y, 0, 0, 1, 1)), must(orepa_slice(y, 1, 0, 4, 2)),
                           must(orepa_permute(y, (int[]){0, 2, 3, 1})), must(orepa_permute(y, (int[]){0, 3, 2, 1})),
                           must(orepa_reshape(y, SHAPE(1, 4, 10, 7)))};
  for (int k = 0; k < 5; k++) {
    asked.moments = 0;
    orepa_tensor *z = norm(views[k]);
    assert_int_equal(asked.moments, 1);
    orepa_tensor *wanted = norm_of_copy(views[k]);
    expect_same(z, wanted);
    orepa_release(z);
    orepa_release(wanted);
    orepa_release(views[k]);
  }
  orepa_release(y);
}

static void nothing_is_measured_without_gradients_or_where_it_costs_a_pass(void **unused) {
  (void)unused;
  asked.moments = 0;
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *y = convolved(fusing_device());
  orepa_set_grad_enabled(was);
  assert_int_equal(asked.moments, 0);
  assert_null(tensor_moments(y));
  orepa_release(y);
  y = convolved(CPU);
  assert_null(tensor_moments(y));
  orepa_release(y);
}

/* The reference device measures as it convolves, and gives the same statistics either way. */
static void ref_measures_too(void **unused) {
  (void)unused;
  orepa_tensor *y = convolved(REF), *z = norm(y), *wanted = norm_of_copy(y);
  assert_non_null(tensor_moments(y));
  expect_same(z, wanted);
  orepa_release(y);
  orepa_release(z);
  orepa_release(wanted);
}

/* A mean that is 10,000 times the deviation, through the whole op. */
static void a_large_mean_costs_no_accuracy(void **unused) {
  (void)unused;
  for_each_device(device) {
    double plain[MOST_VALUES], moved[MOST_VALUES];
    orepa_tensor *x = map(device, 0), *far = map(device, 1e4), *y = norm(x), *z = norm(far);
    read_values(y, plain);
    read_values(z, moved);
    for (int64_t k = 0; k < orepa_count(x); k++)
      assert_float_equal(moved[k], plain[k], 2e-3); /* 1e4 + x has lost 5e-4 of x */
    orepa_tensor *all[] = {x, far, y, z};
    for (int n = 0; n < 4; n++)
      orepa_release(all[n]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_norm_uses_what_the_convolution_measured),
      cmocka_unit_test(a_write_ends_their_use),
      cmocka_unit_test(a_view_is_measured_itself),
      cmocka_unit_test(nothing_is_measured_without_gradients_or_where_it_costs_a_pass),
      cmocka_unit_test(ref_measures_too),
      cmocka_unit_test(a_large_mean_costs_no_accuracy),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
