/* matmul.c: batches of matrix products. */
#include "ref/ref.h"

static int64_t at3(const device_array *a, int64_t batch, int64_t row, int64_t column) {
  return batch * a->strides[0] + row * a->strides[1] + column * a->strides[2];
}

device_status ref_matmul(device_context *context, const device_array *c, const device_array *a, const device_array *b,
                         const device_array *bias) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(c->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t batch = 0; batch < c->shape[0]; batch++)
    for (int64_t m = 0; m < c->shape[1]; m++)
      for (int64_t n = 0; n < c->shape[2]; n++) {
        double sum = 0;
        for (int64_t k = 0; k < a->shape[2]; k++)
          sum += ref_get(a, at3(a, batch, m, k)) * ref_get(b, at3(b, batch, k, n));
        if (bias)
          sum += ref_get(bias, n * bias->strides[0]);
        ref_set(c, at3(c, batch, m, n), sum);
      }
  return DEVICE_DONE;
}
