/* pool.c: maximum and average over windows, regular or adaptive. */
#include "ops/gradient_promise.h"
#include "ops/norm_promise.h"

/* ---- shape ---- */

static int pool_shape(const char *op, const orepa_tensor *x, const orepa_pool *p, int64_t *shape) {
  static const char *const axis[2] = {"height", "width"};
  if (x->rank != 4)
    return error_set("%s: input %s must have 4 dimensions", op, shape_text(x->rank, x->shape));
  shape[0] = x->shape[0];
  shape[1] = x->shape[1];
  for (int d = 0; d < 2; d++) {
    int64_t k = p->kernel[d], s = p->stride[d], pad = p->padding[d], size = x->shape[2 + d];
    if (k < 1 || s < 1 || pad < 0 || p->dilation[d] < 1)
      return error_set("%s: kernel %lld, stride %lld, padding %lld, dilation %lld of the %s: at least 1, 1, 0, 1", op,
                       (long long)k, (long long)s, (long long)pad, (long long)p->dilation[d], axis[d]);
    if (k > INT32_MAX || s > INT32_MAX || pad > INT32_MAX || p->dilation[d] > INT32_MAX)
      return error_set("%s: kernel %lld, stride %lld, padding %lld, dilation %lld of the %s: at most %lld", op,
                       (long long)k, (long long)s, (long long)pad, (long long)p->dilation[d], axis[d],
                       (long long)INT32_MAX);
    int64_t span = p->dilation[d] * (k - 1) + 1;
    if (2 * pad > span)
      return error_set("%s: padding %lld is more than half of the window's %lld, so a window could hold nothing else",
                       op, (long long)pad, (long long)span);
    if (span > size + 2 * pad)
      return error_set("%s: a window that spans %lld does not fit into a %s of %lld with padding %lld (input %s)", op,
                       (long long)span, axis[d], (long long)size, (long long)pad, shape_text(x->rank, x->shape));
    int64_t room = size + 2 * pad - span;
    shape[2 + d] = (p->ceil_mode ? (room + s - 1) / s : room / s) + 1;
    if (p->ceil_mode && (shape[2 + d] - 1) * s >= size + pad) /* a window may not start in the padding behind */
      shape[2 + d]--;
  }
  return 0;
}

static int adaptive_shape(const char *op, const orepa_tensor *x, int64_t height, int64_t width, int64_t *shape) {
  if (x->rank != 4)
    return error_set("%s: input %s must have 4 dimensions", op, shape_text(x->rank, x->shape));
  if (height < 1 || width < 1 || x->shape[2] < 1 || x->shape[3] < 1)
    return error_set("%s: from %lldx%lld to %lldx%lld: sizes must be at least 1", op, (long long)x->shape[2],
                     (long long)x->shape[3], (long long)height, (long long)width);
  shape[0] = x->shape[0];
  shape[1] = x->shape[1];
  shape[2] = height;
  shape[3] = width;
  return 0;
}

/* ---- maximum ---- */

typedef struct {
  device_windows windows;
  int64_t shape[4];
  bool behind_norm; /* the input was promised: so is its gradient */
} pool_payload;

static int max_pool_backward(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const pool_payload *p = node->payload;
  const orepa_device *device = given->storage->device;
  orepa_tensor *indices = autograd_saved_tensor(node, 0), *dense = indices ? op_dense(given) : NULL;
  if (dense && p->behind_norm && promises_made()) {
    dx[0] = gradient_promise_pool(dense, indices, &p->windows, p->shape);
    orepa_release(dense);
    return dx[0] ? 0 : -1;
  }
  device_array from, where, to;
  int failed =
      !dense || tensor_reads(dense, &from) || tensor_reads(indices, &where) ||
      !(dx[0] = tensor_new(given->dtype, device, 4, p->shape)) || tensor_writes(dx[0], &to) ||
      DISPATCH("max_pool2d's gradient", given->dtype, device, max_pool_backward, &p->windows, &to, &from, &where);
  orepa_release(dense);
  return failed ? -1 : 0;
}

static const autograd_op max_pool_op = {"max_pool2d", max_pool_backward, NULL};

