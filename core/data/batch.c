/* batch.c: batches of images and labels from a dataset in memory: one pass from the stored pixels to normalised,
 * cropped and mirrored samples, and the statistics that normalising wants. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "orepa_data.h"
#include "philox.h"
#include "tensor/tensor.h"

/* Fewer elements than this are done by one thread. */
enum { PARALLEL = 1 << 18 };

static int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/* ---- arguments ---- */

/* Images in any memory order: N of C x H x W. Strides in elements. */
typedef struct {
  const void *data;
  bool bytes; /* uint8; else float32 */
  int64_t count, channels, height, width;
  int64_t image_stride, channel_stride, row_stride, column_stride;
} image_set;

static int on_cpu(const char *op, const char *what, const orepa_tensor *t) {
  if (t->storage->device == cpu_device())
    return 0;
  return error_set("%s: %s must be on the device 'cpu', not on '%s'", op, what, t->storage->device->name);
}

static int images_open(const char *op, orepa_tensor *t, image_set *images) {
  device_array array;
  if (on_cpu(op, "images", t))
    return -1;
  if (t->dtype != OREPA_UINT8 && t->dtype != OREPA_FLOAT32)
    return error_set("%s: images must be uint8 or float32, not %s", op, tensor_text(t));
  if (t->rank != 3 && t->rank != 4)
    return error_set("%s: images must be (N, H, W) or (N, C, H, W), not %s", op, tensor_text(t));
  if (tensor_reads(t, &array))
    return -1;
  const int row = t->rank - 2, column = t->rank - 1;
  *images = (image_set){.data = array.data,
                        .bytes = t->dtype == OREPA_UINT8,
                        .count = t->shape[0],
                        .channels = t->rank == 4 ? t->shape[1] : 1,
                        .height = t->shape[row],
                        .width = t->shape[column],
                        .image_stride = t->strides[0],
                        .channel_stride = t->rank == 4 ? t->strides[1] : 0,
                        .row_stride = t->strides[row],
                        .column_stride = t->strides[column]};
  return 0;
}

/* int64 (B), each in 0 ... count-1. */
static int indices_open(const char *op, orepa_tensor *t, const char *what, int64_t count, device_array *array) {
  if (on_cpu(op, "indices", t))
    return -1;
  if (t->dtype != OREPA_INT64 || t->rank != 1)
    return error_set("%s: indices must be int64 (B), not %s", op, tensor_text(t));
  if (tensor_reads(t, array))
    return -1;
  const int64_t *index = array->data, size = array->shape[0], stride = array->strides[0];
  for (int64_t k = 0; k < size; k++)
    if (index[k * stride] < 0 || index[k * stride] >= count)
      return error_set("%s: index %lld (number %lld of %lld) is not in the range of %lld %s, counted from 0", op,
                       (long long)index[k * stride], (long long)k + 1, (long long)size, (long long)count, what);
  return 0;
}

/* ---- the plan of a batch ---- */

typedef struct {
  image_set images;
  int64_t height, width, padding; /* of a sample; around an image */
  bool augment, flip;
  uint64_t key, epoch;
  float *table; /* bytes: (C, 256), what each becomes; floats: (C, 2), mean and 1/deviation */
} batch_plan;

static int transform_check(const orepa_image_transform *transform, const image_set *images) {
  const int64_t most = INT32_MAX, padding = transform->padding, *crop = transform->crop;
  const int64_t images_height = images->height, images_width = images->width;
  if (padding < 0 || padding > most || images_height > most - 2 * padding || images_width > most - 2 * padding)
    return error_set(
        "image_batch: a padding of %lld around images of %lldx%lld is not in the range from 0 to where they "
        "have %lld pixels a side",
        (long long)padding, (long long)images_height, (long long)images_width, (long long)most);
  const int64_t height = images_height + 2 * padding, width = images_width + 2 * padding;
  if (crop[0] < 0 || crop[1] < 0 || crop[0] > height || crop[1] > width)
    return error_set(
        "image_batch: a crop of %lldx%lld from images of %lldx%lld, which are %lldx%lld with a padding of %lld",
        (long long)crop[0], (long long)crop[1], (long long)images_height, (long long)images_width, (long long)height,
        (long long)width, (long long)padding);
  if ((transform->mean || transform->deviation) && transform->channels != images->channels)
    return error_set("image_batch: mean and deviation of %d channels for images of %lld", transform->channels,
                     (long long)images->channels);
  for (int c = 0; c < transform->channels; c++) {
    if (transform->mean && !isfinite(transform->mean[c]))
      return error_set("image_batch: the mean of channel %d of %d is %g", c + 1, transform->channels,
                       (double)transform->mean[c]);
    if (transform->deviation && !(transform->deviation[c] > 0 && isfinite(transform->deviation[c])))
      return error_set("image_batch: the deviation of channel %d of %d is %g; it must be positive", c + 1,
                       transform->channels, (double)transform->deviation[c]);
  }
  return 0;
}

