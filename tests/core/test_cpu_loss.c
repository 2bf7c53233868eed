/* test_cpu_loss.c: the cpu's softmax and cross entropy against ref's, forward and backward, on every instruction set
 * that the machine has: all strides, large and infinite logits, ignored labels, labels that are none. */
#include "kernel_test.h"

#include <omp.h>

typedef struct {
  int rank;
  int64_t shape[4]; /* classes last */
} loss_shape;

static const loss_shape shapes[] = {
    {2, {128, 10}},  {2, {32, 1000}},    {2, {3, 1}},          {2, {1, 7}}, {1, {33}},       {2, {5, 2048}},
    {3, {4, 9, 21}}, {4, {2, 6, 5, 19}}, {4, {3, 16, 16, 21}}, {2, {0, 5}}, {2, {2, 10001}}, {3, {70, 3, 2}}};
enum { SHAPES = sizeof shapes / sizeof *shapes };

static double tolerance(orepa_dtype dtype) {
  return dtype == OREPA_FLOAT32 ? 2e-6 : 1e-2;
}

/* Relative to 1, or to the largest magnitude where that is more: small results are differences of numbers about 1. */
static void expect(const char *what, orepa_dtype dtype, test_layout layout, const test_array *found,
                   const test_array *wanted) {
  double error = test_error(&found->a, &wanted->a), magnitude = 0;
  for (int64_t k = 0; k < test_count(&wanted->a); k++) {
    double value = fabs(test_get(&wanted->a, k));
    magnitude = isfinite(value) && value > magnitude ? value : magnitude;
  }
  if (magnitude > 0 && magnitude < 1)
    error *= magnitude;
  if (!(error <= tolerance(dtype))) {
    print_error("%s of %s %s, layout %d: error %g\n", what, orepa_dtype_name(dtype),
                shape_text(found->a.rank, found->a.shape), layout, error);
    fail();
  }
  assert_true(test_clean(found));
}

/* Logits as they are in a net, or around a large number, or with infinities and NaN among them. */
enum { USUAL, LARGE, SPRINKLED, CONTENTS };

static void fill(test_array *x, int contents, uint64_t seed) {
  test_fill_normal(x, seed, contents == LARGE ? 1000 : 0, contents == LARGE ? 30 : 2);
  if (contents == SPRINKLED)
    test_sprinkle(x, seed + 1);
}

/* A result to be written: another contents at first. */
static test_array result_like(const test_array *like, orepa_dtype dtype, test_layout layout) {
  test_array made = test_new(dtype, layout, like->a.rank, like->a.shape);
  test_fill_integers(&made, 1, -9, 9);
  return made;
}

/* ---- softmax ---- */

static void run_softmax(const orepa_device *device, bool logarithm, const test_array *y, const test_array *dx,
                        const test_array *x, const test_array *dy, const test_array *result) {
  device_context context = test_context(device);
  assert_int_equal(device->softmax_forward(&context, logarithm, &y->a, &x->a), DEVICE_DONE);
  assert_int_equal(device->softmax_backward(&context, logarithm, &dx->a, &dy->a, &result->a), DEVICE_DONE);
  test_context_free(&context);
}

static void check_softmax(bool logarithm, orepa_dtype dtype, const loss_shape *s, test_layout layout, int contents) {
  test_array x = test_new(dtype, layout, s->rank, s->shape), dy = test_copy(&x);
  fill(&x, contents, 3);
  fill(&dy, USUAL, 5);
  test_array y = result_like(&x, dtype, LAYOUT_DENSE), dx = test_copy(&y);
  run_softmax(ref_device(), logarithm, &y, &dx, &x, &dy, &y);
  for_each_isa(device) {
    test_array found_y = result_like(&x, dtype, layout), found_dx = test_copy(&found_y);
    omp_set_num_threads(1);
    run_softmax(device, logarithm, &found_y, &found_dx, &x, &dy, &y);
    expect(logarithm ? "log softmax" : "softmax", dtype, layout, &found_y, &y);
    expect(logarithm ? "dx of log softmax" : "dx of softmax", dtype, layout, &found_dx, &dx);
    for (int threads = 2; threads <= 3; threads++) {
      test_array again_y = result_like(&x, dtype, layout), again_dx = test_copy(&again_y);
      omp_set_num_threads(threads);
      run_softmax(device, logarithm, &again_y, &again_dx, &x, &dy, &y);
      assert_true(test_same(&again_y.a, &found_y.a));
      assert_true(test_same(&again_dx.a, &found_dx.a));
      test_release(&again_y);
      test_release(&again_dx);
    }
    test_release(&found_y);
    test_release(&found_dx);
  }
  test_array *all[] = {&x, &dy, &y, &dx};
  for (int k = 0; k < 4; k++)
    test_release(all[k]);
}

static const test_layout layouts[] = {LAYOUT_DENSE, LAYOUT_ROW_MAJOR, LAYOUT_PERMUTED, LAYOUT_GAPS};

