/* test_selection.c: the gradients of some tensors alone: what they are, what is not computed for them, and what they
 * leave alone. tests/spec/grad_spec.lua has networks. */
#include "engine_test.h"

#include "autograd/autograd.h"

/* Of one tensor, with respect to one. */
static orepa_tensor *gradient(orepa_tensor *y, orepa_tensor *x, bool retain) {
  orepa_tensor *dx;
  done(orepa_gradients(1, &y, NULL, 1, &x, retain, &dx));
  return dx;
}

/* ---- an op of the tests', y = a + b, that notes what is asked of it ---- */

static struct {
  int visits;
  bool asked[2];
} seen;

static int probe_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  seen.visits++;
  for (int k = 0; k < 2; k++) {
    seen.asked[k] = autograd_needs(node, k);
    dx[k] = orepa_retain(dy); /* asked or not */
  }
  return 0;
}

static const autograd_op probe_op = {"probe", probe_backward, NULL};

static orepa_tensor *probe(orepa_tensor *a, orepa_tensor *b) {
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *y = must(orepa_add(a, b));
  orepa_set_grad_enabled(was);
  autograd_node *node;
  done(autograd_record(&probe_op, y, (orepa_tensor *[]){a, b}, 2, 0, 1, &node));
  return y;
}

static int begin(void **unused) {
  (void)unused;
  memset(&seen, 0, sizeof seen);
  return !orepa_grad_enabled();
}

#define TEST(function) cmocka_unit_test_setup(function, begin)

/* ---- what they are ---- */

static void test_leaves_and_what_ops_made(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *a = wanting(numbered(device, SHAPE(2), 1)), *b = wanting(numbered(device, SHAPE(2), 3));
    orepa_tensor *h = must(orepa_mul(a, b)), *square = must(orepa_mul(h, h)), *all = must(orepa_add(square, a));
    orepa_tensor *y = sum_of(all), *xs[] = {b, h, a, y, h}, *dxs[5];
    done(orepa_gradients(1, &y, NULL, 5, xs, true, dxs));
    assert_values(dxs[0], 2 * 3 * 1, 2 * 8 * 2);
    assert_values(dxs[1], 6, 16);
    assert_values(dxs[2], 2 * 3 * 3 + 1, 2 * 8 * 4 + 1);
    assert_values(dxs[3], 1);
    assert_values(dxs[4], 6, 16);
    for (int k = 0; k < 5; k++) {
      assert_true(orepa_is_contiguous(dxs[k]) && orepa_is_leaf(dxs[k]) && !orepa_requires_grad(dxs[k]));
      done(orepa_fill_(dxs[k], 0)); /* each has memory of its own */
    }
    assert_true(!orepa_grad(a) && !orepa_grad(b));
    release_all(5, dxs);
    done(orepa_backward(y, NULL, false)); /* the graph is still there */
    assert_values(orepa_grad(a), 19, 65);
    orepa_tensor *found;
    assert_refused(orepa_gradients(1, &y, NULL, 1, &a, false, &found), "freed by an earlier backward");
    RELEASE(a, b, h, square, all, y);
  }
}

static void test_several_results_and_where_they_start(void **unused) {
  (void)unused;
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *h = must(orepa_mul(a, a)), *y = sum_of(h);
  orepa_tensor *dy = numbered(CPU, SHAPE(2), 10), *ys[] = {h, y, a}, *starts[] = {dy, NULL, dy}, *dx;
  done(orepa_gradients(3, ys, starts, 1, &a, true, &dx)); /* 2a*dy + 2a + dy */
  assert_values(dx, 20 + 2 + 10, 44 + 4 + 11);
  orepa_release(dx);
  assert_refused(orepa_gradients(3, ys, NULL, 1, &a, true, &dx),
                 "grad: a tensor of 2 needs the gradient to start from");
  assert_null(dx);
  orepa_tensor *c = full(CPU, SHAPE(2), 1);
  assert_refused(orepa_gradients(1, &c, &dy, 1, &a, true, &dx), "grad: nothing that this tensor");
  assert_refused(orepa_gradients(1, &h, &dy, 1, &c, true, &dx), "tensor 1 of those asked for (float32 2) requires no");
  orepa_tensor *expanded = must(orepa_expand(y, SHAPE(3))), *three = full(CPU, SHAPE(3), 2);
  done(orepa_gradients(1, &expanded, &three, 1, &y, false, &dx));
  assert_values(dx, 6);
  RELEASE(a, h, y, dy, c, dx, expanded, three);
}

