/* test_random.c: random numbers: the generator itself, what a number may depend on, and how numbers are spread. */
#include "engine_test.h"

#include "cpu/features.h"
#include "philox.h"
#include "tensor/tensor.h"

enum { MANY = 200000 }; /* enough for several threads */

/* for_each_isa(device) { ... }: the cpu's table for each instruction set that this machine has. */
#define for_each_isa(device)                                                                                           \
  for (int isa_ = 0; isa_ < CPU_ISAS; isa_++)                                                                          \
    for (const orepa_device *device = cpu_device_for((cpu_isa)isa_); device; device = NULL)

/* The elements of a fresh draw in logical order; gives back how many bytes they are. */
static size_t draw(const orepa_device *device, orepa_dtype dtype, bool normal, int rank, const int64_t *shape,
                   orepa_rng at, void *data) {
  orepa_set_rng_state(at);
  orepa_tensor *t = must((normal ? orepa_randn : orepa_rand)(dtype, device, rank, shape));
  size_t bytes = (size_t)orepa_count(t) * orepa_dtype_size(dtype);
  done(orepa_to_host(t, data, bytes));
  assert_true(orepa_is_contiguous(t));
  orepa_release(t);
  return bytes;
}

static const orepa_dtype dtypes[2] = {OREPA_FLOAT32, OREPA_FLOAT64};
static double first[MANY], second[MANY]; /* or floats */

