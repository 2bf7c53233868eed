/* zip.c: ZIP archives of stored entries, ordinary and with 64-bit sizes. The directory at the end of the file is
 * checked as a whole: against the file's real size, against the header before each entry, and for entries that lie on
 * one another.
 *
 * Numbers are little-endian. The directory's end is 22 bytes and a comment; before it there may be a locator (20 bytes)
 * of another end, whose sizes have 64 bits. An entry of the directory is 46 bytes, its name, extra fields and a
 * comment; the header before an entry's bytes is 30 bytes, the name again and other extra fields. */
#include "io/zip.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "io/format.h"

enum {
  END_BYTES = 22,
  LOCATOR_BYTES = 20,
  END64_BYTES = 56,
  ENTRY_BYTES = 46,
  HEADER_BYTES = 30,
  MOST_COMMENT_BYTES = 0xffff,
  ENCRYPTED = 1,
  SIZES_FOLLOW = 8, /* a flag: the header doesn't know the sizes yet */
};

static uint64_t number(const unsigned char *at, int bytes) {
  uint64_t value = 0;
  while (bytes-- > 0)
    value = value << 8 | at[bytes];
  return value;
}

/* ---- the directory's end ---- */

typedef struct {
  uint64_t count, bytes, offset;
  int64_t limit; /* the directory ends here at the latest */
} directory_end;

static int read_end64(const file_reader *file, int64_t at, directory_end *end) {
  unsigned char locator[LOCATOR_BYTES], wide[END64_BYTES];
  if (at < LOCATOR_BYTES)
    return 0;
  if (file_read(file, at - LOCATOR_BYTES, locator, sizeof locator))
    return -1;
  if (memcmp(locator, "PK\6\7", 4))
    return 0;
  uint64_t where = number(locator + 8, 8);
  if (where > (uint64_t)(at - LOCATOR_BYTES) || (uint64_t)(at - LOCATOR_BYTES) - where < END64_BYTES)
    return format_refuse(file, NULL, "its ZIP directory's 64-bit end is said to be at %llu, beyond the file",
                         (unsigned long long)where);
  if (file_read(file, (int64_t)where, wide, sizeof wide))
    return -1;
  if (memcmp(wide, "PK\6\6", 4))
    return format_refuse(file, NULL, "its ZIP directory's 64-bit end is not at %llu, where it is said to be",
                         (unsigned long long)where);
  end->count = number(wide + 32, 8);
  end->bytes = number(wide + 40, 8);
  end->offset = number(wide + 48, 8);
  end->limit = (int64_t)where;
  return 0;
}

/* The last place where the mark stands with a comment that ends with the file; -1: none. */
static int64_t find_end(const unsigned char *tail, int64_t bytes) {
  for (int64_t k = bytes - END_BYTES; k >= 0; k--)
    if (!memcmp(tail + k, "PK\5\6", 4) && (int64_t)number(tail + k + 20, 2) == bytes - END_BYTES - k)
      return k;
  return -1;
}

static int read_end(const file_reader *file, directory_end *end) {
  int64_t bytes = file->size < END_BYTES + MOST_COMMENT_BYTES ? file->size : END_BYTES + MOST_COMMENT_BYTES;
  unsigned char *tail = malloc((size_t)bytes + 1);
  if (!tail)
    return error_out_of_memory("%s: out of memory: no room for the end of a ZIP directory", file->path);
  int failed = file_read(file, file->size - bytes, tail, (size_t)bytes);
  int64_t k = failed ? -1 : find_end(tail, bytes);
  if (!failed && k < 0)
    failed = format_refuse(file, NULL, "is a truncated ZIP archive: its directory, which is at the end, is not there");
  if (!failed) {
    *end = (directory_end){number(tail + k + 10, 2), number(tail + k + 12, 4), number(tail + k + 16, 4),
                           file->size - bytes + k};
    failed = read_end64(file, end->limit, end);
  }
  free(tail);
  return failed;
}

static int check_end(const file_reader *file, const directory_end *end) {
  if (end->offset > (uint64_t)end->limit || end->bytes > (uint64_t)end->limit - end->offset)
    return format_refuse(file, NULL, "its ZIP directory of %llu bytes at %llu does not fit before its end, at %lld",
                         (unsigned long long)end->bytes, (unsigned long long)end->offset, (long long)end->limit);
  if (end->count > end->bytes / ENTRY_BYTES)
    return format_refuse(file, NULL, "its ZIP directory of %llu bytes has no room for %llu entries",
                         (unsigned long long)end->bytes, (unsigned long long)end->count);
  return 0;
}

