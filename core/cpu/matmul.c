/* matmul.c: batches of matrix products, by oneDNN. */
#include "cpu/matmul.h"

#include <omp.h>
#include <pthread.h>
#include <string.h>

#include "cpu/onednn.h"
#include "cpu/scratch.h"

static int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}

/* ---- one product ---- */

enum {
  APART = 1 << 17,   /* numbers that are moved apart at a time */
  APART_SIDE = 128,  /* sizes of a product from which that pays */
  APART_STEP = 128,  /* rows whose length is a multiple of this many numbers meet in a few cache sets */
  APART_MOST = 1024, /* from here the library packs by itself */
  GAP = 16,
  PARALLEL_FROM = 1 << 16,
};

/* The library walks down the columns of a turned factor where it lies. Row lengths of a power of two then cost it up to
 * a third of its speed, so the rows of such a factor are copied first, some at a time, with gaps between them. */
static struct {
  pthread_mutex_t lock;
  _Alignas(64) float numbers[APART];
} apart = {.lock = PTHREAD_MUTEX_INITIALIZER};

static device_status product_apart(bool turn_b, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                                   const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  int64_t step = m + GAP, depth = APART / step;
  device_status status = DEVICE_DONE;
  pthread_mutex_lock(&apart.lock);
  for (int64_t first = 0; first < k && status == DEVICE_DONE; first += depth) {
    int64_t rows = smaller(depth, k - first);
#pragma omp parallel for schedule(static) if (rows * m >= PARALLEL_FROM)
    for (int64_t r = 0; r < rows; r++)
      memcpy(apart.numbers + r * step, a + (first + r) * lda, (size_t)m * sizeof *a);
    status = onednn_product(true, turn_b, m, n, rows, apart.numbers, step, turn_b ? b + first : b + first * ldb, ldb,
                            first ? 1 : beta, c, ldc);
  }
  pthread_mutex_unlock(&apart.lock);
  return status;
}

device_status cpu_product(bool turn_a, bool turn_b, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                          const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  bool moves = turn_a && lda % APART_STEP == 0 && m >= APART_SIDE && m < APART_MOST && n >= APART_SIDE && k >= GAP;
  if (moves && !omp_in_parallel())
    return product_apart(turn_b, m, n, k, a, lda, b, ldb, beta, c, ldc);
  if (k > 0)
    return onednn_product(turn_a, turn_b, m, n, k, a, lda, b, ldb, beta, c, ldc);
  for (int64_t r = 0; r < m; r++)
    for (int64_t j = 0; j < n; j++)
      c[r * ldc + j] = beta == 0 ? 0 : beta * c[r * ldc + j];
  return DEVICE_DONE;
}

/* ---- batches ---- */

enum { LENT = 1 << 14, /* bytes of scratch for a kernel that copies */ SMALL = 1 << 21 /* multiplications */ };

/* A batch of matrices (B, rows, columns) as the library takes it: rows or columns without gaps. */
typedef struct {
  device_array array;
  bool turned;  /* columns are what has no gaps */
  int64_t step; /* from row to row, or from column to column */
  bool copied;  /* the array is a dense copy in scratch, at `place` */
  size_t place;
} operand;

/* Of a side of size 1 the stride says nothing. */
static bool lies_well(operand *o) {
  int64_t rows = o->array.shape[1], columns = o->array.shape[2], down = o->array.strides[1],
          across = o->array.strides[2];
  if ((across == 1 || columns == 1) && (down >= columns || rows == 1)) {
    o->step = rows == 1 ? columns : down;
    return true;
  }
  o->turned = (down == 1 || rows == 1) && (across >= rows || columns == 1);
  o->step = columns == 1 ? rows : across;
  return o->turned;
}

/* An array as an operand of `dtype`, with a place in scratch if it is to be copied; a repeated matrix is copied once.
 */
static operand prepare(const device_array *t, orepa_dtype dtype, cpu_scratch *scratch) {
  operand o = {.array = *t};
  if (t->dtype == dtype && lies_well(&o))
    return o;
  int64_t rows = t->shape[1], columns = t->shape[2];
  o = (operand){.array = *t, .copied = true, .step = columns};
  o.array.dtype = dtype;
  o.array.shape[0] = t->strides[0] == 0 ? 1 : t->shape[0];
  o.array.strides[0] = t->strides[0] == 0 ? 0 : rows * columns;
  o.array.strides[1] = columns;
  o.array.strides[2] = 1;
  o.place = scratch_place(scratch, (size_t)(o.array.shape[0] * rows * columns) * orepa_dtype_size(dtype));
  return o;
}

static device_status fetch(device_context *lent, operand *o, const device_array *t, const cpu_scratch *scratch) {
  device_array from = *t;
  if (!o->copied)
    return DEVICE_DONE;
  from.shape[0] = o->array.shape[0];
  o->array.data = scratch->memory + o->place;
  return lent->device->copy(lent, &o->array, &from);
}

static device_status product_of(const device_array *c, const operand *a, const operand *b, int64_t batch, int64_t rows,
                                float beta, bool alone) {
  int64_t n = c->shape[2], k = a->array.shape[2];
  const float *left = (const float *)a->array.data + batch * a->array.strides[0];
  const float *right = (const float *)b->array.data + batch * b->array.strides[0];
  float *to = (float *)c->data + batch * c->shape[1] * n;
  return (alone ? cpu_product : onednn_product)(a->turned, b->turned, rows, n, k, left, a->step, right, b->step, beta,
                                                to, n);
}

