/* index.c: elements found by integers: gather, its special case of one list for all, and its reverse. */
#include <string.h>

#include "ops/ops.h"

typedef struct {
  int axis, rank;
  int64_t shape[OREPA_MAX_RANK]; /* of what is read, or added to */
} index_payload;

/* ---- checks ---- */

static int check_index(const char *op, const orepa_tensor *t, const orepa_tensor *index) {
  if (index->dtype != OREPA_INT64 || index->storage->device != t->storage->device)
    return error_set("%s: the index is %s on '%s'; int64 on '%s' expected", op, tensor_text(index),
                     index->storage->device->name, t->storage->device->name);
  return 0;
}

/* The index fits inside t along all other axes. */
static int check_inside(const char *op, const orepa_tensor *t, const orepa_tensor *index, int axis) {
  bool fits = index->rank == t->rank;
  for (int d = 0; fits && d < t->rank; d++)
    fits = d == axis || index->shape[d] <= t->shape[d];
  return fits ? 0
              : error_set("%s: an index of %s does not fit %s along dimension %d", op,
                          shape_text(index->rank, index->shape), tensor_text(t), axis + 1);
}

/* What a kernel found out of range. */
static int check_offence(const char *op, const orepa_device *device, int axis, int64_t size) {
  int64_t value, position;
  if (!op_offence(device, &value, &position))
    return 0;
  return error_set("%s: %lld, at position %lld of dimension %d of the index, is outside 0 ... %lld", op,
                   (long long)value, (long long)position + 1, axis + 1, (long long)size - 1);
}

/* ---- kernels ---- */

static int gather_into(const char *op, orepa_tensor *y, orepa_tensor *x, orepa_tensor *index, int axis) {
  device_array to, from, named;
  if (tensor_reads(x, &from) || tensor_reads(index, &named) || tensor_writes(y, &to) ||
      DISPATCH(op, x->dtype, x->storage->device, gather, axis, &to, &from, &named))
    return -1;
  return check_offence(op, x->storage->device, axis, x->shape[axis]);
}

static int add_into(const char *op, orepa_tensor *y, orepa_tensor *x, orepa_tensor *index, int axis) {
  device_array to, from, named;
  if (tensor_reads(x, &from) || tensor_reads(index, &named) || tensor_writes(y, &to) ||
      DISPATCH(op, y->dtype, y->storage->device, scatter_add, axis, &to, &from, &named))
    return -1;
  return check_offence(op, y->storage->device, axis, y->shape[axis]);
}

/* Short floats are added up in float32. */
static orepa_dtype sum_type(orepa_dtype dtype) {
  return dtype == OREPA_BFLOAT16 || dtype == OREPA_FLOAT16 ? OREPA_FLOAT32 : dtype;
}

/* ---- gather ---- */

static int gather_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const index_payload *p = node->payload;
  orepa_tensor *index = autograd_saved_tensor(node, 0);
  const orepa_device *device = dy->storage->device;
  orepa_tensor *sum = index ? orepa_full(sum_type(dy->dtype), device, p->rank, p->shape, 0) : NULL;
  orepa_tensor *wide = sum ? orepa_to(dy, sum->dtype, device) : NULL;
  if (wide && !add_into("gather's gradient", sum, wide, index, p->axis))
    dx[0] = orepa_to(sum, dy->dtype, device);
  orepa_release(wide);
  orepa_release(sum);
  return dx[0] ? 0 : -1;
}

static const autograd_op gather_op = {.name = "gather", .backward = gather_backward};

static orepa_tensor *gathered(const char *op, orepa_tensor *x, orepa_tensor *index, int axis) {
  autograd_node *node = NULL;
  orepa_tensor *y = tensor_new(x->dtype, x->storage->device, index->rank, index->shape);
  if (!y)
    return NULL;
  if (gather_into(op, y, x, index, axis) || autograd_record(&gather_op, y, &x, 1, 1, sizeof(index_payload), &node))
    return tensor_fail(y);
  if (node) {
    index_payload *p = node->payload;
    p->axis = axis;
    p->rank = x->rank;
    memcpy(p->shape, x->shape, sizeof p->shape);
    autograd_save(node, 0, index);
  }
  return y;
}

