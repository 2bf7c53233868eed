/* test_ref_sums.c: the reference device's reductions, matrix product, losses and optimizer, against numbers worked out
 * by hand and slopes. */
#include "ref_test.h"

/* ---- reductions ---- */

static void reduce_follows_axes(void **state) {
  (void)state;
  device_array x = strided(OREPA_FLOAT32, 3, (int64_t[]){2, 3, 2}, (int64_t[]){-1, 2, 7});
  put_all(&x, VALUES(1, 7, 3, 3, 5, 2, 0, 9, 4, 4, 6, -1));
  device_array middle = dense(OREPA_FLOAT32, SHAPE(2, 1, 2)), all = dense(OREPA_FLOAT32, SHAPE(1, 1, 1));
  device_array ends = dense(OREPA_FLOAT32, SHAPE(1, 3, 1)), where = dense(OREPA_INT64, SHAPE(2, 1, 2));
  ASSERT_DONE(ref->reduce(&context, OREPA_SUM, &middle, &x));
  check_values(&middle, 0, VALUES(9, 12, 10, 12));
  ASSERT_DONE(ref->reduce(&context, OREPA_SUM, &ends, &x));
  check_values(&ends, 0, VALUES(17, 14, 12));
  ASSERT_DONE(ref->reduce(&context, OREPA_MAX, &ends, &x));
  check_values(&ends, 0, VALUES(9, 4, 6));
  ASSERT_DONE(ref->reduce(&context, OREPA_MIN, &all, &x));
  check_values(&all, 0, VALUES(-1));
  ASSERT_DONE(ref->reduce(&context, OREPA_ARGMAX, &where, &x));
  check_values(&where, 0, VALUES(2, 0, 2, 0));
  ASSERT_DONE(ref->reduce(&context, OREPA_ARGMIN, &where, &x));
  check_values(&where, 0, VALUES(0, 2, 0, 2));
  device_array truth = dense(OREPA_BOOL, SHAPE(2, 1, 2));
  ASSERT_DONE(ref->reduce(&context, OREPA_ALL, &truth, &x));
  check_values(&truth, 0, VALUES(1, 1, 0, 1));
  device_array scalar = dense(OREPA_FLOAT16, SCALAR), sum = like(&scalar);
  put(&scalar, 0, 2.5);
  ASSERT_DONE(ref->reduce(&context, OREPA_SUM, &sum, &scalar));
  check_values(&sum, 0, VALUES(2.5));
}

static void reduce_knows_nan_and_equals(void **state) {
  (void)state;
  device_array x = dense(OREPA_FLOAT32, SHAPE(2, 4)), most = dense(OREPA_FLOAT32, SHAPE(2, 1)),
               where = dense(OREPA_INT64, SHAPE(2, 1)), truth = dense(OREPA_BOOL, SHAPE(2, 1));
  put_all(&x, VALUES(1, NAN, 9, NAN, 0, 5, 5, 0));
  ASSERT_DONE(ref->reduce(&context, OREPA_MAX, &most, &x));
  check_values(&most, 0, VALUES(NAN, 5));
  ASSERT_DONE(ref->reduce(&context, OREPA_MIN, &most, &x));
  check_values(&most, 0, VALUES(NAN, 0));
  ASSERT_DONE(ref->reduce(&context, OREPA_ARGMAX, &where, &x));
  check_values(&where, 0, VALUES(1, 1));
  ASSERT_DONE(ref->reduce(&context, OREPA_ARGMIN, &where, &x));
  check_values(&where, 0, VALUES(1, 0));
  ASSERT_DONE(ref->reduce(&context, OREPA_ALL, &truth, &x));
  check_values(&truth, 0, VALUES(1, 0));
  put_all(&x, VALUES(-INFINITY, -INFINITY, -INFINITY, -INFINITY, 1, 2, 3, 4));
  ASSERT_DONE(ref->reduce(&context, OREPA_ARGMAX, &where, &x));
  check_values(&where, 0, VALUES(0, 3));
}

