/* test_in_place.c: ops that write into a tensor: what is refused and how the error puts it, the gradients of what is
 * allowed, and saved tensors that were changed before backward needed them. */
#include "engine_test.h"

static int in_place(const char *function, orepa_tensor *t, orepa_tensor *other) {
  orepa_operand operands[3] = {{.tensor = t}, {.tensor = other}};
  return orepa_apply_in_place(orepa_function_by_name(function), operands);
}

static int in_place_number(const char *function, orepa_tensor *t, double number) {
  orepa_operand operands[3] = {{.tensor = t}, {.number = number}, {.number = 100}};
  return orepa_apply_in_place(orepa_function_by_name(function), operands);
}

static orepa_tensor *apply(const char *function, orepa_tensor *t) {
  return must(orepa_apply(orepa_function_by_name(function), &(orepa_operand){.tensor = t}));
}

/* x, then 2x as a tensor with history. */
static orepa_tensor *twice(orepa_tensor *x) {
  return must(orepa_add(x, x));
}

/* Backward with gradients 1, 2, ...; the tensor is given back. */
static void backward(orepa_tensor *y) {
  orepa_tensor *dy = numbered(orepa_tensor_device(y), orepa_rank(y), orepa_shape(y), 1);
  done(orepa_backward(y, dy, false));
  RELEASE(y, dy);
}

static void forget(orepa_tensor *x) {
  done(orepa_set_grad(x, NULL));
}

/* All ways to write into t, of (2): k = 0 ... WAYS - 1. */
enum { WAYS = 6 };
static const char *const way_names[WAYS] = {"add", "mul", "relu", "fill", "copy", "assign"};
static int write_by(int k, orepa_tensor *t, orepa_tensor *source) {
  switch (k) {
  case 0:
  case 1:
    return in_place(way_names[k], t, source);
  case 2:
    return in_place(way_names[k], t, NULL);
  case 3:
    return orepa_fill_(t, 7);
  case 4:
    return orepa_copy_(t, source);
  default:
    return orepa_assign_(t, 0, 0, 2, source);
  }
}

/* Each way is refused with these words and its own name, and t stays as it was. */
static void assert_all_refused(orepa_tensor *t, orepa_tensor *source, const char *words) {
  double before[MOST_VALUES], after[MOST_VALUES];
  read_values(t, before);
  for (int k = 0; k < WAYS; k++) {
    char start[20], end[40];
    uint64_t version = orepa_version(t);
    snprintf(start, sizeof start, "%s_: ", way_names[k]);
    snprintf(end, sizeof end, "use %s", way_names[k]); /* the form that is not in place */
    assert_refused(write_by(k, t, source), words);
    assert_refused(-1, start);
    if (strstr(words, "expanded") == NULL)
      assert_refused(-1, end);
    assert_true(orepa_version(t) == version);
  }
  read_values(t, after);
  assert_memory_equal(before, after, (size_t)orepa_count(t) * sizeof *before);
}

/* ---- what is refused ---- */

static void test_a_leaf_that_requires_a_gradient_changes_under_no_grad_only(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(2), 1)), *c = full(device, SHAPE(2), 3);
    assert_all_refused(x, c, "a leaf that requires a gradient (float32 2) can only be changed under no_grad");
    bool was = orepa_set_grad_enabled(false);
    for (int k = 0; k < WAYS; k++)
      done(write_by(k, x, c));
    orepa_set_grad_enabled(was);
    assert_values(x, 3, 3);
    assert_true(orepa_is_leaf(x) && orepa_requires_grad(x));
    RELEASE(x, c);
  }
}

static void test_a_view_is_refused_where_gradients_follow(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(2, 2), 1)), *y = twice(x), *c = full(device, SHAPE(2), 3);
    orepa_tensor *views[] = {must(orepa_select(y, 0, 1)), must(orepa_reshape(y, SHAPE(4)))};
    orepa_tensor *part = must(orepa_slice(views[1], 0, 0, 2, 1)), *plain = must(orepa_select(c, 0, 0));
    assert_all_refused(views[0], c, "this tensor (float32 2) is a view of another");
    assert_all_refused(part, c, "this tensor (float32 2) is a view of another");
    orepa_tensor *scalar = must(orepa_reduce(OREPA_SUM, x, 0, NULL, false));
    assert_refused(in_place("add", plain, scalar), "add_: this tensor (float32 scalar) is a view of another");
    done(in_place_number("add", plain, 1)); /* no gradient: an ordinary write */
    assert_values(c, 4, 3);
    RELEASE(x, y, c, views[0], views[1], part, plain, scalar);
  }
}

