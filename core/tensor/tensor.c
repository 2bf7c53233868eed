/* tensor.c: tensors and storages: making, counting references, geometry, the two doors, and the way to and from the
 * host. */
#include "tensor/tensor.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "autograd/autograd.h"
#include "dtype.h"
#include "loader_thread.h"
#include "tensor/promise.h"
#include "trace.h"

/* ---- types ---- */

static const struct {
  const char *name;
  size_t size;
  bool is_float;
} types[OREPA_DTYPES] = {
    [OREPA_FLOAT32] = {"float32", 4, true}, [OREPA_BFLOAT16] = {"bfloat16", 2, true},
    [OREPA_FLOAT16] = {"float16", 2, true}, [OREPA_FLOAT64] = {"float64", 8, true},
    [OREPA_INT64] = {"int64", 8, false},    [OREPA_INT32] = {"int32", 4, false},
    [OREPA_UINT8] = {"uint8", 1, false},    [OREPA_BOOL] = {"bool", 1, false},
};

const char *orepa_dtype_name(orepa_dtype dtype) {
  return types[dtype].name;
}

size_t orepa_dtype_size(orepa_dtype dtype) {
  return types[dtype].size;
}

bool orepa_dtype_is_float(orepa_dtype dtype) {
  return types[dtype].is_float;
}

int orepa_dtype_by_name(const char *name, orepa_dtype *dtype) {
  for (int k = 0; k < OREPA_DTYPES; k++)
    if (!strcmp(types[k].name, name)) {
      *dtype = (orepa_dtype)k;
      return 0;
    }
  return error_set("no type is called '%s' (there are float32 bfloat16 float16 float64 int64 int32 uint8 bool)", name);
}

/* ---- geometry ---- */

int64_t shape_count(int rank, const int64_t *shape) {
  int64_t count = 1;
  for (int d = 0; d < rank; d++)
    count *= shape[d];
  return count;
}

void shape_row_major(int rank, const int64_t *shape, int64_t *strides) {
  int64_t step = 1;
  for (int d = rank; d-- > 0; step *= shape[d])
    strides[d] = step;
}

void shape_strides(int rank, const int64_t *shape, int64_t *strides) {
  if (rank != 4) {
    shape_row_major(rank, shape, strides);
    return;
  }
  strides[1] = 1;
  strides[3] = shape[1];
  strides[2] = shape[1] * shape[3];
  strides[0] = shape[1] * shape[3] * shape[2];
}

bool shape_has_strides(int rank, const int64_t *shape, const int64_t *strides, const int64_t *wanted) {
  if (shape_count(rank, shape) == 0)
    return true;
  for (int d = 0; d < rank; d++)
    if (shape[d] != 1 && strides[d] != wanted[d])
      return false;
  return true;
}

bool shape_equal(const orepa_tensor *a, const orepa_tensor *b) {
  return a->rank == b->rank && !memcmp(a->shape, b->shape, (size_t)a->rank * sizeof *a->shape);
}

int shape_axis(const char *op, int rank, int axis) {
  if (axis >= -rank && axis < rank)
    return axis < 0 ? axis + rank : axis;
  return error_set("%s: there is no axis %d in a tensor of rank %d", op, axis < 0 ? axis : axis + 1, rank);
}

bool orepa_is_contiguous(const orepa_tensor *t) {
  int64_t strides[OREPA_MAX_RANK];
  shape_strides(t->rank, t->shape, strides);
  return shape_has_strides(t->rank, t->shape, t->strides, strides);
}

bool tensor_is_whole(const orepa_tensor *t) {
  return t->offset == 0 && orepa_is_contiguous(t) &&
         (size_t)orepa_count(t) * orepa_dtype_size(t->dtype) == t->storage->bytes;
}

/* ---- making ---- */

static orepa_tensor *tensor_allocate(void) {
  orepa_tensor *t = calloc(1, sizeof *t);
  if (!t) {
    error_out_of_memory("out of memory: no room for a tensor");
    return NULL;
  }
  atomic_init(&t->references, 1);
  return t;
}

