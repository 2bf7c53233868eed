/* elementwise.h: every element-wise function, once: its name, what types it takes, its expression and its derivatives.
 * Each device expands the list into kernels; core/ops expands it into ops. A new function is a new row.
 *
 *   ROW(name, operands, types, forward, needs_a, da, needs_b, db, needs_c, dc)
 *
 * `a`, `b`, `c` are the operands, `y` the result and `dy` the gradient that arrives; da, db, dc are the gradients that
 * leave. They are expressions in a type T that is float, double or (types ANY and COMPARE, forward only) int64_t, with
 * <tgmath.h>'s generic functions. needs_* says what its derivative reads beside dy: a sum of NEEDS_A, NEEDS_B, NEEDS_C,
 * NEEDS_Y; or PASSES, where the derivative is dy itself, or NO_GRADIENT.
 *
 *   types  REAL     floats; integers and bools are made float32 first
 *          ANY      integers too, computed as int64
 *          COMPARE  integers too; the result is bool */
#ifndef OREPA_CORE_ELEMENTWISE_H
#define OREPA_CORE_ELEMENTWISE_H

#include <math.h>
#include <stdint.h>

enum { ELEMENTWISE_REAL, ELEMENTWISE_ANY, ELEMENTWISE_COMPARE, ELEMENTWISE_CHOICE };
enum { NEEDS_A = 1, NEEDS_B = 2, NEEDS_C = 4, NEEDS_Y = 8, PASSES = 16, NO_GRADIENT = 32 };

/* A constant in the type of x: a plain one would make floats double. */
#define AS(x, constant) _Generic((x), float : (float)(constant), default : (double)(constant))

/* The operands of a function are at most three; a derivative reads dy, a, b, c, y, in this order. */
enum { ELEMENTWISE_MAX_OPERANDS = 3, ELEMENTWISE_MAX_SOURCES = 5 };

/* The quotient rounded down, and what it leaves, which has the sign of b: as Lua's // and %. Of an integer divided by 0
 * both are 0. */
#define FLOOR_DIVIDE(a, b)                                                                                             \
  _Generic((a), int64_t                                                                                                \
           : elementwise_floor_divide_int64, float                                                                     \
           : elementwise_floor_divide_float, default                                                                   \
           : elementwise_floor_divide_double)(a, b)
#define REMAINDER(a, b)                                                                                                \
  _Generic((a), int64_t                                                                                                \
           : elementwise_remainder_int64, float                                                                        \
           : elementwise_remainder_float, default                                                                      \
           : elementwise_remainder_double)(a, b)

static inline int64_t elementwise_floor_divide_int64(int64_t a, int64_t b) {
  if (b == 0 || b == -1)
    return b ? (int64_t)(0 - (uint64_t)a) : 0;
  return a / b - (a % b != 0 && (a ^ b) < 0);
}

static inline int64_t elementwise_remainder_int64(int64_t a, int64_t b) {
  int64_t left = b == 0 || b == -1 ? 0 : a % b;
  return left != 0 && (left ^ b) < 0 ? left + b : left;
}

static inline float elementwise_floor_divide_float(float a, float b) {
  return (float)floor((double)a / b); /* in float the quotient might round up to a whole number */
}

static inline double elementwise_floor_divide_double(double a, double b) {
  return floor(a / b);
}

static inline double elementwise_remainder_double(double a, double b) {
  double left = fmod(a, b);
  return left != 0 && (left < 0) != (b < 0) ? left + b : left;
}

static inline float elementwise_remainder_float(float a, float b) {
  return (float)elementwise_remainder_double(a, b);
}

