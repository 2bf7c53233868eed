/* test_data.c: orders of an epoch, batches against plain loops, what batches may depend on, and statistics. */
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

#include "orepa_data.h"

static const orepa_device *cpu;

/* A call failed, and its message has `words` in it. */
static void assert_message(bool failed, const char *words) {
  assert_true(failed);
  if (!strstr(orepa_error(), words))
    fail_msg("the message is \"%s\", without \"%s\"", orepa_error(), words);
}

#define assert_shape(t, ...)                                                                                           \
  do {                                                                                                                 \
    const int64_t shape_[] = {__VA_ARGS__};                                                                            \
    assert_int_equal(orepa_rank(t), (int)(sizeof shape_ / sizeof *shape_));                                            \
    assert_memory_equal(orepa_shape(t), shape_, sizeof shape_);                                                        \
  } while (0)

static void assert_elements(orepa_tensor *t, const void *elements, size_t bytes) {
  if (!t)
    fail_msg("%s", orepa_error());
  char *found = malloc(bytes + 1);
  assert_non_null(found);
  assert_int_equal(orepa_to_host(t, found, bytes), 0);
  assert_memory_equal(found, elements, bytes);
  free(found);
}

static bool same(orepa_tensor *a, orepa_tensor *b) {
  size_t bytes = (size_t)orepa_count(a) * orepa_dtype_size(orepa_tensor_dtype(a));
  char *both = malloc(2 * bytes + 1);
  assert_non_null(both);
  assert_int_equal(orepa_to_host(a, both, bytes), 0);
  assert_int_equal(orepa_to_host(b, both + bytes, bytes), 0);
  bool equal = !memcmp(both, both + bytes, bytes);
  free(both);
  return equal;
}

