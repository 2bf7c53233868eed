/* custom.c: ops from outside the engine, with a backward function of their own. What comes from outside is checked:
 * gradients must fit the inputs, and what was saved must be unchanged. Results are other tensors than those that the op
 * computed, of the same memory: so an op that keeps what it computed doesn't keep its own node alive. */
#include <stdlib.h>
#include <string.h>

#include "autograd/anomaly.h"
#include "autograd/autograd.h"

typedef struct {
  orepa_dtype dtype;
  const orepa_device *device;
  int rank;
  int64_t shape[OREPA_MAX_RANK];
  bool is_variable; /* of outputs */
} custom_outline;

typedef struct {
  orepa_custom custom;
  void *payload;
  autograd_op op; /* named as the user named it */
  custom_outline *inputs, *outputs;
} custom_payload;

/* Whether result k may have a gradient. */
static bool is_variable(const orepa_custom_forward *f, int k) {
  return orepa_dtype_is_float(f->ys[k]->dtype) && !(f->constant && f->constant[k]);
}

static custom_outline outline_of(const orepa_tensor *t) {
  custom_outline o = {.dtype = t->dtype, .device = t->storage->device, .rank = t->rank};
  memcpy(o.shape, t->shape, sizeof o.shape);
  return o;
}

static bool fits(const custom_outline *o, const orepa_tensor *t) {
  return o->dtype == t->dtype && o->device == t->storage->device && o->rank == t->rank &&
         !memcmp(o->shape, t->shape, (size_t)o->rank * sizeof *o->shape);
}

static void release_all(int count, orepa_tensor **tensors) {
  for (int k = 0; k < count; k++) {
    orepa_release(tensors[k]);
    tensors[k] = NULL;
  }
}

/* ---- backward ---- */

/* What was saved, as tensors that may outlive the node. */
static int saved_again(autograd_node *node, orepa_tensor **kept) {
  for (int k = 0; k < node->slots; k++) {
    orepa_tensor *saved = autograd_saved_tensor(node, k);
    if (!saved || !(kept[k] = orepa_detach(saved)))
      return -1;
  }
  return 0;
}

/* Where no gradient arrived at an output that may have one, it is zero. */
static int gradients_again(const autograd_node *node, const custom_payload *p, orepa_tensor *const *dys,
                           orepa_tensor **all) {
  for (int k = 0; k < node->outputs; k++) {
    const custom_outline *o = &p->outputs[k];
    if (!o->is_variable)
      continue;
    all[k] = dys[k] ? orepa_retain(dys[k]) : orepa_full(o->dtype, o->device, o->rank, o->shape, 0);
    if (!all[k])
      return -1;
  }
  return 0;
}

/* Exchanges what the backward function gave for plain tensors, without a graph of their own. */
static int check_gradients(const autograd_node *node, const custom_payload *p, orepa_tensor **dx) {
  for (int k = 0; k < node->inputs; k++) {
    orepa_tensor *given = dx[k];
    if (!given)
      continue;
    dx[k] = NULL;
    int failed = 0;
    if (!autograd_needs(node, k))
      ;
    else if (!fits(&p->inputs[k], given))
      failed =
          error_set("%s: backward gave %s on '%s' as the gradient of argument %d, which is %s %s on '%s'", p->op.name,
                    tensor_text(given), given->storage->device->name, k + 1, orepa_dtype_name(p->inputs[k].dtype),
                    shape_text(p->inputs[k].rank, p->inputs[k].shape), p->inputs[k].device->name);
    else
      failed = !(dx[k] = orepa_detach(given));
    orepa_release(given);
    if (failed)
      return -1;
  }
  return 0;
}

static int call_backward(autograd_node *node, orepa_tensor *const *dys, orepa_tensor **tensors, bool *needs,
                         orepa_tensor **dx) {
  custom_payload *p = node->payload;
  orepa_tensor **kept = tensors, **all = tensors + node->slots;
  if (saved_again(node, kept) || gradients_again(node, p, dys, all))
    return -1;
  for (int k = 0; k < node->inputs; k++)
    needs[k] = autograd_needs(node, k);
  orepa_custom_call call = {node->slots, node->outputs, node->inputs, kept, all, needs, dx};
  bool was_quiet = anomaly_set_quiet(false);
  int failed = p->custom.backward(p->payload, &call);
  anomaly_set_quiet(was_quiet);
  return failed || check_gradients(node, p, dx) ? -1 : 0;
}

