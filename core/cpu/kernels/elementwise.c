/* elementwise.c: every function of elementwise.h and its derivatives: a loop for each over short runs of one type. What
 * is not such a run in memory (another type, another stride, a number) is loaded into a buffer first, or stored from
 * one. */
#include "elementwise.h"

#include <tgmath.h>

#include "cpu/kernels/convert.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/walk.h"

enum { RUN = 512 }; /* elements; all buffers together stay in the first cache */

/* ---- the loops. dst may be one of the sources: each element is read before it is written, and read once. */

typedef void loop(int64_t n, void *dst, const void *const *sources);

#define FORWARD(name, R, T, expression)                                                                                \
  static void name(int64_t n, void *dst, const void *const *sources) {                                                 \
    R *to = dst;                                                                                                       \
    const T *from_a = sources[0], *from_b = sources[1], *from_c = sources[2];                                          \
    _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                              \
      const T a = from_a[i], b = from_b[i], c = from_c[i];                                                             \
      (void)a, (void)b, (void)c;                                                                                       \
      to[i] = (R)(expression);                                                                                         \
    }                                                                                                                  \
  }

#define DERIVATIVE(name, T, expression)                                                                                \
  static void name(int64_t n, void *dst, const void *const *sources) {                                                 \
    T *to = dst;                                                                                                       \
    const T *from_dy = sources[0], *from_a = sources[1], *from_b = sources[2], *from_c = sources[3],                   \
            *from_y = sources[4];                                                                                      \
    _Pragma("omp simd") for (int64_t i = 0; i < n; i++) {                                                              \
      const T dy = from_dy[i], a = from_a[i], b = from_b[i], c = from_c[i], y = from_y[i];                             \
      (void)dy, (void)a, (void)b, (void)c, (void)y;                                                                    \
      to[i] = (T)(expression);                                                                                         \
    }                                                                                                                  \
  }

