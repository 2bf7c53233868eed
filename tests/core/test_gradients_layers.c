/* Gradients of transposed convolutions, of interpolation, and of norms by an image's own statistics. */
#include "gradient_test.h"

/* ---- transposed convolutions: inputs x, kernel and, if there is a third, bias ---- */

typedef struct {
  orepa_conv conv;
  int64_t output_padding[2];
  bool bias;
} transpose_options;

static orepa_tensor *transpose(orepa_tensor *const *inputs, const void *options) {
  const transpose_options *o = options;
  return orepa_conv_transpose2d(inputs[0], inputs[1], o->bias ? inputs[2] : NULL, &o->conv, o->output_padding);
}

/* stride, padding, dilation, groups; output padding */
static const struct {
  orepa_conv conv;
  int64_t output_padding[2], x[4], w[4];
} transposes[] = {
    {{{1, 1}, {0, 0}, {1, 1}, 1}, {0, 0}, {2, 3, 2, 3}, {3, 2, 2, 2}},
    {{{2, 2}, {0, 0}, {1, 1}, 1}, {0, 0}, {1, 2, 2, 3}, {2, 3, 2, 2}},
    {{{2, 2}, {1, 1}, {1, 1}, 1}, {1, 1}, {1, 2, 3, 2}, {2, 2, 3, 3}},
    {{{3, 2}, {1, 0}, {1, 1}, 1}, {2, 1}, {1, 2, 2, 2}, {2, 1, 3, 2}},
    {{{1, 2}, {1, 2}, {2, 1}, 1}, {0, 1}, {1, 1, 3, 2}, {1, 2, 3, 4}},
    {{{1, 1}, {0, 0}, {3, 2}, 1}, {2, 1}, {1, 2, 2, 2}, {2, 1, 2, 2}}, /* output padding by whole strides */
    {{{2, 1}, {1, 1}, {3, 3}, 1}, {2, 2}, {1, 1, 2, 3}, {1, 2, 2, 2}},
    {{{2, 2}, {1, 1}, {1, 1}, 2}, {0, 0}, {2, 4, 2, 2}, {4, 3, 3, 3}},
    {{{1, 1}, {0, 0}, {1, 1}, 3}, {0, 0}, {1, 3, 2, 2}, {3, 1, 2, 2}},
    {{{2, 2}, {0, 0}, {1, 1}, 1}, {0, 0}, {1, 2, 2, 2}, {2, 2, 1, 1}}, /* elements that only the bias reaches */
    {{{1, 1}, {0, 0}, {1, 1}, 1}, {0, 0}, {1, 1, 1, 1}, {1, 1, 1, 1}},
    {{{2, 2}, {0, 0}, {1, 1}, 1}, {0, 0}, {0, 2, 2, 2}, {2, 3, 2, 2}}, /* nothing */
    {{{2, 2}, {0, 0}, {1, 1}, 1}, {0, 0}, {2, 0, 2, 2}, {0, 3, 2, 2}},
    {{{2, 2}, {0, 0}, {1, 1}, 1}, {0, 0}, {2, 2, 2, 2}, {2, 0, 2, 2}},
};

static void transposed_convolutions_have_their_gradients(void **state) {
  (void)state;
  for (int k = 0; k < COUNT_OF(transposes); k++)
    for (int layout = PLAIN; layout < LAYOUTS; layout++) {
      transpose_options o = {
          transposes[k].conv, {transposes[k].output_padding[0], transposes[k].output_padding[1]}, layout != SLICED};
      gradient_case c = {CASE("conv_transpose2d", transpose, &o, {SIZES(1, 1, 1, 1)}, {SIZES(1, 1, 1, 1)}, {SIZES(1)})};
      memcpy(c.inputs[0].shape, transposes[k].x, sizeof transposes[k].x);
      memcpy(c.inputs[1].shape, transposes[k].w, sizeof transposes[k].w);
      c.inputs[2].shape[0] = transposes[k].w[1] * o.conv.groups;
      c.inputs[0].layout = c.inputs[1].layout = (input_layout)layout;
      c.count = o.bias ? 3 : 2;
      check_case(&c);
    }
}

/* ---- interpolation ---- */

