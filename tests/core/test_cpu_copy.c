/* test_cpu_copy.c: copies, fills and random numbers of the cpu, for each instruction set, against ref and philox.h. */
#include <omp.h>

#include "kernel_test.h"
#include "philox.h"

typedef struct {
  int rank;
  int64_t shape[OREPA_MAX_RANK];
} test_shape;

static const test_shape shapes[] = {
    {0, {0}},
    {1, {0}},
    {1, {1}},
    {1, {137}},
    {2, {5, 0}},
    {2, {37, 50}},
    {3, {4, 33, 9}},
    {4, {2, 3, 17, 5}},
    {4, {2, 40, 6, 7}},
    {4, {3, 36, 1, 1}},
    {5, {2, 1, 3, 4, 2}},
    {6, {2, 3, 1, 2, 3, 2}},
};

enum { SHAPES = sizeof shapes / sizeof *shapes };

/* Values at the edges of the types: halves, subnormals, what saturates, what rounds to even. */
static void fill_edges(test_array *t, uint64_t seed) {
  static const double edges[] = {NAN,        INFINITY,
                                 -INFINITY,  0.0,
                                 -0.0,       0.5,
                                 -0.9,       255.5,
                                 256,        -1,
                                 65504,      65519.99,
                                 65520,      1e-8,
                                 0x1p-24,    0x1.8p-24,
                                 6e-5,       1e30,
                                 -3e9,       2147483647.5,
                                 1e19,       -1e19,
                                 1.00390625, 1.01171875,
                                 0x1.002p0,  0x1.0020000001p0,
                                 0x1.01p0,   3e-39,
                                 1e300,      2.5};
  for (int64_t k = 0; k < test_count(&t->a); k++) {
    uint64_t random = test_random(&seed);
    double edge = edges[random % (sizeof edges / sizeof *edges)];
    test_set(&t->a, k, random >> 32 & 1 ? edge : 100 * test_random_normal(&seed));
  }
}

static void test_every_pair(void **state) {
  (void)state;
  uint64_t seed = 1;
  for_each_isa(device) {
    device_context context = test_context(device);
    for (int to = 0; to < OREPA_DTYPES; to++)
      for (int from = 0; from < OREPA_DTYPES; from++)
        for (int s = 0; s < SHAPES; s++)
          for (test_layout other = LAYOUT_DENSE; other < LAYOUTS; other++) {
            test_layout layout = (seed + other) % (LAYOUT_GAPS + 1);
            test_array src = test_new(from, other, shapes[s].rank, shapes[s].shape);
            test_array got = test_new(to, layout, shapes[s].rank, shapes[s].shape), wanted = test_copy(&got);
            fill_edges(&src, seed++);
            assert_int_equal(ref_device()->copy(&context, &wanted.a, &src.a), DEVICE_DONE);
            assert_int_equal(device->copy(&context, &got.a, &src.a), DEVICE_DONE);
            if (!test_same(&got.a, &wanted.a))
              fail_msg("%s from %s, %s, layouts %d and %d", orepa_dtype_name(to), orepa_dtype_name(from),
                       shape_text(shapes[s].rank, shapes[s].shape), (int)layout, (int)other);
            assert_true(test_clean(&got));
            test_release(&src);
            test_release(&got);
            test_release(&wanted);
          }
  }
}

/* Large enough for threads. */
static void test_large(void **state) {
  (void)state;
  const int64_t shape[4] = {2, 33, 32, 33};
  int before = omp_get_max_threads();
  for_each_isa(device) {
    device_context context = test_context(device);
    for (int from = 0; from < OREPA_DTYPES; from++)
      for (test_layout layout = LAYOUT_DENSE; layout <= LAYOUT_GAPS; layout++)
        for (test_layout other = LAYOUT_DENSE; other <= LAYOUT_GAPS; other++) {
          test_array src = test_new(from, other, 4, shape);
          test_array got = test_new(from, layout, 4, shape);
          test_fill_integers(&src, (uint64_t)layout, 0, 200);
          omp_set_num_threads(1 + from % 3);
          assert_int_equal(device->copy(&context, &got.a, &src.a), DEVICE_DONE);
          assert_true(test_same(&got.a, &src.a));
          assert_true(test_clean(&got));
          test_release(&src);
          test_release(&got);
        }
  }
  omp_set_num_threads(before);
}

