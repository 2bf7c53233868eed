/* conv_test.h: convolutions to compare between devices: a geometry, the arrays of all three directions, random
 * geometries and shapes of real networks. */
#ifndef OREPA_TESTS_CONV_TEST_H
#define OREPA_TESTS_CONV_TEST_H

#include "kernel_test.h"

static const double tolerance[] = {[OREPA_FLOAT32] = 1e-5, [OREPA_BFLOAT16] = 1e-2};

/* ---- one geometry ---- */

typedef struct {
  int64_t batch, in, height, width, out, kernel[2];
  orepa_conv conv;
  bool has_bias;
} geometry;

static inline void shapes_of(const geometry *g, int64_t x[4], int64_t w[4], int64_t y[4]) {
  memcpy(x, (int64_t[]){g->batch, g->in, g->height, g->width}, 4 * sizeof *x);
  memcpy(w, (int64_t[]){g->out, g->in / g->conv.groups, g->kernel[0], g->kernel[1]}, 4 * sizeof *w);
  memcpy(y, (int64_t[]){g->batch, g->out, 0, 0}, 4 * sizeof *y);
  for (int d = 0; d < 2; d++)
    y[2 + d] =
        (x[2 + d] + 2 * g->conv.padding[d] - g->conv.dilation[d] * (g->kernel[d] - 1) - 1) / g->conv.stride[d] + 1;
}

static inline void explain(const geometry *g, const char *what, double error) {
  const orepa_conv *c = &g->conv;
  print_error("%s: batch %d, %d channels of %dx%d to %d, kernel %dx%d, stride %dx%d, padding %dx%d, dilation %dx%d, "
              "groups %d, bias %d: error %g\n",
              what, (int)g->batch, (int)g->in, (int)g->height, (int)g->width, (int)g->out, (int)g->kernel[0],
              (int)g->kernel[1], (int)c->stride[0], (int)c->stride[1], (int)c->padding[0], (int)c->padding[1],
              (int)c->dilation[0], (int)c->dilation[1], (int)c->groups, g->has_bias, error);
}

static inline void expect(const geometry *g, const char *what, const test_array *found, const test_array *wanted) {
  double error = test_error(&found->a, &wanted->a);
  if (!(error <= tolerance[found->a.dtype])) {
    explain(g, what, error);
    fail();
  }
  assert_true(test_clean(found));
}

/* ---- what both devices compute ---- */

typedef struct {
  test_array x, w, y, bias, dy, dx, dw, dbias, moments, scale, shift;
} operands;

static inline operands make_operands(const geometry *g, orepa_dtype dtype, uint64_t seed) {
  int64_t x[4], w[4], y[4];
  shapes_of(g, x, w, y);
  int64_t rows = y[0] * y[2] * y[3], moments[] = {moments_chunks(rows), 4, g->out};
  orepa_dtype gradient = seed % 3 ? OREPA_FLOAT32 : dtype; /* of parameters: may be wider than the maps */
  operands o = {
      .x = test_new(dtype, LAYOUT_DENSE, 4, x),
      .w = test_new(dtype, LAYOUT_DENSE, 4, w),
      .y = test_new(dtype, LAYOUT_DENSE, 4, y),
      .bias = test_new(dtype, seed % 2 ? LAYOUT_GAPS : LAYOUT_DENSE, 1, &g->out),
      .dy = test_new(dtype, LAYOUT_DENSE, 4, y),
      .dx = test_new(dtype, LAYOUT_DENSE, 4, x),
      .dw = test_new(gradient, LAYOUT_DENSE, 4, w),
      .dbias = test_new(gradient, seed % 2 ? LAYOUT_GAPS : LAYOUT_DENSE, 1, &g->out),
      .moments = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 3, moments),
      .scale = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, &g->in),
      .shift = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, &g->in),
  };
  test_fill_normal(&o.x, seed + 1, 0, 1);
  test_fill_normal(&o.w, seed + 2, 0, 1);
  test_fill_normal(&o.bias, seed + 3, 0, 1);
  test_fill_normal(&o.dy, seed + 4, 0, 1);
  test_fill_normal(&o.scale, seed + 5, 1, 0.5);
  test_fill_normal(&o.shift, seed + 6, 0.5, 1);
  test_fill_normal(&o.y, seed + 7, 0, 1); /* results are written whole */
  test_fill_normal(&o.dx, seed + 8, 0, 1);
  test_fill_normal(&o.dw, seed + 9, 0, 1);
  return o;
}

static inline void release_operands(operands *o) {
  test_array *all = (test_array *)o;
  for (size_t k = 0; k < sizeof *o / sizeof *all; k++)
    test_release(&all[k]);
}

static inline operands copy_operands(const operands *o) {
  operands copy;
  for (size_t k = 0; k < sizeof *o / sizeof(test_array); k++)
    ((test_array *)&copy)[k] = test_copy(&((const test_array *)o)[k]);
  return copy;
}