static int table_fill(const orepa_image_transform *transform, batch_plan *plan) {
  const int64_t channels = plan->images.channels, entries = plan->images.bytes ? 256 : 2;
  plan->table = calloc((size_t)larger(channels, 1), (size_t)entries * sizeof *plan->table);
  if (!plan->table)
    return error_out_of_memory("image_batch: out of memory: no room for the tables of %lld channels",
                               (long long)channels);
  for (int64_t c = 0; c < channels; c++) {
    float *table = plan->table + c * entries;
    const double mean = transform->mean ? transform->mean[c] : 0;
    const double deviation = transform->deviation ? transform->deviation[c] : 1;
    if (plan->images.bytes) {
      for (int x = 0; x < 256; x++)
        table[x] = (float)((x / 255.0 - mean) / deviation);
    } else {
      table[0] = (float)mean;
      table[1] = (float)(1 / deviation);
    }
  }
  return 0;
}

/* The key is drawn from the seed at a draw number that tensors never reach: crops share no bits with orepa_rand. */
static uint64_t augmentation_key(uint64_t seed) {
  uint32_t words[4];
  philox(seed, UINT64_MAX - 2, 0, words);
  return (uint64_t)words[1] << 32 | words[0];
}

static int plan_make(const orepa_image_transform *transform, batch_plan *plan) {
  if (transform_check(transform, &plan->images))
    return -1;
  plan->height = transform->crop[0] ? transform->crop[0] : plan->images.height;
  plan->width = transform->crop[1] ? transform->crop[1] : plan->images.width;
  plan->padding = transform->padding;
  plan->augment = transform->augment;
  plan->flip = transform->flip;
  plan->key = augmentation_key(transform->seed);
  plan->epoch = transform->epoch;
  return table_fill(transform, plan);
}

/* ---- samples ---- */

/* What a sample shows of its image: where it starts, which may be outside, and whether it is mirrored. */
typedef struct {
  int64_t top, left;
  bool mirrored;
} image_window;

/* A function of (seed, epoch, index) and the sizes alone. */
static image_window window_of(const batch_plan *plan, int64_t index) {
  const uint64_t down = (uint64_t)(plan->images.height + 2 * plan->padding - plan->height); /* how far it can move */
  const uint64_t right = (uint64_t)(plan->images.width + 2 * plan->padding - plan->width);
  if (!plan->augment) /* the centre of the image, whatever the padding */
    return (image_window){(int64_t)(down / 2) - plan->padding, (int64_t)(right / 2) - plan->padding, false};
  uint32_t words[4];
  philox(plan->key, plan->epoch, (uint64_t)index, words);
  return (image_window){(int64_t)(words[0] * (down + 1) >> 32) - plan->padding,
                        (int64_t)(words[1] * (right + 1) >> 32) - plan->padding, plan->flip && words[2] >> 31};
}

/* `width` pixels, `step` elements apart, to out (width, C). */
static inline void pixels_of_bytes(const batch_plan *plan, int64_t channels, float *restrict out, const uint8_t *in,
                                   int64_t width, int64_t step) {
  const int64_t stride = plan->images.channel_stride;
  const float *restrict table = plan->table;
  for (int64_t x = 0; x < width; x++, out += channels, in += step)
    for (int64_t c = 0; c < channels; c++)
      out[c] = table[256 * c + in[c * stride]];
}

/* The same with the usual numbers of channels as constants, which unrolls them. */
static void row_of_bytes(const batch_plan *plan, float *out, const uint8_t *in, int64_t width, int64_t step) {
  if (plan->images.channels == 1)
    pixels_of_bytes(plan, 1, out, in, width, step);
  else if (plan->images.channels == 3)
    pixels_of_bytes(plan, 3, out, in, width, step);
  else
    pixels_of_bytes(plan, plan->images.channels, out, in, width, step);
}

static void row_of_floats(const batch_plan *plan, float *restrict out, const float *in, int64_t width, int64_t step) {
  const int64_t channels = plan->images.channels, stride = plan->images.channel_stride;
  const float *restrict table = plan->table;
  for (int64_t x = 0; x < width; x++, out += channels, in += step)
    for (int64_t c = 0; c < channels; c++)
      out[c] = (in[c * stride] - table[2 * c]) * table[2 * c + 1];
}