/* The vectors that Random123 publishes for philox4x32-10: counter, key, words. */
static void test_generator_gives_the_published_words(void **unused) {
  (void)unused;
  static const struct {
    uint64_t seed, draw, block;
    uint32_t words[4];
  } known[] = {
      {0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {UINT64_MAX, UINT64_MAX, UINT64_MAX, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822, 0x0370734413198a2e, 0x85a308d3243f6a88, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
    uint32_t words[4];
    philox(known[k].seed, known[k].draw, known[k].block, words);
    assert_memory_equal(words, known[k].words, sizeof words);
  }
}

/* The same in tensors: draw 0 of seed 0 begins with the published words' upper 24 bits, on every device. */
static void test_tensors_hold_the_published_words(void **unused) {
  (void)unused;
  static const uint32_t words[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  float floats[4];
  double doubles[2];
  for_each_device(device) {
    draw(device, OREPA_FLOAT32, false, SHAPE(4), (orepa_rng){0, 0}, floats);
    for (int k = 0; k < 4; k++)
      assert_true(floats[k] == (float)(words[k] >> 8) / 16777216);
    draw(device, OREPA_FLOAT64, false, SHAPE(2), (orepa_rng){0, 0}, doubles);
    for (int k = 0; k < 2; k++)
      assert_true(doubles[k] == ldexp((double)(((uint64_t)words[2 * k + 1] << 32 | words[2 * k]) >> 11), -53));
  }
}

static void test_uniforms_are_the_same_bits_on_every_device(void **unused) {
  (void)unused;
  for (int k = 0; k < 2; k++) {
    size_t bytes = draw(REF, dtypes[k], false, SHAPE(5, 7, 31, 33), (orepa_rng){12345678901234567, 9}, first);
    for_each_isa(device) {
      memset(second, 0, sizeof second);
      draw(device, dtypes[k], false, SHAPE(5, 7, 31, 33), (orepa_rng){12345678901234567, 9}, second);
      assert_memory_equal(first, second, bytes);
    }
  }
}

static void test_normals_are_the_same_to_rounding_on_every_device(void **unused) {
  (void)unused;
  for (int k = 0; k < 2; k++) {
    size_t count = draw(REF, dtypes[k], true, SHAPE(5, 7, 31, 33), (orepa_rng){7, 1}, first);
    count /= orepa_dtype_size(dtypes[k]);
    double step = k ? DBL_EPSILON : FLT_EPSILON;
    for_each_isa(device) {
      draw(device, dtypes[k], true, SHAPE(5, 7, 31, 33), (orepa_rng){7, 1}, second);
      for (size_t n = 0; n < count; n++) {
        double a = value_at(dtypes[k], first, n), b = value_at(dtypes[k], second, n);
        assert_true(fabs(a - b) <= 4 * step * fmax(1, fabs(a)));
      }
    }
  }
}

static void test_any_number_of_threads_gives_the_same_bits(void **unused) {
  (void)unused;
  int before = orepa_threads();
  for (int k = 0; k < 2; k++)
    for (int normal = 0; normal < 2; normal++) {
      orepa_set_threads(1);
      size_t bytes = draw(CPU, dtypes[k], normal, SHAPE(MANY), (orepa_rng){3, 4}, first);
      for (int threads = 2; threads <= 7; threads++) {
        orepa_set_threads(threads);
        draw(CPU, dtypes[k], normal, SHAPE(MANY), (orepa_rng){3, 4}, second);
        assert_memory_equal(first, second, bytes);
      }
    }
  orepa_set_threads(before);
}

/* Element k in logical order is a function of k: the shape, the order in memory and the length change nothing. */
static void test_an_element_depends_on_its_logical_position_only(void **unused) {
  (void)unused;
  for_each_device(device) {
    for (int k = 0; k < 2; k++)
      for (int normal = 0; normal < 2; normal++) {
        size_t bytes = draw(device, dtypes[k], normal, SHAPE(2310), (orepa_rng){8, 2}, first);
        draw(device, dtypes[k], normal, SHAPE(2, 3, 5, 77), (orepa_rng){8, 2}, second); /* channels last in memory */
        assert_memory_equal(first, second, bytes);
        draw(device, dtypes[k], normal, SHAPE(21, 110), (orepa_rng){8, 2}, second);
        assert_memory_equal(first, second, bytes);
        bytes = draw(device, dtypes[k], normal, SHAPE(1001), (orepa_rng){8, 2}, second); /* the beginning of it */
        assert_memory_equal(first, second, bytes);
      }
  }
}

/* A kernel that writes through a view takes the view's logical order, and leaves the rest alone. */
static void test_views_are_filled_in_their_own_logical_order(void **unused) {
  (void)unused;
  float numbers[24];
  for_each_device(device) {
    draw(device, OREPA_FLOAT32, false, SHAPE(24), (orepa_rng){5, 6}, numbers);
    orepa_tensor *base = full(device, SHAPE(4, 3, 8), -1), *part = must(orepa_slice(base, 2, 0, 8, 4));
    orepa_tensor *view = must(orepa_permute(part, AXES(2, 0, 1))), *seen = must(orepa_contiguous(view));
    device_array to;
    done(tensor_writes(view, &to));
    assert_int_equal(device->random(device_context_of(device), &to, false, 5, 6), DEVICE_DONE);
    orepa_release(seen);
    seen = must(orepa_contiguous(view));
    double found[24], all[96];
    read_values(seen, found);
    for (int k = 0; k < 24; k++)
      assert_true(found[k] == numbers[k]);
    read_values(base, all);
    for (int k = 0; k < 96; k++)
      assert_int_equal(all[k] == -1, k % 4 != 0);
    orepa_tensor *made[] = {base, part, view, seen};
    for (int k = 0; k < 4; k++)
      orepa_release(made[k]);
  }
}

static void test_other_seeds_and_draws_give_other_numbers(void **unused) {
  (void)unused;
  const orepa_rng others[] = {{1, 1}, {0, 2}, {0, (uint64_t)1 << 32}, {(uint64_t)1 << 32, 1}, {UINT64_MAX, 1}};
  float *a = (float *)first, *b = (float *)second;
  draw(CPU, OREPA_FLOAT32, false, SHAPE(10000), (orepa_rng){0, 1}, a);
  for (size_t n = 0; n < sizeof others / sizeof *others; n++) {
    draw(CPU, OREPA_FLOAT32, false, SHAPE(10000), others[n], b);
    double product = 0;
    int equal = 0;
    for (int k = 0; k < 10000; k++) {
      product += (a[k] - 0.5) * (b[k] - 0.5);
      equal += a[k] == b[k];
    }
    assert_true(equal < 5);
    assert_true(fabs(12 * product / 10000) < 0.04); /* the correlation: four deviations */
  }
}

static void test_state_counts_draws_and_can_be_restored(void **unused) {
  (void)unused;
  float a[2][100], b[2][100];
  orepa_manual_seed(42);
  assert_true(orepa_rng_state().seed == 42 && orepa_rng_state().draws == 0);
  for (int round = 0; round < 3; round++) { /* saved after one draw, then the next two drawn again and again */
    if (round == 0) {
      orepa_release(must(orepa_randn(OREPA_FLOAT32, CPU, SHAPE(7))));
      assert_true(orepa_rng_state().draws == 1);
    }
    orepa_rng saved = orepa_rng_state();
    for (int k = 0; k < 2; k++) {
      orepa_tensor *t = must((k ? orepa_randn : orepa_rand)(OREPA_FLOAT32, CPU, SHAPE(100)));
      done(orepa_to_host(t, round ? b[k] : a[k], sizeof a[k]));
      orepa_release(t);
    }
    assert_true(orepa_rng_state().seed == 42 && orepa_rng_state().draws == 3);
    if (round)
      assert_memory_equal(a, b, sizeof a);
    assert_true(memcmp(a[0], a[1], sizeof a[0]));
    orepa_set_rng_state(saved);
  }
  orepa_manual_seed(42); /* starts again, whatever was drawn */
  assert_true(orepa_rng_state().draws == 0);
}

/* A draw that fails takes no number: tried once more with memory freed, it gives what it would have given. */
static void test_a_draw_that_fails_is_not_counted(void **unused) {
  (void)unused;
  orepa_manual_seed(1);
  assert_no_tensor(orepa_rand(OREPA_FLOAT16, CPU, SHAPE(2)), "rand: float32 or float64, not float16");
  assert_no_tensor(orepa_randn(OREPA_INT64, CPU, SHAPE(2)), "randn: float32 or float64, not int64");
  assert_no_tensor(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(-2)), "-2");
  orepa_set_memory_limit(CPU, orepa_memory(CPU).live + 1000);
  assert_no_tensor(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(1000)), "out of memory");
  orepa_set_memory_limit(CPU, 0);
  assert_true(orepa_rng_state().draws == 0);
  float a[4], b[4];
  orepa_tensor *t = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(4)));
  done(orepa_to_host(t, a, sizeof a));
  orepa_release(t);
  draw(CPU, OREPA_FLOAT32, false, SHAPE(4), (orepa_rng){1, 0}, b);
  assert_memory_equal(a, b, sizeof a);
}

