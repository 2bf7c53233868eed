/* autograd.c: recording and freeing, and what users ask of the graph; backward.c goes through it. Freeing is a loop: a
 * graph of a million nodes needs no stack. */
#include "autograd/pass.h"

#include <stdlib.h>
#include <string.h>

#include "loader_thread.h"

static _Thread_local bool grad_enabled = true;
static _Thread_local autograd_node *stand_in;
static atomic_ullong nodes_made;

bool orepa_grad_enabled(void) {
  return grad_enabled;
}

bool orepa_set_grad_enabled(bool on) {
  bool was = grad_enabled;
  grad_enabled = on && !loader_thread_here();
  return was;
}

bool orepa_is_recording(void) {
  return grad_enabled && !stand_in;
}

/* ---- recording ---- */

bool autograd_wanted(orepa_tensor *const *inputs, int count) {
  for (int k = 0; grad_enabled && k < count; k++)
    if (inputs[k] && inputs[k]->requires_grad)
      return true;
  return false;
}

autograd_node *autograd_node_retain(autograd_node *node) {
  atomic_fetch_add_explicit(&node->references, 1, memory_order_relaxed);
  return node;
}

static size_t padded(size_t bytes) {
  return (bytes + 15) & ~(size_t)15;
}

autograd_node *autograd_new(const autograd_op *op, orepa_tensor *const *inputs, int count, int slots,
                            size_t payload_bytes) {
  size_t node_bytes = padded(sizeof(autograd_node)), edge_bytes = padded((size_t)count * sizeof(autograd_edge)),
         saved_bytes = padded((size_t)slots * sizeof(autograd_saved));
  char *block = calloc(1, node_bytes + edge_bytes + saved_bytes + payload_bytes);
  if (!block) {
    error_out_of_memory("%s: out of memory: no room for a node", op->name);
    return NULL;
  }
  autograd_node *node = (autograd_node *)block;
  node->op = op;
  node->order = atomic_fetch_add_explicit(&nodes_made, 1, memory_order_relaxed);
  atomic_init(&node->references, 1);
  node->inputs = count;
  node->outputs = 1;
  node->edges = (autograd_edge *)(block + node_bytes);
  node->slots = slots;
  node->saved = (autograd_saved *)(block + node_bytes + edge_bytes);
  node->payload = block + node_bytes + edge_bytes + saved_bytes;
  node->place = anomaly_place();
  for (int k = 0; k < count; k++) {
    if (!inputs[k] || !inputs[k]->requires_grad)
      continue;
    if (inputs[k]->node) {
      node->edges[k].node = autograd_node_retain(inputs[k]->node);
      node->edges[k].output = inputs[k]->output;
    } else {
      node->edges[k].leaf = orepa_retain(inputs[k]);
    }
  }
  return node;
}

uint64_t autograd_nodes_made(void) {
  return atomic_load_explicit(&nodes_made, memory_order_relaxed);
}

void autograd_attach(autograd_node *node, int output, orepa_tensor *y) {
  y->node = autograd_node_retain(node);
  y->output = output;
  y->requires_grad = true;
}

autograd_node *autograd_set_stand_in(autograd_node *node) {
  autograd_node *was = stand_in;
  stand_in = node;
  return was;
}

autograd_node *autograd_stand_in(void) {
  return stand_in;
}

int autograd_record(const autograd_op *op, orepa_tensor *y, orepa_tensor *const *inputs, int count, int slots,
                    size_t payload_bytes, autograd_node **result) {
  *result = NULL;
  if (anomaly_check_result(op->name, y, count, inputs))
    return -1;
  if (!autograd_wanted(inputs, count))
    return 0;
  if (stand_in) {
    autograd_attach(stand_in, 0, y);
    return 0;
  }
  autograd_node *node = autograd_new(op, inputs, count, slots, payload_bytes);
  if (!node)
    return -1;
  autograd_attach(node, 0, y);
  autograd_node_release(node); /* y holds it */
  *result = node;
  return 0;
}

void autograd_save(autograd_node *node, int slot, orepa_tensor *t) {
  if (!t)
    return;
  autograd_saved *saved = &node->saved[slot];
  saved->tensor = *t;
  saved->tensor.node = NULL;
  saved->tensor.grad = NULL;
  saved->tensor.hooks = NULL;
  saved->tensor.retains_grad = false;
  saved->tensor.requires_grad = false;
  atomic_init(&saved->tensor.references, 1); /* the node's own: an op that retains the handle gives it back */
  atomic_fetch_add_explicit(&t->storage->references, 1, memory_order_relaxed);
  saved->version = t->storage->version;
}

