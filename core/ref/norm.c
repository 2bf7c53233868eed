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

double ref_affine(orepa_dtype map, double scale, double x, double shift) {
  double z = map == OREPA_FLOAT64 ? fma(scale, x, shift) : fmaf((float)scale, (float)x, (float)shift);
  return ref_rounded(map, z);
}

double ref_activated(double z, bool relu) {
  return relu && z < 0 ? 0 : z;
}

double ref_after_prologue(const device_array *x, int64_t at, int64_t channel, const device_prologue *prologue) {
  double value = ref_get(x, at);
  if (!prologue)
    return value;
  double scale = channel_value(&prologue->scale, channel, 1), shift = channel_value(&prologue->shift, channel, 0);
  return ref_activated(ref_affine(x->dtype, scale, value, shift), prologue->relu);
}

/* Element (row, c) of a map; rows in logical order of the axes but the second. */
static int64_t map_at(const device_array *map, int64_t row, int64_t c) {
  device_array rows = ref_without(map, 1);
  return ref_at(&rows, row) + c * map->strides[1];
}

static int64_t count_rows(const device_array *map) {
  device_array rows = ref_without(map, 1);
  return ref_count(&rows);
}

device_status ref_norm_apply(device_context *context, const device_array *z, const device_array *y,
                             const device_array *scale, const device_array *shift, const device_array *r,
                             const device_array *r_scale, const device_array *r_shift, bool relu) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(z->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t row = 0; row < count_rows(z); row++)
    for (int64_t c = 0; c < z->shape[1]; c++) {
      double value = ref_get(y, map_at(y, row, c)), added = r ? ref_get(r, map_at(r, row, c)) : 0;
      value = ref_affine(z->dtype, channel_value(scale, c, 1), value, channel_value(shift, c, 0));
      if (r && r_scale)
        added = ref_affine(z->dtype, channel_value(r_scale, c, 1), added, channel_value(r_shift, c, 0));
      if (r)
        value = ref_rounded(z->dtype, value + added);
      ref_set(z, map_at(z, row, c), ref_activated(value, relu));
    }
  return DEVICE_DONE;
}

/* ---- the gradient that arrives ---- */

/* Of element (row, c) of a map x, behind a max pool: the gradients of those windows that took it. */
static double unpooled(const device_gradient *g, const device_array *x, int64_t row, int64_t c) {
  int64_t position = row % (x->shape[2] * x->shape[3]), n = row / (x->shape[2] * x->shape[3]);
  double sum = 0;
  for (int64_t p = 0; p < g->dy->shape[2]; p++)
    for (int64_t q = 0; q < g->dy->shape[3]; q++)
      if (ref_get_integer(g->indices, ref_at4(g->indices, n, c, p, q)) == position)
        sum += ref_get(g->dy, ref_at4(g->dy, n, c, p, q));
  return ref_rounded(x->dtype, sum);
}

static double gradient_value(const device_gradient *g, const device_array *x, int64_t row, int64_t c) {
  double dy = g->windows ? unpooled(g, x, row, c) : ref_get(g->dy, map_at(g->dy, row, c)), z = 1;
  if (!g->windows && g->added)
    dy = ref_rounded(x->dtype, dy + ref_get(g->added, map_at(g->added, row, c)));
  if (g->result)
    z = ref_get(g->result, map_at(g->result, row, c));
  else if (g->scale)
    z = ref_affine(x->dtype, channel_value(g->scale, c, 1), ref_get(x, map_at(x, row, c)),
                   channel_value(g->shift, c, 0));
  return z > 0 ? dy : 0;
}

static void keep_gradient(const device_gradient *g, const device_array *x) {
  for (int64_t row = 0; row < count_rows(x); row++)
    for (int64_t c = 0; c < x->shape[1]; c++)
      ref_set(g->kept, map_at(g->kept, row, c), gradient_value(g, x, row, c));
}

/* ---- backward ---- */

typedef struct {
  double mean, inverse, gain; /* gain: weight * inverse */
  double dy, dy_xh;           /* the sums of dy and of dy * xh */
} channel_sums;

static channel_sums sum_channel(const device_gradient *dy, const device_array *x, int64_t c, double mean,
                                double inverse, double weight) {
  channel_sums s = {.mean = mean, .inverse = inverse, .gain = weight * inverse};
  for (int64_t row = 0; row < count_rows(x); row++) {
    double g = gradient_value(dy, x, row, c);
    s.dy += g;
    s.dy_xh += g * (ref_get(x, map_at(x, row, c)) - mean) * inverse;
  }
  return s;
}

static void input_channel(bool batch_statistics, const device_array *dx, const device_gradient *dy,
                          const device_array *x, int64_t c, const channel_sums *s) {
  double count = (double)count_rows(x);
  for (int64_t row = 0; row < count_rows(x); row++) {
    double g = gradient_value(dy, x, row, c), xh = (ref_get(x, map_at(x, row, c)) - s->mean) * s->inverse;
    if (batch_statistics)
      g -= s->dy / count + xh * s->dy_xh / count;
    ref_set(dx, map_at(dx, row, c), s->gain * g);
  }
}

device_status ref_norm_backward(device_context *context, bool batch_statistics, const device_array *dx,
                                const device_array *dweight, const device_array *dbias, const device_gradient *dy,
                                const device_array *x, const device_array *mean, const device_array *inverse,
                                const device_array *weight) {
  REF_ENTRY;
  (void)context;
  device_gradient kept = {.dy = dy->kept};
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  if (dy->kept) {
    keep_gradient(dy, x);
    dy = &kept;
  }
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
