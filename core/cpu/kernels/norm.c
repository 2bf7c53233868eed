/* norm.c: batch norm in passes that are as fast as memory: partial moments of each chunk of rows, their merging, one
 * fused multiply-add per element, and the gradient in two passes.
 *
 * Rows of few channels are taken several at a time, as one line that repeats the channels, so that vectors are full
 * whatever C is. Sums run over chunks of rows fixed by size, and are merged in their order in double. */
#include <math.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/lanes.h"

enum {
  LINE = 512,            /* channels of a line of repeated rows, at most */
  LINE_LEAST = 64,       /* and at least: loops over fewer don't pay */
  MERGED = 64,           /* channels merged at a time */
  PARALLEL_FROM = 65536, /* elements */
};

static bool is_map(const device_array *a) {
  return a->dtype == OREPA_FLOAT32 || a->dtype == OREPA_BFLOAT16;
}

static bool are_parameters(int count, const device_array *const *arrays) {
  for (int n = 0; n < count; n++)
    if (arrays[n] && arrays[n]->dtype != OREPA_FLOAT32)
      return false;
  return true;
}

/* ---- where rows lie ---- */

/* A map (N, C, ...) of rank 2 or 4 has its channels innermost: it is one block of all rows. Of another rank it is N
 * images of C blocks, each of one channel. */
typedef struct {
  int64_t channels, rows;
  int64_t blocks; /* of an image, side by side: 1 or C */
  int64_t width;  /* channels of a block: C or 1 */
  int64_t length; /* rows of a block */
  bool half;
} row_layout;

static row_layout layout_of(const device_array *x) {
  int64_t channels = x->shape[1], length = 1;
  for (int d = 2; d < x->rank; d++)
    length *= x->shape[d];
  row_layout m = {.channels = channels, .rows = x->shape[0] * length, .half = x->dtype == OREPA_BFLOAT16};
  bool innermost = x->rank == 2 || x->rank == 4;
  m.blocks = innermost ? 1 : channels;
  m.width = innermost ? channels : 1;
  m.length = innermost ? m.rows : length;
  return m;
}

/* Rows of one block that lie side by side: `offset` elements from the map's data. */
typedef struct {
  int64_t offset, rows, channel;
} row_run;

/* How many runs the rows first ... last - 1 are, and run k of them. */
static int64_t runs_between(const row_layout *m, int64_t first, int64_t last) {
  return first < last ? ((last - 1) / m->length - first / m->length + 1) * m->blocks : 0;
}

static row_run run_between(const row_layout *m, int64_t first, int64_t last, int64_t k) {
  int64_t image = first / m->length + k / m->blocks, channel = k % m->blocks, start = image * m->length;
  int64_t low = first > start ? first : start, high = last < start + m->length ? last : start + m->length;
  return (row_run){((image * m->blocks + channel) * m->length + low - start) * m->width, high - low, channel};
}

/* ---- lines ---- */

/* How many rows of C channels make a line: full vectors if that is no longer than LINE. */
static int64_t rows_in_line(int64_t channels, int64_t rows) {
  int64_t copies = 1;
  while (copies * channels % LANES)
    copies *= 2;
  if (copies * channels > LINE)
    copies = 1;
  while (copies * channels < LINE_LEAST)
    copies *= 2;
  return copies < rows ? copies : rows;
}

/* The values of a line, each channel's repeated. */
static const float *repeat(float line[LINE], const float *values, int64_t channels, int64_t copies) {
  if (copies == 1)
    return values;
  for (int64_t k = 0; k < copies; k++)
    for (int64_t c = 0; c < channels; c++)
      line[k * channels + c] = values[c];
  return line;
}

static void add_repeated(float *sums, const float line[LINE], int64_t channels, int64_t copies) {
  for (int64_t k = 0; k < copies; k++)
    for (int64_t c = 0; c < channels; c++)
      sums[c] += line[k * channels + c];
}

