/* test_tensor.c: tensors: making, memory and versions, copies and the way to the host, and what is refused. Views have
 * a file of their own (test_view.c), and so have conversions (test_convert.c). */
#include "engine_test.h"

#include "tensor/tensor.h"

/* ---- types ---- */

static void test_types_have_names_and_sizes(void **unused) {
  (void)unused;
  static const struct {
    const char *name;
    orepa_dtype dtype;
    size_t size;
    bool is_float;
  } known[OREPA_DTYPES] = {
      {"float32", OREPA_FLOAT32, 4, true}, {"bfloat16", OREPA_BFLOAT16, 2, true}, {"float16", OREPA_FLOAT16, 2, true},
      {"float64", OREPA_FLOAT64, 8, true}, {"int64", OREPA_INT64, 8, false},      {"int32", OREPA_INT32, 4, false},
      {"uint8", OREPA_UINT8, 1, false},    {"bool", OREPA_BOOL, 1, false},
  };
  for (int k = 0; k < OREPA_DTYPES; k++) {
    orepa_dtype dtype = OREPA_DTYPES;
    done(orepa_dtype_by_name(known[k].name, &dtype));
    assert_int_equal(dtype, known[k].dtype);
    assert_string_equal(orepa_dtype_name(dtype), known[k].name);
    assert_int_equal(orepa_dtype_size(dtype), known[k].size);
    assert_int_equal(orepa_dtype_is_float(dtype), known[k].is_float);
  }
  orepa_dtype dtype;
  assert_refused(orepa_dtype_by_name("float", &dtype), "no type is called 'float'");
  assert_refused(orepa_dtype_by_name("", &dtype), "no type is called ''");
  assert_no_tensor(orepa_device_by_name("gpu"), "no device is called 'gpu'");
}

/* ---- making ---- */

static void test_every_type_is_made_and_filled(void **unused) {
  (void)unused;
  for_each_device(device) {
    for (int dtype = 0; dtype < OREPA_DTYPES; dtype++) {
      orepa_tensor *t = must(orepa_full(dtype, device, SHAPE(2, 3), 1));
      assert_int_equal(orepa_tensor_dtype(t), dtype);
      assert_ptr_equal(orepa_tensor_device(t), device);
      assert_shape(t, 2, 3);
      assert_int_equal(orepa_count(t), 6);
      assert_true(orepa_is_contiguous(t) && orepa_is_leaf(t) && !orepa_requires_grad(t) && !orepa_grad(t));
      assert_values(t, 1, 1, 1, 1, 1, 1);
      done(orepa_fill_(t, 0));
      assert_values(t, 0, 0, 0, 0, 0, 0);
      orepa_release(t);
    }
  }
}

static void expect_full(const orepa_device *device, orepa_dtype dtype, double value, double wanted) {
  orepa_tensor *t = must(orepa_full(dtype, device, SHAPE(3), value));
  assert_values(t, wanted, wanted, wanted);
  orepa_release(t);
}

/* As a conversion of the number would: rounded to nearest even, or toward zero, saturating. */
static void test_fill_converts_its_number(void **unused) {
  (void)unused;
  for_each_device(device) {
    expect_full(device, OREPA_FLOAT64, 0.1, 0.1);
    expect_full(device, OREPA_FLOAT32, 0.1, (double)0.1f);
    expect_full(device, OREPA_BFLOAT16, 1.01171875, 1.015625);
    expect_full(device, OREPA_FLOAT16, 65519, 65504);
    expect_full(device, OREPA_FLOAT16, 65520, INFINITY);
    expect_full(device, OREPA_INT64, -2.9, -2);
    expect_full(device, OREPA_INT64, 1e30, 0x1p63);
    expect_full(device, OREPA_INT64, -INFINITY, -0x1p63);
    expect_full(device, OREPA_INT64, NAN, 0);
    expect_full(device, OREPA_INT32, 3e9, INT32_MAX);
    expect_full(device, OREPA_INT32, -1e300, INT32_MIN);
    expect_full(device, OREPA_UINT8, 255.9, 255);
    expect_full(device, OREPA_UINT8, 1e20, 255);
    expect_full(device, OREPA_UINT8, -1, 0);
    expect_full(device, OREPA_BOOL, 0.25, 1);
    expect_full(device, OREPA_BOOL, NAN, 1);
    expect_full(device, OREPA_BOOL, -0.0, 0);
  }
}

