/* pool.c: maximum and average over windows. The backward passes add up one plane (H, W) at a time in double. */
#include "ref/ref.h"

/* What of a window lies in the map along one axis: positions first, first + step, ..., `count` of them; and how many
 * lie in the map with its padding. */
typedef struct {
  int64_t first, step, count, padded;
} window_span;

static window_span span_of(const device_windows *windows, int axis, int64_t output, int64_t outputs, int64_t size) {
  if (windows->adaptive) {
    int64_t first = output * size / outputs, end = ((output + 1) * size + outputs - 1) / outputs;
    return (window_span){first, 1, end - first, end - first};
  }
  const orepa_pool *p = &windows->pool;
  window_span span = {.step = p->dilation[axis]};
  for (int64_t k = 0; k < p->kernel[axis]; k++) {
    int64_t at = output * p->stride[axis] + k * span.step - p->padding[axis];
    if (at < size + p->padding[axis])
      span.padded++;
    if (at >= 0 && at < size) {
      span.first = span.count ? span.first : at;
      span.count++;
    }
  }
  return span;
}

typedef struct {
  window_span h, w;
} window;

/* y (N, C, P, Q), x (N, C, H, W). */
static window window_of(const device_windows *windows, const device_array *y, const device_array *x, int64_t p,
                        int64_t q) {
  return (window){span_of(windows, 0, p, y->shape[2], x->shape[2]), span_of(windows, 1, q, y->shape[3], x->shape[3])};
}

/* ---- maximum ---- */

/* NaN beats all, the first of equals stays; -1: there is no element. */
static int64_t largest_in(const window *in, const device_array *x, const device_prologue *prologue, int64_t n,
                          int64_t c, double *largest) {
  int64_t index = -1;
  *largest = -INFINITY;
  for (int64_t i = 0; i < in->h.count; i++)
    for (int64_t j = 0; j < in->w.count; j++) {
      int64_t h = in->h.first + i * in->h.step, w = in->w.first + j * in->w.step;
      double value = ref_after_prologue(x, ref_at4(x, n, c, h, w), c, prologue);
      if (index < 0 || value > *largest || (isnan(value) && !isnan(*largest))) {
        *largest = value;
        index = h * x->shape[3] + w;
      }
    }
  return index;
}

device_status ref_max_pool_forward(device_context *context, const device_windows *windows, const device_array *y,
                                   const device_array *indices, const device_array *x,
                                   const device_prologue *prologue) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t n = 0; n < y->shape[0]; n++)
    for (int64_t c = 0; c < y->shape[1]; c++)
      for (int64_t p = 0; p < y->shape[2]; p++)
        for (int64_t q = 0; q < y->shape[3]; q++) {
          double largest;
          window in = window_of(windows, y, x, p, q);
          int64_t index = largest_in(&in, x, prologue, n, c, &largest);
          ref_set(y, ref_at4(y, n, c, p, q), largest);
          if (indices)
            ref_set_integer(indices, ref_at4(indices, n, c, p, q), index);
        }
  return DEVICE_DONE;
}

/* ---- backward: each plane of dx is summed, then stored ---- */

typedef void add_plane(double *plane, const device_windows *windows, const device_array *dx, const device_array *dy,
                       const device_array *indices, int64_t n, int64_t c);

static device_status backward(device_context *context, add_plane *add, const device_windows *windows,
                              const device_array *dx, const device_array *dy, const device_array *indices) {
  if (!orepa_dtype_is_float(dx->dtype))
    return DEVICE_UNSUPPORTED;
  int64_t height = dx->shape[2], width = dx->shape[3];
  size_t bytes = (size_t)(height * width) * sizeof(double);
  if (ref_count(dx) == 0)
    return DEVICE_DONE;
  double *plane = context->workspace(context, bytes);
  if (!plane)
    return DEVICE_FAILED;
  for (int64_t n = 0; n < dx->shape[0]; n++)
    for (int64_t c = 0; c < dx->shape[1]; c++) {
      memset(plane, 0, bytes);
      add(plane, windows, dx, dy, indices, n, c);
      for (int64_t h = 0; h < height; h++)
        for (int64_t w = 0; w < width; w++)
          ref_set(dx, ref_at4(dx, n, c, h, w), plane[h * width + w]);
    }
  return DEVICE_DONE;
}

static void add_largest(double *plane, const device_windows *windows, const device_array *dx, const device_array *dy,
                        const device_array *indices, int64_t n, int64_t c) {
  (void)windows;
  for (int64_t p = 0; p < dy->shape[2]; p++)
    for (int64_t q = 0; q < dy->shape[3]; q++) {
      int64_t index = ref_get_integer(indices, ref_at4(indices, n, c, p, q));
      if (index >= 0 && index < dx->shape[2] * dx->shape[3])
        plane[index] += ref_get(dy, ref_at4(dy, n, c, p, q));
    }
}

device_status ref_max_pool_backward(device_context *context, const device_windows *windows, const device_array *dx,
                                    const device_array *dy, const device_array *indices) {
  REF_ENTRY;
  return backward(context, add_largest, windows, dx, dy, indices);
}

/* ---- average ---- */

static double divisor_of(const device_windows *windows, const window *in) {
  bool padded = windows->pool.count_padding;
  return (double)(padded ? in->h.padded * in->w.padded : in->h.count * in->w.count);
}

static double average_in(const device_windows *windows, const window *in, const device_array *x, int64_t n, int64_t c) {
  double sum = 0;
  for (int64_t i = 0; i < in->h.count; i++)
    for (int64_t j = 0; j < in->w.count; j++)
      sum += ref_get(x, ref_at4(x, n, c, in->h.first + i * in->h.step, in->w.first + j * in->w.step));
  return in->h.count && in->w.count ? sum / divisor_of(windows, in) : 0;
}

device_status ref_avg_pool_forward(device_context *context, const device_windows *windows, const device_array *y,
                                   const device_array *x) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t n = 0; n < y->shape[0]; n++)
    for (int64_t c = 0; c < y->shape[1]; c++)
      for (int64_t p = 0; p < y->shape[2]; p++)
        for (int64_t q = 0; q < y->shape[3]; q++) {
          window in = window_of(windows, y, x, p, q);
          ref_set(y, ref_at4(y, n, c, p, q), average_in(windows, &in, x, n, c));
        }
  return DEVICE_DONE;
}

static void add_average(double *plane, const device_windows *windows, const device_array *dx, const device_array *dy,
                        const device_array *indices, int64_t n, int64_t c) {
  (void)indices;
  for (int64_t p = 0; p < dy->shape[2]; p++)
    for (int64_t q = 0; q < dy->shape[3]; q++) {
      window in = window_of(windows, dy, dx, p, q);
      double share = ref_get(dy, ref_at4(dy, n, c, p, q)) / divisor_of(windows, &in);
      for (int64_t i = 0; i < in.h.count; i++)
        for (int64_t j = 0; j < in.w.count; j++)
          plane[(in.h.first + i * in.h.step) * dx->shape[3] + in.w.first + j * in.w.step] += share;
    }
}

device_status ref_avg_pool_backward(device_context *context, const device_windows *windows, const device_array *dx,
                                    const device_array *dy) {
  REF_ENTRY;
  return backward(context, add_average, windows, dx, dy, NULL);
}
