/* dtype.h: the short floats, converted in software, and other facts about types that devices share. */
#ifndef OREPA_CORE_DTYPE_H
#define OREPA_CORE_DTYPE_H

#include <string.h>

#include "orepa.h"

static inline float bfloat16_to_float(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* To nearest even; NaN stays NaN. */
static inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float float16_to_float(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff, bits;
  if (rest >= 0x7c00) { /* infinity, NaN */
    bits = sign | 0x7f800000u | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + ((127 - 15) << 23));
  } else { /* rest * 2^-24 */
    float small = (float)rest * 0x1p-24f;
    memcpy(&bits, &small, sizeof bits);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* To nearest even; beyond 65504 plus half a step: infinity; NaN stays NaN. */
static inline uint16_t float_to_float16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u)
    return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  if (rest >= 0x477ff000u) /* rounds to 65536 or more */
    return (uint16_t)(sign | 0x7c00);
  if (rest >= 0x38800000u) /* at least 2^-14 */
    return (uint16_t)(sign | ((rest - ((127 - 15) << 23) + 0xfff + (rest >> 13 & 1)) >> 13));
  float small; /* adding 0.5 leaves the wanted bits at the end of the fraction, rounded by the hardware */
  memcpy(&small, &rest, sizeof small);
  small += 0.5f;
  memcpy(&rest, &small, sizeof rest);
  return (uint16_t)(sign | (rest - 0x3f000000u));
}

/* Toward zero, saturating, NaN is 0. */
static inline int64_t double_to_int64(double value) {
  if (value != value)
    return 0;
  if (value >= 9223372036854775808.0)
    return INT64_MAX;
  if (value <= -9223372036854775808.0)
    return INT64_MIN;
  return (int64_t)value;
}

static inline int32_t int64_to_int32(int64_t value) {
  return value > INT32_MAX ? INT32_MAX : value < INT32_MIN ? INT32_MIN : (int32_t)value;
}

static inline uint8_t int64_to_uint8(int64_t value) {
  return value > 255 ? 255 : value < 0 ? 0 : (uint8_t)value;
}

#endif
