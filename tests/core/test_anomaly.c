/* test_anomaly.c: the mode that names the op that made a number that is not finite, in forward and in backward. */
#include "engine_test.h"

#include "autograd/autograd.h"
#include "ops/ops.h"

static orepa_tensor *values(const orepa_device *device, float a, float b, float c) {
  return must(orepa_from_host(OREPA_FLOAT32, device, SHAPE(3), (float[]){a, b, c}));
}

static orepa_tensor *apply(const char *name, orepa_tensor *a, orepa_tensor *b) {
  return orepa_apply(orepa_function_by_name(name), (orepa_operand[]){{.tensor = a}, {.tensor = b}});
}

static int on(void **unused) {
  (void)unused;
  return orepa_set_anomaly(OREPA_ANOMALY_FINITE) != OREPA_ANOMALY_OFF;
}

static int off(void **unused) {
  (void)unused;
  return orepa_set_anomaly(OREPA_ANOMALY_OFF) == OREPA_ANOMALY_OFF;
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, on, off)

static void test_results_of_ops(void **unused) {
  (void)unused;
  size_t live = orepa_memory_live();
  for_each_device(device) {
    orepa_tensor *x = values(device, 1, 0, -2), *y = values(device, 1, 0, 4), *two = full(device, SHAPE(1, 3), 2);
    orepa_rng before = orepa_rng_state();
    assert_no_tensor(apply("log", x, NULL), "detect_anomaly: 'log' gives -inf at {2} of float32 3, and 1 more");
    assert_no_tensor(apply("div", two, y), "'div' gives inf at {1, 2} of float32 1x3");
    assert_no_tensor(apply("div", y, y), "'div' gives nan at {2} of float32 3");
    orepa_tensor *fine = must(apply("exp", x, NULL)), *is = must(apply("isfinite", x, NULL));
    bool was = orepa_set_grad_enabled(false); /* with a graph or without */
    assert_no_tensor(apply("log", y, NULL), "'log' gives -inf at {2} of float32 3");
    assert_refused(orepa_apply_in_place(orepa_function_by_name("log"), &OPERAND(y)), "'log' gives -inf at {2}");
    orepa_set_grad_enabled(was);
    assert_int_equal(orepa_rng_state().draws, before.draws);
    RELEASE(x, y, two, fine, is);
  }
  assert_int_equal(orepa_memory_live(), live);
}

static void test_what_came_in_is_told_apart(void **unused) {
  (void)unused;
  orepa_tensor *x = values(CPU, 1, INFINITY, NAN), *y = values(CPU, 1, 2, 3), *flags = must(apply("isfinite", x, NULL));
  assert_no_tensor(orepa_add(y, x),
                   "'add' gives inf at {2} of float32 3, and 1 more; its input 2 was not finite before: "
                   "inf at {2} of float32 3, and 1 more");
  orepa_tensor *copy = must(orepa_clone(x)), *part = must(orepa_slice(x, 0, 1, 3, 1)), *wide;
  orepa_tensor *large = must(orepa_full(OREPA_FLOAT64, CPU, SHAPE(2), 1e300));
  wide = must(orepa_to(x, OREPA_FLOAT64, CPU)); /* what only moves numbers made none */
  assert_no_tensor(orepa_to(large, OREPA_FLOAT32, CPU), "'to' gives inf at {1} of float32 2, and 1 more");
  orepa_tensor *chosen = must(orepa_apply(FUNCTION_where, (orepa_operand[]){OPERAND(flags), OPERAND(x), OPERAND(y)}));
  assert_values(chosen, 1, 2, 3); /* what is left out does no harm */
  RELEASE(x, y, flags, chosen, copy, part, wide, large);
}

static void test_nan_alone(void **unused) {
  (void)unused;
  orepa_tensor *zero = values(CPU, 1, 0, 0), *x = values(CPU, -1, -4, 1);
  orepa_set_anomaly(OREPA_ANOMALY_NAN);
  orepa_tensor *infinite = must(apply("log", zero, NULL));
  assert_no_tensor(apply("log", x, NULL), "'log' gives nan at {1} of float32 3, and 1 more");
  orepa_set_anomaly(OREPA_ANOMALY_OFF);
  orepa_tensor *any = must(apply("log", x, NULL));
  RELEASE(zero, x, infinite, any);
}

