/* test_image.c: decoders and encoders of pictures where memory runs out, in several threads, and with hostile files.
 * What the pixels of each kind of file are, tests/spec/image_spec.lua asks. */
#define _GNU_SOURCE /* memmem */
#include "io_test.h"

#include <pthread.h>
#include <stdatomic.h>

#include "data/image.h"

static const char *seed(const char *name) {
  static char path[200];
  snprintf(path, sizeof path, "tests/fuzz/seeds/image/%s", name);
  return path;
}

static orepa_tensor *decode(const void *bytes, size_t size) {
  return orepa_decode_image("picture", bytes, size, NULL);
}

/* ---- memory that runs out: of the allocator, which has a limit, and of malloc, which the libraries call ---- */

static int calls_left = -1; /* until malloc fails, once; -1: never */
static atomic_long blocks;  /* of malloc's that are in use */

#ifdef __SANITIZE_ADDRESS__
enum { CAN_FAIL = 0 }; /* malloc is the sanitizer's */
#else
enum { CAN_FAIL = 1 };
void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t count, size_t bytes);
void *__libc_realloc(void *memory, size_t bytes);
void __libc_free(void *memory);
__attribute__((visibility("default"))) void *malloc(size_t bytes);
__attribute__((visibility("default"))) void *calloc(size_t count, size_t bytes);
__attribute__((visibility("default"))) void *realloc(void *memory, size_t bytes);
__attribute__((visibility("default"))) void free(void *memory);

static bool fails_now(void) {
  return calls_left >= 0 && calls_left-- == 0;
}
void *malloc(size_t bytes) {
  void *memory = fails_now() ? NULL : __libc_malloc(bytes);
  blocks += memory != NULL;
  return memory;
}
void *calloc(size_t count, size_t bytes) {
  void *memory = fails_now() ? NULL : __libc_calloc(count, bytes);
  blocks += memory != NULL;
  return memory;
}
void *realloc(void *memory, size_t bytes) {
  void *grown = fails_now() ? NULL : __libc_realloc(memory, bytes);
  blocks += grown && !memory;
  return grown;
}
void free(void *memory) {
  blocks -= memory != NULL;
  __libc_free(memory);
}
#endif

/* Each call of malloc fails in turn, until there is none left to fail. The first time the engine's own lists may grow;
 * the second time nothing is left behind. */
static void fail_each_call(bool (*try)(const void *what, size_t size), const void *what, size_t size) {
  for (int round = 0; round < 2 && CAN_FAIL; round++) {
    int calls = 0;
    for (bool untouched = false; !untouched; calls++) {
      long before = blocks;
      calls_left = calls;
      bool done = try(what, size);
      untouched = calls_left >= 0;
      calls_left = -1;
      assert_true(done || (!untouched && orepa_error_is_out_of_memory()));
      assert_true(round == 0 || blocks == before);
    }
    assert_true(calls > 3);
  }
}

static bool decodes(const void *bytes, size_t size) {
  orepa_tensor *t = decode(bytes, size);
  orepa_release(t);
  return t != NULL;
}

static void test_malloc_fails(void **unused) {
  (void)unused;
  static const char *const names[] = {"interlaced.png", "420.jpg", "progressive.jpg", "cmyk.jpg", "palette8.png"};
  for (size_t k = 0; k < sizeof names / sizeof *names; k++) {
    size_t size, live = orepa_memory_live();
    char *bytes = read_bytes(seed(names[k]), &size);
    assert_true(decodes(bytes, size));
    fail_each_call(decodes, bytes, size);
    assert_int_equal(orepa_memory_live(), live);
    free(bytes);
  }
}

static orepa_tensor *to_encode;

static bool encodes(const void *how, size_t unused) {
  (void)unused;
  void *bytes;
  size_t size;
  bool done = !orepa_encode_image(to_encode, how, &bytes, &size);
  assert_true(done ? bytes && size : !bytes && !size);
  free(bytes);
  return done;
}

static void test_malloc_fails_in_encoding(void **unused) {
  (void)unused;
  to_encode = random_tensor(OREPA_UINT8, cpu, 3, (const int64_t[]){3, 40, 50});
  for (int format = OREPA_IMAGE_PNG; format <= OREPA_IMAGE_JPEG; format++) {
    const orepa_image_encoding how = {.format = (orepa_image_format)format};
    assert_true(encodes(&how, 0));
    fail_each_call(encodes, &how, 0);
  }
  orepa_release(to_encode);
}

static void test_limit(void **unused) {
  (void)unused;
  size_t size, live = orepa_memory_live(), succeeded = 0;
  char *bytes = read_bytes(seed("interlaced16.png"), &size);
  for (size_t more = 0; more < 4096; more += 32) {
    orepa_empty_cache(cpu);
    orepa_set_memory_limit(cpu, live + more + 1);
    bool done = decodes(bytes, size);
    assert_true(done || orepa_error_is_out_of_memory());
    assert_true(done >= (succeeded > 0));
    succeeded += done;
    assert_int_equal(orepa_memory_live(), live);
  }
  orepa_set_memory_limit(cpu, 0);
  assert_true(succeeded > 0 && succeeded < 4096 / 32);
  free(bytes);
}

/* ---- several threads ---- */

typedef struct {
  pthread_t thread;
  const char *bytes;
  size_t size;
  const unsigned char *wanted;
  size_t count;
  int differing;
} decoding;

static void *decode_often(void *argument) {
  decoding *d = argument;
  unsigned char *found = malloc(d->count);
  for (int k = 0; found && k < 200; k++) {
    orepa_tensor *t = decode(d->bytes, d->size);
    d->differing += !t || orepa_to_host(t, found, d->count) || memcmp(found, d->wanted, d->count) != 0;
    orepa_release(t);
    d->differing += decodes(d->bytes, d->size / 2); /* cut in the middle */
  }
  d->differing += !found;
  free(found);
  return NULL;
}

