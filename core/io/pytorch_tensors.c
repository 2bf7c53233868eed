/* pytorch_tensors.c: tensors as torch.save describes them: a storage by its key, an offset, sizes and strides. All of
 * it is checked against what is in the file before memory is asked for; then each storage is read once. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "error.h"
#include "io/pytorch.h"

enum { NO_DTYPE = -1, MOST_REPEATS = 8, REPEATS_SLACK = 1 << 20 };

typedef struct pytorch_type {
  const char *name;
  int size;
  int dtype; /* NO_DTYPE: no tensor of ours has it */
} pytorch_type;

static const pytorch_type types[] = {
    {"FloatStorage", 4, OREPA_FLOAT32},  {"BFloat16Storage", 2, OREPA_BFLOAT16}, {"HalfStorage", 2, OREPA_FLOAT16},
    {"DoubleStorage", 8, OREPA_FLOAT64}, {"LongStorage", 8, OREPA_INT64},        {"IntStorage", 4, OREPA_INT32},
    {"ByteStorage", 1, OREPA_UINT8},     {"BoolStorage", 1, OREPA_BOOL},         {"ShortStorage", 2, NO_DTYPE},
    {"CharStorage", 1, NO_DTYPE},        {"ComplexFloatStorage", 8, NO_DTYPE},   {"ComplexDoubleStorage", 16, NO_DTYPE},
    {"UntypedStorage", 1, NO_DTYPE},     {"QInt8Storage", 1, NO_DTYPE},          {"QUInt8Storage", 1, NO_DTYPE},
    {"QInt32Storage", 4, NO_DTYPE},      {"QUInt4x2Storage", 1, NO_DTYPE},       {"QUInt2x4Storage", 1, NO_DTYPE},
};

/* ---- storages ---- */

static const pytorch_type *type_of(const pickle_value *v) {
  if (v->kind != PICKLE_GLOBAL || v->global.module.length < 5 || memcmp(v->global.module.bytes, "torch", 5))
    return NULL; /* torch, torch.cuda, torch.storage */
  for (size_t k = 0; k < sizeof types / sizeof *types; k++)
    if (v->global.name.length == strlen(types[k].name) &&
        !memcmp(v->global.name.bytes, types[k].name, v->global.name.length))
      return &types[k];
  return NULL;
}

/* ('storage', type, key, location, count[, view]), or NULL; a persistent value may also stand for a class. */
static const pickle_list *storage_words(const pickle_value *v) {
  const pickle_value *identity = v->kind == PICKLE_PERSISTENT ? v->identity : NULL;
  if (!identity || identity->kind != PICKLE_TUPLE || !identity->items.count ||
      !pickle_is_text(identity->items.values[0], "storage"))
    return NULL;
  return &identity->items;
}

static int compare_keys(const pickle_text *a, const pickle_text *b) {
  int order = memcmp(a->bytes, b->bytes, a->length < b->length ? a->length : b->length);
  return order ? order : a->length < b->length ? -1 : a->length > b->length;
}

static int by_key(const void *a, const void *b) {
  const pytorch_storage *x = a, *y = b;
  return compare_keys(&x->key, &y->key);
}

static int read_storage(const pytorch_file *f, const pickle_list *words, pytorch_storage *s) {
  pickle_value **v = words->values;
  char kind[PYTORCH_KIND_BYTES], printed[FORMAT_QUOTED_BYTES];
  if (words->count < 5 || words->count > 6 || v[2]->kind != PICKLE_TEXT || v[4]->kind != PICKLE_INTEGER)
    return format_refuse(f->file, NULL, "a storage is not described as torch.save does it");
  format_printable(v[2]->text.bytes, v[2]->text.length, printed);
  *s = (pytorch_storage){.key = v[2]->text, .type = type_of(v[1]), .count = v[4]->integer};
  if (!s->type) {
    pytorch_write_kind(v[1], kind);
    return format_refuse(f->file, NULL, "storage %s is of an unknown type, %s", printed, kind);
  }
  if (s->count < 0 || s->count > f->file->size / s->type->size)
    return format_refuse(f->file, NULL, "storage %s is said to have %lld elements of %d bytes, the file has %lld bytes",
                         printed, (long long)s->count, s->type->size, (long long)f->file->size);
  return 0;
}

/* One of each key; two that differ are refused. */
static int remove_twins(pytorch_file *f) {
  pytorch_storage *s = f->storages;
  char printed[FORMAT_QUOTED_BYTES];
  size_t kept = 0;
  for (size_t k = 0; k < f->storage_count; k++) {
    if (kept && !by_key(&s[kept - 1], &s[k])) {
      if (s[kept - 1].type != s[k].type || s[kept - 1].count != s[k].count)
        return format_refuse(f->file, NULL, "storage %s is %lld elements of %s, and %lld of %s elsewhere",
                             format_printable(s[k].key.bytes, s[k].key.length, printed), (long long)s[k].count,
                             s[k].type->name, (long long)s[kept - 1].count, s[kept - 1].type->name);
      continue;
    }
    s[kept++] = s[k];
  }
  f->storage_count = kept;
  return 0;
}

