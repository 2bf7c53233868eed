/* norm_backward.c: batch norm's gradient in two passes that are as fast as memory: sums over the map, then dx.
 *
 * Both read the gradient that arrives block by block. Where it is not in memory as it is needed (a sum, behind a ReLU
 * or a max pool) a block of it is computed first, small enough to be read again from the cache, so that what follows
 * adds up the same numbers in the same order as if it had been stored. */
#include <omp.h>

#include "cpu/kernels/norm_rows.h"
#include "cpu/kernels/pool.h"

enum {
  STEP = 8,     /* lines that are summed together */
  BLOCK = 4096, /* elements of a block, if STEP lines are no more */
};

/* ---- sums over rows ---- */

/* Of each column of a number of lines: the sum of dy and of dy * (x - center). */
static ALWAYS_INLINE void sum_lines(const void *restrict dy, const void *restrict x, int64_t offset, int64_t width,
                                    const float *restrict center, float *restrict sum, float *restrict product,
                                    const int lines, const bool half) {
  for (int64_t c = 0; c < width; c++) {
    float s = 0, p = 0;
#pragma GCC unroll 8
    for (int l = 0; l < lines; l++) {
      float difference = load_float(x, offset + l * width + c, half) - center[c];
      float u = load_float(dy, offset + l * width + c, half);
      s += u;
      p += u * difference;
    }
    sum[c] += s;
    product[c] += p;
  }
}

static ALWAYS_INLINE void sum_all_lines(const void *dy, const void *x, int64_t elements, int64_t width,
                                        const float *center, float *sum, float *product, const bool half) {
  int64_t offset = 0;
  for (; offset + STEP * width <= elements; offset += STEP * width)
    sum_lines(dy, x, offset, width, center, sum, product, STEP, half);
  for (; offset < elements; offset += width)
    sum_lines(dy, x, offset, elements - offset < width ? elements - offset : width, center, sum, product, 1, half);
}

/* ---- the gradient that arrives ---- */

typedef enum { UNMASKED, BY_RESULT, BY_SCALE } mask_kind;

typedef struct {
  const void *dy, *added, *result, *x;
  void *kept;
  const pool_plan *pool; /* NULL: none; indices are those of its windows */
  const int32_t *indices;
  mask_kind mask;
  const float *scale, *shift; /* (C) */
} gradient_source;

static inline const void *element(const void *data, int64_t k, bool half) {
  return (const char *)data + k * (half ? 2 : 4);
}

/* A number that is one of the map's type to the map. */
static ALWAYS_INLINE void store_exact(void *to, int64_t k, float value, bool half) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (half)
    ((uint16_t *)to)[k] = (uint16_t)(bits >> 16);
  else
    ((float *)to)[k] = value;
}

/* One line; `of` is the result or x, by the kind of mask. `to` may be dy. */
static ALWAYS_INLINE void mix_line(void *to, const void *dy, const void *added, const void *of, int64_t offset,
                                   int64_t width, const float *scale, const float *shift, const bool half,
                                   const bool sum, const mask_kind mask) {
#pragma omp simd
  for (int64_t c = 0; c < width; c++) {
    float u = load_float(dy, offset + c, half), z = 1;
    if (mask == BY_RESULT)
      z = load_float(of, offset + c, half);
    if (mask == BY_SCALE)
      z = multiply_add(scale[c], load_float(of, offset + c, half), shift[c]);
    bool passes = z > (mask == BY_SCALE ? largest_zero(half) : 0);
    if (sum)
      store_float(to, offset + c, passes ? u + load_float(added, offset + c, half) : 0, half);
    else
      store_exact(to, offset + c, passes ? u : 0, half);
  }
}

static ALWAYS_INLINE void mix_lines(void *to, const void *dy, const void *added, const void *of, int64_t elements,
                                    int64_t width, const float *scale, const float *shift, const bool half,
                                    const bool sum, const mask_kind mask) {
  for (int64_t k = 0; k < elements; k += width)
    mix_line(to, dy, added, of, k, elements - k < width ? elements - k : width, scale, shift, half, sum, mask);
}

typedef void mix(void *to, const void *dy, const void *added, const void *of, int64_t elements, int64_t width,
                 const float *scale, const float *shift);

