/* test_safetensors.c: reading safetensors files: what is legal, and the refusal of everything else by its rule. Saving
 * them is in test_safetensors_save.c. */
#include <fcntl.h>
#include <sys/stat.h>

#include "io/safetensors.h"
#include "io_test.h"

/* ---- files of any header ---- */

/* The header as it stands, then `data` bytes that are 0 1 0 1 ... */
static const char *file_of_bytes(const char *header, size_t length, size_t data) {
  unsigned char *file = malloc(HEADER_START + length + data);
  assert_non_null(file);
  for (int k = 0; k < HEADER_START; k++)
    file[k] = (unsigned char)(length >> 8 * k);
  memcpy(file + HEADER_START, header, length);
  for (size_t k = 0; k < data; k++)
    file[HEADER_START + length + k] = k & 1;
  const char *path = write_bytes("a.safetensors", file, HEADER_START + length + data);
  free(file);
  return path;
}

static const char *file_of(const char *header, size_t data) {
  return file_of_bytes(header, strlen(header), data);
}

static void refuses_file(const char *path, const char *words) {
  assert_refused(!orepa_load_safetensors(path, cpu), path, words);
  assert_false(orepa_error_is_out_of_memory());
}

static void refuses_bytes(const void *bytes, size_t size, const char *words) {
  refuses_file(write_bytes("a.safetensors", bytes, size), words);
}

static void refuses(const char *header, size_t data, const char *words) {
  refuses_file(file_of(header, data), words);
}

static orepa_archive *reads(const char *header, size_t data) {
  return must_load(file_of(header, data), cpu);
}

/* ---- what is legal ---- */

static void test_elements_are_little_endian_and_row_major(void **unused) {
  (void)unused;
  static const char header[] =
      "{\"w\":{\"dtype\":\"F32\",\"shape\":[1,2,1,2],\"data_offsets\":[0,16]},\"n\":{\"dtype\":\"I64\","
      "\"shape\":[2],\"data_offsets\":[16,32]}} ";
  unsigned char file[sizeof header - 1 + 40] = {sizeof header - 1};
  static const unsigned char data[] = {0, 0, 128, 63, 0, 0, 0, 192, 219, 15,  73,  64,  0,   0,   128, 255,
                                       1, 2, 0,   0,  0, 0, 0, 128, 255, 255, 255, 255, 255, 255, 255, 255};
  memcpy(file + HEADER_START, header, sizeof header - 1);
  memcpy(file + HEADER_START + sizeof header - 1, data, sizeof data);
  const char *path = write_bytes("a.safetensors", file, sizeof file);
  for (int device = 0; device < 2; device++) {
    orepa_archive *archive = must_load(path, device ? ref : cpu);
    orepa_tensor *w = orepa_archive_find(archive, "w"), *n = orepa_archive_find(archive, "n");
    assert_elements(w, (float[]){1, -2, 3.14159274f, -1 / 0.0f}, 16);
    assert_memory_equal(orepa_shape(w), ((int64_t[]){1, 2, 1, 2}), 32);
    assert_ptr_equal(orepa_tensor_device(w), device ? ref : cpu);
    assert_true(orepa_is_contiguous(w));
    assert_elements(n, (int64_t[]){INT64_MIN + 0x201, -1}, 16);
    orepa_archive_free(archive);
  }
}

static void test_the_headers_order_is_kept_whatever_the_datas(void **unused) {
  (void)unused;
  orepa_archive *archive = reads("{\"c\":{\"data_offsets\":[6,8],\"shape\":[2],\"dtype\":\"U8\"},"
                                 "\"__metadata__\":{\"z\":\"1\",\"a\":\"2\"},"
                                 "\"a\":{\"dtype\":\"BOOL\",\"shape\":[2],\"data_offsets\":[0,2]},"
                                 "\"b\":{\"dtype\":\"I32\",\"shape\":[1,1],\"data_offsets\":[2,6]}}",
                                 8);
  assert_int_equal(orepa_archive_count(archive), 3);
  assert_string_equal(orepa_archive_name(archive, 0), "c");
  assert_string_equal(orepa_archive_name(archive, 1), "a");
  assert_string_equal(orepa_archive_name(archive, 2), "b");
  assert_elements(orepa_archive_tensor(archive, 0), "\0\1", 2);
  assert_elements(orepa_archive_tensor(archive, 2), "\0\1\0\1", 4);
  assert_string_equal(orepa_archive_metadata_key(archive, 0), "z");
  assert_string_equal(orepa_archive_find_metadata(archive, "a"), "2");
  orepa_archive_free(archive);
}

