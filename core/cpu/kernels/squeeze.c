/* squeeze.c: all terms of a block added up to its one kernel.
 *
 * An output's part of the kernel, one block of channels wide, is summed up term by term in a small array that never
 * leaves the first cache, and written once. Only products are computed before that, straight into the kernel, for as
 * many outputs as stay in the second cache: no term's own kernel is ever in memory. */
#include "cpu/kernels/squeeze.h"

#include <omp.h>

#include "cpu/kernels/kernels.h"

/* ---- what is asked for, shared with squeeze_backward.c ---- */

static bool has_shape(const device_array *a, int64_t o, int64_t i, int64_t h, int64_t w) {
  return is_dense_kernel(a, OREPA_FLOAT32) && a->shape[0] == o && a->shape[1] == i && a->shape[2] == h &&
         a->shape[3] == w;
}

/* A gradient that isn't wanted has any shape. */
static bool matches(const device_array *gradient, const device_array *a) {
  return !gradient->data || has_shape(gradient, a->shape[0], a->shape[1], a->shape[2], a->shape[3]);
}

/* A kernel of h by w lies centred in s's. */
static bool fits(const squeezing *s, const device_array *a) {
  int64_t h = s->height - a->shape[2], w = s->width - a->shape[3];
  return h >= 0 && w >= 0 && h % 2 == 0 && w % 2 == 0;
}

/* The array that has the term's kernel size, the one that T and E are read from, and these. */
static const device_array *spatial(const device_term *term) {
  return term->kind == TERM_DEPTHWISE ? &term->b : &term->a;
}
static int64_t inner_of(const squeezing *s, const device_term *term) {
  if (term->kind == TERM_PRODUCT)
    return term->a.shape[1];
  return term->kind == TERM_DEPTHWISE && s->channels ? term->a.shape[1] / s->channels : 0;
}

static bool is_vector(const device_array *v, int64_t outputs) {
  return v->rank == 1 && v->dtype == OREPA_FLOAT32 && (v->shape[0] == outputs || v->shape[0] == 1);
}

static bool understands(const squeezing *s, const device_term *term) {
  const device_array *a = &term->a, *b = &term->b;
  int64_t outputs = s->groups * s->outputs, inner = inner_of(s, term);
  if (term->scale.data && !is_vector(&term->scale, outputs))
    return false;
  if (term->dscale.data && (!is_vector(&term->dscale, outputs) || term->dscale.shape[0] != term->scale.shape[0]))
    return false;
  if (!matches(&term->da, a))
    return false;
  switch (term->kind) {
  case TERM_KERNEL:
    return a->rank == 4 && has_shape(a, outputs, s->channels, a->shape[2], a->shape[3]) && fits(s, a);
  case TERM_PATTERN:
    return has_shape(a, outputs, s->channels, 1, 1) && b->rank == 3 && b->dtype == OREPA_FLOAT32 &&
           b->shape[0] == outputs && b->shape[1] == s->height && b->shape[2] == s->width;
  case TERM_PRODUCT:
    return a->rank == 4 && has_shape(a, outputs, inner, a->shape[2], a->shape[3]) && fits(s, a) &&
           has_shape(b, s->groups * inner, s->channels, 1, 1) && matches(&term->db, b);
  case TERM_DEPTHWISE:
    return has_shape(a, outputs, inner * s->channels, 1, 1) && b->rank == 4 && fits(s, b) &&
           has_shape(b, inner * s->channels * s->groups, 1, b->shape[2], b->shape[3]) && matches(&term->db, b);
  }
  return false;
}

bool KERNEL(squeeze_describe)(squeezing *s, int64_t groups, const device_array *w, const orepa_taps *taps, int count,
                              const device_term *terms) {
  if (!is_dense_kernel(w, OREPA_FLOAT32) || groups < 1 || w->shape[0] % groups)
    return false;
  *s = (squeezing){.groups = groups,
                   .outputs = w->shape[0] / groups,
                   .channels = w->shape[1],
                   .taps = w->shape[2] * w->shape[3],
                   .height = w->shape[2],
                   .width = w->shape[3],
                   .used = taps ? *taps : (orepa_taps){{0, 0}, {w->shape[2], w->shape[3]}},
                   .blocks = divide_up(w->shape[1], SQUEEZE_CHANNELS),
                   .padded = divide_up(w->shape[1], LANES) * LANES,
                   .count = count};
  for (int k = 0; k < count; k++) {
    if (terms[k].a.rank != 4 || !understands(s, &terms[k]))
      return false;
    int64_t *most = &s->most_inner[terms[k].kind == TERM_DEPTHWISE];
    *most = larger(*most, inner_of(s, &terms[k]));
  }
  return true;
}

