/* safetensors.c: files of weights in the safetensors format, read as files that somebody else made up, and written.
 *
 * A file is the length N of its header (8 bytes, little-endian), the header (JSON, padded with spaces), and the
 * tensors' bytes (row-major, little-endian) without a gap:
 *
 *     {"__metadata__": {"key": "value"}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
 *
 * Offsets count from the end of the header. Reading checks the whole header against the file's real size before it asks
 * for memory for any tensor. */
#include "io/safetensors.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "io/format.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the tensors' bytes are copied as they are");

enum { LENGTH_BYTES = 8, HEADER_ALIGNMENT = 8, MOST_HEADER_BYTES = 100000000, DEEPEST = 3 };

static const int64_t MOST_INTEGER = (int64_t)1 << 53; /* beyond, other readers of JSON lose digits */

static const char *const type_names[OREPA_DTYPES] = {
    [OREPA_FLOAT32] = "F32", [OREPA_BFLOAT16] = "BF16", [OREPA_FLOAT16] = "F16", [OREPA_FLOAT64] = "F64",
    [OREPA_INT64] = "I64",   [OREPA_INT32] = "I32",     [OREPA_UINT8] = "U8",    [OREPA_BOOL] = "BOOL",
};

static const char *shown(const char *text, char printed[FORMAT_QUOTED_BYTES]) {
  return format_printable(text, strlen(text), printed);
}

/* ---- the header's bytes ---- */

static int refuse_stranger(const file_reader *file, uint64_t length) {
  const char *what = format_stranger(file);
  if (what)
    return format_refuse(file, NULL, "is no safetensors file but %s", what);
  return format_refuse(file, NULL,
                       "is no safetensors file: its first 8 bytes say %llu, and a header has at most %d bytes",
                       (unsigned long long)length, MOST_HEADER_BYTES);
}

/* A ZIP archive or a gzip stream, whose first 8 bytes can be the length of a header; but then no '{' follows them. */
static bool looks_compressed(const unsigned char bytes[LENGTH_BYTES + 1]) {
  return bytes[LENGTH_BYTES] != '{' && (!memcmp(bytes, "PK\3\4", 4) || !memcmp(bytes, "\x1f\x8b\x08", 3));
}

/* The length of the header, whose bytes are known to be there; or -1. */
static int64_t header_length(const file_reader *file) {
  unsigned char bytes[LENGTH_BYTES + 1] = {0};
  if (file->size == 0)
    return format_refuse(file, NULL, "is empty");
  if (file->size < LENGTH_BYTES)
    return format_refuse(file, NULL, "is no safetensors file: it has %lld bytes", (long long)file->size);
  if (file_read(file, 0, bytes, file->size < (int64_t)sizeof bytes ? (size_t)file->size : sizeof bytes))
    return -1;
  uint64_t length = 0;
  for (int k = LENGTH_BYTES; k-- > 0;)
    length = length << 8 | bytes[k];
  if (length > MOST_HEADER_BYTES || looks_compressed(bytes))
    return refuse_stranger(file, length);
  if ((int64_t)length > file->size - LENGTH_BYTES)
    return format_refuse(file, NULL, "is truncated: its header has %lld bytes, and %lld follow", (long long)length,
                         (long long)(file->size - LENGTH_BYTES));
  return (int64_t)length;
}

/* Lists lie in tensors and tensors in the header; what lies deeper is refused before it can cost memory. */
static int check_depth(const file_reader *file, const char *text, size_t length) {
  int depth = 0;
  bool quoted = false;
  for (size_t k = 0; k < length; k++) {
    if (quoted && text[k] == '\\')
      k++;
    else if (text[k] == '"')
      quoted = !quoted;
    else if (!quoted && (text[k] == '{' || text[k] == '['))
      depth++;
    else if (!quoted && (text[k] == '}' || text[k] == ']'))
      depth--;
    if (depth > DEEPEST)
      return format_refuse(file, NULL, "the header is nested more than %d deep at its byte %zu", DEEPEST, k);
  }
  return 0;
}