static uint32_t state = 1;
static uint32_t next_random(void) {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

/* ---- orders ---- */

static void read_order(int64_t count, uint64_t seed, uint64_t epoch, int64_t *order) {
  orepa_tensor *t = orepa_permutation(count, seed, epoch);
  assert_non_null(t);
  assert_shape(t, count);
  assert_int_equal(orepa_tensor_dtype(t), OREPA_INT64);
  assert_int_equal(orepa_to_host(t, order, (size_t)count * sizeof *order), 0);
  orepa_release(t);
}

static void test_permutation(void **unused) {
  (void)unused;
  enum { COUNT = 10000 };
  static int64_t order[COUNT], other[COUNT];
  static bool seen[COUNT];
  read_order(COUNT, 5, 3, order);
  for (int k = 0; k < COUNT; k++) {
    assert_in_range(order[k], 0, COUNT - 1);
    assert_false(seen[order[k]]);
    seen[order[k]] = true;
  }
  read_order(COUNT, 5, 3, other);
  assert_memory_equal(order, other, sizeof order);
  for (int change = 0; change < 2; change++) {
    int equal = 0;
    read_order(COUNT, 5 + change, 4 - change, other);
    for (int k = 0; k < COUNT; k++)
      equal += order[k] == other[k];
    assert_true(equal < 10); /* about one is expected */
  }
  read_order(0, 1, 1, order);
  read_order(1, 1, 1, order);
  assert_int_equal(order[0], 0);
  /* the same on every machine, and in every version */
  read_order(10, 1, 2, order);
  const int64_t known[10] = {8, 9, 6, 7, 5, 3, 1, 2, 0, 4};
  assert_memory_equal(order, known, sizeof known);
  assert_message(!orepa_permutation(-1, 0, 0), "permutation: of -1 numbers");
  assert_message(!orepa_permutation(INT64_MAX, 0, 0), "too large");
}

/* All 24 orders of four numbers are about equally frequent: chi-square, 23 degrees of freedom; 55 is exceeded once in
 * 5000. */
static void test_permutation_is_fair(void **unused) {
  (void)unused;
  enum { EPOCHS = 24000 };
  int counts[256] = {0}, orders = 0;
  double chi = 0;
  for (uint64_t epoch = 0; epoch < EPOCHS; epoch++) {
    int64_t order[4];
    read_order(4, 11, epoch, order);
    counts[order[0] | order[1] << 2 | order[2] << 4 | order[3] << 6]++;
  }
  for (int k = 0; k < 256; k++)
    if (counts[k]) {
      orders++;
      chi += (counts[k] - EPOCHS / 24.0) * (counts[k] - EPOCHS / 24.0) / (EPOCHS / 24.0);
    }
  assert_int_equal(orders, 24);
  assert_true(chi < 55);
}

/* ---- batches against plain loops ---- */

/* Logical element (n, c, y, x) of images in a host copy of logical order, as a double; (N, C, H, W). */
typedef struct {
  orepa_tensor *tensor;
  int64_t count, channels, height, width;
  double *pixels; /* x/255 for bytes */
} image_copy;

static image_copy copy_images(orepa_tensor *t) {
  const int64_t *shape = orepa_shape(t);
  const int rank = orepa_rank(t);
  image_copy copy = {t, shape[0], rank == 4 ? shape[1] : 1, shape[rank - 2], shape[rank - 1], NULL};
  size_t count = (size_t)orepa_count(t), size = orepa_dtype_size(orepa_tensor_dtype(t));
  void *raw = malloc(count * size + 1);
  copy.pixels = malloc(count * sizeof *copy.pixels + 1);
  assert_non_null(raw);
  assert_non_null(copy.pixels);
  assert_int_equal(orepa_to_host(t, raw, count * size), 0);
  for (size_t k = 0; k < count; k++)
    copy.pixels[k] = size == 1 ? ((uint8_t *)raw)[k] / 255.0 : (double)((float *)raw)[k];
  free(raw);
  return copy;
}

/* The pixel of an image, or the mean outside it. */
static double pixel(const image_copy *images, int64_t n, int64_t c, int64_t y, int64_t x, double mean) {
  if (y < 0 || x < 0 || y >= images->height || x >= images->width)
    return mean;
  return images->pixels[((n * images->channels + c) * images->height + y) * images->width + x];
}

/* Whether sample[c, y, x] shows image n from (top, left) on. */
static bool shows(const image_copy *images, int64_t n, const orepa_image_transform *t, int64_t height, int64_t width,
                  const float *sample, int64_t top, int64_t left, bool mirrored) {
  for (int64_t c = 0; c < images->channels; c++)
    for (int64_t y = 0; y < height; y++)
      for (int64_t x = 0; x < width; x++) {
        double mean = t->mean ? t->mean[c] : 0, deviation = t->deviation ? t->deviation[c] : 1;
        double p = pixel(images, n, c, top + y, left + (mirrored ? width - 1 - x : x), mean);
        double wanted = (p - mean) / deviation, found = sample[(c * height + y) * width + x];
        if (fabs(wanted - found) > 1e-6 * (1 + fabs(wanted)))
          return false;
      }
  return true;
}

static orepa_tensor *random_images(orepa_dtype dtype, int rank, const int64_t *shape) {
  int64_t count = 1;
  for (int d = 0; d < rank; d++)
    count *= shape[d];
  uint8_t *bytes = malloc((size_t)count + 1);
  float *floats = malloc((size_t)count * sizeof *floats + 1);
  assert_non_null(bytes);
  assert_non_null(floats);
  for (int64_t k = 0; k < count; k++) {
    bytes[k] = (uint8_t)next_random();
    floats[k] = (float)(next_random() % 100000) * 1e-5f;
  }
  orepa_tensor *t =
      orepa_from_host(dtype, cpu, rank, shape, dtype == OREPA_UINT8 ? (const void *)bytes : (const void *)floats);
  assert_non_null(t);
  free(bytes);
  free(floats);
  return t;
}

static orepa_tensor *positions(int64_t count, const int64_t *values) {
  orepa_tensor *t = orepa_from_host(OREPA_INT64, cpu, 1, &count, values);
  assert_non_null(t);
  return t;
}

static float *read_batch(orepa_tensor *batch) {
  if (!batch)
    fail_msg("%s", orepa_error());
  assert_int_equal(orepa_tensor_dtype(batch), OREPA_FLOAT32);
  assert_true(orepa_is_contiguous(batch));
  size_t bytes = (size_t)orepa_count(batch) * sizeof(float);
  float *samples = malloc(bytes + 1);
  assert_non_null(samples);
  assert_int_equal(orepa_to_host(batch, samples, bytes), 0);
  return samples;
}

/* The image shown whole, and through every window that evaluation chooses. */
static void check_evaluation(orepa_tensor *t) {
  static const float mean[4] = {0.25f, 0.5f, -0.75f, 0}, deviation[4] = {0.5f, 1.25f, 0.01f, 3};
  static const struct {
    int64_t padding, crop[2], top, left;
  } windows[] = {{0, {0, 0}, 0, 0}, {0, {6, 5}, 0, 0},  {0, {4, 3}, 1, 1},       {0, {3, 4}, 1, 0},
                 {0, {1, 1}, 2, 2}, {3, {0, 0}, 0, 0},  {1, {8, 7}, -1, -1},     {5, {11, 12}, -3, -4},
                 {2, {3, 0}, 1, 0}, {1, {0, 7}, 0, -1}, {40, {70, 60}, -32, -28}};
  const int64_t chosen[] = {4, 0, 4, 2, 3, 1};
  image_copy images = copy_images(t);
  orepa_tensor *indices = positions(6, chosen);
  for (size_t k = 0; k < 2 * sizeof windows / sizeof *windows; k++) {
    orepa_image_transform transform = {.padding = windows[k / 2].padding, .flip = true, .seed = k};
    memcpy(transform.crop, windows[k / 2].crop, sizeof transform.crop);
    if (k % 2) {
      transform.channels = (int)images.channels;
      transform.mean = mean;
      transform.deviation = deviation;
    }
    int64_t height = transform.crop[0] ? transform.crop[0] : 6, width = transform.crop[1] ? transform.crop[1] : 5;
    orepa_tensor *batch = orepa_image_batch(t, indices, &transform);
    float *samples = read_batch(batch);
    assert_shape(batch, 6, images.channels, height, width);
    for (int s = 0; s < 6; s++)
      assert_true(shows(&images, chosen[s], &transform, height, width, samples + s * images.channels * height * width,
                        windows[k / 2].top, windows[k / 2].left, false));
    free(samples);
    orepa_release(batch);
  }
  free(images.pixels);
  orepa_release(indices);
}

static void test_evaluation(void **unused) {
  (void)unused;
  for (int dtype = 0; dtype < 2; dtype++)
    for (int64_t channels = 0; channels <= 4; channels++) {
      const int64_t shape[4] = {5, channels, 6, 5}, plain[3] = {5, 6, 5};
      orepa_dtype type = dtype ? OREPA_FLOAT32 : OREPA_UINT8;
      orepa_tensor *t = channels ? random_images(type, 4, shape) : random_images(type, 3, plain);
      check_evaluation(t);
      orepa_release(t);
    }
}

/* Any strides: axes in another order, every second pixel, one image for all. */
static void test_strides(void **unused) {
  (void)unused;
  for (int dtype = 0; dtype < 2; dtype++) {
    const int64_t turned[4] = {5, 6, 3, 5}, wide[4] = {9, 3, 11, 10}, one[4] = {1, 3, 6, 5}, many[4] = {5, 3, 6, 5};
    orepa_dtype type = dtype ? OREPA_FLOAT32 : OREPA_UINT8;
    orepa_tensor *a = random_images(type, 4, turned), *b = random_images(type, 4, wide),
                 *c = random_images(type, 4, one);
    orepa_tensor *views[] = {orepa_permute(a, (const int[]){3, 2, 1, 0}), orepa_slice(b, 0, 0, 9, 2),
                             orepa_expand(c, 4, many), NULL, NULL};
    views[3] = orepa_slice(views[1], 2, 0, 11, 2);
    views[4] = orepa_slice(views[3], 3, 1, 10, 2);
    check_evaluation(views[0]);
    check_evaluation(views[2]);
    check_evaluation(views[4]);
    for (int k = 0; k < 5; k++)
      orepa_release(views[k]);
    orepa_release(a);
    orepa_release(b);
    orepa_release(c);
  }
}

static void test_bytes_are_rounded_once(void **unused) {
  (void)unused;
  const float mean = 0.2860406f, deviation = 0.35302424f;
  uint8_t bytes[256];
  for (int k = 0; k < 256; k++)
    bytes[k] = (uint8_t)k;
  orepa_tensor *t = orepa_from_host(OREPA_UINT8, cpu, 3, (const int64_t[]){1, 16, 16}, bytes);
  orepa_tensor *first = positions(1, (const int64_t[]){0});
  orepa_image_transform transform = {.channels = 1, .mean = &mean, .deviation = &deviation};
  orepa_tensor *batch = orepa_image_batch(t, first, &transform);
  float *samples = read_batch(batch);
  for (int k = 0; k < 256; k++)
    assert_true(samples[k] == (float)((k / 255.0 - (double)mean) / (double)deviation));
  free(samples);
  orepa_release(t);
  orepa_release(first);
  orepa_release(batch);
}

/* ---- augmentation ---- */

/* Every window and both orientations come up, about equally often, and nothing else does. */
static void test_windows_are_fair(void **unused) {
  (void)unused;
  enum { PADDING = 2, HEIGHT = 5, WIDTH = 6, TOPS = 6, LEFTS = 8, CELLS = 2 * TOPS * LEFTS, COUNT = 200 * CELLS };
  const int64_t one[3] = {1, HEIGHT, WIDTH}, many[3] = {COUNT, HEIGHT, WIDTH}, height = 4, width = 3;
  uint8_t bytes[HEIGHT * WIDTH];
  for (int k = 0; k < HEIGHT * WIDTH; k++)
    bytes[k] = (uint8_t)(k + 1);
  orepa_tensor *t = orepa_from_host(OREPA_UINT8, cpu, 3, one, bytes), *same_image = orepa_expand(t, 3, many);
  orepa_tensor *indices = orepa_permutation(COUNT, 0, 0), *batch;
  orepa_image_transform transform = {
      .padding = PADDING, .crop = {height, width}, .augment = true, .seed = 77, .epoch = 5};
  image_copy images = copy_images(t);
  for (int flip = 0; flip < 2; flip++) {
    int counts[2][TOPS][LEFTS] = {0}, found = 0;
    double chi = 0, expected = COUNT / (double)(flip ? CELLS : CELLS / 2);
    transform.flip = flip;
    batch = orepa_image_batch(same_image, indices, &transform);
    float *samples = read_batch(batch);
    for (int k = 0; k < COUNT; k++)
      for (int cell = 0; cell < CELLS; cell++) {
        int mirrored = cell % 2, top = cell / 2 % TOPS, left = cell / 2 / TOPS;
        if (shows(&images, 0, &transform, height, width, samples + k * height * width, top - PADDING, left - PADDING,
                  mirrored)) {
          counts[mirrored][top][left]++;
          found++;
          break;
        }
      }
    assert_int_equal(found, COUNT);
    for (int cell = 0; cell < CELLS; cell++) {
      int count = counts[cell % 2][cell / 2 % TOPS][cell / 2 / TOPS];
      if (flip || cell % 2 == 0)
        chi += (count - expected) * (count - expected) / expected;
      else
        assert_int_equal(count, 0);
    }
    assert_true(chi < (flip ? 150 : 90)); /* 95 and 47 degrees of freedom: exceeded once in several thousand */
    free(samples);
    orepa_release(batch);
  }
  free(images.pixels);
  orepa_release(t);
  orepa_release(same_image);
  orepa_release(indices);
}

/* Samples of other types and channels show a window of their own image. */
static void test_augmented_colours(void **unused) {
  (void)unused;
  const int64_t shape[4] = {40, 3, 7, 5}, height = 6, width = 7;
  const float mean[3] = {0.5f, 0.25f, 0.125f}, deviation[3] = {0.5f, 2, 0.25f};
  for (int dtype = 0; dtype < 2; dtype++) {
    orepa_tensor *t = random_images(dtype ? OREPA_FLOAT32 : OREPA_UINT8, 4, shape);
    orepa_tensor *indices = orepa_permutation(40, 3, 0);
    orepa_image_transform transform = {3, {height, width}, true, true, 3, mean, deviation, 9, 1};
    orepa_tensor *batch = orepa_image_batch(t, indices, &transform);
    float *samples = read_batch(batch);
    int64_t order[40];
    read_order(40, 3, 0, order);
    image_copy images = copy_images(t);
    for (int k = 0; k < 40; k++) {
      bool found = false;
      for (int cell = 0; cell < 2 * 8 * 5 && !found; cell++)
        found = shows(&images, order[k], &transform, height, width, samples + k * 3 * height * width, cell / 2 / 5 - 3,
                      cell / 2 % 5 - 3, cell % 2);
      assert_true(found);
    }
    free(images.pixels);
    free(samples);
    orepa_release(batch);
    orepa_release(indices);
    orepa_release(t);
  }
}

/* A sample depends on seed, epoch and its index: not on its batch, its place in it, or the number of threads. */
static void test_samples_are_their_own(void **unused) {
  (void)unused;
  enum { COUNT = 600 };
  const int64_t shape[3] = {COUNT, 28, 28};
  orepa_tensor *t = random_images(OREPA_UINT8, 3, shape), *order = orepa_permutation(COUNT, 1, 1);
  orepa_image_transform transform = {.padding = 3, .flip = true, .augment = true, .seed = 21, .epoch = 4};
  int threads = orepa_threads();
  orepa_tensor *all = orepa_image_batch(t, order, &transform);
  for (int count = 1; count <= 5; count += 2) {
    orepa_set_threads(count);
    orepa_tensor *again = orepa_image_batch(t, order, &transform);
    assert_true(same(all, again));
    orepa_release(again);
  }
  orepa_set_threads(threads);
  for (int64_t first = 0, last; first < COUNT; first = last) { /* batches of 1, 2, 3, ... */
    last = first + (first < 70 ? first + 1 : 100) < COUNT ? first + (first < 70 ? first + 1 : 100) : COUNT;
    orepa_tensor *some = orepa_slice(order, 0, first, last, 1), *wanted = orepa_slice(all, 0, first, last, 1);
    orepa_tensor *batch = orepa_image_batch(t, some, &transform);
    assert_true(same(batch, wanted));
    orepa_release(some);
    orepa_release(wanted);
    orepa_release(batch);
  }
  for (int change = 0; change < 2; change++) {
    orepa_image_transform other = transform;
    *(change ? &other.seed : &other.epoch) += 1;
    orepa_tensor *batch = orepa_image_batch(t, order, &other);
    assert_false(same(all, batch));
    orepa_release(batch);
  }
  orepa_release(all);
  orepa_release(order);
  orepa_release(t);
}

static void test_empty_batches(void **unused) {
  (void)unused;
  orepa_image_transform transform = {.padding = 1, .crop = {1, 2}, .augment = true};
  orepa_tensor *none = positions(0, NULL), *two = positions(2, (const int64_t[]){0, 1});
  orepa_tensor *t = random_images(OREPA_UINT8, 3, (const int64_t[]){2, 4, 4});
  orepa_tensor *batch = orepa_image_batch(t, none, &transform);
  assert_shape(batch, 0, 1, 1, 2);
  orepa_release(batch);
  orepa_release(t);
  t = random_images(OREPA_FLOAT32, 4, (const int64_t[]){2, 3, 0, 4}); /* nothing but padding */
  batch = orepa_image_batch(t, two, &transform);
  assert_elements(batch, (const float[12]){0}, 48);
  orepa_release(batch);
  transform = (orepa_image_transform){0};
  batch = orepa_image_batch(t, two, &transform);
  assert_shape(batch, 2, 3, 0, 4);
  orepa_release(batch);
  orepa_release(t);
  t = random_images(OREPA_UINT8, 4, (const int64_t[]){2, 0, 4, 4});
  batch = orepa_image_batch(t, two, &transform);
  assert_shape(batch, 2, 0, 4, 4);
  orepa_release(batch);
  orepa_release(t);
  orepa_release(none);
  orepa_release(two);
}

static void test_batch_errors(void **unused) {
  (void)unused;
  const float mean[2] = {0, NAN}, zero[2] = {1, 0};
  const orepa_device *ref = orepa_device_by_name("ref");
  const int64_t shape[4] = {3, 2, 4, 5}, four = 4;
  orepa_tensor *t = random_images(OREPA_UINT8, 4, shape), *far = orepa_empty(OREPA_UINT8, ref, 4, shape);
  orepa_tensor *ints = orepa_empty(OREPA_INT32, cpu, 4, shape), *flat = orepa_empty(OREPA_UINT8, cpu, 1, &four);
  orepa_tensor *i = positions(2, (const int64_t[]){0, 2}), *far_i = orepa_empty(OREPA_INT64, ref, 1, &four);
  orepa_tensor *high = positions(3, (const int64_t[]){0, 3, 9}), *low = positions(2, (const int64_t[]){-1, 0});
  orepa_image_transform good = {0}, bad;
  assert_message(!orepa_image_batch(far, i, &good), "images must be on the device 'cpu', not on 'ref'");
  assert_message(!orepa_image_batch(t, far_i, &good), "indices must be on the device 'cpu', not on 'ref'");
  assert_message(!orepa_image_batch(ints, i, &good), "images must be uint8 or float32, not int32 3x2x4x5");
  assert_message(!orepa_image_batch(flat, i, &good), "images must be (N, H, W) or (N, C, H, W), not uint8 4");
  assert_message(!orepa_image_batch(t, flat, &good), "indices must be int64 (B), not uint8 4");
  assert_message(!orepa_image_batch(t, high, &good), "index 3 (number 2 of 3) is not in the range of 3 images");
  assert_message(!orepa_image_batch(t, low, &good), "index -1 (number 1 of 2) is not in the range of 3 images");
  bad = (orepa_image_transform){.padding = -1};
  assert_message(!orepa_image_batch(t, i, &bad), "a padding of -1 around images of 4x5");
  bad = (orepa_image_transform){.padding = INT64_MAX};
  assert_message(!orepa_image_batch(t, i, &bad), "a padding of 9223372036854775807 around images of 4x5");
  bad = (orepa_image_transform){.padding = 1 << 30, .crop = {1, 1}};
  assert_message(!orepa_image_batch(t, i, &bad), "2147483647 pixels a side");
  bad = (orepa_image_transform){.padding = 1, .crop = {7, 5}};
  assert_message(!orepa_image_batch(t, i, &bad), "a crop of 7x5 from images of 4x5, which are 6x7 with a padding of 1");
  bad = (orepa_image_transform){.crop = {4, -5}};
  assert_message(!orepa_image_batch(t, i, &bad), "a crop of 4x-5");
  bad = (orepa_image_transform){.channels = 1, .mean = mean};
  assert_message(!orepa_image_batch(t, i, &bad), "mean and deviation of 1 channels for images of 2");
  bad = (orepa_image_transform){.channels = 2, .mean = mean};
  assert_message(!orepa_image_batch(t, i, &bad), "the mean of channel 2 of 2 is nan");
  bad = (orepa_image_transform){.channels = 2, .deviation = zero};
  assert_message(!orepa_image_batch(t, i, &bad), "the deviation of channel 2 of 2 is 0; it must be positive");
  orepa_set_memory_limit(cpu, 1);
  assert_message(!orepa_image_batch(t, i, &(orepa_image_transform){.padding = 1000, .crop = {2000, 2000}}),
                 "image_batch: out of memory");
  assert_true(orepa_error_is_out_of_memory());
  orepa_set_memory_limit(cpu, 0);
  orepa_tensor *all[] = {t, far, ints, flat, i, far_i, high, low};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    orepa_release(all[k]);
}

static void test_labels(void **unused) {
  (void)unused;
  const int64_t count = 6, wanted[4] = {9, 3, 9, 7}, strided[2] = {5, 3};
  const void *labels[] = {(const int64_t[]){3, 1, 5, 7, 2, 9}, (const int32_t[]){3, 1, 5, 7, 2, 9},
                          (const uint8_t[]){3, 1, 5, 7, 2, 9}};
  const orepa_dtype types[] = {OREPA_INT64, OREPA_INT32, OREPA_UINT8};
  orepa_tensor *i = positions(4, (const int64_t[]){5, 0, 5, 3}), *j = positions(4, (const int64_t[]){1, 9, 0, 9});
  orepa_tensor *odd = orepa_slice(j, 0, 0, 4, 2);
  for (int k = 0; k < 3; k++) {
    orepa_tensor *t = orepa_from_host(types[k], cpu, 1, &count, labels[k]), *half = orepa_slice(t, 0, 0, 6, 2);
    orepa_tensor *batch = orepa_label_batch(t, i);
    assert_elements(batch, wanted, sizeof wanted);
    assert_int_equal(orepa_tensor_dtype(batch), OREPA_INT64);
    orepa_release(batch);
    batch = orepa_label_batch(half, odd);
    assert_elements(batch, strided, sizeof strided);
    orepa_release(batch);
    assert_message(!orepa_label_batch(t, j), "label_batch: index 9 (number 2 of 4) is not in the range of 6 labels");
    assert_message(!orepa_label_batch(half, i), "index 5 (number 1 of 4) is not in the range of 3 labels");
    orepa_release(half);
    orepa_release(t);
  }
  orepa_tensor *floats = orepa_empty(OREPA_FLOAT32, cpu, 1, &count);
  orepa_tensor *far = orepa_empty(OREPA_INT64, orepa_device_by_name("ref"), 1, &count);
  assert_message(!orepa_label_batch(floats, i), "labels must be int64, int32 or uint8 (N), not float32 6");
  assert_message(!orepa_label_batch(far, i), "labels must be on the device 'cpu', not on 'ref'");
  assert_message(!orepa_label_batch(i, far), "indices must be on the device 'cpu', not on 'ref'");
  orepa_tensor *all[] = {i, j, odd, floats, far};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    orepa_release(all[k]);
}

/* ---- statistics ---- */

static void check_statistics(orepa_tensor *t) {
  image_copy images = copy_images(t);
  double mean[4], deviation[4], again[4], others[4];
  int64_t pixels = images.count * images.height * images.width;
  assert_int_equal(orepa_image_statistics(t, mean, deviation), 0);
  for (int64_t c = 0; c < images.channels; c++) {
    long double sum = 0, squares = 0;
    for (int pass = 0; pass < 2; pass++)
      for (int64_t n = 0; n < images.count; n++)
        for (int64_t k = 0; k < images.height * images.width; k++) {
          long double p = images.pixels[(n * images.channels + c) * images.height * images.width + k];
          if (pass)
            squares += (p - sum / pixels) * (p - sum / pixels);
          else
            sum += p;
        }
    assert_true(fabsl(mean[c] - sum / pixels) <= 1e-14L * (1 + fabsl(sum / pixels)));
    assert_true(fabsl(deviation[c] - sqrtl(squares / pixels)) <= 1e-13L * sqrtl(squares / pixels) + 1e-15L);
  }
  int threads = orepa_threads();
  for (int count = 1; count <= 3; count++) {
    orepa_set_threads(count);
    assert_int_equal(orepa_image_statistics(t, again, others), 0);
    assert_memory_equal(again, mean, (size_t)images.channels * sizeof *mean);
    assert_memory_equal(others, deviation, (size_t)images.channels * sizeof *mean);
  }
  orepa_set_threads(threads);
  free(images.pixels);
}

static void test_statistics(void **unused) {
  (void)unused;
  static const int64_t shapes[][4] = {{1, 1, 1, 1}, {3, 4, 5, 7}, {65, 3, 9, 11}, {700, 3, 20, 20}};
  for (int dtype = 0; dtype < 2; dtype++) {
    orepa_dtype type = dtype ? OREPA_FLOAT32 : OREPA_UINT8;
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++) {
      orepa_tensor *t = random_images(type, 4, shapes[k]), *turned = orepa_permute(t, (const int[]){3, 1, 0, 2});
      orepa_tensor *grey = orepa_select(t, 1, 0);
      check_statistics(t);
      check_statistics(turned);
      check_statistics(grey);
      orepa_release(t);
      orepa_release(turned);
      orepa_release(grey);
    }
  }
  float large[4] = {1e6f, 1e6f + 1, 1e6f + 2, 1e6f + 3}; /* a mean far larger than the deviation */
  orepa_tensor *t = orepa_from_host(OREPA_FLOAT32, cpu, 3, (const int64_t[]){1, 2, 2}, large);
  check_statistics(t);
  orepa_release(t);
  double mean[1], deviation[1];
  t = random_images(OREPA_UINT8, 3, (const int64_t[]){0, 28, 28});
  assert_message(orepa_image_statistics(t, mean, deviation) == -1, "image_statistics: no pixels in uint8 0x28x28");
  orepa_release(t);
  t = orepa_empty(OREPA_INT64, cpu, 3, (const int64_t[]){1, 2, 2});
  assert_message(orepa_image_statistics(t, mean, deviation) == -1, "image_statistics: images must be uint8 or float32");
  orepa_release(t);
}

