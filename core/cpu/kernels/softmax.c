/* softmax.c: softmax, its logarithm and cross entropy, over the last axis. Rows are computed one at a time in a buffer
 * of float32 that stays in the first cache, whatever their type and strides are. */
#include <math.h>
#include <omp.h>

#include "cpu/kernels/convert.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/lanes.h"

enum { PARALLEL_FROM = 16384 /* elements */ };

/* ---- rows ---- */

/* An array seen as rows; axes before the last that lie in memory as one are merged. */
typedef struct {
  char *data;
  int64_t size;              /* of an element */
  convert_run *load, *store; /* to and from float32 */
  int rank;                  /* of the merged axes */
  int64_t shape[OREPA_MAX_RANK], strides[OREPA_MAX_RANK];
  int64_t step; /* from one class to the next */
} row_array;

/* The first `axes` axes of an array are those of the rows. */
static row_array rows_of(const device_array *a, int axes) {
  row_array rows = {.data = a->data, .size = (int64_t)orepa_dtype_size(a->dtype)};
  rows.load = KERNEL(convert)(OREPA_FLOAT32, a->dtype);
  rows.store = KERNEL(convert)(a->dtype, OREPA_FLOAT32);
  rows.step = axes < a->rank ? a->strides[axes] : 0;
  for (int d = 0; d < axes; d++) {
    int last = rows.rank - 1;
    if (a->shape[d] == 1)
      continue;
    if (last >= 0 && rows.strides[last] == a->strides[d] * a->shape[d]) {
      rows.shape[last] *= a->shape[d];
      rows.strides[last] = a->strides[d];
    } else {
      rows.shape[rows.rank] = a->shape[d];
      rows.strides[rows.rank++] = a->strides[d];
    }
  }
  return rows;
}

static int64_t row_start(const row_array *rows, int64_t row) {
  int64_t start = 0;
  for (int d = rows->rank - 1; d > 0; d--) {
    start += row % rows->shape[d] * rows->strides[d];
    row /= rows->shape[d];
  }
  return rows->rank ? start + row * rows->strides[0] : 0;
}

static void load_row(float *to, const row_array *rows, int64_t row, int64_t classes) {
  rows->load(classes, to, 1, rows->data + row_start(rows, row) * rows->size, rows->step);
}

static void store_row(const row_array *rows, int64_t row, const float *from, int64_t classes) {
  rows->store(classes, rows->data + row_start(rows, row) * rows->size, rows->step, from, 1);
}

static float *row_value(const row_array *rows, int64_t row) {
  return (float *)(void *)rows->data + row_start(rows, row);
}

static int64_t count_rows(const device_array *a) {
  int64_t count = 1;
  for (int d = 0; d < a->rank - 1; d++)
    count *= a->shape[d];
  return count;
}

/* `rows` rows of float32 for each thread; NULL with a message. */
static float *row_buffers(device_context *context, int64_t rows, int64_t classes) {
  return context->workspace(context, (size_t)(omp_get_max_threads() * rows * classes + 1) * sizeof(float));
}

static bool is_float(const device_array *a) {
  return a->dtype == OREPA_FLOAT32 || a->dtype == OREPA_BFLOAT16;
}

/* ---- sums over a row: short float sums, added in double ---- */

enum { SUMMED = 512 };

#define ROW_SUM(c, classes, term)                                                                                      \
  double total = 0;                                                                                                    \
  for (int64_t first_ = 0; first_ < (classes); first_ += SUMMED) {                                                     \
    int64_t end_ = (classes)-first_ < SUMMED ? (classes) : first_ + SUMMED;                                            \
    float part = 0;                                                                                                    \
    _Pragma("omp simd reduction(+ : part)") for (int64_t c = first_; c < end_; c++) part += (term);                    \
    total += part;                                                                                                     \
  }                                                                                                                    \
  return total

/* exp(x) for x up to 88, to about one unit in the last place; 0 from about -87.7 down, where the result would be
 * subnormal. With n = x / log(2), rounded by adding a number whose unit is 1, it is 2^n times the series at x - n
 * log(2), and the bits of 2^n are those of 0 for n = -127. */
static ALWAYS_INLINE float exponential(float x) {
  const float rounding = 0x1.8p23f;
  float above = x < -88 ? -88 : x, shifted = above * 0x1.715476p0f + rounding, n = shifted - rounding;
  float r = above - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  float series = 1.f / 720 + r * (1.f / 5040);
  series = 1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * series));
  series = 1 + r * (1 + r * (0.5f + r * series));
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return series * power;
}

