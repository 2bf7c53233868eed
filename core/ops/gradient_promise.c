/* gradient_promise.c: gradients that wait for a norm's backward: how they are filled if somebody else reads them, and
 * what they are as that kernel's argument. */
#include "ops/gradient_promise.h"

/* ---- filling, by the separate kernels ---- */

static int add_into(const device_array *to, orepa_tensor *a, orepa_tensor *b) {
  device_array sources[ELEMENTWISE_MAX_SOURCES] = {{0}};
  const device_number numbers[ELEMENTWISE_MAX_SOURCES] = {{0}};
  if (tensor_reads(a, &sources[0]) || tensor_reads(b, &sources[1]))
    return -1;
  return DISPATCH("add", a->dtype, a->storage->device, elementwise, FUNCTION_add, 0, to, sources, numbers);
}

static int unpool_into(const device_array *to, const gradient_promise *p) {
  device_array dy, indices;
  if (tensor_reads(p->dy, &dy) || tensor_reads(p->indices, &indices))
    return -1;
  return DISPATCH("max_pool2d's gradient", dy.dtype, p->dy->storage->device, max_pool_backward, &p->windows, to, &dy,
                  &indices);
}

static int mask_into(const device_array *to, const device_array *dy, orepa_tensor *result) {
  device_array sources[ELEMENTWISE_MAX_SOURCES] = {*dy};
  const device_number numbers[ELEMENTWISE_MAX_SOURCES] = {{0}};
  if (tensor_reads(result, &sources[ELEMENTWISE_MAX_SOURCES - 1]))
    return -1;
  return DISPATCH("relu's gradient", dy->dtype, result->storage->device, elementwise, FUNCTION_relu, 1, to, sources,
                  numbers);
}

static int gradient_fill(promise *base, const device_array *map) {
  const gradient_promise *p = (const gradient_promise *)base;
  device_array unmasked = *map;
  if (p->indices ? unpool_into(map, p) : p->added ? add_into(map, p->dy, p->added) : tensor_reads(p->dy, &unmasked))
    return -1;
  return p->result ? mask_into(map, &unmasked, p->result) : 0;
}

static void gradient_dispose(promise *base) {
  gradient_promise *p = (gradient_promise *)base;
  orepa_release(p->scale);
  orepa_release(p->shift);
}

static const promise_kind gradient_kind = {gradient_fill, gradient_dispose};

static gradient_promise *pending(const orepa_tensor *t) {
  return (gradient_promise *)promise_of(t, &gradient_kind);
}

/* ---- making ---- */

/* A tensor of `shape` that is promised to be what the terms say. */
static orepa_tensor *promised(const gradient_promise *terms, int rank, const int64_t *shape) {
  orepa_tensor *t = tensor_new(terms->dy->dtype, terms->dy->storage->device, rank, shape);
  orepa_tensor *sources[] = {terms->dy, terms->added, terms->indices, terms->result, terms->y};
  gradient_promise *p = t ? (gradient_promise *)promise_make(t, &gradient_kind, sizeof *p, sources, 5) : NULL;
  if (!p) {
    orepa_release(t);
    return NULL;
  }
  p->dy = p->base.sources[0];
  p->added = p->base.sources[1];
  p->indices = p->base.sources[2];
  p->result = p->base.sources[3];
  p->y = p->base.sources[4];
  p->windows = terms->windows;
  if (!p->y)
    return t;
  p->scale = orepa_detach(terms->scale); /* the given handles may be a node's own */
  p->shift = p->scale ? orepa_detach(terms->shift) : NULL;
  return p->shift ? t : tensor_fail(t);
}

int gradient_promise_sum(orepa_tensor *a, orepa_tensor *b, orepa_tensor **sum) {
  *sum = NULL;
  if (!promises_made() || a->dtype != b->dtype || a->storage->device != b->storage->device || !shape_equal(a, b) ||
      !orepa_is_contiguous(a) || !orepa_is_contiguous(b))
    return 0;
  if (tensor_materialize(a) || tensor_materialize(b)) /* promises read stored maps */
    return -1;
  *sum = promised(&(gradient_promise){.dy = a, .added = b}, a->rank, a->shape);
  return *sum ? 0 : -1;
}