static void test_a_new_tensor_is_dense_and_channels_last_for_rank_4(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t[] = {full(device, SHAPE(5), 0),
                         full(device, SHAPE(2, 5), 0),
                         full(device, SHAPE(2, 3, 5), 0),
                         full(device, SHAPE(2, 3, 5, 7), 0),
                         full(device, SHAPE(2, 3, 1, 5, 7), 0),
                         full(device, SHAPE(2, 3, 1, 5, 7, 2), 0)};
    assert_strides(t[0], 1);
    assert_strides(t[1], 5, 1);
    assert_strides(t[2], 15, 5, 1);
    assert_strides(t[3], 105, 1, 21, 3);
    assert_strides(t[4], 105, 35, 35, 7, 1);
    assert_strides(t[5], 210, 70, 70, 14, 2, 1);
    for (int k = 0; k < 6; k++) {
      assert_true(orepa_is_contiguous(t[k]));
      orepa_release(t[k]);
    }
  }
}

/* The host gives and gets logical order, whatever the order in memory. */
static void test_memory_of_rank_4_holds_the_channels_last(void **unused) {
  (void)unused;
  orepa_tensor *t = numbered(CPU, SHAPE(1, 2, 2, 3), 0);
  assert_values(t, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11);
  device_array array;
  done(tensor_reads(t, &array));
  static const float in_memory[12] = {0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11};
  assert_memory_equal(array.data, in_memory, sizeof in_memory);
  orepa_release(t);
}

static void test_sizes_of_zero_and_rank_zero(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *none = full(device, SHAPE(2, 0, 3), 1), *one = full(device, SCALAR, 7);
    assert_shape(none, 2, 0, 3);
    assert_int_equal(orepa_count(none), 0);
    assert_true(orepa_is_contiguous(none));
    done(orepa_to_host(none, NULL, 0));
    orepa_tensor *part = must(orepa_slice(none, 2, 1, 3, 1)), *copy = must(orepa_clone(part));
    assert_shape(copy, 2, 0, 2);
    done(orepa_fill_(part, 1)); /* an offset into no memory at all */
    assert_int_equal(orepa_rank(one), 0);
    assert_int_equal(orepa_count(one), 1);
    double x = 0;
    int64_t n = 0;
    done(orepa_item(one, &x));
    done(orepa_item_int64(one, &n));
    assert_true(x == 7 && n == 7);
    orepa_tensor *made[] = {none, one, part, copy};
    for (int k = 0; k < 4; k++)
      orepa_release(made[k]);
  }
}

static void test_arange_counts_in_every_type(void **unused) {
  (void)unused;
  for_each_device(device) {
    for (int dtype = 0; dtype < OREPA_BOOL; dtype++) {
      orepa_tensor *t = must(orepa_arange(dtype, device, 2, 3, 4)), *none = must(orepa_arange(dtype, device, 0, 1, 0));
      assert_values(t, 2, 5, 8, 11);
      assert_shape(none, 0);
      orepa_release(t);
      orepa_release(none);
    }
    orepa_tensor *t = must(orepa_arange(OREPA_FLOAT64, device, 1, -0.125, 3001)); /* more than a piece of it */
    double values[MOST_VALUES];
    read_values(t, values);
    for (int k = 0; k < 3001; k++)
      assert_true(values[k] == 1 - 0.125 * k);
    orepa_release(t);
    assert_no_tensor(orepa_arange(OREPA_FLOAT32, device, 0, 1, -1), "-1");
    assert_no_tensor(orepa_arange(OREPA_FLOAT32, device, 0, 1, (int64_t)1 << 61), "2305843009213693952");
    assert_no_tensor(orepa_arange(OREPA_FLOAT32, device, 0, 1, (int64_t)1 << 50), "out of memory");
  }
}