static int custom_backward(autograd_node *node, orepa_tensor *const *dys, orepa_tensor **dx) {
  int count = node->slots + node->outputs;
  orepa_tensor **tensors = calloc((size_t)count, sizeof *tensors);
  bool *needs = calloc((size_t)node->inputs, sizeof *needs);
  int failed = !tensors || !needs;
  if (failed)
    error_out_of_memory("%s: out of memory: no room for %d tensors", node->op->name, count);
  failed = failed || call_backward(node, dys, tensors, needs, dx);
  if (tensors)
    release_all(count, tensors);
  free(tensors);
  free(needs);
  return failed ? -1 : 0;
}

static void custom_dispose(void *payload) {
  custom_payload *p = payload;
  p->custom.dispose(p->payload);
}

/* ---- making ---- */

static autograd_node *node_new(const orepa_custom_forward *f) {
  size_t outlines = (size_t)(f->inputs + f->outputs) * sizeof(custom_outline), name = strlen(f->name) + 1;
  autograd_op op = {f->name, NULL, NULL};
  autograd_node *node = autograd_new(&op, f->xs, f->inputs, f->saved, sizeof(custom_payload) + outlines + name);
  if (!node)
    return NULL;
  custom_payload *p = node->payload;
  p->inputs = (custom_outline *)(p + 1);
  p->outputs = p->inputs + f->inputs;
  p->op.name = memcpy(p->outputs + f->outputs, f->name, name);
  node->op = &p->op;
  node->outputs = f->outputs;
  node->backward_all = custom_backward;
  for (int k = 0; k < f->inputs; k++)
    if (f->xs[k])
      p->inputs[k] = outline_of(f->xs[k]);
  for (int k = 0; k < f->outputs; k++) {
    p->outputs[k] = outline_of(f->ys[k]);
    p->outputs[k].is_variable = is_variable(f, k);
  }
  for (int k = 0; k < f->saved; k++)
    autograd_save(node, k, f->kept[k]);
  return node;
}

static bool shares_with_input(const orepa_custom_forward *f, const orepa_tensor *y) {
  for (int k = 0; k < f->inputs; k++)
    if (f->xs[k] && f->xs[k]->storage == y->storage)
      return true;
  return false;
}

/* Result k, with the node as its history. */
static orepa_tensor *result_of(const orepa_custom_forward *f, autograd_node *node, int output, int k) {
  orepa_tensor *y = f->ys[k], *result = is_variable(f, k) ? orepa_detach(y) : orepa_retain(y);
  if (!result || !is_variable(f, k))
    return result;
  if (shares_with_input(f, y)) {
    result->is_view = true;
    y->storage->viewed_in_graph = true;
  }
  autograd_attach(node, output, result);
  return result;
}

/* A stand-in has one output for all. */
static int make_results(const orepa_custom_forward *f, autograd_node *node, bool stands_in, orepa_tensor **results) {
  for (int k = 0; k < f->outputs; k++)
    if (!(results[k] = result_of(f, node, stands_in ? 0 : k, k))) {
      release_all(k, results);
      return -1;
    }
  return 0;
}

static int make_recorded(const orepa_custom *custom, void *payload, const orepa_custom_forward *f,
                         orepa_tensor **results) {
  autograd_node *node = node_new(f);
  if (!node) {
    custom->dispose(payload);
    return -1;
  }
  custom_payload *p = node->payload;
  p->custom = *custom;
  p->payload = payload;
  p->op.dispose = custom_dispose;
  int failed = make_results(f, node, false, results);
  autograd_node_release(node); /* the results hold it */
  return failed;
}

int orepa_custom_results(const orepa_custom *custom, void *payload, const orepa_custom_forward *f,
                         orepa_tensor **results) {
  int failed = 0;
  for (int k = 0; k < f->outputs && !failed; k++)
    failed = anomaly_check_result(f->name, f->ys[k], f->inputs, f->xs);
  bool wanted = autograd_wanted(f->xs, f->inputs);
  if (!failed && wanted && !autograd_stand_in())
    return make_recorded(custom, payload, f, results);
  custom->dispose(payload);
  if (failed)
    return -1;
  if (wanted)
    return make_results(f, autograd_stand_in(), true, results);
  for (int k = 0; k < f->outputs; k++)
    results[k] = orepa_retain(f->ys[k]);
  return 0;
}
