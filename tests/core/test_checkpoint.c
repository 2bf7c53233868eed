/* test_checkpoint.c: parts of a graph that are computed again, several outputs of one node, and passes inside a pass.
 * tests/spec/checkpoint_spec.lua has what modules see of it. */
#include "engine_test.h"

#include "autograd/autograd.h"
#include "ops/ops.h"

/* A part of the tests': a*b and exp(a + b), where a draw of random numbers is added to b. */
typedef struct {
  int calls, disposed;
  int fails_at; /* the call */
  double drawn; /* the first number of the last draw */
  bool recorded, recomputing;
  const orepa_device *device;
} part;

static int compute(part *p, orepa_tensor *a, orepa_tensor *b, orepa_tensor **ys) {
  if (++p->calls == p->fails_at)
    return error_set("part: call %d fails", p->calls);
  orepa_tensor *noise = must(orepa_rand(OREPA_FLOAT32, p->device, SHAPE(2))), *first = must(orepa_select(noise, 0, 0));
  done(orepa_item(first, &p->drawn));
  orepa_tensor *moved = must(orepa_add(b, noise)), *sum = must(orepa_add(a, b));
  p->recorded = orepa_is_recording();
  p->recomputing = orepa_is_recomputing();
  ys[0] = must(orepa_mul(a, moved));
  ys[1] = must(op_apply2(FUNCTION_exp, OPERAND(sum), OPERAND_NUMBER(0)));
  orepa_release(noise);
  orepa_release(first);
  orepa_release(moved);
  orepa_release(sum);
  return 0;
}

static int again(void *payload, int inputs, orepa_tensor *const *xs, int outputs, orepa_tensor **ys) {
  assert_true(inputs == 2 && outputs == 2);
  return compute(payload, xs[0], xs[1], ys);
}

static void dispose(void *payload) {
  ((part *)payload)->disposed++;
}

static void run(part *p, orepa_tensor *a, orepa_tensor *b, orepa_tensor **results) {
  orepa_tensor *ys[2] = {NULL};
  orepa_checkpoint *c = orepa_checkpoint_begin(&(orepa_recompute){again, dispose}, p, 2, (orepa_tensor *[]){a, b});
  assert_non_null(c);
  assert_true(orepa_grad_enabled() && !orepa_is_recording());
  done(compute(p, a, b, ys));
  orepa_checkpoint_end(c);
  assert_true(orepa_is_recording());
  done(orepa_checkpoint_results(c, 2, ys, results));
  orepa_checkpoint_release(c);
  orepa_release(ys[0]);
  orepa_release(ys[1]);
}

static void test_gradients_random_numbers_and_modes(void **unused) {
  (void)unused;
  for_each_device(device) {
    part plain = {.device = device}, kept = {.device = device};
    orepa_tensor *gradients[2][2], *ys[2];
    for (int k = 0; k < 2; k++) {
      orepa_manual_seed(5);
      orepa_tensor *a = wanting(numbered(device, SHAPE(2), 1)), *b = wanting(numbered(device, SHAPE(2), 3));
      orepa_tensor *a2 = must(orepa_mul(a, a));
      if (k)
        run(&kept, a2, b, ys);
      else
        done(compute(&plain, a2, b, ys));
      orepa_tensor *all = must(orepa_mul(ys[0], ys[1])), *sum = sum_of(all);
      orepa_release(must(orepa_rand(OREPA_FLOAT32, device, SHAPE(1))));
      orepa_rng before = orepa_rng_state();
      done(orepa_backward(sum, NULL, false));
      assert_int_equal(orepa_rng_state().draws, before.draws);
      assert_true(orepa_is_recording() && !orepa_is_recomputing());
      gradients[k][0] = orepa_retain(orepa_grad(a));
      gradients[k][1] = orepa_retain(orepa_grad(b));
      orepa_tensor *made[] = {a, b, a2, ys[0], ys[1], all, sum};
      for (int n = 0; n < 7; n++)
        orepa_release(made[n]);
    }
    assert_true(kept.calls == 2 && plain.calls == 1 && kept.disposed == 1);
    assert_true(kept.recorded && kept.recomputing && !plain.recomputing);
    assert_true(kept.drawn == plain.drawn);
    for (int k = 0; k < 2; k++) {
      double wanted[2];
      read_values(gradients[0][k], wanted);
      assert_values(gradients[1][k], wanted[0], wanted[1]);
      orepa_release(gradients[0][k]);
      orepa_release(gradients[1][k]);
    }
  }
}

