/* orepa.h: the public C interface of the training engine.
 *
 * A tensor has a type, a device and up to OREPA_MAX_RANK dimensions. A shape is read N, C, H, W (images) or O, I, H, W
 * (kernels) and *logical* order is row-major over that shape. In memory a newly made 4-d tensor is channels-last (N, H,
 * W, C; kernels O, H, W, I) and any other rank row-major: that is what "contiguous" means here, and every op's result
 * is contiguous.
 *
 * Functions that return a tensor return a new reference, which the caller gives back with orepa_release; arguments are
 * borrowed. A function that can fail returns NULL or -1 and leaves a message for orepa_error. Dimensions, positions and
 * axes count from 0 here; a negative axis counts from the end. */
#ifndef OREPA_H
#define OREPA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OREPA_VERSION "0.1.0"
#define OREPA_MAX_RANK 6

#if defined(__GNUC__)
#define OREPA_API __attribute__((visibility("default")))
#else
#define OREPA_API
#endif

typedef struct orepa_tensor orepa_tensor;
typedef struct orepa_device orepa_device;

typedef enum {
  OREPA_FLOAT32,
  OREPA_BFLOAT16,
  OREPA_FLOAT16,
  OREPA_FLOAT64,
  OREPA_INT64,
  OREPA_INT32,
  OREPA_UINT8,
  OREPA_BOOL,
  OREPA_DTYPES /* how many there are */
} orepa_dtype;

/* An operand is a tensor or, where `tensor` is NULL, a number. */
typedef struct {
  orepa_tensor *tensor;
  double number;
  int64_t integer;
  bool is_integer; /* `integer` holds the number exactly */
} orepa_operand;

/* ---- errors ------------------------------------------------------------------------------------------------------ */

/* The message that the last failing call of this thread left; "" if none did. Valid until the next failing call. */
OREPA_API const char *orepa_error(void);
/* Whether that call failed because memory ran out: freeing some and calling again may then help. */
OREPA_API bool orepa_error_is_out_of_memory(void);
/* Leaves a message, for functions that the engine calls and that fail. Returns -1. */
OREPA_API int orepa_fail(const char *message);

/* ---- types ------------------------------------------------------------------------------------------------------- */

OREPA_API const char *orepa_dtype_name(orepa_dtype dtype);
/* -1 and a message if no type has that name. */
OREPA_API int orepa_dtype_by_name(const char *name, orepa_dtype *dtype);
OREPA_API size_t orepa_dtype_size(orepa_dtype dtype);
OREPA_API bool orepa_dtype_is_float(orepa_dtype dtype);

/* ---- devices ----------------------------------------------------------------------------------------------------- */

/* "cpu" (fast: oneDNN, OpenMP, own kernels) or "ref" (plain loops, the oracle of the tests). NULL and a message
 * otherwise. */
OREPA_API const orepa_device *orepa_device_by_name(const char *name);
OREPA_API const char *orepa_device_name(const orepa_device *device);
/* One line for `--version`: the libraries behind the devices with their versions, and what the processor offers. */
OREPA_API const char *orepa_build_info(void);

/* Threads that kernels use: by default OMP_NUM_THREADS, else what affinity and the cgroup's quota allow. */
OREPA_API int orepa_threads(void);
OREPA_API int orepa_set_threads(int count);

typedef struct {
  size_t live;   /* bytes in use by tensors and scratch */
  size_t cached; /* bytes freed and kept for reuse */
  size_t peak;   /* the most that was live since the start or orepa_reset_peak */
  size_t limit;  /* live + cached may not exceed it */
  size_t system; /* how often the system was asked for memory */
} orepa_memory_info;

OREPA_API orepa_memory_info orepa_memory(const orepa_device *device);
/* The live bytes of all devices together; cheap enough to ask before every op. */
OREPA_API size_t orepa_memory_live(void);
OREPA_API void orepa_reset_peak(const orepa_device *device);
/* Bytes; 0 goes back to the default, which follows what the system says is available. */
OREPA_API void orepa_set_memory_limit(const orepa_device *device, size_t bytes);
OREPA_API void orepa_empty_cache(const orepa_device *device);

/* Seconds on a monotonic clock. */
OREPA_API double orepa_clock(void);

/* On: a backward pass ends with an error before its next op, one that runs already and later ones. May be called from a
 * signal's handler. */
OREPA_API void orepa_interrupt(bool on);