static void test_one_without_a_part_in_it(void **unused) {
  (void)unused;
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = wanting(full(CPU, SHAPE(2), 1)),
               *h = must(orepa_mul(a, a));
  orepa_tensor *other = must(orepa_mul(b, b)), *y = sum_of(h), *xs[] = {other, a, b}, *dxs[3];
  done(orepa_gradients(1, &y, NULL, 3, xs, true, dxs));
  assert_true(!dxs[0] && !dxs[2]);
  assert_values(dxs[1], 2, 4);
  orepa_release(dxs[1]);
  done(orepa_gradients(1, &y, NULL, 1, &other, false, dxs)); /* nothing leads there: nothing is computed, or freed */
  assert_null(dxs[0]);
  done(orepa_backward(y, NULL, false));
  RELEASE(a, b, h, other, y);
}

/* ---- what is computed ---- */

static void test_only_what_leads_there_is_computed(void **unused) {
  (void)unused;
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = wanting(full(CPU, SHAPE(2), 1));
  orepa_tensor *below = probe(b, b), *h = probe(a, below), *y = sum_of(h);
  orepa_release(gradient(y, a, true));
  assert_true(seen.visits == 1 && seen.asked[0] && !seen.asked[1]);
  orepa_release(gradient(y, h, true));
  assert_int_equal(seen.visits, 1);
  orepa_release(gradient(y, below, true));
  assert_true(seen.visits == 2 && !seen.asked[0] && seen.asked[1]);
  orepa_tensor *db = gradient(y, b, true);
  assert_values(db, 2, 2);
  assert_true(seen.visits == 4 && seen.asked[0] && seen.asked[1]);
  done(orepa_backward(y, NULL, false));
  assert_true(seen.visits == 6 && seen.asked[0] && seen.asked[1]);
  RELEASE(a, b, below, h, y, db);
}

static void test_what_was_used_is_freed_and_the_rest_is_not(void **unused) {
  (void)unused;
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *h = must(orepa_mul(a, a)), *y = sum_of(h), *z = sum_of(h);
  orepa_tensor *dh = gradient(y, h, false), *dx;
  assert_values(dh, 1, 1);
  assert_refused(orepa_gradients(1, &y, NULL, 1, &h, false, &dx), "the graph behind 'sum' was freed");
  orepa_tensor *da = gradient(z, a, false); /* h's own part was not used */
  assert_values(da, 2, 4);
  orepa_tensor *later = sum_of(h), *again = gradient(later, h, true); /* up to h there is a graph */
  assert_values(again, 1, 1);
  assert_refused(orepa_gradients(1, &later, NULL, 1, &a, true, &dx), "the graph behind 'mul' was freed");
  RELEASE(a, h, y, z, dh, da, later, again);
}

static int count_call(void *payload, orepa_tensor *g, orepa_tensor **instead) {
  (void)g, (void)instead;
  ++*(int *)payload;
  return 0;
}

/* Also where an op gives gradients that nobody asked for. */
static void test_hooks_of_what_is_not_asked_for_are_not_called(void **unused) {
  (void)unused;
  static const orepa_hook_kind kind = {count_call, NULL};
  int calls = 0;
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = wanting(full(CPU, SHAPE(2), 1));
  orepa_tensor *below = must(orepa_mul(b, b)), *first = probe(a, below), *h = probe(first, b), *y = sum_of(h);
  orepa_tensor *hooked[] = {b, below};
  for (int k = 0; k < 2; k++)
    orepa_hook_release(orepa_register_hook(hooked[k], &kind, &calls));
  done(orepa_retain_grad(below));
  orepa_tensor *da = gradient(y, a, true);
  assert_values(da, 1, 1);
  assert_true(calls == 0 && !orepa_grad(below) && !orepa_grad(b));
  orepa_release(gradient(y, b, true));
  assert_int_equal(calls, 2); /* on the way, and there */
  RELEASE(a, b, below, first, h, y, da);
}

/* ---- a long chain: no recursion, and a table that grows ---- */

static void test_a_long_chain(void **unused) {
  (void)unused;
  enum { LENGTH = 200000 };
  size_t live = orepa_memory_live();
  orepa_tensor *a = wanting(full(CPU, SCALAR, 1)), *c = full(CPU, SCALAR, 1), *t = orepa_retain(a), *middle = NULL;
  for (int k = 0; k < LENGTH; k++) {
    orepa_tensor *next = must(orepa_mul(t, c));
    orepa_release(t);
    t = next;
    if (k == LENGTH / 2)
      middle = orepa_retain(t);
  }
  orepa_tensor *xs[] = {a, middle}, *dxs[2];
  done(orepa_gradients(1, &t, NULL, 2, xs, false, dxs));
  assert_values(dxs[0], 1);
  assert_values(dxs[1], 1);
  RELEASE(a, c, t, middle, dxs[0], dxs[1]);
  assert_int_equal(orepa_memory_live(), live);
}