static void softmax(void **unused) {
  (void)unused;
  for (int k = 0; k < SHAPES; k++)
    for (int kind = 0; kind < 2 * 2 * CONTENTS; kind++)
      for (int l = 0; l < 4; l++)
        check_softmax(kind & 1, kind & 2 ? OREPA_BFLOAT16 : OREPA_FLOAT32, &shapes[k], layouts[l], kind / 4);
}

/* Each row's largest is its own; a row of -infinity, of one infinity, of one NaN. */
static void softmax_of_extremes(void **unused) {
  (void)unused;
  int64_t shape[] = {4, 20};
  test_array x = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, shape), y = test_copy(&x);
  test_fill_normal(&x, 3, 0, 1);
  for (int64_t c = 0; c < 20; c++)
    test_set(&x.a, c, -INFINITY);
  test_set(&x.a, 20 + 7, INFINITY);
  test_set(&x.a, 40 + 19, NAN);
  test_set(&x.a, 60 + 3, -INFINITY);
  for_each_isa(device) {
    device_context context = test_context(device);
    assert_int_equal(device->softmax_forward(&context, false, &y.a, &x.a), DEVICE_DONE);
    for (int64_t c = 0; c < 20; c++) {
      assert_true(isnan(test_get(&y.a, c)) && isnan(test_get(&y.a, 20 + c)) && isnan(test_get(&y.a, 40 + c)));
      assert_true(c == 3 ? test_get(&y.a, 60 + c) == 0 : test_get(&y.a, 60 + c) > 0);
    }
    test_context_free(&context);
  }
  test_release(&x);
  test_release(&y);
}

/* ---- cross entropy ---- */

enum { IGNORED = 255 };

typedef struct {
  double smoothing;
  test_array logits, labels, dloss;
} loss_source;

typedef struct {
  test_array loss, logz, dlogits;
} loss_result;

/* Labels of which about `ignored` in eight are to be ignored. */
static loss_source make_source(orepa_dtype dtype, const loss_shape *s, test_layout layout, int contents,
                               double smoothing, uint64_t ignored) {
  uint64_t state = 9;
  loss_source source = {.smoothing = smoothing, .logits = test_new(dtype, layout, s->rank, s->shape)};
  fill(&source.logits, contents, 3);
  source.labels = test_new(OREPA_INT64, layout, s->rank - 1, s->shape);
  for (int64_t r = 0; r < test_count(&source.labels.a); r++) {
    uint64_t random = test_random(&state);
    test_set(&source.labels.a, r,
             random % 8 < ignored ? IGNORED : (double)(random / 8 % (uint64_t)s->shape[s->rank - 1]));
  }
  test_layout repeated = layout == LAYOUT_ROW_MAJOR && s->rank > 1 ? LAYOUT_REPEATED : layout;
  source.dloss = test_new(OREPA_FLOAT32, repeated, s->rank - 1, s->shape);
  test_fill_normal(&source.dloss, 4, 1, 0.3);
  return source;
}

static void free_source(loss_source *s) {
  test_release(&s->logits);
  test_release(&s->labels);
  test_release(&s->dloss);
}

static loss_result run_loss(const orepa_device *device, const loss_source *s, test_layout layout,
                            const test_array *logz, int threads) {
  device_context context = test_context(device);
  loss_result result = {result_like(&s->labels, OREPA_FLOAT32, layout), result_like(&s->labels, OREPA_FLOAT32, layout),
                        result_like(&s->logits, s->logits.a.dtype, layout)};
  omp_set_num_threads(threads);
  assert_int_equal(device->cross_entropy_forward(&context, s->smoothing, IGNORED, &result.loss.a, &result.logz.a,
                                                 &s->logits.a, &s->labels.a),
                   DEVICE_DONE);
  assert_true(context.offence_position < 0);
  assert_int_equal(device->cross_entropy_backward(&context, s->smoothing, IGNORED, &result.dlogits.a, &s->dloss.a,
                                                  &s->logits.a, &s->labels.a, logz ? &logz->a : &result.logz.a),
                   DEVICE_DONE);
  test_context_free(&context);
  return result;
}

static void free_result(loss_result *result) {
  test_release(&result->loss);
  test_release(&result->logz);
  test_release(&result->dlogits);
}

static void check_loss(orepa_dtype dtype, const loss_shape *s, test_layout layout, int contents, double smoothing,
                       uint64_t ignored) {
  loss_source source = make_source(dtype, s, layout, contents, smoothing, ignored);
  loss_result wanted = run_loss(ref_device(), &source, LAYOUT_DENSE, NULL, 1);
  for_each_isa(device) {
    loss_result found = run_loss(device, &source, layout, &wanted.logz, 1);
    expect("loss", OREPA_FLOAT32, layout, &found.loss, &wanted.loss);
    expect("logz", OREPA_FLOAT32, layout, &found.logz, &wanted.logz);
    expect("dlogits", dtype, layout, &found.dlogits, &wanted.dlogits);
    for (int threads = 2; threads <= 3; threads++) {
      loss_result again = run_loss(device, &source, layout, &wanted.logz, threads);
      assert_true(test_same(&again.loss.a, &found.loss.a));
      assert_true(test_same(&again.logz.a, &found.logz.a));
      assert_true(test_same(&again.dlogits.a, &found.dlogits.a));
      free_result(&again);
    }
    free_result(&found);
  }
  free_result(&wanted);
  free_source(&source);
}

