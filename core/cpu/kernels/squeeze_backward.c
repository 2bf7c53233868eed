/* squeeze_backward.c: from the gradient dW of a squeezed kernel, the gradients of all its terms.
 *
 * Three kinds of work, each cut so that every number has one writer: a pass over outputs and blocks of channels that
 * reads dW once for all terms but products; products dW . (b + E)^T, whose rows end as the gradient of a product's `a`
 * and, on the way, as that of its scale; and products a^T . dW for the gradients of its `b`. A depthwise term's `b`
 * sums over all outputs: each chunk of them, of a size that depends on the block's shape only, has a partial sum, and
 * these are added in their order. So the number of threads changes no bit.
 *
 * The gradient of a scale is v's share of <dW[o], branch[o]>, taken as <Q[o], last[o]>: Q is the gradient of the
 * branch's last factor without v. No branch's kernel is needed. */
#include <omp.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/squeeze.h"

static bool wants_rows(const device_term *term) {
  return term->da.data || term->dscale.data;
}
static bool is_wanted(const device_term *term) {
  return wants_rows(term) || (term->db.data && term->kind >= TERM_PRODUCT);
}

/* ---- the pass over dW ---- */

/* A few outputs' part of dW under one block of channels, copied together: dw[output][column][tap], and what terms need
 * beside it. */
typedef struct {
  int64_t group, o, outputs; /* o: the first, of all */
  channel_block block;
  float *dw;
  float *pattern;        /* [tap] */
  float *point, *dpoint; /* [e], for one column: from a row of `a`, and its gradient */
  float *scaled;         /* [output][column][e]: rows of `a`, times their scale */
} strip;

/* How many outputs a strip has: so many that it stays in the first cache. */
static int64_t strip_outputs(const squeezing *s) {
  return smaller(8, larger(1, 128 / larger(1, s->taps)));
}

/* dw of a strip's output k under a column and tap. */
static ALWAYS_INLINE float *strip_at(const squeezing *s, const strip *p, int64_t k, int64_t column, int64_t tap) {
  return p->dw + ((k * p->block.columns + column) * s->taps + tap) * LANES;
}

static void copy_strip(const squeezing *s, const float *dw, strip *p) {
  const float *from = dw + p->o * s->taps * s->channels + p->block.first;
  for (int64_t k = 0; k < p->outputs; k++)
    for (int64_t tap = 0; tap < s->taps; tap++, from += s->channels)
      for (int64_t column = 0; column < p->block.columns; column++)
        store_lanes(strip_at(s, p, k, column, tap), 0,
                    load_part(from + column * LANES, p->block.count - column * LANES), false);
}

/* For one row of `a`, where dw's columns under its tap lie `step` apart: da = scale * dw; gives back the sum of dw * a.
 */
static ALWAYS_INLINE float_lanes row_gradient(int64_t count, float scale, const float *dw, int64_t step, const float *a,
                                              float *da) {
  float_lanes sum = {0};
  for (int64_t i = 0; i < count; i += LANES, dw += step) {
    float_lanes d = load_lanes(dw, 0, false);
    sum += d * load_part(a + i, count - i);
    if (da)
      store_part(da + i, count - i, scale * d);
  }
  return sum;
}

static void kernel_gradient(const squeezing *s, const squeeze_term *t, const strip *p) {
  const float *a = t->term->a.data;
  float *da = t->term->da.data;
  for (int64_t k = 0; k < p->outputs; k++) {
    int64_t o = p->o + k, start = o * t->own * s->channels + p->block.first;
    float scale = scale_of(t->term, o);
    float_lanes sum = {0};
    for (int64_t tap = 0; tap < t->taps; tap++) {
      int64_t at = start + t->source[tap] * s->channels;
      sum += row_gradient(p->block.count, scale, strip_at(s, p, k, 0, t->place[tap]), s->taps * LANES, a + at,
                          da ? da + at : NULL);
    }
    for (int64_t tap = t->taps; tap < t->own && da; tap++)
      memset(da + start + t->source[tap] * s->channels, 0, (size_t)p->block.count * sizeof *da);
    t->sums[o] += total(sum);
  }
}

