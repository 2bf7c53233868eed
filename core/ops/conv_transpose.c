/* conv_transpose.c: transposed convolution: what a convolution's data gradient is, as a map. Its own gradients are a
 * convolution and that convolution's weight gradient, so that devices need no entries for it. */
#include "ops/ops.h"

/* ---- shape ---- */

static const char *const axis_names[2] = {"height", "width"};

static int check_channels(const orepa_tensor *x, const orepa_tensor *w, const orepa_tensor *bias, int64_t groups) {
  const char *const x_text = shape_text(x->rank, x->shape), *const w_text = shape_text(w->rank, w->shape);
  if (x->rank != 4 || w->rank != 4)
    return error_set("conv_transpose2d: input %s, kernel %s: both must have 4 dimensions", x_text, w_text);
  if (groups < 1 || x->shape[1] % groups)
    return error_set("conv_transpose2d: %lld groups don't divide %lld input channels (input %s, kernel %s)",
                     (long long)groups, (long long)x->shape[1], x_text, w_text);
  if (w->shape[0] != x->shape[1])
    return error_set("conv_transpose2d: kernel has %lld input channels, input has %lld (input %s, kernel %s: (I, "
                     "O/groups, KH, KW))",
                     (long long)w->shape[0], (long long)x->shape[1], x_text, w_text);
  if (bias && (bias->rank != 1 || bias->shape[0] != w->shape[1] * groups))
    return error_set("conv_transpose2d: bias %s for %lld output channels (kernel %s, groups %lld)",
                     shape_text(bias->rank, bias->shape), (long long)(w->shape[1] * groups), w_text, (long long)groups);
  return 0;
}

/* The size of the result along axis d; -1 and a message. */
static int64_t output_size(const orepa_tensor *x, const orepa_tensor *w, const orepa_conv *c, int64_t more, int d) {
  int64_t stride = c->stride[d], padding = c->padding[d], dilation = c->dilation[d], size = x->shape[2 + d];
  if (stride < 1 || dilation < 1 || padding < 0)
    return error_set("conv_transpose2d: stride %lld, padding %lld, dilation %lld of the %s: at least 1, 0, 1",
                     (long long)stride, (long long)padding, (long long)dilation, axis_names[d]);
  if (stride > INT32_MAX || padding > INT32_MAX || dilation > INT32_MAX)
    return error_set("conv_transpose2d: stride %lld, padding %lld, dilation %lld of the %s: at most %lld",
                     (long long)stride, (long long)padding, (long long)dilation, axis_names[d], (long long)INT32_MAX);
  if (more < 0 || (more >= stride && more >= dilation))
    return error_set(
        "conv_transpose2d: output_padding %lld of the %s: at least 0, and less than the stride %lld or the "
        "dilation %lld",
        (long long)more, axis_names[d], (long long)stride, (long long)dilation);
  if (size < 1 || size > INT32_MAX || w->shape[2 + d] < 1)
    return error_set("conv_transpose2d: from a %s of %lld by a kernel of %lld: at least 1 each (input %s, kernel %s)",
                     axis_names[d], (long long)size, (long long)w->shape[2 + d], shape_text(x->rank, x->shape),
                     shape_text(w->rank, w->shape));
  int64_t result = (size - 1) * stride - 2 * padding + dilation * (w->shape[2 + d] - 1) + more + 1;
  if (result < 1)
    return error_set("conv_transpose2d: padding %lld leaves nothing of the %s (input %s, kernel %s, stride %lld, "
                     "dilation %lld)",
                     (long long)padding, axis_names[d], shape_text(x->rank, x->shape), shape_text(w->rank, w->shape),
                     (long long)stride, (long long)dilation);
  return result;
}

static int transpose_shape(const orepa_tensor *x, const orepa_tensor *w, const orepa_tensor *bias, const orepa_conv *c,
                           const int64_t output_padding[2], int64_t *shape) {
  if (check_channels(x, w, bias, c->groups))
    return -1;
  shape[0] = x->shape[0];
  shape[1] = w->shape[1] * c->groups;
  for (int d = 0; d < 2; d++)
    if ((shape[2 + d] = output_size(x, w, c, output_padding[d], d)) < 0)
      return -1;
  return 0;
}

/* ---- backward ---- */

typedef struct {
  orepa_conv conv;
  orepa_dtype kernel, bias; /* types of their gradients */
} transpose_payload;

static orepa_tensor *bias_gradient(orepa_tensor *dy, orepa_dtype dtype) {
  orepa_tensor *sum = orepa_reduce(OREPA_SUM, dy, 3, (int[]){0, 2, 3}, false);
  orepa_tensor *gradient = sum ? orepa_to(sum, dtype, dy->storage->device) : NULL;
  orepa_release(sum);
  return gradient;
}

