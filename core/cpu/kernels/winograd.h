/* winograd.h: the parts that Winograd's three convolutions are made of (cpu/winograd.h says what they are): how a map
 * is cut into tiles, the transforms of tiles and kernels, and the matrix products between them.
 *
 * Every transformed thing is 36 matrices, one for each element e = 6*p + q of a tile, a fixed distance apart: of tiles
 * [tile][channel], of kernels panels of PANEL columns [panel][row][column]. With stride 2 they are fewer. */
#ifndef OREPA_CORE_CPU_KERNELS_WINOGRAD_H
#define OREPA_CORE_CPU_KERNELS_WINOGRAD_H

#include "cpu/cpu.h"
#include "cpu/kernels/lanes.h"
#include "cpu/winograd.h"

enum { SIDE = 6, ELEMENTS = SIDE * SIDE, PANEL = 2 * LANES, GAP = 16 /* between matrices and rows: cache sets */ };

#ifdef __FP_FAST_FMAF
enum { WINOGRAD_ROUNDS_ONCE = true };
#else
enum { WINOGRAD_ROUNDS_ONCE = false };
#endif

/* ---- tiles ---- */

/* What is convolved along an axis: all taps; or with stride 2 (winograd_strided.h) the outer taps, or the middle one,
 * which meet different pixels. A convolution with stride 2 is the sum of four, one for each pair. */
typedef enum { ALL_TAPS, OUTER_TAPS, MIDDLE_TAP } winograd_taps;
typedef enum { WHOLE, OUTER_OUTER, OUTER_MIDDLE, MIDDLE_OUTER, MIDDLE_MIDDLE, PHASES } winograd_phase;

static ALWAYS_INLINE winograd_taps winograd_taps_of(const winograd_phase phase, const int axis) {
  bool outer = axis == 0 ? phase <= OUTER_MIDDLE : phase == OUTER_OUTER || phase == MIDDLE_OUTER;
  return phase == WHOLE ? ALL_TAPS : outer ? OUTER_TAPS : MIDDLE_TAP;
}

/* Inputs of a tile's axis, and elements of a kernel's. The middle tap is one element, which meets each of a tile's
 * inputs: they are rows of one matrix, one after the other. */
static ALWAYS_INLINE int winograd_inputs(const winograd_taps taps) {
  return taps == ALL_TAPS ? SIDE : taps == OUTER_TAPS ? 5 : 4;
}
static ALWAYS_INLINE int winograd_elements(const winograd_taps taps) {
  return taps == MIDDLE_TAP ? 1 : winograd_inputs(taps);
}
static ALWAYS_INLINE int winograd_positions(const winograd_taps taps, const bool is_short) {
  return taps == MIDDLE_TAP ? 4 - is_short : 1;
}

/* Matrices of a phase, and rows of each, at most. */
static inline int winograd_matrices(winograd_phase phase) {
  return winograd_elements(winograd_taps_of(phase, 0)) * winograd_elements(winograd_taps_of(phase, 1));
}
static inline int64_t winograd_most_rows(winograd_phase phase, int64_t tiles) {
  return tiles * winograd_positions(winograd_taps_of(phase, 0), false) *
         winograd_positions(winograd_taps_of(phase, 1), false);
}

/* A map's axis as tiles of 4 outputs, then tiles of 3; the last may hang over. */
typedef struct {
  int64_t fours, threes;
} winograd_axis;

/* A tile of 6 inputs or, in its short form, 5 along each axis. */
typedef struct {
  int64_t image, y, x;                     /* of its first output */
  int row;                                 /* its first in the matrices of its block */
  uint8_t short_y, short_x, rows, columns; /* how many outputs are in the map */
} winograd_tile;

/* Tiles in their order on the map; in the matrices they stand so that those which have element e are side by side. */
typedef struct {
  winograd_phase phase;
  int count, start[5]; /* start: rows */
  winograd_tile tiles[];
} winograd_block;

typedef struct {
  int64_t size[2], count; /* of tiles */
  winograd_axis axis[2];
} winograd_tiling;

winograd_tiling KERNEL(winograd_tiling_of)(int64_t batch, const int64_t size[2]);
/* Block `number` of a cut into blocks of so many tiles; the last has what is left. */
void KERNEL(winograd_cut)(const winograd_tiling *tiling, winograd_phase phase, int64_t tiles, int64_t number,
                          winograd_block *block);

static inline size_t winograd_block_bytes(int64_t tiles) {
  return (sizeof(winograd_block) + (size_t)tiles * sizeof(winograd_tile) + 63) / 64 * 64;
}

/* Rounded up to lines of the cache. */
static inline int64_t whole_lines(int64_t floats) {
  return (floats + 15) / 16 * 16;
}

/* The rows of a block's matrices for element (p, q): short tiles have none with p or q = 4. */
static inline void winograd_rows(const winograd_block *b, int p, int q, int *first, int *last) {
  *first = q == 4 ? b->start[1] : 0;
  *last = p == 4 ? b->start[2] : q == 4 ? b->start[3] : b->start[4];
}

