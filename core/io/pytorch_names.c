/* pytorch_names.c: the tree of a checkpoint made flat. Dictionaries and lists become paths, `optimizer.state.0.step`;
 * tensors are listed under theirs, plain values go into the metadata, and of what is neither the metadata have the path
 * and the class. A module that was saved as an object is read as its state dict. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "io/pytorch.h"

enum { MOST_NAME_BYTES = 1000, MOST_ATTRIBUTES = 64, DEEPEST = 100, TEXT_PER_BYTE = 16, TEXT_SLACK = 1 << 20 };

typedef struct {
  pytorch_file *f;
  char name[MOST_NAME_BYTES + 1];
  int64_t
      budget; /* bytes of names and values that are left: one object under many names must not become many objects */
  text_buffer value, kept_out;
} walker;

static int walk(walker *w, const pickle_value *v, size_t length, int depth);

/* ---- what it costs ---- */

static int out_of_memory(const walker *w) {
  return error_out_of_memory("%s: out of memory: no room for its names", w->f->file->path);
}

static int spend(walker *w, size_t bytes) {
  w->budget -= (int64_t)bytes + 1;
  return w->budget >= 0 ? 0
                        : format_refuse(w->f->file, NULL,
                                        "the same objects stand in it again and again: the names would be "
                                        "many times as long as the file");
}

/* ---- leaves ---- */

static int keep_out(walker *w, const char *kind) {
  size_t length = strlen(w->name);
  if (spend(w, length + strlen(kind)))
    return -1;
  text_buffer *text = &w->kept_out;
  bool failed = (text->length && text_append(text, "\n", 1)) || text_append(text, w->name, length) ||
                text_append(text, ": ", 2) || text_append(text, kind, strlen(kind));
  return failed ? out_of_memory(w) : 0;
}

static int add_tensor(walker *w, const pytorch_tensor *t) {
  pytorch_file *f = w->f;
  if (f->tensor_count == f->tensor_room) {
    size_t room = f->tensor_room ? 2 * f->tensor_room : 64;
    pytorch_tensor *tensors = realloc(f->tensors, room * sizeof *tensors);
    if (!tensors)
      return out_of_memory(w);
    f->tensors = tensors;
    f->tensor_room = room;
  }
  pytorch_tensor *added = &f->tensors[f->tensor_count];
  *added = *t;
  added->position = f->tensor_count;
  added->name = strdup(w->name[0] ? w->name : "tensor");
  if (!added->name)
    return out_of_memory(w);
  f->tensor_count++;
  return 0;
}

/* 1: it was a plain value; 0: it is none. */
static int add_plain(walker *w, const pickle_value *v) {
  w->value.length = 0;
  int written = pytorch_write_plain(&w->value, v, w->budget);
  if (written == -1)
    return out_of_memory(w);
  if (written == 0)
    return 0;
  if (spend(w, w->value.length))
    return -1; /* after -2 too */
  return orepa_archive_set_metadata(w->f->archive, w->name[0] ? w->name : "value", w->value.bytes)
             ? error_prefix("%s: ", w->f->file->path)
             : 1;
}

static int add_leaf(walker *w, const pickle_value *v) {
  pytorch_tensor t;
  char reason[PYTORCH_KIND_BYTES];
  int plain = add_plain(w, v);
  if (plain)
    return plain < 0 ? -1 : 0;
  int described = pytorch_describe(w->f, w->name[0] ? w->name : "tensor", v, &t, reason);
  if (described < 0)
    return -1;
  return described ? add_tensor(w, &t) : keep_out(w, reason);
}

/* ---- branches ---- */

/* Puts a word behind the path of `length` bytes and gives the new length; -1: the path is too long. */
static int64_t extend(walker *w, size_t length, const char *word, size_t word_length) {
  size_t dot = length > 0;
  if (spend(w, length + dot + word_length))
    return -1;
  if (word_length > MOST_NAME_BYTES - dot || length > MOST_NAME_BYTES - dot - word_length)
    return format_refuse(w->f->file, NULL, "a name in it has more than %d bytes", MOST_NAME_BYTES);
  if (dot)
    w->name[length] = '.';
  memcpy(w->name + length + dot, word, word_length);
  w->name[length + dot + word_length] = '\0';
  return (int64_t)(length + dot + word_length);
}

static int walk_word(walker *w, const char *word, size_t word_length, const pickle_value *v, size_t length, int depth) {
  int64_t extended = extend(w, length, word, word_length);
  return extended < 0 ? -1 : walk(w, v, (size_t)extended, depth + 1);
}

static int walk_position(walker *w, int64_t position, const pickle_value *v, size_t length, int depth) {
  char digits[32];
  int count = snprintf(digits, sizeof digits, "%lld", (long long)position);
  return walk_word(w, digits, (size_t)count, v, length, depth);
}

static int walk_entry(walker *w, const pickle_value *key, const pickle_value *v, size_t length, int depth) {
  if (key->kind == PICKLE_INTEGER)
    return walk_position(w, key->integer, v, length, depth);
  bool has_text = key->kind == PICKLE_TEXT || key->kind == PICKLE_BYTES;
  if (has_text && spend(w, key->text.length))
    return -1;
  int text = has_text ? format_is_text(key->text.bytes, key->text.length) : 0;
  if (text < 0)
    return out_of_memory(w);
  if (text)
    return walk_word(w, key->text.bytes, key->text.length, v, length, depth);
  return extend(w, length, "?", 1) < 0 ? -1 : keep_out(w, "its key is neither text nor an integer");
}

