/* squeeze.c: squeezing as one node of the graph.
 *
 * A block's branches are linear, so the sum of what they compute is one convolution. Its kernel is squeezed from the
 * parameters in every forward pass (general.c says how for every tree, fused.c does it in one pass for the usual ones),
 * and the kernel's gradient is taken apart again into theirs. The feature map sees one convolution. */
#include "reparam/tree.h"

#include <stdlib.h>

#include "autograd/autograd.h"

/* ---- checks ---- */

static int check_shape(const orepa_tensor *t, int slot, int rank, const int64_t *shape) {
  bool fits = t && t->rank == rank && orepa_is_contiguous(t);
  for (int d = 0; fits && d < rank; d++)
    fits = t->shape[d] == shape[d];
  return fits ? 0
              : error_set("squeeze: slot %d holds %s where a contiguous %s is described", slot,
                          t ? tensor_text(t) : "nothing", shape_text(rank, shape));
}

static int check_leaf(const orepa_leaf *leaf, const squeeze_forward *f) {
  if (leaf->kind == OREPA_LEAF_IDENTITY)
    return 0;
  orepa_tensor *t = leaf->slot >= 0 && leaf->slot < f->count ? f->slots[leaf->slot] : NULL;
  if (leaf->kind == OREPA_LEAF_PATTERN && t && t->rank == 2)
    return check_shape(t, leaf->slot, 2, leaf->kernel);
  if (leaf->kind == OREPA_LEAF_PATTERN)
    return check_shape(t, leaf->slot, 3, (int64_t[]){leaf->out, leaf->kernel[0], leaf->kernel[1]});
  return check_shape(t, leaf->slot, 4,
                     (int64_t[]){leaf->out, leaf->in / leaf->groups, leaf->kernel[0], leaf->kernel[1]});
}

static int check_scale(const orepa_tree *node, const squeeze_forward *f) {
  const orepa_tensor *t = node->slot >= 0 && node->slot < f->count ? f->slots[node->slot] : NULL;
  if (t && t->rank == 2 && node->row < t->shape[0] && (t->shape[1] == node->out || t->shape[1] == 1) &&
      orepa_is_contiguous(t))
    return 0;
  return error_set("squeeze: slot %d holds %s; row %lld of a scaling of %lld channels is described", node->slot,
                   t ? tensor_text(t) : "nothing", (long long)node->row, (long long)node->out);
}

static int check_tree(const orepa_tree *node, const squeeze_forward *f) {
  if (node->form == TREE_LEAF && check_leaf(&node->leaf, f))
    return -1;
  if (node->form == TREE_SCALE && check_scale(node, f))
    return -1;
  for (int k = 0; k < node->count; k++)
    if (check_tree(node->children[k], f))
      return -1;
  return 0;
}

static int check_slots(const orepa_tree *tree, squeeze_forward *f) {
  for (int k = 0; k < f->count; k++) {
    const orepa_tensor *t = f->slots[k];
    if (k == 0) {
      f->dtype = t->dtype;
      f->device = t->storage->device;
    } else if (t->dtype != f->dtype || t->storage->device != f->device) {
      return error_set("squeeze: slot %d holds %s on '%s', slot 0 %s on '%s'", k, tensor_text(t),
                       t->storage->device->name, tensor_text(f->slots[0]), f->device->name);
    }
  }
  if (f->count < 1)
    return error_set("squeeze: no tensors");
  return check_tree(tree, f);
}

/* ---- the node ---- */

typedef struct {
  orepa_tree *tree;
  orepa_tensor **kept; /* kernels by id, then prefixes by id */
  orepa_taps taps;
} squeeze_payload;

static void release_kept(const orepa_tree *tree, orepa_tensor **kept) {
  for (int k = 0; kept && k < 2 * (tree->id + 1); k++)
    orepa_release(kept[k]);
  free(kept);
}

static void squeeze_dispose(void *payload) {
  squeeze_payload *p = payload;
  if (!p->tree)
    return;
  release_kept(p->tree, p->kept);
  orepa_tree_release(p->tree);
}

