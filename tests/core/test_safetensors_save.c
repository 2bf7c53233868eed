/* test_safetensors_save.c: what is saved comes back bit for bit, views included, and a save that fails leaves what was
 * there. */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "io_test.h"

/* ---- what comes back ---- */

static void assert_comes_back(const orepa_archive *archive) {
  const char *path = path_of("a.safetensors");
  must_save(path, archive);
  for (int device = 0; device < 2; device++) {
    orepa_archive *again = must_load(path, device ? ref : cpu);
    assert_same_archives(archive, again);
    orepa_archive_free(again);
  }
}

static void test_all_types_and_ranks_come_back_bit_for_bit(void **unused) {
  (void)unused;
  static const int64_t shapes[][OREPA_MAX_RANK] = {
      {0}, {7}, {3, 5}, {2, 3, 4}, {2, 3, 4, 5}, {2, 1, 2, 3, 2}, {2, 3, 1, 2, 2, 3}, {0}, {4, 0, 2, 3}};
  static const int ranks[] = {0, 1, 2, 3, 4, 5, 6, 1, 4};
  for (int device = 0; device < 2; device++) {
    orepa_archive *archive = new_archive();
    for (int type = 0; type < OREPA_DTYPES; type++)
      for (int k = 0; k < 9; k++) {
        char name[64];
        snprintf(name, sizeof name, "%s.%d", orepa_dtype_name((orepa_dtype)type), k);
        put(archive, name, random_tensor((orepa_dtype)type, device ? ref : cpu, ranks[k], shapes[k]));
      }
    assert_comes_back(archive);
    orepa_archive_free(archive);
  }
}

static orepa_tensor *counted(void) { /* 2x3x4x5: element (n, c, h, w) is its position in logical order */
  int32_t numbers[120];
  for (int k = 0; k < 120; k++)
    numbers[k] = k;
  return must(orepa_from_host(OREPA_INT32, cpu, 4, (int64_t[]){2, 3, 4, 5}, numbers));
}

/* The file of one tensor ends with these elements. */
static void assert_saved_as(orepa_tensor *t, const int32_t *expected, size_t count) {
  size_t size;
  orepa_archive *archive = new_archive();
  put(archive, "t", t);
  assert_comes_back(archive);
  char *bytes = read_bytes(path_of("a.safetensors"), &size);
  assert_true(size > 4 * count);
  assert_memory_equal(bytes + size - 4 * count, expected, 4 * count);
  free(bytes);
  orepa_archive_free(archive);
}

static void test_channels_last_memory_is_written_in_logical_order(void **unused) {
  (void)unused;
  int32_t expected[120];
  orepa_tensor *t = counted();
  assert_int_equal(orepa_strides(t)[1], 1); /* channels-last indeed */
  for (int k = 0; k < 120; k++)
    expected[k] = k;
  assert_saved_as(t, expected, 120);
}

static void test_views_are_written_in_their_logical_order(void **unused) {
  (void)unused;
  int32_t expected[240];
  size_t count = 0;
  orepa_tensor *t = counted(), *view;
  for (int w = 0; w < 5; w++) /* permuted */
    for (int n = 0; n < 2; n++)
      for (int h = 0; h < 4; h++)
        for (int c = 0; c < 3; c++)
          expected[count++] = 60 * n + 20 * c + 5 * h + w;
  assert_saved_as(orepa_permute(t, (int[]){3, 0, 2, 1}), expected, count);
  count = 0;
  for (int n = 0; n < 2; n++) /* sliced with a step, from within */
    for (int c = 1; c < 3; c++)
      for (int h = 0; h < 4; h++)
        for (int w = 1; w < 5; w += 2)
          expected[count++] = 60 * n + 20 * c + 5 * h + w;
  view = must(orepa_slice(t, 1, 1, 3, 1));
  assert_saved_as(orepa_slice(view, 3, 1, 5, 2), expected, count);
  orepa_release(view);
  view = must(orepa_select(t, 3, 2)); /* one column, expanded */
  count = 0;
  for (int repeat = 0; repeat < 2; repeat++)
    for (int k = 0; k < 24; k++)
      expected[count++] = 5 * k + 2;
  assert_saved_as(orepa_expand(view, 4, (int64_t[]){2, 2, 3, 4}), expected, count);
  orepa_release(view);
  assert_saved_as(orepa_slice(t, 0, 1, 1, 1), expected, 0); /* nothing */
  orepa_release(t);
}

