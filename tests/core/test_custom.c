/* test_custom.c: ops from outside the engine: what their backward function is given, what is checked of what it gives,
 * and when the payload goes. tests/spec/function_spec.lua has those that are written in Lua. */
#include "engine_test.h"

#include "autograd/autograd.h"

/* ---- an op of the tests': p = a*b, q = a + b, and a's positive elements as integers ---- */

typedef struct {
  int calls, disposed;
  bool needs[3], had_dp, had_bits;
  double dq; /* the first of q's gradient */
  bool fails;
  orepa_tensor *gives; /* as a's gradient */
} pair;

static int pair_backward(void *payload, const orepa_custom_call *call) {
  pair *p = payload;
  assert_true(call->inputs == 3 && call->outputs == 3 && call->saved == 2);
  p->calls++;
  memcpy(p->needs, call->needs, sizeof p->needs);
  p->had_dp = call->dys[0] != NULL;
  p->had_bits = call->dys[2] != NULL;
  orepa_tensor *first = must(orepa_select(call->dys[1], 0, 0));
  done(orepa_item(first, &p->dq));
  orepa_release(first);
  for (int k = 0; k < 2; k++) { /* whether it is asked for or not */
    orepa_tensor *product = must(orepa_mul(call->dys[0], call->kept[1 - k]));
    call->dxs[k ? 2 : 0] = must(orepa_add(product, call->dys[1]));
    orepa_release(product);
  }
  if (p->gives) {
    orepa_release(call->dxs[0]);
    call->dxs[0] = orepa_retain(p->gives);
  }
  return p->fails ? error_set("pair: fails") : 0;
}

static void pair_dispose(void *payload) {
  ((pair *)payload)->disposed++;
}

static const orepa_custom pair_kind = {pair_backward, pair_dispose};

static void apply_pair(pair *p, orepa_tensor *a, orepa_tensor *b, orepa_tensor **results) {
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *ys[3] = {must(orepa_mul(a, b)), must(orepa_add(a, b)), must(orepa_to(a, OREPA_INT64, CPU))};
  orepa_set_grad_enabled(was);
  char name[] = "pair";
  orepa_custom_forward f = {name, 3, 2, 3, (orepa_tensor *[]){a, NULL, b}, (orepa_tensor *[]){a, b}, ys, NULL};
  done(orepa_custom_results(&pair_kind, p, &f, results));
  name[0] = '?'; /* it was copied */
  release_all(3, ys);
}

static void test_what_backward_is_given(void **unused) {
  (void)unused;
  pair p = {0};
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = wanting(numbered(CPU, SHAPE(2), 3)), *ys[3];
  apply_pair(&p, a, b, ys);
  assert_values(ys[0], 3, 8);
  assert_true(orepa_requires_grad(ys[0]) && orepa_requires_grad(ys[1]) && !orepa_requires_grad(ys[2]));
  orepa_tensor *sum = sum_of(ys[0]), *more = sum_of(ys[1]), *all = must(orepa_add(sum, more));
  done(orepa_backward(sum, NULL, true)); /* nothing arrives at q: zeros */
  assert_true(p.had_dp && !p.had_bits && p.dq == 0 && p.needs[0] && !p.needs[1] && p.needs[2]);
  assert_values(orepa_grad(a), 3, 4);
  orepa_tensor *da;
  done(orepa_gradients(1, &all, NULL, 1, &a, false, &da));
  assert_true(p.dq == 1 && p.needs[0] && !p.needs[2] && p.calls == 2 && p.disposed == 1);
  assert_values(da, 4, 5);
  assert_values(orepa_grad(b), 1, 2);
  assert_refused(orepa_backward(all, NULL, false), "freed by an earlier backward");
  RELEASE(a, b, ys[0], ys[1], ys[2], sum, more, all, da);
  assert_int_equal(p.disposed, 1);
}

static void test_without_a_graph(void **unused) {
  (void)unused;
  pair p = {0};
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = full(CPU, SHAPE(2), 1), *ys[3];
  bool was = orepa_set_grad_enabled(false);
  apply_pair(&p, a, b, ys);
  orepa_set_grad_enabled(was);
  assert_true(!orepa_requires_grad(ys[0]) && p.disposed == 1);
  release_all(3, ys);
  apply_pair(&p, b, b, ys); /* nothing that is wanted */
  assert_true(!orepa_requires_grad(ys[0]) && p.disposed == 2);
  release_all(3, ys);
  apply_pair(&p, b, a, ys); /* a graph that is never used */
  release_all(3, ys);
  assert_true(p.disposed == 3 && p.calls == 0);
  RELEASE(a, b);
}

static void test_what_backward_gives_must_fit(void **unused) {
  (void)unused;
  size_t live = orepa_memory_live();
  orepa_tensor *longer = full(CPU, SHAPE(3), 1), *elsewhere = full(REF, SHAPE(2), 1),
               *wide = must(orepa_full(OREPA_FLOAT64, CPU, SHAPE(2), 1));
  pair bad[] = {{.gives = longer}, {.gives = elsewhere}, {.gives = wide}, {.fails = true}};
  const char *const words[] = {
      "pair: backward gave float32 3 on 'cpu' as the gradient of argument 1, which is float32 2 on 'cpu'",
      "pair: backward gave float32 2 on 'ref' as the gradient of argument 1", "pair: backward gave float64 2",
      "pair: fails"};
  for (int k = 0; k < 4; k++) {
    orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = full(CPU, SHAPE(2), 1), *ys[3];
    apply_pair(&bad[k], a, b, ys);
    orepa_tensor *sum = sum_of(ys[0]);
    assert_refused(orepa_backward(sum, NULL, false), words[k]);
    assert_true(!orepa_grad(a) && bad[k].disposed == 1);
    RELEASE(a, b, ys[0], ys[1], ys[2], sum);
  }
  RELEASE(longer, elsewhere, wide);
  assert_int_equal(orepa_memory_live(), live);
}