/* One sample to out (h, w, C). */
static void sample_make(const batch_plan *plan, float *out, int64_t index) {
  const image_set *images = &plan->images;
  const image_window window = window_of(plan, index);
  const int64_t height = plan->height, width = plan->width, channels = images->channels;
  /* what of the image can be seen: rows top <= y < bottom, columns left <= x < right */
  const int64_t top = larger(window.top, 0), bottom = smaller(window.top + height, images->height);
  const int64_t left = larger(window.left, 0), right = smaller(window.left + width, images->width);
  const int64_t rows = larger(bottom - top, 0), columns = larger(right - left, 0);
  if (rows < height || columns < width)
    memset(out, 0, (size_t)(height * width * channels) * sizeof *out);
  if (!rows || !columns)
    return;
  const int64_t step = window.mirrored ? -images->column_stride : images->column_stride;
  const int64_t start = window.mirrored ? right - 1 : left;
  const int64_t margin = window.mirrored ? window.left + width - right : left - window.left;
  int64_t from = index * images->image_stride + top * images->row_stride + start * images->column_stride;
  out += ((top - window.top) * width + margin) * channels;
  for (int64_t y = 0; y < rows; y++, out += width * channels, from += images->row_stride)
    if (images->bytes)
      row_of_bytes(plan, out, (const uint8_t *)images->data + from, columns, step);
    else
      row_of_floats(plan, out, (const float *)images->data + from, columns, step);
}

/* ---- batches ---- */

/* Images of a shuffled dataset are rarely in a cache, and small ones end before the processor has seen a pattern:
 * asking for the one after next halves the time of a batch. */
static void image_prefetch(const image_set *images, int64_t index) {
  enum { LINE = 64, MOST = 4096 };
  const int64_t size = images->bytes ? sizeof(uint8_t) : sizeof(float);
  const int64_t bytes = images->image_stride * size, start = index * bytes;
  for (int64_t k = 0; k < smaller(bytes, MOST); k += LINE)
    __builtin_prefetch((const char *)images->data + start + k);
}

static orepa_tensor *batch_make(const batch_plan *plan, const device_array *indices) {
  const int64_t size = indices->shape[0], *index = indices->data, stride = indices->strides[0];
  const int64_t shape[4] = {size, plan->images.channels, plan->height, plan->width};
  device_array array;
  orepa_tensor *batch = tensor_new(OREPA_FLOAT32, cpu_device(), 4, shape);
  if (!batch || tensor_writes(batch, &array)) {
    error_prefix("image_batch: ");
    return tensor_fail(batch);
  }
  const int64_t sample = plan->images.channels * plan->height * plan->width;
  float *out = array.data;
  if (!sample) /* nor may there be an image to point into */
    return batch;
  signals_hold();
#pragma omp parallel for schedule(static) if (size * sample > PARALLEL)
  for (int64_t k = 0; k < size; k++) {
    if (k + 2 < size)
      image_prefetch(&plan->images, index[(k + 2) * stride]);
    sample_make(plan, out + k * sample, index[k * stride]);
  }
  signals_release();
  return batch;
}

orepa_tensor *orepa_image_batch(orepa_tensor *images, orepa_tensor *indices, const orepa_image_transform *transform) {
  batch_plan plan;
  device_array index;
  if (images_open("image_batch", images, &plan.images) ||
      indices_open("image_batch", indices, "images", plan.images.count, &index) || plan_make(transform, &plan))
    return NULL;
  orepa_tensor *batch = batch_make(&plan, &index);
  free(plan.table);
  return batch;
}

orepa_tensor *orepa_label_batch(orepa_tensor *labels, orepa_tensor *indices) {
  device_array from, index, to;
  if (on_cpu("label_batch", "labels", labels))
    return NULL;
  if (labels->rank != 1 ||
      (labels->dtype != OREPA_INT64 && labels->dtype != OREPA_INT32 && labels->dtype != OREPA_UINT8)) {
    error_set("label_batch: labels must be int64, int32 or uint8 (N), not %s", tensor_text(labels));
    return NULL;
  }
  if (tensor_reads(labels, &from) || indices_open("label_batch", indices, "labels", from.shape[0], &index))
    return NULL;
  orepa_tensor *batch = tensor_new(OREPA_INT64, cpu_device(), 1, index.shape);
  if (!batch || tensor_writes(batch, &to)) {
    error_prefix("label_batch: ");
    return tensor_fail(batch);
  }
  const int64_t *position = index.data;
  int64_t *out = to.data;
  for (int64_t k = 0; k < index.shape[0]; k++) {
    const int64_t at = position[k * index.strides[0]] * from.strides[0];
    out[k] = labels->dtype == OREPA_INT64   ? ((const int64_t *)from.data)[at]
             : labels->dtype == OREPA_INT32 ? ((const int32_t *)from.data)[at]
                                            : ((const uint8_t *)from.data)[at];
  }
  return batch;
}

