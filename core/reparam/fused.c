/* fused.c: squeezing a sum in one pass. The shapes of branches that the device's pass knows are
 *
 *     conv{k}                      a kernel, centred
 *     conv{1}, average or prior    a 1x1 times a pattern
 *     conv{1}, conv{K}             one matrix product, the 1x1 with an identity or not
 *     depthwise{K}, conv{1}        a sum over the expansion
 *
 * each with a scale or without. A sum with any other branch is squeezed leaf by leaf (general.c). */
#include <string.h>

#include "ops/ops.h"
#include "reparam/tree.h"

enum { MAX_TERMS = 16 };

/* ---- which shapes ---- */

static bool is_dense(const orepa_tree *layer, int64_t groups) {
  return layer->form == TREE_LEAF && layer->leaf.kind == OREPA_LEAF_PARAMETER && layer->groups == groups &&
         !layer->leaf.interleave && !layer->leaf.plus_identity;
}

static bool is_pointwise(const orepa_tree *layer) {
  return layer->kernel[0] == 1 && layer->kernel[1] == 1;
}

static bool is_whole(const orepa_tree *layer, const orepa_tree *sum) {
  return layer->kernel[0] == sum->kernel[0] && layer->kernel[1] == sum->kernel[1];
}

static const orepa_tree *chain_of(const orepa_tree *branch) {
  return branch->form == TREE_SCALE ? branch->children[0] : branch;
}

/* The kind of a branch's term, or -1. */
static int term_kind(const orepa_tree *branch, const orepa_tree *sum) {
  const orepa_tree *chain = chain_of(branch);
  const orepa_tree *a = chain->children[0], *b = chain->count > 1 ? chain->children[1] : NULL;
  int64_t groups = sum->groups;
  if (chain->count == 1)
    return is_dense(a, groups) ? TERM_KERNEL : -1;
  if (chain->count != 2 || chain->correlate || a->form != TREE_LEAF || b->form != TREE_LEAF ||
      a->leaf.kind != OREPA_LEAF_PARAMETER)
    return -1;
  if (is_pointwise(a) && is_dense(a, groups) && b->leaf.kind == OREPA_LEAF_PATTERN && is_whole(b, sum))
    return TERM_PATTERN;
  if (is_pointwise(a) && a->groups == groups && !a->leaf.interleave && is_dense(b, groups) && is_whole(b, sum))
    return TERM_PRODUCT;
  if (a->groups == a->in && is_whole(a, sum) && !a->leaf.interleave && !a->leaf.plus_identity && is_pointwise(b) &&
      b->leaf.kind == OREPA_LEAF_PARAMETER && b->groups == groups && !b->leaf.plus_identity)
    return TERM_DEPTHWISE;
  return -1;
}

bool fused_knows(const orepa_tree *branch, const orepa_tree *sum) {
  return sum->count <= MAX_TERMS && term_kind(branch, sum) >= 0;
}

bool fused_possible(const orepa_tree *sum, const squeeze_forward *f) {
  return sum->fast && f->dtype == OREPA_FLOAT32 && f->device->squeeze && f->device->squeeze_backward;
}

/* ---- terms ---- */

/* The slots of a term's two factors; -1: none. */
static void term_slots(const orepa_tree *branch, device_term_kind kind, int *a, int *b) {
  const orepa_tree *chain = chain_of(branch);
  int first = chain->children[0]->leaf.slot, second = chain->count > 1 ? chain->children[1]->leaf.slot : -1;
  bool swapped = kind == TERM_PRODUCT || kind == TERM_DEPTHWISE; /* a is applied last there */
  *a = swapped ? second : first;
  *b = swapped ? first : second;
}

/* A pattern of one channel serves all: stride 0. */
static void as_rows(device_array *pattern, int64_t channels) {
  if (pattern->rank == 3)
    return;
  *pattern = (device_array){pattern->data,
                            pattern->dtype,
                            3,
                            {channels, pattern->shape[0], pattern->shape[1]},
                            {0, pattern->strides[0], pattern->strides[1]}};
}

