/* test_long_graph.c: a million steps, on a stack that recursion would overflow at once. */
#include "engine_test.h"

#include <pthread.h>

enum { STEPS = 1000000, STACK = 256 << 10 };

static orepa_tensor *long_sum(orepa_tensor *x) {
  orepa_tensor *total = orepa_relu(x);
  for (int k = 0; total && k < STEPS; k++) {
    orepa_tensor *next = orepa_add(total, x);
    orepa_release(total);
    total = next;
  }
  return total;
}

/* Runs the pass, or (argument true) only frees the graph. */
static void *sum_a_million(void *argument) {
  const char *wrong = NULL;
  orepa_tensor *x = orepa_full(OREPA_FLOAT32, CPU, SHAPE(1), 1);
  if (!x || orepa_set_requires_grad(x, true))
    return (void *)"no leaf";
  orepa_tensor *y = long_sum(x);
  double value = 0, slope = 0;
  if (!y || orepa_item(y, &value) || value != STEPS + 1)
    wrong = "the sum";
  if (!argument && !wrong &&
      (orepa_backward(y, NULL, false) || orepa_item(orepa_grad(x), &slope) || slope != STEPS + 1))
    wrong = "the gradient";
  orepa_release(y);
  orepa_release(x);
  return (void *)(uintptr_t)wrong;
}

static void on_a_small_stack(void *argument) {
  const size_t live = orepa_memory_live();
  pthread_attr_t attributes;
  pthread_t thread;
  void *wrong;
  assert_int_equal(pthread_attr_init(&attributes), 0);
  assert_int_equal(pthread_attr_setstacksize(&attributes, STACK), 0);
  assert_int_equal(pthread_create(&thread, &attributes, sum_a_million, argument), 0);
  assert_int_equal(pthread_join(thread, &wrong), 0);
  assert_int_equal(pthread_attr_destroy(&attributes), 0);
  if (wrong)
    fail_msg("%s is wrong", (const char *)wrong);
  assert_int_equal(orepa_memory_live(), live);
}

static void test_a_sum_over_a_million_steps_runs_backward_without_recursion(void **unused) {
  (void)unused;
  on_a_small_stack(NULL);
}

static void test_a_sum_over_a_million_steps_is_freed_without_recursion(void **unused) {
  (void)unused;
  on_a_small_stack((void *)1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_a_sum_over_a_million_steps_runs_backward_without_recursion),
      cmocka_unit_test(test_a_sum_over_a_million_steps_is_freed_without_recursion),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
