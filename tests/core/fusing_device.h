/* fusing_device.h: the device `cpu` under another table, which says that convolutions fuse their prologue and moments
 * (its entries then do so by separate kernels, with the same result) and counts what is asked of it. */
#ifndef OREPA_TESTS_FUSING_DEVICE_H
#define OREPA_TESTS_FUSING_DEVICE_H

#include "device.h"

typedef struct {
  int moments; /* passes over a map for its moments, those that convolutions make among them */
  int maps;    /* maps that norm_apply stored, those that convolutions make among them */
} fusing_counts;

static fusing_counts asked;
static orepa_device fusing_table;

static inline device_conv_fusion fusing_conv_fusion(device_context *context, const orepa_conv *conv,
                                                    const device_array *y, const device_array *x,
                                                    const device_array *w) {
  (void)context, (void)conv;
  assert_true(!y->data && !x->data && !w->data && y->rank == 4 && x->rank == 4 && w->rank == 4);
  return (device_conv_fusion){.prologue = true, .weight_prologue = true, .moments = true};
}

static inline device_status fusing_norm_moments(device_context *context, const device_array *moments,
                                                const device_array *x) {
  asked.moments++;
  return cpu_device()->norm_moments(context, moments, x);
}

static inline device_status fusing_norm_apply(device_context *context, const device_array *z, const device_array *y,
                                              const device_array *scale, const device_array *shift,
                                              const device_array *r, const device_array *r_scale,
                                              const device_array *r_shift, bool relu) {
  asked.maps += z->shape[0] > 0; /* without rows it is asked what the device can do */
  return cpu_device()->norm_apply(context, z, y, scale, shift, r, r_scale, r_shift, relu);
}

static inline const orepa_device *fusing_device(void) {
  if (!fusing_table.version) {
    fusing_table = *cpu_device();
    fusing_table.name = "fusing";
    fusing_table.conv_fusion = fusing_conv_fusion;
    fusing_table.norm_moments = fusing_norm_moments;
    fusing_table.norm_apply = fusing_norm_apply;
  }
  return &fusing_table;
}

#endif
