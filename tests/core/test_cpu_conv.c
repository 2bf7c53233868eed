/* test_cpu_conv.c: the cpu's convolutions against ref's, in all three directions: random geometries and shapes of real
 * networks. test_guard_conv.c looks at the memory around them. */
#include "conv_test.h"

#include "cpu/conv.h"
#include "cpu/onednn.h"

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

static void random_geometries(void **unused) {
  (void)unused;
  uint64_t state = 1;
  for (int k = 0; k < RANDOM_CASES(300); k++) {
    geometry g = random_geometry(&state);
    check(&g, OREPA_FLOAT32, (uint64_t)k);
    check(&g, OREPA_BFLOAT16, (uint64_t)k);
  }
}

/* ---- chosen geometries ---- */

static void network_shapes(void **unused) {
  (void)unused;
  for (size_t k = 0; k < sizeof network / sizeof *network; k++) {
    check(&network[k], OREPA_FLOAT32, k);
    check(&network[k], OREPA_BFLOAT16, k);
  }
}

/* Kernels that are large beside the map, whose weight gradient is a product of patches where there are tiles. */
static void large_kernels(void **unused) {
  (void)unused;
  static const geometry all[] = {
      {2, 40, 5, 4, 72, {3, 3}, {{1, 1}, {1, 1}, {1, 1}, 1}, true},
      {3, 33, 7, 6, 64, {3, 2}, {{2, 1}, {1, 0}, {1, 1}, 1}, false},
      {2, 48, 9, 8, 65, {2, 3}, {{1, 2}, {2, 3}, {3, 2}, 1}, true},
      {1, 64, 1, 1, 96, {5, 5}, {{1, 1}, {2, 2}, {1, 1}, 1}, false},
      {1, 300, 4, 3, 64, {1, 4}, {{1, 3}, {0, 4}, {1, 1}, 1}, true},
  };
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    for (uint64_t seed = 0; seed < 3; seed++)
      check(&all[k], OREPA_BFLOAT16, seed);
}

/* First layers: few channels and a stride, whose weight gradient is folded where there are tiles. */
static void few_channels(void **unused) {
  (void)unused;
  static const geometry all[] = {
      {2, 3, 20, 18, 16, {7, 7}, {{2, 2}, {3, 3}, {1, 1}, 1}, true},
      {3, 1, 13, 9, 8, {3, 3}, {{2, 2}, {0, 1}, {1, 1}, 1}, false},
      {2, 4, 11, 17, 20, {5, 4}, {{2, 3}, {2, 5}, {1, 1}, 1}, true},
      {1, 2, 23, 19, 33, {8, 6}, {{4, 3}, {1, 4}, {1, 1}, 1}, false},
      {2, 3, 17, 16, 64, {4, 3}, {{3, 1}, {0, 0}, {1, 1}, 1}, false},
      {1, 3, 5, 6, 16, {5, 6}, {{4, 2}, {0, 0}, {1, 1}, 1}, true},
      {1, 3, 19, 30, 16, {3, 3}, {{2, 2}, {4, 5}, {1, 1}, 1}, true},
  };
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    for (uint64_t seed = 0; seed < 3; seed++)
      check(&all[k], OREPA_BFLOAT16, seed);
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
      conv_geometry c = {OREPA_FLOAT32, OREPA_FLOAT32, x[0],         1,   x[1], y[1],
                         {x[2], x[3]},  {w[2], w[3]},  {y[2], y[3]}, {0}, {0},  {1, 1}};
      memcpy(c.stride, g->conv.stride, sizeof c.stride);
      memcpy(c.padding, g->conv.padding, sizeof c.padding);
      const char *name = onednn_conv_implementation((conv_direction)direction, &c, 0);
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
    for (int k = 0; k < RANDOM_CASES(90); k++) {
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
        onednn_needs needs;
        conv_geometry c = {OREPA_FLOAT32, OREPA_FLOAT32,       1,      1,      8,     8, {g.height, g.width},
                           {3, 3},        {g.height, g.width}, {1, 1}, {1, 1}, {1, 1}};
        assert_int_not_equal(onednn_conv_prepare(CONV_FORWARD, &c, 0, &needs), DEVICE_FAILED);
      }
    }
}

/* ---- what follows, and kernels that are kept ---- */

static device_status forward(device_context *context, const geometry *g, operands *o, const device_epilogue *epilogue,
                             const device_packed *packed) {
  return context->device->conv_forward(context, &g->conv, &o->y.a, &o->x.a, &o->w.a, epilogue, NULL, NULL, packed);
}

