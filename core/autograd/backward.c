/* backward.c: the backward pass. It visits nodes from the youngest to the oldest, out of a heap. A node is made after
 * everything it points to, so each is visited once, when all of its gradient has arrived. */
#include <stdlib.h>

#include "autograd/pass.h"
#include "orepa_trace.h"

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

/* ---- gradients arrive ---- */

/* At an output of a node; takes g's reference. */
static int deliver(backward_pass *pass, autograd_node *node, int output, orepa_tensor *g) {
  autograd_arrival *a = node->arriving;
  if ((!a || a->pass != pass) && !(a = arrival_new(pass, node))) {
    orepa_release(g);
    return -1;
  }
  return gradient_accumulate(&a->gradients[output], g, node->takes_sums);
}

static leaf_arrival *leaf_arrival_new(backward_pass *pass, orepa_tensor *leaf) {
  leaf_arrival *a = calloc(1, sizeof *a);
  if (!a) {
    error_out_of_memory("backward: out of memory: no room for the gradient of a leaf (%s)", tensor_text(leaf));
    return NULL;
  }
  *a = (leaf_arrival){.pass = pass, .leaf = orepa_retain(leaf), .outer = leaf->arriving};
  *pass->last_leaf = a;
  pass->last_leaf = &a->next;
  return leaf->arriving = a;
}

/* At a leaf; takes g's reference. One with hooks, or that is asked for, has it held back until it is whole. */
static int deliver_to_leaf(backward_pass *pass, orepa_tensor *leaf, orepa_tensor *given) {
  leaf_arrival *a = leaf->arriving;
  bool held_back = pass->selection || leaf->hooks || (a && a->pass == pass);
  if (!held_back)
    return gradient_into(leaf, given);
  orepa_tensor *g = gradient_of_kind(leaf, given);
  if (!g)
    return -1;
  if ((!a || a->pass != pass) && !(a = leaf_arrival_new(pass, leaf))) {
    orepa_release(g);
    return -1;
  }
  return gradient_accumulate(&a->sum, g, false);
}

bool autograd_is_asked(const autograd_edge *edge) {
  const selection *s = running ? running->selection : NULL;
  if (!s)
    return true;
  return edge->leaf ? selection_takes_leaf(s, edge->leaf)
                    : selection_takes(s, edge->node) || selection_leads(s, edge->node);
}

/* Along an edge, if there is any and anybody asks; takes g's reference. */
static int deliver_along(backward_pass *pass, const autograd_edge *edge, orepa_tensor *g) {
  if ((edge->node || edge->leaf) && autograd_is_asked(edge))
    return edge->leaf ? deliver_to_leaf(pass, edge->leaf, g) : deliver(pass, edge->node, edge->output, g);
  orepa_release(g);
  return 0;
}

static autograd_edge edge_to(orepa_tensor *y) {
  return y->node ? (autograd_edge){y->node, y->output, NULL} : (autograd_edge){NULL, 0, y};
}

/* Into the graph of y; takes g's reference. */
static int start_from(backward_pass *pass, orepa_tensor *y, orepa_tensor *g) {
  const autograd_edge edge = edge_to(y);
  if (pass->selection && y->node && selection_look(pass->selection, y->node)) {
    orepa_release(g);
    return -1;
  }
  return deliver_along(pass, &edge, g);
}

int autograd_continue(orepa_tensor *y, orepa_tensor *dy) {
  return y->requires_grad ? start_from(running, y, orepa_retain(dy)) : 0;
}

/* ---- a node ---- */

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
  return failed || anomaly_check_gradients(node, dx) ? -1 : 0;
}

/* The gradients are whole: hooks are called, and may exchange them. */
static int complete(autograd_arrival *a) {
  autograd_node *node = a->node;
  for (int k = 0; k < node->outputs; k++) {
    if (!a->gradients[k])
      continue;
    if (anomaly_check_gradient(a->gradients[k], "a sum of gradients, or what backward began with, at the result of",
                               node->op->name))
      return -1;
    if (node->hooks && autograd_run_hooks(&node->hooks, k, &a->gradients[k]))
      return -1;
  }
  return 0;
}