/* The answer does not hang on whether the view is still there. */
static void test_a_base_of_views_is_refused_even_when_they_are_gone(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *y = twice(x), *c = full(CPU, SHAPE(2), 3);
  orepa_tensor *view = must(orepa_slice(y, 0, 0, 1, 1));
  assert_all_refused(y, c, "this tensor (float32 2) is seen by views");
  orepa_release(view);
  assert_all_refused(y, c, "this tensor (float32 2) is seen by views");
  backward(y);
  assert_values(orepa_grad(x), 2, 4);
  RELEASE(x, c);
}

/* Views made outside of a graph don't count, nor does a copy by reshape, nor detach. */
static void test_what_is_no_view_in_the_graph_hinders_nothing(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(1, 2, 2, 1), 1)), *y = twice(x);
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *view = must(orepa_slice(y, 1, 0, 1, 1));
  orepa_set_grad_enabled(was);
  orepa_tensor *detached = must(orepa_detach(y)), *copy = must(orepa_reshape(y, SHAPE(4)));
  assert_false(orepa_shares_storage(copy, y));
  done(in_place_number("mul", y, 3));
  assert_values(detached, 6, 12, 18, 24);
  assert_values(view, 6, 12);
  assert_values(copy, 2, 4, 6, 8);
  done(in_place_number("mul", copy, 10));
  backward(copy);
  assert_values(orepa_grad(x), 20, 40, 60, 80);
  RELEASE(x, y, view, detached);
}

static void test_an_expanded_tensor_is_refused_always(void **unused) {
  (void)unused;
  orepa_tensor *one = full(CPU, SHAPE(1), 5), *t = must(orepa_expand(one, SHAPE(2))), *c = full(CPU, SHAPE(2), 3);
  assert_all_refused(t, c, "an expanded tensor (float32 2) has elements that are one; clone it first");
  bool was = orepa_set_grad_enabled(false);
  assert_all_refused(t, c, "an expanded tensor (float32 2) has elements that are one; clone it first");
  orepa_set_grad_enabled(was);
  orepa_tensor *clone = must(orepa_clone(t)), *single = must(orepa_expand(one, SHAPE(1, 1)));
  done(in_place("add", clone, c));
  done(orepa_fill_(single, 6));
  assert_values(clone, 8, 8);
  assert_values(one, 6);
  RELEASE(one, t, c, clone, single);
}

static void test_the_result_must_fit_into_the_tensor(void **unused) {
  (void)unused;
  orepa_tensor *t = full(CPU, SHAPE(2), 1), *wide = full(CPU, SHAPE(3, 2), 1);
  orepa_tensor *whole = must(orepa_full(OREPA_INT64, CPU, SHAPE(2), 4)),
               *bits = must(orepa_full(OREPA_BOOL, CPU, SHAPE(2), 1));
  assert_refused(in_place("add", t, wide), "add_: the result is float32 3x2, which does not fit into float32 2");
  assert_refused(in_place_number("add", whole, 0.5), "the result is float32 2, which does not fit into int64 2");
  assert_refused(in_place("eq", t, t), "eq_: the result is bool 2, which does not fit into float32 2");
  assert_refused(in_place("add", bits, bits), "the result is int64 2, which does not fit into bool 2");
  assert_refused(in_place("add", NULL, t), "add_: the first operand must be a tensor");
  done(in_place_number("add", whole, 2));
  assert_values(whole, 6, 6);
  RELEASE(t, wide, whole, bits);
}

/* ---- what is allowed, and its gradients ---- */

/* Its history is what made it, then the write. */
static void test_a_result_is_rebased(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(3), 1)), *w = wanting(numbered(device, SHAPE(3), 5)),
                 *y = twice(x);
    done(in_place("mul", y, w)); /* 2xw: reads what y was */
    done(in_place_number("add", y, 1));
    done(in_place("mul", y, w)); /* 2xww + w */
    assert_false(orepa_is_leaf(y));
    assert_values(y, 2 * 25 + 5, 4 * 36 + 6, 6 * 49 + 7);
    backward(y);
    assert_values(orepa_grad(x), 2 * 25, 2 * 2 * 36, 3 * 2 * 49);
    assert_values(orepa_grad(w), 4 * 5 + 1, 2 * (8 * 6 + 1), 3 * (12 * 7 + 1));
    RELEASE(x, w);
  }
}

