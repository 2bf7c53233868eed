/* channels.h: float32 values of each channel, (C) of any stride, absent ones included. */
#ifndef OREPA_CORE_CPU_CHANNELS_H
#define OREPA_CORE_CPU_CHANNELS_H

#include "cpu/cpu.h"

static inline float channel_value(const device_array *a, int64_t c, float absent) {
  return a ? ((const float *)a->data)[c * a->strides[0]] : absent;
}

static inline void channel_set(const device_array *a, int64_t c, double value) {
  if (a)
    ((float *)a->data)[c * a->strides[0]] = (float)value;
}

/* The values of (C) side by side, in `copy` where they aren't. */
static inline const float *dense_channels(const device_array *a, float *copy) {
  if (a->strides[0] == 1)
    return a->data;
  for (int64_t c = 0; c < a->shape[0]; c++)
    copy[c] = channel_value(a, c, 0);
  return copy;
}

#endif
