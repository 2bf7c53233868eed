/* square_sums.c: the sum of squares of each of many arrays, in double: norms of gradients. All arrays are cut into
 * chunks by size alone, which threads share; a chunk's sum is kept and added in order. */
#include <omp.h>

#include "cpu/kernels/convert.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/walk.h"

enum {
  RUN = 512,         /* elements of a block */
  CHUNK_BLOCKS = 32, /* blocks of a chunk */
  LANES = 16,
  AHEAD = 2048 /* elements: gradients come from memory, and one stream alone waits for it */
};

#define SQUARES(name, T)                                                                                               \
  static double name(int64_t n, const void *from) {                                                                    \
    const T *x = from;                                                                                                 \
    double lanes[LANES] = {0};                                                                                         \
    int64_t i = 0;                                                                                                     \
    for (; i + LANES <= n; i += LANES) {                                                                               \
      __builtin_prefetch(x + i + AHEAD, 0, 2);                                                                         \
      for (int l = 0; l < LANES; l++)                                                                                  \
        lanes[l] += (double)x[i + l] * (double)x[i + l];                                                               \
    }                                                                                                                  \
    for (int l = 0; i < n; i++, l++)                                                                                   \
      lanes[l] += (double)x[i] * (double)x[i];                                                                         \
    for (int half = LANES / 2; half; half /= 2)                                                                        \
      for (int l = 0; l < half; l++)                                                                                   \
        lanes[l] += lanes[l + half];                                                                                   \
    return lanes[0];                                                                                                   \
  }

SQUARES(squares_float, float)
SQUARES(squares_double, double)

typedef struct {
  const device_array *arrays;
  int count;
  int64_t *first_chunks; /* (count + 1): of each array, and how many there are */
  double *sums;          /* (chunks) */
} job;

static int64_t chunks_of(const device_array *array, walk *w) {
  walk_plan(w, RUN, 1, &array);
  return (w->block_count + CHUNK_BLOCKS - 1) / CHUNK_BLOCKS;
}

static double sum_chunk(const walk *w, const device_array *array, int64_t chunk) {
  bool wide = array->dtype == OREPA_FLOAT64 || !orepa_dtype_is_float(array->dtype);
  convert_path path = convert_path_of(array->dtype, wide ? OREPA_FLOAT64 : OREPA_FLOAT32);
  double sum = 0, buffer[RUN];
  int64_t first = chunk * CHUNK_BLOCKS, left = w->block_count - first;
  int64_t row = w->strides[0][w->rank - 2], column = w->strides[0][w->rank - 1];
  walk_block b;
  walk_seek(w, first, &b);
  for (int64_t n = left < CHUNK_BLOCKS ? left : CHUNK_BLOCKS; n > 0; n--) {
    convert_side from = {(char *)array->data + b.at[0] * (int64_t)path.outside, path.outside, row, column};
    bool in_place = convert_in_place(&path, b.rows, b.columns, &from);
    if (!in_place)
      convert_into(&path, b.rows, b.columns, buffer, from);
    const void *x = in_place ? (const void *)from.data : buffer;
    sum += wide ? squares_double(b.count, x) : squares_float(b.count, x);
    walk_next(w, &b);
  }
  return sum;
}

static void sum_share(const job *j, int thread, int threads) {
  int64_t chunk, end;
  walk_share(j->first_chunks[j->count], thread, threads, &chunk, &end);
  for (int k = 0; chunk < end; k++) {
    if (j->first_chunks[k + 1] <= chunk)
      continue;
    walk w;
    chunks_of(&j->arrays[k], &w);
    for (; chunk < end && chunk < j->first_chunks[k + 1]; chunk++)
      j->sums[chunk] = sum_chunk(&w, &j->arrays[k], chunk - j->first_chunks[k]);
  }
}

device_status KERNEL(square_sums)(device_context *context, const device_array *dst, int count,
                                  const device_array *arrays) {
  job j = {.arrays = arrays, .count = count};
  int64_t elements = 0, chunks = 0;
  walk w;
  for (int k = 0; k < count; k++) {
    chunks += chunks_of(&arrays[k], &w);
    elements += w.count;
  }
  j.first_chunks = context->workspace(context, (size_t)(count + 1 + chunks) * sizeof(int64_t));
  if (!j.first_chunks)
    return DEVICE_FAILED;
  j.sums = (double *)(j.first_chunks + count + 1);
  j.first_chunks[0] = 0;
  for (int k = 0; k < count; k++)
    j.first_chunks[k + 1] = j.first_chunks[k] + chunks_of(&arrays[k], &w);
  if (elements < PARALLEL_ELEMENTS) {
    sum_share(&j, 0, 1);
  } else {
#pragma omp parallel
    sum_share(&j, omp_get_thread_num(), omp_get_num_threads());
  }
  for (int k = 0; k < count; k++) {
    double sum = 0;
    for (int64_t chunk = j.first_chunks[k]; chunk < j.first_chunks[k + 1]; chunk++)
      sum += j.sums[chunk];
    ((double *)dst->data)[k * dst->strides[0]] = sum;
  }
  return DEVICE_DONE;
}
