/* product.h: what matrix products of our own are made of: panels packed in the order in which they are read, and a tile
 * of registers that multiplies two of them. Whoever uses it walks over the tiles himself, so that a product can begin
 * with rows gathered from anywhere and end in whatever has to be done with its result, while that is still in the
 * cache.
 *
 * A panel holds `width` numbers for each step of the sum: PRODUCT_ROWS of the left factor, PRODUCT_COLUMNS(type) of the
 * right one, filled up with zeros. A tile's sums are added in the order of the steps, in runs of PRODUCT_DEPTH: the
 * same bits wherever the tile lies and whoever computes it. */
#ifndef OREPA_CORE_CPU_PRODUCT_H
#define OREPA_CORE_CPU_PRODUCT_H

#include <string.h>

#include "cpu/cpu.h"
#include "cpu/kernels/lanes.h"

/* PRODUCT_ROWS: as many accumulators as the registers hold beside two vectors of the right factor. PRODUCT_BLOCK: rows
 * that are packed at a time; with a few hundred steps they stay in the second cache. */
#if LANES == 16
enum { PRODUCT_ROWS = 14, PRODUCT_BLOCK = 9 * PRODUCT_ROWS };
#else
enum { PRODUCT_ROWS = 6, PRODUCT_BLOCK = 18 * PRODUCT_ROWS };
#endif
enum { PRODUCT_DEPTH = 256, PRODUCT_MOST_COLUMNS = 2 * LANES };

#define PRODUCT_COLUMNS(type) (2 * (int64_t)sizeof(float_lanes) / (int64_t)sizeof(type))

static inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
static inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
static inline int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

/* Asks for part k of `parts` of an array of floats: a panel that is needed next is fetched while this one is worked on.
 */
static ALWAYS_INLINE void fetch_part(const float *array, int64_t count, int64_t k, int64_t parts) {
  for (int64_t i = count * k / parts; i < count * (k + 1) / parts; i += 16)
    __builtin_prefetch(array + i);
}

/* Channels-last, without gaps. */
static inline bool is_dense_kernel(const device_array *a, orepa_dtype dtype) {
  static const int inner_first[4] = {1, 3, 2, 0};
  int64_t stride = 1;
  if (a->rank != 4 || a->dtype != dtype)
    return false;
  for (int n = 0; n < 4; n++) {
    int64_t size = a->shape[inner_first[n]];
    if (size > 1 && a->strides[inner_first[n]] != stride)
      return false;
    stride *= larger(size, 1);
  }
  return true;
}

/* Numbers of a packed factor with `count` rows (or columns) in panels of `width`. */
static inline int64_t packed_size(int64_t count, int64_t width, int64_t depth) {
  return divide_up(count, width) * width * depth;
}

/* The size of chunks of `count` items: at most `most`, and so that their number is a multiple of `parts`. */
static inline int64_t even_chunk(int64_t count, int64_t most, int64_t parts) {
  int64_t chunks = divide_up(divide_up(count, most), parts) * parts;
  return larger(1, divide_up(count, larger(1, chunks)));
}

