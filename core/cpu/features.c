/* features.c: what this processor offers, and which of the compiled instruction sets is used. */
#include "cpu/features.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const isa_names[CPU_ISAS] = {"base", "avx2", "avx512"};

static struct {
  pthread_once_t once;
  cpu_isa best, used;
  bool available[CPU_ISAS];
  char text[256];
} found = {.once = PTHREAD_ONCE_INIT};

typedef struct {
  const char *name;
  bool present;
} feature;

#ifdef OREPA_X86

#include <cpuid.h>

enum { FEATURES = 11 };

/* The compiler's run time asks both the processor and, for wide registers, the system. */
static const char *ask_processor(feature features[FEATURES]) {
  unsigned a, b, c = 0, d;
  __builtin_cpu_init();
  bool f16c = __builtin_cpu_supports("avx") && __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
  int n = 0;
#define ASK(name) features[n++] = (feature){name, __builtin_cpu_supports(name)}
  ASK("sse4.1"), ASK("avx"), ASK("avx2"), ASK("fma"), ASK("avx512f"), ASK("avx512bw"), ASK("avx512dq");
  ASK("avx512vl"), ASK("avx512vnni"), ASK("avx512bf16");
#undef ASK
  features[n] = (feature){"f16c", f16c};
#define HAS(name) __builtin_cpu_supports(name)
  found.available[CPU_AVX2] = HAS("avx2") && HAS("fma") && f16c;
  found.available[CPU_AVX512] =
      found.available[CPU_AVX2] && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl");
#undef HAS
  return "x86-64";
}

#else

enum { FEATURES = 1 };

static const char *ask_processor(feature features[FEATURES]) {
  features[0] = (feature){"", false};
#ifdef __aarch64__
  return "aarch64";
#else
  return "another processor";
#endif
}

#endif

/* What OREPA_ISA asks for; CPU_ISAS where it asks for nothing or for what there is not. */
static cpu_isa wanted_isa(const char *wanted) {
  for (int isa = 0; isa < CPU_ISAS; isa++)
    if (wanted && found.available[isa] && !strcmp(wanted, isa_names[isa]))
      return (cpu_isa)isa;
  return CPU_ISAS;
}

static void find(void) {
  feature features[FEATURES];
  found.available[CPU_BASE] = true;
  const char *processor = ask_processor(features);
  for (int isa = 0; isa < CPU_ISAS; isa++)
    if (found.available[isa])
      found.best = (cpu_isa)isa;
  const char *asked = getenv("OREPA_ISA");
  cpu_isa wanted = wanted_isa(asked);
  found.used = wanted == CPU_ISAS ? found.best : wanted;

  size_t room = sizeof found.text, used = (size_t)snprintf(found.text, room, "%s", processor);
  for (int n = 0; n < FEATURES; n++)
    if (features[n].present)
      used += (size_t)snprintf(found.text + used, room - used, " %s", features[n].name);
  used += (size_t)snprintf(found.text + used, room - used, ", kernels %s", isa_names[found.used]);
  if (asked && *asked && wanted == CPU_ISAS)
    snprintf(found.text + used, room - used, " (OREPA_ISA=%.16s is not available here)", asked);
}

bool cpu_isa_available(cpu_isa isa) {
  pthread_once(&found.once, find);
  return isa >= CPU_BASE && isa < CPU_ISAS && found.available[isa];
}

cpu_isa cpu_isa_used(void) {
  pthread_once(&found.once, find);
  return found.used;
}

bool cpu_isa_limited(void) {
  pthread_once(&found.once, find);
  return found.used < found.best;
}

const char *cpu_features_text(void) {
  pthread_once(&found.once, find);
  return found.text;
}
