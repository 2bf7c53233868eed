/* compose.c: kernels composed and taken apart, in float32 and float64: w[o,i,u] = sum over t, a of after[o,t,a] *
 * before[t,i,u-a].
 *
 * The middle channels t are cut into segments, so fine that each lies in one group of `after` and in one of `before`. A
 * segment's part of w, and of both gradients, is then one dense matrix product between rows (o,a), channels t and
 * columns (b,i), gathered while they are packed and scattered while they are hot. Segments that add to the same element
 * of w do so in order; no two write to the same element of a gradient. */
#include <omp.h>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/product.h"

/* What a product needs to know of a type. */
typedef struct {
  int64_t size, columns;
  void (*tile)(int64_t depth, const void *a, const void *b, void *c, fetch next);
  void (*pack_columns)(int64_t depth, int64_t width, int64_t count, const void *const *row, void *panel);
  void (*add)(int64_t count, const void *from, void *to);
} arithmetic;

#define ARITHMETIC_DEFINE(type)                                                                                        \
  static void multiply_##type(int64_t depth, const void *a, const void *b, void *c, fetch next) {                      \
    tile_##type(false, depth, a, b, c, next);                                                                          \
  }                                                                                                                    \
  static void turn_##type(int64_t depth, int64_t width, int64_t count, const void *const *row, void *panel) {          \
    pack_columns_##type(depth, width, count, (const type *const *)row, panel);                                         \
  }                                                                                                                    \
  static void add_##type(int64_t count, const void *from, void *to) {                                                  \
    const type *x = from;                                                                                              \
    type *y = to;                                                                                                      \
    for (int64_t k = 0; k < count; k++)                                                                                \
      y[k] += x[k];                                                                                                    \
  }                                                                                                                    \
  static const arithmetic arithmetic_##type = {sizeof(type), PRODUCT_COLUMNS(type), multiply_##type, turn_##type,      \
                                               add_##type};
ARITHMETIC_DEFINE(float)
ARITHMETIC_DEFINE(double)

typedef struct {
  const arithmetic *type;
  int64_t groups, outputs, inputs;            /* all of O, all of I */
  int64_t after_groups, before_groups;        /* na, nb */
  int64_t after_taps, before_taps, w_taps;    /* height * width */
  int64_t after_width, before_width, w_width; /* of a kernel */
  int64_t segments, depth;                    /* depth: the middle channels of one segment */
  int64_t channels;                           /* I / nb */
  int64_t run, columns;                       /* numbers of a tap; columns: before_taps * run, one row of `before` */
  bool turn;
} composition;

/* ---- what is asked for ---- */

static int64_t common_multiple(int64_t a, int64_t b) {
  int64_t x = a, y = b;
  while (y) {
    int64_t rest = x % y;
    x = y;
    y = rest;
  }
  return a / x * b;
}

/* False where shapes don't fit together or the types are not ours. */
static bool describe(composition *p, const device_array *w, const device_array *after, int64_t na,
                     const device_array *before, int64_t nb, int64_t groups, bool turn) {
  orepa_dtype dtype = w->dtype;
  if ((dtype != OREPA_FLOAT32 && dtype != OREPA_FLOAT64) || !is_dense_kernel(w, dtype) ||
      !is_dense_kernel(after, dtype) || !is_dense_kernel(before, dtype))
    return false;
  int64_t middle = before->shape[0];
  if (groups < 1 || na < 1 || nb < 1 || na % groups || nb % groups || w->shape[0] % na || middle % na || middle % nb ||
      after->shape[0] != w->shape[0] || after->shape[1] * na != middle ||
      before->shape[1] * nb != w->shape[1] * groups || w->shape[2] != after->shape[2] + before->shape[2] - 1 ||
      w->shape[3] != after->shape[3] + before->shape[3] - 1)
    return false;
  *p = (composition){.type = dtype == OREPA_FLOAT32 ? &arithmetic_float : &arithmetic_double,
                     .groups = groups,
                     .outputs = w->shape[0],
                     .inputs = w->shape[1] * groups,
                     .after_groups = na,
                     .before_groups = nb,
                     .after_taps = after->shape[2] * after->shape[3],
                     .before_taps = before->shape[2] * before->shape[3],
                     .w_taps = w->shape[2] * w->shape[3],
                     .after_width = after->shape[3],
                     .before_width = before->shape[3],
                     .w_width = w->shape[3],
                     .segments = common_multiple(na, nb),
                     .channels = before->shape[1],
                     .run = before->shape[1],
                     .turn = turn};
  if (nb == groups) { /* a row of taps lies in w as in `before`, without gaps: it is taken for one tap */
    p->run *= before->shape[3];
    p->before_taps = before->shape[2];
    p->before_width = 1;
  }
  p->depth = middle / p->segments; /* a whole number: a common multiple of na and nb divides what both divide */
  p->columns = p->before_taps * p->run;
  return true;
}

