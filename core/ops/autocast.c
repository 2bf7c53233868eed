/* autocast.c: a region in which convolutions and linear layers compute in bfloat16, where the device gains by it. Each
 * of these ops casts what it is given, by nodes of the graph, so that a parameter's gradient arrives in the parameter's
 * own type and backward may run outside of the region. What is summed at the end of a network (the last pool, softmax,
 * the loss) is float32. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "loader_thread.h"
#include "ops/ops.h"

/* ---- the region ---- */

static _Thread_local orepa_dtype asked_for = OREPA_FLOAT32;

orepa_dtype orepa_autocast(void) {
  return asked_for;
}

int orepa_set_autocast(orepa_dtype dtype) {
  if (dtype != OREPA_FLOAT32 && dtype != OREPA_BFLOAT16)
    return error_set("autocast: there is no %s, only bfloat16 and float32", orepa_dtype_name(dtype));
  asked_for = dtype;
  return 0;
}

/* ---- whether the device gains by it ---- */

bool orepa_bfloat16_pays(const orepa_device *device) {
  const char *forced = getenv("OREPA_BFLOAT16");
  if (forced && (!strcmp(forced, "1") || !strcmp(forced, "0")))
    return *forced == '1';
  return device->bfloat16_pays && device->bfloat16_pays(device_context_of(device));
}

static void say_once(const orepa_device *device) {
  static atomic_flag said = ATOMIC_FLAG_INIT;
  if (!atomic_flag_test_and_set(&said))
    fprintf(stderr, "orepa: autocast computes in float32, which is faster than bfloat16 on the device '%s' here\n",
            device->name);
}

static orepa_dtype type_on(const orepa_device *device) {
  if (orepa_bfloat16_pays(device))
    return OREPA_BFLOAT16;
  say_once(device);
  return OREPA_FLOAT32;
}

/* ---- casts ---- */

static int cast_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const orepa_dtype *from = node->payload;
  dx[0] = orepa_to(dy, *from, dy->storage->device);
  return dx[0] ? 0 : -1;
}

static const autograd_op cast_op = {"autocast", cast_backward, NULL};

/* The cast that is kept with t's storage, made if there is none, as a tensor of its own in the graph. */
static orepa_tensor *kept_cast(orepa_tensor *t, orepa_dtype dtype) {
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *kept = tensor_kept_cast(t, dtype), *made = kept ? NULL : orepa_to(t, dtype, t->storage->device);
  orepa_set_grad_enabled(was);
  if (made)
    tensor_keep_cast(t, made);
  orepa_tensor *cast = kept || made ? orepa_detach(kept ? kept : made) : NULL;
  orepa_release(made);
  autograd_node *node = NULL;
  if (!cast || autograd_record(&cast_op, cast, &t, 1, 0, sizeof(orepa_dtype), &node))
    return tensor_fail(cast);
  if (node)
    *(orepa_dtype *)node->payload = t->dtype;
  return cast;
}

/* Whether every tensor is of a type that is cast, and on one device; else the op's own error is the right one. */
static bool are_cast(int count, orepa_tensor *const *given) {
  for (int k = 0; k < count; k++)
    if (given[k] && ((given[k]->dtype != OREPA_FLOAT32 && given[k]->dtype != OREPA_BFLOAT16) ||
                     given[k]->storage->device != given[0]->storage->device))
      return false;
  return true;
}

int op_autocast(int count, orepa_tensor *const *given, orepa_tensor **cast) {
  const orepa_device *device = given[0]->storage->device;
  bool casts = asked_for == OREPA_BFLOAT16 && are_cast(count, given);
  orepa_dtype dtype = casts ? type_on(device) : given[0]->dtype;
  for (int k = 0; k < count; k++)
    cast[k] = NULL;
  for (int k = 0; k < count; k++) {
    if (!given[k])
      continue;
    bool parameter = k > 0 && casts && given[k]->dtype != dtype && tensor_is_whole(given[k]) && !loader_thread_here();
    cast[k] = parameter ? kept_cast(given[k], dtype)
              : casts   ? orepa_to(given[k], dtype, device)
                        : orepa_retain(given[k]);
    if (!cast[k]) {
      op_release_all(count, cast);
      return -1;
    }
  }
  return 0;
}

void op_release_all(int count, orepa_tensor **tensors) {
  for (int k = 0; k < count; k++)
    orepa_release(tensors[k]);
}

orepa_tensor *op_wide(orepa_tensor *t) {
  bool casts = asked_for == OREPA_BFLOAT16 && t->dtype == OREPA_BFLOAT16;
  return casts ? orepa_to(t, OREPA_FLOAT32, t->storage->device) : orepa_retain(t);
}