static bool is_used(const squeezing *s, int64_t h, int64_t w) {
  return h >= s->used.first[0] && h < s->used.last[0] && w >= s->used.first[1] && w < s->used.last[1];
}

/* Fills a term's `source` and `place`; how many of its taps are used. */
static int64_t find_places(const squeezing *s, const device_term *term, int64_t *source, int64_t *place) {
  const int64_t *size = &spatial(term)->shape[2];
  bool whole = term->kind == TERM_PATTERN;
  int64_t height = whole ? s->height : size[0], width = whole ? s->width : size[1];
  int64_t top = (s->height - height) / 2, left = (s->width - width) / 2, used = 0, others = height * width;
  for (int64_t h = height - 1; h >= 0; h--) /* backwards, as the others are filled in from the end */
    for (int64_t w = width - 1; w >= 0; w--)
      if (!is_used(s, top + h, left + w))
        source[--others] = h * width + w;
  for (int64_t h = 0; h < height; h++)
    for (int64_t w = 0; w < width; w++)
      if (is_used(s, top + h, left + w)) {
        source[used] = h * width + w;
        place[used++] = (top + h) * s->width + left + w;
      }
  return used;
}

void KERNEL(squeeze_lay_out)(squeezing *s, squeeze_scratch *m, const device_term *terms, int64_t chunks) {
  s->terms = take(m, s->count, sizeof *s->terms);
  for (int k = 0; k < s->count; k++) {
    const device_term *term = &terms[k];
    const device_array *a = spatial(term);
    int64_t own = term->kind == TERM_PATTERN ? s->taps : a->shape[2] * a->shape[3], inner = inner_of(s, term), size = 0;
    if (term->kind == TERM_PRODUCT && chunks)
      size = s->groups * packed_size(inner, PRODUCT_COLUMNS(float), s->channels);
    else if (term->kind == TERM_PRODUCT)
      size = s->groups * packed_size(s->channels, PRODUCT_COLUMNS(float), inner);
    else if (term->kind == TERM_DEPTHWISE)
      size = s->groups * s->padded * inner * own;
    int64_t *source = take(m, own, sizeof *source), *place = take(m, own, sizeof *place);
    float *packed = take(m, size, sizeof *packed), *partial = NULL;
    double *sums = take(m, chunks ? s->groups * s->outputs : 0, sizeof *sums);
    if (term->kind == TERM_DEPTHWISE && term->db.data)
      partial = take(m, chunks * size, sizeof *partial);
    if (m->memory) {
      int64_t taps = find_places(s, term, source, place);
      s->terms[k] = (squeeze_term){term, own, taps, source, place, inner, packed, partial, sums};
    }
  }
}

/* One e of a column: the used taps of `channels` kernels that lie `row` apart. */
static void take_taps(const squeeze_term *t, int64_t channels, const float *from, int64_t row, float *to) {
  for (int64_t tap = 0; tap < t->taps; tap++, to += t->inner * LANES)
    for (int64_t i = 0; i < LANES; i++)
      to[i] = i < channels ? from[i * row + t->source[tap]] : 0;
}

void KERNEL(squeeze_pack_depthwise)(const squeezing *s) {
  int64_t columns = s->padded / LANES;
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind != TERM_DEPTHWISE)
      continue;
    int64_t row = t->inner * t->own;
#pragma omp for nowait
    for (int64_t n = 0; n < s->groups * columns; n++) {
      int64_t first = n % columns * LANES, channels = smaller(LANES, s->channels - first);
      const float *from = (const float *)t->term->b.data + (n / columns * s->channels + first) * row;
      float *to = t->packed + n * t->inner * t->taps * LANES;
      for (int64_t e = 0; e < t->inner; e++, from += t->own, to += LANES)
        if (t->taps == t->own)
          turn_to_lanes(channels, t->taps, from, row, to, t->inner * LANES);
        else
          take_taps(t, channels, from, row, to);
    }
  }
}

/* ---- products ---- */

/* b of each product in panels of its columns. */
static void pack_products(const squeezing *s) {
  int64_t width = PRODUCT_COLUMNS(float), panels = divide_up(s->channels, width);
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind != TERM_PRODUCT)
      continue;
