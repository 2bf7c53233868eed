/* Gradients of pools, and where they go when windows hold NaN, infinities or equal elements. */
#include "gradient_test.h"

typedef enum { MAX_POOL, AVERAGE_POOL, ADAPTIVE_MAX, ADAPTIVE_AVERAGE, POOLS } pool_kind;

typedef struct {
  pool_kind kind;
  orepa_pool pool;
  int64_t height, width; /* of an adaptive pool's output */
} pool_options;

static const char *const names[POOLS] = {"max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d"};

static orepa_tensor *pool2d(orepa_tensor *const *inputs, const void *options) {
  const pool_options *o = options;
  switch (o->kind) {
  case MAX_POOL:
    return orepa_max_pool2d(inputs[0], &o->pool);
  case AVERAGE_POOL:
    return orepa_avg_pool2d(inputs[0], &o->pool);
  case ADAPTIVE_MAX:
    return orepa_adaptive_max_pool2d(inputs[0], o->height, o->width);
  default:
    return orepa_adaptive_avg_pool2d(inputs[0], o->height, o->width);
  }
}

/* kernel, stride, padding, dilation; ceil mode; count padding */
static const struct {
  orepa_pool pool;
  int64_t shape[4];
} geometries[] = {
    {{{2, 2}, {2, 2}, {0, 0}, {1, 1}, false, false}, {2, 3, 4, 4}},
    {{{3, 3}, {2, 2}, {1, 1}, {1, 1}, false, true}, {1, 2, 5, 4}},
    {{{3, 3}, {2, 2}, {1, 1}, {1, 1}, true, false}, {1, 2, 4, 6}},
    {{{3, 3}, {2, 2}, {1, 1}, {1, 1}, true, true}, {1, 2, 4, 6}},
    {{{2, 3}, {1, 2}, {1, 0}, {1, 1}, false, true}, {2, 1, 3, 5}},
    {{{2, 3}, {3, 1}, {0, 1}, {1, 1}, true, true}, {1, 2, 6, 3}},
    {{{1, 1}, {1, 1}, {0, 0}, {1, 1}, false, false}, {2, 2, 2, 3}},
    {{{1, 1}, {3, 2}, {0, 0}, {1, 1}, true, false}, {1, 2, 5, 4}},  /* elements that no window sees */
    {{{5, 4}, {1, 1}, {2, 2}, {1, 1}, false, false}, {1, 2, 2, 1}}, /* a window larger than the map */
    {{{3, 2}, {3, 3}, {1, 1}, {1, 1}, true, true}, {1, 1, 3, 3}},
    {{{2, 2}, {1, 1}, {1, 1}, {1, 1}, false, true}, {1, 2, 1, 1}},
    {{{2, 2}, {2, 2}, {0, 0}, {1, 1}, true, false}, {0, 2, 3, 3}},
    {{{2, 2}, {2, 2}, {0, 0}, {1, 1}, false, true}, {2, 0, 4, 4}},
};

static const orepa_pool dilated[] = {
    {{2, 2}, {1, 1}, {0, 0}, {2, 2}, false, false}, {{3, 2}, {2, 1}, {2, 1}, {2, 3}, false, false},
    {{2, 3}, {2, 2}, {1, 2}, {3, 2}, true, false},  {{2, 2}, {3, 3}, {1, 1}, {2, 1}, true, false},
    {{2, 2}, {1, 1}, {1, 1}, {2, 2}, false, false}, /* on a small map windows that hold nothing */
};

static void pools_have_their_gradients(void **state) {
  (void)state;
  for (int k = 0; k < 2 * COUNT_OF(geometries); k++) {
    const pool_options o = {(pool_kind)(k % 2), geometries[k / 2].pool, 0, 0};
    gradient_case c = {CASE(names[o.kind], pool2d, &o, {SIZES(1, 1, 1, 1)})};
    memcpy(c.inputs[0].shape, geometries[k / 2].shape, sizeof geometries[k / 2].shape);
    for (int layout = PLAIN; layout < EXPANDED + (o.kind == AVERAGE_POOL); layout++) {
      c.inputs[0].layout = (input_layout)layout;
      check_case(&c);
    }
  }
}

static void dilated_max_pools_have_their_gradients(void **state) {
  (void)state;
  for (int k = 0; k < COUNT_OF(dilated); k++) {
    const pool_options o = {MAX_POOL, dilated[k], 0, 0};
    const gradient_case c = {CASE(names[o.kind], pool2d, &o, {SIZES(1, 2, 5, 6)})};
    check_case(&c);
  }
}

static void a_window_that_holds_nothing_has_no_gradient(void **state) {
  (void)state;
  const pool_options o = {MAX_POOL, {{2, 2}, {1, 1}, {1, 1}, {2, 2}, false, false}, 0, 0};
  const gradient_case c = {CASE("max_pool2d", pool2d, &o, {SIZES(1, 1, 1, 1)}), .rough = true, .dy = LIST(1)};
  check_values(&c, LIST(-INFINITY), LIST(0));
}

