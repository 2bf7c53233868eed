/* test_loader.c: loaders: order, bounds, what fails, how they end, and what is different on their threads. Run under
 * the thread sanitizer too. */
#include "engine_test.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <unistd.h>

#include "orepa_data.h"

enum { PATIENCE = 60 /* seconds */ };

/* ---- a source that counts ---- */

typedef struct {
  int64_t batches, fails_at; /* -1: none fails */
  bool begin_fails;
  int holds;                         /* make doesn't return before stop was called so often */
  bool (*on_thread)(void *argument); /* called by make; false: the batch fails */
  void *argument;
  atomic_int begun, ended, stopped, made, dropped, closed;
  atomic_int most_ahead, taken; /* of batches that were made or being made, and not taken */
} counted_source;

typedef struct {
  counted_source *source;
  uint64_t epoch;
  int64_t number;
} counted_batch;

static int64_t counted_start(void *context, uint64_t epoch) {
  counted_source *s = context;
  atomic_store(&s->made, 0);
  atomic_store(&s->taken, 0);
  return epoch == 13 ? -1 : s->batches;
}

static void *counted_begin(void *context, int thread) {
  counted_source *s = context;
  atomic_fetch_add(&s->begun, 1);
  if (s->begin_fails && thread == 1) {
    orepa_set_threads(0); /* any message */
    return NULL;
  }
  return s;
}

static void note_ahead(counted_source *s) {
  int ahead = atomic_fetch_add(&s->made, 1) + 1 - atomic_load(&s->taken);
  int most = atomic_load(&s->most_ahead);
  while (ahead > most && !atomic_compare_exchange_weak(&s->most_ahead, &most, ahead))
    ;
}

static void *counted_make(void *state, uint64_t epoch, int64_t number) {
  counted_source *s = state;
  note_ahead(s);
  while (atomic_load(&s->stopped) < s->holds)
    usleep(1000);
  usleep((useconds_t)(number * 7919 % 5 * 200)); /* later ones are often done first */
  bool failed = number == s->fails_at;
  if (failed)
    orepa_set_threads(0);
  if (failed || (s->on_thread && !s->on_thread(s->argument)))
    return NULL;
  counted_batch *batch = malloc(sizeof *batch);
  *batch = (counted_batch){s, epoch, number};
  return batch;
}

static void counted_end(void *state) {
  counted_source *s = state;
  atomic_fetch_add(&s->ended, 1);
}

static void counted_stop(void *context, int thread) {
  counted_source *s = context;
  (void)thread;
  atomic_fetch_add(&s->stopped, 1);
}

static void counted_drop(void *p) {
  counted_batch *batch = p;
  atomic_fetch_add(&batch->source->dropped, 1);
  free(batch);
}

static void counted_close(void *context) {
  counted_source *s = context;
  atomic_fetch_add(&s->closed, 1);
}

static orepa_loader *open_counted(counted_source *s, int threads, int prefetch) {
  const orepa_loader_source source = {s,           counted_start, counted_begin, counted_make,
                                      counted_end, counted_stop,  counted_drop,  counted_close};
  orepa_loader *loader = orepa_loader_open(&source, threads, prefetch);
  if (!loader)
    fail_msg("%s", orepa_error());
  return loader;
}

static void take_number(counted_source *s, orepa_loader *loader, uint64_t epoch, int64_t number) {
  void *p = NULL;
  if (orepa_loader_take(loader, PATIENCE, &p) != 1)
    fail_msg("batch %lld: %s", (long long)number, orepa_error());
  atomic_fetch_add(&s->taken, 1);
  counted_batch *batch = p;
  assert_int_equal(batch->epoch, epoch);
  assert_int_equal(batch->number, number);
  free(batch);
}

static void assert_failed(int status, const char *words) {
  assert_int_equal(status, -1);
  if (!strstr(orepa_error(), words))
    fail_msg("the message is \"%s\", without \"%s\"", orepa_error(), words);
}

/* ---- order and bounds ---- */

static void test_batches_come_in_order_and_no_more_than_asked_for(void **unused) {
  (void)unused;
  for (int threads = 1; threads <= 4; threads += 3)
    for (int prefetch = 1; prefetch <= 9; prefetch += 4) {
      counted_source s = {.batches = 40, .fails_at = -1};
      orepa_loader *loader = open_counted(&s, threads, prefetch);
      assert_int_equal(orepa_loader_ready(loader, PATIENCE), 1);
      assert_int_equal(s.begun, threads);
      for (uint64_t epoch = 1; epoch <= 2; epoch++) {
        assert_int_equal(orepa_loader_start(loader, epoch), s.batches);
        for (int64_t k = 0; k < s.batches; k++)
          take_number(&s, loader, epoch, k);
        void *none;
        assert_failed(orepa_loader_take(loader, PATIENCE, &none), "no more batches");
      }
      orepa_loader_close(loader);
      /* counted where a batch begins, by the taker a little late: one more may be seen */
      assert_in_range(s.most_ahead, 1, prefetch + 1);
      assert_int_equal(s.ended, threads);
      assert_int_equal(s.closed, 1);
      assert_int_equal(s.dropped, 0);
    }
}

