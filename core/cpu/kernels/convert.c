/* convert.c: a run for each pair of types. A source is seen as float, double, int64 or int32, whichever holds it
 * exactly; a target takes each of these. */
#include "cpu/kernels/convert.h"

#include "dtype.h"

/* ---- how a type is stored, and what its elements are seen as ---- */

typedef float stored_FLOAT32;
typedef uint16_t stored_BFLOAT16;
typedef uint16_t stored_FLOAT16;
typedef double stored_FLOAT64;
typedef int64_t stored_INT64;
typedef int32_t stored_INT32;
typedef uint8_t stored_UINT8;
typedef uint8_t stored_BOOL;

#define SEEN_FLOAT32(x) (x)
#define SEEN_BFLOAT16(x) bfloat16_to_float(x)
#define SEEN_FLOAT16(x) float16_to_float(x)
#define SEEN_FLOAT64(x) (x)
#define SEEN_INT64(x) (x)
#define SEEN_INT32(x) (x)
#define SEEN_UINT8(x) ((int32_t)(x))
#define SEEN_BOOL(x) ((int32_t)((x) != 0))

/* To float, rounded to odd: rounding that to a short float gives what rounding once would have given. */
static inline float float_to_odd(double value) {
  float nearest = (float)value;
  uint32_t bits;
  memcpy(&bits, &nearest, sizeof bits);
  bool exact = (double)nearest == value || value != value;
  bits -= !exact && __builtin_fabs((double)nearest) > __builtin_fabs(value); /* the neighbour toward zero */
  bits |= !exact;
  memcpy(&nearest, &bits, sizeof nearest);
  return nearest;
}

/* As float_to_bfloat16, in the form that makes the better vector code. */
static inline uint16_t bfloat16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1), is_nan = -(uint32_t)(value != value);
  return (uint16_t)(((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) >> 16);
}

#define AS_FLOAT(v) _Generic((v), float : (v), default : float_to_odd((double)(v)))
#define AS_INT64(v)                                                                                                    \
  _Generic((v), float : double_to_int64((double)(v)), double : double_to_int64((double)(v)), default : (v))

#define MADE_FLOAT32(v) (float)(v)
#define MADE_BFLOAT16(v) bfloat16_of(AS_FLOAT(v))
#define MADE_FLOAT16(v) float_to_float16(AS_FLOAT(v))
#define MADE_FLOAT64(v) (double)(v)
#define MADE_INT64(v) AS_INT64(v)
#define MADE_INT32(v) int64_to_int32(AS_INT64(v))
#define MADE_UINT8(v) int64_to_uint8(AS_INT64(v))
#define MADE_BOOL(v) ((v) != 0)

/* ---- the runs ---- */

/* Dense runs are loops of their own, which become vector code, and so are runs that repeat one element. */
#define RUN(name, D, S, expression)                                                                                    \
  static void name(int64_t n, void *to, int64_t dst_stride, const void *from, int64_t src_stride) {                    \
    D *restrict dst = to;                                                                                              \
    const S *restrict src = from;                                                                                      \
    if (dst_stride == 1 && src_stride == 1) {                                                                          \
      for (int64_t i = 0; i < n; i++) {                                                                                \
        const S x = src[i];                                                                                            \
        dst[i] = expression;                                                                                           \
      }                                                                                                                \
    } else if (dst_stride == 1 && src_stride == 0 && n > 0) {                                                          \
      const S x = *src;                                                                                                \
      const D value = expression;                                                                                      \
      for (int64_t i = 0; i < n; i++)                                                                                  \
        dst[i] = value;                                                                                                \
    } else {                                                                                                           \
      for (int64_t i = 0; i < n; i++) {                                                                                \
        const S x = src[i * src_stride];                                                                               \
        dst[i * dst_stride] = expression;                                                                              \
      }                                                                                                                \
    }                                                                                                                  \
  }

RUN(same_1, uint8_t, uint8_t, x)
RUN(same_2, uint16_t, uint16_t, x)
RUN(same_4, uint32_t, uint32_t, x)
RUN(same_8, uint64_t, uint64_t, x)

/* clang-format off */
#define PAIRS(PAIR)                                                                           \
  PAIR(FLOAT32, BFLOAT16) PAIR(FLOAT32, FLOAT16) PAIR(FLOAT32, FLOAT64) PAIR(FLOAT32, INT64)  \
  PAIR(FLOAT32, INT32) PAIR(FLOAT32, UINT8) PAIR(FLOAT32, BOOL) PAIR(BFLOAT16, FLOAT32)       \
  PAIR(BFLOAT16, FLOAT16) PAIR(BFLOAT16, FLOAT64) PAIR(BFLOAT16, INT64) PAIR(BFLOAT16, INT32) \
  PAIR(BFLOAT16, UINT8) PAIR(BFLOAT16, BOOL) PAIR(FLOAT16, FLOAT32) PAIR(FLOAT16, BFLOAT16)   \
  PAIR(FLOAT16, FLOAT64) PAIR(FLOAT16, INT64) PAIR(FLOAT16, INT32) PAIR(FLOAT16, UINT8)       \
  PAIR(FLOAT16, BOOL) PAIR(FLOAT64, FLOAT32) PAIR(FLOAT64, BFLOAT16) PAIR(FLOAT64, FLOAT16)   \
  PAIR(FLOAT64, INT64) PAIR(FLOAT64, INT32) PAIR(FLOAT64, UINT8) PAIR(FLOAT64, BOOL)          \
  PAIR(INT64, FLOAT32) PAIR(INT64, BFLOAT16) PAIR(INT64, FLOAT16) PAIR(INT64, FLOAT64)        \
  PAIR(INT64, INT32) PAIR(INT64, UINT8) PAIR(INT64, BOOL) PAIR(INT32, FLOAT32)                \
  PAIR(INT32, BFLOAT16) PAIR(INT32, FLOAT16) PAIR(INT32, FLOAT64) PAIR(INT32, INT64)          \
  PAIR(INT32, UINT8) PAIR(INT32, BOOL) PAIR(UINT8, FLOAT32) PAIR(UINT8, BFLOAT16)             \
  PAIR(UINT8, FLOAT16) PAIR(UINT8, FLOAT64) PAIR(UINT8, INT64) PAIR(UINT8, INT32)             \
  PAIR(UINT8, BOOL) PAIR(BOOL, FLOAT32) PAIR(BOOL, BFLOAT16) PAIR(BOOL, FLOAT16)              \
  PAIR(BOOL, FLOAT64) PAIR(BOOL, INT64) PAIR(BOOL, INT32) PAIR(BOOL, UINT8)
/* clang-format on */

#define DEFINE(D, S) RUN(D##_from_##S, stored_##D, stored_##S, MADE_##D(SEEN_##S(x)))
PAIRS(DEFINE)
#undef DEFINE

convert_run *KERNEL(convert)(orepa_dtype dst, orepa_dtype src) {
  static convert_run *const same[] = {[1] = same_1, [2] = same_2, [4] = same_4, [8] = same_8};
  static convert_run *const pairs[OREPA_DTYPES][OREPA_DTYPES] = {
#define ENTRY(D, S) [OREPA_##D][OREPA_##S] = D##_from_##S,
      PAIRS(ENTRY)
#undef ENTRY
  };
  return dst == src ? same[orepa_dtype_size(dst)] : pairs[dst][src];
}
