/* test_pytorch_file.c: checkpoints of PyTorch's as files: those that it wrote, both containers, and what is no such
 * file. What is in them is in test_pytorch_objects.c. */
#include "pytorch_test.h"

/* ---- files that PyTorch wrote: their values are compared with Python's in tests/spec/pytorch_spec.lua */

static const char *const golden[] = {"types", "views",     "checkpoint", "state_dict", "module",
                                     "list",  "protocol4", "tensor",     "unchecked"};

static void test_both_containers_hold_the_same(void **unused) {
  (void)unused;
  char path[2][200];
  for (size_t k = 0; k < sizeof golden / sizeof *golden; k++) {
    orepa_archive *archives[2];
    for (int old = 0; old < 2; old++) {
      snprintf(path[old], sizeof path[old], "tests/golden/pytorch/%s%s.pth", golden[k], old ? ".old" : "");
      archives[old] = orepa_load_pytorch(path[old], old ? ref : cpu);
      if (!archives[old])
        fail_msg("%s", orepa_error());
    }
    assert_same_archives(archives[0], archives[1]);
    for (size_t n = 0; n < orepa_archive_count(archives[1]); n++) {
      assert_ptr_equal(orepa_tensor_device(orepa_archive_tensor(archives[1], n)), ref);
      assert_true(orepa_is_contiguous(orepa_archive_tensor(archives[1], n)));
    }
    orepa_archive_free(archives[0]);
    orepa_archive_free(archives[1]);
  }
}

static void test_every_prefix_of_a_file_is_refused(void **unused) {
  (void)unused;
  static const char *const paths[] = {"tests/golden/pytorch/views.pth", "tests/golden/pytorch/views.old.pth"};
  for (int old = 0; old < 2; old++) {
    size_t size;
    char *bytes = read_bytes(paths[old], &size);
    for (size_t length = 0; length < size; length++) {
      file_reader file = file_in_memory("memory", bytes, length);
      assert_refused(!pytorch_read(&file, cpu), "memory", length > 20 ? "truncated" : "");
    }
    free(bytes);
  }
}

/* Whatever one byte is changed to, there is an archive or a message. */
static void test_every_byte_may_be_wrong(void **unused) {
  (void)unused;
  static const char *const paths[] = {"tests/golden/pytorch/list.pth", "tests/golden/pytorch/list.old.pth"};
  for (int old = 0; old < 2; old++) {
    size_t size;
    char *bytes = read_bytes(paths[old], &size);
    for (size_t k = 0; k < size; k++)
      for (int change = 0; change < 4; change++) {
        char kept = bytes[k];
        bytes[k] = (char[]){0, (char)0xff, (char)(kept ^ 1), (char)(kept + 128)}[change];
        file_reader file = file_in_memory("memory", bytes, size);
        orepa_archive *archive = pytorch_read(&file, cpu);
        assert_true(archive || !strncmp(orepa_error(), "memory: ", 8));
        orepa_archive_free(archive);
        bytes[k] = kept;
      }
    free(bytes);
  }
}

static void test_one_object_under_two_names_is_one_tensor(void **unused) {
  (void)unused;
  orepa_archive *archive = orepa_load_pytorch("tests/golden/pytorch/views.pth", cpu);
  assert_non_null(archive);
  assert_ptr_equal(orepa_archive_find(archive, "base"), orepa_archive_find(archive, "again"));
  assert_false(orepa_shares_storage(orepa_archive_find(archive, "base"), orepa_archive_find(archive, "transposed")));
  orepa_archive_free(archive);
}

/* ---- which file it is ---- */

