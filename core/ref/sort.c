/* sort.c: order and running sums along one axis. */
#include "ref/ref.h"

/* Whether an element at `a` comes before one at `b`, which stands in front of it in the row. NaN is the largest. */
static bool comes_before(const device_array *x, bool descending, int64_t a, int64_t b) {
  if (!orepa_dtype_is_float(x->dtype)) {
    int64_t m = ref_get_integer(x, a), n = ref_get_integer(x, b);
    return descending ? m > n : m < n;
  }
  double m = ref_get(x, a), n = ref_get(x, b);
  if (isnan(m) || isnan(n))
    return descending ? isnan(m) && !isnan(n) : isnan(n) && !isnan(m);
  return descending ? m > n : m < n;
}

/* The first `count` of a row, by insertion. */
static void sort_row(const device_array *x, int axis, bool descending, int64_t from, const device_array *positions,
                     int64_t to) {
  int64_t count = positions->shape[axis], step = x->strides[axis], taken = 0;
  for (int64_t n = 0; n < x->shape[axis]; n++) {
    int64_t place = taken;
    while (place > 0) {
      int64_t other = ref_get_integer(positions, to + (place - 1) * positions->strides[axis]);
      if (!comes_before(x, descending, from + n * step, from + other * step))
        break;
      if (place < count)
        ref_set_integer(positions, to + place * positions->strides[axis], other);
      place--;
    }
    if (place < count)
      ref_set_integer(positions, to + place * positions->strides[axis], n);
    taken += taken < count;
  }
}

device_status ref_sort(device_context *context, int axis, bool descending, const device_array *positions,
                       const device_array *x) {
  REF_ENTRY;
  (void)context;
  device_array from = ref_without(x, axis), to = ref_without(positions, axis);
  for (int64_t k = 0; k < ref_count(&from); k++)
    sort_row(x, axis, descending, ref_at(&from, k), positions, ref_at(&to, k));
  return DEVICE_DONE;
}

device_status ref_running_sum(device_context *context, int axis, bool from_last, const device_array *y,
                              const device_array *x) {
  REF_ENTRY;
  (void)context;
  if (x->dtype != OREPA_FLOAT32 && x->dtype != OREPA_FLOAT64 && x->dtype != OREPA_INT64)
    return DEVICE_UNSUPPORTED;
  device_array from = ref_without(x, axis), to = ref_without(y, axis);
  for (int64_t k = 0; k < ref_count(&from); k++) {
    double sum = 0;
    uint64_t whole = 0;
    for (int64_t n = 0; n < x->shape[axis]; n++) {
      int64_t place = from_last ? x->shape[axis] - 1 - n : n;
      int64_t source = ref_at(&from, k) + place * x->strides[axis], target = ref_at(&to, k) + place * y->strides[axis];
      if (x->dtype == OREPA_INT64)
        ref_set_integer(y, target, (int64_t)(whole += (uint64_t)ref_get_integer(x, source)));
      else
        ref_set(y, target, sum += ref_get(x, source));
    }
  }
  return DEVICE_DONE;
}
