/* test_allocator.c: the caching allocator: size classes and reuse, its books, the limit and what happens there,
 * threads. Blocks are asked for directly on `ref`, whose books nothing else moves; tensors on `cpu`. */
#include "engine_test.h"

#include <pthread.h>

#include "tensor/tensor.h"

enum { MIB = 1 << 20 };

/* Each test starts with nothing cached and the default limit. */
static int begin(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_set_memory_limit(device, 0);
    orepa_empty_cache(device);
    orepa_reset_peak(device);
  }
  return 0;
}

#define TEST(function) cmocka_unit_test_setup_teardown(function, begin, begin)

static orepa_memory_info books(void) {
  return orepa_memory(REF);
}

static void *get(size_t bytes) {
  void *memory = allocator_get(REF, bytes);
  if (!memory)
    fail_msg("%s", orepa_error());
  return memory;
}

static void put(void *memory, size_t bytes) {
  allocator_put(REF, memory, bytes);
}

/* ---- classes and reuse ---- */

/* A block is at least as large as asked, by an eighth at most beyond 64 bytes, aligned to 64, and comes back. */
static void test_a_block_wastes_an_eighth_at_most_and_is_reused(void **unused) {
  (void)unused;
  const size_t live = books().live;
  for (size_t base = 1; base < 32 * MIB; base += base / 7 + 1)
    for (size_t bytes = base > 1 ? base - 1 : 1; bytes <= base + 1; bytes++) {
      char *memory = get(bytes), *again;
      size_t block = books().live - live;
      assert_true(block >= bytes && (block <= 64 || block <= bytes + bytes / 8 + 1));
      assert_int_equal((uintptr_t)memory % 64, 0);
      memory[0] = memory[bytes - 1] = 1;
      put(memory, bytes);
      assert_int_equal(books().live, live);
      size_t asked = books().system;
      again = get(bytes);
      assert_ptr_equal(again, memory);
      assert_int_equal(books().system, asked);
      put(again, bytes);
      orepa_empty_cache(REF);
    }
}

/* Any size of a class may take a block that another size of it left; the next class may not. */
static void test_sizes_of_one_class_share_blocks(void **unused) {
  (void)unused;
  static const size_t classes[][2] = {{1, 64}, {65, 72}, {72 + 1, 80}, {1025, 1152}, {1921, 2048}};
  for (size_t k = 0; k < sizeof classes / sizeof *classes; k++) {
    size_t low = classes[k][0], high = classes[k][1];
    void *memory = get(low);
    put(memory, low);
    assert_int_equal(books().cached, high);
    assert_ptr_equal(get(high), memory);
    put(memory, high);
    size_t asked = books().system;
    void *other = get(high + 1);
    assert_ptr_not_equal(other, memory);
    assert_int_equal(books().system, asked + 1);
    put(other, high + 1);
    orepa_empty_cache(REF);
  }
}

static void test_a_training_step_after_the_first_asks_the_system_for_nothing(void **unused) {
  (void)unused;
  orepa_tensor *x = full(CPU, SHAPE(64, 100), 0.5), *w = wanting(full(CPU, SHAPE(30, 100), 0.1));
  size_t asked = 0;
  for (int step = 0; step < 5; step++) {
    orepa_tensor *y = must(orepa_linear(x, w, NULL)), *z = must(orepa_relu(y)), *p = must(orepa_mul(z, z));
    orepa_tensor *loss = must(orepa_reduce(OREPA_MEAN, p, 0, NULL, false));
    done(orepa_set_grad(w, NULL));
    done(orepa_backward(loss, NULL, false));
    if (step == 0)
      asked = orepa_memory(CPU).system;
    orepa_tensor *made[] = {y, z, p, loss};
    for (int k = 0; k < 4; k++)
      orepa_release(made[k]);
  }
  assert_true(asked > 0);
  assert_int_equal(orepa_memory(CPU).system, asked);
  orepa_release(x);
  orepa_release(w);
}

