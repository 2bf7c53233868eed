/* checkpoint.c: parts of a graph that are not recorded but computed again. A checkpoint is one node: its inputs are
 * kept, nothing that the part computes on its way. When gradients arrive at its results, the part is computed once more
 * from the inputs, recorded this time, and the same pass goes on into what was recorded, and through it into the graph
 * before. So every gradient is added up in the order in which it would be without the checkpoint, to the same bits.
 *
 * While the part is computed for the first time a stand-in is the node of all results that require a gradient, so that
 * ops do what they do while a graph is recorded. */
#include <stdlib.h>

#include "autograd/anomaly.h"
#include "autograd/autograd.h"

/* ---- computing again ---- */

typedef struct {
  orepa_recompute again;
  void *payload;
  orepa_rng rng; /* at the first pass */
  orepa_dtype autocast;
} checkpoint_payload;

static _Thread_local bool recomputing;

bool orepa_is_recomputing(void) {
  return recomputing;
}

/* Input k as it was, with the graph that was before it. */
static orepa_tensor *input_again(autograd_node *node, int k) {
  const autograd_edge *edge = &node->edges[k];
  orepa_tensor *saved = autograd_saved_tensor(node, k);
  if (!saved)
    return NULL;
  if (edge->leaf)
    return orepa_retain(edge->leaf);
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *x = orepa_detach(saved);
  orepa_set_grad_enabled(was);
  if (x && edge->node)
    autograd_attach(edge->node, edge->output, x);
  return x;
}

/* Everything that the first pass saw is the same: random numbers, recording; all is put back afterwards. */
static int recompute(const checkpoint_payload *p, int inputs, orepa_tensor *const *xs, int outputs, orepa_tensor **ys) {
  orepa_rng rng = orepa_rng_state();
  orepa_dtype autocast = orepa_autocast();
  bool was_enabled = orepa_set_grad_enabled(true), was_recomputing = recomputing;
  autograd_node *was = autograd_set_stand_in(NULL);
  bool was_quiet = anomaly_set_quiet(false);
  recomputing = true;
  orepa_set_rng_state(p->rng);
  orepa_set_autocast(p->autocast);
  int failed = p->again.recompute(p->payload, inputs, xs, outputs, ys);
  orepa_set_rng_state(rng);
  orepa_set_autocast(autocast);
  recomputing = was_recomputing;
  anomaly_set_quiet(was_quiet);
  autograd_set_stand_in(was);
  orepa_set_grad_enabled(was_enabled);
  return failed;
}

static int continue_from(int k, orepa_tensor *y, orepa_tensor *dy) {
  if (!dy)
    return 0;
  if (!shape_equal(y, dy) || y->dtype != dy->dtype || y->storage->device != dy->storage->device)
    return error_set("checkpoint: result %d is %s when it is computed again, and was %s", k + 1, tensor_text(y),
                     tensor_text(dy));
  return autograd_continue(y, dy);
}

static void release_all(int count, orepa_tensor **tensors) {
  for (int k = 0; k < count; k++) {
    orepa_release(tensors[k]);
    tensors[k] = NULL;
  }
}

static int checkpoint_backward(autograd_node *node, orepa_tensor *const *dys, orepa_tensor **dx) {
  (void)dx; /* the recorded graph leads to the inputs */
  int inputs = node->inputs, outputs = node->outputs, failed = 0;
  orepa_tensor **xs = calloc((size_t)(inputs + outputs), sizeof *xs), **ys = xs + inputs;
  if (!xs)
    return error_out_of_memory("checkpoint: out of memory: no room for %d tensors", inputs + outputs);
  for (int k = 0; k < inputs && !failed; k++)
    failed = !(xs[k] = input_again(node, k));
  failed = failed || recompute(node->payload, inputs, xs, outputs, ys);
  release_all(inputs, xs);
  for (int k = 0; k < outputs && !failed; k++)
    failed = continue_from(k, ys[k], dys[k]);
  release_all(outputs, ys);
  free(xs);
  return failed ? -1 : 0;
}