/* ---- sums over rows ---- */

/* Of each column of a number of lines: the sum of u and of u * (x - center), where u is dy, or x - center without dy.
 */
static ALWAYS_INLINE void sum_lines(const void *restrict dy, const void *restrict x, int64_t offset, int64_t width,
                                    const float *restrict center, float *restrict sum, float *restrict product,
                                    const int lines, const bool half, const bool gradient) {
  for (int64_t c = 0; c < width; c++) {
    float s = 0, p = 0;
#pragma GCC unroll 8
    for (int l = 0; l < lines; l++) {
      float difference = load_float(x, offset + l * width + c, half) - center[c];
      float u = gradient ? load_float(dy, offset + l * width + c, half) : difference;
      s += u;
      p += u * difference;
    }
    sum[c] += s;
    product[c] += p;
  }
}

static ALWAYS_INLINE void sum_all_lines(const void *dy, const void *x, int64_t offset, int64_t elements, int64_t width,
                                        const float *center, float *sum, float *product, const bool half,
                                        const bool gradient) {
  int64_t end = offset + elements;
  for (; offset + 8 * width <= end; offset += 8 * width)
    sum_lines(dy, x, offset, width, center, sum, product, 8, half, gradient);
  for (; offset < end; offset += width)
    sum_lines(dy, x, offset, end - offset < width ? end - offset : width, center, sum, product, 1, half, gradient);
}

/* Adds to sum (C) and product (C) what rows `run` of a map have. */
static void sum_run(const row_layout *m, row_run run, const void *dy, const void *x, const float *center, float *sum,
                    float *product) {
  float centers[LINE], sums[LINE], products[LINE];
  int64_t copies = rows_in_line(m->width, run.rows), width = copies * m->width, elements = run.rows * m->width;
  const float *line = repeat(centers, center, m->width, copies);
  float *s = copies == 1 ? sum : sums, *p = copies == 1 ? product : products;
  if (copies > 1) {
    memset(sums, 0, (size_t)width * sizeof(float));
    memset(products, 0, (size_t)width * sizeof(float));
  }
  switch ((m->half ? 2 : 0) + (dy ? 1 : 0)) {
  case 0:
    sum_all_lines(NULL, x, run.offset, elements, width, line, s, p, false, false);
    break;
  case 1:
    sum_all_lines(dy, x, run.offset, elements, width, line, s, p, false, true);
    break;
  case 2:
    sum_all_lines(NULL, x, run.offset, elements, width, line, s, p, true, false);
    break;
  default:
    sum_all_lines(dy, x, run.offset, elements, width, line, s, p, true, true);
  }
  if (copies > 1) {
    add_repeated(sum, sums, m->width, copies);
    add_repeated(product, products, m->width, copies);
  }
}

/* sum (C) and product (C) over the rows first ... last - 1. */
static void sum_rows(const row_layout *m, int64_t first, int64_t last, const void *dy, const void *x,
                     const float *center, float *sum, float *product) {
  memset(sum, 0, (size_t)m->channels * sizeof(float));
  memset(product, 0, (size_t)m->channels * sizeof(float));
  for (int64_t k = 0; k < runs_between(m, first, last); k++) {
    row_run run = run_between(m, first, last, k);
    sum_run(m, run, dy, x, center + run.channel, sum + run.channel, product + run.channel);
  }
}

static int64_t chunk_end(int64_t rows, int64_t chunk) {
  int64_t end = (chunk + 1) * moments_rows(rows);
  return end < rows ? end : rows;
}

/* ---- moments ---- */

/* A pivot is about the mean of a chunk's first four rows (of a short run, its first row): nearer the chunk's mean than
 * any one row, so that less is lost when the square of the sum is taken off. */
