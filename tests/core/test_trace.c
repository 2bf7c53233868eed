/* test_trace.c: events and how they nest, what enters a trace by itself, and the multiply-adds that kernels stand for.
 */
#include <pthread.h>

#include "engine_test.h"

#include "orepa_reparam.h"
#include "orepa_trace.h"
#include "timings.h"

/* ---- events by hand ---- */

static const orepa_event *event_at(const orepa_trace *trace, int64_t index) {
  const orepa_event *e = orepa_trace_event(trace, index);
  assert_non_null(e);
  return e;
}

static void test_nothing_is_kept_while_off(void **unused) {
  (void)unused;
  assert_false(orepa_is_traced());
  assert_int_equal(orepa_event_open(OREPA_EVENT_OP, "op", 0), -1);
  orepa_event_close(-1, 0);
  orepa_event_close(7, 0);
  assert_null(orepa_trace_stop());
}

static void test_events_nest_in_the_order_in_which_they_begin(void **unused) {
  (void)unused;
  done(orepa_trace_start());
  assert_true(orepa_is_traced());
  int64_t outer = orepa_event_open(OREPA_EVENT_MODULE, "module", 5);
  int64_t first = orepa_event_open(OREPA_EVENT_OP, "first", 0);
  orepa_event_close(first, 12);
  int64_t second = orepa_event_open(OREPA_EVENT_OP, "second", 0);
  orepa_event_close(second, 0);
  orepa_event_close(outer, 0);
  int64_t after = orepa_event_open(OREPA_EVENT_OP, "after", 0);
  orepa_event_close(after, 0);
  orepa_trace *trace = orepa_trace_stop();
  assert_false(orepa_is_traced());
  assert_int_equal(orepa_trace_count(trace), 4);
  assert_int_equal(orepa_trace_lost(trace), 0);
  const orepa_event *m = event_at(trace, outer), *a = event_at(trace, first), *b = event_at(trace, second);
  assert_int_equal(m->kind, OREPA_EVENT_MODULE);
  assert_int_equal(m->number, 5);
  assert_int_equal(m->around, -1);
  assert_int_equal(a->around, outer);
  assert_int_equal(b->around, outer);
  assert_int_equal(event_at(trace, after)->around, -1);
  assert_string_equal(a->name, "first");
  assert_int_equal(a->bytes, 12);
  assert_true(m->start <= a->start && a->start <= a->end && a->end <= b->start && b->end <= m->end);
  assert_null(orepa_trace_event(trace, 4));
  assert_null(orepa_trace_event(trace, -1));
  orepa_trace_free(trace);
  orepa_trace_free(NULL);
}

static void test_what_is_left_open_ends_with_what_is_around_it(void **unused) {
  (void)unused;
  done(orepa_trace_start());
  int64_t outer = orepa_event_open(OREPA_EVENT_MODULE, "outer", 0);
  int64_t left = orepa_event_open(OREPA_EVENT_MODULE, "left", 0);
  int64_t inner = orepa_event_open(OREPA_EVENT_OP, "inner", 0);
  orepa_event_close(outer, 0);
  orepa_event_close(inner, 99); /* too late */
  int64_t next = orepa_event_open(OREPA_EVENT_MODULE, "next", 0);
  int64_t last = orepa_event_open(OREPA_EVENT_MODULE, "last", 0);
  orepa_trace *trace = orepa_trace_stop();
  assert_true(event_at(trace, left)->end == event_at(trace, outer)->end);
  assert_true(event_at(trace, inner)->end == event_at(trace, outer)->end);
  assert_int_equal(event_at(trace, inner)->bytes, 0);
  assert_int_equal(event_at(trace, next)->around, -1);
  assert_int_equal(event_at(trace, last)->around, next);
  assert_true(event_at(trace, last)->end >= event_at(trace, last)->start);
  assert_true(event_at(trace, next)->end >= event_at(trace, last)->start);
  orepa_trace_free(trace);
}

static void test_many_events_are_kept(void **unused) {
  (void)unused;
  enum { MANY = 5000 };
  done(orepa_trace_start());
  for (int k = 0; k < MANY; k++)
    orepa_event_close(orepa_event_open(OREPA_EVENT_MODULE, "module", k), 0);
  orepa_trace *trace = orepa_trace_stop();
  assert_int_equal(orepa_trace_count(trace), MANY);
  for (int k = 0; k < MANY; k++)
    assert_int_equal(event_at(trace, k)->number, k);
  orepa_trace_free(trace);
}

