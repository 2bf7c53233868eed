/* device.h: what a device is: one struct of functions. The engine knows nothing else about where it runs, and a device
 * knows nothing of gradients, graphs or Lua.
 *
 * Every kernel takes a context first, may return before the work is done, and gives back a status only. A NULL entry,
 * or DEVICE_UNSUPPORTED from it (before anything is written), is the only statement of what a device can do. Unless an
 * entry says otherwise its arrays may have any strides, sizes of 0 are legal, and outputs overlap no input. */
#ifndef OREPA_CORE_DEVICE_H
#define OREPA_CORE_DEVICE_H

#include "orepa.h"
#include "signals.h"
#include "timings.h"

#define DEVICE_TABLE_VERSION 1

typedef enum { DEVICE_DONE, DEVICE_UNSUPPORTED, DEVICE_FAILED /* with a message: error.h */ } device_status;

/* A tensor as a kernel sees it: memory and how to walk it. Strides count elements; 0 repeats. */
typedef struct {
  void *data;
  orepa_dtype dtype;
  int rank;
  int64_t shape[OREPA_MAX_RANK], strides[OREPA_MAX_RANK];
} device_array;

/* A number that stands for an operand; `integer` is exact where `real` is not. */
typedef struct {
  double real;
  int64_t integer;
} device_number;

typedef struct device_context {
  const orepa_device *device;
  int index;    /* which of several */
  void *stream; /* order of work; NULL where the device is synchronous */
  bool deterministic;
  bool accurate; /* convolutions by the most accurate way, not the fastest */
  /* Scratch of this size, aligned to 64 bytes, valid until the entry returns; NULL with a message. One block an entry.
   */
  void *(*workspace)(struct device_context *context, size_t bytes);
  void *workspace_memory;
  size_t workspace_bytes;
  /* The first value that was out of range in a kernel (a label, an index) and its position; position -1: none. */
  int64_t offence, offence_position;
} device_context;

/* What runs on the input of a convolution or a pool before it: act(scale[c]*x + shift[c]). Padding is zeros of the
 * result. */
typedef struct {
  device_array scale, shift; /* float32 (I) */
  bool relu;
} device_prologue;

/* What follows a convolution: act(y + bias + residual), rounded to the map's type once or after each step. */
typedef struct {
  const device_array *bias;     /* (O); NULL: none */
  const device_array *residual; /* y's shape, type and order; NULL: none */
  bool relu;
} device_epilogue;

/* A kernel that does not change, as a convolution wants it, in memory of conv_packed's size: what was put there by a
 * call before, or not ready yet and put there by this one. Memory NULL: not kept yet. */
typedef struct {
  void *memory;
  bool ready;
} device_packed;

/* What a device does of a convolution's surroundings in the same pass. */
typedef struct {
  bool prologue;        /* of the forward pass */
  bool weight_prologue; /* of the weight gradient */
  bool moments;
} device_conv_fusion;

/* Partial statistics of a map of R rows (N*H*W) by C channels: for each chunk of rows and each channel how many rows
 * the chunk has, a pivot p, and the sums of (x-p) and (x-p)^2, so that a large mean costs no accuracy. Array: float32
 * or float64 (chunks, 4, C), dense. A chunk may be any set of rows (runs of moments_rows(R) of them; the tiles of a
 * convolution); where its count is 0 the other three mean nothing. Every row is in one chunk, and there are
 * moments_chunks(R) of them. */
static inline int64_t moments_rows(int64_t rows) {
  int64_t chunk = (rows + 63) / 64;
  return chunk < 128 ? 128 : chunk;
}
static inline int64_t moments_chunks(int64_t rows) {
  return rows ? (rows + moments_rows(rows) - 1) / moments_rows(rows) : 0;
}

/* Windows of a pool. Adaptive: window o of P covers floor(o*H/P) ... ceil((o+1)*H/P) - 1, the rest is unused. */
typedef struct {
  orepa_pool pool;
  bool adaptive;
} device_windows;

