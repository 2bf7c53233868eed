/* index.c: elements found by integers. An axis that is dense and along which the integers repeat is taken in one piece:
 * the rows of a table. */
#include <omp.h>
#include <string.h>

#include "cpu/kernels/kernels.h"

enum { PIECE = 256, /* positions along the axis, or elements of a row, of one task */ PARALLEL_FROM = 1 << 15 };

/* The axis, the one that is dense (-1: none) and what is left. */
typedef struct {
  int axis, dense;
  int64_t length, width, others; /* positions along the axis, elements of the dense one, and of the rest together */
} index_plan;

static index_plan plan_of(int axis, const device_array *shaped, const device_array *other, const device_array *index) {
  index_plan p = {.axis = axis, .dense = -1, .length = index->shape[axis], .width = 1, .others = 1};
  for (int d = 0; d < index->rank; d++)
    if (d != axis && shaped->strides[d] == 1 && other->strides[d] == 1 && index->strides[d] == 0)
      p.dense = d;
  for (int d = 0; d < index->rank; d++)
    if (d == p.dense)
      p.width = index->shape[d];
    else if (d != axis)
      p.others *= index->shape[d];
  return p;
}

/* Where element k of the rest begins. */
static int64_t begin(const index_plan *p, const device_array *index, const device_array *a, int64_t k) {
  int64_t at = 0;
  for (int d = index->rank; d-- > 0;)
    if (d != p->axis && d != p->dense) {
      at += k % index->shape[d] * a->strides[d];
      k /= index->shape[d];
    }
  return at;
}

/* The first position along the axis whose integer is none. */
typedef struct {
  int64_t position, value;
} offence;

static void note(offence *first, int64_t position, int64_t value) {
  if (position < first->position)
    *first = (offence){position, value};
}

/* Numbers first ... last - 1 of what a task is cut from, of element k of the rest. */
typedef void piece(const index_plan *p, const device_array *y, const device_array *x, const device_array *index,
                   int64_t k, int64_t first, int64_t last, offence *found);

/* All elements of the rest, `span` numbers each. Whether every integer that was looked at is a position. */
static bool run_pieces(device_context *context, const index_plan *p, int64_t span, piece *run, const device_array *y,
                       const device_array *x, const device_array *index) {
  int64_t pieces = (span + PIECE - 1) / PIECE;
  offence first = {p->length, 0};
#pragma omp parallel if (p->others * p->length * p->width >= PARALLEL_FROM)
  {
    offence found = {p->length, 0};
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < p->others * pieces; task++) {
      int64_t start = task % pieces * PIECE, end = start + PIECE < span ? start + PIECE : span;
      run(p, y, x, index, task / pieces, start, end, &found);
    }
#pragma omp critical
    note(&first, found.position, found.value);
  }
  if (first.position < p->length && context->offence_position < 0) {
    context->offence = first.value;
    context->offence_position = first.position;
  }
  return first.position == p->length;
}

/* ---- gather ---- */

static void move(char *to, const char *from, size_t bytes) {
  if (bytes == 4)
    memcpy(to, from, 4);
  else
    memcpy(to, from, bytes);
}

/* Positions first ... last - 1 along the axis, of element k of the rest. */
static void gather_piece(const index_plan *p, const device_array *y, const device_array *x, const device_array *index,
                         int64_t k, int64_t first, int64_t last, offence *found) {
  const int64_t *named = (const int64_t *)index->data + begin(p, index, index, k);
  int64_t size = (int64_t)orepa_dtype_size(x->dtype);
  char *to = (char *)y->data + begin(p, index, y, k) * size;
  const char *from = (const char *)x->data + begin(p, index, x, k) * size;
  size_t bytes = (size_t)(p->width * size);
  for (int64_t n = first; n < last; n++) {
    int64_t i = named[n * index->strides[p->axis]];
    char *row = to + n * y->strides[p->axis] * size;
    if (i >= 0 && i < x->shape[p->axis]) {
      move(row, from + i * x->strides[p->axis] * size, bytes);
    } else {
      memset(row, 0, bytes);
      note(found, n, i);
    }
  }
}