/* The bytes of the shape, or -1 with a message. */
static int64_t shape_bytes(orepa_dtype dtype, int rank, const int64_t *shape) {
  if (rank < 0 || rank > OREPA_MAX_RANK)
    return error_set("a tensor has at most %d dimensions, not %d", OREPA_MAX_RANK, rank);
  int64_t bytes = (int64_t)orepa_dtype_size(dtype), nonzero = bytes;
  for (int d = 0; d < rank; d++) {
    if (shape[d] < 0)
      return error_set("a size is negative: %s", shape_text(rank, shape));
    if (__builtin_mul_overflow(nonzero, shape[d] ? shape[d] : 1, &nonzero))
      return error_set("a tensor of shape %s is too large to address", shape_text(rank, shape));
    bytes *= shape[d];
  }
  return bytes;
}

orepa_tensor *tensor_new(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape) {
  int64_t bytes = shape_bytes(dtype, rank, shape);
  if (bytes < 0)
    return NULL;
  orepa_tensor *t = tensor_allocate();
  if (!t)
    return NULL;
  t->storage = calloc(1, sizeof *t->storage);
  if (!t->storage) {
    free(t);
    error_out_of_memory("out of memory: no room for a storage");
    return NULL;
  }
  atomic_init(&t->storage->references, 1);
  t->storage->device = device;
  t->storage->bytes = (size_t)bytes;
  t->dtype = dtype;
  t->rank = rank;
  if (rank)
    memcpy(t->shape, shape, (size_t)rank * sizeof *shape);
  shape_strides(rank, t->shape, t->strides);
  return t;
}

orepa_tensor *tensor_like(const orepa_tensor *t) {
  return tensor_new(t->dtype, t->storage->device, t->rank, t->shape);
}

orepa_tensor *tensor_alias(orepa_tensor *t, int rank, const int64_t *shape, const int64_t *strides, int64_t offset) {
  orepa_tensor *alias = shape_bytes(t->dtype, rank, shape) < 0 ? NULL : tensor_allocate(); /* expanded to too much */
  if (!alias)
    return NULL;
  atomic_fetch_add_explicit(&t->storage->references, 1, memory_order_relaxed);
  alias->storage = t->storage;
  alias->dtype = t->dtype;
  alias->rank = rank;
  alias->offset = offset;
  if (rank) {
    memcpy(alias->shape, shape, (size_t)rank * sizeof *shape);
    memcpy(alias->strides, strides, (size_t)rank * sizeof *strides);
  }
  alias->is_view = true;
  return alias;
}

orepa_tensor *tensor_fail(orepa_tensor *t) {
  orepa_release(t);
  return NULL;
}

orepa_tensor *orepa_retain(orepa_tensor *t) {
  atomic_fetch_add_explicit(&t->references, 1, memory_order_relaxed);
  return t;
}

/* ---- storages ---- */

int storage_get_memory(tensor_storage *storage) {
  if (storage->memory || !storage->bytes)
    return 0;
  storage->memory = allocator_get(storage->device, storage->bytes);
  if (!storage->memory)
    return -1;
  storage->event = trace_memory_got(storage->bytes);
  return 0;
}

void storage_give_back(tensor_storage *storage) {
  trace_memory_given_back(storage->event, storage->bytes);
  allocator_put(storage->device, storage->memory, storage->bytes);
  storage->memory = NULL;
  storage->event = 0;
}

static void storage_release(tensor_storage *storage) {
  if (atomic_fetch_sub_explicit(&storage->references, 1, memory_order_acq_rel) != 1)
    return;
  if (storage->promise)
    promise_free(storage->promise);
  orepa_release(storage->moments);
  orepa_release(storage->cast);
  orepa_release(storage->packed);
  storage_give_back(storage);
  free(storage);
}

void tensor_drop_storage(orepa_tensor *t) {
  storage_release(t->storage);
  t->storage = NULL;
}