static void test_names_and_metadata_of_any_text_come_back(void **unused) {
  (void)unused;
  static const char *const texts[] = {"",
                                      "stage1.0.conv1.weight_orepa_origin",
                                      "\"quoted\" \\back\\ /slash/ \\u0041 \\",
                                      "\1\2\b\t\n\v\f\r\x1f\x7f",
                                      "\xc3\xa9\xe4\xb8\xad\xe2\x80\xa8\xef\xbf\xbf\xf0\x9f\x98\x80\xf4\x8f\xbf\xbf",
                                      "{\"a\":[}]",
                                      "__metadata__ ",
                                      "%s%n%d"};
  orepa_archive *archive = new_archive();
  for (size_t k = 0; k < sizeof texts / sizeof *texts; k++) {
    put(archive, texts[k], random_tensor(OREPA_UINT8, cpu, 1, (int64_t[]){3}));
    assert_int_equal(orepa_archive_set_metadata(archive, texts[k], texts[7 - k]), 0);
  }
  assert_comes_back(archive);
  orepa_archive_free(archive);
}

static void test_archives_without_tensors_come_back(void **unused) {
  (void)unused;
  orepa_archive *archive = new_archive();
  assert_comes_back(archive);
  assert_file_holds(path_of("a.safetensors"), "\x08\0\0\0\0\0\0\0{}      ", 16);
  assert_int_equal(orepa_archive_set_metadata(archive, "only", "metadata"), 0);
  assert_comes_back(archive);
  orepa_archive_free(archive);
}

static void test_other_writers_files_come_back(void **unused) {
  (void)unused;
  static const char *const names[] = {"block_ConvBN_k3s1", "block_OREPA_k3s1g8", "block_OREPA_LargeConv_k5s2"};
  for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
    char path[100];
    snprintf(path, sizeof path, "tests/golden/%s.safetensors", names[k]);
    orepa_archive *archive = must_load(path, cpu);
    assert_true(orepa_archive_count(archive) > 3);
    assert_comes_back(archive);
    orepa_archive_free(archive);
  }
}

/* ---- the bytes ---- */

static void test_the_bytes_are_these(void **unused) {
  (void)unused;
  static const char expected[] =
      "\x88\0\0\0\0\0\0\0{\"__metadata__\":{\"k\":\"\xc3\xa9\"},\"b\":{\"dtype\":\"U8\",\"shape\":[1],"
      "\"data_offsets\":[8,9]},\"a\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]}}"
      "  \0\0\x80?\0\0\0\xc0\7";
  orepa_archive *archive = new_archive();
  put(archive, "b", orepa_full(OREPA_UINT8, cpu, 1, (int64_t[]){1}, 7));
  put(archive, "a", orepa_from_host(OREPA_FLOAT32, cpu, 2, (int64_t[]){1, 2}, (float[]){1, -2}));
  assert_int_equal(orepa_archive_set_metadata(archive, "k", "\xc3\xa9"), 0);
  for (int twice = 0; twice < 2; twice++) {
    must_save(path_of("a.safetensors"), archive);
    assert_file_holds(path_of("a.safetensors"), expected, sizeof expected - 1);
  }
  orepa_archive_free(archive);
}

