/* onednn.c: the one file that knows oneDNN's interface (2.x): engine and stream, descriptors, and a store of ready
 * primitives with all that a call needs, so that a call only sets pointers.
 *
 * Maps are pinned to channels-last; kernels are given in the layout that an implementation wants and packed from or
 * unpacked to ours beside each call (pinned to O,H,W,I the library would run its reference code). Scratchpads are the
 * caller's. */
#include "cpu/onednn.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <oneapi/dnnl/dnnl_debug.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "cpu/features.h"

/* ---- the library ---- */

static struct {
  pthread_once_t once;
  dnnl_status_t status; /* of making the engine, the stream and the attributes */
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  dnnl_primitive_attr_t attributes; /* scratchpads by the user */
} library = {.once = PTHREAD_ONCE_INIT};

static void open_library(void) {
  /* Only before the first use; a refusal leaves the library at its own choice, which computes the same. */
  if (cpu_isa_limited())
    dnnl_set_max_cpu_isa(cpu_isa_used() == CPU_BASE ? dnnl_cpu_isa_sse41 : dnnl_cpu_isa_avx2);
  dnnl_status_t status = dnnl_engine_create(&library.engine, dnnl_cpu, 0);
  if (status == dnnl_success)
    status = dnnl_stream_create(&library.stream, library.engine, dnnl_stream_default_flags);
  if (status == dnnl_success)
    status = dnnl_primitive_attr_create(&library.attributes);
  if (status == dnnl_success)
    status = dnnl_primitive_attr_set_scratchpad_mode(library.attributes, dnnl_scratchpad_mode_user);
  library.status = status;
}

const char *onednn_version(void) {
  static char text[32];
  const dnnl_version_t *version = dnnl_version();
  snprintf(text, sizeof text, "%d.%d.%d", version->major, version->minor, version->patch);
  return text;
}

static device_status failed(const char *call, const char *what, dnnl_status_t status) {
  if (status == dnnl_success)
    return DEVICE_DONE;
  if (status == dnnl_unimplemented)
    return DEVICE_UNSUPPORTED;
  if (status == dnnl_out_of_memory)
    error_out_of_memory("%s of %s: %s", call, what, dnnl_status2str(status));
  else
    error_set("%s of %s: %s", call, what, dnnl_status2str(status));
  return DEVICE_FAILED;
}

device_status onednn_product(bool turn_a, bool turn_b, int64_t m, int64_t n, int64_t k, const float *a, int64_t lda,
                             const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
  if (m == 0 || n == 0)
    return DEVICE_DONE;
  pthread_once(&library.once, open_library);
  dnnl_status_t status = dnnl_sgemm(turn_a ? 'T' : 'N', turn_b ? 'T' : 'N', m, n, k, 1, a, lda, b, ldb, beta, c, ldc);
  if (status == dnnl_success)
    return DEVICE_DONE;
  char what[96];
  snprintf(what, sizeof what, "%lldx%lld . %lldx%lld", (long long)m, (long long)k, (long long)k, (long long)n);
  return failed("dnnl_sgemm", what, status);
}

/* ---- the store ---- */

enum {
  STORED = 384,
  BUCKETS = 1024,
  KEY_NUMBERS = 20,
  ROOM = 240, /* for a geometry in words */
};

typedef enum { KIND_FORWARD, KIND_BACKWARD_DATA, KIND_BACKWARD_WEIGHT, KIND_MATMUL } primitive_kind;

/* What a primitive depends on: also the number of threads, which it cuts its work for. */
typedef struct {
  int64_t kind, threads, has_bias, numbers[KEY_NUMBERS];
} primitive_key;

enum { ARGUMENT_X, ARGUMENT_W, ARGUMENT_Y, ARGUMENT_BIAS, ARGUMENT_SCRATCHPAD, ARGUMENTS };