/* Floating-point operations a second, a multiply-add counted as two, that the processor reaches in float32 on all of
 * orepa_threads with the instruction set in use: independent multiply-adds on registers, no memory. The best of what is
 * seen in 1 to 1000 milliseconds; -1 and a message for any other number. */
OREPA_API double orepa_fma_rate(int milliseconds);

/* Where time goes: the calls of one entry of the device table for one op, and for convolutions one geometry (else "").
 */
typedef struct {
  const char *op, *entry; /* "conv2d's weight gradient", "conv_backward_weight" */
  char detail[72];        /* "3x3 stride 2, 64 -> 128, 56x56": kernel, channels, size of the input */
  int64_t calls;
  double seconds;
} orepa_timing;

/* Starts or stops taking the time of every call, on all threads; what was taken before is forgotten. */
OREPA_API void orepa_set_timings(bool on);
/* Rows 0, 1, ... of what was taken since; false behind the last. */
OREPA_API bool orepa_timing_at(int index, orepa_timing *row);

/* ---- random numbers ---------------------------------------------------------------------------------------------- */

/* Philox 4x32-10 (Salmon et al., 2011): element k of draw n is a function of (seed, n, k) alone. */
typedef struct {
  uint64_t seed;
  uint64_t draws;
} orepa_rng;

OREPA_API void orepa_manual_seed(uint64_t seed);
OREPA_API orepa_rng orepa_rng_state(void);
OREPA_API void orepa_set_rng_state(orepa_rng state);

/* ---- making tensors ---------------------------------------------------------------------------------------------- */

/* Uninitialised. A size of 0 is legal; rank 0 is a single number. */
OREPA_API orepa_tensor *orepa_empty(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape);
OREPA_API orepa_tensor *orepa_full(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape,
                                   double value);
/* The same of an operand that is a number, of which int64 takes every bit. */
OREPA_API orepa_tensor *orepa_full_of(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape,
                                      orepa_operand number);
/* Uniform in [0, 1); normal with mean 0 and deviation 1. float32 or float64. */
OREPA_API orepa_tensor *orepa_rand(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape);
OREPA_API orepa_tensor *orepa_randn(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape);
/* first, first + step, ... `count` of them. */
OREPA_API orepa_tensor *orepa_arange(orepa_dtype dtype, const orepa_device *device, double first, double step,
                                     int64_t count);
/* The same of operands that are numbers, counted in integers if both are. */
OREPA_API orepa_tensor *orepa_arange_of(orepa_dtype dtype, const orepa_device *device, orepa_operand first,
                                        orepa_operand step, int64_t count);
/* Copies `data`, dense in logical order, to a new tensor. */
OREPA_API orepa_tensor *orepa_from_host(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape,
                                        const void *data);
/* Copies the elements in logical order into `data`, which holds `bytes` = element count times the type's size. */
OREPA_API int orepa_to_host(orepa_tensor *t, void *data, size_t bytes);
/* The value of a tensor of one element. */
OREPA_API int orepa_item(orepa_tensor *t, double *value);
OREPA_API int orepa_item_int64(orepa_tensor *t, int64_t *value);

OREPA_API orepa_tensor *orepa_retain(orepa_tensor *t);
OREPA_API void orepa_release(orepa_tensor *t); /* NULL is allowed */

/* ---- asking tensors ---------------------------------------------------------------------------------------------- */

OREPA_API orepa_dtype orepa_tensor_dtype(const orepa_tensor *t);
OREPA_API const orepa_device *orepa_tensor_device(const orepa_tensor *t);
OREPA_API int orepa_rank(const orepa_tensor *t);
OREPA_API const int64_t *orepa_shape(const orepa_tensor *t);
OREPA_API const int64_t *orepa_strides(const orepa_tensor *t); /* in elements */
OREPA_API int64_t orepa_count(const orepa_tensor *t);          /* elements */
OREPA_API bool orepa_is_contiguous(const orepa_tensor *t);
/* Grows with every write to the storage, which views share. */
OREPA_API uint64_t orepa_version(const orepa_tensor *t);
OREPA_API bool orepa_shares_storage(const orepa_tensor *a, const orepa_tensor *b);

/* ---- autograd ---------------------------------------------------------------------------------------------------- */