/* y op= y: the second y is what it was. */
static void test_a_tensor_may_be_its_own_operand(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(3), 1)), *y = twice(x);
    done(in_place("mul", y, y)); /* 4xx */
    done(in_place("add", y, y)); /* 8xx */
    assert_values(y, 8, 32, 72);
    backward(y);
    assert_values(orepa_grad(x), 16, 64, 144);
    orepa_tensor *t = numbered(device, SHAPE(3, 3), 0), *turned = must(orepa_transpose(t, 0, 1));
    done(in_place("add", t, turned)); /* overlaps in another order */
    assert_values(t, 0, 4, 8, 4, 8, 12, 8, 12, 16);
    RELEASE(x, t, turned);
  }
}

/* Functions whose gradient reads the result, or what was there. */
static void test_gradients_of_functions_in_place(void **unused) {
  (void)unused;
  const struct {
    const char *function;
    double wanted[3]; /* of x = -1, 0, 1 by gradients 1, 2, 3, behind y = 2x + 2 */
  } known[] = {{"sqrt", {INFINITY, 2 / sqrt(2), 3 / sqrt(4)}},
               {"relu", {0, 4, 6}},
               {"neg", {-2, -4, -6}},
               {"abs", {0, 4, 6}},
               {"exp", {2, 4 * 7.38905609893065, 6 * 54.598150033144236}}};
  for_each_device(device) {
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
      orepa_tensor *x = wanting(numbered(device, SHAPE(3), -1)), *y = twice(x);
      done(in_place_number("add", y, 2));
      done(in_place(known[k].function, y, NULL));
      backward(y);
      expect_values(orepa_grad(x), 3, known[k].wanted, 1e-4, __LINE__);
      orepa_release(x);
    }
    orepa_tensor *x = wanting(numbered(device, SHAPE(3), -1)), *y = twice(x);
    done(in_place_number("clamp", y, -1)); /* to -1 ... 100 */
    assert_values(y, -1, 0, 2);
    backward(y);
    assert_values(orepa_grad(x), 0, 4, 6);
    orepa_release(x);
  }
}

/* A tensor without history gets one from what is written into it; broadcasting is summed back. */
static void test_a_plain_tensor_takes_the_history_of_its_operand(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *w = wanting(numbered(device, SHAPE(2), 1)), *t = full(device, SHAPE(3, 2), 2);
    done(in_place("mul", t, w));
    assert_true(orepa_requires_grad(t) && !orepa_is_leaf(t));
    assert_values(t, 2, 4, 2, 4, 2, 4);
    backward(t);
    assert_values(orepa_grad(w), 2 * (1 + 3 + 5), 2 * (2 + 4 + 6));
    orepa_release(w);
  }
}

static void test_fill_and_copy_cut_the_history(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(2), 1)), *w = wanting(full(device, SHAPE(1), 4)), *y = twice(x);
    done(orepa_copy_(y, w)); /* broadcast */
    assert_values(y, 4, 4);
    backward(y);
    assert_null(orepa_grad(x));
    assert_values(orepa_grad(w), 3);
    y = twice(x);
    done(orepa_fill_(y, 9));
    assert_values(y, 9, 9);
    assert_true(!orepa_requires_grad(y) && orepa_is_leaf(y));
    orepa_release(y);
    y = twice(x);
    orepa_tensor *c = full(device, SHAPE(2), 6);
    done(orepa_copy_(y, c));
    assert_refused(orepa_backward(y, c, false), "nothing that this tensor");
    RELEASE(x, w, y, c);
  }
}

static void test_copy_from_another_type_and_device_has_gradients(void **unused) {
  (void)unused;
  orepa_tensor *w = wanting(must(orepa_full(OREPA_FLOAT64, REF, SHAPE(2), 3))), *y = full(CPU, SHAPE(2), 0);
  done(orepa_copy_(y, w));
  backward(y);
  assert_int_equal(orepa_tensor_dtype(orepa_grad(w)), OREPA_FLOAT64);
  assert_ptr_equal(orepa_tensor_device(orepa_grad(w)), REF);
  assert_values(orepa_grad(w), 1, 2);
  orepa_release(w);
}

