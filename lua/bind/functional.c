/* functional.c: orepa.F, the ops that layers are made of. */
#include <string.h>

#include "bind.h"

static const int64_t one[2] = {1, 1}, zero[2] = {0, 0};

/* Where the options start: after `tensors` arguments, of which trailing ones may be left out. */
static int options_after(lua_State *L, int required, int tensors) {
  for (int k = required + 1; k <= tensors + 1; k++)
    if (lua_istable(L, k))
      return k;
  return tensors + 1;
}

/* An optional tensor before the options. */
static orepa_tensor *tensor_before(lua_State *L, int index, int options) {
  return index < options ? bind_tensor_or_nil(L, index) : NULL;
}

static orepa_conv conv_options(lua_State *L, int options) {
  orepa_conv conv;
  bind_option_pair(L, options, "stride", one, conv.stride);
  bind_option_pair(L, options, "padding", zero, conv.padding);
  bind_option_pair(L, options, "dilation", one, conv.dilation);
  conv.groups = bind_option_integer(L, options, "groups", 1);
  return conv;
}

orepa_conv bind_conv_options(lua_State *L, int index, const char *function) {
  static const char *const known[] = {"stride", "padding", "dilation", "groups", NULL};
  return conv_options(L, bind_options(L, index, function, known));
}

static int l_conv2d(lua_State *L) {
  static const char *const known[] = {"stride", "padding", "dilation", "groups", "add", "act", NULL};
  orepa_tensor *x = bind_tensor(L, 1), *w = bind_tensor(L, 2), *added = NULL;
  int at = options_after(L, 2, 3), options = bind_options(L, at, "conv2d", known);
  orepa_conv conv = conv_options(L, options);
  orepa_tensor *bias = tensor_before(L, 3, at);
  if (bind_option(L, options, "add") && !(added = bind_test_tensor(L, -1)))
    return bind_error(L, "conv2d: option 'add': a tensor expected, got %s", luaL_typename(L, -1));
  const char *act = bind_option(L, options, "act") ? lua_tostring(L, -1) : "none";
  if (!act || (strcmp(act, "relu") && strcmp(act, "none")))
    return bind_error(L, "conv2d: option 'act' is \"relu\" or \"none\"");
  BIND_RETURN(L, orepa_conv2d_add(x, w, bias, added, !strcmp(act, "relu"), &conv));
}

static int l_linear(lua_State *L) {
  orepa_tensor *x = bind_tensor(L, 1), *w = bind_tensor(L, 2), *bias = bind_tensor_or_nil(L, 3);
  BIND_RETURN(L, orepa_linear(x, w, bias));
}

static int l_conv_transpose2d(lua_State *L) {
  static const char *const known[] = {"stride", "padding", "output_padding", "dilation", "groups", NULL};
  orepa_tensor *x = bind_tensor(L, 1), *w = bind_tensor(L, 2);
  int at = options_after(L, 2, 3), options = bind_options(L, at, "conv_transpose2d", known);
  orepa_conv conv = conv_options(L, options);
  int64_t output_padding[2];
  bind_option_pair(L, options, "output_padding", zero, output_padding);
  orepa_tensor *bias = tensor_before(L, 3, at);
  BIND_RETURN(L, orepa_conv_transpose2d(x, w, bias, &conv, output_padding));
}

/* A tensor among the options, which keep it alive; NULL if it is not there. */
static orepa_tensor *option_tensor(lua_State *L, int options, const char *function, const char *name) {
  if (!bind_option(L, options, name))
    return NULL;
  orepa_tensor *t = bind_test_tensor(L, -1);
  if (!t)
    bind_error(L, "%s: option '%s': a tensor expected, got %s", function, name, luaL_typename(L, -1));
  lua_pop(L, 1);
  return t;
}

static int l_group_norm(lua_State *L) {
  static const char *const known[] = {"weight", "bias", "eps", NULL};
  orepa_tensor *x = bind_tensor(L, 1);
  int64_t groups = bind_integer(L, 2, "group_norm: the number of groups");
  int options = bind_options(L, 3, "group_norm", known);
  orepa_tensor *weight = option_tensor(L, options, "group_norm", "weight"),
               *bias = option_tensor(L, options, "group_norm", "bias");
  double eps = bind_option_number(L, options, "eps", 1e-5);
  BIND_RETURN(L, orepa_group_norm(x, groups, weight, bias, eps));
}

