/* loss.c: softmax, its logarithm, and cross-entropy on class labels. */
#include <string.h>

#include "ops/ops.h"

/* The array with one axis moved to the end: kernels work on the last one. */
static void move_last(device_array *array, int axis) {
  int64_t size = array->shape[axis], stride = array->strides[axis];
  for (int d = axis; d + 1 < array->rank; d++) {
    array->shape[d] = array->shape[d + 1];
    array->strides[d] = array->strides[d + 1];
  }
  array->shape[array->rank - 1] = size;
  array->strides[array->rank - 1] = stride;
}

/* ---- softmax ---- */

typedef struct {
  bool log;
  int axis;
} softmax_payload;

static int softmax_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const softmax_payload *p = node->payload;
  orepa_tensor *y = autograd_saved_tensor(node, 0);
  device_array from, result, to;
  if (!y || !(dx[0] = tensor_like(y)) || tensor_reads(dy, &from) || tensor_reads(y, &result) ||
      tensor_writes(dx[0], &to))
    return -1;
  move_last(&from, p->axis);
  move_last(&result, p->axis);
  move_last(&to, p->axis);
  return DISPATCH("softmax's gradient", y->dtype, y->storage->device, softmax_backward, p->log, &to, &from, &result);
}

static const autograd_op softmax_op = {"softmax", softmax_backward, NULL};
static const autograd_op log_softmax_op = {"log_softmax", softmax_backward, NULL};

static orepa_tensor *softmax_in_type(const autograd_op *op, bool log, orepa_tensor *x, int axis) {
  device_array from, to;
  autograd_node *node = NULL;
  axis = shape_axis(op->name, x->rank, axis);
  orepa_tensor *y = axis < 0 ? NULL : tensor_like(x);
  if (!y)
    return NULL;
  if (tensor_materialize(y) || tensor_reads(x, &from) || tensor_writes(y, &to))
    return tensor_fail(y);
  move_last(&from, axis);
  move_last(&to, axis);
  if (DISPATCH(op->name, x->dtype, x->storage->device, softmax_forward, log, &to, &from) ||
      autograd_record(op, y, &x, 1, 1, sizeof(softmax_payload), &node))
    return tensor_fail(y);
  if (node) {
    *(softmax_payload *)node->payload = (softmax_payload){log, axis};
    autograd_save(node, 0, y);
  }
  return y;
}

static orepa_tensor *softmax(const autograd_op *op, bool log, orepa_tensor *x, int axis) {
  orepa_tensor *wide = op_wide(x), *y = wide ? softmax_in_type(op, log, wide, axis) : NULL;
  orepa_release(wide);
  return y;
}

orepa_tensor *orepa_softmax(orepa_tensor *x, int axis) {
  return softmax(&softmax_op, false, x, axis);
}

orepa_tensor *orepa_log_softmax(orepa_tensor *x, int axis) {
  return softmax(&log_softmax_op, true, x, axis);
}

/* ---- cross-entropy: one loss a row, then their mean ---- */

static int check_labels(const orepa_tensor *logits, const orepa_tensor *labels, const orepa_cross_entropy_options *o) {
  bool fits = logits->rank >= 2 && labels->rank == logits->rank - 1 && labels->shape[0] == logits->shape[0];
  for (int d = 1; fits && d < labels->rank; d++)
    fits = labels->shape[d] == logits->shape[d + 1];
  if (!fits || labels->dtype != OREPA_INT64 || labels->storage->device != logits->storage->device)
    return error_set(
        "cross_entropy: logits are %s on '%s', labels %s on '%s'; (N, C) goes with int64 (N), (N, C, H, W) "
        "with int64 (N, H, W)",
        tensor_text(logits), logits->storage->device->name, tensor_text(labels), labels->storage->device->name);
  if (!(o->label_smoothing >= 0 && o->label_smoothing <= 1))
    return error_set("cross_entropy: label_smoothing is %g, it lies between 0 and 1", o->label_smoothing);
  return 0;
}

static int check_offence(const orepa_tensor *logits) {
  int64_t label, position;
  if (!op_offence(logits->storage->device, &label, &position))
    return 0;
  return error_set("cross_entropy: label %lld at position %lld is outside 0 ... %lld (logits %s)", (long long)label,
                   (long long)position + 1, (long long)logits->shape[1] - 1, shape_text(logits->rank, logits->shape));
}

