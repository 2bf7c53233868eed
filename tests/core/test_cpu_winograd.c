/* test_cpu_winograd.c: Winograd's convolution of each instruction set, with stride 1 and 2, against sums in double:
 * errors, what is done on the way (norm and ReLU of the input; bias, residual, ReLU and moments of the output), and the
 * same bits for any number of threads. */
#include "kernel_test.h"

#include "cpu/winograd.h"

#define for_each_winograd(k)                                                                                           \
  for (int isa_ = 0; isa_ < CPU_ISAS; isa_++)                                                                          \
    for (const winograd_kernels *k = winograd_kernels_for((cpu_isa)isa_); k; k = NULL)

static const double bound = 5e-6; /* of the largest magnitude */

/* ---- problems ---- */

typedef struct {
  conv_geometry g;
  float *x, *w, *y, *dx, *dw, *bias, *scale, *shift, *residual; /* y: the output, and its gradient */
  int64_t in, out, count_x, count_y, count_w;
} problem;

static conv_geometry geometry_of(int64_t stride, int64_t batch, int64_t groups, int64_t in, int64_t out, int64_t height,
                                 int64_t width, int64_t pad_y, int64_t pad_x) {
  return (conv_geometry){.dtype = OREPA_FLOAT32,
                         .batch = batch,
                         .groups = groups,
                         .in = in,
                         .out = out,
                         .size = {height, width},
                         .kernel = {3, 3},
                         .result = {(height + 2 * pad_y - 3) / stride + 1, (width + 2 * pad_x - 3) / stride + 1},
                         .stride = {stride, stride},
                         .padding = {pad_y, pad_x},
                         .dilation = {1, 1}};
}

static float normal(uint64_t *state) {
  double sum = 0;
  for (int k = 0; k < 6; k++)
    sum += (double)(test_random(state) % 65536) / 65536 - 0.5;
  return (float)(sum * 1.4);
}

enum { GUARDS = 16 };
static const float guard = 12345.5f;

/* With guards behind them. */
static float *numbers(int64_t count, uint64_t *state, float mean) {
  float *all = malloc((size_t)(count + GUARDS) * sizeof *all);
  assert_non_null(all);
  for (int64_t k = 0; k < count + GUARDS; k++)
    all[k] = k < count ? mean + normal(state) : guard;
  return all;
}

static void numbers_free(float *all, int64_t count) {
  for (int64_t k = count; k < count + GUARDS; k++)
    assert_true(all[k] == guard);
  free(all);
}

static problem problem_new(conv_geometry g, uint64_t seed, float mean) {
  problem p = {.g = g, .in = g.groups * g.in, .out = g.groups * g.out};
  p.count_x = g.batch * pixels(g.size) * p.in;
  p.count_y = g.batch * pixels(g.result) * p.out;
  p.count_w = p.out * 9 * g.in;
  p.x = numbers(p.count_x, &seed, mean);
  p.w = numbers(p.count_w, &seed, 0);
  p.y = numbers(p.count_y, &seed, 0);
  p.dx = numbers(p.count_x, &seed, 0);
  p.dw = numbers(p.count_w, &seed, 0);
  p.bias = numbers(p.out, &seed, 0);
  p.scale = numbers(p.in, &seed, 1);
  p.shift = numbers(p.in, &seed, 0);
  p.residual = numbers(p.count_y, &seed, 0);
  return p;
}

static void problem_free(problem *p) {
  numbers_free(p->x, p->count_x);
  numbers_free(p->w, p->count_w);
  numbers_free(p->y, p->count_y);
  numbers_free(p->dx, p->count_x);
  numbers_free(p->dw, p->count_w);
  numbers_free(p->bias, p->out);
  numbers_free(p->scale, p->in);
  numbers_free(p->shift, p->in);
  numbers_free(p->residual, p->count_y);
}

