/* promise.h: maps that are not computed yet. A promise belongs to a storage that has a size and no memory: it knows
 * what would fill it, and which tensors that reads. It is fulfilled once, by the first reader that wants the map
 * itself, or before one of the tensors that it reads is written; if nobody asks, the map is never stored.
 *
 * What a promise reads may itself be a promise only if that one reads maps that are stored. All promises are made on
 * the main thread. */
#ifndef OREPA_CORE_PROMISE_H
#define OREPA_CORE_PROMISE_H

#include "tensor/tensor.h"

enum { PROMISE_SOURCES = 5 };

typedef struct {
  /* Writes the whole map; 0, or -1 with a message and the promise as it was. */
  int (*fill)(promise *p, const device_array *map);
  /* Releases what the kind's own part holds, all NULL at first; may be NULL. */
  void (*dispose)(promise *p);
} promise_kind;

/* A promise in the list of those that read a storage. */
struct promise_reader {
  promise *reader;
  promise_reader *next, **link; /* what points here */
};

/* The head of each kind's own struct. */
struct promise {
  const promise_kind *kind;
  orepa_tensor map;                       /* a handle in place; its storage, which owns the promise, is not counted */
  orepa_tensor *sources[PROMISE_SOURCES]; /* handles of the promise's own, without nodes; NULL: none */
  promise_reader readers[PROMISE_SOURCES];
};

/* Whether promises are made here and now: not on other threads, and not with OREPA_DEFER=0. */
bool promises_made(void);
/* Switches them on or off whatever OREPA_DEFER says; gives back what was. For tests. */
bool promises_switch(bool on);

/* Makes the new tensor t, whose storage has nothing in it, one that is promised. `bytes` is the size of the kind's
 * struct, zeroed behind its head; sources may be NULL. NULL and a message if there is no room. */
promise *promise_make(orepa_tensor *t, const promise_kind *kind, size_t bytes, orepa_tensor *const *sources, int count);
/* What t is promised to be, if that is of this kind, and t is the map as it was promised; else NULL. */
promise *promise_of(const orepa_tensor *t, const promise_kind *kind);

/* ---- for a kernel that fills a promised map on its way */
/* The map's memory, not filled; 0, or -1 with a message. */
int promise_begin(promise *p, device_array *map);
/* The kernel filled it (the promise is gone), or did not. */
void promise_end(promise *p, bool filled);

/* ---- for the doors (tensor.c) */
int promise_fill(promise *p);
/* Fulfils every promise that reads this storage. */
int promise_fill_readers(tensor_storage *storage);
/* Nobody will ask any more. */
void promise_free(promise *p);

#endif
