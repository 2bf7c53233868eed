/* copy.c: writing into a tensor: fill and copy, with gradients; and small checks that all ops share. */
#include "ops/ops.h"

int op_same_kind(const char *op, int count, orepa_tensor *const *tensors, const char *const *names) {
  const orepa_tensor *first = NULL;
  for (int k = 0; k < count; k++) {
    const orepa_tensor *t = tensors[k];
    if (!t)
      continue;
    if (!first)
      first = t;
    if (t->storage->device != first->storage->device)
      return error_set("%s: the %s is on '%s', the %s on '%s'", op, names[0], first->storage->device->name, names[k],
                       t->storage->device->name);
    if (t->dtype != first->dtype)
      return error_set("%s: the %s is %s, the %s %s; convert one with to()", op, names[0],
                       orepa_dtype_name(first->dtype), names[k], orepa_dtype_name(t->dtype));
  }
  return 0;
}

orepa_tensor *op_dense(orepa_tensor *t) {
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *dense = orepa_contiguous(t);
  orepa_set_grad_enabled(was);
  return dense;
}

/* ---- copy_: what was there has no gradient any more, all of it goes to the source ---- */

/* What the source was. */
typedef struct {
  orepa_dtype dtype;
  const orepa_device *device;
  int rank;
  int64_t shape[OREPA_MAX_RANK];
} copy_payload;

static copy_payload payload_of(const orepa_tensor *src) {
  copy_payload p = {.dtype = src->dtype, .device = src->storage->device, .rank = src->rank};
  for (int d = 0; d < src->rank; d++)
    p.shape[d] = src->shape[d];
  return p;
}

/* The source's gradient, from that of what was written. */
static orepa_tensor *source_gradient(const copy_payload *p, orepa_tensor *dy) {
  orepa_tensor *sum = op_sum_to(dy, p->rank, p->shape);
  orepa_tensor *dx = sum ? orepa_to(sum, p->dtype, p->device) : NULL;
  orepa_release(sum);
  return dx;
}

static int copy_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  dx[0] = source_gradient(node->payload, dy);
  return dx[0] ? 0 : -1;
}

static const autograd_op copy_op = {"copy_", copy_backward, NULL};

int orepa_copy_(orepa_tensor *dst, orepa_tensor *src) {
  bool recorded = autograd_wanted(&src, 1) && orepa_dtype_is_float(dst->dtype);
  bool history = orepa_grad_enabled() && dst->requires_grad; /* of dst: cut off, so a leaf must refuse */
  if (autograd_check_in_place("copy", dst, recorded || history))
    return -1;
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *here = orepa_to(src, src->dtype, dst->storage->device);
  orepa_tensor *own = here && here->storage == dst->storage ? orepa_clone(here) : here ? orepa_retain(here) : NULL;
  orepa_tensor *shaped = own ? orepa_expand(own, dst->rank, dst->shape) : NULL;
  if (own && !shaped)
    error_prefix("copy_: ");
  int failed = !shaped || tensor_copy_into(dst, shaped);
  orepa_release(shaped);
  orepa_release(own);
  orepa_release(here);
  orepa_set_grad_enabled(was);
  if (failed || !(recorded || history))
    return failed ? -1 : 0;
  orepa_tensor *made = orepa_detach(dst);
  autograd_node *node = NULL;
  if (!made || autograd_record(&copy_op, made, &src, 1, 0, sizeof(copy_payload), &node)) {
    orepa_release(made);
    return -1;
  }
  if (node)
    *(copy_payload *)node->payload = payload_of(src);
  autograd_rebase(dst, made);
  orepa_release(made);
  return 0;
}

int orepa_fill_of_(orepa_tensor *dst, orepa_operand number) {
  bool history = orepa_grad_enabled() && dst->requires_grad;
  if (autograd_check_in_place("fill", dst, history) || tensor_fill(dst, number))
    return -1;
  if (history) { /* a constant now */
    orepa_tensor *made = orepa_detach(dst);
    if (!made)
      return -1;
    autograd_rebase(dst, made);
    orepa_release(made);
  }
  return 0;
}

