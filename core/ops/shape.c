/* shape.c: ops that put tensors together or around each other: concatenate and pad. Slices and copies do the work. */
#include <string.h>

#include "ops/ops.h"

/* ---- concatenate ---- */

typedef struct {
  int axis;
  int64_t sizes[]; /* of the parts, along it */
} concatenate_payload;

static int concatenate_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const concatenate_payload *p = node->payload;
  int64_t first = 0;
  for (int k = 0; k < node->inputs; first += p->sizes[k], k++)
    if (autograd_needs(node, k) && !(dx[k] = orepa_slice(dy, p->axis, first, first + p->sizes[k], 1)))
      return -1;
  return 0;
}

static const autograd_op concatenate_op = {"concatenate", concatenate_backward, NULL};

static int concatenate_shape(int count, orepa_tensor *const *parts, int axis, int64_t *shape) {
  const orepa_tensor *first = parts[0];
  memcpy(shape, first->shape, sizeof first->shape);
  for (int k = 1; k < count; k++) {
    const orepa_tensor *t = parts[k];
    bool fits = t->rank == first->rank && t->dtype == first->dtype && t->storage->device == first->storage->device;
    for (int d = 0; fits && d < t->rank; d++)
      fits = d == axis || t->shape[d] == first->shape[d];
    if (!fits)
      return error_set("concatenate: part 1 is %s on '%s', part %d %s on '%s'; all but axis %d must agree",
                       tensor_text(first), first->storage->device->name, k + 1, tensor_text(t),
                       t->storage->device->name, axis + 1);
    shape[axis] += t->shape[axis];
  }
  return 0;
}

static int copy_into_slice(orepa_tensor *whole, int axis, int64_t first, orepa_tensor *part) {
  orepa_tensor *place = orepa_slice(whole, axis, first, first + part->shape[axis], 1);
  int failed = !place || tensor_copy_into(place, part);
  orepa_release(place);
  return failed ? -1 : 0;
}

orepa_tensor *orepa_concatenate(int count, orepa_tensor *const *parts, int axis) {
  if (count < 1) {
    error_set("concatenate: there is nothing to put together");
    return NULL;
  }
  int64_t shape[OREPA_MAX_RANK], first = 0;
  axis = shape_axis("concatenate", parts[0]->rank, axis);
  if (axis < 0 || concatenate_shape(count, parts, axis, shape))
    return NULL;
  orepa_tensor *y = tensor_new(parts[0]->dtype, parts[0]->storage->device, parts[0]->rank, shape);
  if (!y)
    return NULL;
  bool was = orepa_set_grad_enabled(false);
  int failed = 0;
  for (int k = 0; k < count && !failed; first += parts[k]->shape[axis], k++)
    failed = copy_into_slice(y, axis, first, parts[k]);
  orepa_set_grad_enabled(was);
  autograd_node *node = NULL;
  size_t payload = sizeof(concatenate_payload) + (size_t)count * sizeof(int64_t);
  if (failed || autograd_record(&concatenate_op, y, parts, count, 0, payload, &node))
    return tensor_fail(y);
  if (node) {
    concatenate_payload *p = node->payload;
    p->axis = axis;
    for (int k = 0; k < count; k++)
      p->sizes[k] = parts[k]->shape[axis];
  }
  return y;
}

/* ---- pad ---- */

typedef struct {
  int64_t before[OREPA_MAX_RANK], after[OREPA_MAX_RANK];
} pad_payload;

static int pad_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const pad_payload *p = node->payload;
  int64_t before[OREPA_MAX_RANK], after[OREPA_MAX_RANK];
  for (int d = 0; d < dy->rank; d++) {
    before[d] = -p->before[d];
    after[d] = -p->after[d];
  }
  dx[0] = orepa_pad(dy, before, after, OPERAND_NUMBER(0));
  return dx[0] ? 0 : -1;
}

static const autograd_op pad_op = {"pad", pad_backward, NULL};

/* The parts of y and x that are the same elements. */
static int pad_views(orepa_tensor **y, orepa_tensor **x, const int64_t *before, const int64_t *after) {
  for (int d = 0; d < (*x)->rank; d++) {
    int64_t size = (*x)->shape[d], cut = before[d] < 0 ? -before[d] : 0, end = after[d] < 0 ? size + after[d] : size;
    int64_t place = before[d] < 0 ? 0 : before[d];
    orepa_tensor *from = orepa_slice(*x, d, cut, end < cut ? cut : end, 1);
    orepa_tensor *to = from ? orepa_slice(*y, d, place, place + from->shape[d], 1) : NULL;
    orepa_release(*x);
    orepa_release(*y);
    *x = from;
    *y = to;
    if (!to)
      return -1;
  }
  return 0;
}

orepa_tensor *orepa_pad(orepa_tensor *x, const int64_t *before, const int64_t *after, orepa_operand value) {
  int64_t shape[OREPA_MAX_RANK];
  for (int d = 0; d < x->rank; d++) {
    shape[d] = x->shape[d] + before[d] + after[d];
    if (shape[d] < 0 || -before[d] > x->shape[d] || -after[d] > x->shape[d]) {
      error_set("pad: %lld before and %lld after leave nothing of an axis of size %lld (input %s)",
                (long long)before[d], (long long)after[d], (long long)x->shape[d], shape_text(x->rank, x->shape));
      return NULL;
    }
  }
  orepa_tensor *y = orepa_full_of(x->dtype, x->storage->device, x->rank, shape, value);
  if (!y)
    return NULL;
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *from = orepa_retain(x), *to = orepa_retain(y);
  int failed = pad_views(&to, &from, before, after) || tensor_copy_into(to, from);
  orepa_release(from);
  orepa_release(to);
  orepa_set_grad_enabled(was);
  autograd_node *node = NULL;
  if (failed || autograd_record(&pad_op, y, &x, 1, 0, sizeof(pad_payload), &node))
    return tensor_fail(y);
  if (node) {
    pad_payload *p = node->payload;
    memcpy(p->before, before, (size_t)x->rank * sizeof *before);
    memcpy(p->after, after, (size_t)x->rank * sizeof *after);
  }
  return y;
}
