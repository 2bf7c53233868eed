/* sort.c: order and running sums along one axis. An element becomes a key, an unsigned number in whose order it sorts;
 * keys are sorted by their bytes from the lowest to the highest (a radix sort: stable, and as long as the row is).
 * Where only a few of many are asked for, those that can't be among them are left out first. */
#include <omp.h>
#include <string.h>

#include "cpu/kernels/kernels.h"

enum {
  CHUNK = 256,            /* keys that are looked at together */
  SHORT = 48,             /* a row that insertion sorts faster */
  FEW = 4,                /* one in so many asked for: the others are left out first */
  PARALLEL_FROM = 1 << 14 /* elements */
};

/* One row: where its elements are, and what keys of theirs are. */
typedef struct {
  const char *data;
  int64_t length, stride; /* in elements */
  orepa_dtype dtype;
  int bytes; /* of a key */
  bool descending;
} row;

typedef struct {
  uint64_t key;
  int64_t position;
} item;

/* ---- keys ---- */

/* Of a float's bits: negative ones backwards below the others, both zeros the same, NaN above all. */
static inline uint64_t float_key(uint64_t bits, uint64_t sign, uint64_t infinity) {
  uint64_t magnitude = bits & (sign - 1);
  if (magnitude > infinity)
    return sign | (sign - 1);
  return bits & sign && magnitude ? sign - magnitude : sign + magnitude;
}

#define LOAD(T, expression)                                                                                            \
  for (int k = 0; k < count; k++) {                                                                                    \
    const T v = ((const T *)r->data)[(first + k) * r->stride];                                                         \
    keys[k] = (expression);                                                                                            \
  }                                                                                                                    \
  break

/* Keys of elements first ... first + count - 1. */
static void load_keys(const row *r, int64_t first, int count, uint64_t *keys) {
  switch (r->dtype) {
  case OREPA_FLOAT32:
    LOAD(uint32_t, float_key(v, 1u << 31, 0x7f800000));
  case OREPA_FLOAT64:
    LOAD(uint64_t, float_key(v, (uint64_t)1 << 63, (uint64_t)0x7ff << 52));
  case OREPA_BFLOAT16:
    LOAD(uint16_t, float_key(v, 1u << 15, 0x7f80));
  case OREPA_FLOAT16:
    LOAD(uint16_t, float_key(v, 1u << 15, 0x7c00));
  case OREPA_INT64:
    LOAD(uint64_t, v ^ ((uint64_t)1 << 63));
  case OREPA_INT32:
    LOAD(uint32_t, v ^ (1u << 31));
  default:
    LOAD(uint8_t, v);
  }
  uint64_t all = ~(uint64_t)0 >> (64 - 8 * r->bytes);
  for (int k = 0; r->descending && k < count; k++)
    keys[k] ^= all;
}
#undef LOAD

/* Runs the statement for each element of a row, with its key and its position. */
#define EACH_KEY(r, ...)                                                                                               \
  for (int64_t first = 0; first < (r)->length; first += CHUNK) {                                                       \
    uint64_t keys[CHUNK];                                                                                              \
    int count = (int)((r)->length - first < CHUNK ? (r)->length - first : CHUNK);                                      \
    load_keys(r, first, count, keys);                                                                                  \
    for (int k = 0; k < count; k++) {                                                                                  \
      const uint64_t key = keys[k];                                                                                    \
      const int64_t position = first + k;                                                                              \
      (void)position;                                                                                                  \
      __VA_ARGS__                                                                                                      \
    }                                                                                                                  \
  }

/* ---- the items of a row ---- */

static int64_t all_items(const row *r, item *items) {
  EACH_KEY(r, items[position] = (item){key, position};)
  return r->length;
}

/* Those that may be among the first `wanted`: with a key of at most some limit, which is found byte by byte from the
 * highest on. */
static int64_t few_items(const row *r, int64_t wanted, item *items) {
  uint64_t limit = 0, known = 0; /* the limit's bytes that are found, and where they are */
  int64_t below = 0, found = 0;
  for (int shift = 8 * (r->bytes - 1); shift >= 0; shift -= 8) {
    int64_t counts[256] = {0}, digit = 0;
    EACH_KEY(r, counts[key >> shift & 255] += (key & known) == limit;)
    for (; below + counts[digit] < wanted; digit++)
      below += counts[digit];
    limit |= (uint64_t)digit << shift;
    known |= (uint64_t)255 << shift;
    if (below + counts[digit] <= 2 * wanted + SHORT)
      break;
  }
  EACH_KEY(r, if ((key & known) <= limit) items[found++] = (item){key, position};)
  return found;
}

/* ---- sorting ---- */

static void sort_short(item *items, int64_t count) {
  for (int64_t n = 1; n < count; n++) {
    item taken = items[n];
    int64_t place = n;
    for (; place > 0 && items[place - 1].key > taken.key; place--)
      items[place] = items[place - 1];
    items[place] = taken;
  }
}

