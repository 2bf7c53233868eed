/* group_norm.c: group norm's forward pass: statistics of each image's groups, then the map. */
#include "cpu/kernels/group_norm.h"

enum { PIECE = 1024 }; /* elements that are summed in float */

/* Where the statistics go, (N, G). */
typedef struct {
  float *mean, *inverse;
  double eps;
} group_statistics;

static void set_statistics(const group_statistics *s, int64_t at, double mean, double variance) {
  s->mean[at] = (float)mean;
  s->inverse[at] = (float)(1 / sqrt((variance > 0 || variance != variance ? variance : 0) + s->eps));
}

/* ---- images of many rows: moments of chunks, merged over the chunks and the channels of a group ---- */

/* partial (chunks, 4, C) are the image's moments; group k = n*G + g is set. */
static void merge_group(const group_layout *g, const float *partial, int64_t k, const group_statistics *s) {
  int64_t first = k % g->groups * g->size, last = first + g->size, channels = g->m.channels;
  double rows = (double)g->length, mean = 0, deviations = 0;
  for (int64_t j = 0; j < g->chunks; j++) {
    const float *count = partial + j * 4 * channels, *pivot = count + channels, *sum = pivot + channels;
    for (int64_t c = first; c < last; c++)
      mean += (double)count[c] * pivot[c] + sum[c];
  }
  mean /= rows * (double)g->size;
  for (int64_t j = 0; j < g->chunks; j++) {
    const float *count = partial + j * 4 * channels, *pivot = count + channels, *sum = pivot + channels,
                *square = sum + channels;
    for (int64_t c = first; c < last; c++) {
      double offset = sum[c] / (double)count[c], distance = pivot[c] + offset - mean,
             within = square[c] - sum[c] * offset;
      deviations += (within < 0 ? 0 : within) + count[c] * distance * distance;
    }
  }
  set_statistics(s, k, mean, deviations / (rows * (double)g->size));
}

/* With what the channels of group k are multiplied and what is added: scale, shift (N, C). */
static void group_terms(const group_layout *g, int64_t k, const group_statistics *s, const float *weight,
                        const float *bias, float *scale, float *shift) {
  int64_t first = k % g->groups * g->size, image = k / g->groups * g->m.channels;
  for (int64_t c = first; c < first + g->size; c++) {
    float factor = weight[c] * s->inverse[k];
    scale[image + c] = factor;
    shift[image + c] = (float)(bias[c] - (double)s->mean[k] * factor);
  }
}

static device_status normalize_maps(device_context *context, const group_layout *g, const group_statistics *s,
                                    const device_array *y, const device_array *x, const device_array *weight,
                                    const device_array *bias) {
  int64_t channels = g->m.channels, items = g->images * g->chunks, image = g->chunks * 4 * channels;
  float *w = context->workspace(context, (size_t)(2 * channels + g->images * (image + 2 * channels)) * sizeof(float));
  if (!w)
    return DEVICE_FAILED;
  float *b = w + channels, *scale = b + channels, *shift = scale + g->images * channels,
        *partial = shift + g->images * channels;
  copy_channels(w, weight, channels, 1);
  copy_channels(b, bias, channels, 0);
#pragma omp parallel if (group_elements(g) >= PARALLEL_FROM)
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < items; k++)
      KERNEL(norm_chunk_moments)
    (&g->m, partial + k * 4 * channels, group_first(g, k), group_last(g, k), x->data);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < g->images * g->groups; k++) {
      merge_group(g, partial + k / g->groups * image, k, s);
      group_terms(g, k, s, w, b, scale, shift);
    }
    /* From the end, which the first pass left in the cache. */
#pragma omp for schedule(static)
    for (int64_t k = items - 1; k >= 0; k--) {
      int64_t at = k / g->chunks * channels;
      KERNEL(norm_apply_rows)
      (&g->m, group_first(g, k), group_last(g, k), y->data, x->data, scale + at, shift + at);
    }
  }
  return DEVICE_DONE;
}

/* ---- images of one row: a group's elements lie side by side ---- */

typedef struct {
  double first, second; /* sums of x - pivot and of its square */
} two_sums;

