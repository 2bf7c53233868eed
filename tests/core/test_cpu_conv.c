/* test_cpu_conv.c: the cpu's convolutions against ref's, in all three directions: random geometries, shapes of real
 * networks, and arrays that end or begin at pages without access. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "kernel_test.h"

#include "cpu/conv.h"
#include "cpu/onednn.h"

static const double tolerance[] = {[OREPA_FLOAT32] = 1e-5, [OREPA_BFLOAT16] = 1e-2};

/* ---- one geometry ---- */

typedef struct {
  int64_t batch, in, height, width, out, kernel[2];
  orepa_conv conv;
  bool has_bias;
} geometry;

static void shapes_of(const geometry *g, int64_t x[4], int64_t w[4], int64_t y[4]) {
  memcpy(x, (int64_t[]){g->batch, g->in, g->height, g->width}, 4 * sizeof *x);
  memcpy(w, (int64_t[]){g->out, g->in / g->conv.groups, g->kernel[0], g->kernel[1]}, 4 * sizeof *w);
  memcpy(y, (int64_t[]){g->batch, g->out, 0, 0}, 4 * sizeof *y);
  for (int d = 0; d < 2; d++)
    y[2 + d] =
        (x[2 + d] + 2 * g->conv.padding[d] - g->conv.dilation[d] * (g->kernel[d] - 1) - 1) / g->conv.stride[d] + 1;
}

static void explain(const geometry *g, const char *what, double error) {
  const orepa_conv *c = &g->conv;
  print_error("%s: batch %d, %d channels of %dx%d to %d, kernel %dx%d, stride %dx%d, padding %dx%d, dilation %dx%d, "
              "groups %d, bias %d: error %g\n",
              what, (int)g->batch, (int)g->in, (int)g->height, (int)g->width, (int)g->out, (int)g->kernel[0],
              (int)g->kernel[1], (int)c->stride[0], (int)c->stride[1], (int)c->padding[0], (int)c->padding[1],
              (int)c->dilation[0], (int)c->dilation[1], (int)c->groups, g->has_bias, error);
}

