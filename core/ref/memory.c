/* memory.c: the reference device's memory: the host's; or, with OREPA_REF_GUARD=1, one large arena whose pages nobody
 * may touch outside the device's entries, so that code which takes device memory for its own crashes here and not on
 * the first GPU. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "host_memory.h"
#include "ref/ref.h"

#define ARENA_BYTES ((size_t)8 << 30) /* of address space */

enum { ALIGNMENT = 64 };

/* A free piece of the arena: bytes `first` ... `end` - 1. */
typedef struct {
  size_t first, end;
} arena_hole;

static struct {
  pthread_once_t once;
  bool guarded;
  pthread_mutex_t lock;
  char *memory; /* NULL: the system gave none */
  size_t used;  /* bytes at the start that blocks and holes lie in */
  int entered;  /* entries that are running */
  arena_hole *holes;
  size_t count, capacity; /* holes rise and don't touch */
} arena = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER};

static void arena_make(void) {
  const char *guard = getenv("OREPA_REF_GUARD");
  arena.guarded = guard && !strcmp(guard, "1");
  if (!arena.guarded)
    return;
  void *memory = mmap(NULL, ARENA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  arena.memory = memory == MAP_FAILED ? NULL : memory;
}

/* ---- entries ---- */

int ref_open(void) {
  pthread_once(&arena.once, arena_make);
  if (arena.guarded) {
    pthread_mutex_lock(&arena.lock);
    if (arena.entered++ == 0 && arena.used)
      mprotect(arena.memory, arena.used, PROT_READ | PROT_WRITE);
    pthread_mutex_unlock(&arena.lock);
  }
  return 0;
}

void ref_close(int *opened) {
  (void)opened;
  if (arena.guarded) {
    pthread_mutex_lock(&arena.lock);
    if (--arena.entered == 0 && arena.used)
      mprotect(arena.memory, arena.used, PROT_NONE);
    pthread_mutex_unlock(&arena.lock);
  }
}

/* ---- blocks of the arena: the first hole that is large enough, else the end ---- */

static void remove_hole(size_t k) {
  arena.count--;
  memmove(&arena.holes[k], &arena.holes[k + 1], (arena.count - k) * sizeof *arena.holes);
}

static void *arena_get(size_t bytes) {
  for (size_t k = 0; k < arena.count; k++) {
    arena_hole *hole = &arena.holes[k];
    if (hole->end - hole->first < bytes)
      continue;
    void *block = arena.memory + hole->first;
    hole->first += bytes;
    if (hole->first == hole->end)
      remove_hole(k);
    return block;
  }
  if (!arena.memory || bytes > ARENA_BYTES - arena.used ||
      mprotect(arena.memory, arena.used + bytes, PROT_READ | PROT_WRITE))
    return NULL;
  arena.used += bytes;
  return arena.memory + arena.used - bytes;
}

/* A hole for which there is no room in the list is lost. */
static void arena_put(size_t first, size_t end) {
  size_t k = 0;
  while (k < arena.count && arena.holes[k].end < first)
    k++;
  if (k < arena.count && arena.holes[k].first <= end) { /* touches one, perhaps the next as well */
    arena_hole *hole = &arena.holes[k];
    hole->first = first < hole->first ? first : hole->first;
    hole->end = end > hole->end ? end : hole->end;
    if (k + 1 < arena.count && hole[1].first == hole->end) {
      hole->end = hole[1].end;
      remove_hole(k + 1);
    }
    return;
  }
  if (arena.count == arena.capacity) {
    size_t capacity = 2 * arena.capacity + 16;
    arena_hole *holes = realloc(arena.holes, capacity * sizeof *holes);
    if (!holes)
      return;
    arena.holes = holes;
    arena.capacity = capacity;
  }
  memmove(&arena.holes[k + 1], &arena.holes[k], (arena.count - k) * sizeof *arena.holes);
  arena.holes[k] = (arena_hole){first, end};
  arena.count++;
}

static size_t arena_size(size_t bytes) {
  return bytes ? (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT : ALIGNMENT;
}

/* ---- the table's entries ---- */

void *ref_allocate(device_context *context, size_t bytes) {
  REF_ENTRY;
  (void)context;
  if (!arena.guarded)
    return host_allocate(bytes);
  if (bytes > ARENA_BYTES)
    return NULL;
  pthread_mutex_lock(&arena.lock);
  void *block = arena_get(arena_size(bytes));
  pthread_mutex_unlock(&arena.lock);
  return block;
}

void ref_deallocate(device_context *context, void *memory, size_t bytes) {
  REF_ENTRY;
  (void)context;
  if (!arena.guarded) {
    host_deallocate(memory, bytes);
  } else if (memory) {
    size_t first = (size_t)((char *)memory - arena.memory);
    pthread_mutex_lock(&arena.lock);
    arena_put(first, first + arena_size(bytes));
    pthread_mutex_unlock(&arena.lock);
  }
}

size_t ref_available(device_context *context) {
  (void)context;
  return host_available("");
}

device_status ref_upload(device_context *context, void *device, const void *host, size_t bytes) {
  REF_ENTRY;
  (void)context;
  if (bytes)
    memcpy(device, host, bytes);
  return DEVICE_DONE;
}

device_status ref_download(device_context *context, void *host, const void *device, size_t bytes) {
  REF_ENTRY;
  (void)context;
  if (bytes)
    memcpy(host, device, bytes);
  return DEVICE_DONE;
}