/* Scratch is as large as was asked for, so that the address sanitizer sees its end. */
static void run_forward(const winograd_kernels *k, conv_direction direction, const winograd_operands *o, int threads) {
  void *scratch = aligned_alloc(64, (k->forward_scratch(direction, o->g, threads) + 63) / 64 * 64);
  assert_non_null(scratch);
  k->forward(direction, o, threads, scratch);
  free(scratch);
}

static void run_weight(const winograd_kernels *k, const winograd_operands *o, int threads) {
  void *scratch = aligned_alloc(64, (k->weight_scratch(o->g, threads) + 63) / 64 * 64);
  assert_non_null(scratch);
  k->weight(o, threads, scratch);
  free(scratch);
}

static winograd_operands operands_of(problem *p) {
  return (winograd_operands){.g = &p->g, .x = p->x, .w = p->w, .y = p->y};
}

/* ---- the same in double ---- */

/* Adds up over all terms: y from x and w, or dx from y and w, or dw from x and y. */
static void sums(const problem *p, conv_direction direction, const float *x, const float *w, const float *y,
                 double *to) {
  const conv_geometry *g = &p->g;
  int64_t count = direction == CONV_FORWARD ? p->count_y : direction == CONV_BACKWARD_DATA ? p->count_x : p->count_w;
  memset(to, 0, (size_t)count * sizeof *to);
  for (int64_t row = 0; row < g->batch * pixels(g->result); row++)
    for (int64_t tap = 0; tap < 9; tap++) {
      int64_t oy = row / g->result[1] % g->result[0], ox = row % g->result[1], n = row / pixels(g->result);
      int64_t iy = oy * g->stride[0] + tap / 3 - g->padding[0], ix = ox * g->stride[1] + tap % 3 - g->padding[1];
      if (iy < 0 || iy >= g->size[0] || ix < 0 || ix >= g->size[1])
        continue;
      int64_t at = ((n * g->size[0] + iy) * g->size[1] + ix) * p->in;
      for (int64_t o = 0; o < p->out; o++) {
        int64_t a = at + o / g->out * g->in, b = (o * 9 + tap) * g->in, c = row * p->out + o;
        double sum = 0;
        for (int64_t i = 0; i < g->in; i++)
          if (direction == CONV_FORWARD)
            sum += (double)x[a + i] * w[b + i];
          else if (direction == CONV_BACKWARD_DATA)
            to[a + i] += (double)y[c] * w[b + i];
          else
            to[b + i] += (double)x[a + i] * y[c];
        if (direction == CONV_FORWARD)
          to[c] += sum;
      }
    }
}

static double error_of(int64_t count, const float *found, const double *wanted) {
  double worst = 0, largest = 0;
  for (int64_t k = 0; k < count; k++) {
    double difference = fabs(found[k] - wanted[k]);
    worst = !(difference <= worst) ? difference : worst;
    largest = fabs(wanted[k]) > largest ? fabs(wanted[k]) : largest;
  }
  return largest > 0 ? worst / largest : worst;
}

static void expect(const conv_geometry *g, const char *what, double error, double limit) {
  if (error <= limit)
    return;
  print_error("%s: batch %d, %d groups of %d to %d channels, %dx%d, stride %d, padding %dx%d: error %g\n", what,
              (int)g->batch, (int)g->groups, (int)g->in, (int)g->out, (int)g->size[0], (int)g->size[1],
              (int)g->stride[0], (int)g->padding[0], (int)g->padding[1], error);
  fail();
}

static void check(const winograd_kernels *k, const conv_geometry *g, uint64_t seed, float mean, int threads) {
  problem p = problem_new(*g, seed, mean);
  int64_t most = p.count_x > p.count_y ? p.count_x : p.count_y;
  double *wanted = malloc((size_t)(most > p.count_w ? most : p.count_w) * sizeof *wanted);
  assert_non_null(wanted);
  winograd_operands o = operands_of(&p);
  o.x = p.dx;
  sums(&p, CONV_BACKWARD_DATA, p.x, p.w, p.y, wanted);
  run_forward(k, CONV_BACKWARD_DATA, &o, threads);
  expect(g, "data gradient", error_of(p.count_x, p.dx, wanted), bound);
  o = operands_of(&p);
  o.w = p.dw;
  sums(&p, CONV_BACKWARD_WEIGHT, p.x, p.w, p.y, wanted);
  run_weight(k, &o, threads);
  expect(g, "weight gradient", error_of(p.count_w, p.dw, wanted), bound);
  o = operands_of(&p);
  sums(&p, CONV_FORWARD, p.x, p.w, p.y, wanted);
  run_forward(k, CONV_FORWARD, &o, threads);
  expect(g, "forward", error_of(p.count_y, p.y, wanted), bound);
  free(wanted);
  problem_free(&p);
}