typedef struct {
  orepa_interpolation how;
  int64_t size[2];
} interpolate_options;

static orepa_tensor *interpolate(orepa_tensor *const *inputs, const void *options) {
  const interpolate_options *o = options;
  return orepa_interpolate(inputs[0], o->size, &o->how);
}

static const struct {
  int64_t x[4], size[2];
  double scale[2];
} sizes[] = {
    {{2, 2, 2, 3}, {4, 6}, {0}}, {{1, 3, 3, 2}, {5, 7}, {0}},         {{1, 2, 5, 6}, {2, 3}, {0}},
    {{1, 2, 7, 4}, {3, 9}, {0}}, {{1, 2, 1, 3}, {4, 1}, {0}},         {{2, 1, 3, 3}, {3, 3}, {0}},
    {{1, 1, 1, 1}, {1, 1}, {0}}, {{1, 2, 4, 5}, {5, 3}, {1.3, 0.75}}, {{0, 2, 2, 2}, {4, 4}, {0}},
    {{2, 0, 2, 2}, {4, 4}, {0}},
};

static void interpolation_has_its_gradient(void **state) {
  (void)state;
  for (int k = 0; k < 3 * COUNT_OF(sizes); k++)
    for (int layout = PLAIN; layout < LAYOUTS; layout++) {
      int n = k / 3;
      interpolate_options o = {{k % 3 > 0, k % 3 > 1, {sizes[n].scale[0], sizes[n].scale[1]}},
                               {sizes[n].size[0], sizes[n].size[1]}};
      gradient_case c = {CASE("interpolate", interpolate, &o, {SIZES(1, 1, 1, 1)})};
      memcpy(c.inputs[0].shape, sizes[n].x, sizeof sizes[n].x);
      c.inputs[0].layout = (input_layout)layout;
      check_case(&c);
    }
}

/* ---- norms: inputs x and those of weight and bias that there are ---- */

typedef struct {
  int64_t groups; /* 0: layer norm */
  int axes;       /* of a layer norm */
  bool weight, bias;
} norm_options;

static orepa_tensor *norm(orepa_tensor *const *inputs, const void *options) {
  const norm_options *o = options;
  orepa_tensor *x = *inputs++, *weight = o->weight ? *inputs++ : NULL, *bias = o->bias ? *inputs++ : NULL;
  return o->groups ? orepa_group_norm(x, o->groups, weight, bias, 1e-5)
                   : orepa_layer_norm(x, o->axes, weight, bias, 1e-5);
}

/* With each choice of weight and bias, of a parameter's shape. */
static void check_norm(const case_input *x, int64_t groups, int axes, int rank, const int64_t *shape) {
  for (unsigned choice = 0; choice < 4; choice++)
    for (int layout = PLAIN; layout < EXPANDED; layout++) {
      norm_options o = {groups, axes, choice & 1, choice & 2};
      gradient_case c = {CASE(groups ? "group_norm" : "layer_norm", norm, &o, *x), .tolerance = 1e-4};
      case_input parameter = {.rank = rank, .low = 0.5, .high = 1.5, .layout = (input_layout)layout};
      memcpy(parameter.shape, shape, (size_t)rank * sizeof *shape);
      c.inputs[0].layout = (input_layout)layout;
      c.view = !groups && layout != PLAIN;
      for (unsigned k = 0; k < 2; k++)
        if (choice >> k & 1)
          c.inputs[c.count++] = parameter;
      check_case(&c);
    }
}

static void group_norm_differentiates_through_the_statistics(void **state) {
  (void)state;
  static const struct {
    case_input x;
    int64_t groups;
  } cases[] = {
      {{SIZES(2, 4, 2, 3)}, 2},    {{SIZES(1, 3, 3, 2), .low = -5, .high = 20}, 3},
      {{SIZES(2, 6, 1, 1)}, 2},    {{SIZES(2, 4, 2, 1)}, 1},
      {{SIZES(3, 4)}, 2},          {{SIZES(2, 4, 3)}, 2},
      {{SIZES(2, 4, 2, 1, 2)}, 2}, {{SIZES(1, 2, 1, 2, 2, 2)}, 1},
      {{SIZES(0, 4, 2, 2)}, 2},    {{SIZES(2, 0, 2, 2)}, 2},
      {{SIZES(2, 4, 0, 2)}, 2},
  };
  for (int k = 0; k < COUNT_OF(cases); k++)
    check_norm(&cases[k].x, cases[k].groups, 0, 1, &cases[k].x.shape[1]);
}

