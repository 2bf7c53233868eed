/* test_autocast.c: the region in which ops cast to bfloat16: types, exact values and gradients on both devices, casts
 * that are kept and dropped, and who says whether bfloat16 pays. */
#include "engine_test.h"

#include "tensor/tensor.h"

static const orepa_conv points = {{1, 1}, {0, 0}, {1, 1}, 1};

static int force(void **unused) {
  (void)unused;
  return setenv("OREPA_BFLOAT16", "1", 1);
}

static int leave(void **unused) {
  (void)unused;
  return orepa_set_autocast(OREPA_FLOAT32) || unsetenv("OREPA_BFLOAT16");
}

static void the_region(void **unused) {
  (void)unused;
  assert_int_equal(orepa_autocast(), OREPA_FLOAT32);
  done(orepa_set_autocast(OREPA_BFLOAT16));
  assert_int_equal(orepa_autocast(), OREPA_BFLOAT16);
  assert_refused(orepa_set_autocast(OREPA_FLOAT16), "autocast: there is no float16, only bfloat16 and float32");
  assert_refused(orepa_set_autocast(OREPA_INT64), "int64");
  assert_int_equal(orepa_autocast(), OREPA_BFLOAT16);
}

static void whether_it_pays(void **unused) {
  (void)unused;
  for_each_device(device) {
    setenv("OREPA_BFLOAT16", "1", 1);
    assert_true(orepa_bfloat16_pays(device));
    setenv("OREPA_BFLOAT16", "0", 1);
    assert_false(orepa_bfloat16_pays(device));
  }
  unsetenv("OREPA_BFLOAT16");
  assert_false(orepa_bfloat16_pays(REF));
}

/* x (1, 1, 1, 257), w (2, 1, 1, 1), b (2), all of a few bits; dw sums up to numbers that bfloat16 doesn't have. */
typedef struct {
  orepa_tensor *x, *w, *b, *y;
} convolved;

static convolved convolve(const orepa_device *device) {
  convolved c = {wanting(full(device, SHAPE(1, 1, 1, 257), 1)), wanting(numbered(device, SHAPE(2, 1, 1, 1), 2)),
                 wanting(numbered(device, SHAPE(2), 1)), NULL};
  c.y = must(orepa_conv2d(c.x, c.w, c.b, &points));
  return c;
}

static void finish(convolved *c) {
  orepa_release(c->x);
  orepa_release(c->w);
  orepa_release(c->b);
  orepa_release(c->y);
}

static void convolution_casts_and_gradients_are_not_rounded(void **unused) {
  (void)unused;
  for_each_device(device) {
    done(orepa_set_autocast(OREPA_BFLOAT16));
    convolved c = convolve(device);
    assert_int_equal(orepa_tensor_dtype(c.y), OREPA_BFLOAT16);
    done(orepa_set_autocast(OREPA_FLOAT32));
    orepa_tensor *part = must(orepa_slice(c.y, 3, 256, 257, 1));
    assert_values(part, 3, 5);
    orepa_release(part);
    orepa_tensor *dy = must(orepa_full(OREPA_BFLOAT16, device, 4, orepa_shape(c.y), 1));
    done(orepa_backward(c.y, dy, false)); /* outside of the region */
    orepa_release(dy);
    orepa_tensor *leaves[] = {c.x, c.w, c.b};
    for (int k = 0; k < 3; k++)
      assert_int_equal(orepa_tensor_dtype(orepa_grad(leaves[k])), OREPA_FLOAT32);
    assert_values(orepa_grad(c.w), 257, 257);
    assert_values(orepa_grad(c.b), 257, 257);
    part = must(orepa_slice(orepa_grad(c.x), 3, 0, 1, 1));
    assert_values(part, 5);
    orepa_release(part);
    finish(&c);
  }
}

