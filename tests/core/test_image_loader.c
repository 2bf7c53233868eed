/* test_image_loader.c: batches of images made by threads have the bits of those made without. Run under the thread
 * sanitizer too. */
#include "engine_test.h"

#include "orepa_data.h"

enum { PATIENCE = 60 /* seconds */ };

static void assert_failed(int status, const char *words) {
  assert_int_equal(status, -1);
  if (!strstr(orepa_error(), words))
    fail_msg("the message is \"%s\", without \"%s\"", orepa_error(), words);
}

enum { COUNT = 103, BATCH = 10 };

static void assert_same(orepa_tensor *a, orepa_tensor *b) {
  size_t bytes = (size_t)orepa_count(a) * orepa_dtype_size(orepa_tensor_dtype(a));
  char *both = malloc(2 * bytes + 1);
  assert_non_null(both);
  assert_int_equal(orepa_count(a), orepa_count(b));
  done(orepa_to_host(a, both, bytes));
  done(orepa_to_host(b, both + bytes, bytes));
  assert_memory_equal(both, both + bytes, bytes);
  free(both);
}

/* Batch k as the functions without threads make it. */
static void assert_batch(const orepa_image_epochs *epochs, orepa_tensor *images, orepa_tensor *labels, uint64_t epoch,
                         int64_t k, const orepa_image_batch_pair *pair) {
  orepa_tensor *order = must(epochs->shuffle ? orepa_permutation(COUNT, epochs->seed, epoch)
                                             : orepa_arange(OREPA_INT64, CPU, 0, 1, COUNT));
  int64_t last = (k + 1) * BATCH < COUNT ? (k + 1) * BATCH : COUNT;
  orepa_tensor *indices = must(orepa_slice(order, 0, k * BATCH, last, 1));
  orepa_image_transform transform = epochs->transform;
  transform.epoch = epoch;
  orepa_tensor *x = must(orepa_image_batch(images, indices, &transform)), *y = must(orepa_label_batch(labels, indices));
  assert_same(x, pair->images);
  assert_same(y, pair->labels);
  orepa_release(x);
  orepa_release(y);
  orepa_release(indices);
  orepa_release(order);
}

static void check_epoch(const orepa_image_epochs *epochs, orepa_tensor *images, orepa_tensor *labels,
                        orepa_loader *loader, uint64_t epoch) {
  const int64_t batches = epochs->drop_last ? COUNT / BATCH : COUNT / BATCH + 1;
  assert_int_equal(orepa_loader_start(loader, epoch), batches);
  for (int64_t k = 0; k < batches; k++) {
    void *p = NULL;
    if (orepa_loader_take(loader, PATIENCE, &p) != 1)
      fail_msg("%s", orepa_error());
    assert_batch(epochs, images, labels, epoch, k, p);
    orepa_image_batch_pair_free(p);
  }
}