device_status KERNEL(gather)(device_context *context, int axis, const device_array *y, const device_array *x,
                             const device_array *index) {
  index_plan p = plan_of(axis, y, x, index);
  /* nothing is named where there is nothing to move */
  run_pieces(context, &p, p.width ? p.length : 0, gather_piece, y, x, index);
  return DEVICE_DONE;
}

/* ---- scatter ---- */

#define ADD_ROW(T)                                                                                                     \
  {                                                                                                                    \
    T *sum = (T *)y->data + to;                                                                                        \
    const T *more = (const T *)x->data + from;                                                                         \
    _Pragma("omp simd") for (int64_t c = first; c < last; c++) sum[c] += more[c];                                      \
  }

static void add_row(const device_array *y, int64_t to, const device_array *x, int64_t from, int64_t first,
                    int64_t last) {
  if (y->dtype == OREPA_FLOAT32)
    ADD_ROW(float)
  else if (y->dtype == OREPA_FLOAT64)
    ADD_ROW(double)
  else
    ADD_ROW(uint64_t)
}
#undef ADD_ROW

static void set_row(const device_array *y, int64_t to, const device_array *x, int64_t from, int64_t first,
                    int64_t last) {
  int64_t size = (int64_t)orepa_dtype_size(y->dtype);
  move((char *)y->data + (to + first) * size, (const char *)x->data + (from + first) * size,
       (size_t)((last - first) * size));
}

typedef void write_row(const device_array *y, int64_t to, const device_array *x, int64_t from, int64_t first,
                       int64_t last);

/* Elements first ... last - 1 of the dense axis (0 ... 0 without one), of element k of the rest. */
static inline void scatter_piece(write_row *write, const index_plan *p, const device_array *y, const device_array *x,
                                 const device_array *index, int64_t k, int64_t first, int64_t last) {
  const int64_t *named = (const int64_t *)index->data + begin(p, index, index, k);
  int64_t to = begin(p, index, y, k), from = begin(p, index, x, k);
  for (int64_t n = 0; n < p->length; n++)
    write(y, to + named[n * index->strides[p->axis]] * y->strides[p->axis], x, from + n * x->strides[p->axis], first,
          last);
}

static void add_piece(const index_plan *p, const device_array *y, const device_array *x, const device_array *index,
                      int64_t k, int64_t first, int64_t last, offence *found) {
  (void)found;
  scatter_piece(add_row, p, y, x, index, k, first, last);
}

static void set_piece(const index_plan *p, const device_array *y, const device_array *x, const device_array *index,
                      int64_t k, int64_t first, int64_t last, offence *found) {
  (void)found;
  scatter_piece(set_row, p, y, x, index, k, first, last);
}

/* Positions first ... last - 1 along the axis, of element k of the rest. */
static void check_piece(const index_plan *p, const device_array *y, const device_array *x, const device_array *index,
                        int64_t k, int64_t first, int64_t last, offence *found) {
  (void)x;
  const int64_t *named = (const int64_t *)index->data + begin(p, index, index, k);
  for (int64_t n = first; n < last; n++) {
    int64_t i = named[n * index->strides[p->axis]];
    if (i < 0 || i >= y->shape[p->axis])
      note(found, n, i);
  }
}

/* Each task writes in the order of the axis, to elements that are no other's. */
device_status KERNEL(scatter)(device_context *context, bool adds, int axis, const device_array *y,
                              const device_array *x, const device_array *index) {
  if (adds && y->dtype != OREPA_FLOAT32 && y->dtype != OREPA_FLOAT64 && y->dtype != OREPA_INT64)
    return DEVICE_UNSUPPORTED;
  index_plan p = plan_of(axis, x, y, index);
  if (run_pieces(context, &p, p.width ? p.length : 0, check_piece, y, x, index))
    run_pieces(context, &p, p.width, adds ? add_piece : set_piece, y, x, index);
  return DEVICE_DONE;
}
