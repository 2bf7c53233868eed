/* general.c: squeezing leaf by leaf: what a tree means, for every tree, type and device that can compose kernels.
 *
 * Forward, a chain composes its layers from the first to the last (its prefixes). Backward, from the last layer to the
 * first, each layer's gradient comes from the prefix before it, and the prefix's from the layer. A scale's gradient
 * needs no branch's kernel: with Q the gradient of the last layer without the scale, dv[o] = <Q[o], last[o]>. */
#include <string.h>

#include "ops/ops.h"
#include "reparam/tree.h"

/* ---- composing, as tensors ---- */

int64_t compose_macs(const device_array *after, const device_array *before) {
  return shape_count(4, after->shape) * shape_count(3, before->shape + 1);
}

static orepa_tensor *compose(orepa_tensor *after, int64_t na, orepa_tensor *before, int64_t nb, int64_t groups,
                             bool turn) {
  int64_t shape[4] = {after->shape[0], before->shape[1] * nb / groups, after->shape[2] + before->shape[2] - 1,
                      after->shape[3] + before->shape[3] - 1};
  orepa_tensor *w = tensor_new(after->dtype, after->storage->device, 4, shape);
  device_array a, b, to;
  if (!w)
    return NULL;
  if (tensor_reads(after, &a) || tensor_reads(before, &b) || tensor_writes(w, &to) ||
      timings_macs(compose_macs(&a, &b)) ||
      DISPATCH("squeeze", w->dtype, w->storage->device, compose, &to, &a, na, &b, nb, groups, turn))
    return tensor_fail(w);
  return w;
}

/* The gradient of `after` (like it), or of `before`, from that of their composition. */
static orepa_tensor *compose_gradient(bool of_after, orepa_tensor *dw, orepa_tensor *after, int64_t na,
                                      orepa_tensor *before, int64_t nb, int64_t groups, bool turn) {
  orepa_tensor *d = tensor_like(of_after ? after : before);
  const orepa_device *device = dw->storage->device;
  device_array from, other, to;
  if (!d)
    return NULL;
  if (tensor_reads(dw, &from) || tensor_reads(of_after ? before : after, &other) || tensor_writes(d, &to) ||
      timings_macs(compose_macs(of_after ? &to : &other, of_after ? &other : &to)) ||
      (of_after ? DISPATCH("squeeze's gradient", d->dtype, device, compose_backward_after, &to, na, &from, &other, nb,
                           groups, turn)
                : DISPATCH("squeeze's gradient", d->dtype, device, compose_backward_before, &to, nb, &from, &other, na,
                           groups, turn)))
    return tensor_fail(d);
  return d;
}

/* ---- leaves ---- */

/* Row o of the kernel is row (o mod r)*n + floor(o/r) of the parameter, r = out/n: two axes exchanged. `back` undoes
 * it. */
static orepa_tensor *interleaved(const orepa_tree *leaf, orepa_tensor *t, bool back) {
  int64_t n = leaf->groups, r = leaf->out / n, rest = t->shape[1] * t->shape[2] * t->shape[3];
  orepa_tensor *rows = orepa_reshape(t, 3, back ? (int64_t[]){n, r, rest} : (int64_t[]){r, n, rest});
  orepa_tensor *turned = rows ? orepa_transpose(rows, 0, 1) : NULL;
  orepa_tensor *kernel = turned ? orepa_reshape(turned, 4, t->shape) : NULL;
  orepa_tensor *dense = kernel ? orepa_contiguous(kernel) : NULL;
  orepa_release(rows);
  orepa_release(turned);
  orepa_release(kernel);
  return dense;
}

/* A constant (KH, KW) or (c, KH, KW) as a depthwise kernel (c, 1, KH, KW). */
static orepa_tensor *pattern_kernel(const orepa_tree *leaf, orepa_tensor *pattern) {
  int64_t shape[4] = {leaf->out, 1, leaf->kernel[0], leaf->kernel[1]};
  orepa_tensor *rows = orepa_expand(pattern, 3, (int64_t[]){shape[0], shape[2], shape[3]});
  orepa_tensor *kernel = rows ? orepa_reshape(rows, 4, shape) : NULL;
  orepa_tensor *dense = kernel ? orepa_contiguous(kernel) : NULL;
  orepa_release(rows);
  orepa_release(kernel);
  return dense;
}

static orepa_tensor *leaf_kernel(orepa_tree *node, const squeeze_forward *f) {
  if (node->leaf.kind == OREPA_LEAF_IDENTITY) {
    orepa_tensor *ones = tree_constant(node, f);
    return ones ? orepa_retain(ones) : NULL;
  }
  orepa_tensor *given = f->slots[node->leaf.slot];
  if (node->leaf.kind == OREPA_LEAF_PATTERN)
    return pattern_kernel(node, given);
  orepa_tensor *kernel = node->leaf.interleave ? interleaved(node, given, false) : orepa_retain(given);
  if (!kernel || !node->leaf.plus_identity)
    return kernel;
  orepa_tensor *identity = tree_constant(node, f);
  orepa_tensor *sum = identity ? orepa_add(kernel, identity) : NULL;
  orepa_release(kernel);
  return sum;
}

