/* threads.h: how many threads kernels use. */
#ifndef OREPA_CORE_CPU_THREADS_H
#define OREPA_CORE_CPU_THREADS_H

/* Gives the calling thread the default count (OMP_NUM_THREADS, else what affinity and the control group allow) when it
 * is called for the first time in the process; later calls change nothing. */
void threads_begin(void);
/* From now on kernels that the calling thread starts run on it alone. */
void threads_serial(void);

/* The processors that the control group's quota is worth, rounded up; 0 without a quota. `root` stands before the files
 * that are read: "", or in tests a folder with files like /proc's and /sys's. */
int threads_quota(const char *root);

#endif
