/* Gradients of reductions over every set of axes, their ties and NaN, and softmax over every axis. */
#include "gradient_test.h"

typedef struct {
  orepa_reduction kind;
  int count, axes[OREPA_MAX_RANK];
  bool all, keepdim;
} reduce_options;

static const char *const names[OREPA_REDUCTIONS] = {"sum", "mean", "max", "min", "argmax", "argmin", "all", "any"};

#define OPTIONS(...) (&(const reduce_options){__VA_ARGS__})
#define OVER(...) .count = (int)(sizeof((int[]){__VA_ARGS__}) / sizeof(int)), .axes = {__VA_ARGS__}

static orepa_tensor *reduce(orepa_tensor *const *inputs, const void *options) {
  const reduce_options *o = options;
  return orepa_reduce(o->kind, inputs[0], o->count, o->all ? NULL : o->axes, o->keepdim);
}

/* ---- slopes ---- */

/* The axes of the set, a bit each; every second one counted from the end. */
static reduce_options options_of(orepa_reduction kind, int rank, unsigned set, bool keepdim) {
  reduce_options o = {.kind = kind, .keepdim = keepdim};
  for (int d = 0; d < rank; d++)
    if (set >> d & 1) {
      o.axes[o.count] = o.count % 2 ? d - rank : d;
      o.count++;
    }
  return o;
}

/* An extreme of nothing is an error, a mean of nothing NaN. */
static bool has_elements(const case_input *in, unsigned set) {
  for (int d = 0; d < in->rank; d++)
    if (set >> d & 1 && in->shape[d] == 0)
      return false;
  return true;
}

static void reductions_over_every_set_of_axes_have_their_gradients(void **state) {
  (void)state;
  const case_input inputs[] = {{.rank = 0},      {SIZES(4)},          {SIZES(2, 3)},
                               {SIZES(3, 1, 2)}, {SIZES(2, 3, 2, 2)}, {SIZES(1, 2, 1, 2, 2)},
                               {SIZES(0, 3)},    {SIZES(2, 0)}};
  for (int kind = OREPA_SUM; kind <= OREPA_MIN; kind++)
    for (int k = 0; k < COUNT_OF(inputs); k++)
      for (unsigned set = 0; set < 2u << inputs[k].rank; set++) {
        reduce_options o = options_of((orepa_reduction)kind, inputs[k].rank, set >> 1, set & 1);
        const gradient_case c = {CASE(names[kind], reduce, &o, inputs[k])};
        if (kind == OREPA_SUM || has_elements(&inputs[k], set >> 1))
          check_cases_in_layouts(1, &c);
      }
}

static void reductions_over_everything_have_their_gradients(void **state) {
  (void)state;
  const case_input inputs[] = {{.rank = 0}, {SIZES(5)}, {SIZES(2, 3)}, {SIZES(2, 3, 2, 2)}};
  for (int kind = OREPA_SUM; kind <= OREPA_MIN; kind++)
    for (int k = 0; k < 2 * COUNT_OF(inputs); k++) {
      reduce_options o = {.kind = (orepa_reduction)kind, .all = true, .keepdim = k % 2};
      const gradient_case c = {CASE(names[kind], reduce, &o, inputs[k / 2])};
      check_cases_in_layouts(1, &c);
    }
}

static orepa_tensor *sum_to_number(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_reduce(OREPA_SUM, inputs[0], 0, NULL, false);
}

static void the_sum_of_nothing_is_zero(void **state) {
  (void)state;
  const gradient_case c = {CASE("sum", sum_to_number, NULL, {SIZES(2, 0)})};
  check_values(&c, LIST(0), LIST(0));
}

/* A result can be changed in place like that of any op: that it was reshaped on the way shows nowhere. */
static orepa_tensor *reduce_then_multiply(orepa_tensor *const *inputs, const void *options) {
  const reduce_options *o = options;
  orepa_tensor *y = orepa_reduce(o->kind, inputs[0], o->count, o->axes, o->keepdim);
  orepa_operand operands[] = {{.tensor = y}, {.tensor = inputs[1]}};
  if (y && orepa_apply_in_place(orepa_function_by_name("mul"), operands)) {
    orepa_release(y);
    return NULL;
  }
  return y;
}

static void results_can_be_changed_in_place(void **state) {
  (void)state;
  const gradient_case cases[] = {
      {CASE("sum", reduce_then_multiply, OPTIONS(OREPA_SUM, OVER(1)), {SIZES(2, 3, 2)}, {SIZES(2)})},
      {CASE("mean", reduce_then_multiply, OPTIONS(OREPA_MEAN, OVER(2, 3)), {SIZES(2, 3, 2, 2)}, {SIZES(2, 3)})},
      {CASE("mean", reduce_then_multiply, OPTIONS(OREPA_MEAN, OVER(2, 3), .keepdim = true), {SIZES(2, 3, 2, 2)},
            {SIZES(3, 1, 1)})},
  };
  check_cases(COUNT_OF(cases), cases);
}

