/* philox.h: Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011), and how
 * an element takes its number from it. Element k of draw n depends on (seed, n, k) alone.
 *
 * float32 element k: word k mod 4 of block k / 4, its upper 24 bits; normals pair words 0, 1 and words 2, 3 (Box and
 * Muller). float64 element k: words 2(k mod 2) and 2(k mod 2) + 1 of block k / 2 give 53 bits; normals pair the block's
 * two. */
#ifndef OREPA_CORE_PHILOX_H
#define OREPA_CORE_PHILOX_H

#include <math.h>
#include <stdint.h>

static inline void philox(uint64_t seed, uint64_t draw, uint64_t block, uint32_t words[4]) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = (uint32_t)draw, c3 = (uint32_t)(draw >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

static inline float philox_float(uint32_t word) {
  return (float)(word >> 8) * 0x1p-24f;
}

static inline double philox_double(uint32_t low, uint32_t high) {
  return (double)((uint64_t)high << 21 | low >> 11) * 0x1p-53;
}

/* Two uniform numbers in [0, 1) to two normal ones. */
static inline void philox_normals(double u, double v, double normals[2]) {
  double radius = sqrt(-2 * log1p(-u)), angle = 6.283185307179586 * v;
  normals[0] = radius * cos(angle);
  normals[1] = radius * sin(angle);
}

static inline float philox_element_float(uint64_t seed, uint64_t draw, int64_t k, int normal) {
  uint32_t words[4];
  philox(seed, draw, (uint64_t)k / 4, words);
  if (!normal)
    return philox_float(words[k % 4]);
  double pair[2];
  int first = (int)(k % 4) & 2;
  philox_normals(philox_float(words[first]), philox_float(words[first + 1]), pair);
  return (float)pair[k & 1];
}

static inline double philox_element_double(uint64_t seed, uint64_t draw, int64_t k, int normal) {
  uint32_t words[4];
  philox(seed, draw, (uint64_t)k / 2, words);
  double u = philox_double(words[0], words[1]), v = philox_double(words[2], words[3]), pair[2];
  if (!normal)
    return k & 1 ? v : u;
  philox_normals(u, v, pair);
  return pair[k & 1];
}

#endif
