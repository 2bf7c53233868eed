/* reduce.c: reductions over axes. The axes that stay and those that go are put in the order of the
 * source's memory and joined. Then the source is rows that each fold into one value, or, where neighbours in memory
 * stay apart (bias gradients: all axes but the channels go), columns that fold side by side. Long folds are cut into
 * chunks by size alone, whose values are folded in order: the same bits with any number of threads. */
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/kernels/convert.h"
#include "cpu/kernels/folds.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/walk.h"

enum {
  BUFFER = 2048,   /* elements that are loaded at a time: at least FOLD_WIDTH */
  TASKS = 64,      /* that a large reduction is cut into at least */
  SHORT = 32,      /* rows shorter than this are better folded as columns */
  FEW = 32,        /* columns that are better folded several rows at a time */
  CHUNK = 1 << 16, /* elements, at least */
  TASK_RUN = 4096  /* elements of short rows that a task folds */
};

typedef struct {
  int64_t size, src, dst; /* strides in elements */
} axis;

typedef struct {
  axis axes[OREPA_MAX_RANK];
  int count; /* at least one, made up if need be */
  int64_t size;
} axes;

typedef struct {
  orepa_reduction kind;
  bool positions_wanted;
  int type, state; /* FOLD_...: of elements and of values */
  axes kept, gone;
  bool columns;          /* fold side by side; else each value's elements are a row */
  int64_t width, blocks; /* values that a task makes along the last axis that stays, and how many tasks that axis is */
  int64_t tasks, chunk, chunks; /* a task is cut into chunks of so many elements of the axes that go */
  fold_value identity;
  const char *src;
  convert_path path;
  char *dst;
  size_t dst_size;
  convert_run *store;
  fold_value *values; /* (tasks, chunks, width), where chunks > 1 */
  int64_t *positions;
} job;

/* ---- the plan ---- */

static void take(axes *a, axis taken, bool sorted) {
  int p = a->count++;
  for (; sorted && p > 0 && llabs(a->axes[p - 1].src) < llabs(taken.src); p--)
    a->axes[p] = a->axes[p - 1];
  a->axes[p] = taken;
  a->size *= taken.size;
}

static void join(axes *a) {
  int last = 0;
  for (int p = 1; p < a->count; p++) {
    axis *outer = &a->axes[last], inner = a->axes[p];
    bool one = outer->src == inner.src * inner.size && outer->dst == inner.dst * inner.size;
    if (one)
      *outer = (axis){outer->size * inner.size, inner.src, inner.dst};
    else
      a->axes[++last] = inner;
  }
  if (a->count)
    a->count = last + 1;
  else
    a->axes[a->count++] = (axis){1, 0, 0};
}

static const axis *last_of(const axes *a) {
  return &a->axes[a->count - 1];
}

/* Positions count in logical order, so axes that go are sorted only where none is asked for. */
static void plan_axes(job *j, const device_array *dst, const device_array *src) {
  j->kept.size = j->gone.size = 1;
  for (int d = 0; d < src->rank; d++) {
    if (src->shape[d] == 1)
      continue;
    if (dst->shape[d] == 1)
      take(&j->gone, (axis){src->shape[d], src->strides[d], 0}, !j->positions_wanted);
    else
      take(&j->kept, (axis){src->shape[d], src->strides[d], dst->strides[d]}, true);
  }
  join(&j->kept);
  join(&j->gone);
}

static void plan_tasks(job *j) {
  const axis *kept = last_of(&j->kept), *gone = last_of(&j->gone);
  j->columns = kept->size > 1 && (llabs(kept->src) < llabs(gone->src) || (gone->size < SHORT && kept->size >= SHORT));
  int64_t width = j->columns || j->gone.size == 0 ? FOLD_WIDTH : TASK_RUN / j->gone.size;
  width = width < 1 ? 1 : width > FOLD_WIDTH ? FOLD_WIDTH : width;
  j->width = kept->size < width ? kept->size : width;
  j->blocks = (kept->size + j->width - 1) / j->width;
  j->tasks = j->kept.size / kept->size * j->blocks;
  int64_t least = CHUNK / j->width, wanted = (TASKS + j->tasks - 1) / j->tasks;
  j->chunk = (j->gone.size + wanted - 1) / wanted;
  j->chunk = j->chunk < least ? least : j->chunk;
  j->chunks = j->gone.size ? (j->gone.size + j->chunk - 1) / j->chunk : 1;
}

/* ---- folding ---- */