static void test_without_a_taker_the_threads_stand_still(void **unused) {
  (void)unused;
  counted_source s = {.batches = 1000, .fails_at = -1};
  orepa_loader *loader = open_counted(&s, 3, 5);
  orepa_loader_start(loader, 1);
  while (atomic_load(&s.made) < 5)
    usleep(1000);
  usleep(20000);
  assert_int_equal(s.made, 5);
  take_number(&s, loader, 1, 0);
  while (atomic_load(&s.made) < 6)
    usleep(1000);
  usleep(20000);
  assert_int_equal(s.made, 6);
  orepa_loader_close(loader);
  assert_int_equal(s.dropped, 5);
}

static void test_an_empty_epoch(void **unused) {
  (void)unused;
  counted_source s = {.batches = 0, .fails_at = -1};
  orepa_loader *loader = open_counted(&s, 2, 2);
  assert_int_equal(orepa_loader_start(loader, 1), 0);
  void *none;
  assert_failed(orepa_loader_take(loader, 0, &none), "no more batches");
  orepa_loader_close(loader);
}

/* ---- failures ---- */

static void test_a_failure_is_told_where_its_batch_is_taken(void **unused) {
  (void)unused;
  counted_source s = {.batches = 10, .fails_at = 4};
  orepa_loader *loader = open_counted(&s, 3, 6);
  orepa_loader_start(loader, 2);
  void *none;
  for (int64_t k = 0; k < 4; k++)
    take_number(&s, loader, 2, k);
  assert_failed(orepa_loader_take(loader, PATIENCE, &none), "kernels run on one thread");
  take_number(&s, loader, 2, 5); /* the others are as they were */
  assert_failed((int)orepa_loader_start(loader, 3), "4 of 10 batches of epoch 2 were not taken");
  orepa_loader_close(loader);
  assert_int_equal(s.closed, 1);
}

static void test_a_thread_that_cannot_begin(void **unused) {
  (void)unused;
  counted_source s = {.batches = 10, .fails_at = -1, .begin_fails = true};
  orepa_loader *loader = open_counted(&s, 3, 6);
  assert_failed(orepa_loader_ready(loader, PATIENCE), "kernels run on one thread");
  orepa_loader_start(loader, 1);
  void *none;
  assert_failed(orepa_loader_take(loader, PATIENCE, &none), "kernels run on one thread");
  orepa_loader_close(loader);
  assert_int_equal(s.begun, 3);
  assert_int_equal(s.ended, 2);
}

static void test_wrong_arguments(void **unused) {
  (void)unused;
  counted_source s = {.batches = 1};
  const orepa_loader_source source = {
      .context = &s, .start = counted_start, .make = counted_make, .drop = counted_drop};
  assert_null(orepa_loader_open(&source, 0, 1));
  assert_failed(-1, "threads, not 0");
  assert_null(orepa_loader_open(&source, 1, 0));
  assert_failed(-1, "batches, not 0");
  assert_int_equal(s.closed, 0);
  s.fails_at = -1;
  orepa_loader *loader = open_counted(&s, 1, 1);
  assert_int_equal(orepa_loader_start(loader, 13), -1);
  orepa_loader_close(loader);
  orepa_loader_close(NULL);
}

/* ---- endings ---- */

static void test_waiting_ends_with_the_time(void **unused) {
  (void)unused;
  counted_source s = {.batches = 3, .fails_at = -1, .holds = 1};
  orepa_loader *loader = open_counted(&s, 2, 2);
  orepa_loader_start(loader, 1);
  void *none = &s;
  assert_int_equal(orepa_loader_take(loader, 0, &none), 0);
  assert_int_equal(orepa_loader_take(loader, 0.02, &none), 0);
  assert_ptr_equal(none, &s);
  orepa_loader_close(loader); /* stop lets go of both threads */
  assert_true(s.stopped >= 2);
  assert_int_equal(s.ended, 2);
  assert_int_equal(s.dropped, 2);
}