static orepa_tensor *max_pool(orepa_tensor *given, const device_windows *windows, const int64_t *shape) {
  const orepa_device *device = given->storage->device;
  bool recorded = autograd_wanted(&given, 1);
  orepa_tensor *x = op_dense(given), *y = x ? tensor_new(x->dtype, device, 4, shape) : NULL;
  orepa_tensor *indices = y && recorded ? tensor_new(OREPA_INT32, device, 4, shape) : NULL;
  const norm_promise *promised = x ? norm_promise_prologue(x) : NULL;
  device_array from, to, where;
  device_prologue prologue;
  autograd_node *node = NULL;
  int failed = !y || (recorded && (!indices || tensor_writes(indices, &where))) ||
               (promised ? norm_promise_reads(promised, &from, &prologue) : tensor_reads(x, &from)) ||
               tensor_writes(y, &to) ||
               DISPATCH("max_pool2d", x->dtype, device, max_pool_forward, windows, &to, recorded ? &where : NULL, &from,
                        promised ? &prologue : NULL) ||
               autograd_record(&max_pool_op, y, &given, 1, 1, sizeof(pool_payload), &node);
  if (node) {
    pool_payload *p = node->payload;
    p->windows = *windows;
    for (int d = 0; d < 4; d++)
      p->shape[d] = given->shape[d];
    p->behind_norm = promised != NULL;
    autograd_save(node, 0, indices);
  }
  orepa_release(indices);
  orepa_release(x);
  return failed ? tensor_fail(y) : y;
}

/* ---- average ---- */

static int avg_pool_backward(autograd_node *node, orepa_tensor *given, orepa_tensor **dx) {
  const pool_payload *p = node->payload;
  const orepa_device *device = given->storage->device;
  orepa_tensor *dense = op_dense(given);
  device_array from, to;
  int failed = !dense || tensor_reads(dense, &from) || !(dx[0] = tensor_new(given->dtype, device, 4, p->shape)) ||
               tensor_writes(dx[0], &to) ||
               DISPATCH("avg_pool2d's gradient", given->dtype, device, avg_pool_backward, &p->windows, &to, &from);
  orepa_release(dense);
  return failed ? -1 : 0;
}

static const autograd_op avg_pool_op = {"avg_pool2d", avg_pool_backward, NULL};

static orepa_tensor *avg_pool(orepa_tensor *given, const device_windows *windows, const int64_t *shape) {
  const orepa_device *device = given->storage->device;
  orepa_tensor *x = op_dense(given), *y = x ? tensor_new(x->dtype, device, 4, shape) : NULL;
  device_array from, to;
  autograd_node *node = NULL;
  int failed = !y || tensor_reads(x, &from) || tensor_writes(y, &to) ||
               DISPATCH("avg_pool2d", x->dtype, device, avg_pool_forward, windows, &to, &from) ||
               autograd_record(&avg_pool_op, y, &given, 1, 0, sizeof(pool_payload), &node);
  if (node) {
    pool_payload *p = node->payload;
    p->windows = *windows;
    for (int d = 0; d < 4; d++)
      p->shape[d] = given->shape[d];
  }
  orepa_release(x);
  return failed ? tensor_fail(y) : y;
}

/* ---- the public four ---- */

orepa_tensor *orepa_max_pool2d(orepa_tensor *x, const orepa_pool *pool) {
  int64_t shape[4];
  return pool_shape("max_pool2d", x, pool, shape) ? NULL : max_pool(x, &(device_windows){*pool, false}, shape);
}

orepa_tensor *orepa_avg_pool2d(orepa_tensor *x, const orepa_pool *pool) {
  int64_t shape[4];
  if (pool->dilation[0] != 1 || pool->dilation[1] != 1) {
    error_set("avg_pool2d: there is no dilation (%lldx%lld)", (long long)pool->dilation[0],
              (long long)pool->dilation[1]);
    return NULL;
  }
  return pool_shape("avg_pool2d", x, pool, shape) ? NULL : avg_pool(x, &(device_windows){*pool, false}, shape);
}

orepa_tensor *orepa_adaptive_avg_pool2d(orepa_tensor *x, int64_t height, int64_t width) {
  int64_t shape[4];
  if (adaptive_shape("adaptive_avg_pool2d", x, height, width, shape))
    return NULL;
  orepa_tensor *wide = op_wide(x), *y = wide ? avg_pool(wide, &(device_windows){.adaptive = true}, shape) : NULL;
  orepa_release(wide);
  return y;
}

orepa_tensor *orepa_adaptive_max_pool2d(orepa_tensor *x, int64_t height, int64_t width) {
  int64_t shape[4];
  if (adaptive_shape("adaptive_max_pool2d", x, height, width, shape))
    return NULL;
  return max_pool(x, &(device_windows){.adaptive = true}, shape);
}