/* c = a . b + beta * c, all float32. Many small products are shared out between the threads. */
static device_status products(const device_array *c, const operand *a, const operand *b, float beta) {
  int64_t batch = c->shape[0], m = c->shape[1], work = m * c->shape[2] * a->array.shape[2];
  device_status result = DEVICE_DONE;
  if (b->array.strides[0] == 0 && !a->turned && a->array.strides[0] == m * a->step) /* one product of all rows */
    return product_of(c, a, b, 0, batch * m, beta, true);
  if (batch < omp_get_max_threads() || work > SMALL) {
    for (int64_t k = 0; k < batch && result == DEVICE_DONE; k++)
      result = product_of(c, a, b, k, m, beta, true);
    return result;
  }
#pragma omp parallel for schedule(static) if (batch * work >= PARALLEL_FROM)
  for (int64_t k = 0; k < batch; k++) {
    device_status status = product_of(c, a, b, k, m, beta, false);
    if (status != DEVICE_DONE) {
#pragma omp atomic write
      result = status;
    }
  }
  return result;
}

/* The bias as an array of c's shape. */
static device_array spread(const device_array *bias, const device_array *c) {
  device_array row = *c;
  row.data = bias->data;
  row.dtype = bias->dtype;
  row.strides[0] = row.strides[1] = 0;
  row.strides[2] = bias->strides[0];
  return row;
}

static device_status matmul_float(device_context *context, const device_array *c, const device_array *a,
                                  const device_array *b, const device_array *bias) {
  cpu_scratch scratch = {0};
  operand left = prepare(a, OREPA_FLOAT32, &scratch), right = prepare(b, OREPA_FLOAT32, &scratch);
  device_array to = *c, row = bias ? spread(bias, c) : *c;
  bool converts = c->dtype != OREPA_FLOAT32;
  to.dtype = OREPA_FLOAT32;
  size_t result =
      converts ? scratch_place(&scratch, (size_t)(c->shape[0] * c->shape[1] * c->shape[2]) * sizeof(float)) : 0;
  size_t piece = scratch_place(&scratch, LENT);
  if (!scratch_take(&scratch, context))
    return DEVICE_FAILED;
  if (converts)
    to.data = scratch.memory + result;
  device_context lent = scratch_lend(context, scratch.memory + piece, LENT);
  device_status status = fetch(&lent, &left, a, &scratch);
  if (status == DEVICE_DONE)
    status = fetch(&lent, &right, b, &scratch);
  if (status == DEVICE_DONE && bias)
    status = context->device->copy(&lent, &to, &row);
  if (status == DEVICE_DONE)
    status = products(&to, &left, &right, bias ? 1 : 0);
  return status == DEVICE_DONE && converts ? context->device->copy(&lent, c, &to) : status;
}

/* The library's own product of short floats, where it has a fast one. */
static device_status matmul_bfloat16(device_context *context, const device_array *c, const device_array *a,
                                     const device_array *b, const device_array *bias) {
  cpu_scratch scratch = {0};
  operand left = prepare(a, OREPA_BFLOAT16, &scratch), right = prepare(b, OREPA_BFLOAT16, &scratch);
  onednn_matmul_shape shape = {OREPA_BFLOAT16, OREPA_BFLOAT16, c->shape[0], c->shape[1],
                               c->shape[2],    a->shape[2],    {0},         {0}};
  const operand *operands[2] = {&left, &right};
  for (int k = 0; k < 2; k++) {
    const operand *o = operands[k];
    int64_t *strides = k == 0 ? shape.a_strides : shape.b_strides;
    strides[0] = shape.batch == 1 ? 0 : o->array.strides[0];
    strides[1] = o->turned ? 1 : o->step;
    strides[2] = o->turned ? o->step : 1;
  }
  size_t bytes;
  device_status status = onednn_matmul_scratch(&shape, bias, &bytes);
  if (status != DEVICE_DONE)
    return status;
  size_t own = scratch_place(&scratch, bytes), piece = scratch_place(&scratch, LENT);
  size_t dense_bias = scratch_place(&scratch, bias ? (size_t)shape.n * sizeof(uint16_t) : 0);
  if (!scratch_take(&scratch, context))
    return DEVICE_FAILED;
  device_context lent = scratch_lend(context, scratch.memory + piece, LENT);
  status = fetch(&lent, &left, a, &scratch);
  if (status == DEVICE_DONE)
    status = fetch(&lent, &right, b, &scratch);
  uint16_t *added = (uint16_t *)(scratch.memory + dense_bias);
  for (int64_t n = 0; bias && n < shape.n; n++)
    added[n] = ((const uint16_t *)bias->data)[n * bias->strides[0]];
  return status ? status
                : onednn_matmul(&shape, left.array.data, right.array.data, bias ? added : NULL, c->data,
                                scratch.memory + own);
}

device_status cpu_matmul(device_context *context, const device_array *c, const device_array *a, const device_array *b,
                         const device_array *bias);

device_status cpu_matmul(device_context *context, const device_array *c, const device_array *a, const device_array *b,
                         const device_array *bias) {
  if ((c->dtype != OREPA_FLOAT32 && c->dtype != OREPA_BFLOAT16) || a->dtype != c->dtype || b->dtype != c->dtype ||
      (bias && bias->dtype != c->dtype))
    return DEVICE_UNSUPPORTED;
  if (c->shape[0] * c->shape[1] * c->shape[2] == 0)
    return DEVICE_DONE;
  if (a->shape[2] == 0) {
    device_array row = bias ? spread(bias, c) : *c;
    return bias ? context->device->copy(context, c, &row) : context->device->fill(context, c, (device_number){0});
  }
  if (c->dtype == OREPA_BFLOAT16) {
    device_status status = matmul_bfloat16(context, c, a, b, bias);
    if (status != DEVICE_UNSUPPORTED)
      return status;
  }
  return matmul_float(context, c, a, b, bias);
}