/* A task's first element in src and dst; how many values it makes. */
static int64_t place(const job *j, int64_t task, int64_t *src, int64_t *dst) {
  const axis *last = last_of(&j->kept);
  int64_t first = task % j->blocks * j->width, outer = task / j->blocks;
  *src = first * last->src;
  *dst = first * last->dst;
  for (int p = j->kept.count - 2; p >= 0; p--) {
    const axis *a = &j->kept.axes[p];
    *src += outer % a->size * a->src;
    *dst += outer % a->size * a->dst;
    outer /= a->size;
  }
  return last->size - first < j->width ? last->size - first : j->width;
}

/* Where element `number` of the axes that go is in src; how many there are from it on along the last axis. */
static int64_t place_gone(const axes *gone, int64_t number, int64_t *src) {
  int64_t left = last_of(gone)->size - number % last_of(gone)->size;
  *src = 0;
  for (int p = gone->count - 1; p >= 0; p--) {
    *src += number % gone->axes[p].size * gone->axes[p].src;
    number /= gone->axes[p].size;
  }
  return left;
}

/* n elements along the last axis that goes, the first of them at position `first`, into `count` values: as rows of n,
 * or as n rows of columns. */
static void fold_rows(const job *j, const char *src, int64_t n, int64_t count, fold_value *values, int64_t *positions,
                      int64_t first, void *buffer) {
  const fold *f = KERNEL(fold_of)(j->kind, j->type);
  int64_t size = (int64_t)j->path.outside, along = last_of(&j->gone)->src, across = last_of(&j->kept)->src;
  bool in_place = j->path.same && along == 1;
  int64_t piece = in_place ? FOLD_RUN : BUFFER;
  for (int64_t c = 0; c < count; c++)
    for (int64_t done = 0; done < n; done += piece) {
      int64_t part = n - done < piece ? n - done : piece;
      const char *from = src + (c * across + done * along) * size;
      if (!in_place)
        j->path.in(part, buffer, 1, from, along);
      f->row(part, in_place ? from : buffer, &values[c], &positions[c], first + done);
    }
}

/* Dense rows of few columns are folded as long rows of several, whose values are then rows of what they make. Gives
 * back how many rows that took. */
static int64_t fold_long_rows(const job *j, const char *src, int64_t n, int64_t count, fold_value *values) {
  const fold *elements = KERNEL(fold_of)(j->kind, j->type), *states = KERNEL(fold_of)(j->kind, j->state);
  int64_t together = FOLD_WIDTH / count, width = together * count, rows = n / together;
  fold_value made[FOLD_WIDTH];
  for (int64_t done = 0; done < rows; done += FOLD_ROWS) {
    int64_t part = rows - done < FOLD_ROWS ? rows - done : FOLD_ROWS;
    for (int64_t c = 0; c < width; c++)
      made[c] = j->identity;
    elements->columns(part, width, src + done * width * (int64_t)j->path.outside, width, made, NULL, 0);
    states->columns(together, count, made, count, values, NULL, 0);
  }
  return rows * together;
}

static void fold_columns_of(const job *j, const char *src, int64_t n, int64_t count, fold_value *values,
                            int64_t *positions, int64_t first, void *buffer) {
  const fold *f = KERNEL(fold_of)(j->kind, j->type);
  int64_t size = (int64_t)j->path.outside, along = last_of(&j->gone)->src, across = last_of(&j->kept)->src, done = 0;
  bool in_place = j->path.same && across == 1;
  int64_t piece = in_place || FOLD_ROWS < BUFFER / count ? FOLD_ROWS : BUFFER / count;
  if (in_place && along == count && count <= FEW && !j->positions_wanted)
    done = fold_long_rows(j, src, n, count, values);
  for (; done < n; done += piece) {
    int64_t part = n - done < piece ? n - done : piece;
    convert_side from = {(char *)src + done * along * size, j->path.outside, along, across};
    if (!in_place)
      convert_into(&j->path, part, count, buffer, from);
    f->columns(part, count, in_place ? from.data : buffer, in_place ? along : count, values, positions, first + done);
  }
}

static void store(const job *j, int64_t dst, int64_t count, const fold_value *values, const int64_t *positions) {
  j->store(count, j->dst + dst * (int64_t)j->dst_size, last_of(&j->kept)->dst,
           j->positions_wanted ? (const void *)positions : values, 1);
}

