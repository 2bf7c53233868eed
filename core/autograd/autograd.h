/* autograd.h: how an op records itself, and how it finds again what it saved.
 *
 * A node belongs to the tensor that it made. It owns what it saved and points back to the nodes (or leaves) of its
 * inputs; nothing points forward. An op's forward ends with
 *
 *     if (autograd_record(&op, y, inputs, count, slots, sizeof payload, &node)) return tensor_fail(y);
 *     if (node) { autograd_save(node, 0, x); payload = node->payload; ... }
 *
 * and its backward writes into dx[k] a new reference to the gradient of input k, for each k that autograd_needs. */
#ifndef OREPA_CORE_AUTOGRAD_H
#define OREPA_CORE_AUTOGRAD_H

#include "tensor/tensor.h"

typedef struct {
  const char *name;
  /* 0, or -1 with a message; what stands in dx is released by the caller either way. */
  int (*backward)(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx);
  /* Frees what the payload owns; may be NULL. */
  void (*dispose)(void *payload);
} autograd_op;

typedef struct {
  orepa_tensor tensor; /* a handle without node, in place; its storage is NULL if the slot is empty */
  uint64_t version;
} autograd_saved;

/* Where a gradient goes: to an output of a node, or to a leaf's grad, or nowhere. */
typedef struct {
  autograd_node *node;
  int output;
  orepa_tensor *leaf;
} autograd_edge;

typedef struct autograd_arrival autograd_arrival; /* gradients on their way, of one pass: pass.h */

struct autograd_node {
  const autograd_op *op;
  uint64_t order; /* of making: a node is younger than all it points to */
  atomic_int references;
  int inputs;
  autograd_edge *edges;
  int slots;
  autograd_saved *saved;
  int outputs;
  /* Where there may be several, set by the op, whose own backward is not called then: dys[k] is NULL if no gradient
   * arrived at output k. */
  int (*backward_all)(autograd_node *node, orepa_tensor *const *dys, orepa_tensor **dx);
  autograd_arrival *arriving; /* while a backward pass is under way, of the innermost one that came here */
  autograd_node *next;        /* in the list of nodes being freed */
  orepa_hook *hooks;          /* on its outputs */
  char *place;                /* where in the user's program it was made; NULL: nobody asked */
  bool used;                  /* by a backward pass that freed it */
  bool busy;                  /* its backward is running */
  bool takes_sums;    /* its backward makes good use of a gradient that is promised to be a sum; the op says so */
  bool leads_further; /* its backward goes on into a graph that its edges don't show; the op says so */
  void *payload;
};

/* Makes y's node if a graph is being recorded and some input requires a gradient; else *node is NULL. An input may be
 * NULL. The node has `slots` for saved tensors and a zeroed payload. */
int autograd_record(const autograd_op *op, orepa_tensor *y, orepa_tensor *const *inputs, int count, int slots,
                    size_t payload_bytes, autograd_node **node);
/* Whether autograd_record would make a node. */
bool autograd_wanted(orepa_tensor *const *inputs, int count);
/* A node by itself, without output; autograd_record is this and autograd_attach, for ops of one output. The node is
 * given back with autograd_node_release. */
autograd_node *autograd_new(const autograd_op *op, orepa_tensor *const *inputs, int count, int slots,
                            size_t payload_bytes);
/* How many nodes were made: the order of the next. */
uint64_t autograd_nodes_made(void);
/* Makes y, which no op computed, output number `output` of the node. */
void autograd_attach(autograd_node *node, int output, orepa_tensor *y);
/* Saves a tensor's storage, never its node. NULL is allowed. */
void autograd_save(autograd_node *node, int slot, orepa_tensor *t);
/* Borrowed; NULL and a message if it was changed since. (A slot that holds nothing gives NULL too, without one.) */
orepa_tensor *autograd_saved_tensor(autograd_node *node, int slot);
/* In backward: whether the pass that is under way asks for it. */
bool autograd_needs(const autograd_node *node, int input);

/* In-place ops: may `t` be written by `op`, given whether the result is recorded? 0, or -1 with a message. */
int autograd_check_in_place(const char *op, orepa_tensor *t, bool recorded);
/* Moves the history of t behind the node of `made`, an alias of t that an op recorded: t is now what the op made. */
void autograd_rebase(orepa_tensor *t, orepa_tensor *made);

autograd_node *autograd_node_retain(autograd_node *node);
void autograd_node_release(autograd_node *node);
/* Gives up all that the node holds: a pass came through. */
void autograd_node_use_up(autograd_node *node);

/* ---- hooks.c */
/* Calls the hooks of an output in the order in which they came; *g, a reference, is exchanged for what they give. Then
 * a tensor that retains its gradient gets it. */
int autograd_run_hooks(orepa_hook **hooks, int output, orepa_tensor **g);
void autograd_drop_hooks(orepa_hook **hooks);
/* t is freed. */
void autograd_retain_no_more(orepa_tensor *t);
/* t, which retains its gradient, is about to be output `output` of another node (NULL: a leaf). */
void autograd_move_retained(orepa_tensor *t, autograd_node *node, int output);

/* For a backward function: lets the gradient dy of y go on into y's graph, in the pass that is under way. */
int autograd_continue(orepa_tensor *y, orepa_tensor *dy);

/* Ops that would be recorded are not while there is a stand-in: results that require a gradient get it as their node
 * instead of one of their own. Everything else is as if they were. NULL: ops are recorded. Gives back what was. */
autograd_node *autograd_set_stand_in(autograd_node *node);
autograd_node *autograd_stand_in(void);

#endif
