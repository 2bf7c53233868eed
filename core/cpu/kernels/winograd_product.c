/* winograd_product.c: the matrix products of Winograd's convolutions: a tall matrix times a panel as wide as two (or
 * one) vectors. As many rows at a time as there are registers for their sums. */
#include "cpu/kernels/winograd.h"

#if LANES == 16
enum { ROWS = 14 };
#else
enum { ROWS = 6 };
#endif

enum {
  RUN = 128, /* terms that are summed up before they are added */
  TERMS = 4, /* that are unrolled: what isn't multiplication takes the multipliers' places */
  GROUP = 3, /* rows that are addressed from one pointer: itself, one and two steps on */
  LINE = 16, /* of the cache, in floats */
};

/* The panel of the next product lies behind this one's, and is fetched evenly over the pieces that the rows are cut
 * into: `lines` of it with every TERMS terms. */
typedef struct {
  const float *from;
  int lines;
} fetched;

/* Adds one term to all sums; a[r] points to the rows r * GROUP on. */
static ALWAYS_INLINE void add_term(const bool turned, const int rows, const int vectors, float_lanes sum[ROWS][2],
                                   const float *const *a, int64_t step, const int term, const float *b) {
  float_lanes left = load_lanes(b, 0, false), right = vectors == 2 ? load_lanes(b, LANES, false) : left;
#pragma GCC unroll 14
  for (int r = 0; r < rows; r++) {
    float factor = turned ? a[0][r] : a[r / GROUP][r % GROUP * step + term];
    sum[r][0] += factor * left;
    if (vectors == 2)
      sum[r][1] += factor * right;
  }
}

static ALWAYS_INLINE void multiply(const bool turned, const int rows, const int vectors, int64_t depth, const float *a,
                                   int64_t step, const float *b, float *c, int64_t c_step, bool add, fetched next) {
  enum { POINTERS = (ROWS + GROUP - 1) / GROUP };
  float_lanes sum[ROWS][2];
  const float *row[POINTERS];
#pragma GCC unroll 14
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++)
      sum[r][v] = (float_lanes){0};
#pragma GCC unroll 5
  for (int r = 0; r < POINTERS; r++) {
    row[r] = turned ? a : a + r * GROUP * step;
    __asm__("" : "+r"(row[r])); /* a pointer each, not sums made anew for every term */
  }
  int64_t k = 0;
  for (; k + TERMS <= depth; k += TERMS) {
    for (int line = 0; line < next.lines; line++, next.from += LINE)
      __builtin_prefetch(next.from);
#pragma GCC unroll 4
    for (int term = 0; term < TERMS; term++) {
      add_term(turned, rows, vectors, sum, row, step, term, b + term * PANEL);
      row[0] += turned ? step : 0;
    }
    b += TERMS * PANEL;
#pragma GCC unroll 5
    for (int r = 0; r < POINTERS; r++)
      row[r] += turned ? 0 : TERMS;
  }
  for (; k < depth; k++, b += PANEL) {
    add_term(turned, rows, vectors, sum, row, step, 0, b);
#pragma GCC unroll 5
    for (int r = 0; r < POINTERS; r++)
      row[r] += turned ? step : 1;
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
    multiply(turned, rows, vectors, depth, a, step, b, c, c_step, add, next);                                          \
    break;

/* `rows` at most ROWS */
static ALWAYS_INLINE void multiply_some(const bool turned, int rows, const int vectors, int64_t depth, const float *a,
                                        int64_t step, const float *b, float *c, int64_t c_step, bool add,
                                        fetched next) {
  switch (rows) {
    FORM(1) FORM(2) FORM(3) FORM(4) FORM(5) FORM(6)
#if LANES == 16
    FORM(7) FORM(8) FORM(9) FORM(10) FORM(11) FORM(12) FORM(13) FORM(14)
#endif
  }
}
/* clang-format on */

#define VARIANT(name, turned, vectors)                                                                                 \
  static __attribute__((noinline)) void name(int rows, int64_t depth, const float *a, int64_t step, const float *b,    \
                                             float *c, int64_t c_step, bool add, fetched next) {                       \
    multiply_some(turned, rows, vectors, depth, a, step, b, c, c_step, add, next);                                     \
  }
VARIANT(rows1, false, 1)
VARIANT(rows2, false, 2)
VARIANT(columns1, true, 1)
VARIANT(columns2, true, 2)
#undef VARIANT

void KERNEL(winograd_product)(bool turned, int rows, int64_t depth, const float *a, int64_t step, const float *b,
                              int64_t columns, float *c, int64_t c_step, bool add) {
  __typeof__(rows1) *form = turned ? (columns > LANES ? columns2 : columns1) : (columns > LANES ? rows2 : rows1);
  int pieces = (rows + ROWS - 1) / ROWS;
  int64_t k = 0;
  do {
    int64_t run = depth - k < RUN + RUN / 2 ? depth - k : RUN;
    int lines = pieces < 4 ? 4 : 2;
    const float *next = b + (k + run) * PANEL;
    for (int p = 0; p < pieces; p++) {
      int first = (int)((int64_t)rows * p / pieces), last = (int)((int64_t)rows * (p + 1) / pieces);
      const float *from = turned ? a + first + k * step : a + first * step + k;
      form(last - first, run, from, step, b + k * PANEL, c + first * c_step, c_step, add || k > 0,
           (fetched){next + p * run / TERMS * lines * LINE, lines});
    }
    k += run;
  } while (k < depth);
}