OREPA_API bool orepa_requires_grad(const orepa_tensor *t);
OREPA_API bool orepa_is_leaf(const orepa_tensor *t);
/* Of a leaf only, and of floats only. */
OREPA_API int orepa_set_requires_grad(orepa_tensor *t, bool on);
OREPA_API orepa_tensor *orepa_grad(const orepa_tensor *t); /* borrowed; NULL: none */
/* The gradient must have t's shape, type and device; NULL removes it. */
OREPA_API int orepa_set_grad(orepa_tensor *t, orepa_tensor *grad);
/* Adds the gradients of `y` to the leaves it was computed from. `dy` may be NULL for a single number. Frees the graph
 * on its way unless it is to be retained. */
OREPA_API int orepa_backward(orepa_tensor *y, orepa_tensor *dy, bool retain_graph);
/* The gradients of `count` tensors y, started from dys (which, or some of which, may be NULL for single numbers), with
 * respect to the tensors x, leaves or not: new references in dxs, of memory of their own; NULL where no gradient comes.
 * No leaf's own gradient changes, and nothing is computed that no x needs. */
OREPA_API int orepa_gradients(int count, orepa_tensor *const *ys, orepa_tensor *const *dys, int wanted,
                              orepa_tensor *const *xs, bool retain_graph, orepa_tensor **dxs);

/* What is called with the gradient of a tensor when it is whole. */
typedef struct {
  /* Leaves *instead, or makes it a new reference to what counts from now on, of the same shape, type and device. The
   * gradient itself must not be changed. The payload may be disposed of during the call. 0, or -1 with a message. */
  int (*call)(void *payload, orepa_tensor *gradient, orepa_tensor **instead);
  /* Frees the payload, when the hook is removed or the graph freed; may be NULL. */
  void (*dispose)(void *payload);
} orepa_hook_kind;

typedef struct orepa_hook orepa_hook;

/* Hooks of a tensor are called in the order in which they came, each with what the one before left. Those of a leaf are
 * called at the end of the pass, before its gradient is added; in orepa_gradients those of tensors that it goes to. A
 * hook stays where it is when the tensor is changed in place: it gets the gradient of what the tensor was. Takes over
 * the payload, by a failure too. The hook is given back with orepa_hook_release, and goes on being called. */
OREPA_API orepa_hook *orepa_register_hook(orepa_tensor *t, const orepa_hook_kind *kind, void *payload);
OREPA_API void orepa_hook_remove(orepa_hook *hook); /* it is not called any more */
OREPA_API void orepa_hook_release(orepa_hook *hook);
/* Lets backward set orepa_grad of t, which an op computed, as it does for leaves; after all hooks. */
OREPA_API int orepa_retain_grad(orepa_tensor *t);

/* Whether ops of this thread record a graph; the second gives back what it was. */
OREPA_API bool orepa_grad_enabled(void);
OREPA_API bool orepa_set_grad_enabled(bool on);

/* ---- autocast ---------------------------------------------------------------------------------------------------- */

/* Inside autocast conv2d, conv_transpose2d and linear cast float32 maps and weights to bfloat16 and give bfloat16
 * (gradients arrive in the weights' own type); adaptive_avg_pool2d, softmax, log_softmax and cross_entropy compute and
 * give float32; what is between them computes in the type that comes. Where bfloat16 doesn't pay, float32 is computed
 * instead, and the first such op says so on stderr. Of this thread; OREPA_FLOAT32 at first: off. */
OREPA_API orepa_dtype orepa_autocast(void);
/* OREPA_BFLOAT16 or OREPA_FLOAT32; -1 and a message otherwise. */
OREPA_API int orepa_set_autocast(orepa_dtype dtype);
/* Whether the device computes bfloat16 faster than float32. OREPA_BFLOAT16=1 in the environment says yes for every
 * device, 0 says no. */
OREPA_API bool orepa_bfloat16_pays(const orepa_device *device);

/* ---- ops from outside -------------------------------------------------------------------------------------------- */

/* A call of the backward function of such an op. */
typedef struct {
  int saved, outputs, inputs;
  orepa_tensor *const *kept; /* what was saved */
  orepa_tensor *const *dys;  /* zeros where no gradient arrived; NULL for an output that has none */
  const bool *needs;         /* which inputs' gradients are asked for */
  orepa_tensor **dxs;        /* for new references; NULL is no gradient */
} orepa_custom_call;

