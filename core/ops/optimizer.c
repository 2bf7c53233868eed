/* optimizer.c: one step of SGD over all parameters in one pass, and the norms that tell whether gradients are finite.
 */
#include <stdlib.h>

#include "ops/ops.h"

static int check_item(int k, const orepa_device *device, const orepa_tensor *p, const orepa_tensor *g,
                      const orepa_tensor *v, bool momentum) {
  if (p->storage->device != device)
    return error_set("sgd: parameter 1 is on '%s', parameter %d on '%s'", device->name, k + 1,
                     p->storage->device->name);
  if (!shape_equal(p, g) || p->dtype != g->dtype || p->storage->device != g->storage->device)
    return error_set("sgd: parameter %d is %s, its gradient %s", k + 1, tensor_text(p), tensor_text(g));
  if (momentum && (!v || !shape_equal(p, v) || p->dtype != v->dtype || v->storage->device != device))
    return error_set("sgd: parameter %d is %s, its velocity %s", k + 1, tensor_text(p), v ? tensor_text(v) : "missing");
  if (!orepa_is_contiguous(p) || !orepa_is_contiguous(g) || (v && !orepa_is_contiguous(v)))
    return error_set("sgd: parameter %d (%s), its gradient and its velocity must be contiguous", k + 1, tensor_text(p));
  return 0;
}

int orepa_sgd_step(int count, orepa_tensor *const *parameters, orepa_tensor *const *gradients,
                   orepa_tensor *const *velocities, const double *rates, const double *decays,
                   const orepa_sgd_options *options) {
  if (!count)
    return 0;
  device_sgd_item *items = calloc((size_t)count, sizeof *items);
  if (!items)
    return error_out_of_memory("sgd: out of memory: no room for %d parameters", count);
  bool momentum = options->momentum != 0;
  int failed = 0;
  for (int k = 0; k < count && !failed; k++)
    failed = check_item(k, parameters[0]->storage->device, parameters[k], gradients[k], velocities[k], momentum);
  for (int k = 0; k < count && !failed; k++) /* memory first, so that no step is left half done */
    failed = tensor_materialize(parameters[k]) || tensor_materialize(gradients[k]) ||
             (momentum && tensor_materialize(velocities[k]));
  for (int k = 0; k < count && !failed; k++) {
    items[k].rate = rates[k];
    items[k].decay = decays[k];
    failed = tensor_writes(parameters[k], &items[k].parameter) || tensor_reads(gradients[k], &items[k].gradient) ||
             (momentum && tensor_writes(velocities[k], &items[k].velocity));
  }
  const orepa_tensor *first = parameters[0];
  failed = failed || DISPATCH("sgd", first->dtype, first->storage->device, sgd, options, count, items);
  free(items);
  return failed ? -1 : 0;
}

orepa_tensor *orepa_square_sums(int count, orepa_tensor *const *tensors) {
  if (!count) {
    error_set("square_sums: no tensors");
    return NULL;
  }
  const orepa_device *device = tensors[0]->storage->device;
  int64_t size = count;
  orepa_tensor *sums = tensor_new(OREPA_FLOAT64, device, 1, &size);
  device_array *arrays = calloc((size_t)count, sizeof *arrays), to;
  int failed = !sums || !arrays || tensor_writes(sums, &to);
  if (sums && !arrays)
    error_out_of_memory("square_sums: out of memory: no room for %d tensors", count);
  for (int k = 0; k < count && !failed; k++) {
    const orepa_device *other = tensors[k]->storage->device;
    failed = other != device
                 ? error_set("square_sums: tensor 1 is on '%s', tensor %d on '%s'", device->name, k + 1, other->name)
                 : tensor_reads(tensors[k], &arrays[k]);
  }
  failed = failed || DISPATCH("square_sums", tensors[0]->dtype, device, square_sums, &to, count, arrays);
  free(arrays);
  return failed ? tensor_fail(sums) : sums;
}
