/* test_hooks.c: functions on the way of a gradient, and tensors that retain theirs. tests/spec/hooks_spec.lua has what
 * a script sees of it. */
#include "engine_test.h"

#include "autograd/autograd.h"

/* ---- a hook of the tests': notes what it sees, and gives back the gradient times a factor, if that isn't 0 ---- */

enum { MOST_CALLS = 16 };

static struct {
  int calls, disposed;
  int who[MOST_CALLS];
  double first[MOST_CALLS];
} seen;

typedef struct {
  int name;
  double factor;
  bool fails, writes;
  orepa_tensor *gives;
  orepa_hook *removes;
  orepa_tensor *starts; /* an inner pass */
} hook;

static int call_hook(void *payload, orepa_tensor *g, orepa_tensor **instead) {
  hook *h = payload;
  orepa_tensor *one = must(orepa_reshape(g, SHAPE(-1))), *first = must(orepa_select(one, 0, 0));
  seen.who[seen.calls] = h->name;
  done(orepa_item(first, &seen.first[seen.calls++]));
  RELEASE(one, first);
  if (h->removes)
    orepa_hook_remove(h->removes);
  if (h->writes)
    done(orepa_fill_(g, 7));
  if (h->starts)
    done(orepa_backward(h->starts, NULL, true));
  if (h->gives)
    *instead = orepa_retain(h->gives);
  if (h->factor != 0) {
    orepa_tensor *factor = full(orepa_tensor_device(g), SCALAR, h->factor);
    *instead = must(orepa_mul(g, factor));
    orepa_release(factor);
  }
  return h->fails ? error_set("hook: fails") : 0;
}

static void dispose_hook(void *payload) {
  (void)payload;
  seen.disposed++;
}

static const orepa_hook_kind kind = {call_hook, dispose_hook};

/* Registers, and keeps no handle. */
static void put(orepa_tensor *t, hook *h) {
  orepa_hook *handle = orepa_register_hook(t, &kind, h);
  assert_non_null(handle);
  orepa_hook_release(handle);
}

static int begin(void **unused) {
  (void)unused;
  memset(&seen, 0, sizeof seen);
  return !orepa_grad_enabled();
}

#define TEST(function) cmocka_unit_test_setup(function, begin)

static void assert_calls(int count, const int *who, const double *first) {
  assert_int_equal(seen.calls, count);
  for (int k = 0; k < count; k++)
    if (seen.who[k] != who[k] || seen.first[k] != first[k])
      fail_msg("call %d: hook %d with %g, not hook %d with %g", k, seen.who[k], seen.first[k], who[k], first[k]);
}

/* ---- order and replacement: numbers of PyTorch 2.13 ---- */

/* y = sum(h*h) + sum(h) with h = 2x, x = {1, 2}. */
static void test_hooks_are_called_in_order_and_exchange_the_gradient(void **unused) {
  (void)unused;
  for_each_device(device) {
    begin(NULL);
    hook tenfold = {.name = 1, .factor = 10}, looks = {.name = 2}, leaf = {.name = 3, .factor = -1};
    orepa_tensor *x = wanting(numbered(device, SHAPE(2), 1)), *two = full(device, SHAPE(2), 2);
    orepa_tensor *h = must(orepa_mul(x, two)), *square = must(orepa_mul(h, h)), *all = must(orepa_add(square, h));
    orepa_tensor *y = sum_of(all);
    done(orepa_retain_grad(h)); /* before the hooks, and sees what they leave all the same */
    put(h, &tenfold);
    put(h, &looks);
    put(x, &leaf);
    for (int pass = 1; pass <= 2; pass++) {
      seen.calls = 0;
      done(orepa_backward(y, NULL, pass == 1));
      assert_calls(3, (const int[]){1, 2, 3}, (const double[]){5, 50, 100});
      assert_values(orepa_grad(h), 50 * pass, 90 * pass); /* added up, as a leaf's */
      assert_values(orepa_grad(x), -100 * pass, -180 * pass);
    }
    assert_int_equal(seen.disposed, 2); /* with the graph; the leaf's stays */
    RELEASE(x, two, h, square, all, y);
    assert_int_equal(seen.disposed, 3);
  }
}

static void test_a_leafs_hook_sees_the_sum_of_one_pass(void **unused) {
  (void)unused;
  hook looks = {.name = 1};
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *square = must(orepa_mul(x, x)),
               *twice = must(orepa_add(x, x));
  orepa_tensor *all = must(orepa_add(square, twice)), *y = sum_of(all);
  put(x, &looks);
  done(orepa_backward(y, NULL, true));
  done(orepa_backward(y, NULL, true));
  assert_calls(2, (const int[]){1, 1}, (const double[]){4, 4});
  assert_values(orepa_grad(x), 8, 12);
  done(orepa_backward(x, all, false)); /* from the leaf itself */
  assert_calls(3, (const int[]){1, 1, 1}, (const double[]){4, 4, 3});
  RELEASE(x, square, twice, all, y);
}

