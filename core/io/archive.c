/* archive.c: named tensors and string metadata, in the order in which they were added: a file of weights, in memory. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "orepa_io.h"

typedef struct {
  char *name;
  void *value;
} item;

/* The index maps names to positions. It is jansson's hash table because that one's seed is secret: names come from
 * files, and must not be able to collide on purpose. */
typedef struct {
  item *items;
  size_t count, capacity;
  json_t *index;
} table;

struct orepa_archive {
  table tensors, metadata; /* values: orepa_tensor, char */
};

static item *table_find(const table *t, const char *name) {
  json_t *position = json_object_get(t->index, name);
  return position ? &t->items[json_integer_value(position)] : NULL;
}

static int out_of_memory(void) {
  return error_out_of_memory("out of memory: no room for a name in an archive");
}

/* The value is the table's only after 0. */
static int table_append(table *t, const char *name, void *value) {
  if (t->count == t->capacity) {
    size_t capacity = t->capacity ? 2 * t->capacity : 16;
    item *items = realloc(t->items, capacity * sizeof *items);
    if (!items)
      return out_of_memory();
    t->items = items;
    t->capacity = capacity;
  }
  char *copy = strdup(name);
  if (!copy || json_object_set_new_nocheck(t->index, name, json_integer((json_int_t)t->count))) {
    free(copy);
    return out_of_memory();
  }
  t->items[t->count++] = (item){copy, value};
  return 0;
}

static void table_free(table *t) {
  for (size_t k = 0; k < t->count; k++)
    free(t->items[k].name);
  free(t->items);
  json_decref(t->index);
}

static int check_utf8(const char *what, const char *text) {
  json_t *checked = json_string(text), *plain = checked ? NULL : json_string_nocheck(text);
  int failed = checked ? 0 : plain ? error_set("archive: %s is not valid UTF-8", what) : out_of_memory();
  json_decref(checked);
  json_decref(plain);
  return failed;
}

/* ---- public ---- */

orepa_archive *orepa_archive_new(void) {
  orepa_archive *archive = calloc(1, sizeof *archive);
  if (archive) {
    archive->tensors.index = json_object();
    archive->metadata.index = json_object();
    if (archive->tensors.index && archive->metadata.index)
      return archive;
  }
  orepa_archive_free(archive);
  error_out_of_memory("out of memory: no room for an archive");
  return NULL;
}

void orepa_archive_free(orepa_archive *archive) {
  if (!archive)
    return;
  for (size_t k = 0; k < archive->tensors.count; k++)
    orepa_release(archive->tensors.items[k].value);
  for (size_t k = 0; k < archive->metadata.count; k++)
    free(archive->metadata.items[k].value);
  table_free(&archive->tensors);
  table_free(&archive->metadata);
  free(archive);
}

int orepa_archive_add(orepa_archive *archive, const char *name, orepa_tensor *t) {
  if (check_utf8("a tensor's name", name))
    return -1;
  if (!strcmp(name, "__metadata__"))
    return error_set("archive: a tensor can't be called \"__metadata__\"");
  if (table_find(&archive->tensors, name))
    return error_set("archive: there is a tensor \"%s\" already", name);
  if (table_append(&archive->tensors, name, t))
    return -1;
  orepa_retain(t);
  return 0;
}

int orepa_archive_set_metadata(orepa_archive *archive, const char *key, const char *value) {
  if (check_utf8("a key of the metadata", key) || check_utf8("a value of the metadata", value))
    return -1;
  char *copy = strdup(value);
  if (!copy)
    return out_of_memory();
  item *old = table_find(&archive->metadata, key);
  if (old) {
    free(old->value);
    old->value = copy;
  } else if (table_append(&archive->metadata, key, copy)) {
    free(copy);
    return -1;
  }
  return 0;
}

static const char *name_at(const table *t, size_t position) {
  return position < t->count ? t->items[position].name : NULL;
}

static void *value_at(const table *t, size_t position) {
  return position < t->count ? t->items[position].value : NULL;
}

static void *value_of(const table *t, const char *name) {
  const item *found = table_find(t, name);
  return found ? found->value : NULL;
}

size_t orepa_archive_count(const orepa_archive *archive) {
  return archive->tensors.count;
}

const char *orepa_archive_name(const orepa_archive *archive, size_t position) {
  return name_at(&archive->tensors, position);
}

orepa_tensor *orepa_archive_tensor(const orepa_archive *archive, size_t position) {
  return value_at(&archive->tensors, position);
}

orepa_tensor *orepa_archive_find(const orepa_archive *archive, const char *name) {
  return value_of(&archive->tensors, name);
}

size_t orepa_archive_metadata_count(const orepa_archive *archive) {
  return archive->metadata.count;
}

const char *orepa_archive_metadata_key(const orepa_archive *archive, size_t position) {
  return name_at(&archive->metadata, position);
}

const char *orepa_archive_metadata_value(const orepa_archive *archive, size_t position) {
  return value_at(&archive->metadata, position);
}

const char *orepa_archive_find_metadata(const orepa_archive *archive, const char *key) {
  return value_of(&archive->metadata, key);
}