#define MIX(name, half, sum, mask)                                                                                     \
  static void name(void *to, const void *dy, const void *added, const void *of, int64_t elements, int64_t width,       \
                   const float *scale, const float *shift) {                                                           \
    mix_lines(to, dy, added, of, elements, width, scale, shift, half, sum, mask);                                      \
  }
MIX(copied, false, false, UNMASKED)
MIX(summed, false, true, UNMASKED)
MIX(masked, false, false, BY_RESULT)
MIX(summed_masked, false, true, BY_RESULT)
MIX(recomputed, false, false, BY_SCALE)
MIX(summed_recomputed, false, true, BY_SCALE)
MIX(half_copied, true, false, UNMASKED)
MIX(half_summed, true, true, UNMASKED)
MIX(half_masked, true, false, BY_RESULT)
MIX(half_summed_masked, true, true, BY_RESULT)
MIX(half_recomputed, true, false, BY_SCALE)
MIX(half_summed_recomputed, true, true, BY_SCALE)
#undef MIX

static mix *const mixes[2][2][3] = {/* [half][added][mask] */
                                    {{copied, masked, recomputed}, {summed, summed_masked, summed_recomputed}},
                                    {{half_copied, half_masked, half_recomputed},
                                     {half_summed, half_summed_masked, half_summed_recomputed}}};

/* Whether dy is the gradient as it lies in memory. */
static bool is_plain(const gradient_source *g) {
  return !g->added && !g->pool && g->mask == UNMASKED && !g->kept;
}

/* `elements` elements of the gradient from element `offset` of the map on: where they are. The lines are `width` wide;
 * scale and shift are lines. `buffer` has room for them. */
static const void *gradient_at(const gradient_source *g, const row_layout *m, int64_t offset, int64_t elements,
                               int64_t width, const float *scale, const float *shift, void *buffer) {
  const void *dy = element(g->dy, g->pool ? 0 : offset, m->half);
  if (is_plain(g))
    return dy;
  void *to = g->kept ? (void *)element(g->kept, offset, m->half) : buffer;
  if (g->pool) {
    KERNEL(max_pool_gather)(g->pool, g->dy, g->indices, offset / m->channels, elements / m->channels, to);
    dy = to;
  }
  const void *added = g->added ? element(g->added, offset, m->half) : NULL;
  const void *of = g->mask == UNMASKED ? NULL : element(g->mask == BY_RESULT ? g->result : g->x, offset, m->half);
  if (dy != to || of)
    mixes[m->half][added != NULL][g->mask](to, dy, added, of, elements, width, scale, shift);
  return to;
}

/* Once the first pass has stored the gradient, the second reads it as it is. */
static gradient_source after_first_pass(const gradient_source *g) {
  return g->kept ? (gradient_source){.dy = g->kept, .x = g->x} : *g;
}

/* ---- runs of rows ---- */

/* How a run is walked: in lines of `width`, blocks of `block` elements. */
typedef struct {
  int64_t copies, width, block, elements;
} run_walk;

static run_walk walk_of(const row_layout *m, row_run run) {
  run_walk w = {.copies = rows_in_line(m->width, run.rows), .elements = run.rows * m->width};
  w.width = w.copies * m->width;
  w.block = STEP * w.width * (STEP * w.width < BLOCK ? BLOCK / (STEP * w.width) : 1);
  return w;
}

/* What a thread's buffer has to hold: a line is no wider than LINE or the rows. */
static size_t buffer_bytes(const row_layout *m) {
  int64_t line = m->width < LINE ? LINE : m->width, block = STEP * line < BLOCK ? BLOCK : STEP * line;
  return (size_t)block * sizeof(float);
}

/* Lines of what masks by scale, where it does. */
static void mask_lines(const gradient_source *g, const row_layout *m, row_run run, int64_t copies, float lines[2][LINE],
                       const float **scale, const float **shift) {
  *scale = *shift = NULL;
  if (g->mask != BY_SCALE)
    return;
  *scale = repeat(lines[0], g->scale + run.channel, m->width, copies);
  *shift = repeat(lines[1], g->shift + run.channel, m->width, copies);
}

