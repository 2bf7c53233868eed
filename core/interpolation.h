/* interpolation.h: where along one axis an interpolated map takes its elements from, in PyTorch's arithmetic: which
 * neighbour is nearest is decided in float, so that it is the same one. */
#ifndef OREPA_CORE_INTERPOLATION_H
#define OREPA_CORE_INTERPOLATION_H

#include <math.h>

#include "orepa.h"

/* (1 - share) * x[first] + share * x[second]. What has no share is not looked at. */
typedef struct {
  int64_t first, second;
  double share;
} interpolation_source;

static inline int64_t interpolation_nearest(double scale, int64_t output, int64_t outputs, int64_t inputs) {
  if (outputs == inputs)
    return output;
  if (outputs == 2 * inputs)
    return output / 2;
  float step = scale > 0 ? (float)(1 / scale) : (float)inputs / (float)outputs, at = floorf((float)output * step);
  return at < (float)(inputs - 1) ? (int64_t)at : inputs - 1;
}

/* Output `output` of `outputs`, of an axis of `inputs` elements; there is at least one of each. */
static inline interpolation_source interpolation_source_of(const orepa_interpolation *how, int axis, int64_t output,
                                                           int64_t outputs, int64_t inputs) {
  double scale = how->scale[axis], at;
  interpolation_source source = {0};
  if (!how->bilinear) {
    source.first = source.second = interpolation_nearest(scale, output, outputs, inputs);
    return source;
  }
  if (outputs == inputs)
    at = (double)output;
  else if (how->align_corners)
    at = outputs > 1 ? (double)output * (double)(inputs - 1) / (double)(outputs - 1) : 0;
  else
    at = ((double)output + 0.5) * (scale > 0 ? 1 / scale : (double)inputs / (double)outputs) - 0.5;
  at = at < 0 ? 0 : at;
  source.first = at < (double)(inputs - 1) ? (int64_t)at : inputs - 1;
  source.second = source.first + (source.first < inputs - 1);
  source.share = source.second > source.first ? at - (double)source.first : 0;
  return source;
}

#endif