static int read_term(const orepa_tree *branch, const orepa_tree *sum, const squeeze_forward *f, device_term *term) {
  int a, b;
  memset(term, 0, sizeof *term);
  term->kind = (device_term_kind)term_kind(branch, sum);
  term_slots(branch, term->kind, &a, &b);
  const orepa_tree *chain = chain_of(branch);
  term->plus_identity = term->kind == TERM_PRODUCT && chain->children[0]->leaf.plus_identity;
  term->interleave = term->kind == TERM_DEPTHWISE && chain->children[1]->leaf.interleave;
  if (tensor_reads(f->slots[a], &term->a) || (b >= 0 && tensor_reads(f->slots[b], &term->b)))
    return -1;
  if (term->kind == TERM_PATTERN)
    as_rows(&term->b, sum->out);
  if (branch->form != TREE_SCALE)
    return 0;
  orepa_tensor *row = tree_scale_row(branch, f->slots[branch->slot]); /* the slot keeps the memory alive */
  int failed = !row || tensor_reads(row, &term->scale);
  orepa_release(row);
  return failed ? -1 : 0;
}

/* The whole block's taps are its own sum's; a nest inside is used whole. */
static const orepa_taps *taps_of(const orepa_tree *sum, const squeeze_forward *f) {
  return sum == f->root ? &f->taps : NULL;
}

/* Of a term's product, if it is one; b is applied after a where it is a pattern. */
static int64_t term_macs(const device_term *term) {
  if (term->kind == TERM_KERNEL)
    return 0;
  if (term->kind == TERM_PATTERN) /* one for each element of the kernel that results */
    return shape_count(4, term->a.shape) * shape_count(2, term->b.shape + 1);
  return compose_macs(&term->a, &term->b);
}

orepa_tensor *fused_kernel(orepa_tree *sum, const squeeze_forward *f) {
  device_term terms[MAX_TERMS];
  device_array to;
  int64_t shape[4] = {sum->out, sum->in / sum->groups, sum->kernel[0], sum->kernel[1]};
  int64_t macs = 0;
  for (int k = 0; k < sum->count; k++) {
    if (read_term(sum->children[k], sum, f, &terms[k]))
      return NULL;
    macs += term_macs(&terms[k]);
  }
  orepa_tensor *w = tensor_new(f->dtype, f->device, 4, shape);
  if (!w)
    return NULL;
  if (tensor_writes(w, &to) || timings_macs(macs) ||
      DISPATCH("squeeze", f->dtype, f->device, squeeze, sum->groups, &to, taps_of(sum, f), sum->count, terms))
    return tensor_fail(w);
  return w;
}

/* ---- backward: gradients are made before the pass, so that it fails as a whole or not at all ---- */

static int write_gradient(const squeeze_backward *b, int slot, device_array *array) {
  if (slot < 0 || !b->wanted[slot])
    return 0;
  if (!b->gradients[slot] && !(b->gradients[slot] = tensor_like(b->forward.slots[slot])))
    return -1;
  return tensor_writes(b->gradients[slot], array);
}

static int write_term(const orepa_tree *branch, const squeeze_backward *b, device_term *term) {
  int slot_a, slot_b;
  term_slots(branch, term->kind, &slot_a, &slot_b);
  if (write_gradient(b, slot_a, &term->da) || (term->kind != TERM_PATTERN && write_gradient(b, slot_b, &term->db)))
    return -1;
  if (branch->form != TREE_SCALE || !b->wanted[branch->slot])
    return 0;
  orepa_tensor *whole = tree_scale_gradient(b, branch->slot), *row = whole ? orepa_select(whole, 0, branch->row) : NULL;
  int failed = !row || tensor_writes(row, &term->dscale);
  orepa_release(row);
  return failed ? -1 : 0;
}

int fused_gradients(orepa_tree *sum, const squeeze_backward *b, orepa_tensor *dw) {
  device_term terms[MAX_TERMS];
  device_array from;
  int64_t macs = 0;
  for (int k = 0; k < sum->count; k++) {
    if (read_term(sum->children[k], sum, &b->forward, &terms[k]) || write_term(sum->children[k], b, &terms[k]))
      return -1;
    macs += term_macs(&terms[k]) * ((terms[k].da.data != NULL) + (terms[k].db.data != NULL));
  }
  if (tensor_reads(dw, &from) || timings_macs(macs))
    return -1;
  return DISPATCH("squeeze's gradient", dw->dtype, dw->storage->device, squeeze_backward, sum->groups, &from,
                  taps_of(sum, &b->forward), sum->count, terms);
}
