/* norm_promise.h: what a norm gives back at first: act(scale*y + shift + r), y and r stored maps, and r perhaps a
 * second norm's: r_scale*r + r_shift. It grows while addition and ReLU follow, and then somebody reads it: the map
 * itself through a door, or these terms, to compute what it needs of the map on its way. */
#ifndef OREPA_CORE_NORM_PROMISE_H
#define OREPA_CORE_NORM_PROMISE_H

#include "ops/ops.h"
#include "tensor/promise.h"

typedef struct {
  promise base;
  orepa_tensor *y, *r;             /* among the base's sources; r NULL: nothing is added */
  orepa_tensor *scale, *shift;     /* (C) */
  orepa_tensor *r_scale, *r_shift; /* NULL: r is added as it is */
  bool relu;
} norm_promise;

/* A tensor like y, contiguous, that is promised to be scale*y + shift. NULL and a message if there is no room. */
orepa_tensor *norm_promise_new(orepa_tensor *y, orepa_tensor *scale, orepa_tensor *shift);
/* NULL where t is not such a promise (any more). */
const norm_promise *norm_promise_of(const orepa_tensor *t);
/* The same where kernels can take it as their prologue: nothing is added. */
const norm_promise *norm_promise_prologue(const orepa_tensor *t);
/* Its terms as a kernel's arguments; 0, or -1 with a message. */
int norm_promise_reads(const norm_promise *p, device_array *y, device_prologue *prologue);

/* Makes a longer promise of an element-wise function's operands: *result is NULL where there is none to be made. -1
 * with a message if something went wrong. */
int norm_promise_extend(orepa_function f, const orepa_operand *operands, orepa_tensor **result);

/* Makes the node of z = relu(x) where z is such a promise. 0, or -1 with a message. */
int norm_promise_record_relu(orepa_tensor *x, orepa_tensor *z);

#endif
