/* ranges.c: a sorted array: there are some hundred ranges at most where a network trains. */
#include "ranges.h"

#include <stdlib.h>
#include <string.h>

static void remove_range(range_set *set, size_t k) {
  memmove(&set->list[k], &set->list[k + 1], (--set->count - k) * sizeof *set->list);
}

void *ranges_take(range_set *set, size_t bytes) {
  address_range *best = NULL;
  for (size_t k = 0; k < set->count; k++)
    if (set->list[k].bytes >= bytes && (!best || set->list[k].bytes < best->bytes))
      best = &set->list[k];
  if (!best)
    return NULL;
  char *start = best->start;
  best->start += bytes;
  best->bytes -= bytes;
  if (!best->bytes)
    remove_range(set, (size_t)(best - set->list));
  return start;
}

/* The first range that lies above. */
static size_t place_of(const range_set *set, const char *start) {
  size_t first = 0, last = set->count;
  while (first < last) {
    size_t middle = (first + last) / 2;
    if (set->list[middle].start < start)
      first = middle + 1;
    else
      last = middle;
  }
  return first;
}

static bool insert_range(range_set *set, size_t k, address_range range) {
  if (set->count == set->capacity) {
    size_t capacity = set->capacity ? 2 * set->capacity : 64;
    address_range *list = realloc(set->list, capacity * sizeof *list);
    if (!list)
      return false;
    set->list = list;
    set->capacity = capacity;
  }
  memmove(&set->list[k + 1], &set->list[k], (set->count++ - k) * sizeof *set->list);
  set->list[k] = range;
  return true;
}

bool ranges_put(range_set *set, void *start, size_t bytes) {
  size_t k = place_of(set, start);
  address_range *below = k > 0 ? &set->list[k - 1] : NULL, *above = k < set->count ? &set->list[k] : NULL;
  bool meets_below = below && below->start + below->bytes == start;
  bool meets_above = above && above->start == (char *)start + bytes;
  if (!meets_below && !meets_above)
    return insert_range(set, k, (address_range){start, bytes});
  if (!meets_below) {
    above->start = start;
    above->bytes += bytes;
    return true;
  }
  below->bytes += bytes;
  if (meets_above) {
    below->bytes += above->bytes;
    remove_range(set, k);
  }
  return true;
}