static void adaptive_pools_have_their_gradients(void **state) {
  (void)state;
  static const struct {
    int64_t shape[4], height, width;
  } cases[] = {{{2, 2, 4, 4}, 2, 2}, {{1, 2, 5, 7}, 3, 2}, {{1, 2, 3, 4}, 1, 1},
               {{1, 2, 2, 3}, 5, 4}, {{2, 1, 1, 1}, 3, 2}, {{1, 2, 4, 3}, 4, 3},
               {{1, 1, 7, 5}, 5, 4}, {{0, 2, 3, 3}, 2, 2}, {{2, 0, 3, 3}, 2, 2}};
  for (int k = 0; k < 2 * COUNT_OF(cases); k++) {
    const pool_options o = {
        k % 2 ? ADAPTIVE_MAX : ADAPTIVE_AVERAGE, {.ceil_mode = false}, cases[k / 2].height, cases[k / 2].width};
    gradient_case c = {CASE(names[o.kind], pool2d, &o, {SIZES(1, 1, 1, 1)})};
    memcpy(c.inputs[0].shape, cases[k / 2].shape, sizeof cases[k / 2].shape);
    for (int layout = PLAIN; layout < EXPANDED; layout++) {
      c.inputs[0].layout = (input_layout)layout;
      check_case(&c);
    }
  }
}

/* ---- windows of NaN, infinities and equals: one at a time, asked where its gradient lands ---- */

static bool covers(const pool_options *o, int axis, int64_t window, int64_t windows, int64_t position, int64_t size) {
  if (o->kind >= ADAPTIVE_MAX)
    return position >= window * size / windows && position < ((window + 1) * size + windows - 1) / windows;
  int64_t from = position - window * o->pool.stride[axis] + o->pool.padding[axis];
  return from >= 0 && from % o->pool.dilation[axis] == 0 && from / o->pool.dilation[axis] < o->pool.kernel[axis];
}

/* A map (1, 1, H, W) and one window of its pool (P, Q). */
typedef struct {
  const pool_options *options;
  const double *x;
  int64_t height, width, rows, columns, row, column;
} window_case;

/* The sum of the gradient is 1 where a window holds anything; none of it is outside; a maximum gives it all to one
 * element that equals the output. */
static void check_window(const window_case *w, double y, const double *gradient) {
  bool takes_one = w->options->kind == MAX_POOL || w->options->kind == ADAPTIVE_MAX, nan = false;
  double sum = 0, largest = -INFINITY;
  int taken = 0, held = 0;
  for (int64_t k = 0; k < w->height * w->width; k++) {
    bool inside = covers(w->options, 0, w->row, w->rows, k / w->width, w->height) &&
                  covers(w->options, 1, w->column, w->columns, k % w->width, w->width);
    if (!inside && gradient[k] != 0)
      fail_msg("window %d, %d has gradient %g outside, at %d", (int)w->row, (int)w->column, gradient[k], (int)k);
    nan = nan || (inside && isnan(w->x[k]));
    largest = inside && w->x[k] > largest ? w->x[k] : largest;
    held += inside;
    taken += gradient[k] != 0;
    sum += gradient[k];
    if (takes_one && gradient[k] != 0)
      assert_true(w->x[k] == y || (isnan(w->x[k]) && isnan(y)));
  }
  if (takes_one) {
    assert_true(nan ? isnan(y) : y == largest);
    assert_int_equal(taken, held > 0);
    assert_true(sum == (held > 0));
  } else {
    assert_int_equal(isnan(y), nan);
    assert_int_equal(taken, held);
  }
}

/* NaN, -infinity and a few equal numbers in a map. */
static void spoil(double *x, int64_t count) {
  const double values[] = {-INFINITY, 1, NAN, -INFINITY, 1, -2, -INFINITY, 1, 1, -2, 1};
  for (int64_t k = 0; k < count; k++)
    x[k] = values[(k * 7 + k / 3) % COUNT_OF(values)];
}

static void check_windows(const pool_options *o, const char *device, int64_t height, int64_t width) {
  double x[64];
  spoil(x, height * width);
  case_run run = {device_named(device), OREPA_FLOAT32, 1, false};
  gradient_case c = {CASE(names[o->kind], pool2d, o, {SIZES(1, 1, height, width), .values = x})};
  case_values v = values_new(&c);
  case_result all = run_case(&c, &v, &run);
  double *dy = doubles_new(all.count);
  c.dy = dy;
  for (int64_t n = 0; n < all.count; n++) {
    for (int64_t k = 0; k < all.count; k++)
      dy[k] = k == n;
    case_result r = run_case(&c, &v, &run);
    check_window(&(window_case){o, x, height, width, r.shape[2], r.shape[3], n / r.shape[3], n % r.shape[3]}, r.y[n],
                 r.gradients[0]);
    result_free(&r);
  }
  free(dy);
  result_free(&all);
  values_free(&v);
}

