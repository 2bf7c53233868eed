/* ops.h: what op files share: gradients summed back to a shape, and the usual checks. */
#ifndef OREPA_CORE_OPS_H
#define OREPA_CORE_OPS_H

#include "autograd/autograd.h"
#include "elementwise.h"
#include "tensor/tensor.h"

/* Sums a gradient over the axes that broadcasting added or stretched, to `shape`. A new reference, perhaps g itself. */
orepa_tensor *op_sum_to(orepa_tensor *g, int rank, const int64_t *shape);

/* The broadcast shape of two; -1 and a message that names `op`. */
int op_broadcast(const char *op, int rank_a, const int64_t *a, int rank_b, const int64_t *b, int *rank, int64_t *shape);

/* All tensors on one device and of one type, NULLs left out; -1 and a message. `names` are for the message. */
int op_same_kind(const char *op, int count, orepa_tensor *const *tensors, const char *const *names);

/* Contiguous, without a graph: what kernels with dense arguments read. A new reference. */
orepa_tensor *op_dense(orepa_tensor *t);

/* t, which is given up, in another shape and contiguous, as the result of an op and no view; NULL if t is. */
orepa_tensor *op_shaped(orepa_tensor *t, int rank, const int64_t *shape);
/* The same, contiguous or not. */
orepa_tensor *op_seen_as(orepa_tensor *t, int rank, const int64_t *shape);

/* ---- conv.c: what convolutions share with transposed ones. */
/* Tells whoever takes the time which convolution of a map x the next call is: it stands directly before its DISPATCH.
 * Gives 0. */
int op_note_geometry(const orepa_conv *conv, const orepa_tensor *x, const orepa_tensor *w, const orepa_tensor *y);
/* Of a parameter's gradient: float32 from the start where the parameter is, though its cast is not. */
orepa_dtype op_gradient_type(const orepa_tensor *given, const orepa_tensor *cast);

/* Whether a kernel found a value out of range (a label, an index) since this was asked last: which, and where. Asked at
 * once, where work is done when a call returns. */
static inline bool op_offence(const orepa_device *device, int64_t *value, int64_t *position) {
  device_context *context = device_context_of(device);
  if (device->synchronize || context->offence_position < 0)
    return false;
  *value = context->offence;
  *position = context->offence_position;
  context->offence_position = -1;
  return true;
}

/* What numbers of a type are added up in: float32 for short floats. */
static inline orepa_dtype op_sum_dtype(orepa_dtype dtype) {
  return dtype == OREPA_BFLOAT16 || dtype == OREPA_FLOAT16 ? OREPA_FLOAT32 : dtype;
}

/* The type of what is kept for each channel of a map, statistics and parameters: float32 beside short floats. */
orepa_dtype op_channel_dtype(const orepa_tensor *map);

/* y = f(a, b) without recording, for backward functions; numbers by OPERAND_NUMBER. */
#define OPERAND(t) ((orepa_operand){.tensor = (t)})
#define OPERAND_NUMBER(x) ((orepa_operand){.number = (x)})
orepa_tensor *op_apply2(orepa_function f, orepa_operand a, orepa_operand b);

/* ---- autocast.c: what an op computes with inside autocast. New references; outside, the tensors themselves.
 *
 * given[0] is a map, what follows are parameters or NULL: a parameter's cast is kept with its storage until that is
 * written, so that it is made once a step however often it is used. 0, or -1 and a message. */
int op_autocast(int count, orepa_tensor *const *given, orepa_tensor **cast);
void op_release_all(int count, orepa_tensor **tensors);
/* float32 of a bfloat16 map. */
orepa_tensor *op_wide(orepa_tensor *t);

#endif
