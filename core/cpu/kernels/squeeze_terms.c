/* squeeze_terms.c: what squeezing and its gradient begin with: whether the terms are ours, where their taps lie, and a
 * depthwise term's kernels in the order of vectors. */
#include "cpu/kernels/squeeze.h"

#include "cpu/kernels/kernels.h"

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
    s->work += (double)(w->shape[0] * s->taps * s->channels) * (double)(inner_of(s, &terms[k]) + 1);
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