/* The gradient that arrives at a norm's result, perhaps not computed yet; all maps dense and of one type. It is, where
 * there are windows, what max_pool_backward makes of dy and indices; else dy + added, rounded to the map's type; else
 * dy. Then, if a ReLU followed, it is zero where the ReLU's result is not above zero: `result`, or scale*x + shift of
 * the norm's input x (one fused multiply-add, rounded to the map's type). What does not apply is NULL. The gradient is
 * stored in `kept` if there is one. */
typedef struct {
  const device_array *dy, *added;
  const device_windows *windows;
  const device_array *indices;
  const device_array *result;
  const device_array *scale, *shift; /* (C) */
  const device_array *kept;
} device_gradient;

/* One term of a squeezed kernel's fast form: a kernel W (O, I/G, K, K) is the sum of its terms, each multiplied by
 * scale[o]. */
typedef enum {
  TERM_KERNEL,   /* a (O, I/G, k, k), centred */
  TERM_PATTERN,  /* a (O, I/G, 1, 1) times the constant b (O, K, K) in each channel */
  TERM_PRODUCT,  /* a (O, T, K, K) after b (G*T, I/G, 1, 1), plus the identity if asked for */
  TERM_DEPTHWISE /* a (O, E*I/G, 1, 1) after b (E*I, 1, K, K); rows of a interleaved by group if asked for */
} device_term_kind;

typedef struct {
  device_term_kind kind;
  bool plus_identity; /* PRODUCT: b + E, E[t,i] = 1 where i == t mod (I/G) */
  bool interleave;    /* DEPTHWISE: row o of the kernel is row (o mod O/G)*G + floor(o/(O/G)) of a */
  device_array a, b;
  device_array scale; /* (O) or (1), any stride; data NULL: 1 */
  /* Backward: where the gradients go, written not added; data NULL: not wanted. PATTERN's b has none. */
  device_array da, db, dscale;
} device_term;

/* Seen by SGD, one for each parameter; all three float32 and dense in the same order, velocity.data NULL without
 * momentum. */
typedef struct {
  device_array parameter, gradient, velocity;
  double rate, decay;
} device_sgd_item;

enum { DEVICE_PAGE = 4096 };

struct orepa_device {
  int version; /* DEVICE_TABLE_VERSION */
  const char *name;

  /* ---- memory: raw blocks, aligned to 64 bytes. The engine's allocator caches them. */
  void *(*allocate)(device_context *, size_t bytes); /* NULL: the system gave none (no message) */
  void (*deallocate)(device_context *, void *memory, size_t bytes);
  /* Blocks of this size and more may be deallocated in other pieces than they were allocated in, of whole
   * DEVICE_PAGEs, and neighbours are one: the engine cuts and joins them. 0: none may. */
  size_t divisible;
  /* Bytes that may be allocated now beside what is held, without the system running out. */
  size_t (*available)(device_context *);
  device_status (*upload)(device_context *, void *device, const void *host, size_t bytes);
  device_status (*download)(device_context *, void *host, const void *device, size_t bytes);

  /* ---- order: NULL where work is done when the call returns */
  device_status (*synchronize)(device_context *);

  /* Whether bfloat16 is computed faster than float32; NULL: no. */
  bool (*bfloat16_pays)(device_context *);

  /* ---- copies */
  /* Equal shapes; converts: to nearest even between floats, toward zero from floats to integers (saturating, NaN is 0).
   */
  device_status (*copy)(device_context *, const device_array *dst, const device_array *src);
  device_status (*fill)(device_context *, const device_array *dst, device_number value);
  /* Element k in logical order is element k of draw `draw` of the generator: uniform in [0, 1), or normal. */
  device_status (*random)(device_context *, const device_array *dst, bool normal, uint64_t seed, uint64_t draw);

