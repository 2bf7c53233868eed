/* winograd_kernel.c: 3x3 kernels to elements, and elements back to the gradient of kernels. */
#include "cpu/kernels/product.h"
#include "cpu/kernels/winograd_strided.h"

enum { TAPS = 9, AHEAD = 6 /* kernels */ };

/* All elements, or those of one row. */
enum { ALL_ROWS = SIDE };

typedef void along(const float_lanes *g, const int step, float_lanes *o, const int to);

static ALWAYS_INLINE along *along_of(const winograd_taps taps) {
  return taps == ALL_TAPS ? winograd_kernel : taps == OUTER_TAPS ? outer_kernel : middle_kernel;
}

static ALWAYS_INLINE int elements_in(const winograd_phase phase, const int row) {
  return winograd_elements(winograd_taps_of(phase, 1)) *
         (row == ALL_ROWS ? winograd_elements(winograd_taps_of(phase, 0)) : 1);
}

static ALWAYS_INLINE void elements_of(const winograd_phase phase, const float_lanes *g, const int row, float_lanes *u) {
  along *along_y = along_of(winograd_taps_of(phase, 0)), *along_x = along_of(winograd_taps_of(phase, 1));
  const int height = winograd_elements(winograd_taps_of(phase, 0)), width = elements_in(phase, 0);
  float_lanes done[3 * SIDE];
#pragma GCC unroll 3
  for (int s = 0; s < 3; s++)
    along_y(g + s, 3, done + s, 3);
  if (row < ALL_ROWS) {
    along_x(done + row * 3, 1, u, 1);
    return;
  }
#pragma GCC unroll 6
  for (int p = 0; p < height; p++)
    along_x(done + p * 3, 1, u + p * width, 1);
}

/* The taps of an axis that element p hangs on; ALL_ROWS: that any does. */
static ALWAYS_INLINE bool hangs_on(const winograd_taps taps, const int p, int tap) {
  const int infinity = taps == ALL_TAPS ? 5 : 3;
  return taps == MIDDLE_TAP ? tap == 1 : p == 0 ? tap == 0 : p == infinity ? tap == 2 : taps == ALL_TAPS || tap != 1;
}
static ALWAYS_INLINE bool needs_tap(const winograd_phase phase, const int row, int tap) {
  return hangs_on(winograd_taps_of(phase, 0), row, tap / 3) && hangs_on(winograd_taps_of(phase, 1), ALL_ROWS, tap % 3);
}

static ALWAYS_INLINE void store_panel(float *to, int64_t matrix_step, const float_lanes *u, const int count,
                                      bool streams) {
#pragma GCC unroll 36
  for (int e = 0; e < count; e++)
    if (streams)
      stream_lanes(to + e * matrix_step, u[e]);
    else
      store_lanes(to, e * matrix_step, u[e], false);
}

typedef void take(const float *w, int64_t out, int64_t in, int64_t panel, float *u, int64_t matrix_step, bool streams);

/* Columns are output channels: taps of LANES kernels are turned so that they stand side by side. */
static ALWAYS_INLINE void take_columns(const winograd_phase phase, const int row, const float *w, int64_t out,
                                       int64_t in, int64_t panel, float *u, int64_t matrix_step, bool streams) {
  static const float zeros[TAPS * LANES];
  _Alignas(64) float taps[TAPS][LANES][LANES];
  for (int64_t o = panel * PANEL; o < (panel + 1) * PANEL; o += LANES, u += LANES)
    for (int64_t i = 0; i < in; i += LANES) {
      int64_t count = smaller(LANES, in - i);
      for (int tap = 0; tap < TAPS; tap++) {
        const float *rows[LANES];
        if (!needs_tap(phase, row, tap))
          continue;
        for (int64_t k = 0; k < LANES; k++)
          rows[k] = o + k < out ? w + ((o + k) * TAPS + tap) * in + i : zeros;
        turn_rows_float(LANES, count, rows, taps[tap][0], LANES);
      }
      for (int64_t k = 0; k < count; k++) {
        float_lanes g[TAPS], elements[ELEMENTS];
#pragma GCC unroll 9
        for (int tap = 0; tap < TAPS; tap++)
          g[tap] = needs_tap(phase, row, tap) ? load_lanes(taps[tap][k], 0, false) : (float_lanes){0};
        elements_of(phase, g, row, elements);
        store_panel(u + (i + k) * PANEL, matrix_step, elements, elements_in(phase, row), streams);
      }
    }
}

