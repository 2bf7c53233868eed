/* hooks.c: what is called with the gradient of a tensor, and tensors that keep theirs though they are no leaves. Hooks
 * belong to what the gradient arrives at: the output of a node, or a leaf. So they are called whether or not anybody
 * still holds the tensor, and the graph frees them. */
#include <stdlib.h>

#include "autograd/pass.h"

struct orepa_hook {
  atomic_int references; /* the list's, the holder's of the handle, and those of passes that are about to call it */
  orepa_hook_kind kind;
  void *payload;
  int output;
  orepa_tensor *retains; /* the tensor whose grad is to be set; borrowed: it takes the entry away before it is freed */
  orepa_hook *next, **link; /* what points here; NULL: in no list any more */
};

/* ---- lists ---- */

static void append(orepa_hook **list, orepa_hook *h) {
  while (*list)
    list = &(*list)->next;
  *list = h;
  h->link = list;
}

void orepa_hook_release(orepa_hook *h) {
  if (h && atomic_fetch_sub_explicit(&h->references, 1, memory_order_acq_rel) == 1)
    free(h);
}

void orepa_hook_remove(orepa_hook *h) {
  if (!h->link)
    return;
  *h->link = h->next;
  if (h->next)
    h->next->link = h->link;
  h->link = NULL;
  if (h->kind.dispose)
    h->kind.dispose(h->payload);
  orepa_hook_release(h);
}

void autograd_drop_hooks(orepa_hook **hooks) {
  while (*hooks)
    orepa_hook_remove(*hooks);
}

static orepa_hook *hook_new(const orepa_hook_kind *kind, void *payload, int output) {
  orepa_hook *h = calloc(1, sizeof *h);
  if (!h) {
    error_out_of_memory("register_hook: out of memory: no room for a hook");
    return NULL;
  }
  atomic_init(&h->references, 1);
  h->kind = *kind;
  h->payload = payload;
  h->output = output;
  return h;
}

static orepa_hook **list_of(orepa_tensor *t) {
  return t->node ? &t->node->hooks : &t->hooks;
}

static int check_gradient_asked(const char *what, const orepa_tensor *t) {
  if (!t->requires_grad)
    return error_set("%s: this tensor (%s) requires no gradient", what, tensor_text(t));
  if (t->node && t->node->used)
    return error_set("%s: the graph behind this tensor (%s, computed by '%s') was freed by an earlier backward", what,
                     tensor_text(t), t->node->op->name);
  return 0;
}

orepa_hook *orepa_register_hook(orepa_tensor *t, const orepa_hook_kind *kind, void *payload) {
  orepa_hook *h = check_gradient_asked("register_hook", t) ? NULL : hook_new(kind, payload, t->node ? t->output : 0);
  if (!h) {
    if (kind->dispose)
      kind->dispose(payload);
    return NULL;
  }
  append(list_of(t), h);
  atomic_fetch_add_explicit(&h->references, 1, memory_order_relaxed); /* the caller's */
  return h;
}

/* ---- tensors that retain their gradient ---- */

int orepa_retain_grad(orepa_tensor *t) {
  static const orepa_hook_kind none = {NULL, NULL};
  if (check_gradient_asked("retain_grad", t))
    return -1;
  if (!t->node || t->retains_grad)
    return 0;
  orepa_hook *h = hook_new(&none, NULL, t->output);
  if (!h)
    return -1;
  h->retains = t;
  t->retains_grad = true;
  append(&t->node->hooks, h);
  return 0;
}

/* NULL if its graph was freed. */
static orepa_hook *entry_of(const orepa_tensor *t) {
  orepa_hook *h = t->node ? t->node->hooks : NULL;
  while (h && h->retains != t)
    h = h->next;
  return h;
}

void autograd_retain_no_more(orepa_tensor *t) {
  orepa_hook *h = entry_of(t);
  if (h)
    orepa_hook_remove(h);
}

void autograd_move_retained(orepa_tensor *t, autograd_node *node, int output) {
  orepa_hook *h = entry_of(t);
  if (!h || !node) {
    autograd_retain_no_more(t);
    t->retains_grad = false;
    return;
  }
  *h->link = h->next;
  if (h->next)
    h->next->link = h->link;
  h->next = NULL;
  h->output = output;
  append(&node->hooks, h);
}

static int retain_gradient(orepa_hook *list, int output, orepa_tensor *g) {
  for (orepa_hook *h = list; h; h = h->next)
    if (h->retains && h->output == output && gradient_into(h->retains, orepa_retain(g)))
      return -1;
  return 0;
}

/* ---- calling ---- */

/* Takes the reference of what a hook gave in the place of *g. */
static int exchange(orepa_tensor **g, orepa_tensor *given) {
  orepa_tensor *old = *g;
  int failed = 0;
  if (!shape_equal(old, given) || old->dtype != given->dtype || old->storage->device != given->storage->device)
    failed = error_set("register_hook: the hook gave %s on '%s' for a gradient of %s on '%s'", tensor_text(given),
                       given->storage->device->name, tensor_text(old), old->storage->device->name);
  orepa_tensor *plain = failed ? NULL : orepa_detach(given);
  orepa_release(given);
  if (!plain)
    return -1;
  orepa_release(old);
  *g = plain;
  return anomaly_check_gradient(plain, "what a function gave to", "register_hook") ? -1 : 0;
}

static int call(orepa_hook *h, orepa_tensor **g) {
  orepa_tensor *given = NULL;
  uint64_t version = orepa_version(*g);
  if (!h->link) /* an earlier one removed it */
    return 0;
  bool was_quiet = anomaly_set_quiet(false);
  int failed = h->kind.call(h->payload, *g, &given);
  anomaly_set_quiet(was_quiet);
  if (!failed && orepa_version(*g) != version)
    failed = error_set("register_hook: the hook changed its gradient (%s) in place, which others may see; give back "
                       "another one instead",
                       tensor_text(*g));
  if (failed)
    orepa_release(given);
  return failed || (given && exchange(g, given)) ? -1 : 0;
}

/* What is there now is called: a hook may add others, and remove any. */
static int call_all(orepa_hook *list, int output, int count, orepa_tensor **g) {
  orepa_hook **hooks = malloc((size_t)count * sizeof *hooks);
  int failed = 0, n = 0;
  if (!hooks)
    return error_out_of_memory("backward: out of memory: no room for %d hooks", count);
  for (orepa_hook *h = list; h; h = h->next)
    if (!h->retains && h->output == output) {
      atomic_fetch_add_explicit(&h->references, 1, memory_order_relaxed);
      hooks[n++] = h;
    }
  for (int k = 0; k < n; k++) {
    failed = failed || call(hooks[k], g);
    orepa_hook_release(hooks[k]);
  }
  free(hooks);
  return failed;
}

int autograd_run_hooks(orepa_hook **hooks, int output, orepa_tensor **g) {
  int count = 0;
  for (const orepa_hook *h = *hooks; h; h = h->next)
    count += !h->retains && h->output == output;
  if (count && call_all(*hooks, output, count, g))
    return -1;
  return retain_gradient(*hooks, output, *g);
}
