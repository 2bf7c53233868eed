/* view.c: the same storage, seen differently; and copies in another order, type or place. Each with its gradient. */
#include <stdlib.h>
#include <string.h>

#include "autograd/autograd.h"
#include "ops/ops.h"

static orepa_tensor *finish_view(orepa_tensor *t, orepa_tensor *view, const autograd_op *op, size_t payload_bytes,
                                 const void *payload) {
  if (!view)
    return NULL;
  autograd_node *node;
  if (autograd_record(op, view, &t, 1, 0, payload_bytes, &node))
    return tensor_fail(view);
  if (node)
    memcpy(node->payload, payload, payload_bytes);
  if (orepa_grad_enabled() && view->storage == t->storage)
    t->storage->viewed_in_graph = true;
  return view;
}

/* ---- reshape ---- */

/* Strides of `shape` over t's memory in logical order, if there are any. */
static bool reshape_strides(const orepa_tensor *t, int rank, const int64_t *shape, int64_t *strides) {
  if (orepa_count(t) == 0) {
    shape_strides(rank, shape, strides);
    return true;
  }
  int old = t->rank;
  int64_t left = 1, step = 1; /* elements of the run of old axes not yet handed out, and the stride of its last */
  for (int d = rank; d-- > 0;) {
    if (shape[d] == 1) {
      strides[d] = 1;
      continue;
    }
    if (left == 1) { /* take old axes that follow each other in memory as one run */
      while (old > 0 && t->shape[old - 1] == 1)
        old--;
      if (old == 0)
        return false;
      old--;
      left = t->shape[old];
      step = t->strides[old];
      for (int64_t span = step * t->shape[old]; old > 0; old--) {
        if (t->shape[old - 1] == 1)
          continue;
        if (t->strides[old - 1] != span)
          break;
        left *= t->shape[old - 1];
        span *= t->shape[old - 1];
      }
    }
    if (left % shape[d])
      return false;
    strides[d] = step;
    step *= shape[d];
    left /= shape[d];
  }
  return left == 1;
}

typedef struct {
  int rank;
  int64_t shape[OREPA_MAX_RANK];
} shape_payload;

static int reshape_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const shape_payload *base = node->payload;
  dx[0] = orepa_reshape(dy, base->rank, base->shape);
  return dx[0] ? 0 : -1;
}

static const autograd_op reshape_op = {"reshape", reshape_backward, NULL};

static orepa_tensor *bad_reshape(const orepa_tensor *t, int rank, const int64_t *wanted) {
  error_set("reshape: %s has %lld elements and can't become %s", shape_text(t->rank, t->shape),
            (long long)orepa_count(t), shape_text(rank, wanted));
  return NULL;
}

orepa_tensor *orepa_reshape(orepa_tensor *t, int rank, const int64_t *wanted) {
  int64_t shape[OREPA_MAX_RANK], strides[OREPA_MAX_RANK], known = 1, count = orepa_count(t);
  int unknown = -1;
  if (rank < 0 || rank > OREPA_MAX_RANK) {
    error_set("reshape: a tensor has at most %d dimensions, not %d", OREPA_MAX_RANK, rank);
    return NULL;
  }
  for (int d = 0; d < rank; d++) {
    shape[d] = wanted[d];
    if (wanted[d] == -1 && unknown < 0)
      unknown = d;
    else if (wanted[d] < 0 || __builtin_mul_overflow(known, wanted[d], &known))
      return bad_reshape(t, rank, wanted);
  }
  if (unknown >= 0) {
    if (known == 0 || count % known)
      return bad_reshape(t, rank, wanted);
    known *= shape[unknown] = count / known;
  }
  if (known != count)
    return bad_reshape(t, rank, wanted);
  shape_payload base = {.rank = t->rank};
  memcpy(base.shape, t->shape, sizeof base.shape);
  /* A new 4-d tensor is channels-last: a view that is not would have to be copied by the next op, but stays right. */
  if (reshape_strides(t, rank, shape, strides))
    return finish_view(t, tensor_alias(t, rank, shape, strides, t->offset), &reshape_op, sizeof base, &base);
  orepa_tensor *y = tensor_new(t->dtype, t->storage->device, rank, shape);
  if (!y)
    return NULL;
  /* Row-major memory of either shape is the same sequence: copy into it as the old shape, see it as the new one. */
  orepa_tensor *dense = tensor_new(t->dtype, t->storage->device, t->rank, t->shape);
  if (!dense)
    return tensor_fail(y);
  shape_row_major(t->rank, t->shape, dense->strides);
  shape_row_major(rank, shape, strides);
  orepa_tensor *seen = tensor_copy_into(dense, t) ? NULL : tensor_alias(dense, rank, shape, strides, 0);
  orepa_release(dense);
  if (!seen || tensor_copy_into(y, seen)) {
    orepa_release(seen);
    return tensor_fail(y);
  }
  orepa_release(seen);
  return finish_view(t, y, &reshape_op, sizeof base, &base);
}

