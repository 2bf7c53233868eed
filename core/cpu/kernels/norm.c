/* norm.c: batch norm's forward pass: one fused multiply-add per element, and what follows it. */
#include "cpu/kernels/norm_rows.h"

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
