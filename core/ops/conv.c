/* conv.c: two-dimensional convolution in its three directions. */
#include <stdio.h>
#include <string.h>

#include "autograd/anomaly.h"
#include "ops/norm_promise.h"

/* ---- shape ---- */

static int conv_shape(const orepa_tensor *x, const orepa_tensor *w, const orepa_tensor *bias, const orepa_conv *c,
                      int64_t *shape) {
  static const char *const axis[2] = {"height", "width"};
  const char *const x_text = shape_text(x->rank, x->shape), *const w_text = shape_text(w->rank, w->shape);
  if (x->rank != 4 || w->rank != 4)
    return error_set("conv2d: input %s, kernel %s: both must have 4 dimensions", x_text, w_text);
  if (c->groups < 1 || x->shape[1] % c->groups || w->shape[0] % c->groups)
    return error_set("conv2d: %lld groups don't divide %lld input and %lld output channels (input %s, kernel %s)",
                     (long long)c->groups, (long long)x->shape[1], (long long)w->shape[0], x_text, w_text);
  if (w->shape[1] * c->groups != x->shape[1])
    return error_set("conv2d: kernel has %lld input channels, input has %lld (input %s, kernel %s, groups %lld)",
                     (long long)(w->shape[1] * c->groups), (long long)x->shape[1], x_text, w_text,
                     (long long)c->groups);
  if (bias && (bias->rank != 1 || bias->shape[0] != w->shape[0]))
    return error_set("conv2d: bias %s for %lld output channels (kernel %s)", shape_text(bias->rank, bias->shape),
                     (long long)w->shape[0], w_text);
  shape[0] = x->shape[0];
  shape[1] = w->shape[0];
  for (int d = 0; d < 2; d++) {
    if (c->stride[d] < 1 || c->dilation[d] < 1 || c->padding[d] < 0)
      return error_set("conv2d: stride %lld, padding %lld, dilation %lld of the %s: at least 1, 0, 1",
                       (long long)c->stride[d], (long long)c->padding[d], (long long)c->dilation[d], axis[d]);
    if (c->stride[d] > INT32_MAX || c->padding[d] > INT32_MAX || c->dilation[d] > INT32_MAX)
      return error_set("conv2d: stride %lld, padding %lld, dilation %lld of the %s: at most %lld",
                       (long long)c->stride[d], (long long)c->padding[d], (long long)c->dilation[d], axis[d],
                       (long long)INT32_MAX);
    int64_t span = c->dilation[d] * (w->shape[2 + d] - 1) + 1, room = x->shape[2 + d] + 2 * c->padding[d];
    if (w->shape[2 + d] < 1 || span > room)
      return error_set("conv2d: a kernel that spans %lld does not fit into a %s of %lld with padding %lld (input %s, "
                       "kernel %s)",
                       (long long)span, axis[d], (long long)x->shape[2 + d], (long long)c->padding[d], x_text, w_text);
    shape[2 + d] = (room - span) / c->stride[d] + 1;
  }
  return 0;
}

orepa_taps orepa_conv2d_taps(const orepa_conv *conv, const int64_t kernel[2], const int64_t size[2]) {
  orepa_taps taps = {{0, 0}, {kernel[0], kernel[1]}};
  for (int d = 0; d < 2; d++) {
    int64_t step = conv->dilation[d], room = size[d] + 2 * conv->padding[d] - step * (kernel[d] - 1) - 1;
    if (conv->stride[d] < 1 || step < 1 || room < 0)
      continue; /* for conv2d to refuse */
    int64_t last_start = room / conv->stride[d] * conv->stride[d] - conv->padding[d];
    int64_t first = last_start < 0 ? (step - 1 - last_start) / step : 0,
            last = (size[d] + conv->padding[d] + step - 1) / step;
    taps.last[d] = last < kernel[d] ? last : kernel[d];
    taps.first[d] = first < taps.last[d] ? first : taps.last[d];
  }
  return taps;
}

void orepa_set_conv_accuracy(const orepa_device *device, bool high) {
  device_context_of(device)->accurate = high;
}

/* ---- for whoever takes the time ---- */