static int transpose_backward(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const transpose_payload *payload = node->payload;
  const orepa_conv *conv = &payload->conv;
  const orepa_device *device = given->storage->device;
  orepa_tensor *x = autograd_saved_tensor(node, 0), *w = x ? autograd_saved_tensor(node, 1) : NULL;
  orepa_tensor *dy = w ? op_dense(given) : NULL;
  device_array map, kernel, arriving, to;
  int failed = !dy || tensor_reads(x, &map) || tensor_reads(w, &kernel) || tensor_reads(dy, &arriving);
  if (!failed && autograd_needs(node, 0))
    failed = !(dx[0] = tensor_like(x)) || tensor_writes(dx[0], &to) || op_note_geometry(conv, dy, w, x) ||
             DISPATCH("conv_transpose2d's data gradient", x->dtype, device, conv_forward, conv, &to, &arriving, &kernel,
                      NULL, NULL, NULL, NULL);
  if (!failed && autograd_needs(node, 1))
    failed = !(dx[1] = tensor_new(payload->kernel, device, 4, w->shape)) || tensor_writes(dx[1], &to) ||
             op_note_geometry(conv, dy, w, x) ||
             DISPATCH("conv_transpose2d's weight gradient", x->dtype, device, conv_backward_weight, conv, &to, NULL,
                      &arriving, &map, NULL);
  if (!failed && autograd_needs(node, 2))
    failed = !(dx[2] = bias_gradient(dy, payload->bias));
  orepa_release(dy);
  return failed ? -1 : 0;
}

static const autograd_op transpose_op = {"conv_transpose2d", transpose_backward, NULL};

/* ---- forward ---- */

/* y (N, O, P, Q) += bias (O), in place. */
static int add_bias(orepa_tensor *y, orepa_tensor *bias) {
  orepa_tensor *channels = orepa_reshape(bias, 3, (int64_t[]){y->shape[1], 1, 1});
  int failed = !channels || orepa_apply_in_place(FUNCTION_add, (orepa_operand[]){OPERAND(y), OPERAND(channels)});
  orepa_release(channels);
  return failed ? -1 : 0;
}

static orepa_tensor *transpose_forward(orepa_tensor *x, orepa_tensor *w, orepa_tensor *bias, const orepa_conv *conv,
                                       const int64_t *shape) {
  orepa_tensor *y = tensor_new(x->dtype, x->storage->device, 4, shape);
  device_array from, kernel, to;
  bool was = orepa_set_grad_enabled(false);
  int failed =
      !y || tensor_materialize(y) || tensor_reads(x, &from) || tensor_reads(w, &kernel) || tensor_writes(y, &to) ||
      op_note_geometry(conv, y, w, x) ||
      DISPATCH("conv_transpose2d", x->dtype, x->storage->device, conv_backward_data, conv, &to, &from, &kernel) ||
      (bias && add_bias(y, bias));
  orepa_set_grad_enabled(was);
  return failed ? tensor_fail(y) : y;
}

/* `given` is x, kernel, bias; the padding of the output is less than the stride. */
static orepa_tensor *transpose_recorded(orepa_tensor *const given[3], const transpose_payload *payload,
                                        const int64_t *shape) {
  orepa_tensor *x = op_dense(given[0]), *w = x ? op_dense(given[1]) : NULL;
  orepa_tensor *y = w ? transpose_forward(x, w, given[2], &payload->conv, shape) : NULL;
  autograd_node *node = NULL;
  if (y && autograd_record(&transpose_op, y, given, 3, 2, sizeof *payload, &node))
    y = tensor_fail(y);
  if (node) {
    *(transpose_payload *)node->payload = *payload;
    autograd_save(node, 0, x);
    autograd_save(node, 1, w);
  }
  orepa_release(x);
  orepa_release(w);
  return y;
}

/* A whole stride of output padding is a row of zeros behind the input. A new reference. */
static orepa_tensor *with_rows_behind(orepa_tensor *x, const orepa_conv *conv, const int64_t output_padding[2]) {
  const int64_t none[4] = {0},
                more[4] = {0, 0, output_padding[0] / conv->stride[0], output_padding[1] / conv->stride[1]};
  return more[2] || more[3] ? orepa_pad(x, none, more, OPERAND_NUMBER(0)) : orepa_retain(x);
}

static orepa_tensor *transposed(orepa_tensor *const given[3], const transpose_payload *payload,
                                const int64_t output_padding[2]) {
  static const char *const names[] = {"input", "kernel", "bias"};
  int64_t shape[4];
  if (op_same_kind("conv_transpose2d", 3, given, names) ||
      transpose_shape(given[0], given[1], given[2], &payload->conv, output_padding, shape))
    return NULL;
  orepa_tensor *x = with_rows_behind(given[0], &payload->conv, output_padding);
  orepa_tensor *y = x ? transpose_recorded((orepa_tensor *[]){x, given[1], given[2]}, payload, shape) : NULL;
  orepa_release(x);
  return y;
}

orepa_tensor *orepa_conv_transpose2d(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias, const orepa_conv *conv,
                                     const int64_t output_padding[2]) {
  orepa_tensor *cast[3];
  if (op_autocast(3, (orepa_tensor *[]){x, weight, bias}, cast))
    return NULL;
  transpose_payload payload = {*conv, op_gradient_type(weight, cast[1]), op_gradient_type(bias, cast[2])};
  orepa_tensor *y = transposed(cast, &payload, output_padding);
  op_release_all(3, cast);
  return y;
}