/* Pushes "2x3"; "{}" if there are none. */
static const char *push_sizes(lua_State *L, int rank, const int64_t *shape) {
  luaL_Buffer text;
  luaL_buffinit(L, &text);
  if (rank == 0)
    luaL_addstring(&text, "{}");
  for (int d = 0; d < rank; d++) {
    if (d)
      luaL_addchar(&text, 'x');
    lua_pushinteger(L, shape[d]);
    luaL_addvalue(&text);
  }
  luaL_pushresult(&text);
  return lua_tostring(L, -1);
}

/* The shape at the second place, which is that of x's last dimensions: how many they are. */
static int last_axes(lua_State *L, orepa_tensor *x) {
  int64_t shape[OREPA_MAX_RANK];
  int rank = bind_shape(L, 2, 2, shape, false), before = orepa_rank(x) - rank;
  bool ends = rank > 0 && before >= 0;
  for (int d = 0; ends && d < rank; d++)
    ends = shape[d] == orepa_shape(x)[before + d];
  if (ends)
    return rank;
  const char *const sizes = push_sizes(L, rank, shape), *const given = push_sizes(L, orepa_rank(x), orepa_shape(x));
  return bind_error(L, "layer_norm: the last sizes of the input, %s, are not %s", given, sizes);
}

static int l_layer_norm(lua_State *L) {
  static const char *const known[] = {"weight", "bias", "eps", NULL};
  orepa_tensor *x = bind_tensor(L, 1);
  int axes = last_axes(L, x), options = bind_options(L, 3, "layer_norm", known);
  orepa_tensor *weight = option_tensor(L, options, "layer_norm", "weight"),
               *bias = option_tensor(L, options, "layer_norm", "bias");
  double eps = bind_option_number(L, options, "eps", 1e-5);
  BIND_RETURN(L, orepa_layer_norm(x, axes, weight, bias, eps));
}

static int l_batch_norm(lua_State *L) {
  static const char *const known[] = {"weight",   "bias", "running_mean", "running_var", "training",
                                      "momentum", "eps",  "less_zero",    NULL};
  static const char *const fields[] = {"weight", "bias", "running_mean", "running_var"};
  orepa_tensor *x = bind_tensor(L, 1), *channels[4] = {NULL}, *origin[2] = {NULL};
  int options = bind_options(L, 2, "batch_norm", known);
  for (int k = 0; k < 4; k++)
    channels[k] = option_tensor(L, options, "batch_norm", fields[k]);
  orepa_norm norm = {bind_option_number(L, options, "eps", 1e-5), bind_option_number(L, options, "momentum", 0.1),
                     bind_option_boolean(L, options, "training", false)};
  if (bind_option_boolean(L, options, "less_zero", false)) {
    if (!channels[2] || !channels[3])
      return bind_error(L, "batch_norm: less_zero needs running statistics");
    origin[0] = channels[2], origin[1] = channels[3];
  }
  if (norm.training && orepa_is_recomputing()) /* this batch is in them */
    channels[2] = channels[3] = NULL;
  BIND_RETURN(L, orepa_batch_norm_less_zero(x, channels[0], channels[1], channels[2], channels[3], origin[0], origin[1],
                                            &norm));
}

static orepa_pool pool_options(lua_State *L, int index, const char *function, const char *const *known) {
  orepa_pool pool = {.dilation = {1, 1}};
  int options = bind_options(L, index, function, known);
  if (!options || !bind_option(L, options, "kernel_size"))
    bind_error(L, "%s: option 'kernel_size' is missing", function);
  bind_option_pair(L, options, "kernel_size", one, pool.kernel);
  bind_option_pair(L, options, "stride", pool.kernel, pool.stride);
  bind_option_pair(L, options, "padding", zero, pool.padding);
  bind_option_pair(L, options, "dilation", one, pool.dilation);
  pool.ceil_mode = bind_option_boolean(L, options, "ceil_mode", false);
  pool.count_padding = bind_option_boolean(L, options, "count_include_pad", true);
  return pool;
}

static int l_max_pool2d(lua_State *L) {
  static const char *const known[] = {"kernel_size", "stride", "padding", "dilation", "ceil_mode", NULL};
  orepa_tensor *x = bind_tensor(L, 1);
  orepa_pool pool = pool_options(L, 2, "max_pool2d", known);
  BIND_RETURN(L, orepa_max_pool2d(x, &pool));
}

