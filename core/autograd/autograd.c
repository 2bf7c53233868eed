/* autograd.c: recording, the backward pass, and freeing. All three are loops: a graph of a million nodes needs no
 * stack.
 *
 * The pass visits nodes from the youngest to the oldest, out of a heap. A node is made after everything it points to,
 * so each is visited once, when all of its gradient has arrived. */
#include "autograd/autograd.h"

#include <stdlib.h>
#include <string.h>

#include "elementwise.h"
#include "ops/gradient_promise.h"

static _Thread_local bool grad_enabled = true;
static atomic_ullong nodes_made;

bool orepa_grad_enabled(void) {
  return grad_enabled;
}

bool orepa_set_grad_enabled(bool on) {
  bool was = grad_enabled;
  grad_enabled = on;
  return was;
}

/* ---- recording ---- */

bool autograd_wanted(orepa_tensor *const *inputs, int count) {
  for (int k = 0; grad_enabled && k < count; k++)
    if (inputs[k] && inputs[k]->requires_grad)
      return true;
  return false;
}

static size_t padded(size_t bytes) {
  return (bytes + 15) & ~(size_t)15;
}

int autograd_record(const autograd_op *op, orepa_tensor *y, orepa_tensor *const *inputs, int count, int slots,
                    size_t payload_bytes, autograd_node **result) {
  *result = NULL;
  if (!autograd_wanted(inputs, count))
    return 0;
  size_t node_bytes = padded(sizeof(autograd_node)), edge_bytes = padded((size_t)count * sizeof(autograd_edge)),
         saved_bytes = padded((size_t)slots * sizeof(autograd_saved));
  char *block = calloc(1, node_bytes + edge_bytes + saved_bytes + payload_bytes);
  if (!block)
    return error_out_of_memory("%s: out of memory: no room for a node", op->name);
  autograd_node *node = (autograd_node *)block;
  node->op = op;
  node->order = atomic_fetch_add_explicit(&nodes_made, 1, memory_order_relaxed);
  atomic_init(&node->references, 1);
  node->inputs = count;
  node->edges = (autograd_edge *)(block + node_bytes);
  node->slots = slots;
  node->saved = (autograd_saved *)(block + node_bytes + edge_bytes);
  node->payload = block + node_bytes + edge_bytes + saved_bytes;
  for (int k = 0; k < count; k++) {
    if (!inputs[k] || !inputs[k]->requires_grad)
      continue;
    if (inputs[k]->node) {
      node->edges[k].node = inputs[k]->node;
      atomic_fetch_add_explicit(&inputs[k]->node->references, 1, memory_order_relaxed);
    } else {
      node->edges[k].leaf = orepa_retain(inputs[k]);
    }
  }
  y->node = node;
  y->requires_grad = true;
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
  return node->edges[input].node || node->edges[input].leaf;
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
    node->edges[k] = (autograd_edge){NULL, NULL};
  }
  for (int k = 0; k < node->slots; k++)
    if (node->saved[k].tensor.storage)
      tensor_drop_storage(&node->saved[k].tensor);
  if (node->op->dispose && !node->used)
    node->op->dispose(node->payload);
  node->used = true;
  orepa_release(node->gradient);
  node->gradient = NULL;
}

static void free_list(autograd_node *list) {
  while (list) {
    autograd_node *node = list;
    list = node->next;
    node_empty(node, &list);
    free(node);
  }
}

void autograd_node_release(autograd_node *node) {
  if (atomic_fetch_sub_explicit(&node->references, 1, memory_order_acq_rel) != 1)
    return;
  node->next = NULL;
  free_list(node);
}

/* ---- the pass ---- */

typedef struct {
  autograd_node **nodes; /* each holds a reference */
  size_t count, capacity;
} node_heap;

static int heap_push(node_heap *heap, autograd_node *node) {
  if (heap->count == heap->capacity) {
    size_t capacity = heap->capacity ? 2 * heap->capacity : 64;
    autograd_node **nodes = realloc(heap->nodes, capacity * sizeof(autograd_node *));
    if (!nodes)
      return error_out_of_memory("backward: out of memory: no room for %zu nodes", capacity);
    heap->nodes = nodes;
    heap->capacity = capacity;
  }
  size_t k = heap->count++;
  for (; k && heap->nodes[(k - 1) / 2]->order < node->order; k = (k - 1) / 2)
    heap->nodes[k] = heap->nodes[(k - 1) / 2];
  heap->nodes[k] = node;
  atomic_fetch_add_explicit(&node->references, 1, memory_order_relaxed);
  return 0;
}

static autograd_node *heap_pop(node_heap *heap) {
  autograd_node *youngest = heap->nodes[0], *last = heap->nodes[--heap->count];
  size_t k = 0;
  for (size_t child; (child = 2 * k + 1) < heap->count; k = child) {
    if (child + 1 < heap->count && heap->nodes[child + 1]->order > heap->nodes[child]->order)
      child++;
    if (heap->nodes[child]->order <= last->order)
      break;
    heap->nodes[k] = heap->nodes[child];
  }
  if (heap->count)
    heap->nodes[k] = last;
  return youngest;
}

/* Whether the pass may add into this tensor: nobody else sees its memory, and it is plain. */
static bool is_own(orepa_tensor *t) {
  return atomic_load(&t->references) == 1 && atomic_load(&t->storage->references) == 1 && orepa_is_contiguous(t);
}

