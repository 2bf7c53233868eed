/* squeeze_backward.c: from the gradient dW of a squeezed kernel, the gradients of all its terms.
 *
 * Three kinds of work, each cut so that every number has one writer. Products dW . (b + E)^T for some outputs, whose
 * rows are the gradient of a product's `a` and, on the way, that of its scale; then, with the same outputs' dW still
 * near, a pass in blocks of channels for all other terms; and products a^T . dW for the gradients of a product's `b`.
 * Products are in squeeze_products.c. A depthwise term's `b` sums over all outputs: each chunk of them, of a size that
 * depends on the block's shape only, has a partial sum, and these are added in their order. So the number of threads
 * changes no bit.
 *
 * The gradient of a scale is v's share of <dW[o], branch[o]>, taken as <Q[o], last[o]>: Q is the gradient of the
 * branch's last factor without v. No branch's kernel is needed. */
#include <omp.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/squeeze.h"

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

/* Sums begin with zero. */
static void begin_chunk(const squeezing *s, output_range range, int64_t chunk) {
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    if (t->term->kind != TERM_PRODUCT)
      memset(t->sums + range.o, 0, (size_t)range.outputs * sizeof *t->sums);
    if (t->partial)
      memset(t->partial + depthwise_offset(s, t, chunk * s->groups + range.group, 0), 0,
             (size_t)depthwise_offset(s, t, 1, 0) * sizeof *t->partial);
  }
}

static void strip_gradients(const squeezing *s, const strip *p, int64_t chunk) {
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

/* Of some outputs of a chunk. */
static void pass_outputs(const squeezing *s, const float *dw, int64_t chunk, output_range range, strip *p) {
  int64_t end = range.o + range.outputs, most = strip_outputs(s);
  p->group = range.group;
  for (int64_t block = 0; block < s->blocks; block++) {
    p->block = block_of(s, block);
    for (p->o = range.o; p->o < end; p->o += most) {
      p->outputs = smaller(most, end - p->o);
      copy_strip(s, dw, p);
      strip_gradients(s, p, chunk);
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

/* ---- all of it ---- */

/* How outputs are cut: into chunks, and these into parts of which products are taken at a time. Not by threads: a
 * depthwise term's sums depend on it. */
typedef struct {
  int64_t part, outputs, chunks; /* outputs of a part and of a chunk; chunks of a group */
  int64_t strip, buffer;         /* floats of a thread's scratch: of the pass, of all */
} division;

enum { MOST_CHUNKS = 20 /* as each has its own sums */ };

static division divide(const squeezing *s) {
  division d = {.part = chunk_outputs(s)};
  d.outputs = d.part * larger(1, divide_up(divide_up(s->outputs, d.part), MOST_CHUNKS));
  d.chunks = larger(1, divide_up(s->outputs, d.outputs));
  int64_t most = strip_outputs(s), point = s->most_inner[1] * LANES;
  d.strip = most * (s->taps + s->most_inner[1]) * SQUEEZE_CHANNELS + 2 * point + divide_up(s->taps, LANES) * LANES;
  d.strip = divide_up(d.strip, 16) * 16;
  int64_t products = larger(KERNEL(squeeze_rows_scratch)(s), KERNEL(squeeze_sum_scratch)(s));
  d.buffer = divide_up(d.strip + products, 16) * 16;
  return d;
}

static strip new_strip(const squeezing *s, float *buffer) {
  int64_t most = strip_outputs(s);
  strip p = {.dw = buffer};
  p.scaled = p.dw + most * s->taps * SQUEEZE_CHANNELS;
  p.point = p.scaled + most * s->most_inner[1] * SQUEEZE_CHANNELS;
  p.dpoint = p.point + s->most_inner[1] * LANES;
  p.pattern = p.dpoint + s->most_inner[1] * LANES;
  return p;
}

/* What is read after the products of a part, or with those of the part that begins with output `next`. */
static void list_later(const squeezing *s, const float *dw, output_range range, int64_t next, fetch_list *later) {
  int64_t tiles = 0, row = s->taps * s->channels;
  later->arrays = later->array = 0;
  for (int k = 0; k < s->count; k++) {
    const squeeze_term *t = &s->terms[k];
    int64_t size = output_size(s, t);
    fetch_add(later, (const float *)t->term->a.data + range.o * size, range.outputs * size);
    if (t->term->kind == TERM_PRODUCT)
      tiles += divide_up(t->inner, PRODUCT_COLUMNS(float)) * (range.outputs * t->taps / PRODUCT_ROWS / 2);
  }
  fetch_add(later, dw + next * row, larger(0, smaller(range.outputs, (range.group + 1) * s->outputs - next)) * row);
  fetch_spread(later, tiles);
}

/* Of the outputs of one chunk: all gradients but those of products' b. */
static void chunk_gradients(const squeezing *s, const float *dw, const division *d, int64_t chunk, output_range all,
                            int64_t after, float *buffer) {
  strip p = new_strip(s, buffer);
  int64_t end = all.o + all.outputs;
  begin_chunk(s, all, chunk);
  for (int64_t o = all.o; o < end; o += d->part) {
    output_range range = {all.group, o, smaller(d->part, end - o)};
    fetch_list later;
    list_later(s, dw, range, o + d->part < end ? o + d->part : after, &later);
    for (int k = 0; k < s->count; k++)
      if (s->terms[k].term->kind == TERM_PRODUCT && wants_rows(s->terms[k].term))
        KERNEL(squeeze_rows_gradient)(s, &s->terms[k], dw, range, &later, buffer + d->strip);
    pass_outputs(s, dw, chunk, range, &p);
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
  int threads = parallel ? omp_get_max_threads() : 1;
  division d = divide(&s);
  squeeze_scratch scratch = {NULL, 0};
  KERNEL(squeeze_lay_out)(&s, &scratch, terms, d.chunks);
  take(&scratch, threads * d.buffer, sizeof(float));
  scratch = (squeeze_scratch){context->workspace(context, scratch.used), 0};
  if (!scratch.memory)
    return DEVICE_FAILED;
  KERNEL(squeeze_lay_out)(&s, &scratch, terms, d.chunks);
  float *buffers = take(&scratch, threads * d.buffer, sizeof(float));
#pragma omp parallel if (parallel) num_threads(threads)
  {
    float *buffer = buffers + omp_get_thread_num() * d.buffer;
    KERNEL(squeeze_pack_depthwise)(&s);
    KERNEL(squeeze_pack_rows)(&s);
#pragma omp barrier
#pragma omp for schedule(static, 1) nowait
    for (int64_t k = 0; k < groups * d.chunks; k++) {
      int64_t first = k % d.chunks * d.outputs, group = k / d.chunks, o = group * s.outputs + first;
      output_range range = {group, o, smaller(d.outputs, s.outputs - first)};
      chunk_gradients(&s, dw->data, &d, k % d.chunks, range, o + threads * d.outputs, buffer);
    }
    for (int k = 0; k < count; k++)
      if (s.terms[k].term->kind == TERM_PRODUCT && terms[k].db.data)
        KERNEL(squeeze_sum_gradient)(&s, &s.terms[k], dw->data, threads, buffer + d.strip);
    stream_end();
#pragma omp barrier
    finish_deep_gradients(&s, d.chunks);
  }
  for (int k = 0; k < count; k++)
    if (terms[k].dscale.data)
      put_scale_gradient(&s, &s.terms[k]);
  return DEVICE_DONE;
}
