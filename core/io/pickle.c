/* pickle.c: the opcodes of protocols 2 to 5 that torch.save leads to. Nothing recurses, and nothing is called. */
#include "io/pickle.h"

#include <stdlib.h>
#include <string.h>

#include "io/pickle_machine.h"

enum { MEMO_SLACK = 1024 };

/* ---- opcodes: each gets the number that stands with it in the table ---- */

static int mark(machine *m, int unused) {
  (void)unused;
  return machine_mark(m);
}

static int push_constant(machine *m, int kind) {
  return machine_push(m, (pickle_kind)kind) ? 0 : -1;
}

static int push_truth(machine *m, int truth) {
  pickle_value *value = machine_push(m, PICKLE_BOOL);
  if (value)
    value->truth = truth;
  return value ? 0 : -1;
}

/* Unsigned, but for the one of four bytes. */
static int push_integer(machine *m, int width) {
  uint64_t number;
  pickle_value *value = machine_take_number(m, width, &number) ? NULL : machine_push(m, PICKLE_INTEGER);
  if (value)
    value->integer = width == 4 ? (int32_t)(uint32_t)number : (int64_t)number;
  return value ? 0 : -1;
}

/* Behind a length of `width` bytes: little-endian, two's complement. */
static int push_long(machine *m, int width) {
  pickle_text text;
  if (machine_take_text(m, width, &text))
    return -1;
  pickle_value *value = machine_push(m, text.length > 8 ? PICKLE_LONG : PICKLE_INTEGER);
  if (!value)
    return -1;
  if (text.length > 8) {
    value->text = text;
    return 0;
  }
  bool negative = text.length && text.bytes[text.length - 1] & 0x80;
  uint64_t number = negative ? UINT64_MAX : 0;
  for (size_t k = text.length; k-- > 0;)
    number = number << 8 | (unsigned char)text.bytes[k];
  value->integer = (int64_t)number;
  return 0;
}

/* Big-endian, unlike all else. */
static int push_float(machine *m, int width) {
  const unsigned char *bytes = machine_take(m, (uint64_t)width);
  pickle_value *value = bytes ? machine_push(m, PICKLE_FLOAT) : NULL;
  if (!value)
    return -1;
  uint64_t bits = 0;
  for (int k = 0; k < width; k++)
    bits = bits << 8 | bytes[k];
  memcpy(&value->number, &bits, sizeof bits);
  return 0;
}

static int push_string(machine *m, pickle_kind kind, int width) {
  pickle_text text;
  pickle_value *value = machine_take_text(m, width, &text) ? NULL : machine_push(m, kind);
  if (value)
    value->text = text;
  return value ? 0 : -1;
}

static int push_text(machine *m, int width) {
  return push_string(m, PICKLE_TEXT, width);
}

static int push_bytes(machine *m, int width) {
  return push_string(m, PICKLE_BYTES, width);
}

static int fill(machine *m, pickle_value *into, pickle_value **values, int64_t count) {
  pickle_list *items = pickle_items(into);
  if (count)
    items->values = malloc((size_t)count * sizeof *values);
  if (count && !items->values)
    return machine_out_of_memory(m);
  if (count)
    memcpy(items->values, values, (size_t)count * sizeof *values);
  items->count = items->capacity = (uint32_t)count;
  return machine_append(m, &m->stack, into);
}

/* A tuple, list, set or dictionary of all that is above the mark. */
static int push_marked(machine *m, int kind) {
  pickle_value **values;
  int64_t count = machine_pop_marked(m, &values);
  if (count < 0)
    return -1;
  if (kind == PICKLE_DICT && count % 2)
    return machine_refuse(m, "has a key without a value");
  pickle_value *value = machine_new(m, (pickle_kind)kind);
  return value ? fill(m, value, values, count) : -1;
}

static int push_tuple(machine *m, int count) {
  if (m->stack.count - machine_floor(m) < (uint32_t)count)
    return machine_refuse(m, "takes a value that is not there");
  m->stack.count -= (uint32_t)count;
  pickle_value *value = machine_new(m, PICKLE_TUPLE);
  return value ? fill(m, value, m->stack.values + m->stack.count, count) : -1;
}

/* Adds values to the topmost one, a set or list (step 1) or what is like a dictionary (step 2). What is appended to an
 * object is not kept: its class alone knows what that means. */
static int add_to_top(machine *m, pickle_value **values, int64_t count, int step) {
  pickle_value *into = machine_top(m);
  if (!into)
    return -1;
  bool fits = step == 2 ? into->kind == PICKLE_DICT : into->kind == PICKLE_LIST || into->kind == PICKLE_SET;
  if (!fits && into->kind != PICKLE_OBJECT)
    return machine_refuse(m, step == 2 ? "sets an item of what is no dictionary" : "appends to what is no list");
  if (count % step)
    return machine_refuse(m, "has a key without a value");
  for (int64_t k = 0; k < count && (fits || step == 2); k++)
    if (machine_append(m, pickle_items(into), values[k]))
      return -1;
  return 0;
}