static bool worth_threads(const composition *p) {
  double rows = (double)(p->outputs * p->after_taps), channels = (double)(p->segments * p->depth / p->after_groups);
  return rows * channels * (double)p->columns > 5e5;
}

/* ---- where things lie ---- */

static void *element(const composition *p, const void *base, int64_t position) {
  return (char *)base + position * p->type->size;
}

/* after[o, the segment's first channel, tap a]: a row of `depth` numbers. */
static void *after_row(const composition *p, const void *after, int64_t segment, int64_t o, int64_t a) {
  int64_t in_group = p->segments / p->after_groups, tap = p->turn ? p->after_taps - 1 - a : a;
  return element(p, after, ((o * p->after_taps + tap) * in_group + segment % in_group) * p->depth);
}

/* w[o, first channel that the segment sees, tap a + b]: a row of `run` numbers. */
static void *w_row(const composition *p, const void *w, int64_t segment, int64_t o, int64_t a, int64_t b) {
  int64_t in_w = p->before_groups / p->groups, group = segment / (p->segments / p->before_groups);
  int64_t y = a / p->after_width + b / p->before_width, x = a % p->after_width + b % p->before_width;
  return element(p, w, ((o * p->w_taps + y * p->w_width + x) * in_w + group % in_w) * p->channels);
}

/* Part of one row of `before`: column `first` is channel `i` of tap `b`, and `length` columns on are of the same tap.
 */
typedef struct {
  int64_t b, i, length;
} column_run;

static column_run next_run(const composition *p, int64_t first, int64_t end) {
  int64_t i = first % p->run;
  return (column_run){first / p->run, i, smaller(p->run - i, end - first)};
}

/* Work is cut by outputs: enough for a full block of rows, few enough for each thread to have some. */
typedef struct {
  int64_t outputs, in_group, tasks; /* of a task; tasks of a group of `after`; of all */
} output_tasks;

static output_tasks tasks_by_outputs(const composition *p, int threads) {
  int64_t group = p->outputs / p->after_groups, most = larger(1, PRODUCT_BLOCK / larger(1, p->after_taps));
  int64_t outputs = even_chunk(group, most, p->after_groups < threads ? threads : 1);
  int64_t in_group = divide_up(group, outputs);
  return (output_tasks){outputs, in_group, in_group * p->after_groups};
}

/* ---- w ---- */

/* `before`, segment by segment, in panels of its columns. */
static void pack_before(const composition *p, const void *before, void *packed) {
  int64_t width = p->type->columns, panels = divide_up(p->columns, width), step = width * p->type->size;
#pragma omp for
  for (int64_t k = 0; k < p->segments * panels; k++) {
    int64_t first = k % panels * width, bytes = smaller(width, p->columns - first) * p->type->size;
    char *to = element(p, packed, k * width * p->depth);
    for (int64_t t = 0; t < p->depth; t++, to += step) {
      memcpy(to, element(p, before, (k / panels * p->depth + t) * p->columns + first), (size_t)bytes);
      memset(to + bytes, 0, (size_t)(step - bytes));
    }
  }
}

/* Rows first ... first + count of (o,a), counted from output o0 on. */
static void pack_after(const composition *p, const void *after, int64_t segment, int64_t o0, int64_t first,
                       int64_t count, void *packed) {
  for (int64_t r0 = 0; r0 < count; r0 += PRODUCT_ROWS) {
    const void *row[PRODUCT_ROWS];
    int64_t rows = smaller(PRODUCT_ROWS, count - r0);
    for (int64_t r = 0; r < rows; r++) {
      int64_t k = first + r0 + r;
      row[r] = after_row(p, after, segment, o0 + k / p->after_taps, k % p->after_taps);
    }
    p->type->pack_columns(p->depth, PRODUCT_ROWS, rows, row, element(p, packed, r0 * p->depth));
  }
}

/* Adds a tile of rows from `first` on and columns from `column` on to where they belong in w. */
static void scatter(const composition *p, void *w, int64_t segment, int64_t o0, int64_t first, int64_t rows,
                    int64_t column, const void *tile) {
  int64_t end = smaller(column + p->type->columns, p->columns);
  for (int64_t r = 0; r < rows; r++) {
    int64_t o = o0 + (first + r) / p->after_taps, a = (first + r) % p->after_taps;
    for (int64_t j = column; j < end;) {
      column_run run = next_run(p, j, end);
      p->type->add(run.length, element(p, tile, r * p->type->columns + j - column),
                   element(p, w_row(p, w, segment, o, a, run.b), run.i));
      j += run.length;
    }
  }
}

