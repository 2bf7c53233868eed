/* lanes.h: how kernels read and write floats: float32 or bfloat16 in memory, float in registers, one by one or in
 * vectors as wide as the instruction set's. Functions that take `half` (the memory holds bfloat16) are inlined with a
 * constant there, so that the choice costs nothing in a loop. */
#ifndef OREPA_CORE_CPU_LANES_H
#define OREPA_CORE_CPU_LANES_H

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "dtype.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float float_lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t bit_lanes __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_lanes __attribute__((vector_size(2 * LANES)));

/* ---- one element ---- */

static ALWAYS_INLINE float load_float(const void *from, int64_t k, bool half) {
  return half ? bfloat16_to_float(((const uint16_t *)from)[k]) : ((const float *)from)[k];
}

static ALWAYS_INLINE void store_float(void *to, int64_t k, float value, bool half) {
  if (half) { /* as float_to_bfloat16, in the form that makes the better vector code */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1), is_nan = -(uint32_t)(value != value);
    ((uint16_t *)to)[k] = (uint16_t)(((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) >> 16);
  } else {
    ((float *)to)[k] = value;
  }
}

/* What is left of a value that was stored. */
static ALWAYS_INLINE float rounded_float(float value, bool half) {
  if (!half)
    return value;
  uint16_t stored;
  store_float(&stored, 0, value, true);
  return bfloat16_to_float(stored);
}

/* The largest float that is 0 once it is rounded to the map's type. */
static ALWAYS_INLINE float largest_zero(bool half) {
  return half ? 0x1p-134f : 0;
}

/* a * x + b rounded once. Without the instruction: the product is exact in double, the sum is rounded to odd there, and
 * so the rounding to float sees on which side of a tie it was. */
static ALWAYS_INLINE float multiply_add(float a, float x, float b) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, x, b);
#else
  double product = (double)a * x, sum = product + b, part = sum - product;
  double error = (product - (sum - part)) + (b - part), inexact = error < 0 || error > 0 ? 1.0 : 0.0;
  uint64_t bits, error_bits, inexact_bits;
  memcpy(&bits, &sum, sizeof bits);
  memcpy(&error_bits, &error, sizeof error_bits);
  memcpy(&inexact_bits, &inexact, sizeof inexact_bits); /* bit 52 is set in 1.0, and not in 0.0 */
  uint64_t move = inexact_bits >> 52 & ~bits & 1, toward_zero = (error_bits ^ bits) >> 63;
  bits += move - 2 * (move & toward_zero);
  memcpy(&sum, &bits, sizeof sum);
  return (float)sum;
#endif
}

/* ---- LANES elements, of any alignment ---- */

static ALWAYS_INLINE float_lanes load_lanes(const void *from, int64_t k, bool half) {
  if (half) {
    half_lanes short_floats;
    memcpy(&short_floats, (const uint16_t *)from + k, sizeof short_floats);
    return (float_lanes)(__builtin_convertvector(short_floats, bit_lanes) << 16);
  }
  float_lanes floats;
  memcpy(&floats, (const float *)from + k, sizeof floats);
  return floats;
}

static ALWAYS_INLINE void store_lanes(void *to, int64_t k, float_lanes value, bool half) {
  if (half) { /* as float_to_bfloat16 */
    bit_lanes bits = (bit_lanes)value, is_nan = (bit_lanes)(value != value);
    bit_lanes rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    half_lanes short_floats = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), half_lanes);
    memcpy((uint16_t *)to + k, &short_floats, sizeof short_floats);
  } else {
    memcpy((float *)to + k, &value, sizeof value);
  }
}

static ALWAYS_INLINE float_lanes rounded_lanes(float_lanes value, bool half) {
  if (!half)
    return value;
  half_lanes stored;
  store_lanes(&stored, 0, value, true);
  return load_lanes(&stored, 0, true);
}

/* As `value < 0 ? 0 : value`: NaN stays, and -0. */
static ALWAYS_INLINE float_lanes relu_lanes(float_lanes value) {
  return (float_lanes)((int_lanes)value & ~(int_lanes)(value < (float_lanes){0}));
}

/* a * x + b rounded once. */
static ALWAYS_INLINE float_lanes multiply_add_lanes(float_lanes a, float_lanes x, float_lanes b) {
#if defined(__AVX512F__)
  return (float_lanes)_mm512_fmadd_ps((__m512)a, (__m512)x, (__m512)b);
#elif defined(__FMA__)
  return (float_lanes)_mm256_fmadd_ps((__m256)a, (__m256)x, (__m256)b);
#else
  float_lanes sum;
  for (int l = 0; l < LANES; l++)
    sum[l] = multiply_add(a[l], x[l], b[l]);
  return sum;
#endif
}

/* ---- the first `count` lanes; the others are zero when loaded, and not stored ---- */

static ALWAYS_INLINE float_lanes load_some_lanes(const void *from, int64_t k, int64_t count, bool half) {
  if (count == LANES)
    return load_lanes(from, k, half);
  float floats[LANES] = {0};
  for (int64_t l = 0; l < count; l++)
    floats[l] = load_float(from, k + l, half);
  return load_lanes(floats, 0, false);
}

/* The same for float32 alone, by the instruction set's masks. */
static ALWAYS_INLINE float_lanes load_first_lanes(const float *from, int64_t count) {
#if defined(__AVX512F__)
  return (float_lanes)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#elif defined(__AVX__)
  static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return (float_lanes)_mm256_maskload_ps(from, _mm256_loadu_si256((const __m256i *)(mask + 8 - count)));
#else
  return load_some_lanes(from, 0, count, false);
#endif
}

static ALWAYS_INLINE void store_some_lanes(void *to, int64_t k, float_lanes value, int64_t count, bool half) {
  if (count == LANES)
    store_lanes(to, k, value, half);
  else
    for (int64_t l = 0; l < count; l++)
      store_float(to, k + l, value[l], half);
}

static ALWAYS_INLINE void store_first_lanes(float *to, float_lanes value, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1), (__m512)value);
#elif defined(__AVX__)
  static const int32_t mask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  _mm256_maskstore_ps(to, _mm256_loadu_si256((const __m256i *)(mask + 8 - count)), (__m256)value);
#else
  store_some_lanes(to, 0, value, count, false);
#endif
}

/* ---- past the caches, for results that are too large to be read from there: only whole cache lines go that way
 * without loss, so only the widest vectors do. `to` is aligned to them; stream_end() stands before another thread
 * reads. ---- */

enum { STREAMS = sizeof(float_lanes) == 64 };

static ALWAYS_INLINE void stream_lanes(float *to, float_lanes value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#else
  store_lanes(to, 0, value, false);
#endif
}

static ALWAYS_INLINE void stream_end(void) {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

#endif
