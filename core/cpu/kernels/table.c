/* table.c: this instruction set's kernels, put into a device's table. */
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/winograd.h"

void KERNEL(install)(orepa_device *device);

void KERNEL(install)(orepa_device *device) {
#define KERNEL_INSTALL(entry) device->entry = KERNEL(entry);
  KERNEL_ENTRIES(KERNEL_INSTALL)
#undef KERNEL_INSTALL
}

const winograd_kernels KERNEL(winograd) = {KERNEL(winograd_packed),  KERNEL(winograd_forward_scratch),
                                           KERNEL(winograd_forward), KERNEL(winograd_weight_scratch),
                                           KERNEL(winograd_weight),  WINOGRAD_ROUNDS_ONCE};