static json_t *parse(const file_reader *file, const char *text, size_t length) {
  while (length && text[length - 1] == ' ')
    length--;
  if (!length || text[0] != '{' || text[length - 1] != '}') {
    format_refuse(file, NULL, "the header does not begin with '{' and end with '}' and spaces");
    return NULL;
  }
  if (check_depth(file, text, length))
    return NULL;
  json_error_t error = {.text = ""};
  json_t *json = json_loadb(text, length, JSON_REJECT_DUPLICATES, &error);
  char printed[FORMAT_QUOTED_BYTES];
  if (json)
    return json;
  for (char *c = error.text; *c; c++)
    if (*c & 0x80)
      *c = '?'; /* it may end in the middle of a character */
  if (!error.text[0] || json_error_code(&error) == json_error_out_of_memory)
    error_out_of_memory("%s: out of memory: no room for a header of %zu bytes", file->path, length);
  else
    format_refuse(file, NULL, "the header is no valid JSON: %s (at its byte %d)", shown(error.text, printed),
                  error.position);
  return NULL;
}

static json_t *read_json(const file_reader *file, int64_t *data) {
  int64_t length = header_length(file);
  if (length < 0)
    return NULL;
  *data = LENGTH_BYTES + length;
  char *text = malloc((size_t)length + 1);
  json_t *json = NULL;
  if (!text)
    error_out_of_memory("%s: out of memory: no room for a header of %lld bytes", file->path, (long long)length);
  else if (!file_read(file, LENGTH_BYTES, text, (size_t)length))
    json = parse(file, text, (size_t)length);
  free(text);
  return json;
}

/* ---- the header's tensors ---- */

typedef struct {
  const char *name; /* the JSON's */
  orepa_dtype dtype;
  int rank;
  int64_t shape[OREPA_MAX_RANK];
  int64_t begin, end;
} tensor_entry;

typedef struct {
  const file_reader *file;
  json_t *json;
  int64_t data, bytes; /* where the tensors begin, and how many bytes there are */
  size_t count;
  tensor_entry *entries;  /* in the header's order */
  tensor_entry **by_data; /* in the data's order */
} header;

static int read_dtype(const header *h, tensor_entry *e, json_t *json) {
  const char *name = json_string_value(json);
  char printed[FORMAT_QUOTED_BYTES];
  if (!name)
    return format_refuse(h->file, e->name, "dtype is not a string");
  for (int k = 0; k < OREPA_DTYPES; k++)
    if (!strcmp(name, type_names[k])) {
      e->dtype = (orepa_dtype)k;
      return 0;
    }
  return format_refuse(h->file, e->name, "the type %s is not supported (F32 BF16 F16 F64 I64 I32 U8 BOOL are)",
                       shown(name, printed));
}

static int read_integers(const header *h, const char *tensor, const char *field, json_t *list, int64_t *values) {
  size_t k;
  json_t *item;
  json_array_foreach(list, k, item) {
    values[k] = json_integer_value(item);
    if (!json_is_integer(item))
      return format_refuse(h->file, tensor, "%s holds what is no integer", field);
    if (values[k] < 0 || values[k] > MOST_INTEGER)
      return format_refuse(h->file, tensor, "%s holds %lld, which is not in 0 ... 2^53", field, (long long)values[k]);
  }
  return 0;
}

static int read_shape(const header *h, tensor_entry *e, json_t *json) {
  if (!json_is_array(json))
    return format_refuse(h->file, e->name, "shape is not a list");
  if (json_array_size(json) > OREPA_MAX_RANK)
    return format_refuse(h->file, e->name, "it has %zu dimensions, and at most %d are supported", json_array_size(json),
                         OREPA_MAX_RANK);
  e->rank = (int)json_array_size(json);
  return read_integers(h, e->name, "shape", json, e->shape);
}

static int read_offsets(const header *h, tensor_entry *e, json_t *json) {
  int64_t offsets[2];
  if (!json_is_array(json) || json_array_size(json) != 2)
    return format_refuse(h->file, e->name, "data_offsets is not a list of two");
  if (read_integers(h, e->name, "data_offsets", json, offsets))
    return -1;
  e->begin = offsets[0];
  e->end = offsets[1];
  if (e->begin > e->end)
    return format_refuse(h->file, e->name, "data_offsets [%lld, %lld] end before they begin", (long long)e->begin,
                         (long long)e->end);
  return 0;
}