static void test_headers_may_have_escapes_and_spaces_and_no_padding(void **unused) {
  (void)unused;
  orepa_archive *archive =
      reads("{ \"a\\u0062/\\/\" :\t{ \"dtype\":\"U\\u0038\" , \"shape\" : [ ],\r\n"
            "\"data_offsets\":[0 ,1] } ,\"__metadata__\":{\"\\u00e9\":\"\\ud83d\\ude00\\n\\\"\\\\\"}"
            ",\"\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}   ",
            2);
  assert_elements(orepa_archive_find(archive, "ab//"), "\0", 1);
  assert_int_equal(orepa_rank(orepa_archive_find(archive, "ab//")), 0);
  assert_elements(orepa_archive_find(archive, ""), "\1", 1);
  assert_string_equal(orepa_archive_find_metadata(archive, "\xc3\xa9"), "\xf0\x9f\x98\x80\n\"\\");
  orepa_archive_free(archive);
}

static void test_empty_tensors_lie_at_any_seam(void **unused) {
  (void)unused;
  orepa_archive *archive = reads("{\"last\":{\"dtype\":\"F64\",\"shape\":[3,0,2],\"data_offsets\":[4,4]},"
                                 "\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[2,4]},"
                                 "\"middle\":{\"dtype\":\"F32\",\"shape\":[0,9007199254740992],\"data_offsets\":[2,2]},"
                                 "\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},"
                                 "\"first\":{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[0,0]}}",
                                 4);
  assert_int_equal(orepa_archive_count(archive), 5);
  assert_int_equal(orepa_count(orepa_archive_find(archive, "middle")), 0);
  assert_int_equal(orepa_shape(orepa_archive_find(archive, "middle"))[1], INT64_C(9007199254740992));
  assert_int_equal(orepa_rank(orepa_archive_find(archive, "last")), 3);
  orepa_archive_free(archive);
  archive = reads("{}", 0);
  assert_int_equal(orepa_archive_count(archive), 0);
  orepa_archive_free(archive);
  archive = reads("{\"__metadata__\":{}}", 0);
  assert_int_equal(orepa_archive_metadata_count(archive), 0);
  orepa_archive_free(archive);
}

/* ---- what is not ---- */

static void test_what_is_no_file_is_refused(void **unused) {
  (void)unused;
  refuses_file(path_of("missing"), "cannot be opened: No such file or directory");
  refuses_file(folder, "is a folder, not a file");
  refuses_file("/dev/null", "is a device or a pipe, not a file");
  assert_int_equal(mkfifo(path_of("pipe"), 0600), 0);
  refuses_file(path_of("pipe"), "is a device or a pipe, not a file"); /* and nobody waits for its other end */
}

