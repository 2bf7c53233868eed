/* pytorch.c: files that torch.save wrote, in both of its containers.
 *
 * Since PyTorch 1.6 a file is a ZIP archive of stored entries in one folder: data.pkl, a pickle that describes the
 * object with its tensors, and data/KEY, the elements of each storage. Before, it was pickles one after another (a
 * magic number, a version, the machine's byte order, the object, a list of the storages' keys) and then, in that list's
 * order, each storage: its count of elements (8 bytes), and those. Elements are little-endian. */
#include "io/pytorch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>

#include "error.h"
#include "io/zip.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the tensors' bytes are copied as they are");

enum { MOST_PICKLE_BYTES = 1 << 26, FIRST_WINDOW = 1 << 16, COUNT_BYTES = 8 };

static const unsigned char magic[] = {0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19};

/* ---- what both have ---- */

/* From the object and the places of the storages to the archive. */
static int load(pytorch_file *f, int (*place)(pytorch_file *f, void *container), void *container) {
  f->archive = orepa_archive_new();
  return !f->archive || pytorch_list_storages(f) || place(f, container) || pytorch_list_names(f) ||
                 pytorch_load_tensors(f)
             ? -1
             : 0;
}

static void free_tensors(pytorch_file *f) {
  for (size_t k = 0; k < f->tensor_count; k++) {
    free(f->tensors[k].name);
    orepa_release(f->tensors[k].loaded);
  }
  free(f->tensors);
  free(f->storages);
  pickle_free(&f->object);
}

/* ---- the ZIP archive ---- */

static int read_entry(const file_reader *file, const zip_entry *e, const char *what, unsigned char *bytes) {
  if (file_read(file, e->offset, bytes, (size_t)e->size))
    return -1;
  if (e->checksum && crc32_z(0, bytes, (size_t)e->size) != e->checksum)
    return format_refuse(file, NULL, "%s is damaged: its bytes don't have the checksum that was stored with them",
                         what);
  return 0;
}

static int check_archive(const zip_archive *zip) {
  const zip_entry *order = zip_find(zip, "byteorder");
  unsigned char text[8] = "";
  if (zip_find(zip, "constants.pkl") || zip_has(zip, "code/"))
    return format_refuse(zip->file, NULL,
                         "is a TorchScript archive, a program: in Python, load it with torch.jit.load and "
                         "save its state_dict() with torch.save");
  if (!zip_find(zip, "data.pkl"))
    return format_refuse(zip->file, NULL, "is a ZIP archive, but none of torch.save's: it has no data.pkl");
  if (order && order->size < (int64_t)sizeof text && read_entry(zip->file, order, "byteorder", text))
    return -1;
  if (order && strcmp((char *)text, "little"))
    return format_refuse(zip->file, NULL, "its numbers are %s-endian, which is not supported",
                         strcmp((char *)text, "big") ? "unknown" : "big");
  return 0;
}

static int place_entries(pytorch_file *f, void *container) {
  const zip_archive *zip = container;
  char name[256], printed[FORMAT_QUOTED_BYTES];
  for (size_t k = 0; k < f->storage_count; k++) {
    pytorch_storage *s = &f->storages[k];
    format_printable(s->key.bytes, s->key.length, printed);
    snprintf(name, sizeof name, "data/%.*s", (int)(s->key.length < 200 ? s->key.length : 200), s->key.bytes);
    const zip_entry *e = zip_find(zip, name);
    if (!e)
      return format_refuse(f->file, NULL, "storage %s is missing: the archive has no data/%s", printed, printed);
    int64_t wanted = s->count * pytorch_element_size(s);
    if (e->size < wanted || e->size - wanted >= pytorch_element_size(s))
      return format_refuse(f->file, NULL, "storage %s is said to have %lld bytes, and data/%s has %lld", printed,
                           (long long)wanted, printed, (long long)e->size);
    s->offset = e->offset;
    s->bytes = wanted;
    s->checksum = e->size == wanted ? e->checksum : 0;
    s->found = true;
  }
  return 0;
}