/* ---- permute, transpose ---- */

typedef struct {
  int axes[OREPA_MAX_RANK];
} permute_payload;

static int permute_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const permute_payload *p = node->payload;
  int back[OREPA_MAX_RANK];
  for (int d = 0; d < dy->rank; d++)
    back[p->axes[d]] = d;
  dx[0] = orepa_permute(dy, back);
  return dx[0] ? 0 : -1;
}

static const autograd_op permute_op = {"permute", permute_backward, NULL};

orepa_tensor *orepa_permute(orepa_tensor *t, const int *axes) {
  int64_t shape[OREPA_MAX_RANK], strides[OREPA_MAX_RANK];
  permute_payload p = {{0}};
  unsigned seen = 0;
  for (int d = 0; d < t->rank; d++) {
    int axis = shape_axis("permute", t->rank, axes[d]);
    if (axis < 0)
      return NULL;
    if (seen >> axis & 1) {
      error_set("permute: axis %d is listed twice (tensor %s)", axis + 1, shape_text(t->rank, t->shape));
      return NULL;
    }
    seen |= 1u << axis;
    p.axes[d] = axis;
    shape[d] = t->shape[axis];
    strides[d] = t->strides[axis];
  }
  return finish_view(t, tensor_alias(t, t->rank, shape, strides, t->offset), &permute_op, sizeof p, &p);
}

orepa_tensor *orepa_transpose(orepa_tensor *t, int axis, int other) {
  int axes[OREPA_MAX_RANK];
  for (int d = 0; d < t->rank; d++)
    axes[d] = d;
  axis = shape_axis("transpose", t->rank, axis);
  other = axis < 0 ? -1 : shape_axis("transpose", t->rank, other);
  if (axis < 0 || other < 0)
    return NULL;
  axes[axis] = other;
  axes[other] = axis;
  return orepa_permute(t, axes);
}

/* ---- slice, select: outside of what the view sees the gradient is zero ---- */

typedef struct {
  int base_rank;
  int64_t base_shape[OREPA_MAX_RANK];
  int axis;
  bool select;
  int64_t first, last, step;
} slice_payload;

static int slice_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const slice_payload *p = node->payload;
  dx[0] = orepa_full(dy->dtype, dy->storage->device, p->base_rank, p->base_shape, 0);
  if (!dx[0])
    return -1;
  orepa_tensor *part =
      p->select ? orepa_select(dx[0], p->axis, p->first) : orepa_slice(dx[0], p->axis, p->first, p->last, p->step);
  int failed = !part || tensor_copy_into(part, dy);
  orepa_release(part);
  return failed ? -1 : 0;
}

static const autograd_op slice_op = {"slice", slice_backward, NULL};
static const autograd_op select_op = {"select", slice_backward, NULL};