static int l_avg_pool2d(lua_State *L) {
  static const char *const known[] = {"kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", NULL};
  orepa_tensor *x = bind_tensor(L, 1);
  orepa_pool pool = pool_options(L, 2, "avg_pool2d", known);
  BIND_RETURN(L, orepa_avg_pool2d(x, &pool));
}

static int adaptive(lua_State *L, const char *function, orepa_tensor *(*pool)(orepa_tensor *, int64_t, int64_t)) {
  static const char *const known[] = {"output_size", NULL};
  int64_t size[2];
  orepa_tensor *x = bind_tensor(L, 1);
  bind_option_pair(L, bind_options(L, 2, function, known), "output_size", one, size);
  BIND_RETURN(L, pool(x, size[0], size[1]));
}

static int l_adaptive_avg_pool2d(lua_State *L) {
  return adaptive(L, "adaptive_avg_pool2d", orepa_adaptive_avg_pool2d);
}

static int l_adaptive_max_pool2d(lua_State *L) {
  return adaptive(L, "adaptive_max_pool2d", orepa_adaptive_max_pool2d);
}

/* interpolate(x, height, width, bilinear, align_corners, scales of height and width) */
static int l_interpolate(lua_State *L) {
  orepa_tensor *x = bind_tensor(L, 1);
  int64_t size[2] = {bind_integer(L, 2, "interpolate: the height"), bind_integer(L, 3, "interpolate: the width")};
  orepa_interpolation how = {
      lua_toboolean(L, 4), lua_toboolean(L, 5), {luaL_optnumber(L, 6, 0), luaL_optnumber(L, 7, 0)}};
  BIND_RETURN(L, orepa_interpolate(x, size, &how));
}

static int l_softmax(lua_State *L) {
  orepa_tensor *x = bind_tensor(L, 1);
  int axis = bind_axis(L, 2, orepa_rank(x), "softmax");
  BIND_RETURN(L, orepa_softmax(x, axis));
}

static int l_log_softmax(lua_State *L) {
  orepa_tensor *x = bind_tensor(L, 1);
  int axis = bind_axis(L, 2, orepa_rank(x), "log_softmax");
  BIND_RETURN(L, orepa_log_softmax(x, axis));
}

static int l_relu(lua_State *L) {
  orepa_tensor *x = bind_tensor(L, 1);
  BIND_RETURN(L, orepa_relu(x));
}

static int l_cross_entropy(lua_State *L) {
  static const char *const known[] = {"label_smoothing", "ignore_index", "reduction", NULL};
  orepa_tensor *logits = bind_tensor(L, 1), *labels = bind_tensor(L, 2);
  int options = bind_options(L, 3, "cross_entropy", known);
  orepa_cross_entropy_options o = {bind_option_number(L, options, "label_smoothing", 0),
                                   bind_option_integer(L, options, "ignore_index", -100), true};
  const char *reduction = bind_option(L, options, "reduction") ? lua_tostring(L, -1) : "mean";
  if (!reduction || (strcmp(reduction, "mean") && strcmp(reduction, "none")))
    return bind_error(L, "cross_entropy: option 'reduction' is \"mean\" or \"none\"");
  o.mean = !strcmp(reduction, "mean");
  BIND_RETURN(L, orepa_cross_entropy(logits, labels, &o));
}