static void test_what_is_no_checkpoint_is_called_what_it_is(void **unused) {
  (void)unused;
  static const struct {
    const char *bytes;
    size_t size;
    const char *words;
  } cases[] = {
      {BYTES(""), "is empty"},
      {BYTES("<!DOCTYPE html>"), "is no checkpoint of PyTorch's but an HTML or XML page"},
      {BYTES("version https://git-lfs.github.com/spec/v1\n"), "but a Git LFS pointer"},
      {BYTES("\x1f\x8b\x08\0\0\0"), "but compressed with gzip"},
      {BYTES("\2\0\0\0\0\0\0\0[]"), "begins neither as a ZIP archive nor as a pickle"},
      {BYTES("\x80\2\0\0\0\0\0\0{"), "but a safetensors file"},
      {BYTES("PK\3\4"), "is a truncated ZIP archive"},
      {BYTES("\x80\2N."), "is a Python pickle, but none of torch.save's"},
      {BYTES("\x80\2"), "is no checkpoint of PyTorch's but a Python pickle"},
  };
  for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
    const char *path = write_bytes("a.pth", cases[k].bytes, cases[k].size);
    assert_refused(!orepa_load_pytorch(path, cpu), path, cases[k].words);
  }
  assert_refused(!orepa_load_pytorch(path_of("missing"), cpu), path_of("missing"), "cannot be opened");
  built.size = 0;
  put_number(&built, 0, 257);
  put_bytes(&built, BYTES("ustar"));
  refuses_built("but a tar archive");
}

static void test_the_first_bytes_say_which_reader(void **unused) {
  (void)unused;
  orepa_archive *archive = orepa_load("tests/golden/pytorch/tensor.pth", cpu);
  assert_int_equal(orepa_archive_count(archive), 1);
  const char *path = path_of("named.pth");
  must_save(path, archive);
  orepa_archive *again = orepa_load(path, cpu);
  assert_non_null(again);
  assert_same_archives(archive, again);
  orepa_archive_free(archive);
  orepa_archive_free(again);
  path = write_bytes("a", BYTES("<html>"));
  assert_refused(!orepa_load(path, cpu), path,
                 "is neither a safetensors file nor a checkpoint of PyTorch's but an HTML or XML page");
  path = write_bytes("a", BYTES("<\0\0\0\0\0\0\0{ ")); /* a header of 60 bytes */
  assert_refused(!orepa_load(path, cpu), path, "is truncated: its header has 60 bytes");
  path = write_bytes("a", BYTES("\x80\2\0\0\0\0\0\0{")); /* of 640 */
  assert_refused(!orepa_load(path, cpu), path, "is truncated: its header has 640 bytes");
  path = write_bytes("a", BYTES(""));
  assert_refused(!orepa_load(path, cpu), path, "is empty");
  assert_refused(!orepa_load(folder, cpu), folder, "is a folder, not a file");
}

/* ---- the ZIP archive ---- */

static const entry pickled = {.name = "a/data.pkl", .bytes = NAMED(WHOLE), .size = sizeof NAMED(WHOLE) - 1};
static const entry stored = {.name = "a/data/0", .bytes = six_floats, .size = SIX_BYTES};

static void refuses_entries(const entry *entries, size_t count, const char *words) {
  put_zip(&built, entries, count);
  refuses_built(words);
}

#define REFUSES_ENTRIES(words, ...)                                                                                    \
  refuses_entries((entry[]){__VA_ARGS__}, sizeof((entry[]){__VA_ARGS__}) / sizeof(entry), words)

static entry changed(entry e, unsigned method, unsigned flags) {
  e.method = method;
  e.flags = flags;
  return e;
}

static entry called(entry e, const char *name) {
  e.name = name;
  return e;
}