static int walk_entries(walker *w, const pickle_list *items, size_t length, int depth) {
  for (uint32_t k = 0; k + 1 < items->count; k += 2)
    if (walk_entry(w, items->values[k], items->values[k + 1], length, depth))
      return -1;
  return 0;
}

/* Python 2 gave an OrderedDict its entries as an argument: a list of pairs. */
static const pickle_list *pairs_of(const pickle_value *v) {
  if (v->kind != PICKLE_OBJECT || !pickle_is_global(v->object.callable, "collections", "OrderedDict") ||
      v->object.arguments->items.count != 1)
    return NULL;
  return pytorch_sequence(v->object.arguments->items.values[0]);
}

static int walk_pairs(walker *w, const pickle_list *pairs, size_t length, int depth) {
  for (uint32_t k = 0; k < pairs->count; k++) {
    const pickle_list *pair = pytorch_sequence(pairs->values[k]);
    if (!pair || pair->count != 2)
      return format_refuse(w->f->file, NULL, "an OrderedDict in it is not a list of pairs");
    if (walk_entry(w, pair->values[0], pair->values[1], length, depth))
      return -1;
  }
  return 0;
}

static int walk_list(walker *w, const pickle_list *items, size_t length, int depth) {
  for (uint32_t k = 0; k < items->count; k++)
    if (walk_position(w, k, items->values[k], length, depth))
      return -1;
  return 0;
}

/* ---- modules ---- */

/* A part of a torch.nn.Module's state: its parameters, buffers or modules, which are among its first attributes. */
static const pickle_list *part_of(const pickle_value *v, const char *part) {
  if (v->kind != PICKLE_OBJECT || !v->object.state || v->object.state->kind != PICKLE_DICT)
    return NULL;
  const pickle_list *state = &v->object.state->items;
  for (uint32_t k = 0; k + 1 < state->count && k < 2 * MOST_ATTRIBUTES; k += 2)
    if (pickle_is_text(state->values[k], part))
      return pytorch_dictionary(state->values[k + 1]);
  return NULL;
}

/* What is registered as None is not there. */
static int walk_part(walker *w, const pickle_list *items, size_t length, int depth) {
  for (uint32_t k = 0; items && k + 1 < items->count; k += 2)
    if (items->values[k + 1]->kind != PICKLE_NONE &&
        walk_entry(w, items->values[k], items->values[k + 1], length, depth))
      return -1;
  return 0;
}

static bool is_module(const pickle_value *v) {
  return part_of(v, "_parameters") && part_of(v, "_modules");
}

static int walk_module(walker *w, const pickle_value *v, size_t length, int depth) {
  return walk_part(w, part_of(v, "_parameters"), length, depth) ||
                 walk_part(w, part_of(v, "_buffers"), length, depth) ||
                 walk_part(w, part_of(v, "_modules"), length, depth)
             ? -1
             : 0;
}

/* ---- all of it ---- */

static int walk(walker *w, const pickle_value *v, size_t length, int depth) {
  if (depth > DEEPEST)
    return format_refuse(w->f->file, NULL, "its objects are nested more than %d deep", DEEPEST);
  const pickle_list *items;
  if ((v->kind == PICKLE_TEXT || v->kind == PICKLE_BYTES) && spend(w, v->text.length))
    return -1;
  if (is_module(v))
    return walk_module(w, v, length, depth);
  if ((items = pairs_of(v)))
    return walk_pairs(w, items, length, depth);
  if ((items = pytorch_dictionary(v)) && items->count)
    return walk_entries(w, items, length, depth);
  if (items)
    return 0;
  if ((items = pytorch_sequence(v)) && items->count) {
    int plain = add_plain(w, v);
    return plain ? (plain < 0 ? -1 : 0) : walk_list(w, items, length, depth);
  }
  return add_leaf(w, v);
}

/* An object of somebody's class alone is no checkpoint. */
static int check_root(const pytorch_file *f) {
  const pickle_value *root = f->object.value;
  pytorch_tensor t;
  char kind[PYTORCH_KIND_BYTES];
  if (root->kind != PICKLE_OBJECT || is_module(root) || pytorch_dictionary(root) || pytorch_sequence(root))
    return 0;
  int described = pytorch_describe(f, "tensor", root, &t, kind);
  if (described)
    return described < 0 ? -1 : 0;
  return format_refuse(f->file, NULL,
                       "holds %s, which is neither a tensor nor a dictionary: in Python, save its state_dict()", kind);
}

int pytorch_list_names(pytorch_file *f) {
  walker *w = calloc(1, sizeof *w);
  if (!w)
    return error_out_of_memory("%s: out of memory: no room for its names", f->file->path);
  w->f = f;
  w->budget = TEXT_SLACK + TEXT_PER_BYTE * (int64_t)f->object.bytes;
  int failed = check_root(f) || walk(w, f->object.value, 0, 0);
  if (!failed && w->kept_out.length && orepa_archive_set_metadata(f->archive, "__kept_out__", w->kept_out.bytes))
    failed = error_prefix("%s: ", f->file->path);
  free(w->value.bytes);
  free(w->kept_out.bytes);
  free(w);
  return failed ? -1 : 0;
}
