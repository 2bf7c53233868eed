/* orepa_trace.h: what runs, in which order, and for how long. Include it beside orepa.h, whose rules for references and
 * errors hold here too.
 *
 * A trace is a list of events of one thread, in the order in which they began. Events nest. The engine adds each node
 * that a backward pass visits and each call of the device table; whoever calls ops adds those, and what is above them.
 * While nothing is traced that costs the look at a flag. */
#ifndef OREPA_TRACE_H
#define OREPA_TRACE_H

#include "orepa.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  OREPA_EVENT_MODULE, /* opened by the caller: a part of a network, */
  OREPA_EVENT_OP,     /* a call of an op; also "backward", a whole pass, which the engine opens */
  OREPA_EVENT_NODE,   /* a node in a backward pass, with handing on the gradients that it gives */
  OREPA_EVENT_KERNEL  /* a call of an entry of the device table */
} orepa_event_kind;

typedef struct {
  orepa_event_kind kind;
  const char *name;  /* of a kernel its entry: "conv_backward_weight"; borrowed from whoever opened the event */
  const char *op;    /* of a kernel what it was called for: "conv2d's weight gradient"; else NULL */
  char detail[72];   /* of a convolution's kernel its geometry; else "" */
  int64_t number;    /* of a module the caller's; of a node its place in the order in which nodes are made */
  int64_t around;    /* the event that it is in; -1: none */
  double start, end; /* on orepa_clock */
  int64_t macs;      /* multiply-adds: of a kernel of convolutions, matrix products or squeezing; else 0 */
  size_t bytes;      /* of an op's result, whether it is in memory yet or not */
  size_t kept;       /* of tensors that got memory in it, inner events apart, and have it at the end of the trace */
  size_t live_at_start, live_at_end;     /* orepa_memory_live */
  uint64_t nodes_at_start, nodes_at_end; /* how many nodes were made before: which are made inside */
} orepa_event;

typedef struct orepa_trace orepa_trace;

/* Begins the trace of this thread; -1 and a message if one is under way, on whatever thread. */
OREPA_API int orepa_trace_start(void);
/* Ends it, with what is open; NULL if this thread has none. */
OREPA_API orepa_trace *orepa_trace_stop(void);
/* Whether this thread is traced now. */
OREPA_API bool orepa_is_traced(void);

/* An event begins, inside the one that is open. The name must live as long as the trace. Returns the event, or -1 where
 * nothing is traced or there is no memory for it. */
OREPA_API int64_t orepa_event_open(orepa_event_kind kind, const char *name, int64_t number);
/* It ends, and so does every event inside that was left open. -1, and one that ended already, are allowed. */
OREPA_API void orepa_event_close(int64_t event, size_t bytes);

OREPA_API int64_t orepa_trace_count(const orepa_trace *trace);
/* Events that there was no memory for. */
OREPA_API int64_t orepa_trace_lost(const orepa_trace *trace);
/* Event 0 ... count - 1, borrowed; NULL for others. */
OREPA_API const orepa_event *orepa_trace_event(const orepa_trace *trace, int64_t index);
OREPA_API void orepa_trace_free(orepa_trace *trace); /* NULL is allowed */

#ifdef __cplusplus
}
#endif
#endif
