/* test_cpu_interpolate.c: the cpu's interpolation against ref's, forward and backward, on every instruction set that
 * the machine has: larger and smaller maps, both modes, given scales, few channels, NaN and infinities. */
#include "kernel_test.h"

#include <omp.h>

typedef struct {
  int64_t shape[4], size[2];
  double scale[2];
} interpolate_case;

static const interpolate_case cases[] = {
    {{2, 64, 7, 9}, {14, 18}, {0}}, /* the hot ones */
    {{1, 64, 8, 8}, {32, 32}, {0}},
    {{2, 3, 9, 11}, {18, 22}, {0}}, /* few channels, and numbers that fill no vector */
    {{1, 1, 5, 4}, {13, 9}, {0}},
    {{1, 19, 6, 5}, {17, 7}, {0}},
    {{1, 100, 4, 6}, {7, 11}, {0}},
    {{2, 37, 10, 8}, {5, 4}, {0}}, /* smaller maps */
    {{1, 21, 13, 17}, {4, 3}, {0}},
    {{1, 18, 30, 30}, {1, 2}, {0}},
    {{2, 20, 5, 6}, {5, 6}, {0}}, /* as they are */
    {{2, 20, 1, 1}, {4, 5}, {0}}, /* sizes of one */
    {{1, 20, 1, 6}, {3, 1}, {0}},
    {{1, 8, 2, 2}, {5, 33}, {0}},
    {{1, 24, 7, 5}, {9, 6}, {1.3, 1.3}}, /* scales that are no quotient of the sizes */
    {{1, 24, 7, 5}, {4, 3}, {0.7, 0.75}},
    {{1, 24, 6, 6}, {6, 7}, {1.1, 1.2}},
    {{1, 33, 4, 4}, {40, 2}, {10, 0.5}},
    {{0, 20, 4, 5}, {8, 10}, {0}}, /* nothing */
    {{2, 0, 4, 5}, {8, 10}, {0}},
};

enum { NEAREST, BILINEAR, CORNERS, MODES };

static orepa_interpolation how_of(const interpolate_case *c, int mode) {
  return (orepa_interpolation){mode != NEAREST, mode == CORNERS, {c->scale[0], c->scale[1]}};
}

typedef struct {
  test_array y, dx;
} interpolate_result;

static void free_result(interpolate_result *r) {
  test_release(&r->y);
  test_release(&r->dx);
}

static interpolate_result run(const orepa_device *device, const interpolate_case *c, int mode, const test_array *x,
                              const test_array *dy, int threads) {
  device_context context = test_context(device);
  orepa_interpolation how = how_of(c, mode);
  interpolate_result r = {test_new(dy->a.dtype, LAYOUT_DENSE, 4, dy->a.shape),
                          test_new(x->a.dtype, LAYOUT_DENSE, 4, x->a.shape)};
  test_fill_integers(&r.y, 1, -9, 9);
  test_fill_integers(&r.dx, 1, -9, 9);
  omp_set_num_threads(threads);
  assert_int_equal(device->interpolate_forward(&context, &how, &r.y.a, &x->a), DEVICE_DONE);
  assert_int_equal(device->interpolate_backward(&context, &how, &r.dx.a, &dy->a), DEVICE_DONE);
  test_context_free(&context);
  return r;
}

static void compare(const interpolate_case *c, int mode, const char *what, const test_array *found,
                    const test_array *wanted, bool exact) {
  double error = test_error(&found->a, &wanted->a);
  if (exact ? !test_same(&found->a, &wanted->a) : !(error <= (found->a.dtype == OREPA_FLOAT32 ? 2e-6 : 1e-2))) {
    print_error("%s, mode %d, %s %s to %dx%d: error %g\n", what, mode, orepa_dtype_name(found->a.dtype),
                shape_text(4, c->shape), (int)c->size[0], (int)c->size[1], error);
    fail();
  }
  assert_true(test_clean(found));
}