static void expect(const geometry *g, const char *what, const test_array *found, const test_array *wanted) {
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

static operands make_operands(const geometry *g, orepa_dtype dtype, uint64_t seed) {
  int64_t x[4], w[4], y[4];
  shapes_of(g, x, w, y);
  int64_t rows = y[0] * y[2] * y[3], moments[] = {moments_chunks(rows), 4, g->out};
  operands o = {
      .x = test_new(dtype, LAYOUT_DENSE, 4, x),
      .w = test_new(dtype, LAYOUT_DENSE, 4, w),
      .y = test_new(dtype, LAYOUT_DENSE, 4, y),
      .bias = test_new(dtype, seed % 2 ? LAYOUT_GAPS : LAYOUT_DENSE, 1, &g->out),
      .dy = test_new(dtype, LAYOUT_DENSE, 4, y),
      .dx = test_new(dtype, LAYOUT_DENSE, 4, x),
      .dw = test_new(dtype, LAYOUT_DENSE, 4, w),
      .dbias = test_new(dtype, seed % 2 ? LAYOUT_GAPS : LAYOUT_DENSE, 1, &g->out),
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

static void release_operands(operands *o) {
  test_array *all = (test_array *)o;
  for (size_t k = 0; k < sizeof *o / sizeof *all; k++)
    test_release(&all[k]);
}

static operands copy_operands(const operands *o) {
  operands copy;
  for (size_t k = 0; k < sizeof *o / sizeof(test_array); k++)
    ((test_array *)&copy)[k] = test_copy(&((const test_array *)o)[k]);
  return copy;
}

/* All three directions; the first status that is not DEVICE_DONE. */
static device_status run(device_context *context, const geometry *g, operands *o, bool prologue, bool moments) {
  const orepa_device *device = context->device;
  device_prologue before = {o->scale.a, o->shift.a, true};
  device_status status =
      device->conv_forward(context, &g->conv, &o->y.a, &o->x.a, &o->w.a, g->has_bias ? &o->bias.a : NULL,
                           prologue ? &before : NULL, moments ? &o->moments.a : NULL);
  if (status == DEVICE_DONE)
    status = device->conv_backward_data(context, &g->conv, &o->dx.a, &o->dy.a, &o->w.a);
  if (status == DEVICE_DONE)
    status = device->conv_backward_weight(context, &g->conv, &o->dw.a, g->has_bias ? &o->dbias.a : NULL, &o->x.a,
                                          &o->dy.a, prologue ? &before : NULL);
  return status;
}

/* Chunks may be any sets of rows: what they amount to is that of the map that was found. */
static void check_moments(device_context *cpu, const geometry *g, const operands *found) {
  const orepa_device *device = cpu->device;
  orepa_norm norm = {.training = true, .eps = 1e-5};
  operands again = copy_operands(found);
  int64_t rows = g->out ? test_count(&found->y.a) / g->out : 0;
  test_array statistics[2][4];
  assert_int_equal(device->norm_moments(cpu, &again.moments.a, &found->y.a), DEVICE_DONE);
  for (int k = 0; k < 2; k++) {
    for (int n = 0; n < 4; n++)
      statistics[k][n] = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, &g->out);
    test_array *s = statistics[k];
    if (rows)
      assert_int_equal(device->norm_finalize(cpu, &norm, rows, k ? &again.moments.a : &found->moments.a, NULL, NULL,
                                             NULL, NULL, &s[0].a, &s[1].a, &s[2].a, &s[3].a),
                       DEVICE_DONE);
  }
  for (int n = 0; n < 4; n++) {
    assert_true(test_error(&statistics[0][n].a, &statistics[1][n].a) < 1e-5);
    test_release(&statistics[0][n]);
    test_release(&statistics[1][n]);
  }
  release_operands(&again);
}

static void check_on(const orepa_device *device, const geometry *g, orepa_dtype dtype, uint64_t seed, bool prologue,
                     bool moments) {
  device_context cpu = test_context(device), ref = test_context(ref_device());
  operands found = make_operands(g, dtype, seed), wanted = copy_operands(&found);
  device_status status = run(&cpu, g, &found, prologue, moments);
  if (status != DEVICE_DONE)
    explain(g, status == DEVICE_FAILED ? orepa_error() : "unsupported", 0);
  assert_int_equal(status, DEVICE_DONE);
  assert_int_equal(run(&ref, g, &wanted, prologue, moments), DEVICE_DONE);
  expect(g, "forward", &found.y, &wanted.y);
  expect(g, "data gradient", &found.dx, &wanted.dx);
  expect(g, "weight gradient", &found.dw, &wanted.dw);
  if (g->has_bias)
    expect(g, "bias gradient", &found.dbias, &wanted.dbias);
  if (moments)
    check_moments(&cpu, g, &found);
  release_operands(&found);
  release_operands(&wanted);
  test_context_free(&cpu);
  test_context_free(&ref);
}

static void check(const geometry *g, orepa_dtype dtype, uint64_t seed) {
  check_on(cpu_device(), g, dtype, seed, false, false);
}

/* ---- random geometries ---- */

static int64_t between(uint64_t *state, int64_t low, int64_t high) {
  return low + (int64_t)(test_random(state) % (uint64_t)(high - low + 1));
}

static bool fits(const geometry *g) {
  int64_t x[4], w[4], y[4];
  shapes_of(g, x, w, y);
  for (int d = 0; d < 2; d++)
    if (g->conv.dilation[d] * (g->kernel[d] - 1) + 1 > x[2 + d] + 2 * g->conv.padding[d])
      return false;
  int64_t work = y[0] * y[1] * y[2] * y[3] * w[1] * w[2] * w[3];
  return work <= 300000; /* ref takes its time */
}

static geometry random_geometry(uint64_t *state) {
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

static void random_geometries(void **unused) {
  (void)unused;
  uint64_t state = 1;
  for (int k = 0; k < 300; k++) {
    geometry g = random_geometry(&state);
    check(&g, OREPA_FLOAT32, (uint64_t)k);
    check(&g, OREPA_BFLOAT16, (uint64_t)k);
  }
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

static void network_shapes(void **unused) {
  (void)unused;
  for (size_t k = 0; k < sizeof network / sizeof *network; k++) {
    check(&network[k], OREPA_FLOAT32, k);
    check(&network[k], OREPA_BFLOAT16, k);
  }
}

/* 1x1 with strides from 1 to 40 channels: what overwrites memory inside oneDNN if it is asked for it. */
static void strided_points(void **unused) {
  (void)unused;
  for (int64_t in = 1; in <= 40; in++)
    for (int64_t groups = 1; groups <= 2; groups++)
      for (int64_t batch = 1; batch <= 17; batch += 16) {
        geometry g = {batch, in * groups, 9, 8, groups * (1 + in * 7 % 19), {1, 1}, {{2, 2}, {0, 0}, {1, 1}, groups},
                      in % 2};
        check(&g, OREPA_FLOAT32, (uint64_t)in);
        g.conv.stride[1] = 3;
        g.conv.padding[0] = in % 3;
        check(&g, OREPA_FLOAT32, (uint64_t)in);
        check(&g, OREPA_BFLOAT16, (uint64_t)in);
      }
}

/* What oneDNN is asked for is never its reference code, and never a 1x1 with a stride. */
static void implementations(void **unused) {
  (void)unused;
  for (size_t k = 0; k < sizeof network / sizeof *network; k++)
    for (int direction = CONV_FORWARD; direction <= CONV_BACKWARD_WEIGHT; direction++) {
      const geometry *g = &network[k];
      int64_t x[4], w[4], y[4];
      shapes_of(g, x, w, y);
      conv_geometry c = {OREPA_FLOAT32, x[0],         1,   x[1], y[1],  {x[2], x[3]},
                         {w[2], w[3]},  {y[2], y[3]}, {0}, {0},  {1, 1}};
      memcpy(c.stride, g->conv.stride, sizeof c.stride);
      memcpy(c.padding, g->conv.padding, sizeof c.padding);
      const char *name = onednn_conv_implementation((conv_direction)direction, &c, false);
      assert_null(strstr(name, "ref"));
      if (conv_is_point(&c) && c.stride[0] > 1)
        assert_string_equal(name, "");
    }
}

static void empty_arrays(void **unused) {
  (void)unused;
  geometry g = SQUARE(0, 8, 6, 8, 3, 1, 1);
  for (int bias = 0; bias < 2; bias++) {
    g.has_bias = bias;
    g.batch = 0, g.in = 8, g.out = 8, g.height = 6;
    check_on(cpu_device(), &g, OREPA_FLOAT32, 1, true, true);
    g.batch = 2, g.in = 0;
    check(&g, OREPA_FLOAT32, 2);
    g.in = 8, g.out = 0;
    check(&g, OREPA_FLOAT32, 3);
    g.out = 8, g.height = 0, g.conv.padding[0] = 2;
    check(&g, OREPA_FLOAT32, 4);
    g.conv.padding[0] = 1;
  }
}

static void prologue_and_moments(void **unused) {
  (void)unused;
  uint64_t state = 2;
  for_each_isa(device) {
    for (int k = 0; k < 60; k++) {
      geometry g = k < 21 ? network[k] : random_geometry(&state);
      g.batch = g.batch > 8 && k < 9 ? 17 : g.batch;
      check_on(device, &g, k % 8 == 7 ? OREPA_BFLOAT16 : OREPA_FLOAT32, (uint64_t)k, k % 3 != 0, k % 3 != 1);
    }
  }
}

static void other_types(void **unused) {
  (void)unused;
  geometry g = SQUARE(1, 2, 4, 2, 3, 1, 1);
  device_context cpu = test_context(cpu_device());
  for (int dtype = OREPA_FLOAT16; dtype < OREPA_DTYPES; dtype++) {
    operands o = make_operands(&g, (orepa_dtype)dtype, 1);
    assert_int_equal(run(&cpu, &g, &o, false, false), DEVICE_UNSUPPORTED);
    release_operands(&o);
  }
  test_context_free(&cpu);
}

/* The same input gives the same bits. */
static void repeats(void **unused) {
  (void)unused;
  device_context cpu = test_context(cpu_device());
  for (size_t k = 0; k < sizeof network / sizeof *network; k++) {
    operands first = make_operands(&network[k], OREPA_FLOAT32, k), second = copy_operands(&first);
    for (int n = 0; n < 3; n++) {
      assert_int_equal(run(&cpu, &network[k], n ? &second : &first, true, false), DEVICE_DONE);
      assert_true(!n || (test_same(&first.y.a, &second.y.a) && test_same(&first.dx.a, &second.dx.a) &&
                         test_same(&first.dw.a, &second.dw.a)));
    }
    release_operands(&first);
    release_operands(&second);
  }
  test_context_free(&cpu);
}

/* More geometries than are kept, twice: those that were thrown out are made again. */
static void many_geometries(void **unused) {
  (void)unused;
  for (int n = 0; n < 2; n++)
    for (int64_t k = 0; k < 450; k++) {
      geometry g = {1, 8, 3 + k % 30, 3 + k / 30, 8, {3, 3}, {{1, 1}, {1, 1}, {1, 1}, 1}, false};
      if (k % 9 == 0)
        check(&g, OREPA_FLOAT32, (uint64_t)k);
      else {
        size_t bytes;
        conv_geometry c = {OREPA_FLOAT32,       1,      1,      8,     8, {g.height, g.width}, {3, 3},
                           {g.height, g.width}, {1, 1}, {1, 1}, {1, 1}};
        assert_int_not_equal(onednn_conv_scratch(CONV_FORWARD, &c, false, &bytes), DEVICE_FAILED);
      }
    }
}

/* ---- guarded memory ---- */

enum { PAGE = 4096 };

typedef struct {
  char *region, *memory;
  size_t bytes;
} guarded;

/* `bytes` that end (or begin) where pages without access begin (or end). */
static guarded guarded_new(size_t bytes, bool at_end) {
  size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
  guarded b = {mmap(NULL, room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), NULL, room + 2 * PAGE};
  assert_ptr_not_equal(b.region, MAP_FAILED);
  assert_int_equal(mprotect(b.region + PAGE, room, PROT_READ | PROT_WRITE), 0);
  b.memory = b.region + PAGE + (at_end ? room - bytes : 0);
  memset(b.region + PAGE, 0xFF, room); /* NaN, should it be read */
  return b;
}

static void guarded_free(guarded *b) {
  munmap(b->region, b->bytes);
}

static struct {
  guarded block;
  bool at_end;
} guarded_scratch;

static void *guarded_workspace(device_context *context, size_t bytes) {
  if (context->workspace_memory)
    guarded_free(&guarded_scratch.block);
  guarded_scratch.block = guarded_new((bytes + 63) / 64 * 64, guarded_scratch.at_end);
  context->workspace_bytes = bytes;
  return context->workspace_memory = guarded_scratch.block.memory;
}

/* Moves an array's elements to guarded memory; bits outside are not there to be kept. */
static guarded guard(test_array *t, bool at_end) {
  size_t bytes = (size_t)test_count(&t->a) * orepa_dtype_size(t->a.dtype);
  guarded b = guarded_new(bytes, at_end);
  memcpy(b.memory, t->a.data, bytes);
  t->a.data = b.memory;
  return b;
}

static void check_guarded(const geometry *g, uint64_t seed, bool at_end, bool prologue) {
  device_context cpu = test_context(cpu_device()), ref = test_context(ref_device());
  operands found = make_operands(g, OREPA_FLOAT32, 2 * seed), wanted = copy_operands(&found);
  test_array *arrays[] = {&found.x, &found.w, &found.y, &found.bias, &found.dy, &found.dx, &found.dw, &found.dbias};
  enum { ARRAYS = sizeof arrays / sizeof *arrays };
  guarded blocks[ARRAYS];
  guarded_scratch.at_end = at_end;
  cpu.workspace = guarded_workspace;
  for (int k = 0; k < ARRAYS; k++)
    blocks[k] = guard(arrays[k], at_end);
  assert_int_equal(run(&cpu, g, &found, prologue, false), DEVICE_DONE);
  assert_int_equal(run(&ref, g, &wanted, prologue, false), DEVICE_DONE);
  const test_array *pairs[][2] = {{&found.y, &wanted.y}, {&found.dx, &wanted.dx}, {&found.dw, &wanted.dw}};
  for (int k = 0; k < 3; k++) {
    double error = test_error(&pairs[k][0]->a, &pairs[k][1]->a);
    if (!(error <= tolerance[OREPA_FLOAT32])) {
      explain(g, "guarded", error);
      fail();
    }
  }
  for (int k = 0; k < ARRAYS; k++)
    guarded_free(&blocks[k]);
  if (cpu.workspace_memory)
    guarded_free(&guarded_scratch.block);
  release_operands(&found);
  release_operands(&wanted);
  test_context_free(&ref);
}

static void guard_pages(void **unused) {
  (void)unused;
  uint64_t state = 3;
  for (int at_end = 0; at_end < 2; at_end++) {
    for (int k = 0; k < 200; k++) {
      geometry g = random_geometry(&state);
      check_guarded(&g, (uint64_t)k, at_end, k % 5 == 0);
    }
    for (int64_t in = 1; in <= 20; in++)
      for (int64_t size = 2; size <= 16; size += 7) {
        geometry g = SQUARE(size, in, size, 1 + in * 5 % 21, 1, 2, 0);
        check_guarded(&g, (uint64_t)in, at_end, false);
        g.conv.stride[0] = g.conv.stride[1] = 1;
        check_guarded(&g, (uint64_t)in, at_end, false);
      }
    for (size_t k = 0; k < sizeof network / sizeof *network; k++)
      check_guarded(&network[k], k, at_end, false);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(random_geometries), cmocka_unit_test(network_shapes),       cmocka_unit_test(strided_points),
      cmocka_unit_test(empty_arrays),      cmocka_unit_test(prologue_and_moments), cmocka_unit_test(other_types),
      cmocka_unit_test(repeats),           cmocka_unit_test(implementations),      cmocka_unit_test(many_geometries),
      cmocka_unit_test(guard_pages),
  };
  return cmocka_run_group_tests_name("cpu convolution", tests, NULL, NULL);
}