static void pattern_gradient(const squeezing *s, const squeeze_term *t, const strip *p) {
  float q[SQUEEZE_CHANNELS]; /* the gradient of a's row without scale */
  for (int64_t k = 0; k < p->outputs; k++) {
    int64_t o = p->o + k, at = o * s->channels + p->block.first;
    read_pattern(s, t->term, o, 1, p->pattern);
    for (int64_t column = 0; column < p->block.columns; column++) {
      const float *dw = strip_at(s, p, k, column, 0);
      float_lanes sum = {0};
      for (int64_t tap = 0; tap < t->taps; tap++)
        sum += p->pattern[t->place[tap]] * load_lanes(dw, t->place[tap] * LANES, false);
      store_lanes(q, column * LANES, sum, false);
    }
    float *da = t->term->da.data;
    t->sums[o] += total(row_gradient(p->block.count, scale_of(t->term, o), q, LANES,
                                     (const float *)t->term->a.data + at, da ? da + at : NULL));
  }
}

/* For one column and `count` rows e: q[e] = sum over taps of dw[tap] * deep[tap][e]; dpoint[e] = scale * q[e]; gives
 * back the sum of q[e] * point[e]. */
static ALWAYS_INLINE float_lanes point_gradient(int count, const squeeze_term *t, float scale, const float *dw,
                                                const float *deep, const float *point, float *dpoint) {
  float_lanes q[8], sum = {0};
#pragma GCC unroll 8
  for (int e = 0; e < count; e++)
    q[e] = (float_lanes){0};
  for (int64_t tap = 0; tap < t->taps; tap++, deep += t->inner * LANES) {
    float_lanes d = load_lanes(dw, t->place[tap] * LANES, false);
#pragma GCC unroll 8
    for (int e = 0; e < count; e++)
      q[e] += d * load_lanes(deep, e * LANES, false);
  }
#pragma GCC unroll 8
  for (int e = 0; e < count; e++) {
    sum += q[e] * load_lanes(point, e * LANES, false);
    store_lanes(dpoint, e * LANES, scale * q[e], false);
  }
  return sum;
}

/* The same for all e; `deep` begins with the column. */
static float_lanes column_gradient(const squeeze_term *t, const strip *p, float scale, const float *dw,
                                   const float *deep) {
  float_lanes sum = {0};
  for (int64_t e = 0, step; e < t->inner; e += step) {
    int64_t at = e * LANES;
    step = t->inner - e >= 8 ? 8 : t->inner - e >= 4 ? 4 : 1;
    if (step == 8)
      sum += point_gradient(8, t, scale, dw, deep + at, p->point + at, p->dpoint + at);
    else if (step == 4)
      sum += point_gradient(4, t, scale, dw, deep + at, p->point + at, p->dpoint + at);
    else
      sum += point_gradient(1, t, scale, dw, deep + at, p->point + at, p->dpoint + at);
  }
  return sum;
}

/* The gradients of a depthwise term's `a` and scale for output k of a strip, and its part of `scaled`. */
static void depthwise_row_gradient(const squeezing *s, const squeeze_term *t, const strip *p, int64_t k) {
  int64_t o = p->o + k, inner = t->inner, at = (depthwise_row(s, t, o) * s->channels + p->block.first) * inner;
  const float *deep = t->packed + depthwise_offset(s, t, p->group, p->block.first), *a = t->term->a.data;
  float *da = t->term->da.data, *scaled = p->scaled + k * p->block.columns * inner * LANES;
  float scale = scale_of(t->term, o);
  float_lanes sum = {0};
  for (int64_t column = 0; column < p->block.columns; column++, at += LANES * inner) {
    int64_t channels = smaller(LANES, p->block.count - column * LANES);
    turn_to_lanes(channels, inner, a + at, inner, p->point, LANES);
    if (wants_rows(t->term))
      sum += column_gradient(t, p, scale, strip_at(s, p, k, column, 0), deep + column * inner * t->taps * LANES);
    if (da)
      turn_from_lanes(channels, inner, p->dpoint, da + at);
    if (t->partial)
      for (int64_t e = 0; e < inner; e++, scaled += LANES)
        store_lanes(scaled, 0, scale * load_lanes(p->point, e * LANES, false), false);
  }
  t->sums[o] += total(sum);
}

