/* matmul.h: matrix products for our own kernels. */
#ifndef OREPA_CORE_CPU_MATMUL_H
#define OREPA_CORE_CPU_MATMUL_H

#include "cpu/cpu.h"

/* Row-major c (m, n) = op(a) . op(b) + beta * c, op(a) (m, k), op(b) (k, n); `turn_a`: a is stored (k, m), `turn_b`: b
 * is stored (n, k). lda, ldb, ldc are the distances between stored rows. beta 0 reads nothing of c. Uses all threads
 * where the product is worth them, one inside a parallel region. */
device_status cpu_product(bool turn_a, bool turn_b, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                          const float *b, int64_t ldb, float beta, float *c, int64_t ldc);

#endif