static void test_every_tensor_is_aligned_to_its_type(void **unused) {
  (void)unused;
  orepa_archive *archive = new_archive();
  for (int k = 0; k < 40; k++) {
    char name[16];
    snprintf(name, sizeof name, "t%d", k);
    put(archive, name, random_tensor((orepa_dtype)(k * 3 % OREPA_DTYPES), cpu, 1, (int64_t[]){k % 7}));
  }
  must_save(path_of("a.safetensors"), archive);
  size_t size;
  char *bytes = read_bytes(path_of("a.safetensors"), &size);
  uint64_t length;
  memcpy(&length, bytes, sizeof length);
  assert_int_equal(length % 8, 0);
  json_t *header = json_loadb(bytes + HEADER_START, length, 0, NULL), *entry;
  assert_int_equal(json_object_size(header), 40);
  const char *name;
  size_t position = 0;
  json_object_foreach(header, name, entry) {
    assert_string_equal(name, orepa_archive_name(archive, position));
    size_t width = orepa_dtype_size(orepa_tensor_dtype(orepa_archive_tensor(archive, position++)));
    json_int_t begin = json_integer_value(json_array_get(json_object_get(entry, "data_offsets"), 0));
    assert_int_equal((HEADER_START + length + (uint64_t)begin) % width, 0);
  }
  json_decref(header);
  free(bytes);
  orepa_archive_free(archive);
}

/* ---- files that are replaced ---- */

static orepa_archive *archive_of(int64_t bytes) {
  orepa_archive *archive = new_archive();
  put(archive, "t", orepa_full(OREPA_UINT8, cpu, 1, &bytes, 3));
  return archive;
}

static void save_bytes(const char *path, int64_t bytes) {
  orepa_archive *archive = archive_of(bytes);
  must_save(path, archive);
  orepa_archive_free(archive);
}

static void assert_loads_bytes(const char *path, int64_t bytes) {
  orepa_archive *archive = must_load(path, cpu);
  assert_int_equal(orepa_count(orepa_archive_tensor(archive, 0)), bytes);
  orepa_archive_free(archive);
}

/* Saving there fails for this reason, and the folder holds as many files as before. */
static void assert_not_saved(const char *path, const char *words) {
  orepa_archive *archive = archive_of(5000);
  int files = count_files(false);
  assert_refused(orepa_save_safetensors(path, archive), path, words);
  assert_int_equal(count_files(false), files);
  orepa_archive_free(archive);
}

static void test_a_failing_save_leaves_nothing(void **unused) {
  (void)unused;
  assert_not_saved(path_of("missing/a.safetensors"), "no file can be made in '");
  assert_message(true, "missing/': No such file or directory");
  assert_not_saved(folder, "is a folder: no file can be written there");
  assert_not_saved("/dev/null", "is a device or a pipe: no file can be written there");
  assert_not_saved(path_of("new/"), "No such file or directory");
  const char *file = write_bytes("file", "old", 3);
  assert_not_saved(path_of("file/a.safetensors"), "Not a directory");
  assert_not_saved(path_of("file/"), "Not a directory");
  assert_file_holds(file, "old", 3);
  char name[300];
  memset(name, 'x', sizeof name);
  name[256] = '\0'; /* one more than a folder takes */
  assert_not_saved(path_of(name), "cannot be replaced: File name too long");
}

/* The disk is full, as far as this process can tell, after so many bytes. */
static void test_a_full_disk_leaves_the_old_file(void **unused) {
  (void)unused;
  static const rlim_t limits[] = {0, 1, 8, 50, 100, 4096, 5000};
  const char *path = write_bytes("a.safetensors", "old", 3);
  struct rlimit old, limit;
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
  void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
  for (size_t k = 0; k < sizeof limits / sizeof *limits; k++) {
    limit = (struct rlimit){limits[k], old.rlim_max};
    orepa_archive *archive = archive_of(5000);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    int failed = orepa_save_safetensors(path, archive);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_refused(failed, path, "cannot be written: File too large");
    assert_file_holds(path, "old", 3);
    assert_int_equal(count_files(false), 1);
    orepa_archive_free(archive);
  }
  signal(SIGXFSZ, handler);
  save_bytes(path, 5000);
  assert_loads_bytes(path, 5000);
}

/* What a child process that is not root finds when it saves; from within the folder, whose own folder may be private.
 */
static void assert_not_saved_by_others(const char *name, const char *words) {
  orepa_archive *archive = archive_of(10);
  pid_t child = fork();
  assert_true(child >= 0);
  if (!child) {
    if (chdir(folder) || (geteuid() == 0 && (setgid(65534) || setuid(65534))))
      _exit(2);
    _exit(orepa_save_safetensors(name, archive) && strstr(orepa_error(), words) ? 0 : 1);
  }
  int status = -1;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_true(WIFEXITED(status));
  assert_int_equal(WEXITSTATUS(status), 0);
  orepa_archive_free(archive);
}