/* ---- geometries ---- */

static int64_t between(uint64_t *state, int64_t low, int64_t high) {
  return low + (int64_t)(test_random(state) % (uint64_t)(high - low + 1));
}

static conv_geometry random_geometry(uint64_t *state) {
  for (;;) {
    int64_t groups = between(state, 0, 4) ? 1 : between(state, 2, 4), most = groups > 1 ? 24 : 70;
    int64_t height = between(state, 1, 20), width = between(state, 0, 1) ? height : between(state, 1, 20);
    int64_t pad_y = between(state, 0, 3), pad_x = between(state, 0, 1) ? pad_y : between(state, 0, 4);
    conv_geometry g = geometry_of(between(state, 1, 2), between(state, 1, 6), groups, between(state, 1, most),
                                  between(state, 1, most), height, width, pad_y, pad_x);
    if (g.size[0] + 2 * pad_y >= 3 && g.size[1] + 2 * pad_x >= 3 &&
        g.batch * pixels(g.result) * groups * g.in * g.out < 600000)
      return g;
  }
}

static void random_geometries(void **unused) {
  (void)unused;
  uint64_t state = 1;
  for_each_winograd(k) for (int n = 0; n < RANDOM_CASES(250); n++) {
    conv_geometry g = random_geometry(&state);
    check(k, &g, (uint64_t)n, n % 4 == 3 ? 1000 : 0, 1 + n % 3);
  }
}

/* So large that channels are cut into panels and rectangles, tiles into blocks, and results go past the caches. */
static void large_geometries(void **unused) {
  (void)unused;
  const conv_geometry all[] = {
      geometry_of(1, 2, 1, 130, 140, 14, 14, 1, 1), geometry_of(1, 1, 1, 300, 530, 7, 7, 1, 1),
      geometry_of(1, 9, 1, 16, 32, 56, 60, 1, 1),   geometry_of(1, 3, 1, 64, 64, 28, 28, 1, 1),
      geometry_of(1, 1, 1, 512, 512, 4, 4, 1, 1),   geometry_of(1, 40, 1, 16, 16, 7, 7, 1, 1),
      geometry_of(2, 2, 1, 130, 140, 28, 28, 1, 1), geometry_of(2, 1, 1, 300, 530, 14, 14, 1, 1),
      geometry_of(2, 9, 1, 16, 32, 112, 120, 1, 1), geometry_of(2, 3, 1, 64, 64, 56, 57, 0, 1),
      geometry_of(2, 1, 1, 512, 512, 7, 8, 1, 2),   geometry_of(2, 40, 1, 16, 16, 15, 14, 1, 0),
  };
  for_each_winograd(k) for (size_t n = 0; n < sizeof all / sizeof *all; n++)
      check(k, &all[n], n, n % 2 ? 100 : 0, 1 + (int)n % 3);
}

/* ---- what is done on the way ---- */