static void fold_chunk(const job *j, int64_t task, int64_t chunk, void *buffer) {
  fold_value values[FOLD_WIDTH];
  int64_t positions[FOLD_WIDTH], src, dst, count = place(j, task, &src, &dst);
  for (int64_t c = 0; c < count; c++) {
    values[c] = j->identity;
    positions[c] = -1;
  }
  int64_t at = chunk * j->chunk, end = j->gone.size - at < j->chunk ? j->gone.size : at + j->chunk;
  while (at < end) {
    int64_t gone, n = place_gone(&j->gone, at, &gone);
    n = n < end - at ? n : end - at;
    const char *from = j->src + (src + gone) * (int64_t)j->path.outside;
    (j->columns ? fold_columns_of : fold_rows)(j, from, n, count, values, positions, at, buffer);
    at += n;
  }
  if (!j->values) {
    store(j, dst, count, values, positions);
  } else {
    int64_t to = (task * j->chunks + chunk) * j->width;
    memcpy(j->values + to, values, (size_t)count * sizeof *values);
    memcpy(j->positions + to, positions, (size_t)count * sizeof *positions);
  }
}

static void fold_share(const job *j, int thread, int threads) {
  double buffer[BUFFER];
  int64_t first, end;
  walk_share(j->tasks * j->chunks, thread, threads, &first, &end);
  for (; first < end; first++)
    fold_chunk(j, first / j->chunks, first % j->chunks, buffer);
}

/* Folds a task's chunks, as rows of which the best one's number leads to its position. */
static void fold_chunks(const job *j, int64_t task) {
  fold_value values[FOLD_WIDTH];
  int64_t positions[FOLD_WIDTH], src, dst, count = place(j, task, &src, &dst), from = task * j->chunks * j->width;
  for (int64_t c = 0; c < count; c++) {
    values[c] = j->identity;
    positions[c] = -1;
  }
  KERNEL(fold_of)(j->kind, j->state)->columns(j->chunks, count, j->values + from, j->width, values, positions, 0);
  for (int64_t c = 0; c < count; c++)
    if (positions[c] >= 0)
      positions[c] = j->positions[from + positions[c] * j->width + c];
  store(j, dst, count, values, positions);
}

/* ---- the call ---- */

static device_status run(job *j, device_context *context) {
  if (j->chunks > 1) {
    size_t count = (size_t)(j->tasks * j->chunks * j->width);
    j->values = context->workspace(context, count * (sizeof *j->values + sizeof *j->positions));
    if (!j->values)
      return DEVICE_FAILED;
    j->positions = (int64_t *)(j->values + count);
  }
  if (j->kept.size * j->gone.size < PARALLEL_ELEMENTS) {
    fold_share(j, 0, 1);
  } else {
#pragma omp parallel
    fold_share(j, omp_get_thread_num(), omp_get_num_threads());
  }
  for (int64_t task = 0; j->chunks > 1 && task < j->tasks; task++)
    fold_chunks(j, task);
  return DEVICE_DONE;
}

device_status KERNEL(reduce)(device_context *context, orepa_reduction kind, const device_array *dst,
                             const device_array *src) {
  static const orepa_dtype types[FOLD_TYPES] = {OREPA_FLOAT32, OREPA_FLOAT64, OREPA_INT64};
  if (kind == OREPA_MEAN)
    return DEVICE_UNSUPPORTED;
  job j = {.kind = kind, .src = src->data, .dst = dst->data, .dst_size = orepa_dtype_size(dst->dtype)};
  bool real = orepa_dtype_is_float(src->dtype);
  j.positions_wanted = kind == OREPA_ARGMAX || kind == OREPA_ARGMIN;
  j.type = !real ? FOLD_INT64 : src->dtype == OREPA_FLOAT64 ? FOLD_DOUBLE : FOLD_FLOAT;
  j.state = real ? FOLD_DOUBLE : FOLD_INT64;
  j.identity = KERNEL(fold_identity)(kind, j.state);
  j.path = convert_path_of(src->dtype, types[j.type]);
  j.store = KERNEL(convert)(dst->dtype, j.positions_wanted ? OREPA_INT64 : types[j.state]);
  plan_axes(&j, dst, src);
  if (j.kept.size == 0)
    return DEVICE_DONE;
  if (j.gone.size == 0 && (j.positions_wanted || kind == OREPA_MAX || kind == OREPA_MIN)) {
    error_set("there is no element to choose from");
    return DEVICE_FAILED;
  }
  plan_tasks(&j);
  return run(&j, context);
}