/* ---- memory: a size from the start, bytes from the first door on ---- */

static void test_memory_comes_with_the_first_read_or_write(void **unused) {
  (void)unused;
  for_each_device(device) {
    for (int writes = 0; writes < 2; writes++) {
      size_t live = orepa_memory(device).live;
      orepa_tensor *t = must(tensor_new(OREPA_FLOAT32, device, SHAPE(1000, 1000)));
      orepa_tensor *view = must(orepa_select(t, 0, 3));
      assert_int_equal(t->storage->bytes, 4000000);
      assert_null(t->storage->memory);
      assert_int_equal(orepa_memory(device).live, live);
      device_array array;
      done((writes ? tensor_writes : tensor_reads)(view, &array));
      assert_ptr_equal(array.data, (char *)t->storage->memory + 3 * 4000);
      assert_int_equal(orepa_version(t), writes);
      assert_in_range(orepa_memory(device).live, live + 4000000, live + 4500000);
      orepa_release(t);
      assert_true(orepa_memory(device).live > live); /* the view holds it */
      orepa_release(view);
      assert_int_equal(orepa_memory(device).live, live);
    }
  }
}

static void test_empty_has_its_memory_at_once(void **unused) {
  (void)unused;
  size_t live = orepa_memory(CPU).live;
  orepa_tensor *t = must(orepa_empty(OREPA_FLOAT32, CPU, SHAPE(1000, 1000)));
  assert_true(orepa_memory(CPU).live >= live + 4000000);
  assert_int_equal(orepa_version(t), 0);
  orepa_release(orepa_retain(t)); /* a second reference */
  assert_true(orepa_memory(CPU).live >= live + 4000000);
  orepa_release(t);
  assert_int_equal(orepa_memory(CPU).live, live);
  orepa_release(NULL);
}

/* ---- versions ---- */

/* Every way to write raises the version by at least one for all views, and reading does not. */
static void test_every_write_raises_the_version_that_views_share(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = numbered(device, SHAPE(4, 3), 0), *row = numbered(device, SHAPE(3), 9);
    orepa_tensor *view = must(orepa_select(t, 0, 1)), *detached = must(orepa_detach(t)), *copy = must(orepa_clone(t));
    orepa_tensor *target[] = {t, view, detached};
    orepa_operand operands[2] = {{.tensor = NULL}, {.number = 2}};
    uint64_t before = orepa_version(t), copied = orepa_version(copy);
    for (int k = 0; k < 3; k++)
      for (int way = 0; way < 4; way++) {
        if (k == 1 && way == 2) /* a row has no rows */
          continue;
        operands[0].tensor = target[k];
        done(way == 0   ? orepa_fill_(target[k], 1)
             : way == 1 ? orepa_copy_(target[k], row)
             : way == 2 ? orepa_assign_(target[k], 0, 0, 1, row)
                        : orepa_apply_in_place(orepa_function_by_name("mul"), operands));
        assert_true(orepa_version(t) > before);
        assert_true(orepa_version(view) == orepa_version(t) && orepa_version(detached) == orepa_version(t));
        before = orepa_version(t);
      }
    double values[12];
    read_values(t, values);
    orepa_release(must(orepa_add(t, view)));
    orepa_release(must(orepa_reshape(t, SHAPE(12))));
    assert_true(orepa_version(t) == before && orepa_version(copy) == copied);
    assert_true(orepa_shares_storage(t, view) && orepa_shares_storage(t, detached) && !orepa_shares_storage(t, copy));
    orepa_tensor *made[] = {t, row, view, detached, copy};
    for (int k = 0; k < 5; k++)
      orepa_release(made[k]);
  }
}

