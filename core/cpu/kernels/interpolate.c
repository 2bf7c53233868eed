/* interpolate.c: channels-last maps in another size. Each axis is a list of taps: what a position of the map that is
 * written takes of the map that is read, forward one element or two, backward those that took it, so that every element
 * is written once, by one thread, its terms added in one order. A row is blended of whole rows, then its columns are
 * of that row's columns. */
#include <omp.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/lanes.h"
#include "interpolation.h"

enum {
  BLOCK = 4,             /* vectors that are kept in registers together */
  PARALLEL_FROM = 32768, /* elements of the larger map */
};

/* Elements first ... first + count - 1 of the map that is read, by these shares. */
typedef struct {
  int64_t first, count;
  float *share;
} axis_taps;

/* ---- taps ---- */

/* Shares along an axis are at most two for each element of the interpolated map. */
static size_t taps_bytes(int64_t positions, int64_t outputs) {
  return (size_t)positions * sizeof(axis_taps) + (size_t)(2 * outputs + 2 * (outputs & 1)) * sizeof(float);
}

/* What each output takes. Gives where the memory is free again. */
static void *forward_taps(void *memory, const orepa_interpolation *how, int axis, int64_t outputs, int64_t inputs) {
  axis_taps *taps = memory;
  float *share = (float *)(taps + outputs);
  for (int64_t o = 0; o < outputs; o++, share += 2) {
    interpolation_source source = interpolation_source_of(how, axis, o, outputs, inputs);
    share[0] = (float)(1 - source.share);
    share[1] = (float)source.share;
    taps[o] = (axis_taps){source.first, source.share != 0 ? 2 : 1, share};
  }
  return (char *)memory + taps_bytes(outputs, outputs);
}

static void take_output(axis_taps *taps, int64_t input, int64_t output, double share) {
  axis_taps *t = &taps[input];
  if (share != 0) {
    t->first = t->count ? t->first : output;
    t->count = output - t->first + 1;
  }
}

static void set_share(const axis_taps *taps, int64_t input, int64_t output, double share) {
  if (share != 0)
    taps[input].share[output - taps[input].first] = (float)share;
}

/* The outputs that took each input: neighbours, since sources only grow. */
static void *backward_taps(void *memory, const orepa_interpolation *how, int axis, int64_t outputs, int64_t inputs) {
  axis_taps *taps = memory;
  float *share = (float *)(taps + inputs);
  for (int64_t i = 0; i < inputs; i++)
    taps[i] = (axis_taps){0, 0, NULL};
  for (int64_t o = 0; o < outputs; o++) {
    interpolation_source source = interpolation_source_of(how, axis, o, outputs, inputs);
    take_output(taps, source.first, o, 1 - source.share);
    take_output(taps, source.second, o, source.share);
  }
  for (int64_t i = 0; i < inputs; share += taps[i].count, i++)
    taps[i].share = share;
  for (int64_t o = 0; o < outputs; o++) {
    interpolation_source source = interpolation_source_of(how, axis, o, outputs, inputs);
    set_share(taps, source.first, o, 1 - source.share);
    set_share(taps, source.second, o, source.share);
  }
  return (char *)memory + taps_bytes(inputs, outputs);
}

/* ---- blending: into[k] = sum over taps j of share[j] * from[j * step + k], k < width ---- */

static ALWAYS_INLINE void blend_vectors(void *into, int64_t to, const void *from, int64_t at, int64_t step,
                                        const axis_taps *t, const int vectors, const bool half_into,
                                        const bool half_from) {
  float_lanes sum[BLOCK];
  for (int v = 0; v < vectors; v++)
    sum[v] = t->share[0] * load_lanes(from, at + v * LANES, half_from);
  for (int64_t j = 1; j < t->count; j++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++)
      sum[v] += t->share[j] * load_lanes(from, at + j * step + v * LANES, half_from);
  for (int v = 0; v < vectors; v++)
    store_lanes(into, to + v * LANES, sum[v], half_into);
}

