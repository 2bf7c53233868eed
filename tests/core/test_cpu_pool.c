/* test_cpu_pool.c: the cpu's pools against ref's, forward and backward, on every instruction set that the machine has:
 * padding, dilation, windows that hang over the edge, adaptive ones that overlap, ties, NaN and infinities. */
#include "kernel_test.h"

#include <omp.h>

typedef struct {
  int64_t shape[4]; /* N, C, H, W */
  device_windows windows;
  int64_t outputs[2]; /* of adaptive windows */
} pool_case;

#define POOL(k, s, p, d, ceil, count)                                                                                  \
  { {{k, k}, {s, s}, {p, p}, {d, d}, ceil, count}, false }
#define ADAPTIVE                                                                                                       \
  { {{0}, {0}, {0}, {0}, false, false}, true }

static const pool_case cases[] = {
    {{3, 16, 14, 14}, POOL(3, 2, 1, 1, false, true), {0}}, /* the hot ones */
    {{2, 64, 28, 28}, POOL(3, 2, 1, 1, false, false), {0}},
    {{16, 512, 7, 7}, ADAPTIVE, {1, 1}},
    {{128, 128, 1, 1}, ADAPTIVE, {1, 1}},
    {{2, 3, 9, 11}, POOL(2, 2, 0, 1, false, true), {0}}, /* few channels, and numbers that fill no vector */
    {{2, 1, 8, 8}, POOL(3, 1, 1, 1, false, true), {0}},
    {{2, 37, 9, 7}, POOL(3, 2, 1, 1, false, true), {0}},
    {{1, 100, 10, 6}, POOL(3, 3, 0, 1, false, true), {0}},
    {{1, 19, 12, 12}, POOL(5, 1, 2, 1, false, true), {0}}, /* windows that overlap */
    {{2, 18, 6, 7}, POOL(3, 2, 0, 1, true, true), {0}},    /* windows that hang over the edge */
    {{2, 18, 6, 7}, POOL(3, 2, 1, 1, true, false), {0}},
    {{2, 18, 5, 8}, POOL(4, 3, 2, 1, true, true), {0}},
    {{2, 24, 12, 13}, POOL(3, 4, 1, 1, false, true), {0}}, /* positions in no window */
    {{1, 24, 1, 1}, POOL(1, 1, 0, 1, false, true), {0}},   /* sizes of one */
    {{1, 8, 1, 9}, POOL(3, 2, 1, 1, false, false), {0}},
    {{2, 20, 13, 16}, ADAPTIVE, {5, 6}}, /* windows of two sizes, more of them than positions, as many */
    {{2, 20, 3, 2}, ADAPTIVE, {7, 5}},
    {{2, 20, 4, 5}, ADAPTIVE, {4, 5}},
    {{0, 20, 4, 5}, POOL(3, 2, 1, 1, false, true), {0}}, /* nothing */
    {{2, 0, 4, 5}, POOL(3, 2, 1, 1, false, true), {0}},
    {{2, 4, 4, 5}, ADAPTIVE, {0, 3}},
};

/* These are for maxima only. */
static const pool_case dilated[] = {
    {{2, 20, 13, 16}, POOL(3, 1, 0, 2, false, true), {0}},
    {{2, 33, 13, 16}, POOL(3, 2, 1, 3, false, true), {0}},
    {{2, 9, 11, 10}, POOL(2, 3, 1, 4, true, true), {0}},
    {{1, 9, 2, 2}, POOL(2, 1, 1, 3, false, true), {0}}, /* windows that hold no element at all */
};

/* floor or ceil of (size + 2 padding - reach) / stride, + 1; the last window begins in the map or in its padding. */
static int64_t outputs_of(const orepa_pool *p, int axis, int64_t size) {
  int64_t room = size + 2 * p->padding[axis] - p->dilation[axis] * (p->kernel[axis] - 1) - 1;
  int64_t count = (room + (p->ceil_mode ? p->stride[axis] - 1 : 0)) / p->stride[axis] + 1;
  if (p->ceil_mode && (count - 1) * p->stride[axis] >= size + p->padding[axis])
    count--;
  return count;
}