  /* ---- elements found by integers: along one axis an element's position is what index (int64) says, along others its
   * own. index has the shape of y, or of x where y is written to; the other array may be larger, any may have strides.
   * An index that is no position is an offence, by its own position along the axis. */
  /* y[p] = x[p, index[p] along the axis], of any type; 0 at an offence */
  device_status (*gather)(device_context *, int axis, const device_array *y, const device_array *x,
                          const device_array *index);
  /* y[p, index[p] along the axis] = x[p], of any type, or += x[p], of float32, float64 or int64: from the first
   * position along it to the last, so that the last one stays. Nothing is written if there is an offence. */
  device_status (*scatter)(device_context *, bool adds, int axis, const device_array *y, const device_array *x,
                           const device_array *index);

  /* ---- order and running sums along one axis */
  /* positions (int64; x's shape, along the axis perhaps shorter): where the elements of x are that come first when they
   * are sorted. Equals stay in their order, and NaN is the largest. */
  device_status (*sort)(device_context *, int axis, bool descending, const device_array *positions,
                        const device_array *x);
  /* y[k] = x[0] + ... + x[k], or from x[k] to the last; of one type, float32, float64 or int64 */
  device_status (*running_sum)(device_context *, int axis, bool from_last, const device_array *y,
                               const device_array *x);

  /* ---- element-wise and reductions */
  /* Function f of elementwise.h: `derivative` 0 is the forward expression of sources a, b, c; 1, 2, 3 are da, db, dc of
   * sources dy, a, b, c, y. A source without data is the number beside it. Sources have dst's shape (strides 0
   * broadcast) and one type; dst has it too, or bool for COMPARE. dst may be one of the sources, exactly. */
  device_status (*elementwise)(device_context *, int function, int derivative, const device_array *dst,
                               const device_array *sources, const device_number *numbers);
  /* dst has src's rank, and size 1 in the reduced axes. MEAN is not asked for. Reducing nothing: SUM 0, ALL 1, ANY 0.
   */
  device_status (*reduce)(device_context *, orepa_reduction kind, const device_array *dst, const device_array *src);
  /* dst float64 (count): sum of squares of each array, accumulated in float64. */
  device_status (*square_sums)(device_context *, const device_array *dst, int count, const device_array *arrays);

  /* ---- matrix product: c (B, M, N) = a (B, M, K) . b (B, K, N) + bias (N); bias may be NULL; c is dense */
  device_status (*matmul)(device_context *, const device_array *c, const device_array *a, const device_array *b,
                          const device_array *bias);

  /* ---- convolution: maps (N, C, H, W) and kernels (O, I/G, KH, KW) dense in channels-last order, of one type.
   * epilogue, prologue, moments and packed may be NULL; a device that cannot fuse runs separate kernels with the same
   * result. */
  /* What the entries below fuse for arrays of these shapes and types (data is NULL); what they don't costs a pass of
   * its own, and a prologue memory for its result. A NULL entry: nothing is fused. */
  device_conv_fusion (*conv_fusion)(device_context *, const orepa_conv *, const device_array *y, const device_array *x,
                                    const device_array *w);
  device_status (*conv_forward)(device_context *, const orepa_conv *, const device_array *y, const device_array *x,
                                const device_array *w, const device_epilogue *epilogue, const device_prologue *prologue,
                                const device_array *moments, const device_packed *packed);
  /* Bytes of the kernel as conv_forward wants it for such arrays (data is NULL), and a mark: of one kernel two forms
   * with the same mark are the same. 0: it is not changed first, or not worth keeping. A NULL entry: always 0. */
  size_t (*conv_packed)(device_context *, const orepa_conv *, const device_array *y, const device_array *x,
                        const device_array *w, const device_epilogue *epilogue, int64_t *mark);
  device_status (*conv_backward_data)(device_context *, const orepa_conv *, const device_array *dx,
                                      const device_array *dy, const device_array *w);
  /* dbias may be NULL. The prologue is that of the forward pass, x its input. dw and dbias may be float32 beside
   * bfloat16 maps. */
  device_status (*conv_backward_weight)(device_context *, const orepa_conv *, const device_array *dw,
                                        const device_array *dbias, const device_array *x, const device_array *dy,
                                        const device_prologue *prologue);

