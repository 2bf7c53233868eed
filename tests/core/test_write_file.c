/* test_write_file.c: a file of any bytes, whole or not at all. */
#include "io_test.h"

#include <sys/stat.h>

static void test_bytes_are_written_and_replaced(void **unused) {
  (void)unused;
  const char *path = path_of("trace.json");
  assert_int_equal(orepa_write_file(path, "a\0b and more", 12), 0);
  assert_file_holds(path, "a\0b and more", 12);
  assert_int_equal(orepa_write_file(path, "c", 1), 0);
  assert_file_holds(path, "c", 1);
  assert_int_equal(orepa_write_file(path, "", 0), 0);
  assert_file_holds(path, "", 0);
  assert_int_equal(count_files(false), 1);
}

static void test_what_cannot_be_written_leaves_what_was_there(void **unused) {
  (void)unused;
  const char *path = path_of("held");
  assert_int_equal(mkdir(path, 0700), 0);
  assert_int_equal(orepa_write_file(path, "x", 1), -1);
  assert_non_null(strstr(orepa_error(), "is a folder"));
  assert_int_equal(orepa_write_file(path_of("no such folder/x"), "x", 1), -1);
  assert_non_null(strstr(orepa_error(), "no file can be made"));
  assert_int_equal(count_files(false), 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      IO_TEST(test_bytes_are_written_and_replaced),
      IO_TEST(test_what_cannot_be_written_leaves_what_was_there),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
