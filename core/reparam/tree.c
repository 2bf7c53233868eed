/* tree.c: making descriptions, and the constants that they mention. */
#include "reparam/tree.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- making ---- */

static orepa_tree *out_of_room(void) {
  error_out_of_memory("out of memory: no room for a block's description");
  return NULL;
}

static orepa_tree *tree_copy(const orepa_tree *from) {
  orepa_tree *tree = calloc(1, sizeof *tree);
  orepa_tree **list = from->count ? calloc((size_t)from->count, sizeof *list) : NULL;
  if (!tree || (from->count && !list)) {
    free(tree);
    free(list);
    return out_of_room();
  }
  *tree = *from;
  atomic_init(&tree->references, 1);
  tree->children = list;
  tree->constant = NULL;
  for (int k = 0; k < from->count; k++)
    if (!(list[k] = tree_copy(from->children[k]))) {
      tree->count = k;
      orepa_tree_release(tree);
      return NULL;
    }
  return tree;
}

/* Makes children of a list: a node has its number in one tree alone, so what is a child already is copied. On failure
 * all are released. */
static int adopt(int count, orepa_tree *const *children, orepa_tree **list) {
  for (int k = 0; k < count; k++) {
    list[k] = children[k]->inside ? tree_copy(children[k]) : orepa_tree_retain(children[k]);
    if (!list[k]) {
      for (int done = 0; done < k; done++)
        orepa_tree_release(list[done]);
      break;
    }
  }
  bool complete = !count || list[count - 1];
  for (int k = 0; k < count; k++) {
    if (complete)
      list[k]->inside = true;
    orepa_tree_release(children[k]);
  }
  return complete ? 0 : -1;
}

static orepa_tree *tree_new(tree_form form, int count, orepa_tree *const *children) {
  orepa_tree *tree = calloc(1, sizeof *tree), **list = count ? calloc((size_t)count, sizeof *list) : NULL;
  if (!tree || (count && !list)) {
    for (int k = 0; k < count; k++)
      orepa_tree_release(children[k]);
    out_of_room();
  } else if (!adopt(count, children, list)) {
    atomic_init(&tree->references, 1);
    tree->form = form;
    tree->count = count;
    tree->children = list;
    return tree;
  }
  free(tree);
  free(list);
  return NULL;
}

static orepa_tree *tree_fail(orepa_tree *tree) {
  orepa_tree_release(tree);
  return NULL;
}

orepa_tree *orepa_tree_retain(orepa_tree *tree) {
  atomic_fetch_add_explicit(&tree->references, 1, memory_order_relaxed);
  return tree;
}

void orepa_tree_release(orepa_tree *tree) {
  if (!tree || atomic_fetch_sub_explicit(&tree->references, 1, memory_order_acq_rel) != 1)
    return;
  for (int k = 0; k < tree->count; k++)
    orepa_tree_release(tree->children[k]);
  orepa_release(tree->constant);
  free(tree->children);
  free(tree);
}

/* Numbers the nodes below, children first; returns the next free number. */
static int number_nodes(orepa_tree *tree, int next) {
  for (int k = 0; k < tree->count; k++)
    next = number_nodes(tree->children[k], next);
  tree->id = next;
  return next + 1;
}

static bool divides(int64_t groups, int64_t in, int64_t out) {
  return groups > 0 && in % groups == 0 && out % groups == 0;
}

orepa_tree *orepa_tree_leaf(const orepa_leaf *leaf) {
  orepa_tree *tree = tree_new(TREE_LEAF, 0, NULL);
  if (!tree)
    return NULL;
  tree->leaf = *leaf;
  tree->in = leaf->in;
  tree->out = leaf->out;
  tree->groups = leaf->groups;
  memcpy(tree->kernel, leaf->kernel, sizeof tree->kernel);
  if (leaf->in < 1 || leaf->out < 1 || leaf->kernel[0] < 1 || leaf->kernel[1] < 1 ||
      !divides(leaf->groups, leaf->in, leaf->out))
    error_set("leaf: %lld groups don't divide %lld -> %lld channels (kernel %lldx%lld)", (long long)leaf->groups,
              (long long)leaf->in, (long long)leaf->out, (long long)leaf->kernel[0], (long long)leaf->kernel[1]);
  else if (leaf->plus_identity && (leaf->kernel[0] % 2 == 0 || leaf->kernel[1] % 2 == 0 || leaf->out % leaf->in))
    error_set("leaf: plus_identity needs an odd kernel and a multiple of the input channels (%lld -> %lld, %lldx%lld)",
              (long long)leaf->in, (long long)leaf->out, (long long)leaf->kernel[0], (long long)leaf->kernel[1]);
  else if (leaf->kind != OREPA_LEAF_PARAMETER && (leaf->in != leaf->out || leaf->groups != leaf->in))
    error_set("leaf: a constant is depthwise, from %lld channels to as many", (long long)leaf->in);
  else
    return tree;
  return tree_fail(tree);
}

