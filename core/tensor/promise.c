/* promise.c: making, filling and dropping promised maps, and the list of the promises that read a storage. What is
 * promised, the kinds say. */
#include "tensor/promise.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sys/syscall.h>

/* ---- whether to ---- */

static int wanted = -1; /* -1: not asked yet */

static bool on_main_thread(void) {
  static _Thread_local int known = -1;
  if (known < 0)
    known = syscall(SYS_gettid) == getpid();
  return known;
}

static bool are_wanted(void) {
  if (wanted < 0) {
    const char *text = getenv("OREPA_DEFER");
    wanted = !text || strcmp(text, "0") != 0;
  }
  return wanted;
}

bool promises_made(void) {
  return on_main_thread() && are_wanted();
}

bool promises_switch(bool on) {
  bool was = are_wanted();
  wanted = on;
  return was;
}

/* ---- making ---- */

static void add_reader(promise *p, int k) {
  promise_reader *entry = &p->readers[k], **list = &p->sources[k]->storage->readers;
  *entry = (promise_reader){p, *list, list};
  if (*list)
    (*list)->link = &entry->next;
  *list = entry;
}

static void remove_reader(promise_reader *entry) {
  *entry->link = entry->next;
  if (entry->next)
    entry->next->link = entry->link;
}

void promise_free(promise *p) {
  for (int k = 0; k < PROMISE_SOURCES; k++)
    if (p->sources[k])
      remove_reader(&p->readers[k]);
  if (p->kind->dispose)
    p->kind->dispose(p);
  for (int k = 0; k < PROMISE_SOURCES; k++)
    orepa_release(p->sources[k]);
  free(p);
}

promise *promise_make(orepa_tensor *t, const promise_kind *kind, size_t bytes, orepa_tensor *const *sources,
                      int count) {
  promise *p = calloc(1, bytes);
  if (!p) {
    error_out_of_memory("out of memory: no room for a promise");
    return NULL;
  }
  p->kind = kind;
  p->map = *t;
  for (int k = 0; k < count; k++) {
    if (!sources[k])
      continue;
    if (!(p->sources[k] = orepa_detach(sources[k]))) {
      promise_free(p);
      return NULL;
    }
    add_reader(p, k);
  }
  t->storage->promise = p;
  t->storage->version++; /* as if it had been written: looking changes nothing later */
  return p;
}

promise *promise_of(const orepa_tensor *t, const promise_kind *kind) {
  promise *p = t->storage->promise;
  return p && p->kind == kind && shape_equal(t, &p->map) && tensor_is_whole(t) ? p : NULL;
}

/* ---- filling ---- */

int promise_begin(promise *p, device_array *map) {
  tensor_storage *storage = p->map.storage;
  if (storage_get_memory(storage))
    return -1;
  tensor_outline(&p->map, map);
  map->data = storage->memory;
  return 0;
}

void promise_end(promise *p, bool filled) {
  tensor_storage *storage = p->map.storage;
  if (filled) {
    storage->promise = NULL;
    promise_free(p);
  } else {
    storage_give_back(storage);
  }
}

int promise_fill(promise *p) {
  device_array map;
  if (promise_begin(p, &map))
    return -1;
  int failed = p->kind->fill(p, &map);
  promise_end(p, !failed);
  return failed ? -1 : 0;
}

int promise_fill_readers(tensor_storage *storage) {
  while (storage->readers)
    if (promise_fill(storage->readers->reader))
      return -1;
  return 0;
}
