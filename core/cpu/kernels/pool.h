/* pool.h: the windows of a pool over a channels-last map, worked out once, for kernels that go through them. */
#ifndef OREPA_CORE_CPU_POOL_H
#define OREPA_CORE_CPU_POOL_H

#include "cpu/kernels/kernels.h"

/* Positions first, first + step, ... < end. */
typedef struct {
  int64_t first, end, step;
  int64_t divisor; /* of a window: what an average divides by along this axis */
  float share;     /* 1 / divisor */
} pool_span;

typedef struct {
  int64_t images, channels, height, width, rows, columns; /* maps (N, H, W, C), windows (N, P, Q, C) */
  pool_span *row, *column;                                /* (P), (Q): windows */
  pool_span *over_row, *over_column;                      /* (H), (W): windows over a position */
  bool half;
} pool_plan;

/* x is the map, and y has an element for each window; memory of pool_plan_bytes holds what the plan points to. */
size_t KERNEL(pool_plan_bytes)(const device_array *y, const device_array *x);
pool_plan KERNEL(pool_plan_in)(void *memory, const device_windows *windows, const device_array *y,
                               const device_array *x);

/* What max_pool_backward writes for positions first ... first + count - 1 of the map (N*H*W), into (count, C) of the
 * map's type. */
void KERNEL(max_pool_gather)(const pool_plan *plan, const void *dy, const int32_t *indices, int64_t first,
                             int64_t count, void *into);

#endif
