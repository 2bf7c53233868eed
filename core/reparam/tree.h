/* tree.h: a description of a block, from the inside. */
#ifndef OREPA_CORE_REPARAM_TREE_H
#define OREPA_CORE_REPARAM_TREE_H

#include "orepa_reparam.h"
#include "tensor/tensor.h"

typedef enum { TREE_LEAF, TREE_CHAIN, TREE_SCALE, TREE_SUM } tree_form; /* a nest is a sum inside a chain */

struct orepa_tree {
  atomic_int references;
  tree_form form;
  int64_t in, out, kernel[2];
  int64_t groups; /* of the kernel: a leaf's own n, else the block's G */
  int id;         /* position in the whole tree, children first; the root's is the largest */
  bool inside;    /* is a child */
  int count;      /* children */
  orepa_tree **children;
  orepa_leaf leaf;
  bool correlate; /* chain */
  int slot;       /* scale */
  int64_t row;
  bool fast;              /* sum: all branches have shapes that the fused pass knows, and it is wanted */
  bool known_shapes;      /* sum: the first of these two */
  orepa_tensor *constant; /* E or ones of a leaf, made when first needed, for one type and device */
};

/* What squeezing is given, and what it keeps for the backward pass. */
typedef struct {
  int count;
  orepa_tensor *const *slots;
  orepa_dtype dtype;
  const orepa_device *device;
  const orepa_tree *root;
  orepa_taps taps; /* those of the root's kernel that are used */
  /* By id: a layer's kernel, and the composition of a chain up to it. NULL: nothing is kept. */
  orepa_tensor **kernels, **prefixes;
} squeeze_forward;

typedef struct {
  squeeze_forward forward;  /* its slots, kernels and prefixes */
  orepa_tensor **gradients; /* by slot, NULL until something was added; */
  const bool *wanted;       /* by slot */
} squeeze_backward;

/* The kernel of a node: compact (its own groups) for a leaf, in the block's groups otherwise. */
orepa_tensor *squeeze_kernel(orepa_tree *node, const squeeze_forward *f);
/* Adds the gradients of a node's slots, given that of its kernel. */
int squeeze_gradients(orepa_tree *node, const squeeze_backward *b, orepa_tensor *dw);

/* The fused pass over a sum of known shapes (fused.c). */
bool fused_knows(const orepa_tree *branch, const orepa_tree *sum);
bool fused_possible(const orepa_tree *sum, const squeeze_forward *f);
orepa_tensor *fused_kernel(orepa_tree *sum, const squeeze_forward *f);
int fused_gradients(orepa_tree *sum, const squeeze_backward *b, orepa_tensor *dw);

/* Where compositions are cut for the fewest multiplications (order.c): [i * count + j] is the last layer of the left
 * part of layers i ... j. The caller frees it; NULL: no memory. */
int *chain_order(int count, orepa_tree *const *layers, int64_t groups);

/* How many multiply-adds a composition of two kernels is, and each of its two gradients. */
int64_t compose_macs(const device_array *after, const device_array *before);

/* A row of a scale's parameter: an alias (out) or (1). */
orepa_tensor *tree_scale_row(const orepa_tree *scale, orepa_tensor *vector);
/* E (plus_identity) or ones (depthwise 1x1) of a leaf, borrowed. */
orepa_tensor *tree_constant(orepa_tree *leaf, const squeeze_forward *f);
/* Adds g to a slot's gradient, taking its reference. */
int tree_add_gradient(const squeeze_backward *b, int slot, orepa_tensor *g);
/* The gradient of a scale's parameter, zero until rows are written; borrowed. */
orepa_tensor *tree_scale_gradient(const squeeze_backward *b, int slot);

#endif
