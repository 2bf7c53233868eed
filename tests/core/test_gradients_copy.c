/* Gradients through copies and through what is written in place. */
#include "gradient_test.h"

/* What an op is told; each reads its own. */
typedef struct {
  int axis;
  int64_t first, last;
  orepa_dtype dtype;
} copy_options;

#define OPTIONS(...) (&(const copy_options){__VA_ARGS__})
#define SCALAR .rank = 0

/* Gives `t` back if the op on it worked. */
static orepa_tensor *written(orepa_tensor *t, int failed) {
  if (!failed)
    return t;
  orepa_release(t);
  return NULL;
}

/* a * b, and both references are taken; so that what a case changed goes on in the graph. */
static orepa_tensor *product_of(orepa_tensor *a, orepa_tensor *b) {
  orepa_tensor *y = a && b ? orepa_mul(a, b) : NULL;
  orepa_release(a);
  orepa_release(b);
  return y;
}

/* ---- copies ---- */

static orepa_tensor *clone(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_clone(inputs[0]);
}

static orepa_tensor *contiguous(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_contiguous(inputs[0]);
}

static const orepa_device *other_device(const orepa_tensor *t) {
  return device_named(strcmp(orepa_device_name(orepa_tensor_device(t)), "cpu") ? "cpu" : "ref");
}

/* To the other device and back. */
static orepa_tensor *there_and_back(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *x = inputs[0], *there = orepa_to(x, orepa_tensor_dtype(x), other_device(x));
  orepa_tensor *back = there ? orepa_to(there, orepa_tensor_dtype(x), orepa_tensor_device(x)) : NULL;
  orepa_release(there);
  return back;
}

/* Through another type and back. */
static orepa_tensor *through_type(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *x = inputs[0];
  orepa_tensor *other = orepa_to(x, ((const copy_options *)options)->dtype, orepa_tensor_device(x));
  orepa_tensor *back = other ? orepa_to(other, orepa_tensor_dtype(x), orepa_tensor_device(x)) : NULL;
  orepa_release(other);
  return back;
}

static void copies_pass_the_gradient_on(void **state) {
  (void)state;
  case_function *const functions[] = {clone, contiguous, there_and_back};
  const case_input inputs[] = {{SIZES(2, 3)}, {SIZES(2, 3, 2, 2)}, {SCALAR}, {SIZES(0, 2)}, {SIZES(2, 0, 1, 3)}};
  for (int k = 0; k < COUNT_OF(functions); k++)
    for (int n = 0; n < COUNT_OF(inputs); n++) {
      const gradient_case c = {CASE("copy", functions[k], NULL, inputs[n])};
      check_cases_in_layouts(1, &c);
    }
}

/* Values and dy that bfloat16 and float16 hold exactly. */
static void types_pass_the_gradient_on(void **state) {
  (void)state;
  for (orepa_dtype dtype = 0; dtype < OREPA_DTYPES; dtype++) {
    const gradient_case c = {
        CASE(orepa_dtype_name(dtype), through_type, OPTIONS(.dtype = dtype), {SIZES(3), .values = LIST(1.5, -2, 96)}),
        .rough = true, .dy = LIST(-0.75, 3, 160)};
    if (orepa_dtype_is_float(dtype))
      check_values(&c, LIST(1.5, -2, 96), LIST(-0.75, 3, 160));
  }
}

static void integers_end_the_graph(void **state) {
  (void)state;
  orepa_tensor *x = orepa_full(OREPA_FLOAT32, device_named("ref"), 1, (int64_t[]){2}, 3);
  assert_int_equal(orepa_set_requires_grad(x, true), 0);
  for (orepa_dtype dtype = 0; dtype < OREPA_DTYPES; dtype++) {
    orepa_tensor *y = orepa_to(x, dtype, orepa_tensor_device(x));
    assert_non_null(y);
    assert_int_equal(orepa_requires_grad(y), orepa_dtype_is_float(dtype));
    orepa_release(y);
  }
  orepa_release(x);
}

static orepa_tensor *detached_factor(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return product_of(orepa_retain(inputs[0]), orepa_detach(inputs[0]));
}

static void detach_lets_no_gradient_through(void **state) {
  (void)state;
  const gradient_case c = {CASE("detach", detached_factor, NULL, {SIZES(2), .values = LIST(3, -5)}), .rough = true,
                           .dy = LIST(1, 2)};
  check_values(&c, LIST(9, 25), LIST(3, -10));
}

/* ---- written in place: `inputs[0]` is copied, changed, and goes on as a factor ---- */

static orepa_tensor *copy_over(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *t = orepa_clone(inputs[0]);
  return product_of(written(t, orepa_copy_(t, inputs[1])), orepa_retain(inputs[0]));
}

