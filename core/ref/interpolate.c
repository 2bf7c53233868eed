/* interpolate.c: maps in another size. The backward pass adds up one plane (H, W) at a time in double. */
#include "interpolation.h"
#include "ref/ref.h"

/* What of x a position of y is: four elements, the same one several times where there are fewer. */
typedef struct {
  interpolation_source h, w;
} sources;

/* y (N, C, P, Q), x (N, C, H, W). */
static sources sources_of(const orepa_interpolation *how, const device_array *y, const device_array *x, int64_t p,
                          int64_t q) {
  return (sources){interpolation_source_of(how, 0, p, y->shape[2], x->shape[2]),
                   interpolation_source_of(how, 1, q, y->shape[3], x->shape[3])};
}

/* Corner k of four: its place in a plane of x and its share in the element. */
static double corner(const sources *s, int k, int64_t *h, int64_t *w) {
  *h = k / 2 ? s->h.second : s->h.first;
  *w = k % 2 ? s->w.second : s->w.first;
  return (k / 2 ? s->h.share : 1 - s->h.share) * (k % 2 ? s->w.share : 1 - s->w.share);
}

device_status ref_interpolate_forward(device_context *context, const orepa_interpolation *how, const device_array *y,
                                      const device_array *x) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t n = 0; n < y->shape[0]; n++)
    for (int64_t c = 0; c < y->shape[1]; c++)
      for (int64_t p = 0; p < y->shape[2]; p++)
        for (int64_t q = 0; q < y->shape[3]; q++) {
          sources s = sources_of(how, y, x, p, q);
          double sum = -0.0; /* plus x is x, of either sign */
          for (int k = 0; k < 4; k++) {
            int64_t h, w;
            double share = corner(&s, k, &h, &w);
            if (share != 0)
              sum += share * ref_get(x, ref_at4(x, n, c, h, w));
          }
          ref_set(y, ref_at4(y, n, c, p, q), sum);
        }
  return DEVICE_DONE;
}

static void add_plane(double *plane, const orepa_interpolation *how, const device_array *dx, const device_array *dy,
                      int64_t n, int64_t c) {
  for (int64_t p = 0; p < dy->shape[2]; p++)
    for (int64_t q = 0; q < dy->shape[3]; q++) {
      sources s = sources_of(how, dy, dx, p, q);
      for (int k = 0; k < 4; k++) {
        int64_t h, w;
        double share = corner(&s, k, &h, &w);
        if (share != 0)
          plane[h * dx->shape[3] + w] += share * ref_get(dy, ref_at4(dy, n, c, p, q));
      }
    }
}

device_status ref_interpolate_backward(device_context *context, const orepa_interpolation *how, const device_array *dx,
                                       const device_array *dy) {
  REF_ENTRY;
  if (!orepa_dtype_is_float(dx->dtype))
    return DEVICE_UNSUPPORTED;
  int64_t height = dx->shape[2], width = dx->shape[3];
  size_t bytes = (size_t)(height * width) * sizeof(double);
  double *plane = ref_count(dx) ? context->workspace(context, bytes) : NULL;
  if (ref_count(dx) && !plane)
    return DEVICE_FAILED;
  for (int64_t n = 0; plane && n < dx->shape[0]; n++)
    for (int64_t c = 0; c < dx->shape[1]; c++) {
      memset(plane, 0, bytes);
      add_plane(plane, how, dx, dy, n, c);
      for (int64_t k = 0; k < height * width; k++)
        ref_set(dx, ref_at4(dx, n, c, k / width, k % width), plane[k]);
    }
  return DEVICE_DONE;
}
