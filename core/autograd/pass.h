/* pass.h: a backward pass from the inside, for the files of this room: what is under way, sums of gradients, and which
 * part of the graph a pass goes through that is asked for the gradients of some tensors alone. */
#ifndef OREPA_CORE_PASS_H
#define OREPA_CORE_PASS_H

#include "autograd/anomaly.h"
#include "autograd/autograd.h"

/* ---- what is under way ----
 *
 * A backward function may start another pass (a callback of the user's does what it likes), which may come to nodes
 * where gradients of the outer one wait. So what arrives at a node belongs to a pass, and the node holds that of the
 * innermost. The same goes for leaves whose gradient is held back until it is whole: those with hooks, and those that
 * are asked for. */

typedef struct backward_pass backward_pass;

struct autograd_arrival {
  const backward_pass *pass;
  autograd_node *node;       /* a reference */
  autograd_arrival *outer;   /* of an outer pass */
  orepa_tensor *gradients[]; /* one for each of the node's outputs */
};

struct leaf_arrival {
  const backward_pass *pass;
  orepa_tensor *leaf;  /* a reference */
  leaf_arrival *outer; /* of an outer pass */
  leaf_arrival *next;  /* in the order in which the first gradients came */
  orepa_tensor *sum;
};

struct backward_pass {
  autograd_arrival **heap; /* the youngest node's is the first */
  size_t count, capacity;
  leaf_arrival *leaves, **last_leaf;
  bool retain_graph;
  struct selection *selection; /* NULL: every leaf gets its gradient */
};

/* ---- sums.c */
/* Whether the pass may add into this tensor: nobody else sees its memory, and it is plain. */
bool gradient_is_own(orepa_tensor *t);
/* *sum += g, taking g's reference; it may wait until the sum is read. */
int gradient_accumulate(orepa_tensor **sum, orepa_tensor *g, bool may_wait);
/* t->grad += g, taking g's reference: contiguous, in t's type, and its own memory. */
int gradient_into(orepa_tensor *t, orepa_tensor *g);
/* g, whose reference is taken, in the type and on the device of t, which may have moved since; NULL with a message. */
orepa_tensor *gradient_of_kind(const orepa_tensor *t, orepa_tensor *g);
/* The same, contiguous, filled and its own memory. */
orepa_tensor *gradient_of_its_own(const orepa_tensor *t, orepa_tensor *g);

/* ---- selection.c: where the gradients are that somebody asks for, and which nodes lead there */
typedef struct selection selection;

/* The tensors asked for; they are borrowed for the selection's life. NULL and a message if there is no room. */
selection *selection_new(int count, orepa_tensor *const *xs);
void selection_free(selection *s);
/* Looks at the graph behind a node; nodes seen before are not looked at again. */
int selection_look(selection *s, autograd_node *node);
/* Whether a gradient that arrives is asked for itself, and whether it is needed for others. Nodes that were not looked
 * at are needed. */
bool selection_takes(const selection *s, const autograd_node *node);
bool selection_takes_leaf(const selection *s, const orepa_tensor *leaf);
bool selection_leads(const selection *s, const autograd_node *node);
/* The place of tensor k as it was at the start: an output of a node, or a leaf. */
const autograd_edge *selection_at(const selection *s, int k);
int selection_count(const selection *s);

/* Whether the pass that is under way asks for what goes along the edge. */
bool autograd_is_asked(const autograd_edge *edge);

#endif