static void prologue_is_a_norm_before(void **unused) {
  (void)unused;
  uint64_t state = 2;
  for_each_winograd(k) for (int n = 0; n < 40 && k->rounds_once; n++) {
    conv_geometry g = random_geometry(&state);
    problem p = problem_new(g, (uint64_t)n, 0), again = problem_new(g, (uint64_t)n, 0);
    bool relu = n % 2;
    p.x[0] = n % 5 ? p.x[0] : NAN;
    again.x[0] = p.x[0];
    for (int64_t i = 0; i < p.count_x; i++) {
      float z = fmaf(p.scale[i % p.in], again.x[i], p.shift[i % p.in]);
      again.x[i] = relu && z < 0 ? 0 : z;
    }
    winograd_operands o = operands_of(&p), plain = operands_of(&again);
    o.scale = p.scale, o.shift = p.shift, o.relu_x = relu;
    run_forward(k, CONV_FORWARD, &o, 2);
    run_forward(k, CONV_FORWARD, &plain, 2);
    assert_memory_equal(p.y, again.y, (size_t)p.count_y * sizeof(float));
    o.y = plain.y = p.residual;
    o.w = p.dw, plain.w = again.dw;
    run_weight(k, &o, 2);
    run_weight(k, &plain, 2);
    assert_memory_equal(p.dw, again.dw, (size_t)p.count_w * sizeof(float));
    problem_free(&p);
    problem_free(&again);
  }
}

static void epilogue_comes_after(void **unused) {
  (void)unused;
  uint64_t state = 3;
  for_each_winograd(k) for (int n = 0; n < 40; n++) {
    problem p = problem_new(random_geometry(&state), (uint64_t)n, 0);
    winograd_operands o = operands_of(&p);
    float *plain = malloc((size_t)p.count_y * sizeof *plain);
    assert_non_null(plain);
    run_forward(k, CONV_FORWARD, &o, 1);
    memcpy(plain, p.y, (size_t)p.count_y * sizeof *plain);
    o.after.bias = n % 3 ? p.bias : NULL;
    o.after.residual = n % 5 ? p.residual : NULL;
    o.after.relu = n % 2;
    run_forward(k, CONV_FORWARD, &o, 1);
    for (int64_t i = 0; i < p.count_y; i++) {
      float wanted = plain[i];
      wanted += o.after.bias ? p.bias[i % p.out] : 0;
      wanted += o.after.residual ? p.residual[i] : 0;
      assert_true(p.y[i] == (o.after.relu && wanted < 0 ? 0 : wanted));
    }
    free(plain);
    problem_free(&p);
  }
}

/* The first pass leaves the transformed kernel, the second one reads no other. */
static void kept_kernels_are_the_same(void **unused) {
  (void)unused;
  uint64_t state = 6;
  for_each_winograd(k) for (int n = 0; n < 24; n++) {
    problem p = problem_new(random_geometry(&state), (uint64_t)n, 0);
    size_t bytes = k->packed(&p.g);
    device_packed packed = {.memory = aligned_alloc(64, (bytes + 63) / 64 * 64)};
    winograd_operands o = operands_of(&p);
    assert_non_null(packed.memory);
    run_forward(k, CONV_FORWARD, &o, 1);
    o.y = p.residual;
    o.packed = &packed;
    run_forward(k, CONV_FORWARD, &o, 2);
    assert_memory_equal(p.y, p.residual, (size_t)p.count_y * sizeof(float));
    memset(p.residual, 0, (size_t)p.count_y * sizeof(float));
    memset(p.w, 0, (size_t)p.count_w * sizeof(float));
    packed.ready = true;
    run_forward(k, CONV_FORWARD, &o, 3);
    assert_memory_equal(p.y, p.residual, (size_t)p.count_y * sizeof(float));
    free(packed.memory);
    problem_free(&p);
  }
}

