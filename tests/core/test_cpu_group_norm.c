/* test_cpu_group_norm.c: the cpu's group norm against ref's, forward and backward, on every instruction set that the
 * machine has: maps of many rows and of one (layer norm), odd channels, means far from zero. */
#include "kernel_test.h"

#include <omp.h>

typedef struct {
  int64_t shape[4], groups;
} norm_case;

static const norm_case cases[] = {
    {{2, 64, 14, 14}, 32}, {{1, 256, 28, 28}, 32}, /* the hot ones */
    {{300, 96, 1, 1}, 1},  {{17, 768, 1, 1}, 1},   {{2, 6, 5, 7}, 3},
    {{3, 37, 3, 5}, 1}, /* numbers that fill no vector */
    {{2, 37, 9, 4}, 37},   {{1, 3, 40, 33}, 3},    {{1, 12, 31, 37}, 4},
    {{5, 4100, 1, 1}, 2},                     /* several chunks, long rows */
    {{9, 15, 1, 1}, 5},    {{4, 7, 1, 1}, 7}, /* groups of few elements */
    {{1, 1, 1, 1}, 1},     {{1, 1, 2, 1}, 1}, /* sizes of one */
    {{2, 4, 1, 2}, 2},     {{0, 8, 3, 3}, 2}, /* nothing */
    {{0, 8, 1, 1}, 2},     {{2, 8, 0, 3}, 2},      {{2, 0, 3, 3}, 2},
};

enum { Y, MEAN, INVERSE, DX, DWEIGHT, DBIAS, RESULTS };

typedef struct {
  test_array a[RESULTS];
} norm_result;

static void free_result(norm_result *r) {
  for (int k = 0; k < RESULTS; k++)
    test_release(&r->a[k]);
}

typedef struct {
  test_array x, dy, weight, bias;
  bool affine;
} norm_inputs;

static norm_inputs inputs_of(const norm_case *c, orepa_dtype dtype, double mean, bool affine) {
  norm_inputs in = {test_new(dtype, LAYOUT_DENSE, 4, c->shape), test_new(dtype, LAYOUT_DENSE, 4, c->shape),
                    test_new(OREPA_FLOAT32, LAYOUT_GAPS, 1, &c->shape[1]),
                    test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, &c->shape[1]), affine};
  test_fill_normal(&in.x, 1, mean, 2);
  test_fill_normal(&in.dy, 2, 0.25, 1);
  test_fill_normal(&in.weight, 3, 1, 0.5);
  test_fill_normal(&in.bias, 4, 0, 1);
  return in;
}

static void free_inputs(norm_inputs *in) {
  test_release(&in->x);
  test_release(&in->dy);
  test_release(&in->weight);
  test_release(&in->bias);
}

static norm_result run(const orepa_device *device, const norm_case *c, const norm_inputs *in, int threads) {
  device_context context = test_context(device);
  int64_t statistics[] = {c->shape[0], c->groups};
  orepa_dtype dtype = in->x.a.dtype;
  norm_result r = {{test_new(dtype, LAYOUT_DENSE, 4, c->shape), test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, statistics),
                    test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, statistics), test_new(dtype, LAYOUT_DENSE, 4, c->shape),
                    test_new(OREPA_FLOAT32, LAYOUT_GAPS, 1, &c->shape[1]),
                    test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, &c->shape[1])}};
  for (int k = 0; k < RESULTS; k++)
    test_fill_integers(&r.a[k], 1, -9, 9);
  const device_array *weight = in->affine ? &in->weight.a : NULL, *bias = in->affine ? &in->bias.a : NULL;
  omp_set_num_threads(threads);
  assert_int_equal(
      device->group_norm_forward(&context, 1e-5, &r.a[Y].a, &r.a[MEAN].a, &r.a[INVERSE].a, &in->x.a, weight, bias),
      DEVICE_DONE);
  assert_int_equal(device->group_norm_backward(&context, &r.a[DX].a, &r.a[DWEIGHT].a, &r.a[DBIAS].a, &in->dy.a,
                                               &in->x.a, &r.a[MEAN].a, &r.a[INVERSE].a, weight),
                   DEVICE_DONE);
  test_context_free(&context);
  return r;
}

/* In a group of one element or two dx is what is left of numbers that are much larger, by which the error is measured.
 */
static double small_error(const norm_result *found, const norm_result *wanted) {
  double difference = 0, inverse = 0;
  for (int64_t k = 0; k < test_count(&wanted->a[DX].a); k++)
    difference = fmax(difference, fabs(test_get(&found->a[DX].a, k) - test_get(&wanted->a[DX].a, k)));
  for (int64_t k = 0; k < test_count(&wanted->a[INVERSE].a); k++)
    inverse = fmax(inverse, test_get(&wanted->a[INVERSE].a, k));
  return difference / inverse;
}