int orepa_fill_(orepa_tensor *dst, double value) {
  return orepa_fill_of_(dst, OPERAND_NUMBER(value));
}

/* ---- assignment to a part: what stood there has no gradient, the rest keeps its own ---- */

typedef struct {
  int axis;
  int64_t first, last;
  bool selects; /* the source has no such axis */
  copy_payload source;
} assign_payload;

static int assign_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const assign_payload *p = node->payload;
  orepa_tensor *part =
      p->selects ? orepa_select(dy, p->axis, p->first) : orepa_slice(dy, p->axis, p->first, p->last, 1);
  int failed = !part;
  if (!failed && autograd_needs(node, 1)) {
    dx[1] = source_gradient(&p->source, part);
    failed = !dx[1];
    if (dx[1] && dx[1]->storage == dy->storage) { /* its own memory: dy's is about to change */
      orepa_tensor *own = orepa_clone(dx[1]);
      orepa_release(dx[1]);
      failed = !(dx[1] = own);
    }
  }
  orepa_release(part);
  if (!failed && autograd_needs(node, 0)) {
    dx[0] = orepa_clone(dy);
    orepa_tensor *gone = dx[0] ? orepa_slice(dx[0], p->axis, p->first, p->last, 1) : NULL;
    failed = !gone || tensor_fill(gone, OPERAND_NUMBER(0));
    orepa_release(gone);
  }
  return failed ? -1 : 0;
}

static const autograd_op assign_op = {"assign_", assign_backward, NULL};

/* Copies src into the part; `selects` tells whether it lacks the axis. */
static int write_part(orepa_tensor *dst, int axis, int64_t first, int64_t last, orepa_tensor *src, bool selects) {
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *part = selects ? orepa_select(dst, axis, first) : orepa_slice(dst, axis, first, last, 1);
  orepa_tensor *here = part ? orepa_to(src, src->dtype, dst->storage->device) : NULL;
  orepa_tensor *own = here && here->storage == dst->storage ? orepa_clone(here) : here ? orepa_retain(here) : NULL;
  orepa_tensor *shaped = own ? orepa_expand(own, part->rank, part->shape) : NULL;
  if (own && !shaped)
    error_prefix("assign_: ");
  int failed = !shaped || tensor_copy_into(part, shaped);
  orepa_release(shaped);
  orepa_release(own);
  orepa_release(here);
  orepa_release(part);
  orepa_set_grad_enabled(was);
  return failed ? -1 : 0;
}

int orepa_assign_(orepa_tensor *dst, int axis, int64_t first, int64_t last, orepa_tensor *src) {
  orepa_tensor *inputs[2] = {dst, src};
  bool recorded = orepa_dtype_is_float(dst->dtype) && autograd_wanted(inputs, 2);
  axis = shape_axis("assign_", dst->rank, axis);
  if (axis < 0 || autograd_check_in_place("assign", dst, recorded))
    return -1;
  if (first < 0 || first > last || last > dst->shape[axis])
    return error_set("assign_: positions %lld to %lld don't fit an axis of size %lld (tensor %s)", (long long)first + 1,
                     (long long)last, (long long)dst->shape[axis], shape_text(dst->rank, dst->shape));
  bool selects = last == first + 1 && src->rank < dst->rank;
  if (!recorded)
    return write_part(dst, axis, first, last, src, selects);
  orepa_tensor *made = orepa_detach(dst);
  autograd_node *node = NULL;
  int failed = !made || write_part(dst, axis, first, last, src, selects) ||
               autograd_record(&assign_op, made, inputs, 2, 0, sizeof(assign_payload), &node);
  if (node)
    *(assign_payload *)node->payload = (assign_payload){axis, first, last, selects, payload_of(src)};
  if (!failed)
    autograd_rebase(dst, made);
  orepa_release(made);
  return failed ? -1 : 0;
}
