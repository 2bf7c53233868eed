/* test_timings.c: the rows of where time goes, and the kernel behind the processor's rate. */
#include <pthread.h>

#include "engine_test.h"

#include "cpu/features.h"
#include "timings.h"

static orepa_timing row_at(int index) {
  orepa_timing row;
  assert_true(orepa_timing_at(index, &row));
  return row;
}

static void test_nothing_is_taken_while_off(void **unused) {
  (void)unused;
  orepa_timing row;
  orepa_set_timings(false);
  orepa_release(must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(3))));
  assert_false(orepa_timing_at(0, &row));
}

static void test_ops_are_taken_by_name_and_entry(void **unused) {
  (void)unused;
  orepa_timing row;
  orepa_tensor *x = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(3)));
  orepa_set_timings(true);
  for (int k = 0; k < 3; k++)
    orepa_release(must(orepa_relu(x)));
  orepa_set_timings(true);
  assert_false(orepa_timing_at(0, &row));
  for (int k = 0; k < 2; k++)
    orepa_release(must(orepa_relu(x)));
  row = row_at(0);
  assert_string_equal(row.op, "relu");
  assert_string_equal(row.entry, "elementwise");
  assert_string_equal(row.detail, "");
  assert_int_equal(row.calls, 2);
  assert_true(row.seconds > 0 && row.seconds < 60);
  assert_false(orepa_timing_at(1, &row) || orepa_timing_at(-1, &row));
  orepa_set_timings(false);
  orepa_release(x);
}

static void test_a_call_that_began_while_off_is_left_out(void **unused) {
  (void)unused;
  orepa_timing row;
  orepa_set_timings(true);
  timings_end("op", "entry");
  assert_false(orepa_timing_at(0, &row));
  timings_begin();
  timings_end("op", "entry");
  assert_int_equal(row_at(0).calls, 1);
  orepa_set_timings(false);
}

static void test_a_detail_is_that_of_one_call(void **unused) {
  (void)unused;
  orepa_set_timings(true);
  for (int k = 0; k < 2; k++) {
    if (k == 0)
      timings_detail("%d %s", 7, "and a text that goes on for longer than a row has room, which is seventy-two bytes");
    timings_begin();
    timings_end("op", "entry");
  }
  assert_int_equal(strlen(row_at(0).detail), sizeof row_at(0).detail - 1);
  assert_memory_equal(row_at(0).detail, "7 and a text", 12);
  assert_string_equal(row_at(1).detail, "");
  orepa_set_timings(false);
}

enum { THREADS = 4, CALLS = 2000 };

static void *call_often(void *detail) {
  for (int k = 0; k < CALLS; k++) {
    timings_detail("%s", (const char *)detail);
    timings_begin();
    timings_end("op", "entry");
  }
  return NULL;
}

static void test_threads_add_to_the_same_rows(void **unused) {
  (void)unused;
  static char *const details[THREADS] = {"a", "b", "a", "a"};
  pthread_t threads[THREADS];
  orepa_timing row;
  orepa_set_timings(true);
  for (int k = 0; k < THREADS; k++)
    assert_int_equal(pthread_create(&threads[k], NULL, call_often, details[k]), 0);
  for (int k = 0; k < THREADS; k++)
    pthread_join(threads[k], NULL);
  for (int k = 0; k < 2; k++)
    assert_int_equal(row_at(k).calls, row_at(k).detail[0] == 'a' ? 3 * CALLS : CALLS);
  assert_false(orepa_timing_at(2, &row));
  orepa_set_timings(false);
}

/* ---- the rate ---- */

double cpu_base_fma_chains(int64_t steps, float *value);
#ifdef __x86_64__
double cpu_avx2_fma_chains(int64_t steps, float *value);
double cpu_avx512_fma_chains(int64_t steps, float *value);
#endif

static void test_chains_do_the_work_that_they_count(void **unused) {
  (void)unused;
  static const struct {
    double (*chains)(int64_t, float *);
    int lanes;
  } sets[CPU_ISAS] = {
      [CPU_BASE] = {cpu_base_fma_chains, 4},
#ifdef __x86_64__
      [CPU_AVX2] = {cpu_avx2_fma_chains, 8},
      [CPU_AVX512] = {cpu_avx512_fma_chains, 16},
#endif
  };
  for (int isa = 0; isa < CPU_ISAS; isa++) {
    if (!cpu_isa_available((cpu_isa)isa))
      continue;
    float none = 0.5f, many = 0.5f; /* x = x/2 + 1 ends at 2, from 0 ... 11 */
    assert_true(sets[isa].chains(0, &none) == 0);
    assert_true(none == 66.0f * (float)sets[isa].lanes);
    assert_true(sets[isa].chains(100, &many) == 2.0 * 12 * sets[isa].lanes * 100);
    assert_true(many == 24.0f * (float)sets[isa].lanes);
  }
}

static void test_rate_wants_milliseconds(void **unused) {
  (void)unused;
  assert_true(orepa_fma_rate(1) > 0);
  for (int k = 0; k < 3; k++) {
    assert_true(orepa_fma_rate((int[]){0, -5, 1001}[k]) < 0);
    assert_non_null(strstr(orepa_error(), "fma_rate: 1 to 1000 milliseconds"));
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_nothing_is_taken_while_off),
      cmocka_unit_test(test_ops_are_taken_by_name_and_entry),
      cmocka_unit_test(test_a_call_that_began_while_off_is_left_out),
      cmocka_unit_test(test_a_detail_is_that_of_one_call),
      cmocka_unit_test(test_threads_add_to_the_same_rows),
      cmocka_unit_test(test_chains_do_the_work_that_they_count),
      cmocka_unit_test(test_rate_wants_milliseconds),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