/* Mean and variance of a channel merged from its chunks, whose counts are those of all rows. */
static void check_moments(const problem *p, const float *moments, int64_t c) {
  int64_t rows = p->g.batch * pixels(p->g.result), chunks = moments_chunks(rows);
  double mean = 0, variance = 0, found_mean = 0, found = 0, count = 0;
  for (int64_t r = 0; r < rows; r++)
    mean += p->y[r * p->out + c] / (double)rows;
  for (int64_t r = 0; r < rows; r++)
    variance += (p->y[r * p->out + c] - mean) * (p->y[r * p->out + c] - mean) / (double)rows;
  for (int64_t k = 0; k < chunks; k++) {
    const float *m = moments + k * 4 * p->out + c;
    count += m[0];
    found_mean += m[0] > 0 ? ((double)m[0] * m[p->out] + m[2 * p->out]) / (double)rows : 0;
  }
  for (int64_t k = 0; k < chunks; k++) {
    const float *m = moments + k * 4 * p->out + c;
    double distance = m[p->out] - found_mean; /* sum of (x - mean)^2 around another pivot */
    found += m[0] > 0 ? (m[3 * p->out] + 2 * distance * m[2 * p->out] + m[0] * distance * distance) / (double)rows : 0;
  }
  assert_true(count == (double)rows);
  assert_true(fabs(found_mean - mean) <= 1e-6 * (fabs(mean) + sqrt(variance)));
  assert_true(fabs(found - variance) <= 2e-5 * variance + 1e-12);
}

static void moments_of_the_output(void **unused) {
  (void)unused;
  uint64_t state = 4;
  for_each_winograd(k) for (int n = 0; n < 40; n++) {
    conv_geometry g = n < 2 ? geometry_of(1 + n, 9, 1, 5, 40, 56 + 56 * n, 60 + 60 * n, 1, 1) : random_geometry(&state);
    problem p = problem_new(g, (uint64_t)n, 0);
    int64_t chunks = moments_chunks(g.batch * pixels(g.result)), size = chunks * 4 * p.out;
    float *moments = numbers(size, &state, 0);
    winograd_operands o = operands_of(&p);
    for (int64_t c = 0; c < p.out; c++)
      p.bias[c] *= n % 2 ? 1e4f : 1; /* large means cost no accuracy */
    o.after.bias = p.bias;
    o.moments = moments;
    run_forward(k, CONV_FORWARD, &o, 1 + n % 3);
    for (int64_t c = 0; c < p.out; c++)
      check_moments(&p, moments, c);
    numbers_free(moments, size);
    problem_free(&p);
  }
}

/* Work is shared out between threads in several ways: none of them changes a bit of maps and moments. */
static void threads_change_nothing(void **unused) {
  (void)unused;
  uint64_t state = 5;
  for_each_winograd(k) for (int n = 0; n < 36; n++) {
    conv_geometry g =
        n < 2 ? geometry_of(1 + n, 9, 1, 20, 40, 56 + 56 * n, 60 + 60 * n, 1, 1) : random_geometry(&state);
    problem p = problem_new(g, (uint64_t)n, 0), one = problem_new(g, (uint64_t)n, 0);
    int64_t size = moments_chunks(g.batch * pixels(g.result)) * 4 * p.out;
    float *moments = numbers(size, &state, 0), *ones = numbers(size, &state, 0);
    winograd_operands single = operands_of(&one), o = operands_of(&p);
    single.moments = ones;
    run_forward(k, CONV_FORWARD, &single, 1);
    single.x = one.dx;
    single.moments = NULL;
    run_forward(k, CONV_BACKWARD_DATA, &single, 1);
    for (int threads = 2; threads <= 7; threads++) {
      o.x = p.x;
      o.moments = moments;
      run_forward(k, CONV_FORWARD, &o, threads);
      assert_memory_equal(p.y, one.y, (size_t)p.count_y * sizeof(float));
      assert_memory_equal(moments, ones, (size_t)size * sizeof(float));
      o.x = p.dx;
      o.moments = NULL;
      run_forward(k, CONV_BACKWARD_DATA, &o, threads);
      assert_memory_equal(p.dx, one.dx, (size_t)p.count_x * sizeof(float));
    }
    numbers_free(moments, size);
    numbers_free(ones, size);
    problem_free(&p);
    problem_free(&one);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(random_geometries),         cmocka_unit_test(large_geometries),
      cmocka_unit_test(epilogue_comes_after),      cmocka_unit_test(prologue_is_a_norm_before),
      cmocka_unit_test(moments_of_the_output),     cmocka_unit_test(threads_change_nothing),
      cmocka_unit_test(kept_kernels_are_the_same),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
