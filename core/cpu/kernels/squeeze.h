/* squeeze.h: what squeezing shares with its gradient: the terms in the form that both passes work on, and their
 * scratch.
 *
 * Both walk over outputs o and blocks of SQUEEZE_CHANNELS input channels. What they sum up or copy of a block lies in
 * small arrays of vectors, [column][tap][LANES]: a column is LANES channels, the last one filled up with zeros. Every
 * term may be smaller than the kernel and then lies centred in it. */
#ifndef OREPA_CORE_CPU_SQUEEZE_H
#define OREPA_CORE_CPU_SQUEEZE_H

#include "cpu/kernels/product.h"

enum { SQUEEZE_CHANNELS = 64, SQUEEZE_PARALLEL = 500000 /* multiplications that are worth threads */ };

typedef struct {
  const device_term *term;
  int64_t own, taps; /* of its own kernel: all, and those that are used */
  int64_t *source;   /* (own): the used ones' places in its own kernel, then those of the others */
  int64_t *place;    /* (taps): where the used ones lie in the whole kernel */
  int64_t inner;     /* PRODUCT: T; DEPTHWISE: E */
  float *packed;     /* PRODUCT: b in panels; DEPTHWISE: b as [group][column][tap][e][LANES] */
  float *partial;    /* DEPTHWISE, backward: chunks of the gradient of b, each in the order of `packed` */
  double *sums;      /* backward: what <dW[o], the term without scale> has come to, (O) */
} squeeze_term;

typedef struct {
  int64_t groups, outputs, channels; /* O/G and I/G: of one group */
  int64_t taps, height, width;       /* of the kernel */
  orepa_taps used;                   /* of these */
  int64_t blocks, padded;            /* of a group's channels: blocks; channels filled up to whole columns */
  int64_t most_inner[2];             /* the largest T and E */
  double work;                       /* multiplications of all terms */
  int count;
  squeeze_term *terms;
} squeezing;

/* A block of channels: `count` of them from `first` on. */
typedef struct {
  int64_t first, count, columns;
} channel_block;

static inline channel_block block_of(const squeezing *s, int64_t block) {
  int64_t first = block * SQUEEZE_CHANNELS, count = smaller(SQUEEZE_CHANNELS, s->channels - first);
  return (channel_block){first, count, divide_up(count, LANES)};
}

/* Where a group's channels from `first` on begin in a depthwise term's `packed`, or in one chunk of its `partial`. */
static inline int64_t depthwise_offset(const squeezing *s, const squeeze_term *t, int64_t group, int64_t first) {
  return (group * s->padded + first) * t->inner * t->taps;
}

/* The row of a depthwise term's `a` that belongs to output o (of all). */
static inline int64_t depthwise_row(const squeezing *s, const squeeze_term *t, int64_t o) {
  return t->term->interleave ? o % s->outputs * s->groups + o / s->outputs : o;
}

/* Numbers of a term's `a` for one output. */
static inline int64_t output_size(const squeezing *s, const squeeze_term *t) {
  switch (t->term->kind) {
  case TERM_KERNEL:
    return t->own * s->channels;
  case TERM_PATTERN:
    return s->channels;
  case TERM_PRODUCT:
    return t->own * t->inner;
  case TERM_DEPTHWISE:
    return t->inner * s->channels;
  }
  return 0;
}

/* How many outputs are worked on at a time: so many that the rows of their products, of a factor of these, and what is
 * fetched meanwhile stay in the second cache; and so few that there are sixteen such chunks, in whole tiles. */
static inline int64_t chunk_outputs(const squeezing *s) {
  const int64_t floats = 260 << 10, taps = larger(1, s->taps);
  int64_t tiles = smaller(PRODUCT_BLOCK, floats / larger(1, 2 * (s->most_inner[0] + s->channels))) / PRODUCT_ROWS;
  int64_t wanted = divide_up(divide_up(s->outputs, 16) * taps, PRODUCT_ROWS);
  return larger(1, larger(1, smaller(tiles, wanted)) * PRODUCT_ROWS / taps);
}

static inline float scale_of(const device_term *term, int64_t o) {
  const device_array *scale = &term->scale;
  if (!scale->data)
    return 1;
  return ((const float *)scale->data)[scale->shape[0] == 1 ? 0 : o * scale->strides[0]];
}

/* scale * b[o], tap by tap. */
static inline void read_pattern(const squeezing *s, const device_term *term, int64_t o, float scale, float *to) {
  const int64_t *stride = term->b.strides;
  for (int64_t h = 0; h < s->height; h++)
    for (int64_t w = 0; w < s->width; w++)
      *to++ = scale * ((const float *)term->b.data)[o * stride[0] + h * stride[1] + w * stride[2]];
}

