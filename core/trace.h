/* trace.h: how the device's calls enter a trace (orepa_trace.h); timings.c calls this around each. */
#ifndef OREPA_CORE_TRACE_H
#define OREPA_CORE_TRACE_H

#include "orepa_trace.h"

/* Ends the kernel's event. `op` and `entry` live for ever; the detail is copied. */
void trace_close_kernel(int64_t event, const char *op, const char *entry, const char *detail, int64_t macs);

#endif
