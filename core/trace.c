/* trace.c: the list of events, and which of them are open: the innermost, and those around it. */
#include "trace.h"

#include <stdlib.h>
#include <string.h>

#include "autograd/autograd.h"
#include "timings.h"

struct orepa_trace {
  orepa_event *events;
  int64_t count, capacity, lost;
  int64_t open; /* the innermost event that is; -1: none */
};

static atomic_bool under_way;
static _Thread_local orepa_trace *current;
static int64_t earlier; /* events of the traces that are over; whoever has the one under way looks at it */

int orepa_trace_start(void) {
  orepa_trace *trace = calloc(1, sizeof *trace);
  if (!trace)
    return error_out_of_memory("trace: out of memory");
  if (atomic_exchange(&under_way, true)) {
    free(trace);
    return error_set("trace: one is under way already, and they do not nest");
  }
  trace->open = -1;
  current = trace;
  timings_want(TIMINGS_TRACE, true);
  return 0;
}

orepa_trace *orepa_trace_stop(void) {
  orepa_trace *trace = current;
  if (!trace)
    return NULL;
  int64_t outermost = trace->open;
  while (outermost >= 0 && trace->events[outermost].around >= 0)
    outermost = trace->events[outermost].around;
  orepa_event_close(outermost, 0);
  timings_want(TIMINGS_TRACE, false);
  current = NULL;
  earlier += trace->count;
  atomic_store(&under_way, false);
  return trace;
}

bool orepa_is_traced(void) {
  return timings_wanted() && current;
}

/* ---- events ---- */

static bool has_room(orepa_trace *trace) {
  if (trace->count < trace->capacity)
    return true;
  int64_t capacity = trace->capacity ? 2 * trace->capacity : 256;
  orepa_event *events = realloc(trace->events, (size_t)capacity * sizeof *events);
  if (!events)
    return false;
  trace->events = events;
  trace->capacity = capacity;
  return true;
}

int64_t orepa_event_open(orepa_event_kind kind, const char *name, int64_t number) {
  orepa_trace *trace = orepa_is_traced() ? current : NULL;
  if (!trace)
    return -1;
  if (!has_room(trace)) {
    trace->lost++;
    return -1;
  }
  int64_t event = trace->count++;
  trace->events[event] = (orepa_event){.kind = kind,
                                       .name = name,
                                       .number = number,
                                       .around = trace->open,
                                       .end = -1, /* open */
                                       .live_at_start = orepa_memory_live(),
                                       .nodes_at_start = autograd_nodes_made(),
                                       .start = orepa_clock()};
  return trace->open = event;
}

void orepa_event_close(int64_t event, size_t bytes) {
  double now = orepa_clock();
  if (!current || event < 0 || event >= current->count || current->events[event].end >= 0)
    return;
  current->events[event].bytes = bytes;
  size_t live = orepa_memory_live();
  uint64_t nodes = autograd_nodes_made();
  int64_t around = current->events[event].around;
  for (int64_t k = current->open; k != around; k = current->events[k].around) {
    current->events[k].end = now;
    current->events[k].live_at_end = live;
    current->events[k].nodes_at_end = nodes;
  }
  current->open = around;
}

void trace_close_kernel(int64_t event, const char *op, const char *entry, const char *detail, int64_t macs) {
  if (!current || event < 0 || event >= current->count)
    return;
  orepa_event *e = &current->events[event];
  e->name = entry;
  e->op = op;
  e->macs = macs;
  memcpy(e->detail, detail, strnlen(detail, sizeof e->detail - 1)); /* the event's is zeroed */
  orepa_event_close(event, 0);
}

/* ---- memory ---- */

int64_t trace_memory_got(size_t bytes) {
  if (!orepa_is_traced() || current->open < 0)
    return 0;
  current->events[current->open].kept += bytes;
  return earlier + current->open + 1;
}

void trace_memory_given_back(int64_t mark, size_t bytes) {
  if (orepa_is_traced() && mark > earlier)
    current->events[mark - earlier - 1].kept -= bytes;
}

/* ---- asking ---- */

int64_t orepa_trace_count(const orepa_trace *trace) {
  return trace->count;
}

int64_t orepa_trace_lost(const orepa_trace *trace) {
  return trace->lost;
}

const orepa_event *orepa_trace_event(const orepa_trace *trace, int64_t index) {
  return index >= 0 && index < trace->count ? &trace->events[index] : NULL;
}

void orepa_trace_free(orepa_trace *trace) {
  if (!trace)
    return;
  free(trace->events);
  free(trace);
}