static void test_the_headers_length_is_checked_against_the_file(void **unused) {
  (void)unused;
  refuses_bytes("", 0, "is empty");
  refuses_bytes("\2\0\0\0\0\0\0", 7, "is no safetensors file: it has 7 bytes");
  refuses_bytes("\2\0\0\0\0\0\0\0", 8, "is truncated: its header has 2 bytes, and 0 follow");
  refuses_bytes("\3\0\0\0\0\0\0\0{}", 10, "is truncated: its header has 3 bytes, and 2 follow");
  refuses_bytes("\0\xe1\xf5\5\0\0\0\0{}", 10, "is truncated: its header has 100000000 bytes, and 2 follow");
  refuses_bytes("\1\xe1\xf5\5\0\0\0\0{}", 10, "its first 8 bytes say 100000001, and a header has at most 100000000");
  refuses_bytes("\2\0\0\0\0\0\0\x80{}", 10, "its first 8 bytes say 9223372036854775810");
  refuses_bytes("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10, "its first 8 bytes say 18446744073709551615");
  refuses_bytes("\xf8\xff\xff\xff\xff\xff\xff\xff{}", 10, "its first 8 bytes say 18446744073709551608");
}

static void test_other_formats_are_named(void **unused) {
  (void)unused;
#define REFUSES(bytes, words) refuses_bytes(bytes, sizeof bytes - 1, "is no safetensors file but " words)
  REFUSES("PK\3\4\0\0\x08\x08\0\0\0\0\0\0", "a ZIP archive, such as PyTorch's .pth");
  REFUSES("PK\3\4\0\0\0\0\0\0\0\0", "a ZIP archive");
  REFUSES("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer");
  REFUSES("<!DOCTYPE html>", "an HTML or XML page");
  REFUSES("\n\n  <html><body>", "an HTML or XML page");
  REFUSES("\x80\2\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.", "a Python pickle");
  REFUSES("\x1f\x8b\x08\0\x12\x34\x56\x65\0\3", "compressed with gzip");
  REFUSES("\x1f\x8b\x08\0\0\0\0\0\0\3", "compressed with gzip");
  REFUSES("\x89HDF\r\n\x1a\n\0", "an HDF5 file");
  REFUSES("\x93NUMPY\1\0v\0", "a NumPy array");
  REFUSES("GGUF\3\0\0\0\1\0", "a GGUF file");
  REFUSES("{\"metadata\": {\"total_size\": 1}}", "JSON text");
#undef REFUSES
}

/* Such a header is as long as the first bytes of a gzip stream say. */
static void test_a_length_that_looks_like_gzip_is_a_length(void **unused) {
  (void)unused;
  enum { LENGTH = 0x088b1f };
  char *header = malloc(LENGTH);
  assert_non_null(header);
  memset(header, ' ', LENGTH);
  memcpy(header, "{}", 2);
  orepa_archive_free(must_load(file_of_bytes(header, LENGTH, 0), cpu));
  free(header);
}

static void test_the_header_is_one_object_of_valid_json(void **unused) {
  (void)unused;
  static const char brackets[] = "the header does not begin with '{' and end with '}' and spaces";
  refuses("", 0, brackets);
  refuses("      ", 0, brackets);
  refuses("[]", 0, brackets);
  refuses(" {}", 0, brackets);
  refuses("{}\n", 0, brackets);
  refuses("\xef\xbb\xbf{}", 0, brackets);
  refuses("{", 0, brackets);
  static const char *const broken[] = {"{\"a\":}",
                                       "{}{}",
                                       "{\"a\":1,}",
                                       "{'a':1}",
                                       "{a:1}",
                                       "{\"a\":NaN}",
                                       "{\"a\":01}",
                                       "{\"a\":+1}",
                                       "{\"a\":0x1}",
                                       "{/**/}",
                                       "{\"a\":\"\n\"}",
                                       "{\"a\":\"\\x41\"}",
                                       "{\"\\ud800\":1}",
                                       "{\"a\\u0000b\":1}",
                                       "{\"\xff\":1}",
                                       "{\"\xc0\xaf\":1}",
                                       "{\"\xed\xa0\x80\":1}",
                                       "{\"a\":[1}",
                                       "{\"a\":[9223372036854775808]}",
                                       "{\"a\":1e999}"};
  for (size_t k = 0; k < sizeof broken / sizeof *broken; k++)
    refuses(broken[k], 0, "the header is no valid JSON: ");
  refuses_file(file_of_bytes("{\"a\0b\":1}", 9, 0), "the header is no valid JSON: ");
  refuses_file(file_of_bytes("{\0}", 3, 0), "the header is no valid JSON: ");
}

static void test_depth_is_refused_before_it_costs_anything(void **unused) {
  (void)unused;
  refuses("{\"a\":{\"shape\":[[1]]}}", 0, "the header is nested more than 3 deep at its byte 15");
  refuses("{\"\\\"a[[[[\":[{\"[\":[]}]}", 0, "nested more than 3 deep at its byte 17");
  enum { DEEP = 1 << 20 };
  char *header = malloc(DEEP);
  assert_non_null(header);
  memset(header, '[', DEEP);
  memcpy(header, "{\"a\":", 5);
  header[DEEP - 1] = '}';
  refuses_file(file_of_bytes(header, DEEP, 0), "nested more than 3 deep at its byte 7");
  free(header);
}

#define TENSOR(name, dtype, shape, offsets)                                                                            \
  "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void test_duplicate_keys_are_refused(void **unused) {
  (void)unused;
  refuses("{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("a", "U8", "[1]", "[1,2]") "}", 2, "duplicate object key");
  refuses("{" TENSOR("a", "U8", "[1]", "[0,1]") "," TENSOR("\\u0061", "U8", "[1]", "[1,2]") "}", 2, "duplicate");
  refuses("{\"__metadata__\":{},\"__metadata__\":{}}", 0, "duplicate object key");
  refuses("{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, "duplicate object key");
  refuses("{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
          "duplicate object key");
}

static void test_metadata_maps_strings_to_strings(void **unused) {
  (void)unused;
  refuses("{\"__metadata__\":[]}", 0, "__metadata__ is not an object");
  refuses("{\"__metadata__\":null}", 0, "__metadata__ is not an object");
  refuses("{\"__metadata__\":{\"ok\":\"\",\"epoch\":1}}", 0, "__metadata__: the value of \"epoch\" is not a string");
  refuses("{\"__metadata__\":{\"k\\n\":{}}}", 0, "__metadata__: the value of \"k?\" is not a string");
}

static void test_an_entry_has_its_three_fields_and_no_other(void **unused) {
  (void)unused;
  refuses("{\"a.b\":[0,1]}", 1, "tensor \"a.b\": its entry in the header is not an object");
  refuses("{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor \"a\": it has no dtype");
  refuses("{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "tensor \"a\": it has no shape");
  refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "tensor \"a\": it has no data_offsets");
  refuses("{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"strides\":[1]}}", 1,
          "tensor \"a\": it has an unknown field \"strides\"");
  refuses("{\"a\":{\"dtype\":8,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "tensor \"a\": dtype is not a string");
  refuses("{" TENSOR("a", "F8_E4M3", "[1]", "[0,1]") "}", 1,
          "tensor \"a\": the type F8_E4M3 is not supported (F32 BF16 F16 F64 I64 I32 U8 BOOL are)");
  refuses("{" TENSOR("a", "f32", "[1]", "[0,4]") "}", 4, "tensor \"a\": the type f32 is not supported");
  refuses("{" TENSOR("a", "", "[1]", "[0,4]") "}", 4, "tensor \"a\": the type  is not supported");
}

