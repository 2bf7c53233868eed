/* test_cpu_matmul.c: the cpu's matrix products against ref's: batches with all sorts of strides, bias, short floats,
 * empty arrays; and the product that our own kernels use. */
#include "kernel_test.h"

#include "cpu/matmul.h"

static int64_t between(uint64_t *state, int64_t low, int64_t high) {
  return low + (int64_t)(test_random(state) % (uint64_t)(high - low + 1));
}

/* A batch of matrices whose layout is a choice: dense, turned, with gaps, rows apart, or one matrix repeated. */
static test_array matrices(orepa_dtype dtype, int choice, int64_t batch, int64_t rows, int64_t columns, uint64_t seed) {
  int64_t shape[] = {batch, rows, columns}, all = rows * columns;
  const int64_t strides[][3] = {
      {all, columns, 1}, {all, 1, rows}, {4 * all, 4 * columns, 2},     {rows * (columns + 3), columns + 3, 1},
      {0, columns, 1},   {0, 1, rows},   {columns, batch * columns, 1}, {all, columns, 0},
      {all, -columns, 1}};
  test_array t = test_new_strided(dtype, 3, shape, strides[choice]);
  test_fill_normal(&t, seed, 0, 1);
  return t;
}
enum { CHOICES = 9 };

static void check(orepa_dtype dtype, int a_choice, int b_choice, int64_t batch, int64_t m, int64_t n, int64_t k,
                  int bias, uint64_t seed) {
  int64_t shape[] = {batch, m, n};
  device_context cpu = test_context(cpu_device()), ref = test_context(ref_device());
  test_array a = matrices(dtype, a_choice, batch, m, k, seed), b = matrices(dtype, b_choice, batch, k, n, seed + 1);
  test_array added = test_new(dtype, bias == 2 ? LAYOUT_GAPS : LAYOUT_DENSE, 1, &n);
  test_array found = test_new(dtype, LAYOUT_DENSE, 3, shape), wanted = test_copy(&found);
  test_fill_normal(&added, seed + 2, 0, 1);
  test_fill_normal(&found, seed + 3, 0, 1);
  device_status status = cpu.device->matmul(&cpu, &found.a, &a.a, &b.a, bias ? &added.a : NULL);
  if (status == DEVICE_FAILED)
    print_error("%s\n", orepa_error());
  assert_int_equal(status, DEVICE_DONE);
  assert_int_equal(ref.device->matmul(&ref, &wanted.a, &a.a, &b.a, bias ? &added.a : NULL), DEVICE_DONE);
  double error = test_error(&found.a, &wanted.a);
  if (!(error <= (dtype == OREPA_FLOAT32 ? 1e-5 : 1e-2))) {
    print_error("%s, layouts %d and %d, %d times %dx%d . %dx%d, bias %d: error %g\n", orepa_dtype_name(dtype), a_choice,
                b_choice, (int)batch, (int)m, (int)k, (int)k, (int)n, bias, error);
    fail();
  }
  assert_true(test_clean(&found));
  test_release(&a);
  test_release(&b);
  test_release(&added);
  test_release(&found);
  test_release(&wanted);
  test_context_free(&cpu);
  test_context_free(&ref);
}

static void batches(void **unused) {
  (void)unused;
  uint64_t state = 1;
  for (int k = 0; k < 600; k++) {
    int64_t batch = between(&state, 1, 9), m = between(&state, 1, 40), n = between(&state, 1, 40);
    check(k % 4 ? OREPA_FLOAT32 : OREPA_BFLOAT16, k % CHOICES, k / CHOICES % CHOICES, batch, m, n,
          between(&state, 1, 40), k % 3, (uint64_t)k);
  }
}

static void sizes_of_one_and_zero(void **unused) {
  (void)unused;
  for (int layouts = 0; layouts < CHOICES * CHOICES; layouts++)
    for (int sizes = 0; sizes < 16; sizes++)
      for (int64_t small = 0; small < 2; small++)
        check(layouts % 5 ? OREPA_FLOAT32 : OREPA_BFLOAT16, layouts % CHOICES, layouts / CHOICES, sizes & 1 ? 3 : small,
              sizes & 2 ? 5 : small, sizes & 4 ? 6 : small, sizes & 8 ? 7 : small, layouts % 3, (uint64_t)layouts);
}