static void test_threads(void **unused) {
  (void)unused;
  static const char *const names[] = {"rgb.png", "progressive.jpg", "palette8.png", "cmyk.jpg"};
  enum { COUNT = sizeof names / sizeof *names };
  decoding all[COUNT] = {0};
  for (int k = 0; k < COUNT; k++) {
    char *bytes = read_bytes(seed(names[k]), &all[k].size);
    orepa_tensor *t = must(decode(bytes, all[k].size));
    all[k].count = bytes_of(t);
    unsigned char *wanted = malloc(all[k].count);
    assert_true(wanted && !orepa_to_host(t, wanted, all[k].count));
    orepa_release(t);
    all[k].bytes = bytes;
    all[k].wanted = wanted;
  }
  for (int k = 0; k < COUNT; k++)
    assert_int_equal(pthread_create(&all[k].thread, NULL, decode_often, &all[k]), 0);
  for (int k = 0; k < COUNT; k++) {
    assert_int_equal(pthread_join(all[k].thread, NULL), 0);
    assert_int_equal(all[k].differing, 0);
    free((void *)all[k].bytes);
    free((void *)all[k].wanted);
  }
}

/* ---- hostile files ---- */

static void test_claims(void **unused) {
  (void)unused;
  size_t size;
  char *bytes = read_bytes(seed("420.jpg"), &size);
  char *frame = memmem(bytes, size, "\xff\xc0\0\x11\x08", 5);
  assert_non_null(frame);
  memcpy(frame + 5, "\xff\xdc\xff\xdc", 4); /* 65500 x 65500 */
  assert_refused(!decode(bytes, size), "picture", "claims 65500 x 65500 pixels, more than its");
  memcpy(frame + 5, "\xff\xff\xff\xff", 4);
  assert_refused(!decode(bytes, size), "picture", "is damaged");
  free(bytes);
}

/* The first scan of a progressive file, again and again: each is a pass over all coefficients. */
static void test_scans(void **unused) {
  (void)unused;
  enum { TIMES = 600 };
  size_t size;
  char *bytes = read_bytes(seed("progressive.jpg"), &size);
  char *first = memmem(bytes, size, "\xff\xda", 2),
       *behind = memmem(first, size - (size_t)(first - bytes), "\xff\xc4", 2);
  assert_true(first && behind);
  size_t scan = (size_t)(behind - first), longer = size + TIMES * scan;
  char *many = malloc(longer);
  assert_non_null(many);
  memcpy(many, bytes, size - 2);
  for (size_t k = 0; k < TIMES; k++)
    memcpy(many + size - 2 + k * scan, first, scan);
  memcpy(many + longer - 2, "\xff\xd9", 2);
  assert_refused(!decode(many, longer), "picture", "has more than 500 scans");
  free(many);
  free(bytes);
}

static void test_orientation(void **unused) {
  (void)unused;
  static const unsigned char little[] = "II*\0\10\0\0\0\2\0\1\1\3\0\1\0\0\0\5\0\0\0\22\1\3\0\1\0\0\0\6\0\0\0";
  static const unsigned char big[] = "MM\0*\0\0\0\10\0\1\1\22\0\3\0\0\0\1\0\10\0\0";
  assert_int_equal(image_orientation(little, sizeof little), 6);
  assert_int_equal(image_orientation(big, sizeof big), 8);
  for (size_t size = 0; size < 20; size++) { /* memory of its own, for the sanitizer to watch */
    unsigned char *cut = malloc(size + 1);
    assert_non_null(cut);
    memcpy(cut, big, size);
    assert_int_equal(image_orientation(cut, size), 1);
    free(cut);
  }
  unsigned char broken[sizeof little];
  static const struct {
    int at;
    unsigned char byte;
  } changes[] = {{0, 'J'}, {2, '+'}, {24, 4}, {30, 0}, {30, 9}, {4, 200}, {7, 0xff}};
  for (size_t k = 0; k < sizeof changes / sizeof *changes; k++) {
    memcpy(broken, little, sizeof little);
    broken[changes[k].at] = changes[k].byte;
    assert_int_equal(image_orientation(broken, sizeof broken), 1);
  }
}

/* ---- the C interface ---- */

static void test_interface(void **unused) {
  (void)unused;
  orepa_tensor *t = random_tensor(OREPA_UINT8, cpu, 3, (const int64_t[]){3, 4, 5});
  const orepa_image_encoding png = {0}, nothing = {.format = (orepa_image_format)7};
  void *bytes;
  size_t size;
  assert_message(orepa_encode_image(t, &png, &bytes, &size), "PNG or JPEG");
  assert_message(orepa_encode_image(t, &nothing, &bytes, &size), "PNG or JPEG");
  const char *path = path_of("a.png");
  assert_int_equal(orepa_save_image(path, t, &png), 0);
  orepa_tensor *back = must(orepa_load_image(path, NULL));
  assert_same(t, back);
  assert_refused(!orepa_load_image(path, &(orepa_image_options){.channels = 2}), path, "2 channels");
  assert_refused(!orepa_load_image(path_of("none"), NULL), path_of("none"), "cannot be opened");
  assert_refused(orepa_save_image(path, t, &(orepa_image_encoding){.quality = 200}), path, "quality 200");
  orepa_release(back);
  orepa_release(t);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      IO_TEST(test_malloc_fails), IO_TEST(test_malloc_fails_in_encoding),
      IO_TEST(test_limit),        IO_TEST(test_threads),
      IO_TEST(test_claims),       IO_TEST(test_scans),
      IO_TEST(test_orientation),  IO_TEST(test_interface),
  };
  return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
