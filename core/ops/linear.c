/* linear.c: matrix products. One op on batches of matrices; matmul and linear are views around it. */
#include <string.h>

#include "ops/ops.h"

/* ---- c (B, M, N) = a (B, M, K) . b (B, K, N) + bias (N) ---- */

static orepa_tensor *product(orepa_tensor *a, orepa_tensor *b, orepa_tensor *bias) {
  int64_t shape[3] = {a->shape[0], a->shape[1], b->shape[2]};
  orepa_tensor *c = tensor_new(a->dtype, a->storage->device, 3, shape);
  device_array left, right, added, to;
  if (!c)
    return NULL;
  if (tensor_materialize(c) || tensor_reads(a, &left) || tensor_reads(b, &right) ||
      (bias && tensor_reads(bias, &added)) || tensor_writes(c, &to) || timings_macs(orepa_count(c) * a->shape[2]) ||
      DISPATCH("matmul", a->dtype, a->storage->device, matmul, &to, &left, &right, bias ? &added : NULL))
    return tensor_fail(c);
  return c;
}

static int product_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  for (int k = 0; k < 2; k++) {
    if (!autograd_needs(node, k))
      continue;
    orepa_tensor *other = autograd_saved_tensor(node, 1 - k), *turned = other ? orepa_transpose(other, 1, 2) : NULL;
    if (turned)
      dx[k] = k == 0 ? product(dy, turned, NULL) : product(turned, dy, NULL);
    orepa_release(turned);
    if (!dx[k])
      return -1;
  }
  if (autograd_needs(node, 2)) {
    dx[2] = orepa_reduce(OREPA_SUM, dy, 2, (int[]){0, 1}, false);
    if (!dx[2])
      return -1;
  }
  return 0;
}

static const autograd_op product_op = {"matmul", product_backward, NULL};

static orepa_tensor *recorded_product(orepa_tensor *a, orepa_tensor *b, orepa_tensor *bias) {
  orepa_tensor *c = product(a, b, bias);
  autograd_node *node = NULL;
  if (!c)
    return NULL;
  if (autograd_record(&product_op, c, (orepa_tensor *[]){a, b, bias}, 3, 2, 0, &node))
    return tensor_fail(c);
  if (node) {
    autograd_save(node, 0, autograd_needs(node, 1) ? a : NULL);
    autograd_save(node, 1, autograd_needs(node, 0) ? b : NULL);
  }
  return c;
}

/* ---- matmul: leading axes broadcast, then flattened to one ---- */

/* t (..., R, C) as (B, R, C), B the product of `batch`. */
static orepa_tensor *as_batch(orepa_tensor *t, int rank, const int64_t *batch) {
  int64_t shape[OREPA_MAX_RANK];
  memcpy(shape, batch, (size_t)rank * sizeof *shape);
  shape[rank] = t->shape[t->rank - 2];
  shape[rank + 1] = t->shape[t->rank - 1];
  orepa_tensor *full = orepa_expand(t, rank + 2, shape);
  int64_t flat[3] = {shape_count(rank, batch), shape[rank], shape[rank + 1]};
  orepa_tensor *three = full ? orepa_reshape(full, 3, flat) : NULL;
  orepa_release(full);
  return three;
}

/* What nobody else sees the memory of may be changed in place. */
static orepa_tensor *no_view(orepa_tensor *t) {
  if (t) {
    t->is_view = false;
    t->storage->viewed_in_graph = false;
  }
  return t;
}

orepa_tensor *op_seen_as(orepa_tensor *t, int rank, const int64_t *shape) {
  orepa_tensor *seen = t ? orepa_reshape(t, rank, shape) : NULL;
  orepa_release(t);
  return no_view(seen);
}

orepa_tensor *op_shaped(orepa_tensor *t, int rank, const int64_t *shape) {
  orepa_tensor *seen = t ? orepa_reshape(t, rank, shape) : NULL;
  orepa_tensor *dense = seen ? orepa_contiguous(seen) : NULL;
  orepa_release(seen);
  orepa_release(t);
  return no_view(dense);
}