/* " stride 2" or " stride 2x1"; nothing for 1. */
static void pair_text(char text[40], const char *name, const int64_t pair[2]) {
  text[0] = '\0';
  if (pair[0] != pair[1])
    snprintf(text, 40, " %s %lldx%lld", name, (long long)pair[0], (long long)pair[1]);
  else if (pair[0] != 1)
    snprintf(text, 40, " %s %lld", name, (long long)pair[0]);
}

/* Stands directly before its DISPATCH: the note goes with the next call. Each direction multiplies as often. */
int op_note_geometry(const orepa_conv *c, const orepa_tensor *x, const orepa_tensor *w, const orepa_tensor *y) {
  char stride[40], dilation[40], groups[40];
  if (!timings_wanted())
    return 0;
  pair_text(stride, "stride", c->stride);
  pair_text(dilation, "dilation", c->dilation);
  pair_text(groups, "groups", (int64_t[2]){c->groups, c->groups});
  timings_detail("%lldx%lld%s%s%s, %lld -> %lld, %lldx%lld", (long long)w->shape[2], (long long)w->shape[3], stride,
                 dilation, groups, (long long)x->shape[1], (long long)w->shape[0], (long long)x->shape[2],
                 (long long)x->shape[3]);
  return timings_macs(orepa_count(y) * w->shape[1] * w->shape[2] * w->shape[3]);
}

/* ---- what the device fuses ---- */

static device_conv_fusion fusion_of(const orepa_conv *conv, const orepa_tensor *y, const orepa_tensor *x,
                                    const orepa_tensor *w) {
  const orepa_device *device = x->storage->device;
  device_array arrays[3];
  if (!device->conv_fusion)
    return (device_conv_fusion){false, false, false};
  tensor_outline(y, &arrays[0]);
  tensor_outline(x, &arrays[1]);
  tensor_outline(w, &arrays[2]);
  return device->conv_fusion(device_context_of(device), conv, &arrays[0], &arrays[1], &arrays[2]);
}

/* A convolution's input as its kernel takes it: the map, or what would become the map and how. */
typedef struct {
  device_array map;
  device_prologue terms, *prologue; /* NULL: the map as it is */
} conv_input;

/* A promised input stays promised where the device normalises it in the same pass. */
static int input_reads(orepa_tensor *x, bool fused, conv_input *input) {
  const norm_promise *p = fused ? norm_promise_prologue(x) : NULL;
  input->prologue = p ? &input->terms : NULL;
  return p ? norm_promise_reads(p, &input->map, &input->terms) : tensor_reads(x, &input->map);
}

/* ---- backward ---- */

typedef struct {
  orepa_conv conv;
  orepa_dtype kernel, bias; /* types of their gradients */
} conv_payload;

static int conv_backward(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const conv_payload *payload = node->payload;
  const orepa_conv *conv = &payload->conv;
  const orepa_device *device = given->storage->device;
  device_array w, dy, to, to_bias;
  conv_input x;
  orepa_tensor *saved_x = autograd_saved_tensor(node, 0), *saved_w = saved_x ? autograd_saved_tensor(node, 1) : NULL;
  orepa_tensor *dense = saved_w ? op_dense(given) : NULL;
  int failed = !dense || tensor_reads(saved_w, &w) || tensor_reads(dense, &dy);
  if (!failed && autograd_needs(node, 0)) {
    failed = !(dx[0] = tensor_like(saved_x)) || tensor_writes(dx[0], &to) ||
             op_note_geometry(conv, saved_x, saved_w, given) ||
             DISPATCH("conv2d's data gradient", saved_x->dtype, device, conv_backward_data, conv, &to, &dy, &w);
  }
  if (!failed && autograd_needs(node, 2)) {
    failed = !(dx[2] = tensor_new(payload->bias, device, 1, &w.shape[0])) || tensor_writes(dx[2], &to_bias);
  }
  if (!failed && (autograd_needs(node, 1) || dx[2])) {
    orepa_tensor *dw = tensor_new(payload->kernel, device, 4, saved_w->shape);
    failed = !dw || tensor_writes(dw, &to) ||
             input_reads(saved_x, fusion_of(conv, dense, saved_x, saved_w).weight_prologue, &x) ||
             op_note_geometry(conv, saved_x, saved_w, given) ||
             DISPATCH("conv2d's weight gradient", saved_x->dtype, device, conv_backward_weight, conv, &to,
                      dx[2] ? &to_bias : NULL, &x.map, &dy, x.prologue);
    if (!failed && autograd_needs(node, 1))
      dx[1] = dw;
    else
      orepa_release(dw);
  }
  orepa_release(dense);
  return failed ? -1 : 0;
}