static void test_what_may_not_be_written_is_kept(void **unused) {
  (void)unused;
  const char *path = write_bytes("a.safetensors", "old", 3);
  assert_int_equal(chmod(folder, 0777), 0);
  assert_int_equal(chmod(path, 0444), 0); /* renaming would be allowed */
  assert_not_saved_by_others("a.safetensors", "cannot be written: Permission denied");
  assert_int_equal(chmod(path, 0666), 0);
  assert_int_equal(chmod(folder, 0555), 0);
  assert_not_saved_by_others("a.safetensors", "no file can be made in '.': Permission denied");
  assert_not_saved_by_others("new.safetensors", "no file can be made in '.': Permission denied");
  assert_int_equal(chmod(folder, 0700), 0);
  assert_int_equal(count_files(false), 1);
  assert_file_holds(path, "old", 3);
}

static void test_a_file_is_replaced_not_written_over(void **unused) {
  (void)unused;
  const char *path = write_bytes("a.safetensors", "old", 3), *other = path_of("other");
  assert_int_equal(link(path, other), 0);
  save_bytes(path, 100);
  assert_loads_bytes(path, 100);
  assert_file_holds(other, "old", 3);
  assert_int_equal(count_files(false), 2);
}

static void test_modes_are_kept_and_new_ones_follow_the_umask(void **unused) {
  (void)unused;
  struct stat status;
  const char *path = path_of("a.safetensors");
  mode_t old = umask(027);
  save_bytes(path, 10);
  umask(old);
  assert_int_equal(stat(path, &status), 0);
  assert_int_equal(status.st_mode & 07777, 0640);
  assert_int_equal(chmod(path, 0606), 0);
  save_bytes(path, 20);
  assert_int_equal(stat(path, &status), 0);
  assert_int_equal(status.st_mode & 07777, 0606);
}

static void test_names_may_be_as_long_as_a_folder_takes(void **unused) {
  (void)unused;
  char name[256];
  memset(name, 'x', sizeof name - 1);
  name[255] = '\0';
  save_bytes(path_of(name), 10);
  assert_loads_bytes(path_of(name), 10);
  assert_int_equal(count_files(false), 1);
}

static void test_a_path_without_a_folder_is_in_the_current_one(void **unused) {
  (void)unused;
  char here[4096];
  assert_non_null(getcwd(here, sizeof here));
  assert_int_equal(chdir(folder), 0);
  orepa_archive *archive = archive_of(10);
  int failed = orepa_save_safetensors("plain.safetensors", archive);
  assert_int_equal(chdir(here), 0);
  orepa_archive_free(archive);
  assert_int_equal(failed, 0);
  assert_loads_bytes(path_of("plain.safetensors"), 10);
}

/* Whoever may write to the folder can guess temporary names, and put links there. */
static void test_names_that_are_taken_are_left_alone(void **unused) {
  (void)unused;
  enum { GUESSES = 1000 };
  const char *victim = write_bytes("victim", "old", 3);
  for (int k = 0; k < GUESSES; k++) {
    char name[100];
    snprintf(name, sizeof name, ".a.safetensors.%ld-%d.tmp", (long)getpid(), k);
    assert_int_equal(symlink("victim", path_of(name)), 0);
  }
  save_bytes(path_of("a.safetensors"), 10);
  assert_loads_bytes(path_of("a.safetensors"), 10);
  assert_file_holds(victim, "old", 3);
  assert_int_equal(count_files(false), GUESSES + 2);
}

/* ---- symbolic links ---- */

static void assert_link(const char *path) {
  struct stat status;
  assert_int_equal(lstat(path, &status), 0);
  assert_true(S_ISLNK(status.st_mode));
}

static void test_links_stay_and_their_targets_are_replaced(void **unused) {
  (void)unused;
  const char *target = write_bytes("target", "old", 3), *to_it = path_of("link"), *to_link = path_of("second");
  assert_int_equal(symlink("target", to_it), 0); /* relative to the folder, not to where we are */
  assert_int_equal(symlink(to_it, to_link), 0);
  save_bytes(to_link, 30);
  assert_link(to_it);
  assert_link(to_link);
  assert_loads_bytes(target, 30);
  assert_loads_bytes(to_link, 30);
  assert_int_equal(count_files(false), 3);
}