int pytorch_list_storages(pytorch_file *f) {
  const pickle_list *all = &f->object.persistent;
  f->storages = calloc((size_t)all->count + 1, sizeof *f->storages);
  if (!f->storages)
    return error_out_of_memory("%s: out of memory: no room for a list of %u storages", f->file->path, all->count);
  for (uint32_t k = 0; k < all->count; k++) {
    const pickle_list *words = storage_words(all->values[k]);
    if (words && read_storage(f, words, &f->storages[f->storage_count++]))
      return -1;
  }
  qsort(f->storages, f->storage_count, sizeof *f->storages, by_key);
  return remove_twins(f);
}

pytorch_storage *pytorch_find_storage(const pytorch_file *f, const pickle_text *key) {
  pytorch_storage wanted = {.key = *key};
  return f->storage_count ? bsearch(&wanted, f->storages, f->storage_count, sizeof wanted, by_key) : NULL;
}

int64_t pytorch_element_size(const pytorch_storage *s) {
  return s->type->size;
}

/* ---- which values are tensors ---- */

/* The arguments of torch._utils._rebuild_tensor or _rebuild_tensor_v2 that the value comes down to; NULL: it is no
 * tensor. */
static const pickle_list *tensor_arguments(const pickle_value *v) {
  for (int wrapped = 0; v->kind == PICKLE_OBJECT && wrapped < 4; wrapped++) {
    const pickle_value *callable = v->object.callable;
    const pickle_list *arguments = &v->object.arguments->items;
    if (pickle_is_global(callable, "torch._tensor", "_rebuild_from_type_v2") && arguments->count >= 3) {
      callable = arguments->values[0]; /* of (function, type, arguments, state) */
      if (arguments->values[2]->kind != PICKLE_TUPLE)
        return NULL;
      arguments = &arguments->values[2]->items;
    }
    if (pickle_is_global(callable, "torch._utils", "_rebuild_tensor_v2") ||
        pickle_is_global(callable, "torch._utils", "_rebuild_tensor"))
      return arguments;
    if ((!pickle_is_global(callable, "torch._utils", "_rebuild_parameter") &&
         !pickle_is_global(callable, "torch._utils", "_rebuild_parameter_with_state")) ||
        !arguments->count)
      return NULL;
    v = arguments->values[0];
  }
  return NULL;
}

/* Views of bits that were never turned round are not supported: conj and neg. */
static bool has_flags(const pickle_list *arguments) {
  const pickle_list *flags = arguments->count > 6 ? pytorch_dictionary(arguments->values[6]) : NULL;
  return flags && flags->count;
}

/* ---- geometry ---- */

static int read_sizes(const pytorch_file *f, const char *name, const pickle_list *list, const char *what,
                      int64_t *sizes) {
  for (uint32_t d = 0; d < list->count; d++) {
    if (list->values[d]->kind != PICKLE_INTEGER)
      return format_refuse(f->file, name, "its %s hold what is no integer", what);
    sizes[d] = list->values[d]->integer;
    if (sizes[d] < 0)
      return format_refuse(f->file, name, "its %s hold %lld", what, (long long)sizes[d]);
  }
  return 0;
}

/* A window of the storage, as files before PyTorch 0.4 have them: (key, offset, count). */
static int read_window(const pytorch_file *f, const char *name, const pickle_list *words, int64_t *first,
                       int64_t *limit) {
  const pickle_value *view = words->count == 6 ? words->values[5] : NULL;
  if (!view || view->kind == PICKLE_NONE)
    return 0;
  if (view->kind != PICKLE_TUPLE || view->items.count != 3 || view->items.values[1]->kind != PICKLE_INTEGER ||
      view->items.values[2]->kind != PICKLE_INTEGER)
    return format_refuse(f->file, name, "the view of its storage is not described as torch.save does it");
  int64_t offset = view->items.values[1]->integer, count = view->items.values[2]->integer;
  if (offset < 0 || count < 0 || offset > *limit || count > *limit - offset)
    return format_refuse(f->file, name, "it views %lld elements at %lld of a storage of %lld", (long long)count,
                         (long long)offset, (long long)*limit);
  *first = offset;
  *limit = count;
  return 0;
}

