/* interpolate.c: a map in another size: each element the nearest one of the input, or a blend of its four neighbours.
 */
#include <math.h>

#include "ops/ops.h"

/* ---- shape ---- */

static int check(const orepa_tensor *x, const int64_t size[2], const orepa_interpolation *how) {
  if (x->rank != 4)
    return error_set("interpolate: input %s must have 4 dimensions", shape_text(x->rank, x->shape));
  if (size[0] < 1 || size[1] < 1 || x->shape[2] < 1 || x->shape[3] < 1)
    return error_set("interpolate: from %lldx%lld to %lldx%lld: sizes must be at least 1", (long long)x->shape[2],
                     (long long)x->shape[3], (long long)size[0], (long long)size[1]);
  for (int d = 0; d < 2; d++)
    if (!isfinite(how->scale[d]) || how->scale[d] < 0)
      return error_set("interpolate: scale %g of the %s; a finite number above 0 expected", how->scale[d],
                       d ? "width" : "height");
  return 0;
}

/* ---- backward ---- */

typedef struct {
  orepa_interpolation how;
  int64_t shape[4];
} interpolate_payload;

static int interpolate_backward(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const interpolate_payload *p = node->payload;
  const orepa_device *device = given->storage->device;
  orepa_tensor *dense = op_dense(given);
  device_array from, to;
  int failed = !dense || tensor_reads(dense, &from) || !(dx[0] = tensor_new(given->dtype, device, 4, p->shape)) ||
               tensor_writes(dx[0], &to) ||
               DISPATCH("interpolate's gradient", given->dtype, device, interpolate_backward, &p->how, &to, &from);
  orepa_release(dense);
  return failed ? -1 : 0;
}

static const autograd_op interpolate_op = {"interpolate", interpolate_backward, NULL};

/* ---- forward ---- */

orepa_tensor *orepa_interpolate(orepa_tensor *given, const int64_t size[2], const orepa_interpolation *how) {
  if (check(given, size, how))
    return NULL;
  const orepa_device *device = given->storage->device;
  int64_t shape[4] = {given->shape[0], given->shape[1], size[0], size[1]};
  orepa_tensor *x = op_dense(given), *y = x ? tensor_new(x->dtype, device, 4, shape) : NULL;
  device_array from, to;
  autograd_node *node = NULL;
  int failed = !y || tensor_materialize(y) || tensor_reads(x, &from) || tensor_writes(y, &to) ||
               DISPATCH("interpolate", x->dtype, device, interpolate_forward, how, &to, &from) ||
               autograd_record(&interpolate_op, y, &given, 1, 0, sizeof(interpolate_payload), &node);
  if (node) {
    interpolate_payload *p = node->payload;
    p->how = *how;
    for (int d = 0; d < 4; d++)
      p->shape[d] = given->shape[d];
  }
  orepa_release(x);
  return failed ? tensor_fail(y) : y;
}