/* Infinite for an empty row; a NaN is passed over. */
static float row_largest(const float *row, int64_t classes) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t c = 0; c < classes; c++)
    largest = row[c] > largest ? row[c] : largest;
  return largest;
}

/* The row becomes exp(row - largest); its sum. */
static double exponentials(float *row, int64_t classes, float largest) {
#pragma omp simd
  for (int64_t c = 0; c < classes; c++)
    row[c] = exponential(row[c] - largest);
  ROW_SUM(c, classes, row[c]);
}

static double sum_of_exponentials(const float *row, int64_t classes, float largest) {
  ROW_SUM(c, classes, exponential(row[c] - largest));
}

static double sum_of_differences(const float *row, int64_t classes, float largest) {
  ROW_SUM(c, classes, row[c] - largest);
}

static double row_sum(const float *row, int64_t classes) {
  ROW_SUM(c, classes, row[c]);
}

static double row_product(const float *restrict a, const float *restrict b, int64_t classes) {
  ROW_SUM(c, classes, a[c] * b[c]);
}

/* ---- softmax ---- */

static void softmax_row(bool logarithm, float *row, int64_t classes) {
  float largest = row_largest(row, classes);
  if (logarithm) {
    float rest = (float)log(sum_of_exponentials(row, classes, largest));
    for (int64_t c = 0; c < classes; c++)
      row[c] = row[c] - largest - rest;
  } else {
    float part = (float)(1 / exponentials(row, classes, largest));
    for (int64_t c = 0; c < classes; c++)
      row[c] *= part;
  }
}

device_status KERNEL(softmax_forward)(device_context *context, bool logarithm, const device_array *y,
                                      const device_array *x) {
  if (!is_float(x) || y->dtype != x->dtype)
    return DEVICE_UNSUPPORTED;
  row_array from = rows_of(x, x->rank - 1), to = rows_of(y, y->rank - 1);
  int64_t rows = count_rows(x), classes = x->shape[x->rank - 1];
  float *buffers = row_buffers(context, 1, classes);
  if (!buffers)
    return DEVICE_FAILED;
#pragma omp parallel for schedule(static) if (rows * classes >= PARALLEL_FROM)
  for (int64_t r = 0; r < rows; r++) {
    float *row = buffers + omp_get_thread_num() * classes;
    load_row(row, &from, r, classes);
    softmax_row(logarithm, row, classes);
    store_row(&to, r, row, classes);
  }
  return DEVICE_DONE;
}

/* The row of dy becomes that of dx. */
static void softmax_gradient(bool logarithm, float *restrict dy, const float *restrict y, int64_t classes) {
  if (logarithm) {
    float sum = (float)row_sum(dy, classes);
#pragma omp simd
    for (int64_t c = 0; c < classes; c++)
      dy[c] -= exponential(y[c]) * sum;
  } else {
    float sum = (float)row_product(dy, y, classes);
    for (int64_t c = 0; c < classes; c++)
      dy[c] = y[c] * (dy[c] - sum);
  }
}

device_status KERNEL(softmax_backward)(device_context *context, bool logarithm, const device_array *dx,
                                       const device_array *dy, const device_array *y) {
  if (!is_float(y) || dy->dtype != y->dtype || dx->dtype != y->dtype)
    return DEVICE_UNSUPPORTED;
  row_array result = rows_of(y, y->rank - 1), from = rows_of(dy, dy->rank - 1), to = rows_of(dx, dx->rank - 1);
  int64_t rows = count_rows(y), classes = y->shape[y->rank - 1];
  float *buffers = row_buffers(context, 2, classes);
  if (!buffers)
    return DEVICE_FAILED;
#pragma omp parallel for schedule(static) if (rows * classes >= PARALLEL_FROM)
  for (int64_t r = 0; r < rows; r++) {
    float *gradient = buffers + 2 * omp_get_thread_num() * classes, *row = gradient + classes;
    load_row(gradient, &from, r, classes);
    load_row(row, &result, r, classes);
    softmax_gradient(logarithm, gradient, row, classes);
    store_row(&to, r, gradient, classes);
  }
  return DEVICE_DONE;
}

/* ---- cross entropy: the target is (1 - smoothing) on the label and smoothing / C on every class ---- */

typedef struct {
  double smoothing;
  int64_t ignore, classes;
  row_array logits, labels, logz;
} loss_rows;