/* ---- entries ---- */

/* Sizes that don't fit into 32 bits are in an extra field, in this order. */
static int read_wide(const unsigned char *extra, size_t bytes, uint64_t *values[3]) {
  while (bytes >= 4) {
    size_t id = number(extra, 2), length = number(extra + 2, 2);
    if (length > bytes - 4)
      return -1;
    if (id == 1) {
      size_t used = 0;
      for (int k = 0; k < 3; k++) {
        if (*values[k] != 0xffffffff)
          continue;
        if (length - used < 8)
          return -1;
        *values[k] = number(extra + 4 + used, 8);
        used += 8;
      }
      return 0;
    }
    extra += 4 + length;
    bytes -= 4 + length;
  }
  return 0;
}

static int refuse_entry(const file_reader *file, const zip_entry *e, const char *what) {
  char printed[FORMAT_QUOTED_BYTES];
  return format_refuse(file, NULL, "entry \"%s\" of the ZIP archive %s", format_printable(e->name, e->length, printed),
                       what);
}

/* The header before the entry's bytes says the same as the directory; behind it the bytes begin. */
static int check_header(zip_archive *zip, zip_entry *e, uint64_t header, unsigned flags) {
  unsigned char bytes[HEADER_BYTES], name[256];
  const file_reader *file = zip->file;
  if (header > (uint64_t)file->size || (uint64_t)file->size - header < HEADER_BYTES)
    return refuse_entry(file, e, "is said to begin beyond the file: it is truncated");
  if (file_read(file, (int64_t)header, bytes, sizeof bytes))
    return -1;
  size_t name_length = number(bytes + 26, 2), extra = number(bytes + 28, 2);
  e->offset = (int64_t)header + HEADER_BYTES + (int64_t)(name_length + extra);
  if (memcmp(bytes, "PK\3\4", 4) || name_length != e->length || number(bytes + 8, 2) != 0)
    return refuse_entry(file, e, "has another header than the directory says");
  if (e->offset > file->size || e->size > file->size - e->offset)
    return refuse_entry(file, e, "reaches beyond the file: it is truncated");
  if (file_read(file, (int64_t)header + HEADER_BYTES, name, name_length))
    return -1;
  uint64_t size = number(bytes + 22, 4);
  bool same_size = flags & SIZES_FOLLOW || size == 0xffffffff || size == (uint64_t)e->size;
  return memcmp(name, e->name, e->length) || !same_size
             ? refuse_entry(file, e, "has another header than the directory says")
             : 0;
}

static int check_entry(zip_archive *zip, zip_entry *e, const unsigned char *bytes, uint64_t packed) {
  const file_reader *file = zip->file;
  unsigned flags = (unsigned)number(bytes + 8, 2), method = (unsigned)number(bytes + 10, 2);
  if (e->length == 0 || e->length > 255)
    return format_refuse(file, NULL, "its ZIP directory has a name of %zu bytes", e->length);
  if (flags & ENCRYPTED)
    return refuse_entry(file, e, "is encrypted");
  if (method != 0)
    return refuse_entry(file, e, "is compressed, which torch.save never does: unpack the archive and store it again");
  return packed == (uint64_t)e->size ? 0 : refuse_entry(file, e, "has two sizes, and is not compressed");
}

/* One entry at `at` of `left` bytes: how many it takes, or -1. */
static int64_t read_entry(zip_archive *zip, zip_entry *e, const unsigned char *at, uint64_t left) {
  if (left < ENTRY_BYTES || memcmp(at, "PK\1\2", 4))
    return format_refuse(zip->file, NULL, "its ZIP directory is damaged after %zu entries", zip->count);
  size_t name = number(at + 28, 2), extra = number(at + 30, 2), comment = number(at + 32, 2);
  if (name + extra + comment > left - ENTRY_BYTES)
    return format_refuse(zip->file, NULL, "its ZIP directory is damaged after %zu entries", zip->count);
  uint64_t packed = number(at + 20, 4), size = number(at + 24, 4), header = number(at + 42, 4);
  *e = (zip_entry){(const char *)at + ENTRY_BYTES, name, 0, 0, (uint32_t)number(at + 16, 4)};
  if (read_wide(at + ENTRY_BYTES + name, extra, (uint64_t *[]){&size, &packed, &header}))
    return refuse_entry(zip->file, e, "has 64-bit sizes that are cut off");
  if (size > (uint64_t)zip->file->size)
    return refuse_entry(zip->file, e, "is said to be larger than the file: it is truncated");
  e->size = (int64_t)size;
  if (check_entry(zip, e, at, packed) || check_header(zip, e, header, (unsigned)number(at + 8, 2)))
    return -1;
  return ENTRY_BYTES + (int64_t)(name + extra + comment);
}

