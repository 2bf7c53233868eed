/* group_norm.c: norms by an image's own statistics: of groups of its channels, or of all that stands on its last axes,
 * which is one group whose elements are channels. */
#include "ops/ops.h"

/* ---- checks ---- */

static int check_parameter(const char *op, const orepa_tensor *x, const orepa_tensor *t, const char *what, int rank,
                           const int64_t *shape) {
  if (!t)
    return 0;
  bool fits = t->rank == rank && t->dtype == op_channel_dtype(x) && t->storage->device == x->storage->device;
  for (int d = 0; fits && d < rank; d++)
    fits = t->shape[d] == shape[d];
  if (!fits)
    return error_set("%s: %s is %s on '%s'; an input of %s on '%s' needs %s %s", op, what, tensor_text(t),
                     t->storage->device->name, tensor_text(x), x->storage->device->name,
                     orepa_dtype_name(op_channel_dtype(x)), shape_text(rank, shape));
  return 0;
}

static int check(const char *op, const orepa_tensor *x, const orepa_tensor *weight, const orepa_tensor *bias, int rank,
                 const int64_t *shape, double eps) {
  if (!(eps >= 0))
    return error_set("%s: eps is %g, a number of at least 0 expected", op, eps);
  return check_parameter(op, x, weight, "weight", rank, shape) || check_parameter(op, x, bias, "bias", rank, shape) ? -1
                                                                                                                    : 0;
}

/* ---- backward ---- */

static const autograd_op layer_norm_op;

static int norm_backward(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const orepa_device *device = given->storage->device;
  bool weighted = node->saved[3].tensor.storage != NULL;
  orepa_tensor *x = autograd_saved_tensor(node, 0), *mean = x ? autograd_saved_tensor(node, 1) : NULL,
               *inverse = mean ? autograd_saved_tensor(node, 2) : NULL,
               *weight = inverse && weighted ? autograd_saved_tensor(node, 3) : NULL;
  if (!inverse || (weighted && !weight))
    return -1;
  device_array from, arriving, m, s, w, to[3];
  orepa_tensor *dy = op_dense(given);
  int failed = !dy || tensor_reads(dy, &arriving) || tensor_reads(x, &from) || tensor_reads(mean, &m) ||
               tensor_reads(inverse, &s) || (weight && tensor_reads(weight, &w));
  for (int k = 0; k < 3 && !failed; k++)
    if (autograd_needs(node, k))
      failed = !(dx[k] = k ? tensor_new(op_channel_dtype(x), device, 1, &x->shape[1]) : tensor_like(x)) ||
               tensor_writes(dx[k], &to[k]);
  if (!failed)
    failed = DISPATCH(node->op == &layer_norm_op ? "layer_norm's gradient" : "group_norm's gradient", x->dtype, device,
                      group_norm_backward, dx[0] ? &to[0] : NULL, dx[1] ? &to[1] : NULL, dx[2] ? &to[2] : NULL,
                      &arriving, &from, &m, &s, weight ? &w : NULL);
  orepa_release(dy);
  return failed ? -1 : 0;
}

static const autograd_op group_norm_op = {"group_norm", norm_backward, NULL};
static const autograd_op layer_norm_op = {"layer_norm", norm_backward, NULL};

/* ---- forward: of a map (N, C, H, W) ---- */

/* y, mean and inverse are new. */
static int normalize(const char *op, orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias, double eps,
                     orepa_tensor *y, orepa_tensor *mean, orepa_tensor *inverse) {
  device_array from, w, b, to, m, s;
  return tensor_materialize(y) || tensor_reads(x, &from) || (weight && tensor_reads(weight, &w)) ||
                 (bias && tensor_reads(bias, &b)) || tensor_writes(y, &to) || tensor_writes(mean, &m) ||
                 tensor_writes(inverse, &s) ||
                 DISPATCH(op, x->dtype, x->storage->device, group_norm_forward, eps, &to, &m, &s, &from,
                          weight ? &w : NULL, bias ? &b : NULL)
             ? -1
             : 0;
}