/* Gives back which of the two has the items in order. */
static item *sort_long(item *items, item *spare, int64_t count, int bytes) {
  int64_t counts[8][256] = {{0}};
  for (int64_t n = 0; n < count; n++)
    for (int b = 0; b < bytes; b++)
      counts[b][items[n].key >> (8 * b) & 255]++;
  for (int b = 0; b < bytes; b++) {
    int64_t *start = counts[b], at = 0;
    if (start[items[0].key >> (8 * b) & 255] == count) /* all the same */
      continue;
    for (int digit = 0; digit < 256; digit++) {
      int64_t here = start[digit];
      start[digit] = at;
      at += here;
    }
    for (int64_t n = 0; n < count; n++)
      spare[start[items[n].key >> (8 * b) & 255]++] = items[n];
    item *sorted = spare;
    spare = items;
    items = sorted;
  }
  return items;
}

/* Keys of one byte need no items. */
static void sort_bytes(const row *r, int64_t wanted, int64_t *positions, int64_t stride) {
  int64_t starts[257] = {0};
  EACH_KEY(r, starts[key + 1]++;)
  for (int digit = 0; digit < 256; digit++)
    starts[digit + 1] += starts[digit];
  EACH_KEY(r, {
    int64_t place = starts[key]++;
    if (place < wanted)
      positions[place * stride] = position;
  })
}

/* Memory: two items for each element of the row. */
static void sort_row(const row *r, int64_t wanted, int64_t *positions, int64_t stride, item *memory) {
  if (r->bytes == 1) {
    sort_bytes(r, wanted, positions, stride);
    return;
  }
  bool few = r->length > SHORT && wanted <= r->length / FEW;
  int64_t count = few ? few_items(r, wanted, memory) : all_items(r, memory);
  item *sorted = memory;
  if (count <= SHORT)
    sort_short(sorted, count);
  else
    sorted = sort_long(memory, memory + r->length, count, r->bytes);
  for (int64_t n = 0; n < wanted; n++)
    positions[n * stride] = sorted[n].position;
}

/* ---- rows of an array ---- */

/* Where row number k begins. */
static int64_t row_start(const device_array *a, int axis, int64_t k) {
  int64_t at = 0;
  for (int d = a->rank; d-- > 0;)
    if (d != axis) {
      at += k % a->shape[d] * a->strides[d];
      k /= a->shape[d];
    }
  return at;
}

static int64_t row_count(const device_array *a, int axis) {
  int64_t count = 1;
  for (int d = 0; d < a->rank; d++)
    count *= d == axis ? 1 : a->shape[d];
  return count;
}

device_status KERNEL(sort)(device_context *context, int axis, bool descending, const device_array *positions,
                           const device_array *x) {
  int64_t rows = row_count(x, axis), length = x->shape[axis], wanted = positions->shape[axis];
  if (rows == 0 || wanted == 0)
    return DEVICE_DONE;
  int bytes = (int)orepa_dtype_size(x->dtype), threads = rows * length < PARALLEL_FROM ? 1 : omp_get_max_threads();
  threads = rows < threads ? (int)rows : threads;
  item *memory = context->workspace(context, bytes == 1 ? 1 : (size_t)(2 * threads * length) * sizeof *memory);
  if (!memory)
    return DEVICE_FAILED;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < rows; k++) {
    const row r = {
        (const char *)x->data + row_start(x, axis, k) * bytes, length, x->strides[axis], x->dtype, bytes, descending};
    sort_row(&r, wanted, (int64_t *)positions->data + row_start(positions, axis, k), positions->strides[axis],
             memory + (bytes == 1 ? 0 : 2 * omp_get_thread_num() * length));
  }
  return DEVICE_DONE;
}

/* ---- running sums: in float64 of floats, so that long rows stay accurate ---- */

#define RUN(T, SUM)                                                                                                    \
  {                                                                                                                    \
    SUM sum = 0;                                                                                                       \
    for (int64_t n = 0; n < length; n++, from += x_step, to += y_step)                                                 \
      ((T *)y->data)[to] = (T)(sum += (SUM)((const T *)x->data)[from]);                                                \
  }

device_status KERNEL(running_sum)(device_context *context, int axis, bool from_last, const device_array *y,
                                  const device_array *x) {
  (void)context;
  int64_t rows = row_count(x, axis), length = x->shape[axis];
  int64_t x_step = from_last ? -x->strides[axis] : x->strides[axis];
  int64_t y_step = from_last ? -y->strides[axis] : y->strides[axis];
  if (x->dtype != OREPA_FLOAT32 && x->dtype != OREPA_FLOAT64 && x->dtype != OREPA_INT64)
    return DEVICE_UNSUPPORTED;
#pragma omp parallel for schedule(static) if (rows * length >= PARALLEL_FROM)
  for (int64_t k = 0; k < rows; k++) {
    int64_t last = from_last && length ? length - 1 : 0;
    int64_t from = row_start(x, axis, k) + last * x->strides[axis];
    int64_t to = row_start(y, axis, k) + last * y->strides[axis];
    if (x->dtype == OREPA_FLOAT32)
      RUN(float, double)
    else if (x->dtype == OREPA_FLOAT64)
      RUN(double, double)
    else
      RUN(int64_t, uint64_t)
  }
  return DEVICE_DONE;
}