/* The last element that it reaches is in the storage. */
static int check_reach(const pytorch_file *f, const char *name, const pytorch_tensor *t, int64_t limit) {
  int64_t last = t->offset;
  bool counted = true;
  for (int d = 0; d < t->rank; d++) {
    int64_t step;
    if (t->shape[d] == 0)
      return 0;
    counted = counted && !__builtin_mul_overflow(t->shape[d] - 1, t->strides[d], &step) &&
              !__builtin_add_overflow(last, step, &last);
  }
  if (counted && last < limit)
    return 0;
  return format_refuse(f->file, name, "%s with strides %s at offset %lld reaches beyond its storage of %lld elements",
                       shape_text(t->rank, t->shape), shape_text(t->rank, t->strides), (long long)t->offset,
                       (long long)limit);
}

static int read_geometry(const pytorch_file *f, const char *name, const pickle_list *arguments, pytorch_tensor *t) {
  const pickle_list *shape = pytorch_sequence(arguments->values[2]), *strides = pytorch_sequence(arguments->values[3]);
  const pickle_value *offset = arguments->values[1];
  int64_t first = 0, limit = t->storage->count;
  if (!shape || !strides || shape->count != strides->count || offset->kind != PICKLE_INTEGER || offset->integer < 0)
    return format_refuse(f->file, name, "its offset, sizes and strides are not described as torch.save does it");
  t->rank = (int)shape->count;
  if (read_sizes(f, name, shape, "sizes", t->shape) || read_sizes(f, name, strides, "strides", t->strides) ||
      read_window(f, name, storage_words(arguments->values[0]), &first, &limit))
    return -1;
  t->bytes = format_count_bytes(orepa_dtype_size(t->dtype), t->rank, t->shape);
  if (t->bytes < 0)
    return format_refuse(f->file, name, "a %s %s has more bytes than can be counted", orepa_dtype_name(t->dtype),
                         shape_text(t->rank, t->shape));
  t->offset = offset->integer;
  if (check_reach(f, name, t, limit))
    return -1;
  t->offset += first;
  return 0;
}

int pytorch_describe(const pytorch_file *f, const char *name, const pickle_value *v, pytorch_tensor *t,
                     char reason[PYTORCH_KIND_BYTES]) {
  const pickle_list *arguments = tensor_arguments(v);
  if (!arguments) {
    pytorch_write_kind(v, reason);
    return 0;
  }
  const pickle_list *words = arguments->count >= 4 ? storage_words(arguments->values[0]) : NULL;
  if (!words)
    return format_refuse(f->file, name, "it has no storage");
  *t = (pytorch_tensor){.value = v, .storage = pytorch_find_storage(f, &words->values[2]->text)};
  const pytorch_type *type = t->storage->type;
  const pickle_list *shape = pytorch_sequence(arguments->values[2]);
  if (type->dtype == NO_DTYPE)
    snprintf(reason, PYTORCH_KIND_BYTES, "a tensor of torch.%s", type->name);
  else if (has_flags(arguments))
    snprintf(reason, PYTORCH_KIND_BYTES, "a tensor that is to be negated or conjugated");
  else if (shape && shape->count > OREPA_MAX_RANK)
    snprintf(reason, PYTORCH_KIND_BYTES, "a tensor of %u dimensions (at most %d are supported)", shape->count,
             OREPA_MAX_RANK);
  else {
    t->dtype = (orepa_dtype)type->dtype;
    return read_geometry(f, name, arguments, t) ? -1 : 1;
  }
  return 0;
}

/* ---- loading ---- */

/* Storages in the file's order, names of one value side by side. */
static int by_storage(const void *a, const void *b) {
  const pytorch_tensor *x = *(pytorch_tensor *const *)a, *y = *(pytorch_tensor *const *)b;
  if (x->storage != y->storage)
    return x->storage->offset != y->storage->offset ? (x->storage->offset < y->storage->offset ? -1 : 1)
                                                    : (x->storage < y->storage ? -1 : 1);
  if (x->value != y->value)
    return x->value < y->value ? -1 : 1;
  return x->position < y->position ? -1 : x->position > y->position;
}

static bool is_row_major(const pytorch_tensor *t) {
  int64_t stride = 1;
  for (int d = t->rank; d-- > 0; stride *= t->shape[d])
    if (t->shape[d] != 1 && t->strides[d] != stride)
      return false;
  return true;
}

/* Strides can repeat elements, and tensors can share storages: what they take together stays within a few times the
 * file. */