  /* ---- norm: x is (N, C, ...), dense: rows of C channels */
  /* Chunks are runs of moments_rows(R) rows. */
  device_status (*norm_moments)(device_context *, const device_array *moments, const device_array *x);
  /* From the moments of `rows` rows: mean (C), inverse deviation 1/sqrt(var + eps) (C); scale = weight * inverse, shift
   * = bias - mean * scale (C); running statistics updated (variance by rows/(rows-1)). weight, bias, running_* may be
   * NULL. */
  device_status (*norm_finalize)(device_context *, const orepa_norm *, int64_t rows, const device_array *moments,
                                 const device_array *weight, const device_array *bias, const device_array *running_mean,
                                 const device_array *running_var, const device_array *mean, const device_array *inverse,
                                 const device_array *scale, const device_array *shift);
  /* z = act(scale*y + shift + r): one fused multiply-add, then + r, then max, each rounded to the map's type as if it
   * were stored. r may be NULL; dense like y. With r_scale and r_shift, r_scale*r + r_shift is added, a fused
   * multiply-add as well. */
  device_status (*norm_apply)(device_context *, const device_array *z, const device_array *y, const device_array *scale,
                              const device_array *shift, const device_array *r, const device_array *r_scale,
                              const device_array *r_shift, bool relu);
  /* dy is the gradient's. With xh = (x - mean) * inverse: dweight = sum dy*xh, dbias = sum dy; dx = weight*inverse *
   * (dy - dbias/R - xh*dweight/R) for the batch's statistics, weight*inverse * dy for running ones. dx may be NULL;
   * weight NULL is 1.
   */
  device_status (*norm_backward)(device_context *, bool batch_statistics, const device_array *dx,
                                 const device_array *dweight, const device_array *dbias, const device_gradient *dy,
                                 const device_array *x, const device_array *mean, const device_array *inverse,
                                 const device_array *weight);

  /* ---- group norm: maps (N, C, H, W) dense in channels-last order. Channels are cut into G runs of C/G, each
   * normalised with each image's own mean and variance: y = (x - mean) * inverse * weight + bias. mean and inverse =
   * 1/sqrt(var + eps) are (N, G) and dense, float32 beside short floats; weight, bias (C) may be NULL. */
  device_status (*group_norm_forward)(device_context *, double eps, const device_array *y, const device_array *mean,
                                      const device_array *inverse, const device_array *x, const device_array *weight,
                                      const device_array *bias);
  /* With xh = (x - mean) * inverse and M elements in a group of an image: dweight = sum dy*xh, dbias = sum dy; dx =
   * inverse * (g - (sum g)/M - xh * (sum g*xh)/M) where g = weight * dy. dx, dweight, dbias, weight may be NULL. */
  device_status (*group_norm_backward)(device_context *, const device_array *dx, const device_array *dweight,
                                       const device_array *dbias, const device_array *dy, const device_array *x,
                                       const device_array *mean, const device_array *inverse,
                                       const device_array *weight);

  /* ---- pooling: maps dense in channels-last order. indices: int32, y's shape, h*W + w of the element taken; NULL: not
   * wanted. NaN wins. The prologue may be NULL; else its result, rounded to the map's type, is what is pooled. Backward
   * writes dx whole. */
  device_status (*max_pool_forward)(device_context *, const device_windows *, const device_array *y,
                                    const device_array *indices, const device_array *x,
                                    const device_prologue *prologue);
  device_status (*max_pool_backward)(device_context *, const device_windows *, const device_array *dx,
                                     const device_array *dy, const device_array *indices);
  device_status (*avg_pool_forward)(device_context *, const device_windows *, const device_array *y,
                                    const device_array *x);
  device_status (*avg_pool_backward)(device_context *, const device_windows *, const device_array *dx,
                                     const device_array *dy);

  /* ---- interpolation: maps dense in channels-last order, none of height or width 0; y is x in another size. Elements
   * without a share are not looked at. Backward writes dx whole. */
  device_status (*interpolate_forward)(device_context *, const orepa_interpolation *, const device_array *y,
                                       const device_array *x);
  device_status (*interpolate_backward)(device_context *, const orepa_interpolation *, const device_array *dx,
                                        const device_array *dy);

