/* random.c: random numbers by philox.h: whole blocks of the generator for a run of elements in logical order, taken to
 * where they belong. */
#include <string.h>

#include "cpu/kernels/convert.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/walk.h"
#include "philox.h"

enum {
  RUN = 2048, /* elements: whole groups of blocks of the generator */
  BLOCKS = 32 /* that are made side by side */
};

/* ---- the generator: a word in the lower half of each lane, anything in the upper ---- */

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 8 };
#define LOW_PRODUCT(a, b) (lanes) _mm512_mul_epu32((__m512i)(a), _mm512_set1_epi64(b))
#elif defined(__AVX2__)
#include <immintrin.h>
enum { LANES = 4 };
#define LOW_PRODUCT(a, b) (lanes) _mm256_mul_epu32((__m256i)(a), _mm256_set1_epi64x(b))
#elif defined(__SSE2__)
#include <immintrin.h>
enum { LANES = 2 };
#define LOW_PRODUCT(a, b) (lanes) _mm_mul_epu32((__m128i)(a), _mm_set1_epi64x(b))
#else
enum { LANES = 2 };
#define LOW_PRODUCT(a, b) (((a)&0xffffffffu) * (uint64_t)(b))
#endif

typedef uint64_t lanes __attribute__((vector_size(8 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

/* What philox() makes of LANES blocks from `first` on, to to[0][l], ..., to[3][l]. GCC multiplies such halves of lanes
 * by itself only after moving them apart: three times slower. */
static inline void philox_lanes(uint64_t seed, uint64_t draw, uint64_t first, uint32_t (*to)[BLOCKS]) {
  lanes block, c0, c1, c2, c3;
  for (int l = 0; l < LANES; l++)
    block[l] = first + (uint64_t)l;
  c0 = block, c1 = block >> 32, c2 = draw + (lanes){0}, c3 = (draw >> 32) + (lanes){0};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    lanes p0 = LOW_PRODUCT(c0, 0xD2511F53), p1 = LOW_PRODUCT(c2, 0xCD9E8D57);
    c0 = p1 >> 32 ^ c1 ^ k0;
    c1 = p1;
    c2 = p0 >> 32 ^ c3 ^ k1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const lanes made[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; w++) {
    words low = __builtin_convertvector(made[w], words);
    memcpy(to[w], &low, sizeof low);
  }
}

static void philox_blocks(uint64_t seed, uint64_t draw, uint64_t first, uint32_t to[4][BLOCKS]) {
  for (int l = 0; l < BLOCKS; l += LANES)
    philox_lanes(seed, draw, first + (uint64_t)l, (uint32_t(*)[BLOCKS])(to[0] + l));
}

static void make_floats(uint64_t seed, uint64_t draw, int64_t first, int64_t n, bool normal, float *values) {
  uint32_t made[4][BLOCKS];
  for (int64_t k = 0; k < n; k += 4 * BLOCKS) {
    philox_blocks(seed, draw, (uint64_t)(first + k) / 4, made);
    float *to = values + k;
    for (int l = 0; l < BLOCKS; l++)
      for (int w = 0; w < 4; w++)
        to[4 * l + w] = philox_float(made[w][l]);
  }
  for (int64_t k = 0; normal && k < n; k += 2) {
    double pair[2];
    philox_normals(values[k], values[k + 1], pair);
    values[k] = (float)pair[0], values[k + 1] = (float)pair[1];
  }
}

static void make_doubles(uint64_t seed, uint64_t draw, int64_t first, int64_t n, bool normal, double *values) {
  uint32_t made[4][BLOCKS];
  for (int64_t k = 0; k < n; k += 2 * BLOCKS) {
    philox_blocks(seed, draw, (uint64_t)(first + k) / 2, made);
    double *to = values + k;
    for (int l = 0; l < BLOCKS; l++) {
      to[2 * l] = philox_double(made[0][l], made[1][l]);
      to[2 * l + 1] = philox_double(made[2][l], made[3][l]);
    }
  }
  for (int64_t k = 0; normal && k < n; k += 2)
    philox_normals(values[k], values[k + 1], values + k);
}

/* ---- the call ---- */

typedef struct {
  walk w; /* axes in logical order */
  char *data;
  orepa_dtype dtype;
  size_t size;
  convert_run *run;
  bool normal;
  uint64_t seed, draw;
} job;

/* n values to the elements from `first` on, which are a few runs along the last axis. */
static void put(const job *j, int64_t first, int64_t n, const char *values) {
  int last = j->w.rank - 1;
  for (int64_t done = 0, part; done < n; done += part) {
    int64_t number = first + done, at = 0, left = j->w.shape[last] - number % j->w.shape[last];
    for (int p = last; p >= 0; p--) {
      at += number % j->w.shape[p] * j->w.strides[0][p];
      number /= j->w.shape[p];
    }
    part = left < n - done ? left : n - done;
    j->run(part, j->data + at * (int64_t)j->size, j->w.strides[0][last], values + done * (int64_t)j->size, 1);
  }
}

static void run_share(const job *j, int thread, int threads) {
  union {
    float floats[RUN];
    double doubles[RUN];
  } values;
  int64_t run, end;
  walk_share((j->w.count + RUN - 1) / RUN, thread, threads, &run, &end);
  for (; run < end; run++) {
    int64_t first = run * RUN, left = j->w.count - first, n = left < RUN ? left : RUN;
    if (j->dtype == OREPA_FLOAT32)
      make_floats(j->seed, j->draw, first, n, j->normal, values.floats);
    else
      make_doubles(j->seed, j->draw, first, n, j->normal, values.doubles);
    put(j, first, n, (const char *)&values);
  }
}

device_status KERNEL(random)(device_context *context, const device_array *dst, bool normal, uint64_t seed,
                             uint64_t draw) {
  (void)context;
  if (dst->dtype != OREPA_FLOAT32 && dst->dtype != OREPA_FLOAT64)
    return DEVICE_UNSUPPORTED;
  job j = {.data = dst->data,
           .dtype = dst->dtype,
           .size = orepa_dtype_size(dst->dtype),
           .run = KERNEL(convert)(dst->dtype, dst->dtype),
           .normal = normal,
           .seed = seed,
           .draw = draw};
  walk_begin(&j.w, false, 1, &dst);
  if (j.w.count < PARALLEL_ELEMENTS / 16) {
    run_share(&j, 0, 1);
  } else {
#pragma omp parallel
    run_share(&j, omp_get_thread_num(), omp_get_num_threads());
  }
  return DEVICE_DONE;
}
