/* squeeze_products.c: the gradients of a squeezed kernel's products, which are products themselves: dW . (b + E)^T,
 * whose rows are the gradient of `a` and, on the way, that of the scale; and a^T . dW, the gradient of b, which sums
 * over all outputs and taps. */
#include <omp.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/squeeze.h"

/* ---- a's gradient and the scale's ---- */

void KERNEL(squeeze_pack_rows)(const squeezing *s) {
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

/* A row of sums: its places in dW and `a`, where it goes (or NULL), and its output. */
typedef struct {
  const float *dw, *a;
  float *da;
  int64_t o;
} sum_row;

/* Rows of sums lie in scratch: whole tiles, and more, as rows a power of two apart share cache sets. */
static int64_t sum_stride(int64_t inner) {
  return packed_size(inner, PRODUCT_COLUMNS(float), 1) + 16;
}

static void find_rows(const squeezing *s, const squeeze_term *t, const float *dw, int64_t first, int64_t rows,
                      sum_row *row) {
  int64_t o = first / t->taps, tap = first % t->taps;
  float *da = t->term->da.data;
  for (int64_t r = 0; r < rows; r++) {
    int64_t at = (o * t->own + t->source[tap]) * t->inner;
    row[r] = (sum_row){dw + (o * s->taps + t->place[tap]) * s->channels, (const float *)t->term->a.data + at,
                       da ? da + at : NULL, o};
    if (++tap == t->taps)
      tap = 0, o++;
  }
}

/* The identity's part of a row of sums: dw[channel t mod I/G], filled up with zeros. */
static void begin_sum(const squeezing *s, const squeeze_term *t, const float *dw, float *sum) {
  for (int64_t at = 0; at < t->inner && s->channels; at += s->channels)
    memcpy(sum + at, dw, (size_t)smaller(s->channels, t->inner - at) * sizeof *sum);
  int64_t filled = s->channels ? t->inner : 0;
  memset(sum + filled, 0, (size_t)(sum_stride(t->inner) - filled) * sizeof *sum);
}

static void pack_dw(const squeezing *s, const squeeze_term *t, int64_t rows, const sum_row *row, float *sums,
                    float *packed) {
  const float *from[PRODUCT_BLOCK];
  int64_t stride = sum_stride(t->inner);
  for (int64_t r = 0; r < rows; r++) {
    from[r] = row[r].dw;
    if (t->term->plus_identity)
      begin_sum(s, t, from[r], sums + r * stride);
  }
  for (int64_t r = 0; r < rows; r += PRODUCT_ROWS)
    pack_panel(s->channels, PRODUCT_ROWS, smaller(PRODUCT_ROWS, rows - r), from + r, packed + r * s->channels);
}

static void sum_rows(const squeezing *s, const squeeze_term *t, int64_t group, int64_t rows, const float *packed,
                     fetch_list *later, float *sums) {
  float tile[PRODUCT_ROWS * PRODUCT_MOST_COLUMNS] __attribute__((aligned(64)));
  int64_t width = PRODUCT_COLUMNS(float), panels = divide_up(t->inner, width), size = s->channels * width;
  int64_t pieces = divide_up(rows, PRODUCT_ROWS), stride = sum_stride(t->inner);
  const float *right = t->packed + group * panels * size;
  for (int64_t j = 0; j < panels; j++)
    for (int64_t k = 0; k < pieces; k++) {
      int64_t first = k * PRODUCT_ROWS;
      fetch part = k % 2 ? fetch_next(later, s->channels)
                         : fetch_part(right + (j + 1) % panels * size, size, k / 2, divide_up(pieces, 2), s->channels);
      tile_float(false, s->channels, packed + first * s->channels, right + j * size, tile, part);
      float *to = sums + first * stride + j * width;
      for (int64_t r = 0; r < smaller(PRODUCT_ROWS, rows - first); r++)
        if (t->term->plus_identity)
          add_scaled(width, 1, tile + r * width, to + r * stride);
        else
          put_scaled(width, 1, tile + r * width, to + r * stride);
    }
}

static void clear_unused_rows(const squeeze_term *t, output_range range) {
  float *da = t->term->da.data;
  for (int64_t k = range.o; k < range.o + range.outputs && da; k++)
    for (int64_t tap = t->taps; tap < t->own; tap++)
      memset(da + (k * t->own + t->source[tap]) * t->inner, 0, (size_t)t->inner * sizeof *da);
}

int64_t KERNEL(squeeze_rows_scratch)(const squeezing *s) {
  return s->most_inner[0] == 0 ? 0 : PRODUCT_BLOCK * (divide_up(s->channels, 16) * 16 + sum_stride(s->most_inner[0]));
}

void KERNEL(squeeze_rows_gradient)(const squeezing *s, const squeeze_term *t, const float *dw, output_range range,
                                   fetch_list *later, float *scratch) {
  float *sums = scratch, *packed = scratch + PRODUCT_BLOCK * sum_stride(t->inner);
  int64_t end = (range.o + range.outputs) * t->taps;
  memset(t->sums + range.o, 0, (size_t)range.outputs * sizeof *t->sums);
  clear_unused_rows(t, range);
  for (int64_t first = range.o * t->taps; first < end && t->inner; first += PRODUCT_BLOCK) {
    sum_row row[PRODUCT_BLOCK];
    int64_t rows = smaller(PRODUCT_BLOCK, end - first);
    find_rows(s, t, dw, first, rows, row);
    pack_dw(s, t, rows, row, sums, packed);
    sum_rows(s, t, range.group, rows, packed, later, sums);
    for (int64_t r = 0; r < rows; r++)
      t->sums[row[r].o] += total(row_gradient(t->inner, scale_of(t->term, row[r].o), sums + r * sum_stride(t->inner),
                                              LANES, row[r].a, row[r].da));
  }
}

/* ---- b's gradient ---- */

/* A block of b: rows t and columns i, as many as stay in the second cache with a run of their factors. */
enum { SUM_PIECES = LANES == 16 ? 19 : 36, SUM_PANELS = 16 * 8 / LANES };
typedef struct {
  int64_t group, row, rows, column, columns;
} product_block;

/* A run of the sum: rows of (o, used tap) in `a` and dW, and the scale of each. */
typedef struct {
  int64_t count;
  const float *a[PRODUCT_DEPTH], *dw[PRODUCT_DEPTH];
  float scale[PRODUCT_DEPTH];
} product_run;

static void find_run(const squeezing *s, const squeeze_term *t, const float *dw, const product_block *b, int64_t first,
                     product_run *run) {
  int64_t taps = larger(1, t->taps), o = first / taps, tap = first % taps;
  for (int64_t k = 0; k < run->count; k++) {
    run->a[k] = (const float *)t->term->a.data + (o * t->own + t->source[tap]) * t->inner + b->row;
    run->dw[k] = dw + (o * s->taps + t->place[tap]) * s->channels + b->column;
    run->scale[k] = scale_of(t->term, o);
    if (++tap == t->taps)
      tap = 0, o++;
  }
}

/* Floats of a run's panel, and some more, as panels a power of two apart share cache sets. */
static ALWAYS_INLINE int64_t panel_stride(int64_t width) {
  return PRODUCT_DEPTH * width + 16;
}

/* A run's rows in panels of `width`, row by row: so they are read as they lie in memory. */
static ALWAYS_INLINE void pack_run(int64_t depth, int64_t width, int64_t count, const float *const *row,
                                   const float *factor, float *packed) {
  for (int64_t k = 0; k < depth; k++) {
    float *to = packed + k * width;
    for (int64_t first = 0; first < count; first += width, to += panel_stride(width))
      pack_step(width, count - first, factor ? factor[k] : 1, row[k] + first, to);
  }
}

static void multiply_run(const product_block *b, bool add, int64_t depth, const float *left, const float *right,
                         float *tiles) {
  const int64_t width = PRODUCT_COLUMNS(float), pieces = divide_up(b->rows, PRODUCT_ROWS);
  for (int64_t n = 0; n < divide_up(b->columns, width) * pieces; n++)
    tile_float(add, depth, left + n % pieces * panel_stride(PRODUCT_ROWS), right + n / pieces * panel_stride(width),
               tiles + n * PRODUCT_ROWS * width, (fetch){(const char *)left, 0});
}

/* Tiles lie panel by panel; the block is written row by row. */
static void write_tiles(const squeezing *s, const product_block *b, const float *tiles, float *db) {
  const int64_t width = PRODUCT_COLUMNS(float), panel = divide_up(b->rows, PRODUCT_ROWS) * PRODUCT_ROWS * width;
  bool stream = STREAMS && s->channels % LANES == 0 && (uintptr_t)db % 64 == 0;
  for (int64_t r = 0; r < b->rows; r++, tiles += width, db += s->channels)
    for (int64_t j = 0; j < b->columns; j += LANES) {
      const float *from = tiles + j / width * panel + j % width;
      if (stream)
        stream_lanes(db + j, load_lanes(from, 0, false));
      else
        store_part(db + j, b->columns - j, load_lanes(from, 0, false));
    }
}

static void block_gradient(const squeezing *s, const squeeze_term *t, const float *dw, const product_block *b,
                           float *scratch) {
  float *right = scratch,
        *left = right + divide_up(b->columns, PRODUCT_COLUMNS(float)) * panel_stride(PRODUCT_COLUMNS(float));
  float *tiles = left + divide_up(b->rows, PRODUCT_ROWS) * panel_stride(PRODUCT_ROWS);
  int64_t start = b->group * s->outputs * t->taps, end = start + s->outputs * t->taps, first = start;
  do {
    product_run run = {.count = smaller(PRODUCT_DEPTH, end - first)};
    find_run(s, t, dw, b, first, &run);
    pack_run(run.count, PRODUCT_ROWS, b->rows, run.a, run.scale, left);
    pack_run(run.count, PRODUCT_COLUMNS(float), b->columns, run.dw, NULL, right);
    multiply_run(b, first > start, run.count, left, right, tiles);
    first += run.count;
  } while (first < end);
  write_tiles(s, b, tiles, (float *)t->term->db.data + (b->group * t->inner + b->row) * s->channels + b->column);
}

int64_t KERNEL(squeeze_sum_scratch)(const squeezing *s) {
  int64_t width = PRODUCT_COLUMNS(float), pieces = smaller(SUM_PIECES, divide_up(s->most_inner[0], PRODUCT_ROWS));
  int64_t panels = smaller(SUM_PANELS, divide_up(s->channels, width));
  return pieces * (panel_stride(PRODUCT_ROWS) + panels * PRODUCT_ROWS * width) + panels * panel_stride(width);
}

void KERNEL(squeeze_sum_gradient)(const squeezing *s, const squeeze_term *t, const float *dw, int threads,
                                  float *scratch) {
  int64_t width = PRODUCT_COLUMNS(float), pieces = divide_up(t->inner, PRODUCT_ROWS);
  int64_t panels = divide_up(s->channels, width), rows = even_chunk(pieces, SUM_PIECES, 1) * PRODUCT_ROWS;
  int64_t columns = even_chunk(panels, SUM_PANELS, threads) * width;
  int64_t down = divide_up(t->inner, rows), across = divide_up(s->channels, columns);
#pragma omp for schedule(static, 1) nowait
  for (int64_t k = 0; k < s->groups * down * across; k++) {
    int64_t row = k / across % down * rows, column = k % across * columns;
    product_block b = {k / across / down, row, smaller(rows, t->inner - row), column,
                       smaller(columns, s->channels - column)};
    block_gradient(s, t, dw, &b, scratch);
  }
}
