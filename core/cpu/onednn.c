/* onednn.c: what core/cpu asks of oneDNN: the library opened once, and a store of ready primitives. */
#include "cpu/onednn.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl_debug.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "cpu/features.h"
#include "cpu/onednn_primitives.h"

/* ---- the library ---- */

static pthread_once_t opened = PTHREAD_ONCE_INIT;
static dnnl_status_t open_status; /* of making what is in `library` */
static onednn_library library;

static void open_library(void) {
  /* Only before the first use; a refusal leaves the library at its own choice, which computes the same. */
  if (cpu_isa_limited())
    dnnl_set_max_cpu_isa(cpu_isa_used() == CPU_BASE ? dnnl_cpu_isa_sse41 : dnnl_cpu_isa_avx2);
  dnnl_status_t status = dnnl_engine_create(&library.engine, dnnl_cpu, 0);
  if (status == dnnl_success)
    status = dnnl_stream_create(&library.stream, library.engine, dnnl_stream_default_flags);
  if (status == dnnl_success)
    status = onednn_attributes_new(&library.attributes, NULL, false);
  open_status = status;
}

const char *onednn_version(void) {
  static _Thread_local char text[32];
  const dnnl_version_t *version = dnnl_version();
  snprintf(text, sizeof text, "%d.%d.%d", version->major, version->minor, version->patch);
  return text;
}

bool onednn_has_tiles(void) {
  pthread_once(&opened, open_library);
  return (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core_amx) == dnnl_cpu_isa_avx512_core_amx;
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
  pthread_once(&opened, open_library);
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
  int64_t kind, threads, follows, numbers[KEY_NUMBERS];
} primitive_key;

typedef struct {
  primitive_key key;
  int next;             /* in its bucket: 1 + its index; 0: none */
  uint64_t used;        /* when */
  device_status status; /* DEVICE_UNSUPPORTED is remembered too, without a primitive */
  onednn_primitive primitive;
} stored_primitive;

static struct {
  pthread_mutex_t lock; /* held while a primitive runs: its pointers belong to the call */
  stored_primitive entries[STORED];
  int buckets[BUCKETS]; /* 1 + the first entry; 0: none */
  int count;
  uint64_t clock;
  int64_t marks; /* of packed kernels that were given out */
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

static void unlink_entry(int index) {
  int *link = &store.buckets[bucket_of(&store.entries[index].key)];
  while (*link != index + 1)
    link = &store.entries[*link - 1].next;
  *link = store.entries[index].next;
}

/* The mark of a kernel as it is packed for a new primitive: that of another which packs in the same way, or a new one.
 */
static int64_t mark_of(const onednn_primitive *made) {
  for (int k = 0; k < store.count; k++)
    if (onednn_same_packing(&store.entries[k].primitive, made))
      return store.entries[k].primitive.mark;
  return ++store.marks;
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
    onednn_primitive_free(&store.entries[index].primitive);
  }
  stored_primitive *e = &store.entries[index];
  *e = *made;
  e->used = ++store.clock;
  e->next = store.buckets[bucket];
  store.buckets[bucket] = index + 1;
  return e;
}

/* ---- finding and running ---- */

static primitive_key conv_key(conv_direction direction, const conv_geometry *g, int follows) {
  primitive_key key = {.kind = direction, .threads = omp_get_max_threads(), .follows = follows};
  memcpy(key.numbers, g, sizeof *g);
  return key;
}

static primitive_key matmul_key(const onednn_matmul_shape *shape, bool has_bias) {
  primitive_key key = {.kind = KIND_MATMUL, .threads = omp_get_max_threads(), .follows = has_bias};
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

static dnnl_status_t make(onednn_primitive *primitive, const primitive_key *key) {
  if (open_status != dnnl_success)
    return open_status;
  if (key->kind == KIND_MATMUL) {
    onednn_matmul_shape shape;
    memcpy(&shape, key->numbers, sizeof shape);
    return onednn_make_product(primitive, &library, &shape, key->follows);
  }
  conv_geometry g;
  memcpy(&g, key->numbers, sizeof g);
  return onednn_make_conv(primitive, &library, (conv_direction)key->kind, &g, (int)key->follows);
}

/* The primitive of a key, made if need be, with the store locked. NULL: failed, with a message. */
static stored_primitive *find(const primitive_key *key) {
  unsigned bucket = bucket_of(key);
  stored_primitive *found = stored(key, bucket);
  if (found)
    return found;
  stored_primitive made = {.key = *key};
  pthread_once(&opened, open_library);
  dnnl_status_t status = make(&made.primitive, key);
  if (status == dnnl_success) {
    made.primitive.mark = mark_of(&made.primitive);
    return keep(&made, bucket);
  }
  onednn_primitive_free(&made.primitive);
  char text[ROOM];
  describe_key(key, text);
  made.status = failed("oneDNN's primitive", text, status);
  return made.status == DEVICE_UNSUPPORTED ? keep(&made, bucket) : NULL;
}

static device_status needs_of(const primitive_key *key, onednn_needs *needs) {
  pthread_mutex_lock(&store.lock);
  stored_primitive *e = find(key);
  device_status status = e ? e->status : DEVICE_FAILED;
  if (status == DEVICE_DONE)
    *needs = (onednn_needs){onednn_primitive_scratch(&e->primitive), e->primitive.packed_bytes, e->primitive.mark};
  pthread_mutex_unlock(&store.lock);
  return status;
}

static device_status run(const primitive_key *key, void *const pointers[ARGUMENTS], const device_packed *packed,
                         void *scratch) {
  pthread_mutex_lock(&store.lock);
  stored_primitive *e = find(key);
  device_status status = e ? e->status : DEVICE_FAILED;
  if (status == DEVICE_DONE) {
    dnnl_status_t result = onednn_primitive_run(&e->primitive, &library, pointers, packed, scratch);
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

device_status onednn_conv_prepare(conv_direction direction, const conv_geometry *g, int follows, onednn_needs *needs) {
  primitive_key key = conv_key(direction, g, follows);
  return needs_of(&key, needs);
}

device_status onednn_conv(conv_direction direction, const conv_geometry *g, void *x, void *w, void *y,
                          const conv_epilogue *epilogue, const device_packed *packed, void *scratch) {
  const conv_epilogue after = epilogue ? *epilogue : (conv_epilogue){0};
  primitive_key key = conv_key(direction, g, conv_follows(&after));
  return run(&key, (void *[ARGUMENTS]){x, w, y, (void *)after.bias, (void *)after.residual}, packed, scratch);
}

const char *onednn_conv_implementation(conv_direction direction, const conv_geometry *g, int follows) {
  primitive_key key = conv_key(direction, g, follows);
  pthread_mutex_lock(&store.lock);
  stored_primitive *e = find(&key);
  pthread_mutex_unlock(&store.lock);
  return e && e->status == DEVICE_DONE ? e->primitive.implementation : "";
}

device_status onednn_matmul_scratch(const onednn_matmul_shape *shape, bool has_bias, size_t *bytes) {
  primitive_key key = matmul_key(shape, has_bias);
  onednn_needs needs = {0};
  device_status status = needs_of(&key, &needs);
  *bytes = needs.scratch;
  return status;
}

device_status onednn_matmul(const onednn_matmul_shape *shape, void *a, void *b, const void *bias, void *c,
                            void *scratch) {
  primitive_key key = matmul_key(shape, bias);
  return run(&key, (void *[ARGUMENTS]){a, b, c, (void *)bias}, NULL, scratch);
}