static int read_entries(zip_archive *zip, const directory_end *end) {
  const unsigned char *at = zip->directory;
  uint64_t left = end->bytes;
  while (zip->count < end->count) {
    int64_t bytes = read_entry(zip, &zip->entries[zip->count], at, left);
    if (bytes < 0)
      return -1;
    at += bytes;
    left -= (uint64_t)bytes;
    zip->count++;
  }
  return 0;
}

/* ---- names and places ---- */

static int by_place(const void *a, const void *b) {
  const zip_entry *x = a, *y = b;
  return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static int compare_names(const char *a, size_t a_length, const char *b, size_t b_length) {
  int order = memcmp(a, b, a_length < b_length ? a_length : b_length);
  return order ? order : a_length < b_length ? -1 : a_length > b_length;
}

static int by_name(const void *a, const void *b) {
  const zip_entry *x = a, *y = b;
  return compare_names(x->name, x->length, y->name, y->length);
}

static int check_places(const zip_archive *zip) {
  qsort(zip->entries, zip->count, sizeof *zip->entries, by_place);
  for (size_t k = 1; k < zip->count; k++)
    if (zip->entries[k - 1].offset + zip->entries[k - 1].size > zip->entries[k].offset)
      return refuse_entry(zip->file, &zip->entries[k], "lies on another one");
  return 0;
}

static int check_names(zip_archive *zip) {
  const char *slash = zip->count ? memchr(zip->entries[0].name, '/', zip->entries[0].length) : NULL;
  if (!slash)
    return format_refuse(zip->file, NULL, "is a ZIP archive, but none of torch.save's: it has no folder");
  zip->root = zip->entries[0].name;
  zip->root_length = (size_t)(slash - zip->root) + 1;
  for (size_t k = 0; k < zip->count; k++)
    if (zip->entries[k].length < zip->root_length || memcmp(zip->entries[k].name, zip->root, zip->root_length))
      return refuse_entry(zip->file, &zip->entries[k], "is in another folder than the first: torch.save makes one");
  if (check_places(zip))
    return -1;
  qsort(zip->entries, zip->count, sizeof *zip->entries, by_name);
  for (size_t k = 1; k < zip->count; k++)
    if (!by_name(&zip->entries[k - 1], &zip->entries[k]))
      return refuse_entry(zip->file, &zip->entries[k], "is there twice");
  return 0;
}

/* ---- public ---- */

int zip_open(zip_archive *zip, const file_reader *file) {
  directory_end end = {0};
  *zip = (zip_archive){.file = file};
  if (read_end(file, &end) || check_end(file, &end))
    return -1;
  zip->directory = malloc((size_t)end.bytes + 1);
  zip->entries = calloc((size_t)end.count + 1, sizeof *zip->entries);
  int failed;
  if (!zip->directory || !zip->entries)
    failed = error_out_of_memory("%s: out of memory: no room for a ZIP directory of %llu bytes", file->path,
                                 (unsigned long long)end.bytes);
  else
    failed = file_read(file, (int64_t)end.offset, zip->directory, (size_t)end.bytes) || read_entries(zip, &end) ||
             check_names(zip);
  if (failed)
    zip_close(zip);
  return failed ? -1 : 0;
}

void zip_close(zip_archive *zip) {
  free(zip->directory);
  free(zip->entries);
  *zip = (zip_archive){0};
}

/* The first entry whose name in the root folder is not before `name`. */
static size_t lower_bound(const zip_archive *zip, const char *name, size_t length) {
  size_t first = 0, last = zip->count;
  while (first < last) {
    size_t middle = first + (last - first) / 2;
    const zip_entry *e = &zip->entries[middle];
    if (compare_names(e->name + zip->root_length, e->length - zip->root_length, name, length) < 0)
      first = middle + 1;
    else
      last = middle;
  }
  return first;
}

const zip_entry *zip_find(const zip_archive *zip, const char *name) {
  size_t length = strlen(name), k = lower_bound(zip, name, length);
  const zip_entry *e = &zip->entries[k];
  return k < zip->count && e->length == zip->root_length + length && !memcmp(e->name + zip->root_length, name, length)
             ? e
             : NULL;
}

bool zip_has(const zip_archive *zip, const char *start) {
  size_t length = strlen(start), k = lower_bound(zip, start, length);
  const zip_entry *e = &zip->entries[k];
  return k < zip->count && e->length >= zip->root_length + length && !memcmp(e->name + zip->root_length, start, length);
}