static void output_shape(const pool_case *c, int64_t shape[4]) {
  for (int d = 0; d < 2; d++) {
    shape[d] = c->shape[d];
    shape[2 + d] = c->windows.adaptive ? c->outputs[d] : outputs_of(&c->windows.pool, d, c->shape[2 + d]);
  }
}

enum { Y_MAX, INDICES, DX_MAX, Y_AVERAGE, DX_AVERAGE, RESULTS };

typedef struct {
  test_array a[RESULTS];
} pool_result;

static void free_result(pool_result *result) {
  for (int k = 0; k < RESULTS; k++)
    test_release(&result->a[k]);
}

static pool_result run(const orepa_device *device, const pool_case *c, const test_array *x, const test_array *dy,
                       int threads) {
  device_context context = test_context(device);
  pool_result result;
  for (int k = 0; k < RESULTS; k++) {
    const test_array *like = k == DX_MAX || k == DX_AVERAGE ? x : dy;
    result.a[k] = test_new(k == INDICES ? OREPA_INT32 : like->a.dtype, LAYOUT_DENSE, 4, like->a.shape);
    test_fill_integers(&result.a[k], 1, -9, 9);
  }
  test_array again = test_copy(&result.a[Y_MAX]);
  device_array *y = &result.a[Y_MAX].a, *indices = &result.a[INDICES].a;
  omp_set_num_threads(threads);
  assert_int_equal(device->max_pool_forward(&context, &c->windows, y, indices, &x->a, NULL), DEVICE_DONE);
  assert_int_equal(device->max_pool_forward(&context, &c->windows, &again.a, NULL, &x->a, NULL), DEVICE_DONE);
  assert_true(test_same(y, &again.a));
  assert_int_equal(device->max_pool_backward(&context, &c->windows, &result.a[DX_MAX].a, &dy->a, indices), DEVICE_DONE);
  assert_int_equal(device->avg_pool_forward(&context, &c->windows, &result.a[Y_AVERAGE].a, &x->a), DEVICE_DONE);
  assert_int_equal(device->avg_pool_backward(&context, &c->windows, &result.a[DX_AVERAGE].a, &dy->a), DEVICE_DONE);
  test_release(&again);
  test_context_free(&context);
  return result;
}

static void compare(const pool_case *c, orepa_dtype dtype, bool averages, const pool_result *found,
                    const pool_result *wanted) {
  static const char *const names[] = {"largest", "indices", "dx of largest", "average", "dx of average"};
  for (int k = 0; k < (averages ? RESULTS : Y_AVERAGE); k++) {
    double error = test_error(&found->a[k].a, &wanted->a[k].a);
    bool exact = k == Y_MAX || k == INDICES;
    if (exact ? !test_same(&found->a[k].a, &wanted->a[k].a) : !(error <= (dtype == OREPA_FLOAT32 ? 1e-6 : 1e-2))) {
      print_error("%s of %s %s, kernel %d, stride %d, padding %d: error %g\n", names[k], orepa_dtype_name(dtype),
                  shape_text(4, c->shape), (int)c->windows.pool.kernel[0], (int)c->windows.pool.stride[0],
                  (int)c->windows.pool.padding[0], error);
      fail();
    }
    assert_true(test_clean(&found->a[k]));
  }
}

/* What a map is filled with: numbers, few different ones (ties), numbers among NaN and infinities, -infinity. */
enum { NUMBERS, TIES, SPRINKLED, LOWEST, CONTENTS };

static void fill(test_array *x, int contents, uint64_t seed) {
  if (contents == TIES)
    test_fill_integers(x, seed, -1, 1);
  else
    test_fill_normal(x, seed, 0.5, 1);
  if (contents == SPRINKLED)
    test_sprinkle(x, seed + 1);
  for (int64_t k = 0; contents == LOWEST && k < test_count(&x->a); k++)
    test_set(&x->a, k, -INFINITY);
}