/* Columns are input channels, which stand side by side; the kernel is turned. */
static ALWAYS_INLINE void take_turned(const winograd_phase phase, const int row, const float *w, int64_t out,
                                      int64_t in, int64_t panel, float *u, int64_t matrix_step, bool streams) {
  for (int64_t o = 0; o < out; o++)
    for (int half = 0; half < 2; half++) {
      int64_t i = panel * PANEL + half * LANES, count = i < in ? smaller(LANES, in - i) : 0;
      float_lanes g[TAPS], elements[ELEMENTS];
#pragma GCC unroll 9
      for (int tap = 0; tap < TAPS; tap++) {
        const float *from = w + (o * TAPS + TAPS - 1 - tap) * in + i;
        bool loads = needs_tap(phase, row, tap) && count;
        g[tap] = !loads           ? (float_lanes){0}
                 : count == LANES ? load_lanes(from, 0, false)
                                  : load_first_lanes(from, count);
        __builtin_prefetch(from + AHEAD * TAPS * in);
      }
      elements_of(phase, g, row, elements);
      store_panel(u + o * PANEL + half * LANES, matrix_step, elements, elements_in(phase, row), streams);
    }
}

#define TAKE(name, way, phase, row)                                                                                    \
  static void name(const float *w, int64_t out, int64_t in, int64_t panel, float *u, int64_t matrix_step,              \
                   bool streams) {                                                                                     \
    way(phase, row, w, out, in, panel, u, matrix_step, streams);                                                       \
  }