static void reduce_of_integers_is_exact(void **state) {
  (void)state;
  int64_t large = ((int64_t)1 << 53) + 1;
  device_array x = dense(OREPA_INT64, SHAPE(3)), one = dense(OREPA_INT64, SHAPE(1)),
               bytes = dense(OREPA_UINT8, SHAPE(300)), truths = dense(OREPA_BOOL, SHAPE(300)),
               any = dense(OREPA_BOOL, SHAPE(1));
  put_bits(&x, 0, (uint64_t)(large - 1));
  put_bits(&x, 1, (uint64_t)large);
  put_bits(&x, 2, (uint64_t)-3);
  ASSERT_DONE(ref->reduce(&context, OREPA_SUM, &one, &x));
  assert_true(take_integer(&one, 0) == 2 * large - 4);
  ASSERT_DONE(ref->reduce(&context, OREPA_MAX, &one, &x));
  assert_true(take_integer(&one, 0) == large);
  ASSERT_DONE(ref->reduce(&context, OREPA_ARGMAX, &one, &x));
  assert_int_equal(take_integer(&one, 0), 1);
  ASSERT_DONE(ref->reduce(&context, OREPA_ARGMIN, &one, &x));
  assert_int_equal(take_integer(&one, 0), 2);
  ASSERT_DONE(ref->fill(&context, &bytes, (device_number){255, 255}));
  ASSERT_DONE(ref->reduce(&context, OREPA_SUM, &one, &bytes));
  assert_int_equal(take_integer(&one, 0), 300 * 255);
  ASSERT_DONE(ref->fill(&context, &truths, (device_number){1, 1}));
  ASSERT_DONE(ref->reduce(&context, OREPA_SUM, &one, &truths));
  assert_int_equal(take_integer(&one, 0), 300);
  ASSERT_DONE(ref->reduce(&context, OREPA_ANY, &any, &x));
  assert_int_equal(take_integer(&any, 0), 1);
}

static void reduce_of_nothing(void **state) {
  (void)state;
  device_array none = dense(OREPA_FLOAT32, SHAPE(2, 0)), sum = dense(OREPA_FLOAT32, SHAPE(2, 1)),
               truth = dense(OREPA_BOOL, SHAPE(2, 1)), rest = dense(OREPA_FLOAT32, SHAPE(1, 0));
  ASSERT_DONE(ref->reduce(&context, OREPA_SUM, &sum, &none));
  check_values(&sum, 0, VALUES(0, 0));
  ASSERT_DONE(ref->reduce(&context, OREPA_ALL, &truth, &none));
  check_values(&truth, 0, VALUES(1, 1));
  ASSERT_DONE(ref->reduce(&context, OREPA_ANY, &truth, &none));
  check_values(&truth, 0, VALUES(0, 0));
  ASSERT_DONE(ref->reduce(&context, OREPA_MAX, &rest, &none));
  assert_int_equal(ref->reduce(&context, OREPA_MAX, &sum, &none), DEVICE_FAILED);
  assert_int_equal(ref->reduce(&context, OREPA_MEAN, &sum, &none), DEVICE_UNSUPPORTED);
}

static void square_sums_are_double(void **state) {
  (void)state;
  device_array arrays[3] = {vector(OREPA_FLOAT32, VALUES(3, 4)), dense(OREPA_FLOAT32, SHAPE(0)),
                            vector(OREPA_FLOAT32, VALUES(1e30, -1e30))};
  device_array sums = dense(OREPA_FLOAT64, SHAPE(3));
  ASSERT_DONE(ref->square_sums(&context, &sums, 3, arrays));
  check_values(&sums, 1e-6, VALUES(25, 0, 2e60));
}

/* ---- matrix product ---- */

static void matmul_by_hand(void **state) {
  (void)state;
  device_array a = dense(OREPA_FLOAT32, SHAPE(2, 2, 3)),
               b = strided(OREPA_FLOAT32, 3, (int64_t[]){2, 3, 1}, (int64_t[]){0, -1, 5});
  device_array c = dense(OREPA_FLOAT32, SHAPE(2, 2, 1)), bias = vector(OREPA_FLOAT32, VALUES(0.5));
  put_all(&a, VALUES(1, 2, 3, 4, 5, 6, -1, 0, 1, 0, 0, 0));
  put_all(&b, VALUES(1, 10, 100, 1, 10, 100)); /* one matrix, repeated */
  ASSERT_DONE(ref->matmul(&context, &c, &a, &b, &bias));
  check_values(&c, 0, VALUES(321.5, 654.5, 99.5, 0.5));
  device_array left = dense(OREPA_FLOAT64, SHAPE(1, 2, 0)), right = dense(OREPA_FLOAT64, SHAPE(1, 0, 2)),
               zero = dense(OREPA_FLOAT64, SHAPE(1, 2, 2));
  ASSERT_DONE(ref->matmul(&context, &zero, &left, &right, NULL));
  check_values(&zero, 0, VALUES(0, 0, 0, 0));
  device_array short_a = dense(OREPA_BFLOAT16, SHAPE(1, 1, 3)), short_b = dense(OREPA_BFLOAT16, SHAPE(1, 3, 1)),
               short_c = dense(OREPA_BFLOAT16, SHAPE(1, 1, 1));
  put_all(&short_a, VALUES(256, 1, 1));
  put_all(&short_b, VALUES(1, 1, 2)); /* 259 is rounded once, to 260 */
  ASSERT_DONE(ref->matmul(&context, &short_c, &short_a, &short_b, NULL));
  check_values(&short_c, 0, VALUES(260));
  device_array integers = dense(OREPA_INT32, SHAPE(1, 1, 1));
  assert_int_equal(ref->matmul(&context, &integers, &integers, &integers, NULL), DEVICE_UNSUPPORTED);
}

