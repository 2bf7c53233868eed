/* table.c: this instruction set's kernels, put into a device's table. */
#include "cpu/kernels/kernels.h"

void KERNEL(install)(orepa_device *device);

void KERNEL(install)(orepa_device *device) {
#define KERNEL_INSTALL(entry) device->entry = KERNEL(entry);
  KERNEL_ENTRIES(KERNEL_INSTALL)
#undef KERNEL_INSTALL
}