/* partial[tap][e] += sum over the strip's outputs of scaled[e] * dw[tap], for one column, `es` rows e and `taps` taps.
 */
static ALWAYS_INLINE void deep_gradient(int es, int taps, const squeezing *s, const squeeze_term *t, const strip *p,
                                        int64_t column, int64_t e, int64_t tap, float *partial) {
  float_lanes sum[3][4];
#pragma GCC unroll 3
  for (int y = 0; y < taps; y++)
#pragma GCC unroll 4
    for (int x = 0; x < es; x++)
      sum[y][x] = load_lanes(partial, (y * t->inner + x) * LANES, false);
  const float *scaled = p->scaled + (column * t->inner + e) * LANES, *dw[3];
  int64_t scaled_step = p->block.columns * t->inner * LANES, dw_step = p->block.columns * s->taps * LANES;
#pragma GCC unroll 3
  for (int y = 0; y < taps; y++)
    dw[y] = strip_at(s, p, 0, column, t->place[tap + y]);
  for (int64_t k = 0; k < p->outputs; k++, scaled += scaled_step) {
    float_lanes factor[4];
#pragma GCC unroll 4
    for (int x = 0; x < es; x++)
      factor[x] = load_lanes(scaled, x * LANES, false);
#pragma GCC unroll 3
    for (int y = 0; y < taps; y++) {
      float_lanes d = load_lanes(dw[y], k * dw_step, false);
#pragma GCC unroll 4
      for (int x = 0; x < es; x++)
        sum[y][x] += factor[x] * d;
    }
  }
#pragma GCC unroll 3
  for (int y = 0; y < taps; y++)
#pragma GCC unroll 4
    for (int x = 0; x < es; x++)
      store_lanes(partial, (y * t->inner + x) * LANES, sum[y][x], false);
}

/* `partial` begins with the strip's block. */
static void add_deep_gradients(const squeezing *s, const squeeze_term *t, const strip *p, float *partial) {
  for (int64_t column = 0; column < p->block.columns; column++)
    for (int64_t tap = 0, taps; tap < t->taps; tap += taps) {
      taps = t->taps - tap >= 3 ? 3 : 1;
      for (int64_t e = 0, es; e < t->inner; e += es) {
        float *to = partial + ((column * t->taps + tap) * t->inner + e) * LANES;
        es = t->inner - e >= 4 ? 4 : 1;
        if (es == 4 && taps == 3)
          deep_gradient(4, 3, s, t, p, column, e, tap, to);
        else if (es == 4)
          deep_gradient(4, 1, s, t, p, column, e, tap, to);
        else if (taps == 3)
          deep_gradient(1, 3, s, t, p, column, e, tap, to);
        else
          deep_gradient(1, 1, s, t, p, column, e, tap, to);
      }
    }
}

static void depthwise_gradient(const squeezing *s, const squeeze_term *t, const strip *p, int64_t chunk) {
  for (int64_t k = 0; k < p->outputs; k++)
    depthwise_row_gradient(s, t, p, k);
  if (t->partial)
    add_deep_gradients(s, t, p, t->partial + depthwise_offset(s, t, chunk * s->groups + p->group, p->block.first));
}

/* Of one group and chunk of outputs. */
static void pass_outputs(const squeezing *s, const float *dw, int64_t chunk, int64_t outputs, strip *p) {
  int64_t end = p->o + outputs, first = p->o, most = strip_outputs(s);
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind != TERM_PRODUCT)
      memset(t->sums + first, 0, (size_t)outputs * sizeof *t->sums);
    if (t->partial)
      memset(t->partial + depthwise_offset(s, t, chunk * s->groups + p->group, 0), 0,
             (size_t)depthwise_offset(s, t, 1, 0) * sizeof *t->partial);
  }
  for (int64_t block = 0; block < s->blocks; block++) {
    p->block = block_of(s, block);
    for (p->o = first; p->o < end; p->o += most) {
      p->outputs = smaller(most, end - p->o);
      copy_strip(s, dw, p);
      for (int k = 0; k < s->count; k++) {
        const squeeze_term *t = &s->terms[k];
        if (!is_wanted(t->term))
          continue;
        if (t->term->kind == TERM_KERNEL)
          kernel_gradient(s, t, p);
        else if (t->term->kind == TERM_PATTERN)
          pattern_gradient(s, t, p);
        else if (t->term->kind == TERM_DEPTHWISE)
          depthwise_gradient(s, t, p, chunk);
      }
    }
  }
}