/* An optimizer's step and running statistics are writes too. */
static void test_kernels_with_several_results_raise_all_versions(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *p = full(device, SHAPE(3), 1), *g = full(device, SHAPE(3), 1), *v = full(device, SHAPE(3), 0);
    uint64_t versions[3] = {orepa_version(p), orepa_version(g), orepa_version(v)};
    done(orepa_sgd_step(1, &p, &g, &v, (double[]){0.5}, (double[]){0}, &(orepa_sgd_options){.momentum = 0.5}));
    assert_true(orepa_version(p) > versions[0] && orepa_version(g) == versions[1] && orepa_version(v) > versions[2]);
    assert_values(p, 0.5, 0.5, 0.5);
    orepa_tensor *x = numbered(device, SHAPE(4, 3), 0), *mean = full(device, SHAPE(3), 0);
    versions[0] = orepa_version(x), versions[1] = orepa_version(mean), versions[2] = orepa_version(v);
    const orepa_norm norm = {.eps = 1e-5, .momentum = 0.5, .training = true};
    orepa_release(must(orepa_batch_norm(x, NULL, NULL, mean, v, &norm)));
    assert_true(orepa_version(x) == versions[0]);
    assert_true(orepa_version(mean) > versions[1] && orepa_version(v) > versions[2]);
    orepa_tensor *made[] = {p, g, v, x, mean};
    for (int k = 0; k < 5; k++)
      orepa_release(made[k]);
  }
}

/* ---- copies ---- */

static void test_clone_to_and_contiguous(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = numbered(device, SHAPE(2, 3), 0), *turned = must(orepa_transpose(t, 0, 1));
    orepa_tensor *clone = must(orepa_clone(turned)), *same = must(orepa_to(t, OREPA_FLOAT32, device));
    orepa_tensor *dense = must(orepa_contiguous(turned)), *itself = must(orepa_contiguous(t));
    assert_ptr_equal(same, t);
    assert_ptr_equal(itself, t);
    assert_false(orepa_is_contiguous(turned));
    assert_strides(clone, 2, 1);
    assert_strides(dense, 2, 1);
    assert_values(clone, 0, 3, 1, 4, 2, 5);
    assert_values(dense, 0, 3, 1, 4, 2, 5);
    done(orepa_fill_(t, 9)); /* they are copies */
    assert_values(clone, 0, 3, 1, 4, 2, 5);
    assert_values(dense, 0, 3, 1, 4, 2, 5);
    orepa_tensor *made[] = {t, turned, clone, same, dense, itself};
    for (int k = 0; k < 6; k++)
      orepa_release(made[k]);
  }
}

/* Every type, layouts that are not dense, and conversion on the way. */
static void test_copies_between_devices(void **unused) {
  (void)unused;
  for_each_device(device) {
    const orepa_device *other = device == CPU ? REF : CPU;
    for (int dtype = 0; dtype < OREPA_BOOL; dtype++) {
      orepa_tensor *source = numbered(device, SHAPE(1, 2, 3, 2), 0), *t = must(orepa_to(source, dtype, device));
      orepa_tensor *view = must(orepa_permute(t, AXES(3, 1, 0, 2))), *there = must(orepa_to(view, dtype, other));
      orepa_tensor *wide = must(orepa_to(view, OREPA_FLOAT64, other)), *target = full(other, SHAPE(2, 2, 1, 3), 0);
      assert_ptr_equal(orepa_tensor_device(there), other);
      assert_int_equal(orepa_tensor_dtype(there), dtype);
      assert_true(orepa_is_contiguous(there) && !orepa_shares_storage(there, t));
      done(orepa_copy_(target, view)); /* across devices as well */
      orepa_tensor *results[] = {there, wide, target};
      for (int k = 0; k < 3; k++) {
        assert_values(results[k], 0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11);
        orepa_release(results[k]);
      }
      orepa_release(source);
      orepa_release(t);
      orepa_release(view);
    }
  }
}