static int read_object(pytorch_file *f, zip_archive *zip) {
  const zip_entry *e = zip_find(zip, "data.pkl");
  if (e->size > MOST_PICKLE_BYTES)
    return format_refuse(f->file, NULL, "data.pkl has %lld bytes, and at most %d are read", (long long)e->size,
                         MOST_PICKLE_BYTES);
  unsigned char *bytes = malloc((size_t)e->size + 1);
  bool cut;
  pickle_source source = {f->file, "data.pkl", bytes, (size_t)e->size, 0};
  int failed;
  if (!bytes)
    failed =
        error_out_of_memory("%s: out of memory: no room for data.pkl of %lld bytes", f->file->path, (long long)e->size);
  else
    failed = read_entry(f->file, e, "data.pkl", bytes) || pickle_read(&f->object, &source, &cut) ||
             load(f, place_entries, zip);
  free_tensors(f);
  free(bytes);
  return failed;
}

static int read_archive(pytorch_file *f) {
  zip_archive zip;
  if (zip_open(&zip, f->file))
    return -1;
  int failed = check_archive(&zip) || read_object(f, &zip);
  zip_close(&zip);
  return failed;
}

/* ---- pickles one after another ---- */

/* The pickle at *at, whose bytes the caller frees. How long it is, is only known when it is read: it is tried on
 * windows that grow. */
static int next_pickle(const file_reader *file, int64_t *at, pickle *p, unsigned char **bytes) {
  *bytes = NULL;
  for (int64_t window = FIRST_WINDOW;; window *= 8) {
    int64_t size = file->size - *at < window ? file->size - *at : window;
    bool cut = false;
    free(*bytes);
    *bytes = malloc((size_t)size + 1);
    if (!*bytes)
      return error_out_of_memory("%s: out of memory: no room for %lld bytes of objects", file->path, (long long)size);
    if (file_read(file, *at, *bytes, (size_t)size))
      return -1;
    pickle_source source = {file, NULL, *bytes, (size_t)size, *at};
    if (!pickle_read(p, &source, &cut)) {
      *at += (int64_t)p->bytes;
      return 0;
    }
    if (!cut || size < window || window >= MOST_PICKLE_BYTES)
      return -1;
  }
}

/* Reads a pickle of which only what `check` says of it counts. */
static int check_pickle(const file_reader *file, int64_t *at, int (*check)(const file_reader *, const pickle_value *)) {
  pickle p = {0};
  unsigned char *bytes;
  int failed = next_pickle(file, at, &p, &bytes) || check(file, p.value);
  pickle_free(&p);
  free(bytes);
  return failed;
}

static int check_magic(const file_reader *file, const pickle_value *v) {
  if (v->kind == PICKLE_LONG && v->text.length == sizeof magic && !memcmp(v->text.bytes, magic, sizeof magic))
    return 0;
  return format_refuse(file, NULL,
                       "is a Python pickle, but none of torch.save's: it does not begin with the magic number");
}

static int check_version(const file_reader *file, const pickle_value *v) {
  enum { VERSION = 1001 };
  if (v->kind == PICKLE_INTEGER && v->integer == VERSION)
    return 0;
  return format_refuse(file, NULL, "its protocol version is not %d", VERSION);
}

static int check_system(const file_reader *file, const pickle_value *v) {
  const pickle_list *items = pytorch_dictionary(v);
  for (uint32_t k = 0; items && k + 1 < items->count; k += 2)
    if (pickle_is_text(items->values[k], "little_endian") && items->values[k + 1]->kind == PICKLE_BOOL &&
        !items->values[k + 1]->truth)
      return format_refuse(file, NULL, "its numbers are big-endian, which is not supported");
  return items ? 0 : format_refuse(file, NULL, "what its machine was like is no dictionary");
}

