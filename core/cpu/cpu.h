/* cpu.h: the CPU device from the inside: kernels of our own, compiled for each instruction set, and oneDNN.
 *
 * The files of kernels/ are compiled once for each instruction set with KERNEL_ISA = base, avx2 or avx512; every
 * function of theirs with external linkage is named through KERNEL(name), so that the copies live side by side:
 * cpu_base_copy, cpu_avx2_copy, ... kernels/table.c lists them. device.c makes the device's table from the best list
 * that the machine has (OREPA_ISA forces one) and from conv.c and matmul.c, which call oneDNN through onednn.c. */
#ifndef OREPA_CORE_CPU_H
#define OREPA_CORE_CPU_H

#include "device.h"
#include "error.h"

#define KERNEL_PASTE_(isa, name) cpu_##isa##_##name
#define KERNEL_PASTE(isa, name) KERNEL_PASTE_(isa, name)
#define KERNEL(name) KERNEL_PASTE(KERNEL_ISA, name)

#endif