/* A gradient that is another's memory stays as it is when more is added to it. */
static void test_a_gradient_that_others_hold(void **unused) {
  (void)unused;
  pair p = {.gives = wanting(full(CPU, SHAPE(2), 5))};
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = full(CPU, SHAPE(2), 1), *ys[3];
  apply_pair(&p, a, b, ys);
  orepa_tensor *both = must(orepa_add(ys[0], a)), *sum = sum_of(both);
  done(orepa_backward(sum, NULL, false));
  assert_values(orepa_grad(a), 6, 6);
  assert_values(p.gives, 5, 5);
  assert_true(!orepa_requires_grad(orepa_grad(a)) && orepa_is_leaf(orepa_grad(a)));
  RELEASE(a, b, ys[0], ys[1], ys[2], both, sum, p.gives);
}

static void test_what_was_saved_is_watched(void **unused) {
  (void)unused;
  pair p = {0};
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = full(CPU, SHAPE(2), 1), *ys[3];
  apply_pair(&p, a, b, ys);
  orepa_tensor *sum = sum_of(ys[0]);
  done(orepa_fill_(b, 3));
  assert_refused(orepa_backward(sum, NULL, false),
                 "pair: backward needs a tensor (float32 2) that was changed in place");
  assert_true(p.calls == 0 && p.disposed == 1);
  RELEASE(a, b, ys[0], ys[1], ys[2], sum);
}

/* ---- an op that gives back its input, and keeps its result ---- */

typedef struct {
  orepa_tensor *kept;
  int disposed;
} keeper;

static int keeper_backward(void *payload, const orepa_custom_call *call) {
  (void)payload;
  call->dxs[0] = orepa_retain(call->dys[0]);
  return 0;
}

static void keeper_dispose(void *payload) {
  keeper *k = payload;
  orepa_release(k->kept);
  k->disposed++;
}

static orepa_tensor *keep(keeper *k, orepa_tensor *x, orepa_tensor *y) {
  static const orepa_custom custom = {keeper_backward, keeper_dispose};
  orepa_tensor *result;
  k->kept = orepa_retain(y);
  orepa_custom_forward f = {"keep", 1, 1, 1, &x, &y, &y, NULL};
  done(orepa_custom_results(&custom, k, &f, &result));
  return result;
}

static void test_results_that_are_kept_or_were_given(void **unused) {
  (void)unused;
  size_t live = orepa_memory_live();
  keeper k = {0};
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *h = must(orepa_mul(x, x)), *y = must(orepa_detach(h));
  orepa_tensor *own = must(orepa_clone(y)), *result = keep(&k, h, own);
  orepa_release(own);
  orepa_release(result); /* the node keeps what it computed, and not itself */
  assert_int_equal(k.disposed, 1);
  result = keep(&k, h, h);
  assert_true(result != h && orepa_shares_storage(result, h));
  assert_refused(orepa_fill_(result, 0), "fill_: this tensor (float32 2) is a view of another");
  assert_refused(orepa_fill_(h, 0), "is seen by views");
  orepa_tensor *sum = sum_of(result);
  done(orepa_backward(sum, NULL, false));
  assert_values(orepa_grad(x), 2, 4);
  RELEASE(x, h, y, result, sum);
  assert_int_equal(k.disposed, 2);
  assert_int_equal(orepa_memory_live(), live);
}

/* ---- in a checkpoint ---- */

static struct {
  pair p;
  int calls;
} part;

static int compute(void *unused, int inputs, orepa_tensor *const *xs, int outputs, orepa_tensor **ys) {
  (void)unused;
  orepa_tensor *results[3];
  assert_true(inputs == 2 && outputs == 1);
  part.calls++;
  apply_pair(&part.p, xs[0], xs[1], results);
  ys[0] = must(orepa_add(results[0], results[1]));
  release_all(3, results);
  return 0;
}

static void dispose_nothing(void *unused) {
  (void)unused;
}

static void test_in_a_checkpoint(void **unused) {
  (void)unused;
  orepa_tensor *xs[] = {wanting(numbered(CPU, SHAPE(2), 1)), wanting(numbered(CPU, SHAPE(2), 3))}, *y, *result;
  orepa_checkpoint *c = orepa_checkpoint_begin(&(orepa_recompute){compute, dispose_nothing}, NULL, 2, xs);
  done(compute(NULL, 2, xs, 1, &y));
  assert_true(orepa_requires_grad(y) && part.p.disposed == 1); /* no node of its own yet */
  orepa_checkpoint_end(c);
  done(orepa_checkpoint_results(c, 1, &y, &result));
  orepa_checkpoint_release(c);
  orepa_tensor *sum = sum_of(result);
  done(orepa_backward(sum, NULL, false));
  assert_true(part.calls == 2 && part.p.calls == 1 && part.p.disposed == 2);
  assert_values(orepa_grad(xs[0]), 4, 5);
  RELEASE(xs[0], xs[1], y, result, sum);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_what_backward_is_given),
      cmocka_unit_test(test_without_a_graph),
      cmocka_unit_test(test_what_backward_gives_must_fit),
      cmocka_unit_test(test_a_gradient_that_others_hold),
      cmocka_unit_test(test_what_was_saved_is_watched),
      cmocka_unit_test(test_results_that_are_kept_or_were_given),
      cmocka_unit_test(test_in_a_checkpoint),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
