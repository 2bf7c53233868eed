/* folds.h: what reductions do to runs: rows folded into one value, or added up column by column into many. A fold's
 * state is wider than what it reads where that matters: double for float, so that only short runs are summed in float.
 */
#ifndef OREPA_CORE_CPU_FOLDS_H
#define OREPA_CORE_CPU_FOLDS_H

#include "cpu/cpu.h"

enum {
  FOLD_WIDTH = 512, /* columns at a time */
  FOLD_RUN = 4096,  /* elements of a row at a time */
  FOLD_ROWS = 256   /* rows at a time */
};

/* What elements are read as, and what a fold's values are: double for floats. */
enum { FOLD_FLOAT, FOLD_DOUBLE, FOLD_INT64, FOLD_TYPES };

typedef union {
  double real;
  int64_t integer;
} fold_value;

/* x[0 ... n-1], at most FOLD_RUN, into one value. `position` is that of the element chosen (-1: none yet), `first` that
 * of x[0]; folds other than ARGMAX and ARGMIN leave it alone. */
typedef void fold_row(int64_t n, const void *x, fold_value *value, int64_t *position, int64_t first);
/* Rows of n columns, at most FOLD_ROWS and FOLD_WIDTH, into n values; `first` is the position of the first row. */
typedef void fold_columns(int64_t rows, int64_t n, const void *x, int64_t stride, fold_value *values,
                          int64_t *positions, int64_t first);

typedef struct {
  fold_row *row;
  fold_columns *columns;
} fold;

/* NULL entries for MEAN. */
const fold *KERNEL(fold_of)(orepa_reduction kind, int type);
/* What nothing folds to. */
fold_value KERNEL(fold_identity)(orepa_reduction kind, int type);

#endif
