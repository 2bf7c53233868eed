/* timings.c: the rows of where time goes, one for each op, entry and detail. */
#include "timings.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "trace.h"

atomic_int timings_wanted_by;

void timings_want(int who, bool on) {
  if (on)
    atomic_fetch_or(&timings_wanted_by, who);
  else
    atomic_fetch_and(&timings_wanted_by, ~who);
}

static struct {
  pthread_mutex_t lock;
  orepa_timing *rows;
  int count, capacity;
} table = {.lock = PTHREAD_MUTEX_INITIALIZER};

static _Thread_local double started; /* 0: timings were off then */
static _Thread_local int64_t event;  /* the call's in the trace */
static _Thread_local char next_detail[sizeof table.rows->detail];
static _Thread_local int64_t next_macs;

void timings_begin(void) {
  event = orepa_event_open(OREPA_EVENT_KERNEL, NULL, 0);
  started = orepa_clock();
}

void timings_detail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(next_detail, sizeof next_detail, format, arguments);
  va_end(arguments);
}

int timings_macs(int64_t macs) {
  if (timings_wanted())
    next_macs = macs;
  return 0;
}

static bool table_has_room(void) {
  if (table.count < table.capacity)
    return true;
  int capacity = table.capacity ? 2 * table.capacity : 64;
  orepa_timing *rows = realloc(table.rows, (size_t)capacity * sizeof *rows);
  if (!rows)
    return false;
  table.rows = rows;
  table.capacity = capacity;
  return true;
}

/* NULL if there is no memory for a new one: time that is not attributed then. */
static orepa_timing *row_of(const char *op, const char *entry) {
  for (int k = 0; k < table.count; k++) {
    orepa_timing *row = &table.rows[k];
    if (!strcmp(row->op, op) && !strcmp(row->entry, entry) && !strcmp(row->detail, next_detail))
      return row;
  }
  if (!table_has_room())
    return NULL;
  orepa_timing *row = &table.rows[table.count++];
  *row = (orepa_timing){.op = op, .entry = entry};
  memcpy(row->detail, next_detail, sizeof next_detail);
  return row;
}

void timings_end(const char *op, const char *entry) {
  double seconds = orepa_clock() - started;
  if (started > 0)
    trace_close_kernel(event, op, entry, next_detail, next_macs);
  if (started > 0 && atomic_load(&timings_wanted_by) & TIMINGS_ROWS) {
    pthread_mutex_lock(&table.lock);
    orepa_timing *row = row_of(op, entry);
    if (row) {
      row->calls++;
      row->seconds += seconds;
    }
    pthread_mutex_unlock(&table.lock);
  }
  started = 0;
  next_detail[0] = '\0';
  next_macs = 0;
}

void orepa_set_timings(bool on) {
  pthread_mutex_lock(&table.lock);
  timings_want(TIMINGS_ROWS, on);
  table.count = 0;
  pthread_mutex_unlock(&table.lock);
}

bool orepa_timing_at(int index, orepa_timing *row) {
  pthread_mutex_lock(&table.lock);
  bool found = index >= 0 && index < table.count;
  if (found)
    *row = table.rows[index];
  pthread_mutex_unlock(&table.lock);
  return found;
}