static void check_images(orepa_dtype dtype) {
  orepa_tensor *floats = numbered(CPU, SHAPE(COUNT, 3, 9, 8), 0);
  for (int64_t n = 0; n < COUNT; n++) { /* bytes of many values */
    orepa_tensor *one = must(orepa_select(floats, 0, n));
    float pixels[3 * 9 * 8];
    done(orepa_to_host(one, pixels, sizeof pixels));
    for (size_t k = 0; k < sizeof pixels / sizeof *pixels; k++)
      pixels[k] = (float)((int)pixels[k] * 37 % 251);
    orepa_tensor *mixed = must(orepa_from_host(OREPA_FLOAT32, CPU, SHAPE(3, 9, 8), pixels));
    done(orepa_copy_(one, mixed));
    orepa_release(mixed);
    orepa_release(one);
  }
  orepa_tensor *images = must(orepa_to(floats, dtype, CPU)),
               *labels = must(orepa_arange(OREPA_INT64, CPU, 0, 1, COUNT));
  const float mean[] = {0.1f, 0.2f, 0.3f}, deviation[] = {0.5f, 0.25f, 2};
  for (int way = 0; way < 8; way++) {
    orepa_image_epochs epochs = {
        .batch_size = BATCH, .shuffle = way & 1, .drop_last = way & 2, .seed = 5, .transform = {.seed = 6}};
    if (way & 4) {
      float *channels = malloc(sizeof mean + sizeof deviation); /* the loader keeps numbers, not pointers */
      assert_non_null(channels);
      memcpy(channels, mean, sizeof mean);
      memcpy(channels + 3, deviation, sizeof deviation);
      epochs.transform = (orepa_image_transform){2, {7, 7}, true, true, 3, channels, channels + 3, 6, 0};
    }
    orepa_loader *loader = orepa_image_loader(images, labels, &epochs, 1 + way % 3, 1 + way % 4);
    if (!loader)
      fail_msg("%s", orepa_error());
    if (way & 4) {
      memset((float *)epochs.transform.mean, 0, sizeof mean + sizeof deviation);
      free((float *)epochs.transform.mean);
      epochs.transform.mean = mean;
      epochs.transform.deviation = deviation;
    }
    for (uint64_t epoch = 1; epoch <= 2; epoch++)
      check_epoch(&epochs, images, labels, loader, epoch);
    orepa_loader_start(loader, 3); /* and ends in the middle */
    orepa_loader_close(loader);
  }
  orepa_release(floats);
  orepa_release(images);
  orepa_release(labels);
}

static void test_images_have_the_bits_of_batches_without_threads(void **unused) {
  (void)unused;
  check_images(OREPA_UINT8);
  check_images(OREPA_FLOAT32);
}

static void test_image_loaders_refuse(void **unused) {
  (void)unused;
  orepa_tensor *images = full(CPU, SHAPE(4, 5, 5), 1), *labels = must(orepa_arange(OREPA_INT64, CPU, 0, 1, 3));
  orepa_image_epochs epochs = {.batch_size = 2};
  assert_null(orepa_image_loader(images, labels, &epochs, 1, 1));
  assert_failed(-1, "not as many");
  orepa_tensor *four = must(orepa_arange(OREPA_INT64, CPU, 0, 1, 4));
  epochs.batch_size = 0;
  assert_null(orepa_image_loader(images, four, &epochs, 1, 1));
  assert_failed(-1, "a batch of 0 images");
  epochs.batch_size = 2;
  assert_null(orepa_image_loader(images, four, &epochs, 0, 1));
  epochs.transform.crop[0] = epochs.transform.crop[1] = 9;
  orepa_loader *loader = orepa_image_loader(images, four, &epochs, 2, 1);
  assert_non_null(loader);
  orepa_loader_start(loader, 1);
  void *none;
  assert_failed(orepa_loader_take(loader, PATIENCE, &none), "a crop of 9x9");
  orepa_loader_close(loader);
  orepa_release(images);
  orepa_release(labels);
  orepa_release(four);
}

/* ---- random numbers of samples ---- */

static void test_samples_have_their_own_states(void **unused) {
  (void)unused;
  const orepa_rng one = orepa_sample_rng(1, 2, 3);
  assert_int_equal(one.draws, 0);
  assert_int_equal(one.seed, orepa_sample_rng(1, 2, 3).seed);
  assert_int_not_equal(one.seed, orepa_sample_rng(2, 2, 3).seed);
  assert_int_not_equal(one.seed, orepa_sample_rng(1, 3, 3).seed);
  assert_int_not_equal(one.seed, orepa_sample_rng(1, 2, 4).seed);
  assert_int_not_equal(one.seed, orepa_sample_rng(1, 2, -3).seed);
}

/* ---- the run ---- */

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, remember_live, nothing_leaks)
  const struct CMUnitTest tests[] = {
      TEST(test_images_have_the_bits_of_batches_without_threads),
      TEST(test_image_loaders_refuse),
      TEST(test_samples_have_their_own_states),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