static void check(const pool_case *c, orepa_dtype dtype, int contents, bool averages) {
  int64_t shape[4];
  output_shape(c, shape);
  test_array x = test_new(dtype, LAYOUT_DENSE, 4, c->shape), dy = test_new(dtype, LAYOUT_DENSE, 4, shape);
  fill(&x, contents, 3);
  fill(&dy, contents == LOWEST ? NUMBERS : contents, 4);
  pool_result wanted = run(ref_device(), c, &x, &dy, 1);
  for_each_isa(device) {
    pool_result found = run(device, c, &x, &dy, 1);
    compare(c, dtype, averages, &found, &wanted);
    for (int threads = 2; threads <= 3; threads++) {
      pool_result again = run(device, c, &x, &dy, threads);
      for (int k = 0; k < RESULTS; k++)
        assert_true(test_same(&again.a[k].a, &found.a[k].a));
      free_result(&again);
    }
    free_result(&found);
  }
  free_result(&wanted);
  test_release(&x);
  test_release(&dy);
}

static void windows(void **unused) {
  (void)unused;
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++)
    for (int contents = 0; contents < CONTENTS; contents++) {
      check(&cases[k], OREPA_FLOAT32, contents, true);
      check(&cases[k], OREPA_BFLOAT16, contents, true);
    }
}

static void dilation(void **unused) {
  (void)unused;
  for (size_t k = 0; k < sizeof dilated / sizeof *dilated; k++)
    for (int contents = 0; contents < CONTENTS; contents++) {
      check(&dilated[k], OREPA_FLOAT32, contents, false);
      check(&dilated[k], OREPA_BFLOAT16, contents, false);
    }
}

/* Height and width have their own kernel, stride and padding. */
static void oblong(void **unused) {
  (void)unused;
  pool_case c = {{2, 21, 10, 15}, {{{2, 5}, {1, 3}, {1, 0}, {1, 1}, false, false}, false}, {0}};
  check(&c, OREPA_FLOAT32, NUMBERS, true);
  c.windows.pool.ceil_mode = c.windows.pool.count_padding = true;
  check(&c, OREPA_FLOAT32, NUMBERS, true);
}

/* An average of ones is one, whatever the window. */
static void ones(void **unused) {
  (void)unused;
  int64_t shape[] = {1, 40, 13, 11}, outputs[] = {1, 40, 3, 2};
  device_windows adaptive = ADAPTIVE;
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array x = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, shape),
               y = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 4, outputs);
    test_fill_integers(&x, 1, 1, 1);
    assert_int_equal(device->avg_pool_forward(&context, &adaptive, &y.a, &x.a), DEVICE_DONE);
    for (int64_t k = 0; k < test_count(&y.a); k++)
      assert_true(test_get(&y.a, k) == 1);
    test_release(&x);
    test_release(&y);
    test_context_free(&context);
  }
}

static void types_it_leaves(void **unused) {
  (void)unused;
  int64_t shape[] = {1, 2, 3, 3}, outputs[] = {1, 2, 1, 1};
  device_windows adaptive = ADAPTIVE;
  for_each_isa(device) {
    device_context context = test_context(device);
    test_array x = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 4, shape),
               y = test_new(OREPA_FLOAT64, LAYOUT_DENSE, 4, outputs),
               indices = test_new(OREPA_INT32, LAYOUT_DENSE, 4, outputs);
    test_fill_normal(&x, 1, 0, 1);
    assert_int_equal(device->max_pool_forward(&context, &adaptive, &y.a, NULL, &x.a, NULL), DEVICE_UNSUPPORTED);
    assert_int_equal(device->avg_pool_forward(&context, &adaptive, &y.a, &x.a), DEVICE_UNSUPPORTED);
    assert_int_equal(device->max_pool_backward(&context, &adaptive, &x.a, &y.a, &indices.a), DEVICE_UNSUPPORTED);
    assert_int_equal(device->avg_pool_backward(&context, &adaptive, &x.a, &y.a), DEVICE_UNSUPPORTED);
    assert_true(test_get(&y.a, 0) == 0 && test_get(&y.a, 1) == 0);
    test_release(&x);
    test_release(&y);
    test_release(&indices);
    test_context_free(&context);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(windows), cmocka_unit_test(dilation),        cmocka_unit_test(oblong),
      cmocka_unit_test(ones),    cmocka_unit_test(types_it_leaves),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