static void test_hooks_stay_where_they_are_when_the_tensor_changes(void **unused) {
  (void)unused;
  hook before = {.name = 1}, after = {.name = 2};
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *three = full(CPU, SHAPE(2), 3),
               *h = must(orepa_add(x, three));
  done(orepa_retain_grad(h));
  put(h, &before);
  done(orepa_apply_in_place(orepa_function_by_name("mul"), (orepa_operand[]){{.tensor = h}, {.tensor = three}}));
  put(h, &after);
  orepa_tensor *y = sum_of(h);
  done(orepa_backward(y, NULL, false));
  assert_calls(2, (const int[]){2, 1}, (const double[]){1, 3});
  assert_values(orepa_grad(h), 1, 1); /* of what the tensor is */
  assert_values(orepa_grad(x), 3, 3);
  RELEASE(x, three, h, y);
}

static void test_a_hook_is_called_when_nobody_holds_its_tensor(void **unused) {
  (void)unused;
  hook looks = {.name = 1, .factor = 2};
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *h = must(orepa_mul(x, x));
  put(h, &looks);
  done(orepa_retain_grad(h));
  orepa_tensor *y = sum_of(h);
  orepa_release(h); /* with the gradient that it wanted to retain */
  done(orepa_backward(y, NULL, false));
  assert_values(orepa_grad(x), 4, 8);
  assert_int_equal(seen.disposed, 1);
  RELEASE(x, y);
}

/* ---- removing ---- */

static void test_removed_hooks_are_not_called(void **unused) {
  (void)unused;
  hook a = {.name = 1}, b = {.name = 2}, c = {.name = 3};
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *y = sum_of(x);
  orepa_hook *first = orepa_register_hook(x, &kind, &a), *second = orepa_register_hook(x, &kind, &b),
             *third = orepa_register_hook(x, &kind, &c);
  orepa_hook_remove(second);
  orepa_hook_remove(second);
  assert_int_equal(seen.disposed, 1);
  done(orepa_backward(y, NULL, true));
  assert_calls(2, (const int[]){1, 3}, (const double[]){1, 1});
  a.removes = first; /* itself */
  done(orepa_backward(y, NULL, true));
  c.removes = third;
  hook d = {.name = 4, .removes = third};
  orepa_hook *fourth = orepa_register_hook(x, &kind, &d);
  orepa_hook_remove(third);
  orepa_hook_release(third);
  third = orepa_register_hook(x, &kind, &c);
  d.removes = third; /* one that comes behind it */
  done(orepa_backward(y, NULL, false));
  assert_calls(5, (const int[]){1, 3, 1, 3, 4}, (const double[]){1, 1, 1, 1, 1});
  RELEASE(x, y);
  orepa_hook *handles[] = {first, second, third, fourth};
  for (int k = 0; k < 4; k++) { /* after everything is gone */
    orepa_hook_remove(handles[k]);
    orepa_hook_release(handles[k]);
  }
  assert_int_equal(seen.disposed, 5);
}

/* ---- what is refused ---- */

static void test_what_a_hook_may_not_give_or_do(void **unused) {
  (void)unused;
  size_t live = orepa_memory_live();
  orepa_tensor *longer = full(CPU, SHAPE(3), 1), *wide = must(orepa_full(OREPA_FLOAT64, CPU, SHAPE(2), 1)),
               *elsewhere = full(REF, SHAPE(2), 1);
  hook bad[] = {{.gives = longer}, {.gives = wide}, {.gives = elsewhere}, {.writes = true}, {.fails = true}};
  const char *const words[] = {"the hook gave float32 3 on 'cpu' for a gradient of float32 2 on 'cpu'",
                               "the hook gave float64 2", "float32 2 on 'ref' for a gradient of float32 2 on 'cpu'",
                               "changed its gradient (float32 2) in place", "hook: fails"};
  for (int on_leaf = 0; on_leaf < 2; on_leaf++)
    for (int k = 0; k < 5; k++) {
      orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *h = must(orepa_mul(x, x)), *z = must(orepa_mul(h, h));
      orepa_tensor *y = sum_of(z);
      put(on_leaf ? x : h, &bad[k]);
      assert_refused(orepa_backward(y, NULL, false), words[k]);
      assert_null(orepa_grad(x));
      assert_true(orepa_grad_enabled());
      assert_refused(orepa_backward(y, NULL, false), "freed by an earlier backward");
      RELEASE(x, h, z, y);
    }
  assert_int_equal(seen.disposed, 10);
  RELEASE(longer, wide, elsewhere);
  assert_int_equal(orepa_memory_live(), live);
}