static int add_marked(machine *m, int step) {
  pickle_value **values;
  int64_t count = machine_pop_marked(m, &values);
  return count < 0 ? -1 : add_to_top(m, values, count, step);
}

static int add_one(machine *m, int step) {
  if (m->stack.count - machine_floor(m) < (uint32_t)step)
    return machine_refuse(m, "takes a value that is not there");
  m->stack.count -= (uint32_t)step;
  return add_to_top(m, m->stack.values + m->stack.count, step, step);
}

static int remember(machine *m, uint64_t index) {
  pickle_value *value = machine_top(m);
  if (!value)
    return -1;
  if (index > 2 * m->puts + MEMO_SLACK)
    return machine_refuse(m, "numbers an object higher than there are objects");
  if (index >= m->memo_room) {
    size_t room = 2 * (size_t)index + 64;
    pickle_value **memo = realloc(m->memo, room * sizeof *memo);
    if (!memo)
      return machine_out_of_memory(m);
    memset(memo + m->memo_room, 0, (room - m->memo_room) * sizeof *memo);
    m->memo = memo;
    m->memo_room = room;
  }
  m->memo[index] = value;
  m->puts++;
  return 0;
}

static int put(machine *m, int width) {
  uint64_t index;
  return machine_take_number(m, width, &index) ? -1 : remember(m, index);
}

static int memoize(machine *m, int unused) {
  (void)unused;
  return remember(m, m->puts);
}

static int get(machine *m, int width) {
  uint64_t index;
  if (machine_take_number(m, width, &index))
    return -1;
  if (index >= m->memo_room || !m->memo[index])
    return machine_refuse(m, "refers to an object that is not there");
  return machine_append(m, &m->stack, m->memo[index]);
}

static int push_global(machine *m, pickle_text module, pickle_text name) {
  pickle_value *value = machine_push(m, PICKLE_GLOBAL);
  if (!value)
    return -1;
  value->global.module = module;
  value->global.name = name;
  return 0;
}

static int global(machine *m, int unused) {
  (void)unused;
  pickle_text module, name;
  return machine_take_line(m, &module) || machine_take_line(m, &name) ? -1 : push_global(m, module, name);
}

static int stack_global(machine *m, int unused) {
  (void)unused;
  pickle_value *name = machine_pop(m), *module = name ? machine_pop(m) : NULL;
  if (!module)
    return -1;
  if (name->kind != PICKLE_TEXT || module->kind != PICKLE_TEXT)
    return machine_refuse(m, "names a class by what is no text");
  return push_global(m, module->text, name->text);
}

static int push_object(machine *m, pickle_value *callable, pickle_value *arguments) {
  if (!callable || !arguments)
    return -1;
  if (arguments->kind != PICKLE_TUPLE)
    return machine_refuse(m, "calls something with what is no tuple");
  pickle_value *value = machine_push(m, PICKLE_OBJECT);
  if (!value)
    return -1;
  value->object.callable = callable;
  value->object.arguments = arguments;
  return 0;
}

/* What Python would call, with a tuple of arguments, and with named ones too if they are there: those are left out. */
static int reduce(machine *m, int named) {
  if (named && !machine_pop(m))
    return -1;
  pickle_value *arguments = machine_pop(m), *callable = arguments ? machine_pop(m) : NULL;
  return push_object(m, callable, arguments);
}

/* A class and its arguments above the mark. */
static int object(machine *m, int unused) {
  (void)unused;
  pickle_value **values;
  int64_t count = machine_pop_marked(m, &values);
  if (count < 0)
    return -1;
  if (count == 0)
    return machine_refuse(m, "makes an object of no class");
  pickle_value *callable = values[0], *arguments = machine_new(m, PICKLE_TUPLE);
  if (!arguments || fill(m, arguments, values + 1, count - 1))
    return -1;
  m->stack.count--;
  return push_object(m, callable, arguments);
}

/* The state of other things than objects would be attributes, which nobody asks for. */
static int build(machine *m, int unused) {
  (void)unused;
  pickle_value *state = machine_pop(m), *value = state ? machine_top(m) : NULL;
  if (value && value->kind == PICKLE_OBJECT)
    value->object.state = state;
  return value ? 0 : -1;
}

static int persistent(machine *m, int unused) {
  (void)unused;
  pickle_value *identity = machine_pop(m), *value = identity ? machine_push(m, PICKLE_PERSISTENT) : NULL;
  if (!value)
    return -1;
  value->identity = identity;
  return machine_append(m, &m->result->persistent, value);
}

static int drop(machine *m, int unused) {
  (void)unused;
  if (m->mark_count && m->stack.count == machine_floor(m)) {
    m->mark_count--;
    return 0;
  }
  return machine_pop(m) ? 0 : -1;
}