static void test_outputs_without_gradient_and_without_need(void **unused) {
  (void)unused;
  part p = {.device = CPU};
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = full(CPU, SHAPE(2), 0), *ys[2];
  run(&p, a, b, ys);
  assert_true(orepa_requires_grad(ys[0]) && !orepa_is_leaf(ys[0]) && orepa_requires_grad(ys[1]));
  orepa_release(ys[0]);
  orepa_tensor *sum = sum_of(ys[1]);
  done(orepa_backward(sum, NULL, false));
  assert_near(orepa_grad(a), 1e-5, exp(1), exp(2));
  assert_true(p.disposed == 1 && !orepa_grad(b));
  orepa_release(ys[1]);
  orepa_release(sum);
  orepa_tensor *c = full(CPU, SHAPE(2), 1);
  run(&p, c, b, ys);
  assert_true(!orepa_requires_grad(ys[0]) && orepa_is_leaf(ys[1]) && p.disposed == 2);
  orepa_tensor *made[] = {a, b, c, ys[0], ys[1]};
  for (int n = 0; n < 5; n++)
    orepa_release(made[n]);
}

static void test_a_failure_frees_the_graph_and_changes_no_mode(void **unused) {
  (void)unused;
  size_t live = orepa_memory_live();
  part p = {.device = CPU, .fails_at = 2};
  orepa_tensor *a = wanting(numbered(CPU, SHAPE(2), 1)), *b = full(CPU, SHAPE(2), 0), *ys[2];
  orepa_tensor *twice = must(orepa_add(a, a));
  run(&p, twice, b, ys);
  orepa_tensor *all = must(orepa_mul(ys[0], ys[1])), *sum = sum_of(all);
  orepa_rng before = orepa_rng_state();
  assert_refused(orepa_backward(sum, NULL, false), "part: call 2 fails");
  assert_true(orepa_is_recording() && !orepa_is_recomputing() && orepa_rng_state().draws == before.draws);
  assert_true(p.disposed == 1 && !orepa_grad(a));
  assert_refused(orepa_backward(sum, NULL, false), "freed by an earlier backward");
  orepa_tensor *made[] = {a, b, twice, ys[0], ys[1], all, sum};
  for (int n = 0; n < 7; n++)
    orepa_release(made[n]);
  assert_int_equal(orepa_memory_live(), live);
}

/* ---- a pass inside a pass: an op of the tests', y = x, whose backward starts another one ---- */

static struct {
  orepa_tensor *start; /* of the inner pass */
  bool retain;
  int status;
} inner;

static int nesting_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  (void)node;
  orepa_tensor *ones = full(CPU, SHAPE(2), 1);
  inner.status = orepa_backward(inner.start, ones, inner.retain);
  orepa_release(ones);
  dx[0] = orepa_retain(dy);
  return 0;
}

static const autograd_op nesting_op = {"nesting", nesting_backward, NULL};

static orepa_tensor *nesting(orepa_tensor *x) {
  orepa_tensor *y = must(orepa_detach(x));
  autograd_node *node;
  done(autograd_record(&nesting_op, y, &x, 1, 0, 1, &node));
  return y;
}

/* y = 2h + nesting(3x) with h = x*x: h's node has its gradient when the inner pass starts from 5h. */
static void test_an_inner_pass_leaves_the_outer_ones_gradients_alone(void **unused) {
  (void)unused;
  for (int retain = 0; retain < 2; retain++) {
    orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *two = full(CPU, SHAPE(2), 2),
                 *three = full(CPU, SHAPE(2), 3);
    orepa_tensor *h = must(orepa_mul(x, x)), *five = full(CPU, SHAPE(2), 5), *side = must(orepa_mul(h, five));
    orepa_tensor *tripled = must(orepa_mul(x, three)), *nested = nesting(tripled), *doubled = must(orepa_mul(h, two));
    orepa_tensor *y = must(orepa_add(doubled, nested));
    inner.start = side;
    inner.retain = retain;
    int failed = orepa_backward(y, three, false);
    assert_int_equal(inner.status, 0);
    if (retain) { /* 3 * (2 * 2x + 3) and 5 * 2x */
      done(failed);
      assert_values(orepa_grad(x), 21 + 10, 33 + 20);
    } else { /* the inner pass used up what the outer one still needs */
      assert_refused(failed, "the graph behind 'mul' was freed by an earlier backward");
    }
    orepa_tensor *made[] = {x, two, three, h, five, side, tripled, nested, doubled, y};
    for (int n = 0; n < 10; n++)
      orepa_release(made[n]);
  }
}

static void test_an_inner_pass_through_the_op_that_started_it(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *ones = full(CPU, SHAPE(2), 1), *y = nesting(x);
  inner.start = y;
  inner.retain = false;
  done(orepa_backward(y, ones, false));
  assert_int_equal(inner.status, -1);
  assert_values(orepa_grad(x), 1, 1);
  orepa_release(x);
  orepa_release(ones);
  orepa_release(y);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_gradients_random_numbers_and_modes),
      cmocka_unit_test(test_outputs_without_gradient_and_without_need),
      cmocka_unit_test(test_a_failure_frees_the_graph_and_changes_no_mode),
      cmocka_unit_test(test_an_inner_pass_leaves_the_outer_ones_gradients_alone),
      cmocka_unit_test(test_an_inner_pass_through_the_op_that_started_it),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