static void test_what_has_memory_at_the_end_is_kept_by_the_event_in_which_it_got_it(void **unused) {
  (void)unused;
  orepa_tensor *earlier = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(1000)));
  done(orepa_trace_start());
  orepa_release(must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(9)))); /* in no event */
  int64_t outer = orepa_event_open(OREPA_EVENT_MODULE, "outer", 0);
  orepa_tensor *a = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(100)));
  int64_t inner = orepa_event_open(OREPA_EVENT_OP, "inner", 0);
  orepa_tensor *b = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(30)));
  orepa_tensor *view = must(orepa_slice(b, 0, 3, 5, 1));
  orepa_tensor *nothing = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(0, 4)));
  orepa_release(must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(2000))));
  orepa_event_close(inner, 0);
  orepa_tensor *c = must(orepa_rand(OREPA_FLOAT64, CPU, SHAPE(7)));
  orepa_event_close(outer, 0);
  orepa_release(a);
  orepa_release(b); /* the view holds its storage */
  orepa_release(earlier);
  orepa_trace *trace = orepa_trace_stop();
  orepa_release(view);
  orepa_release(nothing);
  assert_int_equal(event_at(trace, outer)->kept, 7 * 8);
  assert_int_equal(event_at(trace, inner)->kept, 30 * 4);
  orepa_trace_free(trace);

  done(orepa_trace_start()); /* events have the same places in the next trace */
  outer = orepa_event_open(OREPA_EVENT_MODULE, "outer", 0);
  inner = orepa_event_open(OREPA_EVENT_OP, "inner", 0);
  orepa_release(c);
  trace = orepa_trace_stop();
  assert_int_equal(event_at(trace, outer)->kept, 0);
  assert_int_equal(event_at(trace, inner)->kept, 0);
  orepa_trace_free(trace);
}

static void *elsewhere(void *unused) {
  (void)unused;
  assert_refused(orepa_trace_start(), "under way");
  assert_false(orepa_is_traced());
  assert_int_equal(orepa_event_open(OREPA_EVENT_OP, "elsewhere", 0), -1);
  orepa_release(must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(3))));
  assert_null(orepa_trace_stop());
  return NULL;
}

static void test_one_thread_is_traced(void **unused) {
  (void)unused;
  pthread_t thread;
  done(orepa_trace_start());
  assert_refused(orepa_trace_start(), "do not nest");
  assert_int_equal(pthread_create(&thread, NULL, elsewhere, NULL), 0);
  pthread_join(thread, NULL);
  orepa_trace *trace = orepa_trace_stop();
  assert_int_equal(orepa_trace_count(trace), 0);
  orepa_trace_free(trace);
}

/* ---- what enters by itself ---- */

/* The first event of a kind with that name, from `from` on; fails if there is none. */
static const orepa_event *event_named(const orepa_trace *trace, orepa_event_kind kind, const char *name, int64_t from) {
  for (int64_t k = from; k < orepa_trace_count(trace); k++) {
    const orepa_event *e = event_at(trace, k);
    if (e->kind == kind && !strcmp(e->name, name))
      return e;
  }
  fail_msg("no event '%s'", name);
  return NULL;
}

static const char *name_around(const orepa_trace *trace, const orepa_event *e) {
  return e->around < 0 ? "" : event_at(trace, e->around)->name;
}

static void test_kernels_are_events_and_no_timings(void **unused) {
  (void)unused;
  orepa_timing row;
  orepa_tensor *x = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(3)));
  orepa_set_timings(false);
  done(orepa_trace_start());
  int64_t op = orepa_event_open(OREPA_EVENT_OP, "op", 0);
  orepa_release(must(orepa_relu(x)));
  orepa_event_close(op, 0);
  orepa_trace *trace = orepa_trace_stop();
  orepa_release(must(orepa_relu(x)));
  assert_false(orepa_timing_at(0, &row));
  assert_int_equal(orepa_trace_count(trace), 2);
  const orepa_event *e = event_named(trace, OREPA_EVENT_KERNEL, "elementwise", 0);
  assert_string_equal(e->op, "relu");
  assert_string_equal(e->detail, "");
  assert_int_equal(e->around, op);
  orepa_trace_free(trace);
  orepa_release(x);
}

static void test_timings_and_a_trace_go_together(void **unused) {
  (void)unused;
  orepa_timing row;
  orepa_tensor *x = must(orepa_rand(OREPA_FLOAT32, CPU, SHAPE(3)));
  orepa_set_timings(true);
  done(orepa_trace_start());
  orepa_release(must(orepa_relu(x)));
  orepa_trace *trace = orepa_trace_stop();
  orepa_release(must(orepa_relu(x)));
  assert_int_equal(orepa_trace_count(trace), 1);
  assert_true(orepa_timing_at(0, &row) && row.calls == 2);
  orepa_set_timings(false);
  assert_false(timings_wanted());
  orepa_trace_free(trace);
  orepa_release(x);
}