static void what_ends_a_network_is_float32(void **unused) {
  (void)unused;
  for_each_device(device) {
    done(orepa_set_autocast(OREPA_BFLOAT16));
    orepa_tensor *x = wanting(must(orepa_full(OREPA_BFLOAT16, device, SHAPE(1, 2, 1, 3), 1.5)));
    orepa_tensor *y = must(orepa_adaptive_avg_pool2d(x, 1, 1)), *p = must(orepa_softmax(y, 1));
    assert_int_equal(orepa_tensor_dtype(y), OREPA_FLOAT32);
    assert_int_equal(orepa_tensor_dtype(p), OREPA_FLOAT32);
    orepa_tensor *dy = full(device, SHAPE(1, 2, 1, 1), 3);
    done(orepa_backward(y, dy, false));
    assert_int_equal(orepa_tensor_dtype(orepa_grad(x)), OREPA_BFLOAT16);
    assert_values(orepa_grad(x), 1, 1, 1, 1, 1, 1);
    orepa_release(dy);
    orepa_release(p);
    orepa_release(y);
    orepa_release(x);
  }
}

static void where_it_does_not_pay_nothing_is_cast(void **unused) {
  (void)unused;
  setenv("OREPA_BFLOAT16", "0", 1);
  done(orepa_set_autocast(OREPA_BFLOAT16));
  for_each_device(device) {
    convolved c = convolve(device);
    assert_int_equal(orepa_tensor_dtype(c.y), OREPA_FLOAT32);
    assert_null(tensor_kept_cast(c.w, OREPA_BFLOAT16));
    finish(&c);
  }
}

static orepa_tensor *linear(orepa_tensor *x, orepa_tensor *w) {
  return must(orepa_linear(x, w, NULL));
}

static void a_cast_is_kept_until_the_parameter_is_written(void **unused) {
  (void)unused;
  done(orepa_set_autocast(OREPA_BFLOAT16));
  orepa_tensor *x = full(CPU, SHAPE(1, 2), 1), *w = full(CPU, SHAPE(2, 2), 3);
  orepa_tensor *y = linear(x, w), *kept = tensor_kept_cast(w, OREPA_BFLOAT16);
  assert_non_null(kept);
  assert_null(tensor_kept_cast(x, OREPA_BFLOAT16)); /* maps are used once */
  orepa_tensor *again = linear(x, w);
  assert_ptr_equal(tensor_kept_cast(w, OREPA_BFLOAT16), kept);
  assert_null(tensor_kept_cast(w, OREPA_FLOAT16));
  orepa_tensor *part = must(orepa_slice(w, 0, 0, 1, 1)), *less = linear(x, part);
  assert_null(tensor_kept_cast(part, OREPA_BFLOAT16)); /* it is of the whole */
  assert_values(less, 6);
  done(orepa_fill_(w, 4));
  assert_null(tensor_kept_cast(w, OREPA_BFLOAT16));
  orepa_tensor *later = linear(x, w);
  assert_values(y, 6, 6);
  assert_values(again, 6, 6);
  assert_values(later, 8, 8);
  orepa_tensor *all[] = {x, w, y, again, part, less, later};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    orepa_release(all[k]);
}

static void memory_that_runs_out_is_an_error(void **unused) {
  (void)unused;
  done(orepa_set_autocast(OREPA_BFLOAT16));
  orepa_tensor *x = full(CPU, SHAPE(1, 2048), 1), *w = wanting(full(CPU, SHAPE(2048, 2048), 1));
  orepa_empty_cache(CPU);
  size_t live = orepa_memory(CPU).live;
  orepa_set_memory_limit(CPU, live + (1 << 20)); /* the cast takes 8 MiB */
  assert_null(orepa_linear(x, w, NULL));
  assert_true(orepa_error_is_out_of_memory());
  assert_null(tensor_kept_cast(w, OREPA_BFLOAT16));
  assert_int_equal(orepa_memory(CPU).live, live);
  orepa_set_memory_limit(CPU, 0);
  orepa_release(linear(x, w));
  orepa_release(x);
  orepa_release(w);
}

int main(void) {
#define TEST(f) cmocka_unit_test_setup_teardown(f, force, leave)
  const struct CMUnitTest tests[] = {
      TEST(the_region),
      TEST(whether_it_pays),
      TEST(convolution_casts_and_gradients_are_not_rounded),
      TEST(what_ends_a_network_is_float32),
      TEST(where_it_does_not_pay_nothing_is_cast),
      TEST(a_cast_is_kept_until_the_parameter_is_written),
      TEST(memory_that_runs_out_is_an_error),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
