/* norm.c: batch norm: by the batch's statistics with running ones kept, or by the running ones (evaluation, or frozen
 * inside a network that trains, where it is an affine op with gradients). */
#include "ops/gradient_promise.h"
#include "ops/norm_promise.h"

/* Small tensors over channels that a norm makes: statistics, and the map y -> scale*y + shift that they amount to. */
typedef struct {
  orepa_tensor *mean, *inverse, *scale, *shift;
} norm_channels;

static void channels_release(norm_channels *c) {
  orepa_release(c->mean);
  orepa_release(c->inverse);
  orepa_release(c->scale);
  orepa_release(c->shift);
}

orepa_dtype op_channel_dtype(const orepa_tensor *x) {
  return x->dtype == OREPA_FLOAT64 ? OREPA_FLOAT64 : OREPA_FLOAT32;
}

/* ---- checks ---- */

static int check_channels(const orepa_tensor *x, const orepa_tensor *t, const char *what) {
  if (!t)
    return 0;
  if (t->rank != 1 || t->shape[0] != x->shape[1] || t->dtype != op_channel_dtype(x) ||
      t->storage->device != x->storage->device || !orepa_is_contiguous(t))
    return error_set("batch_norm: %s is %s on '%s'; an input of %s on '%s' needs contiguous %s %lld", what,
                     tensor_text(t), t->storage->device->name, tensor_text(x), x->storage->device->name,
                     orepa_dtype_name(op_channel_dtype(x)), (long long)x->shape[1]);
  return 0;
}

static int check(const orepa_tensor *x, const orepa_tensor *weight, const orepa_tensor *bias,
                 const orepa_tensor *running_mean, const orepa_tensor *running_var, const orepa_norm *norm) {
  if (x->rank < 2)
    return error_set("batch_norm: input %s has no channels (N, C, ...)", shape_text(x->rank, x->shape));
  if (check_channels(x, weight, "weight") || check_channels(x, bias, "bias") ||
      check_channels(x, running_mean, "running_mean") || check_channels(x, running_var, "running_var"))
    return -1;
  if (!running_mean != !running_var)
    return error_set("batch_norm: running_mean and running_var come together or not at all");
  if (!norm->training && !running_mean)
    return error_set("batch_norm: in evaluation it needs running statistics");
  int64_t count = orepa_count(x), rows = x->shape[1] ? count / x->shape[1] : 0;
  if (norm->training && count && rows == 1)
    return error_set("batch_norm: input %s has one value in each channel; the statistics of a batch need two or more",
                     shape_text(x->rank, x->shape));
  return 0;
}

static int check_zero(const orepa_tensor *x, const orepa_tensor *zero_mean, const orepa_tensor *zero_var) {
  if (!zero_mean != !zero_var)
    return error_set("batch_norm: the two statistics of zero come together or not at all");
  return check_channels(x, zero_mean, "zero's mean") || check_channels(x, zero_var, "zero's variance") ? -1 : 0;
}

/* ---- statistics ---- */

/* Of x as it is: those that came with it, or from a pass over it. A new reference. */
static orepa_tensor *moments_of(orepa_tensor *x, int64_t rows) {
  int64_t shape[3] = {moments_chunks(rows), 4, x->shape[1]};
  orepa_tensor *moments = tensor_moments(x);
  if (moments)
    return orepa_retain(moments);
  device_array from, partial;
  moments = tensor_new(op_channel_dtype(x), x->storage->device, 3, shape);
  if (!moments)
    return NULL;
  if (tensor_writes(moments, &partial) || tensor_reads(x, &from) ||
      DISPATCH("batch_norm", x->dtype, x->storage->device, norm_moments, &partial, &from))
    return tensor_fail(moments);
  return moments;
}