typedef struct {
  /* 0, or -1 with a message; what stands in dxs is released either way. */
  int (*backward)(void *payload, const orepa_custom_call *call);
  /* Frees the payload; when the graph is freed, on whatever occasion. */
  void (*dispose)(void *payload);
} orepa_custom;

/* What the op computed, without a graph: ys of xs. An input may be NULL. */
typedef struct {
  const char *name; /* for messages; copied */
  int inputs, saved, outputs;
  orepa_tensor *const *xs, *const *kept, *const *ys;
  const bool *constant; /* which outputs have no gradient, as integers have none; NULL: none of the others */
} orepa_custom_forward;

/* Makes a node for it, if a graph is recorded: new references to results of the same memory as ys, with that history.
 * Takes over the payload, by a failure too. */
OREPA_API int orepa_custom_results(const orepa_custom *custom, void *payload, const orepa_custom_forward *forward,
                                   orepa_tensor **results);

/* ---- anomalies --------------------------------------------------------------------------------------------------- */

typedef enum {
  OREPA_ANOMALY_OFF,
  OREPA_ANOMALY_NAN,   /* NaN is one */
  OREPA_ANOMALY_FINITE /* infinities too */
} orepa_anomaly;

/* Which numbers let an op of this thread fail when they come out of it, or out of its backward function. The second
 * gives back what it was. */
OREPA_API orepa_anomaly orepa_anomaly_wanted(void);
OREPA_API orepa_anomaly orepa_set_anomaly(orepa_anomaly wanted);
/* Where the user's program is ("net.lua:12"), for the message of a failure in backward; forgotten by orepa_set_anomaly.
 * For callers who are asked by orepa_anomaly_wanted. */
OREPA_API void orepa_set_place(const char *text);

/* ---- checkpoints ------------------------------------------------------------------------------------------------- */

/* Part of a computation whose maps are not kept for the backward pass: they are computed again in it. */
typedef struct {
  /* Computes the results from the inputs again: new references, as many as there were. 0, or -1 with a message; what
   * stands in ys is released either way. */
  int (*recompute)(void *payload, int inputs, orepa_tensor *const *xs, int outputs, orepa_tensor **ys);
  /* Frees the payload; when the graph is freed, on whatever occasion. */
  void (*dispose)(void *payload);
} orepa_recompute;

typedef struct orepa_checkpoint orepa_checkpoint;

/* Whether ops of this thread are recorded: gradients are enabled, and no checkpoint's first pass is under way. */
OREPA_API bool orepa_is_recording(void);
/* Between begin and end the part is computed for the first time: ops do what they do while a graph is recorded, but
 * keep nothing. Takes over the payload, by a failure too. */
OREPA_API orepa_checkpoint *orepa_checkpoint_begin(const orepa_recompute *again, void *payload, int count,
                                                   orepa_tensor *const *inputs);
OREPA_API void orepa_checkpoint_end(orepa_checkpoint *c);
/* After the end: new references to what the part gave, now with the checkpoint as their history where they need one. */
OREPA_API int orepa_checkpoint_results(orepa_checkpoint *c, int count, orepa_tensor *const *ys, orepa_tensor **results);
OREPA_API void orepa_checkpoint_release(orepa_checkpoint *c); /* ends it as well */
/* Whether this thread is computing a part again. */
OREPA_API bool orepa_is_recomputing(void);

/* ---- views: the same storage, seen differently ------------------------------------------------------------------- */

/* One size may be -1. A view where strides allow, else a copy: logical order is kept either way. */
OREPA_API orepa_tensor *orepa_reshape(orepa_tensor *t, int rank, const int64_t *shape);
OREPA_API orepa_tensor *orepa_permute(orepa_tensor *t, const int *axes);
OREPA_API orepa_tensor *orepa_transpose(orepa_tensor *t, int axis, int other);
/* Positions first <= p < last of one axis. */
OREPA_API orepa_tensor *orepa_slice(orepa_tensor *t, int axis, int64_t first, int64_t last, int64_t step);
OREPA_API orepa_tensor *orepa_select(orepa_tensor *t, int axis, int64_t position);
/* Repeats sizes of 1 without copying; new axes come first. */
OREPA_API orepa_tensor *orepa_expand(orepa_tensor *t, int rank, const int64_t *shape);
OREPA_API orepa_tensor *orepa_detach(orepa_tensor *t);

/* ---- copies ------------------------------------------------------------------------------------------------------ */