static void test_no_element_and_one_element(void **unused) {
  (void)unused;
  for_each_device(device) {
    double one, same;
    draw(device, OREPA_FLOAT64, true, SCALAR, (orepa_rng){1, 1}, &one);
    draw(device, OREPA_FLOAT64, true, SHAPE(1, 1), (orepa_rng){1, 1}, &same);
    assert_true(one == same && isfinite(one));
    assert_int_equal(draw(device, OREPA_FLOAT32, false, SHAPE(3, 0, 2), (orepa_rng){1, 1}, &one), 0);
  }
}

/* ---- how they are spread: MANY numbers; bounds that a good generator passes 999 times in 1000 */

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* Kolmogorov and Smirnov: the largest distance between the distribution and the numbers', times sqrt(n). Sorts. */
static double distance(double *values, int count, bool normal) {
  double most = 0;
  qsort(values, (size_t)count, sizeof *values, by_value);
  for (int k = 0; k < count; k++) {
    double p = normal ? 0.5 * erfc(-values[k] / sqrt(2)) : values[k];
    most = fmax(most, fmax((k + 1.0) / count - p, p - (double)k / count));
  }
  return most * sqrt(count);
}

static void check_spread(const orepa_device *device, orepa_dtype dtype, bool normal) {
  double sum = 0, squares = 0, neighbours = 0, mean = normal ? 0 : 0.5, variance = normal ? 1 : 1.0 / 12;
  draw(device, dtype, normal, SHAPE(MANY), (orepa_rng){2024, 5}, first);
  for (int k = 0; k < MANY; k++)
    second[k] = value_at(dtype, first, (size_t)k);
  for (int k = 0; k < MANY; k++) {
    double x = second[k] - mean;
    assert_true(normal ? fabs(x) < 7 : second[k] >= 0 && second[k] < 1);
    sum += x;
    squares += x * x;
    neighbours += k ? x * (second[k - 1] - mean) : 0;
  }
  double deviation = 1 / sqrt(MANY), fourth = normal ? 2 : 0.8; /* variance of x*x over variance of x, squared */
  assert_true(fabs(sum / MANY) < 3.3 * sqrt(variance) * deviation);
  assert_true(fabs(squares / MANY / variance - 1) < 3.3 * sqrt(fourth) * deviation);
  assert_true(fabs(neighbours / MANY / variance) < 3.3 * deviation);
  assert_true(distance(second, MANY, normal) < 1.95);
}

static void test_numbers_are_spread_as_promised(void **unused) {
  (void)unused;
  for_each_device(device) {
    for (int k = 0; k < 2; k++) {
      check_spread(device, dtypes[k], false);
      check_spread(device, dtypes[k], true);
    }
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_generator_gives_the_published_words),
      cmocka_unit_test(test_tensors_hold_the_published_words),
      cmocka_unit_test(test_uniforms_are_the_same_bits_on_every_device),
      cmocka_unit_test(test_normals_are_the_same_to_rounding_on_every_device),
      cmocka_unit_test(test_any_number_of_threads_gives_the_same_bits),
      cmocka_unit_test(test_an_element_depends_on_its_logical_position_only),
      cmocka_unit_test(test_views_are_filled_in_their_own_logical_order),
      cmocka_unit_test(test_other_seeds_and_draws_give_other_numbers),
      cmocka_unit_test(test_state_counts_draws_and_can_be_restored),
      cmocka_unit_test(test_a_draw_that_fails_is_not_counted),
      cmocka_unit_test(test_no_element_and_one_element),
      cmocka_unit_test(test_numbers_are_spread_as_promised),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
