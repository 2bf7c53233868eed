/* test_cpu_sgd.c: the cpu's gradient descent step against ref's, on every instruction set that the machine has:
 * parameters of all sizes side by side, with and without velocities, with rates of their own. */
#include "kernel_test.h"

#include <omp.h>

/* Sizes of parameters: many small ones, empty ones, and some that are cut into pieces. */
static const int64_t sizes[] = {16,   16, 0,   1,    3, 8191,  8192, 8193, 70001, 64, 64, 64,    64,
                                2304, 0,  300, 4097, 5, 40000, 2,    1,    16,    16, 16, 16384, 0};
enum { ITEMS = sizeof sizes / sizeof *sizes, STEPS = 3 };

typedef struct {
  test_array parameters[ITEMS], gradients[ITEMS], velocities[ITEMS];
  device_sgd_item items[ITEMS];
} sgd_state;

static void make_state(sgd_state *s, bool velocities) {
  for (int n = 0; n < ITEMS; n++) {
    uint64_t seed = (uint64_t)n * 3;
    test_array *made[] = {&s->parameters[n], &s->gradients[n], &s->velocities[n]};
    for (int k = 0; k < 3; k++) {
      *made[k] = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, &sizes[n]);
      test_fill_normal(made[k], seed + (uint64_t)k, 0.1, 1);
    }
    s->items[n] = (device_sgd_item){s->parameters[n].a, s->gradients[n].a, s->velocities[n].a, 0.1 / (n + 1), 1e-4 * n};
    if (!velocities)
      s->items[n].velocity.data = NULL;
  }
}

static void free_state(sgd_state *s) {
  for (int n = 0; n < ITEMS; n++) {
    test_release(&s->parameters[n]);
    test_release(&s->gradients[n]);
    test_release(&s->velocities[n]);
  }
}

static void run(const orepa_device *device, const orepa_sgd_options *options, sgd_state *s, bool velocities,
                int threads) {
  device_context context = test_context(device);
  make_state(s, velocities);
  omp_set_num_threads(threads);
  for (int step = 0; step < STEPS; step++)
    assert_int_equal(device->sgd(&context, options, ITEMS, s->items), DEVICE_DONE);
  test_context_free(&context);
}

static void check(double momentum, bool nesterov, bool velocities) {
  static sgd_state wanted, found, again;
  orepa_sgd_options options = {momentum, nesterov};
  run(ref_device(), &options, &wanted, velocities, 1);
  for_each_isa(device) {
    run(device, &options, &found, velocities, 1);
    for (int threads = 2; threads <= 3; threads++) {
      run(device, &options, &again, velocities, threads);
      for (int n = 0; n < ITEMS; n++) {
        assert_true(test_same(&found.parameters[n].a, &again.parameters[n].a));
        assert_true(test_same(&found.velocities[n].a, &again.velocities[n].a));
      }
      free_state(&again);
    }
    for (int n = 0; n < ITEMS; n++) {
      assert_true(test_error(&found.parameters[n].a, &wanted.parameters[n].a) < 1e-6);
      assert_true(test_error(&found.velocities[n].a, &wanted.velocities[n].a) < 1e-6);
      assert_true(test_same(&found.gradients[n].a, &wanted.gradients[n].a));
      assert_true(test_clean(&found.parameters[n]) && test_clean(&found.velocities[n]));
    }
    free_state(&found);
  }
  free_state(&wanted);
}

static void steps(void **unused) {
  (void)unused;
  for (int nesterov = 0; nesterov < 2; nesterov++) {
    check(0, nesterov, false);
    check(0, nesterov, true);
    check(0.9, nesterov, true);
  }
}

static void kernels_and_scalars(void **unused) {
  (void)unused;
  int64_t shape[] = {5, 3, 3, 3};
  orepa_sgd_options options = {.momentum = 0};
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array kernel = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, shape), gradient = test_copy(&kernel);
    test_array scalar = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 0, NULL), slope = test_copy(&scalar);
    test_fill_normal(&gradient, 1, 0, 1);
    test_set(&slope.a, 0, 3);
    device_sgd_item items[] = {{kernel.a, gradient.a, {.data = NULL}, 0.5, 0},
                               {scalar.a, slope.a, {.data = NULL}, 2, 0}};
    assert_int_equal(device->sgd(&context, &options, 2, items), DEVICE_DONE);
    for (int64_t k = 0; k < test_count(&kernel.a); k++)
      assert_true(test_get(&kernel.a, k) == -0.5 * test_get(&gradient.a, k));
    assert_true(test_get(&scalar.a, 0) == -6);
    assert_int_equal(device->sgd(&context, &options, 0, NULL), DEVICE_DONE);
    test_array *all[] = {&kernel, &gradient, &scalar, &slope};
    for (int k = 0; k < 4; k++)
      test_release(all[k]);
    test_context_free(&context);
  }
}

static void types_it_leaves(void **unused) {
  (void)unused;
  int64_t size = 5;
  orepa_sgd_options options = {.momentum = 0};
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array good = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, &size),
               other = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 1, &size);
    test_fill_normal(&good, 1, 0, 1);
    test_array before = test_copy(&good);
    device_sgd_item items[] = {{good.a, good.a, {.data = NULL}, 0.5, 0}, {other.a, other.a, {.data = NULL}, 2, 0}};
    assert_int_equal(device->sgd(&context, &options, 2, items), DEVICE_UNSUPPORTED);
    assert_true(test_same(&good.a, &before.a));
    test_release(&good);
    test_release(&other);
    test_release(&before);
    test_context_free(&context);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(steps),
      cmocka_unit_test(kernels_and_scalars),
      cmocka_unit_test(types_it_leaves),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
