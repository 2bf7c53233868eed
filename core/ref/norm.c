/* norm.c: batch norm in its steps: partial moments of a map, statistics from them, the map's scale and shift applied,
 * and the gradient. A map (N, C, ...) is R rows of C channels; rows are counted in logical order of the other axes. */
#include "ref/ref.h"

/* ---- statistics ---- */

enum { COUNT, PIVOT, SUM, SQUARE }; /* moments (chunks, 4, C) */

static int64_t moment_at(const device_array *moments, int64_t chunk, int which, int64_t c) {
  return chunk * moments->strides[0] + which * moments->strides[1] + c * moments->strides[2];
}

static int64_t rows_in_chunk(int64_t rows, int64_t chunk) {
  int64_t most = moments_rows(rows), left = rows - chunk * most;
  return left < most ? left : most;
}

/* The pivot is the chunk's mean as far as the moments' type holds it. */
static void chunk_moments(const device_array *moments, const device_array *x, int64_t chunk, int64_t c) {
  device_array rows = ref_without(x, 1);
  int64_t count = rows_in_chunk(ref_count(&rows), chunk), first = chunk * moments_rows(ref_count(&rows));
  double sum = 0, difference = 0, square = 0;
  for (int64_t r = first; r < first + count; r++)
    sum += ref_get(x, ref_at(&rows, r) + c * x->strides[1]);
  double pivot = ref_rounded(moments->dtype, sum / (double)count);
  for (int64_t r = first; r < first + count; r++) {
    double d = ref_get(x, ref_at(&rows, r) + c * x->strides[1]) - pivot;
    difference += d;
    square += d * d;
  }
  ref_set(moments, moment_at(moments, chunk, COUNT, c), (double)count);
  ref_set(moments, moment_at(moments, chunk, PIVOT, c), pivot);
  ref_set(moments, moment_at(moments, chunk, SUM, c), difference);
  ref_set(moments, moment_at(moments, chunk, SQUARE, c), square);
}

void ref_moments_of(const device_array *moments, const device_array *x) {
  for (int64_t chunk = 0; chunk < moments->shape[0]; chunk++)
    for (int64_t c = 0; c < moments->shape[2]; c++)
      chunk_moments(moments, x, chunk, c);
}

device_status ref_norm_moments(device_context *context, const device_array *moments, const device_array *x) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  ref_moments_of(moments, x);
  return DEVICE_DONE;
}

static double moment(const device_array *moments, int64_t chunk, int which, int64_t c) {
  return ref_get(moments, moment_at(moments, chunk, which, c));
}

/* Mean and sum of squared deviations of one channel, merged from the chunks that have rows. */
static void merge_chunks(const device_array *moments, int64_t rows, int64_t c, double *mean, double *deviations) {
  double sum = 0, squares = 0;
  for (int64_t k = 0; k < moments->shape[0]; k++)
    if (moment(moments, k, COUNT, c) > 0)
      sum += moment(moments, k, SUM, c) + moment(moments, k, COUNT, c) * moment(moments, k, PIVOT, c);
  *mean = sum / (double)rows;
  for (int64_t k = 0; k < moments->shape[0]; k++) {
    double count = moment(moments, k, COUNT, c), s1 = moment(moments, k, SUM, c);
    if (!(count > 0))
      continue;
    double off = moment(moments, k, PIVOT, c) + s1 / count - *mean;
    double within = moment(moments, k, SQUARE, c) - s1 * s1 / count;
    squares += (within < 0 ? 0 : within) + count * off * off;
  }
  *deviations = squares;
}

static double channel_value(const device_array *a, int64_t c, double absent) {
  return a ? ref_get(a, c * a->strides[0]) : absent;
}

static void channel_set(const device_array *a, int64_t c, double value) {
  if (a)
    ref_set(a, c * a->strides[0], value);
}