static int check_size(const header *h, const tensor_entry *e) {
  int64_t wanted = format_count_bytes(orepa_dtype_size(e->dtype), e->rank, e->shape), given = e->end - e->begin;
  const char *type = orepa_dtype_name(e->dtype), *shape = shape_text(e->rank, e->shape);
  if (wanted < 0)
    return format_refuse(h->file, e->name, "a %s %s has more bytes than can be counted", type, shape);
  if (wanted != given)
    return format_refuse(h->file, e->name, "data_offsets [%lld, %lld] are %lld bytes, a %s %s has %lld",
                         (long long)e->begin, (long long)e->end, (long long)given, type, shape, (long long)wanted);
  return 0;
}

static int read_entry(const header *h, tensor_entry *e, json_t *json) {
  static const char *const fields[] = {"dtype", "shape", "data_offsets"};
  json_t *values[3], *value;
  const char *field;
  char printed[FORMAT_QUOTED_BYTES];
  if (!json_is_object(json))
    return format_refuse(h->file, e->name, "its entry in the header is not an object");
  for (int k = 0; k < 3; k++)
    if (!(values[k] = json_object_get(json, fields[k])))
      return format_refuse(h->file, e->name, "it has no %s", fields[k]);
  json_object_foreach(json, field, value) {
    if (value != values[0] && value != values[1] && value != values[2])
      return format_refuse(h->file, e->name, "it has an unknown field \"%s\"", shown(field, printed));
  }
  return read_dtype(h, e, values[0]) || read_shape(h, e, values[1]) || read_offsets(h, e, values[2]) || check_size(h, e)
             ? -1
             : 0;
}

static int check_metadata(const file_reader *file, json_t *metadata) {
  const char *key;
  json_t *value;
  char printed[FORMAT_QUOTED_BYTES];
  if (!json_is_object(metadata))
    return format_refuse(file, NULL, "__metadata__ is not an object");
  json_object_foreach(metadata, key, value) {
    if (!json_is_string(value))
      return format_refuse(file, NULL, "__metadata__: the value of \"%s\" is not a string", shown(key, printed));
  }
  return 0;
}

static int read_entries(header *h) {
  size_t room = json_object_size(h->json);
  h->entries = calloc(room + 1, sizeof *h->entries); /* + 1: calloc of nothing may give NULL */
  h->by_data = calloc(room + 1, sizeof *h->by_data);
  if (!h->entries || !h->by_data)
    return error_out_of_memory("%s: out of memory: no room for a list of %zu tensors", h->file->path, room);
  const char *name;
  json_t *json;
  json_object_foreach(h->json, name, json) {
    if (!strcmp(name, "__metadata__")) {
      if (check_metadata(h->file, json))
        return -1;
      continue;
    }
    tensor_entry *e = &h->entries[h->count];
    e->name = name;
    if (read_entry(h, e, json))
      return -1;
    h->by_data[h->count++] = e;
  }
  return 0;
}

/* ---- where the tensors lie ---- */

static int by_offsets(const void *a, const void *b) {
  const tensor_entry *x = *(tensor_entry *const *)a, *y = *(tensor_entry *const *)b;
  if (x->begin != y->begin)
    return x->begin < y->begin ? -1 : 1;
  return x->end < y->end ? -1 : x->end > y->end;
}

/* In the order of the data each tensor begins where the one before it ends, and the last ends with the file. */
static int check_layout(header *h) {
  qsort(h->by_data, h->count, sizeof *h->by_data, by_offsets);
  int64_t at = 0;
  char printed[FORMAT_QUOTED_BYTES];
  for (size_t k = 0; k < h->count; k++) {
    const tensor_entry *e = h->by_data[k];
    if (e->begin < at)
      return format_refuse(h->file, e->name, "data_offsets [%lld, %lld] overlap those of \"%s\", which end at %lld",
                           (long long)e->begin, (long long)e->end, shown(h->by_data[k - 1]->name, printed),
                           (long long)at);
    if (e->begin > at)
      return format_refuse(h->file, e->name,
                           "data_offsets [%lld, %lld] leave a hole: the tensors before it end at %lld",
                           (long long)e->begin, (long long)e->end, (long long)at);
    at = e->end;
    if (at > h->bytes)
      return format_refuse(h->file, e->name,
                           "data_offsets [%lld, %lld] reach beyond the file, which has %lld bytes of data: "
                           "it is truncated",
                           (long long)e->begin, (long long)e->end, (long long)h->bytes);
  }
  if (at < h->bytes)
    return format_refuse(h->file, NULL, "%lld bytes follow where the last tensor ends, at %lld",
                         (long long)(h->bytes - at), (long long)at);
  return 0;
}

