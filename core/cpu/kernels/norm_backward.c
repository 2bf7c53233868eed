/* norm_backward.c: batch norm's gradient in two passes that are as fast as memory. */
#include "cpu/kernels/norm_rows.h"

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