static int batch_channels(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias, orepa_tensor *running_mean,
                          orepa_tensor *running_var, const orepa_norm *norm, norm_channels *c) {
  const orepa_device *device = x->storage->device;
  int64_t channels = x->shape[1], rows = orepa_count(x) / channels;
  orepa_tensor *moments = moments_of(x, rows);
  c->mean = tensor_new(op_channel_dtype(x), device, 1, &channels);
  c->inverse = tensor_new(op_channel_dtype(x), device, 1, &channels);
  c->scale = tensor_new(op_channel_dtype(x), device, 1, &channels);
  c->shift = tensor_new(op_channel_dtype(x), device, 1, &channels);
  device_array partial, w, b, rm, rv, mean, inverse, scale, shift;
  int failed =
      !moments || !c->mean || !c->inverse || !c->scale || !c->shift || tensor_reads(moments, &partial) ||
      tensor_writes(c->mean, &mean) || tensor_writes(c->inverse, &inverse) || tensor_writes(c->scale, &scale) ||
      tensor_writes(c->shift, &shift) || (weight && tensor_reads(weight, &w)) || (bias && tensor_reads(bias, &b)) ||
      (running_mean && (tensor_writes(running_mean, &rm) || tensor_writes(running_var, &rv))) ||
      DISPATCH("batch_norm", x->dtype, device, norm_finalize, norm, rows, &partial, weight ? &w : NULL,
               bias ? &b : NULL, running_mean ? &rm : NULL, running_mean ? &rv : NULL, &mean, &inverse, &scale, &shift);
  orepa_release(moments);
  return failed ? -1 : 0;
}

static int running_channels(orepa_tensor *weight, orepa_tensor *bias, orepa_tensor *running_mean,
                            orepa_tensor *running_var, const orepa_norm *norm, norm_channels *c) {
  orepa_tensor *safe = op_apply2(FUNCTION_add, OPERAND(running_var), OPERAND_NUMBER(norm->eps));
  c->inverse = safe ? op_apply2(FUNCTION_pow, OPERAND(safe), OPERAND_NUMBER(-0.5)) : NULL;
  c->scale = !c->inverse ? NULL : weight ? orepa_mul(weight, c->inverse) : orepa_retain(c->inverse);
  orepa_tensor *moved = c->scale ? orepa_mul(running_mean, c->scale) : NULL;
  if (moved)
    c->shift = op_apply2(FUNCTION_sub, bias ? OPERAND(bias) : OPERAND_NUMBER(0), OPERAND(moved));
  c->mean = orepa_clone(running_mean); /* later training steps change the statistics themselves */
  orepa_release(safe);
  orepa_release(moved);
  return c->shift && c->mean ? 0 : -1;
}

/* Takes off the shift what evaluation by these statistics would make of zero. */
static int take_off_zero(orepa_tensor *weight, orepa_tensor *bias, orepa_tensor *zero_mean, orepa_tensor *zero_var,
                         const orepa_norm *norm, norm_channels *c) {
  norm_channels running = {NULL};
  orepa_tensor *less = NULL;
  if (!running_channels(weight, bias, zero_mean, zero_var, norm, &running))
    less = op_apply2(FUNCTION_sub, OPERAND(c->shift), OPERAND(running.shift));
  channels_release(&running);
  if (!less)
    return -1;
  orepa_release(c->shift);
  c->shift = less;
  return 0;
}

/* ---- backward ---- */

