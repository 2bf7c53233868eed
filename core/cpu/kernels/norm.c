/* norm.c: batch norm's forward pass: one fused multiply-add per element, and what follows it. */
#include "cpu/kernels/norm_rows.h"

/* ---- forward ---- */

typedef enum { ALONE, PLUS_MAP, PLUS_NORM } apply_kind;

/* (C) each. */
typedef struct {
  const float *scale, *shift, *r_scale, *r_shift;
} apply_terms;

static ALWAYS_INLINE void apply_line(void *restrict z, const void *restrict y, const void *restrict r, int64_t offset,
                                     int64_t width, const apply_terms t, float least, const bool half,
                                     const apply_kind kind) {
  const float *restrict scale = t.scale, *restrict shift = t.shift, *restrict r_scale = t.r_scale,
                        *restrict r_shift = t.r_shift;
  const float limit = least - largest_zero(half); /* what is below it is below `least` once it is rounded */
  for (int64_t c = 0; c < width; c++) {
    float value = multiply_add(scale[c], load_float(y, offset + c, half), shift[c]);
    if (kind == PLUS_MAP)
      value = rounded_float(value, half) + load_float(r, offset + c, half);
    if (kind == PLUS_NORM) {
      float added = multiply_add(r_scale[c], load_float(r, offset + c, half), r_shift[c]);
      value = rounded_float(value, half) + rounded_float(added, half);
    }
    store_float(z, offset + c, value < limit ? least : value, half); /* rounds the last step */
  }
}

/* A line of floats past the caches; z and the width are whole vectors. */
static ALWAYS_INLINE void stream_line(float *z, const float *y, const float *r, int64_t width, const apply_terms t,
                                      float least, const apply_kind kind) {
  const float_lanes floor = (float_lanes){0} + least;
  for (int64_t c = 0; c < width; c += LANES) {
    float_lanes value =
        multiply_add_lanes(load_lanes(t.scale, c, false), load_lanes(y, c, false), load_lanes(t.shift, c, false));
    if (kind == PLUS_MAP)
      value += load_lanes(r, c, false);
    if (kind == PLUS_NORM)
      value +=
          multiply_add_lanes(load_lanes(t.r_scale, c, false), load_lanes(r, c, false), load_lanes(t.r_shift, c, false));
    const int_lanes below = (int_lanes)(value < floor); /* NaN is not */
    stream_lanes(z + c, (float_lanes)(((int_lanes)floor & below) | ((int_lanes)value & ~below)));
  }
}

static ALWAYS_INLINE void apply_lines(void *z, const void *y, const void *r, int64_t offset, int64_t elements,
                                      int64_t width, const apply_terms t, float least, const bool half, bool streams,
                                      const apply_kind kind) {
  for (int64_t end = offset + elements; offset < end; offset += width)
    if (!half && streams && end - offset >= width)
      stream_line((float *)z + offset, (const float *)y + offset, (const float *)r + (r ? offset : 0), width, t, least,
                  kind);
    else
      apply_line(z, y, r, offset, end - offset < width ? end - offset : width, t, least, half, kind);
}

static void apply_run(const row_layout *m, row_run run, void *z, const void *y, const void *r, const apply_terms *terms,
                      bool relu, bool streams) {
  float lines[4][LINE], least = relu ? 0 : -INFINITY;
  int64_t copies = rows_in_line(m->width, run.rows), width = copies * m->width, elements = run.rows * m->width;
  apply_terms t = {repeat(lines[0], terms->scale + run.channel, m->width, copies),
                   repeat(lines[1], terms->shift + run.channel, m->width, copies), NULL, NULL};
  if (terms->r_scale) {
    t.r_scale = repeat(lines[2], terms->r_scale + run.channel, m->width, copies);
    t.r_shift = repeat(lines[3], terms->r_shift + run.channel, m->width, copies);
  }
  apply_kind kind = !r ? ALONE : t.r_scale ? PLUS_NORM : PLUS_MAP;
  switch ((m->half ? 3 : 0) + (int)kind) {
  case ALONE:
    apply_lines(z, y, NULL, run.offset, elements, width, t, least, false, streams, ALONE);
    break;
  case PLUS_MAP:
    apply_lines(z, y, r, run.offset, elements, width, t, least, false, streams, PLUS_MAP);
    break;
  case PLUS_NORM:
    apply_lines(z, y, r, run.offset, elements, width, t, least, false, streams, PLUS_NORM);
    break;
  case 3 + ALONE:
    apply_lines(z, y, NULL, run.offset, elements, width, t, least, true, false, ALONE);
    break;
  case 3 + PLUS_MAP:
    apply_lines(z, y, r, run.offset, elements, width, t, least, true, false, PLUS_MAP);
    break;
  default:
    apply_lines(z, y, r, run.offset, elements, width, t, least, true, false, PLUS_NORM);
  }
}

void KERNEL(norm_apply_rows)(const row_layout *m, int64_t first, int64_t last, void *z, const void *y,
                             const float *scale, const float *shift) {
  apply_terms terms = {scale, shift, NULL, NULL};
  bool streams = streams_map(m, z);
  for (int64_t k = 0; k < runs_between(m, first, last); k++)
    apply_run(m, run_between(m, first, last, k), z, y, NULL, &terms, false, streams);
  stream_end();
}

/* Rows that a thread takes at a time where nothing is summed: about 16,000 elements. */
static int64_t rows_at_once(int64_t channels) {
  return 1 + 16384 / (channels + 1);
}

device_status KERNEL(norm_apply)(device_context *context, const device_array *z, const device_array *y,
                                 const device_array *scale, const device_array *shift, const device_array *r,
                                 const device_array *r_scale, const device_array *r_shift, bool relu) {
  const device_array *parameters[] = {scale, shift, r_scale, r_shift};
  if (!is_map(z) || y->dtype != z->dtype || (r && r->dtype != z->dtype) || !are_parameters(4, parameters))
    return DEVICE_UNSUPPORTED;
  row_layout m = layout_of(z);
  if (m.rows * m.channels == 0)
    return DEVICE_DONE;
  float *copies = context->workspace(context, (size_t)(4 * m.channels) * sizeof(float));
  if (!copies)
    return DEVICE_FAILED;
  apply_terms terms = {dense_channels(scale, copies), dense_channels(shift, copies + m.channels), NULL, NULL};
  if (r && r_scale) {
    terms.r_scale = dense_channels(r_scale, copies + 2 * m.channels);
    terms.r_shift = dense_channels(r_shift, copies + 3 * m.channels);
  }
  int64_t step = rows_at_once(m.channels);
  bool streams = streams_map(&m, z->data);
#pragma omp parallel for schedule(static) if (m.rows * m.channels >= PARALLEL_FROM)
  for (int64_t first = 0; first < m.rows; first += step) {
    int64_t last = first + step < m.rows ? first + step : m.rows;
    for (int64_t k = 0; k < runs_between(&m, first, last); k++)
      apply_run(&m, run_between(&m, first, last, k), z->data, y->data, r ? r->data : NULL, &terms, relu, streams);
    stream_end();
  }
  return DEVICE_DONE;
}
