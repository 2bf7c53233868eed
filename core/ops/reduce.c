/* reduce.c: sums, means, extremes and truth over axes. */
#include <math.h>
#include <string.h>

#include "ops/ops.h"

static const char *const names[OREPA_REDUCTIONS] = {"sum", "mean", "max", "min", "argmax", "argmin", "all", "any"};

typedef struct {
  orepa_reduction kind;
  int rank;
  int64_t kept[OREPA_MAX_RANK]; /* the result's shape with size 1 in the reduced axes */
  int64_t shape[OREPA_MAX_RANK];
  int64_t reduced; /* elements behind each result */
} reduce_payload;

static int reduce_shape(orepa_reduction kind, const orepa_tensor *x, int count, const int *axes, reduce_payload *p) {
  bool reduced[OREPA_MAX_RANK] = {false};
  for (int k = 0; axes && k < count; k++) {
    int axis = shape_axis(names[kind], x->rank, axes[k]);
    if (axis < 0)
      return -1;
    if (reduced[axis])
      return error_set("%s: axis %d is listed twice", names[kind], axis + 1);
    reduced[axis] = true;
  }
  *p = (reduce_payload){.kind = kind, .rank = x->rank, .reduced = 1};
  for (int d = 0; d < x->rank; d++) {
    bool gone = !axes || reduced[d];
    p->shape[d] = x->shape[d];
    p->kept[d] = gone ? 1 : x->shape[d];
    p->reduced *= gone ? x->shape[d] : 1;
  }
  if (p->reduced == 0 && kind >= OREPA_MAX && kind <= OREPA_ARGMIN)
    return error_set("%s: there is no element to choose in a tensor of %s", names[kind], shape_text(x->rank, x->shape));
  if ((kind == OREPA_ARGMAX || kind == OREPA_ARGMIN) && axes && count != 1)
    return error_set("%s: over one axis or over all, not over %d", names[kind], count);
  return 0;
}

static orepa_dtype reduce_dtype(orepa_reduction kind, orepa_dtype x) {
  switch (kind) {
  case OREPA_SUM:
  case OREPA_MEAN:
    return orepa_dtype_is_float(x) ? x : OREPA_INT64;
  case OREPA_ARGMAX:
  case OREPA_ARGMIN:
    return OREPA_INT64;
  case OREPA_ALL:
  case OREPA_ANY:
    return OREPA_BOOL;
  default:
    return x;
  }
}

/* dx of a maximum: dy, shared by the elements that equal it. */
static orepa_tensor *extreme_gradient(autograd_node *node, orepa_tensor *dy) {
  const reduce_payload *p = node->payload;
  orepa_tensor *x = autograd_saved_tensor(node, 0), *y = x ? autograd_saved_tensor(node, 1) : NULL;
  if (!y)
    return NULL;
  int axes[OREPA_MAX_RANK], count = 0;
  for (int d = 0; d < p->rank; d++)
    if (p->kept[d] != p->shape[d])
      axes[count++] = d;
  orepa_tensor *kept = orepa_reshape(y, p->rank, p->kept);
  orepa_tensor *equal = kept ? op_apply2(FUNCTION_eq, OPERAND(x), OPERAND(kept)) : NULL;
  orepa_tensor *mask = equal ? orepa_to(equal, dy->dtype, dy->storage->device) : NULL;
  orepa_tensor *ties = mask ? orepa_reduce(OREPA_SUM, mask, count, axes, true) : NULL;
  orepa_tensor *share = ties ? op_apply2(FUNCTION_div, OPERAND(dy), OPERAND(ties)) : NULL;
  orepa_tensor *dx = share ? orepa_mul(mask, share) : NULL;
  orepa_release(kept);
  orepa_release(equal);
  orepa_release(mask);
  orepa_release(ties);
  orepa_release(share);
  return dx;
}

static int reduce_backward(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const reduce_payload *p = node->payload;
  orepa_tensor *dy = orepa_reshape(given, p->rank, p->kept);
  if (!dy)
    return -1;
  if (p->kind == OREPA_SUM) {
    dx[0] = orepa_expand(dy, p->rank, p->shape);
  } else if (p->kind == OREPA_MEAN) {
    orepa_tensor *share = op_apply2(FUNCTION_div, OPERAND(dy), OPERAND_NUMBER((double)p->reduced));
    dx[0] = share ? orepa_expand(share, p->rank, p->shape) : NULL;
    orepa_release(share);
  } else {
    dx[0] = extreme_gradient(node, dy);
  }
  orepa_release(dy);
  return dx[0] ? 0 : -1;
}

