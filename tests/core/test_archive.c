/* test_archive.c: names, order and references of archives in memory. */
#include "io_test.h"

static orepa_tensor *number(double value) {
  return must(orepa_full(OREPA_FLOAT32, cpu, 0, NULL, value));
}

static double value_of(orepa_tensor *t) {
  double value = 0;
  assert_non_null(t);
  assert_int_equal(orepa_item(t, &value), 0);
  return value;
}

static void test_names_are_found_and_keep_their_order(void **unused) {
  (void)unused;
  enum { COUNT = 1000 };
  orepa_archive *archive = new_archive();
  char name[32];
  for (int k = 0; k < COUNT; k++) {
    snprintf(name, sizeof name, "layer%d.weight", k * 7919 % COUNT);
    put(archive, name, number(k));
  }
  assert_int_equal(orepa_archive_count(archive), COUNT);
  for (int k = 0; k < COUNT; k++) {
    snprintf(name, sizeof name, "layer%d.weight", k * 7919 % COUNT);
    assert_string_equal(orepa_archive_name(archive, (size_t)k), name);
    assert_int_equal((int)value_of(orepa_archive_find(archive, name)), k);
    assert_ptr_equal(orepa_archive_find(archive, name), orepa_archive_tensor(archive, (size_t)k));
  }
  orepa_archive_free(archive);
}

static void test_what_is_not_there_is_null(void **unused) {
  (void)unused;
  orepa_archive *archive = new_archive();
  assert_null(orepa_archive_name(archive, 0));
  put(archive, "a", number(1));
  assert_int_equal(orepa_archive_set_metadata(archive, "key", "value"), 0);
  assert_null(orepa_archive_name(archive, 1));
  assert_null(orepa_archive_tensor(archive, SIZE_MAX));
  assert_null(orepa_archive_find(archive, "A"));
  assert_null(orepa_archive_find(archive, "key"));
  assert_null(orepa_archive_find(archive, "\xff"));
  assert_null(orepa_archive_metadata_key(archive, 1));
  assert_null(orepa_archive_metadata_value(archive, 1));
  assert_null(orepa_archive_find_metadata(archive, "a"));
  orepa_archive_free(archive);
  orepa_archive_free(NULL);
}

static void test_names_that_are_refused_leave_no_trace(void **unused) {
  (void)unused;
  orepa_archive *archive = new_archive();
  orepa_tensor *one = number(1), *two = number(2);
  assert_int_equal(orepa_archive_add(archive, "conv.weight", one), 0);
  assert_message(orepa_archive_add(archive, "conv.weight", two), "there is a tensor \"conv.weight\" already");
  assert_message(orepa_archive_add(archive, "__metadata__", two), "a tensor can't be called \"__metadata__\"");
  assert_message(orepa_archive_add(archive, "\xc3(", two), "a tensor's name is not valid UTF-8");
  assert_message(orepa_archive_add(archive, "\xed\xa0\x80", two), "a tensor's name is not valid UTF-8");
  assert_message(orepa_archive_add(archive, "\xc0\x80", two), "a tensor's name is not valid UTF-8");
  assert_message(orepa_archive_add(archive, "\xf4\x90\x80\x80", two), "a tensor's name is not valid UTF-8");
  assert_message(orepa_archive_set_metadata(archive, "\x80", ""), "a key of the metadata is not valid UTF-8");
  assert_message(orepa_archive_set_metadata(archive, "", "\xe4\xb8"), "a value of the metadata is not valid UTF-8");
  assert_int_equal(orepa_archive_count(archive), 1);
  assert_int_equal(orepa_archive_metadata_count(archive), 0);
  assert_int_equal((int)value_of(orepa_archive_find(archive, "conv.weight")), 1);
  orepa_archive_free(archive);
  orepa_release(one);
  orepa_release(two);
}

static void test_a_tensor_is_held_not_copied(void **unused) {
  (void)unused;
  orepa_archive *archive = new_archive();
  orepa_tensor *t = number(1);
  assert_int_equal(orepa_archive_add(archive, "a", t), 0);
  assert_int_equal(orepa_archive_add(archive, "", t), 0);
  assert_ptr_equal(orepa_archive_find(archive, "a"), t);
  assert_int_equal(orepa_fill_(t, 5), 0);
  orepa_release(t);
  assert_int_equal((int)value_of(orepa_archive_find(archive, "a")), 5);
  orepa_retain(t);
  orepa_archive_free(archive);
  assert_int_equal((int)value_of(t), 5);
  orepa_release(t);
}

static void test_metadata_is_replaced_where_it_stands(void **unused) {
  (void)unused;
  static const char *const keys[] = {"epoch", "", "\xf0\x9f\x98\x80"};
  orepa_archive *archive = new_archive();
  for (int round = 0; round < 2; round++)
    for (int k = 0; k < 3; k++) {
      char value[16];
      snprintf(value, sizeof value, "%d", 10 * round + k);
      assert_int_equal(orepa_archive_set_metadata(archive, keys[k], value), 0);
    }
  assert_int_equal(orepa_archive_metadata_count(archive), 3);
  for (int k = 0; k < 3; k++) {
    char value[16];
    snprintf(value, sizeof value, "%d", 10 + k);
    assert_string_equal(orepa_archive_metadata_key(archive, (size_t)k), keys[k]);
    assert_string_equal(orepa_archive_metadata_value(archive, (size_t)k), value);
    assert_string_equal(orepa_archive_find_metadata(archive, keys[k]), value);
  }
  /* A value may be given back as its own successor. */
  assert_int_equal(orepa_archive_set_metadata(archive, "epoch", orepa_archive_find_metadata(archive, "epoch")), 0);
  assert_string_equal(orepa_archive_find_metadata(archive, "epoch"), "10");
  orepa_archive_free(archive);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      IO_TEST(test_names_are_found_and_keep_their_order),  IO_TEST(test_what_is_not_there_is_null),
      IO_TEST(test_names_that_are_refused_leave_no_trace), IO_TEST(test_a_tensor_is_held_not_copied),
      IO_TEST(test_metadata_is_replaced_where_it_stands),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
