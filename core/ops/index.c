/* index.c: elements found by integers: gather and its reverse, and what both are where one list serves all. */
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

static int scatter_into(const char *op, bool adds, orepa_tensor *y, orepa_tensor *x, orepa_tensor *index, int axis) {
  device_array to, from, named;
  if (tensor_reads(x, &from) || tensor_reads(index, &named) || tensor_writes(y, &to) ||
      DISPATCH(op, y->dtype, y->storage->device, scatter, adds, axis, &to, &from, &named))
    return -1;
  return check_offence(op, y->storage->device, axis, y->shape[axis]);
}

/* ---- gather ---- */

static int gather_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const index_payload *p = node->payload;
  orepa_tensor *index = autograd_saved_tensor(node, 0);
  const orepa_device *device = dy->storage->device;
  orepa_tensor *sum = index ? orepa_full(op_sum_dtype(dy->dtype), device, p->rank, p->shape, 0) : NULL;
  orepa_tensor *wide = sum ? orepa_to(dy, sum->dtype, device) : NULL;
  if (wide && !scatter_into("gather's gradient", true, sum, wide, index, p->axis))
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

static int check_list(const char *op, const orepa_tensor *list) {
  return list->rank == 1 ? 0 : error_set("%s: the index is %s; a list expected", op, tensor_text(list));
}

orepa_tensor *orepa_index_select(orepa_tensor *x, int axis, orepa_tensor *list) {
  axis = shape_axis("index_select", x->rank, axis);
  if (axis < 0 || check_index("index_select", x, list) || check_list("index_select", list))
    return NULL;
  orepa_tensor *index = repeated(list, x, axis), *y = index ? gathered("index_select", x, index, axis) : NULL;
  orepa_release(index);
  return y;
}

/* ---- scatter: what the source has goes, or is added, where the index says ---- */

/* The gradient of what was added. */
static orepa_tensor *added_gradient(orepa_tensor *dy, orepa_tensor *index, int axis) {
  orepa_tensor *dx = tensor_new(dy->dtype, dy->storage->device, index->rank, index->shape);
  return dx && gather_into("scatter's gradient", dx, dy, index, axis) ? tensor_fail(dx) : dx;
}

static int scatter_add_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const index_payload *p = node->payload;
  orepa_tensor *index = autograd_saved_tensor(node, 0);
  if (!index)
    return -1;
  if (autograd_needs(node, 0))
    dx[0] = orepa_retain(dy);
  if (autograd_needs(node, 1))
    dx[1] = added_gradient(dy, index, p->axis);
  return autograd_needs(node, 1) && !dx[1] ? -1 : 0;
}

/* Positions along the axis, as a view of the index's shape. */
static orepa_tensor *places_of(orepa_tensor *index, int axis) {
  int64_t shape[OREPA_MAX_RANK];
  for (int d = 0; d < index->rank; d++)
    shape[d] = d == axis ? index->shape[d] : 1;
  orepa_tensor *list = orepa_arange(OREPA_INT64, index->storage->device, 0, 1, index->shape[axis]);
  orepa_tensor *column = list ? orepa_reshape(list, index->rank, shape) : NULL;
  orepa_tensor *places = column ? orepa_expand(column, index->rank, index->shape) : NULL;
  orepa_release(list);
  orepa_release(column);
  return places;
}

/* Whether an element of the source is the one that stayed: bool, of the index's shape. */
static orepa_tensor *stayed(const index_payload *p, orepa_tensor *index) {
  orepa_tensor *places = places_of(index, p->axis), *found = NULL, *mask = NULL;
  orepa_tensor *last = places ? orepa_full(OREPA_INT64, index->storage->device, p->rank, p->shape, 0) : NULL;
  if (last && !scatter_into("scatter's gradient", false, last, places, index, p->axis))
    found = orepa_gather(last, p->axis, index);
  if (found)
    mask = op_apply2(FUNCTION_eq, OPERAND(found), OPERAND(places));
  orepa_release(places);
  orepa_release(last);
  orepa_release(found);
  return mask;
}

/* dy where nothing was written, else 0. */
static orepa_tensor *untouched_gradient(orepa_tensor *dy, orepa_tensor *index, int axis) {
  orepa_tensor *zero = orepa_full(dy->dtype, dy->storage->device, 0, NULL, 0);
  orepa_tensor *zeros = zero ? orepa_expand(zero, index->rank, index->shape) : NULL;
  orepa_tensor *dx = zeros ? orepa_clone(dy) : NULL;
  if (dx && scatter_into("scatter's gradient", false, dx, zeros, index, axis))
    dx = tensor_fail(dx);
  orepa_release(zeros);
  orepa_release(zero);
  return dx;
}

static orepa_tensor *written_gradient(const index_payload *p, orepa_tensor *dy, orepa_tensor *index) {
  orepa_tensor *there = added_gradient(dy, index, p->axis), *mask = there ? stayed(p, index) : NULL;
  orepa_tensor *dx = NULL;
  if (mask)
    dx = orepa_apply(FUNCTION_where, (orepa_operand[]){OPERAND(mask), OPERAND(there), OPERAND_NUMBER(0)});
  orepa_release(there);
  orepa_release(mask);
  return dx;
}