void orepa_release(orepa_tensor *t) {
  if (!t || atomic_fetch_sub_explicit(&t->references, 1, memory_order_acq_rel) != 1)
    return;
  storage_release(t->storage);
  orepa_release(t->grad); /* a gradient has none of its own */
  if (t->retains_grad)
    autograd_retain_no_more(t);
  autograd_drop_hooks(&t->hooks);
  autograd_node *node = t->node;
  free(t);
  if (node)
    autograd_node_release(node);
}

/* ---- the two doors ---- */

static int storage_fill(tensor_storage *storage) {
  if (storage->promise)
    return promise_fill(storage->promise);
  return storage_get_memory(storage);
}

void tensor_outline(const orepa_tensor *t, device_array *array) {
  array->data = NULL;
  array->dtype = t->dtype;
  array->rank = t->rank;
  memcpy(array->shape, t->shape, sizeof array->shape);
  memcpy(array->strides, t->strides, sizeof array->strides);
}

static void array_of(const orepa_tensor *t, device_array *array) {
  char *memory = t->storage->memory; /* NULL where there is no element, whatever the offset */
  tensor_outline(t, array);
  if (memory)
    array->data = memory + (size_t)t->offset * orepa_dtype_size(t->dtype);
}

int tensor_reads(orepa_tensor *t, device_array *array) {
  if (storage_fill(t->storage))
    return -1;
  array_of(t, array);
  return 0;
}

int tensor_writes(orepa_tensor *t, device_array *array) {
  tensor_storage *storage = t->storage;
  if (loader_thread_here() && storage->handed_over)
    return error_set("a loader's thread may not write to a tensor that another thread has as well (%s): clone it",
                     tensor_text(t));
  if (storage_fill(storage) || promise_fill_readers(storage))
    return -1;
  storage->version++;
  tensor_drop_packed(t);
  array_of(t, array);
  return 0;
}

int tensor_materialize(orepa_tensor *t) {
  return storage_fill(t->storage);
}

/* ---- statistics that came with a map ---- */

void tensor_keep_moments(orepa_tensor *t, orepa_tensor *moments) {
  orepa_release(t->storage->moments);
  t->storage->moments = orepa_retain(moments);
  t->storage->moments_version = t->storage->version;
}

orepa_tensor *tensor_moments(const orepa_tensor *t) {
  const tensor_storage *storage = t->storage;
  bool holds = storage->moments && storage->moments_version == storage->version && t->rank == 4 &&
               t->shape[1] == storage->moments->shape[2] && tensor_is_whole(t);
  return holds ? storage->moments : NULL;
}

/* ---- a whole tensor in another type ---- */

void tensor_keep_cast(orepa_tensor *t, orepa_tensor *cast) {
  orepa_release(t->storage->cast);
  t->storage->cast = orepa_retain(cast);
  t->storage->cast_version = t->storage->version;
}

orepa_tensor *tensor_kept_cast(orepa_tensor *t, orepa_dtype dtype) {
  tensor_storage *storage = t->storage;
  if (storage->cast && storage->cast_version != storage->version) {
    orepa_release(storage->cast);
    storage->cast = NULL;
  }
  bool holds = storage->cast && storage->cast->dtype == dtype && shape_equal(storage->cast, t) && tensor_is_whole(t);
  return holds ? storage->cast : NULL;
}

/* ---- a kernel as the device wants it ---- */

void tensor_drop_packed(orepa_tensor *t) {
  orepa_release(t->storage->packed);
  t->storage->packed = NULL;
}

void tensor_packed(orepa_tensor *t, size_t bytes, int64_t mark, device_packed *packed) {
  tensor_storage *storage = t->storage;
  device_array memory;
  *packed = (device_packed){NULL, false};
  if (!tensor_is_whole(t) || loader_thread_here())
    return;
  bool asked_before = storage->packed_version == storage->version;
  storage->packed_version = storage->version;
  packed->ready = storage->packed && storage->packed_mark == mark &&
                  !memcmp(storage->packed_shape, t->shape, sizeof storage->packed_shape);
  if (!packed->ready) {
    tensor_drop_packed(t);
    if (asked_before)
      storage->packed = tensor_new(OREPA_FLOAT32, storage->device, 1, &(int64_t){(int64_t)((bytes + 3) / 4)});
    storage->packed_mark = mark;
    memcpy(storage->packed_shape, t->shape, sizeof storage->packed_shape);
  }
  packed->memory = storage->packed && !tensor_reads(storage->packed, &memory) ? memory.data : NULL;
  if (!packed->memory)
    tensor_drop_packed(t);
}