/* ---- vectors, rows of numbers, small matrices ---- */

/* LANES numbers, or the `count` that there are and zeros. */
static ALWAYS_INLINE float_lanes load_part(const float *from, int64_t count) {
  if (count >= LANES)
    return load_lanes(from, 0, false);
  float_lanes part = {0};
  for (int64_t i = 0; i < count; i++)
    part[i] = from[i];
  return part;
}
static ALWAYS_INLINE void store_part(float *to, int64_t count, float_lanes value) {
  if (count >= LANES)
    store_lanes(to, 0, value, false);
  else
    for (int64_t i = 0; i < count; i++)
      to[i] = value[i];
}

static inline double total(float_lanes lanes) {
  typedef double doubles __attribute__((vector_size(8 * LANES)));
  doubles sums = __builtin_convertvector(lanes, doubles);
  double sum[LANES];
  memcpy(sum, &sums, sizeof sum);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++)
      sum[i] += sum[i + half];
  return sum[0];
}

/* to[c][r] = from[r][c] for matrices whose rows are `from_ld` and `to_ld` numbers apart. */
static inline void turn_matrix(int64_t rows, int64_t columns, const float *from, int64_t from_ld, float *to,
                               int64_t to_ld) {
  if (rows < 4 || columns < 4) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++)
        to[c * to_ld + r] = from[r * from_ld + c];
    return;
  }
  for (int64_t next = 0; next < rows; next += 4) {
    int64_t r = smaller(next, rows - 4);
    const float *row = from + r * from_ld;
    for (int64_t k = 0; k < columns; k += 4) {
      int64_t c = smaller(k, columns - 4);
      turn4_float(row + c, row + from_ld + c, row + 2 * from_ld + c, row + 3 * from_ld + c, to + c * to_ld + r, to_ld);
    }
  }
}

#if LANES >= 8
static ALWAYS_INLINE void load_eight(const float *from, float_lanes *v) {
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++)
    v[k] = load_lanes(from, k * LANES, false);
}
static ALWAYS_INLINE void store_eight(float *to, const float_lanes *v) {
#pragma GCC unroll 8
  for (int k = 0; k < 8; k++)
    store_lanes(to, k * LANES, v[k], false);
}

/* LANES rows of eight numbers, one after the other, become eight vectors. In a number's place, channel above e, each
 * round moves one bit of e from the bottom into the vector's number and one bit of the channel from there to the top.
 */
static ALWAYS_INLINE void eights_to_lanes(const float *from, float *to) {
  float_lanes v[8], next[8];
  load_eight(from, v);
#pragma GCC unroll 3
  for (int bit = 1; bit < 8; bit *= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
      next[k] = k & bit ? __builtin_shufflevector(v[k - bit], v[k], ODD_LANES)
                        : __builtin_shufflevector(v[k], v[k + bit], EVEN_LANES);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
      v[k] = next[k];
  }
  store_eight(to, v);
}

/* Back, past the caches. */
static ALWAYS_INLINE void lanes_to_eights(const float *from, float *to) {
  float_lanes v[8], next[8];
  load_eight(from, v);
#pragma GCC unroll 3
  for (int bit = 4; bit > 0; bit /= 2) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
      next[k] = k & bit ? __builtin_shufflevector(v[k - bit], v[k], HIGH_LANES)
                        : __builtin_shufflevector(v[k], v[k + bit], LOW_LANES);
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
      v[k] = next[k];
  }
  if (STREAMS && (uintptr_t)to % 64 == 0)
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++)
      stream_lanes(to + k * LANES, v[k]);
  else
    store_eight(to, v);
}
#else
static inline void eights_to_lanes(const float *from, float *to) {
  turn_matrix(LANES, 8, from, 8, to, LANES);
}
static inline void lanes_to_eights(const float *from, float *to) {
  turn_matrix(8, LANES, from, LANES, to, 8);
}
#endif

/* Up to LANES rows of `inner` numbers become vectors that lie `to_ld` apart, filled up with zeros. */
static inline void turn_to_lanes(int64_t channels, int64_t inner, const float *from, int64_t ld, float *to,
                                 int64_t to_ld) {
  if (channels == LANES && inner == 8 && ld == 8 && to_ld == LANES) {
    eights_to_lanes(from, to);
    return;
  }
  if (channels < LANES)
    for (int64_t e = 0; e < inner; e++)
      store_lanes(to, e * to_ld, (float_lanes){0}, false);
  turn_matrix(channels, inner, from, ld, to, to_ld);
}

