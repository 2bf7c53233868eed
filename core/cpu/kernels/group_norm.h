/* group_norm.h: how the two passes of group norm walk a map. Where an image has several rows of channels (positions)
 * its rows are cut into chunks, as batch norm's are; where it has one (layer norm), whole images are taken one by one.
 */
#ifndef OREPA_CORE_CPU_GROUP_NORM_H
#define OREPA_CORE_CPU_GROUP_NORM_H

#include "cpu/kernels/norm_rows.h"

typedef struct {
  row_layout m;
  int64_t images, length; /* rows of an image */
  int64_t groups, size;   /* channels of a group */
  int64_t step, chunks;   /* rows of a chunk, chunks of an image */
} group_layout;

static inline group_layout group_layout_of(const device_array *x, const device_array *mean) {
  group_layout g = {.m = layout_of(x), .images = x->shape[0], .length = x->shape[2] * x->shape[3]};
  g.groups = mean->shape[1];
  g.size = g.m.channels / g.groups;
  g.step = moments_rows(g.length);
  g.chunks = moments_chunks(g.length);
  return g;
}

static inline int64_t group_elements(const group_layout *g) {
  return g->m.rows * g->m.channels;
}

/* Rows of chunk `item` of all images' chunks. */
static inline int64_t group_first(const group_layout *g, int64_t item) {
  return item / g->chunks * g->length + item % g->chunks * g->step;
}

static inline int64_t group_last(const group_layout *g, int64_t item) {
  int64_t last = group_first(g, item) + g->step, end = (item / g->chunks + 1) * g->length;
  return last < end ? last : end;
}

/* Images of one row that are taken together: about 16,000 elements, or a 64th of all. */
static inline int64_t images_at_once(const group_layout *g) {
  int64_t share = (g->images + 63) / 64, least = 16384 / (g->m.channels + 1) + 1;
  return share > least ? share : least;
}

/* The values of (C) side by side; all the same where there are none. */
static inline void copy_channels(float *copy, const device_array *a, int64_t channels, float absent) {
  for (int64_t c = 0; c < channels; c++)
    copy[c] = channel_value(a, c, absent);
}

#endif