static orepa_tensor *matmul_matrices(orepa_tensor *a, orepa_tensor *b) {
  int rank;
  int64_t shape[OREPA_MAX_RANK], m = a->shape[a->rank - 2], k = a->shape[a->rank - 1], n = b->shape[b->rank - 1];
  if (k != b->shape[b->rank - 2]) {
    error_set("matmul: %s . %s: the inner sizes %lld and %lld differ", shape_text(a->rank, a->shape),
              shape_text(b->rank, b->shape), (long long)k, (long long)b->shape[b->rank - 2]);
    return NULL;
  }
  if (op_broadcast("matmul", a->rank - 2, a->shape, b->rank - 2, b->shape, &rank, shape))
    return NULL;
  orepa_tensor *left, *right;
  if (b->rank == 2 && a->rank > 2) { /* all rows of a against one b */
    int64_t rows[3] = {1, shape_count(a->rank - 1, a->shape), k}, one[3] = {1, k, n};
    left = orepa_reshape(a, 3, rows);
    right = left ? orepa_reshape(b, 3, one) : NULL;
  } else {
    left = as_batch(a, rank, shape);
    right = left ? as_batch(b, rank, shape) : NULL;
  }
  orepa_tensor *c = right ? recorded_product(left, right, NULL) : NULL;
  orepa_release(left);
  orepa_release(right);
  shape[rank] = m;
  shape[rank + 1] = n;
  return op_shaped(c, rank + 2, shape);
}

orepa_tensor *orepa_matmul(orepa_tensor *a, orepa_tensor *b) {
  if (a->rank == 0 || b->rank == 0) {
    error_set("matmul: %s . %s: a scalar is no matrix", shape_text(a->rank, a->shape), shape_text(b->rank, b->shape));
    return NULL;
  }
  if (op_same_kind("matmul", 2, (orepa_tensor *[]){a, b}, (const char *[]){"left matrix", "right matrix"}))
    return NULL;
  orepa_tensor *left = a->rank == 1 ? orepa_reshape(a, 2, (int64_t[]){1, -1}) : orepa_retain(a);
  orepa_tensor *right = b->rank == 1 ? orepa_reshape(b, 2, (int64_t[]){-1, 1}) : orepa_retain(b);
  orepa_tensor *c = left && right ? matmul_matrices(left, right) : NULL;
  orepa_release(left);
  orepa_release(right);
  if (!c || (a->rank > 1 && b->rank > 1))
    return c;
  int64_t shape[OREPA_MAX_RANK];
  int rank = 0;
  for (int d = 0; d < c->rank; d++)
    if (!(a->rank == 1 && d == c->rank - 2) && !(b->rank == 1 && d == c->rank - 1))
      shape[rank++] = c->shape[d];
  return op_shaped(c, rank, shape);
}

/* ---- linear ---- */

static orepa_tensor *linear(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias) {
  if (weight->rank != 2 || x->rank < 1 || x->shape[x->rank - 1] != weight->shape[1]) {
    error_set("linear: input %s, weight %s: the last size of the input must be the weight's second",
              shape_text(x->rank, x->shape), shape_text(weight->rank, weight->shape));
    return NULL;
  }
  if (bias && (bias->rank != 1 || bias->shape[0] != weight->shape[0])) {
    error_set("linear: bias %s for weight %s", shape_text(bias->rank, bias->shape),
              shape_text(weight->rank, weight->shape));
    return NULL;
  }
  if (op_same_kind("linear", 3, (orepa_tensor *[]){x, weight, bias}, (const char *[]){"input", "weight", "bias"}))
    return NULL;
  int64_t in = weight->shape[1], out = weight->shape[0], shape[OREPA_MAX_RANK];
  orepa_tensor *rows = orepa_reshape(x, 3, (int64_t[]){1, shape_count(x->rank - 1, x->shape), in});
  orepa_tensor *kernel = rows ? orepa_reshape(weight, 3, (int64_t[]){1, out, in}) : NULL;
  orepa_tensor *turned = kernel ? orepa_transpose(kernel, 1, 2) : NULL;
  orepa_tensor *y = turned ? recorded_product(rows, turned, bias) : NULL;
  orepa_release(rows);
  orepa_release(kernel);
  orepa_release(turned);
  memcpy(shape, x->shape, sizeof shape);
  shape[x->rank - 1] = out;
  return op_shaped(y, x->rank, shape);
}

orepa_tensor *orepa_linear(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias) {
  orepa_tensor *given[3] = {x, weight, bias}, *cast[3];
  if (op_autocast(3, given, cast))
    return NULL;
  orepa_tensor *y = linear(cast[0], cast[1], cast[2]);
  op_release_all(3, cast);
  return y;
}