static ALWAYS_INLINE two_sums sums_from(const void *x, int64_t at, int64_t count, float pivot, const bool half) {
  two_sums total = {0, 0};
  for (int64_t k = 0, end; k < count; k = end) {
    float_lanes sum[2] = {{0}, {0}}, square[2] = {{0}, {0}};
    float rest = 0, rest_square = 0;
    end = count - k < PIECE ? count : k + PIECE;
    for (; k + 2 * LANES <= end; k += 2 * LANES)
      for (int v = 0; v < 2; v++) {
        float_lanes d = load_lanes(x, at + k + v * LANES, half) - pivot;
        sum[v] += d;
        square[v] += d * d;
      }
    for (; k < end; k++) {
      float d = load_float(x, at + k, half) - pivot;
      rest += d;
      rest_square += d * d;
    }
    sum[0] += sum[1];
    square[0] += square[1];
    for (int l = 0; l < LANES; l++) {
      rest += sum[0][l];
      rest_square += square[0][l];
    }
    total.first += rest;
    total.second += rest_square;
  }
  return total;
}

static ALWAYS_INLINE void write_group(void *restrict y, const void *restrict x, int64_t at, int64_t count, float mean,
                                      float inverse, const float *restrict weight, const float *restrict bias,
                                      const bool half) {
  for (int64_t c = 0; c < count; c++)
    store_float(y, at + c, (load_float(x, at + c, half) - mean) * inverse * weight[c] + bias[c], half);
}

/* Group k = n*G + g: two passes over what is then in the cache. */
static ALWAYS_INLINE void normalize_group(const group_layout *g, int64_t k, const group_statistics *s, void *y,
                                          const void *x, const float *weight, const float *bias, const bool half) {
  int64_t at = k * g->size, channel = k % g->groups * g->size;
  float pivot = load_float(x, at, half);
  double mean = pivot + sums_from(x, at, g->size, pivot, half).first / (double)g->size;
  two_sums about = sums_from(x, at, g->size, (float)mean, half);
  double rest = about.first / (double)g->size;
  set_statistics(s, k, (float)mean + rest, about.second / (double)g->size - rest * rest);
  write_group(y, x, at, g->size, s->mean[k], s->inverse[k], weight + channel, bias + channel, half);
}

static device_status normalize_rows(device_context *context, const group_layout *g, const group_statistics *s,
                                    const device_array *y, const device_array *x, const device_array *weight,
                                    const device_array *bias) {
  int64_t channels = g->m.channels, step = images_at_once(g) * g->groups, groups = g->images * g->groups;
  float *w = context->workspace(context, (size_t)(2 * channels) * sizeof(float)), *b = w + channels;
  if (!w)
    return DEVICE_FAILED;
  copy_channels(w, weight, channels, 1);
  copy_channels(b, bias, channels, 0);
#pragma omp parallel for schedule(static) if (group_elements(g) >= PARALLEL_FROM)
  for (int64_t first = 0; first < groups; first += step)
    for (int64_t k = first; k < first + step && k < groups; k++)
      if (g->m.half)
        normalize_group(g, k, s, y->data, x->data, w, b, true);
      else
        normalize_group(g, k, s, y->data, x->data, w, b, false);
  return DEVICE_DONE;
}

/* ---- the entry ---- */

device_status KERNEL(group_norm_forward)(device_context *context, double eps, const device_array *y,
                                         const device_array *mean, const device_array *inverse, const device_array *x,
                                         const device_array *weight, const device_array *bias) {
  const device_array *parameters[] = {mean, inverse, weight, bias};
  if (!is_map(x) || y->dtype != x->dtype || !are_parameters(4, parameters))
    return DEVICE_UNSUPPORTED;
  group_layout g = group_layout_of(x, mean);
  group_statistics s = {mean->data, inverse->data, eps};
  if (group_elements(&g) == 0) {
    for (int64_t k = 0; k < g.images * g.groups; k++)
      set_statistics(&s, k, 0, 0);
    return DEVICE_DONE;
  }
  return g.length == 1 ? normalize_rows(context, &g, &s, y, x, weight, bias)
                       : normalize_maps(context, &g, &s, y, x, weight, bias);
}
