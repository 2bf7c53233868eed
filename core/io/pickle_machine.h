/* pickle_machine.h: the stack, the marks and the values that a pickle's opcodes work on. */
#ifndef OREPA_CORE_IO_PICKLE_MACHINE_H
#define OREPA_CORE_IO_PICKLE_MACHINE_H

#include "io/pickle.h"

typedef struct {
  pickle *result;
  const pickle_source *source;
  size_t at, opcode_at;
  bool cut, stopped;
  pickle_list stack;
  uint32_t *marks; /* heights of the stack */
  size_t mark_count, mark_room;
  pickle_value **memo; /* values that come again, by number */
  size_t memo_room, puts;
} machine;

int machine_refuse(const machine *m, const char *what); /* with the opcode's place */
int machine_out_of_memory(const machine *m);

/* ---- the pickle's bytes */
const unsigned char *machine_take(machine *m, uint64_t count); /* NULL: they are not there */
int machine_take_number(machine *m, int width, uint64_t *value);
int machine_take_text(machine *m, int width, pickle_text *text); /* behind its length */
int machine_take_line(machine *m, pickle_text *line);

/* ---- values and lists of them */
pickle_value *machine_new(machine *m, pickle_kind kind);
int machine_append(machine *m, pickle_list *list, pickle_value *value);
pickle_list *pickle_items(pickle_value *v); /* NULL: it has none */

/* ---- the stack: nothing below the last mark is taken but by what looks for the mark */
uint32_t machine_floor(const machine *m);
pickle_value *machine_push(machine *m, pickle_kind kind); /* a new value */
pickle_value *machine_top(machine *m);                    /* NULL and a message: there is none */
pickle_value *machine_pop(machine *m);
int machine_mark(machine *m);
/* Takes the last mark away: *values are those above it, still in the stack's memory. Their count; -1: there is no mark.
 */
int64_t machine_pop_marked(machine *m, pickle_value ***values);

/* ---- the end */
void machine_free(machine *m); /* not its result */

#endif