/* One e of a column: the used taps of `channels` kernels that lie `row` apart; the others are zero. */
static void put_taps(const squeeze_term *t, int64_t channels, const float *from, float *to, int64_t row) {
  for (int64_t i = 0; i < channels; i++, to += row) {
    memset(to, 0, (size_t)t->own * sizeof *to);
    for (int64_t tap = 0; tap < t->taps; tap++)
      to[t->source[tap]] = from[tap * t->inner * LANES + i];
  }
}

/* Adds a depthwise term's chunks in their order and turns the sum back to where it belongs. */
static void finish_deep_gradients(const squeezing *s, int64_t chunks) {
  int64_t columns = s->padded / LANES;
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (!t->partial)
      continue;
    int64_t row = t->inner * t->taps, next = depthwise_offset(s, t, s->groups, 0);
#pragma omp for nowait
    for (int64_t n = 0; n < s->groups * columns; n++) {
      float *sum = t->partial + n * row * LANES;
      for (int64_t chunk = 1; chunk < chunks; chunk++)
        add_scaled(row * LANES, 1, sum + chunk * next, sum);
      int64_t first = n % columns * LANES, channels = smaller(LANES, s->channels - first), whole = t->inner * t->own;
      float *to = (float *)t->term->db.data + (n / columns * s->channels + first) * whole;
      for (int64_t e = 0; e < t->inner; e++, sum += LANES, to += t->own)
        if (t->taps == t->own)
          turn_matrix(t->taps, channels, sum, t->inner * LANES, to, whole);
        else
          put_taps(t, channels, sum, to, whole);
    }
  }
}

/* ---- products: a's gradient and the scale's, dW . (b + E)^T ---- */

/* b of each product whose `a` or scale wants a gradient, in panels of its rows. */
static void pack_products(const squeezing *s) {
  int64_t width = PRODUCT_COLUMNS(float);
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind != TERM_PRODUCT || !wants_rows(t->term))
      continue;
    int64_t panels = divide_up(t->inner, width);
#pragma omp for nowait
    for (int64_t n = 0; n < s->groups * panels; n++) {
      const float *row[PRODUCT_MOST_COLUMNS];
      int64_t first = n % panels * width, count = smaller(width, t->inner - first);
      for (int64_t r = 0; r < count; r++)
        row[r] = (const float *)t->term->b.data + (n / panels * t->inner + first + r) * s->channels;
      pack_panel(s->channels, width, count, row, t->packed + n * width * s->channels);
    }
  }
}

/* A row of a product: its places in dW and `a`, where it goes (or NULL), its scale, and the sum of <q, a>. */
typedef struct {
  const float *dw, *a;
  float *da, scale;
  float_lanes sum;
} product_row;

/* Ends rows of a tile whose columns are channels t from `first` on: q += the identity's part, dw[channel t mod I/G];
 * a's gradient is scale * q, the scale's q . a. */
static void finish_tile(const squeezing *s, const squeeze_term *t, int64_t rows, product_row *row, int64_t first,
                        float *q) {
  int64_t count = smaller(PRODUCT_COLUMNS(float), t->inner - first);
  int64_t copied = t->term->plus_identity && s->channels ? count : 0, start = copied ? first % s->channels : 0;
  for (int64_t r = 0; r < rows; r++, q += PRODUCT_COLUMNS(float)) {
    for (int64_t j = 0, channel = start, run; j < copied; j += run, channel = 0) {
      run = smaller(s->channels - channel, copied - j);
      add_scaled(run, 1, row[r].dw + channel, q + j);
    }
    row[r].sum += row_gradient(count, row[r].scale, q, LANES, row[r].a + first, row[r].da ? row[r].da + first : NULL);
  }
}