orepa_tensor *gradient_promise_pool(orepa_tensor *dy, orepa_tensor *indices, const device_windows *windows,
                                    const int64_t *shape) {
  if (tensor_materialize(dy))
    return NULL;
  return promised(&(gradient_promise){.dy = dy, .indices = indices, .windows = *windows}, 4, shape);
}

orepa_tensor *gradient_promise_mask(orepa_tensor *dy, orepa_tensor *result, orepa_tensor *y, orepa_tensor *scale,
                                    orepa_tensor *shift) {
  const gradient_promise *parts = pending(dy);
  orepa_tensor *dense = op_dense(dy);
  gradient_promise terms = {.dy = dense};
  if (!dense)
    return NULL;
  if (parts && !parts->result)
    terms = *parts;
  terms.result = result;
  terms.y = y;
  terms.scale = scale;
  terms.shift = shift;
  bool stored = (parts && !parts->result) || !tensor_materialize(dense); /* promises read stored maps */
  orepa_tensor *masked = stored ? promised(&terms, result->rank, result->shape) : NULL;
  orepa_release(dense);
  return masked && !promises_made() && tensor_materialize(masked) ? tensor_fail(masked) : masked;
}

/* ---- reading ---- */

/* Whether a tensor is the map y at the place and of the shape that x is. */
static bool is_same_map(const orepa_tensor *y, const orepa_tensor *x) {
  return y->storage == x->storage && y->offset == x->offset && shape_equal(y, x) && orepa_is_contiguous(y) &&
         orepa_is_contiguous(x);
}

static bool is_held_by_others(const orepa_tensor *t) {
  return atomic_load(&t->references) > 1 || atomic_load(&t->storage->references) > 1;
}

static int mask_reads(const gradient_promise *p, const orepa_tensor *x, gradient_arrays *a) {
  if (!p->result)
    return 0;
  if (p->y && is_same_map(p->y, x)) {
    a->gradient.scale = &a->scale;
    a->gradient.shift = &a->shift;
    return tensor_reads(p->scale, &a->scale) || tensor_reads(p->shift, &a->shift) ? -1 : 0;
  }
  a->gradient.result = &a->result;
  return tensor_reads(p->result, &a->result);
}

static int parts_read(const gradient_promise *p, const orepa_tensor *x, gradient_arrays *a) {
  a->gradient = (device_gradient){.dy = &a->dy};
  if (tensor_reads(p->dy, &a->dy) || (p->added && tensor_reads(p->added, &a->added)) ||
      (p->indices && tensor_reads(p->indices, &a->indices)) || mask_reads(p, x, a))
    return -1;
  a->gradient.added = p->added ? &a->added : NULL;
  a->gradient.windows = p->indices ? &p->windows : NULL;
  a->gradient.indices = p->indices ? &a->indices : NULL;
  return 0;
}

int gradient_reads(orepa_tensor *dy, const orepa_tensor *x, gradient_arrays *a) {
  gradient_promise *p = shape_equal(dy, x) && dy->dtype == x->dtype ? pending(dy) : NULL;
  a->kept_promise = NULL;
  if (!p) {
    a->gradient = (device_gradient){.dy = &a->dy};
    return tensor_reads(dy, &a->dy);
  }
  if (parts_read(p, x, a))
    return -1;
  if (is_held_by_others(dy)) {
    if (promise_begin(&p->base, &a->kept))
      return -1;
    a->gradient.kept = &a->kept;
    a->kept_promise = p;
  }
  return 0;
}

void gradient_end(gradient_arrays *a, bool done) {
  if (a->kept_promise)
    promise_end(&a->kept_promise->base, done);
  a->kept_promise = NULL;
}
