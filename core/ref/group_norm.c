/* group_norm.c: each image's groups of channels by their own mean and variance, in two passes. */
#include "ref/ref.h"

/* The channels first ... last - 1 of image n. */
typedef struct {
  int64_t n, first, last;
  double elements;
} channel_group;

static channel_group group_of(const device_array *x, const device_array *mean, int64_t n, int64_t g) {
  int64_t size = x->shape[1] / mean->shape[1];
  return (channel_group){n, g * size, (g + 1) * size, (double)(size * x->shape[2] * x->shape[3])};
}

static double channel_value(const device_array *a, int64_t c, double absent) {
  return a ? ref_get(a, c * a->strides[0]) : absent;
}

static int64_t statistic_at(const device_array *a, int64_t n, int64_t g) {
  return n * a->strides[0] + g * a->strides[1];
}

/* for_each_element(x, group): c, h, w go through a group. */
#define for_each_element(x, in)                                                                                        \
  for (int64_t c = (in).first; c < (in).last; c++)                                                                     \
    for (int64_t h = 0; h < (x)->shape[2]; h++)                                                                        \
      for (int64_t w = 0; w < (x)->shape[3]; w++)

static double mean_of(const device_array *x, channel_group in) {
  double sum = 0;
  for_each_element(x, in) sum += ref_get(x, ref_at4(x, in.n, c, h, w));
  return in.elements > 0 ? sum / in.elements : 0;
}

static double variance_of(const device_array *x, channel_group in, double mean) {
  double sum = 0;
  for_each_element(x, in) {
    double d = ref_get(x, ref_at4(x, in.n, c, h, w)) - mean;
    sum += d * d;
  }
  return in.elements > 0 ? sum / in.elements : 0;
}

device_status ref_group_norm_forward(device_context *context, double eps, const device_array *y,
                                     const device_array *mean, const device_array *inverse, const device_array *x,
                                     const device_array *weight, const device_array *bias) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t n = 0; n < x->shape[0]; n++)
    for (int64_t g = 0; g < mean->shape[1]; g++) {
      channel_group in = group_of(x, mean, n, g);
      double m = mean_of(x, in), one = 1 / sqrt(variance_of(x, in, m) + eps);
      ref_set(mean, statistic_at(mean, n, g), m);
      ref_set(inverse, statistic_at(inverse, n, g), one);
      for_each_element(x, in) {
        double xh = (ref_get(x, ref_at4(x, n, c, h, w)) - m) * one;
        ref_set(y, ref_at4(y, n, c, h, w), xh * channel_value(weight, c, 1) + channel_value(bias, c, 0));
      }
    }
  return DEVICE_DONE;
}

/* ---- backward ---- */

typedef struct {
  const device_array *dy, *x, *mean, *inverse, *weight;
} group_gradient;

static double normalized(const group_gradient *g, int64_t n, int64_t group, int64_t c, int64_t h, int64_t w) {
  double m = ref_get(g->mean, statistic_at(g->mean, n, group));
  return (ref_get(g->x, ref_at4(g->x, n, c, h, w)) - m) * ref_get(g->inverse, statistic_at(g->inverse, n, group));
}

static void write_group(const device_array *dx, const group_gradient *g, int64_t n, int64_t group) {
  channel_group in = group_of(g->x, g->mean, n, group);
  double sum = 0, product = 0, one = ref_get(g->inverse, statistic_at(g->inverse, n, group));
  for_each_element(dx, in) {
    double d = channel_value(g->weight, c, 1) * ref_get(g->dy, ref_at4(g->dy, n, c, h, w));
    sum += d;
    product += d * normalized(g, n, group, c, h, w);
  }
  for_each_element(dx, in) {
    double d = channel_value(g->weight, c, 1) * ref_get(g->dy, ref_at4(g->dy, n, c, h, w));
    double less = sum / in.elements + normalized(g, n, group, c, h, w) * product / in.elements;
    ref_set(dx, ref_at4(dx, n, c, h, w), one * (d - less));
  }
}

/* The gradients of channel c's weight and bias. */
static void sum_channel(const group_gradient *g, int64_t c, double *product, double *sum) {
  int64_t group = c / (g->x->shape[1] / g->mean->shape[1]);
  *product = *sum = 0;
  for (int64_t n = 0; n < g->x->shape[0]; n++)
    for (int64_t h = 0; h < g->x->shape[2]; h++)
      for (int64_t w = 0; w < g->x->shape[3]; w++) {
        double d = ref_get(g->dy, ref_at4(g->dy, n, c, h, w));
        *sum += d;
        *product += d * normalized(g, n, group, c, h, w);
      }
}

device_status ref_group_norm_backward(device_context *context, const device_array *dx, const device_array *dweight,
                                      const device_array *dbias, const device_array *dy, const device_array *x,
                                      const device_array *mean, const device_array *inverse,
                                      const device_array *weight) {
  REF_ENTRY;
  (void)context;
  group_gradient g = {dy, x, mean, inverse, weight};
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t n = 0; dx && n < x->shape[0]; n++)
    for (int64_t k = 0; k < mean->shape[1]; k++)
      write_group(dx, &g, n, k);
  for (int64_t c = 0; (dweight || dbias) && c < x->shape[1]; c++) {
    double product, sum;
    sum_channel(&g, c, &product, &sum);
    if (dweight)
      ref_set(dweight, c * dweight->strides[0], product);
    if (dbias)
      ref_set(dbias, c * dbias->strides[0], sum);
  }
  return DEVICE_DONE;
}