static int scatter_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const index_payload *p = node->payload;
  orepa_tensor *index = autograd_saved_tensor(node, 0);
  if (!index)
    return -1;
  if (autograd_needs(node, 0) && !(dx[0] = untouched_gradient(dy, index, p->axis)))
    return -1;
  return autograd_needs(node, 1) && !(dx[1] = written_gradient(p, dy, index)) ? -1 : 0;
}

static const autograd_op scatter_op = {.name = "scatter", .backward = scatter_backward};
static const autograd_op scatter_add_op = {.name = "scatter_add", .backward = scatter_add_backward};
static const autograd_op scatter_in_place_op = {.name = "scatter_", .backward = scatter_backward};

static int check_scatter(const char *op, const orepa_tensor *t, int axis, const orepa_tensor *index,
                         const orepa_tensor *source) {
  if (axis < 0 || check_index(op, t, index) || check_inside(op, t, index, axis))
    return -1;
  if (!shape_equal(source, index) || source->dtype != t->dtype || source->storage->device != t->storage->device)
    return error_set("%s: the source is %s on '%s'; %s %s on '%s', as the index, expected", op, tensor_text(source),
                     source->storage->device->name, orepa_dtype_name(t->dtype), shape_text(index->rank, index->shape),
                     t->storage->device->name);
  return 0;
}

/* What scatter makes of y, of whose history inputs[0] is the end, is recorded. */
static int record_scatter(const autograd_op *op, orepa_tensor *y, orepa_tensor *const *inputs, int axis,
                          orepa_tensor *index) {
  autograd_node *node = NULL;
  if (autograd_record(op, y, inputs, 2, 1, sizeof(index_payload), &node))
    return -1;
  if (node) {
    index_payload *p = node->payload;
    p->axis = axis;
    p->rank = y->rank;
    memcpy(p->shape, y->shape, sizeof p->shape);
    autograd_save(node, 0, index);
  }
  return 0;
}

static orepa_tensor *scatter(const autograd_op *op, bool adds, orepa_tensor *t, int axis, orepa_tensor *index,
                             orepa_tensor *source) {
  axis = shape_axis(op->name, t->rank, axis);
  if (check_scatter(op->name, t, axis, index, source))
    return NULL;
  const orepa_device *device = t->storage->device;
  orepa_dtype wide = adds ? op_sum_dtype(t->dtype) : t->dtype;
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *changed = t->dtype == wide ? orepa_clone(t) : orepa_to(t, wide, device);
  orepa_tensor *more = changed ? orepa_to(source, wide, device) : NULL, *y = NULL;
  if (more && !scatter_into(op->name, adds, changed, more, index, axis))
    y = orepa_to(changed, t->dtype, device);
  orepa_release(changed);
  orepa_release(more);
  orepa_set_grad_enabled(was);
  return y && record_scatter(op, y, (orepa_tensor *[]){t, source}, axis, index) ? tensor_fail(y) : y;
}

orepa_tensor *orepa_scatter(orepa_tensor *t, int axis, orepa_tensor *index, orepa_tensor *source) {
  return scatter(&scatter_op, false, t, axis, index, source);
}

orepa_tensor *orepa_scatter_add(orepa_tensor *t, int axis, orepa_tensor *index, orepa_tensor *source) {
  return scatter(&scatter_add_op, true, t, axis, index, source);
}

/* What is read while t is written: a copy if it is in t's memory. */
static orepa_tensor *apart_from(const orepa_tensor *t, orepa_tensor *read) {
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *own = read->storage == t->storage ? orepa_clone(read) : orepa_retain(read);
  orepa_set_grad_enabled(was);
  return own;
}

int orepa_scatter_(orepa_tensor *t, int axis, orepa_tensor *index, orepa_tensor *source) {
  orepa_tensor *inputs[2] = {t, source};
  bool recorded = orepa_dtype_is_float(t->dtype) && autograd_wanted(inputs, 2);
  axis = shape_axis("scatter_", t->rank, axis);
  if (check_scatter("scatter_", t, axis, index, source) || autograd_check_in_place("scatter", t, recorded))
    return -1;
  orepa_tensor *own = apart_from(t, source), *named = own ? apart_from(t, index) : NULL;
  orepa_tensor *made = named ? orepa_detach(t) : NULL;
  int failed = !made || scatter_into("scatter_", false, made, own, named, axis) ||
               (recorded && record_scatter(&scatter_in_place_op, made, inputs, axis, named));
  if (!failed && recorded)
    autograd_rebase(t, made);
  orepa_release(made);
  orepa_release(named);
  orepa_release(own);
  return failed ? -1 : 0;
}

int orepa_index_copy_(orepa_tensor *t, int axis, orepa_tensor *list, orepa_tensor *source) {
  axis = shape_axis("index_copy_", t->rank, axis);
  if (axis < 0 || check_index("index_copy_", t, list) || check_list("index_copy_", list))
    return -1;
  orepa_tensor *index = repeated(list, t, axis);
  orepa_tensor *fitting = index ? orepa_to(source, t->dtype, t->storage->device) : NULL;
  orepa_tensor *whole = fitting ? orepa_expand(fitting, index->rank, index->shape) : NULL;
  if (fitting && !whole)
    error_prefix("index_copy_: ");
  int failed = !whole || orepa_scatter_(t, axis, index, whole);
  orepa_release(whole);
  orepa_release(fitting);
  orepa_release(index);
  return failed ? -1 : 0;
}
