/* folds.c: the loops of reductions, for each kind and type. */
#ifndef __clang__
#pragma GCC optimize("no-trapping-math") /* a choice may be computed both ways: vector code, and the same values */
#endif
#include "cpu/kernels/folds.h"

#include <math.h>

enum {
  LANES = 32, /* partial values of a row, so that additions need not wait for one another */
  /* Additions one after another in the elements' own type before the state takes the sum: so few lose no more in
   * float32 than adding in pairs does. */
  ADDITIONS = 32
};

#define ANY_NUMBER (INT64_MAX / LANES)

/* `expression` makes one value of two, m before x, each an element or made of several, `most` of them one after another
 * before the state takes the value in. The state's type S has its pair defined before. */
#define FOLD(kind, T, S, field, identity, most, expression)                                                            \
  static inline T kind##_pair_##T(const T m, const T x) {                                                              \
    return expression;                                                                                                 \
  }                                                                                                                    \
                                                                                                                       \
  static T kind##_run_##T(int64_t n, const T *x) {                                                                     \
    T lanes[LANES];                                                                                                    \
    int64_t i = 0;                                                                                                     \
    for (int l = 0; l < LANES; l++)                                                                                    \
      lanes[l] = identity;                                                                                             \
    for (; i + LANES <= n; i += LANES)                                                                                 \
      for (int l = 0; l < LANES; l++)                                                                                  \
        lanes[l] = kind##_pair_##T(lanes[l], x[i + l]);                                                                \
    for (; i + 8 <= n; i += 8)                                                                                         \
      for (int l = 0; l < 8; l++)                                                                                      \
        lanes[l] = kind##_pair_##T(lanes[l], x[i + l]);                                                                \
    for (int l = 0; i < n; i++, l++)                                                                                   \
      lanes[l] = kind##_pair_##T(lanes[l], x[i]);                                                                      \
    for (int half = LANES / 2; half; half /= 2)                                                                        \
      for (int l = 0; l < half; l++)                                                                                   \
        lanes[l] = kind##_pair_##T(lanes[l], lanes[l + half]);                                                         \
    return lanes[0];                                                                                                   \
  }                                                                                                                    \
                                                                                                                       \
  static void kind##_row_##T(int64_t n, const void *x, fold_value *value, int64_t *position, int64_t first) {          \
    (void)position, (void)first;                                                                                       \
    for (int64_t i = 0, here; i < n; i += here) {                                                                      \
      here = (n - i) / LANES < most ? n - i : most * LANES;                                                            \
      value->field = kind##_pair_##S(value->field, kind##_run_##T(here, (const T *)x + i));                            \
    }                                                                                                                  \
  }                                                                                                                    \
                                                                                                                       \
  static void kind##_columns_##T(int64_t rows, int64_t n, const void *from, int64_t stride, fold_value *values,        \
                                 int64_t *positions, int64_t first) {                                                  \
    (void)positions, (void)first;                                                                                      \
    const T *x = from;                                                                                                 \
    T made[FOLD_WIDTH];                                                                                                \
    for (int64_t r = 0; r < rows;) {                                                                                   \
      for (int64_t c = 0; c < n; c++)                                                                                  \
        made[c] = identity;                                                                                            \
      for (int64_t end = rows - r < most ? rows : r + most; r < end; r++, x += stride)                                 \
        for (int64_t c = 0; c < n; c++)                                                                                \
          made[c] = kind##_pair_##T(made[c], x[c]);                                                                    \
      for (int64_t c = 0; c < n; c++)                                                                                  \
        values[c].field = kind##_pair_##S(values[c].field, made[c]);                                                   \
    }                                                                                                                  \
  }

#define FOLDS(kind, least_real, least_integer, most, expression)                                                       \
  FOLD(kind, double, double, real, least_real, ANY_NUMBER, expression)                                                 \
  FOLD(kind, float, double, real, (float)least_real, most, expression)                                                 \
  FOLD(kind, int64_t, int64_t, integer, least_integer, ANY_NUMBER, expression)

