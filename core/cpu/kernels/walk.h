/* walk.h: arrays of one shape walked together, block by block. Axes are put in the order of the first array's memory
 * and joined where every array allows, so that dense arrays are one long axis, and a channels-last map beside a number
 * for each channel is rows of channels. Blocks are cut by size alone: which thread takes one changes nothing. */
#ifndef OREPA_CORE_CPU_WALK_H
#define OREPA_CORE_CPU_WALK_H

#include <omp.h>
#include <stdlib.h>

#include "cpu/cpu.h"

enum {
  WALK_ARRAYS = 6,
  PARALLEL_ELEMENTS = 1 << 16 /* from here on starting threads is worth it */
};

/* Blocks are cut from the last two axes, rows and columns, which there always are. */
typedef struct {
  int rank, arrays;
  int64_t count; /* elements */
  int64_t shape[OREPA_MAX_RANK], strides[WALK_ARRAYS][OREPA_MAX_RANK];
  int64_t steps[OREPA_MAX_RANK], blocks[OREPA_MAX_RANK]; /* a block's extent along each axis, and how many there are */
  int64_t block_count;
} walk;

typedef struct {
  int64_t index[OREPA_MAX_RANK]; /* which block along each axis */
  int64_t at[WALK_ARRAYS];       /* where each array's part begins, in elements */
  int64_t rows, columns, count;
} walk_block;

static inline bool walk_is_outer(const walk *w, int p, int q) {
  for (int n = 0; n < w->arrays; n++)
    if (w->strides[n][p] != w->strides[n][q])
      return llabs(w->strides[n][p]) > llabs(w->strides[n][q]);
  return true;
}

/* Whether walking q inside p is walking one axis, for every array. */
static inline bool walk_is_one_axis(const walk *w, int p, int q) {
  for (int n = 0; n < w->arrays; n++)
    if (w->strides[n][p] != w->strides[n][q] * w->shape[q])
      return false;
  return true;
}

static inline void walk_swap(int64_t *axes, int p) {
  int64_t kept = axes[p];
  axes[p] = axes[p - 1];
  axes[p - 1] = kept;
}

/* Takes in the axis that was put at w->rank, moved to its place among those before it if they are sorted. */
static inline void walk_put_last(walk *w, bool sorted) {
  for (int p = w->rank++; sorted && p > 0 && !walk_is_outer(w, p - 1, p); p--) {
    walk_swap(w->shape, p);
    for (int n = 0; n < w->arrays; n++)
      walk_swap(w->strides[n], p);
  }
}

static inline void walk_join(walk *w) {
  int last = 0;
  for (int p = 1; p < w->rank; p++) {
    bool one = walk_is_one_axis(w, last, p);
    if (!one)
      last++;
    w->shape[last] = one ? w->shape[last] * w->shape[p] : w->shape[p];
    for (int n = 0; n < w->arrays; n++)
      w->strides[n][last] = w->strides[n][p];
  }
  w->rank = w->rank ? last + 1 : 0;
}

/* At least two axes; new ones are outermost, of size 1. */
static inline void walk_pad(walk *w) {
  for (; w->rank < 2; w->rank++) {
    w->shape[1] = w->rank ? w->shape[0] : 1;
    w->shape[0] = 1;
    for (int n = 0; n < w->arrays; n++) {
      w->strides[n][1] = w->rank ? w->strides[n][0] : 0;
      w->strides[n][0] = 0;
    }
  }
}

/* Axes of size 1 are left out; `sorted`: in the order of the first array's memory, else in the order given. */
static inline void walk_begin(walk *w, bool sorted, int arrays, const device_array *const *given) {
  *w = (walk){.arrays = arrays, .count = 1};
  for (int d = 0; d < given[0]->rank; d++) {
    w->count *= given[0]->shape[d];
    if (given[0]->shape[d] == 1)
      continue;
    w->shape[w->rank] = given[0]->shape[d];
    for (int n = 0; n < arrays; n++)
      w->strides[n][w->rank] = given[n]->strides[d];
    walk_put_last(w, sorted);
  }
  walk_join(w);
  walk_pad(w);
}

/* Cuts the walk into blocks of so many rows and columns. */
static inline void walk_cut(walk *w, int64_t rows, int64_t columns) {
  w->block_count = 1;
  for (int p = 0; p < w->rank; p++) {
    w->steps[p] = p == w->rank - 1 ? columns : p == w->rank - 2 ? rows : 1;
    w->blocks[p] = w->count ? (w->shape[p] + w->steps[p] - 1) / w->steps[p] : 0;
    w->block_count *= w->blocks[p];
  }
}

/* Blocks of at most so many elements: a piece of a row, or some whole rows. */
static inline void walk_plan(walk *w, int64_t most, int arrays, const device_array *const *given) {
  walk_begin(w, true, arrays, given);
  int64_t rows = w->shape[w->rank - 2], columns = w->shape[w->rank - 1];
  int64_t fitting = columns > 0 && columns < most ? most / columns : 1;
  walk_cut(w, fitting < rows ? fitting : rows, columns < most ? columns : most);
}

static inline void walk_measure(const walk *w, walk_block *b) {
  int p = w->rank - 2, q = w->rank - 1;
  int64_t rows = w->shape[p] - b->index[p] * w->steps[p], columns = w->shape[q] - b->index[q] * w->steps[q];
  b->rows = rows < w->steps[p] ? rows : w->steps[p];
  b->columns = columns < w->steps[q] ? columns : w->steps[q];
  b->count = b->rows * b->columns;
}

static inline void walk_seek(const walk *w, int64_t number, walk_block *b) {
  for (int n = 0; n < w->arrays; n++)
    b->at[n] = 0;
  for (int p = w->rank - 1; p >= 0; p--) {
    b->index[p] = number % w->blocks[p];
    number /= w->blocks[p];
    for (int n = 0; n < w->arrays; n++)
      b->at[n] += b->index[p] * w->steps[p] * w->strides[n][p];
  }
  walk_measure(w, b);
}

static inline void walk_next(const walk *w, walk_block *b) {
  for (int p = w->rank - 1; p >= 0; p--) {
    bool carry = ++b->index[p] == w->blocks[p];
    int64_t moved = carry ? 1 - w->blocks[p] : 1; /* blocks along this axis */
    for (int n = 0; n < w->arrays; n++)
      b->at[n] += moved * w->steps[p] * w->strides[n][p];
    if (!carry)
      break;
    b->index[p] = 0;
  }
  walk_measure(w, b);
}

/* A thread's share of the pieces 0 ... count - 1: first ... end - 1. */
static inline void walk_share(int64_t count, int thread, int threads, int64_t *first, int64_t *end) {
  int64_t each = count / threads, more = count % threads;
  *first = thread * each + (thread < more ? thread : more);
  *end = *first + each + (thread < more);
}

#endif