static void test_entries_are_checked(void **unused) {
  (void)unused;
  REFUSES_ENTRIES("entry \"a/data/0\" of the ZIP archive is compressed, which torch.save never does", pickled,
                  changed(stored, 8, 0));
  REFUSES_ENTRIES("is encrypted", pickled, changed(stored, 0, 1));
  REFUSES_ENTRIES("entry \"a/data/0\" of the ZIP archive is there twice", pickled, stored, stored);
  REFUSES_ENTRIES("entry \"b/data/0\" of the ZIP archive is in another folder", pickled, called(stored, "b/data/0"));
  REFUSES_ENTRIES("it has no folder", called(pickled, "data.pkl"));
  REFUSES_ENTRIES("it has no folder", called(pickled, "data.pkl"), stored);
  REFUSES_ENTRIES("has a name of 0 bytes", called(pickled, ""));
  REFUSES_ENTRIES("it has no data.pkl", stored);
  REFUSES_ENTRIES("storage 0 is missing: the archive has no data/0", pickled);
  REFUSES_ENTRIES("is a TorchScript archive", pickled, stored, called(stored, "a/constants.pkl"));
  REFUSES_ENTRIES("is a TorchScript archive", pickled, stored, called(stored, "a/code/__torch__.py"));
  REFUSES_ENTRIES("its numbers are big-endian", pickled, stored, (entry){"a/byteorder", "big", 3, 0, 0, false, false});
  REFUSES_ENTRIES("its numbers are unknown-endian", pickled, stored, called(stored, "a/byteorder"));
  put_zip(&built, NULL, 0);
  refuses_built("begins neither as a ZIP archive");
}

static void test_archives_may_be_wide_and_unchecked_and_have_a_comment(void **unused) {
  (void)unused;
  entry wide = stored, plain = changed(pickled, 0, 8);
  wide.wide = plain.no_checksum = true;
  put_zip(&built, (entry[]){plain, wide}, 2);
  memcpy(built.bytes + built.size - 2, "\3\0", 2);
  put_bytes(&built, "\x50K!", 3);
  orepa_archive *archive = reads_built();
  assert_elements(orepa_archive_find(archive, "w"), six_floats, SIX_BYTES);
  orepa_archive_free(archive);
}

/* Where such bytes stand at or behind a place. */
static unsigned char *find(size_t from, const void *bytes, size_t size) {
  for (size_t k = from; k + size <= built.size; k++)
    if (!memcmp(built.bytes + k, bytes, size))
      return built.bytes + k;
  fail_msg("there are no such bytes");
  return NULL;
}

/* Where the mark of a ZIP record first stands. */
static unsigned char *record(const char *mark) {
  return find(0, mark, 4);
}

/* One number of a record of an otherwise good archive is changed. */
static void refuses_number(const char *mark, size_t at, uint32_t value, int width, const char *words) {
  put_zip(&built, (entry[]){pickled, stored}, 2);
  unsigned char *to = record(mark) + at;
  for (int k = 0; k < width; k++, value >>= 8)
    to[k] = (unsigned char)value;
  refuses_built(words);
}

static void test_the_directory_is_checked_against_the_file(void **unused) {
  (void)unused;
  refuses_number("PK\5\6", 10, 3, 2, "has no room for 3 entries");
  refuses_number("PK\5\6", 10, 9, 2, "has no room for 9 entries");
  refuses_number("PK\5\6", 12, 1 << 20, 4, "does not fit before its end");
  refuses_number("PK\5\6", 16, 1 << 20, 4, "does not fit before its end");
  refuses_number("PK\5\6", 16, 0, 4, "is damaged after 0 entries");
  refuses_number("PK\5\6", 20, 1, 2, "is a truncated ZIP archive");
  refuses_number("PK\1\2", 0, 0, 4, "is damaged after 0 entries");
  refuses_number("PK\1\2", 28, 0xffff, 2, "is damaged after 0 entries");
  refuses_number("PK\1\2", 20, 1, 4, "has two sizes, and is not compressed");
  refuses_number("PK\1\2", 24, 1 << 30, 4, "is said to be larger than the file: it is truncated");
  refuses_number("PK\1\2", 42, 1 << 30, 4, "is said to begin beyond the file: it is truncated");
  refuses_number("PK\1\2", 42, 1, 4, "has another header than the directory says");
  refuses_number("PK\3\4", 8, 8, 2, "has another header than the directory says");
  refuses_number("PK\3\4", 22, 7, 4, "has another header than the directory says");
  refuses_number("PK\3\4", 26, 9, 2, "has another header than the directory says");
  refuses_number("PK\3\4", 28, 0xffff, 2, "reaches beyond the file: it is truncated");
  refuses_number("PK\3\4", 30, 'b', 1, "has another header than the directory says");
  refuses_number("PK\3\4", 40, 0, 1, "data.pkl is damaged: its bytes don't have the checksum");
  put_zip(&built, (entry[]){pickled, stored}, 2);
  record("PK\1\2")[42 + 46 + strlen(pickled.name)] = 0; /* the second entry's header is the first one's */
  refuses_built("has another header than the directory says");
  put_zip(&built, (entry[]){pickled, stored}, 2);
  *find(0, six_floats, SIX_BYTES) ^= 1;
  refuses_built("storage 0 is damaged: its bytes don't have the checksum");
}