orepa_tensor *orepa_slice(orepa_tensor *t, int axis, int64_t first, int64_t last, int64_t step) {
  axis = shape_axis("slice", t->rank, axis);
  if (axis < 0)
    return NULL;
  if (step < 1 || first < 0 || last > t->shape[axis] || first > last) {
    error_set("slice: positions %lld to %lld in steps of %lld don't fit an axis of size %lld (tensor %s)",
              (long long)first + 1, (long long)last, (long long)step, (long long)t->shape[axis],
              shape_text(t->rank, t->shape));
    return NULL;
  }
  slice_payload p = {.base_rank = t->rank, .axis = axis, .first = first, .last = last, .step = step};
  memcpy(p.base_shape, t->shape, sizeof p.base_shape);
  int64_t shape[OREPA_MAX_RANK], strides[OREPA_MAX_RANK];
  memcpy(shape, t->shape, sizeof shape);
  memcpy(strides, t->strides, sizeof strides);
  shape[axis] = (last - first) / step + ((last - first) % step != 0);
  strides[axis] *= step;
  return finish_view(t, tensor_alias(t, t->rank, shape, strides, t->offset + first * t->strides[axis]), &slice_op,
                     sizeof p, &p);
}

orepa_tensor *orepa_select(orepa_tensor *t, int axis, int64_t position) {
  axis = shape_axis("select", t->rank, axis);
  if (axis < 0)
    return NULL;
  if (position < -t->shape[axis] || position >= t->shape[axis]) {
    error_set("select: there is no position %lld in an axis of size %lld (tensor %s)",
              (long long)(position < 0 ? position : position + 1), (long long)t->shape[axis],
              shape_text(t->rank, t->shape));
    return NULL;
  }
  if (position < 0)
    position += t->shape[axis];
  slice_payload p = {.base_rank = t->rank, .axis = axis, .first = position, .select = true};
  memcpy(p.base_shape, t->shape, sizeof p.base_shape);
  int64_t shape[OREPA_MAX_RANK], strides[OREPA_MAX_RANK];
  for (int d = 0, k = 0; d < t->rank; d++)
    if (d != axis) {
      shape[k] = t->shape[d];
      strides[k++] = t->strides[d];
    }
  return finish_view(t, tensor_alias(t, t->rank - 1, shape, strides, t->offset + position * t->strides[axis]),
                     &select_op, sizeof p, &p);
}

/* ---- expand ---- */

static int expand_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const shape_payload *base = node->payload;
  dx[0] = op_sum_to(dy, base->rank, base->shape);
  return dx[0] ? 0 : -1;
}

static const autograd_op expand_op = {"expand", expand_backward, NULL};

orepa_tensor *orepa_expand(orepa_tensor *t, int rank, const int64_t *shape) {
  int64_t strides[OREPA_MAX_RANK];
  bool fits = rank >= t->rank && rank <= OREPA_MAX_RANK;
  for (int d = 0, k = t->rank - rank; fits && d < rank; d++, k++) {
    fits = shape[d] >= 0 && (k < 0 || t->shape[k] == shape[d] || t->shape[k] == 1);
    strides[d] = k < 0 || (t->shape[k] == 1 && shape[d] != 1) ? 0 : t->strides[k];
  }
  if (!fits) {
    error_set("expand: %s does not broadcast to %s", shape_text(t->rank, t->shape),
              shape_text(rank < OREPA_MAX_RANK ? rank : OREPA_MAX_RANK, shape));
    return NULL;
  }
  shape_payload base = {.rank = t->rank};
  memcpy(base.shape, t->shape, sizeof base.shape);
  return finish_view(t, tensor_alias(t, rank, shape, strides, t->offset), &expand_op, sizeof base, &base);
}

orepa_tensor *orepa_detach(orepa_tensor *t) {
  orepa_tensor *alias = tensor_alias(t, t->rank, t->shape, t->strides, t->offset);
  if (alias)
    alias->is_view = t->is_view;
  return alias;
}