static void compose_outputs(const composition *p, void *w, const void *after, const void *before, int64_t segment,
                            int64_t o0, int64_t outputs, void *packed) {
  double tile[PRODUCT_ROWS * PRODUCT_MOST_COLUMNS] __attribute__((aligned(64)));
  int64_t rows = outputs * p->after_taps, width = p->type->columns, panels = divide_up(p->columns, width);
  for (int64_t block = 0; block < rows; block += PRODUCT_BLOCK) {
    int64_t count = smaller(PRODUCT_BLOCK, rows - block);
    pack_after(p, after, segment, o0, block, count, packed);
    for (int64_t j = 0; j < panels; j++) {
      const void *panel = element(p, before, (segment * panels + j) * width * p->depth);
      for (int64_t r = 0; r < count; r += PRODUCT_ROWS) {
        p->type->tile(p->depth, element(p, packed, r * p->depth), panel, tile, (fetch){panel, 0});
        scatter(p, w, segment, o0, block + r, smaller(PRODUCT_ROWS, count - r), j * width, tile);
      }
    }
  }
}

device_status KERNEL(compose)(device_context *context, const device_array *w, const device_array *after, int64_t na,
                              const device_array *before, int64_t nb, int64_t groups, bool turn) {
  composition p;
  if (!describe(&p, w, after, na, before, nb, groups, turn))
    return DEVICE_UNSUPPORTED;
  bool parallel = worth_threads(&p);
  int threads = parallel ? omp_get_max_threads() : 1;
  output_tasks tasks = tasks_by_outputs(&p, threads);
  int64_t right = p.segments * packed_size(p.columns, p.type->columns, p.depth), left = PRODUCT_BLOCK * p.depth;
  void *scratch = context->workspace(context, (size_t)(64 + (right + threads * left) * p.type->size));
  if (!scratch)
    return DEVICE_FAILED;
#pragma omp parallel if (parallel) num_threads(threads)
  {
    void *packed = element(&p, scratch, right + omp_get_thread_num() * left);
    pack_before(&p, before->data, scratch);
#pragma omp for
    for (int64_t k = 0; k < tasks.tasks; k++) {
      int64_t group = k / tasks.in_group, size = p.outputs / na, first = k % tasks.in_group * tasks.outputs;
      int64_t o0 = group * size + first, count = smaller(tasks.outputs, size - first);
      int64_t row = p.w_taps * w->shape[1], each = p.segments / na;
      memset(element(&p, w->data, o0 * row), 0, (size_t)(count * row * p.type->size));
      for (int64_t s = group * each; s < (group + 1) * each; s++)
        compose_outputs(&p, w->data, after->data, scratch, s, o0, count, packed);
    }
  }
  return DEVICE_DONE;
}

/* ---- the gradient of `after` ---- */

/* Taps of `before` that are summed over at a time. */
static int64_t taps_at_once(const composition *p) {
  return smaller(larger(1, PRODUCT_DEPTH / larger(1, p->run)), larger(1, p->before_taps));
}

/* `before`, segment by segment, in panels of its rows. */
static void pack_before_turned(const composition *p, const void *before, void *packed) {
  int64_t width = p->type->columns, panels = divide_up(p->depth, width);
#pragma omp for
  for (int64_t k = 0; k < p->segments * panels; k++) {
    const void *row[PRODUCT_MOST_COLUMNS];
    int64_t first = k % panels * width, count = smaller(width, p->depth - first);
    for (int64_t t = 0; t < count; t++)
      row[t] = element(p, before, (k / panels * p->depth + first + t) * p->columns);
    p->type->pack_columns(p->columns, width, count, row, element(p, packed, k * width * p->columns));
  }
}

/* dw under taps b0 ... b0 + taps of `before`, for rows first ... first + count of (o,a). */
static void pack_dw_rows(const composition *p, const void *dw, int64_t segment, int64_t o0, int64_t first,
                         int64_t count, int64_t b0, int64_t taps, void *packed) {
  for (int64_t r0 = 0; r0 < count; r0 += PRODUCT_ROWS) {
    const void *row[PRODUCT_ROWS];
    int64_t rows = smaller(PRODUCT_ROWS, count - r0);
    for (int64_t b = 0; b < taps; b++) {
      for (int64_t r = 0; r < rows; r++) {
        int64_t k = first + r0 + r;
        row[r] = w_row(p, dw, segment, o0 + k / p->after_taps, k % p->after_taps, b0 + b);
      }
      void *panel = element(p, packed, (r0 * taps + b * PRODUCT_ROWS) * p->run);
      p->type->pack_columns(p->run, PRODUCT_ROWS, rows, row, panel);
    }
  }
}

