/* group_norm_backward.c: group norm's gradient. With d = x - mean it is, in each channel,
 *     dx = inverse * (weight*dy - d * inverse^2/M * sum(weight*dy*d) - 1/M * sum(weight*dy)),
 * the sums over the M elements of the group; dweight = sum(dy*d) * inverse and dbias = sum(dy). */
#include "cpu/kernels/group_norm.h"

typedef struct {
  const float *mean, *inverse; /* (N, G) */
  const float *weight;         /* (C) */
  const void *dy, *x;
  void *dx; /* NULL: not wanted */
} group_gradient;

/* What is taken off weight*dy in a group: d * along + off. */
typedef struct {
  float along, off;
} group_rest;

static group_rest rest_of(double inverse, double elements, double sum, double product) {
  return (group_rest){(float)(inverse * inverse * product / elements), (float)(sum / elements)};
}

/* ---- images of many rows: sums of chunks by channel, their merging, the map ---- */

/* By channel, (C) each of an image; and the sums of its chunks (chunks, 2, C): of dy and of dy*d. */
typedef struct {
  float *mean, *inverse, *along, *off, *partial;
} image_terms;

static image_terms terms_of(const group_layout *g, float *memory, int64_t image) {
  int64_t channels = g->m.channels;
  float *mean = memory + image * (4 + 2 * g->chunks) * channels;
  return (image_terms){mean, mean + channels, mean + 2 * channels, mean + 3 * channels, mean + 4 * channels};
}

static size_t terms_floats(const group_layout *g) {
  return (size_t)(g->images * (4 + 2 * g->chunks) * g->m.channels);
}

static ALWAYS_INLINE void sum_lines(const group_gradient *d, int64_t offset, int64_t width, const float *restrict mean,
                                    float *restrict sum, float *restrict product, const int lines, const bool half) {
  for (int64_t c = 0; c < width; c++) {
    float s = 0, p = 0;
#pragma GCC unroll 4
    for (int l = 0; l < lines; l++) {
      float dy = load_float(d->dy, offset + l * width + c, half);
      s += dy;
      p += dy * (load_float(d->x, offset + l * width + c, half) - mean[c]);
    }
    sum[c] += s;
    product[c] += p;
  }
}

/* The rows first ... last - 1 of one image. */
static ALWAYS_INLINE void sum_rows(const group_layout *g, const group_gradient *d, int64_t first, int64_t last,
                                   const float *mean, float *sum, float *product, const bool half) {
  int64_t width = g->m.width, row = first;
  memset(sum, 0, (size_t)width * sizeof(float));
  memset(product, 0, (size_t)width * sizeof(float));
  for (; row + 4 <= last; row += 4)
    sum_lines(d, row * width, width, mean, sum, product, 4, half);
  for (; row < last; row++)
    sum_lines(d, row * width, width, mean, sum, product, 1, half);
}

static void spread_means(const group_layout *g, const group_gradient *d, int64_t image, float *mean) {
  for (int64_t c = 0; c < g->m.channels; c++)
    mean[c] = d->mean[image * g->groups + c / g->size];
}

/* Group k = n*G + group; leaves the whole image's sums in the first chunk's. */
static void merge_group(const group_layout *g, const group_gradient *d, int64_t k, const image_terms *t) {
  int64_t first = k % g->groups * g->size, last = first + g->size, channels = g->m.channels;
  double group_sum = 0, group_product = 0;
  for (int64_t c = first; c < last; c++) {
    double sum = 0, product = 0;
    for (int64_t j = 0; j < g->chunks; j++) {
      sum += t->partial[j * 2 * channels + c];
      product += t->partial[(j * 2 + 1) * channels + c];
    }
    t->partial[c] = (float)sum;
    t->partial[channels + c] = (float)product;
    group_sum += d->weight[c] * sum;
    group_product += d->weight[c] * product;
  }
  group_rest rest = rest_of(d->inverse[k], (double)g->length * (double)g->size, group_sum, group_product);
  for (int64_t c = first; c < last; c++) {
    t->inverse[c] = d->inverse[k];
    t->along[c] = rest.along;
    t->off[c] = rest.off;
  }
}