/* One storage at *at, whose count stands before its elements. */
static int place_one(pytorch_file *f, const pickle_value *key, int64_t *at) {
  unsigned char bytes[COUNT_BYTES];
  char printed[FORMAT_QUOTED_BYTES];
  pytorch_storage *s = key->kind == PICKLE_TEXT ? pytorch_find_storage(f, &key->text) : NULL;
  if (!s || s->found)
    return format_refuse(f->file, NULL, "its list of storages has one %s", s ? "twice" : "that no tensor has");
  format_printable(s->key.bytes, s->key.length, printed);
  if (f->file->size - *at < COUNT_BYTES)
    return format_refuse(f->file, NULL, "is truncated: storage %s is missing", printed);
  if (file_read(f->file, *at, bytes, sizeof bytes))
    return -1;
  uint64_t count = 0;
  for (int k = COUNT_BYTES; k-- > 0;)
    count = count << 8 | bytes[k];
  if (count != (uint64_t)s->count)
    return format_refuse(f->file, NULL, "storage %s is said to have %lld elements, and %lld stand before them", printed,
                         (long long)s->count, (long long)count);
  s->offset = *at + COUNT_BYTES;
  s->bytes = s->count * pytorch_element_size(s);
  if (s->bytes > f->file->size - s->offset)
    return format_refuse(f->file, NULL, "is truncated: storage %s has %lld bytes, and %lld follow", printed,
                         (long long)s->bytes, (long long)(f->file->size - s->offset));
  s->found = true;
  *at = s->offset + s->bytes;
  return 0;
}

static int place_in_order(pytorch_file *f, void *container) {
  int64_t *at = container;
  pickle p = {0};
  unsigned char *bytes;
  int failed = next_pickle(f->file, at, &p, &bytes);
  const pickle_list *keys = failed ? NULL : pytorch_sequence(p.value);
  if (!failed && !keys)
    failed = format_refuse(f->file, NULL, "has no list of storages");
  for (uint32_t k = 0; !failed && k < keys->count; k++)
    failed = place_one(f, keys->values[k], at);
  char printed[FORMAT_QUOTED_BYTES];
  for (size_t k = 0; !failed && k < f->storage_count; k++)
    if (!f->storages[k].found)
      failed = format_refuse(f->file, NULL, "storage %s is not in the file's list of storages",
                             format_printable(f->storages[k].key.bytes, f->storages[k].key.length, printed));
  pickle_free(&p);
  free(bytes);
  return failed;
}

static int read_pickles(pytorch_file *f) {
  int64_t at = 0;
  unsigned char *bytes = NULL;
  if (check_pickle(f->file, &at, check_magic) || check_pickle(f->file, &at, check_version) ||
      check_pickle(f->file, &at, check_system))
    return -1;
  int failed = next_pickle(f->file, &at, &f->object, &bytes) || load(f, place_in_order, &at);
  free_tensors(f);
  free(bytes);
  return failed;
}

/* ---- public ---- */

enum { START_BYTES = 4 };

static bool is_zip(const unsigned char start[START_BYTES]) {
  return !memcmp(start, "PK\3\4", START_BYTES);
}

static bool is_pickle(const unsigned char start[START_BYTES]) {
  return start[0] == 0x80 && start[1] >= 2 && start[1] <= 5;
}

/* Zeros if the file is too short, or a header of safetensors is as long as these bytes say. */
static void read_start(const file_reader *file, unsigned char start[START_BYTES]) {
  memset(start, 0, START_BYTES);
  if (!format_is_safetensors(file) && file->size >= START_BYTES)
    (void)!file_read(file, 0, start, START_BYTES);
}

bool pytorch_may_be(const file_reader *file) {
  unsigned char start[START_BYTES];
  read_start(file, start);
  return is_zip(start) || is_pickle(start);
}

static int refuse_other(const file_reader *file) {
  if (file->size == 0)
    return format_refuse(file, NULL, "is empty");
  const char *what = format_is_safetensors(file) ? "a safetensors file" : format_stranger(file);
  return what ? format_refuse(file, NULL, "is no checkpoint of PyTorch's but %s", what)
              : format_refuse(file, NULL,
                              "is no checkpoint of PyTorch's: it begins neither as a ZIP archive nor as a pickle");
}

orepa_archive *pytorch_read(const file_reader *file, const orepa_device *device) {
  unsigned char start[START_BYTES];
  pytorch_file f = {.file = file, .device = device};
  read_start(file, start);
  int failed = is_zip(start) ? read_archive(&f) : is_pickle(start) ? read_pickles(&f) : refuse_other(file);
  if (!failed)
    return f.archive;
  orepa_archive_free(f.archive);
  return NULL;
}