/* ---- extremes: equal ones, NaN, infinities ---- */

typedef struct {
  const char *name;
  orepa_reduction kind;
  const double *x, *y, *dx; /* x 2x3, over the second axis; dy is 6, 1 */
} extreme_case;

static void extremes_share_the_gradient_among_equals(void **state) {
  (void)state;
  const extreme_case cases[] = {
      {"max of equals", OREPA_MAX, LIST(1, 1, 0, 2, 3, 3), LIST(1, 3), LIST(3, 3, 0, 0, 0.5, 0.5)},
      {"max of three", OREPA_MAX, LIST(2, 2, 2, 0, -1, -1), LIST(2, 0), LIST(2, 2, 2, 1, 0, 0)},
      {"max of signed zeros", OREPA_MAX, LIST(0.0, -0.0, -1, 1, 2, 3), LIST(0, 3), LIST(3, 3, 0, 0, 0, 1)},
      {"min of equals", OREPA_MIN, LIST(1, 1, 2, 3, 2, 2), LIST(1, 2), LIST(3, 3, 0, 0, 0.5, 0.5)},
      {"max of infinities", OREPA_MAX, LIST(INFINITY, INFINITY, 0, -INFINITY, -INFINITY, -1), LIST(INFINITY, -1),
       LIST(3, 3, 0, 0, 0, 1)},
      {"max of -infinity", OREPA_MAX, LIST(-INFINITY, -INFINITY, -INFINITY, 0, 1, 2), LIST(-INFINITY, 2),
       LIST(2, 2, 2, 0, 0, 1)},
      {"max of NaN", OREPA_MAX, LIST(1, NAN, 2, 3, 5, 4), LIST(NAN, 5), LIST(NAN, NAN, NAN, 0, 1, 0)},
      {"min of NaN", OREPA_MIN, LIST(NAN, 1, NAN, 3, 5, 4), LIST(NAN, 3), LIST(NAN, NAN, NAN, 1, 0, 0)},
  };
  for (int k = 0; k < COUNT_OF(cases); k++) {
    const extreme_case *e = &cases[k];
    const gradient_case c = {CASE(e->name, reduce, OPTIONS(e->kind, OVER(1)), {SIZES(2, 3), .values = e->x}),
                             .rough = true, .dy = LIST(6, 1)};
    check_values(&c, e->y, e->dx);
  }
}

static void positions_and_truth_ask_for_no_gradient(void **state) {
  (void)state;
  for (int kind = OREPA_ARGMAX; kind < OREPA_REDUCTIONS; kind++)
    for (int k = 0; k < 2; k++) {
      orepa_tensor *x = orepa_full(OREPA_FLOAT32, device_named(k ? "cpu" : "ref"), 1, (int64_t[]){3}, 1);
      assert_int_equal(orepa_set_requires_grad(x, true), 0);
      orepa_tensor *y = orepa_reduce((orepa_reduction)kind, x, 0, NULL, false);
      assert_non_null(y);
      assert_int_equal(orepa_tensor_dtype(y), kind < OREPA_ALL ? OREPA_INT64 : OREPA_BOOL);
      assert_false(orepa_requires_grad(y));
      orepa_release(y);
      orepa_release(x);
    }
}

/* ---- softmax ---- */

typedef struct {
  bool log;
  int axis;
} softmax_options;

static orepa_tensor *softmax(orepa_tensor *const *inputs, const void *options) {
  const softmax_options *o = options;
  return o->log ? orepa_log_softmax(inputs[0], o->axis) : orepa_softmax(inputs[0], o->axis);
}

static void softmax_over_every_axis_has_its_gradient(void **state) {
  (void)state;
  const case_input inputs[] = {
      {SIZES(4), .low = -3, .high = 3}, {SIZES(2, 3)}, {SIZES(3, 1, 2)}, {SIZES(2, 3, 2, 2), .low = -9, .high = 9},
      {SIZES(1, 2, 1, 2, 1, 2)},        {SIZES(0, 3)}, {SIZES(2, 0)}};
  for (int k = 0; k < 2 * COUNT_OF(inputs); k++)
    for (int axis = -inputs[k / 2].rank; axis < inputs[k / 2].rank; axis++) {
      softmax_options o = {k % 2, axis};
      const gradient_case c = {CASE(o.log ? "log_softmax" : "softmax", softmax, &o, inputs[k / 2])};
      check_cases_in_layouts(1, &c);
    }
}