/* A tile's rows of `count` numbers written to `to`, or added to what is there. */
static void put_row(const composition *p, bool add, int64_t count, const void *from, void *to) {
  if (add)
    p->type->add(count, from, to);
  else
    memcpy(to, from, (size_t)(count * p->type->size));
}

static void after_gradient(const composition *p, void *dafter, const void *dw, const void *before, int64_t segment,
                           int64_t o0, int64_t outputs, void *packed) {
  double tile[PRODUCT_ROWS * PRODUCT_MOST_COLUMNS] __attribute__((aligned(64)));
  int64_t all = outputs * p->after_taps, width = p->type->columns, panels = divide_up(p->depth, width);
  int64_t step = taps_at_once(p), b = 0;
  do {
    int64_t taps = smaller(step, p->before_taps - b), depth = taps * p->run;
    for (int64_t block = 0; block < all; block += PRODUCT_BLOCK) {
      int64_t count = smaller(PRODUCT_BLOCK, all - block);
      pack_dw_rows(p, dw, segment, o0, block, count, b, taps, packed);
      for (int64_t j = 0; j < panels; j++) {
        const void *panel = element(p, before, ((segment * panels + j) * p->columns + b * p->run) * width);
        for (int64_t r0 = 0; r0 < count; r0 += PRODUCT_ROWS) {
          p->type->tile(depth, element(p, packed, r0 * depth), panel, tile, (fetch){panel, 0});
          for (int64_t r = 0; r < smaller(PRODUCT_ROWS, count - r0); r++) {
            int64_t k = block + r0 + r;
            void *to = after_row(p, dafter, segment, o0 + k / p->after_taps, k % p->after_taps);
            put_row(p, b > 0, smaller(width, p->depth - j * width), element(p, tile, r * width),
                    element(p, to, j * width));
          }
        }
      }
    }
    b += step;
  } while (b < p->before_taps);
}

device_status KERNEL(compose_backward_after)(device_context *context, const device_array *dafter, int64_t na,
                                             const device_array *dw, const device_array *before, int64_t nb,
                                             int64_t groups, bool turn) {
  composition p;
  if (!describe(&p, dw, dafter, na, before, nb, groups, turn))
    return DEVICE_UNSUPPORTED;
  bool parallel = worth_threads(&p);
  int threads = parallel ? omp_get_max_threads() : 1;
  output_tasks tasks = tasks_by_outputs(&p, threads);
  int64_t right = p.segments * packed_size(p.depth, p.type->columns, p.columns);
  int64_t left = PRODUCT_BLOCK * taps_at_once(&p) * p.run;
  void *scratch = context->workspace(context, (size_t)(64 + (right + threads * left) * p.type->size));
  if (!scratch)
    return DEVICE_FAILED;
#pragma omp parallel if (parallel) num_threads(threads)
  {
    void *packed = element(&p, scratch, right + omp_get_thread_num() * left);
    pack_before_turned(&p, before->data, scratch);
#pragma omp for
    for (int64_t k = 0; k < tasks.tasks; k++) {
      int64_t group = k / tasks.in_group, size = p.outputs / na, first = k % tasks.in_group * tasks.outputs;
      int64_t each = p.segments / na;
      for (int64_t s = group * each; s < (group + 1) * each; s++)
        after_gradient(&p, dafter->data, dw->data, scratch, s, group * size + first,
                       smaller(tasks.outputs, size - first), packed);
    }
  }
  return DEVICE_DONE;
}

/* ---- the gradient of `before` ---- */

/* A block of rows (channels t) and a range of columns (b,i) of one segment. */
typedef struct {
  int64_t segment, row, rows, column, columns;
} before_block;

/* after[first ... first + steps of (o,a), the block's channels], as steps. */
static void pack_after_steps(const composition *p, const void *after, const before_block *block, int64_t o0,
                             int64_t first, int64_t steps, void *packed) {
  for (int64_t r = 0; r < block->rows; r += PRODUCT_ROWS) {
    int64_t bytes = smaller(PRODUCT_ROWS, block->rows - r) * p->type->size, width = PRODUCT_ROWS * p->type->size;
    char *to = element(p, packed, r * steps);
    for (int64_t k = first; k < first + steps; k++, to += width) {
      const void *row = after_row(p, after, block->segment, o0 + k / p->after_taps, k % p->after_taps);
      memcpy(to, element(p, row, block->row + r), (size_t)bytes);
      memset(to + bytes, 0, (size_t)(width - bytes));
    }
  }
}

