/* timings.h: where time goes: each call of a device entry, added up by op and entry while timings are on. Off, a call
 * costs the look at one flag, twice. Meant for synchronous devices: of others it sees only how long starting takes. */
#ifndef OREPA_CORE_TIMINGS_H
#define OREPA_CORE_TIMINGS_H

#include <stdatomic.h>

#include "orepa.h"

extern atomic_bool timings_on;

/* Around one call on one thread. `op` and `entry` live for ever. */
void timings_begin(void);
void timings_end(const char *op, const char *entry);

/* What distinguishes the thread's next call from others of the same op: "3x3 stride 2, 64 -> 128, 56x56". */
void timings_detail(const char *format, ...) __attribute__((format(printf, 1, 2)));

static inline bool timings_wanted(void) {
  return atomic_load_explicit(&timings_on, memory_order_relaxed);
}

#endif
