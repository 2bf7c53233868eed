/* test_cpu_index.c: gather and scatter on the cpu, for each instruction set, against ref: types, layouts, axes,
 * rows of tables, integers that are no position, any number of threads. */
#include "kernel_test.h"

#include <omp.h>

typedef struct {
  int axis, rank;
  int64_t index[OREPA_MAX_RANK], other[OREPA_MAX_RANK]; /* shapes: of the index, of what it points into */
} index_case;

static const index_case cases[] = {
    {0, 1, {7}, {5}},
    {0, 1, {0}, {5}},
    {0, 1, {3}, {1}},
    {0, 1, {1000}, {17}},
    {0, 2, {40, 33}, {11, 33}},
    {1, 2, {40, 3}, {40, 50}},
    {1, 2, {30, 9}, {40, 50}},
    {0, 2, {300, 700}, {20, 700}},
    {1, 3, {2, 5, 6}, {3, 4, 6}},
    {2, 3, {2, 3, 400}, {2, 3, 30}},
    {1, 4, {2, 9, 3, 5}, {2, 4, 3, 5}},
    {3, 4, {2, 3, 4, 7}, {2, 3, 5, 2}},
    {5, 6, {2, 1, 2, 1, 3, 4}, {2, 1, 2, 1, 3, 9}},
    {0, 2, {3, 0}, {4, 0}},
};

enum { CASES = sizeof cases / sizeof *cases };

/* The index repeats along every axis but its own for kinds 1 and 2: rows of a table. */
static test_array make_index(const index_case *c, int kind, uint64_t seed) {
  int64_t strides[OREPA_MAX_RANK] = {0}, shape[OREPA_MAX_RANK] = {0}, step = 1;
  for (int d = c->rank; d-- > 0;) {
    shape[d] = c->index[d];
    strides[d] = kind && d != c->axis ? 0 : step * (kind == 2 ? 3 : 1);
    step *= kind && d != c->axis ? 1 : shape[d] > 1 ? shape[d] : 1;
  }
  test_array index = test_new_strided(OREPA_INT64, c->rank, shape, strides);
  test_fill_integers(&index, seed, 0, c->other[c->axis] - 1);
  return index;
}

static void fill(test_array *t, uint64_t seed) {
  if (orepa_dtype_is_float(t->a.dtype))
    test_fill_normal(t, seed, 0, 2);
  else
    test_fill_integers(t, seed, -9, 9);
}

typedef enum { GATHER, SCATTER, SCATTER_ADD } entry;

static device_status call(device_context *context, entry e, int axis, const device_array *y, const device_array *x,
                          const device_array *index) {
  return e == GATHER ? context->device->gather(context, axis, y, x, index)
                     : context->device->scatter(context, e == SCATTER_ADD, axis, y, x, index);
}

/* Both devices with the same arrays. */
static void compare(const orepa_device *device, const index_case *c, orepa_dtype dtype, entry e, uint64_t seed) {
  device_context ref = test_context(ref_device()), cpu = test_context(device);
  test_array index = make_index(c, (int)(seed % 3), seed);
  test_array x = test_new(dtype, seed / 3 % LAYOUT_CHANNELS, c->rank, e ? c->index : c->other);
  test_array wanted = test_new(dtype, seed / 12 % LAYOUT_CHANNELS, c->rank, e ? c->other : c->index);
  fill(&x, seed + 1);
  fill(&wanted, seed + 2);
  test_array found = test_copy(&wanted);
  for (int k = 0; k < 2; k++) {
    device_context *context = k ? &cpu : &ref;
    const device_array *y = k ? &found.a : &wanted.a;
    assert_int_equal(call(context, e, c->axis, y, &x.a, &index.a), DEVICE_DONE);
    assert_int_equal(context->offence_position, -1);
  }
  if (e == SCATTER_ADD && orepa_dtype_is_float(dtype))
    assert_true(test_error(&found.a, &wanted.a) < 1e-5);
  else
    assert_true(test_same(&found.a, &wanted.a));
  assert_true(test_clean(&found));
  test_array *all[] = {&index, &x, &wanted, &found};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    test_release(all[k]);
  test_context_free(&ref);
  test_context_free(&cpu);
}