/* Whoever holds the tensor sees it at its new place, with its gradient; views stay where they were. */
static void test_move_in_place(void **unused) {
  (void)unused;
  orepa_tensor *t = wanting(numbered(CPU, SHAPE(2, 2), 1)), *view = must(orepa_detach(t));
  orepa_tensor *grad = numbered(CPU, SHAPE(2, 2), 5);
  done(orepa_set_grad(t, grad));
  uint64_t version = orepa_version(t);
  done(orepa_move_(t, OREPA_FLOAT64, REF));
  assert_int_equal(orepa_tensor_dtype(t), OREPA_FLOAT64);
  assert_ptr_equal(orepa_tensor_device(t), REF);
  assert_true(orepa_version(t) > version && orepa_requires_grad(t));
  assert_values(t, 1, 2, 3, 4);
  assert_int_equal(orepa_tensor_dtype(orepa_grad(t)), OREPA_FLOAT64);
  assert_ptr_equal(orepa_tensor_device(orepa_grad(t)), REF);
  assert_values(orepa_grad(t), 5, 6, 7, 8);
  assert_values(view, 1, 2, 3, 4);
  assert_ptr_equal(orepa_tensor_device(view), CPU);
  assert_refused(orepa_move_(t, OREPA_INT32, REF), "can't become int32");
  orepa_tensor *y = must(orepa_relu(t));
  assert_refused(orepa_move_(y, OREPA_FLOAT32, REF), "(float64 2x2) was computed by 'relu'");
  orepa_tensor *made[] = {t, view, grad, y};
  for (int k = 0; k < 4; k++)
    orepa_release(made[k]);
}

/* ---- what is refused: NULL or -1, and a message that shows the shapes ---- */

static void test_shapes_that_no_tensor_has(void **unused) {
  (void)unused;
  const int64_t seven[7] = {1, 1, 1, 1, 1, 1, 1}, huge = INT64_MAX;
  for_each_device(device) {
    for (int dtype = 0; dtype < OREPA_DTYPES; dtype++) {
      assert_no_tensor(orepa_empty(dtype, device, 7, seven), "at most 6 dimensions, not 7");
      assert_no_tensor(orepa_empty(dtype, device, -1, seven), "at most 6 dimensions, not -1");
      assert_no_tensor(orepa_full(dtype, device, SHAPE(2, -3), 0), "a size is negative: 2x-3");
      assert_no_tensor(orepa_from_host(dtype, device, SHAPE(-1), seven), "a size is negative: -1");
      assert_no_tensor(orepa_empty(dtype, device, SHAPE(huge, 2)), "9223372036854775807x2 is too large to address");
      assert_no_tensor(orepa_empty(dtype, device, SHAPE(0, huge, huge)), "0x9223372036854775807x92233");
      assert_no_tensor(orepa_empty(dtype, device, SHAPE(4294967296, 4294967296)), "4294967296x4294967296");
    }
    assert_no_tensor(orepa_empty(OREPA_INT64, device, SHAPE(huge / 8 + 1)), "1152921504606846976 is too large");
  }
}

static void test_wrong_buffers_and_numbers(void **unused) {
  (void)unused;
  orepa_tensor *t = numbered(CPU, SHAPE(2, 3), 0), *none = full(CPU, SHAPE(0), 0);
  float few[6];
  double x;
  int64_t n;
  assert_refused(orepa_to_host(t, few, sizeof few - 1), "a buffer of 23 bytes for a tensor of 24 (float32 2x3)");
  assert_refused(orepa_item(t, &x), "a tensor of 2x3 is not a single number");
  assert_refused(orepa_item_int64(t, &n), "a tensor of 2x3 is not a single number");
  assert_refused(orepa_item(none, &x), "a tensor of 0 is not a single number");
  orepa_release(t);
  orepa_release(none);
}