static ALWAYS_INLINE void write_row(const group_gradient *d, void *restrict dx, int64_t at, int64_t width,
                                    const image_terms t, const bool half) {
  const float *restrict mean = t.mean, *restrict inverse = t.inverse, *restrict along = t.along, *restrict off = t.off,
                        *restrict weight = d->weight;
  for (int64_t c = 0; c < width; c++) {
    float rest = (load_float(d->x, at + c, half) - mean[c]) * along[c] + off[c];
    store_float(dx, at + c, inverse[c] * (weight[c] * load_float(d->dy, at + c, half) - rest), half);
  }
}

/* The parameters' gradients, over all images in their order. */
static void sum_images(const group_layout *g, const group_gradient *d, float *memory, int64_t c,
                       const device_array *dweight, const device_array *dbias) {
  double sum = 0, product = 0;
  for (int64_t n = 0; n < g->images; n++) {
    const float *totals = terms_of(g, memory, n).partial;
    sum += totals[c];
    product += (double)totals[g->m.channels + c] * d->inverse[n * g->groups + c / g->size];
  }
  channel_set(dweight, c, product);
  channel_set(dbias, c, sum);
}

static void backward_maps(const group_layout *g, const group_gradient *d, float *memory, const device_array *dweight,
                          const device_array *dbias) {
  int64_t items = g->images * g->chunks, channels = g->m.channels;
#pragma omp parallel if (group_elements(g) >= PARALLEL_FROM)
  {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < g->images; n++)
      spread_means(g, d, n, terms_of(g, memory, n).mean);
#pragma omp for schedule(static)
    for (int64_t k = 0; k < items; k++) {
      image_terms t = terms_of(g, memory, k / g->chunks);
      float *sum = t.partial + k % g->chunks * 2 * channels;
      if (g->m.half)
        sum_rows(g, d, group_first(g, k), group_last(g, k), t.mean, sum, sum + channels, true);
      else
        sum_rows(g, d, group_first(g, k), group_last(g, k), t.mean, sum, sum + channels, false);
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < g->images * g->groups; k++) {
      image_terms t = terms_of(g, memory, k / g->groups);
      merge_group(g, d, k, &t);
    }
#pragma omp for schedule(static) nowait
    for (int64_t c = 0; c < channels; c++)
      sum_images(g, d, memory, c, dweight, dbias);
      /* From the end, which the first pass left in the cache. */
#pragma omp for schedule(static)
    for (int64_t k = (d->dx ? items : 0) - 1; k >= 0; k--) {
      image_terms t = terms_of(g, memory, k / g->chunks);
      for (int64_t row = group_first(g, k); row < group_last(g, k); row++)
        if (g->m.half)
          write_row(d, d->dx, row * channels, channels, t, true);
        else
          write_row(d, d->dx, row * channels, channels, t, false);
    }
  }
}

/* ---- images of one row ---- */

enum { PIECE = 1024 }; /* elements that are summed in float */

/* Sums over a group of weight*dy and of weight*dy*d. */
static ALWAYS_INLINE void group_sums(const group_gradient *d, int64_t at, int64_t count, const float *weight,
                                     float mean, double *total, double *total_product, const bool half) {
  *total = *total_product = 0;
  for (int64_t k = 0, end; k < count; k = end) {
    float_lanes sum = {0}, product = {0};
    float rest = 0, rest_product = 0;
    end = count - k < PIECE ? count : k + PIECE;
    for (; k + LANES <= end; k += LANES) {
      float_lanes wdy = load_lanes(weight, k, false) * load_lanes(d->dy, at + k, half);
      sum += wdy;
      product += wdy * (load_lanes(d->x, at + k, half) - mean);
    }
    for (; k < end; k++) {
      float wdy = weight[k] * load_float(d->dy, at + k, half);
      rest += wdy;
      rest_product += wdy * (load_float(d->x, at + k, half) - mean);
    }
    for (int l = 0; l < LANES; l++) {
      rest += sum[l];
      rest_product += product[l];
    }
    *total += rest;
    *total_product += rest_product;
  }
}

static ALWAYS_INLINE void add_parameters(const group_gradient *d, int64_t at, int64_t count, float mean, float inverse,
                                         float *restrict dweight, float *restrict dbias, const bool half) {
  for (int64_t c = 0; c < count; c++) {
    float dy = load_float(d->dy, at + c, half);
    dweight[c] += dy * ((load_float(d->x, at + c, half) - mean) * inverse);
    dbias[c] += dy;
  }
}

