/* rate.c: how fast the processor could be, which benchmarks compare with. */
#include "cpu/features.h"
#include "error.h"

/* kernels/fma.c, once for each instruction set. */
double cpu_base_fma_chains(int64_t steps, float *value);
#ifdef OREPA_X86
double cpu_avx2_fma_chains(int64_t steps, float *value);
double cpu_avx512_fma_chains(int64_t steps, float *value);
#endif

static double (*const chains[CPU_ISAS])(int64_t steps, float *value) = CPU_EACH_ISA(, fma_chains);

/* Operations a second of one round on all threads. */
static double round_rate(int threads, int64_t steps) {
  double operations = 0, start = orepa_clock();
  signals_hold();
#pragma omp parallel num_threads(threads)
  {
    float value = 0.5f;
    double own = chains[cpu_isa_used()](steps, &value);
#pragma omp critical
    operations += own;
  }
  signals_release();
  return operations / (orepa_clock() - start);
}

double orepa_fma_rate(int milliseconds) {
  enum { STEPS = 1 << 17 /* less than a millisecond */ };
  if (milliseconds < 1 || milliseconds > 1000)
    return error_set("fma_rate: 1 to 1000 milliseconds, not %d", milliseconds);
  int threads = orepa_threads();
  double best = 0, end = orepa_clock() + 1e-3 * milliseconds;
  do {
    double rate = round_rate(threads, STEPS);
    best = rate > best ? rate : best;
  } while (orepa_clock() < end);
  return best;
}