static void layer_norm_differentiates_through_the_statistics(void **state) {
  (void)state;
  static const struct {
    case_input x;
    int axes;
  } cases[] = {
      {{SIZES(3, 5)}, 1},       {{SIZES(2, 3, 4)}, 1},    {{SIZES(2, 3, 4)}, 2},       {{SIZES(6)}, 1},
      {{SIZES(2, 3, 2, 4)}, 1}, {{SIZES(2, 3, 2, 2)}, 2}, {{SIZES(2, 3, 2, 2)}, 3},    {{SIZES(2, 2, 2, 2)}, 4},
      {{SIZES(0, 4)}, 1},       {{SIZES(3, 0)}, 1},       {{SIZES(2, 1, 2, 1, 3)}, 2}, {{SIZES(0, 3, 2, 2)}, 3},
  };
  for (int k = 0; k < COUNT_OF(cases); k++)
    check_norm(&cases[k].x, 0, cases[k].axes, cases[k].axes, cases[k].x.shape + cases[k].x.rank - cases[k].axes);
}

/* ---- what they refuse ---- */

static void wrong_arguments_have_messages(void **state) {
  (void)state;
  const orepa_device *ref = orepa_device_by_name("ref");
  orepa_tensor *map = orepa_full(OREPA_FLOAT32, ref, 4, (int64_t[]){1, 4, 3, 3}, 1),
               *kernel = orepa_full(OREPA_FLOAT32, ref, 4, (int64_t[]){4, 2, 2, 2}, 1),
               *list = orepa_full(OREPA_FLOAT32, ref, 1, (int64_t[]){3}, 1);
  orepa_conv conv = {{2, 2}, {0, 0}, {1, 1}, 1};
  int64_t none[2] = {0, 0}, two[2] = {0, 2}, size[2] = {0, 5};
  assert_null(orepa_conv_transpose2d(map, map, NULL, &conv, none));
  assert_non_null(strstr(orepa_error(), "kernel has 1 input channels, input has 4"));
  assert_null(orepa_conv_transpose2d(map, kernel, list, &conv, none));
  assert_non_null(strstr(orepa_error(), "bias 3 for 2 output channels"));
  assert_null(orepa_conv_transpose2d(map, kernel, NULL, &conv, two));
  assert_non_null(strstr(orepa_error(), "output_padding 2 of the width"));
  conv.padding[0] = 4;
  assert_null(orepa_conv_transpose2d(map, kernel, NULL, &conv, none));
  assert_non_null(strstr(orepa_error(), "padding 4 leaves nothing of the height"));
  assert_null(orepa_interpolate(map, size, &(orepa_interpolation){.bilinear = true}));
  assert_non_null(strstr(orepa_error(), "from 3x3 to 0x5: sizes must be at least 1"));
  assert_null(orepa_group_norm(map, 3, NULL, NULL, 1e-5));
  assert_non_null(strstr(orepa_error(), "3 groups don't divide 4 channels"));
  assert_null(orepa_group_norm(map, 2, list, NULL, 1e-5));
  assert_non_null(strstr(orepa_error(), "needs float32 4"));
  assert_null(orepa_layer_norm(map, 5, NULL, NULL, 1e-5));
  assert_non_null(strstr(orepa_error(), "over the last 5 dimensions"));
  assert_null(orepa_layer_norm(map, 1, NULL, NULL, -1));
  assert_non_null(strstr(orepa_error(), "eps is -1"));
  orepa_release(map);
  orepa_release(kernel);
  orepa_release(list);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(transposed_convolutions_have_their_gradients),
      cmocka_unit_test(interpolation_has_its_gradient),
      cmocka_unit_test(group_norm_differentiates_through_the_statistics),
      cmocka_unit_test(layer_norm_differentiates_through_the_statistics),
      cmocka_unit_test(wrong_arguments_have_messages),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
