/* scratch.h: the one block of workspace that an entry may ask for, cut into pieces: sizes are added up first, then the
 * block is taken, then places become pointers. */
#ifndef OREPA_CORE_CPU_SCRATCH_H
#define OREPA_CORE_CPU_SCRATCH_H

#include "cpu/cpu.h"

typedef struct {
  size_t bytes;
  char *memory;
} cpu_scratch;

/* Room for a piece; where it begins in the block. */
static inline size_t scratch_place(cpu_scratch *s, size_t bytes) {
  size_t place = s->bytes;
  s->bytes += (bytes + 63) / 64 * 64;
  return place;
}

/* Takes the block; false and a message if there is no memory. */
static inline bool scratch_take(cpu_scratch *s, device_context *context) {
  s->memory = s->bytes ? context->workspace(context, s->bytes) : NULL;
  return s->memory || !s->bytes;
}

static inline void *scratch_lent(device_context *context, size_t bytes) {
  if (bytes <= context->workspace_bytes)
    return context->workspace_memory;
  error_set("a kernel called by another asks for %zu bytes of scratch, it may have %zu", bytes,
            context->workspace_bytes);
  return NULL;
}

/* A context for an entry that is called while the block is in use: its workspace is a piece of the block. */
static inline device_context scratch_lend(const device_context *context, void *piece, size_t bytes) {
  device_context inner = *context;
  inner.workspace = scratch_lent;
  inner.workspace_memory = piece;
  inner.workspace_bytes = bytes;
  return inner;
}

#endif