/* dw[first ... first + steps of (o,a), under columns first_column on], as steps of one panel. */
static void pack_dw_steps(const composition *p, const void *dw, int64_t segment, int64_t o0, int64_t first,
                          int64_t steps, int64_t column, void *panel) {
  int64_t width = p->type->columns, end = smaller(column + width, p->columns);
  for (int64_t k = 0; k < steps; k++) {
    int64_t o = o0 + (first + k) / p->after_taps, a = (first + k) % p->after_taps;
    void *to = element(p, panel, k * width);
    for (int64_t j = column; j < end;) {
      column_run run = next_run(p, j, end);
      memcpy(element(p, to, j - column), element(p, w_row(p, dw, segment, o, a, run.b), run.i),
             (size_t)(run.length * p->type->size));
      j += run.length;
    }
    memset(element(p, to, end - column), 0, (size_t)((width - end + column) * p->type->size));
  }
}

static void before_gradient(const composition *p, void *dbefore, const void *dw, const void *after,
                            const before_block *block, void *packed) {
  double tile[PRODUCT_ROWS * PRODUCT_MOST_COLUMNS] __attribute__((aligned(64)));
  int64_t group_outputs = p->outputs / p->after_groups, width = p->type->columns;
  int64_t o0 = block->segment / (p->segments / p->after_groups) * group_outputs, all = group_outputs * p->after_taps;
  int64_t first = 0, end = block->column + block->columns;
  void *panel = element(p, packed, PRODUCT_BLOCK * PRODUCT_DEPTH);
  do {
    int64_t steps = smaller(PRODUCT_DEPTH, all - first);
    pack_after_steps(p, after, block, o0, first, steps, packed);
    for (int64_t j = block->column; j < end; j += width) {
      pack_dw_steps(p, dw, block->segment, o0, first, steps, j, panel);
      for (int64_t r0 = 0; r0 < block->rows; r0 += PRODUCT_ROWS) {
        p->type->tile(steps, element(p, packed, r0 * steps), panel, tile, (fetch){panel, 0});
        for (int64_t r = 0; r < smaller(PRODUCT_ROWS, block->rows - r0); r++) {
          int64_t t = block->segment * p->depth + block->row + r0 + r;
          put_row(p, first > 0, smaller(width, end - j), element(p, tile, r * width),
                  element(p, dbefore, t * p->columns + j));
        }
      }
    }
    first += steps;
  } while (first < all);
}

device_status KERNEL(compose_backward_before)(device_context *context, const device_array *dbefore, int64_t nb,
                                              const device_array *dw, const device_array *after, int64_t na,
                                              int64_t groups, bool turn) {
  composition p;
  if (!describe(&p, dw, after, na, dbefore, nb, groups, turn))
    return DEVICE_UNSUPPORTED;
  bool parallel = worth_threads(&p);
  int threads = parallel ? omp_get_max_threads() : 1;
  /* Blocks of rows, each with all columns; where these are too few for the threads, with some. */
  int64_t rows = even_chunk(p.depth, PRODUCT_BLOCK, 1), blocks = divide_up(p.depth, rows) * p.segments;
  int64_t panels = divide_up(p.columns, p.type->columns), parts = blocks < 4 * threads ? threads : 1;
  int64_t columns = even_chunk(panels, larger(1, panels), parts) * p.type->columns;
  int64_t across = divide_up(p.columns, columns), each = (PRODUCT_BLOCK + p.type->columns) * PRODUCT_DEPTH;
  void *scratch = context->workspace(context, (size_t)(64 + threads * each * p.type->size));
  if (!scratch)
    return DEVICE_FAILED;
#pragma omp parallel for if (parallel) num_threads(threads)
  for (int64_t k = 0; k < blocks * across; k++) {
    int64_t in_segment = divide_up(p.depth, rows), block = k / across;
    int64_t row = block % in_segment * rows, column = k % across * columns;
    before_block part = {.segment = block / in_segment,
                         .row = row,
                         .rows = smaller(rows, p.depth - row),
                         .column = column,
                         .columns = smaller(columns, p.columns - column)};
    before_gradient(&p, dbefore->data, dw->data, after->data, &part, element(&p, scratch, omp_get_thread_num() * each));
  }
  return DEVICE_DONE;
}
