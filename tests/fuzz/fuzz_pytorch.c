/* fuzz_pytorch.c: libFuzzer's entry to the reader of PyTorch's checkpoints. Whatever the bytes are, they give a
 * message, or an archive whose tensors take no more memory than the reader promises. An input that begins as a pickle
 * is also tried as what lies in a checkpoint: as data.pkl of a ZIP archive with two storages, and as the object of the
 * older container, which takes the fuzzer past checksums, sizes and magic numbers.
 *
 * Built by clang with -fsanitize=fuzzer,address,undefined; seeds/pytorch holds files of both containers, and pickles
 * that are right and wrong. */
#include "fuzz.h"
#include "io/pytorch.h"

static void check_archive(const orepa_archive *archive) {
  for (size_t k = 0; k < orepa_archive_count(archive); k++) {
    orepa_tensor *t = orepa_archive_tensor(archive, k);
    check_text(orepa_archive_name(archive, k));
    require(orepa_archive_find(archive, orepa_archive_name(archive, k)) == t && orepa_is_contiguous(t));
    free(elements_of(t)); /* every element can be read */
  }
  for (size_t k = 0; k < orepa_archive_metadata_count(archive); k++) {
    check_text(orepa_archive_metadata_key(archive, k));
    check_text(orepa_archive_metadata_value(archive, k));
  }
}

static void read_bytes(const uint8_t *bytes, size_t size) {
  enum { MOST_REPEATS = 8, SLACK = 1 << 20, SMALLEST_BLOCK = 64 };
  file_reader file = file_in_memory("input", bytes, size);
  orepa_reset_peak(cpu());
  size_t live = orepa_memory_live(), justified = MOST_REPEATS * size + SLACK;
  orepa_archive *archive = pytorch_read(&file, cpu());
  require(!archive || pytorch_may_be(&file));
  size_t tensors = archive ? orepa_archive_count(archive) : size / 8;
  require(orepa_memory(cpu()).peak - live <= justified + justified / 8 + SMALLEST_BLOCK * (tensors + 1));
  if (archive)
    check_archive(archive);
  else
    check_message("input");
  orepa_archive_free(archive);
  require(orepa_memory_live() == live);
}

/* ---- files around a pickle ---- */

typedef struct {
  uint8_t *bytes;
  size_t size;
} output;

static void put(output *o, const void *bytes, size_t size) {
  memcpy(o->bytes + o->size, bytes, size);
  o->size += size;
}

static void put_number(output *o, uint64_t value, int width) {
  for (; width > 0; width--, value >>= 8)
    put(o, &(uint8_t){(uint8_t)value}, 1);
}

/* Elements of storages "0" and "1": 0 and 1 as bytes. */
static const struct {
  const char *key, *entry;
  size_t bytes;
} storages[] = {{"0", "a/data/0", 24}, {"1", "a/data/1", 8}};

enum { STORAGES = 2, AROUND = 1024 };

static void put_elements(output *o, size_t count) {
  for (size_t k = 0; k < count; k++)
    put_number(o, k & 1, 1);
}

static void put_header(output *o, const char *name, size_t size, size_t at, bool central) {
  put(o, central ? "PK\1\2\0\0\0\0" : "PK\3\4\0\0", central ? 8 : 6);
  put_number(o, 0, 8);
  put_number(o, 0, 4); /* no checksum */
  put_number(o, size, 4);
  put_number(o, size, 4);
  put_number(o, strlen(name), 2);
  put_number(o, 0, 2);
  if (central) {
    put_number(o, 0, 8);
    put_number(o, 0, 2);
    put_number(o, at, 4);
  }
  put(o, name, strlen(name));
}

static void read_in_archive(const uint8_t *bytes, size_t size) {
  output o = {malloc(size + AROUND), 0};
  size_t at[STORAGES + 1] = {0};
  require(o.bytes != NULL);
  put_header(&o, "a/data.pkl", size, 0, false);
  put(&o, bytes, size);
  for (int k = 0; k < STORAGES; k++) {
    at[k + 1] = o.size;
    put_header(&o, storages[k].entry, storages[k].bytes, 0, false);
    put_elements(&o, storages[k].bytes);
  }
  size_t directory = o.size;
  put_header(&o, "a/data.pkl", size, 0, true);
  for (int k = 0; k < STORAGES; k++)
    put_header(&o, storages[k].entry, storages[k].bytes, at[k + 1], true);
  size_t end = o.size;
  put(&o, "PK\5\6\0\0\0\0\3\0\3\0", 12);
  put_number(&o, end - directory, 4);
  put_number(&o, directory, 4);
  put_number(&o, 0, 2);
  read_bytes(o.bytes, o.size);
  free(o.bytes);
}

#define LITERAL(text) text, sizeof(text) - 1

/* Six elements of four bytes, of storage "0" alone. */
static void read_in_old_file(const uint8_t *bytes, size_t size) {
  output o = {malloc(size + AROUND), 0};
  require(o.bytes != NULL);
  put(&o, LITERAL("\x80\2\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.\x80\2M\xe9\3.\x80\2}."));
  put(&o, bytes, size);
  put(&o, LITERAL("\x80\2]X\1\0\0\0"
                  "0a.\6\0\0\0\0\0\0\0"));
  put_elements(&o, storages[0].bytes);
  read_bytes(o.bytes, o.size);
  free(o.bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  read_bytes(bytes, size);
  if (size && bytes[0] == 0x80) {
    read_in_archive(bytes, size);
    read_in_old_file(bytes, size);
  }
  return 0;
}