static void test_a_thread_that_does_not_hear_is_told_again(void **unused) {
  (void)unused;
  counted_source s = {.batches = 3, .fails_at = -1, .holds = 5};
  orepa_loader *loader = open_counted(&s, 1, 1);
  orepa_loader_start(loader, 1);
  while (!atomic_load(&s.made))
    usleep(1000);
  orepa_loader_close(loader);
  assert_true(s.stopped >= 5);
  assert_int_equal(s.ended, 1);
}

static void test_closing_at_any_moment(void **unused) {
  (void)unused;
  for (int k = 0; k < 40; k++) {
    counted_source s = {.batches = 20, .fails_at = 11};
    orepa_loader *loader = open_counted(&s, 1 + k % 4, 1 + k % 3);
    if (k % 5)
      orepa_loader_start(loader, 1);
    for (int64_t n = 0; k % 5 && n < k % 7; n++)
      take_number(&s, loader, 1, n);
    usleep((useconds_t)(k * 50));
    orepa_loader_close(loader);
    assert_int_equal(s.ended, 1 + k % 4);
    assert_int_equal(s.closed, 1);
  }
}

/* In a process of its own: exit() while threads make batches and nobody closes. What they use is alive until then. */
static void leave_in_mid_epoch(void) {
  static counted_source s = {.batches = 1000, .fails_at = -1, .holds = 1};
  static counted_source t = {.batches = 1000, .fails_at = -1};
  orepa_loader *first = open_counted(&s, 2, 2), *second = open_counted(&t, 2, 2);
  orepa_loader_start(first, 1);
  orepa_loader_start(second, 1);
  take_number(&t, second, 1, 0);
  exit(7);
}

static void test_exit_joins_the_threads(void **unused) {
  (void)unused;
  pid_t child = fork();
  if (child == 0)
    leave_in_mid_epoch();
  int status = 0;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  assert_int_equal(WEXITSTATUS(status), 7);
}

/* ---- what is different on a loader's thread ---- */

/* Runs a function on one; whether it gave true. */
static bool on_loader_thread(bool (*function)(void *), void *argument) {
  counted_source s = {.batches = 1, .fails_at = -1, .on_thread = function, .argument = argument};
  orepa_loader *loader = open_counted(&s, 1, 1);
  orepa_loader_start(loader, 1);
  void *batch = NULL;
  int status = orepa_loader_take(loader, PATIENCE, &batch);
  free(batch);
  orepa_loader_close(loader);
  return status == 1;
}

static bool all_signals_are_blocked(void *unused) {
  (void)unused;
  sigset_t set;
  pthread_sigmask(SIG_SETMASK, NULL, &set);
  return sigismember(&set, SIGINT) == 1 && sigismember(&set, SIGTERM) == 1 && sigismember(&set, SIGALRM) == 1;
}

static bool kernels_run_alone(void *unused) {
  (void)unused;
  return orepa_threads() == 1 && orepa_set_threads(2) == -1 && strstr(orepa_error(), "set_threads");
}

static bool no_graph_is_recorded(void *leaf) {
  orepa_set_grad_enabled(true);
  orepa_tensor *y = orepa_relu(leaf);
  bool good = y && !orepa_requires_grad(y) && orepa_is_leaf(y) && !orepa_grad_enabled();
  orepa_release(y);
  return good;
}

static bool there_are_no_loaders_within(void *unused) {
  (void)unused;
  counted_source s = {.batches = 1};
  const orepa_loader_source source = {
      .context = &s, .start = counted_start, .make = counted_make, .drop = counted_drop};
  return !orepa_loader_open(&source, 1, 1) && strstr(orepa_error(), "can't open another");
}

static bool random_numbers_are_its_own(void *unused) {
  (void)unused;
  orepa_manual_seed(99);
  orepa_release(orepa_rand(OREPA_FLOAT32, orepa_device_by_name("cpu"), SHAPE(4)));
  orepa_rng state = orepa_rng_state();
  return state.seed == 99 && state.draws == 1;
}

static bool what_was_handed_over_is_not_written(void *t) {
  return orepa_fill_(t, 6) == -1 && strstr(orepa_error(), "clone it");
}

static void test_what_is_different_on_a_loaders_thread(void **unused) {
  (void)unused;
  orepa_tensor *leaf = wanting(full(CPU, SHAPE(3), 1)), *given = full(CPU, SHAPE(2), 5);
  orepa_manual_seed(3);
  assert_true(on_loader_thread(all_signals_are_blocked, NULL));
  assert_true(on_loader_thread(kernels_run_alone, NULL));
  assert_true(on_loader_thread(no_graph_is_recorded, leaf));
  assert_true(on_loader_thread(there_are_no_loaders_within, NULL));
  assert_true(on_loader_thread(random_numbers_are_its_own, NULL));
  assert_int_equal(orepa_rng_state().seed, 3);
  assert_int_equal(orepa_rng_state().draws, 0);
  orepa_tensor *same = must(orepa_hand_over(given));
  assert_true(on_loader_thread(what_was_handed_over_is_not_written, same));
  assert_true(on_loader_thread(what_was_handed_over_is_not_written, given));
  done(orepa_fill_(given, 6)); /* here it is */
  assert_values(same, 6, 6);
  orepa_release(same);
  orepa_release(given);
  orepa_release(leaf);
}