/* Adds to sum (C) and product (C), already those of the run's channels, what a run has. */
static void sum_run(const row_layout *m, row_run run, const gradient_source *g, const float *center, float *sum,
                    float *product, void *buffer) {
  float lines[5][LINE];
  const float *scale, *shift;
  run_walk w = walk_of(m, run);
  const float *centers = repeat(lines[0], center, m->width, w.copies);
  float *s = w.copies == 1 ? sum : lines[1], *p = w.copies == 1 ? product : lines[2];
  mask_lines(g, m, run, w.copies, lines + 3, &scale, &shift);
  if (w.copies > 1) {
    memset(s, 0, (size_t)w.width * sizeof(float));
    memset(p, 0, (size_t)w.width * sizeof(float));
  }
  for (int64_t k = 0; k < w.elements; k += w.block) {
    int64_t count = w.elements - k < w.block ? w.elements - k : w.block;
    const void *dy = gradient_at(g, m, run.offset + k, count, w.width, scale, shift, buffer);
    const void *x = element(g->x, run.offset + k, m->half);
    if (m->half)
      sum_all_lines(dy, x, count, w.width, centers, s, p, true);
    else
      sum_all_lines(dy, x, count, w.width, centers, s, p, false);
  }
  if (w.copies > 1) {
    add_repeated(sum, s, m->width, w.copies);
    add_repeated(product, p, m->width, w.copies);
  }
}

/* sum (C) and product (C) over the rows first ... last - 1. */
static void sum_rows(const row_layout *m, int64_t first, int64_t last, const gradient_source *g, const float *center,
                     float *sum, float *product, void *buffer) {
  memset(sum, 0, (size_t)m->channels * sizeof(float));
  memset(product, 0, (size_t)m->channels * sizeof(float));
  for (int64_t k = 0; k < runs_between(m, first, last); k++) {
    row_run run = run_between(m, first, last, k);
    sum_run(m, run, g, center + run.channel, sum + run.channel, product + run.channel, buffer);
  }
}

/* ---- dx = gain * dy + slope * (x - mean) + level ---- */

typedef struct {
  const float *mean;
  float *gain, *slope, *level; /* (C) */
} gradient_terms;

/* Lines of the terms for a run's channels. */
typedef struct {
  const float *mean, *gain, *slope, *level;
} term_lines;

/* A number of lines. Without `centered` slope and level are zero. */
static ALWAYS_INLINE void gradient_lines(void *restrict dx, const void *restrict dy, const void *restrict x,
                                         int64_t offset, int64_t width, const term_lines t, const int lines,
                                         const bool half, const bool centered) {
  const float *restrict mean = t.mean, *restrict gain = t.gain, *restrict slope = t.slope, *restrict level = t.level;
  for (int64_t c = 0; c < width; c++) {
#pragma GCC unroll 4
    for (int l = 0; l < lines; l++) {
      int64_t k = offset + l * width + c;
      float rest = centered ? slope[c] * (load_float(x, k, half) - mean[c]) + level[c] : 0;
      store_float(dx, k, gain[c] * load_float(dy, k, half) + rest, half);
    }
  }
}

/* The same of floats past the caches; width and dx are whole vectors. */
static void stream_gradient(float *dx, const float *dy, const float *x, int64_t elements, int64_t width,
                            const term_lines *t, bool centered) {
  for (int64_t line = 0; line < elements; line += width)
    for (int64_t c = 0; c < width; c += LANES) {
      float_lanes gain = load_lanes(t->gain, c, false), u = gain * load_lanes(dy, line + c, false);
      if (centered)
        u += load_lanes(t->slope, c, false) * (load_lanes(x, line + c, false) - load_lanes(t->mean, c, false)) +
             load_lanes(t->level, c, false);
      stream_lanes(dx + line + c, u);
    }
}

static ALWAYS_INLINE void all_gradient_lines(void *dx, const void *dy, const void *x, int64_t elements, int64_t width,
                                             const term_lines t, const bool half, const bool centered) {
  int64_t offset = 0;
  for (; offset + 4 * width <= elements; offset += 4 * width)
    gradient_lines(dx, dy, x, offset, width, t, 4, half, centered);
  for (; offset < elements; offset += width)
    gradient_lines(dx, dy, x, offset, elements - offset < width ? elements - offset : width, t, 1, half, centered);
}