static orepa_tensor *norm_of_map(const autograd_op *op, orepa_tensor *given, int64_t groups, orepa_tensor *weight,
                                 orepa_tensor *bias, double eps) {
  const orepa_device *device = given->storage->device;
  int64_t shape[2] = {given->shape[0], groups};
  orepa_tensor *x = op_dense(given), *y = x ? tensor_like(x) : NULL,
               *mean = y ? tensor_new(op_channel_dtype(x), device, 2, shape) : NULL,
               *inverse = mean ? tensor_like(mean) : NULL;
  autograd_node *node = NULL;
  int failed = !inverse || normalize(op->name, x, weight, bias, eps, y, mean, inverse) ||
               autograd_record(op, y, (orepa_tensor *[]){given, weight, bias}, 3, 4, 0, &node);
  if (node) {
    autograd_save(node, 0, x);
    autograd_save(node, 1, mean);
    autograd_save(node, 2, inverse);
    autograd_save(node, 3, weight);
  }
  orepa_release(x);
  orepa_release(mean);
  orepa_release(inverse);
  return failed ? tensor_fail(y) : y;
}

/* The same of what is a map when seen as `shape`. */
static orepa_tensor *norm_of(const autograd_op *op, orepa_tensor *x, const int64_t shape[4], int64_t groups,
                             orepa_tensor *weight, orepa_tensor *bias, double eps, bool *viewed) {
  orepa_tensor *map = orepa_reshape(x, 4, shape);
  *viewed = map && map->storage == x->storage;
  orepa_tensor *y = map ? norm_of_map(op, map, groups, weight, bias, eps) : NULL;
  orepa_release(map);
  return y;
}

orepa_tensor *orepa_group_norm(orepa_tensor *x, int64_t groups, orepa_tensor *weight, orepa_tensor *bias, double eps) {
  const char *const name = group_norm_op.name;
  if (x->rank < 2) {
    error_set("%s: input %s has no channels (N, C, ...)", name, shape_text(x->rank, x->shape));
    return NULL;
  }
  if (groups < 1 || x->shape[1] % groups) {
    error_set("%s: %lld groups don't divide %lld channels (input %s)", name, (long long)groups, (long long)x->shape[1],
              shape_text(x->rank, x->shape));
    return NULL;
  }
  if (check(name, x, weight, bias, 1, &x->shape[1], eps))
    return NULL;
  if (x->rank == 4)
    return norm_of_map(&group_norm_op, x, groups, weight, bias, eps);
  bool viewed;
  int64_t shape[4] = {x->shape[0], x->shape[1], shape_count(x->rank - 2, x->shape + 2), 1};
  return op_shaped(norm_of(&group_norm_op, x, shape, groups, weight, bias, eps, &viewed), x->rank, x->shape);
}

/* Of what f gives, with the type that y, which is given up, has. */
static orepa_tensor *applied(orepa_function f, orepa_tensor *y, orepa_tensor *parameter) {
  if (!y || !parameter)
    return y;
  orepa_tensor *wide = orepa_apply(f, (orepa_operand[]){OPERAND(y), OPERAND(parameter)});
  orepa_tensor *z = wide ? orepa_to(wide, y->dtype, y->storage->device) : NULL;
  orepa_release(wide);
  orepa_release(y);
  return z;
}

/* Over all of each image: one group, and parameters for each element. */
static orepa_tensor *norm_of_images(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias, double eps) {
  orepa_tensor *y = norm_of_map(&layer_norm_op, x, 1, NULL, NULL, eps);
  return applied(FUNCTION_add, applied(FUNCTION_mul, y, weight), bias);
}

/* A parameter as a list. A new reference. */
static int flat(orepa_tensor *t, orepa_tensor **list) {
  *list = !t ? NULL : t->rank == 1 ? orepa_retain(t) : orepa_reshape(t, 1, (int64_t[]){-1});
  return t && !*list ? -1 : 0;
}

orepa_tensor *orepa_layer_norm(orepa_tensor *x, int axes, orepa_tensor *weight, orepa_tensor *bias, double eps) {
  const char *const name = layer_norm_op.name;
  if (axes < 1 || axes > x->rank) {
    error_set("%s: over the last %d dimensions of an input %s", name, axes, shape_text(x->rank, x->shape));
    return NULL;
  }
  if (check(name, x, weight, bias, axes, x->shape + x->rank - axes, eps))
    return NULL;
  if (x->rank == 4 && axes == 3)
    return norm_of_images(x, weight, bias, eps);
  int64_t rows = shape_count(x->rank - axes, x->shape), size = shape_count(axes, x->shape + x->rank - axes);
  orepa_tensor *w, *b = NULL, *y = NULL;
  bool viewed = false;
  if (!flat(weight, &w) && !flat(bias, &b))
    y = norm_of(&layer_norm_op, x, (int64_t[]){rows, size, 1, 1}, 1, w, b, eps, &viewed);
  orepa_release(w);
  orepa_release(b);
  return viewed && !orepa_is_contiguous(x) ? op_seen_as(y, x->rank, x->shape) : op_shaped(y, x->rank, x->shape);
}
