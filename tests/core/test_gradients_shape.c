/* Gradients through views, and through what is put together or around. */
#include "gradient_test.h"

/* What an op is told; each reads its own. */
typedef struct {
  int rank;
  int64_t shape[OREPA_MAX_RANK];
  int axes[OREPA_MAX_RANK];
  int axis;
  int64_t first, last, step;
  int64_t before[OREPA_MAX_RANK], after[OREPA_MAX_RANK];
  double number;
} shape_options;

#define OPTIONS(...) (&(const shape_options){__VA_ARGS__})
/* A case with one input of these sizes. */
#define OF(function, sizes, ...)                                                                                       \
  { CASE(#function, function, OPTIONS(__VA_ARGS__), {sizes}), .view = true }
#define SCALAR .rank = 0

/* a * b, and both references are taken; so that what a case changed goes on in the graph. */
static orepa_tensor *product_of(orepa_tensor *a, orepa_tensor *b) {
  orepa_tensor *y = a && b ? orepa_mul(a, b) : NULL;
  orepa_release(a);
  orepa_release(b);
  return y;
}

/* ---- views ---- */

static orepa_tensor *reshape(orepa_tensor *const *inputs, const void *options) {
  const shape_options *o = options;
  return orepa_reshape(inputs[0], o->rank, o->shape);
}

static orepa_tensor *permute(orepa_tensor *const *inputs, const void *options) {
  return orepa_permute(inputs[0], ((const shape_options *)options)->axes);
}

static orepa_tensor *transpose(orepa_tensor *const *inputs, const void *options) {
  const shape_options *o = options;
  return orepa_transpose(inputs[0], o->axes[0], o->axes[1]);
}

static orepa_tensor *slice(orepa_tensor *const *inputs, const void *options) {
  const shape_options *o = options;
  return orepa_slice(inputs[0], o->axis, o->first, o->last, o->step);
}

static orepa_tensor *select_one(orepa_tensor *const *inputs, const void *options) {
  const shape_options *o = options;
  return orepa_select(inputs[0], o->axis, o->first);
}

static orepa_tensor *expand(orepa_tensor *const *inputs, const void *options) {
  const shape_options *o = options;
  return orepa_expand(inputs[0], o->rank, o->shape);
}

static void reshape_has_its_gradient(void **state) {
  (void)state;
  const gradient_case cases[] = {
      OF(reshape, SIZES(2, 3, 4), SIZES(4, 6)),
      OF(reshape, SIZES(2, 3, 4), SIZES(-1)),
      OF(reshape, SIZES(2, 3, 2, 2), SIZES(2, -1)),
      OF(reshape, SIZES(2, 12), SIZES(2, 3, 2, 2)),
      OF(reshape, SIZES(2, 3, 2, 2), SIZES(3, 2, 4)),
      OF(reshape, SIZES(2, 3, 1, 1), SIZES(2, 3)),
      OF(reshape, SIZES(2, 3), SIZES(1, 2, 1, 3, 1)),
      OF(reshape, SIZES(2, 2, 2, 3), SIZES(3, 2, 2, 2)),
      OF(reshape, SCALAR, SIZES(1, 1)),
      OF(reshape, SIZES(1), SCALAR),
      OF(reshape, SIZES(0, 3), SIZES(3, 0)),
      OF(reshape, SIZES(0, 4), SIZES(2, 0, 2, 1)),
      OF(reshape, SIZES(2, 0), SIZES(-1)),
      OF(reshape, SIZES(1, 2, 1, 2, 1, 2), SIZES(2, 1, 4)),
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

static void permute_and_transpose_have_their_gradients(void **state) {
  (void)state;
  const gradient_case cases[] = {
      OF(permute, SIZES(2, 3, 4), .axes = {2, 0, 1}),
      OF(permute, SIZES(2, 3, 4), .axes = {-1, 0, -2}),
      OF(permute, SIZES(2, 3, 2, 3), .axes = {0, 2, 3, 1}),
      OF(permute, SIZES(2, 1, 2, 1, 3, 1), .axes = {5, 4, 2, 0, 1, 3}),
      OF(permute, SIZES(3), .axes = {0}),
      OF(permute, SCALAR, .axis = 0),
      OF(permute, SIZES(2, 0), .axes = {1, 0}),
      OF(transpose, SIZES(2, 3), .axes = {0, 1}),
      OF(transpose, SIZES(2, 3, 4, 2), .axes = {-1, 1}),
      OF(transpose, SIZES(2, 3), .axes = {1, 1}),
      OF(transpose, SIZES(0, 3), .axes = {0, 1}),
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

static void parts_have_their_gradients(void **state) {
  (void)state;
  const gradient_case cases[] = {
      OF(slice, SIZES(5), .first = 1, .last = 4, .step = 1),
      OF(slice, SIZES(5), .first = 0, .last = 5, .step = 2),
      OF(slice, SIZES(2, 6), .axis = 1, .first = 1, .last = 6, .step = 3),
      OF(slice, SIZES(2, 6), .axis = -1, .first = 2, .last = 4, .step = 7),
      OF(slice, SIZES(2, 3, 4, 2), .axis = 1, .first = 1, .last = 3, .step = 1),
      OF(slice, SIZES(2, 3), .axis = 0, .first = 1, .last = 1, .step = 1),
      OF(slice, SIZES(2, 3), .axis = 1, .first = 3, .last = 3, .step = 2),
      OF(slice, SIZES(0, 3), .axis = 1, .first = 1, .last = 2, .step = 1),
      OF(slice, SIZES(0), .first = 0, .last = 0, .step = 1),
      OF(select_one, SIZES(3), .first = 2),
      OF(select_one, SIZES(3), .first = -3),
      OF(select_one, SIZES(2, 3, 2, 2), .axis = 1, .first = -1),
      OF(select_one, SIZES(2, 3, 2), .axis = -1, .first = 0),
      OF(select_one, SIZES(0, 3), .axis = 1, .first = 1),
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

static void expand_sums_its_gradient(void **state) {
  (void)state;
  const gradient_case cases[] = {
      OF(expand, SIZES(3, 1), SIZES(2, 3, 4)),
      OF(expand, SIZES(3), SIZES(2, 3)),
      OF(expand, SIZES(1), SIZES(4)),
      OF(expand, SCALAR, SIZES(2, 2)),
      OF(expand, SCALAR, SCALAR),
      OF(expand, SIZES(2, 1, 2, 1), SIZES(2, 3, 2, 2)),
      OF(expand, SIZES(1, 3, 1), SIZES(2, 1, 3, 2)),
      OF(expand, SIZES(1), SIZES(0)),
      OF(expand, SIZES(2, 1), SIZES(2, 0)),
      OF(expand, SIZES(0), SIZES(2, 0)),
      OF(expand, SIZES(1, 1), SIZES(1, 2, 1, 2, 1, 2)),
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

/* ---- parts that overlap: their gradients add up ---- */

static orepa_tensor *overlapping_parts(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *parts[3] = {orepa_slice(inputs[0], 0, 0, 3, 1), orepa_slice(inputs[0], 0, 1, 4, 1),
                            orepa_slice(inputs[0], 0, 0, 4, 2)};
  orepa_tensor *y = orepa_concatenate(3, parts, 0);
  for (int k = 0; k < 3; k++)
    orepa_release(parts[k]);
  return y;
}

/* x + its own transpose, and that times x. */
static orepa_tensor *own_transpose(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *turned = orepa_transpose(inputs[0], 0, 1), *sum = orepa_add(inputs[0], turned);
  orepa_release(turned);
  return product_of(sum, orepa_retain(inputs[0]));
}

/* The sum hands one gradient to two branches; then more arrives at one of them, and at the other it must not show. */
static orepa_tensor *shared_gradient(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *a = orepa_clone(inputs[0]), *b = orepa_clone(inputs[1]);
  orepa_tensor *parts[] = {orepa_mul(a, a), orepa_add(a, b)}, *y = orepa_concatenate(2, parts, 0);
  orepa_tensor *sum = orepa_add(parts[1], parts[0]), *rest = orepa_concatenate(2, (orepa_tensor *[]){sum, b}, 0);
  orepa_release(a);
  orepa_release(b);
  orepa_release(parts[0]);
  orepa_release(parts[1]);
  orepa_release(sum);
  return product_of(y, rest);
}

static orepa_tensor *sum_of_leaves(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_add(inputs[0], inputs[1]);
}

static void gradients_of_all_uses_add_up(void **state) {
  (void)state;
  const gradient_case cases[] = {
      {CASE("overlapping parts", overlapping_parts, NULL, {SIZES(4, 2)})},
      {CASE("shared gradient", shared_gradient, NULL, {SIZES(2, 2)}, {SIZES(2, 2)})},
      {CASE("sum of leaves", sum_of_leaves, NULL, {SIZES(2, 2)}, {SIZES(2, 2)})},
      {CASE("own transpose", own_transpose, NULL, {SIZES(3, 3)})},
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

/* ---- put together, put around ---- */

static orepa_tensor *concatenate2(orepa_tensor *const *inputs, const void *options) {
  return orepa_concatenate(2, inputs, ((const shape_options *)options)->axis);
}

static orepa_tensor *concatenate3(orepa_tensor *const *inputs, const void *options) {
  return orepa_concatenate(3, inputs, ((const shape_options *)options)->axis);
}

static orepa_tensor *concatenate_itself(orepa_tensor *const *inputs, const void *options) {
  return orepa_concatenate(3, (orepa_tensor *[]){inputs[0], inputs[1], inputs[0]},
                           ((const shape_options *)options)->axis);
}

static orepa_tensor *pad(orepa_tensor *const *inputs, const void *options) {
  const shape_options *o = options;
  return orepa_pad(inputs[0], o->before, o->after, (orepa_operand){.number = o->number});
}

static void concatenate_deals_the_gradient_out(void **state) {
  (void)state;
  const gradient_case cases[] = {
      {CASE("1-d", concatenate2, OPTIONS(.axis = 0), {SIZES(2)}, {SIZES(3)})},
      {CASE("rows", concatenate2, OPTIONS(.axis = 0), {SIZES(2, 3)}, {SIZES(1, 3)})},
      {CASE("last axis", concatenate3, OPTIONS(.axis = -1), {SIZES(2, 1)}, {SIZES(2, 3)}, {SIZES(2, 2)})},
      {CASE("channels", concatenate2, OPTIONS(.axis = 1), {SIZES(2, 1, 2, 2)}, {SIZES(2, 3, 2, 2)})},
      {CASE("constant", concatenate2, OPTIONS(.axis = 1), {SIZES(2, 2)}, {SIZES(2, 1), .constant = true})},
      {CASE("empty part", concatenate3, OPTIONS(.axis = 0), {SIZES(2, 2)}, {SIZES(0, 2)}, {SIZES(1, 2)})},
      {CASE("nothing", concatenate2, OPTIONS(.axis = 1), {SIZES(0, 2)}, {SIZES(0, 3)})},
      {CASE("itself", concatenate_itself, OPTIONS(.axis = 1), {SIZES(2, 2)}, {SIZES(2, 1)})},
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

static void pad_cuts_the_gradient_out(void **state) {
  (void)state;
  const gradient_case cases[] = {
      OF(pad, SIZES(3), .before = {1}, .after = {2}, .number = 0.5),
      OF(pad, SIZES(2, 3), .before = {0, 1}, .after = {1, 0}),
      OF(pad, SIZES(2, 3, 2, 2), .before = {0, 0, 1, 2}, .after = {0, 1, 0, 1}, .number = -1),
      OF(pad, SIZES(4), .before = {-1}, .after = {-2}),
      OF(pad, SIZES(5), .before = {-3}, .after = {4}),
      OF(pad, SIZES(5), .before = {2}, .after = {-4}),
      OF(pad, SIZES(2, 3), .before = {-2, 1}, .after = {1, -1}),
      OF(pad, SIZES(3), .before = {-3}, .after = {0}),
      OF(pad, SIZES(0, 2), .before = {1, 0}, .after = {1, 1}),
      OF(pad, SCALAR, .number = 1),
  };
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

/* ---- wrong input ---- */

static orepa_tensor *concatenate_types(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *wide = orepa_to(inputs[1], OREPA_FLOAT64, orepa_tensor_device(inputs[1]));
  orepa_tensor *y = concatenate2((orepa_tensor *[]){inputs[0], wide}, options);
  orepa_release(wide);
  return y;
}

static orepa_tensor *concatenate_none(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_concatenate(0, inputs, 0);
}

#define BAD(function, sizes, words, ...)                                                                               \
  { {CASE(#function, function, OPTIONS(__VA_ARGS__), {sizes})}, words }
#define BAD2(function, one, two, words, ...)                                                                           \
  { {CASE(#function, function, OPTIONS(__VA_ARGS__), {one}, {two})}, words }

static void views_name_what_does_not_fit(void **state) {
  (void)state;
  const error_case cases[] = {
      BAD(reshape, SIZES(2, 3), WORDS("reshape", "2x3", "4x2", "6"), SIZES(4, 2)),
      BAD(reshape, SIZES(2, 3), WORDS("reshape", "2x3", "-1x-1"), SIZES(-1, -1)),
      BAD(reshape, SIZES(2, 3), WORDS("reshape", "2x3", "-1x4"), SIZES(-1, 4)),
      BAD(reshape, SIZES(0), WORDS("reshape", "0", "-1x0"), SIZES(-1, 0)),
      BAD(reshape, SIZES(2), WORDS("reshape", "6", "7"), .rank = 7),
      BAD(permute, SIZES(2, 3), WORDS("permute", "axis 2", "twice"), .axes = {1, 1}),
      BAD(permute, SIZES(2, 3), WORDS("permute", "axis 3", "rank 2"), .axes = {2, 0}),
      BAD(transpose, SIZES(2, 3), WORDS("transpose", "axis -3", "rank 2"), .axes = {0, -3}),
      BAD(slice, SIZES(2, 3), WORDS("slice", "size 3"), .axis = 1, .first = 0, .last = 4, .step = 1),
      BAD(slice, SIZES(2, 3), WORDS("slice", "size 3"), .axis = 1, .first = 2, .last = 1, .step = 1),
      BAD(slice, SIZES(2, 3), WORDS("slice", "steps of 0"), .axis = 1, .first = 0, .last = 1, .step = 0),
      BAD(slice, SIZES(2, 3), WORDS("slice", "axis 3", "rank 2"), .axis = 2, .last = 1, .step = 1),
      BAD(select_one, SIZES(2, 3), WORDS("select", "position 4", "size 3"), .axis = 1, .first = 3),
      BAD(select_one, SIZES(2, 3), WORDS("select", "position -3", "size 2"), .first = -3),
      BAD(select_one, SCALAR, WORDS("select", "rank 0"), .first = 0),
      BAD(expand, SIZES(2, 3), WORDS("expand", "2x3", "2x4"), SIZES(2, 4)),
      BAD(expand, SIZES(2, 3), WORDS("expand", "2x3", "3"), SIZES(3)),
      BAD(expand, SIZES(1), WORDS("expand", "-1"), SIZES(-1)),
  };
  check_errors(COUNT_OF(cases), cases);
}

static void copies_name_what_does_not_fit(void **state) {
  (void)state;
  const error_case cases[] = {
      BAD2(concatenate2, SIZES(2, 3), SIZES(2, 4), WORDS("concatenate", "2x3", "2x4", "axis 1"), .axis = 0),
      BAD2(concatenate2, SIZES(2, 3), SIZES(3), WORDS("concatenate", "2x3", "float32 3"), .axis = 0),
      BAD2(concatenate2, SIZES(2, 3), SIZES(2, 3), WORDS("concatenate", "axis 3", "rank 2"), .axis = 2),
      BAD2(concatenate2, SCALAR, SCALAR, WORDS("concatenate", "rank 0"), .axis = 0),
      BAD2(concatenate_types, SIZES(2), SIZES(2), WORDS("concatenate", "float32 2", "float64 2"), .axis = 0),
      BAD(concatenate_none, SIZES(2), WORDS("concatenate", "nothing"), .axis = 0),
      BAD(pad, SIZES(2, 3), WORDS("pad", "2x3", "size 3"), .before = {0, -2}, .after = {0, -2}),
      BAD(pad, SIZES(2, 3), WORDS("pad", "2x3", "size 2"), .before = {-3, 0}, .after = {4, 0}),
  };
  check_errors(COUNT_OF(cases), cases);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(reshape_has_its_gradient),      cmocka_unit_test(permute_and_transpose_have_their_gradients),
      cmocka_unit_test(parts_have_their_gradients),    cmocka_unit_test(expand_sums_its_gradient),
      cmocka_unit_test(gradients_of_all_uses_add_up),  cmocka_unit_test(concatenate_deals_the_gradient_out),
      cmocka_unit_test(pad_cuts_the_gradient_out),     cmocka_unit_test(views_name_what_does_not_fit),
      cmocka_unit_test(copies_name_what_does_not_fit),
  };
  return RUN_GUARDED(tests);
}