static void gradient_block(void *dx, const void *dy, const void *x, int64_t elements, int64_t width,
                           const term_lines *t, bool half, bool centered, bool streams) {
  if (streams)
    stream_gradient(dx, dy, x, elements, width, t, centered);
  else if (half && centered)
    all_gradient_lines(dx, dy, x, elements, width, *t, true, true);
  else if (half)
    all_gradient_lines(dx, dy, x, elements, width, *t, true, false);
  else if (centered)
    all_gradient_lines(dx, dy, x, elements, width, *t, false, true);
  else
    all_gradient_lines(dx, dy, x, elements, width, *t, false, false);
}

static void gradient_run(const row_layout *m, row_run run, void *dx, const gradient_source *g, bool batch_statistics,
                         const gradient_terms *terms, bool streams, void *buffer) {
  float lines[6][LINE];
  const float *scale, *shift;
  run_walk w = walk_of(m, run);
  const term_lines t = {repeat(lines[0], terms->mean + run.channel, m->width, w.copies),
                        repeat(lines[1], terms->gain + run.channel, m->width, w.copies),
                        repeat(lines[2], terms->slope + run.channel, m->width, w.copies),
                        repeat(lines[3], terms->level + run.channel, m->width, w.copies)};
  mask_lines(g, m, run, w.copies, lines + 4, &scale, &shift);
  for (int64_t k = 0; k < w.elements; k += w.block) {
    int64_t count = w.elements - k < w.block ? w.elements - k : w.block, offset = run.offset + k;
    const void *dy = gradient_at(g, m, offset, count, w.width, scale, shift, buffer);
    gradient_block((void *)element(dx, offset, m->half), dy, element(g->x, offset, m->half), count, w.width, &t,
                   m->half, batch_statistics, streams && count % w.width == 0);
  }
}

/* ---- the entry ---- */

typedef struct {
  bool batch_statistics;
  const device_array *dweight, *dbias, *mean, *inverse, *weight;
} norm_gradient;

/* The sums of `count` channels (at most MERGED) from c on, of all chunks; partial (chunks, 2, C). */
static void merge_gradients(const norm_gradient *g, const float *partial, int64_t chunks, const row_layout *m,
                            int64_t first, int64_t count, const gradient_terms *terms) {
  double sums[MERGED] = {0}, products[MERGED] = {0}, part = g->batch_statistics ? 1 / (double)m->rows : 0;
  for (int64_t k = 0; k < chunks; k++) {
    const float *sum = partial + k * 2 * m->channels + first, *product = sum + m->channels;
    for (int64_t j = 0; j < count; j++) {
      sums[j] += sum[j];
      products[j] += product[j];
    }
  }
  for (int64_t j = 0; j < count; j++) {
    int64_t c = first + j;
    double inverse = channel_value(g->inverse, c, 1), gain = channel_value(g->weight, c, 1) * inverse;
    terms->gain[c] = (float)gain;
    terms->slope[c] = (float)(-gain * inverse * inverse * products[j] * part);
    terms->level[c] = (float)(-gain * sums[j] * part);
    channel_set(g->dweight, c, products[j] * inverse);
    channel_set(g->dbias, c, sums[j]);
  }
}

static bool is_like(const device_array *a, const device_array *x) {
  return !a || a->dtype == x->dtype;
}

static bool is_supported(const device_gradient *dy, const device_array *x) {
  return is_map(x) && is_like(dy->dy, x) && is_like(dy->added, x) && is_like(dy->result, x) && is_like(dy->kept, x) &&
         are_parameters(2, (const device_array *[]){dy->scale, dy->shift}) &&
         (!dy->windows || (dy->indices->dtype == OREPA_INT32 && x->rank == 4));
}

/* Pieces of the block of scratch, in floats but for the plan. */
typedef struct {
  float *terms, *scale, *shift, *partial; /* (4, C), (C), (C), (chunks, 2, C) */
  char *buffers;                          /* one for each thread */
  void *plan;
  size_t buffer;
} gradient_scratch;