/* ---- reading ---- */

static int load_tensor(const header *h, const tensor_entry *e, void *bytes, const orepa_device *device,
                       orepa_archive *archive) {
  if (file_read(h->file, h->data + e->begin, bytes, (size_t)(e->end - e->begin)))
    return -1;
  if (e->dtype == OREPA_BOOL && format_check_bools(h->file, e->name, bytes, e->end - e->begin))
    return -1;
  orepa_tensor *t = orepa_from_host(e->dtype, device, e->rank, e->shape, bytes);
  int failed = !t || orepa_archive_add(archive, e->name, t);
  orepa_release(t);
  char printed[FORMAT_QUOTED_BYTES];
  return failed ? error_prefix("%s: tensor \"%s\": ", h->file->path, shown(e->name, printed)) : 0;
}

static int load_metadata(const header *h, orepa_archive *archive) {
  const char *key;
  json_t *value;
  json_object_foreach(json_object_get(h->json, "__metadata__"), key, value) {
    if (orepa_archive_set_metadata(archive, key, json_string_value(value)))
      return error_prefix("%s: ", h->file->path);
  }
  return 0;
}

/* By way of one buffer that holds the largest tensor. */
static int load(const header *h, const orepa_device *device, orepa_archive *archive) {
  int64_t largest = 1;
  for (size_t k = 0; k < h->count; k++)
    if (h->entries[k].end - h->entries[k].begin > largest)
      largest = h->entries[k].end - h->entries[k].begin;
  void *bytes = malloc((size_t)largest);
  if (!bytes)
    return error_out_of_memory("%s: out of memory: no room for a tensor of %lld bytes on the host", h->file->path,
                               (long long)largest);
  int failed = load_metadata(h, archive);
  for (size_t k = 0; k < h->count && !failed; k++)
    failed = load_tensor(h, &h->entries[k], bytes, device, archive);
  free(bytes);
  return failed;
}

orepa_archive *safetensors_read(const file_reader *file, const orepa_device *device) {
  header h = {.file = file};
  h.json = read_json(file, &h.data);
  h.bytes = file->size - h.data;
  orepa_archive *archive = NULL;
  if (h.json && !read_entries(&h) && !check_layout(&h)) {
    archive = orepa_archive_new();
    if (archive && load(&h, device, archive)) {
      orepa_archive_free(archive);
      archive = NULL;
    }
  }
  free(h.entries);
  free(h.by_data);
  json_decref(h.json);
  return archive;
}

/* ---- writing ---- */

typedef struct {
  const char *path;
  const orepa_archive *archive;
  size_t count;
  size_t *order;           /* the tensors' positions in the archive, in the data's order */
  int64_t *begins, *bytes; /* by position in the archive */
  int64_t largest;
} layout;

/* Sizes of types fall from 8 to 1, so each tensor begins at a multiple of its own; within a size the archive's order
 * holds. */
static int lay_out(layout *l) {
  int64_t at = 0;
  size_t placed = 0;
  for (size_t size = 8; size; size /= 2)
    for (size_t k = 0; k < l->count; k++) {
      const orepa_tensor *t = orepa_archive_tensor(l->archive, k);
      orepa_dtype dtype = orepa_tensor_dtype(t);
      if (orepa_dtype_size(dtype) != size)
        continue;
      int64_t bytes = format_count_bytes(orepa_dtype_size(dtype), orepa_rank(t), orepa_shape(t));
      if (bytes < 0 || bytes > MOST_INTEGER - at)
        return error_set("%s: tensor \"%s\": %s is too large for a file", l->path, orepa_archive_name(l->archive, k),
                         tensor_text(t));
      l->order[placed++] = k;
      l->begins[k] = at;
      l->bytes[k] = bytes;
      at += bytes;
      if (bytes > l->largest)
        l->largest = bytes;
    }
  return 0;
}