/* A convolution with what follows it, as a stranger, then for a kernel that will be kept, is put away, and is read. */
static void check_followed(const geometry *g, orepa_dtype dtype, uint64_t seed, int follows) {
  device_context cpu = test_context(cpu_device()), ref = test_context(ref_device());
  operands found = make_operands(g, dtype, seed), wanted = copy_operands(&found), first;
  device_epilogue after = {follows & FOLLOWED_BY_BIAS ? &found.bias.a : NULL,
                           follows & FOLLOWED_BY_RESIDUAL ? &found.dy.a : NULL, follows & FOLLOWED_BY_RELU};
  assert_int_equal(forward(&ref, g, &wanted, &after, NULL), DEVICE_DONE);
  assert_int_equal(forward(&cpu, g, &found, &after, NULL), DEVICE_DONE);
  expect(g, "followed", &found.y, &wanted.y);
  int64_t mark = -1;
  size_t bytes = cpu.device->conv_packed(&cpu, &g->conv, &found.y.a, &found.x.a, &found.w.a, &after, &mark);
  char *memory = aligned_alloc(64, bytes / 64 * 64 + 128);
  memset(memory + bytes, 77, 64);
  for (int k = 0; k < 3 && bytes; k++) {
    test_fill_normal(&found.y, seed + 20, 0, 1);
    assert_int_equal(forward(&cpu, g, &found, &after, &(device_packed){k ? memory : NULL, k == 2}), DEVICE_DONE);
    expect(g, "followed, of a kept kernel", &found.y, &wanted.y);
    if (k == 0)
      first = copy_operands(&found);
    assert_true(test_same(&found.y.a, &first.y.a));
    if (k == 1) /* only what was put away is read */
      test_fill_normal(&found.w, seed + 21, 5, 1);
  }
  for (int k = 0; k < 64; k++)
    assert_int_equal(memory[bytes + (size_t)k], 77);
  free(memory);
  if (bytes)
    release_operands(&first);
  release_operands(&found);
  release_operands(&wanted);
  test_context_free(&cpu);
  test_context_free(&ref);
}

static void followed_convolutions(void **unused) {
  (void)unused;
  uint64_t state = 5;
  for (int k = 0; k < RANDOM_CASES(150); k++) {
    geometry g = random_geometry(&state);
    check_followed(&g, k % 3 ? OREPA_FLOAT32 : OREPA_BFLOAT16, (uint64_t)k, k % 8);
  }
  static const geometry few_pixels[] = {
      {1, 40, 7, 7, 96, {3, 3}, {{1, 1}, {1, 1}, {1, 1}, 1}, true},
      {1, 64, 14, 13, 48, {3, 3}, {{2, 2}, {1, 1}, {1, 1}, 1}, true},
      {2, 96, 5, 9, 64, {1, 1}, {{1, 1}, {0, 0}, {1, 1}, 1}, true},
      {1, 128, 9, 9, 16, {1, 1}, {{2, 2}, {0, 0}, {1, 1}, 1}, true},
      {1, 7, 11, 12, 80, {5, 3}, {{1, 2}, {3, 0}, {2, 1}, 1}, true},
      {3, 16, 5, 5, 32, {2, 2}, {{2, 1}, {0, 1}, {1, 3}, 1}, true},
      {1, 70, 3, 8, 24, {3, 2}, {{2, 3}, {1, 2}, {1, 1}, 1}, true},
  };
  for (size_t k = 0; k < sizeof few_pixels / sizeof *few_pixels; k++)
    for (int follows = 0; follows < 8; follows++)
      check_followed(&few_pixels[k], OREPA_FLOAT32, k, follows);
  for (size_t k = 0; k < sizeof network / sizeof *network; k++)
    for (int follows = 0; follows < 8; follows++)
      check_followed(&network[k], follows % 3 == 1 ? OREPA_BFLOAT16 : OREPA_FLOAT32, k, follows);
}

/* The same bytes of the same kernel have the same mark, whatever the map; other bytes another. */
static void marks_of_kept_kernels(void **unused) {
  (void)unused;
  enum { GEOMETRIES = 6, MOST = 1 << 20 };
  static char kernels[GEOMETRIES][MOST];
  int64_t marks[GEOMETRIES];
  size_t bytes[GEOMETRIES];
  device_context cpu = test_context(cpu_device());
  for (int k = 0; k < GEOMETRIES; k++) {
    geometry g = {k % 2 ? 1 : 9, 32, 8, 7 + k, 32, {3, 3}, {{1 + k / 4, 1 + k / 4}, {1, 1}, {1, 1}, 1}, false};
    operands o = make_operands(&g, OREPA_FLOAT32, 3);
    memset(kernels[k], 0, MOST);
    bytes[k] = cpu.device->conv_packed(&cpu, &g.conv, &o.y.a, &o.x.a, &o.w.a, NULL, &marks[k]);
    assert_true(bytes[k] <= MOST);
    if (bytes[k])
      assert_int_equal(forward(&cpu, &g, &o, NULL, &(device_packed){kernels[k], false}), DEVICE_DONE);
    release_operands(&o);
  }
  for (int j = 0; j < GEOMETRIES; j++)
    for (int k = 0; k < j; k++)
      if (bytes[j] && bytes[k] && marks[j] == marks[k]) {
        assert_int_equal(bytes[j], bytes[k]);
        assert_memory_equal(kernels[j], kernels[k], bytes[j]);
      }
  if (bytes[0] && bytes[2])
    assert_int_equal(marks[0], marks[2]);
  test_context_free(&cpu);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(random_geometries),
      cmocka_unit_test(network_shapes),
      cmocka_unit_test(large_kernels),
      cmocka_unit_test(few_channels),
      cmocka_unit_test(strided_points),
      cmocka_unit_test(empty_arrays),
      cmocka_unit_test(prologue_and_moments),
      cmocka_unit_test(other_types),
      cmocka_unit_test(repeats),
      cmocka_unit_test(implementations),
      cmocka_unit_test(many_geometries),
      cmocka_unit_test(followed_convolutions),
      cmocka_unit_test(marks_of_kept_kernels),
  };
  return cmocka_run_group_tests_name("cpu convolution", tests, NULL, NULL);
}
