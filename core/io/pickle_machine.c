/* pickle_machine.c: a pickle is a program for a machine with a stack; this is the machine, without its opcodes. Each
 * opcode makes at most one value, so memory is bounded by the bytes that are there. */
#include "io/pickle_machine.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "io/format.h"

enum { BLOCK_VALUES = 512 };

typedef struct pickle_block {
  struct pickle_block *next;
  size_t used;
  pickle_value values[BLOCK_VALUES];
} pickle_block;

/* ---- messages ---- */

int machine_refuse(const machine *m, const char *what) {
  const char *part = m->source->part;
  return format_refuse(m->source->file, NULL, "%s%s%s (at its byte %lld)", part ? part : "", part ? ": " : "", what,
                       (long long)m->source->start + (long long)m->opcode_at);
}

int machine_out_of_memory(const machine *m) {
  return error_out_of_memory("%s: out of memory: no room for the objects that it lists", m->source->file->path);
}

/* ---- bytes ---- */

/* The next `count` bytes, or NULL. */
const unsigned char *machine_take(machine *m, uint64_t count) {
  if (count > m->source->size - m->at) {
    m->cut = true;
    machine_refuse(m, "ends in the middle of a pickled object: it is truncated");
    return NULL;
  }
  const unsigned char *bytes = m->source->bytes + m->at;
  m->at += (size_t)count;
  return bytes;
}

int machine_take_number(machine *m, int width, uint64_t *value) {
  const unsigned char *bytes = machine_take(m, (uint64_t)width);
  *value = 0;
  for (int k = width; bytes && k-- > 0;)
    *value = *value << 8 | bytes[k];
  return bytes ? 0 : -1;
}

/* Bytes behind a length of `width` bytes. */
int machine_take_text(machine *m, int width, pickle_text *text) {
  uint64_t length;
  if (machine_take_number(m, width, &length))
    return -1;
  text->length = (size_t)length;
  text->bytes = (const char *)machine_take(m, length);
  return text->bytes ? 0 : -1;
}

int machine_take_line(machine *m, pickle_text *line) {
  const unsigned char *from = m->source->bytes + m->at, *end = memchr(from, '\n', m->source->size - m->at);
  if (!end)
    return machine_take(m, UINT64_MAX) ? 0 : -1;
  *line = (pickle_text){(const char *)from, (size_t)(end - from)};
  m->at += line->length + 1;
  return 0;
}

/* ---- values ---- */

int machine_append(machine *m, pickle_list *list, pickle_value *value) {
  if (list->count == list->capacity) {
    uint32_t capacity = list->capacity ? 2 * list->capacity : 4;
    pickle_value **values = capacity > list->capacity ? realloc(list->values, capacity * sizeof *values) : NULL;
    if (!values)
      return machine_out_of_memory(m);
    list->values = values;
    list->capacity = capacity;
  }
  list->values[list->count++] = value;
  return 0;
}

pickle_value *machine_new(machine *m, pickle_kind kind) {
  pickle_block *block = m->result->blocks;
  if (!block || block->used == BLOCK_VALUES) {
    block = malloc(sizeof *block);
    if (!block) {
      machine_out_of_memory(m);
      return NULL;
    }
    block->next = m->result->blocks;
    block->used = 0;
    m->result->blocks = block;
  }
  pickle_value *value = &block->values[block->used++];
  memset(value, 0, sizeof *value);
  value->kind = kind;
  return value;
}

pickle_value *machine_push(machine *m, pickle_kind kind) {
  pickle_value *value = machine_new(m, kind);
  return value && !machine_append(m, &m->stack, value) ? value : NULL;
}

pickle_list *pickle_items(pickle_value *v) {
  if (v->kind == PICKLE_OBJECT)
    return &v->object.items;
  return v->kind >= PICKLE_TUPLE && v->kind <= PICKLE_DICT ? &v->items : NULL;
}

/* ---- the stack ---- */

/* Nothing below the last mark is taken but by what looks for it. */
uint32_t machine_floor(const machine *m) {
  return m->mark_count ? m->marks[m->mark_count - 1] : 0;
}

/* The topmost value; NULL: there is none. */
pickle_value *machine_top(machine *m) {
  if (m->stack.count > machine_floor(m))
    return m->stack.values[m->stack.count - 1];
  machine_refuse(m, "takes a value that is not there");
  return NULL;
}

pickle_value *machine_pop(machine *m) {
  pickle_value *value = machine_top(m);
  m->stack.count -= value != NULL;
  return value;
}

int machine_mark(machine *m) {
  if (m->mark_count == m->mark_room) {
    size_t room = m->mark_room ? 2 * m->mark_room : 64;
    uint32_t *marks = realloc(m->marks, room * sizeof *marks);
    if (!marks)
      return machine_out_of_memory(m);
    m->marks = marks;
    m->mark_room = room;
  }
  m->marks[m->mark_count++] = m->stack.count;
  return 0;
}

/* Takes the last mark away: *values are the ones above it, still in the stack's memory. -1: there is none. */
int64_t machine_pop_marked(machine *m, pickle_value ***values) {
  if (!m->mark_count)
    return machine_refuse(m, "looks for a mark that is not there");
  uint32_t height = m->marks[--m->mark_count], count = m->stack.count - height;
  *values = m->stack.values + height;
  m->stack.count = height;
  return count;
}

/* ---- the end ---- */

void machine_free(machine *m) {
  free(m->stack.values);
  free(m->marks);
  free(m->memo);
}

void pickle_free(pickle *p) {
  while (p->blocks) {
    pickle_block *block = p->blocks;
    for (size_t k = 0; k < block->used; k++) {
      pickle_list *items = pickle_items(&block->values[k]);
      if (items)
        free(items->values);
    }
    p->blocks = block->next;
    free(block);
  }
  free(p->persistent.values);
  *p = (pickle){0};
}
