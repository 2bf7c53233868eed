/* backward.c: the backward pass. It visits nodes from the youngest to the oldest, out of a heap. A node is made after
 * everything it points to, so each is visited once, when all of its gradient has arrived. */
#include <stdlib.h>

#include "autograd/autograd.h"
#include "elementwise.h"
#include "ops/gradient_promise.h"
#include "orepa_trace.h"

/* ---- what is under way ----
 *
 * A backward function may start another pass (a callback of the user's does what it likes), which may come to nodes
 * where gradients of the outer one wait. So what arrives at a node belongs to a pass, and the node holds that of the
 * innermost. */

typedef struct backward_pass backward_pass;

struct autograd_arrival {
  const backward_pass *pass;
  autograd_node *node;       /* a reference */
  autograd_arrival *outer;   /* of an outer pass */
  orepa_tensor *gradients[]; /* one for each of the node's outputs */
};

struct backward_pass {
  autograd_arrival **heap; /* the youngest node's is the first */
  size_t count, capacity;
  bool retain_graph;
};

static _Thread_local backward_pass *running;

static uint64_t order_of(const autograd_arrival *a) {
  return a->node->order;
}

static int heap_push(backward_pass *pass, autograd_arrival *arrival) {
  if (pass->count == pass->capacity) {
    size_t capacity = pass->capacity ? 2 * pass->capacity : 64;
    autograd_arrival **heap = realloc(pass->heap, capacity * sizeof *heap);
    if (!heap)
      return error_out_of_memory("backward: out of memory: no room for %zu nodes", capacity);
    pass->heap = heap;
    pass->capacity = capacity;
  }
  size_t k = pass->count++;
  for (; k && order_of(pass->heap[(k - 1) / 2]) < order_of(arrival); k = (k - 1) / 2)
    pass->heap[k] = pass->heap[(k - 1) / 2];
  pass->heap[k] = arrival;
  return 0;
}

static autograd_arrival *heap_pop(backward_pass *pass) {
  autograd_arrival **heap = pass->heap, *youngest = heap[0], *last = heap[--pass->count];
  size_t k = 0;
  for (size_t child; (child = 2 * k + 1) < pass->count; k = child) {
    if (child + 1 < pass->count && order_of(heap[child + 1]) > order_of(heap[child]))
      child++;
    if (order_of(heap[child]) <= order_of(last))
      break;
    heap[k] = heap[child];
  }
  if (pass->count)
    heap[k] = last;
  return youngest;
}

static autograd_arrival *arrival_new(backward_pass *pass, autograd_node *node) {
  autograd_arrival *a = calloc(1, sizeof *a + (size_t)node->outputs * sizeof *a->gradients);
  if (!a) {
    error_out_of_memory("backward: out of memory: no room for the gradients of '%s'", node->op->name);
    return NULL;
  }
  a->pass = pass;
  a->node = node;
  if (heap_push(pass, a)) {
    free(a);
    return NULL;
  }
  autograd_node_retain(node);
  a->outer = node->arriving;
  return node->arriving = a;
}

static void release_gradients(autograd_arrival *a) {
  for (int k = 0; k < a->node->outputs; k++) {
    orepa_release(a->gradients[k]);
    a->gradients[k] = NULL;
  }
}

static void arrival_free(autograd_arrival *a) {
  release_gradients(a);
  autograd_node_release(a->node);
  free(a);
}

/* ---- sums ---- */

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

/* ---- the pass ---- */

/* A gradient reaches an output of a node; takes g's reference. */
static int deliver(backward_pass *pass, autograd_node *node, int output, orepa_tensor *g) {
  autograd_arrival *a = node->arriving;
  if ((!a || a->pass != pass) && !(a = arrival_new(pass, node))) {
    orepa_release(g);
    return -1;
  }
  return accumulate(&a->gradients[output], g, node->takes_sums);
}

int autograd_continue(orepa_tensor *y, orepa_tensor *dy) {
  if (!y->requires_grad)
    return 0;
  orepa_retain(dy);
  return y->node ? deliver(running, y->node, y->output, dy) : accumulate_leaf(y, dy);
}

static atomic_bool interrupted;

void orepa_interrupt(bool on) {
  atomic_store(&interrupted, on);
}

static int call_backward(autograd_node *node, const autograd_arrival *a, orepa_tensor **dx) {
  if (atomic_load_explicit(&interrupted, memory_order_relaxed))
    return error_set("backward: interrupted");
  if (node->busy)
    return error_set("backward: a pass inside the backward function of '%s' leads through that op itself",
                     node->op->name);
  if (node->used)
    return error_set("backward: the graph behind '%s' was freed by an earlier backward; ask that one to retain_graph",
                     node->op->name);
  node->busy = true;
  int failed =
      node->backward_all ? node->backward_all(node, a->gradients, dx) : node->op->backward(node, a->gradients[0], dx);
  node->busy = false;
  return failed;
}

enum { FEW_INPUTS = 8 };

static int visit(backward_pass *pass, autograd_arrival *a) {
  autograd_node *node = a->node;
  orepa_tensor *few[FEW_INPUTS] = {NULL}, **dx = few;
  if (node->inputs > FEW_INPUTS && !(dx = calloc((size_t)node->inputs, sizeof *dx)))
    return error_out_of_memory("backward: out of memory: no room for %d gradients", node->inputs);
  int64_t event = orepa_event_open(OREPA_EVENT_NODE, node->op->name, (int64_t)node->order);
  int failed = call_backward(node, a, dx);
  release_gradients(a);
  for (int k = 0; k < node->inputs; k++) {
    autograd_edge *edge = &node->edges[k];
    if (!dx[k])
      continue;
    if (failed || (!edge->node && !edge->leaf))
      orepa_release(dx[k]);
    else
      failed = edge->leaf ? accumulate_leaf(edge->leaf, dx[k]) : deliver(pass, edge->node, edge->output, dx[k]);
  }
  orepa_event_close(event, 0);
  if (dx != few)
    free(dx);
  if (!pass->retain_graph && !node->busy)
    autograd_node_use_up(node);
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
  backward_pass pass = {.retain_graph = retain_graph}, *outer = running;
  int64_t event = orepa_event_open(OREPA_EVENT_OP, "backward", 0);
  running = &pass;
  if (!failed)
    failed = y->node ? deliver(&pass, y->node, y->output, seed) : accumulate_leaf(y, seed);
  while (pass.count) {
    autograd_arrival *a = heap_pop(&pass);
    a->node->arriving = a->outer;
    if (!failed) /* a pass that failed leaves no gradients behind */
      failed = visit(&pass, a);
    arrival_free(a);
  }
  orepa_event_close(event, 0);
  free(pass.heap);
  running = outer;
  orepa_set_grad_enabled(was);
  return failed;
}
