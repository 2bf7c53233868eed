/* gradient_promise.h: gradients that wait for a norm's backward, which computes them on its way: where they are above
 * zero the ReLU's result lets through dy + added, or what a max pool hands back. A reader that wants the gradient
 * itself gets it through a door, by the separate kernels. */
#ifndef OREPA_CORE_GRADIENT_PROMISE_H
#define OREPA_CORE_GRADIENT_PROMISE_H

#include "ops/ops.h"
#include "tensor/promise.h"

/* All but shift and scale are among the base's sources. */
typedef struct {
  promise base;
  orepa_tensor *dy, *added; /* added NULL: dy alone */
  orepa_tensor *indices;    /* dy is that of a max pool by `windows`; NULL: no pool */
  device_windows windows;
  orepa_tensor *result;        /* of a ReLU, perhaps promised itself; NULL: no ReLU */
  orepa_tensor *y;             /* the ReLU is that of scale*y + shift; NULL: unknown */
  orepa_tensor *scale, *shift; /* (C) */
} gradient_promise;

/* a + b, of one shape and type and contiguous. *sum is NULL where it can't wait; -1 with a message where something went
 * wrong. */
int gradient_promise_sum(orepa_tensor *a, orepa_tensor *b, orepa_tensor **sum);
/* The gradient of a max pool's input, from that of its result, which is contiguous. */
orepa_tensor *gradient_promise_pool(orepa_tensor *dy, orepa_tensor *indices, const device_windows *windows,
                                    const int64_t *shape);
/* What arrives at a ReLU behind a norm, masked by its result. y, scale and shift may be NULL together. It waits if it
 * may. */
orepa_tensor *gradient_promise_mask(orepa_tensor *dy, orepa_tensor *result, orepa_tensor *y, orepa_tensor *scale,
                                    orepa_tensor *shift);

/* A gradient as a kernel's argument: what device_gradient points to. */
typedef struct {
  device_gradient gradient;
  device_array dy, added, indices, result, scale, shift, kept;
  gradient_promise *kept_promise; /* to be ended once the kernel ran */
} gradient_arrays;

/* The gradient that arrives at the norm of x, in parts if it is promised. If others than the caller hold it the kernel
 * is to store it. 0, or -1 with a message; gradient_end comes after the kernel either way. */
int gradient_reads(orepa_tensor *dy, const orepa_tensor *x, gradient_arrays *arrays);
void gradient_end(gradient_arrays *arrays, bool done);

#endif