/* Those that are asked for. */
static void take_gradients(const selection *s, const autograd_arrival *a, orepa_tensor **dxs) {
  for (int k = 0; k < selection_count(s); k++) {
    const autograd_edge *at = selection_at(s, k);
    if (at->node == a->node && a->gradients[at->output])
      dxs[k] = orepa_retain(a->gradients[at->output]);
  }
}

enum { FEW_INPUTS = 8 };

/* The node's inputs get theirs. */
static int go_on(backward_pass *pass, autograd_arrival *a) {
  autograd_node *node = a->node;
  orepa_tensor *few[FEW_INPUTS] = {NULL}, **dx = few;
  if (node->inputs > FEW_INPUTS && !(dx = calloc((size_t)node->inputs, sizeof *dx)))
    return error_out_of_memory("backward: out of memory: no room for %d gradients", node->inputs);
  int64_t event = orepa_event_open(OREPA_EVENT_NODE, node->op->name, (int64_t)node->order);
  int failed = call_backward(node, a, dx);
  release_gradients(a);
  for (int k = 0; k < node->inputs; k++) {
    if (!dx[k])
      continue;
    if (failed)
      orepa_release(dx[k]);
    else
      failed = deliver_along(pass, &node->edges[k], dx[k]);
  }
  orepa_event_close(event, 0);
  if (dx != few)
    free(dx);
  return failed ? -1 : 0;
}

static int visit(backward_pass *pass, autograd_arrival *a, orepa_tensor **dxs) {
  const selection *s = pass->selection;
  int failed = complete(a);
  if (!failed && s && selection_takes(s, a->node))
    take_gradients(s, a, dxs);
  if (s && !selection_leads(s, a->node))
    return failed;
  failed = failed || go_on(pass, a);
  if (!pass->retain_graph && !a->node->busy)
    autograd_node_use_up(a->node);
  return failed ? -1 : 0;
}

/* ---- the pass ---- */

static void go_through(backward_pass *pass, int *failed, orepa_tensor **dxs) {
  while (pass->count) {
    autograd_arrival *a = heap_pop(pass);
    a->node->arriving = a->outer;
    if (!*failed) /* a pass that failed leaves no gradients behind */
      *failed = visit(pass, a, dxs);
    arrival_free(a);
  }
}

static int finish_leaf(const backward_pass *pass, leaf_arrival *a, orepa_tensor **dxs) {
  const selection *s = pass->selection;
  if (anomaly_check_gradient(a->sum, "the gradient of a", "leaf") || autograd_run_hooks(&a->leaf->hooks, 0, &a->sum))
    return -1;
  for (int k = 0; s && k < selection_count(s); k++)
    if (selection_at(s, k)->leaf == a->leaf)
      dxs[k] = orepa_retain(a->sum);
  if (s)
    return 0;
  orepa_tensor *g = a->sum;
  a->sum = NULL;
  return gradient_into(a->leaf, g);
}

static void finish_leaves(backward_pass *pass, int *failed, orepa_tensor **dxs) {
  while (pass->leaves) {
    leaf_arrival *a = pass->leaves;
    pass->leaves = a->next;
    a->leaf->arriving = a->outer;
    if (!*failed && a->sum)
      *failed = finish_leaf(pass, a, dxs);
    orepa_release(a->sum);
    orepa_release(a->leaf);
    free(a);
  }
}