/* ---- one axis: POINT_A, -POINT_A, POINT_B, -POINT_B are elements 1 ... 4, 0 and infinity 0 and 5 ---- */

#define POINT_A 0.625f
#define POINT_B 1.5f
#define A2 (POINT_A * POINT_A)
#define A3 (A2 * POINT_A)
#define B2 (POINT_B * POINT_B)
#define B3 (B2 * POINT_B)
#define GA (1 / (2 * A2 * (A2 - B2)))
#define GB (1 / (2 * B2 * (B2 - A2)))

/* a * x + y, rounded once where there is an instruction for it. Of a sum of two products the compiler may fuse either,
 * or none, and not the same in every copy of a transform, whose bits must be the same: so each is named. */
static ALWAYS_INLINE float_lanes fused(float a, float_lanes x, float_lanes y) {
#ifdef __FMA__
  return multiply_add_lanes((float_lanes){0} + a, x, y);
#else
  return a * x + y;
#endif
}

/* Inputs (6, or 5 of a short tile) to elements. */
static ALWAYS_INLINE void winograd_in(const bool is_short, const float_lanes *d, const int step, float_lanes *o,
                                      const int to) {
  float_lanes d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  if (is_short) {
    const float a = POINT_A, b = POINT_B;
    o[0] = fused(a * a * b * b, d0, fused(-a * a * b, d1, fused(-b * b, d2, b * d3)));
    o[to] = fused(-a * b * (a + b), d1, fused((a - b) * (a + b), d2, (a + b) * d3));
    o[2 * to] = fused(a * b * (b - a), d1, fused(-(a + b) * (b - a), d2, (b - a) * d3));
    o[3 * to] = fused(-2 * a * a * b, d1, 2 * b * d3);
    o[5 * to] = fused(a * a * b, d1, fused(-a * a, d2, fused(-b, d3, d4)));
    return;
  }
  float_lanes d5 = d[5 * step];
  float_lanes even = fused(-B2, d2, d4), odd = fused(-B2, d1, d3);
  o[0] = fused(A2 * B2, d0, fused(-(A2 + B2), d2, d4));
  o[to] = fused(POINT_A, odd, even);
  o[2 * to] = fused(-POINT_A, odd, even);
  even = fused(-A2, d2, d4);
  odd = fused(-A2, d1, d3);
  o[3 * to] = fused(POINT_B, odd, even);
  o[4 * to] = fused(-POINT_B, odd, even);
  o[5 * to] = fused(A2 * B2, d1, fused(-(A2 + B2), d3, d5));
}

/* Elements to outputs: 4, or 3. */
static ALWAYS_INLINE void winograd_out(const bool is_short, const float_lanes *m, const int step, float_lanes *o,
                                       const int to) {
  float_lanes even = m[step] + m[2 * step], odd = m[step] - m[2 * step], m3 = m[3 * step];
  if (is_short) {
    o[0] = m[0] + even + m3;
    o[to] = fused(POINT_B, m3, POINT_A * odd);
    o[2 * to] = fused(B2, m3, fused(A2, even, m[5 * step]));
    return;
  }
  float_lanes even_b = m3 + m[4 * step], odd_b = m3 - m[4 * step];
  o[0] = m[0] + even + even_b;
  o[to] = fused(POINT_B, odd_b, POINT_A * odd);
  o[2 * to] = fused(B2, even_b, A2 * even);
  o[3 * to] = fused(B3, odd_b, fused(A3, odd, m[5 * step]));
}

/* The transpose of that: gradients of 4 or 3 outputs to elements. */
static ALWAYS_INLINE void winograd_out_turned(const bool is_short, const float_lanes *d, const int step, float_lanes *o,
                                              const int to) {
  float_lanes d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = is_short ? d2 : d[3 * step];
  float_lanes even = fused(A2, d2, d0), odd = is_short ? POINT_A * d1 : fused(A3, d3, POINT_A * d1);
  o[0] = d0;
  o[to] = even + odd;
  o[2 * to] = even - odd;
  if (is_short) {
    o[3 * to] = fused(B2, d2, fused(POINT_B, d1, d0));
    o[5 * to] = d2;
    return;
  }
  even = fused(B2, d2, d0);
  odd = fused(B3, d3, POINT_B * d1);
  o[3 * to] = even + odd;
  o[4 * to] = even - odd;
  o[5 * to] = d3;
}

/* 3 numbers of a kernel to elements. */
static ALWAYS_INLINE void winograd_kernel(const float_lanes *g, const int step, float_lanes *o, const int to) {
  float_lanes g0 = g[0], g1 = g[step], g2 = g[2 * step];
  float_lanes even = fused(GA, g0, GA * A2 * g2);
  o[0] = 1 / (A2 * B2) * g0;
  o[to] = fused(GA * POINT_A, g1, even);
  o[2 * to] = fused(-GA * POINT_A, g1, even);
  even = fused(GB, g0, GB * B2 * g2);
  o[3 * to] = fused(GB * POINT_B, g1, even);
  o[4 * to] = fused(-GB * POINT_B, g1, even);
  o[5 * to] = g2;
}

