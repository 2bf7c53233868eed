/* selection.c: a pass that is asked for the gradients of some tensors goes only where these are. The graph is looked
 * through before: which nodes lead to one of them. What a node turned out to be is kept by its number, since nodes are
 * freed on the way and their memory becomes others'. */
#include "autograd/pass.h"

#include <stdlib.h>

enum { TAKEN = 1, LEADS = 2, LOOKED_AT = 4 };

typedef struct {
  uint64_t key; /* 0: free */
  unsigned is;
} selection_entry;

struct selection {
  int count;
  autograd_edge *places; /* of the tensors asked for; nodes are references */
  uint64_t oldest;       /* node among them; 0: a leaf is */
  selection_entry *entries;
  size_t used, capacity; /* a power of two */
};

/* ---- a table of what is known ---- */

static uint64_t key_of_node(const autograd_node *node) {
  return 2 * node->order + 1;
}

static uint64_t key_of_leaf(const orepa_tensor *leaf) {
  return (uint64_t)(uintptr_t)leaf;
}

/* The entry with the key, or the free one where it belongs. */
static selection_entry *find(selection_entry *entries, size_t capacity, uint64_t key) {
  size_t k = (size_t)((key * UINT64_C(0x9E3779B97F4A7C15)) >> 20) & (capacity - 1);
  while (entries[k].key && entries[k].key != key)
    k = (k + 1) & (capacity - 1);
  return &entries[k];
}

static unsigned known(const selection *s, uint64_t key) {
  return find(s->entries, s->capacity, key)->is;
}

static int grow(selection *s) {
  size_t capacity = 2 * s->capacity;
  selection_entry *entries = calloc(capacity, sizeof *entries);
  if (!entries)
    return error_out_of_memory("grad: out of memory: no room for what %zu nodes lead to", s->used);
  for (size_t k = 0; k < s->capacity; k++)
    if (s->entries[k].key)
      *find(entries, capacity, s->entries[k].key) = s->entries[k];
  free(s->entries);
  s->entries = entries;
  s->capacity = capacity;
  return 0;
}

static int mark(selection *s, uint64_t key, unsigned as) {
  if (2 * s->used >= s->capacity && grow(s))
    return -1;
  selection_entry *entry = find(s->entries, s->capacity, key);
  s->used += !entry->key;
  entry->key = key;
  entry->is |= as;
  return 0;
}

/* ---- looking through the graph: in depth, by a stack of nodes that are not done ---- */

typedef struct {
  autograd_node *node;
  int next; /* edge */
} selection_step;

typedef struct {
  selection_step *steps;
  size_t count, capacity;
} selection_path;

static int push(selection_path *path, autograd_node *node) {
  if (path->count == path->capacity) {
    size_t capacity = path->capacity ? 2 * path->capacity : 64;
    selection_step *steps = realloc(path->steps, capacity * sizeof *steps);
    if (!steps)
      return error_out_of_memory("grad: out of memory: no room for a path of %zu nodes", capacity);
    path->steps = steps;
    path->capacity = capacity;
  }
  path->steps[path->count++] = (selection_step){node, 0};
  return 0;
}

static bool leads_along(const selection *s, const autograd_edge *edge) {
  if (edge->node)
    return known(s, key_of_node(edge->node)) & (TAKEN | LEADS);
  return edge->leaf && selection_takes_leaf(s, edge->leaf);
}

/* All behind the node is known. One that an earlier pass used up must say so, unless it is where the pass would end. In
 * a graph that is not there yet may be whatever is older. */
static int conclude(selection *s, const autograd_node *node) {
  bool leads = (node->leads_further && s->oldest < node->order) || (node->used && !selection_takes(s, node));
  for (int k = 0; k < node->inputs && !leads; k++)
    leads = leads_along(s, &node->edges[k]);
  return mark(s, key_of_node(node), LOOKED_AT | (leads ? LEADS : 0));
}

int selection_look(selection *s, autograd_node *first) {
  selection_path path = {NULL, 0, 0};
  int failed = known(s, key_of_node(first)) & LOOKED_AT ? 0 : push(&path, first);
  while (path.count && !failed) {
    selection_step *step = &path.steps[path.count - 1];
    autograd_node *node = step->node, *older = NULL;
    while (step->next < node->inputs && !older) {
      older = node->edges[step->next++].node;
      if (older && known(s, key_of_node(older)) & LOOKED_AT)
        older = NULL;
    }
    if (older) {
      failed = push(&path, older);
    } else {
      failed = conclude(s, node);
      path.count--;
    }
  }
  free(path.steps);
  return failed;
}

/* ---- making and asking ---- */

static int take(selection *s, autograd_edge *place, orepa_tensor *x) {
  uint64_t order = x->node ? x->node->order : 0;
  s->oldest = order < s->oldest ? order : s->oldest;
  if (x->node)
    *place = (autograd_edge){autograd_node_retain(x->node), x->output, NULL};
  else
    place->leaf = x;
  return mark(s, x->node ? key_of_node(x->node) : key_of_leaf(x), TAKEN);
}

selection *selection_new(int count, orepa_tensor *const *xs) {
  selection *s = calloc(1, sizeof *s);
  if (s) {
    s->capacity = 64;
    s->oldest = UINT64_MAX;
    s->count = count;
    s->places = calloc((size_t)count, sizeof *s->places);
    s->entries = calloc(s->capacity, sizeof *s->entries);
  }
  int failed = !s || !s->places || !s->entries;
  if (failed)
    error_out_of_memory("grad: out of memory: no room for %d tensors", count);
  for (int k = 0; k < count && !failed; k++)
    failed = take(s, &s->places[k], xs[k]);
  if (!failed)
    return s;
  selection_free(s);
  return NULL;
}

void selection_free(selection *s) {
  if (!s)
    return;
  for (int k = 0; k < s->count && s->places; k++)
    if (s->places[k].node)
      autograd_node_release(s->places[k].node);
  free(s->places);
  free(s->entries);
  free(s);
}

bool selection_takes(const selection *s, const autograd_node *node) {
  return known(s, key_of_node(node)) & TAKEN;
}

bool selection_takes_leaf(const selection *s, const orepa_tensor *leaf) {
  return known(s, key_of_leaf(leaf)) & TAKEN;
}

bool selection_leads(const selection *s, const autograd_node *node) {
  unsigned is = known(s, key_of_node(node));
  return is & LEADS || !(is & LOOKED_AT);
}

const autograd_edge *selection_at(const selection *s, int k) {
  return &s->places[k];
}

int selection_count(const selection *s) {
  return s->count;
}