static void test_entries_dont_lie_on_one_another(void **unused) {
  (void)unused;
  put_zip(&built, (entry[]){pickled, stored}, 2);
  unsigned char *second = find(4, "PK\3\4", 4);
  unsigned char *first = record("PK\1\2");
  uint32_t longer = (uint32_t)(second + 30 - built.bytes - 30 - (long)strlen(pickled.name) + 20);
  for (int k = 0; k < 4; k++) {
    first[20 + k] = first[24 + k] = (unsigned char)(longer >> 8 * k);
    built.bytes[22 + k] = (unsigned char)(longer >> 8 * k);
  }
  refuses_built("lies on another one");
}

static void test_wide_numbers_are_checked(void **unused) {
  (void)unused;
  entry wide = stored;
  wide.wide = true;
  put_zip(&built, (entry[]){wide}, 1);
  record("PK\1\2")[46 + 8 + 6 + 2] = 16; /* the field's length: no room for three numbers */
  refuses_built("has 64-bit sizes that are cut off");
  put_zip(&built, (entry[]){wide, pickled}, 2);
  record("PK\5\6")[10] = 3; /* there would be room for it */
  refuses_built("is damaged after 2 entries");
  put_zip(&built, (entry[]){wide}, 1);
  record("PK\1\2")[46 + 8 + 2] = 200; /* a field that is longer than all of them */
  refuses_built("has 64-bit sizes that are cut off");
  size_t size;
  char *bytes = read_bytes("tests/golden/pytorch/tensor.pth", &size);
  memcpy(built.bytes, bytes, size);
  free(bytes);
  built.size = size;
  record("PK\6\6")[0] = 0;
  refuses_built("64-bit end is not at");
  record("PK\6\7")[8 + 5] = 1;
  refuses_built("64-bit end is said to be at");
}

/* ---- the container before 1.6 ---- */

static void test_old_files_are_checked(void **unused) {
  (void)unused;
#define AFTER(object, keys, count) BYTES(MAGIC VERSION SYSTEM("\x88") object keys count)
#define COUNT "\6\0\0\0\0\0\0\0"
  refuses_old(BYTES(PROTO "K\1."), "does not begin with the magic number");
  refuses_old(BYTES(PROTO "\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x1a."), "does not begin with the magic number");
  refuses_old(BYTES(MAGIC PROTO "K\1."), "its protocol version is not 1001");
  refuses_old(BYTES(MAGIC VERSION PROTO "N."), "what its machine was like is no dictionary");
  refuses_old(BYTES(MAGIC VERSION SYSTEM("\x89")), "its numbers are big-endian");
  refuses_old(BYTES(MAGIC VERSION SYSTEM("\x88") PROTO "?."),
              "has an opcode that torch.save does not write (at its byte 47)");
  refuses_old(AFTER(OLD_NAMED, PROTO "N.", COUNT), "has no list of storages");
  refuses_old(AFTER(OLD_NAMED, PROTO "].", COUNT), "storage 0 is not in the file's list of storages");
  refuses_old(AFTER(OLD_NAMED,
                    PROTO "]X\1\0\0\0"
                          "1a.",
                    COUNT),
              "its list of storages has one that no tensor has");
  refuses_old(AFTER(OLD_NAMED, PROTO "]Na.", COUNT), "its list of storages has one that no tensor has");
  refuses_old(AFTER(OLD_NAMED, KEYS, "\5\0\0\0\0\0\0\0"), "said to have 6 elements, and 5 stand before them");
  refuses_old(AFTER(OLD_NAMED,
                    PROTO "](X\1\0\0\0"
                          "0X\1\0\0\0"
                          "0e.",
                    COUNT),
              "has one twice");
  put_old(&built, AFTER(OLD_NAMED, KEYS, COUNT));
  orepa_archive *archive = reads_built();
  assert_elements(orepa_archive_find(archive, "w"), six_floats, SIX_BYTES);
  orepa_archive_free(archive);
  built.size--;
  refuses_built("is truncated: storage 0 has 24 bytes, and 23 follow");
  built.size -= SIX_BYTES;
  refuses_built("is truncated: storage 0 is missing");
}

