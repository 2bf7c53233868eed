/* permutation.c: the order in which an epoch visits a dataset, and what its samples draw. */
#include "orepa_data.h"
#include "philox.h"
#include "tensor/tensor.h"

/* The key is drawn from the seed at a draw number that tensors never reach: an order shares no bits with orepa_rand. */
#define ORDER_DRAW (UINT64_MAX - 1)
#define SAMPLE_DRAW (UINT64_MAX - 3)

static uint64_t key_of(uint64_t seed, uint64_t draw, uint64_t counter) {
  uint32_t words[4];
  philox(seed, draw, counter, words);
  return (uint64_t)words[1] << 32 | words[0];
}

/* 64 bits at a time from draw `epoch` of the key. */
typedef struct {
  uint64_t key, epoch, taken;
  uint32_t words[4];
} order_bits;

static uint64_t next_bits(order_bits *bits) {
  uint64_t half = bits->taken % 2;
  if (half == 0)
    philox(bits->key, bits->epoch, bits->taken / 2, bits->words);
  bits->taken++;
  return (uint64_t)bits->words[2 * half + 1] << 32 | bits->words[2 * half];
}

/* Uniform in 0 ... bound-1: the lowest 2^64 mod bound values are drawn again. That remainder is below the bound, so
 * only a small value pays for its division. */
static uint64_t next_below(order_bits *bits, uint64_t bound) {
  uint64_t value;
  do
    value = next_bits(bits);
  while (value < bound && value < -bound % bound);
  return value % bound;
}

orepa_tensor *orepa_permutation(int64_t count, uint64_t seed, uint64_t epoch) {
  if (count < 0) {
    error_set("permutation: of %lld numbers", (long long)count);
    return NULL;
  }
  orepa_tensor *t = tensor_new(OREPA_INT64, cpu_device(), 1, &count);
  device_array array;
  if (!t || tensor_writes(t, &array))
    return tensor_fail(t);
  order_bits bits = {.key = key_of(seed, ORDER_DRAW, 0), .epoch = epoch};
  int64_t *order = array.data;
  for (int64_t k = 0; k < count; k++) { /* k changes places with one of those before it, or stays */
    int64_t place = (int64_t)next_below(&bits, (uint64_t)k + 1);
    order[k] = k;
    order[k] = order[place];
    order[place] = k;
  }
  return t;
}

orepa_rng orepa_sample_rng(uint64_t seed, uint64_t epoch, int64_t sample) {
  return (orepa_rng){key_of(key_of(seed, SAMPLE_DRAW, 0), epoch, (uint64_t)sample), 0};
}