static void choose_pivots(const row_layout *m, float *pivot, int64_t first, int64_t last, const void *x) {
  for (int64_t k = 0; k < m->blocks; k++) {
    row_run run = run_between(m, first, last, k);
    int64_t step = run.rows < 4 ? 0 : m->width;
    for (int64_t c = 0; c < m->width; c++) {
      float sum = 0;
#pragma GCC unroll 4
      for (int l = 0; l < 4; l++)
        sum += 0.25f * load_float(x, run.offset + l * step + c, m->half);
      pivot[run.channel + c] = sum;
    }
  }
}

device_status KERNEL(norm_moments)(device_context *context, const device_array *moments, const device_array *x) {
  (void)context;
  if (!is_map(x) || moments->dtype != OREPA_FLOAT32)
    return DEVICE_UNSUPPORTED;
  row_layout m = layout_of(x);
  if (m.channels == 0)
    return DEVICE_DONE;
  int64_t chunks = moments_chunks(m.rows), step = moments_rows(m.rows);
#pragma omp parallel for schedule(static) if (m.rows * m.channels >= PARALLEL_FROM)
  for (int64_t k = 0; k < chunks; k++) {
    float *pivot = (float *)moments->data + k * 3 * m.channels;
    choose_pivots(&m, pivot, k * step, chunk_end(m.rows, k), x->data);
    sum_rows(&m, k * step, chunk_end(m.rows, k), NULL, x->data, pivot, pivot + m.channels, pivot + 2 * m.channels);
  }
  return DEVICE_DONE;
}

/* ---- statistics ---- */

static float channel_value(const device_array *a, int64_t c, float absent) {
  return a ? ((const float *)a->data)[c * a->strides[0]] : absent;
}

static void channel_set(const device_array *a, int64_t c, double value) {
  if (a)
    ((float *)a->data)[c * a->strides[0]] = (float)value;
}

/* Mean and sum of squared deviations of `count` channels (at most MERGED) from c on; moments (chunks, 3, C). */
static void merge_moments(const float *moments, int64_t rows, int64_t channels, int64_t c, int64_t count, double *mean,
                          double *deviations) {
  int64_t chunks = moments_chunks(rows), step = moments_rows(rows);
  for (int64_t j = 0; j < count; j++)
    mean[j] = deviations[j] = 0;
  for (int64_t k = 0; k < chunks; k++) {
    const float *pivot = moments + k * 3 * channels + c, *sum = pivot + channels;
    double n = (double)(chunk_end(rows, k) - k * step);
    for (int64_t j = 0; j < count; j++)
      mean[j] += n * pivot[j] + sum[j];
  }
  for (int64_t j = 0; j < count; j++)
    mean[j] /= (double)rows;
  for (int64_t k = 0; k < chunks; k++) {
    const float *pivot = moments + k * 3 * channels + c, *sum = pivot + channels, *square = sum + channels;
    double n = (double)(chunk_end(rows, k) - k * step), part = 1 / n;
    for (int64_t j = 0; j < count; j++) {
      double offset = sum[j] * part, distance = pivot[j] + offset - mean[j];
      double within = square[j] - sum[j] * offset;
      deviations[j] += (within < 0 ? 0 : within) + n * distance * distance;
    }
  }
}