typedef struct {
  primitive_key key;
  int next;                   /* in its bucket: 1 + its index; 0: none */
  uint64_t used;              /* when */
  device_status status;       /* DEVICE_UNSUPPORTED is remembered too, without a primitive */
  const char *implementation; /* the library's name for it; lives as long as desc */
  dnnl_primitive_desc_t desc, hint;
  dnnl_primitive_t primitive;
  dnnl_exec_arg_t arguments[ARGUMENTS]; /* absent ones without a memory */
  size_t scratchpad_bytes;
  /* Of convolutions whose kernel is wanted in a layout other than ours: from ours to it, or back. */
  dnnl_primitive_desc_t packing_desc;
  dnnl_primitive_t packing;
  dnnl_memory_t kernel, packing_scratchpad;
  size_t packed_bytes, packing_bytes;
  size_t kernel_offset;  /* bytes before the taps in use */
  size_t kernel_cleared; /* bytes to clear before the taps' gradients arrive: the kernel, where taps are left out */
} stored_primitive;

static struct {
  pthread_mutex_t lock; /* held while a primitive runs: its pointers belong to the call */
  stored_primitive entries[STORED];
  int buckets[BUCKETS]; /* 1 + the first entry; 0: none */
  int count;
  uint64_t clock;
} store = {.lock = PTHREAD_MUTEX_INITIALIZER};