static void test_where_there_is_no_gradient_there_is_no_hook(void **unused) {
  (void)unused;
  hook h = {.name = 1};
  orepa_tensor *c = full(CPU, SHAPE(2), 1), *x = wanting(full(CPU, SHAPE(2), 2)), *m = must(orepa_mul(x, x));
  orepa_tensor *y = sum_of(m);
  assert_null(orepa_register_hook(c, &kind, &h));
  assert_int_equal(seen.disposed, 1); /* taken over by a failure too */
  assert_refused(orepa_retain_grad(c), "retain_grad: this tensor (float32 2) requires no gradient");
  done(orepa_retain_grad(x)); /* a leaf does anyway */
  done(orepa_backward(y, NULL, false));
  assert_null(orepa_register_hook(m, &kind, &h));
  assert_refused(orepa_retain_grad(m), "computed by 'mul') was freed by an earlier backward");
  assert_values(orepa_grad(x), 4, 4);
  RELEASE(c, x, m, y);
}

/* ---- passes inside hooks ---- */

static void test_passes_inside_hooks(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *h = must(orepa_mul(x, x)), *y = sum_of(h);
  orepa_tensor *cube = must(orepa_mul(h, x)), *side = sum_of(cube);
  hook starts = {.name = 1, .starts = side}, looks = {.name = 2};
  orepa_tensor *z = must(orepa_add(y, side));
  put(cube, &looks);
  put(y, &starts); /* while gradients wait at cube and at x */
  put(x, &looks);
  done(orepa_backward(z, NULL, true));
  assert_values(orepa_grad(x), 3 + 2 + 3, 12 + 4 + 12);
  assert_int_equal(seen.calls, 1 + 2 + 2); /* at y; at cube and at x once in each pass */
  RELEASE(x, h, y, cube, side, z);
}

/* ---- many, and little memory ---- */

static void test_many_hooks_and_retained_gradients(void **unused) {
  (void)unused;
  size_t live = orepa_memory_live();
  hook h = {.name = 1};
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1));
  for (int k = 0; k < 10000; k++) {
    orepa_hook *handle = orepa_register_hook(x, &kind, &h);
    orepa_hook_remove(handle);
    orepa_hook_release(handle);
  }
  assert_int_equal(seen.disposed, 10000);
  orepa_tensor *chain[20] = {orepa_retain(x)};
  for (int k = 1; k < 20; k++) {
    chain[k] = must(orepa_add(chain[k - 1], x));
    done(orepa_retain_grad(chain[k]));
    done(orepa_retain_grad(chain[k])); /* once */
  }
  orepa_tensor *y = sum_of(chain[19]);
  done(orepa_backward(y, NULL, false));
  done(orepa_fill_(orepa_grad(chain[5]), 9)); /* each has its own memory */
  assert_values(orepa_grad(chain[4]), 1, 1);
  assert_values(orepa_grad(chain[6]), 1, 1);
  assert_values(orepa_grad(x), 20, 20);
  release_all(20, chain);
  RELEASE(x, y);
  assert_int_equal(orepa_memory_live(), live);
}

static void test_passes_that_run_out_of_memory(void **unused) {
  (void)unused;
  enum { MANY = 1 << 18 }; /* 1 MiB of float32 */
  size_t before = 0;       /* known after the first round, since kernels keep scratch */
  int failures = 0;
  for (size_t room = 0; failures >= 0; room += 1 << 19) {
    begin(NULL);
    hook looks = {.name = 1};
    orepa_tensor *x = wanting(full(CPU, SHAPE(MANY), 1)), *h = must(orepa_mul(x, x)), *y = sum_of(h);
    put(x, &looks);
    done(orepa_retain_grad(h));
    orepa_empty_cache(CPU);
    orepa_set_memory_limit(CPU, orepa_memory_live() + room);
    int failed = orepa_backward(y, NULL, false);
    orepa_set_memory_limit(CPU, 0);
    assert_true(!failed || orepa_error_is_out_of_memory());
    assert_true(!failed == (orepa_grad(x) != NULL));
    RELEASE(x, h, y);
    before = room == 0 ? orepa_memory_live() : before;
    assert_int_equal(orepa_memory_live(), before);
    assert_int_equal(seen.disposed, 1);
    failures = failed ? failures + 1 : -failures - 1;
  }
  assert_true(failures < -2); /* it failed more than once, and then did not */
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(test_hooks_are_called_in_order_and_exchange_the_gradient),
      TEST(test_a_leafs_hook_sees_the_sum_of_one_pass),
      TEST(test_hooks_stay_where_they_are_when_the_tensor_changes),
      TEST(test_a_hook_is_called_when_nobody_holds_its_tensor),
      TEST(test_removed_hooks_are_not_called),
      TEST(test_what_a_hook_may_not_give_or_do),
      TEST(test_where_there_is_no_gradient_there_is_no_hook),
      TEST(test_passes_inside_hooks),
      TEST(test_many_hooks_and_retained_gradients),
      TEST(test_passes_that_run_out_of_memory),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