/* The transpose of that: elements to the gradient of 3 numbers. */
static ALWAYS_INLINE void winograd_kernel_turned(const float_lanes *u, const int step, float_lanes *o, const int to) {
  float_lanes even_a = u[step] + u[2 * step], odd_a = u[step] - u[2 * step];
  float_lanes even_b = u[3 * step] + u[4 * step], odd_b = u[3 * step] - u[4 * step];
  o[0] = fused(1 / (A2 * B2), u[0], fused(GB, even_b, GA * even_a));
  o[to] = fused(GA * POINT_A, odd_a, GB * POINT_B * odd_b);
  o[2 * to] = fused(GB * B2, even_b, fused(GA * A2, even_a, u[5 * step]));
}

/* ---- maps and their tiles ---- */

/* Inputs of tiles: a map, its padding (less than 0: a border that is not read), and what is done to each number first.
 */
typedef struct {
  const float *data;
  int64_t size[2], channels, step; /* from pixel to pixel */
  int64_t padding[2];
  int stride;                 /* from input to input of a tile */
  const float *scale, *shift; /* NULL: nothing */
  bool relu;
} winograd_map;

/* What stands between a tile's elements and the map of outputs. */
typedef struct {
  float *data;
  int64_t size[2], step, line, image; /* from pixel to pixel, line to line, image to image */
  const float *bias, *residual;
  bool relu;
  float *moments;       /* of a chunk (4, C): what device.h says, without the count; NULL: not wanted */
  int64_t moments_step; /* from row to row of it */
  bool begins;          /* the block is the chunk's first */
  bool streams;         /* past the caches */
} winograd_result;

/* v[e][row][channel] of a block's tiles first ... last-1; rows are `row_step` apart, matrices `matrix_step`. */
void KERNEL(winograd_take)(const winograd_map *x, const winograd_block *block, int first, int last, float *v,
                           int64_t row_step, int64_t matrix_step);
/* A phase's m[e][row][channel] of a block's tiles. */
typedef struct {
  const winograd_block *block;
  const float *m;
  int64_t matrix_step;
} winograd_part;

/* The map's channels first ... first+count-1, m beginning with the first: from one phase, or the sum of all four with
 * stride 2. */
void KERNEL(winograd_give)(const winograd_result *y, const winograd_part *parts, bool sums, int64_t first,
                           int64_t count, int64_t row_step);
/* z[e][panel][row][column] of the gradient of a map of outputs; rows is that of the matrices. */
void KERNEL(winograd_take_gradient)(const winograd_map *dy, const winograd_block *block, int first, int last, float *z,
                                    int64_t rows, int64_t matrix_step);

/* ---- kernels: w (O, 3, 3, I) ---- */

/* u[e][i][column] of one panel of O, or turned by 180 degrees and with the channels' roles changed: u[e][o][column] of
 * one panel of I. All elements of a phase, perhaps past the caches; or those of one row, e = width*row + q, as u[q].
 * A row of phases of stride 2 is always turned. */
void KERNEL(winograd_take_kernel)(winograd_phase phase, const float *w, int64_t out, int64_t in, bool turned,
                                  int64_t panel, float *u, int64_t matrix_step, bool streams);
void KERNEL(winograd_take_kernel_row)(winograd_phase phase, const float *w, int64_t out, int64_t in, bool turned,
                                      int64_t panel, int row, float *u, int64_t matrix_step);
/* The taps of a phase in dw from du[e][i][o], the sum of `parts` such, for `rows` input and `columns` output channels;
 * w points to the first. */
void KERNEL(winograd_give_kernel)(winograd_phase phase, const float *du, int64_t row_step, int64_t matrix_step,
                                  int parts, int64_t part_step, int64_t rows, int64_t columns, float *dw, int64_t in);

/* ---- products ---- */

/* c[row][column] (+)= sum over k of a[row, k] * b[k][column], for a panel b whose first `columns` columns are wanted
 * (the others of a vector are written as well). a[row, k] is a[row * step + k], or turned a[k * step + row]. */
void KERNEL(winograd_product)(bool turned, int rows, int64_t depth, const float *a, int64_t step, const float *b,
                              int64_t columns, float *c, int64_t c_step, bool add);

/* ---- convolutions: the functions of winograd_kernels ---- */

size_t KERNEL(winograd_packed)(const conv_geometry *g);
size_t KERNEL(winograd_forward_scratch)(conv_direction direction, const conv_geometry *g, int threads);
void KERNEL(winograd_forward)(conv_direction direction, const winograd_operands *operands, int threads, void *scratch);
size_t KERNEL(winograd_weight_scratch)(const conv_geometry *g, int threads);
void KERNEL(winograd_weight)(const winograd_operands *operands, int threads, void *scratch);

#endif
