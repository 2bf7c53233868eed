/* kernels.h: the entries of the device table that are kernels of our own. Each is one function in this folder, named
 * through KERNEL(); its type is that of the table's entry. */
#ifndef OREPA_CORE_CPU_KERNELS_H
#define OREPA_CORE_CPU_KERNELS_H

#include "cpu/cpu.h"

/* clang-format off */
#define KERNEL_ENTRIES(ENTRY)                                                                         \
  ENTRY(copy) ENTRY(fill) ENTRY(random) ENTRY(gather) ENTRY(scatter) ENTRY(sort) ENTRY(running_sum) ENTRY(elementwise)                                          \
  ENTRY(reduce) ENTRY(square_sums) ENTRY(norm_moments) ENTRY(norm_finalize)                           \
  ENTRY(norm_apply) ENTRY(norm_backward) ENTRY(max_pool_forward) ENTRY(max_pool_backward)             \
  ENTRY(avg_pool_forward) ENTRY(avg_pool_backward) ENTRY(softmax_forward) ENTRY(softmax_backward)     \
  ENTRY(interpolate_forward) ENTRY(interpolate_backward)                                              \
  ENTRY(group_norm_forward) ENTRY(group_norm_backward)                                                \
  ENTRY(cross_entropy_forward) ENTRY(cross_entropy_backward) ENTRY(sgd) ENTRY(compose)                \
  ENTRY(compose_backward_after) ENTRY(compose_backward_before) ENTRY(squeeze) ENTRY(squeeze_backward)
/* clang-format on */

#define KERNEL_DECLARE(entry) __typeof__(*((orepa_device *)0)->entry) KERNEL(entry);
KERNEL_ENTRIES(KERNEL_DECLARE)
#undef KERNEL_DECLARE

#endif
