/* winograd_kernel.c: 3x3 kernels to elements, and elements back to the gradient of kernels. */
#include "cpu/kernels/product.h"
#include "cpu/kernels/winograd.h"

enum { TAPS = 9 };

static ALWAYS_INLINE void elements_of(const float_lanes *g, float_lanes *u) {
  float_lanes done[3 * SIDE];
#pragma GCC unroll 3
  for (int s = 0; s < 3; s++)
    winograd_kernel(g + s, 3, done + s, 3);
#pragma GCC unroll 6
  for (int p = 0; p < SIDE; p++)
    winograd_kernel(done + p * 3, 1, u + p * SIDE, 1);
}

static ALWAYS_INLINE void store_panel(float *to, int64_t matrix_step, const float_lanes *u, bool streams) {
#pragma GCC unroll 36
  for (int e = 0; e < ELEMENTS; e++)
    if (streams)
      stream_lanes(to + e * matrix_step, u[e]);
    else
      store_lanes(to, e * matrix_step, u[e], false);
}

/* Columns are output channels: taps of LANES kernels are turned so that they stand side by side. */
static void take_columns(const float *w, int64_t out, int64_t in, int64_t o, float *u, int64_t matrix_step,
                         bool streams) {
  static const float zeros[TAPS * LANES];
  _Alignas(64) float taps[TAPS][LANES][LANES];
  for (int64_t i = 0; i < in; i += LANES) {
    int64_t count = smaller(LANES, in - i);
    for (int tap = 0; tap < TAPS; tap++) {
      const float *rows[LANES];
      for (int64_t k = 0; k < LANES; k++)
        rows[k] = o + k < out ? w + ((o + k) * TAPS + tap) * in + i : zeros;
      turn_rows_float(LANES, count, rows, taps[tap][0], LANES);
    }
    for (int64_t k = 0; k < count; k++) {
      float_lanes g[TAPS], elements[ELEMENTS];
#pragma GCC unroll 9
      for (int tap = 0; tap < TAPS; tap++)
        g[tap] = load_lanes(taps[tap][k], 0, false);
      elements_of(g, elements);
      store_panel(u + (i + k) * PANEL, matrix_step, elements, streams);
    }
  }
}

/* Columns are input channels, which stand side by side; the kernel is turned. */
static void take_turned(const float *w, int64_t out, int64_t in, int64_t i, float *u, int64_t matrix_step,
                        bool streams) {
  int64_t count = i < in ? smaller(LANES, in - i) : 0;
  for (int64_t o = 0; o < out; o++) {
    float_lanes g[TAPS], elements[ELEMENTS];
#pragma GCC unroll 9
    for (int tap = 0; tap < TAPS; tap++) {
      const float *from = w + (o * TAPS + TAPS - 1 - tap) * in + i;
      g[tap] = count == LANES ? load_lanes(from, 0, false) : count ? load_first_lanes(from, count) : (float_lanes){0};
    }
    elements_of(g, elements);
    store_panel(u + o * PANEL, matrix_step, elements, streams);
  }
}

void KERNEL(winograd_take_kernel)(const float *w, int64_t out, int64_t in, bool turned, int64_t first, int64_t last,
                                  float *u, int64_t matrix_step, bool streams) {
  int64_t depth = turned ? out : in;
  for (int64_t panel = first; panel < last; panel++)
    for (int half = 0; half < 2; half++) {
      int64_t column = panel * PANEL + half * LANES;
      float *to = u + (panel - first) * PANEL * depth + half * LANES;
      (turned ? take_turned : take_columns)(w, out, in, column, to, matrix_step, streams);
    }
}

/* du[e][i][o]; LANES of each at a time. */
void KERNEL(winograd_give_kernel)(const float *du, int64_t row_step, int64_t matrix_step, int parts, int64_t part_step,
                                  int64_t rows, int64_t columns, float *dw, int64_t in) {
  _Alignas(64) float taps[TAPS][LANES][LANES];
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t o = 0; o < columns; o += LANES) {
      int64_t height = smaller(LANES, rows - i), width = smaller(LANES, columns - o);
      for (int64_t k = 0; k < height; k++) {
        const float *from = du + (i + k) * row_step + o;
        float_lanes u[ELEMENTS], done[3 * SIDE], g[TAPS];
#pragma GCC unroll 36
        for (int e = 0; e < ELEMENTS; e++)
          u[e] = load_lanes(from, e * matrix_step, false);
        for (int part = 1; part < parts; part++)
#pragma GCC unroll 36
          for (int e = 0; e < ELEMENTS; e++)
            u[e] += load_lanes(from + part * part_step, e * matrix_step, false);
#pragma GCC unroll 6
        for (int q = 0; q < SIDE; q++)
          winograd_kernel_turned(u + q, SIDE, done + q, SIDE);
#pragma GCC unroll 3
        for (int r = 0; r < 3; r++)
          winograd_kernel_turned(done + r * SIDE, 1, g + r * 3, 1);
#pragma GCC unroll 9
        for (int tap = 0; tap < TAPS; tap++)
          store_lanes(taps[tap][k], 0, g[tap], false);
      }
      for (int tap = 0; tap < TAPS; tap++) {
        const float *from[LANES];
        for (int64_t k = 0; k < height; k++)
          from[k] = taps[tap][k];
        turn_rows_float(height, width, from, dw + (o * TAPS + tap) * in + i, TAPS * in);
      }
    }
}