static const autograd_op conv_op = {"conv2d", conv_backward, NULL};

/* ---- forward ---- */

/* Room for the moments of y, which the next norm will want. */
static orepa_tensor *new_moments(const orepa_tensor *y) {
  int64_t rows = y->shape[0] * y->shape[2] * y->shape[3], shape[3] = {moments_chunks(rows), 4, y->shape[1]};
  return tensor_new(op_channel_dtype(y), y->storage->device, 3, shape);
}

/* What is computed beside the input; bias and residual may be NULL. */
typedef struct {
  orepa_tensor *weight, *bias, *residual;
  bool relu;
  bool keeps; /* no gradient will change the kernel: it is worth keeping as the device wants it */
} conv_rest;

/* An epilogue with its arrays. */
typedef struct {
  device_array bias, residual;
  device_epilogue epilogue;
} conv_after;

static int after_reads(const conv_rest *rest, conv_after *after) {
  after->epilogue =
      (device_epilogue){rest->bias ? &after->bias : NULL, rest->residual ? &after->residual : NULL, rest->relu};
  return (rest->bias && tensor_reads(rest->bias, &after->bias)) ||
                 (rest->residual && tensor_reads(rest->residual, &after->residual))
             ? -1
             : 0;
}

/* Whether the kernel is, or will be, kept as the device wants it. */
static bool packed_kernel(const conv_rest *rest, const orepa_conv *conv, const device_array *y, const device_array *x,
                          const device_array *w, const device_epilogue *epilogue, device_packed *packed) {
  const orepa_device *device = rest->weight->storage->device;
  int64_t mark = 0;
  if (!rest->keeps || !device->conv_packed)
    return false;
  size_t bytes = device->conv_packed(device_context_of(device), conv, y, x, w, epilogue, &mark);
  if (bytes)
    tensor_packed(rest->weight, bytes, mark, packed);
  return bytes;
}

static orepa_tensor *conv_forward(orepa_tensor *x, const conv_rest *rest, const orepa_conv *conv,
                                  const int64_t *shape) {
  orepa_tensor *y = tensor_new(x->dtype, x->storage->device, 4, shape), *w = rest->weight;
  if (!y)
    return NULL;
  device_array kernel, to, partial;
  device_packed packed;
  conv_input from;
  conv_after after;
  const device_conv_fusion fusion = fusion_of(conv, y, x, w);
  bool measures = orepa_grad_enabled() && orepa_count(y) && fusion.moments, packs = false;
  orepa_tensor *moments = measures ? new_moments(y) : NULL;
  int failed = (measures && (!moments || tensor_writes(moments, &partial))) || tensor_materialize(y) ||
               input_reads(x, fusion.prologue, &from) || tensor_reads(w, &kernel) || after_reads(rest, &after) ||
               tensor_writes(y, &to);
  if (!failed) {
    packs = packed_kernel(rest, conv, &to, &from.map, &kernel, &after.epilogue, &packed);
    failed = op_note_geometry(conv, x, w, y) ||
             DISPATCH("conv2d", x->dtype, x->storage->device, conv_forward, conv, &to, &from.map, &kernel,
                      &after.epilogue, from.prologue, measures ? &partial : NULL, packs ? &packed : NULL);
  }
  if (failed && packs && !packed.ready)
    tensor_drop_packed(w);
  if (!failed && measures)
    tensor_keep_moments(y, moments);
  orepa_release(moments);
  return failed ? tensor_fail(y) : y;
}

static const char *const argument_names[] = {"input", "kernel", "bias"};

