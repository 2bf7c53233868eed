/* norm_rows.h: how the norm's kernels walk a map: as rows of channels in runs that lie side by side in memory.
 *
 * Rows of few channels are taken several at a time, as one line that repeats the channels, so that vectors are full
 * whatever C is. Sums run over chunks of rows fixed by size, and are merged in their order in double. */
#ifndef OREPA_CORE_CPU_NORM_ROWS_H
#define OREPA_CORE_CPU_NORM_ROWS_H

#include <math.h>

#include "cpu/kernels/channels.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/lanes.h"

enum {
  LINE = 512,            /* channels of a line of repeated rows, at most */
  LINE_LEAST = 256,      /* and at least: loops over fewer don't pay */
  MERGED = 64,           /* channels merged at a time */
  PARALLEL_FROM = 65536, /* elements */
  STREAMED = 1 << 20,    /* elements of a map that is written past the caches */
};

static inline bool is_map(const device_array *a) {
  return a->dtype == OREPA_FLOAT32 || a->dtype == OREPA_BFLOAT16;
}

static inline bool are_parameters(int count, const device_array *const *arrays) {
  for (int n = 0; n < count; n++)
    if (arrays[n] && arrays[n]->dtype != OREPA_FLOAT32)
      return false;
  return true;
}

/* ---- where rows lie ---- */

/* A map (N, C, ...) of rank 2 or 4 has its channels innermost: it is one block of all rows. Of another rank it is N
 * images of C blocks, each of one channel. */
typedef struct {
  int64_t channels, rows;
  int64_t blocks; /* of an image, side by side: 1 or C */
  int64_t width;  /* channels of a block: C or 1 */
  int64_t length; /* rows of a block */
  bool half;
} row_layout;

static inline row_layout layout_of(const device_array *x) {
  int64_t channels = x->shape[1], length = 1;
  for (int d = 2; d < x->rank; d++)
    length *= x->shape[d];
  row_layout m = {.channels = channels, .rows = x->shape[0] * length, .half = x->dtype == OREPA_BFLOAT16};
  bool innermost = x->rank == 2 || x->rank == 4;
  m.blocks = innermost ? 1 : channels;
  m.width = innermost ? channels : 1;
  m.length = innermost ? m.rows : length;
  return m;
}

/* Whether a result like the map is written past the caches: then its lines are whole vectors. */
static inline bool streams_map(const row_layout *m, const void *data) {
  return STREAMS && !m->half && m->rows * m->channels >= STREAMED && m->width % LANES == 0 &&
         (uintptr_t)data % sizeof(float_lanes) == 0;
}

/* Rows of one block that lie side by side: `offset` elements from the map's data. */
typedef struct {
  int64_t offset, rows, channel;
} row_run;

/* How many runs the rows first ... last - 1 are, and run k of them. */
static inline int64_t runs_between(const row_layout *m, int64_t first, int64_t last) {
  return first < last ? ((last - 1) / m->length - first / m->length + 1) * m->blocks : 0;
}

static inline row_run run_between(const row_layout *m, int64_t first, int64_t last, int64_t k) {
  int64_t image = first / m->length + k / m->blocks, channel = k % m->blocks, start = image * m->length;
  int64_t low = first > start ? first : start, high = last < start + m->length ? last : start + m->length;
  return (row_run){((image * m->blocks + channel) * m->length + low - start) * m->width, high - low, channel};
}

/* ---- lines ---- */

/* How many rows of C channels make a line: full vectors if that is no longer than LINE. */
static inline int64_t rows_in_line(int64_t channels, int64_t rows) {
  int64_t copies = 1;
  while (copies * channels % LANES)
    copies *= 2;
  if (copies * channels > LINE)
    copies = 1;
  while (copies * channels < LINE_LEAST)
    copies *= 2;
  return copies < rows ? copies : rows;
}

/* The values of a line, each channel's repeated. */
static inline const float *repeat(float line[LINE], const float *values, int64_t channels, int64_t copies) {
  if (copies == 1)
    return values;
  for (int64_t k = 0; k < copies; k++)
    for (int64_t c = 0; c < channels; c++)
      line[k * channels + c] = values[c];
  return line;
}

static inline void add_repeated(float *sums, const float line[LINE], int64_t channels, int64_t copies) {
  for (int64_t k = 0; k < copies; k++)
    for (int64_t c = 0; c < channels; c++)
      sums[c] += line[k * channels + c];
}

/* ---- chunks ---- */

/* norm_statistics.c: moments of the rows first ... last - 1 of a map, into `chunk` (4, C). */
void KERNEL(norm_chunk_moments)(const row_layout *m, float *chunk, int64_t first, int64_t last, const void *x);
/* norm.c: z = scale*y + shift in these rows. */
void KERNEL(norm_apply_rows)(const row_layout *m, int64_t first, int64_t last, void *z, const void *y,
                             const float *scale, const float *shift);

static inline int64_t chunk_end(int64_t rows, int64_t chunk) {
  int64_t end = (chunk + 1) * moments_rows(rows);
  return end < rows ? end : rows;
}

#endif