/* ---- statistics: images are cut into at most CHUNKS runs by their number alone, whose sums are added in order ---- */

enum { CHUNKS = 64 };

static int64_t chunk_of(int64_t count) {
  return (count + CHUNKS - 1) / CHUNKS;
}

/* Adds to counts[256] what channel c of images first <= n < last holds. */
static void count_bytes(const image_set *images, int64_t c, int64_t first, int64_t last, int64_t *counts) {
  for (int64_t n = first; n < last; n++)
    for (int64_t y = 0; y < images->height; y++) {
      const uint8_t *in = (const uint8_t *)images->data + n * images->image_stride + c * images->channel_stride +
                          y * images->row_stride;
      for (int64_t x = 0; x < images->width; x++)
        counts[in[x * images->column_stride]]++;
    }
}

static void byte_statistics(const image_set *images, int64_t c, double *mean, double *deviation) {
  const int64_t pixels = images->count * images->height * images->width, chunk = chunk_of(images->count);
  int64_t counts[256] = {0}, sum = 0;
  signals_hold();
#pragma omp parallel for schedule(static) if (pixels > PARALLEL)
  for (int64_t first = 0; first < images->count; first += chunk) {
    int64_t some[256] = {0};
    count_bytes(images, c, first, smaller(first + chunk, images->count), some);
#pragma omp critical /* integers: any order gives the same sum */
    for (int x = 0; x < 256; x++)
      counts[x] += some[x];
  }
  signals_release();
  for (int x = 0; x < 256; x++)
    sum += x * counts[x];
  double centre = (double)sum / (double)pixels, squares = 0;
  for (int x = 0; x < 256; x++)
    squares += (double)counts[x] * (x - centre) * (x - centre);
  *mean = centre / 255;
  *deviation = sqrt(squares / (double)pixels) / 255;
}

/* The sum of x - pivot, or of its squares, over channel c of images first <= n < last. */
static double sum_floats(const image_set *images, int64_t c, int64_t first, int64_t last, double pivot, bool squares) {
  double sum = 0;
  for (int64_t n = first; n < last; n++)
    for (int64_t y = 0; y < images->height; y++) {
      const float *in =
          (const float *)images->data + n * images->image_stride + c * images->channel_stride + y * images->row_stride;
      double row = 0;
#pragma omp simd reduction(+ : row)
      for (int64_t x = 0; x < images->width; x++) {
        double distance = in[x * images->column_stride] - pivot;
        row += squares ? distance * distance : distance;
      }
      sum += row;
    }
  return sum;
}

static double mean_floats(const image_set *images, int64_t c, double pivot, bool squares) {
  const int64_t pixels = images->count * images->height * images->width, chunk = chunk_of(images->count);
  double sums[CHUNKS] = {0}, sum = 0;
  signals_hold();
#pragma omp parallel for schedule(static) if (pixels > PARALLEL)
  for (int64_t first = 0; first < images->count; first += chunk)
    sums[first / chunk] = sum_floats(images, c, first, smaller(first + chunk, images->count), pivot, squares);
  signals_release();
  for (int k = 0; k < CHUNKS; k++)
    sum += sums[k];
  return sum / (double)pixels;
}

static void float_statistics(const image_set *images, int64_t c, double *mean, double *deviation) {
  *mean = mean_floats(images, c, 0, false);
  *deviation = sqrt(mean_floats(images, c, *mean, true));
}

int orepa_image_statistics(orepa_tensor *t, double *mean, double *deviation) {
  image_set images;
  if (images_open("image_statistics", t, &images))
    return -1;
  if (orepa_count(t) == 0)
    return error_set("image_statistics: no pixels in %s", tensor_text(t));
  for (int64_t c = 0; c < images.channels; c++)
    if (images.bytes)
      byte_statistics(&images, c, &mean[c], &deviation[c]);
    else
      float_statistics(&images, c, &mean[c], &deviation[c]);
  return 0;
}