OREPA_API orepa_tensor *orepa_clone(orepa_tensor *t);
OREPA_API orepa_tensor *orepa_contiguous(orepa_tensor *t); /* t itself if it is */
/* To another type or device; t itself if nothing changes. Gradients pass through types of float. */
OREPA_API orepa_tensor *orepa_to(orepa_tensor *t, orepa_dtype dtype, const orepa_device *device);

/* Converts or moves a leaf and its gradient in place: whoever holds the tensor sees it there. */
OREPA_API int orepa_move_(orepa_tensor *t, orepa_dtype dtype, const orepa_device *device);

/* ---- element-wise functions -------------------------------------------------------------------------------------- */

/* Each row of core/elementwise.h is a function: orepa_function_by_name gives its number, or -1 and a message. */
typedef int orepa_function;
OREPA_API orepa_function orepa_function_by_name(const char *name);
OREPA_API int orepa_function_count(void);
OREPA_API const char *orepa_function_name(orepa_function f);
OREPA_API int orepa_function_arity(orepa_function f);

/* Applies f with broadcasting. Types: between tensors nothing is promoted but bfloat16 or float16 with float32; a
 * number takes the tensors' type, except that integers meet a number with a fraction as float32. */
OREPA_API orepa_tensor *orepa_apply(orepa_function f, const orepa_operand *operands);
/* The same, written into the first operand, which must be a tensor of the result's type and shape. */
OREPA_API int orepa_apply_in_place(orepa_function f, const orepa_operand *operands);

OREPA_API orepa_tensor *orepa_add(orepa_tensor *a, orepa_tensor *b);
OREPA_API orepa_tensor *orepa_mul(orepa_tensor *a, orepa_tensor *b);
OREPA_API orepa_tensor *orepa_relu(orepa_tensor *x);

/* Writes `src`, broadcast and converted, into `dst`; with gradients. */
OREPA_API int orepa_copy_(orepa_tensor *dst, orepa_tensor *src);
OREPA_API int orepa_fill_(orepa_tensor *dst, double value);
OREPA_API int orepa_fill_of_(orepa_tensor *dst, orepa_operand number);
/* Writes `src`, broadcast, into positions first <= p < last of one axis of `dst`: an op on dst, with gradients. If it
 * is one position, src may lack the axis. */
OREPA_API int orepa_assign_(orepa_tensor *dst, int axis, int64_t first, int64_t last, orepa_tensor *src);

/* ---- reductions -------------------------------------------------------------------------------------------------- */

typedef enum {
  OREPA_SUM,  /* integers and bools give int64 */
  OREPA_MEAN, /* floats */
  OREPA_MAX,  /* NaN wins; the gradient is shared by equal elements */
  OREPA_MIN,
  OREPA_ARGMAX, /* int64, counted from 0; the first of equals */
  OREPA_ARGMIN,
  OREPA_ALL, /* bool: no element is zero */
  OREPA_ANY, /* bool: some element is not */
  OREPA_REDUCTIONS
} orepa_reduction;

/* Over the axes listed, or over all of them if `axes` is NULL; keepdim leaves them with size 1. */
OREPA_API orepa_tensor *orepa_reduce(orepa_reduction kind, orepa_tensor *x, int count, const int *axes, bool keepdim);

/* ---- shape ops that copy ----------------------------------------------------------------------------------------- */

OREPA_API orepa_tensor *orepa_concatenate(int count, orepa_tensor *const *parts, int axis);
/* before[d] and after[d] elements of `value`, a number, around each axis; negative ones crop. */
OREPA_API orepa_tensor *orepa_pad(orepa_tensor *x, const int64_t *before, const int64_t *after, orepa_operand value);

/* ---- elements found by integers: index is int64 and counts from 0 -------------------------------------------------
 */

/* y[p] = x[p, index[p] along the axis], of the index's shape, which is no larger than x along other axes. */
OREPA_API orepa_tensor *orepa_gather(orepa_tensor *x, int axis, orepa_tensor *index);
/* Those positions along the axis that a list (N) names, in its order. */
OREPA_API orepa_tensor *orepa_index_select(orepa_tensor *x, int axis, orepa_tensor *list);
/* t with source, of the index's shape, added: y[p, index[p] along the axis] += source[p]. */
OREPA_API orepa_tensor *orepa_scatter_add(orepa_tensor *t, int axis, orepa_tensor *index, orepa_tensor *source);
/* t with source written there instead: where integers are equal the last one stays, and it alone has a gradient. */
OREPA_API orepa_tensor *orepa_scatter(orepa_tensor *t, int axis, orepa_tensor *index, orepa_tensor *source);
OREPA_API int orepa_scatter_(orepa_tensor *t, int axis, orepa_tensor *index, orepa_tensor *source);
/* Writes source, broadcast and converted, into those positions along the axis that a list names. */
OREPA_API int orepa_index_copy_(orepa_tensor *t, int axis, orepa_tensor *list, orepa_tensor *source);