static void test_handing_over_leaves_the_graph_behind(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2, 3), 1)), *y = must(orepa_relu(x));
  orepa_tensor *same = must(orepa_hand_over(y));
  assert_false(orepa_requires_grad(same));
  assert_true(orepa_is_leaf(same) && orepa_shares_storage(same, y));
  orepa_release(y);
  orepa_release(x);
  assert_values(same, 1, 2, 3, 4, 5, 6);
  orepa_release(same);
}

/* Kernels with scratch and offences of their own, at the same time on several threads and on this one. */
typedef struct {
  orepa_tensor *x, *index, *wrong, *wanted;
} indexing;

static bool index_often(void *argument) {
  const indexing *i = argument;
  for (int k = 0; k < 20; k++) {
    orepa_tensor *y = orepa_reduce(OREPA_ARGMAX, i->x, 1, AXES(1), false), *none = orepa_gather(i->x, 1, i->wrong);
    bool good = y && !none && strstr(orepa_error(), "77");
    int64_t found[64], wanted[64];
    good = good && !orepa_to_host(y, found, sizeof found) && !orepa_to_host(i->wanted, wanted, sizeof wanted) &&
           !memcmp(found, wanted, sizeof found);
    orepa_release(y);
    if (!good)
      return false;
  }
  return true;
}

static void test_kernels_on_several_threads_have_their_own_scratch(void **unused) {
  (void)unused;
  const int64_t wrong[] = {0, 77};
  indexing i = {.x = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(64, 50))),
                .wrong = must(orepa_from_host(OREPA_INT64, CPU, SHAPE(1, 2), wrong))};
  i.wanted = must(orepa_reduce(OREPA_ARGMAX, i.x, 1, AXES(1), false));
  counted_source s = {.batches = 12, .fails_at = -1, .on_thread = index_often, .argument = &i};
  orepa_loader *loader = open_counted(&s, 3, 12);
  orepa_loader_start(loader, 1);
  assert_true(index_often(&i));
  for (int64_t k = 0; k < s.batches; k++)
    take_number(&s, loader, 1, k);
  orepa_loader_close(loader);
  orepa_release(i.x);
  orepa_release(i.wrong);
  orepa_release(i.wanted);
}

/* ---- files ---- */

/* A small file read by all threads. */
static bool read_idx(void *unused) {
  (void)unused;
  static const unsigned char bytes[] = {0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9};
  orepa_tensor *t = orepa_parse_idx("memory", bytes, sizeof bytes), *none = orepa_parse_idx("short", bytes, 10);
  unsigned char found[3] = {0};
  bool good =
      t && !none && !orepa_to_host(t, found, 3) && !memcmp(found, bytes + 8, 3) && strstr(orepa_error(), "short");
  orepa_release(t);
  return good;
}

static void test_idx_files_are_read_on_threads(void **unused) {
  (void)unused;
  counted_source s = {.batches = 60, .fails_at = -1, .on_thread = read_idx};
  orepa_loader *loader = open_counted(&s, 3, 4);
  orepa_loader_start(loader, 1);
  for (int64_t k = 0; k < s.batches; k++)
    take_number(&s, loader, 1, k);
  orepa_loader_close(loader);
}

/* ---- the run ---- */

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, remember_live, nothing_leaks)
  const struct CMUnitTest tests[] = {
      TEST(test_batches_come_in_order_and_no_more_than_asked_for),
      TEST(test_without_a_taker_the_threads_stand_still),
      TEST(test_an_empty_epoch),
      TEST(test_a_failure_is_told_where_its_batch_is_taken),
      TEST(test_a_thread_that_cannot_begin),
      TEST(test_wrong_arguments),
      TEST(test_waiting_ends_with_the_time),
      TEST(test_a_thread_that_does_not_hear_is_told_again),
      TEST(test_closing_at_any_moment),
      TEST(test_exit_joins_the_threads),
      TEST(test_what_is_different_on_a_loaders_thread),
      TEST(test_handing_over_leaves_the_graph_behind),
      TEST(test_kernels_on_several_threads_have_their_own_scratch),
      TEST(test_idx_files_are_read_on_threads),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
