/* norm_promise.c: a norm's map that waits: how it is filled, how addition and ReLU make it longer, and the gradient of
 * that ReLU, which waits as well. */
#include "ops/norm_promise.h"

#include "ops/gradient_promise.h"

/* ---- filling ---- */

static int norm_fill(promise *base, const device_array *map) {
  const norm_promise *p = (const norm_promise *)base;
  device_array y, r, r_scale, r_shift;
  device_prologue own;
  if (norm_promise_reads(p, &y, &own) || (p->r && tensor_reads(p->r, &r)) ||
      (p->r_scale && (tensor_reads(p->r_scale, &r_scale) || tensor_reads(p->r_shift, &r_shift))))
    return -1;
  return DISPATCH("batch_norm", map->dtype, base->map.storage->device, norm_apply, map, &y, &own.scale, &own.shift,
                  p->r ? &r : NULL, p->r_scale ? &r_scale : NULL, p->r_scale ? &r_shift : NULL, p->relu);
}

static void norm_dispose(promise *base) {
  norm_promise *p = (norm_promise *)base;
  orepa_release(p->scale);
  orepa_release(p->shift);
  orepa_release(p->r_scale);
  orepa_release(p->r_shift);
}

static const promise_kind norm_kind = {norm_fill, norm_dispose};

/* ---- asking ---- */

const norm_promise *norm_promise_of(const orepa_tensor *t) {
  return (const norm_promise *)promise_of(t, &norm_kind);
}

const norm_promise *norm_promise_prologue(const orepa_tensor *t) {
  const norm_promise *p = norm_promise_of(t);
  return p && !p->r ? p : NULL;
}

int norm_promise_reads(const norm_promise *p, device_array *y, device_prologue *prologue) {
  prologue->relu = p->relu;
  return tensor_reads(p->y, y) || tensor_reads(p->scale, &prologue->scale) || tensor_reads(p->shift, &prologue->shift)
             ? -1
             : 0;
}

/* ---- making ---- */

static orepa_tensor *retained(orepa_tensor *t) {
  return t ? orepa_retain(t) : NULL;
}

static orepa_tensor *promised(const norm_promise *terms) {
  orepa_tensor *z = tensor_like(terms->y);
  if (!z)
    return NULL;
  norm_promise *p = (norm_promise *)promise_make(z, &norm_kind, sizeof *p, (orepa_tensor *[]){terms->y, terms->r}, 2);
  if (!p)
    return tensor_fail(z);
  p->y = p->base.sources[0];
  p->r = p->base.sources[1];
  p->scale = orepa_retain(terms->scale);
  p->shift = orepa_retain(terms->shift);
  p->r_scale = retained(terms->r_scale);
  p->r_shift = retained(terms->r_shift);
  p->relu = terms->relu;
  return z;
}

/* Whether the device normalises maps of this type at all: asked with a map of no rows, so that the error is the norm's
 * and not its reader's. */
static int check_type(orepa_tensor *y, orepa_tensor *scale, orepa_tensor *shift) {
  device_array map, factor, added;
  if (tensor_reads(scale, &factor) || tensor_reads(shift, &added))
    return -1;
  tensor_outline(y, &map);
  map.shape[0] = 0;
  return DISPATCH("batch_norm", y->dtype, y->storage->device, norm_apply, &map, &map, &factor, &added, NULL, NULL, NULL,
                  false);
}

orepa_tensor *norm_promise_new(orepa_tensor *y, orepa_tensor *scale, orepa_tensor *shift) {
  if (check_type(y, scale, shift))
    return NULL;
  return promised(&(norm_promise){.y = y, .scale = scale, .shift = shift});
}

/* Of a promise to which something can still be added. */
static const norm_promise *open_promise(const orepa_tensor *t) {
  const norm_promise *p = t ? norm_promise_prologue(t) : NULL;
  return p && !p->relu ? p : NULL;
}

static int extend_by_addition(orepa_tensor *a, orepa_tensor *b, orepa_tensor **sum) {
  const norm_promise *p = open_promise(a);
  orepa_tensor *other = p ? b : a;
  if (!p && !(p = open_promise(b)))
    return 0;
  if (!other || other->dtype != p->y->dtype || other->storage->device != p->y->storage->device ||
      !shape_equal(other, p->y) || !orepa_is_contiguous(other))
    return 0;
  norm_promise terms = {.y = p->y, .scale = p->scale, .shift = p->shift};
  const norm_promise *second = open_promise(other);
  if (second) {
    terms.r = second->y;
    terms.r_scale = second->scale;
    terms.r_shift = second->shift;
  } else {
    terms.r = other;
    if (tensor_materialize(other)) /* promises read stored maps */
      return -1;
  }
  *sum = promised(&terms);
  return *sum ? 0 : -1;
}

static int extend_by_relu(orepa_tensor *x, orepa_tensor **z) {
  const norm_promise *p = x ? norm_promise_of(x) : NULL;
  if (!p || p->relu)
    return 0;
  norm_promise terms = *p;
  terms.relu = true;
  *z = promised(&terms);
  return *z ? 0 : -1;
}

int norm_promise_extend(orepa_function f, const orepa_operand *operands, orepa_tensor **result) {
  *result = NULL;
  if (!promises_made())
    return 0;
  if (f == FUNCTION_add)
    return extend_by_addition(operands[0].tensor, operands[1].tensor, result);
  return f == FUNCTION_relu ? extend_by_relu(operands[0].tensor, result) : 0;
}

/* ---- the ReLU's gradient ---- */

/* Its result; and, where nothing was added, what the result is made of, so that the mask needs no map of its own. */
enum { RESULT, NORM_Y, NORM_SCALE, NORM_SHIFT, RELU_SLOTS };

/* As it was saved; NULL if it was not, or was changed since. */
static orepa_tensor *unchanged(autograd_node *node, int slot) {
  autograd_saved *saved = &node->saved[slot];
  tensor_storage *storage = saved->tensor.storage;
  return storage && storage->version == saved->version ? &saved->tensor : NULL;
}

static int relu_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  orepa_tensor *z = autograd_saved_tensor(node, RESULT), *y = unchanged(node, NORM_Y);
  if (!z)
    return -1;
  dx[0] = y ? gradient_promise_mask(dy, z, y, &node->saved[NORM_SCALE].tensor, &node->saved[NORM_SHIFT].tensor)
            : gradient_promise_mask(dy, z, NULL, NULL, NULL);
  return dx[0] ? 0 : -1;
}

static const autograd_op relu_op = {"relu", relu_backward, NULL};

int norm_promise_record_relu(orepa_tensor *x, orepa_tensor *z) {
  autograd_node *node;
  const norm_promise *p = norm_promise_prologue(z);
  if (autograd_record(&relu_op, z, &x, 1, RELU_SLOTS, 0, &node))
    return -1;
  if (!node)
    return 0;
  node->takes_sums = true;
  autograd_save(node, RESULT, z);
  if (p) {
    autograd_save(node, NORM_Y, p->y);
    autograd_save(node, NORM_SCALE, p->scale);
    autograd_save(node, NORM_SHIFT, p->shift);
  }
  return 0;
}