device_status KERNEL(norm_finalize)(device_context *context, const orepa_norm *norm, int64_t rows,
                                    const device_array *moments, const device_array *weight, const device_array *bias,
                                    const device_array *running_mean, const device_array *running_var,
                                    const device_array *mean, const device_array *inverse, const device_array *scale,
                                    const device_array *shift) {
  (void)context;
  const device_array *parameters[] = {moments, weight, bias, running_mean, running_var, mean, inverse, scale, shift};
  if (!are_parameters(9, parameters))
    return DEVICE_UNSUPPORTED;
  int64_t channels = mean->shape[0];
  double keep = 1 - norm->momentum, unbiased = (double)(rows > 1 ? rows - 1 : 1);
#pragma omp parallel for schedule(static) if (moments_chunks(rows) * channels >= PARALLEL_FROM / 8)
  for (int64_t first = 0; first < channels; first += MERGED) {
    double means[MERGED], deviations[MERGED];
    int64_t count = channels - first < MERGED ? channels - first : MERGED;
    merge_moments(moments->data, rows, channels, first, count, means, deviations);
    for (int64_t c = first; c < first + count; c++) {
      double m = means[c - first], d = deviations[c - first], one = 1 / sqrt(d / (double)rows + norm->eps);
      float factor = (float)(channel_value(weight, c, 1) * one); /* as it will be applied */
      channel_set(mean, c, m);
      channel_set(inverse, c, one);
      channel_set(scale, c, factor);
      channel_set(shift, c, channel_value(bias, c, 0) - m * factor);
      channel_set(running_mean, c, keep * channel_value(running_mean, c, 0) + norm->momentum * m);
      channel_set(running_var, c, keep * channel_value(running_var, c, 0) + norm->momentum * (d / unbiased));
    }
  }
  return DEVICE_DONE;
}

/* ---- forward ---- */

/* a * x + b rounded once. Without the instruction: the product is exact in double, the sum is rounded to odd there, and
 * so the rounding to float sees on which side of a tie it was. */
static ALWAYS_INLINE float multiply_add(float a, float x, float b) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, x, b);
#else
  double product = (double)a * x, sum = product + b, part = sum - product;
  double error = (product - (sum - part)) + (b - part), inexact = error < 0 || error > 0 ? 1.0 : 0.0;
  uint64_t bits, error_bits, inexact_bits;
  memcpy(&bits, &sum, sizeof bits);
  memcpy(&error_bits, &error, sizeof error_bits);
  memcpy(&inexact_bits, &inexact, sizeof inexact_bits); /* bit 52 is set in 1.0, and not in 0.0 */
  uint64_t move = inexact_bits >> 52 & ~bits & 1, toward_zero = (error_bits ^ bits) >> 63;
  bits += move - 2 * (move & toward_zero);
  memcpy(&sum, &bits, sizeof sum);
  return (float)sum;
#endif
}

static ALWAYS_INLINE void apply_line(void *restrict z, const void *restrict y, const void *restrict r, int64_t offset,
                                     int64_t width, const float *restrict scale, const float *restrict shift,
                                     float least, const bool half, const bool residual) {
  for (int64_t c = 0; c < width; c++) {
    float value = multiply_add(scale[c], load_float(y, offset + c, half), shift[c]);
    if (residual)
      value += load_float(r, offset + c, half);
    store_float(z, offset + c, value < least ? least : value, half);
  }
}

static ALWAYS_INLINE void apply_lines(void *z, const void *y, const void *r, int64_t offset, int64_t elements,
                                      int64_t width, const float *scale, const float *shift, float least,
                                      const bool half, const bool residual) {
  for (int64_t end = offset + elements; offset < end; offset += width)
    apply_line(z, y, r, offset, end - offset < width ? end - offset : width, scale, shift, least, half, residual);
}

static void apply_run(const row_layout *m, row_run run, void *z, const void *y, const void *r, const float *scale,
                      const float *shift, bool relu) {
  float scales[LINE], shifts[LINE], least = relu ? 0 : -INFINITY;
  int64_t copies = rows_in_line(m->width, run.rows), width = copies * m->width, elements = run.rows * m->width;
  scale = repeat(scales, scale, m->width, copies);
  shift = repeat(shifts, shift, m->width, copies);
  switch ((m->half ? 2 : 0) + (r ? 1 : 0)) {
  case 0:
    apply_lines(z, y, NULL, run.offset, elements, width, scale, shift, least, false, false);
    break;
  case 1:
    apply_lines(z, y, r, run.offset, elements, width, scale, shift, least, false, true);
    break;
  case 2:
    apply_lines(z, y, NULL, run.offset, elements, width, scale, shift, least, true, false);
    break;
  default:
    apply_lines(z, y, r, run.offset, elements, width, scale, shift, least, true, true);
  }
}