#pragma omp for nowait
    for (int64_t n = 0; n < s->groups * panels; n++) {
      int64_t first = n % panels * width;
      const float *row = (const float *)t->term->b.data + n / panels * t->inner * s->channels;
      float *panel = t->packed + n * t->inner * width;
      for (int64_t step = 0; step < t->inner; step++, row += s->channels, panel += width)
        pack_rows(1, width, s->channels - first, &row, first, NULL, panel);
    }
  }
}

/* A row of a product: its place in `a`, where it goes, and its scale. */
typedef struct {
  const float *a;
  float *w, scale;
} product_row;

/* Ends rows of a tile whose columns are channels from `channel` on: adds the identity's part, a[o, t, tap] for each t
 * with t mod I/G = channel, multiplies by the scale, and puts or adds the result to w. */
static void finish_tile(const squeezing *s, const squeeze_term *t, bool add, int64_t rows, const product_row *row,
                        int64_t channel, float *tile) {
  int64_t count = smaller(PRODUCT_COLUMNS(float), s->channels - channel), inner = t->term->plus_identity ? t->inner : 0;
  for (int64_t r = 0; r < rows; r++, tile += PRODUCT_COLUMNS(float)) {
    for (int64_t at = channel; at < inner; at += s->channels)
      add_scaled(smaller(count, inner - at), 1, row[r].a + at, tile);
    if (add)
      add_scaled(count, row[r].scale, tile, row[r].w + channel);
    else
      put_scaled(count, row[r].scale, tile, row[r].w + channel);
  }
}

/* Rows of `a` from row `first` of (o, used tap) on. */
static void pack_product_rows(const squeezing *s, const squeeze_term *t, float *w, int64_t first, int64_t rows,
                              product_row *row, float *packed) {
  int64_t o = first / t->taps, tap = first % t->taps;
  const float *from[PRODUCT_BLOCK];
  for (int64_t r = 0; r < rows; r++) {
    from[r] = (const float *)t->term->a.data + (o * t->own + t->source[tap]) * t->inner;
    row[r] = (product_row){from[r], w + (o * s->taps + t->place[tap]) * s->channels, scale_of(t->term, o)};
    if (++tap == t->taps)
      tap = 0, o++;
  }
  for (int64_t r = 0; r < rows; r += PRODUCT_ROWS)
    pack_columns_float(t->inner, PRODUCT_ROWS, smaller(PRODUCT_ROWS, rows - r), from + r, packed + r * t->inner);
}

static void multiply(const squeezing *s, const squeeze_term *t, bool add, float *w, int64_t group, int64_t o,
                     int64_t outputs, float *packed) {
  float tile[PRODUCT_ROWS * PRODUCT_MOST_COLUMNS] __attribute__((aligned(64)));
  int64_t width = PRODUCT_COLUMNS(float), panels = divide_up(s->channels, width), end = (o + outputs) * t->taps;
  const float *right = t->packed + group * panels * t->inner * width;
  for (int64_t first = o * t->taps; first < end; first += PRODUCT_BLOCK) {
    product_row row[PRODUCT_BLOCK];
    int64_t rows = smaller(PRODUCT_BLOCK, end - first);
    pack_product_rows(s, t, w, first, rows, row, packed);
    for (int64_t j = 0; j < panels; j++)
      for (int64_t r = 0; r < rows; r += PRODUCT_ROWS) {
        tile_float(t->inner, packed + r * t->inner, right + j * t->inner * width, tile);
        finish_tile(s, t, add, smaller(PRODUCT_ROWS, rows - r), row + r, j * width, tile);
      }
  }
}

/* All products of some outputs of a group; whether there was any, so that w is written. */
static bool multiply_all(const squeezing *s, float *w, int64_t group, int64_t o, int64_t outputs, float *packed) {
  bool written = false;
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind != TERM_PRODUCT)
      continue;
    if (!written && t->taps < s->taps) {
      int64_t row = s->taps * s->channels;
      memset(w + o * row, 0, (size_t)(outputs * row) * sizeof *w);
      written = true;
    }
    multiply(s, t, written, w, group, o, outputs, packed);
    written = true;
  }
  return written;
}

/* ---- the other terms, added to sum[column][tap] of output o and a block of channels ---- */

typedef struct {
  float *sum, *pattern, *point, *packed;
} squeeze_buffers;