static void test_operands_that_do_not_go_together(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *a = full(device, SHAPE(2, 3), 1), *b = full(device, SHAPE(2, 4), 1);
    orepa_tensor *whole = must(orepa_full(OREPA_INT64, device, SHAPE(2, 3), 1));
    orepa_tensor *away = full(device == CPU ? REF : CPU, SHAPE(2, 3), 1);
    assert_no_tensor(orepa_add(a, b), "add: shapes 2x3 and 2x4 don't broadcast");
    assert_no_tensor(orepa_mul(a, whole), "mul: float32 and int64 don't mix");
    assert_no_tensor(orepa_add(a, away), "add: one tensor is on '");
    assert_refused(orepa_copy_(a, b), "2x4 does not broadcast to 2x3");
    assert_refused(orepa_assign_(a, 0, 1, 3, b), "positions 2 to 3");
    assert_refused(orepa_assign_(a, 2, 0, 1, b), "there is no axis 3 in a tensor of rank 2");
    assert_refused(orepa_assign_(a, 0, 0, 1, b), "does not broadcast to 1x3");
    orepa_tensor *parts[2] = {a, b};
    assert_no_tensor(orepa_concatenate(2, parts, 0), "part 1 is float32 2x3 on");
    assert_no_tensor(orepa_concatenate(0, parts, 0), "nothing to put together");
    assert_no_tensor(orepa_pad(a, (int64_t[]){0, -4}, (int64_t[]){0, 2}, (orepa_operand){0}), "(input 2x3)");
    assert_no_tensor(orepa_matmul(a, b), "2x4");
    orepa_tensor *y = must(orepa_add(a, a)); /* nothing of this did any harm */
    assert_values(y, 2, 2, 2, 2, 2, 2);
    orepa_tensor *made[] = {a, b, whole, away, y};
    for (int k = 0; k < 5; k++)
      orepa_release(made[k]);
  }
}

/* A message stays until the next failure, and belongs to the thread. */
static void test_messages_stay(void **unused) {
  (void)unused;
  orepa_tensor *t = full(CPU, SHAPE(2), 1);
  assert_no_tensor(orepa_select(t, 0, 5), "select");
  assert_false(orepa_error_is_out_of_memory());
  orepa_release(must(orepa_add(t, t)));
  assert_non_null(strstr(orepa_error(), "select"));
  assert_no_tensor(orepa_empty(OREPA_UINT8, CPU, SHAPE((int64_t)1 << 60)), "1152921504606846976 bytes wanted");
  assert_true(orepa_error_is_out_of_memory());
  assert_no_tensor(orepa_select(t, 0, 5), "select");
  assert_false(orepa_error_is_out_of_memory());
  orepa_release(t);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_types_have_names_and_sizes),
      cmocka_unit_test(test_every_type_is_made_and_filled),
      cmocka_unit_test(test_fill_converts_its_number),
      cmocka_unit_test(test_a_new_tensor_is_dense_and_channels_last_for_rank_4),
      cmocka_unit_test(test_memory_of_rank_4_holds_the_channels_last),
      cmocka_unit_test(test_sizes_of_zero_and_rank_zero),
      cmocka_unit_test(test_arange_counts_in_every_type),
      cmocka_unit_test(test_memory_comes_with_the_first_read_or_write),
      cmocka_unit_test(test_empty_has_its_memory_at_once),
      cmocka_unit_test(test_every_write_raises_the_version_that_views_share),
      cmocka_unit_test(test_kernels_with_several_results_raise_all_versions),
      cmocka_unit_test(test_clone_to_and_contiguous),
      cmocka_unit_test(test_copies_between_devices),
      cmocka_unit_test(test_move_in_place),
      cmocka_unit_test(test_shapes_that_no_tensor_has),
      cmocka_unit_test(test_wrong_buffers_and_numbers),
      cmocka_unit_test(test_operands_that_do_not_go_together),
      cmocka_unit_test(test_messages_stay),
  };
  RUN_GUARDED_AND_NOT(tests);
}
