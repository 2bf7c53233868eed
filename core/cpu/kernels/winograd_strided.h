/* winograd_strided.h: one axis of Winograd's convolution with stride 2. Of a kernel's three taps, the middle one meets
 * every second input, the two outer ones meet the inputs between. So an axis is two convolutions without stride whose
 * results are added: one with 2 taps by F(4, 2), 5 products for 4 outputs, and one with 1 tap, 4 products; in both axes
 * 81 products for the 144 of the direct way.
 *
 * Elements 0 ... 4 of the outer taps are the points 0, +-STRIDED_A, infinity and STRIDED_B, which short tiles leave
 * out.
 */
#ifndef OREPA_CORE_CPU_KERNELS_WINOGRAD_STRIDED_H
#define OREPA_CORE_CPU_KERNELS_WINOGRAD_STRIDED_H

#include "cpu/kernels/winograd.h"

#define STRIDED_A 0.75f
#define STRIDED_B 1.5f
#define SA2 (STRIDED_A * STRIDED_A)
#define SA3 (SA2 * STRIDED_A)
#define SB2 (STRIDED_B * STRIDED_B)
#define SB3 (SB2 * STRIDED_B)

/* Inputs (5, or 4 of a short tile) to elements. */
static ALWAYS_INLINE void outer_in(const bool is_short, const float_lanes *d, const int step, float_lanes *o,
                                   const int to) {
  const float a = STRIDED_A, b = STRIDED_B;
  float_lanes d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
  if (is_short) {
    o[0] = fused(a * a * b, d0, -b * d2);
    o[to] = fused((a - b) * a, d1, (a - b) * d2);
    o[2 * to] = fused((a + b) * a, d1, -(a + b) * d2);
    o[3 * to] = fused(-a * a, d1, d3);
    return;
  }
  float_lanes d4 = d[4 * step];
  float_lanes u0 = fused(-b, d0, d1), u1 = fused(-b, d1, d2), u2 = fused(-b, d2, d3), u3 = fused(-b, d3, d4);
  o[0] = fused(-a * a, u0, u2);
  o[to] = fused(a, u1, u2);
  o[2 * to] = fused(-a, u1, u2);
  o[3 * to] = fused(-a * a, u1, u3);
  o[4 * to] = fused(-a * a, d1, d3);
}

/* Elements to outputs: 4, or 3. */
static ALWAYS_INLINE void outer_out(const bool is_short, const float_lanes *m, const int step, float_lanes *o,
                                    const int to) {
  float_lanes even = m[step] + m[2 * step], odd = m[step] - m[2 * step], m3 = m[3 * step];
  if (is_short) {
    o[0] = m[0] + even;
    o[to] = STRIDED_A * odd;
    o[2 * to] = fused(SA2, even, m3);
    return;
  }
  float_lanes m4 = m[4 * step];
  o[0] = m[0] + even + m4;
  o[to] = fused(STRIDED_B, m4, STRIDED_A * odd);
  o[2 * to] = fused(SB2, m4, SA2 * even);
  o[3 * to] = fused(SB3, m4, fused(SA3, odd, m3));
}

/* The transpose of that: gradients of 4 or 3 outputs to elements. */
static ALWAYS_INLINE void outer_out_turned(const bool is_short, const float_lanes *d, const int step, float_lanes *o,
                                           const int to) {
  float_lanes d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = is_short ? d2 : d[3 * step];
  float_lanes even = fused(SA2, d2, d0), odd = is_short ? STRIDED_A * d1 : fused(SA3, d3, STRIDED_A * d1);
  o[0] = d0;
  o[to] = even + odd;
  o[2 * to] = even - odd;
  o[3 * to] = d3;
  if (!is_short)
    o[4 * to] = fused(SB2, d2, d0) + fused(SB3, d3, STRIDED_B * d1);
}

/* 3 numbers of a kernel, of which the outer ones count, to elements. */
static ALWAYS_INLINE void outer_kernel(const float_lanes *g, const int step, float_lanes *o, const int to) {
  const float a = STRIDED_A, b = STRIDED_B;
  float_lanes g0 = g[0], g2 = g[2 * step];
  o[0] = 1 / (a * a * b) * g0;
  o[to] = fused(1 / (2 * a * (a - b)), g2, 1 / (2 * a * a * (a - b)) * g0);
  o[2 * to] = fused(1 / (2 * a * (a + b)), g2, -1 / (2 * a * a * (a + b)) * g0);
  o[3 * to] = g2;
  o[4 * to] = fused(1 / (b * b - a * a), g2, 1 / (b * (b * b - a * a)) * g0);
}

/* The transpose of that: elements to the gradient of 2 numbers. */
static ALWAYS_INLINE void outer_kernel_turned(const float_lanes *u, const int step, float_lanes *o, const int to) {
  const float a = STRIDED_A, b = STRIDED_B;
  float_lanes plus = 1 / (2 * a * (a - b)) * u[step], minus = 1 / (2 * a * (a + b)) * u[2 * step];
  float_lanes u4 = 1 / (b * b - a * a) * u[4 * step];
  o[0] = fused(1 / (a * a * b), u[0], fused(1 / a, plus - minus, 1 / b * u4));
  o[to] = plus + minus + u4 + u[3 * step];
}

/* The middle tap's elements are inputs and outputs as they stand. */
static ALWAYS_INLINE void middle_same(const bool is_short, const float_lanes *d, const int step, float_lanes *o,
                                      const int to) {
#pragma GCC unroll 4
  for (int k = 0; k < 4 - is_short; k++)
    o[k * to] = d[k * step];
}
static ALWAYS_INLINE void middle_kernel(const float_lanes *g, const int step, float_lanes *o, const int to) {
  (void)to;
  o[0] = g[step];
}
static ALWAYS_INLINE void middle_kernel_turned(const float_lanes *u, const int step, float_lanes *o, const int to) {
  (void)step;
  (void)to;
  o[0] = u[0];
}

#endif