static void test_shapes_and_offsets_are_lists_of_whole_numbers(void **unused) {
  (void)unused;
  refuses("{" TENSOR("a", "U8", "1", "[0,1]") "}", 1, "tensor \"a\": shape is not a list");
  refuses("{" TENSOR("a", "U8", "{}", "[0,1]") "}", 1, "tensor \"a\": shape is not a list");
  refuses("{" TENSOR("a", "U8", "[1,1,1,1,1,1,1]", "[0,1]") "}", 1, "it has 7 dimensions, and at most 6 are supported");
  static const char *const no_integers[] = {"1.0", "1e0", "\"1\"", "true", "null", "0.5", "1e300"};
  char header[200];
  for (size_t k = 0; k < sizeof no_integers / sizeof *no_integers; k++) {
    snprintf(header, sizeof header, "{" TENSOR("a", "U8", "[1,%s]", "[0,1]") "}", no_integers[k]);
    refuses(header, 1, "tensor \"a\": shape holds what is no integer");
    snprintf(header, sizeof header, "{" TENSOR("a", "U8", "[1]", "[0,%s]") "}", no_integers[k]);
    refuses(header, 1, "tensor \"a\": data_offsets holds what is no integer");
  }
  refuses("{" TENSOR("a", "U8", "[-1]", "[0,1]") "}", 1, "shape holds -1, which is not in 0 ... 2^53");
  refuses("{" TENSOR("a", "U8", "[0,9007199254740993]", "[0,0]") "}", 0, "shape holds 9007199254740993, which");
  refuses("{" TENSOR("a", "U8", "[1]", "[-1,0]") "}", 1, "data_offsets holds -1, which is not in 0 ... 2^53");
  refuses("{" TENSOR("a", "U8", "[1]", "[0,9223372036854775807]") "}", 1, "data_offsets holds 9223372036854775807");
  refuses("{" TENSOR("a", "U8", "[1]", "{}") "}", 1, "tensor \"a\": data_offsets is not a list of two");
  refuses("{" TENSOR("a", "U8", "[1]", "[0]") "}", 1, "data_offsets is not a list of two");
  refuses("{" TENSOR("a", "U8", "[1]", "[0,1,1]") "}", 1, "data_offsets is not a list of two");
  refuses("{" TENSOR("a", "U8", "[0]", "[1,0]") "}", 1, "data_offsets [1, 0] end before they begin");
}

