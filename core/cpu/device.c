/* device.c: the table of the device `cpu`: memory of the host, kernels of our own for the instruction set in use, and
 * convolutions and matrix products by oneDNN. */
#include <pthread.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/features.h"
#include "cpu/threads.h"
#include "host_memory.h"

/* conv.c and matmul.c; the types are those of the table's entries. */
#define DECLARE(entry) __typeof__(*((orepa_device *)0)->entry) cpu_##entry
DECLARE(bfloat16_pays);
DECLARE(conv_fusion);
DECLARE(conv_forward);
DECLARE(conv_packed);
DECLARE(conv_backward_data);
DECLARE(conv_backward_weight);
DECLARE(matmul);
#undef DECLARE

/* kernels/table.c, once for each instruction set. */
void cpu_base_install(orepa_device *device);
#ifdef OREPA_X86
void cpu_avx2_install(orepa_device *device);
void cpu_avx512_install(orepa_device *device);
#endif

static void (*const installs[CPU_ISAS])(orepa_device *) = CPU_EACH_ISA(, install);

static void *allocate(device_context *context, size_t bytes) {
  (void)context;
  return host_allocate(bytes);
}

static void deallocate(device_context *context, void *memory, size_t bytes) {
  (void)context;
  host_deallocate(memory, bytes);
}

static size_t available(device_context *context) {
  (void)context;
  return host_available("");
}

static device_status transfer(device_context *context, void *to, const void *from, size_t bytes) {
  (void)context;
  if (bytes)
    memcpy(to, from, bytes);
  return DEVICE_DONE;
}

static orepa_device tables[CPU_ISAS];

static void make_tables(void) {
  for (int isa = 0; isa < CPU_ISAS; isa++) {
    if (!cpu_isa_available((cpu_isa)isa))
      continue;
    tables[isa] = (orepa_device){.version = DEVICE_TABLE_VERSION,
                                 .name = "cpu",
                                 .allocate = allocate,
                                 .deallocate = deallocate,
                                 .divisible = host_divisible(),
                                 .available = available,
                                 .upload = transfer,
                                 .download = transfer,
                                 .bfloat16_pays = cpu_bfloat16_pays,
                                 .matmul = cpu_matmul,
                                 .conv_fusion = cpu_conv_fusion,
                                 .conv_forward = cpu_conv_forward,
                                 .conv_packed = cpu_conv_packed,
                                 .conv_backward_data = cpu_conv_backward_data,
                                 .conv_backward_weight = cpu_conv_backward_weight};
    installs[isa](&tables[isa]);
  }
}

const orepa_device *cpu_device_for(cpu_isa isa) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, make_tables);
  threads_begin();
  return cpu_isa_available(isa) ? &tables[isa] : NULL;
}

const orepa_device *cpu_device(void) {
  return cpu_device_for(cpu_isa_used());
}