/* Rows of dW that belong to rows of (o, used tap) from `first` on. */
static void pack_dw_rows(const squeezing *s, const squeeze_term *t, const float *dw, int64_t first, int64_t rows,
                         product_row *row, float *packed) {
  int64_t o = first / t->taps, tap = first % t->taps;
  const float *from[PRODUCT_BLOCK], *a = t->term->a.data;
  float *da = t->term->da.data;
  for (int64_t r = 0; r < rows; r++) {
    int64_t at = (o * t->own + t->source[tap]) * t->inner;
    from[r] = dw + (o * s->taps + t->place[tap]) * s->channels;
    row[r] = (product_row){from[r], a + at, da ? da + at : NULL, scale_of(t->term, o), {0}};
    if (++tap == t->taps)
      tap = 0, o++;
  }
  for (int64_t r = 0; r < rows; r += PRODUCT_ROWS)
    pack_panel(s->channels, PRODUCT_ROWS, smaller(PRODUCT_ROWS, rows - r), from + r, packed + r * s->channels);
}

static void clear_unused_rows(const squeeze_term *t, int64_t o, int64_t outputs) {
  float *da = t->term->da.data;
  for (int64_t k = o; k < o + outputs && da; k++)
    for (int64_t tap = t->taps; tap < t->own; tap++)
      memset(da + (k * t->own + t->source[tap]) * t->inner, 0, (size_t)t->inner * sizeof *da);
}

static void product_rows_gradient(const squeezing *s, const squeeze_term *t, const float *dw, int64_t group, int64_t o,
                                  int64_t outputs, float *packed) {
  float tile[PRODUCT_ROWS * PRODUCT_MOST_COLUMNS] __attribute__((aligned(64)));
  int64_t width = PRODUCT_COLUMNS(float), panels = divide_up(t->inner, width), end = (o + outputs) * t->taps;
  const float *right = t->packed + group * panels * s->channels * width;
  memset(t->sums + o, 0, (size_t)outputs * sizeof *t->sums);
  clear_unused_rows(t, o, outputs);
  for (int64_t first = o * t->taps; first < end && panels; first += PRODUCT_BLOCK) {
    product_row row[PRODUCT_BLOCK];
    int64_t rows = smaller(PRODUCT_BLOCK, end - first);
    pack_dw_rows(s, t, dw, first, rows, row, packed);
    for (int64_t j = 0; j < panels; j++)
      for (int64_t r = 0; r < rows; r += PRODUCT_ROWS) {
        tile_float(s->channels, packed + r * s->channels, right + j * s->channels * width, tile,
                   fetch_part(right + (j + 1) * s->channels * width, s->channels * width, r / PRODUCT_ROWS,
                              divide_up(rows, PRODUCT_ROWS), s->channels));
        finish_tile(s, t, smaller(PRODUCT_ROWS, rows - r), row + r, j * width, tile);
      }
    for (int64_t r = 0; r < rows; r++)
      t->sums[(first + r) / t->taps] += total(row[r].sum);
  }
}

/* ---- products: b's gradient, a^T . dW over all outputs of a group, with their scales ---- */

/* Some of b's rows and columns in one group. */
typedef struct {
  int64_t group, row, rows, column, columns;
} product_block;

/* Steps of the sum: rows of (o, used tap) in `a` and dW, and the scale of each. */
typedef struct {
  int64_t count;
  const float *a[PRODUCT_DEPTH], *dw[PRODUCT_DEPTH];
  float scale[PRODUCT_DEPTH];
} product_steps;

static void find_steps(const squeezing *s, const squeeze_term *t, const float *dw, int64_t first,
                       product_steps *steps) {
  int64_t taps = larger(1, t->taps), o = first / taps, tap = first % taps;
  for (int64_t k = 0; k < steps->count; k++) {
    steps->a[k] = (const float *)t->term->a.data + (o * t->own + t->source[tap]) * t->inner;
    steps->dw[k] = dw + (o * s->taps + t->place[tap]) * s->channels;
    steps->scale[k] = scale_of(t->term, o);
    if (++tap == t->taps)
      tap = 0, o++;
  }
}