static void softmax_is_safe_from_overflow(void **state) {
  (void)state;
  const softmax_options plain = {false, 0}, log = {true, 0};
  gradient_case c = {CASE("softmax", softmax, &plain, {SIZES(3), .values = LIST(10000, 10000, -10000)}), .rough = true,
                     .dy = LIST(1, 0, 0)};
  check_values(&c, LIST(0.5, 0.5, 0), LIST(0.25, -0.25, 0));
  c.inputs[0].values = LIST(-INFINITY, 3, 3);
  check_values(&c, LIST(0, 0.5, 0.5), LIST(0, 0, 0));
  c.options = &log;
  c.inputs[0].values = LIST(-10000, -10000, -30000);
  check_values(&c, LIST(-log1p(1), -log1p(1), -20000 - log1p(1)), LIST(0.5, -0.5, 0));
}

static void nan_fills_its_row_of_softmax_alone(void **state) {
  (void)state;
  const softmax_options rows = {false, 1};
  const gradient_case c = {CASE("softmax", softmax, &rows, {SIZES(2, 2), .values = LIST(0, NAN, 1, 1)}), .rough = true,
                           .dy = LIST(1, 0, 1, 0)};
  check_values(&c, LIST(NAN, NAN, 0.5, 0.5), LIST(NAN, NAN, 0.25, -0.25));
}

/* ---- wrong input ---- */

static orepa_tensor *mean_of_integers(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *whole = orepa_to(inputs[0], OREPA_INT32, orepa_tensor_device(inputs[0]));
  orepa_tensor *y = reduce(&whole, options);
  orepa_release(whole);
  return y;
}

static orepa_tensor *softmax_of_integers(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *whole = orepa_to(inputs[0], OREPA_INT32, orepa_tensor_device(inputs[0]));
  orepa_tensor *y = softmax(&whole, options);
  orepa_release(whole);
  return y;
}

static void wrong_reductions_are_named(void **state) {
  (void)state;
  const softmax_options last = {false, 2}, log = {true, -3}, first = {true, 0};
  const error_case cases[] = {
      {{CASE("axis", reduce, OPTIONS(OREPA_SUM, OVER(2)), {SIZES(2, 3)})}, WORDS("sum", "axis 3", "rank 2")},
      {{CASE("axis", reduce, OPTIONS(OREPA_MEAN, OVER(-3)), {SIZES(2, 3)})}, WORDS("mean", "axis -3", "rank 2")},
      {{CASE("twice", reduce, OPTIONS(OREPA_MAX, OVER(1, -1)), {SIZES(2, 3)})}, WORDS("max", "axis 2", "twice")},
      {{CASE("nothing", reduce, OPTIONS(OREPA_MAX, OVER(0)), {SIZES(0, 3)})}, WORDS("max", "0x3")},
      {{CASE("nothing", reduce, OPTIONS(OREPA_MIN, .all = true), {SIZES(2, 0)})}, WORDS("min", "2x0")},
      {{CASE("nothing", reduce, OPTIONS(OREPA_ARGMIN, OVER(0)), {SIZES(0, 3)})}, WORDS("argmin", "0x3")},
      {{CASE("two axes", reduce, OPTIONS(OREPA_ARGMAX, OVER(0, 1)), {SIZES(2, 3)})}, WORDS("argmax", "one axis")},
      {{CASE("int32", mean_of_integers, OPTIONS(OREPA_MEAN, OVER(0)), {SIZES(2)})}, WORDS("mean", "int32")},
      {{CASE("int32", softmax_of_integers, &first, {SIZES(2)})}, WORDS("log_softmax", "int32")},
      {{CASE("axis", softmax, &last, {SIZES(2, 3)})}, WORDS("softmax", "axis 3", "rank 2")},
      {{CASE("axis", softmax, &log, {SIZES(2, 3)})}, WORDS("log_softmax", "axis -3", "rank 2")},
      {{CASE("scalar", softmax, &first, {.rank = 0})}, WORDS("log_softmax", "rank 0")},
  };
  check_errors(COUNT_OF(cases), cases);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(reductions_over_every_set_of_axes_have_their_gradients),
      cmocka_unit_test(reductions_over_everything_have_their_gradients),
      cmocka_unit_test(the_sum_of_nothing_is_zero),
      cmocka_unit_test(results_can_be_changed_in_place),
      cmocka_unit_test(extremes_share_the_gradient_among_equals),
      cmocka_unit_test(positions_and_truth_ask_for_no_gradient),
      cmocka_unit_test(softmax_over_every_axis_has_its_gradient),
      cmocka_unit_test(softmax_is_safe_from_overflow),
      cmocka_unit_test(nan_fills_its_row_of_softmax_alone),
      cmocka_unit_test(wrong_reductions_are_named),
  };
  return RUN_GUARDED(tests);
}