static void compare(const norm_case *c, const norm_result *found, const norm_result *wanted, double limit) {
  static const char *const names[] = {"y", "mean", "inverse", "dx", "dweight", "dbias"};
  int64_t elements = c->shape[0] * c->shape[1] * c->shape[2] * c->shape[3];
  bool small = elements && elements <= 2 * c->shape[0] * c->groups;
  for (int k = 0; k < RESULTS; k++) {
    double error = small && k == DX ? small_error(found, wanted) : test_error(&found->a[k].a, &wanted->a[k].a);
    if (!(error <= limit)) {
      print_error("%s of %s %s in %d groups: error %g\n", names[k], orepa_dtype_name(found->a[Y].a.dtype),
                  shape_text(4, c->shape), (int)c->groups, error);
      fail();
    }
    assert_true(test_clean(&found->a[k]));
  }
}

static void check(const norm_case *c, orepa_dtype dtype, double mean, bool affine, double limit) {
  norm_inputs in = inputs_of(c, dtype, mean, affine);
  norm_result wanted = run(ref_device(), c, &in, 1);
  for_each_isa(device) {
    norm_result found = run(device, c, &in, 1);
    compare(c, &found, &wanted, limit);
    for (int threads = 2; threads <= 3; threads++) {
      norm_result again = run(device, c, &in, threads);
      for (int k = 0; k < RESULTS; k++)
        assert_true(test_same(&again.a[k].a, &found.a[k].a));
      free_result(&again);
    }
    free_result(&found);
  }
  free_result(&wanted);
  free_inputs(&in);
}

static void groups(void **unused) {
  (void)unused;
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
    for (int affine = 0; affine < 2; affine++) {
      check(&cases[k], OREPA_FLOAT32, 0.5, affine, 1e-5);
      check(&cases[k], OREPA_BFLOAT16, 0.5, affine, 1.5e-2);
    }
}

/* The mean is 500 times the deviation: squares of it would leave nothing of the variance. */
static void far_from_zero(void **unused) {
  (void)unused;
  const norm_case far[] = {{{2, 64, 14, 14}, 8}, {{40, 768, 1, 1}, 1}, {{1, 6, 30, 50}, 2}};
  for (size_t k = 0; k < sizeof far / sizeof *far; k++)
    check(&far[k], OREPA_FLOAT32, 1000, true, 2e-4);
}

/* What is not wanted is not written, and changes nothing else. */
static void parts(void **unused) {
  (void)unused;
  const norm_case some[] = {{{2, 6, 5, 7}, 3}, {{9, 15, 1, 1}, 5}};
  for (size_t k = 0; k < 2; k++)
    for_each_isa(device) {
      device_context context = test_context(device);
      norm_inputs in = inputs_of(&some[k], OREPA_FLOAT32, 0, true);
      norm_result all = run(device, &some[k], &in, 1);
      for (int part = DX; part < RESULTS; part++) {
        test_array alone = test_copy(&all.a[part]);
        test_fill_integers(&alone, 1, -9, 9);
        assert_int_equal(device->group_norm_backward(&context, part == DX ? &alone.a : NULL,
                                                     part == DWEIGHT ? &alone.a : NULL, part == DBIAS ? &alone.a : NULL,
                                                     &in.dy.a, &in.x.a, &all.a[MEAN].a, &all.a[INVERSE].a,
                                                     &in.weight.a),
                         DEVICE_DONE);
        assert_true(test_same(&alone.a, &all.a[part].a));
        test_release(&alone);
      }
      free_result(&all);
      free_inputs(&in);
      test_context_free(&context);
    }
}

/* A NaN spoils its own group of its own image, and no other. */
static void not_a_number(void **unused) {
  (void)unused;
  const norm_case some[] = {{{2, 4, 3, 3}, 2}, {{3, 40, 1, 1}, 2}};
  for (size_t k = 0; k < 2; k++)
    for_each_isa(device) {
      norm_inputs in = inputs_of(&some[k], OREPA_FLOAT32, 0, true);
      test_set(&in.x.a, 1, NAN);
      norm_result r = run(device, &some[k], &in, 1);
      int64_t image = test_count(&r.a[Y].a) / some[k].shape[0];
      for (int64_t n = 0; n < test_count(&r.a[Y].a); n++)
        assert_int_equal(!!isnan(test_get(&r.a[Y].a, n)), n < image / 2);
      free_result(&r);
      free_inputs(&in);
    }
}

static void types_it_leaves(void **unused) {
  (void)unused;
  int64_t shape[] = {1, 2, 3, 3}, statistics[] = {1, 1};
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array x = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 4, shape), y = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 4, shape),
               m = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 2, statistics);
    assert_int_equal(device->group_norm_forward(&context, 0, &y.a, &m.a, &m.a, &x.a, NULL, NULL), DEVICE_UNSUPPORTED);
    assert_int_equal(device->group_norm_backward(&context, &y.a, NULL, NULL, &x.a, &x.a, &m.a, &m.a, NULL),
                     DEVICE_UNSUPPORTED);
    test_release(&x);
    test_release(&y);
    test_release(&m);
    test_context_free(&context);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(groups),       cmocka_unit_test(far_from_zero),   cmocka_unit_test(parts),
      cmocka_unit_test(not_a_number), cmocka_unit_test(types_it_leaves),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
