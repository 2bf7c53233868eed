/* timings.h: where time goes: each call of a device entry, added up by op and entry while timings are on, and an event
 * of the trace if there is one. Off, a call costs the look at one flag, twice. Meant for synchronous devices: of others
 * it sees only how long starting takes. */
#ifndef OREPA_CORE_TIMINGS_H
#define OREPA_CORE_TIMINGS_H

#include <stdatomic.h>

#include "orepa.h"

enum { TIMINGS_ROWS = 1, TIMINGS_TRACE = 2 };
extern atomic_int timings_wanted_by; /* a sum of these */

void timings_want(int who, bool on);

/* Around one call on one thread. `op` and `entry` live for ever. */
void timings_begin(void);
void timings_end(const char *op, const char *entry);

/* What distinguishes the thread's next call from others of the same op: "3x3 stride 2, 64 -> 128, 56x56". */
void timings_detail(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* How many multiply-adds the thread's next call stands for. Gives 0, so that it can stand before a DISPATCH. */
int timings_macs(int64_t macs);

static inline bool timings_wanted(void) {
  return atomic_load_explicit(&timings_wanted_by, memory_order_relaxed);
}

#endif
