/* test_idx.c: idx files of every type and shape, plain and compressed, and every way to be broken. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>
#include <zlib.h>

#include "orepa_data.h"

static const orepa_device *cpu;

/* A call failed, and its message has `words` in it. */
static void assert_message(bool failed, const char *words) {
  assert_true(failed);
  if (!strstr(orepa_error(), words))
    fail_msg("the message is \"%s\", without \"%s\"", orepa_error(), words);
}

static void assert_elements(orepa_tensor *t, const void *elements, size_t bytes) {
  if (!t)
    fail_msg("%s", orepa_error());
  char *found = malloc(bytes + 1);
  assert_non_null(found);
  assert_int_equal(orepa_to_host(t, found, bytes), 0);
  assert_memory_equal(found, elements, bytes);
  free(found);
}

static uint32_t state = 1;
static uint32_t next_random(void) {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

/* ---- files ---- */

static char folder[256], path[300];

static const char *path_of(const char *name) {
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return path;
}

static const char *write_plain(const char *name, const void *bytes, size_t size) {
  FILE *file = fopen(path_of(name), "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(bytes, 1, size, file), size);
  assert_int_equal(fclose(file), 0);
  return path;
}

static const char *write_gzip(const char *name, const char *mode, const void *bytes, size_t size) {
  gzFile file = gzopen(path_of(name), mode);
  assert_non_null(file);
  assert_int_equal(gzwrite(file, bytes, (unsigned)size), (int)size);
  assert_int_equal(gzclose(file), Z_OK);
  return path;
}

static size_t read_file(const char *name, unsigned char *bytes, size_t room) {
  FILE *file = fopen(path_of(name), "rb");
  assert_non_null(file);
  size_t size = fread(bytes, 1, room, file);
  fclose(file);
  return size;
}

/* Writes a header to `bytes`; how long it is. */
static size_t header(unsigned char *bytes, int code, int rank, const int64_t *shape) {
  bytes[0] = bytes[1] = 0;
  bytes[2] = (unsigned char)code;
  bytes[3] = (unsigned char)rank;
  for (int d = 0; d < rank; d++)
    for (int k = 0; k < 4; k++)
      bytes[4 + 4 * d + k] = (unsigned char)(shape[d] >> (24 - 8 * k));
  return 4 + 4 * (size_t)rank;
}

/* A whole file of this shape, in memory of its own; its elements are random. */
static unsigned char *idx_file(int code, int rank, const int64_t *shape, size_t *size) {
  int64_t bytes = code == 0x08 ? 1 : code == 0x0E ? 8 : 4;
  for (int d = 0; d < rank; d++)
    bytes *= shape[d];
  unsigned char *file = malloc((size_t)bytes + 64);
  assert_non_null(file);
  size_t start = header(file, code, rank, shape);
  for (int64_t k = 0; k < bytes; k++)
    file[start + (size_t)k] = (unsigned char)next_random();
  *size = start + (size_t)bytes;
  return file;
}

/* Loads the file plain, compressed and from memory: three times the same elements. */
static void assert_loads(const unsigned char *file, size_t size, const void *elements, size_t bytes, int rank,
                         const int64_t *shape) {
  for (int way = 0; way < 4; way++) {
    orepa_tensor *t = way == 0   ? orepa_load_idx(write_plain("a.idx", file, size))
                      : way == 1 ? orepa_load_idx(write_gzip("a.idx.gz", "wb", file, size))
                      : way == 2 ? orepa_load_idx(write_gzip("odd-name", "wb0", file, size))
                                 : orepa_parse_idx("memory", file, size);
    assert_elements(t, elements, bytes);
    assert_int_equal(orepa_rank(t), rank);
    assert_memory_equal(orepa_shape(t), shape, (size_t)rank * sizeof *shape);
    assert_true(orepa_is_contiguous(t));
    orepa_release(t);
  }
}

static void test_types(void **unused) {
  (void)unused;
  const int64_t shape[2] = {1, 3};
  const unsigned char bytes[] = {0, 0, 0x08, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 127, 255};
  assert_loads(bytes, sizeof bytes, (const uint8_t[]){0, 127, 255}, 3, 2, shape);
  const unsigned char ints[] = {0, 0, 0x0C, 2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 1, 2, 3, 255, 255, 255, 255, 128, 0, 0, 0};
  assert_loads(ints, sizeof ints, (const int32_t[]){0x010203, -1, INT32_MIN}, 12, 2, shape);
  const unsigned char floats[] = {0,    0,    0x0D, 2, 0,    0,    0,    1,    0,    0,    0, 3,
                                  0x3f, 0x80, 0,    0, 0xc0, 0x49, 0x0f, 0xdb, 0x7f, 0x80, 0, 0};
  assert_loads(floats, sizeof floats, (const float[]){1, -3.14159274f, INFINITY}, 12, 2, shape);
  const unsigned char doubles[] = {0, 0, 0x0E, 2, 0,    0,    0,    1,    0,    0,    0, 3, 0x3f, 0xf0, 0, 0, 0, 0,
                                   0, 0, 0xc0, 9, 0x21, 0xfb, 0x54, 0x44, 0x2d, 0x18, 0, 0, 0,    0,    0, 0, 0, 1};
  assert_loads(doubles, sizeof doubles, (const double[]){1, -3.141592653589793, 5e-324}, 24, 2, shape);
}

static void test_shapes(void **unused) {
  (void)unused;
  static const int64_t shapes[][OREPA_MAX_RANK] = {
      {7}, {3, 5},     {2, 3, 4},    {2, 3, 4, 5}, {2, 1, 2, 3, 2}, {2, 3, 1, 2, 2, 3},
      {0}, {4, 0, 28}, {0, 3, 2, 2}, {300000},     {50, 3, 70, 60}};
  static const int ranks[] = {1, 2, 3, 4, 5, 6, 1, 3, 4, 1, 4};
  for (size_t k = 0; k < sizeof ranks / sizeof *ranks; k++) {
    size_t size, start = 4 + 4 * (size_t)ranks[k];
    unsigned char *file = idx_file(0x08, ranks[k], shapes[k], &size);
    assert_loads(file, size, file + start, size - start, ranks[k], shapes[k]);
    free(file);
  }
}

static void test_wide_types_in_many_pieces(void **unused) {
  (void)unused;
  const int64_t shape[4] = {60, 2, 100, 70};
  for (int code = 0x0C; code <= 0x0E; code++) {
    size_t size, start = 20, width = code == 0x0E ? 8 : 4;
    unsigned char *file = idx_file(code, 4, shape, &size), *swapped = malloc(size);
    assert_non_null(swapped);
    for (size_t k = 0; k < size - start; k++)
      swapped[k] = file[start + k / width * width + width - 1 - k % width];
    assert_loads(file, size, swapped, size - start, 4, shape);
    free(file);
    free(swapped);
  }
}

static void test_gzip_members(void **unused) {
  (void)unused;
  size_t size;
  unsigned char *file = idx_file(0x08, 1, (const int64_t[]){100000}, &size);
  static const size_t cuts[] = {1, 4, 6, 8, 50000, 100007};
  for (size_t k = 0; k < sizeof cuts / sizeof *cuts; k++) {
    write_gzip("two.gz", "wb", file, cuts[k]);
    orepa_tensor *t = orepa_load_idx(write_gzip("two.gz", "ab", file + cuts[k], size - cuts[k]));
    assert_elements(t, file + 8, size - 8);
    orepa_release(t);
  }
  orepa_tensor *t = orepa_load_idx(write_gzip("two.gz", "ab", "", 0)); /* an empty member */
  assert_elements(t, file + 8, size - 8);
  orepa_release(t);
  assert_message(!orepa_load_idx(write_gzip("two.gz", "ab", "!", 1)), "has 100,001 bytes of elements");
  free(file);
}

/* ---- files that are broken ---- */

static void assert_refused(const void *bytes, size_t size, const char *words) {
  assert_message(!orepa_load_idx(write_plain("bad", bytes, size)), words);
  assert_non_null(strstr(orepa_error(), folder));
  assert_message(!orepa_load_idx(write_gzip("bad.gz", "wb", bytes, size)), words);
  assert_message(!orepa_parse_idx("memory", bytes, size), words);
  assert_int_equal(strncmp(orepa_error(), "memory: ", 8), 0);
}

static void test_not_idx(void **unused) {
  (void)unused;
  assert_message(!orepa_load_idx(path_of("missing")), "missing: cannot be opened: No such file or directory");
  assert_message(!orepa_load_idx(folder), "reading failed: Is a directory");
  assert_refused("", 0, "not an idx file: it is empty");
  assert_refused("\0\0\x08", 3, "not an idx file: it ends after 3 bytes");
  assert_refused("<htm", 4, "not an idx file: it starts with 3c 68 74 6d (HTML?)");
  assert_refused("\211PNG", 4, "it starts with 89 50 4e 47 (PNG?)");
  assert_refused("version https", 13, "it starts with 76 65 72 73 (a Git LFS pointer?)");
  assert_refused("\3757zX", 4, "(xz?)");
  assert_refused("\0\1\0\0", 4, "it starts with 00 01 00 00");
  assert_refused("\0\0\x07\1", 4, "no type has the code 07");
  assert_refused("\0\0\x09\1", 4, "its elements are int8, for which there is no tensor type");
  assert_refused("\0\0\x0B\1", 4, "its elements are int16, for which there is no tensor type");
  assert_refused("\0\0\x08\0", 4, "its rank is 0; ranks of 1 to 6 are read");
  assert_refused("\0\0\x08\7", 4, "its rank is 7; ranks of 1 to 6 are read");
  assert_refused("\0\0\x08\2\0\0\0\1\0\0", 10, "ends after 10 of the 12 bytes of its header");
  write_gzip("inner.gz", "wb", "\0\0\x08\1", 4);
  unsigned char inner[64];
  size_t size = read_file("inner.gz", inner, sizeof inner);
  assert_message(!orepa_load_idx(write_gzip("outer.gz", "wb", inner, size)), "(gzip within gzip?)");
}

static void test_wrong_length(void **unused) {
  (void)unused;
  size_t size, start = 16;
  unsigned char *file = idx_file(0x0C, 3, (const int64_t[]){1000, 20, 20}, &size);
  assert_refused(file, start, "ends after 0 of 1,600,000 bytes of elements (int32 1000x20x20)");
  assert_refused(file, start + 1234, "ends after 1,234 of 1,600,000 bytes of elements (int32 1000x20x20)");
  assert_refused(file, start + 500000, "ends after 500,000 of 1,600,000 bytes");
  assert_refused(file, size - 1, "ends after 1,599,999 of 1,600,000 bytes");
  assert_refused(file, size + 1, "has 1,600,001 bytes of elements, but its header announces 1,600,000");
  header(file, 0x08, 3, (const int64_t[]){0, 20, 20});
  assert_refused(file, start + 7, "has 7 bytes of elements, but its header announces 0 (uint8 0x20x20)");
  free(file);
  size = (size_t)20 << 20;
  file = calloc(size, 1);
  assert_non_null(file);
  header(file, 0x08, 1, (const int64_t[]){100});
  assert_refused(file, size, "has more than 16,777,");
  free(file);
}

static void test_claims_cost_nothing(void **unused) {
  (void)unused;
  unsigned char file[64] = {0};
  header(file, 0x0E, 3, (const int64_t[]){1 << 30, 1 << 27, 1});
  orepa_reset_peak(cpu);
  size_t live = orepa_memory(cpu).live;
  assert_refused(file, 20, "ends after 4 of 1,152,921,504,606,846,976 bytes of elements");
  header(file, 0x08, 1, (const int64_t[]){4294967295});
  assert_refused(file, 28, "ends after 20 of 4,294,967,295 bytes of elements");
  assert_true(orepa_memory(cpu).peak <= live + (1 << 18));
  header(file, 0x0E, 3, (const int64_t[]){4294967295, 4294967295, 1});
  assert_refused(file, 20, "its header claims float64 4294967295x4294967295x1, more than can be addressed");
}

static void test_broken_gzip(void **unused) {
  (void)unused;
  size_t size;
  unsigned char *file = idx_file(0x08, 1, (const int64_t[]){200000}, &size), *packed = malloc(size + 100);
  assert_non_null(packed);
  write_gzip("whole.gz", "wb", file, size);
  size_t length = read_file("whole.gz", packed, size + 100);
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, length / 2)), "of 200,000 bytes of elements");
  assert_non_null(strstr(orepa_error(), "its gzip stream is cut off"));
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, 11)), "empty (its gzip stream is cut off)");
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, 2)), "empty (its gzip stream is cut off)");
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, length - 1)), "is cut off before its checksum");
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, length - 8)), "is cut off before its checksum");
  memcpy(packed + length, "tail", 4);
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, length + 4)), "other bytes follow its gzip stream");
  memcpy(packed + length, "\x1f!", 2);
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, length + 2)), "damaged: incorrect header check");
  packed[length - 1] ^= 1; /* the length */
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, length)), "damaged: incorrect length check");
  packed[length - 5] ^= 1; /* the checksum */
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, length)), "damaged: incorrect data check");
  packed[10] = 0xff; /* the first block's kind */
  assert_message(!orepa_load_idx(write_plain("bad.gz", packed, length)), "damaged: invalid block type after 0 bytes");
  free(file);
  free(packed);
}

