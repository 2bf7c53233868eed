/* test_ranges.c: free ranges: what is taken, what is joined; and the allocator's blocks that are cut from them. */
#include "engine_test.h"

#include "ranges.h"
#include "tensor/tensor.h"

/* ---- the set: places in an array stand for addresses ---- */

enum { PLACES = 4096 };
static char places[PLACES];

static void put(range_set *set, size_t first, size_t bytes) {
  assert_true(ranges_put(set, places + first, bytes));
}

static void expect_range(const range_set *set, size_t k, size_t first, size_t bytes) {
  assert_true(k < set->count);
  assert_int_equal(set->list[k].start - places, first);
  assert_int_equal(set->list[k].bytes, bytes);
}

static void test_neighbours_are_joined(void **unused) {
  (void)unused;
  range_set set = {0};
  put(&set, 100, 50);
  put(&set, 300, 50);
  put(&set, 200, 50);
  assert_int_equal(set.count, 3);
  expect_range(&set, 1, 200, 50);
  put(&set, 150, 50); /* meets both */
  assert_int_equal(set.count, 2);
  expect_range(&set, 0, 100, 150);
  put(&set, 90, 10); /* the one above */
  put(&set, 350, 5); /* the one below */
  put(&set, 0, 1);   /* none */
  assert_int_equal(set.count, 3);
  expect_range(&set, 0, 0, 1);
  expect_range(&set, 1, 90, 160);
  expect_range(&set, 2, 300, 55);
  free(set.list);
}

static void test_the_smallest_that_has_room_is_cut(void **unused) {
  (void)unused;
  range_set set = {0};
  assert_null(ranges_take(&set, 1));
  put(&set, 0, 100);
  put(&set, 200, 60);
  put(&set, 400, 60);
  assert_ptr_equal(ranges_take(&set, 50), places + 200);
  expect_range(&set, 1, 250, 10);
  assert_ptr_equal(ranges_take(&set, 60), places + 400);
  assert_int_equal(set.count, 2);
  assert_ptr_equal(ranges_take(&set, 60), places);
  assert_null(ranges_take(&set, 41));
  assert_ptr_equal(ranges_take(&set, 40), places + 60);
  assert_ptr_equal(ranges_take(&set, 10), places + 250);
  assert_int_equal(set.count, 0);
  free(set.list);
}

/* At random: nothing is given out twice, and once all is back there is one range. */
static void test_nothing_is_lost_or_lent_twice(void **unused) {
  (void)unused;
  range_set set = {0};
  static char taken[PLACES];
  struct {
    char *start;
    size_t bytes;
  } held[64] = {{0}};
  uint32_t state = 1;
  memset(taken, 0, sizeof taken);
  put(&set, 0, PLACES);
  for (int round = 0; round < 20000; round++) {
    state = state * 1664525u + 1013904223u;
    size_t k = state >> 26;
    if (held[k].start) {
      memset(taken + (held[k].start - places), 0, held[k].bytes);
      put(&set, (size_t)(held[k].start - places), held[k].bytes);
      held[k].start = NULL;
      continue;
    }
    held[k].bytes = 1 + (state >> 8) % 150;
    held[k].start = ranges_take(&set, held[k].bytes);
    if (!held[k].start)
      continue;
    char *mark = taken + (held[k].start - places);
    assert_null(memchr(mark, 1, held[k].bytes));
    memset(mark, 1, held[k].bytes);
  }
  for (int k = 0; k < 64; k++)
    if (held[k].start)
      put(&set, (size_t)(held[k].start - places), held[k].bytes);
  assert_int_equal(set.count, 1);
  expect_range(&set, 0, 0, PLACES);
  free(set.list);
}

/* ---- blocks of the CPU's ---- */

enum { MIB = 1 << 20 };

static void *get(size_t bytes) {
  void *memory = allocator_get(CPU, bytes);
  if (!memory)
    fail_msg("%s", orepa_error());
  memset(memory, 1, bytes);
  return memory;
}

static void release(void *memory, size_t bytes) {
  allocator_put(CPU, memory, bytes);
}

static void test_freed_blocks_serve_larger_and_smaller_ones(void **unused) {
  (void)unused;
  if (!CPU->divisible)
    skip();
  orepa_empty_cache(CPU);
  const size_t live = orepa_memory(CPU).live;
  release(get(32 * MIB), 32 * MIB);
  size_t asked = orepa_memory(CPU).system;
  void *parts[8];
  for (int round = 0; round < 3; round++) {
    for (int k = 0; k < 8; k++)
      parts[k] = get(4 * MIB - 100);
    assert_int_equal(orepa_memory(CPU).live, live + 32 * MIB); /* whole pages */
    for (int k = 0; k < 8; k++)
      release(parts[(3 * k + round) % 8], 4 * MIB - 100);
    void *a = get(20 * MIB), *b = get(11 * MIB);
    release(a, 20 * MIB);
    release(b, 11 * MIB);
  }
  orepa_memory_info now = orepa_memory(CPU);
  assert_int_equal(now.system, asked);
  assert_true(now.live == live && now.cached >= 32 * MIB);
  orepa_empty_cache(CPU);
  assert_int_equal(orepa_memory(CPU).cached, 0);
  release(get(5 * MIB), 5 * MIB); /* what went back to the system can be had again */
}