/* Rows that a thread takes at a time where nothing is summed: about 16,000 elements. */
static int64_t rows_at_once(int64_t channels) {
  return 1 + 16384 / (channels + 1);
}

/* The values of (C) side by side, in `copy` where they aren't. */
static const float *dense_channels(const device_array *a, float *copy) {
  if (a->strides[0] == 1)
    return a->data;
  for (int64_t c = 0; c < a->shape[0]; c++)
    copy[c] = channel_value(a, c, 0);
  return copy;
}

device_status KERNEL(norm_apply)(device_context *context, const device_array *z, const device_array *y,
                                 const device_array *scale, const device_array *shift, const device_array *r,
                                 bool relu) {
  const device_array *parameters[] = {scale, shift};
  if (!is_map(z) || y->dtype != z->dtype || (r && r->dtype != z->dtype) || !are_parameters(2, parameters))
    return DEVICE_UNSUPPORTED;
  row_layout m = layout_of(z);
  if (m.rows * m.channels == 0)
    return DEVICE_DONE;
  float *copies = context->workspace(context, (size_t)(2 * m.channels) * sizeof(float));
  if (!copies)
    return DEVICE_FAILED;
  const float *scales = dense_channels(scale, copies), *shifts = dense_channels(shift, copies + m.channels);
  int64_t step = rows_at_once(m.channels);
#pragma omp parallel for schedule(static) if (m.rows * m.channels >= PARALLEL_FROM)
  for (int64_t first = 0; first < m.rows; first += step) {
    int64_t last = first + step < m.rows ? first + step : m.rows;
    for (int64_t k = 0; k < runs_between(&m, first, last); k++) {
      row_run run = run_between(&m, first, last, k);
      apply_run(&m, run, z->data, y->data, r ? r->data : NULL, scales + run.channel, shifts + run.channel, relu);
    }
  }
  return DEVICE_DONE;
}

/* ---- backward: dx = gain * dy + slope * (x - mean) + level ---- */

typedef struct {
  const float *mean;
  float *gain, *slope, *level; /* (C) */
} gradient_terms;

static ALWAYS_INLINE void gradient_line(void *restrict dx, const void *restrict dy, const void *restrict x,
                                        int64_t offset, int64_t width, const float *restrict mean,
                                        const float *restrict gain, const float *restrict slope,
                                        const float *restrict level, const bool half) {
  for (int64_t c = 0; c < width; c++) {
    float rest = slope[c] * (load_float(x, offset + c, half) - mean[c]) + level[c];
    store_float(dx, offset + c, gain[c] * load_float(dy, offset + c, half) + rest, half);
  }
}

static ALWAYS_INLINE void scaled_line(void *restrict dx, const void *restrict dy, int64_t offset, int64_t width,
                                      const float *restrict gain, const bool half) {
  for (int64_t c = 0; c < width; c++)
    store_float(dx, offset + c, gain[c] * load_float(dy, offset + c, half), half);
}

/* x NULL: slope and level are zero. */
static void gradient_run(const row_layout *m, row_run run, void *dx, const void *dy, const void *x,
                         const gradient_terms *terms) {
  float lines[4][LINE];
  int64_t copies = rows_in_line(m->width, run.rows), width = copies * m->width, end = run.offset + run.rows * m->width;
  const float *gain = repeat(lines[0], terms->gain + run.channel, m->width, copies);
  const float *mean = repeat(lines[1], terms->mean + run.channel, m->width, copies);
  const float *slope = repeat(lines[2], terms->slope + run.channel, m->width, copies);
  const float *level = repeat(lines[3], terms->level + run.channel, m->width, copies);
  for (int64_t offset = run.offset; offset < end; offset += width) {
    int64_t count = end - offset < width ? end - offset : width;
    if (x && m->half)
      gradient_line(dx, dy, x, offset, count, mean, gain, slope, level, true);
    else if (x)
      gradient_line(dx, dy, x, offset, count, mean, gain, slope, level, false);
    else if (m->half)
      scaled_line(dx, dy, offset, count, gain, true);
    else
      scaled_line(dx, dy, offset, count, gain, false);
  }
}

