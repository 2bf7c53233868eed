/* norm_statistics.c: batch norm's first pass: partial moments of each chunk of rows, and their merging. */
#include "cpu/kernels/norm_rows.h"

/* ---- sums over rows ---- */

/* Of each column of a number of lines: the sum of x - pivot and of its square. */
static ALWAYS_INLINE void sum_lines(const void *restrict x, int64_t offset, int64_t width, const float *restrict pivot,
                                    float *restrict sum, float *restrict square, const int lines, const bool half) {
  for (int64_t c = 0; c < width; c++) {
    float s = 0, q = 0;
#pragma GCC unroll 8
    for (int l = 0; l < lines; l++) {
      float difference = load_float(x, offset + l * width + c, half) - pivot[c];
      s += difference;
      q += difference * difference;
    }
    sum[c] += s;
    square[c] += q;
  }
}

static ALWAYS_INLINE void sum_all_lines(const void *x, int64_t offset, int64_t elements, int64_t width,
                                        const float *pivot, float *sum, float *square, const bool half) {
  int64_t end = offset + elements;
  for (; offset + 8 * width <= end; offset += 8 * width)
    sum_lines(x, offset, width, pivot, sum, square, 8, half);
  for (; offset < end; offset += width)
    sum_lines(x, offset, end - offset < width ? end - offset : width, pivot, sum, square, 1, half);
}

/* Adds to sum (C) and square (C) what rows `run` of a map have. */
static void sum_run(const row_layout *m, row_run run, const void *x, const float *pivot, float *sum, float *square) {
  float pivots[LINE], sums[LINE], squares[LINE];
  int64_t copies = rows_in_line(m->width, run.rows), width = copies * m->width, elements = run.rows * m->width;
  const float *line = repeat(pivots, pivot, m->width, copies);
  float *s = copies == 1 ? sum : sums, *q = copies == 1 ? square : squares;
  if (copies > 1) {
    memset(sums, 0, (size_t)width * sizeof(float));
    memset(squares, 0, (size_t)width * sizeof(float));
  }
  if (m->half)
    sum_all_lines(x, run.offset, elements, width, line, s, q, true);
  else
    sum_all_lines(x, run.offset, elements, width, line, s, q, false);
  if (copies > 1) {
    add_repeated(sum, sums, m->width, copies);
    add_repeated(square, squares, m->width, copies);
  }
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

void KERNEL(norm_chunk_moments)(const row_layout *m, float *chunk, int64_t first, int64_t last, const void *x) {
  float *count = chunk, *pivot = count + m->channels, *sum = pivot + m->channels, *square = sum + m->channels;
  for (int64_t c = 0; c < m->channels; c++)
    count[c] = (float)(last - first);
  choose_pivots(m, pivot, first, last, x);
  memset(sum, 0, (size_t)(2 * m->channels) * sizeof(float));
  for (int64_t k = 0; k < runs_between(m, first, last); k++) {
    row_run run = run_between(m, first, last, k);
    sum_run(m, run, x, pivot + run.channel, sum + run.channel, square + run.channel);
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
  for (int64_t k = 0; k < chunks; k++)
    KERNEL(norm_chunk_moments)
  (&m, (float *)moments->data + k * 4 * m.channels, k * step, chunk_end(m.rows, k), x->data);
  return DEVICE_DONE;
}

/* ---- statistics ---- */

/* Mean and sum of squared deviations of `count` channels (at most MERGED) from c on; moments (chunks, 4, C). */
static void merge_moments(const device_array *moments, int64_t rows, int64_t c, int64_t count, double *mean,
                          double *deviations) {
  int64_t chunks = moments->shape[0], channels = moments->shape[2];
  const float *all = (const float *)moments->data + c;
  for (int64_t j = 0; j < count; j++)
    mean[j] = deviations[j] = 0;
  for (int64_t k = 0; k < chunks; k++) {
    const float *n = all + k * 4 * channels, *pivot = n + channels, *sum = pivot + channels;
    for (int64_t j = 0; j < count; j++)
      mean[j] += n[j] > 0 ? (double)n[j] * pivot[j] + sum[j] : 0;
  }
  for (int64_t j = 0; j < count; j++)
    mean[j] /= (double)rows;
  for (int64_t k = 0; k < chunks; k++) {
    const float *n = all + k * 4 * channels, *pivot = n + channels, *sum = pivot + channels, *square = sum + channels;
    for (int64_t j = 0; j < count; j++) {
      double offset = sum[j] / (n[j] > 0 ? (double)n[j] : 1), distance = pivot[j] + offset - mean[j];
      double within = square[j] - sum[j] * offset;
      deviations[j] += n[j] > 0 ? (within < 0 ? 0 : within) + n[j] * distance * distance : 0;
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
#pragma omp parallel for schedule(static) if (moments->shape[0] * channels >= PARALLEL_FROM / 8)
  for (int64_t first = 0; first < channels; first += MERGED) {
    double means[MERGED], deviations[MERGED];
    int64_t count = channels - first < MERGED ? channels - first : MERGED;
    merge_moments(moments, rows, first, count, means, deviations);
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