/* The part's gradient goes to what was assigned, the rest keeps its own. */
static void test_assignment_to_a_part(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *x = wanting(numbered(device, SHAPE(3, 2), 1)), *w = wanting(numbered(device, SHAPE(2), 8)),
                 *y = twice(x);
    done(orepa_assign_(y, 0, 1, 2, w));
    assert_values(y, 2, 4, 8, 9, 10, 12);
    backward(y);
    assert_values(orepa_grad(x), 2, 4, 0, 0, 10, 12);
    assert_values(orepa_grad(w), 3, 4);
    forget(x);
    forget(w);
    y = twice(x);
    done(orepa_assign_(y, 0, 0, 3, w)); /* every row */
    orepa_tensor *zero = full(device, SCALAR, 0);
    done(orepa_assign_(y, 1, 1, 2, zero)); /* a column */
    assert_values(y, 8, 0, 8, 0, 8, 0);
    backward(y);
    assert_values(orepa_grad(x), 0, 0, 0, 0, 0, 0);
    assert_values(orepa_grad(w), 1 + 3 + 5, 0);
    RELEASE(x, w, zero);
  }
}

/* ---- saved tensors that changed ---- */

static orepa_tensor *conv(orepa_tensor *x, orepa_tensor *w) {
  return must(orepa_conv2d(x, w, NULL, &(orepa_conv){{1, 1}, {0, 0}, {1, 1}, 1}));
}

static orepa_tensor *label_loss(orepa_tensor *x, orepa_tensor *w) {
  (void)w;
  orepa_tensor *labels = must(orepa_full(OREPA_INT64, orepa_tensor_device(x), SHAPE(4), 1));
  orepa_tensor *y = must(orepa_cross_entropy(x, labels, &(orepa_cross_entropy_options){0, -1, false}));
  orepa_release(labels);
  return y;
}

static orepa_tensor *norm(orepa_tensor *x, orepa_tensor *w) {
  (void)w;
  return must(orepa_batch_norm(x, NULL, NULL, NULL, NULL, &(orepa_norm){1e-5, 0.1, true}));
}

static orepa_tensor *product(orepa_tensor *x, orepa_tensor *w) {
  return must(orepa_mul(x, w));
}

static orepa_tensor *largest(orepa_tensor *x, orepa_tensor *w) {
  (void)w;
  return must(orepa_reduce(OREPA_MAX, x, 1, AXES(-1), false));
}

static orepa_tensor *logarithm(orepa_tensor *x, orepa_tensor *w) {
  (void)w;
  return apply("log", x);
}

static orepa_tensor *exponential(orepa_tensor *x, orepa_tensor *w) {
  (void)w;
  return apply("exp", x);
}

static orepa_tensor *rectified(orepa_tensor *x, orepa_tensor *w) {
  (void)w;
  return must(orepa_relu(x));
}

static orepa_tensor *soft(orepa_tensor *x, orepa_tensor *w) {
  (void)w;
  return must(orepa_softmax(x, 1));
}

static orepa_tensor *matrices(orepa_tensor *x, orepa_tensor *w) {
  return must(orepa_matmul(x, w));
}

enum { SAVES_X = 1, SAVES_W = 2, SAVES_Y = 4 };

static const struct {
  const char *name; /* as the error has it */
  orepa_tensor *(*op)(orepa_tensor *x, orepa_tensor *w);
  int rank; /* of x and w: 2 (4, 4) or 4 (2, 2, 2, 2) */
  int saves;
} ops[] = {{"mul", product, 2, SAVES_X + SAVES_W},
           {"mul", product, 4, SAVES_X + SAVES_W},
           {"log", logarithm, 4, SAVES_X},
           {"exp", exponential, 4, SAVES_Y},
           {"relu", rectified, 4, SAVES_Y},
           {"softmax", soft, 2, SAVES_Y},
           {"max", largest, 4, SAVES_X + SAVES_Y},
           {"conv2d", conv, 4, SAVES_X + SAVES_W},
           {"matmul", matrices, 2, SAVES_X + SAVES_W},
           {"batch_norm", norm, 4, SAVES_X},
           {"cross_entropy", label_loss, 2, SAVES_X}};

