/* test_signals.c: signals come between kernels, never in one: neither on the thread that calls it nor on another. */
#include "engine_test.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

static pthread_t caller;
static volatile sig_atomic_t heard, elsewhere;

static void on_alarm(int number) {
  (void)number;
  heard++;
  elsewhere += !pthread_equal(pthread_self(), caller);
}

static void set_timer(int microseconds) {
  const struct itimerval timer = {{0, microseconds}, {0, microseconds}};
  assert_int_equal(setitimer(ITIMER_REAL, &timer, NULL), 0);
}

/* Products of this size once wrote over the heap when a signal came. */
static void products_are_whole_under_signals(void **state) {
  (void)state;
  enum { SIZE = 300, TIMES = 400 };
  struct sigaction action = {.sa_handler = on_alarm}, before;
  caller = pthread_self();
  sigaction(SIGALRM, &action, &before);
  set_timer(200);
  orepa_tensor *a = must(orepa_full(OREPA_FLOAT32, CPU, SHAPE(SIZE, SIZE), 1));
  for (int k = 0; k < TIMES; k++) {
    orepa_tensor *c = must(orepa_matmul(a, a)), *sum = must(orepa_reduce(OREPA_SUM, c, 0, NULL, false));
    float value;
    done(orepa_to_host(sum, &value, sizeof value));
    assert_true(value == (float)SIZE * SIZE * SIZE);
    orepa_release(sum);
    orepa_release(c);
  }
  set_timer(0);
  sigaction(SIGALRM, &before, NULL);
  orepa_release(a);
  assert_true(heard > 0);
  assert_int_equal(elsewhere, 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(products_are_whole_under_signals)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
