/* fma.c: how fast this instruction set multiplies and adds: independent chains in registers and nothing else. */
#include "cpu/cpu.h"
#include "cpu/kernels/lanes.h"

double KERNEL(fma_chains)(int64_t steps, float *value);

/* Enough that no chain waits for its own last result, few enough for 16 registers with the two constants. */
#define CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
enum { CHAIN_COUNT = 12 };

/* Each chain repeats x = x * value + 1; gives the number of operations. Their sum goes to `value`, so that no compiler
 * leaves the work out. */
double KERNEL(fma_chains)(int64_t steps, float *value) {
  float_lanes factor = (float_lanes){0} + *value, one = (float_lanes){0} + 1, sum = {0};
#define START(k) float_lanes chain##k = one * (float)k;
#define STEP(k) chain##k = chain##k * factor + one;
#define FINISH(k) sum += chain##k;
  CHAINS(START)
  for (int64_t n = 0; n < steps; n++) {
    CHAINS(STEP)
  }
  CHAINS(FINISH)
#undef START
#undef STEP
#undef FINISH
  *value = 0;
  for (int l = 0; l < LANES; l++)
    *value += sum[l];
  return 2.0 * CHAIN_COUNT * LANES * (double)steps;
}