/* ---- losses ---- */

static void softmax_by_hand(void **state) {
  (void)state;
  device_array x = strided(OREPA_FLOAT64, 2, (int64_t[]){2, 3}, (int64_t[]){1, 2}), y = like(&x);
  put_all(&x, VALUES(0, log(2), log(5), 1000, 1000, -INFINITY));
  ASSERT_DONE(ref->softmax_forward(&context, false, &y, &x));
  check_values(&y, 1e-13, VALUES(0.125, 0.25, 0.625, 0.5, 0.5, 0));
  ASSERT_DONE(ref->softmax_forward(&context, true, &y, &x));
  check_values(&y, 1e-13, VALUES(log(0.125), log(0.25), log(0.625), log(0.5), log(0.5), -INFINITY));
  device_array none = dense(OREPA_FLOAT32, SHAPE(2, 0)), one = dense(OREPA_BFLOAT16, SHAPE(2, 1));
  ASSERT_DONE(ref->softmax_forward(&context, false, &none, &none));
  put_all(&one, VALUES(3, -70));
  ASSERT_DONE(ref->softmax_forward(&context, false, &one, &one));
  check_values(&one, 0, VALUES(1, 1));
}

static void softmax_gradient_is_a_slope(void **state) {
  (void)state;
  device_array x = dense(OREPA_FLOAT64, SHAPE(2, 1, 3)), y = like(&x), dy = like(&x), dx = like(&x);
  put_fractions(&x);
  put_fractions(&dy);
  for (int log = 0; log < 2; log++) {
    ASSERT_DONE(ref->softmax_forward(&context, log, &y, &x));
    ASSERT_DONE(ref->softmax_backward(&context, log, &dx, &dy, &y));
    for (int k = 0; k < 6; k++) {
      double value = take(&x, k), step = 1e-5, loss[2];
      for (int side = 0; side < 2; side++) {
        put(&x, k, value + (side ? step : -step));
        ASSERT_DONE(ref->softmax_forward(&context, log, &y, &x));
        loss[side] = inner_product(&y, &dy);
      }
      put(&x, k, value);
      ASSERT_NEAR(take(&dx, k), (loss[1] - loss[0]) / (2 * step), 1e-9);
    }
  }
}

static void cross_entropy_by_hand(void **state) {
  (void)state;
  device_array x = dense(OREPA_BFLOAT16, SHAPE(4, 3)), labels = vector(OREPA_INT64, VALUES(2, -100, 0, 1));
  device_array loss = dense(OREPA_FLOAT32, SHAPE(4)), logz = like(&loss);
  put_all(&x, VALUES(0, 0, 0, 5, 5, 5, 2, 1, 0, -INFINITY, 4, -INFINITY));
  ASSERT_DONE(ref->cross_entropy_forward(&context, 0, -100, &loss, &logz, &x, &labels));
  check_values(&loss, 1e-6, VALUES(log(3), 0, log(1 + exp(-1) + exp(-2)), 0));
  check_values(&logz, 1e-6, VALUES(log(3), 5 + log(3), 2 + log(1 + exp(-1) + exp(-2)), 4));
  assert_int_equal(context.offence_position, -1);
  ASSERT_DONE(ref->cross_entropy_forward(&context, 0, 1, &loss, &logz, &x, &labels));
  assert_int_equal(context.offence, -100);
  assert_int_equal(context.offence_position, 1);
}

static void cross_entropy_smooths(void **state) {
  (void)state;
  device_array x = dense(OREPA_FLOAT64, SHAPE(1, 4)), labels = vector(OREPA_INT64, VALUES(1));
  device_array loss = dense(OREPA_FLOAT64, SHAPE(1)), logz = like(&loss), dloss = vector(OREPA_FLOAT64, VALUES(2)),
               dx = like(&x);
  put_all(&x, VALUES(log(1), log(2), log(3), log(4)));
  ASSERT_DONE(ref->cross_entropy_forward(&context, 0.2, -100, &loss, &logz, &x, &labels));
  check_values(&loss, 1e-14, VALUES(-(0.05 * log(0.1) + 0.85 * log(0.2) + 0.05 * log(0.3) + 0.05 * log(0.4))));
  ASSERT_DONE(ref->cross_entropy_backward(&context, 0.2, -100, &dx, &dloss, &x, &labels, &logz));
  check_values(&dx, 1e-14, VALUES(2 * (0.1 - 0.05), 2 * (0.2 - 0.85), 2 * (0.3 - 0.05), 2 * (0.4 - 0.05)));
}