/* Adds a row of `count` numbers to one tap: to vectors that lie `step` apart. */
static ALWAYS_INLINE void add_to_tap(int64_t count, float scale, const float *row, float *sum, int64_t step) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES, sum += step)
    store_lanes(sum, 0, load_lanes(sum, 0, false) + scale * load_lanes(row, i, false), false);
  if (i < count)
    store_lanes(sum, 0, load_lanes(sum, 0, false) + scale * load_part(row + i, count - i), false);
}

static void add_kernel(const squeezing *s, const squeeze_term *t, int64_t o, channel_block block, float *sum) {
  const float *a = (const float *)t->term->a.data + o * t->own * s->channels + block.first;
  float scale = scale_of(t->term, o);
  for (int64_t tap = 0; tap < t->taps; tap++) /* the next output's */
    for (int64_t i = 0; i < block.count; i += 16)
      __builtin_prefetch(a + (t->own + t->source[tap]) * s->channels + i);
  for (int64_t tap = 0; tap < t->taps; tap++)
    add_to_tap(block.count, scale, a + t->source[tap] * s->channels, sum + t->place[tap] * LANES, s->taps * LANES);
}

static void add_pattern(const squeezing *s, const squeeze_term *t, int64_t o, channel_block block, float *pattern,
                        float *sum) {
  const float *row = (const float *)t->term->a.data + o * s->channels + block.first;
  read_pattern(s, t->term, o, scale_of(t->term, o), pattern);
  for (int64_t column = 0; column < block.columns; column++) {
    float_lanes factor = load_part(row + column * LANES, block.count - column * LANES);
    for (int64_t tap = 0; tap < t->taps; tap++) {
      float *to = sum + t->place[tap] * LANES;
      store_lanes(to, 0, load_lanes(to, 0, false) + pattern[t->place[tap]] * factor, false);
    }
    sum += s->taps * LANES;
  }
}

/* sum[tap] += scale * (`count` of point[e] times deep[tap][e]), for one column. */
static ALWAYS_INLINE void add_column(int count, const squeeze_term *t, float scale, const float *point,
                                     const float *deep, float *sum) {
  const int64_t taps = t->taps, step = t->inner * LANES, *place = t->place;
  float_lanes factor[8];
#pragma GCC unroll 8
  for (int e = 0; e < count; e++)
    factor[e] = scale * load_lanes(point, e * LANES, false);
  for (int64_t tap = 0; tap < taps; tap++, deep += step) {
    float *to = sum + place[tap] * LANES;
    float_lanes even = load_lanes(to, 0, false), odd = {0}; /* two chains of sums wait half as long */
#pragma GCC unroll 8
    for (int e = 0; e < count; e++)
      if (e % 2)
        odd += factor[e] * load_lanes(deep, e * LANES, false);
      else
        even += factor[e] * load_lanes(deep, e * LANES, false);
    store_lanes(to, 0, even + odd, false);
  }
}

static void add_depthwise(const squeezing *s, const squeeze_term *t, int64_t group, int64_t o, channel_block block,
                          float *point, float *sum) {
  const float *deep = t->packed + depthwise_offset(s, t, group, block.first), *row = t->term->a.data;
  float scale = scale_of(t->term, o);
  row += (depthwise_row(s, t, o) * s->channels + block.first) * t->inner;
  for (int64_t i = 0; i < block.count * t->inner; i += 16)
    __builtin_prefetch(row + s->channels * t->inner + i);
  for (int64_t column = 0; column < block.columns; column++) /* all at first: what was just stored is slow to load */
    turn_to_lanes(smaller(LANES, block.count - column * LANES), t->inner, row + column * t->inner * LANES, t->inner,
                  point + column * t->inner * LANES, LANES);
  for (int64_t column = 0; column < block.columns; column++) {
    for (int64_t e = 0, step; e < t->inner; e += step) {
      step = t->inner - e >= 8 ? 8 : t->inner - e >= 4 ? 4 : 1;
      if (step == 8)
        add_column(8, t, scale, point + e * LANES, deep + e * LANES, sum);
      else if (step == 4)
        add_column(4, t, scale, point + e * LANES, deep + e * LANES, sum);
      else
        add_column(1, t, scale, point + e * LANES, deep + e * LANES, sum);
    }
    point += t->inner * LANES;
    deep += t->inner * t->taps * LANES;
    sum += s->taps * LANES;
  }
}

/* ---- the pass ---- */