/* ---- the books ---- */

static void test_live_cached_and_peak_add_up(void **unused) {
  (void)unused;
  orepa_memory_info start = books();
  assert_int_equal(start.cached, 0);
  assert_int_equal(start.peak, start.live);
  void *a = get(4 * MIB), *b = get(2 * MIB);
  orepa_memory_info now = books();
  assert_int_equal(now.live, start.live + 6 * MIB);
  assert_int_equal(now.peak, now.live);
  assert_int_equal(now.cached, 0);
  assert_int_equal(now.system, start.system + 2);
  put(a, 4 * MIB);
  now = books();
  assert_int_equal(now.live, start.live + 2 * MIB);
  assert_int_equal(now.cached, 4 * MIB);
  assert_int_equal(now.peak, start.live + 6 * MIB);
  orepa_reset_peak(REF);
  assert_int_equal(books().peak, start.live + 2 * MIB);
  a = get(4 * MIB);
  assert_int_equal(books().cached, 0);
  assert_int_equal(books().peak, start.live + 6 * MIB);
  put(a, 4 * MIB);
  put(b, 2 * MIB);
  assert_int_equal(books().cached, 6 * MIB);
  orepa_empty_cache(REF);
  now = books();
  assert_true(now.cached == 0 && now.live == start.live);
  allocator_put(REF, NULL, 100); /* nothing at all */
  assert_int_equal(books().live, start.live);
}

static void test_live_bytes_of_all_devices_together(void **unused) {
  (void)unused;
  size_t before = orepa_memory_live();
  assert_int_equal(before, orepa_memory(CPU).live + orepa_memory(REF).live);
  orepa_tensor *a = full(CPU, SHAPE(MIB), 1), *b = full(REF, SHAPE(2 * MIB), 1);
  assert_int_equal(orepa_memory_live(), before + 12 * MIB);
  assert_int_equal(orepa_memory_live(), orepa_memory(CPU).live + orepa_memory(REF).live);
  orepa_release(a);
  assert_int_equal(orepa_memory_live(), before + 8 * MIB);
  orepa_release(b);
  assert_int_equal(orepa_memory_live(), before);
}

/* ---- the limit ---- */

/* The message of a refusal has what was asked for, what is in use and what is kept. */
static void assert_out_of_memory(const void *memory, size_t wanted, size_t live, size_t limit) {
  char words[200];
  assert_null(memory);
  assert_true(orepa_error_is_out_of_memory());
  snprintf(words, sizeof words,
           "%zu bytes wanted on 'ref', where %zu are in use, 0 kept for reuse, and the limit is %zu", wanted, live,
           limit);
  assert_no_tensor(memory, words);
}

static void test_beyond_the_limit_is_an_error_with_the_figures(void **unused) {
  (void)unused;
  const size_t live = books().live, limit = live + 8 * MIB;
  orepa_set_memory_limit(REF, limit);
  assert_int_equal(books().limit, limit);
  assert_out_of_memory(allocator_get(REF, 8 * MIB + 1), 8 * MIB + 1, live, limit);
  void *all = get(8 * MIB); /* to the last byte */
  assert_out_of_memory(allocator_get(REF, 1), 1, limit, limit);
  assert_int_equal(books().live, limit);
  put(all, 8 * MIB);
  orepa_set_memory_limit(REF, limit - 1);
  assert_out_of_memory(allocator_get(REF, 8 * MIB), 8 * MIB, live, limit - 1);
  put(get(MIB), MIB); /* the session goes on */
  assert_int_equal(books().live, live);
  orepa_set_memory_limit(REF, 0);
  assert_true(books().limit > limit);
  put(get(9 * MIB), 9 * MIB);
}