/* The real files, where Debian's package dataset-fashion-mnist puts them. */
static void test_fashion_mnist(void **unused) {
  (void)unused;
  static const char where[] = "/usr/share/datasets/fashion-mnist";
  char images_path[100], labels_path[100];
  if (access(where, R_OK))
    skip();
  snprintf(images_path, sizeof images_path, "%s/train-images-idx3-ubyte.gz", where);
  snprintf(labels_path, sizeof labels_path, "%s/train-labels-idx1-ubyte.gz", where);
  orepa_tensor *images = orepa_load_idx(images_path), *labels = orepa_load_idx(labels_path);
  if (!images || !labels)
    fail_msg("%s", orepa_error());
  assert_shape(images, 60000, 28, 28);
  assert_shape(labels, 60000);
  double mean, deviation;
  assert_int_equal(orepa_image_statistics(images, &mean, &deviation), 0);
  assert_true(fabs(mean - 0.2860406) < 1e-7 && fabs(deviation - 0.3530242) < 1e-7);
  orepa_tensor *order = orepa_permutation(60000, 1, 1), *shuffled = orepa_label_batch(labels, order);
  int64_t *classes = malloc(60000 * sizeof *classes), counts[10] = {0};
  assert_non_null(classes);
  assert_int_equal(orepa_to_host(shuffled, classes, 60000 * sizeof *classes), 0);
  for (int k = 0; k < 60000; k++) {
    assert_in_range(classes[k], 0, 9);
    counts[classes[k]]++;
  }
  for (int c = 0; c < 10; c++)
    assert_int_equal(counts[c], 6000);
  free(classes);
  orepa_release(images);
  orepa_release(labels);
  orepa_release(order);
  orepa_release(shuffled);
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

static int find_cpu(void **unused) {
  (void)unused;
  cpu = orepa_device_by_name("cpu");
  return cpu ? 0 : -1;
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, begin, nothing_leaks)
  const struct CMUnitTest tests[] = {
      TEST(test_permutation),
      TEST(test_permutation_is_fair),
      TEST(test_evaluation),
      TEST(test_strides),
      TEST(test_bytes_are_rounded_once),
      TEST(test_windows_are_fair),
      TEST(test_augmented_colours),
      TEST(test_samples_are_their_own),
      TEST(test_empty_batches),
      TEST(test_batch_errors),
      TEST(test_labels),
      TEST(test_statistics),
      TEST(test_fashion_mnist),
  };
  return cmocka_run_group_tests(tests, find_cpu, NULL);
}