#define TAKE_ROWS(way)                                                                                                 \
  TAKE(way##_0, way, WHOLE, 0)                                                                                         \
  TAKE(way##_1, way, WHOLE, 1)                                                                                         \
  TAKE(way##_2, way, WHOLE, 2)                                                                                         \
  TAKE(way##_3, way, WHOLE, 3)                                                                                         \
  TAKE(way##_4, way, WHOLE, 4)                                                                                         \
  TAKE(way##_5, way, WHOLE, 5)                                                                                         \
  TAKE(way##_all, way, WHOLE, ALL_ROWS)                                                                                \
  static take *const way##_rows[] = {way##_0, way##_1, way##_2, way##_3, way##_4, way##_5, way##_all};
TAKE_ROWS(take_columns)
TAKE_ROWS(take_turned)
#undef TAKE_ROWS

#define TAKE_OUTER(phase)                                                                                              \
  TAKE(phase##_0, take_turned, phase, 0)                                                                               \
  TAKE(phase##_1, take_turned, phase, 1)                                                                               \
  TAKE(phase##_2, take_turned, phase, 2)                                                                               \
  TAKE(phase##_3, take_turned, phase, 3)                                                                               \
  TAKE(phase##_4, take_turned, phase, 4)                                                                               \
  TAKE(phase##_all, take_turned, phase, ALL_ROWS)
TAKE(columns_OUTER_OUTER, take_columns, OUTER_OUTER, ALL_ROWS)
TAKE(columns_OUTER_MIDDLE, take_columns, OUTER_MIDDLE, ALL_ROWS)
TAKE(columns_MIDDLE_OUTER, take_columns, MIDDLE_OUTER, ALL_ROWS)
TAKE(columns_MIDDLE_MIDDLE, take_columns, MIDDLE_MIDDLE, ALL_ROWS)
TAKE_OUTER(OUTER_OUTER)
TAKE_OUTER(OUTER_MIDDLE)
TAKE(MIDDLE_OUTER_0, take_turned, MIDDLE_OUTER, 0)
TAKE(MIDDLE_MIDDLE_0, take_turned, MIDDLE_MIDDLE, 0)
#undef TAKE_OUTER
#undef TAKE

static take *form_of(winograd_phase phase, bool turned, int row) {
  static take *const outer_outer[] = {OUTER_OUTER_0, OUTER_OUTER_1, OUTER_OUTER_2,  OUTER_OUTER_3,
                                      OUTER_OUTER_4, NULL,          OUTER_OUTER_all};
  static take *const outer_middle[] = {OUTER_MIDDLE_0, OUTER_MIDDLE_1, OUTER_MIDDLE_2,  OUTER_MIDDLE_3,
                                       OUTER_MIDDLE_4, NULL,           OUTER_MIDDLE_all};
  static take *const columns[PHASES] = {
      [OUTER_OUTER] = columns_OUTER_OUTER,
      [OUTER_MIDDLE] = columns_OUTER_MIDDLE,
      [MIDDLE_OUTER] = columns_MIDDLE_OUTER,
      [MIDDLE_MIDDLE] = columns_MIDDLE_MIDDLE,
  };
  if (phase != WHOLE && !turned)
    return columns[phase];
  switch (phase) {
  case OUTER_OUTER:
    return outer_outer[row];
  case OUTER_MIDDLE:
    return outer_middle[row];
  case MIDDLE_OUTER:
    return MIDDLE_OUTER_0;
  case MIDDLE_MIDDLE:
    return MIDDLE_MIDDLE_0;
  default:
    return (turned ? take_turned_rows : take_columns_rows)[row];
  }
}

void KERNEL(winograd_take_kernel)(winograd_phase phase, const float *w, int64_t out, int64_t in, bool turned,
                                  int64_t panel, float *u, int64_t matrix_step, bool streams) {
  form_of(phase, turned, ALL_ROWS)(w, out, in, panel, u, matrix_step, streams);
}

void KERNEL(winograd_take_kernel_row)(winograd_phase phase, const float *w, int64_t out, int64_t in, bool turned,
                                      int64_t panel, int row, float *u, int64_t matrix_step) {
  form_of(phase, turned, row)(w, out, in, panel, u, matrix_step, false);
}

/* ---- gradients ---- */

static ALWAYS_INLINE along *backwards_of(const winograd_taps taps) {
  return taps == ALL_TAPS ? winograd_kernel_turned : taps == OUTER_TAPS ? outer_kernel_turned : middle_kernel_turned;
}

/* How many taps there are along an axis, and which is number k. */
static ALWAYS_INLINE int taps_in(const winograd_taps taps) {
  return taps == ALL_TAPS ? 3 : taps == OUTER_TAPS ? 2 : 1;
}
static ALWAYS_INLINE int tap_at(const winograd_taps taps, int k) {
  return taps == ALL_TAPS ? k : taps == OUTER_TAPS ? 2 * k : 1;
}

/* du[e][i][o]; LANES of each at a time. */
static ALWAYS_INLINE void give_kernel(const winograd_phase phase, const float *du, int64_t row_step,
                                      int64_t matrix_step, int parts, int64_t part_step, int64_t rows, int64_t columns,
                                      float *dw, int64_t in) {
  const winograd_taps of_y = winograd_taps_of(phase, 0), of_x = winograd_taps_of(phase, 1);
  const int height = winograd_elements(of_y), width = winograd_elements(of_x), elements = height * width;
  const int down = taps_in(of_y), across = taps_in(of_x);
  _Alignas(64) float taps[TAPS][LANES][LANES];
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t o = 0; o < columns; o += LANES) {
      int64_t ins = smaller(LANES, rows - i), outs = smaller(LANES, columns - o);
      for (int64_t k = 0; k < ins; k++) {
        const float *from = du + (i + k) * row_step + o;
        float_lanes u[ELEMENTS], done[3 * SIDE], g[TAPS];
#pragma GCC unroll 36
        for (int e = 0; e < elements; e++)
          u[e] = load_lanes(from, e * matrix_step, false);
        for (int part = 1; part < parts; part++)
#pragma GCC unroll 36
          for (int e = 0; e < elements; e++)
            u[e] += load_lanes(from + part * part_step, e * matrix_step, false);
#pragma GCC unroll 6
        for (int q = 0; q < width; q++)
          backwards_of(of_y)(u + q, width, done + q, width);
#pragma GCC unroll 3
        for (int r = 0; r < down; r++)
          backwards_of(of_x)(done + r * width, 1, g + r * across, 1);
#pragma GCC unroll 9
        for (int tap = 0; tap < down * across; tap++)
          store_lanes(taps[tap][k], 0, g[tap], false);
      }
      for (int tap = 0; tap < down * across; tap++) {
        const float *from[LANES];
        int to = 3 * tap_at(of_y, tap / across) + tap_at(of_x, tap % across);
        for (int64_t k = 0; k < ins; k++)
          from[k] = taps[tap][k];
        turn_rows_float(ins, outs, from, dw + (o * TAPS + to) * in + i, TAPS * in);
      }
    }
}

#define GIVE(phase)                                                                                                    \
  case phase:                                                                                                          \
    give_kernel(phase, du, row_step, matrix_step, parts, part_step, rows, columns, dw, in);                            \
    break;

void KERNEL(winograd_give_kernel)(winograd_phase phase, const float *du, int64_t row_step, int64_t matrix_step,
                                  int parts, int64_t part_step, int64_t rows, int64_t columns, float *dw, int64_t in) {
  switch (phase) {
    GIVE(WHOLE)
    GIVE(OUTER_OUTER)
    GIVE(OUTER_MIDDLE)
    GIVE(MIDDLE_OUTER)
    GIVE(MIDDLE_MIDDLE)
  default:
    break;
  }
}