static int64_t label_of(const loss_rows *l, int64_t row) {
  return ((const int64_t *)(const void *)l->labels.data)[row_start(&l->labels, row)];
}

/* Fills one place of `loss` and of logz; false if the label is none. */
static bool row_loss(const loss_rows *l, const row_array *loss, int64_t r, float *row) {
  int64_t label = label_of(l, r), classes = l->classes;
  bool is_class = label >= 0 && label < classes;
  load_row(row, &l->logits, r, classes);
  float largest = row_largest(row, classes);
  double rest = log(sum_of_exponentials(row, classes, largest)), value = 0;
  if (is_class && label != l->ignore) { /* logz - row[label], and the like, without the large part */
    value = rest - (1 - l->smoothing) * (row[label] - largest);
    if (l->smoothing != 0)
      value -= l->smoothing * sum_of_differences(row, classes, largest) / (double)classes;
  }
  *row_value(&l->logz, r) = (float)(largest + rest);
  *row_value(loss, r) = (float)value;
  return is_class || label == l->ignore;
}

device_status KERNEL(cross_entropy_forward)(device_context *context, double smoothing, int64_t ignore,
                                            const device_array *loss, const device_array *logz,
                                            const device_array *logits, const device_array *labels) {
  if (!is_float(logits) || loss->dtype != OREPA_FLOAT32 || logz->dtype != OREPA_FLOAT32 || labels->dtype != OREPA_INT64)
    return DEVICE_UNSUPPORTED;
  int axes = logits->rank - 1;
  loss_rows l = {smoothing,          ignore, logits->shape[axes], rows_of(logits, axes), rows_of(labels, axes),
                 rows_of(logz, axes)};
  row_array losses = rows_of(loss, axes);
  int64_t rows = count_rows(logits), offending = rows; /* the first row whose label is none */
  float *buffers = row_buffers(context, 1, l.classes);
  if (!buffers)
    return DEVICE_FAILED;
#pragma omp parallel if (rows * l.classes >= PARALLEL_FROM)
  {
    int64_t first = rows;
    float *row = buffers + omp_get_thread_num() * l.classes;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < rows; r++)
      if (!row_loss(&l, &losses, r, row) && r < first)
        first = r;
#pragma omp critical
    offending = first < offending ? first : offending;
  }
  if (offending < rows && context->offence_position < 0) {
    context->offence = label_of(&l, offending);
    context->offence_position = offending;
  }
  return DEVICE_DONE;
}

/* The row of logits becomes that of their gradient. */
static void row_gradient(const loss_rows *l, int64_t r, float weight, float *row) {
  int64_t label = label_of(l, r);
  float logz = *row_value(&l->logz, r), target = (float)(l->smoothing / (double)l->classes);
  if (label == l->ignore) {
    memset(row, 0, (size_t)l->classes * sizeof(float));
    return;
  }
#pragma omp simd
  for (int64_t c = 0; c < l->classes; c++)
    row[c] = exponential(row[c] - logz) - target;
  if (label >= 0 && label < l->classes)
    row[label] -= (float)(1 - l->smoothing);
  for (int64_t c = 0; c < l->classes; c++)
    row[c] *= weight;
}

device_status KERNEL(cross_entropy_backward)(device_context *context, double smoothing, int64_t ignore,
                                             const device_array *dlogits, const device_array *dloss,
                                             const device_array *logits, const device_array *labels,
                                             const device_array *logz) {
  if (!is_float(logits) || dlogits->dtype != logits->dtype || dloss->dtype != OREPA_FLOAT32 ||
      logz->dtype != OREPA_FLOAT32 || labels->dtype != OREPA_INT64)
    return DEVICE_UNSUPPORTED;
  int axes = logits->rank - 1;
  loss_rows l = {smoothing,          ignore, logits->shape[axes], rows_of(logits, axes), rows_of(labels, axes),
                 rows_of(logz, axes)};
  row_array weights = rows_of(dloss, axes), to = rows_of(dlogits, axes);
  int64_t rows = count_rows(logits);
  float *buffers = row_buffers(context, 1, l.classes);
  if (!buffers)
    return DEVICE_FAILED;
#pragma omp parallel for schedule(static) if (rows * l.classes >= PARALLEL_FROM)
  for (int64_t r = 0; r < rows; r++) {
    float *row = buffers + omp_get_thread_num() * l.classes;
    load_row(row, &l.logits, r, l.classes);
    row_gradient(&l, r, *row_value(&weights, r), row);
    store_row(&to, r, row, l.classes);
  }
  return DEVICE_DONE;
}