device_status ref_norm_finalize(device_context *context, const orepa_norm *norm, int64_t rows,
                                const device_array *moments, const device_array *weight, const device_array *bias,
                                const device_array *running_mean, const device_array *running_var,
                                const device_array *mean, const device_array *inverse, const device_array *scale,
                                const device_array *shift) {
  REF_ENTRY;
  (void)context;
  double keep = 1 - norm->momentum;
  for (int64_t c = 0; c < mean->shape[0]; c++) {
    double m, deviations;
    merge_chunks(moments, rows, c, &m, &deviations);
    double one = 1 / sqrt(deviations / (double)rows + norm->eps);
    double factor = ref_rounded(scale->dtype, channel_value(weight, c, 1) * one); /* as it will be applied */
    channel_set(mean, c, m);
    channel_set(inverse, c, one);
    channel_set(scale, c, factor);
    channel_set(shift, c, channel_value(bias, c, 0) - m * factor);
    channel_set(running_mean, c, keep * channel_value(running_mean, c, 0) + norm->momentum * m);
    channel_set(running_var, c,
                keep * channel_value(running_var, c, 0) + norm->momentum * deviations / (double)(rows - 1));
  }
  return DEVICE_DONE;
}

/* ---- forward ---- */

double ref_affine(orepa_dtype map, double scale, double x, double shift, const double *r, bool relu) {
  if (map == OREPA_FLOAT64) {
    double z = fma(scale, x, shift);
    z = r ? z + *r : z;
    return relu && z < 0 ? 0 : z;
  }
  float z = fmaf((float)scale, (float)x, (float)shift);
  z = r ? z + (float)*r : z;
  return relu && z < 0 ? 0 : z;
}

device_status ref_norm_apply(device_context *context, const device_array *z, const device_array *y,
                             const device_array *scale, const device_array *shift, const device_array *r, bool relu) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(z->dtype))
    return DEVICE_UNSUPPORTED;
  device_array rows = ref_without(z, 1), rows_y = ref_without(y, 1), rows_r = ref_without(r ? r : y, 1);
  for (int64_t row = 0; row < ref_count(&rows); row++)
    for (int64_t c = 0; c < z->shape[1]; c++) {
      double added = r ? ref_get(r, ref_at(&rows_r, row) + c * r->strides[1]) : 0;
      ref_set(z, ref_at(&rows, row) + c * z->strides[1],
              ref_affine(z->dtype, channel_value(scale, c, 1), ref_get(y, ref_at(&rows_y, row) + c * y->strides[1]),
                         channel_value(shift, c, 0), r ? &added : NULL, relu));
    }
  return DEVICE_DONE;
}

/* ---- backward ---- */

typedef struct {
  double mean, inverse, gain; /* gain: weight * inverse */
  double dy, dy_xh;           /* the sums of dy and of dy * xh */
} channel_sums;

static channel_sums sum_channel(const device_array *dy, const device_array *x, int64_t c, double mean, double inverse,
                                double weight) {
  channel_sums s = {.mean = mean, .inverse = inverse, .gain = weight * inverse};
  device_array rows = ref_without(x, 1), rows_dy = ref_without(dy, 1);
  for (int64_t r = 0; r < ref_count(&rows); r++) {
    double g = ref_get(dy, ref_at(&rows_dy, r) + c * dy->strides[1]);
    s.dy += g;
    s.dy_xh += g * (ref_get(x, ref_at(&rows, r) + c * x->strides[1]) - mean) * inverse;
  }
  return s;
}

static void input_channel(bool batch_statistics, const device_array *dx, const device_array *dy, const device_array *x,
                          int64_t c, const channel_sums *s) {
  device_array rows = ref_without(x, 1), rows_dy = ref_without(dy, 1), rows_dx = ref_without(dx, 1);
  double count = (double)ref_count(&rows);
  for (int64_t r = 0; r < ref_count(&rows); r++) {
    double g = ref_get(dy, ref_at(&rows_dy, r) + c * dy->strides[1]);
    double xh = (ref_get(x, ref_at(&rows, r) + c * x->strides[1]) - s->mean) * s->inverse;
    if (batch_statistics)
      g -= s->dy / count + xh * s->dy_xh / count;
    ref_set(dx, ref_at(&rows_dx, r) + c * dx->strides[1], s->gain * g);
  }
}

device_status ref_norm_backward(device_context *context, bool batch_statistics, const device_array *dx,
                                const device_array *dweight, const device_array *dbias, const device_array *dy,
                                const device_array *x, const device_array *mean, const device_array *inverse,
                                const device_array *weight) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t c = 0; c < x->shape[1]; c++) {
    channel_sums s =
        sum_channel(dy, x, c, channel_value(mean, c, 0), channel_value(inverse, c, 1), channel_value(weight, c, 1));
    if (dx)
      input_channel(batch_statistics, dx, dy, x, c, &s);
    channel_set(dweight, c, s.dy_xh);
    channel_set(dbias, c, s.dy);
  }
  return DEVICE_DONE;
}
