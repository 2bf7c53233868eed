/* copy.c: writing arrays: copies of any strides and types, and one value everywhere. */
#include <string.h>

#include "cpu/kernels/convert.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/walk.h"

enum { BLOCK = 1 << 14 /* elements: shared out among threads */, TILE = 32 };

enum { TO, FROM }; /* the arrays of the walk */

typedef struct {
  walk w;
  convert_run *run;
  bool transposed; /* blocks are tiles of which TO is dense along the columns, FROM along the rows */
  bool words;      /* ... and elements keep their four bytes */
  convert_side to, from;
} job;

static convert_side side_of(const walk *w, int array, const device_array *a) {
  const int64_t *strides = &w->strides[array][w->rank - 2];
  return (convert_side){a->data, orepa_dtype_size(a->dtype), strides[0], strides[1]};
}

/* Where the source is dense along another axis than the destination is, that one becomes the rows, and blocks are tiles
 * small enough that the lines of both stay in the first cache. */
static void plan_tiles(walk *w, bool *transposed) {
  int columns = w->rank - 1, rows = w->rank - 2;
  *transposed = false;
  if (!w->count || w->strides[TO][columns] != 1 || w->strides[FROM][columns] == 1)
    return;
  for (int p = 0; p < columns && !*transposed; p++) {
    if (w->strides[FROM][p] != 1 || w->shape[p] == 1)
      continue;
    for (; p < rows; p++) { /* moved inwards, the order of the others stays */
      walk_swap(w->shape, p + 1);
      walk_swap(w->strides[TO], p + 1);
      walk_swap(w->strides[FROM], p + 1);
    }
    *transposed = true;
  }
  if (*transposed) {
    int64_t wide = w->shape[columns] < TILE ? w->shape[columns] : TILE;
    walk_cut(w, TILE * TILE / wide, wide);
  }
}

/* ---- tiles of four-byte elements ---- */

typedef uint32_t four __attribute__((vector_size(16)));

static inline four load_four(const uint32_t *from) {
  four values;
  memcpy(&values, from, sizeof values);
  return values;
}

static inline void store_four(uint32_t *to, four values) {
  memcpy(to, &values, sizeof values);
}

/* to[r*to_row + c] = from[r + c*from_column], r, c < 4. */
static inline void transpose_four(uint32_t *to, int64_t to_row, const uint32_t *from, int64_t from_column) {
  four a = load_four(from), b = load_four(from + from_column);
  four c = load_four(from + 2 * from_column), d = load_four(from + 3 * from_column);
  four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store_four(to, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
  store_four(to + to_row, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
  store_four(to + 2 * to_row, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  store_four(to + 3 * to_row, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

static void transpose_words(int64_t rows, int64_t columns, convert_side dst, convert_side src) {
  uint32_t *to = (uint32_t *)dst.data;
  const uint32_t *from = (const uint32_t *)src.data;
  int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t first = 0; first < whole_columns; first += 16) /* lines of `to` are written whole */
    for (int64_t r = 0; r < whole_rows; r += 4)
      for (int64_t c = first; c < first + 16 && c < whole_columns; c += 4)
        transpose_four(to + r * dst.row + c, dst.row, from + r + c * src.column, src.column);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++)
      to[r * dst.row + c] = from[r + c * src.column];
}

/* ---- the call ---- */

static void run_share(const job *j, int thread, int threads) {
  int64_t first, end;
  walk_share(j->w.block_count, thread, threads, &first, &end);
  walk_block b;
  for (int64_t n = first; n < end; n++) {
    if (n == first)
      walk_seek(&j->w, n, &b);
    else
      walk_next(&j->w, &b);
    convert_side to = j->to, from = j->from;
    to.data += b.at[TO] * (int64_t)to.size;
    from.data += b.at[FROM] * (int64_t)from.size;
    if (j->words)
      transpose_words(b.rows, b.columns, to, from);
    else
      convert_block(j->run, b.rows, b.columns, to, from);
  }
}

static device_status run(const job *j) {
  if (j->w.count < PARALLEL_ELEMENTS) {
    run_share(j, 0, 1);
  } else {
#pragma omp parallel
    run_share(j, omp_get_thread_num(), omp_get_num_threads());
  }
  return DEVICE_DONE;
}

device_status KERNEL(copy)(device_context *context, const device_array *dst, const device_array *src) {
  (void)context;
  const device_array *const arrays[] = {dst, src};
  job j = {.run = KERNEL(convert)(dst->dtype, src->dtype)};
  walk_plan(&j.w, BLOCK, 2, arrays);
  plan_tiles(&j.w, &j.transposed);
  j.words = j.transposed && dst->dtype == src->dtype && orepa_dtype_size(dst->dtype) == 4;
  j.to = side_of(&j.w, TO, dst);
  j.from = side_of(&j.w, FROM, src);
  return run(&j);
}

/* A copy of one element that repeats. */
device_status KERNEL(fill)(device_context *context, const device_array *dst, device_number value) {
  bool real = orepa_dtype_is_float(dst->dtype) || dst->dtype == OREPA_BOOL; /* 0.5 is true */
  uint64_t element = 0;
  if (real)
    KERNEL(convert)(dst->dtype, OREPA_FLOAT64)(1, &element, 1, &value.real, 1);
  else
    KERNEL(convert)(dst->dtype, OREPA_INT64)(1, &element, 1, &value.integer, 1);
  device_array source = *dst;
  source.data = &element;
  memset(source.strides, 0, sizeof source.strides);
  return KERNEL(copy)(context, dst, &source);
}