static int leaf_gradient(const orepa_tree *node, const squeeze_backward *b, orepa_tensor *dw) {
  if (node->leaf.kind != OREPA_LEAF_PARAMETER || !b->wanted[node->leaf.slot])
    return 0;
  return tree_add_gradient(b, node->leaf.slot,
                           node->leaf.interleave ? interleaved(node, dw, true) : orepa_contiguous(dw));
}

/* ---- chains ---- */

static void keep(orepa_tensor **list, int id, orepa_tensor *t) {
  if (!list)
    return;
  orepa_release(list[id]);
  list[id] = orepa_retain(t);
}

/* A single layer with finer groups than the block's is a chain behind an identity. */
static orepa_tensor *ones_before(const orepa_tree *chain, const squeeze_forward *f) {
  int64_t shape[4] = {chain->in, 1, 1, 1};
  return orepa_full(f->dtype, f->device, 4, shape, 1);
}

static orepa_tensor *chain_kernel(orepa_tree *node, const squeeze_forward *f) {
  orepa_tree *first = node->children[0];
  orepa_tensor *prefix = squeeze_kernel(first, f);
  int64_t groups = first->groups;
  if (!prefix)
    return NULL;
  keep(f->kernels, first->id, prefix);
  if (node->count == 1 && groups != node->groups) {
    orepa_tensor *ones = ones_before(node, f);
    orepa_tensor *dense = ones ? compose(prefix, groups, ones, node->in, node->groups, false) : NULL;
    orepa_release(ones);
    orepa_release(prefix);
    return dense;
  }
  for (int k = 1; k < node->count && prefix; k++) {
    orepa_tree *layer = node->children[k];
    keep(f->prefixes, layer->id, prefix); /* what comes before this layer */
    orepa_tensor *kernel = squeeze_kernel(layer, f), *next = NULL;
    if (kernel) {
      keep(f->kernels, layer->id, kernel);
      next = compose(kernel, layer->groups, prefix, groups, node->groups, node->correlate);
    }
    orepa_release(kernel);
    orepa_release(prefix);
    prefix = next;
    groups = node->groups;
  }
  return prefix;
}

/* dv, a row of the scale's gradient: <q[o], last[o]>, summed over all o for a scalar. */
static int scale_gradient(const orepa_tree *scale, const squeeze_backward *b, orepa_tensor *q, orepa_tensor *last) {
  orepa_tensor *whole = tree_scale_gradient(b, scale->slot);
  orepa_tensor *row = whole ? orepa_select(whole, 0, scale->row) : NULL;
  orepa_tensor *product = row ? orepa_mul(q, last) : NULL;
  bool scalar = row && row->shape[0] != scale->out;
  orepa_tensor *sum =
      product ? orepa_reduce(OREPA_SUM, product, scalar ? 4 : 3, scalar ? (int[]){0, 1, 2, 3} : (int[]){1, 2, 3}, false)
              : NULL;
  orepa_tensor *shaped = sum ? orepa_reshape(sum, 1, &row->shape[0]) : NULL;
  int failed = !shaped || tensor_copy_into(row, shaped);
  orepa_release(row);
  orepa_release(product);
  orepa_release(sum);
  orepa_release(shaped);
  return failed ? -1 : 0;
}

/* t scaled by the row of a scale, t itself without one. */
static orepa_tensor *scaled(const orepa_tree *scale, const squeeze_forward *f, orepa_tensor *t) {
  if (!scale)
    return orepa_retain(t);
  orepa_tensor *row = tree_scale_row(scale, f->slots[scale->slot]);
  orepa_tensor *column = row ? orepa_reshape(row, 4, (int64_t[]){-1, 1, 1, 1}) : NULL;
  orepa_tensor *product = column ? orepa_mul(t, column) : NULL;
  orepa_release(row);
  orepa_release(column);
  return product;
}

/* The last layer's gradient without the scale. */
static orepa_tensor *last_gradient(orepa_tree *node, const squeeze_backward *b, orepa_tensor *dw) {
  orepa_tree *last = node->children[node->count - 1];
  orepa_tensor *kernel = b->forward.kernels[last->id];
  if (node->count > 1) {
    orepa_tensor *before = b->forward.prefixes[last->id];
    int64_t nb = node->count == 2 ? node->children[0]->groups : node->groups;
    return compose_gradient(true, dw, kernel, last->groups, before, nb, node->groups, node->correlate);
  }
  if (last->groups == node->groups)
    return orepa_retain(dw);
  orepa_tensor *ones = ones_before(node, &b->forward);
  orepa_tensor *q = ones ? compose_gradient(true, dw, kernel, last->groups, ones, node->in, node->groups, false) : NULL;
  orepa_release(ones);
  return q;
}