/* `inner` vectors, one after the other, of which `channels` lanes count, become rows. */
static inline void turn_from_lanes(int64_t channels, int64_t inner, const float *from, float *to) {
  if (channels == LANES && inner == 8)
    lanes_to_eights(from, to);
  else
    turn_matrix(inner, channels, from, LANES, to, inner);
}

/* y += scale * x, or = */
static ALWAYS_INLINE void add_scaled(int64_t count, float scale, const float *x, float *y) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    store_lanes(y, i, load_lanes(y, i, false) + scale * load_lanes(x, i, false), false);
  for (; i < count; i++)
    y[i] += scale * x[i];
}
static ALWAYS_INLINE void put_scaled(int64_t count, float scale, const float *x, float *y) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    store_lanes(y, i, scale * load_lanes(x, i, false), false);
  for (; i < count; i++)
    y[i] = scale * x[i];
}

/* One step of a panel: factor times `width` numbers, of which there are `count`, and zeros. */
static ALWAYS_INLINE void pack_step(int64_t width, int64_t count, float factor, const float *from, float *to) {
  for (int64_t j = 0; j < width; j += LANES) {
    int64_t wanted = smaller(LANES, width - j), there = larger(0, smaller(wanted, count - j));
    if (there == LANES)
      store_lanes(to, j, factor * load_lanes(from, j, false), false);
    else
      store_first_lanes(to + j, factor * load_first_lanes(from + j, there), wanted);
  }
}

/* Scratch is asked for once: laid out without memory to learn the size, then with it. */
typedef struct {
  char *memory; /* NULL: only counting */
  size_t used;
} squeeze_scratch;

static inline void *take(squeeze_scratch *m, int64_t count, size_t size) {
  void *taken = m->memory ? m->memory + m->used : NULL;
  m->used += ((size_t)count * size + 63) / 64 * 64;
  return taken;
}

/* A gradient is wanted of a term's rows of `a` or its scale. */
static inline bool wants_rows(const device_term *term) {
  return term->da.data || term->dscale.data;
}

/* For one row of `a`, where dw's columns under its tap lie `step` apart: da = scale * dw; gives back the sum of dw * a.
 */
static ALWAYS_INLINE float_lanes row_gradient(int64_t count, float scale, const float *dw, int64_t step, const float *a,
                                              float *da) {
  float_lanes sum = {0};
  if (STREAMS && da && count % LANES == 0 && (uintptr_t)da % 64 == 0) {
    for (int64_t i = 0; i < count; i += LANES, dw += step) {
      float_lanes d = load_lanes(dw, 0, false);
      sum += d * load_lanes(a, i, false);
      stream_lanes(da + i, scale * d);
    }
    return sum;
  }
  for (int64_t i = 0; i < count; i += LANES, dw += step) {
    float_lanes d = load_lanes(dw, 0, false);
    sum += d * load_part(a + i, count - i);
    if (da)
      store_part(da + i, count - i, scale * d);
  }
  return sum;
}

/* Some outputs of a group. */
typedef struct {
  int64_t group, o, outputs; /* o: the first, of all */
} output_range;

/* False where shapes don't fit together or the types are not ours. */
bool KERNEL(squeeze_describe)(squeezing *s, int64_t groups, const device_array *w, const orepa_taps *taps, int count,
                              const device_term *terms);
/* Fills s->terms. Backward there are `chunks` > 0 of partial sums, and panels of b's rows; forward 0, and of its
 * columns. */
void KERNEL(squeeze_lay_out)(squeezing *s, squeeze_scratch *m, const device_term *terms, int64_t chunks);
/* Within a parallel region: brings b of each depthwise term into `packed`. */
void KERNEL(squeeze_pack_depthwise)(const squeezing *s);

/* Products' gradients (squeeze_products.c), all within a parallel region. First b goes into `packed`, in panels of its
 * rows. */
void KERNEL(squeeze_pack_rows)(const squeezing *s);
/* Those of `a` and the scale for some outputs; what is on `later` is fetched meanwhile. Scratch: a number of floats. */
int64_t KERNEL(squeeze_rows_scratch)(const squeezing *s);
void KERNEL(squeeze_rows_gradient)(const squeezing *s, const squeeze_term *t, const float *dw, output_range range,
                                   fetch_list *later, float *scratch);
/* That of b, over all outputs: the threads share the work. */
int64_t KERNEL(squeeze_sum_scratch)(const squeezing *s);
void KERNEL(squeeze_sum_gradient)(const squeezing *s, const squeeze_term *t, const float *dw, int threads,
                                  float *scratch);

#endif