static void all_types_are_moved(void **unused) {
  (void)unused;
  static const orepa_dtype types[] = {OREPA_FLOAT32, OREPA_BFLOAT16, OREPA_FLOAT64, OREPA_INT64,
                                      OREPA_INT32,   OREPA_UINT8,    OREPA_BOOL};
  for (entry e = GATHER; e <= SCATTER; e++)
    for_each_isa(device) for (int k = 0; k < CASES; k++) for (size_t type = 0; type < sizeof types / sizeof *types;
                                                              type++) for (uint64_t seed = 0; seed < 6; seed++)
        compare(device, &cases[k], types[type], e, 17 * seed + type);
}

static void scatter_add_adds_up(void **unused) {
  (void)unused;
  static const orepa_dtype types[] = {OREPA_FLOAT32, OREPA_FLOAT64, OREPA_INT64};
  for_each_isa(device) for (int k = 0; k < CASES; k++) for (size_t type = 0; type < 3; type++) for (uint64_t seed = 0;
                                                                                                    seed < 12; seed++)
      compare(device, &cases[k], types[type], SCATTER_ADD, 7 * seed + type);
}

/* Sums in the order of the axis: the same bits with any number of threads. */
static void threads_change_nothing(void **unused) {
  (void)unused;
  const index_case c = {0, 2, {300, 700}, {20, 700}};
  for_each_isa(device) {
    test_array sums[3];
    for (int k = 0; k < 3; k++) {
      device_context context = test_context(device);
      test_array index = make_index(&c, 1, 5), x = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, c.index);
      sums[k] = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, c.other);
      fill(&x, 6);
      omp_set_num_threads(k + 1);
      assert_int_equal(device->scatter(&context, true, 0, &sums[k].a, &x.a, &index.a), DEVICE_DONE);
      assert_true(test_same(&sums[k].a, &sums[0].a));
      test_release(&index);
      test_release(&x);
      test_context_free(&context);
    }
    for (int k = 0; k < 3; k++)
      test_release(&sums[k]);
  }
  omp_set_num_threads(2);
}

/* The first one along the axis is told. Others are gathered as if it were not there; nothing is scattered. */
static void what_is_no_position_is_an_offence(void **unused) {
  (void)unused;
  const index_case c = {0, 2, {9, 4}, {5, 4}};
  for (entry e = GATHER; e <= SCATTER_ADD; e++)
    for (int kind = 0; kind < 2; kind++) {
      test_array x = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, e ? c.index : c.other), index = make_index(&c, kind, 3);
      fill(&x, 4);
      test_set(&index.a, 7 * 4 + 1, -1);
      test_set(&index.a, 6 * 4 + 2, 5);
      for_each_isa(device) {
        test_array found = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 2, e ? c.other : c.index);
        test_array fresh = test_copy(&found), before = test_copy(&found);
        for (int k = 0; k < 2; k++) {
          device_context context = test_context(k ? device : ref_device());
          const device_array *y = k ? &found.a : &fresh.a;
          assert_int_equal(call(&context, e, 0, y, &x.a, &index.a), DEVICE_DONE);
          assert_int_equal(context.offence_position, 6);
          assert_int_equal(context.offence, 5);
          test_context_free(&context);
        }
        assert_true(test_same(&found.a, &fresh.a));
        assert_true(e == GATHER || test_same(&found.a, &before.a));
        test_release(&found);
        test_release(&fresh);
        test_release(&before);
      }
      test_release(&x);
      test_release(&index);
    }
}

static void sums_of_short_floats_are_left(void **unused) {
  (void)unused;
  const int64_t shape[] = {3};
  test_array y = test_new(OREPA_BFLOAT16, LAYOUT_DENSE, 1, shape),
             index = test_new(OREPA_INT64, LAYOUT_DENSE, 1, shape);
  for_each_isa(device) {
    device_context context = test_context(device);
    assert_int_equal(device->scatter(&context, true, 0, &y.a, &y.a, &index.a), DEVICE_UNSUPPORTED);
    test_context_free(&context);
  }
  test_release(&y);
  test_release(&index);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(all_types_are_moved),           cmocka_unit_test(scatter_add_adds_up),
      cmocka_unit_test(threads_change_nothing),        cmocka_unit_test(what_is_no_position_is_an_offence),
      cmocka_unit_test(sums_of_short_floats_are_left),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