FOLDS(sum, 0, 0, ADDITIONS, m + x)
FOLDS(max, -INFINITY, INT64_MIN, ANY_NUMBER, ((x > m) | (x != x)) ? x : m)
FOLDS(min, INFINITY, INT64_MAX, ANY_NUMBER, ((x < m) | (x != x)) ? x : m)
FOLDS(all, 1, 1, ANY_NUMBER, x == 0 ? 0 : m)
FOLDS(any, 0, 0, ANY_NUMBER, x != 0 ? 1 : m)

/* The position of the first of the best; NaN is better than all else. */
#define ARG(kind, extreme, T, field, compare)                                                                          \
  static void kind##_row_##T(int64_t n, const void *from, fold_value *value, int64_t *position, int64_t first) {       \
    const T *x = from;                                                                                                 \
    const T best = extreme##_run_##T(n, x), old = (T)value->field;                                                     \
    if (*position >= 0 && !(best compare old || (best != best && old == old)))                                         \
      return;                                                                                                          \
    int64_t i = 0;                                                                                                     \
    while (x[i] != best && (best == best || x[i] == x[i]))                                                             \
      i++;                                                                                                             \
    value->field = best;                                                                                               \
    *position = first + i;                                                                                             \
  }                                                                                                                    \
                                                                                                                       \
  static void kind##_columns_##T(int64_t rows, int64_t n, const void *from, int64_t stride, fold_value *values,        \
                                 int64_t *positions, int64_t first) {                                                  \
    const T *x = from;                                                                                                 \
    T best[FOLD_WIDTH];                                                                                                \
    int32_t row[FOLD_WIDTH]; /* where a better one was; -1: nowhere */                                                 \
    bool none = n > 0 && positions[0] < 0;                                                                             \
    for (int64_t c = 0; c < n; c++) {                                                                                  \
      best[c] = none ? x[c] : (T)values[c].field;                                                                      \
      row[c] = none ? 0 : -1;                                                                                          \
    }                                                                                                                  \
    for (int32_t r = 0; r < rows; r++, x += stride)                                                                    \
      for (int64_t c = 0; c < n; c++) {                                                                                \
        const bool better = x[c] compare best[c] || (x[c] != x[c] && best[c] == best[c]);                              \
        best[c] = better ? x[c] : best[c];                                                                             \
        row[c] = better ? r : row[c];                                                                                  \
      }                                                                                                                \
    for (int64_t c = 0; c < n; c++) {                                                                                  \
      values[c].field = best[c];                                                                                       \
      positions[c] = row[c] < 0 ? positions[c] : first + row[c];                                                       \
    }                                                                                                                  \
  }

#define ARGS(kind, extreme, compare)                                                                                   \
  ARG(kind, extreme, double, real, compare)                                                                            \
  ARG(kind, extreme, float, real, compare) ARG(kind, extreme, int64_t, integer, compare)

ARGS(argmax, max, >)
ARGS(argmin, min, <)

#define ROW(kind)                                                                                                      \
  {                                                                                                                    \
    {kind##_row_float, kind##_columns_float}, {kind##_row_double, kind##_columns_double}, {                            \
      kind##_row_int64_t, kind##_columns_int64_t                                                                       \
    }                                                                                                                  \
  }

static const fold folds[OREPA_REDUCTIONS][FOLD_TYPES] = {
    [OREPA_SUM] = ROW(sum),       [OREPA_MAX] = ROW(max), [OREPA_MIN] = ROW(min), [OREPA_ARGMAX] = ROW(argmax),
    [OREPA_ARGMIN] = ROW(argmin), [OREPA_ALL] = ROW(all), [OREPA_ANY] = ROW(any)};

const fold *KERNEL(fold_of)(orepa_reduction kind, int type) {
  return &folds[kind][type];
}

fold_value KERNEL(fold_identity)(orepa_reduction kind, int type) {
  bool low = kind == OREPA_MAX || kind == OREPA_ARGMAX, high = kind == OREPA_MIN || kind == OREPA_ARGMIN;
  double truth = kind == OREPA_ALL;
  if (type == FOLD_INT64)
    return (fold_value){.integer = low ? INT64_MIN : high ? INT64_MAX : (int64_t)truth};
  return (fold_value){.real = low ? -INFINITY : high ? INFINITY : truth};
}