static void check(const interpolate_case *c, int mode, orepa_dtype dtype, bool sprinkled) {
  int64_t shape[] = {c->shape[0], c->shape[1], c->size[0], c->size[1]};
  test_array x = test_new(dtype, LAYOUT_DENSE, 4, c->shape), dy = test_new(dtype, LAYOUT_DENSE, 4, shape);
  test_fill_normal(&x, 3, 0.5, 1);
  test_fill_normal(&dy, 4, 0.5, 1);
  if (sprinkled) {
    test_sprinkle(&x, 5);
    test_sprinkle(&dy, 6);
  }
  interpolate_result wanted = run(ref_device(), c, mode, &x, &dy, 1);
  for_each_isa(device) {
    interpolate_result found = run(device, c, mode, &x, &dy, 1);
    compare(c, mode, "y", &found.y, &wanted.y, mode == NEAREST);
    compare(c, mode, "dx", &found.dx, &wanted.dx, false);
    for (int threads = 2; threads <= 3; threads++) {
      interpolate_result again = run(device, c, mode, &x, &dy, threads);
      assert_true(test_same(&again.y.a, &found.y.a) && test_same(&again.dx.a, &found.dx.a));
      free_result(&again);
    }
    free_result(&found);
  }
  free_result(&wanted);
  test_release(&x);
  test_release(&dy);
}

static void maps(void **unused) {
  (void)unused;
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
    for (int mode = 0; mode < MODES; mode++)
      for (int sprinkled = 0; sprinkled < 2; sprinkled++) {
        check(&cases[k], mode, OREPA_FLOAT32, sprinkled);
        check(&cases[k], mode, OREPA_BFLOAT16, sprinkled);
      }
}

/* All small sizes, so that every way in which elements meet edges is there. */
static void small_sizes(void **unused) {
  (void)unused;
  for (int64_t in = 1; in <= 6; in++)
    for (int64_t out = 1; out <= 13; out++)
      for (int mode = 0; mode < MODES; mode++)
        check(&(interpolate_case){{1, 2, in, 7 - in}, {out, 14 - out}, {0}}, mode, OREPA_FLOAT32, false);
}

/* A map of ones stays one, and the gradient of a sum sums to the number of elements. */
static void ones(void **unused) {
  (void)unused;
  int64_t shape[] = {1, 40, 13, 11}, size[] = {1, 40, 29, 7};
  interpolate_case c = {{1, 40, 13, 11}, {29, 7}, {0}};
  test_array x = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, shape), dy = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, size);
  test_fill_integers(&x, 1, 1, 1);
  test_fill_integers(&dy, 1, 1, 1);
  for_each_isa(device) for (int mode = 0; mode < MODES; mode++) {
    interpolate_result r = run(device, &c, mode, &x, &dy, 2);
    double sum = 0;
    for (int64_t k = 0; k < test_count(&r.y.a); k++)
      assert_true(fabs(test_get(&r.y.a, k) - 1) <= 1e-6);
    for (int64_t k = 0; k < test_count(&r.dx.a); k++)
      sum += test_get(&r.dx.a, k);
    assert_true(fabs(sum - (double)test_count(&dy.a)) < 1e-2);
    free_result(&r);
  }
  test_release(&x);
  test_release(&dy);
}

static void types_it_leaves(void **unused) {
  (void)unused;
  int64_t shape[] = {1, 2, 3, 3}, size[] = {1, 2, 6, 6};
  orepa_interpolation how = {.bilinear = true};
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array x = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 4, shape), y = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 4, size);
    test_fill_normal(&x, 1, 0, 1);
    assert_int_equal(device->interpolate_forward(&context, &how, &y.a, &x.a), DEVICE_UNSUPPORTED);
    assert_int_equal(device->interpolate_backward(&context, &how, &x.a, &y.a), DEVICE_UNSUPPORTED);
    assert_true(test_get(&y.a, 0) == 0);
    test_release(&x);
    test_release(&y);
    test_context_free(&context);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(maps),
      cmocka_unit_test(small_sizes),
      cmocka_unit_test(ones),
      cmocka_unit_test(types_it_leaves),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
