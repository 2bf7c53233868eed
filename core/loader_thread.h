/* loader_thread.h: what is different on a thread that makes batches beside the main one: kernels run on it alone, ops
 * record no graph, random numbers and devices' contexts are its own. Everything else that threads share is counted by
 * atomics or locked. */
#ifndef OREPA_LOADER_THREAD_H
#define OREPA_LOADER_THREAD_H

#include <stdbool.h>

/* Whether this is one. */
bool loader_thread_here(void);

/* The first and the last thing that such a thread calls. */
void loader_thread_begin(void);
void loader_thread_end(void);

#endif