/* New references for those that are not NULL; -1 and a message, and some of them made. */
static int all_dense(int count, orepa_tensor *const *given, orepa_tensor **dense) {
  for (int k = 0; k < count; k++)
    if (given[k] && !(dense[k] = op_dense(given[k])))
      return -1;
  return 0;
}

/* Without a graph, all at once; NULL with a message. `given` is x, kernel, bias, residual. */
static orepa_tensor *conv2d_fused(orepa_tensor *const given[4], bool relu, const orepa_conv *conv,
                                  const int64_t *shape) {
  orepa_tensor *dense[4] = {NULL}, *y = NULL;
  if (!all_dense(4, given, dense))
    y = conv_forward(dense[0], &(conv_rest){dense[1], dense[2], dense[3], relu, true}, conv, shape);
  op_release_all(4, dense);
  return y;
}

/* The payload says the types of gradients: a cast argument's is not its own. */
static orepa_tensor *conv2d_recorded(orepa_tensor *const given[3], const conv_payload *payload, const int64_t *shape) {
  orepa_tensor *dense[3] = {NULL}, *y = NULL;
  autograd_node *node = NULL;
  if (!all_dense(3, given, dense))
    y = conv_forward(dense[0], &(conv_rest){.weight = dense[1], .bias = dense[2]}, &payload->conv, shape);
  if (y && autograd_record(&conv_op, y, given, 3, 2, sizeof *payload, &node))
    y = tensor_fail(y);
  if (node) {
    *(conv_payload *)node->payload = *payload;
    autograd_save(node, 0, dense[0]);
    autograd_save(node, 1, dense[1]);
  }
  op_release_all(3, dense);
  return y;
}

/* y, which is given up, + residual, then the ReLU; NULL if y is, or with a message. */
static orepa_tensor *followed(orepa_tensor *y, orepa_tensor *residual, bool relu) {
  orepa_tensor *sum = y && residual ? orepa_add(y, residual) : y;
  if (y != sum)
    orepa_release(y);
  orepa_tensor *z = sum && relu ? orepa_relu(sum) : sum;
  if (sum != z)
    orepa_release(sum);
  return z;
}

orepa_dtype op_gradient_type(const orepa_tensor *given, const orepa_tensor *cast) {
  return given && given->dtype != OREPA_FLOAT32 ? cast->dtype : OREPA_FLOAT32;
}

/* Whether a residual can be added by the kernel: it is one more map of the result's kind. */
static bool is_like_result(const orepa_tensor *r, const orepa_tensor *x, const int64_t *shape) {
  return r->dtype == x->dtype && r->storage->device == x->storage->device && r->rank == 4 &&
         !memcmp(r->shape, shape, 4 * sizeof *shape);
}

orepa_tensor *orepa_conv2d_add(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias, orepa_tensor *residual,
                               bool relu, const orepa_conv *conv) {
  orepa_tensor *given[3] = {x, weight, bias}, *cast[3], *y = NULL;
  int64_t shape[4];
  if (op_autocast(3, given, cast))
    return NULL;
  bool valid = !op_same_kind("conv2d", 3, cast, argument_names) && !conv_shape(cast[0], cast[1], cast[2], conv, shape);
  bool fuses = valid && !autograd_wanted((orepa_tensor *[]){x, weight, bias, residual}, 4) &&
               (!residual || is_like_result(residual, cast[0], shape));
  if (fuses) {
    orepa_tensor *all[] = {cast[0], cast[1], cast[2], residual};
    y = conv2d_fused(all, relu, conv, shape);
    if (y && anomaly_check_result("conv2d", y, 4, all))
      y = tensor_fail(y);
  } else if (valid) {
    conv_payload payload = {*conv, op_gradient_type(weight, cast[1]), op_gradient_type(bias, cast[2])};
    y = conv2d_recorded(cast, &payload, shape);
  }
  op_release_all(3, cast);
  return fuses ? y : followed(y, residual, relu);
}

orepa_tensor *orepa_conv2d(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias, const orepa_conv *conv) {
  return orepa_conv2d_add(x, weight, bias, NULL, false, conv);
}