static ALWAYS_INLINE void write_group(const group_gradient *d, void *restrict dx, int64_t at, int64_t count, float mean,
                                      float inverse, const float *restrict weight, group_rest rest, const bool half) {
  for (int64_t c = 0; c < count; c++) {
    float off = (load_float(d->x, at + c, half) - mean) * rest.along + rest.off;
    store_float(dx, at + c, inverse * (weight[c] * load_float(d->dy, at + c, half) - off), half);
  }
}

/* Group k = n*G + group: dx, and its part in the parameters' gradients, which are added to. */
static ALWAYS_INLINE void backward_group(const group_layout *g, const group_gradient *d, int64_t k, float *dweight,
                                         float *dbias, const bool half) {
  int64_t at = k * g->size, channel = k % g->groups * g->size;
  float mean = d->mean[k], inverse = d->inverse[k];
  double sum, product;
  add_parameters(d, at, g->size, mean, inverse, dweight + channel, dbias + channel, half);
  if (!d->dx)
    return;
  group_sums(d, at, g->size, d->weight + channel, mean, &sum, &product, half);
  write_group(d, d->dx, at, g->size, mean, inverse, d->weight + channel,
              rest_of(inverse, (double)g->size, sum, product), half);
}

/* memory: (pieces, 2, C), one for each run of images_at_once. */
static void backward_rows(const group_layout *g, const group_gradient *d, float *memory, const device_array *dweight,
                          const device_array *dbias) {
  int64_t channels = g->m.channels, step = images_at_once(g), pieces = (g->images + step - 1) / step;
#pragma omp parallel if (group_elements(g) >= PARALLEL_FROM)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pieces; p++) {
      float *sums = memory + p * 2 * channels;
      int64_t last = (p + 1) * step < g->images ? (p + 1) * step : g->images;
      memset(sums, 0, (size_t)(2 * channels) * sizeof(float));
      for (int64_t k = p * step * g->groups; k < last * g->groups; k++)
        if (g->m.half)
          backward_group(g, d, k, sums, sums + channels, true);
        else
          backward_group(g, d, k, sums, sums + channels, false);
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < channels; c++) {
      double sum = 0, product = 0;
      for (int64_t p = 0; p < pieces; p++) {
        product += memory[p * 2 * channels + c];
        sum += memory[(p * 2 + 1) * channels + c];
      }
      channel_set(dweight, c, product);
      channel_set(dbias, c, sum);
    }
  }
}

/* ---- the entry ---- */

device_status KERNEL(group_norm_backward)(device_context *context, const device_array *dx, const device_array *dweight,
                                          const device_array *dbias, const device_array *dy, const device_array *x,
                                          const device_array *mean, const device_array *inverse,
                                          const device_array *weight) {
  const device_array *parameters[] = {dweight, dbias, mean, inverse, weight};
  if (!is_map(x) || dy->dtype != x->dtype || (dx && dx->dtype != x->dtype) || !are_parameters(5, parameters))
    return DEVICE_UNSUPPORTED;
  group_layout g = group_layout_of(x, mean);
  int64_t channels = g.m.channels, step = images_at_once(&g), pieces = (g.images + step - 1) / step;
  for (int64_t c = 0; group_elements(&g) == 0 && c < channels; c++) {
    channel_set(dweight, c, 0);
    channel_set(dbias, c, 0);
  }
  if (group_elements(&g) == 0)
    return DEVICE_DONE;
  size_t floats = g.length == 1 ? (size_t)(pieces * 2 * channels) : terms_floats(&g);
  float *w = context->workspace(context, ((size_t)channels + floats) * sizeof(float));
  if (!w)
    return DEVICE_FAILED;
  copy_channels(w, weight, channels, 1);
  group_gradient d = {mean->data, inverse->data, w, dy->data, x->data, dx ? dx->data : NULL};
  if (g.length == 1)
    backward_rows(&g, &d, w + channels, dweight, dbias);
  else
    backward_maps(&g, &d, w + channels, dweight, dbias);
  return DEVICE_DONE;
}