/* ---- public: making and asking ---- */

orepa_tensor *orepa_empty(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape) {
  orepa_tensor *t = tensor_new(dtype, device, rank, shape);
  return t && tensor_materialize(t) ? tensor_fail(t) : t;
}

orepa_tensor *orepa_full_of(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape,
                            orepa_operand number) {
  orepa_tensor *t = tensor_new(dtype, device, rank, shape);
  return t && tensor_fill(t, number) ? tensor_fail(t) : t;
}

orepa_tensor *orepa_full(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape, double value) {
  return orepa_full_of(dtype, device, rank, shape, (orepa_operand){.number = value});
}

/* A sequence's numbers into fresh memory of float64 or int64, a piece at a time. */
static int upload_sequence(orepa_tensor *t, const device_number *first, const device_number *step) {
  union {
    double reals[512];
    int64_t integers[512];
  } piece;
  const int64_t count = t->shape[0], most = sizeof piece.reals / sizeof *piece.reals;
  const bool whole = t->dtype == OREPA_INT64;
  device_array to;
  if (tensor_writes(t, &to))
    return -1;
  for (int64_t start = 0; start < count; start += most) {
    int64_t n = count - start < most ? count - start : most;
    for (int64_t k = 0; k < n; k++)
      if (whole)
        piece.integers[k] = first->integer + (start + k) * step->integer;
      else
        piece.reals[k] = first->real + (double)(start + k) * step->real;
    if (DISPATCH("arange", t->dtype, t->storage->device, upload, (char *)to.data + start * 8, &piece, (size_t)n * 8))
      return -1;
  }
  return 0;
}

orepa_tensor *orepa_arange_of(orepa_dtype dtype, const orepa_device *device, orepa_operand first, orepa_operand step,
                              int64_t count) {
  orepa_tensor *wide = tensor_new(first.is_integer && step.is_integer ? OREPA_INT64 : OREPA_FLOAT64, device, 1, &count);
  device_number from = tensor_number(&first), by = tensor_number(&step);
  orepa_tensor *t = wide && !upload_sequence(wide, &from, &by) ? orepa_to(wide, dtype, device) : NULL;
  orepa_release(wide);
  return t;
}

orepa_tensor *orepa_arange(orepa_dtype dtype, const orepa_device *device, double first, double step, int64_t count) {
  return orepa_arange_of(dtype, device, (orepa_operand){.number = first}, (orepa_operand){.number = step}, count);
}

orepa_dtype orepa_tensor_dtype(const orepa_tensor *t) {
  return t->dtype;
}

const orepa_device *orepa_tensor_device(const orepa_tensor *t) {
  return t->storage->device;
}

int orepa_rank(const orepa_tensor *t) {
  return t->rank;
}

const int64_t *orepa_shape(const orepa_tensor *t) {
  return t->shape;
}

const int64_t *orepa_strides(const orepa_tensor *t) {
  return t->strides;
}

int64_t orepa_count(const orepa_tensor *t) {
  return shape_count(t->rank, t->shape);
}

uint64_t orepa_version(const orepa_tensor *t) {
  return t->storage->version;
}

bool orepa_shares_storage(const orepa_tensor *a, const orepa_tensor *b) {
  return a->storage == b->storage;
}