static int norm_backward(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const bool *batch_statistics = node->payload;
  const orepa_device *device = given->storage->device;
  orepa_tensor *x = autograd_saved_tensor(node, 0), *mean = x ? autograd_saved_tensor(node, 1) : NULL,
               *inverse = mean ? autograd_saved_tensor(node, 2) : NULL;
  bool weighted = node->saved[3].tensor.storage != NULL;
  orepa_tensor *weight = inverse && weighted ? autograd_saved_tensor(node, 3) : NULL;
  if (!inverse || (weighted && !weight))
    return -1;
  device_array from, m, s, w, to[3];
  gradient_arrays arriving;
  orepa_tensor *dense = orepa_is_contiguous(given) ? NULL : op_dense(given), *dy = dense ? dense : given;
  int failed = (!dense && !orepa_is_contiguous(given)) || tensor_reads(x, &from) || tensor_reads(mean, &m) ||
               tensor_reads(inverse, &s) || (weight && tensor_reads(weight, &w));
  for (int k = 0; k < 3 && !failed; k++)
    if (autograd_needs(node, k))
      failed = !(dx[k] = tensor_like(k ? mean : x)) || tensor_writes(dx[k], &to[k]);
  if (!failed && !(failed = gradient_reads(dy, x, &arriving))) {
    failed =
        DISPATCH("batch_norm's gradient", x->dtype, device, norm_backward, *batch_statistics, dx[0] ? &to[0] : NULL,
                 dx[1] ? &to[1] : NULL, dx[2] ? &to[2] : NULL, &arriving.gradient, &from, &m, &s, weight ? &w : NULL);
    gradient_end(&arriving, !failed);
  }
  orepa_release(dense);
  return failed ? -1 : 0;
}

static const autograd_op norm_op = {"batch_norm", norm_backward, NULL};

/* ---- forward ---- */

/* The map, which waits if it may. */
static orepa_tensor *apply(orepa_tensor *x, const norm_channels *c) {
  orepa_tensor *y = tensor_materialize(x) ? NULL : norm_promise_new(x, c->scale, c->shift);
  return y && !promises_made() && tensor_materialize(y) ? tensor_fail(y) : y;
}

orepa_tensor *orepa_batch_norm(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias, orepa_tensor *running_mean,
                               orepa_tensor *running_var, const orepa_norm *norm) {
  return orepa_batch_norm_less_zero(x, weight, bias, running_mean, running_var, NULL, NULL, norm);
}

orepa_tensor *orepa_batch_norm_less_zero(orepa_tensor *given, orepa_tensor *weight, orepa_tensor *bias,
                                         orepa_tensor *running_mean, orepa_tensor *running_var, orepa_tensor *zero_mean,
                                         orepa_tensor *zero_var, const orepa_norm *norm) {
  if (check(given, weight, bias, running_mean, running_var, norm) || check_zero(given, zero_mean, zero_var))
    return NULL;
  orepa_tensor *x = op_dense(given), *y = NULL;
  if (!x)
    return NULL;
  norm_channels c = {NULL};
  bool was = orepa_set_grad_enabled(false), empty = orepa_count(x) == 0;
  int failed = 0;
  if (empty && norm->training) { /* nothing to measure: neither output nor statistics change */
    c.mean = orepa_full(op_channel_dtype(x), x->storage->device, 1, &x->shape[1], 0);
    c.inverse = c.mean ? orepa_retain(c.mean) : NULL;
    failed = !c.mean || !(y = orepa_empty(x->dtype, x->storage->device, x->rank, x->shape));
  } else {
    failed = norm->training ? batch_channels(x, weight, bias, running_mean, running_var, norm, &c)
                            : running_channels(weight, bias, running_mean, running_var, norm, &c);
    failed = failed || (zero_mean && take_off_zero(weight, bias, zero_mean, zero_var, norm, &c));
    failed = failed || !(y = apply(x, &c));
  }
  orepa_set_grad_enabled(was);
  autograd_node *node = NULL;
  if (!failed && autograd_record(&norm_op, y, (orepa_tensor *[]){given, weight, bias}, 3, 4, sizeof(bool), &node))
    y = tensor_fail(y);
  if (node) {
    *(bool *)node->payload = norm->training;
    node->takes_sums = true;
    autograd_save(node, 0, x);
    autograd_save(node, 1, c.mean);
    autograd_save(node, 2, c.inverse);
    autograd_save(node, 3, weight);
  }
  channels_release(&c);
  orepa_release(x);
  return y;
}
