/* gradient_test.h: checks of gradients through the public interface. A case is a function from input tensors to one
 * output, and what its inputs look like. check_case runs it
 *   - in float64 on ref: every gradient is compared with central differences of the output, element by element;
 *   - there again with one input at a time asking for a gradient, and with a gradient of the output that is a strided
 *     view: the same must come out;
 *   - in float32 on ref and on cpu: output and gradients are compared with those in float64.
 * All numbers are made on the host and fit float32, so that all runs compute from the same ones. */
#ifndef OREPA_TESTS_GRADIENT_TEST_H
#define OREPA_TESTS_GRADIENT_TEST_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "orepa.h"

enum { MOST_INPUTS = 8 };

/* How a leaf becomes the input: itself, or a view of the leaf whose shape is made to fit. */
typedef enum { PLAIN, PERMUTED, SLICED, EXPANDED, LAYOUTS } input_layout;

typedef struct {
  int rank;
  int64_t shape[OREPA_MAX_RANK]; /* that the function sees */
  input_layout layout;
  bool constant;        /* asks for no gradient */
  double low, high;     /* both 0: from -1 to 1 */
  const double *values; /* of a plain leaf, in logical order; NULL: spread over the range, no two equal, none 0 */
} case_input;

/* {SIZES(2, 3), .low = 1, .high = 2} */
#define SIZES(...) .rank = (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), .shape = {__VA_ARGS__}
#define LIST(...) ((const double[]){__VA_ARGS__})
#define WORDS(...) ((const char *const[]){__VA_ARGS__, NULL})
#define COUNT_OF(array) ((int)(sizeof(array) / sizeof *(array)))

typedef orepa_tensor *case_function(orepa_tensor *const *inputs, const void *options);

typedef struct {
  const char *name;
  case_function *function;
  const void *options;
  int count;
  case_input inputs[MOST_INPUTS];
  bool view;        /* the result need not be contiguous */
  bool rough;       /* no differences: not finite, or at a kink */
  const double *dy; /* the output's gradient; NULL: some numbers, none 0 */
  double tolerance; /* of float32; 0: FLOAT32_TOLERANCE */
} gradient_case;

/* {CASE("sum of rows", function, &options, {SIZES(2, 3)}), .rough = true} */
#define CASE(label, called, with, ...)                                                                                 \
  .name = label, .function = called, .options = with,                                                                  \
  .count = (int)(sizeof((case_input[]){__VA_ARGS__}) / sizeof(case_input)), .inputs = {__VA_ARGS__}

#define FLOAT32_TOLERANCE 1e-5
#define DIFFERENCE_TOLERANCE 1e-6
#define STEP 1e-6

/* ---- messages ---- */

static inline const char *case_text(const gradient_case *c) {
  static char text[512];
  size_t used = (size_t)snprintf(text, sizeof text, "%s(", c->name);
  for (int k = 0; k < c->count; k++) {
    static const char *const layouts[LAYOUTS] = {"", " permuted", " sliced", " expanded"};
    used += (size_t)snprintf(text + used, sizeof text - used, k ? ", [" : "[");
    for (int d = 0; d < c->inputs[k].rank; d++)
      used += (size_t)snprintf(text + used, sizeof text - used, d ? " %d" : "%d", (int)c->inputs[k].shape[d]);
    used += (size_t)snprintf(text + used, sizeof text - used, "]%s", layouts[c->inputs[k].layout]);
  }
  snprintf(text + used, sizeof text - used, ")");
  return text;
}

