/* io_test.h: a folder for the files of a test, empty before and after each, and what is asked of messages and tensors.
 */
#ifndef OREPA_TESTS_IO_TEST_H
#define OREPA_TESTS_IO_TEST_H

#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "orepa_io.h"

enum { HEADER_START = 8, MOST_BYTES = 1 << 16 };

/* IO_TEST(test) in a list that run_io_tests runs. */
#define IO_TEST(name) cmocka_unit_test_setup_teardown(name, io_begin, io_end)

static const orepa_device *cpu, *ref;
static char folder[256];
static size_t live_before;

/* In one of a few buffers. */
static inline const char *path_of(const char *name) {
  static char paths[8][600];
  static int next;
  char *path = paths[next = (next + 1) % 8];
  snprintf(path, sizeof paths[0], "%s/%s", folder, name);
  return path;
}

/* What the folder holds; removes it too if asked. */
static inline int count_files(bool remove) {
  int count = 0;
  DIR *opened = opendir(folder);
  assert_non_null(opened);
  for (struct dirent *entry; (entry = readdir(opened));) {
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
      continue;
    count++;
    if (remove && unlink(path_of(entry->d_name)))
      rmdir(path_of(entry->d_name));
  }
  closedir(opened);
  return count;
}

static inline int io_begin(void **unused) {
  (void)unused;
  live_before = orepa_memory_live();
  return 0;
}

/* No test leaves memory, nor a file half written. */
static inline int io_end(void **unused) {
  (void)unused;
  count_files(true);
  return count_files(false) == 0 && orepa_memory_live() == live_before ? 0 : -1;
}

static inline int make_folder(void **unused) {
  (void)unused;
  const char *parent = getenv("TMPDIR");
  cpu = orepa_device_by_name("cpu");
  ref = orepa_device_by_name("ref");
  snprintf(folder, sizeof folder, "%s/orepa-io-XXXXXX", parent ? parent : P_tmpdir);
  return cpu && ref && mkdtemp(folder) ? 0 : -1;
}

static inline int remove_folder(void **unused) {
  (void)unused;
  return rmdir(folder);
}

/* ---- files ---- */

static inline const char *write_bytes(const char *name, const void *bytes, size_t size) {
  const char *path = path_of(name);
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(bytes, 1, size, file), size);
  assert_int_equal(fclose(file), 0);
  return path;
}

/* Into memory of its own, with a NUL behind it. */
static inline char *read_bytes(const char *path, size_t *size) {
  char *bytes = calloc(1, MOST_BYTES + 1);
  FILE *file = fopen(path, "rb");
  assert_true(bytes && file);
  *size = fread(bytes, 1, MOST_BYTES, file);
  fclose(file);
  return bytes;
}

static inline void assert_file_holds(const char *path, const void *bytes, size_t size) {
  size_t found;
  char *held = read_bytes(path, &found);
  assert_int_equal(found, size);
  assert_memory_equal(held, bytes, size);
  free(held);
}

/* ---- messages ---- */

/* A call failed, and its message has `words` in it. */
static inline void assert_message(bool failed, const char *words) {
  if (!failed)
    fail_msg("nothing failed where \"%s\" was expected", words);
  if (!strstr(orepa_error(), words))
    fail_msg("the message is \"%s\", without \"%s\"", orepa_error(), words);
}

/* The same, and the message begins with the path. */
static inline void assert_refused(bool failed, const char *path, const char *words) {
  assert_message(failed, words);
  if (strncmp(orepa_error(), path, strlen(path)) || strncmp(orepa_error() + strlen(path), ": ", 2))
    fail_msg("the message \"%s\" does not begin with the path", orepa_error());
}

/* ---- tensors and archives ---- */

static inline uint32_t next_random(void) {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

static inline size_t bytes_of(const orepa_tensor *t) {
  return (size_t)orepa_count(t) * orepa_dtype_size(orepa_tensor_dtype(t));
}

static inline orepa_tensor *must(orepa_tensor *t) {
  if (!t)
    fail_msg("%s", orepa_error());
  return t;
}

/* Adds it under that name and keeps no other reference. */
static inline void put(orepa_archive *archive, const char *name, orepa_tensor *t) {
  must(t);
  if (orepa_archive_add(archive, name, t))
    fail_msg("%s", orepa_error());
  orepa_release(t);
}

/* A tensor of random bits, but for bools. */
static inline orepa_tensor *random_tensor(orepa_dtype dtype, const orepa_device *device, int rank,
                                          const int64_t *shape) {
  size_t bytes = orepa_dtype_size(dtype);
  for (int d = 0; d < rank; d++)
    bytes *= (size_t)shape[d];
  unsigned char *bits = malloc(bytes + 1);
  assert_non_null(bits);
  for (size_t k = 0; k < bytes; k++)
    bits[k] = (unsigned char)(dtype == OREPA_BOOL ? next_random() & 1 : next_random());
  orepa_tensor *t = must(orepa_from_host(dtype, device, rank, shape, bits));
  free(bits);
  return t;
}

static inline void assert_elements(orepa_tensor *t, const void *elements, size_t bytes) {
  must(t);
  assert_int_equal(bytes_of(t), bytes);
  char *found = malloc(bytes + 1);
  assert_non_null(found);
  assert_int_equal(orepa_to_host(t, found, bytes), 0);
  assert_memory_equal(found, elements, bytes);
  free(found);
}

/* Type, shape and bits. */
static inline void assert_same(orepa_tensor *a, orepa_tensor *b) {
  assert_true(a && b);
  assert_int_equal(orepa_tensor_dtype(a), orepa_tensor_dtype(b));
  assert_int_equal(orepa_rank(a), orepa_rank(b));
  assert_memory_equal(orepa_shape(a), orepa_shape(b), (size_t)orepa_rank(a) * sizeof(int64_t));
  char *bits = malloc(bytes_of(a) + 1);
  assert_non_null(bits);
  assert_int_equal(orepa_to_host(a, bits, bytes_of(a)), 0);
  assert_elements(b, bits, bytes_of(a));
  free(bits);
}

/* All of it, in order. */
static inline void assert_same_archives(const orepa_archive *a, const orepa_archive *b) {
  assert_int_equal(orepa_archive_count(a), orepa_archive_count(b));
  for (size_t k = 0; k < orepa_archive_count(a); k++) {
    assert_string_equal(orepa_archive_name(a, k), orepa_archive_name(b, k));
    assert_same(orepa_archive_tensor(a, k), orepa_archive_tensor(b, k));
  }
  assert_int_equal(orepa_archive_metadata_count(a), orepa_archive_metadata_count(b));
  for (size_t k = 0; k < orepa_archive_metadata_count(a); k++) {
    assert_string_equal(orepa_archive_metadata_key(a, k), orepa_archive_metadata_key(b, k));
    assert_string_equal(orepa_archive_metadata_value(a, k), orepa_archive_metadata_value(b, k));
  }
}

static inline orepa_archive *new_archive(void) {
  orepa_archive *archive = orepa_archive_new();
  assert_non_null(archive);
  return archive;
}

static inline orepa_archive *must_load(const char *path, const orepa_device *device) {
  orepa_archive *archive = orepa_load_safetensors(path, device);
  if (!archive)
    fail_msg("%s", orepa_error());
  return archive;
}

static inline void must_save(const char *path, const orepa_archive *archive) {
  if (orepa_save_safetensors(path, archive))
    fail_msg("%s", orepa_error());
}

#endif