/* *sum += g, taking g's reference; it may wait until the sum is read. */
static int accumulate(orepa_tensor **sum, orepa_tensor *g, bool may_wait) {
  if (!*sum) {
    *sum = g;
    return 0;
  }
  orepa_tensor *waiting = NULL;
  if (may_wait && gradient_promise_sum(*sum, g, &waiting)) {
    orepa_release(g);
    return -1;
  }
  if (waiting) {
    orepa_release(*sum);
    orepa_release(g);
    *sum = waiting;
    return 0;
  }
  if (is_own(*sum)) {
    orepa_operand operands[2] = {{.tensor = *sum}, {.tensor = g}};
    int failed = orepa_apply_in_place(FUNCTION_add, operands);
    orepa_release(g);
    return failed;
  }
  orepa_tensor *total = is_own(g) ? g : NULL;
  if (total) {
    orepa_operand operands[2] = {{.tensor = g}, {.tensor = *sum}};
    if (orepa_apply_in_place(FUNCTION_add, operands)) {
      orepa_release(g);
      return -1;
    }
  } else {
    total = orepa_add(*sum, g);
    orepa_release(g);
    if (!total)
      return -1;
  }
  orepa_release(*sum);
  *sum = total;
  return 0;
}

/* A leaf's gradient is contiguous, in the leaf's type, and its own memory. */
static int accumulate_leaf(orepa_tensor *leaf, orepa_tensor *g) {
  if (g->dtype != leaf->dtype || g->storage->device != leaf->storage->device) { /* it may have moved since */
    orepa_tensor *converted = orepa_to(g, leaf->dtype, leaf->storage->device);
    orepa_release(g);
    if (!converted)
      return -1;
    g = converted;
  }
  if (!leaf->grad && !is_own(g)) {
    orepa_tensor *own = orepa_clone(g);
    orepa_release(g);
    if (!own)
      return -1;
    g = own;
  }
  if (!leaf->grad) {
    int failed = tensor_materialize(g);
    if (failed)
      orepa_release(g);
    else
      leaf->grad = g;
    return failed;
  }
  orepa_operand operands[2] = {{.tensor = leaf->grad}, {.tensor = g}};
  int failed = orepa_apply_in_place(FUNCTION_add, operands);
  orepa_release(g);
  return failed;
}

enum { FEW_INPUTS = 8 };

static int visit(autograd_node *node, node_heap *heap, bool retain_graph) {
  orepa_tensor *few[FEW_INPUTS] = {NULL}, **dx = few;
  if (node->inputs > FEW_INPUTS && !(dx = calloc((size_t)node->inputs, sizeof *dx)))
    return error_out_of_memory("backward: out of memory: no room for %d gradients", node->inputs);
  orepa_tensor *dy = node->gradient;
  node->gradient = NULL;
  int failed = 0;
  if (node->used)
    failed = error_set("backward: the graph behind '%s' was freed by an earlier backward; ask that one to retain_graph",
                       node->op->name);
  else
    failed = node->op->backward(node, dy, dx);
  orepa_release(dy);
  for (int k = 0; k < node->inputs; k++) {
    autograd_edge *edge = &node->edges[k];
    if (!dx[k])
      continue;
    if (failed || (!edge->node && !edge->leaf)) {
      orepa_release(dx[k]);
    } else if (edge->leaf) {
      failed = accumulate_leaf(edge->leaf, dx[k]);
    } else {
      bool first = !edge->node->gradient;
      failed = accumulate(&edge->node->gradient, dx[k], edge->node->takes_sums);
      if (!failed && first)
        failed = heap_push(heap, edge->node);
    }
  }
  if (dx != few)
    free(dx);
  if (!retain_graph) {
    autograd_node *unheld = NULL;
    node_empty(node, &unheld);
    free_list(unheld);
  }
  return failed ? -1 : 0;
}

static int check_seed(orepa_tensor *y, orepa_tensor *dy) {
  if (!y->requires_grad)
    return error_set("backward: nothing that this tensor (%s) was computed from requires a gradient", tensor_text(y));
  if (!dy) {
    if (orepa_count(y) != 1)
      return error_set("backward: a tensor of %s needs the gradient to start from; only a single number does without",
                       shape_text(y->rank, y->shape));
    return 0;
  }
  if (!shape_equal(y, dy) || y->dtype != dy->dtype || y->storage->device != dy->storage->device)
    return error_set("backward: the gradient is %s on '%s', the tensor %s on '%s'", tensor_text(dy),
                     dy->storage->device->name, tensor_text(y), y->storage->device->name);
  return 0;
}

int orepa_backward(orepa_tensor *y, orepa_tensor *dy, bool retain_graph) {
  if (check_seed(y, dy))
    return -1;
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *seed = dy ? orepa_detach(dy) : orepa_full(y->dtype, y->storage->device, y->rank, y->shape, 1);
  int failed = seed ? 0 : -1;
  node_heap heap = {NULL, 0, 0};
  if (!failed && !y->node) {
    failed = accumulate_leaf(y, seed);
  } else if (!failed) {
    y->node->gradient = seed;
    failed = heap_push(&heap, y->node);
    if (failed) {
      orepa_release(seed);
      y->node->gradient = NULL;
    }
  }
  while (heap.count) {
    autograd_node *node = heap_pop(&heap);
    if (!failed) {
      failed = visit(node, &heap, retain_graph);
    } else { /* a pass that failed leaves no gradients behind */
      orepa_release(node->gradient);
      node->gradient = NULL;
    }
    autograd_node_release(node);
  }
  free(heap.nodes);
  orepa_set_grad_enabled(was);
  return failed;
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
  t->node = made->node;
  t->requires_grad = made->requires_grad;
  made->node = NULL;
  if (old)
    autograd_node_release(old);
}