/* What is kept counts, and goes before anything is refused. */
static void test_the_cache_is_emptied_before_refusing(void **unused) {
  (void)unused;
  const size_t live = books().live;
  orepa_set_memory_limit(REF, live + 10 * MIB);
  put(get(6 * MIB), 6 * MIB);
  assert_int_equal(books().cached, 6 * MIB);
  void *held = get(3 * MIB); /* both fit */
  assert_int_equal(books().cached, 6 * MIB);
  void *more = get(7 * MIB); /* fits without what is kept */
  assert_int_equal(books().cached, 0);
  assert_int_equal(books().live, live + 10 * MIB);
  put(more, 7 * MIB);
  assert_int_equal(books().cached, 7 * MIB);
  assert_out_of_memory(allocator_get(REF, 8 * MIB), 8 * MIB, live + 3 * MIB, live + 10 * MIB);
  assert_int_equal(books().cached, 0);
  put(held, 3 * MIB);
}

/* A limit below what is in use stops all that is new, until enough was given back; nothing is kept above it. */
static void test_a_limit_below_what_is_in_use(void **unused) {
  (void)unused;
  const size_t live = books().live;
  void *large = get(8 * MIB), *small = get(MIB);
  put(get(2 * MIB), 2 * MIB);
  orepa_set_memory_limit(REF, live + 4 * MIB);
  assert_int_equal(books().cached, 0); /* live and cached together may not exceed the limit */
  assert_out_of_memory(allocator_get(REF, 2 * MIB), 2 * MIB, live + 9 * MIB, live + 4 * MIB);
  put(small, MIB);
  assert_int_equal(books().cached, 0);
  assert_out_of_memory(allocator_get(REF, MIB), MIB, live + 8 * MIB, live + 4 * MIB);
  put(large, 8 * MIB);
  assert_int_equal(books().cached, 0);
  put(get(3 * MIB), 3 * MIB);
  assert_int_equal(books().cached, 3 * MIB);
  assert_int_equal(books().live, live);
}

static void test_sizes_near_overflow_are_refused(void **unused) {
  (void)unused;
  static const size_t sizes[] = {SIZE_MAX,         SIZE_MAX - 63, SIZE_MAX / 2 + 1, SIZE_MAX / 2,
                                 SIZE_MAX / 4 + 1, SIZE_MAX / 4,  SIZE_MAX / 8,     (size_t)1 << 60};
  const size_t live = books().live;
  orepa_set_memory_limit(REF, live + 64 * MIB);
  for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
    put(get(MIB), MIB);
    assert_null(allocator_get(REF, sizes[k]));
    assert_true(orepa_error_is_out_of_memory());
    char words[100];
    snprintf(words, sizeof words, "%zu bytes wanted on 'ref', where %zu are in use", sizes[k], live);
    assert_no_tensor(NULL, words);
  }
  assert_int_equal(books().live, live);
  assert_no_tensor(orepa_empty(OREPA_UINT8, REF, SHAPE(INT64_MAX)), "9223372036854775807 bytes wanted on 'ref'");
  assert_no_tensor(orepa_empty(OREPA_FLOAT64, REF, SHAPE(INT64_MAX / 8)), "bytes wanted on 'ref'");
}

/* Without a limit of the user's it follows the system: what is held counts once. */
static void test_the_default_limit_is_what_is_held_and_available(void **unused) {
  (void)unused;
  orepa_memory_info now = books();
  assert_true(now.limit >= now.live + now.cached);
  assert_no_tensor(allocator_get(REF, (size_t)1 << 50), "1125899906842624 bytes wanted");
  assert_true(orepa_error_is_out_of_memory());
  void *memory = get(64 * MIB);
  assert_true(books().limit >= books().live);
  put(memory, 64 * MIB);
}

/* ---- ops at the limit: nothing is half done, nothing lost ---- */