/* ---- order along an axis ----------------------------------------------------------------------------------------- */

/* Where the `count` elements are (int64, from 0) that come first when x is sorted; equals in their order, NaN as the
 * largest. */
OREPA_API orepa_tensor *orepa_argsort(orepa_tensor *x, int axis, int64_t count, bool descending);
/* The positions, in logical order, of elements that are not 0: int64 (count). Waits for the device. */
OREPA_API orepa_tensor *orepa_nonzero(orepa_tensor *x);
/* y[k] = x[0] + ... + x[k] along the axis; integers and bools give int64. */
OREPA_API orepa_tensor *orepa_cumsum(orepa_tensor *x, int axis);

/* ---- linear algebra ---------------------------------------------------------------------------------------------- */

/* (..., M, K) . (..., K, N) with leading axes broadcast; 1-d arguments as in NumPy. */
OREPA_API orepa_tensor *orepa_matmul(orepa_tensor *a, orepa_tensor *b);
/* x (..., I), weight (O, I), bias (O) or NULL: (..., O). */
OREPA_API orepa_tensor *orepa_linear(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias);

/* ---- convolution ------------------------------------------------------------------------------------------------- */

typedef struct {
  int64_t stride[2], padding[2], dilation[2]; /* height, width */
  int64_t groups;
} orepa_conv;

/* Cross-correlation: x (N, I, H, W), weight (O, I/groups, KH, KW), bias (O) or NULL: (N, O, P, Q). */
OREPA_API orepa_tensor *orepa_conv2d(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias, const orepa_conv *conv);
/* The same + residual, which may be NULL, then a ReLU if asked for. Where no gradient is recorded this is one kernel
 * (its ReLU of NaN may be 0). */
OREPA_API orepa_tensor *orepa_conv2d_add(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias,
                                         orepa_tensor *residual, bool relu, const orepa_conv *conv);
/* Whether a device's convolutions go by the fastest way (the default; for float32 the error may be 5e-6 of the largest
 * magnitude) or by the most accurate. */
OREPA_API void orepa_set_conv_accuracy(const orepa_device *device, bool high);
/* The taps of a kernel that meet the map at some output, for a map of `size`: rows first[0] ... last[0]-1, columns
 * likewise. A 3x3 kernel with padding 1 has one of them on a map of 1x1. */
typedef struct {
  int64_t first[2], last[2];
} orepa_taps;
OREPA_API orepa_taps orepa_conv2d_taps(const orepa_conv *conv, const int64_t kernel[2], const int64_t size[2]);

/* The same backwards, as the data gradient of a convolution of this geometry from (N, O, P, Q) to (N, I, H, W): x
 * (N, I, H, W), weight (I, O/groups, KH, KW), bias (O) or NULL: (N, O, P, Q), P = (H - 1) * stride - 2 * padding +
 * dilation * (KH - 1) + output_padding + 1. output_padding (height, width) is less than the stride or the dilation. */
OREPA_API orepa_tensor *orepa_conv_transpose2d(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias,
                                               const orepa_conv *conv, const int64_t output_padding[2]);

/* ---- norm -------------------------------------------------------------------------------------------------------- */

typedef struct {
  double eps;
  double momentum; /* running = (1 - momentum) * running + momentum * batch; the variance unbiased there */
  bool training;   /* normalise by the batch and update running statistics; else by running statistics */
} orepa_norm;

/* Batch norm over all axes but the second of x (N, C, ...); weight, bias (C) may be NULL, and so may the running
 * statistics while training. */
OREPA_API orepa_tensor *orepa_batch_norm(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias,
                                         orepa_tensor *running_mean, orepa_tensor *running_var, const orepa_norm *norm);
/* The same less what running statistics, read after this step's update, make of zero: weight, bias and `zero_mean`,
 * `zero_var` (C) as in evaluation. No gradient flows through that. A border of zeros around this map is a border of
 * that value around the other. zero_mean and zero_var NULL: nothing is taken off. */
