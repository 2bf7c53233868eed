/* trace.h: how calls of the device (from timings.c) and memory (from tensor.c) enter a trace (orepa_trace.h). */
#ifndef OREPA_CORE_TRACE_H
#define OREPA_CORE_TRACE_H

#include "orepa_trace.h"

/* Ends a kernel's event. `op` and `entry` live for ever; the detail is copied. */
void trace_close_kernel(int64_t event, const char *op, const char *entry, const char *detail, int64_t macs);

/* Memory that a storage gets counts as kept by the event that is open, until the thread gives it back. Gives the mark
 * by which it is known then, which no other trace's is; 0: no event is open. */
int64_t trace_memory_got(size_t bytes);
void trace_memory_given_back(int64_t mark, size_t bytes);

#endif