#define WINDOW(view)                                                                                                   \
  "(X\7\0\0\0storagectorch.cuda\nFloatStorage\nX\1\0\0\0"                                                              \
  "0X\3\0\0\0cpuK\6" view "tQ"
#define VIEWED(view) AFTER(NAMED(TENSOR_OF(WINDOW(view), "K\1", "K\2\x85", "K\1\x85")), KEYS, COUNT)

static void test_old_files_have_windows_of_storages(void **unused) {
  (void)unused;
  put_old(&built, VIEWED("X\1\0\0\0vK\2K\3\x87"));
  orepa_archive *archive = reads_built();
  assert_elements(orepa_archive_find(archive, "w"), (float[]){4, 5}, 8);
  orepa_archive_free(archive);
  refuses_old(VIEWED("X\1\0\0\0vK\2K\2\x87"), "2 with strides 1 at offset 1 reaches beyond its storage of 2 elements");
  refuses_old(VIEWED("X\1\0\0\0vK\4K\3\x87"), "it views 3 elements at 4 of a storage of 6");
  refuses_old(VIEWED("X\1\0\0\0vJ\xff\xff\xff\xffK\3\x87"), "it views 3 elements at -1 of a storage of 6");
  refuses_old(VIEWED("X\1\0\0\0vNK\3\x87"), "the view of its storage is not described as torch.save does it");
}

/* Objects that fill more than the first window that is tried. */
static void test_old_files_may_have_many_objects(void **unused) {
  (void)unused;
  enum { LONG = 70000 };
  built.size = 0;
  put_bytes(&built, BYTES(MAGIC VERSION SYSTEM("\x88") PROTO "}(X\1\0\0\0tX"));
  put_number(&built, LONG, 4);
  for (int k = 0; k < LONG; k++)
    put_bytes(&built, "t", 1);
  put_bytes(&built, BYTES("X\1\0\0\0w" TENSOR_OF(OLD_SIX, "K\0", "K\6\x85", "K\1\x85") "u." KEYS COUNT));
  put_bytes(&built, six_floats, SIX_BYTES);
  orepa_archive *archive = reads_built();
  assert_elements(orepa_archive_find(archive, "w"), six_floats, SIX_BYTES);
  assert_int_equal(strlen(orepa_archive_find_metadata(archive, "t")), LONG);
  orepa_archive_free(archive);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      IO_TEST(test_both_containers_hold_the_same),
      IO_TEST(test_every_prefix_of_a_file_is_refused),
      IO_TEST(test_every_byte_may_be_wrong),
      IO_TEST(test_one_object_under_two_names_is_one_tensor),
      IO_TEST(test_what_is_no_checkpoint_is_called_what_it_is),
      IO_TEST(test_the_first_bytes_say_which_reader),
      IO_TEST(test_entries_are_checked),
      IO_TEST(test_archives_may_be_wide_and_unchecked_and_have_a_comment),
      IO_TEST(test_the_directory_is_checked_against_the_file),
      IO_TEST(test_entries_dont_lie_on_one_another),
      IO_TEST(test_wide_numbers_are_checked),
      IO_TEST(test_old_files_are_checked),
      IO_TEST(test_old_files_have_windows_of_storages),
      IO_TEST(test_old_files_may_have_many_objects),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
