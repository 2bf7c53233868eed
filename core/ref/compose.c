/* compose.c: two kernels as one, and the gradients of both:
 *
 *   w[o,i,u] = sum over t, a of after[o,t,a] * before[t,i,u-a]
 *
 * Here o, t and i count all channels. Row r of a kernel (R, C/n, ...) in n groups has entries for the C/n channels from
 * r / (R/n) * (C/n) on, and is zero elsewhere. */
#include "ref/ref.h"

/* The first channel that row r has an entry for. */
static int64_t first_channel(const device_array *kernel, int64_t groups, int64_t r) {
  return r / (kernel->shape[0] / groups) * kernel->shape[1];
}

/* Entry (r, channel) at (h, w); zero outside the row's group, and outside the kernel. */
static double entry(const device_array *kernel, int64_t groups, int64_t r, int64_t channel, int64_t h, int64_t w) {
  int64_t column = channel - first_channel(kernel, groups, r);
  if (column < 0 || column >= kernel->shape[1] || h < 0 || h >= kernel->shape[2] || w < 0 || w >= kernel->shape[3])
    return 0;
  return ref_get(kernel, ref_at4(kernel, r, column, h, w));
}

/* The same of a kernel that is turned by 180 degrees if asked for. */
static double turned_entry(const device_array *kernel, int64_t groups, int64_t r, int64_t channel, int64_t h, int64_t w,
                           bool turn) {
  return turn ? entry(kernel, groups, r, channel, kernel->shape[2] - 1 - h, kernel->shape[3] - 1 - w)
              : entry(kernel, groups, r, channel, h, w);
}

device_status ref_compose(device_context *context, const device_array *w, const device_array *after, int64_t na,
                          const device_array *before, int64_t nb, int64_t groups, bool turn) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(w->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t k = 0; k < ref_count(w); k++) {
    int64_t x = k % w->shape[3], y = k / w->shape[3] % w->shape[2], column = k / w->shape[3] / w->shape[2];
    int64_t o = column / w->shape[1], i = first_channel(w, groups, o) + column % w->shape[1];
    int64_t first = first_channel(after, na, o);
    double sum = 0;
    for (int64_t t = first; t < first + after->shape[1]; t++)
      for (int64_t h = 0; h < after->shape[2]; h++)
        for (int64_t v = 0; v < after->shape[3]; v++)
          sum += turned_entry(after, na, o, t, h, v, turn) * entry(before, nb, t, i, y - h, x - v);
    ref_set(w, ref_at(w, k), sum);
  }
  return DEVICE_DONE;
}

device_status ref_compose_backward_after(device_context *context, const device_array *dafter, int64_t na,
                                         const device_array *dw, const device_array *before, int64_t nb, int64_t groups,
                                         bool turn) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(dw->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t k = 0; k < ref_count(dafter); k++) {
    int64_t width = dafter->shape[3], height = dafter->shape[2], column = k / width / height;
    int64_t x = turn ? width - 1 - k % width : k % width, y = k / width % height;
    int64_t o = column / dafter->shape[1], t = first_channel(dafter, na, o) + column % dafter->shape[1];
    int64_t first = first_channel(before, nb, t);
    double sum = 0;
    y = turn ? height - 1 - y : y;
    for (int64_t i = first; i < first + before->shape[1]; i++)
      for (int64_t h = 0; h < before->shape[2]; h++)
        for (int64_t v = 0; v < before->shape[3]; v++)
          sum += entry(dw, groups, o, i, y + h, x + v) * entry(before, nb, t, i, h, v);
    ref_set(dafter, ref_at(dafter, k), sum);
  }
  return DEVICE_DONE;
}

device_status ref_compose_backward_before(device_context *context, const device_array *dbefore, int64_t nb,
                                          const device_array *dw, const device_array *after, int64_t na, int64_t groups,
                                          bool turn) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(dw->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t k = 0; k < ref_count(dbefore); k++) {
    int64_t width = dbefore->shape[3], height = dbefore->shape[2], column = k / width / height;
    int64_t x = k % width, y = k / width % height;
    int64_t t = column / dbefore->shape[1], i = first_channel(dbefore, nb, t) + column % dbefore->shape[1];
    double sum = 0;
    for (int64_t o = 0; o < after->shape[0]; o++)
      for (int64_t h = 0; h < after->shape[2]; h++)
        for (int64_t v = 0; v < after->shape[3]; v++)
          sum += turned_entry(after, na, o, t, h, v, turn) * entry(dw, groups, o, i, y + h, x + v);
    ref_set(dbefore, ref_at(dbefore, k), sum);
  }
  return DEVICE_DONE;
}