static void test_links_to_nothing_yet_are_followed(void **unused) {
  (void)unused;
  const char *inside = path_of("inside"), *to_it = path_of("link"), *to_nowhere = path_of("nowhere");
  assert_int_equal(mkdir(inside, 0700), 0);
  assert_int_equal(symlink("inside/new.safetensors", to_it), 0);
  save_bytes(to_it, 30);
  assert_link(to_it);
  assert_loads_bytes(path_of("inside/new.safetensors"), 30);
  assert_int_equal(unlink(path_of("inside/new.safetensors")), 0);
  assert_int_equal(symlink("missing/new.safetensors", to_nowhere), 0);
  assert_not_saved(to_nowhere, "missing/': No such file or directory");
  assert_link(to_nowhere);
}

static void test_links_in_a_circle_are_refused(void **unused) {
  (void)unused;
  assert_int_equal(symlink("b", path_of("a")), 0);
  assert_int_equal(symlink("a", path_of("b")), 0);
  assert_not_saved(path_of("a"), "cannot be written: Too many levels of symbolic links");
  assert_link(path_of("a"));
}

/* ---- many at once ---- */

static const char *shared_path;
static atomic_int unfinished, bad;

static void *save_often(void *archive) {
  for (int k = 0; k < 25; k++)
    bad += orepa_save_safetensors(shared_path, archive) != 0;
  unfinished--;
  return NULL;
}

static void test_readers_find_one_whole_file_whoever_writes(void **unused) {
  (void)unused;
  enum { WRITERS = 3 };
  pthread_t threads[WRITERS];
  orepa_archive *archives[WRITERS];
  shared_path = path_of("a.safetensors");
  save_bytes(shared_path, 1000);
  unfinished = WRITERS;
  bad = 0;
  for (int k = 0; k < WRITERS; k++) {
    archives[k] = archive_of(1000 * (k + 1));
    assert_int_equal(pthread_create(&threads[k], NULL, save_often, archives[k]), 0);
  }
  do {
    orepa_archive *archive = orepa_load_safetensors(shared_path, cpu);
    bad += !archive || orepa_count(orepa_archive_tensor(archive, 0)) % 1000;
    orepa_archive_free(archive);
  } while (unfinished);
  for (int k = 0; k < WRITERS; k++) {
    pthread_join(threads[k], NULL);
    orepa_archive_free(archives[k]);
  }
  assert_int_equal(bad, 0);
  assert_int_equal(count_files(false), 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      IO_TEST(test_all_types_and_ranks_come_back_bit_for_bit),
      IO_TEST(test_channels_last_memory_is_written_in_logical_order),
      IO_TEST(test_views_are_written_in_their_logical_order),
      IO_TEST(test_names_and_metadata_of_any_text_come_back),
      IO_TEST(test_archives_without_tensors_come_back),
      IO_TEST(test_other_writers_files_come_back),
      IO_TEST(test_the_bytes_are_these),
      IO_TEST(test_every_tensor_is_aligned_to_its_type),
      IO_TEST(test_a_failing_save_leaves_nothing),
      IO_TEST(test_a_full_disk_leaves_the_old_file),
      IO_TEST(test_what_may_not_be_written_is_kept),
      IO_TEST(test_a_file_is_replaced_not_written_over),
      IO_TEST(test_modes_are_kept_and_new_ones_follow_the_umask),
      IO_TEST(test_names_may_be_as_long_as_a_folder_takes),
      IO_TEST(test_a_path_without_a_folder_is_in_the_current_one),
      IO_TEST(test_names_that_are_taken_are_left_alone),
      IO_TEST(test_links_stay_and_their_targets_are_replaced),
      IO_TEST(test_links_to_nothing_yet_are_followed),
      IO_TEST(test_links_in_a_circle_are_refused),
      IO_TEST(test_readers_find_one_whole_file_whoever_writes),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