  /* ---- losses: over the last axis of arrays of equal rank */
  device_status (*softmax_forward)(device_context *, bool log, const device_array *y, const device_array *x);
  device_status (*softmax_backward)(device_context *, bool log, const device_array *dx, const device_array *dy,
                                    const device_array *y);
  /* logits (R.., C), labels int64 (R..): loss (R..) and log of the sum of exponentials logz (R..), both float32 or
   * float64. A row with label `ignore` has loss 0. A label outside 0 ... C-1 is an offence. */
  device_status (*cross_entropy_forward)(device_context *, double smoothing, int64_t ignore, const device_array *loss,
                                         const device_array *logz, const device_array *logits,
                                         const device_array *labels);
  /* dlogits = dloss[row] * (softmax - target); rows that are ignored: 0. */
  device_status (*cross_entropy_backward)(device_context *, double smoothing, int64_t ignore,
                                          const device_array *dlogits, const device_array *dloss,
                                          const device_array *logits, const device_array *labels,
                                          const device_array *logz);

  /* ---- optimizer */
  device_status (*sgd)(device_context *, const orepa_sgd_options *, int count, const device_sgd_item *items);

  /* ---- squeezing: kernels (O, I/n, KH, KW), dense in channels-last order, composed and taken apart.
   * w[o,i,u] = sum over t, a of after[o,t,a] * before[t,i,u-a], `after` in na groups, `before` in nb, w in `groups`
   * dense ones (na and nb are multiples of it; entries outside are zero), of size ka+kb-1. `turn`: after is turned by
   * 180 degrees first. */
  device_status (*compose)(device_context *, const device_array *w, const device_array *after, int64_t na,
                           const device_array *before, int64_t nb, int64_t groups, bool turn);
  device_status (*compose_backward_after)(device_context *, const device_array *dafter, int64_t na,
                                          const device_array *dw, const device_array *before, int64_t nb,
                                          int64_t groups, bool turn);
  device_status (*compose_backward_before)(device_context *, const device_array *dbefore, int64_t nb,
                                           const device_array *dw, const device_array *after, int64_t na,
                                           int64_t groups, bool turn);
  /* The fast form: all terms in one pass. NULL, or unsupported: the engine composes. Taps outside `taps` (NULL: none
   * are) become zero, and are zero in dw. */
  device_status (*squeeze)(device_context *, int64_t groups, const device_array *w, const orepa_taps *taps, int count,
                           const device_term *terms);
  device_status (*squeeze_backward)(device_context *, int64_t groups, const device_array *dw, const orepa_taps *taps,
                                    int count, const device_term *terms);
};

/* The devices of this build. Each lives in its own room. */
const orepa_device *ref_device(void);
const orepa_device *cpu_device(void);

/* The one context of a device, made when it is first asked for; a loader's thread has one of its own. */
device_context *device_context_of(const orepa_device *device);

/* Turns a status into 0, or -1 with a message: "conv2d: the device 'cpu' does not support float64". */
int device_check(device_status status, const orepa_device *device, const char *op, orepa_dtype dtype);

/* Before and after a call of an entry. */
static inline void dispatch_begin(void) {
  if (timings_wanted())
    timings_begin();
  signals_hold();
}
static inline device_status dispatch_end(device_status status, const char *op, const char *entry) {
  signals_release();
  if (timings_wanted())
    timings_end(op, entry);
  return status;
}

/* int result = DISPATCH("relu", dtype, device, elementwise, f, 0, &dst, ...): an entry called, absent ones included. */
#define DISPATCH(op, dtype, dev, entry, ...)                                                                           \
  (dispatch_begin(),                                                                                                   \
   device_check(dispatch_end((dev)->entry ? (dev)->entry(device_context_of(dev), __VA_ARGS__) : DEVICE_UNSUPPORTED,    \
                             op, #entry),                                                                              \
                dev, op, dtype))

#endif
