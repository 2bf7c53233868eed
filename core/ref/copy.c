/* copy.c: writing arrays: copies with conversion, one value everywhere, random numbers. */
#include "philox.h"
#include "ref/ref.h"

device_status ref_copy(device_context *context, const device_array *dst, const device_array *src) {
  REF_ENTRY;
  (void)context;
  size_t size = orepa_dtype_size(src->dtype);
  for (int64_t k = 0; k < ref_count(dst); k++) {
    int64_t to = ref_at(dst, k), from = ref_at(src, k);
    if (dst->dtype == src->dtype) /* bit for bit, NaNs too */
      memcpy((char *)dst->data + to * (int64_t)size, (const char *)src->data + from * (int64_t)size, size);
    else if (orepa_dtype_is_float(src->dtype))
      ref_set(dst, to, ref_get(src, from));
    else
      ref_set_integer(dst, to, ref_get_integer(src, from));
  }
  return DEVICE_DONE;
}

device_status ref_fill(device_context *context, const device_array *dst, device_number value) {
  REF_ENTRY;
  (void)context;
  bool real = orepa_dtype_is_float(dst->dtype) || dst->dtype == OREPA_BOOL; /* 0.5 is true */
  for (int64_t k = 0; k < ref_count(dst); k++) {
    if (real)
      ref_set(dst, ref_at(dst, k), value.real);
    else
      ref_set_integer(dst, ref_at(dst, k), value.integer);
  }
  return DEVICE_DONE;
}

device_status ref_random(device_context *context, const device_array *dst, bool normal, uint64_t seed, uint64_t draw) {
  REF_ENTRY;
  (void)context;
  if (dst->dtype != OREPA_FLOAT32 && dst->dtype != OREPA_FLOAT64)
    return DEVICE_UNSUPPORTED;
  for (int64_t k = 0; k < ref_count(dst); k++)
    ref_set(dst, ref_at(dst, k),
            dst->dtype == OREPA_FLOAT64 ? philox_element_double(seed, draw, k, normal)
                                        : (double)philox_element_float(seed, draw, k, normal));
  return DEVICE_DONE;
}