static int check_seed(const char *what, orepa_tensor *y, orepa_tensor *dy) {
  if (!y->requires_grad)
    return error_set("%s: nothing that this tensor (%s) was computed from requires a gradient", what, tensor_text(y));
  if (!dy) {
    if (orepa_count(y) != 1)
      return error_set("%s: a tensor of %s needs the gradient to start from; only a single number does without", what,
                       shape_text(y->rank, y->shape));
    return 0;
  }
  if (!shape_equal(y, dy) || y->dtype != dy->dtype || y->storage->device != dy->storage->device)
    return error_set("%s: the gradient is %s on '%s', the tensor %s on '%s'", what, tensor_text(dy),
                     dy->storage->device->name, tensor_text(y), y->storage->device->name);
  return 0;
}

static int seed(backward_pass *pass, orepa_tensor *y, orepa_tensor *dy) {
  orepa_tensor *g = dy ? orepa_detach(dy) : orepa_full(y->dtype, y->storage->device, y->rank, y->shape, 1);
  return g ? start_from(pass, y, g) : -1;
}

/* From `count` tensors; dys, and any of them, may be NULL. dxs are those of the selection, if there is one. */
static int run_pass(backward_pass *pass, int count, orepa_tensor *const *ys, orepa_tensor *const *dys,
                    orepa_tensor **dxs) {
  bool was = orepa_set_grad_enabled(false), was_quiet = anomaly_set_quiet(true);
  backward_pass *outer = running;
  int64_t event = orepa_event_open(OREPA_EVENT_OP, "backward", 0);
  int failed = 0;
  pass->last_leaf = &pass->leaves;
  running = pass;
  for (int k = 0; k < count && !failed; k++)
    failed = seed(pass, ys[k], dys ? dys[k] : NULL);
  go_through(pass, &failed, dxs);
  finish_leaves(pass, &failed, dxs);
  orepa_event_close(event, 0);
  free(pass->heap);
  running = outer;
  anomaly_set_quiet(was_quiet);
  orepa_set_grad_enabled(was);
  return failed;
}

int orepa_backward(orepa_tensor *y, orepa_tensor *dy, bool retain_graph) {
  if (check_seed("backward", y, dy))
    return -1;
  backward_pass pass = {.retain_graph = retain_graph};
  return run_pass(&pass, 1, &y, &dy, NULL);
}

static int check_gradients(int count, orepa_tensor *const *ys, orepa_tensor *const *dys, int wanted,
                           orepa_tensor *const *xs) {
  for (int k = 0; k < count; k++)
    if (check_seed("grad", ys[k], dys ? dys[k] : NULL))
      return -1;
  for (int k = 0; k < wanted; k++)
    if (!xs[k]->requires_grad)
      return error_set("grad: tensor %d of those asked for (%s) requires no gradient", k + 1, tensor_text(xs[k]));
  return 0;
}

/* What the pass found, as tensors that nobody else sees. */
static int finish_gradients(int count, orepa_tensor *const *xs, orepa_tensor **dxs) {
  bool was = orepa_set_grad_enabled(false), was_quiet = anomaly_set_quiet(true);
  int failed = 0;
  for (int k = 0; k < count && !failed; k++)
    if (dxs[k])
      failed = !(dxs[k] = gradient_of_its_own(xs[k], dxs[k]));
  anomaly_set_quiet(was_quiet);
  orepa_set_grad_enabled(was);
  return failed;
}

int orepa_gradients(int count, orepa_tensor *const *ys, orepa_tensor *const *dys, int wanted, orepa_tensor *const *xs,
                    bool retain_graph, orepa_tensor **dxs) {
  for (int k = 0; k < wanted; k++)
    dxs[k] = NULL;
  if (check_gradients(count, ys, dys, wanted, xs))
    return -1;
  backward_pass pass = {.retain_graph = retain_graph, .selection = selection_new(wanted, xs)};
  int failed = !pass.selection || run_pass(&pass, count, ys, dys, dxs);
  selection_free(pass.selection);
  failed = failed || finish_gradients(wanted, xs, dxs);
  for (int k = 0; k < wanted && failed; k++) {
    orepa_release(dxs[k]);
    dxs[k] = NULL;
  }
  return failed ? -1 : 0;
}
