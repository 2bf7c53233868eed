/* features.h: what this processor offers, and which of the compiled instruction sets is used. */
#ifndef OREPA_CORE_CPU_FEATURES_H
#define OREPA_CORE_CPU_FEATURES_H

#include "device.h"

/* The instruction sets that our kernels are compiled for, in rising order. */
typedef enum { CPU_BASE, CPU_AVX2, CPU_AVX512, CPU_ISAS /* how many there are */ } cpu_isa;

/* Whether this build has kernels for it and both processor and system can run them. */
bool cpu_isa_available(cpu_isa isa);
/* The one in use: the best, or what OREPA_ISA=base|avx2|avx512 asks for where that is available. Read once. */
cpu_isa cpu_isa_used(void);
/* Whether OREPA_ISA asked for a lower one than the best: oneDNN is to be limited alike. */
bool cpu_isa_limited(void);
/* "x86-64 avx2 fma f16c, kernels avx2": one line for --version; says so where OREPA_ISA could not be followed. */
const char *cpu_features_text(void);

/* One of each name that the files of kernels/ make, as the initial values of an array by instruction set: functions, or
 * with & the addresses of tables. */
#ifdef OREPA_X86
#define CPU_EACH_ISA(address, name)                                                                                    \
  {                                                                                                                    \
    [CPU_BASE] = address cpu_base_##name, [CPU_AVX2] = address cpu_avx2_##name,                                        \
    [CPU_AVX512] = address cpu_avx512_##name                                                                           \
  }
#else
#define CPU_EACH_ISA(address, name)                                                                                    \
  { [CPU_BASE] = address cpu_base_##name }
#endif

/* The cpu's table made of one instruction set's kernels; NULL where that is not available. cpu_device() is the one in
 * use. */
const orepa_device *cpu_device_for(cpu_isa isa);

#endif