static ALWAYS_INLINE void blend(void *into, int64_t to, const void *from, int64_t at, int64_t step, int64_t width,
                                const axis_taps *t, const bool half_into, const bool half_from) {
  int64_t k = 0;
  at += t->first * step;
  if (t->count == 0) {
    for (; k < width; k++)
      store_float(into, to + k, 0, half_into);
    return;
  }
  for (; width - k >= BLOCK * LANES; k += BLOCK * LANES)
    blend_vectors(into, to + k, from, at + k, step, t, BLOCK, half_into, half_from);
  for (; width - k >= LANES; k += LANES)
    blend_vectors(into, to + k, from, at + k, step, t, 1, half_into, half_from);
  if (k < width && width >= LANES) { /* the last vector overlaps the one before it */
    blend_vectors(into, to + width - LANES, from, at + width - LANES, step, t, 1, half_into, half_from);
    return;
  }
  for (; k < width; k++) {
    float sum = t->share[0] * load_float(from, at + k, half_from);
    for (int64_t j = 1; j < t->count; j++)
      sum += t->share[j] * load_float(from, at + j * step + k, half_from);
    store_float(into, to + k, sum, half_into);
  }
}

/* ---- rows ---- */

/* `into` (N, H, W, C) is made of `from` (N, P, Q, C). */
typedef struct {
  void *into;
  const void *from;
  int64_t images, channels, height, width, rows, columns;
  axis_taps *row, *column; /* (H), (W) */
  bool half;
} resizing;

static ALWAYS_INLINE void blend_columns(const resizing *r, int64_t line, const void *from, int64_t at, const bool half,
                                        const bool half_from) {
  for (int64_t w = 0; w < r->width; w++)
    blend(r->into, (line * r->width + w) * r->channels, from, at, r->channels, r->channels, &r->column[w], half,
          half_from);
}

/* Line n*H + h of the result; the buffer holds a row of the map that is read. */
static ALWAYS_INLINE void resize_line(const resizing *r, int64_t line, float *buffer, const bool half) {
  const axis_taps *t = &r->row[line % r->height];
  int64_t length = r->columns * r->channels, image = line / r->height * r->rows * length;
  if (t->count == 1 && t->share[0] == 1) { /* a row as it is */
    blend_columns(r, line, r->from, image + t->first * length, half, half);
    return;
  }
  blend(buffer, 0, r->from, image, length, length, t, false, half);
  blend_columns(r, line, buffer, 0, half, false);
}

/* ---- the entries ---- */

typedef void *make_taps(void *memory, const orepa_interpolation *how, int axis, int64_t outputs, int64_t inputs);

/* Makes `into` of `from`, one of which is y, the interpolated map, and the other x. */
static device_status resize(device_context *context, const orepa_interpolation *how, make_taps *taps,
                            const device_array *into, const device_array *from, const device_array *y,
                            const device_array *x) {
  if (into->dtype != from->dtype || (into->dtype != OREPA_FLOAT32 && into->dtype != OREPA_BFLOAT16))
    return DEVICE_UNSUPPORTED;
  resizing r = {into->data,
                from->data,
                into->shape[0],
                into->shape[1],
                into->shape[2],
                into->shape[3],
                from->shape[2],
                from->shape[3],
                NULL,
                NULL,
                into->dtype == OREPA_BFLOAT16};
  int64_t lines = r.channels ? r.images * r.height : 0, length = r.columns * r.channels,
          threads = omp_get_max_threads();
  if (lines == 0)
    return DEVICE_DONE;
  size_t plan = taps_bytes(r.height, y->shape[2]) + taps_bytes(r.width, y->shape[3]);
  char *memory = context->workspace(context, plan + (size_t)(threads * length) * sizeof(float));
  if (!memory)
    return DEVICE_FAILED;
  r.row = (axis_taps *)memory;
  r.column = taps(memory, how, 0, y->shape[2], x->shape[2]);
  float *buffers = taps(r.column, how, 1, y->shape[3], x->shape[3]);
  int64_t largest = r.height * r.width > r.rows * r.columns ? r.height * r.width : r.rows * r.columns;
#pragma omp parallel for schedule(static) if (r.images * r.channels * largest >= PARALLEL_FROM)
  for (int64_t line = 0; line < lines; line++) {
    float *buffer = buffers + omp_get_thread_num() * length;
    if (r.half)
      resize_line(&r, line, buffer, true);
    else
      resize_line(&r, line, buffer, false);
  }
  return DEVICE_DONE;
}

device_status KERNEL(interpolate_forward)(device_context *context, const orepa_interpolation *how,
                                          const device_array *y, const device_array *x) {
  return resize(context, how, forward_taps, y, x, y, x);
}

device_status KERNEL(interpolate_backward)(device_context *context, const orepa_interpolation *how,
                                           const device_array *dx, const device_array *dy) {
  return resize(context, how, backward_taps, dx, dy, dy, dx);
}