static void product_block_gradient(const squeezing *s, const squeeze_term *t, const float *dw, const product_block *b,
                                   float *packed) {
  float tile[PRODUCT_ROWS * PRODUCT_MOST_COLUMNS] __attribute__((aligned(64)));
  int64_t start = b->group * s->outputs * t->taps, end = start + s->outputs * t->taps, width = PRODUCT_COLUMNS(float);
  float *panel = packed + PRODUCT_BLOCK * PRODUCT_DEPTH;
  float *db = (float *)t->term->db.data + (b->group * t->inner + b->row) * s->channels;
  int64_t first = start;
  do {
    product_steps steps = {.count = smaller(PRODUCT_DEPTH, end - first)};
    find_steps(s, t, dw, first, &steps);
    for (int64_t r = 0; r < b->rows; r += PRODUCT_ROWS)
      pack_rows(steps.count, PRODUCT_ROWS, t->inner - b->row - r, steps.a, b->row + r, steps.scale,
                packed + r * steps.count);
    for (int64_t j = b->column; j < b->column + b->columns; j += width) {
      pack_rows(steps.count, width, s->channels - j, steps.dw, j, NULL, panel);
      for (int64_t r0 = 0; r0 < b->rows; r0 += PRODUCT_ROWS) {
        tile_float(steps.count, packed + r0 * steps.count, panel, tile, (fetch){(const char *)panel, 0});
        for (int64_t r = 0; r < smaller(PRODUCT_ROWS, b->rows - r0); r++)
          if (first > start)
            add_scaled(smaller(width, s->channels - j), 1, tile + r * width, db + (r0 + r) * s->channels + j);
          else
            put_scaled(smaller(width, s->channels - j), 1, tile + r * width, db + (r0 + r) * s->channels + j);
      }
    }
    first += steps.count;
  } while (first < end);
}

/* ---- all of it ---- */

/* How the three kinds of work are cut. */
typedef struct {
  int threads;
  int64_t pass, pass_chunks; /* outputs of a chunk of the pass, chunks of a group */
  int64_t rows, row_chunks;  /* the same for products by rows */
  int64_t buffer;            /* floats of each thread's scratch */
} division;

static division divide(const squeezing *s, int threads) {
  division d = {.threads = threads};
  d.pass = larger(8, divide_up(s->outputs, 16)); /* not by threads: partial sums depend on it */
  d.pass_chunks = larger(1, divide_up(s->outputs, d.pass));
  d.rows = even_chunk(s->outputs, larger(1, PRODUCT_BLOCK / larger(1, s->taps)), s->groups < threads ? threads : 1);
  d.row_chunks = divide_up(s->outputs, d.rows);
  int64_t most = strip_outputs(s), point = s->most_inner[1] * LANES;
  int64_t strip_size =
      most * (s->taps + s->most_inner[1]) * SQUEEZE_CHANNELS + 2 * point + divide_up(s->taps, LANES) * LANES;
  int64_t rows_size = PRODUCT_BLOCK * divide_up(s->channels, 16) * 16;
  int64_t block_size = (PRODUCT_BLOCK + PRODUCT_COLUMNS(float)) * PRODUCT_DEPTH;
  d.buffer = larger(strip_size, s->most_inner[0] ? larger(rows_size, block_size) : 0);
  return d;
}

static void pass_gradients(const squeezing *s, const float *dw, const division *d, float *buffer) {
  int64_t most = strip_outputs(s);
  strip p = {.dw = buffer};
  p.scaled = p.dw + most * s->taps * SQUEEZE_CHANNELS;
  p.point = p.scaled + most * s->most_inner[1] * SQUEEZE_CHANNELS;
  p.dpoint = p.point + s->most_inner[1] * LANES;
  p.pattern = p.dpoint + s->most_inner[1] * LANES;
#pragma omp for nowait
  for (int64_t k = 0; k < s->groups * d->pass_chunks; k++) {
    int64_t first = k % d->pass_chunks * d->pass;
    p.group = k / d->pass_chunks;
    p.o = p.group * s->outputs + first;
    pass_outputs(s, dw, k % d->pass_chunks, smaller(d->pass, s->outputs - first), &p);
  }
}

