/* pytorch_test.h: checkpoints made of bytes: ZIP archives of any entries, and pickles with a few tensors in them. */
#ifndef OREPA_TESTS_PYTORCH_TEST_H
#define OREPA_TESTS_PYTORCH_TEST_H

#include <zlib.h>

#include "io/pytorch.h"
#include "io_test.h"

/* A literal and its length, NULs included. */
#define BYTES(literal) literal, sizeof(literal) - 1

/* ---- pieces of pickles. A number behind K is one byte. */
#define PROTO "\x80\2"
#define STORAGE(type, key, count) "(X\7\0\0\0storagectorch\n" type "\nX\1\0\0\0" key "X\3\0\0\0cpu" count "tQ"
#define REBUILD "ctorch._utils\n_rebuild_tensor_v2\n"
#define TENSOR_OF(storage, offset, shape, strides) REBUILD "(" storage offset shape strides "\x89NtR"
/* Of storage 0, six floats. */
#define SIX STORAGE("FloatStorage", "0", "K\6")
#define TENSOR(offset, shape, strides) TENSOR_OF(SIX, offset, shape, strides)
#define WHOLE TENSOR("K\0", "K\6\x85", "K\1\x85")
/* {"w": value}. */
#define NAMED(value) PROTO "}X\1\0\0\0w" value "s."

enum { SIX_BYTES = 24 };

/* ---- ZIP archives */

typedef struct {
  const char *name;
  const void *bytes;
  size_t size;
  unsigned method, flags;
  bool no_checksum, wide; /* wide: sizes in 64 bits */
} entry;

typedef struct {
  unsigned char bytes[1 << 17];
  size_t size;
} buffer;

static inline void put_bytes(buffer *b, const void *bytes, size_t size) {
  assert_true(size <= sizeof b->bytes - b->size);
  if (size)
    memcpy(b->bytes + b->size, bytes, size);
  b->size += size;
}

static inline void put_number(buffer *b, uint64_t value, int width) {
  for (int k = 0; k < width; k++, value >>= 8)
    put_bytes(b, &(unsigned char){(unsigned char)value}, 1);
}

/* The header before an entry's bytes, or (central) the directory's, which says where that is. */
static inline void put_header(buffer *b, const entry *e, bool central, size_t at) {
  uint32_t size = e->wide ? 0xffffffff : (uint32_t)e->size;
  put_bytes(b, central ? "PK\1\2\0\0\0\0" : "PK\3\4\0\0", central ? 8 : 6);
  put_number(b, e->flags, 2);
  put_number(b, e->method, 2);
  put_number(b, 0, 4);
  put_number(b, e->no_checksum ? 0 : crc32_z(0, e->bytes, e->size), 4);
  put_number(b, size, 4);
  put_number(b, size, 4);
  put_number(b, strlen(e->name), 2);
  put_number(b, e->wide ? 34 : 0, 2);
  if (central) {
    put_number(b, 0, 10);
    put_number(b, e->wide ? 0xffffffff : at, 4);
  }
  put_bytes(b, e->name, strlen(e->name));
  if (!e->wide)
    return;
  put_bytes(b, "FB\2\0ZZ\1\0\x18\0", 10); /* a field that says nothing before the sizes */
  put_number(b, e->size, 8);
  put_number(b, e->size, 8);
  put_number(b, at, 8);
}

static inline void put_zip(buffer *b, const entry *entries, size_t count) {
  size_t at[32];
  assert_true(count <= 32);
  b->size = 0;
  for (size_t k = 0; k < count; k++) {
    at[k] = b->size;
    put_header(b, &entries[k], false, at[k]);
    put_bytes(b, entries[k].bytes, entries[k].size);
  }
  size_t directory = b->size;
  for (size_t k = 0; k < count; k++)
    put_header(b, &entries[k], true, at[k]);
  size_t end = b->size;
  put_bytes(b, "PK\5\6\0\0\0\0", 8);
  put_number(b, count, 2);
  put_number(b, count, 2);
  put_number(b, end - directory, 4);
  put_number(b, directory, 4);
  put_number(b, 0, 2);
}

