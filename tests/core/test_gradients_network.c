/* Gradients of matrix products and convolutions, and a small network of all layers. */
#include "gradient_test.h"

/* ---- matrix products ---- */

static orepa_tensor *matmul(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_matmul(inputs[0], inputs[1]);
}

static orepa_tensor *linear(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_linear(inputs[0], inputs[1], NULL);
}

static orepa_tensor *linear_bias(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  return orepa_linear(inputs[0], inputs[1], inputs[2]);
}

static orepa_tensor *gram(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *turned = orepa_transpose(inputs[0], 0, 1), *y = orepa_matmul(turned, inputs[0]);
  orepa_release(turned);
  return y;
}

static void matmul_of_all_ranks_has_its_gradients(void **state) {
  (void)state;
#define OF(a, b)                                                                                                       \
  { CASE("matmul", matmul, NULL, {a}, {b}) }
  const gradient_case cases[] = {
      OF(SIZES(3), SIZES(3)),
      OF(SIZES(2, 3), SIZES(3)),
      OF(SIZES(3), SIZES(3, 2)),
      OF(SIZES(2, 3), SIZES(3, 4)),
      OF(SIZES(1, 1), SIZES(1, 1)),
      OF(SIZES(2, 2, 3), SIZES(3, 2)),
      OF(SIZES(2, 3), SIZES(2, 3, 2)),
      OF(SIZES(2, 2, 3), SIZES(2, 3, 2)),
      OF(SIZES(1, 2, 3), SIZES(3, 3, 1)),
      OF(SIZES(3, 2, 3), SIZES(1, 3, 1)),
      OF(SIZES(2, 1, 2, 3), SIZES(3, 3, 2)),
      OF(SIZES(2, 2, 2, 3), SIZES(2, 2, 3, 1)),
      OF(SIZES(2, 1, 2, 1, 1, 2), SIZES(2, 1, 2, 2)),
      OF(SIZES(2, 2, 3), SIZES(3)),
      OF(SIZES(3), SIZES(2, 3, 2)),
      OF(SIZES(0, 3), SIZES(3, 2)),
      OF(SIZES(2, 0), SIZES(0, 3)),
      OF(SIZES(0), SIZES(0)),
      OF(SIZES(2, 3), SIZES(3, 0)),
      OF(SIZES(0, 2, 3), SIZES(3, 2)),
      OF(SIZES(1, 2, 3), SIZES(0, 3, 2)),
      OF(SIZES(2, 2, 0), SIZES(2, 0, 2)),
      {CASE("x'x", gram, NULL, {SIZES(2, 3)})},
  };
#undef OF
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

static void linear_has_its_gradients(void **state) {
  (void)state;
#define OF(x, w, b)                                                                                                    \
  {CASE("linear", linear, NULL, {x}, {w})}, {                                                                          \
    CASE("linear", linear_bias, NULL, {x}, {w}, {b})                                                                   \
  }
  const gradient_case cases[] = {
      OF(SIZES(3), SIZES(2, 3), SIZES(2)),
      OF(SIZES(4, 3), SIZES(2, 3), SIZES(2)),
      OF(SIZES(2, 2, 3), SIZES(1, 3), SIZES(1)),
      OF(SIZES(2, 1, 2, 3), SIZES(4, 3), SIZES(4)),
      OF(SIZES(1, 2, 1, 1, 2, 2), SIZES(3, 2), SIZES(3)),
      OF(SIZES(0, 3), SIZES(2, 3), SIZES(2)),
      OF(SIZES(2, 0), SIZES(2, 0), SIZES(2)),
      OF(SIZES(2, 3), SIZES(0, 3), SIZES(0)),
  };
#undef OF
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

/* Results of an op belong to the user alone: they may be changed in place. */
static orepa_tensor *then_multiply(orepa_tensor *y, orepa_tensor *factor) {
  orepa_operand operands[] = {{.tensor = y}, {.tensor = factor}};
  if (y && orepa_apply_in_place(orepa_function_by_name("mul"), operands)) {
    orepa_release(y);
    return NULL;
  }
  return y;
}

static orepa_tensor *matmul_then_multiply(orepa_tensor *const *inputs, const void *options) {
  return then_multiply(matmul(inputs, options), inputs[2]);
}

static orepa_tensor *linear_then_multiply(orepa_tensor *const *inputs, const void *options) {
  return then_multiply(linear(inputs, options), inputs[2]);
}

static void products_can_be_changed_in_place(void **state) {
  (void)state;
  const gradient_case cases[] = {
      {CASE("matmul", matmul_then_multiply, NULL, {SIZES(2, 3)}, {SIZES(3, 2)}, {SIZES(2)})},
      {CASE("matmul", matmul_then_multiply, NULL, {SIZES(2, 2, 1, 3)}, {SIZES(2, 3, 2)}, {SIZES(2)})},
      {CASE("matmul", matmul_then_multiply, NULL, {SIZES(3)}, {SIZES(3, 2)}, {SIZES(2)})},
      {CASE("linear", linear_then_multiply, NULL, {SIZES(2, 3)}, {SIZES(4, 3)}, {SIZES(2, 1)})},
  };
  check_cases(COUNT_OF(cases), cases);
}

/* ---- convolutions ---- */

static orepa_tensor *conv2d(orepa_tensor *const *inputs, const void *options) {
  return orepa_conv2d(inputs[0], inputs[1], NULL, options);
}

static orepa_tensor *conv2d_bias(orepa_tensor *const *inputs, const void *options) {
  return orepa_conv2d(inputs[0], inputs[1], inputs[2], options);
}

/* {stride, padding, dilation, groups}: pairs are height, width */
#define CONV(...) (&(const orepa_conv){__VA_ARGS__})

static void convolutions_have_their_gradients(void **state) {
  (void)state;
  const orepa_conv *plain = CONV({1, 1}, {0, 0}, {1, 1}, 1), *same = CONV({1, 1}, {1, 1}, {1, 1}, 1);
#define OF(conv, x, w, b)                                                                                              \
  {CASE("conv2d", conv2d, conv, {x}, {w})}, {                                                                          \
    CASE("conv2d", conv2d_bias, conv, {x}, {w}, {b})                                                                   \
  }
  const gradient_case cases[] = {
      OF(plain, SIZES(2, 3, 3, 4), SIZES(2, 3, 1, 1), SIZES(2)),
      OF(same, SIZES(1, 2, 4, 3), SIZES(3, 2, 3, 3), SIZES(3)),
      OF(same, SIZES(2, 1, 1, 1), SIZES(2, 1, 3, 3), SIZES(2)), /* the kernel is larger than the map */
      OF(CONV({1, 1}, {2, 3}, {1, 1}, 1), SIZES(1, 2, 2, 1), SIZES(2, 2, 5, 6), SIZES(2)),
      OF(CONV({1, 1}, {2, 2}, {1, 1}, 1), SIZES(1, 1, 2, 2), SIZES(2, 1, 1, 1),
         SIZES(2)), /* more padding than kernel */
      OF(CONV({2, 3}, {1, 0}, {1, 1}, 1), SIZES(1, 2, 4, 5), SIZES(2, 2, 3, 2), SIZES(2)),
      OF(CONV({3, 3}, {0, 0}, {1, 1}, 1), SIZES(2, 2, 5, 4), SIZES(1, 2, 1, 1),
         SIZES(1)), /* rows that no window sees */
      OF(CONV({1, 2}, {2, 1}, {2, 3}, 1), SIZES(1, 2, 3, 4), SIZES(2, 2, 3, 2), SIZES(2)),
      OF(CONV({1, 1}, {1, 1}, {1, 1}, 2), SIZES(2, 4, 3, 2), SIZES(6, 2, 3, 3), SIZES(6)),
      OF(CONV({2, 1}, {1, 1}, {1, 1}, 3), SIZES(1, 3, 4, 3), SIZES(3, 1, 3, 3), SIZES(3)), /* depthwise */
      OF(CONV({1, 1}, {0, 1}, {2, 1}, 2), SIZES(1, 2, 4, 2), SIZES(4, 1, 2, 3), SIZES(4)),
      OF(same, SIZES(0, 2, 3, 3), SIZES(2, 2, 3, 3), SIZES(2)),
      OF(same, SIZES(1, 2, 0, 3), SIZES(2, 2, 2, 2), SIZES(2)),
      OF(same, SIZES(1, 0, 2, 2), SIZES(2, 0, 3, 3), SIZES(2)),
      OF(same, SIZES(1, 2, 2, 2), SIZES(0, 2, 3, 3), SIZES(0)),
  };
#undef OF
  check_cases_in_layouts(COUNT_OF(cases), cases);
}

static orepa_tensor *conv2d_add(orepa_tensor *const *inputs, const void *options) {
  return orepa_conv2d_add(inputs[0], inputs[1], NULL, inputs[2], false, options);
}

static orepa_tensor *conv2d_add_relu(orepa_tensor *const *inputs, const void *options) {
  return orepa_conv2d_add(inputs[0], inputs[1], inputs[2], inputs[3], true, options);
}

static orepa_tensor *conv2d_relu(orepa_tensor *const *inputs, const void *options) {
  return orepa_conv2d_add(inputs[0], inputs[1], NULL, NULL, true, options);
}

static void what_follows_has_its_gradients(void **state) {
  (void)state;
  const orepa_conv *same = CONV({1, 1}, {1, 1}, {1, 1}, 1);
  const gradient_case cases[] = {
      {CASE("conv2d", conv2d_add, same, {SIZES(2, 2, 3, 4)}, {SIZES(3, 2, 3, 3)}, {SIZES(2, 3, 3, 4)})},
      {CASE("conv2d", conv2d_add, same, {SIZES(2, 2, 3, 4)}, {SIZES(3, 2, 3, 3)}, {SIZES(3, 1, 1)})}, /* broadcast */
      {CASE("conv2d", conv2d_add_relu, same, {SIZES(1, 2, 3, 4)}, {SIZES(2, 2, 3, 3)}, {SIZES(2)},
            {SIZES(1, 2, 3, 4)})},
      {CASE("conv2d", conv2d_relu, same, {SIZES(2, 2, 3, 2)}, {SIZES(3, 2, 3, 3)})},
  };
  check_cases(COUNT_OF(cases), cases);
}

static int64_t between(uint64_t *seed, int64_t low, int64_t high) {
  *seed = *seed * 6364136223846793005u + 1442695040888963407u;
  return low + (int64_t)((*seed >> 33) % (uint64_t)(high - low + 1));
}

/* A geometry whose window fits; the bias is input 3. */
static gradient_case random_convolution(uint64_t *seed, orepa_conv *conv) {
  conv->groups = between(seed, 1, 3);
  int64_t in = between(seed, 1, 2), out = between(seed, 1, 2) * conv->groups;
  gradient_case c = {CASE("conv2d", conv2d_bias, conv, {SIZES(1, 1, 1, 1)}, {SIZES(1, 1, 1, 1)}, {SIZES(1)})};
  int64_t *x = c.inputs[0].shape, *w = c.inputs[1].shape;
  x[0] = between(seed, 1, 2);
  x[1] = in * conv->groups;
  w[0] = c.inputs[2].shape[0] = out;
  w[1] = in;
  for (int d = 0; d < 2; d++) {
    conv->stride[d] = between(seed, 1, 3);
    conv->padding[d] = between(seed, 0, 3);
    conv->dilation[d] = between(seed, 1, 3);
    w[2 + d] = between(seed, 1, 3);
    int64_t least = conv->dilation[d] * (w[2 + d] - 1) + 1 - 2 * conv->padding[d];
    x[2 + d] = between(seed, least < 1 ? 1 : least, least < 1 ? 4 : least + 2);
  }
  for (int k = 0; k < c.count; k++)
    c.inputs[k].layout = (input_layout)between(seed, 0, LAYOUTS - 1);
  return c;
}

static void convolutions_of_random_geometry_have_their_gradients(void **state) {
  (void)state;
  uint64_t seed = 20240217;
  for (int k = 0; k < 60; k++) {
    orepa_conv conv;
    gradient_case c = random_convolution(&seed, &conv);
    check_case(&c);
  }
}

/* ---- a network: convolution, norm, ReLU, pool, frozen norm, linear, cross-entropy ---- */

typedef struct {
  orepa_tensor *x;
} chain;

/* The next value of the chain; the last one is given back. */
static void next(chain *c, orepa_tensor *y) {
  orepa_release(c->x);
  c->x = y;
}

static orepa_tensor *network(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  const int64_t labels[] = {1, 0}, two = 2;
  const orepa_norm batch = {1e-5, 0.1, true}, frozen = {1e-5, 0.1, false};
  const orepa_pool pool = {{3, 3}, {2, 2}, {1, 1}, {1, 1}, false, true};
  const orepa_cross_entropy_options loss = {0.1, -100, true};
  const orepa_device *device = orepa_tensor_device(inputs[0]);
  orepa_tensor *mean = orepa_full(orepa_tensor_dtype(inputs[0]), device, 1, &two, 0.25),
               *var = orepa_full(orepa_tensor_dtype(inputs[0]), device, 1, &two, 2),
               *classes = orepa_from_host(OREPA_INT64, device, 1, &two, labels);
  chain c = {orepa_conv2d(inputs[0], inputs[1], NULL, CONV({1, 1}, {1, 1}, {1, 1}, 1))};
  next(&c, orepa_batch_norm(c.x, inputs[2], inputs[3], NULL, NULL, &batch));
  next(&c, orepa_relu(c.x));
  orepa_tensor *shortcut = orepa_conv2d(c.x, inputs[4], NULL, CONV({1, 1}, {0, 0}, {1, 1}, 1));
  next(&c, orepa_add(c.x, shortcut));
  next(&c, orepa_max_pool2d(c.x, &pool));
  next(&c, orepa_batch_norm(c.x, inputs[2], inputs[3], mean, var, &frozen));
  next(&c, orepa_adaptive_avg_pool2d(c.x, 1, 1));
  next(&c, orepa_reshape(c.x, 2, (int64_t[]){2, 2}));
  next(&c, orepa_linear(c.x, inputs[5], inputs[6]));
  next(&c, orepa_cross_entropy(c.x, classes, &loss));
  orepa_release(shortcut);
  orepa_release(mean);
  orepa_release(var);
  orepa_release(classes);
  return c.x;
}

static void a_network_has_its_gradients(void **state) {
  (void)state;
  const gradient_case c = {CASE("network", network, NULL, {SIZES(2, 3, 5, 4)}, {SIZES(2, 3, 3, 3)},
                                {SIZES(2), .low = 0.5, .high = 1.5}, {SIZES(2)}, {SIZES(2, 2, 1, 1)}, {SIZES(3, 2)},
                                {SIZES(3)})};
  check_case(&c);
}

/* ---- wrong input ---- */

static orepa_tensor *conv2d_types(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *wide = orepa_to(inputs[1], OREPA_FLOAT64, orepa_tensor_device(inputs[1]));
  orepa_tensor *y = orepa_conv2d(inputs[0], wide, NULL, options);
  orepa_release(wide);
  return y;
}

static orepa_tensor *matmul_types(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  orepa_tensor *half = orepa_to(inputs[1], OREPA_BFLOAT16, orepa_tensor_device(inputs[1]));
  orepa_tensor *y = orepa_matmul(inputs[0], half);
  orepa_release(half);
  return y;
}

static orepa_tensor *linear_devices(orepa_tensor *const *inputs, const void *options) {
  (void)options;
  bool on_cpu = !strcmp(orepa_device_name(orepa_tensor_device(inputs[0])), "cpu");
  orepa_tensor *there = orepa_to(inputs[1], OREPA_FLOAT32, device_named(on_cpu ? "ref" : "cpu"));
  orepa_tensor *y = orepa_linear(inputs[0], there, NULL);
  orepa_release(there);
  return y;
}

#define BAD(name, function, a, b, words)                                                                               \
  { {CASE(name, function, NULL, {a}, {b})}, words }

static void wrong_products_are_named(void **state) {
  (void)state;
  const error_case cases[] = {
      BAD("inner", matmul, SIZES(2, 3), SIZES(4, 2), WORDS("matmul", "2x3", "4x2")),
      BAD("batch", matmul, SIZES(2, 2, 3), SIZES(3, 3, 2), WORDS("matmul", "broadcast")),
      BAD("scalar", matmul, .rank = 0, SIZES(3), WORDS("matmul", "scalar", "3")),
      BAD("types", matmul_types, SIZES(2, 3), SIZES(3, 2), WORDS("matmul", "float32", "bfloat16")),
      BAD("inner", linear, SIZES(2, 3), SIZES(2, 4), WORDS("linear", "2x3", "2x4")),
      BAD("weight", linear, SIZES(2, 3), SIZES(3), WORDS("linear", "2x3", "3")),
      BAD("scalar", linear, .rank = 0, SIZES(2, 3), WORDS("linear", "scalar", "2x3")),
      BAD("devices", linear_devices, SIZES(2, 3), SIZES(2, 3), WORDS("linear", "'cpu'", "'ref'", "weight")),
      {{CASE("bias", linear_bias, NULL, {SIZES(2, 3)}, {SIZES(4, 3)}, {SIZES(3)})}, WORDS("linear", "bias 3", "4x3")},
  };
  check_errors(COUNT_OF(cases), cases);
}

static void wrong_convolutions_are_named(void **state) {
  (void)state;
  const orepa_conv *plain = CONV({1, 1}, {0, 0}, {1, 1}, 1), *two = CONV({1, 1}, {0, 0}, {1, 1}, 2),
                   *none = CONV({1, 1}, {0, 0}, {1, 1}, 0), *still = CONV({1, 0}, {0, 0}, {1, 1}, 1),
                   *negative = CONV({1, 1}, {-1, 0}, {1, 1}, 1), *flat = CONV({1, 1}, {0, 0}, {0, 1}, 1);
#define OF(conv, x, w, words)                                                                                          \
  { {CASE("conv2d", conv2d, conv, {x}, {w})}, words }
  const error_case cases[] = {
      OF(plain, SIZES(2, 3, 4), SIZES(2, 3, 1, 1), WORDS("conv2d", "2x3x4", "2x3x1x1", "4 dimensions")),
      OF(plain, SIZES(2, 3, 4, 4), SIZES(2, 3, 1), WORDS("conv2d", "2x3x4x4", "2x3x1", "4 dimensions")),
      OF(plain, SIZES(2, 3, 4, 4), SIZES(2, 4, 1, 1), WORDS("conv2d", "2x3x4x4", "2x4x1x1", "channels")),
      OF(two, SIZES(1, 3, 4, 4), SIZES(2, 1, 1, 1), WORDS("conv2d", "2 groups", "1x3x4x4", "2x1x1x1")),
      OF(two, SIZES(1, 4, 4, 4), SIZES(3, 2, 1, 1), WORDS("conv2d", "2 groups", "3x2x1x1")),
      OF(two, SIZES(1, 4, 4, 4), SIZES(2, 4, 1, 1), WORDS("conv2d", "groups 2", "1x4x4x4", "2x4x1x1")),
      OF(none, SIZES(1, 4, 4, 4), SIZES(2, 4, 1, 1), WORDS("conv2d", "0 groups")),
      OF(plain, SIZES(1, 1, 2, 4), SIZES(1, 1, 3, 1), WORDS("conv2d", "height of 2", "1x1x2x4", "1x1x3x1")),
      OF(plain, SIZES(1, 1, 4, 2), SIZES(1, 1, 1, 3), WORDS("conv2d", "width of 2", "1x1x4x2", "1x1x1x3")),
      OF(plain, SIZES(1, 1, 4, 4), SIZES(1, 1, 0, 3), WORDS("conv2d", "1x1x0x3")),
      OF(still, SIZES(1, 1, 4, 4), SIZES(1, 1, 1, 1), WORDS("conv2d", "stride 0", "width")),
      OF(negative, SIZES(1, 1, 4, 4), SIZES(1, 1, 1, 1), WORDS("conv2d", "padding -1", "height")),
      OF(flat, SIZES(1, 1, 4, 4), SIZES(1, 1, 1, 1), WORDS("conv2d", "dilation 0", "height")),
      {{CASE("types", conv2d_types, plain, {SIZES(1, 1, 4, 4)}, {SIZES(1, 1, 1, 1)})},
       WORDS("conv2d", "input", "float32", "kernel", "float64")},
      {{CASE("bias", conv2d_bias, plain, {SIZES(1, 1, 4, 4)}, {SIZES(2, 1, 1, 1)}, {SIZES(1)})},
       WORDS("conv2d", "bias 1", "2x1x1x1")},
  };
#undef OF
  check_errors(COUNT_OF(cases), cases);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(matmul_of_all_ranks_has_its_gradients),
      cmocka_unit_test(linear_has_its_gradients),
      cmocka_unit_test(products_can_be_changed_in_place),
      cmocka_unit_test(convolutions_have_their_gradients),
      cmocka_unit_test(what_follows_has_its_gradients),
      cmocka_unit_test(convolutions_of_random_geometry_have_their_gradients),
      cmocka_unit_test(a_network_has_its_gradients),
      cmocka_unit_test(wrong_products_are_named),
      cmocka_unit_test(wrong_convolutions_are_named),
  };
  return RUN_GUARDED(tests);
}