static void product_gradients(const squeezing *s, const squeeze_term *t, const float *dw, const division *d,
                              float *buffer) {
  if (wants_rows(t->term)) {
#pragma omp for nowait
    for (int64_t k = 0; k < s->groups * d->row_chunks; k++) {
      int64_t group = k / d->row_chunks, first = k % d->row_chunks * d->rows;
      product_rows_gradient(s, t, dw, group, group * s->outputs + first, smaller(d->rows, s->outputs - first), buffer);
    }
  }
  if (t->term->db.data) {
    /* Blocks of rows, each with all columns; where these are too few for the threads, with some. */
    int64_t rows = even_chunk(t->inner, PRODUCT_BLOCK, 1), down = divide_up(t->inner, rows), blocks = s->groups * down;
    int64_t panels = divide_up(s->channels, PRODUCT_COLUMNS(float)), parts = blocks < 4 * d->threads ? d->threads : 1;
    int64_t columns = even_chunk(panels, larger(1, panels), parts) * PRODUCT_COLUMNS(float);
    int64_t across = divide_up(s->channels, columns);
#pragma omp for nowait
    for (int64_t k = 0; k < blocks * across; k++) {
      int64_t row = k / across % down * rows, column = k % across * columns;
      product_block b = {k / across / down, row, smaller(rows, t->inner - row), column,
                         smaller(columns, s->channels - column)};
      product_block_gradient(s, t, dw, &b, buffer);
    }
  }
}

static void put_scale_gradient(const squeezing *s, const squeeze_term *t) {
  const device_array *to = &t->term->dscale;
  int64_t outputs = s->groups * s->outputs;
  float *data = to->data;
  if (to->shape[0] == outputs) {
    for (int64_t o = 0; o < outputs; o++)
      data[o * to->strides[0]] = (float)t->sums[o];
    return;
  }
  double all = 0;
  for (int64_t o = 0; o < outputs; o++)
    all += t->sums[o];
  *data = (float)all;
}

device_status KERNEL(squeeze_backward)(device_context *context, int64_t groups, const device_array *dw,
                                       const orepa_taps *taps, int count, const device_term *terms) {
  squeezing s;
  if (!KERNEL(squeeze_describe)(&s, groups, dw, taps, count, terms))
    return DEVICE_UNSUPPORTED;
  bool parallel = 2 * s.work > SQUEEZE_PARALLEL;
  division d = divide(&s, parallel ? omp_get_max_threads() : 1);
  squeeze_scratch scratch = {NULL, 0};
  KERNEL(squeeze_lay_out)(&s, &scratch, terms, d.pass_chunks);
  take(&scratch, d.threads * d.buffer, sizeof(float));
  scratch = (squeeze_scratch){context->workspace(context, scratch.used), 0};
  if (!scratch.memory)
    return DEVICE_FAILED;
  KERNEL(squeeze_lay_out)(&s, &scratch, terms, d.pass_chunks);
  float *buffers = take(&scratch, d.threads * d.buffer, sizeof(float));
#pragma omp parallel if (parallel) num_threads(d.threads)
  {
    float *buffer = buffers + omp_get_thread_num() * d.buffer;
    KERNEL(squeeze_pack_depthwise)(&s);
    pack_products(&s);
#pragma omp barrier
    pass_gradients(&s, dw->data, &d, buffer);
    for (int k = 0; k < count; k++)
      if (s.terms[k].term->kind == TERM_PRODUCT)
        product_gradients(&s, &s.terms[k], dw->data, &d, buffer);
#pragma omp barrier
    finish_deep_gradients(&s, d.pass_chunks);
  }
  for (int k = 0; k < count; k++)
    if (terms[k].dscale.data)
      put_scale_gradient(&s, &s.terms[k]);
  return DEVICE_DONE;
}
