/* squeeze.c: all terms of a block added up to its one kernel.
 *
 * An output's part of the kernel, one block of channels wide, is summed up term by term in a small array that never
 * leaves the first cache, and written once. Only products are computed before that, into scratch, for as many outputs
 * as stay in the second cache: no term's own kernel is ever in memory. While they are multiplied, the other terms' rows
 * are fetched. */
#include "cpu/kernels/squeeze.h"

#include <omp.h>

#include "cpu/kernels/kernels.h"

/* ---- products ---- */

/* b of each product in panels of its columns. Row by row: so it is read as it lies in memory. */
static void pack_products(const squeezing *s) {
  const int64_t width = PRODUCT_COLUMNS(float);
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind != TERM_PRODUCT)
      continue;
#pragma omp for nowait
    for (int64_t n = 0; n < s->groups * t->inner; n++) {
      const float *row = (const float *)t->term->b.data + n * s->channels;
      float *panel = t->packed + n / t->inner * packed_size(s->channels, width, t->inner) + n % t->inner * width;
      for (int64_t first = 0; first < s->channels; first += width, panel += t->inner * width)
        pack_step(width, s->channels - first, 1, row + first, panel);
    }
  }
}

/* Some outputs of a group: what is worked on at a time, and what is fetched on the way. */
typedef struct {
  int64_t group, o, outputs; /* o: the first, of all */
  float *products;           /* their sum: [output][tap][channel], rows `row` apart; w itself where nothing streams */
  int64_t row;
  fetch_list later;
} output_chunk;

/* A row of a product: where it goes, and its scale. */
typedef struct {
  float *sum, scale;
} product_row;

/* Ends rows of a tile whose columns are channels from `channel` on: multiplied by the scale, put or added to the sum.
 */
static void finish_tile(bool add, int64_t rows, const product_row *row, int64_t channel, const float *tile) {
  const int64_t width = PRODUCT_COLUMNS(float);
  for (int64_t r = 0; r < rows; r++, tile += width)
    if (add)
      add_scaled(width, row[r].scale, tile, row[r].sum + channel);
    else
      put_scaled(width, row[r].scale, tile, row[r].sum + channel);
}

/* The identity's part of a row: scale * a[o, t, tap] put or added to each channel i = t mod I/G. */
static void begin_row(const squeezing *s, const squeeze_term *t, bool add, const float *a, product_row row,
                      int64_t padded) {
  if (!add)
    memset(row.sum, 0, (size_t)padded * sizeof *row.sum);
  for (int64_t at = 0; at < t->inner && s->channels; at += s->channels)
    add_scaled(smaller(s->channels, t->inner - at), row.scale, a + at, row.sum);
}

/* Rows of `a` from row `first` of the chunk's (o, used tap) on; with an identity their sums begin here, while they are
 * near. */
static void pack_product_rows(const squeezing *s, const squeeze_term *t, const output_chunk *c, bool add, int64_t first,
                              int64_t rows, product_row *row, float *packed) {
  int64_t k = first / t->taps, tap = first % t->taps;
  const float *from[PRODUCT_BLOCK];
  for (int64_t r = 0; r < rows; r++) {
    from[r] = (const float *)t->term->a.data + ((c->o + k) * t->own + t->source[tap]) * t->inner;
    row[r] = (product_row){c->products + (k * s->taps + t->place[tap]) * c->row, scale_of(t->term, c->o + k)};
    if (t->term->plus_identity)
      begin_row(s, t, add, from[r], row[r], c->row);
    if (++tap == t->taps)
      tap = 0, k++;
  }
  for (int64_t r = 0; r < rows; r += PRODUCT_ROWS)
    pack_panel(t->inner, PRODUCT_ROWS, smaller(PRODUCT_ROWS, rows - r), from + r, packed + r * t->inner);
}

/* Panels are read once for each block of rows: while one is multiplied, every other tile asks for a part of the next
 * one, and the tiles between them for what comes after the products. */