/* Columns of one output: from w, where products are already, and to it. */
static void read_columns(const squeezing *s, const float *w, channel_block block, float *sum) {
  for (int64_t tap = 0; tap < s->taps; tap++, w += s->channels)
    for (int64_t column = 0; column < block.columns; column++)
      store_lanes(sum, (column * s->taps + tap) * LANES, load_part(w + column * LANES, block.count - column * LANES),
                  false);
}
static void write_columns(const squeezing *s, const float *sum, channel_block block, float *w) {
  for (int64_t tap = 0; tap < s->taps; tap++, w += s->channels)
    for (int64_t column = 0; column < block.columns; column++)
      store_part(w + column * LANES, block.count - column * LANES,
                 load_lanes(sum, (column * s->taps + tap) * LANES, false));
}

static void squeeze_output(const squeezing *s, float *w, int64_t group, int64_t o, channel_block block, bool written,
                           const squeeze_buffers *b) {
  float *row = w + o * s->taps * s->channels + block.first;
  if (written)
    read_columns(s, row, block, b->sum);
  else
    memset(b->sum, 0, (size_t)(s->taps * block.columns * LANES) * sizeof *row);
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind == TERM_KERNEL)
      add_kernel(s, t, o, block, b->sum);
    else if (t->term->kind == TERM_PATTERN)
      add_pattern(s, t, o, block, b->pattern, b->sum);
    else if (t->term->kind == TERM_DEPTHWISE)
      add_depthwise(s, t, group, o, block, b->point, b->sum);
  }
  write_columns(s, b->sum, block, row);
}

static void squeeze_outputs(const squeezing *s, float *w, int64_t group, int64_t o, int64_t outputs,
                            const squeeze_buffers *b) {
  bool written = multiply_all(s, w, group, o, outputs, b->packed);
  for (int64_t block = 0; block < s->blocks; block++)
    for (int64_t k = o; k < o + outputs; k++)
      squeeze_output(s, w, group, k, block_of(s, block), written, b);
}

/* Multiplications of the whole pass, all terms. */
static bool worth_threads(const squeezing *s, const device_term *terms) {
  double each = 0, size = (double)(s->groups * s->outputs * s->taps * s->channels);
  for (int k = 0; k < s->count; k++)
    each += (double)inner_of(s, &terms[k]) + 1;
  return each * size > 5e5;
}

device_status KERNEL(squeeze)(device_context *context, int64_t groups, const device_array *w, const orepa_taps *taps,
                              int count, const device_term *terms) {
  squeezing s;
  if (!KERNEL(squeeze_describe)(&s, groups, w, taps, count, terms))
    return DEVICE_UNSUPPORTED;
  bool parallel = worth_threads(&s, terms);
  int threads = parallel ? omp_get_max_threads() : 1;
  int64_t sum = s.taps * SQUEEZE_CHANNELS, pattern = divide_up(s.taps, 16) * 16,
          point = s.most_inner[1] * SQUEEZE_CHANNELS;
  int64_t each = sum + pattern + point + divide_up(s.most_inner[0], 16) * 16 * PRODUCT_BLOCK;
  squeeze_scratch scratch = {NULL, 0};
  KERNEL(squeeze_lay_out)(&s, &scratch, terms, 0);
  take(&scratch, threads * each, sizeof(float));
  scratch = (squeeze_scratch){context->workspace(context, scratch.used), 0};
  if (!scratch.memory)
    return DEVICE_FAILED;
  KERNEL(squeeze_lay_out)(&s, &scratch, terms, 0);
  float *buffers = take(&scratch, threads * each, sizeof(float));
  int64_t outputs = even_chunk(s.outputs, larger(1, PRODUCT_BLOCK / larger(1, s.taps)), groups < threads ? threads : 1);
  int64_t chunks = divide_up(s.outputs, outputs);
#pragma omp parallel if (parallel) num_threads(threads)
  {
    float *own = buffers + omp_get_thread_num() * each;
    squeeze_buffers b = {own, own + sum, own + sum + pattern, own + sum + pattern + point};
    KERNEL(squeeze_pack_depthwise)(&s);
    pack_products(&s);
#pragma omp barrier
#pragma omp for nowait
    for (int64_t k = 0; k < groups * chunks; k++) {
      int64_t group = k / chunks, first = k % chunks * outputs;
      squeeze_outputs(&s, w->data, group, group * s.outputs + first, smaller(outputs, s.outputs - first), &b);
    }
  }
  return DEVICE_DONE;
}