orepa_tensor *orepa_gather(orepa_tensor *x, int axis, orepa_tensor *index) {
  axis = shape_axis("gather", x->rank, axis);
  if (axis < 0 || check_index("gather", x, index) || check_inside("gather", x, index, axis))
    return NULL;
  return gathered("gather", x, index, axis);
}

/* ---- one list for all ---- */

/* The list under the shape of what it selects: a view that repeats it. */
static orepa_tensor *repeated(orepa_tensor *list, const orepa_tensor *x, int axis) {
  int64_t shape[OREPA_MAX_RANK];
  for (int d = 0; d < x->rank; d++)
    shape[d] = d == axis ? list->shape[0] : 1;
  orepa_tensor *column = orepa_reshape(list, x->rank, shape);
  memcpy(shape, x->shape, sizeof shape);
  shape[axis] = list->shape[0];
  orepa_tensor *whole = column ? orepa_expand(column, x->rank, shape) : NULL;
  orepa_release(column);
  return whole;
}

orepa_tensor *orepa_index_select(orepa_tensor *x, int axis, orepa_tensor *list) {
  axis = shape_axis("index_select", x->rank, axis);
  if (axis < 0 || check_index("index_select", x, list))
    return NULL;
  if (list->rank != 1) {
    error_set("index_select: the index is %s; a list expected", tensor_text(list));
    return NULL;
  }
  orepa_tensor *index = repeated(list, x, axis), *y = index ? gathered("index_select", x, index, axis) : NULL;
  orepa_release(index);
  return y;
}

/* ---- scatter_add ---- */

static int scatter_add_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const index_payload *p = node->payload;
  orepa_tensor *index = autograd_saved_tensor(node, 0);
  if (!index)
    return -1;
  if (autograd_needs(node, 0))
    dx[0] = orepa_retain(dy);
  if (!autograd_needs(node, 1))
    return 0;
  dx[1] = tensor_new(dy->dtype, dy->storage->device, index->rank, index->shape);
  return !dx[1] || gather_into("scatter_add's gradient", dx[1], dy, index, p->axis) ? -1 : 0;
}

static const autograd_op scatter_add_op = {.name = "scatter_add", .backward = scatter_add_backward};

static int check_source(const orepa_tensor *t, const orepa_tensor *index, const orepa_tensor *source) {
  if (!shape_equal(source, index) || source->dtype != t->dtype || source->storage->device != t->storage->device)
    return error_set("scatter_add: the source is %s on '%s'; %s %s on '%s', as the index, expected",
                     tensor_text(source), source->storage->device->name, orepa_dtype_name(t->dtype),
                     shape_text(index->rank, index->shape), t->storage->device->name);
  return 0;
}

orepa_tensor *orepa_scatter_add(orepa_tensor *t, int axis, orepa_tensor *index, orepa_tensor *source) {
  axis = shape_axis("scatter_add", t->rank, axis);
  if (axis < 0 || check_index("scatter_add", t, index) || check_inside("scatter_add", t, index, axis) ||
      check_source(t, index, source))
    return NULL;
  const orepa_device *device = t->storage->device;
  orepa_dtype wide = sum_type(t->dtype);
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *sum = t->dtype == wide ? orepa_clone(t) : orepa_to(t, wide, device);
  orepa_tensor *more = sum ? orepa_to(source, wide, device) : NULL;
  orepa_tensor *y = more && !add_into("scatter_add", sum, more, index, axis) ? orepa_to(sum, t->dtype, device) : NULL;
  orepa_release(sum);
  orepa_release(more);
  orepa_set_grad_enabled(was);
  autograd_node *node = NULL;
  if (!y || autograd_record(&scatter_add_op, y, (orepa_tensor *[]){t, source}, 2, 1, sizeof(index_payload), &node))
    return y ? tensor_fail(y) : NULL;
  if (node) {
    ((index_payload *)node->payload)->axis = axis;
    autograd_save(node, 0, index);
  }
  return y;
}