static void multiply(const squeezing *s, const squeeze_term *t, bool add, output_chunk *c, float *packed) {
  float tile[PRODUCT_ROWS * PRODUCT_MOST_COLUMNS] __attribute__((aligned(64)));
  int64_t width = PRODUCT_COLUMNS(float), panels = divide_up(s->channels, width), all = c->outputs * t->taps;
  const float *right = t->packed + c->group * panels * t->inner * width;
  for (int64_t first = 0; first < all; first += PRODUCT_BLOCK) {
    product_row row[PRODUCT_BLOCK];
    int64_t rows = smaller(PRODUCT_BLOCK, all - first), pieces = divide_up(rows, PRODUCT_ROWS);
    pack_product_rows(s, t, c, add, first, rows, row, packed);
    for (int64_t j = 0; j < panels; j++) {
      const float *panel = right + j * t->inner * width, *next = right + (j + 1) % panels * t->inner * width;
      for (int64_t k = 0; k < pieces; k++) {
        int64_t r = k * PRODUCT_ROWS;
        fetch part = k % 2 ? fetch_next(&c->later, t->inner)
                           : fetch_part(next, t->inner * width, k / 2, divide_up(pieces, 2), t->inner);
        tile_float(false, t->inner, packed + r * t->inner, panel, tile, part);
        finish_tile(add || t->term->plus_identity, smaller(PRODUCT_ROWS, rows - r), row + r, j * width, tile);
      }
    }
  }
}

/* What is read after the products of a chunk: the other terms' rows, and a product's rows of the chunk that begins with
 * output `next`. */
static void list_later(const squeezing *s, output_chunk *c, int64_t next) {
  int64_t outputs = larger(0, smaller(c->outputs, (c->group + 1) * s->outputs - next)), tiles = 0;
  c->later.arrays = c->later.array = 0;
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    const float *a = t->term->a.data;
    int64_t size = output_size(s, t);
    if (t->term->kind == TERM_PRODUCT) {
      fetch_add(&c->later, a + next * size, outputs * size);
      tiles += divide_up(s->channels, PRODUCT_COLUMNS(float)) * (c->outputs * t->taps / PRODUCT_ROWS / 2);
    } else {
      fetch_add(&c->later, a + c->o * size, c->outputs * size);
    }
  }
  fetch_spread(&c->later, tiles);
}

/* All products of a chunk; whether there was any. */
static bool multiply_all(const squeezing *s, output_chunk *c, float *packed) {
  bool written = false;
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind != TERM_PRODUCT)
      continue;
    if (!written && t->taps < s->taps) {
      memset(c->products, 0, (size_t)(c->outputs * s->taps * c->row) * sizeof *c->products);
      written = true;
    }
    multiply(s, t, written, c, packed);
    written = true;
  }
  return written;
}

/* ---- the other terms, added to sum[column][tap] of output o and a block of channels ---- */