/* The copied tensor is of another type than its source, or on another device. */
static orepa_tensor *copy_to_type(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *x = inputs[0];
  const orepa_device *device = orepa_tensor_device(x);
  orepa_tensor *t = orepa_full(((const copy_options *)options)->dtype, device, orepa_rank(x), orepa_shape(x), 0);
  t = written(t, orepa_copy_(t, x));
  orepa_tensor *y = t ? orepa_to(t, orepa_tensor_dtype(x), device) : NULL;
  orepa_release(t);
  return y;
}

/* The source is a product of matrices, whose gradient takes only what is on its own device. */
static orepa_tensor *copy_to_device(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *x = inputs[0], *square = orepa_matmul(x, x);
  orepa_tensor *t = orepa_full(orepa_tensor_dtype(x), other_device(x), orepa_rank(x), orepa_shape(x), 0);
  t = written(t, orepa_copy_(t, square));
  orepa_tensor *y = t ? orepa_to(t, orepa_tensor_dtype(x), orepa_tensor_device(x)) : NULL;
  orepa_release(square);
  orepa_release(t);
  return y;
}

static orepa_tensor *copy_itself(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *t = orepa_clone(inputs[0]);
  return product_of(written(t, orepa_copy_(t, t)), orepa_retain(inputs[0]));
}

static orepa_tensor *fill(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *t = orepa_clone(inputs[0]);
  return product_of(written(t, orepa_fill_(t, 0.75)), orepa_retain(inputs[0]));
}

static orepa_tensor *assign(orepa_tensor *const *inputs, const void *options) {
  const copy_options *o = options;
  orepa_tensor *t = orepa_clone(inputs[0]);
  return product_of(written(t, orepa_assign_(t, o->axis, o->first, o->last, inputs[1])), orepa_retain(inputs[0]));
}

static orepa_tensor *assign_twice(orepa_tensor *const *inputs, const void *options) {
  const copy_options *o = options;
  orepa_tensor *t = orepa_clone(inputs[0]);
  int failed = orepa_assign_(t, o->axis, o->first, o->last, inputs[1]) ||
               orepa_assign_(t, o->axis, o->first, o->last - 1, inputs[1]);
  return written(t, failed);
}

/* Into a tensor on the other device that asks for nothing. */
static orepa_tensor *assign_on_device(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *x = inputs[0], *square = orepa_matmul(x, x);
  orepa_tensor *t = orepa_full(orepa_tensor_dtype(x), other_device(x), 2, (int64_t[]){2, orepa_shape(x)[0]}, 1);
  t = written(t, orepa_assign_(t, 0, 1, 2, square));
  orepa_tensor *y = t ? orepa_to(t, orepa_tensor_dtype(x), orepa_tensor_device(x)) : NULL;
  orepa_release(square);
  orepa_release(t);
  return y;
}