static void test_gradients(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(values(CPU, 4, 0, 1)), *three = full(CPU, SHAPE(3), 3);
  orepa_set_place("net.lua:12");
  orepa_tensor *root = must(apply("sqrt", x, NULL));
  orepa_set_place("net.lua:13");
  orepa_tensor *scaled = must(orepa_mul(root, three)), *sum = sum_of(scaled);
  assert_refused(orepa_backward(sum, NULL, true),
                 "detect_anomaly: the backward of 'sqrt' (called at net.lua:12) gives its "
                 "input 1 a gradient that has inf at {2} of float32 3");
  assert_null(orepa_grad(x));
  orepa_set_anomaly(OREPA_ANOMALY_OFF);
  done(orepa_backward(sum, NULL, true));
  orepa_set_anomaly(OREPA_ANOMALY_NAN);
  done(orepa_backward(sum, NULL, false));
  orepa_set_anomaly(OREPA_ANOMALY_FINITE);
  orepa_tensor *again = must(apply("sqrt", x, NULL)), *nan = values(CPU, 1, 1, NAN); /* the place is forgotten */
  assert_refused(orepa_backward(again, nan, true), "a sum of gradients, or what backward began with, at the result of "
                                                   "'sqrt' has nan at {3}");
  assert_refused(orepa_backward(again, three, false), "the backward of 'sqrt' gives its input 1");
  RELEASE(x, three, root, scaled, sum, again, nan);
}

/* Numbers that overflow only when they are added up. */
static void test_sums_of_gradients(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(2), 1)), *large = full(CPU, SHAPE(2), 3e38), *one = full(CPU, SHAPE(2), 1);
  orepa_tensor *h = must(orepa_mul(x, one)), *a = must(orepa_mul(h, one)), *b = must(orepa_mul(h, one));
  orepa_tensor *y = must(orepa_add(a, b));
  assert_refused(orepa_backward(y, large, false), "or what backward began with, at the result of 'mul' has inf at {1}");
  RELEASE(x, large, one, h, a, b, y);
}

/* Ops inside a backward function are not looked at one by one: its result is. */
static int detour_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  (void)node;
  orepa_tensor *zero = full(CPU, SHAPE(3), 0), *infinite = must(apply("log", zero, NULL));
  dx[0] = must(apply("exp", infinite, NULL)); /* 0 */
  (void)dy;
  RELEASE(zero, infinite);
  return 0;
}

static const autograd_op detour_op = {"detour", detour_backward, NULL};

static int call_log(void *unused, orepa_tensor *g, orepa_tensor **instead) {
  (void)unused;
  *instead = apply("log", g, NULL);
  return *instead ? 0 : -1;
}

static void test_inside_a_pass(void **unused) {
  (void)unused;
  static const orepa_hook_kind kind = {call_log, NULL};
  orepa_tensor *x = wanting(values(CPU, 1, 2, 3)), *y = must(orepa_detach(x)), *dy = full(CPU, SHAPE(3), 1);
  autograd_node *node;
  done(autograd_record(&detour_op, y, &x, 1, 0, 1, &node));
  done(orepa_backward(y, dy, true));
  assert_values(orepa_grad(x), 0, 0, 0);
  orepa_hook *h = orepa_register_hook(x, &kind, NULL);
  assert_refused(orepa_backward(y, dy, false), "'log' gives -inf at {1}"); /* in a callback they are the user's */
  orepa_hook_release(h);
  RELEASE(x, y, dy);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(test_results_of_ops), TEST(test_what_came_in_is_told_apart), cmocka_unit_test(test_nan_alone),
      TEST(test_gradients),      TEST(test_sums_of_gradients),          TEST(test_inside_a_pass),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