static const unsigned char six_floats[SIX_BYTES] = {0, 0, 128, 63, 0, 0, 0,   64, 0, 0, 64,  64,
                                                    0, 0, 128, 64, 0, 0, 160, 64, 0, 0, 192, 64};

/* A checkpoint with this data.pkl and storage 0. */
static inline void put_checkpoint(buffer *b, const void *object, size_t size) {
  put_zip(b,
          (entry[]){{.name = "a/data.pkl", .bytes = object, .size = size},
                    {.name = "a/byteorder", .bytes = "little", .size = 6},
                    {.name = "a/data/0", .bytes = six_floats, .size = SIX_BYTES}},
          3);
}

/* ---- the container before 1.6 */

#define MAGIC PROTO "\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19."
#define VERSION PROTO "M\xe9\3."
#define SYSTEM(little) PROTO "}X\r\0\0\0little_endian" little "s."
#define KEYS                                                                                                           \
  PROTO "]X\1\0\0\0"                                                                                                   \
        "0a."
#define OLD_SIX                                                                                                        \
  "(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"                                                                   \
  "0X\3\0\0\0cpuK\6NtQ"
#define OLD_NAMED NAMED(TENSOR_OF(OLD_SIX, "K\0", "K\6\x85", "K\1\x85"))
#define OLD(object) MAGIC VERSION SYSTEM("\x88") object KEYS "\6\0\0\0\0\0\0\0"

/* Such a file's pickles, then storage 0. */
static inline void put_old(buffer *b, const void *pickles, size_t size) {
  b->size = 0;
  put_bytes(b, pickles, size);
  put_bytes(b, six_floats, SIX_BYTES);
}

/* ---- reading what was built */

static buffer built;

static inline void refuses_built(const char *words) {
  file_reader file = file_in_memory("memory", built.bytes, built.size);
  assert_refused(!pytorch_read(&file, cpu), "memory", words);
  assert_false(orepa_error_is_out_of_memory());
}

static inline orepa_archive *reads_built(void) {
  file_reader file = file_in_memory("memory", built.bytes, built.size);
  orepa_archive *archive = pytorch_read(&file, cpu);
  if (!archive)
    fail_msg("%s", orepa_error());
  return archive;
}

static inline void refuses(const void *object, size_t size, const char *words) {
  put_checkpoint(&built, object, size);
  refuses_built(words);
}

static inline orepa_archive *reads(const void *object, size_t size) {
  put_checkpoint(&built, object, size);
  return reads_built();
}

static inline void refuses_old(const void *pickles, size_t size, const char *words) {
  put_old(&built, pickles, size);
  refuses_built(words);
}

/* One tensor w, of these floats. */
static inline void reads_floats(const void *object, size_t size, int rank, const float *wanted, size_t count) {
  orepa_archive *archive = reads(object, size);
  assert_int_equal(orepa_archive_count(archive), 1);
  orepa_tensor *w = orepa_archive_find(archive, "w");
  assert_elements(w, wanted, count * sizeof *wanted);
  assert_int_equal(orepa_rank(w), rank);
  assert_true(orepa_is_contiguous(w));
  orepa_archive_free(archive);
}

static inline void reads_metadata(const void *object, size_t size, const char *wanted) {
  orepa_archive *archive = reads(object, size);
  const char *found = orepa_archive_find_metadata(archive, "w");
  assert_non_null(found);
  assert_string_equal(found, wanted);
  orepa_archive_free(archive);
}

static inline void keeps_out(const void *object, size_t size, const char *wanted) {
  orepa_archive *archive = reads(object, size);
  const char *found = orepa_archive_find_metadata(archive, "__kept_out__");
  assert_non_null(found);
  assert_string_equal(found, wanted);
  assert_int_equal(orepa_archive_count(archive), 0);
  orepa_archive_free(archive);
}

#endif