/* ---- copies ---- */

typedef struct {
  orepa_dtype dtype;
  const orepa_device *device;
} to_payload;

static int to_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const to_payload *from = node->payload;
  dx[0] = orepa_to(dy, from->dtype, from->device);
  return dx[0] ? 0 : -1;
}

static const autograd_op to_op = {"to", to_backward, NULL};
static const autograd_op clone_op = {"clone", to_backward, NULL};

/* A new contiguous tensor with t's elements, through the host where the devices differ. */
static orepa_tensor *copied(orepa_tensor *t, orepa_dtype dtype, const orepa_device *device) {
  orepa_tensor *y = tensor_new(dtype, device, t->rank, t->shape);
  if (!y)
    return NULL;
  if (device == t->storage->device)
    return tensor_copy_into(y, t) ? tensor_fail(y) : y;
  size_t bytes = (size_t)orepa_count(t) * orepa_dtype_size(t->dtype);
  void *host = malloc(bytes ? bytes : 1);
  orepa_tensor *moved = NULL;
  if (!host)
    error_out_of_memory("to: out of memory: no room for %zu bytes on the host", bytes);
  else if (!orepa_to_host(t, host, bytes))
    moved = orepa_from_host(t->dtype, device, t->rank, t->shape, host);
  free(host);
  int failed = !moved || tensor_copy_into(y, moved);
  orepa_release(moved);
  return failed ? tensor_fail(y) : y;
}

static orepa_tensor *copy_op(const autograd_op *op, orepa_tensor *t, orepa_dtype dtype, const orepa_device *device) {
  orepa_tensor *y = copied(t, dtype, device);
  autograd_node *node = NULL;
  if (!y || !orepa_dtype_is_float(dtype))
    return y;
  if (autograd_record(op, y, &t, 1, 0, sizeof(to_payload), &node))
    return tensor_fail(y);
  if (node)
    *(to_payload *)node->payload = (to_payload){t->dtype, t->storage->device};
  return y;
}

orepa_tensor *orepa_clone(orepa_tensor *t) {
  return copy_op(&clone_op, t, t->dtype, t->storage->device);
}

orepa_tensor *orepa_contiguous(orepa_tensor *t) {
  return orepa_is_contiguous(t) ? orepa_retain(t) : orepa_clone(t);
}

orepa_tensor *orepa_to(orepa_tensor *t, orepa_dtype dtype, const orepa_device *device) {
  if (dtype == t->dtype && device == t->storage->device)
    return orepa_retain(t);
  return copy_op(&to_op, t, dtype, device);
}

/* t becomes what `moved` is: the storages change places. */
static void take_storage(orepa_tensor *t, orepa_tensor *moved) {
  tensor_storage *storage = t->storage;
  t->storage = moved->storage;
  moved->storage = storage;
  t->dtype = moved->dtype;
  t->offset = moved->offset;
  memcpy(t->strides, moved->strides, sizeof t->strides);
  t->storage->version = storage->version + 1;
}

int orepa_move_(orepa_tensor *t, orepa_dtype dtype, const orepa_device *device) {
  if (t->node)
    return error_set("move: this tensor (%s) was computed by '%s'; only a leaf moves in place", tensor_text(t),
                     t->node->op->name);
  if (dtype == t->dtype && device == t->storage->device)
    return 0;
  if (t->requires_grad && !orepa_dtype_is_float(dtype))
    return error_set("move: a tensor that requires a gradient can't become %s", orepa_dtype_name(dtype));
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *moved = orepa_to(t, dtype, device), *grad = moved && t->grad ? orepa_to(t->grad, dtype, device) : NULL;
  orepa_set_grad_enabled(was);
  if (!moved || (t->grad && !grad)) {
    orepa_release(moved);
    return -1;
  }
  take_storage(t, moved);
  orepa_release(moved);
  if (grad) {
    orepa_release(t->grad);
    t->grad = grad;
  }
  return 0;
}
