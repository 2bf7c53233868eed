/* sort.c: order and running sums along one axis, and where elements are that are not zero. */
#include <string.h>

#include "ops/ops.h"

/* ---- order ---- */

static orepa_tensor *positions_of(const char *op, orepa_tensor *x, int axis, int64_t count, bool descending) {
  int64_t shape[OREPA_MAX_RANK];
  memcpy(shape, x->shape, sizeof shape);
  shape[axis] = count;
  orepa_tensor *y = tensor_new(OREPA_INT64, x->storage->device, x->rank, shape);
  device_array from, to;
  if (!y)
    return NULL;
  if (tensor_materialize(y) || tensor_reads(x, &from) || tensor_writes(y, &to) ||
      DISPATCH(op, x->dtype, x->storage->device, sort, axis, descending, &to, &from))
    return tensor_fail(y);
  return y;
}

orepa_tensor *orepa_argsort(orepa_tensor *x, int axis, int64_t count, bool descending) {
  axis = shape_axis("argsort", x->rank, axis);
  if (axis < 0)
    return NULL;
  if (count < 0 || count > x->shape[axis]) {
    error_set("argsort: the first %lld of dimension %d of %s, which has %lld", (long long)count, axis + 1,
              tensor_text(x), (long long)x->shape[axis]);
    return NULL;
  }
  return positions_of("argsort", x, axis, count, descending);
}

/* The true elements of a list come first when it is sorted downwards, in their order. */
static orepa_tensor *true_positions(orepa_tensor *list) {
  orepa_tensor *sum = orepa_reduce(OREPA_SUM, list, 0, NULL, false);
  int64_t count;
  bool known = sum && !orepa_to_host(sum, &count, sizeof count);
  orepa_release(sum);
  return known ? positions_of("nonzero", list, 0, count, true) : NULL;
}

orepa_tensor *orepa_nonzero(orepa_tensor *x) {
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *mask = x->dtype == OREPA_BOOL ? orepa_retain(x) : op_apply2(FUNCTION_ne, OPERAND(x), OPERAND_NUMBER(0));
  orepa_tensor *list = mask ? orepa_reshape(mask, 1, (int64_t[]){orepa_count(mask)}) : NULL;
  orepa_tensor *positions = list ? true_positions(list) : NULL;
  orepa_release(mask);
  orepa_release(list);
  orepa_set_grad_enabled(was);
  return positions;
}

/* ---- running sums ---- */

static orepa_tensor *running_sum(orepa_tensor *x, int axis, bool from_last) {
  const orepa_device *device = x->storage->device;
  orepa_dtype wide = orepa_dtype_is_float(x->dtype) ? op_sum_dtype(x->dtype) : OREPA_INT64;
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *source = orepa_to(x, wide, device), *y = NULL, *sums = NULL;
  device_array from, to;
  if (source && (sums = tensor_new(wide, device, x->rank, x->shape)) && !tensor_reads(source, &from) &&
      !tensor_writes(sums, &to) && !DISPATCH("cumsum", wide, device, running_sum, axis, from_last, &to, &from))
    y = orepa_to(sums, wide == OREPA_INT64 ? wide : x->dtype, device);
  orepa_release(source);
  orepa_release(sums);
  orepa_set_grad_enabled(was);
  return y;
}

static int cumsum_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  dx[0] = running_sum(dy, *(const int *)node->payload, true);
  return dx[0] ? 0 : -1;
}

static const autograd_op cumsum_op = {.name = "cumsum", .backward = cumsum_backward};

orepa_tensor *orepa_cumsum(orepa_tensor *x, int axis) {
  axis = shape_axis("cumsum", x->rank, axis);
  orepa_tensor *y = axis < 0 ? NULL : running_sum(x, axis, false);
  autograd_node *node = NULL;
  if (!y || (orepa_dtype_is_float(x->dtype) && autograd_record(&cumsum_op, y, &x, 1, 0, sizeof(int), &node)))
    return y ? tensor_fail(y) : NULL;
  if (node)
    *(int *)node->payload = axis;
  return y;
}