typedef struct {
  float *sum, *pattern, *point, *products, *packed;
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

/* Columns of one output: from the products, which are padded to whole columns, and to w. */
static void read_columns(const squeezing *s, const float *products, int64_t row, channel_block block, float *sum) {
  for (int64_t tap = 0; tap < s->taps; tap++, products += row)
    for (int64_t column = 0; column < block.columns; column++)
      store_lanes(sum, (column * s->taps + tap) * LANES, load_lanes(products, column * LANES, false), false);
}
static void write_columns(const squeezing *s, const float *sum, channel_block block, float *w) {
  if (STREAMS && s->channels % LANES == 0 && (uintptr_t)w % 64 == 0) {
    for (int64_t tap = 0; tap < s->taps; tap++, w += s->channels)
      for (int64_t column = 0; column < block.columns; column++)
        stream_lanes(w + column * LANES, load_lanes(sum, (column * s->taps + tap) * LANES, false));
    return;
  }
  for (int64_t tap = 0; tap < s->taps; tap++, w += s->channels)
    for (int64_t column = 0; column < block.columns; column++)
      store_part(w + column * LANES, block.count - column * LANES,
                 load_lanes(sum, (column * s->taps + tap) * LANES, false));
}

static void squeeze_output(const squeezing *s, float *w, const output_chunk *c, int64_t k, channel_block block,
                           bool written, const squeeze_buffers *b) {
  int64_t o = c->o + k;
  if (written)
    read_columns(s, c->products + k * s->taps * c->row + block.first, c->row, block, b->sum);
  else
    memset(b->sum, 0, (size_t)(s->taps * block.columns * LANES) * sizeof *b->sum);
  for (int n = 0; n < s->count; n++) {
    const squeeze_term *t = &s->terms[n];
    if (t->term->kind == TERM_KERNEL)
      add_kernel(s, t, o, block, b->sum);
    else if (t->term->kind == TERM_PATTERN)
      add_pattern(s, t, o, block, b->pattern, b->sum);
    else if (t->term->kind == TERM_DEPTHWISE)
      add_depthwise(s, t, c->group, o, block, b->point, b->sum);
  }
  write_columns(s, b->sum, block, w + o * s->taps * s->channels + block.first);
}

static void squeeze_chunk(const squeezing *s, float *w, output_chunk *c, int64_t next, const squeeze_buffers *b) {
  c->products = b->products ? b->products : w + c->o * s->taps * s->channels;
  list_later(s, c, next);
  bool written = multiply_all(s, c, b->packed);
  for (int64_t block = 0; block < s->blocks; block++)
    for (int64_t k = 0; k < c->outputs; k++)
      squeeze_output(s, w, c, k, block_of(s, block), written, b);
}

/* How outputs are cut into chunks, and what a thread's scratch holds, in floats. */
typedef struct {
  int64_t outputs, chunks; /* of a chunk; chunks of a group */
  int64_t row; /* of the products: those of w, or whole tiles and more, as rows a power of two apart share cache sets */
  int64_t sum, pattern, point, products, packed, all;
} division;

static division divide(const squeezing *s, const device_term *terms) {
  bool in_place = !STREAMS && s->channels % PRODUCT_COLUMNS(float) == 0;
  division d = {.row = in_place ? s->channels : packed_size(s->channels, PRODUCT_COLUMNS(float), 1) + 16};
  d.outputs = chunk_outputs(s);
  d.chunks = divide_up(s->outputs, d.outputs);
  d.sum = s->taps * SQUEEZE_CHANNELS;
  d.pattern = divide_up(s->taps, 16) * 16;
  d.point = s->most_inner[1] * SQUEEZE_CHANNELS;
  for (int k = 0; k < s->count; k++)
    if (terms[k].kind == TERM_PRODUCT && !in_place)
      d.products = d.outputs * s->taps * d.row;
  d.packed = divide_up(s->most_inner[0], 16) * 16 * PRODUCT_BLOCK;
  d.all = d.sum + d.pattern + d.point + d.products + d.packed;
  return d;
}

static squeeze_buffers cut(const division *d, float *memory) {
  squeeze_buffers b = {.sum = memory};
  b.pattern = b.sum + d->sum;
  b.point = b.pattern + d->pattern;
  b.packed = b.point + d->point;
  b.products = d->products ? b.packed + d->packed : NULL;
  return b;
}

device_status KERNEL(squeeze)(device_context *context, int64_t groups, const device_array *w, const orepa_taps *taps,
                              int count, const device_term *terms) {
  squeezing s;
  if (!KERNEL(squeeze_describe)(&s, groups, w, taps, count, terms))
    return DEVICE_UNSUPPORTED;
  bool parallel = s.work > SQUEEZE_PARALLEL;
  int threads = parallel ? omp_get_max_threads() : 1;
  division d = divide(&s, terms);
  squeeze_scratch scratch = {NULL, 0};
  KERNEL(squeeze_lay_out)(&s, &scratch, terms, 0);
  take(&scratch, threads * d.all, sizeof(float));
  scratch = (squeeze_scratch){context->workspace(context, scratch.used), 0};
  if (!scratch.memory)
    return DEVICE_FAILED;
  KERNEL(squeeze_lay_out)(&s, &scratch, terms, 0);
  float *buffers = take(&scratch, threads * d.all, sizeof(float));
#pragma omp parallel if (parallel) num_threads(threads)
  {
    squeeze_buffers b = cut(&d, buffers + omp_get_thread_num() * d.all);
    KERNEL(squeeze_pack_depthwise)(&s);
    pack_products(&s);
#pragma omp barrier
#pragma omp for schedule(static, 1) nowait
    for (int64_t k = 0; k < groups * d.chunks; k++) {
      int64_t first = k % d.chunks * d.outputs, o = k / d.chunks * s.outputs + first;
      output_chunk c = {.group = k / d.chunks, .o = o, .outputs = smaller(d.outputs, s.outputs - first), .row = d.row};
      squeeze_chunk(&s, w->data, &c, o + threads * d.outputs, &b);
    }
    stream_end();
  }
  return DEVICE_DONE;
}