/* The gradients of sum(relu(x * x)), x made before or in the trace. */
static void test_nodes_are_events_under_backward(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(full(device, SHAPE(4), 2));
    done(orepa_trace_start());
    int64_t before = orepa_event_open(OREPA_EVENT_MODULE, "before", 1);
    orepa_tensor *square = must(orepa_mul(x, x));
    orepa_event_close(before, 0);
    int64_t module = orepa_event_open(OREPA_EVENT_MODULE, "module", 2);
    orepa_tensor *y = must(orepa_relu(square)), *sum = must(orepa_reduce(OREPA_SUM, y, 0, NULL, false));
    orepa_event_close(module, 0);
    done(orepa_backward(sum, NULL, false));
    orepa_trace *trace = orepa_trace_stop();
    const orepa_event *a = event_at(trace, before), *b = event_at(trace, module);
    assert_int_equal(a->nodes_at_end - a->nodes_at_start, 1);
    assert_int_equal(b->nodes_at_end - b->nodes_at_start, 2);
    const orepa_event *mul = event_named(trace, OREPA_EVENT_NODE, "mul", 0),
                      *relu = event_named(trace, OREPA_EVENT_NODE, "relu", 0);
    assert_true((uint64_t)mul->number >= a->nodes_at_start && (uint64_t)mul->number < a->nodes_at_end);
    assert_true((uint64_t)relu->number >= b->nodes_at_start && (uint64_t)relu->number < b->nodes_at_end);
    assert_string_equal(name_around(trace, mul), "backward");
    assert_string_equal(name_around(trace, relu), "backward");
    assert_int_equal(event_named(trace, OREPA_EVENT_OP, "backward", 0)->around, -1);
    assert_true(relu->end <= mul->start);
    orepa_trace_free(trace);
    orepa_release(sum);
    orepa_release(y);
    orepa_release(square);
    orepa_release(x);
  }
}

static void test_a_pass_that_fails_leaves_nothing_open(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(full(CPU, SHAPE(4), 2)), *y = must(orepa_mul(x, x)),
               *sum = must(orepa_reduce(OREPA_SUM, y, 0, NULL, false));
  done(orepa_backward(sum, NULL, false));
  done(orepa_trace_start());
  assert_refused(orepa_backward(sum, NULL, false), "freed");
  int64_t after = orepa_event_open(OREPA_EVENT_OP, "after", 0);
  orepa_trace *trace = orepa_trace_stop();
  assert_int_equal(event_at(trace, after)->around, -1);
  orepa_trace_free(trace);
  orepa_release(sum);
  orepa_release(y);
  orepa_release(x);
}

/* ---- multiply-adds ---- */

static int64_t macs_of(const orepa_trace *trace, const char *op) {
  int64_t sum = 0;
  for (int64_t k = 0; k < orepa_trace_count(trace); k++)
    if (event_at(trace, k)->op && !strcmp(event_at(trace, k)->op, op))
      sum += event_at(trace, k)->macs;
  return sum;
}

/* The trace of a forward and a backward pass that y = f(a, b) makes. */
static orepa_trace *trace_both(orepa_tensor *(*f)(orepa_tensor *a, orepa_tensor *b), orepa_tensor *a, orepa_tensor *b) {
  done(orepa_trace_start());
  orepa_tensor *y = must(f(a, b)), *sum = sum_of(y);
  done(orepa_backward(sum, NULL, false));
  orepa_trace *trace = orepa_trace_stop();
  orepa_release(sum);
  orepa_release(y);
  orepa_release(a);
  orepa_release(b);
  return trace;
}

static orepa_tensor *grouped_conv(orepa_tensor *x, orepa_tensor *w) {
  return orepa_conv2d(x, w, NULL, &(orepa_conv){{2, 1}, {1, 0}, {1, 1}, 2});
}

static void test_macs_of_a_convolution(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_trace *trace = trace_both(grouped_conv, wanting(full(device, SHAPE(3, 4, 9, 8), 1)),
                                    wanting(full(device, SHAPE(6, 2, 3, 5), 1)));
    int64_t macs = 3 * 6 * 5 * 4 * 2 * 3 * 5; /* of 3x6x5x4 numbers each 2*3*5 */
    assert_int_equal(macs_of(trace, "conv2d"), macs);
    assert_int_equal(macs_of(trace, "conv2d's data gradient"), macs);
    assert_int_equal(macs_of(trace, "conv2d's weight gradient"), macs);
    const orepa_event *e = event_named(trace, OREPA_EVENT_KERNEL, "conv_forward", 0);
    assert_string_equal(e->detail, "3x5 stride 2x1 groups 2, 4 -> 6, 9x8");
    orepa_trace_free(trace);
  }
}

