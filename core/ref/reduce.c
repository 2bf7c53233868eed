/* reduce.c: sums, extremes, their positions and truth over axes, and sums of squares. */
#include "ref/ref.h"

/* What one result is made of: the elements `from + ref_at(block, j)` of src, at least one if an extreme is wanted.
 * Position j counts in logical order. NaN beats all and the first of equals stays. */
static void reduce_reals(orepa_reduction kind, const device_array *dst, int64_t to, const device_array *block,
                         int64_t from) {
  bool low = kind == OREPA_MIN || kind == OREPA_ARGMIN, all = true, any = false;
  double sum = 0, best = 0;
  int64_t position = 0;
  for (int64_t j = 0; j < ref_count(block); j++) {
    double x = ref_get(block, from + ref_at(block, j));
    sum += x;
    all = all && x != 0;
    any = any || x != 0;
    if (j == 0 || (low ? x < best : x > best) || (isnan(x) && !isnan(best))) {
      best = x;
      position = j;
    }
  }
  if (kind == OREPA_ARGMAX || kind == OREPA_ARGMIN)
    ref_set_integer(dst, to, position);
  else if (kind == OREPA_ALL || kind == OREPA_ANY)
    ref_set_integer(dst, to, kind == OREPA_ALL ? all : any);
  else
    ref_set(dst, to, kind == OREPA_SUM ? sum : best);
}

static void reduce_integers(orepa_reduction kind, const device_array *dst, int64_t to, const device_array *block,
                            int64_t from) {
  bool low = kind == OREPA_MIN || kind == OREPA_ARGMIN, all = true, any = false;
  int64_t sum = 0, best = 0, position = 0;
  for (int64_t j = 0; j < ref_count(block); j++) {
    int64_t x = ref_get_integer(block, from + ref_at(block, j));
    sum += x;
    all = all && x != 0;
    any = any || x != 0;
    if (j == 0 || (low ? x < best : x > best)) {
      best = x;
      position = j;
    }
  }
  if (kind == OREPA_ARGMAX || kind == OREPA_ARGMIN)
    ref_set_integer(dst, to, position);
  else if (kind == OREPA_ALL || kind == OREPA_ANY)
    ref_set_integer(dst, to, kind == OREPA_ALL ? all : any);
  else
    ref_set_integer(dst, to, kind == OREPA_SUM ? sum : best);
}

device_status ref_reduce(device_context *context, orepa_reduction kind, const device_array *dst,
                         const device_array *src) {
  REF_ENTRY;
  (void)context;
  device_array block = *src, outer = *src; /* src's axes that are reduced, and those that stay */
  for (int d = 0; d < src->rank; d++) {
    block.shape[d] = dst->shape[d] == 1 ? src->shape[d] : 1;
    outer.shape[d] = dst->shape[d];
  }
  if (kind == OREPA_MEAN)
    return DEVICE_UNSUPPORTED;
  bool extreme = kind != OREPA_SUM && kind != OREPA_ALL && kind != OREPA_ANY;
  if (extreme && ref_count(&block) == 0 && ref_count(dst)) {
    error_set("there is no element to choose from");
    return DEVICE_FAILED;
  }
  for (int64_t k = 0; k < ref_count(dst); k++) {
    if (orepa_dtype_is_float(src->dtype))
      reduce_reals(kind, dst, ref_at(dst, k), &block, ref_at(&outer, k));
    else
      reduce_integers(kind, dst, ref_at(dst, k), &block, ref_at(&outer, k));
  }
  return DEVICE_DONE;
}

device_status ref_square_sums(device_context *context, const device_array *dst, int count, const device_array *arrays) {
  REF_ENTRY;
  (void)context;
  for (int n = 0; n < count; n++) {
    double sum = 0;
    for (int64_t k = 0; k < ref_count(&arrays[n]); k++) {
      double x = ref_get(&arrays[n], ref_at(&arrays[n], k));
      sum += x * x;
    }
    ref_set(dst, ref_at(dst, n), sum);
  }
  return DEVICE_DONE;
}