typedef struct {
  bool batch_statistics;
  const device_array *dweight, *dbias, *mean, *inverse, *weight;
} norm_gradient;

/* The sums of `count` channels (at most MERGED) from c on, of all chunks; partial (chunks, 2, C). */
static void merge_gradients(const norm_gradient *g, const float *partial, int64_t chunks, const row_layout *m,
                            int64_t first, int64_t count, const gradient_terms *terms) {
  double sums[MERGED] = {0}, products[MERGED] = {0}, part = g->batch_statistics ? 1 / (double)m->rows : 0;
  for (int64_t k = 0; k < chunks; k++) {
    const float *sum = partial + k * 2 * m->channels + first, *product = sum + m->channels;
    for (int64_t j = 0; j < count; j++) {
      sums[j] += sum[j];
      products[j] += product[j];
    }
  }
  for (int64_t j = 0; j < count; j++) {
    int64_t c = first + j;
    double inverse = channel_value(g->inverse, c, 1), gain = channel_value(g->weight, c, 1) * inverse;
    terms->gain[c] = (float)gain;
    terms->slope[c] = (float)(-gain * inverse * inverse * products[j] * part);
    terms->level[c] = (float)(-gain * sums[j] * part);
    channel_set(g->dweight, c, products[j] * inverse);
    channel_set(g->dbias, c, sums[j]);
  }
}

device_status KERNEL(norm_backward)(device_context *context, bool batch_statistics, const device_array *dx,
                                    const device_array *dweight, const device_array *dbias, const device_array *dy,
                                    const device_array *x, const device_array *mean, const device_array *inverse,
                                    const device_array *weight) {
  norm_gradient g = {batch_statistics, dweight, dbias, mean, inverse, weight};
  const device_array *parameters[] = {dweight, dbias, mean, inverse, weight};
  if (!is_map(x) || dy->dtype != x->dtype || (dx && dx->dtype != x->dtype) || !are_parameters(5, parameters))
    return DEVICE_UNSUPPORTED;
  row_layout m = layout_of(x);
  if (m.channels == 0)
    return DEVICE_DONE;
  bool summed = (batch_statistics && dx) || dweight || dbias;
  int64_t step = moments_rows(m.rows), chunks = moments_chunks(m.rows), summed_chunks = summed ? chunks : 0;
  float *scratch = context->workspace(context, (size_t)((4 + 2 * summed_chunks) * m.channels) * sizeof(float));
  if (!scratch)
    return DEVICE_FAILED;
  float *partial = scratch + 4 * m.channels;
  gradient_terms terms = {dense_channels(mean, scratch), scratch + m.channels, scratch + 2 * m.channels,
                          scratch + 3 * m.channels};
#pragma omp parallel if (m.rows * m.channels >= PARALLEL_FROM)
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < summed_chunks; k++) {
      float *sum = partial + k * 2 * m.channels;
      sum_rows(&m, k * step, chunk_end(m.rows, k), dy->data, x->data, terms.mean, sum, sum + m.channels);
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < m.channels; first += MERGED) {
      int64_t count = m.channels - first < MERGED ? m.channels - first : MERGED;
      merge_gradients(&g, partial, summed_chunks, &m, first, count, &terms);
    }
    /* From the end, which the first pass left in the cache. */
#pragma omp for schedule(static)
    for (int64_t k = (dx ? chunks : 0) - 1; k >= 0; k--) {
      int64_t first = k * step, last = chunk_end(m.rows, k);
      for (int64_t j = 0; j < runs_between(&m, first, last); j++)
        gradient_run(&m, run_between(&m, first, last, j), dx->data, dy->data, batch_statistics ? x->data : NULL,
                     &terms);
    }
  }
  return DEVICE_DONE;
}