/* Fails with the case and the engine's message if a call failed. */
#define CASE_DONE(c, ok)                                                                                               \
  do {                                                                                                                 \
    if (!(ok))                                                                                                         \
      fail_msg("%s: %s: %s", case_text(c), #ok, orepa_error());                                                        \
  } while (0)

/* NaN equals NaN; `scale` is what counts as large. */
static inline bool case_near(double x, double y, double tolerance, double scale) {
  return x == y || (isnan(x) && isnan(y)) || fabs(x - y) <= tolerance * (1 + scale);
}

static inline void case_same(const gradient_case *c, const char *what, int64_t count, const double *got,
                             const double *wanted, double tolerance) {
  double scale = 0;
  for (int64_t k = 0; k < count; k++)
    scale = isfinite(wanted[k]) ? fmax(scale, fabs(wanted[k])) : scale;
  for (int64_t k = 0; k < count; k++)
    if (!case_near(got[k], wanted[k], tolerance, scale))
      fail_msg("%s: %s: element %d is %.17g, not %.17g", case_text(c), what, (int)k, got[k], wanted[k]);
}

/* ---- numbers ---- */

static inline int64_t sizes_product(int rank, const int64_t *shape) {
  int64_t count = 1;
  for (int d = 0; d < rank; d++)
    count *= shape[d];
  return count;
}

static inline int64_t greatest_divisor(int64_t a, int64_t b) {
  return b ? greatest_divisor(b, a % b) : a;
}

/* `count` numbers, each in its own one of as many equal parts of the range, in mixed order. Where in its part depends
 * on the input, so that no two inputs share a number. */
static inline void spread_values(double *values, int64_t count, double low, double high, int input) {
  int64_t jump = count * 5 / 8 + 1;
  while (greatest_divisor(jump, count) > 1)
    jump++;
  for (int64_t k = 0; k < count; k++)
    values[k] = (float)(low + (high - low) * ((double)(k * jump % count) + 0.21 + 0.13 * input) / (double)count);
}

static inline double dy_value(const gradient_case *c, int64_t k) {
  return c->dy ? c->dy[k] : ((double)((k * 37 + 11) % 101) - 50.5) / 64;
}

static inline double *doubles_new(int64_t count) {
  double *values = malloc((size_t)count * sizeof *values + 1);
  assert_non_null(values);
  return values;
}

static inline double *doubles_of(orepa_tensor *t) {
  bool was = orepa_set_grad_enabled(false);
  double *values = doubles_new(orepa_count(t));
  orepa_tensor *wide = orepa_to(t, OREPA_FLOAT64, orepa_tensor_device(t));
  assert_non_null(wide);
  assert_int_equal(orepa_to_host(wide, values, (size_t)orepa_count(t) * sizeof *values), 0);
  orepa_release(wide);
  orepa_set_grad_enabled(was);
  return values;
}

static inline orepa_tensor *tensor_of(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape,
                                      const double *values) {
  orepa_tensor *wide = orepa_from_host(OREPA_FLOAT64, device, rank, shape, values);
  assert_non_null(wide);
  orepa_tensor *t = orepa_to(wide, dtype, device);
  assert_non_null(t);
  orepa_release(wide);
  return t;
}

/* ---- inputs ---- */

/* The axis along which an expanded leaf has size 1; -1 if there is none. */
static inline int expanded_axis(const case_input *in) {
  int axis = in->rank - 1;
  while (axis >= 0 && in->shape[axis] == 1)
    axis--;
  return axis;
}

static inline void leaf_shape(const case_input *in, int64_t *shape) {
  int last = in->rank - 1;
  for (int d = 0; d <= last; d++)
    shape[d] = in->shape[in->layout == PERMUTED ? last - d : d];
  if (in->layout == SLICED && in->rank > 0)
    shape[last] = 2 * shape[last] + 1;
  if (in->layout == SLICED && in->rank > 1)
    shape[0]++;
  if (in->layout == EXPANDED && expanded_axis(in) >= 0)
    shape[expanded_axis(in)] = 1;
}

static inline int64_t leaf_count(const case_input *in) {
  int64_t shape[OREPA_MAX_RANK];
  leaf_shape(in, shape);
  return sizes_product(in->rank, shape);
}

static inline orepa_tensor *reversed(orepa_tensor *t) {
  int axes[OREPA_MAX_RANK];
  for (int d = 0; d < orepa_rank(t); d++)
    axes[d] = orepa_rank(t) - 1 - d;
  return orepa_permute(t, axes);
}

/* What the function sees of a leaf; a new reference. */
static inline orepa_tensor *seen_of(const case_input *in, orepa_tensor *leaf) {
  int last = in->rank - 1;
  if (in->layout == PERMUTED)
    return reversed(leaf);
  if (in->layout == EXPANDED)
    return orepa_expand(leaf, in->rank, in->shape);
  if (in->layout == PLAIN || in->rank == 0)
    return orepa_retain(leaf);
  orepa_tensor *part = orepa_slice(leaf, last, 1, 2 * in->shape[last] + 1, 2);
  if (in->rank == 1 || !part)
    return part;
  orepa_tensor *inner = orepa_slice(part, 0, 1, in->shape[0] + 1, 1);
  orepa_release(part);
  return inner;
}

typedef struct {
  double *of[MOST_INPUTS];
} case_values;

static inline case_values values_new(const gradient_case *c) {
  case_values v = {{NULL}};
  for (int k = 0; k < c->count; k++) {
    const case_input *in = &c->inputs[k];
    int64_t count = leaf_count(in);
    bool given = in->low != 0 || in->high != 0;
    v.of[k] = doubles_new(count);
    if (in->values)
      memcpy(v.of[k], in->values, (size_t)count * sizeof(double));
    else
      spread_values(v.of[k], count, given ? in->low : -1, given ? in->high : 1, k);
  }
  return v;
}

static inline void values_free(case_values *v) {
  for (int k = 0; k < MOST_INPUTS; k++)
    free(v->of[k]);
}

static inline bool values_have_nan(const gradient_case *c, const case_values *v) {
  for (int k = 0; k < c->count; k++)
    for (int64_t n = 0; n < leaf_count(&c->inputs[k]); n++)
      if (!isfinite(v->of[k][n]))
        return true;
  return false;
}

/* ---- one run ---- */

typedef struct {
  const orepa_device *device;
  orepa_dtype dtype;
  unsigned asking; /* the inputs that ask for a gradient, a bit each */
  bool strided;    /* the output's gradient is a view */
} case_run;

typedef struct {
  int rank;
  int64_t shape[OREPA_MAX_RANK], count;
  double *y, *gradients[MOST_INPUTS];
} case_result;

static inline void result_free(case_result *r) {
  free(r->y);
  for (int k = 0; k < MOST_INPUTS; k++)
    free(r->gradients[k]);
}

static inline unsigned asking_all(const gradient_case *c) {
  unsigned asking = 0;
  for (int k = 0; k < c->count; k++)
    asking |= c->inputs[k].constant ? 0u : 1u << k;
  return asking;
}

/* The output, and the leaves it was computed from. */
static inline orepa_tensor *forward(const gradient_case *c, const case_values *v, const case_run *run,
                                    orepa_tensor **leaves) {
  orepa_tensor *seen[MOST_INPUTS] = {NULL};
  for (int k = 0; k < c->count; k++) {
    int64_t shape[OREPA_MAX_RANK];
    leaf_shape(&c->inputs[k], shape);
    leaves[k] = tensor_of(run->dtype, run->device, c->inputs[k].rank, shape, v->of[k]);
    assert_int_equal(orepa_set_requires_grad(leaves[k], run->asking >> k & 1), 0);
    seen[k] = seen_of(&c->inputs[k], leaves[k]);
    CASE_DONE(c, seen[k]);
  }
  orepa_tensor *y = c->function(seen, c->options);
  for (int k = 0; k < c->count; k++)
    orepa_release(seen[k]);
  return y;
}

/* Like y; as a view, every second element of the reversed shape. */
static inline orepa_tensor *gradient_of_output(const gradient_case *c, orepa_tensor *y, bool strided) {
  case_input like = {.rank = orepa_rank(y), .layout = strided ? SLICED : PLAIN};
  int64_t count = orepa_count(y);
  memcpy(like.shape, orepa_shape(y), (size_t)like.rank * sizeof *like.shape);
  double *values = doubles_new(count);
  for (int64_t k = 0; k < count; k++)
    values[k] = dy_value(c, k);
  orepa_tensor *dy = tensor_of(orepa_tensor_dtype(y), orepa_tensor_device(y), like.rank, like.shape, values);
  free(values);
  if (!strided)
    return dy;
  int64_t shape[OREPA_MAX_RANK];
  leaf_shape(&like, shape);
  int64_t turned[OREPA_MAX_RANK];
  for (int d = 0; d < like.rank; d++)
    turned[d] = shape[like.rank - 1 - d];
  orepa_tensor *wide = orepa_full(orepa_tensor_dtype(y), orepa_tensor_device(y), like.rank, turned, NAN);
  orepa_tensor *back = reversed(wide), *view = seen_of(&like, back);
  assert_int_equal(orepa_copy_(view, dy), 0);
  orepa_release(dy);
  orepa_release(wide);
  orepa_release(back);
  return view;
}

/* The gradient of leaf k, on the host: like the leaf, contiguous, and in memory that is nobody else's. */
static inline double *checked_gradient(const gradient_case *c, orepa_tensor *const *leaves, int k,
                                       const orepa_tensor *dy, bool asked) {
  const orepa_tensor *leaf = leaves[k];
  orepa_tensor *g = orepa_grad(leaf);
  if (!asked) {
    assert_null(g);
    return NULL;
  }
  if (!g)
    fail_msg("%s: gradient %d is missing", case_text(c), k + 1);
  assert_int_equal(orepa_tensor_dtype(g), orepa_tensor_dtype(leaf));
  assert_ptr_equal(orepa_tensor_device(g), orepa_tensor_device(leaf));
  assert_int_equal(orepa_rank(g), orepa_rank(leaf));
  assert_memory_equal(orepa_shape(g), orepa_shape(leaf), (size_t)orepa_rank(leaf) * sizeof(int64_t));
  assert_true(orepa_is_contiguous(g));
  assert_false(orepa_shares_storage(g, dy));
  for (int n = 0; n < c->count; n++) {
    assert_false(orepa_shares_storage(g, leaves[n]));
    assert_false(n != k && orepa_grad(leaves[n]) && orepa_shares_storage(g, orepa_grad(leaves[n])));
  }
  return doubles_of(g);
}

static inline case_result run_case(const gradient_case *c, const case_values *v, const case_run *run) {
  orepa_tensor *leaves[MOST_INPUTS] = {NULL}, *y = forward(c, v, run, leaves);
  CASE_DONE(c, y);
  case_result r = {.rank = orepa_rank(y), .count = orepa_count(y), .y = doubles_of(y)};
  memcpy(r.shape, orepa_shape(y), (size_t)r.rank * sizeof *r.shape);
  if (!c->view && !orepa_is_contiguous(y))
    fail_msg("%s: the result is not contiguous", case_text(c));
  assert_int_equal(orepa_requires_grad(y), run->asking != 0);
  orepa_tensor *dy = gradient_of_output(c, y, run->strided);
  uint64_t version = orepa_version(dy);
  if (run->asking)
    CASE_DONE(c, orepa_backward(y, dy, false) == 0);
  assert_int_equal(orepa_version(dy), version);
  orepa_release(y);
  for (int k = 0; k < c->count; k++)
    r.gradients[k] = checked_gradient(c, leaves, k, dy, run->asking >> k & 1);
  for (int k = 0; k < c->count; k++)
    orepa_release(leaves[k]);
  orepa_release(dy);
  return r;
}

static inline void compare_results(const gradient_case *c, const char *what, const case_result *got,
                                   const case_result *wanted, double tolerance) {
  assert_int_equal(got->rank, wanted->rank);
  assert_memory_equal(got->shape, wanted->shape, sizeof got->shape);
  case_same(c, what, got->count, got->y, wanted->y, tolerance);
  for (int k = 0; k < c->count; k++)
    if (got->gradients[k]) {
      char name[64];
      snprintf(name, sizeof name, "%s, gradient %d", what, k + 1);
      case_same(c, name, leaf_count(&c->inputs[k]), got->gradients[k], wanted->gradients[k], tolerance);
    }
}

/* ---- central differences ---- */

static inline const orepa_device *device_named(const char *name) {
  const orepa_device *device = orepa_device_by_name(name);
  assert_non_null(device);
  return device;
}

/* The sum of the output's elements, each times its dy. */
static inline double weighted_output(const gradient_case *c, const case_values *v) {
  case_run run = {device_named("ref"), OREPA_FLOAT64, 0, false};
  orepa_tensor *leaves[MOST_INPUTS] = {NULL}, *y = forward(c, v, &run, leaves);
  CASE_DONE(c, y);
  double *values = doubles_of(y), sum = 0;
  for (int64_t k = 0; k < orepa_count(y); k++)
    sum += dy_value(c, k) * values[k];
  free(values);
  orepa_release(y);
  for (int k = 0; k < c->count; k++)
    orepa_release(leaves[k]);
  return sum;
}

static inline double difference(const gradient_case *c, case_values *v, int input, int64_t element) {
  double *x = &v->of[input][element], middle = *x, low, high, width;
  *x = middle + STEP;
  width = *x;
  high = weighted_output(c, v);
  *x = middle - STEP;
  width -= *x;
  low = weighted_output(c, v);
  *x = middle;
  return (high - low) / width;
}

static inline void check_differences(const gradient_case *c, case_values *v, const case_result *r) {
  for (int k = 0; k < c->count; k++)
    for (int64_t n = 0; r->gradients[k] && n < leaf_count(&c->inputs[k]); n++) {
      double got = r->gradients[k][n], wanted = difference(c, v, k, n);
      if (!case_near(got, wanted, DIFFERENCE_TOLERANCE, fabs(wanted)))
        fail_msg("%s: gradient %d, element %d is %.12g, the difference %.12g", case_text(c), k + 1, (int)n, got,
                 wanted);
    }
}

/* ---- a case ---- */

static inline void check_finite(const gradient_case *c, const case_result *r) {
  for (int64_t n = 0; n < r->count; n++)
    if (isnan(r->y[n]))
      fail_msg("%s: output element %d is NaN", case_text(c), (int)n);
  for (int k = 0; k < c->count; k++)
    for (int64_t n = 0; r->gradients[k] && n < leaf_count(&c->inputs[k]); n++)
      if (isnan(r->gradients[k][n]))
        fail_msg("%s: gradient %d, element %d is NaN", case_text(c), k + 1, (int)n);
}

/* The same numbers come out whoever asks, and however the output's gradient lies in memory; nothing stays behind. */
static inline void check_again(const gradient_case *c, const case_values *v, case_run run, const case_result *first) {
  unsigned all = run.asking;
  size_t live = orepa_memory_live();
  for (int k = -1; k < c->count; k++) {
    run.strided = k < 0;
    run.asking = k < 0 ? all : all & 1u << k;
    if (k >= 0 && (!run.asking || run.asking == all))
      continue;
    case_result r = run_case(c, v, &run);
    compare_results(c, "again", &r, first, run.dtype == OREPA_FLOAT64 ? 1e-13 : FLOAT32_TOLERANCE);
    result_free(&r);
  }
  if (orepa_memory_live() != live)
    fail_msg("%s: %zu bytes live before, %zu after", case_text(c), live, orepa_memory_live());
}

static inline void check_case(const gradient_case *c) {
  double tolerance = c->tolerance > 0 ? c->tolerance : FLOAT32_TOLERANCE;
  case_values v = values_new(c);
  case_run run = {device_named("ref"), OREPA_FLOAT64, asking_all(c), false};
  case_result exact = run_case(c, &v, &run);
  if (!values_have_nan(c, &v))
    check_finite(c, &exact);
  if (!c->rough)
    check_differences(c, &v, &exact);
  check_again(c, &v, run, &exact);
  for (int k = 0; k < 2; k++) {
    case_run single = {device_named(k ? "cpu" : "ref"), OREPA_FLOAT32, run.asking, false};
    case_result r = run_case(c, &v, &single);
    compare_results(c, k ? "float32 on cpu" : "float32 on ref", &r, &exact, tolerance);
    check_again(c, &v, single, &r);
    result_free(&r);
  }
  result_free(&exact);
  values_free(&v);
}

static inline void check_cases(int count, const gradient_case *cases) {
  for (int k = 0; k < count; k++)
    check_case(&cases[k]);
}

/* Each case with its inputs in all layouts, mixed. */
static inline void check_cases_in_layouts(int count, const gradient_case *cases) {
  for (int k = 0; k < count * LAYOUTS; k++) {
    gradient_case c = cases[k / LAYOUTS];
    for (int n = 0; n < c.count; n++)
      c.inputs[n].layout = (input_layout)((k + n) % LAYOUTS);
    check_case(&c);
  }
}

/* The case, and what must come out: the output and the gradient of the first input. */
static inline void check_values(const gradient_case *c, const double *y, const double *gradient) {
  check_case(c);
  case_values v = values_new(c);
  case_run run = {device_named("ref"), OREPA_FLOAT64, asking_all(c), false};
  case_result r = run_case(c, &v, &run);
  case_same(c, "output", r.count, r.y, y, 1e-12);
  case_same(c, "gradient", leaf_count(&c->inputs[0]), r.gradients[0], gradient, 1e-12);
  result_free(&r);
  values_free(&v);
}

/* ---- wrong input ---- */

typedef struct {
  gradient_case c;
  const char *const *words; /* that the message must have */
} error_case;

/* The function fails on both devices, says what is wrong, and leaves nothing behind. */
static inline void check_errors(int count, const error_case *cases) {
  for (int k = 0; k < 2 * count; k++) {
    const gradient_case *c = &cases[k / 2].c;
    case_values v = values_new(c);
    case_run run = {device_named(k % 2 ? "cpu" : "ref"), OREPA_FLOAT32, asking_all(c), false};
    orepa_tensor *leaves[MOST_INPUTS] = {NULL};
    size_t live = orepa_memory_live();
    if (forward(c, &v, &run, leaves))
      fail_msg("%s: it did not fail", case_text(c));
    for (const char *const *word = cases[k / 2].words; *word; word++)
      if (!strstr(orepa_error(), *word))
        fail_msg("%s: the message lacks '%s': %s", case_text(c), *word, orepa_error());
    for (int n = 0; n < c->count; n++)
      orepa_release(leaves[n]);
    assert_int_equal(orepa_memory_live(), live);
    values_free(&v);
  }
}

/* For main: device memory is out of the host's reach. */
#define RUN_GUARDED(tests) (setenv("OREPA_REF_GUARD", "1", 1), cmocka_run_group_tests(tests, NULL, NULL))

#endif