static int drop_marked(machine *m, int unused) {
  (void)unused;
  pickle_value **values;
  return machine_pop_marked(m, &values) < 0 ? -1 : 0;
}

static int duplicate(machine *m, int unused) {
  (void)unused;
  pickle_value *value = machine_top(m);
  return value ? machine_append(m, &m->stack, value) : -1;
}

static int protocol(machine *m, int unused) {
  (void)unused;
  const unsigned char *version = machine_take(m, 1);
  if (!version)
    return -1;
  return *version >= 2 && *version <= 5 ? 0
                                        : machine_refuse(m, "is of a pickle protocol that is not known (2 to 5 are)");
}

/* How the bytes were grouped while they were written. */
static int frame(machine *m, int width) {
  return machine_take(m, (uint64_t)width) ? 0 : -1;
}

static int stop(machine *m, int unused) {
  (void)unused;
  m->result->value = machine_pop(m);
  m->stopped = true;
  return m->result->value ? 0 : -1;
}

static const struct {
  int (*run)(machine *m, int argument);
  int argument;
} opcodes[256] = {
    ['('] = {mark, 0},
    [')'] = {push_constant, PICKLE_TUPLE},
    [']'] = {push_constant, PICKLE_LIST},
    ['}'] = {push_constant, PICKLE_DICT},
    [0x8f] = {push_constant, PICKLE_SET},
    ['N'] = {push_constant, PICKLE_NONE},
    [0x88] = {push_truth, true},
    [0x89] = {push_truth, false},
    ['K'] = {push_integer, 1},
    ['M'] = {push_integer, 2},
    ['J'] = {push_integer, 4},
    [0x8a] = {push_long, 1},
    [0x8b] = {push_long, 4},
    ['G'] = {push_float, 8},
    ['U'] = {push_text, 1},
    ['T'] = {push_text, 4},
    [0x8c] = {push_text, 1},
    ['X'] = {push_text, 4},
    [0x8d] = {push_text, 8},
    ['C'] = {push_bytes, 1},
    ['B'] = {push_bytes, 4},
    [0x8e] = {push_bytes, 8},
    [0x96] = {push_bytes, 8},
    ['t'] = {push_marked, PICKLE_TUPLE},
    ['l'] = {push_marked, PICKLE_LIST},
    ['d'] = {push_marked, PICKLE_DICT},
    [0x91] = {push_marked, PICKLE_SET},
    [0x85] = {push_tuple, 1},
    [0x86] = {push_tuple, 2},
    [0x87] = {push_tuple, 3},
    ['a'] = {add_one, 1},
    ['s'] = {add_one, 2},
    ['e'] = {add_marked, 1},
    ['u'] = {add_marked, 2},
    [0x90] = {add_marked, 1},
    ['q'] = {put, 1},
    ['r'] = {put, 4},
    [0x94] = {memoize, 0},
    ['h'] = {get, 1},
    ['j'] = {get, 4},
    ['c'] = {global, 0},
    [0x93] = {stack_global, 0},
    ['R'] = {reduce, 0},
    [0x81] = {reduce, 0},
    [0x92] = {reduce, 1},
    ['o'] = {object, 0},
    ['b'] = {build, 0},
    ['Q'] = {persistent, 0},
    ['0'] = {drop, 0},
    ['1'] = {drop_marked, 0},
    ['2'] = {duplicate, 0},
    [0x80] = {protocol, 0},
    [0x95] = {frame, 8},
    ['.'] = {stop, 0},
};

static int step(machine *m) {
  m->opcode_at = m->at;
  const unsigned char *opcode = machine_take(m, 1);
  if (!opcode)
    return -1;
  if (!opcodes[*opcode].run)
    return machine_refuse(m, "has an opcode that torch.save does not write");
  return opcodes[*opcode].run(m, opcodes[*opcode].argument);
}

/* ---- public ---- */

int pickle_read(pickle *p, const pickle_source *source, bool *cut) {
  *p = (pickle){0};
  machine m = {.result = p, .source = source};
  int failed = 0;
  while (!failed && !m.stopped)
    failed = step(&m);
  p->bytes = m.at;
  *cut = m.cut;
  machine_free(&m);
  if (failed)
    pickle_free(p);
  return failed ? -1 : 0;
}

static bool text_is(const pickle_text *text, const char *wanted) {
  return text->length == strlen(wanted) && !memcmp(text->bytes, wanted, text->length);
}

bool pickle_is_text(const pickle_value *v, const char *text) {
  return v->kind == PICKLE_TEXT && text_is(&v->text, text);
}

bool pickle_is_global(const pickle_value *v, const char *module, const char *name) {
  return v->kind == PICKLE_GLOBAL && text_is(&v->global.module, module) && text_is(&v->global.name, name);
}