static int rows_backward(autograd_node *node, orepa_tensor *dloss, orepa_tensor **dx) {
  const orepa_cross_entropy_options *o = node->payload;
  orepa_tensor *logits = autograd_saved_tensor(node, 0), *labels = logits ? autograd_saved_tensor(node, 1) : NULL,
               *logz = labels ? autograd_saved_tensor(node, 2) : NULL;
  device_array to, weight, from, classes, z;
  if (!logz || !(dx[0] = tensor_like(logits)) || tensor_reads(dloss, &weight) || tensor_reads(logits, &from) ||
      tensor_reads(labels, &classes) || tensor_reads(logz, &z) || tensor_writes(dx[0], &to))
    return -1;
  move_last(&to, 1);
  move_last(&from, 1);
  return DISPATCH("cross_entropy's gradient", logits->dtype, logits->storage->device, cross_entropy_backward,
                  o->label_smoothing, o->ignore_index, &to, &weight, &from, &classes, &z);
}

static const autograd_op rows_op = {"cross_entropy", rows_backward, NULL};

static orepa_tensor *row_losses(orepa_tensor *logits, orepa_tensor *labels, const orepa_cross_entropy_options *o) {
  const orepa_device *device = logits->storage->device;
  orepa_dtype dtype = logits->dtype == OREPA_FLOAT64 ? OREPA_FLOAT64 : OREPA_FLOAT32;
  orepa_tensor *loss = tensor_new(dtype, device, labels->rank, labels->shape);
  orepa_tensor *logz = loss ? tensor_like(loss) : NULL;
  device_array from, classes, to, z;
  autograd_node *node = NULL;
  int failed = !logz || tensor_writes(loss, &to) || tensor_writes(logz, &z) || tensor_reads(logits, &from) ||
               tensor_reads(labels, &classes);
  if (!failed) {
    move_last(&from, 1);
    failed = DISPATCH("cross_entropy", logits->dtype, device, cross_entropy_forward, o->label_smoothing,
                      o->ignore_index, &to, &z, &from, &classes) ||
             check_offence(logits) || autograd_record(&rows_op, loss, &logits, 1, 3, sizeof *o, &node);
  }
  if (node) {
    *(orepa_cross_entropy_options *)node->payload = *o;
    autograd_save(node, 0, logits);
    autograd_save(node, 1, labels);
    autograd_save(node, 2, logz);
  }
  orepa_release(logz);
  return failed ? tensor_fail(loss) : loss;
}

/* How many rows count, at least 1, as a tensor of the loss's type. */
static orepa_tensor *rows_that_count(orepa_tensor *loss, orepa_tensor *labels, int64_t ignore) {
  orepa_operand ignored = {.integer = ignore, .is_integer = true};
  orepa_tensor *counts = op_apply2(FUNCTION_ne, OPERAND(labels), ignored);
  orepa_tensor *sum = counts ? orepa_reduce(OREPA_SUM, counts, 0, NULL, false) : NULL;
  orepa_tensor *some = sum ? op_apply2(FUNCTION_maximum, OPERAND(sum), OPERAND_NUMBER(1)) : NULL;
  orepa_tensor *number = some ? orepa_to(some, loss->dtype, loss->storage->device) : NULL;
  orepa_release(counts);
  orepa_release(sum);
  orepa_release(some);
  return number;
}

orepa_tensor *orepa_cross_entropy(orepa_tensor *logits, orepa_tensor *labels, const orepa_cross_entropy_options *o) {
  if (check_labels(logits, labels, o))
    return NULL;
  orepa_tensor *wide = op_wide(logits), *loss = wide ? row_losses(wide, labels, o) : NULL;
  orepa_release(wide);
  if (!loss || !o->mean)
    return loss;
  orepa_tensor *total = orepa_reduce(OREPA_SUM, loss, 0, NULL, false);
  orepa_tensor *count = total ? rows_that_count(loss, labels, o->ignore_index) : NULL;
  orepa_tensor *mean = count ? op_apply2(FUNCTION_div, OPERAND(total), OPERAND(count)) : NULL;
  orepa_release(loss);
  orepa_release(total);
  orepa_release(count);
  return mean;
}