static void cross_entropy_ignores_and_reports(void **state) {
  (void)state;
  /* logits of (2, 2, H = 2) seen with their classes last */
  device_array x = strided(OREPA_FLOAT32, 3, (int64_t[]){2, 2, 2}, (int64_t[]){4, 1, 2}), dx = like(&x);
  device_array labels = dense(OREPA_INT64, SHAPE(2, 2)), loss = dense(OREPA_FLOAT32, SHAPE(2, 2)), logz = like(&loss),
               dloss = like(&loss);
  put_all(&x, VALUES(0, 0, 1, 1, 2, 2, 3, 3));
  put_all(&labels, VALUES(0, 7, 2, -1));
  put_all(&logz, VALUES(9, 9, 9, 9));
  put_all(&dloss, VALUES(1, 1, 1, 1));
  ASSERT_DONE(ref->cross_entropy_forward(&context, 0, 7, &loss, &logz, &x, &labels));
  check_values(&loss, 1e-6, VALUES(log(2), 0, 0, 0));
  check_values(&logz, 1e-6, VALUES(log(2), 1 + log(2), 9, 9)); /* nothing is written where a label offends */
  assert_int_equal(context.offence, 2);
  assert_int_equal(context.offence_position, 2);
  ASSERT_DONE(ref->cross_entropy_backward(&context, 0, 7, &dx, &dloss, &x, &labels, &logz));
  ASSERT_NEAR(take(&dx, 0), -0.5, 1e-6);
  ASSERT_NEAR(take(&dx, 1), 0.5, 1e-6);
  assert_true(take(&dx, 2) == 0 && take(&dx, 3) == 0);
  device_array none = dense(OREPA_FLOAT32, SHAPE(0, 3)), no_labels = dense(OREPA_INT64, SHAPE(0)),
               no_loss = dense(OREPA_FLOAT32, SHAPE(0));
  ASSERT_DONE(ref->cross_entropy_forward(&context, 0.1, 7, &no_loss, &no_loss, &none, &no_labels));
}

/* ---- optimizer ---- */

static void sgd_by_hand(void **state) {
  (void)state;
  device_sgd_item items[2] = {
      {.parameter = vector(OREPA_FLOAT32, VALUES(1, -2)),
       .gradient = vector(OREPA_FLOAT32, VALUES(4, 8)),
       .velocity = vector(OREPA_FLOAT32, VALUES(2, 0)),
       .rate = 0.5,
       .decay = 0.25},
      {.parameter = dense(OREPA_FLOAT32, SHAPE(0)), .gradient = dense(OREPA_FLOAT32, SHAPE(0))}};
  ASSERT_DONE(ref->sgd(&context, &(orepa_sgd_options){.momentum = 0.5}, 2, items)); /* g = 4.25, 7.5 */
  check_values(&items[0].velocity, 0, VALUES(5.25, 7.5));
  check_values(&items[0].parameter, 0, VALUES(-1.625, -5.75));
  put_all(&items[0].parameter, VALUES(1, -2));
  put_all(&items[0].velocity, VALUES(2, 0));
  ASSERT_DONE(ref->sgd(&context, &(orepa_sgd_options){.momentum = 0.5, .nesterov = true}, 1, items));
  check_values(&items[0].velocity, 0, VALUES(5.25, 7.5));
  check_values(&items[0].parameter, 0, VALUES(1 - 0.5 * (4.25 + 2.625), -2 - 0.5 * (7.5 + 3.75)));
  put_all(&items[0].parameter, VALUES(1, -2));
  items[0].velocity.data = NULL;
  ASSERT_DONE(ref->sgd(&context, &(orepa_sgd_options){.momentum = 0}, 1, items));
  check_values(&items[0].parameter, 0, VALUES(1 - 2.125, -2 - 3.75));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(reduce_follows_axes),
      TEST(reduce_knows_nan_and_equals),
      TEST(reduce_of_integers_is_exact),
      TEST(reduce_of_nothing),
      TEST(square_sums_are_double),
      TEST(matmul_by_hand),
      TEST(softmax_by_hand),
      TEST(softmax_gradient_is_a_slope),
      TEST(cross_entropy_by_hand),
      TEST(cross_entropy_smooths),
      TEST(cross_entropy_ignores_and_reports),
      TEST(sgd_by_hand),
  };
  RUN_GUARDED_AND_NOT(tests);
}