static void large(void **unused) {
  (void)unused;
  check(OREPA_FLOAT32, 0, 1, 1, 128, 10, 512, 1, 1);
  check(OREPA_FLOAT32, 1, 0, 1, 256, 128, 300, 0, 2);
  check(OREPA_FLOAT32, 0, 4, 6, 50, 64, 64, 1, 3);
  check(OREPA_FLOAT32, 6, 1, 12, 64, 64, 32, 0, 4);
}

static void other_types(void **unused) {
  (void)unused;
  int64_t shape[] = {1, 2, 2};
  device_context cpu = test_context(cpu_device());
  for (int dtype = OREPA_FLOAT16; dtype < OREPA_DTYPES; dtype++) {
    test_array t = test_new((orepa_dtype)dtype, LAYOUT_DENSE, 3, shape);
    assert_int_equal(cpu.device->matmul(&cpu, &t.a, &t.a, &t.a, NULL), DEVICE_UNSUPPORTED);
    test_release(&t);
  }
  test_context_free(&cpu);
}

/* ---- cpu_product ---- */

static float *numbers(int64_t count, uint64_t seed) {
  float *memory = malloc((size_t)count * sizeof *memory);
  assert_non_null(memory);
  for (int64_t k = 0; k < count; k++)
    memory[k] = (float)test_random_normal(&seed);
  return memory;
}

static void check_product(bool turn_a, bool turn_b, int64_t m, int64_t n, int64_t k, int64_t gap, float beta) {
  int64_t lda = (turn_a ? m : k) + gap, ldb = (turn_b ? k : n) + gap, ldc = n + gap;
  float *a = numbers((turn_a ? k : m) * lda + 1, 1), *b = numbers((turn_b ? n : k) * ldb + 1, 2);
  float *c = numbers(m * ldc + 1, 3), *before = numbers(m * ldc + 1, 3);
  for (int64_t r = 0; beta == 0 && r < m; r++)
    for (int64_t j = 0; j < n; j++)
      c[r * ldc + j] = NAN; /* not read */
  assert_int_equal(cpu_product(turn_a, turn_b, m, n, k, a, lda, b, ldb, beta, c, ldc), DEVICE_DONE);
  double error = 0;
  for (int64_t r = 0; r < m; r++)
    for (int64_t j = 0; j < ldc; j++) {
      double sum = j < n && beta == 0 ? 0 : before[r * ldc + j];
      if (j < n) {
        sum *= beta;
        for (int64_t t = 0; t < k; t++)
          sum += (double)a[turn_a ? t * lda + r : r * lda + t] * b[turn_b ? j * ldb + t : t * ldb + j];
      }
      double difference = fabs(sum - c[r * ldc + j]);
      error = difference <= error ? error : difference; /* NaN counts */
    }
  if (!(error <= 1e-5 * 5 * sqrt((double)k + 1))) {
    print_error("turned %d %d, %dx%d . %dx%d, gap %d, beta %g: error %g\n", turn_a, turn_b, (int)m, (int)k, (int)k,
                (int)n, (int)gap, beta, error);
    fail();
  }
  free(a);
  free(b);
  free(c);
  free(before);
}

static void products(void **unused) {
  (void)unused;
  static const int64_t sizes[][3] = {{1, 1, 1},      {5, 7, 3},        {17, 1, 64},   {64, 64, 64},   {128, 64, 100},
                                     {256, 70, 300}, {128, 128, 1152}, {144, 16, 16}, {896, 64, 150}, {3, 4, 0}};
  for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
    for (int turns = 0; turns < 4; turns++)
      for (int beta = 0; beta < 3; beta++)
        for (int64_t gap = 0; gap < 10; gap += 3)
          check_product(turns & 1, turns & 2, sizes[k][0], sizes[k][1], sizes[k][2], gap, (float)beta / 2);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(batches),  cmocka_unit_test(sizes_of_one_and_zero),
      cmocka_unit_test(large),    cmocka_unit_test(other_types),
      cmocka_unit_test(products),
  };
  return cmocka_run_group_tests_name("cpu matrix product", tests, NULL, NULL);
}