static void test_an_op_that_is_refused_changes_nothing(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(MIB), 2)), *y = must(orepa_mul(x, x)), *w = wanting(full(CPU, SHAPE(1), 3));
  orepa_tensor *small = full(CPU, SHAPE(4), 1);
  size_t live = orepa_memory(CPU).live;
  uint64_t version = orepa_version(y);
  orepa_set_memory_limit(CPU, live + MIB);
  orepa_operand operands[2] = {{.tensor = y}, {.tensor = w}};
  assert_no_tensor(orepa_add(x, x), "4194304 bytes wanted on 'cpu'");
  assert_no_tensor(orepa_clone(x), "out of memory");
  assert_refused(orepa_apply_in_place(orepa_function_by_name("mul"), operands), "out of memory"); /* keeps what y was */
  assert_int_equal(orepa_version(y), version);
  assert_true(orepa_error_is_out_of_memory() && orepa_grad_enabled());
  assert_true(orepa_memory(CPU).live == live);
  orepa_release(must(orepa_add(small, small)));
  orepa_set_memory_limit(CPU, 0);
  double value;
  orepa_tensor *one = must(orepa_select(y, 0, MIB - 1));
  done(orepa_item(one, &value));
  assert_true(value == 4);
  orepa_tensor *made[] = {x, y, w, small, one};
  for (int k = 0; k < 5; k++)
    orepa_release(made[k]);
}

/* The pass fails like any op, and the same pass over a new graph works once there is room. */
static void test_a_backward_pass_that_is_refused(void **unused) {
  (void)unused;
  size_t start = orepa_memory(CPU).live;
  orepa_tensor *x = wanting(full(CPU, SHAPE(MIB), 2));
  for (int room = 0; room < 2; room++) {
    orepa_tensor *y = must(orepa_mul(x, x)), *sum = must(orepa_reduce(OREPA_SUM, y, 0, NULL, false));
    orepa_set_memory_limit(CPU, room ? 0 : orepa_memory(CPU).live + MIB);
    if (!room) {
      assert_refused(orepa_backward(sum, NULL, false), "out of memory");
      assert_true(orepa_error_is_out_of_memory() && orepa_grad_enabled() && !orepa_grad(x));
    } else {
      done(orepa_backward(sum, NULL, false));
      assert_true(orepa_grad(x) != NULL);
    }
    orepa_release(y);
    orepa_release(sum);
  }
  orepa_release(x);
  assert_int_equal(orepa_memory(CPU).live, start);
}

/* ---- threads ---- */

enum { THREADS = 4, ROUNDS = 4000, HELD = 16 };

/* Blocks of random sizes, each with a pattern of its own at both ends; counts patterns that others overwrote. */
static void *churn(void *argument) {
  uint64_t state = (uint64_t)(uintptr_t)argument, wrong = 0;
  struct {
    uint64_t *memory, mark;
    size_t words;
  } held[HELD] = {{0}};
  for (int round = 0; round < ROUNDS + HELD; round++) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    int k = round % HELD;
    if (held[k].memory) {
      wrong += held[k].memory[0] != held[k].mark || held[k].memory[held[k].words - 1] != held[k].mark;
      allocator_put(CPU, held[k].memory, held[k].words * 8);
      held[k].memory = NULL;
    }
    if (round >= ROUNDS)
      continue;
    held[k].words = 1 + (state >> 33) % 3000;
    held[k].mark = state;
    held[k].memory = allocator_get(CPU, held[k].words * 8);
    if (!held[k].memory)
      return (void *)1;
    held[k].memory[0] = held[k].memory[held[k].words - 1] = state;
  }
  return (void *)(uintptr_t)wrong;
}

/* Making, viewing, retaining and releasing tensors: reference counts and the books are shared with all threads. */
static void *make_tensors(void *argument) {
  orepa_tensor *shared = argument;
  for (int round = 0; round < 500; round++) {
    orepa_tensor *t = orepa_empty(OREPA_FLOAT32, CPU, SHAPE(10 + round % 7, 33)), *view = orepa_select(shared, 0, 1);
    orepa_tensor *part = t ? orepa_slice(t, 0, 1, 3, 1) : NULL;
    if (!t || !view || !part)
      return (void *)1;
    orepa_release(t);
    orepa_release(orepa_retain(shared));
    orepa_release(view);
    orepa_release(part);
  }
  return NULL;
}