static unsigned bucket_of(const primitive_key *key) {
  const int64_t *numbers = (const int64_t *)key;
  uint64_t hash = 0;
  for (size_t k = 0; k < sizeof *key / sizeof *numbers; k++) {
    hash = (hash ^ (uint64_t)numbers[k]) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return (unsigned)(hash % BUCKETS);
}

static stored_primitive *stored(const primitive_key *key, unsigned bucket) {
  for (int k = store.buckets[bucket]; k > 0; k = store.entries[k - 1].next)
    if (!memcmp(&store.entries[k - 1].key, key, sizeof *key)) {
      store.entries[k - 1].used = ++store.clock;
      return &store.entries[k - 1];
    }
  return NULL;
}

/* Frees what an entry holds; its key stays. */
static void empty(stored_primitive *e) {
  dnnl_primitive_destroy(e->primitive);
  dnnl_primitive_destroy(e->packing);
  for (int k = 0; k < ARGUMENTS; k++)
    dnnl_memory_destroy(e->arguments[k].memory);
  dnnl_memory_destroy(e->kernel);
  dnnl_memory_destroy(e->packing_scratchpad);
  dnnl_primitive_desc_destroy(e->desc);
  dnnl_primitive_desc_destroy(e->hint);
  dnnl_primitive_desc_destroy(e->packing_desc);
  *e = (stored_primitive){.key = e->key};
}

static void unlink_entry(int index) {
  int *link = &store.buckets[bucket_of(&store.entries[index].key)];
  while (*link != index + 1)
    link = &store.entries[*link - 1].next;
  *link = store.entries[index].next;
}

/* Moves a made primitive into the store, in place of the one that was not used for the longest time if it is full. */
static stored_primitive *keep(const stored_primitive *made, unsigned bucket) {
  int index = store.count;
  if (index < STORED) {
    store.count++;
  } else {
    index = 0;
    for (int k = 1; k < STORED; k++)
      if (store.entries[k].used < store.entries[index].used)
        index = k;
    unlink_entry(index);
    empty(&store.entries[index]);
  }
  stored_primitive *e = &store.entries[index];
  *e = *made;
  e->used = ++store.clock;
  e->next = store.buckets[bucket];
  store.buckets[bucket] = index + 1;
  return e;
}

/* ---- making one ---- */

#define TRY(call)                                                                                                      \
  do {                                                                                                                 \
    dnnl_status_t try_status = (call);                                                                                 \
    if (try_status != dnnl_success)                                                                                    \
      return try_status;                                                                                               \
  } while (0)

static dnnl_data_type_t data_type(int64_t dtype) {
  return dtype == OREPA_BFLOAT16 ? dnnl_bf16 : dnnl_f32;
}

static dnnl_status_t strided(dnnl_memory_desc_t *desc, int64_t dtype, int rank, const int64_t *shape,
                             const int64_t *strides) {
  dnnl_dims_t dims = {0}, steps = {0};
  memcpy(dims, shape, (size_t)rank * sizeof *dims);
  memcpy(steps, strides, (size_t)rank * sizeof *steps);
  return dnnl_memory_desc_init_by_strides(desc, rank, dims, data_type(dtype), steps);
}

static dnnl_status_t tagged(dnnl_memory_desc_t *desc, int64_t dtype, int rank, const int64_t *shape,
                            dnnl_format_tag_t tag) {
  dnnl_dims_t dims = {0};
  memcpy(dims, shape, (size_t)rank * sizeof *dims);
  return dnnl_memory_desc_init_by_tag(desc, rank, dims, data_type(dtype), tag);
}

/* A memory without data for argument `place`; none for an empty scratchpad. */
static dnnl_status_t add_argument(stored_primitive *e, int place, int argument, const dnnl_memory_desc_t *desc) {
  e->arguments[place].arg = argument;
  if (dnnl_memory_desc_get_size(desc) == 0)
    return dnnl_success;
  return dnnl_memory_create(&e->arguments[place].memory, desc, library.engine, DNNL_MEMORY_NONE);
}

/* The primitive of a descriptor and its scratchpad, unless the implementation is one that is refused. */
static dnnl_status_t make_primitive(stored_primitive *e, bool refuse_gemm) {
  TRY(dnnl_primitive_desc_query(e->desc, dnnl_query_impl_info_str, 0, &e->implementation));
  const char *name = e->implementation;
  if (strstr(name, "ref") || (refuse_gemm && (strstr(name, ":gemm") || !strncmp(name, "gemm", 4))))
    return dnnl_unimplemented;
  const dnnl_memory_desc_t *scratchpad = dnnl_primitive_desc_query_md(e->desc, dnnl_query_scratchpad_md, 0);
  e->scratchpad_bytes = dnnl_memory_desc_get_size(scratchpad);
  TRY(dnnl_primitive_create(&e->primitive, e->desc));
  return add_argument(e, ARGUMENT_SCRATCHPAD, DNNL_ARG_SCRATCHPAD, scratchpad);
}

/* ---- convolutions ---- */

/* Descriptors of a convolution's arguments. The kernel may be cropped to the taps that meet the map for some output. */
typedef struct {
  dnnl_memory_desc_t x, w, y, bias, kernel; /* w: in any layout; kernel: ours */
  dnnl_dims_t stride, dilation, before, after;
  int64_t first[2], taps[2];
} conv_descriptors;

/* On an axis without dilation, taps that meet nothing but padding are left out: 3x3 on a map of 1x1 is one tap. Besides
 * the time, 2.6.3's AMX kernels never write such taps' gradients. A single result that ends with the map is reached
 * without a step, and so a strided 3x3 on a map of 1x1 is no strided 1x1. */
static void crop_axis(const conv_geometry *g, int axis, conv_descriptors *d) {
  int64_t last_start = (g->result[axis] - 1) * g->stride[axis] - g->padding[axis];
  int64_t first = last_start < 0 ? -last_start : 0, last = g->size[axis] + g->padding[axis];
  bool crops = g->dilation[axis] == 1 && first < g->kernel[axis];
  d->first[axis] = crops ? first : 0;
  d->taps[axis] = (crops && last < g->kernel[axis] ? last : g->kernel[axis]) - d->first[axis];
  d->before[axis] = g->padding[axis] - d->first[axis];
  int64_t span = (d->taps[axis] - 1) * g->dilation[axis] + 1;
  int64_t after = (g->result[axis] - 1) * g->stride[axis] + span - g->size[axis] - d->before[axis];
  d->after[axis] = after > 0 ? after : 0;
  d->stride[axis] = g->result[axis] == 1 && after >= 0 ? 1 : g->stride[axis];
  d->dilation[axis] = g->dilation[axis] - 1;
}

static dnnl_status_t describe(const conv_geometry *g, conv_descriptors *d) {
  crop_axis(g, 0, d);
  crop_axis(g, 1, d);
  if (d->taps[0] * d->taps[1] == 1 && (d->stride[0] > 1 || d->stride[1] > 1))
    return dnnl_unimplemented; /* onednn.h says why */
  int64_t in = g->groups * g->in, out = g->groups * g->out;
  TRY(tagged(&d->x, g->dtype, 4, (int64_t[]){g->batch, in, g->size[0], g->size[1]}, dnnl_nhwc));
  TRY(tagged(&d->y, g->dtype, 4, (int64_t[]){g->batch, out, g->result[0], g->result[1]}, dnnl_nhwc));
  TRY(tagged(&d->bias, g->dtype, 1, &out, dnnl_a));
  int64_t line = g->kernel[1] * g->in, all = g->kernel[0] * line;
  int64_t shape[] = {g->groups, g->out, g->in, d->taps[0], d->taps[1]}, strides[] = {g->out * all, all, 1, line, g->in};
  int grouped = g->groups > 1;
  TRY(tagged(&d->w, g->dtype, 4 + grouped, shape + !grouped, dnnl_format_tag_any));
  return strided(&d->kernel, g->dtype, 4 + grouped, shape + !grouped, strides + !grouped);
}

static dnnl_status_t describe_forward(stored_primitive *e, const conv_descriptors *d, dnnl_primitive_desc_t *desc) {
  dnnl_convolution_desc_t op;
  TRY(dnnl_dilated_convolution_forward_desc_init(&op, dnnl_forward_training, dnnl_convolution_direct, &d->x, &d->w,
                                                 e->key.has_bias ? &d->bias : NULL, &d->y, d->stride, d->dilation,
                                                 d->before, d->after));
  return dnnl_primitive_desc_create(desc, &op, library.attributes, library.engine, NULL);
}

/* Both gradients take the forward pass's descriptor as a hint. */
static dnnl_status_t describe_conv(stored_primitive *e, const conv_descriptors *d) {
  dnnl_convolution_desc_t op;
  if (e->key.kind == KIND_FORWARD)
    return describe_forward(e, d, &e->desc);
  TRY(describe_forward(e, d, &e->hint));
  if (e->key.kind == KIND_BACKWARD_DATA)
    TRY(dnnl_dilated_convolution_backward_data_desc_init(&op, dnnl_convolution_direct, &d->x, &d->w, &d->y, d->stride,
                                                         d->dilation, d->before, d->after));
  else
    TRY(dnnl_dilated_convolution_backward_weights_desc_init(&op, dnnl_convolution_direct, &d->x, &d->w, NULL, &d->y,
                                                            d->stride, d->dilation, d->before, d->after));
  return dnnl_primitive_desc_create(&e->desc, &op, library.attributes, library.engine, e->hint);
}

/* The reorder between our kernel and the primitive's, if they differ. */
static dnnl_status_t make_packing(stored_primitive *e, const dnnl_memory_desc_t *ours,
                                  const dnnl_memory_desc_t *wanted) {
  bool back = e->key.kind == KIND_BACKWARD_WEIGHT;
  if (dnnl_memory_desc_equal(ours, wanted))
    return dnnl_success;
  TRY(dnnl_reorder_primitive_desc_create(&e->packing_desc, back ? wanted : ours, library.engine, back ? ours : wanted,
                                         library.engine, library.attributes));
  const dnnl_memory_desc_t *scratchpad = dnnl_primitive_desc_query_md(e->packing_desc, dnnl_query_scratchpad_md, 0);
  e->packed_bytes = dnnl_memory_desc_get_size(wanted);
  e->packing_bytes = dnnl_memory_desc_get_size(scratchpad);
  TRY(dnnl_primitive_create(&e->packing, e->packing_desc));
  TRY(dnnl_memory_create(&e->kernel, ours, library.engine, DNNL_MEMORY_NONE));
  return e->packing_bytes ? dnnl_memory_create(&e->packing_scratchpad, scratchpad, library.engine, DNNL_MEMORY_NONE)
                          : dnnl_success;
}

static dnnl_status_t make_conv(stored_primitive *e, const conv_geometry *g) {
  static const int x_argument[] = {DNNL_ARG_SRC, DNNL_ARG_DIFF_SRC, DNNL_ARG_SRC};
  static const int w_argument[] = {DNNL_ARG_WEIGHTS, DNNL_ARG_WEIGHTS, DNNL_ARG_DIFF_WEIGHTS};
  static const int y_argument[] = {DNNL_ARG_DST, DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_DST};
  conv_descriptors d;
  int64_t kind = e->key.kind;
  TRY(describe(g, &d));
  TRY(describe_conv(e, &d));
  TRY(make_primitive(e, g->dtype == OREPA_FLOAT32));
  bool dilated = g->dilation[0] > 1 || g->dilation[1] > 1;
  if (kind == KIND_BACKWARD_WEIGHT && dilated && strstr(e->implementation, "amx"))
    return dnnl_unimplemented; /* wrong in 2.6.3 */
  const dnnl_memory_desc_t *wanted = dnnl_primitive_desc_query_md(
      e->desc, kind == KIND_BACKWARD_WEIGHT ? dnnl_query_diff_weights_md : dnnl_query_weights_md, 0);
  TRY(make_packing(e, &d.kernel, wanted));
  TRY(add_argument(e, ARGUMENT_X, x_argument[kind], &d.x));
  TRY(add_argument(e, ARGUMENT_W, w_argument[kind], wanted));
  TRY(add_argument(e, ARGUMENT_Y, y_argument[kind], &d.y));
  if (e->key.has_bias)
    TRY(add_argument(e, ARGUMENT_BIAS, DNNL_ARG_BIAS, &d.bias));
  size_t size = orepa_dtype_size((orepa_dtype)g->dtype);
  e->kernel_offset = (size_t)((d.first[0] * g->kernel[1] + d.first[1]) * g->in) * size;
  if (kind == KIND_BACKWARD_WEIGHT && d.taps[0] * d.taps[1] < g->kernel[0] * g->kernel[1])
    e->kernel_cleared = (size_t)(g->groups * g->out * g->in * g->kernel[0] * g->kernel[1]) * size;
  return dnnl_success;
}

/* ---- matrix products ---- */

static dnnl_status_t make_matmul(stored_primitive *e, const onednn_matmul_shape *s) {
  int64_t a_shape[] = {s->a_strides[0] ? s->batch : 1, s->m, s->k};
  int64_t b_shape[] = {s->b_strides[0] ? s->batch : 1, s->k, s->n};
  int64_t a_strides[] = {s->a_strides[0] ? s->a_strides[0] : s->m * s->k, s->a_strides[1], s->a_strides[2]};
  int64_t b_strides[] = {s->b_strides[0] ? s->b_strides[0] : s->k * s->n, s->b_strides[1], s->b_strides[2]};
  dnnl_memory_desc_t a, b, c, bias;
  dnnl_matmul_desc_t op;
  if (s->batch > a_shape[0] && s->batch > b_shape[0])
    return dnnl_unimplemented; /* the library repeats one side only */
  TRY(strided(&a, s->dtype, 3, a_shape, a_strides));
  TRY(strided(&b, s->dtype, 3, b_shape, b_strides));
  TRY(tagged(&c, s->dtype, 3, (int64_t[]){s->batch, s->m, s->n}, dnnl_abc));
  TRY(tagged(&bias, s->dtype, 3, (int64_t[]){1, 1, s->n}, dnnl_abc));
  TRY(dnnl_matmul_desc_init(&op, &a, &b, e->key.has_bias ? &bias : NULL, &c));
  TRY(dnnl_primitive_desc_create(&e->desc, &op, library.attributes, library.engine, NULL));
  TRY(make_primitive(e, false));
  TRY(add_argument(e, ARGUMENT_X, DNNL_ARG_SRC, &a));
  TRY(add_argument(e, ARGUMENT_W, DNNL_ARG_WEIGHTS, &b));
  TRY(add_argument(e, ARGUMENT_Y, DNNL_ARG_DST, &c));
  return e->key.has_bias ? add_argument(e, ARGUMENT_BIAS, DNNL_ARG_BIAS, &bias) : dnnl_success;
}

/* ---- finding and running ---- */

static primitive_key conv_key(conv_direction direction, const conv_geometry *g, bool has_bias) {
  primitive_key key = {.kind = direction, .threads = omp_get_max_threads(), .has_bias = has_bias};
  memcpy(key.numbers, g, sizeof *g);
  return key;
}

static primitive_key matmul_key(const onednn_matmul_shape *shape, bool has_bias) {
  primitive_key key = {.kind = KIND_MATMUL, .threads = omp_get_max_threads(), .has_bias = has_bias};
  memcpy(key.numbers, shape, sizeof *shape);
  return key;
}
_Static_assert(sizeof(conv_geometry) <= KEY_NUMBERS * sizeof(int64_t), "a key holds a convolution");
_Static_assert(sizeof(onednn_matmul_shape) <= KEY_NUMBERS * sizeof(int64_t), "a key holds a product");

/* What a message calls the primitive. */
static void describe_key(const primitive_key *key, char text[ROOM]) {
  static const char *const kinds[] = {"convolution", "convolution's data gradient", "convolution's weight gradient"};
  if (key->kind == KIND_MATMUL) {
    onednn_matmul_shape s;
    memcpy(&s, key->numbers, sizeof s);
    snprintf(text, ROOM, "%lld products %lldx%lld . %lldx%lld, %s", (long long)s.batch, (long long)s.m, (long long)s.k,
             (long long)s.k, (long long)s.n, orepa_dtype_name((orepa_dtype)s.dtype));
    return;
  }
  conv_geometry g;
  memcpy(&g, key->numbers, sizeof g);
  snprintf(text, ROOM,
           "%s, input %s, kernel %s, stride %lldx%lld, padding %lldx%lld, dilation %lldx%lld, groups %lld, %s",
           kinds[key->kind], shape_text(4, (int64_t[]){g.batch, g.groups * g.in, g.size[0], g.size[1]}),
           shape_text(4, (int64_t[]){g.groups * g.out, g.in, g.kernel[0], g.kernel[1]}), (long long)g.stride[0],
           (long long)g.stride[1], (long long)g.padding[0], (long long)g.padding[1], (long long)g.dilation[0],
           (long long)g.dilation[1], (long long)g.groups, orepa_dtype_name((orepa_dtype)g.dtype));
}

static dnnl_status_t make(stored_primitive *e) {
  if (library.status != dnnl_success)
    return library.status;
  if (e->key.kind == KIND_MATMUL) {
    onednn_matmul_shape shape;
    memcpy(&shape, e->key.numbers, sizeof shape);
    return make_matmul(e, &shape);
  }
  conv_geometry g;
  memcpy(&g, e->key.numbers, sizeof g);
  return make_conv(e, &g);
}

/* The primitive of a key, made if need be, with the store locked. NULL: failed, with a message. */
static stored_primitive *find(const primitive_key *key) {
  unsigned bucket = bucket_of(key);
  stored_primitive *found = stored(key, bucket);
  if (found)
    return found;
  stored_primitive made = {.key = *key};
  pthread_once(&library.once, open_library);
  dnnl_status_t status = make(&made);
  if (status == dnnl_success)
    return keep(&made, bucket);
  empty(&made);
  char text[ROOM];
  describe_key(key, text);
  made.status = failed("oneDNN's primitive", text, status);
  return made.status == DEVICE_UNSUPPORTED ? keep(&made, bucket) : NULL;
}

static size_t rounded(size_t bytes) {
  return (bytes + 63) / 64 * 64;
}

static device_status scratch_of(const primitive_key *key, size_t *bytes) {
  pthread_mutex_lock(&store.lock);
  stored_primitive *e = find(key);
  device_status status = e ? e->status : DEVICE_FAILED;
  if (status == DEVICE_DONE)
    *bytes = rounded(e->packed_bytes) + rounded(e->packing_bytes) + e->scratchpad_bytes;
  pthread_mutex_unlock(&store.lock);
  return status;
}

static dnnl_status_t pack(stored_primitive *e, void *scratchpad) {
  dnnl_memory_t ours = e->kernel, wanted = e->arguments[ARGUMENT_W].memory;
  bool back = e->key.kind == KIND_BACKWARD_WEIGHT;
  dnnl_exec_arg_t arguments[] = {{DNNL_ARG_FROM, back ? wanted : ours},
                                 {DNNL_ARG_TO, back ? ours : wanted},
                                 {DNNL_ARG_SCRATCHPAD, e->packing_scratchpad}};
  if (e->packing_scratchpad)
    TRY(dnnl_memory_set_data_handle(e->packing_scratchpad, scratchpad));
  return dnnl_primitive_execute(e->packing, library.stream, e->packing_scratchpad ? 3 : 2, arguments);
}

/* Sets the arguments and runs what belongs together: packing, the primitive, unpacking. */
static dnnl_status_t execute(stored_primitive *e, void *const given[ARGUMENTS], char *scratch) {
  void *pointers[ARGUMENTS];
  dnnl_exec_arg_t arguments[ARGUMENTS];
  int count = 0;
  bool back = e->key.kind == KIND_BACKWARD_WEIGHT;
  char *kernel = (char *)given[ARGUMENT_W] + e->kernel_offset;
  char *packing_scratchpad = scratch + rounded(e->packed_bytes);
  memcpy(pointers, given, sizeof pointers);
  pointers[ARGUMENT_W] = e->packing ? scratch : kernel;
  pointers[ARGUMENT_SCRATCHPAD] = packing_scratchpad + rounded(e->packing_bytes);
  for (int k = 0; k < ARGUMENTS; k++)
    if (e->arguments[k].memory) {
      TRY(dnnl_memory_set_data_handle(e->arguments[k].memory, pointers[k]));
      arguments[count++] = e->arguments[k];
    }
  if (e->packing)
    TRY(dnnl_memory_set_data_handle(e->kernel, kernel));
  if (e->packing && !back)
    TRY(pack(e, packing_scratchpad));
  if (e->kernel_cleared)
    memset(given[ARGUMENT_W], 0, e->kernel_cleared);
  TRY(dnnl_primitive_execute(e->primitive, library.stream, count, arguments));
  if (e->packing && back)
    TRY(pack(e, packing_scratchpad));
  return dnnl_stream_wait(library.stream);
}

static device_status run(const primitive_key *key, void *const pointers[ARGUMENTS], void *scratch) {
  pthread_mutex_lock(&store.lock);
  stored_primitive *e = find(key);
  device_status status = e ? e->status : DEVICE_FAILED;
  if (status == DEVICE_DONE) {
    dnnl_status_t result = execute(e, pointers, scratch);
    if (result != dnnl_success) {
      char text[ROOM];
      describe_key(key, text);
      failed("dnnl_primitive_execute", text, result);
      status = DEVICE_FAILED;
    }
  }
  pthread_mutex_unlock(&store.lock);
  return status;
}

device_status onednn_conv_scratch(conv_direction direction, const conv_geometry *g, bool has_bias, size_t *bytes) {
  primitive_key key = conv_key(direction, g, has_bias);
  return scratch_of(&key, bytes);
}

device_status onednn_conv(conv_direction direction, const conv_geometry *g, void *x, void *w, void *y, const void *bias,
                          void *scratch) {
  primitive_key key = conv_key(direction, g, bias);
  return run(&key, (void *[ARGUMENTS]){x, w, y, (void *)bias}, scratch);
}

const char *onednn_conv_implementation(conv_direction direction, const conv_geometry *g, bool has_bias) {
  primitive_key key = conv_key(direction, g, has_bias);
  pthread_mutex_lock(&store.lock);
  stored_primitive *e = find(&key);
  pthread_mutex_unlock(&store.lock);
  return e && e->status == DEVICE_DONE ? e->implementation : "";
}

device_status onednn_matmul_scratch(const onednn_matmul_shape *shape, bool has_bias, size_t *bytes) {
  primitive_key key = matmul_key(shape, has_bias);
  return scratch_of(&key, bytes);
}

device_status onednn_matmul(const onednn_matmul_shape *shape, void *a, void *b, const void *bias, void *c,
                            void *scratch) {
  primitive_key key = matmul_key(shape, bias);
  return run(&key, (void *[ARGUMENTS]){a, b, c, (void *)bias}, scratch);
}