static void test_blocks_that_grew_from_the_system_are_neighbours(void **unused) {
  (void)unused;
  if (!CPU->divisible)
    skip();
  orepa_empty_cache(CPU);
  void *first = get(3 * MIB), *second = get(3 * MIB);
  release(first, 3 * MIB);
  release(second, 3 * MIB);
  size_t asked = orepa_memory(CPU).system;
  void *both = get(6 * MIB);
  assert_int_equal(orepa_memory(CPU).system, asked);
  release(both, 6 * MIB);
  orepa_empty_cache(CPU);
}

static void test_the_last_range_grows_by_what_it_lacks(void **unused) {
  (void)unused;
  if (!CPU->divisible)
    skip();
  orepa_empty_cache(CPU);
  const size_t live = orepa_memory(CPU).live;
  void *first = get(2 * MIB), *second = get(3 * MIB);
  release(second, 3 * MIB);
  void *larger = get(5 * MIB);
  assert_int_equal(orepa_memory(CPU).live, live + 7 * MIB);
  assert_true(orepa_memory(CPU).cached < MIB);
  release(first, 2 * MIB);
  void *other = get(3 * MIB); /* the hole is too small, and not the last */
  assert_true(orepa_memory(CPU).cached >= 2 * MIB && orepa_memory(CPU).cached < 3 * MIB);
  release(larger, 5 * MIB);
  release(other, 3 * MIB);
  orepa_empty_cache(CPU);
  assert_int_equal(orepa_memory(CPU).live, live);
}

/* What the system gives for less lies elsewhere: no range may grow by so little. */
static void test_a_range_that_lacks_little_grows_by_a_block(void **unused) {
  (void)unused;
  if (!CPU->divisible)
    skip();
  orepa_empty_cache(CPU);
  release(get(MIB), MIB);
  orepa_memory_info before = orepa_memory(CPU);
  const size_t more = before.cached + 1;
  void *larger = get(more);
  orepa_memory_info now = orepa_memory(CPU);
  assert_int_equal(now.system, before.system + 1);
  assert_true(now.live + now.cached <= before.live + before.cached + CPU->divisible);
  release(larger, more);
  orepa_empty_cache(CPU);
}

/* What a range is larger than its block may be as small as blocks that no range holds, and is none of them. */
static void test_a_small_rest_is_no_small_block(void **unused) {
  (void)unused;
  if (!CPU->divisible)
    skip();
  orepa_empty_cache(CPU);
  char *first = get(MIB), *second = get(MIB);
  const size_t rest = orepa_memory(CPU).cached;
  assert_true(rest > 0 && rest < CPU->divisible);
  char *small = get(rest), *after = second + MIB;
  assert_true(small + rest <= after || small >= after + rest);
  assert_int_equal(orepa_memory(CPU).cached, rest);
  release(small, rest);
  release(first, MIB);
  release(second, MIB);
  orepa_empty_cache(CPU);
}

/* The part by which ranges grow beyond what is asked for stays within the limit. */
static void test_ranges_grow_within_the_limit(void **unused) {
  (void)unused;
  orepa_empty_cache(CPU);
  void *large = get(64 * MIB);
  const size_t live = orepa_memory(CPU).live;
  orepa_set_memory_limit(CPU, live + MIB);
  void *small = get(MIB / 2), *other = get(MIB / 2);
  assert_null(allocator_get(CPU, MIB / 2));
  assert_true(orepa_error_is_out_of_memory());
  assert_true(orepa_memory(CPU).live + orepa_memory(CPU).cached <= live + MIB);
  release(small, MIB / 2);
  release(other, MIB / 2);
  release(large, 64 * MIB);
  orepa_set_memory_limit(CPU, 0);
  orepa_empty_cache(CPU);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_neighbours_are_joined),
      cmocka_unit_test(test_the_smallest_that_has_room_is_cut),
      cmocka_unit_test(test_nothing_is_lost_or_lent_twice),
      cmocka_unit_test(test_freed_blocks_serve_larger_and_smaller_ones),
      cmocka_unit_test(test_blocks_that_grew_from_the_system_are_neighbours),
      cmocka_unit_test(test_the_last_range_grows_by_what_it_lacks),
      cmocka_unit_test(test_a_range_that_lacks_little_grows_by_a_block),
      cmocka_unit_test(test_a_small_rest_is_no_small_block),
      cmocka_unit_test(test_ranges_grow_within_the_limit),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