/* ---- checkpoints: what is in them is not there when the graph is looked through ---- */

static struct {
  orepa_tensor *hidden; /* used by the part, and not among its inputs */
  int calls;
} part;

static int compute(void *unused, int inputs, orepa_tensor *const *xs, int outputs, orepa_tensor **ys) {
  (void)unused;
  assert_true(inputs == 1 && outputs == 1);
  part.calls++;
  orepa_tensor *h = must(orepa_mul(xs[0], part.hidden));
  ys[0] = must(orepa_mul(h, h));
  orepa_release(h);
  return 0;
}

static void dispose(void *unused) {
  (void)unused;
}

static orepa_tensor *checkpoint(orepa_tensor *x) {
  orepa_tensor *y, *result;
  orepa_checkpoint *c = orepa_checkpoint_begin(&(orepa_recompute){compute, dispose}, NULL, 1, &x);
  assert_non_null(c);
  done(compute(NULL, 1, &x, 1, &y));
  orepa_checkpoint_end(c);
  done(orepa_checkpoint_results(c, 1, &y, &result));
  orepa_checkpoint_release(c);
  orepa_release(y);
  return result;
}

static void test_through_checkpoints(void **unused) {
  (void)unused;
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *w = wanting(numbered(CPU, SHAPE(2), 3));
  part.hidden = must(orepa_mul(w, w));
  orepa_tensor *before = must(orepa_add(a, a)), *middle = checkpoint(before), *y = checkpoint(middle), *sum = sum_of(y);
  orepa_tensor *xs[] = {w, a, before, middle, part.hidden}, *expected[2];
  done(orepa_backward(sum, NULL, true)); /* sum of (middle * v)^2, middle = (2a v)^2, v = w^2 */
  expected[0] = must(orepa_clone(orepa_grad(w)));
  expected[1] = must(orepa_clone(orepa_grad(a)));
  done(orepa_set_grad(w, NULL));
  done(orepa_set_grad(a, NULL));
  for (int k = 0; k < 5; k++) { /* each alone */
    part.calls = 0;
    orepa_tensor *dx = gradient(sum, xs[k], true);
    double wanted[2];
    if (k < 2) {
      read_values(expected[k], wanted);
      assert_values(dx, wanted[0], wanted[1]);
    }
    assert_int_equal(part.calls, k == 3 ? 1 : 2);
    orepa_release(dx);
  }
  assert_true(!orepa_grad(w) && !orepa_grad(a));
  RELEASE(a, w, before, middle, y, sum, part.hidden, expected[0], expected[1]);
}

/* ---- little memory ---- */

static void test_passes_that_run_out_of_memory(void **unused) {
  (void)unused;
  enum { MANY = 1 << 18 }; /* 1 MiB of float32 */
  size_t before = 0;       /* known after the first round, since kernels keep scratch */
  int failures = 0;
  for (size_t room = 0; failures >= 0; room += 1 << 19) {
    orepa_tensor *a = wanting(full(CPU, SHAPE(MANY), 2)), *h = must(orepa_mul(a, a)), *z = must(orepa_mul(h, h));
    orepa_tensor *y = sum_of(z), *xs[] = {a, h}, *dxs[2];
    orepa_empty_cache(CPU);
    orepa_set_memory_limit(CPU, orepa_memory_live() + room);
    int failed = orepa_gradients(1, &y, NULL, 2, xs, false, dxs);
    orepa_set_memory_limit(CPU, 0);
    assert_true(!failed || (orepa_error_is_out_of_memory() && !dxs[0] && !dxs[1]));
    assert_null(orepa_grad(a));
    RELEASE(a, h, z, y, dxs[0], dxs[1]);
    before = room == 0 ? orepa_memory_live() : before;
    assert_int_equal(orepa_memory_live(), before);
    failures = failed ? failures + 1 : -failures - 1;
  }
  assert_true(failures < -2); /* it failed more than once, and then did not */
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(test_leaves_and_what_ops_made),
      TEST(test_several_results_and_where_they_start),
      TEST(test_one_without_a_part_in_it),
      TEST(test_only_what_leads_there_is_computed),
      TEST(test_hooks_of_what_is_not_asked_for_are_not_called),
      TEST(test_what_was_used_is_freed_and_the_rest_is_not),
      TEST(test_a_long_chain),
      TEST(test_through_checkpoints),
      TEST(test_passes_that_run_out_of_memory),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