static void copying_over_hands_the_gradient_to_the_source(void **state) {
  (void)state;
  const gradient_case cases[] = {
      {CASE("same shape", copy_over, NULL, {SIZES(2, 3)}, {SIZES(2, 3)})},
      {CASE("broadcast", copy_over, NULL, {SIZES(2, 3, 2, 2)}, {SIZES(3, 1, 2)})},
      {CASE("scalar", copy_over, NULL, {SIZES(2, 3)}, {SCALAR})},
      {CASE("constant", copy_over, NULL, {SIZES(2, 3)}, {SIZES(3), .constant = true})},
      {CASE("empty", copy_over, NULL, {SIZES(0, 3)}, {SIZES(3)})},
      {CASE("itself", copy_itself, NULL, {SIZES(2, 3)})},
      {CASE("to float64", copy_to_type, OPTIONS(.dtype = OREPA_FLOAT64), {SIZES(2, 3)})},
      {CASE("to the other device", copy_to_device, NULL, {SIZES(2, 3, 2, 2)})},
      {CASE("fill", fill, NULL, {SIZES(2, 3)})},
      {CASE("fill nothing", fill, NULL, {SIZES(2, 0)})},
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

static void assigning_to_a_part_shares_the_gradient_out(void **state) {
  (void)state;
  const gradient_case cases[] = {
      {CASE("rows", assign, OPTIONS(.axis = 0, .first = 1, .last = 3), {SIZES(4, 2)}, {SIZES(2, 2)})},
      {CASE("one row", assign, OPTIONS(.axis = 0, .first = 1, .last = 2), {SIZES(3, 2)}, {SIZES(2)})},
      {CASE("last axis", assign, OPTIONS(.axis = -1, .first = 0, .last = 2), {SIZES(2, 3)}, {SIZES(2, 1)})},
      {CASE("channel", assign, OPTIONS(.axis = 1, .first = 2, .last = 3), {SIZES(2, 3, 2, 2)}, {SIZES(2, 2, 2)})},
      {CASE("scalar", assign, OPTIONS(.axis = 0, .first = 0, .last = 1), {SIZES(3, 2)}, {SCALAR})},
      {CASE("scalar to rows", assign, OPTIONS(.axis = 0, .first = 0, .last = 2), {SIZES(3, 2)}, {SCALAR})},
      {CASE("nothing", assign, OPTIONS(.axis = 0, .first = 2, .last = 2), {SIZES(3, 2)}, {SIZES(2)})},
      {CASE("all", assign, OPTIONS(.axis = 1, .first = 0, .last = 2), {SIZES(3, 2)}, {SIZES(3, 2)})},
      {CASE("empty", assign, OPTIONS(.axis = 1, .first = 0, .last = 2), {SIZES(0, 3)}, {SIZES(0, 2)})},
      {CASE("twice", assign_twice, OPTIONS(.axis = 0, .first = 1, .last = 3), {SIZES(4, 2)}, {SIZES(1, 2)})},
      {CASE("on the other device", assign_on_device, NULL, {SIZES(3)})},
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

/* What was overwritten as a whole has no part in the result. */
static void what_was_overwritten_gets_no_gradient(void **state) {
  (void)state;
  for (int k = 0; k < 2; k++) {
    orepa_tensor *x = orepa_full(OREPA_FLOAT32, device_named("ref"), 1, (int64_t[]){2}, 3);
    assert_int_equal(orepa_set_requires_grad(x, true), 0);
    orepa_tensor *t = orepa_clone(x), *source = orepa_detach(x);
    assert_int_equal(k ? orepa_fill_(t, 1) : orepa_copy_(t, source), 0);
    assert_false(orepa_requires_grad(t));
    assert_null(orepa_grad(x));
    orepa_release(source);
    orepa_release(t);
    orepa_release(x);
  }
}

/* ---- wrong input ---- */

static orepa_tensor *copy_to_leaf(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_copy_(inputs[0], inputs[1]) ? NULL : orepa_retain(inputs[0]);
}

static orepa_tensor *fill_leaf(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_fill_(inputs[0], 1) ? NULL : orepa_retain(inputs[0]);
}

static orepa_tensor *assign_to_leaf(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_assign_(inputs[0], 0, 0, 1, inputs[1]) ? NULL : orepa_retain(inputs[0]);
}

#define BAD(function, sizes, words, ...)                                                                               \
  { {CASE(#function, function, OPTIONS(__VA_ARGS__), {sizes})}, words }
#define BAD2(function, one, two, words, ...)                                                                           \
  { {CASE(#function, function, OPTIONS(__VA_ARGS__), {one}, {two})}, words }

static void writing_names_what_does_not_fit(void **state) {
  (void)state;
  const error_case cases[] = {
      BAD2(copy_over, SIZES(2, 3), SIZES(2, 2), WORDS("copy_", "2x3", "2x2"), .axis = 0),
      BAD2(copy_over, SIZES(3), SIZES(1, 3), WORDS("copy_", "3", "1x3"), .axis = 0),
      BAD2(copy_to_leaf, SIZES(2, 3), SIZES(3), WORDS("copy_", "leaf", "2x3"), .axis = 0),
      BAD(fill_leaf, SIZES(2, 3), WORDS("fill_", "leaf", "2x3"), .axis = 0),
      BAD2(assign_to_leaf, SIZES(2, 3), SIZES(3), WORDS("assign_", "leaf", "2x3"), .axis = 0),
      BAD2(assign, SIZES(2, 3), SIZES(2), WORDS("assign_", "3", "2"), .first = 0, .last = 1),
      BAD2(assign, SIZES(2, 3), SIZES(3), WORDS("assign_", "size 2"), .first = 2, .last = 3),
      BAD2(assign, SIZES(2, 3), SIZES(3), WORDS("assign_", "size 2"), .first = -1, .last = 0),
      BAD2(assign, SIZES(2, 3), SIZES(2, 3), WORDS("assign_", "size 3"), .axis = 1, .first = 1, .last = 4),
      BAD2(assign, SIZES(2, 3), SIZES(2, 3), WORDS("assign_", "axis 3", "rank 2"), .axis = 2, .last = 1),
  };
  check_errors(COUNT_OF(cases), cases);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(copies_pass_the_gradient_on),
      cmocka_unit_test(types_pass_the_gradient_on),
      cmocka_unit_test(integers_end_the_graph),
      cmocka_unit_test(detach_lets_no_gradient_through),
      cmocka_unit_test(copying_over_hands_the_gradient_to_the_source),
      cmocka_unit_test(assigning_to_a_part_shares_the_gradient_out),
      cmocka_unit_test(what_was_overwritten_gets_no_gradient),
      cmocka_unit_test(writing_names_what_does_not_fit),
  };
  return RUN_GUARDED(tests);
}