static void test_fills(void **state) {
  (void)state;
  const device_number numbers[] = {{0, 0}, {0.5, 0}, {-3.75, -3}, {1e6, 1000000}, {NAN, 0}, {0x1p53, (1ll << 53) + 1}};
  for_each_isa(device) {
    device_context context = test_context(device);
    for (int dtype = 0; dtype < OREPA_DTYPES; dtype++)
      for (int s = 0; s < SHAPES; s++)
        for (test_layout layout = LAYOUT_DENSE; layout <= LAYOUT_GAPS; layout++)
          for (size_t n = 0; n < sizeof numbers / sizeof *numbers; n++) {
            test_array got = test_new(dtype, layout, shapes[s].rank, shapes[s].shape), wanted = test_copy(&got);
            assert_int_equal(ref_device()->fill(&context, &wanted.a, numbers[n]), DEVICE_DONE);
            assert_int_equal(device->fill(&context, &got.a, numbers[n]), DEVICE_DONE);
            assert_true(test_same(&got.a, &wanted.a));
            assert_true(test_clean(&got));
            test_release(&got);
            test_release(&wanted);
          }
  }
}

static void check_random(const orepa_device *device, orepa_dtype dtype, test_layout layout, int rank,
                         const int64_t *shape, bool normal) {
  device_context context = test_context(device);
  const uint64_t seed = 0x123456789abcdefu, draw = 77;
  test_array got = test_new(dtype, layout, rank, shape), wanted = test_copy(&got);
  assert_int_equal(device->random(&context, &got.a, normal, seed, draw), DEVICE_DONE);
  for (int64_t k = 0; k < test_count(&got.a); k++)
    test_set(&wanted.a, k,
             dtype == OREPA_FLOAT64 ? philox_element_double(seed, draw, k, normal)
                                    : (double)philox_element_float(seed, draw, k, normal));
  assert_true(normal ? test_error(&got.a, &wanted.a) < (dtype == OREPA_FLOAT64 ? 1e-14 : 1e-7)
                     : test_same(&got.a, &wanted.a));
  assert_true(test_clean(&got));
  test_release(&got);
  test_release(&wanted);
}

static void test_random_numbers(void **state) {
  (void)state;
  const int64_t large[4] = {3, 20, 21, 22};
  int before = omp_get_max_threads();
  for_each_isa(device) for (int dtype = OREPA_FLOAT32; dtype <= OREPA_FLOAT64;
                            dtype += OREPA_FLOAT64 -
                                     OREPA_FLOAT32) for (test_layout layout = LAYOUT_DENSE; layout <= LAYOUT_GAPS;
                                                         layout++) for (int normal = 0; normal < 2; normal++) {
    for (int s = 0; s < SHAPES; s++)
      check_random(device, dtype, layout, shapes[s].rank, shapes[s].shape, normal);
    for (int threads = 1; threads <= 3; threads++) {
      omp_set_num_threads(threads);
      check_random(device, dtype, layout, 4, large, normal);
    }
  }
  omp_set_num_threads(before);
}

static void test_random_unsupported(void **state) {
  (void)state;
  const int64_t shape[1] = {3};
  for_each_isa(device) {
    device_context context = test_context(device);
    for (int dtype = 0; dtype < OREPA_DTYPES; dtype++) {
      test_array t = test_new(dtype, LAYOUT_DENSE, 1, shape);
      bool has = dtype == OREPA_FLOAT32 || dtype == OREPA_FLOAT64;
      assert_int_equal(device->random(&context, &t.a, false, 1, 1), has ? DEVICE_DONE : DEVICE_UNSUPPORTED);
      test_release(&t);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_pair),
      cmocka_unit_test(test_large),
      cmocka_unit_test(test_fills),
      cmocka_unit_test(test_random_numbers),
      cmocka_unit_test(test_random_unsupported),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