/* All three directions; the first status that is not DEVICE_DONE. */
static inline device_status run(device_context *context, const geometry *g, operands *o, bool prologue, bool moments) {
  const orepa_device *device = context->device;
  device_prologue before = {o->scale.a, o->shift.a, true};
  device_status status = device->conv_forward(context, &g->conv, &o->y.a, &o->x.a, &o->w.a,
                                              g->has_bias ? &(device_epilogue){.bias = &o->bias.a} : NULL,
                                              prologue ? &before : NULL, moments ? &o->moments.a : NULL, NULL);
  if (status == DEVICE_DONE)
    status = device->conv_backward_data(context, &g->conv, &o->dx.a, &o->dy.a, &o->w.a);
  if (status == DEVICE_DONE)
    status = device->conv_backward_weight(context, &g->conv, &o->dw.a, g->has_bias ? &o->dbias.a : NULL, &o->x.a,
                                          &o->dy.a, prologue ? &before : NULL);
  return status;
}

/* ---- random geometries ---- */

static inline int64_t between(uint64_t *state, int64_t low, int64_t high) {
  return low + (int64_t)(test_random(state) % (uint64_t)(high - low + 1));
}

static inline bool fits(const geometry *g) {
  int64_t x[4], w[4], y[4];
  shapes_of(g, x, w, y);
  for (int d = 0; d < 2; d++)
    if (g->conv.dilation[d] * (g->kernel[d] - 1) + 1 > x[2 + d] + 2 * g->conv.padding[d])
      return false;
  int64_t work = y[0] * y[1] * y[2] * y[3] * w[1] * w[2] * w[3];
  return work <= 300000; /* ref takes its time */
}

static inline geometry random_geometry(uint64_t *state) {
  geometry g;
  do {
    int64_t groups = between(state, 0, 3) ? 1 : between(state, 2, 8);
    g = (geometry){.batch = between(state, 1, 20), .height = between(state, 1, 14), .width = between(state, 1, 14)};
    g.conv.groups = groups;
    g.in = groups * between(state, 1, 40 / groups);
    g.out = groups * between(state, 1, 40 / groups);
    if (groups > 1 && between(state, 0, 1)) { /* depthwise, perhaps with a multiplier */
      g.conv.groups = g.in;
      g.out = g.in * between(state, 1, 3);
    }
    for (int d = 0; d < 2; d++) {
      g.kernel[d] = between(state, 1, 7);
      g.conv.stride[d] = between(state, 1, 3);
      g.conv.padding[d] = between(state, 0, g.kernel[d] + 1);
      g.conv.dilation[d] = between(state, 0, 3) ? 1 : between(state, 2, 3);
    }
    if (between(state, 0, 2) == 0) { /* square, as in most networks */
      g.kernel[1] = g.kernel[0];
      g.conv.stride[1] = g.conv.stride[0];
      g.conv.padding[0] = g.conv.padding[1] = g.kernel[0] / 2;
      g.conv.dilation[0] = g.conv.dilation[1] = 1;
    }
    g.has_bias = between(state, 0, 1);
  } while (!fits(&g));
  return g;
}

/* ---- chosen geometries ---- */

#define SQUARE(n, i, size, o, k, s, p)                                                                                 \
  { n, i, size, size, o, {k, k}, {{s, s}, {p, p}, {1, 1}, 1}, false }

static const geometry network[] = {
    SQUARE(33, 1, 28, 16, 7, 2, 3),    SQUARE(128, 16, 7, 16, 3, 1, 1),  SQUARE(128, 16, 7, 32, 3, 2, 1),
    SQUARE(128, 16, 7, 32, 1, 2, 0),   SQUARE(64, 32, 4, 32, 3, 1, 1),   SQUARE(64, 32, 4, 64, 3, 2, 1),
    SQUARE(128, 32, 4, 64, 1, 2, 0),   SQUARE(33, 64, 2, 64, 3, 1, 1),   SQUARE(32, 64, 2, 128, 3, 2, 1),
    SQUARE(128, 64, 2, 128, 1, 2, 0),  SQUARE(32, 128, 1, 128, 3, 1, 1), SQUARE(32, 128, 1, 128, 3, 2, 1),
    SQUARE(128, 128, 1, 128, 1, 1, 0), SQUARE(1, 3, 56, 64, 7, 2, 3),    SQUARE(1, 64, 14, 64, 3, 1, 1),
    SQUARE(2, 64, 14, 128, 3, 2, 1),   SQUARE(2, 128, 14, 256, 1, 2, 0), SQUARE(1, 256, 7, 128, 3, 1, 1),
    SQUARE(3, 128, 7, 130, 1, 1, 0),   SQUARE(1, 48, 9, 48, 5, 1, 2),    SQUARE(2, 16, 5, 16, 3, 1, 3),
};

#endif