/* Layers i ... j of a chain become a chain of their own, in the place of layer i. */
static int join(orepa_tree *chain, int i, int j) {
  for (int k = i; k <= j; k++)
    chain->children[k]->inside = false;
  orepa_tree *part = orepa_tree_chain(j - i + 1, &chain->children[i], chain->groups, false);
  chain->children[i] = part;
  for (int k = i + 1; k <= j; k++)
    chain->children[k] = NULL;
  if (part)
    part->inside = true;
  return part ? 0 : -1;
}

/* Puts layers together that are better composed before they meet what stands on their left. A composition of turned
 * kernels is the turned composition: so only the whole chain turns. */
static int arrange(orepa_tree *chain) {
  int count = chain->count, kept = 0, failed = 0;
  int *cut = chain_order(count, chain->children, chain->groups);
  for (int j = count - 1; cut && j > 0 && !failed;) {
    int m = cut[j];
    failed = j > m + 1 && join(chain, m + 1, j);
    j = m;
  }
  for (int k = 0; k < count && cut && !failed; k++)
    if (chain->children[k])
      chain->children[kept++] = chain->children[k];
  if (cut && !failed)
    chain->count = kept;
  free(cut);
  return cut && !failed ? 0 : -1;
}

orepa_tree *orepa_tree_chain(int count, orepa_tree *const *layers, int64_t groups, bool correlate) {
  orepa_tree *tree = tree_new(TREE_CHAIN, count, layers);
  if (!tree)
    return NULL;
  tree->groups = groups;
  tree->correlate = correlate;
  tree->kernel[0] = tree->kernel[1] = 1;
  for (int k = 0; k < count; k++) {
    const orepa_tree *layer = tree->children[k];
    if (groups < 1 || layer->groups % groups) {
      error_set("chain: layer %d has %lld groups, no multiple of %lld", k + 1, (long long)layer->groups,
                (long long)groups);
      return tree_fail(tree);
    }
    if (k && layer->in != tree->children[k - 1]->out) {
      error_set("chain: layer %d takes %lld channels, the one before gives %lld", k + 1, (long long)layer->in,
                (long long)tree->children[k - 1]->out);
      return tree_fail(tree);
    }
    tree->kernel[0] += layer->kernel[0] - 1;
    tree->kernel[1] += layer->kernel[1] - 1;
  }
  if (!count) {
    error_set("chain: no layers");
    return tree_fail(tree);
  }
  tree->in = tree->children[0]->in;
  tree->out = tree->children[count - 1]->out;
  if (count > 2 && arrange(tree))
    return tree_fail(tree);
  number_nodes(tree, 0);
  return tree;
}

orepa_tree *orepa_tree_scale(orepa_tree *child, int slot, int64_t row) {
  orepa_tree *tree = tree_new(TREE_SCALE, 1, &child);
  if (!tree)
    return NULL;
  child = tree->children[0];
  tree->in = child->in;
  tree->out = child->out;
  tree->groups = child->groups;
  memcpy(tree->kernel, child->kernel, sizeof tree->kernel);
  tree->slot = slot;
  tree->row = row;
  if (child->form != TREE_CHAIN) {
    error_set("scale: its child must be a chain");
    return tree_fail(tree);
  }
  number_nodes(tree, 0);
  return tree;
}

orepa_tree *orepa_tree_sum(int count, orepa_tree *const *branches, int64_t groups, const int64_t kernel[2]) {
  orepa_tree *tree = tree_new(TREE_SUM, count, branches);
  if (!tree)
    return NULL;
  tree->groups = groups;
  memcpy(tree->kernel, kernel, sizeof tree->kernel);
  if (!count) {
    error_set("sum: no branches");
    return tree_fail(tree);
  }
  tree->in = tree->children[0]->in;
  tree->out = tree->children[0]->out;
  tree->known_shapes = true;
  for (int k = 0; k < count; k++) {
    const orepa_tree *b = tree->children[k];
    bool fits = (b->form == TREE_CHAIN || b->form == TREE_SCALE) && b->in == tree->in && b->out == tree->out &&
                b->groups == groups;
    for (int d = 0; d < 2; d++)
      fits = fits && b->kernel[d] <= kernel[d] && (kernel[d] - b->kernel[d]) % 2 == 0;
    if (!fits) {
      error_set("sum: branch %d (%lld -> %lld channels, %lldx%lld) does not fit into %lld -> %lld, %lldx%lld", k + 1,
                (long long)b->in, (long long)b->out, (long long)b->kernel[0], (long long)b->kernel[1],
                (long long)tree->in, (long long)tree->out, (long long)kernel[0], (long long)kernel[1]);
      return tree_fail(tree);
    }
    tree->known_shapes = tree->known_shapes && fused_knows(b, tree);
  }
  tree->fast = tree->known_shapes;
  number_nodes(tree, 0);
  return tree;
}