static void cross_entropy(void **unused) {
  (void)unused;
  static const double smoothings[] = {0, 0.1, 1};
  for (int k = 0; k < SHAPES; k++)
    for (int l = 0; l < 4; l++)
      for (int n = 0; n < 3; n++)
        for (int contents = 0; contents < CONTENTS; contents++) {
          if (contents == SPRINKLED && smoothings[n] == 1)
            continue; /* 0 times an infinity: one may be NaN and the other not */
          check_loss(OREPA_FLOAT32, &shapes[k], layouts[l], contents, smoothings[n], 1);
          check_loss(OREPA_BFLOAT16, &shapes[k], layouts[l], contents, smoothings[n], 1);
        }
}

static void all_ignored(void **unused) {
  (void)unused;
  loss_source source = make_source(OREPA_FLOAT32, &shapes[0], LAYOUT_DENSE, SPRINKLED, 0.1, 8);
  for_each_isa(device) {
    loss_result found = run_loss(device, &source, LAYOUT_DENSE, NULL, 2);
    for (int64_t r = 0; r < test_count(&found.loss.a); r++)
      assert_true(test_get(&found.loss.a, r) == 0);
    for (int64_t k = 0; k < test_count(&found.dlogits.a); k++)
      assert_true(test_get(&found.dlogits.a, k) == 0);
    free_result(&found);
  }
  free_source(&source);
}

/* The lowest row whose label is none is reported, whichever thread meets it, and an earlier report stays. */
static void bad_labels(void **unused) {
  (void)unused;
  static const int64_t bad[][2] = {{700, -1}, {1999, 30}, {701, 9999}, {1300, INT64_MIN}};
  loss_shape s = {2, {2000, 30}};
  for_each_isa(device) for (int threads = 1; threads <= 3; threads++) {
    loss_source source = make_source(OREPA_FLOAT32, &s, LAYOUT_DENSE, USUAL, 0, 1);
    loss_result result = run_loss(device, &source, LAYOUT_DENSE, NULL, threads);
    for (int k = 0; k < 4; k++)
      ((int64_t *)source.labels.a.data)[bad[k][0]] = bad[k][1];
    device_context context = test_context(device);
    for (int again = 0; again < 2; again++) {
      assert_int_equal(device->cross_entropy_forward(&context, 0, IGNORED, &result.loss.a, &result.logz.a,
                                                     &source.logits.a, &source.labels.a),
                       DEVICE_DONE);
      assert_true(context.offence_position == 700 && context.offence == -1);
      ((int64_t *)source.labels.a.data)[3] = 31;
    }
    context.offence_position = -1;
    assert_int_equal(device->cross_entropy_forward(&context, 0, 31, &result.loss.a, &result.logz.a, &source.logits.a,
                                                   &source.labels.a),
                     DEVICE_DONE);
    assert_true(context.offence_position < 700 && context.offence == IGNORED);
    test_context_free(&context);
    free_result(&result);
    free_source(&source);
  }
}

static void types_it_leaves(void **unused) {
  (void)unused;
  int64_t shape[] = {3, 4};
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array x = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 2, shape), y = test_copy(&x);
    test_array labels = test_new(OREPA_INT64, LAYOUT_DENSE, 1, shape),
               loss = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, shape);
    test_fill_normal(&x, 1, 0, 1);
    assert_int_equal(device->softmax_forward(&context, false, &y.a, &x.a), DEVICE_UNSUPPORTED);
    assert_int_equal(device->softmax_backward(&context, false, &y.a, &x.a, &x.a), DEVICE_UNSUPPORTED);
    assert_int_equal(device->cross_entropy_forward(&context, 0, -1, &loss.a, &loss.a, &x.a, &labels.a),
                     DEVICE_UNSUPPORTED);
    assert_int_equal(device->cross_entropy_backward(&context, 0, -1, &y.a, &loss.a, &x.a, &labels.a, &loss.a),
                     DEVICE_UNSUPPORTED);
    for (int64_t k = 0; k < 12; k++)
      assert_true(test_get(&y.a, k) == 0);
    test_array *all[] = {&x, &y, &labels, &loss};
    for (int k = 0; k < 4; k++)
      test_release(all[k]);
    test_context_free(&context);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(softmax),     cmocka_unit_test(softmax_of_extremes), cmocka_unit_test(cross_entropy),
      cmocka_unit_test(all_ignored), cmocka_unit_test(bad_labels),          cmocka_unit_test(types_it_leaves),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