/* References and views alone: nothing but their counts puts what threads do in an order. */
static void *count_references(void *argument) {
  orepa_tensor *shared = argument;
  for (int round = 0; round < 2000; round++) {
    orepa_release(orepa_retain(shared));
    orepa_tensor *view = orepa_select(shared, 0, 1);
    if (!view)
      return (void *)1;
    orepa_release(view);
  }
  return NULL;
}

static void run_threads(void *(*function)(void *), void *argument) {
  pthread_t threads[THREADS];
  for (int k = 0; k < THREADS; k++)
    assert_int_equal(pthread_create(&threads[k], NULL, function, argument ? argument : (void *)(uintptr_t)(k + 1)), 0);
  for (int k = 0; k < THREADS; k++) {
    void *wrong;
    assert_int_equal(pthread_join(threads[k], &wrong), 0);
    assert_null(wrong);
  }
}

static void test_threads_share_blocks_without_sharing_memory(void **unused) {
  (void)unused;
  size_t live = orepa_memory(CPU).live, everywhere = orepa_memory_live();
  run_threads(churn, NULL);
  assert_int_equal(orepa_memory(CPU).live, live);
  assert_int_equal(orepa_memory_live(), everywhere);
  assert_true(orepa_memory(CPU).peak > live);
  orepa_empty_cache(CPU);
  assert_int_equal(orepa_memory(CPU).cached, 0);
}

static void test_threads_at_the_limit_stay_below_it(void **unused) {
  (void)unused;
  orepa_memory_info start = orepa_memory(CPU);
  orepa_set_memory_limit(CPU, start.live + THREADS * (HELD + 1) * 27000); /* all that is held at once, little more */
  run_threads(churn, NULL);
  orepa_memory_info now = orepa_memory(CPU);
  assert_int_equal(now.live, start.live);
  assert_true(now.peak <= now.limit && now.cached <= now.limit - now.live);
}

static void test_threads_share_tensors(void **unused) {
  (void)unused;
  size_t live = orepa_memory(CPU).live;
  orepa_tensor *shared = full(CPU, SHAPE(2, 3), 1);
  run_threads(make_tensors, shared);
  assert_values(shared, 1, 1, 1, 1, 1, 1);
  orepa_release(shared);
  assert_int_equal(orepa_memory(CPU).live, live);
}

static void test_threads_count_references(void **unused) {
  (void)unused;
  size_t live = orepa_memory(CPU).live;
  orepa_tensor *shared = full(CPU, SHAPE(2, 3), 1);
  run_threads(count_references, shared);
  orepa_release(shared);
  assert_int_equal(orepa_memory(CPU).live, live);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(test_a_block_wastes_an_eighth_at_most_and_is_reused),
      TEST(test_sizes_of_one_class_share_blocks),
      TEST(test_a_training_step_after_the_first_asks_the_system_for_nothing),
      TEST(test_live_cached_and_peak_add_up),
      TEST(test_live_bytes_of_all_devices_together),
      TEST(test_beyond_the_limit_is_an_error_with_the_figures),
      TEST(test_the_cache_is_emptied_before_refusing),
      TEST(test_a_limit_below_what_is_in_use),
      TEST(test_sizes_near_overflow_are_refused),
      TEST(test_the_default_limit_is_what_is_held_and_available),
      TEST(test_an_op_that_is_refused_changes_nothing),
      TEST(test_a_backward_pass_that_is_refused),
      TEST(test_threads_share_blocks_without_sharing_memory),
      TEST(test_threads_at_the_limit_stay_below_it),
      TEST(test_threads_share_tensors),
      TEST(test_threads_count_references),
  };
  unsetenv("OREPA_REF_GUARD"); /* blocks are written to here */
  return cmocka_run_group_tests(tests, NULL, NULL);
}