double orepa_clock(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- small kernels ---- */

int tensor_copy_into(orepa_tensor *dst, orepa_tensor *src) {
  device_array from, to;
  if (tensor_materialize(dst) || tensor_reads(src, &from) || tensor_writes(dst, &to))
    return -1;
  return DISPATCH("copy", dst->dtype, dst->storage->device, copy, &to, &from);
}

device_number tensor_number(const orepa_operand *number) {
  if (number->is_integer)
    return (device_number){(double)number->integer, number->integer};
  return (device_number){number->number, double_to_int64(number->number)};
}

int tensor_fill(orepa_tensor *t, orepa_operand number) {
  device_array to;
  if (tensor_writes(t, &to))
    return -1;
  return DISPATCH("fill", t->dtype, t->storage->device, fill, &to, tensor_number(&number));
}

/* ---- to and from the host, in logical order ---- */

/* An alias of a dense tensor's memory as a row-major tensor of the same shape: what the host sees. */
static orepa_tensor *row_major_of(orepa_tensor *t) {
  int64_t strides[OREPA_MAX_RANK];
  shape_row_major(t->rank, t->shape, strides);
  if (shape_has_strides(t->rank, t->shape, t->strides, strides))
    return orepa_retain(t);
  orepa_tensor *dense = tensor_like(t);
  if (!dense)
    return NULL;
  memcpy(dense->strides, strides, sizeof strides);
  return tensor_copy_into(dense, t) ? tensor_fail(dense) : dense;
}

int orepa_to_host(orepa_tensor *t, void *data, size_t bytes) {
  size_t size = (size_t)orepa_count(t) * orepa_dtype_size(t->dtype);
  if (bytes != size)
    return error_set("to_host: a buffer of %zu bytes for a tensor of %zu (%s)", bytes, size, tensor_text(t));
  if (!size)
    return 0;
  orepa_tensor *dense = row_major_of(t);
  if (!dense)
    return -1;
  device_array from;
  const orepa_device *device = t->storage->device;
  int failed = tensor_reads(dense, &from) || DISPATCH("to_host", t->dtype, device, download, data, from.data, size);
  orepa_release(dense);
  return failed ? -1 : 0;
}

orepa_tensor *orepa_from_host(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape,
                              const void *data) {
  orepa_tensor *t = tensor_new(dtype, device, rank, shape);
  if (!t)
    return NULL;
  size_t size = t->storage->bytes;
  if (!size)
    return t;
  int64_t strides[OREPA_MAX_RANK];
  shape_row_major(rank, shape, strides);
  bool dense = shape_has_strides(rank, shape, t->strides, strides);
  orepa_tensor *staged = dense ? orepa_retain(t) : tensor_like(t);
  if (!staged)
    return tensor_fail(t);
  if (!dense)
    memcpy(staged->strides, strides, sizeof strides);
  device_array to;
  int failed = tensor_writes(staged, &to) || DISPATCH("from_host", dtype, device, upload, to.data, data, size) ||
               (!dense && tensor_copy_into(t, staged));
  orepa_release(staged);
  return failed ? tensor_fail(t) : t;
}

int orepa_item_int64(orepa_tensor *t, int64_t *value) {
  if (orepa_count(t) != 1)
    return error_set("item: a tensor of %s is not a single number", shape_text(t->rank, t->shape));
  orepa_tensor *wide = t->dtype == OREPA_INT64 ? orepa_retain(t) : orepa_to(t, OREPA_INT64, t->storage->device);
  int failed = !wide || orepa_to_host(wide, value, sizeof *value);
  orepa_release(wide);
  return failed ? -1 : 0;
}

int orepa_item(orepa_tensor *t, double *value) {
  if (orepa_count(t) != 1)
    return error_set("item: a tensor of %s is not a single number", shape_text(t->rank, t->shape));
  bool was = orepa_set_grad_enabled(false);
  orepa_tensor *wide = t->dtype == OREPA_FLOAT64 ? orepa_retain(t) : orepa_to(t, OREPA_FLOAT64, t->storage->device);
  int failed = !wide || orepa_to_host(wide, value, sizeof *value);
  orepa_release(wide);
  orepa_set_grad_enabled(was);
  return failed ? -1 : 0;
}
