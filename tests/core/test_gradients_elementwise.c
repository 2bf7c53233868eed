/* Every function of elementwise.h: its gradients under broadcasting, with numbers for operands and in place, what it
 * does at kinks, and what it says of wrong input. All tests go through the list, so that a new row is a tested one. */
#include "elementwise.h"
#include "gradient_test.h"

static const struct {
  int types, needs[ELEMENTWISE_MAX_OPERANDS];
} rows[FUNCTION_COUNT] = {
#define ROW(name, operands, types, forward, needs_a, da, needs_b, db, needs_c, dc)                                     \
  [FUNCTION_##name] = {ELEMENTWISE_##types, {needs_a, needs_b, needs_c}},
    ELEMENTWISE_ROWS(ROW)
#undef ROW
};

/* Where a function is smooth; operands that are not listed run from -1 to 1. */
static const struct {
  double low, high;
} ranges[FUNCTION_COUNT][ELEMENTWISE_MAX_OPERANDS] = {
    [FUNCTION_div] = {{-1, 1}, {0.5, 2}},
    [FUNCTION_pow] = {{0.5, 2}, {-2, 2}},
    [FUNCTION_sqrt] = {{0.5, 2}},
    [FUNCTION_log] = {{0.5, 2}},
    [FUNCTION_softplus] = {{-3, 3}},
    [FUNCTION_silu] = {{-6, 6}},
    [FUNCTION_gelu] = {{-3, 3}},
    [FUNCTION_hardswish] = {{-4, 4}},
    [FUNCTION_xlogy] = {{0.5, 2}, {0.5, 2}},
    [FUNCTION_clamp] = {{-1, 1}, {-0.5, -0.4}, {0.4, 0.5}},
};

static const case_input shapes[][ELEMENTWISE_MAX_OPERANDS] = {
    {{SIZES(2, 3)}, {SIZES(2, 3)}, {SIZES(2, 3)}},
    {{SIZES(2, 3)}, {SIZES(3)}, {.rank = 0}},
    {{SIZES(3)}, {SIZES(2, 3)}, {SIZES(2, 1)}},
    {{SIZES(2, 1)}, {SIZES(1, 3)}, {SIZES(1, 1)}},
    {{.rank = 0}, {SIZES(2, 3)}, {SIZES(3)}},
    {{SIZES(2, 3)}, {.rank = 0}, {SIZES(2, 3)}},
    {{.rank = 0}, {.rank = 0}, {.rank = 0}},
    {{SIZES(1)}, {.rank = 0}, {SIZES(1, 1)}},
    {{SIZES(2, 1, 3)}, {SIZES(4, 1)}, {SIZES(1, 4, 3)}},
    {{SIZES(2, 3, 1, 2)}, {SIZES(3, 2, 1)}, {SIZES(3, 1, 1)}},
    {{SIZES(2, 3, 2, 2)}, {SIZES(1, 3, 1, 1)}, {SIZES(2, 3, 2, 2)}},
    {{SIZES(1, 2, 1, 2, 1, 2)}, {SIZES(2, 1, 1, 1, 2, 1)}, {SIZES(2, 1)}},
    {{SIZES(0, 3)}, {SIZES(1, 3)}, {SIZES(3)}},
    {{SIZES(1)}, {SIZES(0)}, {.rank = 0}},
    {{SIZES(2, 1)}, {SIZES(2, 0)}, {SIZES(2, 1)}},
};

/* ---- the functions as cases ---- */

typedef struct {
  orepa_function function;
  unsigned numbers; /* the operands that are numbers, a bit each */
  double number[ELEMENTWISE_MAX_OPERANDS];
} elementwise_options;

static void take_operands(const elementwise_options *o, orepa_tensor *const *inputs, orepa_operand *operands) {
  int count = orepa_function_arity(o->function);
  for (int k = 0; k < ELEMENTWISE_MAX_OPERANDS && k < count; k++) {
    bool number = o->numbers >> k & 1;
    operands[k] = (orepa_operand){.tensor = number ? NULL : *inputs, .number = o->number[k]};
    inputs += !number;
  }
}

static orepa_tensor *apply(orepa_tensor *const *inputs, const void *options) {
  const elementwise_options *o = options;
  orepa_operand operands[ELEMENTWISE_MAX_OPERANDS];
  take_operands(o, inputs, operands);
  return orepa_apply(o->function, operands);
}

static orepa_tensor *apply_in_place(orepa_tensor *const *inputs, const void *options) {
  const elementwise_options *o = options;
  orepa_operand operands[ELEMENTWISE_MAX_OPERANDS];
  take_operands(o, inputs, operands);
  operands[0].tensor = orepa_clone(operands[0].tensor);
  if (operands[0].tensor && orepa_apply_in_place(o->function, operands)) {
    orepa_release(operands[0].tensor);
    return NULL;
  }
  return operands[0].tensor;
}

/* The one input is every operand. */
static orepa_tensor *apply_to_one(orepa_tensor *const *inputs, const void *options) {
  return apply((orepa_tensor *[]){inputs[0], inputs[0], inputs[0]}, options);
}

static orepa_tensor *apply_to_one_in_place(orepa_tensor *const *inputs, const void *options) {
  const elementwise_options *o = options;
  orepa_tensor *t = orepa_clone(inputs[0]);
  if (t && orepa_apply_in_place(o->function, (orepa_operand[]){{.tensor = t}, {.tensor = t}, {.tensor = t}})) {
    orepa_release(t);
    return NULL;
  }
  return t;
}

/* Function f of inputs of these shapes, without those for which `o` has numbers. */
static gradient_case case_of(orepa_function f, const case_input *inputs, elementwise_options *o) {
  gradient_case c = {.name = orepa_function_name(f), .function = apply, .options = o, .tolerance = 2e-5};
  o->function = f;
  for (int k = 0; k < orepa_function_arity(f); k++) {
    bool listed = ranges[f][k].low < ranges[f][k].high;
    double low = listed ? ranges[f][k].low : -1, high = listed ? ranges[f][k].high : 1;
    o->number[k] = low + 0.37 * (high - low);
    if (o->numbers >> k & 1)
      continue;
    c.inputs[c.count] = inputs[k];
    c.inputs[c.count].low = low;
    c.inputs[c.count].high = high;
    c.inputs[c.count++].constant = rows[f].needs[k] == NO_GRADIENT;
  }
  return c;
}

#define for_each_function(f) for (orepa_function f = 0; f < orepa_function_count(); f++)

static void every_gradient_is_the_slope_under_broadcasting(void **state) {
  (void)state;
  for_each_function(f) {
    for (int k = 0; k < COUNT_OF(shapes); k++) {
      elementwise_options o = {.numbers = 0};
      gradient_case c = case_of(f, shapes[k], &o);
      check_cases_in_layouts(1, &c);
    }
  }
}

static void every_gradient_is_the_slope_with_numbers_for_operands(void **state) {
  (void)state;
  for_each_function(f) {
    unsigned all = (1u << orepa_function_arity(f)) - 1;
    for (unsigned numbers = 1; numbers < all; numbers++)
      for (int k = 0; k < 4; k++) {
        elementwise_options o = {.numbers = numbers};
        gradient_case c = case_of(f, shapes[k], &o);
        check_case(&c);
      }
  }
}

static bool fits_in_place(orepa_function f, const case_input *inputs) {
  int64_t shape[OREPA_MAX_RANK];
  memcpy(shape, inputs[0].shape, sizeof shape);
  for (int k = 1; k < orepa_function_arity(f); k++)
    for (int d = 1; d <= inputs[k].rank; d++)
      if (d > inputs[0].rank || (inputs[k].shape[inputs[k].rank - d] != 1 &&
                                 inputs[k].shape[inputs[k].rank - d] != shape[inputs[0].rank - d]))
        return false;
  return rows[f].types != ELEMENTWISE_COMPARE;
}

static void every_gradient_is_the_slope_in_place(void **state) {
  (void)state;
  int tried = 0;
  for_each_function(f) {
    for (int k = 0; k < COUNT_OF(shapes); k++) {
      elementwise_options o = {.numbers = 0};
      gradient_case c = case_of(f, shapes[k], &o);
      c.function = apply_in_place;
      if (!fits_in_place(f, shapes[k]))
        continue;
      check_cases_in_layouts(1, &c);
      tried++;
    }
  }
  assert_true(tried > 5 * FUNCTION_COUNT);
}

static void gradients_of_an_operand_used_twice_add_up(void **state) {
  (void)state;
  const case_input matrix[] = {{SIZES(2, 3)}, {SIZES(2, 3)}, {SIZES(2, 3)}};
  for_each_function(f) {
    elementwise_options o = {.numbers = 0};
    gradient_case c = case_of(f, matrix, &o);
    if (f == FUNCTION_clamp) /* always at a bound */
      continue;
    c.count = 1;
    c.inputs[0].low = f == FUNCTION_div ? 0.5 : c.inputs[0].low;
    c.function = apply_to_one;
    check_cases_in_layouts(1, &c);
    c.function = apply_to_one_in_place;
    if (rows[f].types != ELEMENTWISE_COMPARE)
      check_case(&c);
  }
}

/* ---- kinks ---- */

static void kinks_have_their_conventions(void **state) {
  (void)state;
  const struct {
    orepa_function function;
    const double *b; /* NULL: one operand */
    const double *a, *y, *da;
  } kinks[] = {
      {FUNCTION_relu, NULL, LIST(-1, 0, 2), LIST(0, 0, 2), LIST(0, 0, 1)},
      {FUNCTION_relu, NULL, LIST(-INFINITY, -0.0, INFINITY), LIST(0, 0, INFINITY), LIST(0, 0, 1)},
      {FUNCTION_abs, NULL, LIST(-3, 0, 3), LIST(3, 0, 3), LIST(-1, 0, 1)},
      {FUNCTION_maximum, LIST(1, 1, 1), LIST(0, 1, 2), LIST(1, 1, 2), LIST(0, 0.5, 1)},
      {FUNCTION_minimum, LIST(1, 1, 1), LIST(0, 1, 2), LIST(0, 1, 1), LIST(1, 0.5, 0)},
      {FUNCTION_maximum, LIST(0, 0, 0), LIST(-INFINITY, INFINITY, 0), LIST(0, INFINITY, 0), LIST(0, 1, 0.5)},
      {FUNCTION_pow, LIST(0, 1, 2), LIST(0, 0, 0), LIST(1, 0, 0), LIST(0, 1, 0)},
      {FUNCTION_pow, LIST(2, 3, 1), LIST(-2, -1, -3), LIST(4, -1, -3), LIST(-4, 3, 1)},
      {FUNCTION_sign, NULL, LIST(-3, 0, INFINITY), LIST(-1, 0, 1), LIST(0, 0, 0)},
      {FUNCTION_round, NULL, LIST(-0.5, 1.5, 2.5), LIST(0, 2, 2), LIST(0, 0, 0)},
      {FUNCTION_floor_divide, LIST(2, 2, -2), LIST(-7, 7, 7), LIST(-4, 3, -4), LIST(0, 0, 0)},
      {FUNCTION_remainder, LIST(2, 2, -2), LIST(-7, 7, 7), LIST(1, 1, -1), LIST(1, 1, 1)},
      {FUNCTION_sqrt, NULL, LIST(0, 4, INFINITY), LIST(0, 2, INFINITY), LIST(INFINITY, 0.25, 0)},
      {FUNCTION_log, NULL, LIST(0, 1, 2), LIST(-INFINITY, 0, 0.69314718055994531), LIST(INFINITY, 1, 0.5)},
      {FUNCTION_leaky_relu, LIST(0.5, 0.5, 0.5), LIST(-2, 0, 2), LIST(-1, 0, 2), LIST(0.5, 0.5, 1)},
      {FUNCTION_hardswish, NULL, LIST(-INFINITY, -3, 3), LIST(0, 0, 3), LIST(0, 0, 1)},
      {FUNCTION_hardswish, NULL, LIST(-4, 0, INFINITY), LIST(0, 0, INFINITY), LIST(0, 0.5, 1)},
      {FUNCTION_softplus, NULL, LIST(-INFINITY, -200, INFINITY), LIST(0, 0, INFINITY), LIST(0, 0, 1)},
      {FUNCTION_silu, NULL, LIST(-1000, 0, 1000), LIST(0, 0, 1000), LIST(0, 0.5, 1)},
      {FUNCTION_tanh, NULL, LIST(-INFINITY, 0, 1000), LIST(-1, 0, 1), LIST(0, 1, 0)},
      {FUNCTION_gelu, NULL, LIST(-1000, 0, 1000), LIST(0, 0, 1000), LIST(0, 0.5, 1)},
      {FUNCTION_xlogy, LIST(0, 0, 1), LIST(0, 2, 0), LIST(0, -INFINITY, 0), LIST(0, -INFINITY, 0)},
      {FUNCTION_exp, NULL, LIST(-INFINITY, 0, 0), LIST(0, 1, 1), LIST(0, 1, 1)},
  };
  for (int k = 0; k < COUNT_OF(kinks); k++) {
    elementwise_options o = {.function = kinks[k].function};
    gradient_case c = {.name = orepa_function_name(o.function), .function = apply, .options = &o, .rough = true};
    c.count = kinks[k].b ? 2 : 1;
    c.inputs[0] = (case_input){SIZES(3), .values = kinks[k].a};
    c.inputs[1] = (case_input){SIZES(3), .values = kinks[k].b, .constant = true};
    c.dy = LIST(1, 1, 1);
    check_values(&c, kinks[k].y, kinks[k].da);
  }
}

static void clamp_passes_the_gradient_from_bound_to_bound(void **state) {
  (void)state;
  const elementwise_options o = {FUNCTION_clamp, 6, {0, -1, 1}};
  const gradient_case c = {CASE("clamp", apply, &o, {SIZES(5), .values = LIST(-2, -1, 0.5, 1, 2)}), .rough = true,
                           .dy = LIST(3, 3, 3, 3, 3)};
  check_values(&c, LIST(-1, -1, 0.5, 1, 1), LIST(0, 3, 3, 3, 0));
}

static void nan_comes_through_every_function(void **state) {
  (void)state;
  for_each_function(f) {
    for (int place = 0; place < orepa_function_arity(f); place++) {
      orepa_operand operands[ELEMENTWISE_MAX_OPERANDS] = {{.number = -1}, {.number = 1}, {.number = 1}};
      if (rows[f].types == ELEMENTWISE_COMPARE || (f == FUNCTION_clamp && place > 0))
        continue; /* a bound that is NaN bounds nothing */
      if (rows[f].types == ELEMENTWISE_CHOICE && place != 1)
        continue; /* -1 and NaN choose operand 2 */
      for (int k = 0; k < 2; k++) {
        orepa_tensor *nan = orepa_full(OREPA_FLOAT32, device_named(k ? "cpu" : "ref"), 0, NULL, NAN);
        operands[place].tensor = nan;
        orepa_tensor *y = orepa_apply(f, operands);
        double value = 0;
        assert_non_null(y);
        assert_int_equal(orepa_item(y, &value), 0);
        if (!isnan(value))
          fail_msg("%s: operand %d is NaN, the result %g", orepa_function_name(f), place + 1, value);
        orepa_release(y);
        orepa_release(nan);
      }
    }
  }
}

/* ---- what asks for no gradient, and what was changed since ---- */

static void comparisons_ask_for_no_gradient(void **state) {
  (void)state;
  for_each_function(f) {
    if (rows[f].types != ELEMENTWISE_COMPARE)
      continue;
    orepa_tensor *x = orepa_full(OREPA_FLOAT32, device_named("ref"), 0, NULL, 1);
    assert_int_equal(orepa_set_requires_grad(x, true), 0);
    orepa_tensor *y = orepa_apply(f, (orepa_operand[]){{.tensor = x}, {.tensor = x}});
    assert_non_null(y);
    assert_int_equal(orepa_tensor_dtype(y), OREPA_BOOL);
    assert_false(orepa_requires_grad(y));
    assert_int_equal(orepa_backward(y, NULL, false), -1);
    orepa_release(y);
    orepa_release(x);
  }
}

/* Whether operand `which` (3: the result) is read by the gradient of some operand. */
static bool is_read(orepa_function f, int which) {
  int needs = 0;
  for (int k = 0; k < orepa_function_arity(f); k++)
    needs |= rows[f].needs[k] < PASSES ? rows[f].needs[k] : 0;
  return needs >> which & 1;
}

static void backward_refuses_what_was_changed_since_if_it_reads_it(void **state) {
  (void)state;
  for_each_function(f) {
    for (int which = 0; which < 4; which++) {
      orepa_tensor *leaf = orepa_full(OREPA_FLOAT32, device_named("ref"), 0, NULL, 1), *t[4] = {NULL};
      if (rows[f].types == ELEMENTWISE_COMPARE || (which < 3 && which >= orepa_function_arity(f))) {
        orepa_release(leaf);
        continue;
      }
      assert_int_equal(orepa_set_requires_grad(leaf, true), 0);
      for (int k = 0; k < 3; k++)
        t[k] = orepa_clone(leaf);
      t[3] = orepa_apply(f, (orepa_operand[]){{.tensor = t[0]}, {.tensor = t[1]}, {.tensor = t[2]}});
      orepa_tensor *sum = orepa_add(t[3], t[3]);
      bool was = orepa_set_grad_enabled(false);
      assert_int_equal(orepa_fill_(t[which], 2), 0);
      orepa_set_grad_enabled(was);
      assert_int_equal(orepa_backward(sum, NULL, false), is_read(f, which) ? -1 : 0);
      if (is_read(f, which)) {
        assert_non_null(strstr(orepa_error(), orepa_function_name(f)));
        assert_non_null(strstr(orepa_error(), "changed in place"));
      }
      for (int k = 0; k < 4; k++)
        orepa_release(t[k]);
      orepa_release(sum);
      orepa_release(leaf);
    }
  }
}

/* ---- wrong input ---- */

static orepa_tensor *apply_to_two_types(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *wide = orepa_to(inputs[1], OREPA_FLOAT64, orepa_tensor_device(inputs[1]));
  orepa_tensor *y = apply((orepa_tensor *[]){inputs[0], wide, wide}, options);
  orepa_release(wide);
  return y;
}

static orepa_tensor *apply_on_two_devices(orepa_tensor *const *inputs, const void *options) {
  bool on_cpu = !strcmp(orepa_device_name(orepa_tensor_device(inputs[0])), "cpu");
  orepa_tensor *there = orepa_to(inputs[1], OREPA_FLOAT32, device_named(on_cpu ? "ref" : "cpu"));
  orepa_tensor *y = apply((orepa_tensor *[]){inputs[0], there, there}, options);
  orepa_release(there);
  return y;
}

static void operands_that_do_not_fit_are_named(void **state) {
  (void)state;
  const case_input matrices[] = {{SIZES(2, 3)}, {SIZES(4, 3)}, {SIZES(3)}};
  for_each_function(f) {
    const char *name = orepa_function_name(f);
    elementwise_options o = {.numbers = 0};
    if (orepa_function_arity(f) < 2)
      continue;
    error_case bad = {case_of(f, matrices, &o), WORDS(name, "2x3", "4x3", "broadcast")};
    check_errors(1, &bad);
    bad.c.function = apply_to_two_types;
    bad.words = WORDS(name, "float32", "float64");
    check_errors(1, &bad);
    bad.c.function = apply_on_two_devices;
    bad.words = WORDS(name, "'ref'", "'cpu'");
    check_errors(1, &bad);
  }
}

static orepa_tensor *apply_in_place_to_input(orepa_tensor *const *inputs, const void *options) {
  const elementwise_options *o = options;
  orepa_operand operands[ELEMENTWISE_MAX_OPERANDS];
  take_operands(o, inputs, operands);
  return orepa_apply_in_place(o->function, operands) ? NULL : orepa_retain(inputs[0]);
}

static orepa_tensor *apply_in_place_to_view(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *copy = orepa_clone(inputs[0]), *view = orepa_slice(copy, 0, 0, 1, 1);
  orepa_tensor *y = apply_in_place_to_input((orepa_tensor *[]){view, inputs[1], inputs[1]}, options);
  orepa_release(view);
  orepa_release(copy);
  return y;
}

static orepa_tensor *apply_in_place_to_viewed(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *copy = orepa_clone(inputs[0]), *view = orepa_slice(copy, 0, 0, 1, 1);
  orepa_release(view);
  orepa_tensor *y = apply_in_place_to_input((orepa_tensor *[]){copy, inputs[1], inputs[1]}, options);
  orepa_release(copy);
  return y;
}

static orepa_tensor *apply_in_place_to_number(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_operand operands[] = {{.number = 1}, {.tensor = inputs[0]}};
  return orepa_apply_in_place(FUNCTION_add, operands) ? NULL : orepa_retain(inputs[0]);
}

static orepa_tensor *apply_to_numbers(orepa_tensor *const *inputs, const void *options) {
  (void)inputs;
  (void)options;
  return orepa_apply(FUNCTION_add, (orepa_operand[]){{.number = 1}, {.number = 2}});
}

static orepa_tensor *compare_in_place(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return apply_in_place(inputs, &(elementwise_options){.function = FUNCTION_lt});
}

static void in_place_says_what_it_cannot_do(void **state) {
  (void)state;
  const elementwise_options add = {.function = FUNCTION_add};
  const error_case cases[] = {
      {{CASE("larger", apply_in_place, &add, {SIZES(3)}, {SIZES(2, 3)})}, WORDS("add_", "2x3", "float32 3")},
      {{CASE("no broadcast", apply_in_place, &add, {SIZES(3)}, {SIZES(4)})}, WORDS("add", "3", "4", "broadcast")},
      {{CASE("leaf", apply_in_place_to_input, &add, {SIZES(2, 3)}, {SIZES(3)})}, WORDS("add_", "leaf", "2x3")},
      {{CASE("expanded", apply_in_place_to_input, &add, {SIZES(2, 3), .layout = EXPANDED}, {SIZES(3)})},
       WORDS("add_", "expanded", "2x3", "clone")},
      {{CASE("view", apply_in_place_to_view, &add, {SIZES(2, 3)}, {SIZES(3)})}, WORDS("add_", "view", "1x3")},
      {{CASE("viewed", apply_in_place_to_viewed, &add, {SIZES(2, 3)}, {SIZES(3)})}, WORDS("add_", "view", "2x3")},
      {{CASE("number", apply_in_place_to_number, NULL, {SIZES(3)})}, WORDS("add_", "first operand")},
      {{CASE("numbers", apply_to_numbers, NULL, {SIZES(1)})}, WORDS("add", "no operand")},
      {{CASE("bool", compare_in_place, NULL, {SIZES(2)}, {SIZES(2)})}, WORDS("lt_", "bool 2", "float32 2")},
  };
  check_errors(COUNT_OF(cases), cases);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_gradient_is_the_slope_under_broadcasting),
      cmocka_unit_test(every_gradient_is_the_slope_with_numbers_for_operands),
      cmocka_unit_test(every_gradient_is_the_slope_in_place),
      cmocka_unit_test(gradients_of_an_operand_used_twice_add_up),
      cmocka_unit_test(kinks_have_their_conventions),
      cmocka_unit_test(clamp_passes_the_gradient_from_bound_to_bound),
      cmocka_unit_test(nan_comes_through_every_function),
      cmocka_unit_test(comparisons_ask_for_no_gradient),
      cmocka_unit_test(backward_refuses_what_was_changed_since_if_it_reads_it),
      cmocka_unit_test(operands_that_do_not_fit_are_named),
      cmocka_unit_test(in_place_says_what_it_cannot_do),
  };
  return RUN_GUARDED(tests);
}
