/* convert.h: runs of elements from one type and stride to another: how kernels load what they cannot use in place, and
 * store. The rules are those of the table's copy. */
#ifndef OREPA_CORE_CPU_CONVERT_H
#define OREPA_CORE_CPU_CONVERT_H

#include "cpu/cpu.h"

/* dst[i * dst_stride] = src[i * src_stride], i < n; strides count elements. No overlap. */
typedef void convert_run(int64_t n, void *dst, int64_t dst_stride, const void *src, int64_t src_stride);

convert_run *KERNEL(convert)(orepa_dtype dst, orepa_dtype src);

/* One side of a block of rows and columns. */
typedef struct {
  char *data;
  size_t size;         /* of an element */
  int64_t row, column; /* strides */
} convert_side;

/* A block, by whichever way needs fewer runs. */
static inline void convert_block(convert_run *run, int64_t rows, int64_t columns, convert_side dst, convert_side src) {
  if (rows == 1 || (dst.row == dst.column * columns && src.row == src.column * columns)) {
    run(rows * columns, dst.data, dst.column, src.data, src.column);
  } else if (rows <= columns) {
    for (int64_t r = 0; r < rows; r++)
      run(columns, dst.data + r * dst.row * (int64_t)dst.size, dst.column, src.data + r * src.row * (int64_t)src.size,
          src.column);
  } else {
    for (int64_t c = 0; c < columns; c++)
      run(rows, dst.data + c * dst.column * (int64_t)dst.size, dst.row, src.data + c * src.column * (int64_t)src.size,
          src.row);
  }
}

/* ---- an array beside a loop over dense runs of one type ---- */

typedef struct {
  size_t outside, inside; /* of an element of the array and of the loop's type */
  bool same;              /* they are of one type: what is dense is used where it is */
  convert_run *in, *out;
} convert_path;

static inline convert_path convert_path_of(orepa_dtype outside, orepa_dtype inside) {
  return (convert_path){orepa_dtype_size(outside), orepa_dtype_size(inside), outside == inside,
                        KERNEL(convert)(inside, outside), KERNEL(convert)(outside, inside)};
}

/* Whether a block of the array is what the loop takes, where it is. */
static inline bool convert_in_place(const convert_path *p, int64_t rows, int64_t columns, const convert_side *side) {
  return p->same && (rows * columns == 1 || (side->column == 1 && (rows == 1 || side->row == columns)));
}

static inline void convert_into(const convert_path *p, int64_t rows, int64_t columns, void *buffer, convert_side from) {
  convert_block(p->in, rows, columns, (convert_side){buffer, p->inside, columns, 1}, from);
}

static inline void convert_out_of(const convert_path *p, int64_t rows, int64_t columns, void *buffer, convert_side to) {
  convert_block(p->out, rows, columns, to, (convert_side){buffer, p->inside, columns, 1});
}

#endif