OREPA_API orepa_tensor *orepa_batch_norm_less_zero(orepa_tensor *x, orepa_tensor *weight, orepa_tensor *bias,
                                                   orepa_tensor *running_mean, orepa_tensor *running_var,
                                                   orepa_tensor *zero_mean, orepa_tensor *zero_var,
                                                   const orepa_norm *norm);

/* Each image's channels of x (N, C, ...) in groups, each normalised with its own mean and variance; weight, bias (C)
 * may be NULL. */
OREPA_API orepa_tensor *orepa_group_norm(orepa_tensor *x, int64_t groups, orepa_tensor *weight, orepa_tensor *bias,
                                         double eps);
/* The last `axes` axes of x, together, normalised with their own mean and variance; weight, bias of their shape may be
 * NULL. Of a view whose strides allow it the result lies in memory as x does. */
OREPA_API orepa_tensor *orepa_layer_norm(orepa_tensor *x, int axes, orepa_tensor *weight, orepa_tensor *bias,
                                         double eps);

/* ---- pooling ----------------------------------------------------------------------------------------------------- */

typedef struct {
  int64_t kernel[2], stride[2], padding[2], dilation[2]; /* dilation of max pooling only */
  bool ceil_mode;                                        /* a last window that hangs over the edge counts */
  bool count_padding; /* average pooling divides by the window's size, padding included */
} orepa_pool;

OREPA_API orepa_tensor *orepa_max_pool2d(orepa_tensor *x, const orepa_pool *pool);
OREPA_API orepa_tensor *orepa_avg_pool2d(orepa_tensor *x, const orepa_pool *pool);
/* Window o of P covers floor(o*H/P) ... ceil((o+1)*H/P) - 1. */
OREPA_API orepa_tensor *orepa_adaptive_avg_pool2d(orepa_tensor *x, int64_t height, int64_t width);
OREPA_API orepa_tensor *orepa_adaptive_max_pool2d(orepa_tensor *x, int64_t height, int64_t width);

/* ---- interpolation ----------------------------------------------------------------------------------------------- */

typedef struct {
  bool bilinear;      /* a blend of four neighbours; else the nearest element */
  bool align_corners; /* bilinear: the centres of the corners stay where they are; else the edges of the map */
  double scale[2];    /* of height and width as asked for, where that is not exactly the quotient of sizes; 0: that */
} orepa_interpolation;

/* x (N, C, H, W) in another size (height, width), by PyTorch's rules. */
OREPA_API orepa_tensor *orepa_interpolate(orepa_tensor *x, const int64_t size[2], const orepa_interpolation *how);

/* ---- losses ------------------------------------------------------------------------------------------------------ */

OREPA_API orepa_tensor *orepa_softmax(orepa_tensor *x, int axis);
OREPA_API orepa_tensor *orepa_log_softmax(orepa_tensor *x, int axis);

typedef struct {
  double label_smoothing;
  int64_t ignore_index; /* rows with this label have no loss and no gradient */
  bool mean;            /* over the rows that are not ignored; 0 if all are. Else one loss per row. */
} orepa_cross_entropy_options;

/* logits (N, C) with labels (N), or (N, C, H, W) with (N, H, W); labels are int64 and count from 0. */
OREPA_API orepa_tensor *orepa_cross_entropy(orepa_tensor *logits, orepa_tensor *labels,
                                            const orepa_cross_entropy_options *options);

/* ---- optimizer --------------------------------------------------------------------------------------------------- */

typedef struct {
  double momentum;
  bool nesterov;
} orepa_sgd_options;

/* For each k: g = grad + decay[k]*p; v = momentum*v + g; p -= rate[k] * (nesterov ? g + momentum*v : v). velocities[k]
 * may be NULL where momentum is 0, and starts at zero. One pass over all parameters, which may not require anything of
 * autograd. */
OREPA_API int orepa_sgd_step(int count, orepa_tensor *const *parameters, orepa_tensor *const *gradients,
                             orepa_tensor *const *velocities, const double *rates, const double *decays,
                             const orepa_sgd_options *options);
/* float64 (count): the sum of squares of each tensor, accumulated in float64. Not finite exactly where a tensor is not.
 */
OREPA_API orepa_tensor *orepa_square_sums(int count, orepa_tensor *const *tensors);

#ifdef __cplusplus
}
#endif
#endif
