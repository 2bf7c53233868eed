/* tensor.h: tensors and storages from the inside.
 *
 * A storage is memory with a version. Kernels reach it through two doors only: tensor_reads, which makes a tensor a
 * kernel's argument, and tensor_writes, which does so for writing and counts the write. A storage has a size from the
 * start and gets its memory at the first door; one that is promised (promise.h) is filled there as well, and before a
 * write everything that was promised of the storage. */
#ifndef OREPA_CORE_TENSOR_H
#define OREPA_CORE_TENSOR_H

#include <stdatomic.h>

#include "device.h"
#include "error.h"
#include "orepa.h"

typedef struct autograd_node autograd_node;
typedef struct promise promise; /* promise.h */
typedef struct promise_reader promise_reader;
typedef struct leaf_arrival leaf_arrival; /* autograd/pass.h */

typedef struct {
  atomic_int references;
  const orepa_device *device;
  size_t bytes;
  void *memory;  /* NULL until it is needed */
  int64_t event; /* in which it was got; 0: none (trace.h) */
  uint64_t version;
  promise *promise;        /* what would fill it; NULL: nothing, or it is filled */
  promise_reader *readers; /* the promises that read it */
  orepa_tensor *moments;   /* of the map that it holds, taken while it was written (device.h); NULL: none */
  uint64_t moments_version;
  orepa_tensor *cast; /* the same numbers in another type; NULL: none */
  uint64_t cast_version;
  orepa_tensor *packed;                 /* a kernel as the device wants it; NULL: none */
  int64_t packed_mark, packed_shape[4]; /* of what was packed */
  uint64_t packed_version;              /* when it was packed, or asked for the first time */
  bool handed_over;                     /* to another thread: loaders' threads write it no more */
  /* A view of it was made while a graph was recorded: in-place ops with gradients are refused. */
  atomic_bool viewed_in_graph;
} tensor_storage;

struct orepa_tensor {
  atomic_int references;
  orepa_dtype dtype;
  int rank;
  int64_t shape[OREPA_MAX_RANK], strides[OREPA_MAX_RANK]; /* strides in elements */
  int64_t offset;                                         /* in elements */
  tensor_storage *storage;
  bool is_view;
  bool requires_grad;  /* of a leaf: asked for; of others: some input has it */
  autograd_node *node; /* what computed it; NULL: a leaf */
  int output;          /* which of the node's outputs it is */
  orepa_tensor *grad;
  orepa_hook *hooks;      /* of a leaf; those of what a node computed are the node's */
  leaf_arrival *arriving; /* of a leaf, while a backward pass is under way that holds its gradient back */
  bool retains_grad;      /* the node has an entry for it */
};

/* ---- the two doors: 0, or -1 with a message where there is no memory, and nothing has changed */
int tensor_reads(orepa_tensor *t, device_array *array);
int tensor_writes(orepa_tensor *t, device_array *array);

/* A tensor as a kernel sees it, without memory: for questions about shapes. */
void tensor_outline(const orepa_tensor *t, device_array *array);

/* ---- statistics that came with a map: moments (chunks, 4, C) of a whole tensor (N, C, H, W) as it is now, kept until
 * it is written. */
void tensor_keep_moments(orepa_tensor *t, orepa_tensor *moments);
/* Borrowed; NULL if there are none, or t is not the whole map any more. */
orepa_tensor *tensor_moments(const orepa_tensor *t);

/* ---- a whole tensor in another type, kept until it is written */
void tensor_keep_cast(orepa_tensor *t, orepa_tensor *cast);
/* Borrowed; NULL if there is none of t as it is now. */
orepa_tensor *tensor_kept_cast(orepa_tensor *t, orepa_dtype dtype);

/* ---- a whole kernel as a device wants it (device.h), kept from the second time that it is asked for unchanged, until
 * it is written. Its memory is NULL as long as it is not kept, and always on a loader's thread. */
void tensor_packed(orepa_tensor *t, size_t bytes, int64_t mark, device_packed *packed);
/* What is kept was not made ready. */
void tensor_drop_packed(orepa_tensor *t);

/* ---- making */
/* Checks rank, sizes and that the bytes can be counted. No memory is allocated before the first door. */
orepa_tensor *tensor_new(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape);
orepa_tensor *tensor_like(const orepa_tensor *t); /* type, device, shape */
/* The same storage with other geometry; no node, no gradient asked. */
orepa_tensor *tensor_alias(orepa_tensor *t, int rank, const int64_t *shape, const int64_t *strides, int64_t offset);
/* Drops the reference and returns NULL: `return tensor_fail(y);` */
orepa_tensor *tensor_fail(orepa_tensor *t);
/* Gets the memory of a storage now, and fills it if it is promised, so that nothing fails later. */
int tensor_materialize(orepa_tensor *t);

/* ---- geometry */
int64_t shape_count(int rank, const int64_t *shape);
/* Strides of a dense tensor: channels-last for rank 4, else row-major. */
void shape_strides(int rank, const int64_t *shape, int64_t *strides);
void shape_row_major(int rank, const int64_t *shape, int64_t *strides);
/* Whether the strides are these, sizes of 1 left aside. */
bool shape_has_strides(int rank, const int64_t *shape, const int64_t *strides, const int64_t *wanted);
/* Whether t is all of its storage, contiguous. */
bool tensor_is_whole(const orepa_tensor *t);
bool shape_equal(const orepa_tensor *a, const orepa_tensor *b);
/* The axis, counted from 0, of `axis` in [-rank, rank); -1 and a message otherwise. */
int shape_axis(const char *op, int rank, int axis);

/* Memory for a storage, unless it has some; 0, or -1 with a message. */
int storage_get_memory(tensor_storage *storage);
void storage_give_back(tensor_storage *storage);

/* Gives back the storage of a handle that is not counted itself (autograd_saved). */
void tensor_drop_storage(orepa_tensor *t);

/* ---- the allocator: blocks by size class, kept when freed (allocator.c) */
void *allocator_get(const orepa_device *device, size_t bytes);
void allocator_put(const orepa_device *device, void *memory, size_t bytes);
/* Gives back the scratch of a loader's thread. */
void allocator_end_thread(void);

/* ---- random numbers */
/* The number of the next draw. */
orepa_rng rng_draw(void);

/* ---- small kernels that everybody calls, without autograd */
int tensor_copy_into(orepa_tensor *dst, orepa_tensor *src); /* shapes equal; converts */
int tensor_fill(orepa_tensor *t, orepa_operand number);
/* A number as devices take it. */
device_number tensor_number(const orepa_operand *number);

#endif