static void a_gradient_never_leaves_its_window(void **state) {
  (void)state;
  for (int k = 0; k < 2; k++) {
    const char *device = k ? "cpu" : "ref";
    for (int g = 0; g < 2 * COUNT_OF(geometries); g++) {
      const int64_t *shape = geometries[g / 2].shape;
      const pool_options o = {(pool_kind)(g % 2), geometries[g / 2].pool, 0, 0};
      check_windows(&o, device, shape[2], shape[3]);
    }
    for (int g = 0; g < COUNT_OF(dilated); g++)
      check_windows(&(pool_options){MAX_POOL, dilated[g], 0, 0}, device, 5, 6);
    for (int64_t size = 1; size < 8; size++) {
      check_windows(&(pool_options){.kind = ADAPTIVE_MAX, .height = size, .width = 3}, device, 5, 4);
      check_windows(&(pool_options){.kind = ADAPTIVE_AVERAGE, .height = 2, .width = size}, device, 3, 6);
    }
  }
}

static void the_first_of_equals_takes_the_gradient(void **state) {
  (void)state;
  const pool_options o = {MAX_POOL, {{2, 2}, {2, 2}, {0, 0}, {1, 1}, false, false}, 0, 0};
  const gradient_case c = {
      CASE("max_pool2d", pool2d, &o, {SIZES(1, 1, 2, 4), .values = LIST(1, 2, 0, NAN, 2, 2, NAN, 5)}), .rough = true,
      .dy = LIST(3, 4)};
  check_values(&c, LIST(2, NAN), LIST(0, 3, 0, 4, 0, 0, 0, 0));
}

/* ---- wrong input ---- */

static void wrong_pools_are_named(void **state) {
  (void)state;
  for (pool_kind kind = MAX_POOL; kind <= AVERAGE_POOL; kind++) {
    const char *name = names[kind];
    const pool_options plain = {kind, {{3, 3}, {1, 1}, {0, 0}, {1, 1}, false, false}, 0, 0},
                       none = {kind, {{3, 0}, {1, 1}, {0, 0}, {1, 1}, false, false}, 0, 0},
                       still = {kind, {{3, 3}, {0, 1}, {0, 0}, {1, 1}, false, false}, 0, 0},
                       negative = {kind, {{3, 3}, {1, 1}, {0, -1}, {1, 1}, false, false}, 0, 0},
                       wide = {kind, {{3, 3}, {1, 1}, {2, 0}, {1, 1}, false, false}, 0, 0},
                       flat = {kind, {{3, 3}, {1, 1}, {0, 0}, {1, 0}, false, false}, 0, 0};
    const error_case cases[] = {
        {{CASE(name, pool2d, &plain, {SIZES(2, 3, 4)})}, WORDS(name, "2x3x4", "4 dimensions")},
        {{CASE(name, pool2d, &plain, {SIZES(1, 1, 2, 3)})}, WORDS(name, "height of 2", "1x1x2x3")},
        {{CASE(name, pool2d, &plain, {SIZES(1, 1, 3, 0)})}, WORDS(name, "width of 0", "1x1x3x0")},
        {{CASE(name, pool2d, &none, {SIZES(1, 1, 3, 3)})}, WORDS(name, "kernel 0", "width")},
        {{CASE(name, pool2d, &still, {SIZES(1, 1, 3, 3)})}, WORDS(name, "stride 0", "height")},
        {{CASE(name, pool2d, &negative, {SIZES(1, 1, 3, 3)})}, WORDS(name, "padding -1", "width")},
        {{CASE(name, pool2d, &wide, {SIZES(1, 1, 3, 3)})}, WORDS(name, "padding 2", "half")},
        {{CASE(name, pool2d, &flat, {SIZES(1, 1, 3, 3)})}, WORDS(name, "dilation")},
    };
    check_errors(COUNT_OF(cases), cases);
  }
  for (pool_kind kind = ADAPTIVE_MAX; kind <= ADAPTIVE_AVERAGE; kind++) {
    const pool_options plain = {.kind = kind, .height = 2, .width = 2}, none = {.kind = kind, .height = 2, .width = 0};
    const error_case cases[] = {
        {{CASE(names[kind], pool2d, &plain, {SIZES(3, 4)})}, WORDS(names[kind], "3x4", "4 dimensions")},
        {{CASE(names[kind], pool2d, &none, {SIZES(1, 1, 3, 4)})}, WORDS(names[kind], "3x4", "2x0")},
        {{CASE(names[kind], pool2d, &plain, {SIZES(1, 1, 0, 4)})}, WORDS(names[kind], "0x4", "2x2")},
    };
    check_errors(COUNT_OF(cases), cases);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(pools_have_their_gradients),
      cmocka_unit_test(dilated_max_pools_have_their_gradients),
      cmocka_unit_test(a_window_that_holds_nothing_has_no_gradient),
      cmocka_unit_test(adaptive_pools_have_their_gradients),
      cmocka_unit_test(a_gradient_never_leaves_its_window),
      cmocka_unit_test(the_first_of_equals_takes_the_gradient),
      cmocka_unit_test(wrong_pools_are_named),
  };
  return RUN_GUARDED(tests);
}