static void test_offsets_agree_with_type_and_shape(void **unused) {
  (void)unused;
  refuses("{" TENSOR("a", "F32", "[2,3]", "[0,23]") "}", 23,
          "tensor \"a\": data_offsets [0, 23] are 23 bytes, a float32 2x3 has 24");
  refuses("{" TENSOR("a", "F16", "[]", "[0,0]") "}", 0, "data_offsets [0, 0] are 0 bytes, a float16 scalar has 2");
  refuses("{" TENSOR("a", "F64", "[0]", "[0,8]") "}", 8, "data_offsets [0, 8] are 8 bytes, a float64 0 has 0");
  static const char overflow[] = "has more bytes than can be counted";
  refuses("{" TENSOR("a", "F64", "[2147483648,2147483648,4]", "[0,0]") "}", 0, overflow); /* 0 modulo 2^64 */
  refuses("{" TENSOR("a", "U8", "[4294967296,4294967296]", "[0,0]") "}", 0, overflow);
  refuses("{" TENSOR("a", "U8", "[9007199254740992,2048]", "[0,1]") "}", 1, overflow);
  refuses("{" TENSOR("a", "F32", "[0,9007199254740992,9007199254740992]", "[0,0]") "}", 0, overflow);
  refuses("{" TENSOR("a", "F32", "[9007199254740992,9007199254740992,0]", "[0,0]") "}", 0, overflow);
}

static void test_the_data_has_no_hole_and_no_overlap(void **unused) {
  (void)unused;
#define A TENSOR("a", "U8", "[4]", "[0,4]")
  refuses("{" TENSOR("a", "U8", "[2]", "[1,3]") "}", 3,
          "tensor \"a\": data_offsets [1, 3] leave a hole: the tensors before it end at 0");
  refuses("{" TENSOR("b", "U8", "[1]", "[5,6]") "," A "}", 6,
          "tensor \"b\": data_offsets [5, 6] leave a hole: the tensors before it end at 4");
  refuses("{" TENSOR("b", "U8", "[2]", "[3,5]") "," A "}", 5,
          "tensor \"b\": data_offsets [3, 5] overlap those of \"a\", which end at 4");
  refuses("{" A "," TENSOR("b", "U8", "[4]", "[0,4]") "}", 4, "data_offsets [0, 4] overlap those of");
  refuses("{" A "," TENSOR("b", "U8", "[1]", "[1,2]") "}", 4, "\"b\": data_offsets [1, 2] overlap those of \"a\"");
  refuses("{" A "," TENSOR("b", "U8", "[0]", "[2,2]") "}", 4, "\"b\": data_offsets [2, 2] overlap those of \"a\"");
  refuses("{" A "}", 3, "\"a\": data_offsets [0, 4] reach beyond the file, which has 3 bytes of data: it is truncated");
  refuses("{" A "," TENSOR("b", "U8", "[0]", "[5,5]") "}", 4, "\"b\": data_offsets [5, 5] leave a hole");
  refuses("{" A "}", 6, "2 bytes follow where the last tensor ends, at 4");
  refuses("{}", 1, "1 bytes follow where the last tensor ends, at 0");
#undef A
}

static void test_bools_are_0_or_1(void **unused) {
  (void)unused;
  static const char header[] = "{" TENSOR("mask", "BOOL", "[3]", "[0,3]") "}\1\0\2";
  char file[HEADER_START + sizeof header] = {sizeof header - 4};
  memcpy(file + HEADER_START, header, sizeof header);
  refuses_bytes(file, sizeof file - 1, "tensor \"mask\": element 2 of a BOOL is 2, neither 0 nor 1");
}

