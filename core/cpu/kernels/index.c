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

/* All elements of the rest, `span` numbers each. */
static device_status run_pieces(device_context *context, const index_plan *p, int64_t span, piece *run,
                                const device_array *y, const device_array *x, const device_array *index) {
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
  return DEVICE_DONE;
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
  return run_pieces(context, &p, p.width ? p.length : 0, gather_piece, y, x, index);
}

/* ---- scatter_add ---- */

#define ADD_ROW(T)                                                                                                     \
  {                                                                                                                    \
    T *sum = (T *)y->data + to + i * y->strides[p->axis];                                                              \
    const T *more = (const T *)x->data + from + n * x->strides[p->axis];                                               \
    _Pragma("omp simd") for (int64_t c = first; c < last; c++) sum[c] += more[c];                                      \
  }

/* Elements first ... last - 1 of the dense axis (0 ... 0 without one), of element k of the rest. */
static void add_piece(const index_plan *p, const device_array *y, const device_array *x, const device_array *index,
                      int64_t k, int64_t first, int64_t last, offence *found) {
  const int64_t *named = (const int64_t *)index->data + begin(p, index, index, k);
  int64_t to = begin(p, index, y, k), from = begin(p, index, x, k);
  for (int64_t n = 0; n < p->length; n++) {
    int64_t i = named[n * index->strides[p->axis]];
    if (i < 0 || i >= y->shape[p->axis])
      note(found, n, i);
    else if (y->dtype == OREPA_FLOAT32)
      ADD_ROW(float)
    else if (y->dtype == OREPA_FLOAT64)
      ADD_ROW(double)
    else
      ADD_ROW(uint64_t)
  }
}
#undef ADD_ROW

/* Each task adds in the order of the axis, to elements that are no other's. */
device_status KERNEL(scatter_add)(device_context *context, int axis, const device_array *y, const device_array *x,
                                  const device_array *index) {
  if (y->dtype != OREPA_FLOAT32 && y->dtype != OREPA_FLOAT64 && y->dtype != OREPA_INT64)
    return DEVICE_UNSUPPORTED;
  index_plan p = plan_of(axis, x, y, index);
  return run_pieces(context, &p, p.width, add_piece, y, x, index);
}