/* Fills those of x, w and y whose bit is set, through a view. */
static void change(int which, orepa_tensor *const *tensors) {
  for (int n = 0; n < 3; n++) {
    orepa_tensor *view = must(orepa_detach(tensors[n]));
    if (which >> n & 1)
      done(orepa_fill_(view, 1));
    orepa_release(view);
  }
}

static void check_changes(const orepa_device *device, size_t k, int changed) {
  int rank = ops[k].rank;
  const int64_t *shape = rank == 4 ? (const int64_t[]){2, 2, 2, 2} : (const int64_t[]){4, 4};
  orepa_tensor *x = wanting(numbered(device, rank, shape, 1)), *w = wanting(numbered(device, rank, shape, 2));
  orepa_tensor *y = ops[k].op(x, w), *sum = must(orepa_reduce(OREPA_SUM, y, 0, NULL, false));
  change(changed, (orepa_tensor *[]){x, w, y});
  int status = orepa_backward(sum, NULL, false);
  if (changed & ops[k].saves) {
    char words[80];
    snprintf(words, sizeof words, "%s: backward needs a tensor (", ops[k].name);
    assert_refused(status, words);
    assert_refused(status, "that was changed in place after the forward pass");
  } else {
    done(status);
  }
  RELEASE(x, w, y, sum);
}

/* Of every op whose backward reads x, w or y: changing that is an error that names the op; changing the others is none.
 */
static void test_a_saved_tensor_that_changed_is_an_error_that_names_the_op(void **unused) {
  (void)unused;
  for_each_device(device) {
    for (size_t k = 0; k < sizeof ops / sizeof *ops; k++)
      for (int changed = 0; changed < 8; changed++)
        check_changes(device, k, changed);
  }
}

/* What an addition read is of no interest to its backward, nor is what a product's constant partner needs not. */
static void test_what_backward_does_not_read_may_change(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *c = full(CPU, SHAPE(2), 3), *d = must(orepa_detach(x));
  orepa_tensor *y = must(orepa_add(x, c)), *z = must(orepa_mul(x, c));
  done(orepa_fill_(d, 0)); /* x itself */
  backward(z);
  done(orepa_fill_(c, 0));
  done(orepa_fill_(d, 0));
  backward(y);
  assert_values(orepa_grad(x), 4, 8);
  RELEASE(x, c, d);
}

/* An optimizer's step between forward and backward is such a change. */
static void test_an_optimizers_step_counts_as_a_change(void **unused) {
  (void)unused;
  orepa_tensor *w = wanting(numbered(CPU, SHAPE(2), 1)), *g = full(CPU, SHAPE(2), 1), *y = must(orepa_mul(w, w)),
               *none = NULL;
  done(orepa_sgd_step(1, &w, &g, &none, (double[]){0.5}, (double[]){0}, &(orepa_sgd_options){0, false}));
  assert_refused(orepa_backward(y, g, false), "mul: backward needs a tensor (float32 2) that was changed in place");
  RELEASE(w, g, y);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_a_leaf_that_requires_a_gradient_changes_under_no_grad_only),
      cmocka_unit_test(test_a_view_is_refused_where_gradients_follow),
      cmocka_unit_test(test_a_base_of_views_is_refused_even_when_they_are_gone),
      cmocka_unit_test(test_what_is_no_view_in_the_graph_hinders_nothing),
      cmocka_unit_test(test_an_expanded_tensor_is_refused_always),
      cmocka_unit_test(test_the_result_must_fit_into_the_tensor),
      cmocka_unit_test(test_a_result_is_rebased),
      cmocka_unit_test(test_a_tensor_may_be_its_own_operand),
      cmocka_unit_test(test_gradients_of_functions_in_place),
      cmocka_unit_test(test_a_plain_tensor_takes_the_history_of_its_operand),
      cmocka_unit_test(test_fill_and_copy_cut_the_history),
      cmocka_unit_test(test_copy_from_another_type_and_device_has_gradients),
      cmocka_unit_test(test_assignment_to_a_part),
      cmocka_unit_test(test_a_saved_tensor_that_changed_is_an_error_that_names_the_op),
      cmocka_unit_test(test_what_backward_does_not_read_may_change),
      cmocka_unit_test(test_an_optimizers_step_counts_as_a_change),
  };
  RUN_GUARDED_AND_NOT(tests);
}