static void test_without_memory(void **unused) {
  (void)unused;
  size_t size;
  unsigned char *file = idx_file(0x08, 1, (const int64_t[]){2000000}, &size);
  write_plain("large", file, size);
  for (size_t room = 1 << 14; room <= 1 << 20; room *= 8) { /* for no piece, for some, for all but the tensor */
    orepa_empty_cache(cpu);
    size_t live = orepa_memory(cpu).live;
    orepa_set_memory_limit(cpu, live + room);
    assert_message(!orepa_load_idx(path_of("large")), "large: out of memory");
    assert_true(orepa_error_is_out_of_memory());
    assert_int_equal(orepa_memory(cpu).live, live);
    orepa_set_memory_limit(cpu, 0);
  }
  free(file);
}

/* ---- the run ---- */

static size_t live_before;

static int begin(void **unused) {
  (void)unused;
  live_before = orepa_memory(cpu).live;
  return 0;
}

static int nothing_leaks(void **unused) {
  (void)unused;
  return orepa_memory(cpu).live == live_before ? 0 : -1;
}

static int make_folder(void **unused) {
  (void)unused;
  const char *parent = getenv("TMPDIR");
  cpu = orepa_device_by_name("cpu");
  snprintf(folder, sizeof folder, "%s/orepa-data-XXXXXX", parent ? parent : P_tmpdir);
  return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **unused) {
  (void)unused;
  static const char *const names[] = {"a.idx",  "a.idx.gz", "odd-name", "two.gz",   "bad",
                                      "bad.gz", "inner.gz", "outer.gz", "whole.gz", "large"};
  for (size_t k = 0; k < sizeof names / sizeof *names; k++)
    unlink(path_of(names[k]));
  return rmdir(folder);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, nothing_leaks)
  const struct CMUnitTest tests[] = {
      TEST(test_types),          TEST(test_shapes),       TEST(test_wide_types_in_many_pieces), TEST(test_gzip_members),
      TEST(test_not_idx),        TEST(test_wrong_length), TEST(test_claims_cost_nothing),       TEST(test_broken_gzip),
      TEST(test_without_memory),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