const int64_t *orepa_tree_kernel(const orepa_tree *tree) {
  return tree->kernel;
}

void orepa_tree_set_fast(orepa_tree *tree, bool fast) {
  tree->fast = fast && tree->known_shapes;
  for (int k = 0; k < tree->count; k++)
    orepa_tree_set_fast(tree->children[k], fast);
}

/* ---- constants ---- */

/* Zeros on the host for a constant of this shape, which the device must have room for; they go with free(). */
static double *constant_values(const orepa_device *device, int rank, const int64_t *shape) {
  orepa_tensor *room = orepa_empty(OREPA_FLOAT64, device, rank, shape);
  if (!room)
    return NULL;
  double *values = calloc((size_t)orepa_count(room) + 1, sizeof *values);
  if (!values)
    error_out_of_memory("out of memory: no room for a constant of %s", tensor_text(room));
  orepa_release(room);
  return values;
}

orepa_tensor *orepa_frequency_prior(orepa_dtype dtype, const orepa_device *device, int64_t channels,
                                    const int64_t kernel[2]) {
  int64_t shape[3] = {channels, kernel[0], kernel[1]}, n = 0;
  double *values = constant_values(device, 3, shape), half = (double)channels / 2;
  if (!values)
    return NULL;
  for (int64_t q = 0; q < channels; q++)
    for (int64_t h = 0; h < kernel[0]; h++)
      for (int64_t w = 0; w < kernel[1]; w++) {
        bool tall = (double)q < half;
        double f = tall ? (double)q + 1 : (double)q + 1 - half, u = (double)(tall ? h : w) + 0.5;
        values[n++] = cos(3.14159265358979323846 * u * f / (double)(tall ? kernel[0] : kernel[1]));
      }
  orepa_tensor *wide = orepa_from_host(OREPA_FLOAT64, device, 3, shape, values);
  free(values);
  orepa_tensor *prior = wide ? orepa_to(wide, dtype, device) : NULL;
  orepa_release(wide);
  return prior;
}

orepa_tensor *orepa_identity_kernel(orepa_dtype dtype, const orepa_device *device, int64_t rows, int64_t columns,
                                    const int64_t kernel[2]) {
  int64_t shape[4] = {rows, columns, kernel[0], kernel[1]}, area = kernel[0] * kernel[1];
  double *values = constant_values(device, 4, shape);
  if (!values)
    return NULL;
  for (int64_t t = 0; t < rows; t++)
    values[(t * columns + t % columns) * area + kernel[0] / 2 * kernel[1] + kernel[1] / 2] = 1;
  orepa_tensor *wide = orepa_from_host(OREPA_FLOAT64, device, 4, shape, values);
  free(values);
  orepa_tensor *identity = wide ? orepa_to(wide, dtype, device) : NULL;
  orepa_release(wide);
  return identity;
}

orepa_tensor *tree_constant(orepa_tree *leaf, const squeeze_forward *f) {
  if (leaf->constant && leaf->constant->dtype == f->dtype && leaf->constant->storage->device == f->device)
    return leaf->constant;
  orepa_tensor *constant = orepa_identity_kernel(f->dtype, f->device, leaf->out, leaf->in / leaf->groups, leaf->kernel);
  if (constant) {
    orepa_release(leaf->constant);
    leaf->constant = constant;
  }
  return constant;
}

/* ---- rows of a scale's parameter ---- */

orepa_tensor *tree_scale_row(const orepa_tree *scale, orepa_tensor *vector) {
  return orepa_select(vector, 0, scale->row);
}

int tree_add_gradient(const squeeze_backward *b, int slot, orepa_tensor *g) {
  if (!g || !b->wanted[slot]) {
    orepa_release(g);
    return g ? 0 : -1;
  }
  orepa_tensor *sum = b->gradients[slot] ? orepa_add(b->gradients[slot], g) : orepa_retain(g);
  orepa_release(g);
  if (!sum)
    return -1;
  orepa_release(b->gradients[slot]);
  b->gradients[slot] = sum;
  return 0;
}

orepa_tensor *tree_scale_gradient(const squeeze_backward *b, int slot) {
  orepa_tensor *vector = b->forward.slots[slot];
  if (!b->gradients[slot])
    b->gradients[slot] = orepa_full(vector->dtype, vector->storage->device, vector->rank, vector->shape, 0);
  return b->gradients[slot];
}