/* scale: the node around the chain, or NULL. */
static int chain_gradients(orepa_tree *node, const orepa_tree *scale, const squeeze_backward *b, orepa_tensor *dw) {
  orepa_tree *last = node->children[node->count - 1];
  orepa_tensor *q = last_gradient(node, b, dw);
  if (!q)
    return -1;
  int failed = scale && b->wanted[scale->slot] && scale_gradient(scale, b, q, b->forward.kernels[last->id]);
  orepa_tensor *dlast = failed ? NULL : scaled(scale, &b->forward, q);
  failed = !dlast || squeeze_gradients(last, b, dlast);
  orepa_release(q);
  orepa_release(dlast);
  if (failed || node->count == 1)
    return failed ? -1 : 0;
  orepa_tensor *dprefix = scaled(scale, &b->forward, dw); /* of the composition up to layer k */
  for (int k = node->count - 1; k >= 1 && dprefix; k--) {
    orepa_tree *layer = node->children[k];
    orepa_tensor *kernel = b->forward.kernels[layer->id], *before = b->forward.prefixes[layer->id];
    int64_t nb = k == 1 ? node->children[0]->groups : node->groups;
    if (k < node->count - 1) {
      orepa_tensor *d =
          compose_gradient(true, dprefix, kernel, layer->groups, before, nb, node->groups, node->correlate);
      failed = !d || squeeze_gradients(layer, b, d);
      orepa_release(d);
    }
    orepa_tensor *older =
        failed ? NULL
               : compose_gradient(false, dprefix, kernel, layer->groups, before, nb, node->groups, node->correlate);
    orepa_release(dprefix);
    dprefix = older;
  }
  failed = !dprefix || squeeze_gradients(node->children[0], b, dprefix);
  orepa_release(dprefix);
  return failed ? -1 : 0;
}

/* ---- sums ---- */

/* The part of a sum's kernel where a branch lies: a view. */
static orepa_tensor *central(orepa_tensor *w, const orepa_tree *branch) {
  int64_t h = (w->shape[2] - branch->kernel[0]) / 2, v = (w->shape[3] - branch->kernel[1]) / 2;
  orepa_tensor *rows = orepa_slice(w, 2, h, h + branch->kernel[0], 1);
  orepa_tensor *part = rows ? orepa_slice(rows, 3, v, v + branch->kernel[1], 1) : NULL;
  orepa_release(rows);
  return part;
}

static int add_branch(orepa_tensor *w, orepa_tree *branch, const squeeze_forward *f) {
  orepa_tensor *part = central(w, branch), *kernel = part ? squeeze_kernel(branch, f) : NULL;
  orepa_operand operands[2] = {OPERAND(part), OPERAND(kernel)};
  int failed = !kernel || orepa_apply_in_place(FUNCTION_add, operands);
  orepa_release(kernel);
  orepa_release(part);
  return failed ? -1 : 0;
}

static orepa_tensor *sum_kernel(orepa_tree *node, const squeeze_forward *f) {
  int64_t shape[4] = {node->out, node->in / node->groups, node->kernel[0], node->kernel[1]};
  orepa_tensor *w = orepa_full(f->dtype, f->device, 4, shape, 0);
  for (int k = 0; w && k < node->count; k++)
    if (add_branch(w, node->children[k], f))
      return tensor_fail(w);
  return w;
}

static int sum_gradients(orepa_tree *node, const squeeze_backward *b, orepa_tensor *dw) {
  for (int k = 0; k < node->count; k++) {
    orepa_tensor *part = central(dw, node->children[k]), *dense = part ? orepa_contiguous(part) : NULL;
    int failed = !dense || squeeze_gradients(node->children[k], b, dense);
    orepa_release(part);
    orepa_release(dense);
    if (failed)
      return -1;
  }
  return 0;
}

/* ---- the tree ---- */

orepa_tensor *squeeze_kernel(orepa_tree *node, const squeeze_forward *f) {
  switch (node->form) {
  case TREE_LEAF:
    return leaf_kernel(node, f);
  case TREE_CHAIN:
    return chain_kernel(node, f);
  case TREE_SUM:
    return fused_possible(node, f) ? fused_kernel(node, f) : sum_kernel(node, f);
  case TREE_SCALE:
    break;
  }
  orepa_tensor *kernel = squeeze_kernel(node->children[0], f);
  orepa_tensor *product = kernel ? scaled(node, f, kernel) : NULL;
  orepa_release(kernel);
  return product;
}

int squeeze_gradients(orepa_tree *node, const squeeze_backward *b, orepa_tensor *dw) {
  switch (node->form) {
  case TREE_LEAF:
    return leaf_gradient(node, b, dw);
  case TREE_CHAIN:
    return chain_gradients(node, NULL, b, dw);
  case TREE_SUM:
    return fused_possible(node, &b->forward) ? fused_gradients(node, b, dw) : sum_gradients(node, b, dw);
  case TREE_SCALE:
    break;
  }
  return chain_gradients(node->children[0], node, b, dw);
}