static const autograd_op reduce_ops[OREPA_REDUCTIONS] = {
    [OREPA_SUM] = {"sum", reduce_backward, NULL},
    [OREPA_MEAN] = {"mean", reduce_backward, NULL},
    [OREPA_MAX] = {"max", reduce_backward, NULL},
    [OREPA_MIN] = {"min", reduce_backward, NULL},
};

/* y with the reduced axes left out (or kept), from an axis of size 1 each. */
static orepa_tensor *drop_axes(orepa_tensor *y, const reduce_payload *p, int count, const int *axes, bool keepdim) {
  if (keepdim)
    return orepa_retain(y);
  int64_t shape[OREPA_MAX_RANK];
  int rank = 0;
  for (int d = 0; d < p->rank; d++) {
    bool gone = !axes;
    for (int k = 0; axes && k < count; k++)
      gone = gone || axes[k] == d || axes[k] + p->rank == d;
    if (!gone)
      shape[rank++] = p->kept[d];
  }
  orepa_tensor *flat = orepa_reshape(y, rank, shape);
  orepa_tensor *dense = flat ? orepa_contiguous(flat) : NULL;
  orepa_release(flat);
  if (dense)
    dense->is_view = false; /* nobody else sees it */
  return dense;
}

/* argmax over everything is argmax over one axis of the elements in logical order. */
static orepa_tensor *flattened(orepa_reduction kind, orepa_tensor *x, bool everything) {
  if (!everything || (kind != OREPA_ARGMAX && kind != OREPA_ARGMIN) || x->rank == 1)
    return orepa_retain(x);
  return orepa_reshape(x, 1, (int64_t[]){-1});
}

static orepa_tensor *reduce_values(orepa_reduction kind, orepa_tensor *x, const reduce_payload *p) {
  orepa_tensor *y = tensor_new(reduce_dtype(kind, x->dtype), x->storage->device, p->rank, p->kept);
  device_array from, to;
  if (!y)
    return NULL;
  orepa_reduction of_device = kind == OREPA_MEAN ? OREPA_SUM : kind;
  if (tensor_materialize(y) || tensor_reads(x, &from) || tensor_writes(y, &to) ||
      DISPATCH(names[kind], x->dtype, x->storage->device, reduce, of_device, &to, &from))
    return tensor_fail(y);
  if (kind == OREPA_MEAN) {
    orepa_operand divide[2] = {OPERAND(y), OPERAND_NUMBER((double)p->reduced)};
    if (orepa_apply_in_place(FUNCTION_div, divide))
      return tensor_fail(y);
  }
  return y;
}

orepa_tensor *orepa_reduce(orepa_reduction kind, orepa_tensor *x, int count, const int *axes, bool keepdim) {
  reduce_payload p;
  if (kind == OREPA_MEAN && !orepa_dtype_is_float(x->dtype)) {
    error_set("mean: %s has no mean of its own type; convert it with to()", orepa_dtype_name(x->dtype));
    return NULL;
  }
  bool was = orepa_set_grad_enabled(false), everything = !axes && !keepdim;
  orepa_tensor *source = flattened(kind, x, everything), *y = NULL, *result = NULL;
  if (source && !reduce_shape(kind, source, count, axes, &p))
    y = reduce_values(kind, source, &p);
  if (y)
    result = drop_axes(y, &p, count, axes, keepdim);
  orepa_release(y);
  orepa_release(source);
  orepa_set_grad_enabled(was);
  autograd_node *node = NULL;
  if (result && kind <= OREPA_MIN && orepa_dtype_is_float(x->dtype)) {
    bool extreme = kind == OREPA_MAX || kind == OREPA_MIN;
    if (autograd_record(&reduce_ops[kind], result, &x, 1, 2, sizeof p, &node))
      return tensor_fail(result);
    if (node) {
      *(reduce_payload *)node->payload = p;
      autograd_save(node, 0, extreme ? x : NULL);
      autograd_save(node, 1, extreme ? result : NULL);
    }
  }
  return result;
}

/* ---- gradients back through broadcasting ---- */

orepa_tensor *op_sum_to(orepa_tensor *g, int rank, const int64_t *shape) {
  int axes[OREPA_MAX_RANK], count = 0, extra = g->rank - rank;
  for (int d = 0; d < g->rank; d++)
    if (d < extra || (shape[d - extra] == 1 && g->shape[d] != 1))
      axes[count++] = d;
  if (!count)
    return orepa_retain(g);
  orepa_tensor *sum = orepa_reduce(OREPA_SUM, g, count, axes, true);
  if (!sum || !extra)
    return sum;
  orepa_tensor *shaped = orepa_reshape(sum, rank, shape);
  orepa_tensor *dense = shaped ? orepa_contiguous(shaped) : NULL;
  orepa_release(shaped);
  orepa_release(sum);
  return dense;
}
