/* fuzz_safetensors.c: libFuzzer's entry to the reader and the writer of safetensors files. Whatever the bytes are, they
 * give a message, or an archive whose bytes are the file's and that comes back the same once it is saved. Memory stays
 * within what the bytes justify. Each input is also tried with the length of its header made right, which takes the
 * fuzzer past that check.
 *
 * Built by clang with -fsanitize=fuzzer,address,undefined; seeds/safetensors holds files of every type, and broken
 * ones. */
#include <stdio.h>
#include <unistd.h>

#include "fuzz.h"
#include "io/safetensors.h"

static size_t bytes_of(const orepa_tensor *t) {
  return (size_t)orepa_count(t) * orepa_dtype_size(orepa_tensor_dtype(t));
}

static void check_tensors_equal(orepa_tensor *a, orepa_tensor *b) {
  require(orepa_tensor_dtype(a) == orepa_tensor_dtype(b) && orepa_rank(a) == orepa_rank(b));
  require(!memcmp(orepa_shape(a), orepa_shape(b), (size_t)orepa_rank(a) * sizeof(int64_t)));
  unsigned char *x = elements_of(a), *y = elements_of(b);
  require(!memcmp(x, y, bytes_of(a)));
  free(x);
  free(y);
}

static void check_equal(const orepa_archive *a, const orepa_archive *b) {
  require(orepa_archive_count(a) == orepa_archive_count(b));
  for (size_t k = 0; k < orepa_archive_count(a); k++) {
    require(!strcmp(orepa_archive_name(a, k), orepa_archive_name(b, k)));
    check_tensors_equal(orepa_archive_tensor(a, k), orepa_archive_tensor(b, k));
  }
  require(orepa_archive_metadata_count(a) == orepa_archive_metadata_count(b));
  for (size_t k = 0; k < orepa_archive_metadata_count(a); k++) {
    require(!strcmp(orepa_archive_metadata_key(a, k), orepa_archive_metadata_key(b, k)));
    require(!strcmp(orepa_archive_metadata_value(a, k), orepa_archive_metadata_value(b, k)));
  }
}

static void check_round_trip(const orepa_archive *archive) {
  char path[512];
  const char *folder = getenv("TMPDIR");
  snprintf(path, sizeof path, "%s/fuzz-safetensors-%ld", folder ? folder : P_tmpdir, (long)getpid());
  require(!orepa_save_safetensors(path, archive));
  orepa_archive *again = orepa_load_safetensors(path, cpu());
  unlink(path);
  require(again != NULL);
  check_equal(archive, again);
  orepa_archive_free(again);
}

static void check_archive(const orepa_archive *archive, size_t size) {
  size_t bytes = 0;
  for (size_t k = 0; k < orepa_archive_count(archive); k++) {
    orepa_tensor *t = orepa_archive_tensor(archive, k);
    require(orepa_archive_find(archive, orepa_archive_name(archive, k)) == t);
    bytes += bytes_of(t);
  }
  require(bytes <= size);
  check_round_trip(archive);
}

static void read_bytes(const uint8_t *bytes, size_t size) {
  enum { SMALLEST_BLOCK = 64 };
  file_reader file = file_in_memory("input", bytes, size);
  orepa_reset_peak(cpu());
  size_t live = orepa_memory(cpu()).live;
  orepa_archive *archive = safetensors_read(&file, cpu());
  size_t tensors = archive ? orepa_archive_count(archive) : size / SMALLEST_BLOCK;
  require(orepa_memory(cpu()).peak - live <= size + size / 8 + SMALLEST_BLOCK * (tensors + 1));
  if (archive)
    check_archive(archive, size);
  else
    check_message("input");
  orepa_archive_free(archive);
  require(orepa_memory(cpu()).live == live);
}

/* Where the object ends that begins behind the first 8 bytes. */
static size_t header_end(const uint8_t *bytes, size_t size) {
  int depth = 0;
  bool quoted = false;
  for (size_t k = 8; k < size; k++) {
    if (quoted && bytes[k] == '\\')
      k++;
    else if (bytes[k] == '"')
      quoted = !quoted;
    else if (!quoted && bytes[k] == '{')
      depth++;
    else if (!quoted && bytes[k] == '}' && --depth == 0)
      return k + 1;
  }
  return 0;
}

static void read_mended(const uint8_t *bytes, size_t size) {
  size_t end = header_end(bytes, size);
  if (!end)
    return;
  uint8_t *mended = malloc(size);
  uint64_t length = end - 8;
  require(mended != NULL);
  memcpy(mended, &length, sizeof length);
  memcpy(mended + 8, bytes + 8, size - 8);
  if (memcmp(mended, bytes, 8))
    read_bytes(mended, size);
  free(mended);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  read_bytes(bytes, size);
  read_mended(bytes, size);
  return 0;
}