static json_t *entry_json(const orepa_tensor *t, int64_t begin, int64_t bytes) {
  json_t *shape = json_array();
  for (int d = 0; d < orepa_rank(t); d++)
    if (json_array_append_new(shape, json_integer(orepa_shape(t)[d]))) {
      json_decref(shape);
      return NULL;
    }
  return json_pack("{s:s, s:o, s:[I, I]}", "dtype", type_names[orepa_tensor_dtype(t)], "shape", shape, "data_offsets",
                   (json_int_t)begin, (json_int_t)(begin + bytes));
}

static json_t *metadata_json(const orepa_archive *archive) {
  json_t *json = json_object();
  for (size_t k = 0; k < orepa_archive_metadata_count(archive); k++)
    if (json_object_set_new_nocheck(json, orepa_archive_metadata_key(archive, k),
                                    json_string_nocheck(orepa_archive_metadata_value(archive, k)))) {
      json_decref(json);
      return NULL;
    }
  return json;
}

/* The header without its padding; NULL: out of memory. */
static char *header_text(const layout *l) {
  json_t *json = json_object();
  int failed = !json;
  if (!failed && orepa_archive_metadata_count(l->archive))
    failed = json_object_set_new_nocheck(json, "__metadata__", metadata_json(l->archive));
  for (size_t k = 0; k < l->count && !failed; k++)
    failed = json_object_set_new_nocheck(json, orepa_archive_name(l->archive, k),
                                         entry_json(orepa_archive_tensor(l->archive, k), l->begins[k], l->bytes[k]));
  char *text = failed ? NULL : json_dumps(json, JSON_COMPACT);
  json_decref(json);
  return text;
}

static int write_header(file_writer *file, const char *text) {
  static const char spaces[HEADER_ALIGNMENT] = "        ";
  size_t length = strlen(text), padding = (HEADER_ALIGNMENT - length % HEADER_ALIGNMENT) % HEADER_ALIGNMENT;
  uint64_t padded = length + padding;
  if (padded > MOST_HEADER_BYTES)
    return error_set("%s: the header would have %llu bytes, and at most %d are allowed", file->path,
                     (unsigned long long)padded, MOST_HEADER_BYTES);
  return file_write(file, &padded, sizeof padded) || file_write(file, text, length) ||
         file_write(file, spaces, padding);
}

static int write_tensors(file_writer *file, const layout *l) {
  void *bytes = malloc((size_t)l->largest + 1);
  if (!bytes)
    return error_out_of_memory("%s: out of memory: no room for a tensor of %lld bytes on the host", l->path,
                               (long long)l->largest);
  int failed = 0;
  for (size_t n = 0; n < l->count && !failed; n++) {
    size_t k = l->order[n], size = (size_t)l->bytes[k];
    if (orepa_to_host(orepa_archive_tensor(l->archive, k), bytes, size))
      failed = error_prefix("%s: tensor \"%s\": ", l->path, orepa_archive_name(l->archive, k));
    else
      failed = file_write(file, bytes, size);
  }
  free(bytes);
  return failed;
}

static int save(const layout *l) {
  char *text = header_text(l);
  file_writer file;
  if (!text)
    return error_out_of_memory("%s: out of memory: no room for the header", l->path);
  int failed = file_create(&file, l->path);
  if (!failed)
    failed = file_finish(&file, write_header(&file, text) || write_tensors(&file, l));
  free(text);
  return failed;
}

int orepa_save_safetensors(const char *path, const orepa_archive *archive) {
  size_t count = orepa_archive_count(archive);
  layout l = {.path = path, .archive = archive, .count = count};
  l.order = calloc(count + 1, sizeof *l.order);
  l.begins = calloc(count + 1, sizeof *l.begins);
  l.bytes = calloc(count + 1, sizeof *l.bytes);
  int failed;
  if (!l.order || !l.begins || !l.bytes)
    failed = error_out_of_memory("%s: out of memory: no room for a list of %zu tensors", path, count);
  else
    failed = lay_out(&l) || save(&l);
  free(l.order);
  free(l.begins);
  free(l.bytes);
  return failed ? -1 : 0;
}