/* clang-format off */
#define PRODUCT_DEFINE(type)                                                                                           \
  typedef type type##_vector __attribute__((vector_size(4 * LANES)  , may_alias));                                    \
  typedef type type##_quad __attribute__((vector_size(4 * sizeof(type)), aligned(sizeof(type)), may_alias));           \
                                                                                                                       \
  /* c[row][column] = sum over k of a[k][row] * b[k][column]; all three aligned to vectors. */                         \
  static __attribute__((noinline, unused)) void tile_##type(int64_t depth, const type *a, const type *b, type *c) {    \
    type##_vector *result = (type##_vector *)c, zero = {0};                                                            \
    int64_t k = 0;                                                                                                     \
    do {                                                                                                               \
      int64_t end = smaller(k + PRODUCT_DEPTH, depth);                                                                 \
      type##_vector sum[PRODUCT_ROWS][2];                                                                              \
      _Pragma("GCC unroll 14") for (int r = 0; r < PRODUCT_ROWS; r++)                                                  \
        sum[r][0] = sum[r][1] = zero;                                                                                  \
      _Pragma("GCC unroll 4") for (int64_t step = k; step < end; step++) {                                             \
        type##_vector left = ((const type##_vector *)b)[0], right = ((const type##_vector *)b)[1];                     \
        _Pragma("GCC unroll 14") for (int r = 0; r < PRODUCT_ROWS; r++) {                                              \
          sum[r][0] += a[r] * left;                                                                                    \
          sum[r][1] += a[r] * right;                                                                                   \
        }                                                                                                              \
        a += PRODUCT_ROWS;                                                                                             \
        b += PRODUCT_COLUMNS(type);                                                                                    \
      }                                                                                                                \
      _Pragma("GCC unroll 14") for (int r = 0; r < PRODUCT_ROWS; r++) {                                                \
        if (k) {                                                                                                       \
          sum[r][0] += result[2 * r];                                                                                  \
          sum[r][1] += result[2 * r + 1];                                                                              \
        }                                                                                                              \
        result[2 * r] = sum[r][0];                                                                                     \
        result[2 * r + 1] = sum[r][1];                                                                                 \
      }                                                                                                                \
      k = end;                                                                                                         \
    } while (k < depth);                                                                                               \
  }                                                                                                                    \
                                                                                                                       \
  /* Four rows become four columns. */                                                                                 \
  static inline void turn4_##type(const type *a, const type *b, const type *c, const type *d, type *to, int64_t ld) {  \
    type##_quad x = *(const type##_quad *)a, y = *(const type##_quad *)b;                                              \
    type##_quad z = *(const type##_quad *)c, w = *(const type##_quad *)d;                                              \
    type##_quad xy = __builtin_shufflevector(x, y, 0, 4, 1, 5), zw = __builtin_shufflevector(z, w, 0, 4, 1, 5);        \
    *(type##_quad *)to = __builtin_shufflevector(xy, zw, 0, 1, 4, 5);                                                  \
    *(type##_quad *)(to + ld) = __builtin_shufflevector(xy, zw, 2, 3, 6, 7);                                           \
    xy = __builtin_shufflevector(x, y, 2, 6, 3, 7), zw = __builtin_shufflevector(z, w, 2, 6, 3, 7);                    \
    *(type##_quad *)(to + 2 * ld) = __builtin_shufflevector(xy, zw, 0, 1, 4, 5);                                       \
    *(type##_quad *)(to + 3 * ld) = __builtin_shufflevector(xy, zw, 2, 3, 6, 7);                                       \
  }                                                                                                                    \
                                                                                                                       \
  /* to[c][r] = row[r][c]. What is left over after fours is taken again with the four before it. */                    \
  static inline void turn_rows_##type(int64_t rows, int64_t columns, const type *const *row, type *to, int64_t ld) {   \
    if (rows < 4 || columns < 4) {                                                                                     \
      for (int64_t r = 0; r < rows; r++)                                                                               \
        for (int64_t c = 0; c < columns; c++)                                                                          \
          to[c * ld + r] = row[r][c];                                                                                  \
      return;                                                                                                          \
    }                                                                                                                  \
    for (int64_t next = 0; next < rows; next += 4) {                                                                   \
      int64_t r = smaller(next, rows - 4);                                                                             \
      const type *x = row[r], *y = row[r + 1], *z = row[r + 2], *w = row[r + 3];                                       \
      for (int64_t k = 0; k < columns; k += 4) {                                                                       \
        int64_t c = smaller(k, columns - 4);                                                                           \
        turn4_##type(x + c, y + c, z + c, w + c, to + c * ld + r, ld);                                                 \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
                                                                                                                       \
  /* A panel whose step k is column k of `count` rows, up to `width`. */                                               \
  static inline void pack_columns_##type(int64_t depth, int64_t width, int64_t count, const type *const *row,          \
                                         type *panel) {                                                                \
    turn_rows_##type(count, depth, row, panel, width);                                                                 \
    if (count < width)                                                                                                 \
      for (int64_t k = 0; k < depth; k++)                                                                              \
        memset(panel + k * width + count, 0, (size_t)(width - count) * sizeof(type));                                  \
  }
/* clang-format on */

PRODUCT_DEFINE(float)
PRODUCT_DEFINE(double)

#endif
