/* winograd_product.c: the matrix products of Winograd's convolutions: a tall matrix times a panel as wide as two (or
 * one) vectors. As many rows at a time as there are registers for their sums. */
#include "cpu/kernels/winograd.h"

#if LANES == 16
enum { ROWS = 14 };
#else
enum { ROWS = 6 };
#endif

enum { AHEAD = 24 /* rows of the panel */, RUN = 128 /* terms that are summed up before they are added */ };

static ALWAYS_INLINE void multiply(const bool turned, const int rows, const int vectors, int64_t depth, const float *a,
                                   int64_t step, const float *b, int64_t b_step, float *c, int64_t c_step, bool add) {
  float_lanes sum[ROWS][2];
  const int64_t down = turned ? 1 : step, along = turned ? step : 1;
#pragma GCC unroll 14
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
      sum[r][v] = (float_lanes){0};
  for (int64_t k = 0; k < depth; k++) {
    float_lanes left = load_lanes(b, 0, false), right = vectors == 2 ? load_lanes(b, LANES, false) : left;
    __builtin_prefetch(b + AHEAD * PANEL);
    if (vectors == 2)
      __builtin_prefetch(b + AHEAD * PANEL + LANES);
    b += b_step;
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
      float factor = a[r * down];
      sum[r][0] += factor * left;
      if (vectors == 2)
        sum[r][1] += factor * right;
    }
    a += along;
  }
#pragma GCC unroll 14
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) {
      int64_t at = r * c_step + v * LANES;
      store_lanes(c, at, add ? load_lanes(c, at, false) + sum[r][v] : sum[r][v], false);
    }
}

/* clang-format off */
#define FORM(rows)                                                                                                     \
  case rows:                                                                                                           \
    multiply(turned, rows, vectors, depth, a, step, b, b_step, c, c_step, add);                                        \
    break;

/* `rows` at most ROWS */
static ALWAYS_INLINE void multiply_some(const bool turned, int rows, const int vectors, int64_t depth, const float *a,
                                        int64_t step, const float *b, int64_t b_step, float *c, int64_t c_step,
                                        bool add) {
  switch (rows) {
    FORM(1) FORM(2) FORM(3) FORM(4) FORM(5) FORM(6)
#if LANES == 16
    FORM(7) FORM(8) FORM(9) FORM(10) FORM(11) FORM(12) FORM(13) FORM(14)
#endif
  }
}
/* clang-format on */

static __attribute__((noinline)) void rows2(int rows, int64_t depth, const float *a, int64_t step, const float *b,
                                            int64_t b_step, float *c, int64_t c_step, bool add) {
  multiply_some(false, rows, 2, depth, a, step, b, b_step, c, c_step, add);
}

static __attribute__((noinline)) void rows1(int rows, int64_t depth, const float *a, int64_t step, const float *b,
                                            int64_t b_step, float *c, int64_t c_step, bool add) {
  multiply_some(false, rows, 1, depth, a, step, b, b_step, c, c_step, add);
}

static __attribute__((noinline)) void columns2(int rows, int64_t depth, const float *a, int64_t step, const float *b,
                                               int64_t b_step, float *c, int64_t c_step, bool add) {
  multiply_some(true, rows, 2, depth, a, step, b, b_step, c, c_step, add);
}

static __attribute__((noinline)) void columns1(int rows, int64_t depth, const float *a, int64_t step, const float *b,
                                               int64_t b_step, float *c, int64_t c_step, bool add) {
  multiply_some(true, rows, 1, depth, a, step, b, b_step, c, c_step, add);
}

void KERNEL(winograd_product)(bool turned, int rows, int64_t depth, const float *a, int64_t step, const float *b,
                              int64_t b_step, int width, float *c, int64_t c_step, bool add) {
  __typeof__(rows1) *form = turned ? (width > LANES ? columns2 : columns1) : (width > LANES ? rows2 : rows1);
  int pieces = (rows + ROWS - 1) / ROWS;
  int64_t k = 0;
  do {
    int64_t run = depth - k < RUN + RUN / 2 ? depth - k : RUN;
    for (int p = 0; p < pieces; p++) {
      int first = (int)((int64_t)rows * p / pieces), last = (int)((int64_t)rows * (p + 1) / pieces);
      const float *from = turned ? a + first + k * step : a + first * step + k;
      form(last - first, run, from, step, b + k * b_step, b_step, c + first * c_step, c_step, add || k > 0);
    }
    k += run;
  } while (k < depth);
}