static int squeeze_backward_pass(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const squeeze_payload *p = node->payload;
  int count = node->inputs, failed = 0;
  orepa_tensor **slots = calloc((size_t)count, sizeof *slots);
  bool *wanted = calloc((size_t)count, sizeof *wanted);
  if (!slots || !wanted)
    failed = error_out_of_memory("squeeze's gradient: out of memory: no room for %d slots", count);
  for (int k = 0; k < count && !failed; k++) {
    slots[k] = autograd_saved_tensor(node, k);
    wanted[k] = autograd_needs(node, k);
    failed = !slots[k];
  }
  orepa_tensor *dw = failed ? NULL : orepa_contiguous(given);
  if (dw) {
    squeeze_forward f = {count,   slots,   dw->dtype, dw->storage->device,
                         p->tree, p->taps, p->kept,   p->kept + p->tree->id + 1};
    squeeze_backward b = {f, dx, wanted};
    failed = squeeze_gradients(p->tree, &b, dw);
  }
  orepa_release(dw);
  free(slots);
  free(wanted);
  return failed || !dw ? -1 : 0;
}

static const autograd_op squeeze_op = {"squeeze", squeeze_backward_pass, squeeze_dispose};

static bool is_leaf_alone(const orepa_tree *node) {
  while (node->form == TREE_CHAIN && node->count == 1)
    node = node->children[0];
  return node->form == TREE_LEAF;
}

/* A leaf alone has no kernel but the tensor that it was given, or its constant: the result is another. */
static orepa_tensor *own_kernel(orepa_tree *tree, const squeeze_forward *f) {
  orepa_tensor *w = squeeze_kernel(tree, f);
  if (!w || !is_leaf_alone(tree))
    return w;
  orepa_tensor *copy = orepa_clone(w);
  orepa_release(w);
  return copy;
}

/* A chain of one layer hands that layer's kernel on as its own. Where it is the result, the node would hold what holds
 * the node; and no product needs it. */
static void let_go_of_result(orepa_tensor **kept, int count, orepa_tensor *w) {
  for (int k = 0; kept && k < count; k++)
    if (kept[k] == w) {
      orepa_release(kept[k]);
      kept[k] = NULL;
    }
}

orepa_tensor *orepa_squeeze(orepa_tree *tree, int count, orepa_tensor *const *slots, const orepa_taps *taps) {
  const orepa_taps all = {{0, 0}, {tree->kernel[0], tree->kernel[1]}};
  squeeze_forward f = {.count = count, .slots = slots, .root = tree, .taps = taps ? *taps : all};
  if (check_slots(tree, &f))
    return NULL;
  orepa_tensor **kept = NULL;
  if (autograd_wanted(slots, count)) {
    kept = calloc(2 * ((size_t)tree->id + 1), sizeof *kept);
    if (!kept) {
      error_out_of_memory("squeeze: out of memory: no room for %d layers", tree->id + 1);
      return NULL;
    }
    f.kernels = kept;
    f.prefixes = kept + tree->id + 1;
  }
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *w = own_kernel(tree, &f);
  orepa_set_grad_enabled(was);
  let_go_of_result(kept, 2 * (tree->id + 1), w);
  autograd_node *node = NULL;
  if (w && autograd_record(&squeeze_op, w, slots, count, count, sizeof(squeeze_payload), &node))
    w = tensor_fail(w);
  if (!node) {
    release_kept(tree, kept);
    return w;
  }
  *(squeeze_payload *)node->payload = (squeeze_payload){orepa_tree_retain(tree), kept, f.taps};
  for (int k = 0; k < count; k++)
    autograd_save(node, k, slots[k]);
  return w;
}

orepa_tensor *orepa_tree_branch(orepa_tree *sum, int branch, int count, orepa_tensor *const *slots) {
  squeeze_forward f = {.count = count, .slots = slots};
  if (sum->form != TREE_SUM || branch < 0 || branch >= sum->count) {
    error_set("squeeze: there is no branch %d", branch);
    return NULL;
  }
  if (check_slots(sum, &f))
    return NULL;
  const orepa_tree *child = sum->children[branch];
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *kernel = squeeze_kernel(sum->children[branch], &f), *padded = NULL;
  if (kernel) {
    int64_t around[4] = {0, 0, (sum->kernel[0] - child->kernel[0]) / 2, (sum->kernel[1] - child->kernel[1]) / 2};
    padded = orepa_pad(kernel, around, around, (orepa_operand){0});
  }
  orepa_release(kernel);
  orepa_set_grad_enabled(was);
  return padded;
}
