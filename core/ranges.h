/* ranges.h: free ranges of addresses: cut where one is taken, joined where neighbours meet. */
#ifndef OREPA_CORE_RANGES_H
#define OREPA_CORE_RANGES_H

#include <stdbool.h>
#include <stddef.h>

typedef struct {
  char *start;
  size_t bytes;
} address_range;

/* All zero: empty. The ranges rise and don't touch. */
typedef struct {
  address_range *list;
  size_t count, capacity;
} range_set;

/* The start of the smallest range that has room, which is cut there; of equal ones the lowest. NULL: none has. */
void *ranges_take(range_set *set, size_t bytes);
/* Adds a range that lies outside all others. False: there is no memory for the list, and nothing has changed. */
bool ranges_put(range_set *set, void *start, size_t bytes);

#endif