static void test_every_prefix_of_a_file_is_refused(void **unused) {
  (void)unused;
  size_t size;
  orepa_archive *archive = reads("{" TENSOR("a", "F32", "[2]", "[0,8]") ",\"__metadata__\":{\"k\":\"v\"}}  ", 8);
  orepa_archive_free(archive);
  char *bytes = read_bytes(path_of("a.safetensors"), &size);
  for (size_t length = 0; length < size; length++) {
    file_reader file = file_in_memory("memory", bytes, length);
    assert_refused(!safetensors_read(&file, cpu), "memory", length < size - 8 && length >= 8 ? "is truncated" : "");
  }
  file_reader file = file_in_memory("memory", bytes, size);
  archive = safetensors_read(&file, cpu);
  assert_non_null(archive);
  orepa_archive_free(archive);
  free(bytes);
}

/* ---- messages and memory ---- */

static void test_names_in_messages_are_cut_and_printable(void **unused) {
  (void)unused;
  refuses("{\"a\\n\\u001b[31m\\u007fb\":1}", 0, "tensor \"a??[31m?b\": its entry");
  char header[600] = "{\"";
  for (int k = 0; k < 100; k++)
    strcat(header, k ? "\xe4\xb8\xad" : "x"); /* three bytes each */
  strcat(header, "\":1}");
  refuses(header, 0, "\xe4\xb8\xad...\": its entry in the header is not an object");
  refuses("{\"\xc3\xa9\\u00e9\\ud83\xc3\xa9\":1}", 0, "invalid escape near '\"??\\u00e9\\ud83?'");
}

static void test_claims_cost_nothing(void **unused) {
  (void)unused;
  orepa_reset_peak(cpu);
  size_t live = orepa_memory(cpu).live;
  refuses("{" TENSOR("a", "F32", "[1048576,1048576]", "[0,4398046511104]") "}", 8,
          "\"a\": data_offsets [0, 4398046511104] reach beyond the file, which has 8 bytes of data");
  refuses("{" TENSOR("a", "U8", "[8]", "[0,8]") "," TENSOR("b", "U8", "[9007199254740984]", "[8,9007199254740992]") "}",
          8, "\"b\": data_offsets [8, 9007199254740992] reach beyond the file");
  assert_int_equal(orepa_memory(cpu).peak, live);
}

static void test_without_memory_nothing_is_left(void **unused) {
  (void)unused;
  char header[200];
  enum { BYTES = 1 << 20 };
  snprintf(header, sizeof header, "{" TENSOR("a", "U8", "[8]", "[0,8]") "," TENSOR("b", "U8", "[%d]", "[8,%d]") "}",
           BYTES, BYTES + 8);
  const char *path = file_of(header, BYTES + 8);
  orepa_empty_cache(cpu);
  size_t live = orepa_memory(cpu).live;
  orepa_set_memory_limit(cpu, live + BYTES / 2);
  orepa_archive *archive = orepa_load_safetensors(path, cpu);
  bool memory = orepa_error_is_out_of_memory();
  orepa_set_memory_limit(cpu, 0);
  assert_refused(!archive, path, "tensor \"b\": out of memory: ");
  assert_true(memory);
  assert_int_equal(orepa_memory(cpu).live, live);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      IO_TEST(test_elements_are_little_endian_and_row_major),
      IO_TEST(test_the_headers_order_is_kept_whatever_the_datas),
      IO_TEST(test_headers_may_have_escapes_and_spaces_and_no_padding),
      IO_TEST(test_empty_tensors_lie_at_any_seam),
      IO_TEST(test_what_is_no_file_is_refused),
      IO_TEST(test_the_headers_length_is_checked_against_the_file),
      IO_TEST(test_other_formats_are_named),
      IO_TEST(test_a_length_that_looks_like_gzip_is_a_length),
      IO_TEST(test_the_header_is_one_object_of_valid_json),
      IO_TEST(test_depth_is_refused_before_it_costs_anything),
      IO_TEST(test_duplicate_keys_are_refused),
      IO_TEST(test_metadata_maps_strings_to_strings),
      IO_TEST(test_an_entry_has_its_three_fields_and_no_other),
      IO_TEST(test_shapes_and_offsets_are_lists_of_whole_numbers),
      IO_TEST(test_offsets_agree_with_type_and_shape),
      IO_TEST(test_the_data_has_no_hole_and_no_overlap),
      IO_TEST(test_bools_are_0_or_1),
      IO_TEST(test_every_prefix_of_a_file_is_refused),
      IO_TEST(test_names_in_messages_are_cut_and_printable),
      IO_TEST(test_claims_cost_nothing),
      IO_TEST(test_without_memory_nothing_is_left),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