static int check_total(const pytorch_file *f, pytorch_tensor *const *order, int64_t *largest_storage,
                       int64_t *largest_gathered) {
  int64_t left = REPEATS_SLACK;
  if (__builtin_add_overflow(left, MOST_REPEATS * (f->file->size < INT64_MAX / 16 ? f->file->size : INT64_MAX / 16),
                             &left))
    left = INT64_MAX;
  for (size_t k = 0; k < f->tensor_count; k++) {
    const pytorch_tensor *t = order[k];
    if (t->storage->bytes > *largest_storage)
      *largest_storage = t->storage->bytes;
    if (k && order[k - 1]->value == t->value)
      continue;
    if (t->bytes > left)
      return format_refuse(f->file, t->name,
                           "a %s %s has %lld bytes: with it the tensors would take more than %d times the file's %lld; "
                           "its strides repeat elements, or many tensors share a storage",
                           orepa_dtype_name(t->dtype), shape_text(t->rank, t->shape), (long long)t->bytes, MOST_REPEATS,
                           (long long)f->file->size);
    left -= t->bytes;
    if (t->bytes > *largest_gathered && !is_row_major(t))
      *largest_gathered = t->bytes;
  }
  return 0;
}

/* Elements in logical order. */
static void gather(const pytorch_tensor *t, const unsigned char *storage, unsigned char *to) {
  size_t size = orepa_dtype_size(t->dtype);
  int64_t at[OREPA_MAX_RANK] = {0}, element = t->offset;
  for (int64_t left = t->bytes / (int64_t)size; left > 0; left--, to += size) {
    memcpy(to, storage + (size_t)element * size, size);
    for (int d = t->rank; d-- > 0;) {
      element += t->strides[d];
      if (++at[d] < t->shape[d])
        break;
      element -= t->strides[d] * t->shape[d];
      at[d] = 0;
    }
  }
}

static int read_bytes(const pytorch_file *f, const pytorch_storage *s, unsigned char *bytes) {
  char printed[FORMAT_QUOTED_BYTES];
  if (file_read(f->file, s->offset, bytes, (size_t)s->bytes))
    return -1;
  if (s->checksum && crc32_z(0, bytes, (size_t)s->bytes) != s->checksum)
    return format_refuse(f->file, NULL,
                         "storage %s is damaged: its bytes don't have the checksum that was stored with them",
                         format_printable(s->key.bytes, s->key.length, printed));
  return 0;
}

static int load_one(const pytorch_file *f, pytorch_tensor *t, const unsigned char *storage, unsigned char *gathered) {
  size_t size = orepa_dtype_size(t->dtype);
  const unsigned char *elements = gathered;
  if (t->bytes == 0 || is_row_major(t))
    elements = t->bytes ? storage + (size_t)t->offset * size : storage;
  else
    gather(t, storage, gathered);
  if (t->dtype == OREPA_BOOL && format_check_bools(f->file, t->name, elements, t->bytes))
    return -1;
  t->loaded = orepa_from_host(t->dtype, f->device, t->rank, t->shape, elements);
  char printed[FORMAT_QUOTED_BYTES];
  return t->loaded
             ? 0
             : error_prefix("%s: tensor \"%s\": ", f->file->path, format_printable(t->name, strlen(t->name), printed));
}

static int load_in_order(const pytorch_file *f, pytorch_tensor *const *order, unsigned char *storage,
                         unsigned char *gathered) {
  for (size_t k = 0; k < f->tensor_count; k++) {
    pytorch_tensor *t = order[k], *before = k ? order[k - 1] : NULL;
    if ((!before || before->storage != t->storage) && read_bytes(f, t->storage, storage))
      return -1;
    if (before && before->value == t->value)
      t->loaded = orepa_retain(before->loaded);
    else if (load_one(f, t, storage, gathered))
      return -1;
  }
  return 0;
}

static int add_all(pytorch_file *f) {
  for (size_t k = 0; k < f->tensor_count; k++)
    if (orepa_archive_add(f->archive, f->tensors[k].name, f->tensors[k].loaded))
      return error_prefix("%s: ", f->file->path);
  return 0;
}

int pytorch_load_tensors(pytorch_file *f) {
  int64_t largest_storage = 0, largest_gathered = 0;
  pytorch_tensor **order = malloc((f->tensor_count + 1) * sizeof *order);
  if (!order)
    return error_out_of_memory("%s: out of memory: no room for a list of %zu tensors", f->file->path, f->tensor_count);
  for (size_t k = 0; k < f->tensor_count; k++)
    order[k] = &f->tensors[k];
  qsort(order, f->tensor_count, sizeof *order, by_storage);
  int failed = check_total(f, order, &largest_storage, &largest_gathered);
  if (!failed) {
    unsigned char *storage = malloc((size_t)largest_storage + 1), *gathered = malloc((size_t)largest_gathered + 1);
    if (!storage || !gathered)
      failed = error_out_of_memory("%s: out of memory: no room for a storage of %lld bytes on the host", f->file->path,
                                   (long long)largest_storage);
    else
      failed = load_in_order(f, order, storage, gathered) || add_all(f);
    free(storage);
    free(gathered);
  }
  free(order);
  return failed ? -1 : 0;
}