static void test_macs_of_a_product(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_trace *trace =
        trace_both(orepa_matmul, wanting(full(device, SHAPE(2, 3, 4), 1)), wanting(full(device, SHAPE(2, 4, 5), 1)));
    assert_int_equal(macs_of(trace, "matmul"), 3 * 2 * 3 * 4 * 5); /* and each of both gradients */
    orepa_trace_free(trace);
  }
}

static orepa_tree *leaf(orepa_leaf_kind kind, int slot, int64_t in, int64_t out, int64_t groups, int64_t kernel) {
  orepa_tree *tree = orepa_tree_leaf(
      &(orepa_leaf){.kind = kind, .slot = slot, .in = in, .out = out, .groups = groups, .kernel = {kernel, kernel}});
  assert_non_null(tree);
  return tree;
}

/* A kernel alone, a 1x1 to 6 channels before a 3x3, a 1x1 before a pattern, and depthwise before pointwise. */
static orepa_tree *four_branches(void) {
  orepa_tree *branches[4] = {
      orepa_tree_chain(1, (orepa_tree *[]){leaf(OREPA_LEAF_PARAMETER, 0, 4, 8, 1, 3)}, 1, false),
      orepa_tree_chain(
          2, (orepa_tree *[]){leaf(OREPA_LEAF_PARAMETER, 1, 4, 6, 1, 1), leaf(OREPA_LEAF_PARAMETER, 2, 6, 8, 1, 3)}, 1,
          false),
      orepa_tree_chain(
          2, (orepa_tree *[]){leaf(OREPA_LEAF_PARAMETER, 3, 4, 8, 1, 1), leaf(OREPA_LEAF_PATTERN, 4, 8, 8, 8, 3)}, 1,
          false),
      orepa_tree_chain(
          2, (orepa_tree *[]){leaf(OREPA_LEAF_PARAMETER, 5, 4, 8, 4, 3), leaf(OREPA_LEAF_PARAMETER, 6, 8, 8, 1, 1)}, 1,
          false),
  };
  orepa_tree *sum = orepa_tree_sum(4, branches, 1, (int64_t[]){3, 3});
  assert_non_null(sum);
  return sum;
}

static void test_macs_of_squeezing_are_those_of_both_forms(void **unused) {
  (void)unused;
  static const int64_t shapes[7][4] = {{8, 4, 3, 3}, {6, 4, 1, 1}, {8, 6, 3, 3}, {8, 4, 1, 1},
                                       {0},          {8, 1, 3, 3}, {8, 8, 1, 1}};
  for (int fast = 0; fast < 2; fast++) {
    orepa_tree *tree = four_branches();
    orepa_tree_set_fast(tree, fast);
    orepa_tensor *slots[7];
    for (int k = 0; k < 7; k++)
      slots[k] = k == 4 ? full(CPU, SHAPE(3, 3), 1) : wanting(full(CPU, 4, shapes[k], 1));
    done(orepa_trace_start());
    orepa_tensor *w = must(orepa_squeeze(tree, 7, slots, NULL)), *sum = sum_of(w);
    done(orepa_backward(sum, NULL, false));
    orepa_trace *trace = orepa_trace_stop();
    int64_t product = 8 * 6 * 9 * 4, pattern = 8 * 4 * 9, depthwise = 8 * 8 * 9;
    assert_int_equal(macs_of(trace, "squeeze"), product + pattern + depthwise);
    /* a pattern has no gradient; leaf by leaf it is computed, and not used */
    assert_int_equal(macs_of(trace, "squeeze's gradient"), 2 * product + (fast ? 1 : 2) * pattern + 2 * depthwise);
    event_named(trace, OREPA_EVENT_NODE, "squeeze", 0);
    orepa_trace_free(trace);
    orepa_release(sum);
    orepa_release(w);
    for (int k = 0; k < 7; k++)
      orepa_release(slots[k]);
    orepa_tree_release(tree);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_nothing_is_kept_while_off),
      cmocka_unit_test(test_events_nest_in_the_order_in_which_they_begin),
      cmocka_unit_test(test_what_is_left_open_ends_with_what_is_around_it),
      cmocka_unit_test(test_many_events_are_kept),
      cmocka_unit_test(test_what_has_memory_at_the_end_is_kept_by_the_event_in_which_it_got_it),
      cmocka_unit_test(test_one_thread_is_traced),
      cmocka_unit_test(test_kernels_are_events_and_no_timings),
      cmocka_unit_test(test_timings_and_a_trace_go_together),
      cmocka_unit_test(test_nodes_are_events_under_backward),
      cmocka_unit_test(test_a_pass_that_fails_leaves_nothing_open),
      cmocka_unit_test(test_macs_of_a_convolution),
      cmocka_unit_test(test_macs_of_a_product),
      cmocka_unit_test(test_macs_of_squeezing_are_those_of_both_forms),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