static bool take_scratch(gradient_scratch *s, device_context *context, const row_layout *m, int64_t chunks,
                         const device_gradient *dy, const device_array *x) {
  size_t plan = dy->windows ? (KERNEL(pool_plan_bytes)(dy->dy, x) + 63) / 64 * 64 : 0;
  s->buffer = buffer_bytes(m);
  size_t buffers = (size_t)omp_get_max_threads() * s->buffer;
  char *memory = context->workspace(context, plan + buffers + (size_t)((6 + 2 * chunks) * m->channels) * sizeof(float));
  if (!memory)
    return false;
  s->plan = memory;
  s->buffers = memory + plan;
  s->terms = (float *)(s->buffers + buffers);
  s->scale = s->terms + 4 * m->channels;
  s->shift = s->scale + m->channels;
  s->partial = s->shift + m->channels;
  return true;
}

static gradient_source source_of(const device_gradient *dy, const device_array *x, const pool_plan *pool,
                                 const gradient_scratch *s) {
  gradient_source g = {.dy = dy->dy->data, .x = x->data, .kept = dy->kept ? dy->kept->data : NULL};
  g.added = dy->added ? dy->added->data : NULL;
  if (dy->windows) {
    g.pool = pool;
    g.indices = dy->indices->data;
    g.added = NULL;
  }
  if (dy->result) {
    g.mask = BY_RESULT;
    g.result = dy->result->data;
  } else if (dy->scale) {
    g.mask = BY_SCALE;
    g.scale = dense_channels(dy->scale, s->scale);
    g.shift = dense_channels(dy->shift, s->shift);
  }
  return g;
}

device_status KERNEL(norm_backward)(device_context *context, bool batch_statistics, const device_array *dx,
                                    const device_array *dweight, const device_array *dbias, const device_gradient *dy,
                                    const device_array *x, const device_array *mean, const device_array *inverse,
                                    const device_array *weight) {
  norm_gradient g = {batch_statistics, dweight, dbias, mean, inverse, weight};
  const device_array *parameters[] = {dweight, dbias, mean, inverse, weight};
  if (!is_supported(dy, x) || (dx && dx->dtype != x->dtype) || !are_parameters(5, parameters))
    return DEVICE_UNSUPPORTED;
  row_layout m = layout_of(x);
  if (m.channels == 0)
    return DEVICE_DONE;
  bool summed = (batch_statistics && dx) || dweight || dbias || dy->kept;
  int64_t step = moments_rows(m.rows), chunks = moments_chunks(m.rows), summed_chunks = summed ? chunks : 0;
  gradient_scratch s;
  if (!take_scratch(&s, context, &m, summed_chunks, dy, x))
    return DEVICE_FAILED;
  gradient_terms terms = {dense_channels(mean, s.terms), s.terms + m.channels, s.terms + 2 * m.channels,
                          s.terms + 3 * m.channels};
  bool streams = dx && streams_map(&m, dx->data);
  pool_plan pool;
  if (dy->windows)
    pool = KERNEL(pool_plan_in)(s.plan, dy->windows, dy->dy, x);
  const gradient_source arriving = source_of(dy, x, &pool, &s), kept = after_first_pass(&arriving);
#pragma omp parallel if (m.rows * m.channels >= PARALLEL_FROM)
  {
    void *buffer = s.buffers + (size_t)omp_get_thread_num() * s.buffer;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < summed_chunks; k++) {
      float *sum = s.partial + k * 2 * m.channels;
      sum_rows(&m, k * step, chunk_end(m.rows, k), &arriving, terms.mean, sum, sum + m.channels, buffer);
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < m.channels; first += MERGED) {
      int64_t count = m.channels - first < MERGED ? m.channels - first : MERGED;
      merge_gradients(&g, s.partial, summed_chunks, &m, first, count, &terms);
    }
    /* From the end, which the first pass left in the cache. */
#pragma omp for schedule(static)
    for (int64_t k = (dx ? chunks : 0) - 1; k >= 0; k--) {
      int64_t first = k * step, last = chunk_end(m.rows, k);
      for (int64_t j = 0; j < runs_between(&m, first, last); j++)
        gradient_run(&m, run_between(&m, first, last, j), dx->data, &kept, batch_statistics, &terms, streams, buffer);
    }
    stream_end();
  }
  return DEVICE_DONE;
}
