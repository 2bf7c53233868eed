/* optimizer.c: a step of stochastic gradient descent. */
#include "ref/ref.h"

static void step(const orepa_sgd_options *options, const device_sgd_item *item, int64_t k) {
  const device_array *parameter = &item->parameter, *gradient = &item->gradient, *velocity = &item->velocity;
  double p = ref_get(parameter, ref_at(parameter, k));
  double g = ref_get(gradient, ref_at(gradient, k)) + item->decay * p, v = g;
  if (velocity->data) {
    v += options->momentum * ref_get(velocity, ref_at(velocity, k));
    ref_set(velocity, ref_at(velocity, k), v);
  }
  ref_set(parameter, ref_at(parameter, k), p - item->rate * (options->nesterov ? g + options->momentum * v : v));
}

device_status ref_sgd(device_context *context, const orepa_sgd_options *options, int count,
                      const device_sgd_item *items) {
  REF_ENTRY;
  (void)context;
  for (int n = 0; n < count; n++)
    if (!orepa_dtype_is_float(items[n].parameter.dtype))
      return DEVICE_UNSUPPORTED;
  for (int n = 0; n < count; n++)
    for (int64_t k = 0; k < ref_count(&items[n].parameter); k++)
      step(options, &items[n], k);
  return DEVICE_DONE;
}