static const bind_row rows[] = {
    {"conv2d", l_conv2d,
     "F.conv2d(x, weight, bias, {stride=, padding=, dilation=, groups=, add=, act=}) -> tensor\n"
     "Cross-correlation of x (N, I, H, W) with weight (O, I/groups, KH, KW); bias (O) may be left out. Sizes are a "
     "number or {height, width}; stride 1, padding 0, dilation 1, groups 1. To the result `add` is added, a tensor "
     "like "
     "it; then, with act = \"relu\", comes a ReLU. Without gradients all that is one kernel, whose ReLU of NaN may be "
     "0.\n"
     "> F.conv2d(orepa.ones(1, 3, 8, 8), orepa.ones(4, 3, 3, 3), {padding = 1})"},
    {"conv_transpose2d", l_conv_transpose2d,
     "F.conv_transpose2d(x, weight, bias, {stride=, padding=, output_padding=, dilation=, groups=}) -> tensor\n"
     "The data gradient of a convolution as a map: x (N, I, H, W) with weight (I, O/groups, KH, KW) gives (N, O, P, "
     "Q), where P = (H - 1) * stride - 2 * padding + dilation * (KH - 1) + output_padding + 1; bias (O) may be left "
     "out. Sizes are a number or {height, width}; output_padding, 0 if not given, is less than the stride or the "
     "dilation.\n"
     "> F.conv_transpose2d(orepa.ones(1, 3, 4, 4), orepa.ones(3, 2, 2, 2), {stride = 2})"},
    {"group_norm", l_group_norm,
     "F.group_norm(x, groups, {weight=, bias=, eps=}) -> tensor\n"
     "Cuts the channels of x (N, C, ...) into groups and normalises each by its own mean and variance in each image; "
     "then weight (C) multiplies and bias (C) is added. eps is 1e-5 if not given.\n"
     "> F.group_norm(orepa.randn(2, 6, 4, 4), 3)"},
    {"layer_norm", l_layer_norm,
     "F.layer_norm(x, shape, {weight=, bias=, eps=}) -> tensor\n"
     "Normalises the last dimensions of x together, by their own mean and variance; their shape is a list, or a number "
     "for the last one. weight and bias are of that shape; eps is 1e-5 if not given.\n"
     "> F.layer_norm(orepa.randn(2, 5, 8), 8)"},
    {"linear", l_linear,
     "F.linear(x, weight, bias) -> tensor\nx (..., I) times weight (O, I) transposed, plus bias (O), which may be left "
     "out.\n> F.linear(orepa.ones(2, 3), orepa.ones(4, 3))"},
    {"batch_norm", l_batch_norm,
     "F.batch_norm(x, {weight=, bias=, running_mean=, running_var=, training=, momentum=, eps=, less_zero=}) -> "
     "tensor\n"
     "Normalises each channel of x (N, C, ...): by the batch's statistics while training, which updates the running "
     "ones; else by the running ones. `less_zero` takes off what the running ones, updated, make of zero; no gradient "
     "flows through that.\n> F.batch_norm(orepa.randn(4, 3, 2, 2), {training = true})"},
    {"max_pool2d", l_max_pool2d,
     "F.max_pool2d(x, {kernel_size=, stride=, padding=, dilation=, ceil_mode=}) -> tensor\nThe largest element of each "
     "window; the stride is the kernel's size if not given.\n> F.max_pool2d(orepa.ones(1, 1, 4, 4), {kernel_size = "
     "2})"},
    {"avg_pool2d", l_avg_pool2d,
     "F.avg_pool2d(x, {kernel_size=, stride=, padding=, ceil_mode=, count_include_pad=}) -> tensor\nThe mean of each "
     "window.\n> F.avg_pool2d(orepa.ones(1, 1, 4, 4), {kernel_size = 2})"},
    {"adaptive_avg_pool2d", l_adaptive_avg_pool2d,
     "F.adaptive_avg_pool2d(x, {output_size=}) -> tensor\nThe means of windows chosen so that the result has the size "
     "asked for; 1 if none is.\n> F.adaptive_avg_pool2d(orepa.ones(1, 1, 7, 5))"},
    {"adaptive_max_pool2d", l_adaptive_max_pool2d,
     "F.adaptive_max_pool2d(x, {output_size=}) -> tensor\nThe same with the largest elements.\n"
     "> F.adaptive_max_pool2d(orepa.ones(1, 1, 7, 5), {output_size = {2, 3}})"},
    {"interpolate", l_interpolate, NULL}, /* resize.lua has what users call */
    {"softmax", l_softmax,
     "F.softmax(x, dim) -> tensor\nExponentials that sum to 1 along a dimension.\n"
     "> F.softmax(orepa.ones(2, 4), 2)"},
    {"log_softmax", l_log_softmax,
     "F.log_softmax(x, dim) -> tensor\nThe logarithm of softmax, accurate.\n"
     "> F.log_softmax(orepa.ones(2, 4), -1)"},
    {"relu", l_relu, "F.relu(x) -> tensor\nNegative elements become 0; NaN stays.\n> F.relu(orepa.tensor({-1, 2}))"},
    {"cross_entropy", l_cross_entropy, NULL}, /* losses.lua has what users call */
    {NULL, NULL, NULL},
};

void bind_functional_family(lua_State *L) {
  lua_newtable(L);
  bind_register(L, "F.", rows);
  lua_setfield(L, -2, "F");
}