static void checkpoint_dispose(void *payload) {
  checkpoint_payload *p = payload;
  p->again.dispose(p->payload);
}

static const autograd_op checkpoint_op = {"checkpoint", NULL, checkpoint_dispose};

/* ---- the stand-in ---- */

static int inside_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  (void)node, (void)dy, (void)dx;
  return error_set("backward: a tensor that a checkpoint computed on its way, and that is none of its results, has no "
                   "graph behind it");
}

static const autograd_op inside_op = {"checkpoint", inside_backward, NULL};

/* ---- the first pass ---- */

struct orepa_checkpoint {
  autograd_node *node, *inside, *was;
  bool open; /* the stand-in is in its place */
};

orepa_checkpoint *orepa_checkpoint_begin(const orepa_recompute *again, void *payload, int count,
                                         orepa_tensor *const *inputs) {
  orepa_checkpoint *c = calloc(1, sizeof *c);
  if (c)
    c->node = autograd_new(&checkpoint_op, inputs, count, count, sizeof(checkpoint_payload));
  if (!c || !c->node) {
    error_out_of_memory("checkpoint: out of memory: no room for a node");
    again->dispose(payload);
    free(c);
    return NULL;
  }
  c->node->backward_all = checkpoint_backward;
  c->node->leads_further = true;
  *(checkpoint_payload *)c->node->payload = (checkpoint_payload){*again, payload, orepa_rng_state(), orepa_autocast()};
  for (int k = 0; k < count; k++)
    autograd_save(c->node, k, inputs[k]);
  c->inside = autograd_new(&inside_op, NULL, 0, 0, 0);
  if (!c->inside) {
    orepa_checkpoint_release(c);
    return NULL;
  }
  c->was = autograd_set_stand_in(c->inside);
  c->open = true;
  return c;
}

void orepa_checkpoint_end(orepa_checkpoint *c) {
  if (c->open)
    autograd_set_stand_in(c->was);
  c->open = false;
}

/* Whether the first pass left its inputs alone: they are all that the second one has. */
static int check_inputs(autograd_node *node) {
  for (int k = 0; k < node->inputs; k++)
    if (node->saved[k].tensor.storage->version != node->saved[k].version)
      return error_set("checkpoint: input %d (%s) is changed in place, so its results can't be computed again", k + 1,
                       tensor_text(&node->saved[k].tensor));
  return 0;
}

/* What leaves the part as result k: y itself if the part computed it, else another tensor of the same storage. */
static orepa_tensor *result_of(orepa_checkpoint *c, int k, orepa_tensor *y) {
  if (!y->requires_grad)
    return orepa_retain(y);
  bool own = y->node == c->inside, was = orepa_set_grad_enabled(false);
  orepa_tensor *result = own ? orepa_retain(y) : orepa_detach(y);
  orepa_set_grad_enabled(was);
  if (own) {
    if (y->retains_grad)
      autograd_move_retained(y, c->node, k);
    autograd_node_release(y->node);
    y->node = NULL;
  }
  if (result)
    autograd_attach(c->node, k, result);
  return result;
}

int orepa_checkpoint_results(orepa_checkpoint *c, int count, orepa_tensor *const *ys, orepa_tensor **results) {
  if (check_inputs(c->node))
    return -1;
  c->node->outputs = count;
  for (int k = 0; k < count; k++)
    if (!(results[k] = result_of(c, k, ys[k]))) {
      release_all(k, results);
      return -1;
    }
  return 0;
}

void orepa_checkpoint_release(orepa_checkpoint *c) {
  if (!c)
    return;
  orepa_checkpoint_end(c);
  autograd_node_release(c->node);
  if (c->inside)
    autograd_node_release(c->inside);
  free(c);
}