#define ELEMENTWISE_ROWS(ROW)                                                                                          \
  ROW(add, 2, ANY, a + b, PASSES, dy, PASSES, dy, NO_GRADIENT, 0)                                                      \
  ROW(sub, 2, ANY, a - b, PASSES, dy, 0, -dy, NO_GRADIENT, 0)                                                          \
  ROW(mul, 2, ANY, a *b, NEEDS_B, dy *b, NEEDS_A, dy *a, NO_GRADIENT, 0)                                               \
  ROW(div, 2, REAL, a / b, NEEDS_B, dy / b, NEEDS_B + NEEDS_Y, -dy * y / b, NO_GRADIENT, 0)                            \
  ROW(pow, 2, REAL, pow(a, b), NEEDS_A + NEEDS_B, b == 0 ? 0 : dy * b * pow(a, b - 1), NEEDS_A + NEEDS_B + NEEDS_Y,    \
      a == 0 && b >= 0 ? 0 : dy * y * log(a), NO_GRADIENT, 0)                                                          \
  ROW(maximum, 2, ANY, a > b || a != a ? a : b, NEEDS_A + NEEDS_B, a > b ? dy : (a == b ? dy / 2 : 0),                 \
      NEEDS_A + NEEDS_B, a < b ? dy : (a == b ? dy / 2 : 0), NO_GRADIENT, 0)                                           \
  ROW(minimum, 2, ANY, a < b || a != a ? a : b, NEEDS_A + NEEDS_B, a < b ? dy : (a == b ? dy / 2 : 0),                 \
      NEEDS_A + NEEDS_B, a > b ? dy : (a == b ? dy / 2 : 0), NO_GRADIENT, 0)                                           \
  ROW(neg, 1, ANY, -a, 0, -dy, NO_GRADIENT, 0, NO_GRADIENT, 0)                                                         \
  ROW(abs, 1, ANY, a<0 ? -a : a + 0, NEEDS_A, a> 0 ? dy : (a < 0 ? -dy : 0), NO_GRADIENT, 0, NO_GRADIENT, 0)           \
  ROW(sign, 1, ANY, a > 0 ? 1 : (a < 0 ? -1 : a), 0, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                \
  ROW(floor, 1, REAL, floor(a), 0, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                                  \
  ROW(ceil, 1, REAL, ceil(a), 0, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                                    \
  ROW(round, 1, REAL, rint(a), 0, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                                   \
  ROW(floor_divide, 2, ANY, FLOOR_DIVIDE(a, b), 0, 0, 0, 0, NO_GRADIENT, 0)                                            \
  ROW(remainder, 2, ANY, REMAINDER(a, b), PASSES, dy, NEEDS_A + NEEDS_B, -dy * FLOOR_DIVIDE(a, b), NO_GRADIENT, 0)     \
  ROW(sin, 1, REAL, sin(a), NEEDS_A, dy *cos(a), NO_GRADIENT, 0, NO_GRADIENT, 0)                                       \
  ROW(cos, 1, REAL, cos(a), NEEDS_A, -dy *sin(a), NO_GRADIENT, 0, NO_GRADIENT, 0)                                      \
  ROW(sqrt, 1, REAL, sqrt(a), NEEDS_Y, dy / (2 * y), NO_GRADIENT, 0, NO_GRADIENT, 0)                                   \
  ROW(exp, 1, REAL, exp(a), NEEDS_Y, dy *y, NO_GRADIENT, 0, NO_GRADIENT, 0)                                            \
  ROW(log, 1, REAL, log(a), NEEDS_A, dy / a, NO_GRADIENT, 0, NO_GRADIENT, 0)                                           \
  ROW(sigmoid, 1, REAL, 1 / (1 + exp(-a)), NEEDS_Y, dy * y * (1 - y), NO_GRADIENT, 0, NO_GRADIENT, 0)                  \
  ROW(tanh, 1, REAL, tanh(a), NEEDS_Y, dy *(1 - y * y), NO_GRADIENT, 0, NO_GRADIENT, 0)                                \
  ROW(softplus, 1, REAL, (a < 0 ? 0 : a) + log1p(exp(a < 0 ? a : -a)), NEEDS_A, dy / (1 + exp(-a)), NO_GRADIENT, 0,    \
      NO_GRADIENT, 0)                                                                                                  \
  ROW(silu, 1, REAL, a / (1 + exp(-a)), NEEDS_A, dy * (1 + a / (1 + exp(a))) / (1 + exp(-a)), NO_GRADIENT, 0,          \
      NO_GRADIENT, 0)                                                                                                  \
  ROW(gelu, 1, REAL, a *erfc(-a *AS(a, 0.7071067811865476)) / 2, NEEDS_A,                                              \
      dy * (erfc(-a * AS(a, 0.7071067811865476)) / 2 + a * exp(-a * a / 2) * AS(a, 0.3989422804014327)), NO_GRADIENT,  \
      0, NO_GRADIENT, 0)                                                                                               \
  ROW(hardswish, 1, REAL, a <= -3 ? 0 : (a >= 3 ? a : a * (a + 3) / 6), NEEDS_A,                                       \
      a <= -3 ? 0 : (a >= 3 ? dy : dy * (2 * a + 3) / 6), NO_GRADIENT, 0, NO_GRADIENT, 0)                              \
  ROW(leaky_relu, 2, REAL, a > 0 ? a : a * b, NEEDS_A + NEEDS_B, a > 0 ? dy : dy * b, NEEDS_A, a > 0 ? 0 : dy * a,     \
      NO_GRADIENT, 0)                                                                                                  \
  ROW(xlogy, 2, REAL, a == 0 && b == b ? 0 : a * log(b), NEEDS_A + NEEDS_B, a == 0 && b == 0 ? 0 : dy * log(b),        \
      NEEDS_A + NEEDS_B, a == 0 ? 0 : dy * a / b, NO_GRADIENT, 0)                                                      \
  ROW(relu, 1, ANY, a<0 ? 0 : a, NEEDS_Y, y> 0 ? dy : 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                               \
  ROW(clamp, 3, ANY, a < b ? b : (a > c ? c : a), NEEDS_A + NEEDS_B + NEEDS_C, a >= b && a <= c ? dy : 0, NO_GRADIENT, \
      0, NO_GRADIENT, 0)                                                                                               \
  ROW(multiply_add, 3, ANY, a *b + c, NEEDS_B, dy * b, NEEDS_A, dy * a, PASSES, dy)                                    \
  ROW(where, 3, CHOICE, a != 0 ? b : c, NO_GRADIENT, 0, NEEDS_A, a != 0 ? dy : 0, NEEDS_A, a != 0 ? 0 : dy)            \
  ROW(eq, 2, COMPARE, a == b, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                          \
  ROW(ne, 2, COMPARE, a != b, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                          \
  ROW(lt, 2, COMPARE, a < b, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                           \
  ROW(le, 2, COMPARE, a <= b, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                          \
  ROW(gt, 2, COMPARE, a > b, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                           \
  ROW(ge, 2, COMPARE, a >= b, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                          \
  ROW(isfinite, 1, COMPARE, a - a == 0, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                \
  ROW(isnan, 1, COMPARE, a != a, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                       \
  ROW(logical_not, 1, COMPARE, a == 0, NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                                 \
  ROW(logical_and, 2, COMPARE, (a != 0) & (b != 0), NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                    \
  ROW(logical_or, 2, COMPARE, (a != 0) | (b != 0), NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)                     \
  ROW(logical_xor, 2, COMPARE, (a != 0) ^ (b != 0), NO_GRADIENT, 0, NO_GRADIENT, 0, NO_GRADIENT, 0)

/* FUNCTION_add, FUNCTION_sub, ..., FUNCTION_COUNT */
#define ELEMENTWISE_ENUM(name, ...) FUNCTION_##name,
enum { ELEMENTWISE_ROWS(ELEMENTWISE_ENUM) FUNCTION_COUNT };
#undef ELEMENTWISE_ENUM

#endif