orepa_tensor *autograd_saved_tensor(autograd_node *node, int slot) {
  autograd_saved *saved = &node->saved[slot];
  if (!saved->tensor.storage)
    return NULL;
  if (saved->tensor.storage->version != saved->version) {
    error_set("%s: backward needs a tensor (%s) that was changed in place after the forward pass (version %llu then, "
              "%llu now)",
              node->op->name, tensor_text(&saved->tensor), (unsigned long long)saved->version,
              (unsigned long long)saved->tensor.storage->version);
    return NULL;
  }
  return &saved->tensor;
}

bool autograd_needs(const autograd_node *node, int input) {
  const autograd_edge *edge = &node->edges[input];
  if (!edge->node && !edge->leaf)
    return false;
  return !node->busy || autograd_is_asked(edge);
}

/* ---- freeing ---- */

/* Gives up everything that the node holds; nodes that nothing holds any more go on the list. */
static void node_empty(autograd_node *node, autograd_node **list) {
  for (int k = 0; k < node->inputs; k++) {
    autograd_node *older = node->edges[k].node;
    if (older && atomic_fetch_sub_explicit(&older->references, 1, memory_order_acq_rel) == 1) {
      older->next = *list;
      *list = older;
    }
    orepa_release(node->edges[k].leaf);
    node->edges[k] = (autograd_edge){NULL, 0, NULL};
  }
  for (int k = 0; k < node->slots; k++)
    if (node->saved[k].tensor.storage)
      tensor_drop_storage(&node->saved[k].tensor);
  autograd_drop_hooks(&node->hooks);
  if (node->op->dispose && !node->used)
    node->op->dispose(node->payload);
  node->used = true;
}

static void free_list(autograd_node *list) {
  while (list) {
    autograd_node *node = list;
    list = node->next;
    node_empty(node, &list);
    free(node->place);
    free(node);
  }
}

void autograd_node_use_up(autograd_node *node) {
  autograd_node *unheld = NULL;
  node_empty(node, &unheld);
  free_list(unheld);
}

void autograd_node_release(autograd_node *node) {
  if (atomic_fetch_sub_explicit(&node->references, 1, memory_order_acq_rel) != 1)
    return;
  node->next = NULL;
  free_list(node);
}

/* ---- what users ask of tensors ---- */

bool orepa_requires_grad(const orepa_tensor *t) {
  return t->requires_grad;
}

bool orepa_is_leaf(const orepa_tensor *t) {
  return !t->node;
}

int orepa_set_requires_grad(orepa_tensor *t, bool on) {
  if (t->node)
    return error_set("requires_grad: this tensor (%s) was computed by '%s'; only a leaf can be asked (detach it first)",
                     tensor_text(t), t->node->op->name);
  if (on && !orepa_dtype_is_float(t->dtype))
    return error_set("requires_grad: %s has no gradients, only floats have", orepa_dtype_name(t->dtype));
  t->requires_grad = on;
  return 0;
}

orepa_tensor *orepa_grad(const orepa_tensor *t) {
  return t->grad;
}

int orepa_set_grad(orepa_tensor *t, orepa_tensor *grad) {
  if (grad && (!shape_equal(t, grad) || t->dtype != grad->dtype || t->storage->device != grad->storage->device))
    return error_set("grad: a gradient of %s for a tensor of %s", tensor_text(grad), tensor_text(t));
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *own = !grad ? NULL : orepa_is_contiguous(grad) ? orepa_detach(grad) : orepa_clone(grad);
  orepa_set_grad_enabled(was);
  if (grad && !own)
    return -1;
  orepa_release(t->grad);
  t->grad = own;
  return 0;
}

/* ---- in-place ops ---- */

int autograd_check_in_place(const char *op, orepa_tensor *t, bool recorded) {
  for (int d = 0; d < t->rank && orepa_count(t); d++) /* an empty tensor's strides mean nothing */
    if (t->shape[d] > 1 && t->strides[d] == 0)
      return error_set("%s_: an expanded tensor (%s) has elements that are one; clone it first", op, tensor_text(t));
  if (!recorded)
    return 0;
  if (!t->node && t->requires_grad)
    return error_set("%s_: a leaf that requires a gradient (%s) can only be changed under no_grad; use %s", op,
                     tensor_text(t), op);
  if (t->is_view || t->storage->viewed_in_graph)
    return error_set("%s_: this tensor (%s) %s, so a change in place can't be followed by gradients; use %s", op,
                     tensor_text(t), t->is_view ? "is a view of another" : "is seen by views", op);
  return 0;
}

void autograd_rebase(orepa_tensor *t, orepa_tensor *made) {
  autograd_node *old = t->node;
  if (t->retains_grad)
    autograd_move_retained(t, made->node, made->output);
  t->node = made->node;
  t->output = made->output;
  t->requires_grad = made->requires_grad;
  made->node = NULL;
  if (old)
    autograd_node_release(old);
}
