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

/* Memory that a tile asks for while it multiplies, so that it is near when it is needed: a line in each step, the next
 * one `step` bytes on. Nothing is read: it may lie anywhere. */
typedef struct {
  const char *at;
  int64_t step;
} fetch;

/* Part k of `parts` of `count` floats, over `depth` steps. */
static inline fetch fetch_part(const float *array, int64_t count, int64_t k, int64_t parts, int64_t depth) {
  int64_t bytes = count * (int64_t)sizeof *array, step = divide_up(bytes, larger(1, parts * depth));
  return (fetch){(const char *)array + k * depth * step, step};
}

/* Arrays that are needed later, to be fetched piece by piece. */
enum { FETCH_MOST = 20 };
typedef struct {
  const float *from[FETCH_MOST];
  int64_t count[FETCH_MOST];
  int arrays, array;
  int64_t done, each; /* floats of this array, of a piece */
} fetch_list;

static inline void fetch_add(fetch_list *list, const float *from, int64_t count) {
  if (count > 0 && list->arrays < FETCH_MOST) {
    list->from[list->arrays] = from;
    list->count[list->arrays++] = count;
  }
}

/* To be done within `pieces`. */
static inline void fetch_spread(fetch_list *list, int64_t pieces) {
  int64_t all = 0;
  for (int k = 0; k < list->arrays; k++)
    all += list->count[k];
  list->done = 0;
  list->each = divide_up(all, larger(1, pieces - list->arrays));
}

/* The next piece, over `depth` steps; after the last one nothing new. */
static inline fetch fetch_next(fetch_list *list, int64_t depth) {
  if (list->array == list->arrays)
    return (fetch){(const char *)list, 0};
  int k = list->array;
  int64_t count = smaller(list->each, list->count[k] - list->done);
  const float *from = list->from[k] + list->done;
  list->done += count;
  if (list->done == list->count[k])
    list->array++, list->done = 0;
  return fetch_part(from, count, 0, 1, depth);
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

#if LANES >= 8
/* Vectors a and b, seen as one row of 2 * LANES numbers: those at even places, and at odd places; and back. */
#if LANES == 16
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#define LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#endif
#endif

/* clang-format off */
#define PRODUCT_DEFINE(type)                                                                                           \
  typedef type type##_vector __attribute__((vector_size(4 * LANES)  , may_alias));                                    \
  typedef type type##_quad __attribute__((vector_size(4 * sizeof(type)), aligned(sizeof(type)), may_alias));           \
                                                                                                                       \
  /* c[row][column] = sum over k of a[k][row] * b[k][column], or +=; all three aligned to vectors. */                  \
  static __attribute__((noinline, unused)) void tile_##type(bool add, int64_t depth, const type *a, const type *b, type *c, \
                                                            fetch next) {                                              \
    type##_vector *result = (type##_vector *)c, zero = {0};                                                            \
    int64_t k = 0;                                                                                                     \
    do {                                                                                                               \
      int64_t end = smaller(k + PRODUCT_DEPTH, depth);                                                                 \
      type##_vector sum[PRODUCT_ROWS][2];                                                                              \
      _Pragma("GCC unroll 14") for (int r = 0; r < PRODUCT_ROWS; r++)                                                  \
        sum[r][0] = sum[r][1] = zero;                                                                                  \
      _Pragma("GCC unroll 4") for (int64_t step = k; step < end; step++) {                                             \
        type##_vector left = ((const type##_vector *)b)[0], right = ((const type##_vector *)b)[1];                     \
        __builtin_prefetch(next.at, 0, 2);                                                                             \
        next.at += next.step;                                                                                          \
        _Pragma("GCC unroll 14") for (int r = 0; r < PRODUCT_ROWS; r++) {                                              \
          sum[r][0] += a[r] * left;                                                                                    \
          sum[r][1] += a[r] * right;                                                                                   \
        }                                                                                                              \
        a += PRODUCT_ROWS;                                                                                             \
        b += PRODUCT_COLUMNS(type);                                                                                    \
      }                                                                                                                \
      _Pragma("GCC unroll 14") for (int r = 0; r < PRODUCT_ROWS; r++) {                                                \
        if (k || add) {                                                                                                       \
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

#if LANES == 16
/* Row r's k-th number becomes vector k's r-th. In a number's place, row above k, each round moves the lowest bit of k
 * into the vector's number and one bit of the row to the top of the lane's. */
static ALWAYS_INLINE void turn_sixteen(float_lanes *v) {
#pragma GCC unroll 4
  for (int bit = 1; bit < 16; bit *= 2)
#pragma GCC unroll 16
    for (int k = 0; k < 16; k++)
      if (!(k & bit)) {
        float_lanes even = __builtin_shufflevector(v[k], v[k + bit], EVEN_LANES);
        v[k + bit] = __builtin_shufflevector(v[k], v[k + bit], ODD_LANES);
        v[k] = even;
      }
}

/* As pack_columns_float(), for at most sixteen rows and steps in sixteens. */
static inline void pack_sixteen(int64_t depth, int64_t width, int64_t count, int64_t columns, const float *const *row,
                                float *panel) {
  for (int64_t k = 0; k < depth; k += 16, panel += 16 * width) {
    float_lanes v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
      v[r] = r < count ? load_lanes(row[r], k, false) : (float_lanes){0};
    turn_sixteen(v);
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
      store_first_lanes(panel + r * width, v[r], columns);
  }
}
#endif

/* pack_columns_float() by the widest vectors where they fit. */
static inline void pack_panel(int64_t depth, int64_t width, int64_t count, const float *const *row, float *panel) {
#if LANES == 16
  if (depth % 16 == 0) {
    for (int64_t r = 0; r < width; r += 16)
      pack_sixteen(depth, width, larger(0, smaller(16, count - r)), smaller(16, width - r), row + r, panel + r);
    return;
  }
#endif
  pack_columns_float(depth, width, count, row, panel);
}

#endif