#define LOOPS_REAL(name, forward)                                                                                      \
  FORWARD(name##_float, float, float, forward) FORWARD(name##_double, double, double, forward)
#define LOOPS_ANY(name, forward) LOOPS_REAL(name, forward) FORWARD(name##_int64, int64_t, int64_t, forward)
#define LOOPS_CHOICE(name, forward) LOOPS_ANY(name, forward)
#define LOOPS_COMPARE(name, forward)                                                                                   \
  FORWARD(name##_float, uint8_t, float, forward)                                                                       \
  FORWARD(name##_double, uint8_t, double, forward) FORWARD(name##_int64, uint8_t, int64_t, forward)

#define ROW(name, operands, types, forward, needs_a, da, needs_b, db, needs_c, dc)                                     \
  LOOPS_##types(name, forward) DERIVATIVE(name##_da_float, float, da) DERIVATIVE(name##_da_double, double, da)         \
      DERIVATIVE(name##_db_float, float, db) DERIVATIVE(name##_db_double, double, db)                                  \
          DERIVATIVE(name##_dc_float, float, dc) DERIVATIVE(name##_dc_double, double, dc)
ELEMENTWISE_ROWS(ROW)
#undef ROW

/* ---- the rows, as a table: [0] forward, [1] ... [3] derivatives ---- */

#define INT64_REAL(name) NULL
#define INT64_ANY(name) name##_int64
#define INT64_COMPARE(name) name##_int64
#define INT64_CHOICE(name) name##_int64

static const struct {
  int operands;
  bool compare;
  int needs[ELEMENTWISE_MAX_OPERANDS];
  loop *in_float[4], *in_double[4], *in_int64[4];
} functions[FUNCTION_COUNT] = {
#define ROW(name, operands, types, forward, needs_a, da, needs_b, db, needs_c, dc)                                     \
  [FUNCTION_##name] = {operands,                                                                                       \
                       ELEMENTWISE_##types == ELEMENTWISE_COMPARE,                                                     \
                       {needs_a, needs_b, needs_c},                                                                    \
                       {name##_float, name##_da_float, name##_db_float, name##_dc_float},                              \
                       {name##_double, name##_da_double, name##_db_double, name##_dc_double},                          \
                       {INT64_##types(name)}},
    ELEMENTWISE_ROWS(ROW)
#undef ROW
};

/* ---- the call ---- */

/* dst or a source. */
typedef struct {
  enum { UNREAD, NUMBER, ARRAY } kind;
  int array; /* in the walk */
  char *data;
  convert_path path;
} operand;

typedef struct {
  loop *run;
  walk w;
  operand dst, sources[ELEMENTWISE_MAX_SOURCES];
  int count; /* sources */
  orepa_dtype compute;
  const device_number *numbers;
} job;

typedef struct {
  _Alignas(64) double dst[RUN];
  _Alignas(64) double sources[ELEMENTWISE_MAX_SOURCES][RUN];
  const char *held[ELEMENTWISE_MAX_SOURCES]; /* where a buffer's contents are from: what repeats is loaded once */
  int64_t held_count[ELEMENTWISE_MAX_SOURCES];
} buffers;

static operand operand_of(const device_array *array, int number, orepa_dtype inside) {
  return (operand){ARRAY, number, array->data, convert_path_of(array->dtype, inside)};
}

/* The type that all sources have: that of the first array, else the result's. */
static orepa_dtype type_of(const device_array *dst, int count, const device_array *sources) {
  for (int k = 0; k < count; k++)
    if (sources[k].data)
      return sources[k].dtype;
  return dst->dtype;
}

static bool is_read(int function, int derivative, int source) {
  if (!derivative)
    return source < functions[function].operands;
  int needs = functions[function].needs[derivative - 1];
  return source == 0 || (needs >> (source - 1) & 1);
}

static bool plan(job *j, int function, int derivative, const device_array *dst, const device_array *sources,
                 const device_number *numbers) {
  const device_array *arrays[WALK_ARRAYS] = {dst};
  int used = 1;
  *j = (job){.count = derivative ? ELEMENTWISE_MAX_SOURCES : functions[function].operands, .numbers = numbers};
  orepa_dtype dtype = type_of(dst, j->count, sources);
  bool real = orepa_dtype_is_float(dtype);
  j->compute = !real ? OREPA_INT64 : dtype == OREPA_FLOAT64 ? OREPA_FLOAT64 : OREPA_FLOAT32;
  j->run = !real                    ? functions[function].in_int64[derivative]
           : dtype == OREPA_FLOAT64 ? functions[function].in_double[derivative]
                                    : functions[function].in_float[derivative];
  if (!j->run)
    return false;
  j->dst = operand_of(dst, 0, functions[function].compare && !derivative ? OREPA_BOOL : j->compute);
  for (int k = 0; k < j->count; k++) {
    if (is_read(function, derivative, k) && sources[k].data) {
      arrays[used] = &sources[k];
      j->sources[k] = operand_of(&sources[k], used++, j->compute);
    } else if (is_read(function, derivative, k)) {
      j->sources[k].kind = NUMBER;
    }
  }
  walk_plan(&j->w, RUN, used, arrays);
  return true;
}

static void fill(const job *j, int source, double *buffer) {
  int64_t n = j->w.count < RUN ? j->w.count : RUN;
  float number = (float)j->numbers[source].real;
  convert_run *same = KERNEL(convert)(j->compute, j->compute);
  if (j->compute == OREPA_FLOAT32)
    same(n, buffer, 1, &number, 0);
  else if (j->compute == OREPA_FLOAT64)
    same(n, buffer, 1, &j->numbers[source].real, 0);
  else
    same(n, buffer, 1, &j->numbers[source].integer, 0);
}

/* An operand's part of a block. */
static convert_side side_of(const job *j, const operand *o, const walk_block *b) {
  const int64_t *strides = &j->w.strides[o->array][j->w.rank - 2];
  return (convert_side){o->data + b->at[o->array] * (int64_t)o->path.outside, o->path.outside, strides[0], strides[1]};
}

static const void *load(const job *j, int source, const walk_block *b, buffers *all) {
  const operand *o = &j->sources[source];
  if (o->kind != ARRAY)
    return all->sources[source];
  convert_side from = side_of(j, o, b);
  if (convert_in_place(&o->path, b->rows, b->columns, &from))
    return from.data;
  if (all->held[source] != from.data || all->held_count[source] < b->count) {
    convert_into(&o->path, b->rows, b->columns, all->sources[source], from);
    all->held[source] = from.data;
    all->held_count[source] = b->count;
  }
  return all->sources[source];
}

static void run_share(const job *j, int thread, int threads) {
  buffers all;
  int64_t first, end;
  walk_share(j->w.block_count, thread, threads, &first, &end);
  if (first == end)
    return;
  for (int k = 0; k < j->count; k++) {
    all.held[k] = NULL;
    if (j->sources[k].kind == NUMBER)
      fill(j, k, all.sources[k]);
  }
  walk_block b;
  walk_seek(&j->w, first, &b);
  for (;;) {
    const void *sources[ELEMENTWISE_MAX_SOURCES] = {all.dst, all.dst, all.dst, all.dst, all.dst};
    for (int k = 0; k < j->count; k++)
      sources[k] = load(j, k, &b, &all);
    convert_side to = side_of(j, &j->dst, &b);
    bool direct = convert_in_place(&j->dst.path, b.rows, b.columns, &to);
    j->run(b.count, direct ? (void *)to.data : all.dst, sources);
    if (!direct)
      convert_out_of(&j->dst.path, b.rows, b.columns, all.dst, to);
    if (++first == end)
      return;
    walk_next(&j->w, &b);
  }
}

device_status KERNEL(elementwise)(device_context *context, int function, int derivative, const device_array *dst,
                                  const device_array *sources, const device_number *numbers) {
  (void)context;
  job j;
  if (!plan(&j, function, derivative, dst, sources, numbers))
    return DEVICE_UNSUPPORTED;
  if (j.w.count < PARALLEL_ELEMENTS) { /* even a team of one has to be made */
    run_share(&j, 0, 1);
  } else {
#pragma omp parallel
    run_share(&j, omp_get_thread_num(), omp_get_num_threads());
  }
  return DEVICE_DONE;
}
