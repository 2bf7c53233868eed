/* test_ref_maps.c: the reference device's kernels on maps (N, C, H, W) and on convolution kernels: convolution, norm,
 * pools, composition. Linear ones are held against adjoint identities in integers, where sums are exact. */
#include "ref_test.h"

/* ---- convolution ---- */

typedef struct {
  int64_t n, channels, h, w, outputs, kh, kw;
  orepa_conv conv;
} conv_case;

static const conv_case conv_cases[] = {
    {2, 3, 5, 4, 2, 3, 3, {{1, 1}, {1, 1}, {1, 1}, 1}}, {1, 4, 7, 6, 6, 3, 2, {{2, 3}, {0, 2}, {1, 1}, 2}},
    {2, 3, 6, 9, 3, 2, 3, {{1, 2}, {3, 1}, {2, 3}, 3}}, {1, 4, 1, 1, 8, 1, 1, {{1, 1}, {0, 0}, {1, 1}, 4}},
    {3, 2, 4, 4, 1, 4, 4, {{5, 5}, {0, 0}, {1, 1}, 1}}, {1, 2, 3, 3, 2, 1, 1, {{2, 2}, {2, 2}, {1, 1}, 1}},
    {0, 2, 3, 3, 2, 3, 3, {{1, 1}, {1, 1}, {1, 1}, 1}},
};
enum { CONV_CASES = sizeof conv_cases / sizeof *conv_cases };

typedef struct {
  device_array x, w, y, bias;
} conv_arrays;

static conv_arrays conv_new(const conv_case *c, orepa_dtype dtype) {
  int64_t out[2], in[2] = {c->h, c->w}, k[2] = {c->kh, c->kw};
  for (int d = 0; d < 2; d++)
    out[d] = (in[d] + 2 * c->conv.padding[d] - c->conv.dilation[d] * (k[d] - 1) - 1) / c->conv.stride[d] + 1;
  conv_arrays a = {dense(dtype, SHAPE(c->n, c->channels, c->h, c->w)),
                   dense(dtype, SHAPE(c->outputs, c->channels / c->conv.groups, c->kh, c->kw)),
                   dense(dtype, SHAPE(c->n, c->outputs, out[0], out[1])), dense(dtype, SHAPE(c->outputs))};
  put_integers(&a.x);
  put_integers(&a.w);
  put_integers(&a.bias);
  return a;
}

static double element(const device_array *a, int64_t n, int64_t c, int64_t h, int64_t w) {
  return take(a, ((n * a->shape[1] + c) * a->shape[2] + h) * a->shape[3] + w);
}

static void put_element(const device_array *a, int64_t n, int64_t c, int64_t h, int64_t w, double value) {
  put(a, ((n * a->shape[1] + c) * a->shape[2] + h) * a->shape[3] + w, value);
}

static void conv_by_hand(void **state) {
  (void)state;
  orepa_conv conv = {{1, 1}, {0, 1}, {1, 1}, 1};
  device_array x = dense(OREPA_FLOAT32, SHAPE(1, 2, 2, 3)), w = dense(OREPA_FLOAT32, SHAPE(1, 2, 2, 2)),
               y = dense(OREPA_FLOAT32, SHAPE(1, 1, 1, 4)), bias = vector(OREPA_FLOAT32, VALUES(0.5));
  put_all(&x, VALUES(1, 2, 3, 4, 5, 6, 0, 1, 0, 0, 0, 2));
  put_all(&w, VALUES(1, 10, 100, 1000, -1, 0, 0, 2));
  ASSERT_DONE(ref->conv_forward(&context, &conv, &y, &x, &w, &(device_epilogue){.bias = &bias}, NULL, NULL, NULL));
  check_values(&y, 0, VALUES(4010.5, 5421.5, 6535.5, 603.5));
  device_array half_x = dense(OREPA_BFLOAT16, SHAPE(1, 3, 1, 1)), half_w = like(&half_x),
               half_y = dense(OREPA_BFLOAT16, SHAPE(1, 1, 1, 1));
  put_all(&half_x, VALUES(256, 1, 1));
  put_all(&half_w, VALUES(1, 1, 2));
  conv.padding[1] = 0;
  ASSERT_DONE(ref->conv_forward(&context, &conv, &half_y, &half_x, &half_w, NULL, NULL, NULL, NULL));
  check_values(&half_y, 0, VALUES(260)); /* 259, rounded once */
  device_array integers = dense(OREPA_INT32, SHAPE(1, 1, 1, 1));
  assert_int_equal(ref->conv_forward(&context, &conv, &integers, &integers, &integers, NULL, NULL, NULL, NULL),
                   DEVICE_UNSUPPORTED);
}

/* Forward in another way: every input is sent where it goes. */
static void conv_scattered(const conv_case *c, const conv_arrays *a, const device_array *y) {
  int64_t inputs = a->w.shape[1], outputs = c->outputs / c->conv.groups;
  for (int64_t k = 0; k < count_of(y); k++)
    put(y, k, take(&a->bias, k / y->shape[3] / y->shape[2] % y->shape[1]));
  for (int64_t n = 0; n < c->n; n++)
    for (int64_t tap = 0; tap < c->kh * c->kw; tap++)
      for (int64_t k = 0; k < c->channels * c->h * c->w; k++) {
        int64_t i = k / (c->h * c->w), h = k / c->w % c->h, v = k % c->w, kh = tap / c->kw, kw = tap % c->kw;
        int64_t p = h + c->conv.padding[0] - kh * c->conv.dilation[0];
        int64_t q = v + c->conv.padding[1] - kw * c->conv.dilation[1];
        if (p < 0 || q < 0 || p % c->conv.stride[0] || q % c->conv.stride[1])
          continue;
        p /= c->conv.stride[0], q /= c->conv.stride[1];
        for (int64_t o = i / inputs * outputs; o < (i / inputs + 1) * outputs && p < y->shape[2] && q < y->shape[3];
             o++)
          put_element(y, n, o, p, q,
                      element(y, n, o, p, q) + element(&a->w, o, i % inputs, kh, kw) * element(&a->x, n, i, h, v));
      }
}

static void conv_forward_equals_scattering(void **state) {
  (void)state;
  for (int k = 0; k < CONV_CASES; k++) {
    conv_arrays a = conv_new(&conv_cases[k], OREPA_FLOAT64);
    device_array other = like(&a.y);
    conv_scattered(&conv_cases[k], &a, &other);
    ASSERT_DONE(ref->conv_forward(&context, &conv_cases[k].conv, &a.y, &a.x, &a.w, &(device_epilogue){.bias = &a.bias},
                                  NULL, NULL, NULL));
    check_same(&a.y, &other, 0);
  }
}

/* <conv(x, w), dy> = <x, data(dy, w)> = <w, weight(x, dy)>, and dbias sums dy. */
static void conv_directions_are_adjoint(void **state) {
  (void)state;
  for (int k = 0; k < CONV_CASES; k++) {
    const orepa_conv *conv = &conv_cases[k].conv;
    conv_arrays a = conv_new(&conv_cases[k], OREPA_FLOAT64);
    device_array dy = like(&a.y), dx = like(&a.x), dw = like(&a.w), dbias = like(&a.bias);
    put_integers(&dy);
    ASSERT_DONE(ref->conv_forward(&context, conv, &a.y, &a.x, &a.w, NULL, NULL, NULL, NULL));
    ASSERT_DONE(ref->conv_backward_data(&context, conv, &dx, &dy, &a.w));
    ASSERT_DONE(ref->conv_backward_weight(&context, conv, &dw, &dbias, &a.x, &dy, NULL));
    double product = inner_product(&a.y, &dy);
    ASSERT_NEAR(inner_product(&a.x, &dx), product, 0);
    ASSERT_NEAR(inner_product(&a.w, &dw), product, 0);
    ASSERT_DONE(
        ref->conv_forward(&context, conv, &a.y, &a.x, &a.w, &(device_epilogue){.bias = &a.bias}, NULL, NULL, NULL));
    ASSERT_NEAR(inner_product(&a.w, &dw) + inner_product(&a.bias, &dbias), inner_product(&a.y, &dy), 0);
  }
}

/* The prologue is norm_apply into a map of its own; moments are norm_moments of the result. */
static void conv_prologue_and_moments_are_separate_kernels(void **state) {
  (void)state;
  static const orepa_dtype types[] = {OREPA_FLOAT32, OREPA_BFLOAT16, OREPA_FLOAT64};
  for (int t = 0; t < 3; t++)
    for (int k = 0; k < CONV_CASES; k++) {
      const orepa_conv *conv = &conv_cases[k].conv;
      conv_arrays a = conv_new(&conv_cases[k], types[t]);
      device_prologue prologue = {dense(OREPA_FLOAT32, SHAPE(a.x.shape[1])), dense(OREPA_FLOAT32, SHAPE(a.x.shape[1])),
                                  k % 2};
      int64_t rows = a.y.shape[0] * a.y.shape[2] * a.y.shape[3];
      device_array moments = dense(OREPA_FLOAT32, SHAPE(moments_chunks(rows), 4, a.y.shape[1])), same = like(&moments);
      device_array z = like(&a.x), y = like(&a.y), dw = like(&a.w), dw_same = like(&a.w);
      put_fractions(&prologue.scale);
      put_fractions(&prologue.shift);
      ASSERT_DONE(
          ref->norm_apply(&context, &z, &a.x, &prologue.scale, &prologue.shift, NULL, NULL, NULL, prologue.relu));
      ASSERT_DONE(
          ref->conv_forward(&context, conv, &y, &z, &a.w, &(device_epilogue){.bias = &a.bias}, NULL, NULL, NULL));
      ASSERT_DONE(ref->conv_forward(&context, conv, &a.y, &a.x, &a.w, &(device_epilogue){.bias = &a.bias}, &prologue,
                                    &moments, NULL));
      check_same(&a.y, &y, 0);
      ASSERT_DONE(ref->norm_moments(&context, &same, &y));
      check_same(&moments, &same, 0);
      ASSERT_DONE(ref->conv_backward_weight(&context, conv, &dw_same, NULL, &z, &y, NULL));
      ASSERT_DONE(ref->conv_backward_weight(&context, conv, &dw, NULL, &a.x, &y, &prologue));
      check_same(&dw, &dw_same, 0);
    }
}

/* ---- norm ---- */

/* Mean and variance of channel c in two passes. */
static void statistics(const device_array *x, int64_t c, double *mean, double *variance) {
  int64_t inner = 1, rows = 0;
  double sum = 0, squares = 0;
  for (int d = 2; d < x->rank; d++)
    inner *= x->shape[d];
  for (int64_t k = 0; k < count_of(x); k++)
    if (k / inner % x->shape[1] == c)
      sum += take(x, k), rows++;
  *mean = sum / (double)rows;
  for (int64_t k = 0; k < count_of(x); k++)
    if (k / inner % x->shape[1] == c)
      squares += (take(x, k) - *mean) * (take(x, k) - *mean);
  *variance = squares / (double)rows;
}

typedef struct {
  device_array weight, bias, running_mean, running_var, mean, inverse, scale, shift;
} channel_arrays;

static channel_arrays channels_new(orepa_dtype dtype, int64_t channels) {
  channel_arrays c;
  device_array *arrays[] = {&c.weight, &c.bias,    &c.running_mean, &c.running_var,
                            &c.mean,   &c.inverse, &c.scale,        &c.shift};
  for (int k = 0; k < 8; k++) {
    *arrays[k] = dense(dtype, SHAPE(channels));
    put_fractions(arrays[k]);
  }
  return c;
}

static void finalize(const orepa_norm *norm, const device_array *x, const channel_arrays *c, bool running) {
  int64_t rows = count_of(x) / x->shape[1];
  device_array moments = dense(c->mean.dtype, SHAPE(moments_chunks(rows), 4, x->shape[1]));
  ASSERT_DONE(ref->norm_moments(&context, &moments, x));
  ASSERT_DONE(ref->norm_finalize(&context, norm, rows, &moments, &c->weight, &c->bias,
                                 running ? &c->running_mean : NULL, running ? &c->running_var : NULL, &c->mean,
                                 &c->inverse, &c->scale, &c->shift));
}

/* Four chunks, the last of 15 rows; a mean 1000 times the deviation. */
static void norm_statistics_are_exact(void **state) {
  (void)state;
  orepa_norm norm = {.eps = 1e-5, .momentum = 0.1, .training = true};
  device_array x = dense(OREPA_FLOAT32, SHAPE(3, 2, 7, 19));
  channel_arrays c = channels_new(OREPA_FLOAT32, 2);
  put_fractions(&x);
  for (int64_t k = 0; k < count_of(&x); k++)
    put(&x, k, 1000 + take(&x, k));
  double running_mean = take(&c.running_mean, 1), running_var = take(&c.running_var, 1), mean, variance;
  finalize(&norm, &x, &c, true);
  statistics(&x, 1, &mean, &variance);
  double inverse = 1 / sqrt(variance + 1e-5);
  ASSERT_NEAR(take(&c.mean, 1), mean, 1e-7);
  ASSERT_NEAR(take(&c.inverse, 1), inverse, 1e-6);
  ASSERT_NEAR(take(&c.scale, 1), take(&c.weight, 1) * inverse, 1e-6);
  ASSERT_NEAR(take(&c.shift, 1), take(&c.bias, 1) - mean * take(&c.scale, 1), 1e-6);
  ASSERT_NEAR(take(&c.running_mean, 1), 0.9 * running_mean + 0.1 * mean, 1e-6);
  ASSERT_NEAR(take(&c.running_var, 1), 0.9 * running_var + 0.1 * variance * 399 / 398, 1e-6);
}

/* All layouts of moments mean the same, whatever the pivot. */
static void norm_finalize_by_hand(void **state) {
  (void)state;
  orepa_norm norm = {.eps = 1, .momentum = 0.5};
  int64_t rows = 130; /* chunks of 2, 0 and 128 rows: -1 and 1 around -1; nothing; 128 times 3 around 5 */
  device_array moments = dense(OREPA_FLOAT64, SHAPE(3, 4, 1));
  put_all(&moments, VALUES(2, -1, 2, 4, 0, NAN, INFINITY, 7, 128, 5, -128 * 2, 128 * 4));
  channel_arrays c = channels_new(OREPA_FLOAT64, 1);
  ASSERT_DONE(ref->norm_finalize(&context, &norm, rows, &moments, NULL, NULL, NULL, NULL, &c.mean, &c.inverse, &c.scale,
                                 &c.shift));
  double mean = (128 * 3.0 + 0.0) / 130,
         squares = 128 * (3 - mean) * (3 - mean) + (-1 - mean) * (-1 - mean) + (1 - mean) * (1 - mean);
  check_values(&c.mean, 1e-14, VALUES(mean));
  check_values(&c.inverse, 1e-14, VALUES(1 / sqrt(squares / 130 + 1)));
  check_same(&c.scale, &c.inverse, 0);
  check_values(&c.shift, 1e-14, VALUES(-mean / sqrt(squares / 130 + 1)));
}

static void norm_apply_has_these_bits(void **state) {
  (void)state;
  device_array y = dense(OREPA_FLOAT32, SHAPE(2, 3, 2, 5)), r = like(&y), z = like(&y);
  device_array scale = dense(OREPA_FLOAT32, SHAPE(3)), shift = dense(OREPA_FLOAT32, SHAPE(3));
  put_fractions(&y);
  put_fractions(&r);
  put_fractions(&scale);
  put_fractions(&shift);
  ASSERT_DONE(ref->norm_apply(&context, &z, &y, &scale, &shift, &r, NULL, NULL, true));
  for (int64_t k = 0; k < count_of(&y); k++) {
    float s = (float)take(&scale, k / 10 % 3), t = (float)take(&shift, k / 10 % 3), v = (float)take(&y, k);
    float expected = fmaf(s, v, t) + (float)take(&r, k);
    assert_true(take(&z, k) == (expected > 0 ? expected : 0));
  }
  device_array half = dense(OREPA_BFLOAT16, SHAPE(1, 3)), half_r = like(&half);
  put_all(&half, VALUES(1, -1, NAN));
  put_all(&half_r, VALUES(1, 0, 0));
  put_all(&scale, VALUES(1, 1, 1));
  put_all(&shift, VALUES(0x1p-8 - 1, 0, 0));
  ASSERT_DONE(ref->norm_apply(&context, &half, &half, &scale, &shift, &half_r, NULL, NULL, true));
  check_values(&half, 0, VALUES(1, 0, NAN)); /* 1 + 2^-8 is a tie */
  put_all(&half, VALUES(1, -2, -0.0));
  ASSERT_DONE(ref->norm_apply(&context, &half, &half, &scale, &shift, NULL, NULL, NULL, false));
  check_values(&half, 0, VALUES(0x1p-8, -2, 0));
  device_array none = dense(OREPA_FLOAT32, SHAPE(0, 3, 4));
  ASSERT_DONE(ref->norm_apply(&context, &none, &none, &scale, &shift, &none, NULL, NULL, true));
}

/* Of sum(z * dz) by the batch's statistics; rank 3 and 4. */
static double norm_loss(const device_array *x, const channel_arrays *c, const device_array *z, const device_array *dz) {
  orepa_norm norm = {.eps = 1e-3, .momentum = 0.1, .training = true};
  finalize(&norm, x, c, false);
  ASSERT_DONE(ref->norm_apply(&context, z, x, &c->scale, &c->shift, NULL, NULL, NULL, false));
  return inner_product(z, dz);
}

static void check_slopes(const device_array *of, const device_array *gradient, const device_array *x,
                         const channel_arrays *c, const device_array *z, const device_array *dz) {
  for (int64_t k = 0; k < count_of(of); k++) {
    double value = take(of, k), step = 1e-5;
    put(of, k, value + step);
    double high = norm_loss(x, c, z, dz);
    put(of, k, value - step);
    double low = norm_loss(x, c, z, dz);
    put(of, k, value);
    ASSERT_NEAR(take(gradient, k), (high - low) / (2 * step), 1e-7);
  }
}

static void norm_gradients_are_slopes(void **state) {
  (void)state;
  for (int rank = 2; rank <= 4; rank++) {
    device_array x = dense(OREPA_FLOAT64, rank, (int64_t[]){3, 2, 2, 2}), z = like(&x), dz = like(&x), dx = like(&x);
    channel_arrays c = channels_new(OREPA_FLOAT64, 2);
    device_array dweight = like(&c.weight), dbias = like(&c.bias);
    put_fractions(&x);
    put_fractions(&dz);
    norm_loss(&x, &c, &z, &dz);
    ASSERT_DONE(ref->norm_backward(&context, true, &dx, &dweight, &dbias, &(device_gradient){.dy = &dz}, &x, &c.mean,
                                   &c.inverse, &c.weight));
    check_slopes(&x, &dx, &x, &c, &z, &dz);
    check_slopes(&c.weight, &dweight, &x, &c, &z, &dz);
    check_slopes(&c.bias, &dbias, &x, &c, &z, &dz);
  }
}

static void norm_gradient_by_running_statistics(void **state) {
  (void)state;
  device_array x = dense(OREPA_FLOAT32, SHAPE(2, 1, 1, 1)), dy = like(&x), dx = like(&x),
               dweight = dense(OREPA_FLOAT32, SHAPE(1)), mean = vector(OREPA_FLOAT32, VALUES(1)),
               inverse = vector(OREPA_FLOAT32, VALUES(0.5));
  put_all(&x, VALUES(3, -1));
  put_all(&dy, VALUES(2, 8));
  ASSERT_DONE(ref->norm_backward(&context, false, &dx, &dweight, NULL, &(device_gradient){.dy = &dy}, &x, &mean,
                                 &inverse, NULL));
  check_values(&dx, 0, VALUES(1, 4));
  check_values(&dweight, 0, VALUES(2 - 8));
  ASSERT_DONE(ref->norm_backward(&context, false, NULL, NULL, &dweight, &(device_gradient){.dy = &dy}, &x, &mean,
                                 &inverse, NULL));
  check_values(&dweight, 0, VALUES(10));
}

/* ---- pools ---- */

static device_windows windows(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool count_padding) {
  return (device_windows){.pool = {.kernel = {kernel, kernel},
                                   .stride = {stride, stride},
                                   .padding = {padding, padding},
                                   .dilation = {dilation, dilation},
                                   .ceil_mode = true,
                                   .count_padding = count_padding}};
}

static void max_pool_by_hand(void **state) {
  (void)state;
  device_array x = dense(OREPA_FLOAT32, SHAPE(1, 2, 3, 3)), y = dense(OREPA_FLOAT32, SHAPE(1, 2, 2, 2)), dx = like(&x),
               dy = like(&y), where = dense(OREPA_INT32, SHAPE(1, 2, 2, 2));
  device_windows w = windows(2, 1, 0, 1, false);
  put_all(&x, VALUES(1, 5, 5, 0, 5, 2, 3, 4, 1, NAN, 1, -INFINITY, 2, NAN, -INFINITY, -INFINITY, -INFINITY, 7));
  ASSERT_DONE(ref->max_pool_forward(&context, &w, &y, &where, &x, NULL));
  check_values(&y, 0, VALUES(5, 5, 5, 5, NAN, NAN, NAN, NAN));
  check_values(&where, 0, VALUES(1, 1, 4, 4, 0, 4, 4, 4));
  put_all(&dy, VALUES(1, 2, 4, 8, 1, 2, 4, 8));
  ASSERT_DONE(ref->max_pool_backward(&context, &w, &dx, &dy, &where));
  check_values(&dx, 0, VALUES(0, 3, 0, 0, 12, 0, 0, 0, 0, 1, 0, 0, 0, 14, 0, 0, 0, 0));
}

/* Dilation 2, padding 1: windows see positions -1, 1 and 1, 3 of three; then one that lies outside altogether. */
static void max_pool_stays_inside(void **state) {
  (void)state;
  device_array x = dense(OREPA_BFLOAT16, SHAPE(1, 1, 3, 3)), y = dense(OREPA_BFLOAT16, SHAPE(1, 1, 3, 3)),
               dx = like(&x), where = dense(OREPA_INT32, SHAPE(1, 1, 3, 3));
  device_windows w = windows(2, 2, 1, 2, false);
  put_all(&x, VALUES(9, 9, 9, 9, -INFINITY, 9, 9, 9, 9));
  ASSERT_DONE(ref->max_pool_forward(&context, &w, &y, &where, &x, NULL));
  check_values(
      &y, 0, VALUES(-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY));
  check_values(&where, 0, VALUES(4, 4, -1, 4, 4, -1, -1, -1, -1));
  ASSERT_DONE(ref->fill(&context, &y, (device_number){1, 1}));
  ASSERT_DONE(ref->max_pool_backward(&context, &w, &dx, &y, &where));
  check_values(&dx, 0, VALUES(0, 0, 0, 0, 4, 0, 0, 0, 0));
  device_array none = dense(OREPA_FLOAT32, SHAPE(0, 1, 3, 3)), no_y = dense(OREPA_FLOAT32, SHAPE(0, 1, 2, 2));
  ASSERT_DONE(ref->max_pool_forward(&context, &w, &no_y, NULL, &none, NULL));
  ASSERT_DONE(ref->max_pool_backward(&context, &w, &none, &no_y, &where));
}

/* Windows of 3 by step 2, padding 1, over 4: positions -1..1, 1..3, 3..5, which ends one beyond the padding. */
static void avg_pool_divides_as_pytorch(void **state) {
  (void)state;
  device_array x = dense(OREPA_FLOAT32, SHAPE(1, 1, 1, 4)), y = dense(OREPA_FLOAT32, SHAPE(1, 1, 1, 3)), dx = like(&x);
  device_windows w = windows(3, 2, 1, 1, true);
  w.pool.kernel[0] = 1, w.pool.stride[0] = 1, w.pool.padding[0] = 0;
  put_all(&x, VALUES(1, 2, 3, 10));
  ASSERT_DONE(ref->avg_pool_forward(&context, &w, &y, &x));
  check_values(&y, 1e-7, VALUES(1, 5, 5));
  put_all(&y, VALUES(3, 6, 4));
  ASSERT_DONE(ref->avg_pool_backward(&context, &w, &dx, &y));
  check_values(&dx, 1e-7, VALUES(1, 3, 2, 4));
  w.pool.count_padding = false;
  ASSERT_DONE(ref->avg_pool_forward(&context, &w, &y, &x));
  check_values(&y, 1e-7, VALUES(1.5, 5, 10));
  device_array empty = dense(OREPA_FLOAT32, SHAPE(1, 1, 0, 4)), zero = dense(OREPA_FLOAT32, SHAPE(1, 1, 1, 3));
  ASSERT_DONE(ref->avg_pool_forward(&context, &w, &zero, &empty));
  check_values(&zero, 0, VALUES(0, 0, 0));
  ASSERT_DONE(ref->avg_pool_backward(&context, &w, &empty, &zero));
}

static void adaptive_windows_overlap(void **state) {
  (void)state;
  device_array x = dense(OREPA_FLOAT64, SHAPE(1, 1, 1, 5)), y = dense(OREPA_FLOAT64, SHAPE(1, 1, 1, 3)),
               where = dense(OREPA_INT32, SHAPE(1, 1, 1, 3));
  device_windows w = {.adaptive = true}; /* 0..1, 1..3, 3..4 */
  put_all(&x, VALUES(1, 3, 2, 10, 6));
  ASSERT_DONE(ref->avg_pool_forward(&context, &w, &y, &x));
  check_values(&y, 1e-15, VALUES(2, 5, 8));
  ASSERT_DONE(ref->max_pool_forward(&context, &w, &y, &where, &x, NULL));
  check_values(&y, 0, VALUES(3, 10, 10));
  check_values(&where, 0, VALUES(1, 3, 3));
}

static void avg_pool_is_adjoint(void **state) {
  (void)state;
  const device_windows cases[] = {
      windows(3, 2, 1, 1, true), windows(3, 2, 1, 1, false), windows(2, 3, 0, 1, true), {.adaptive = true}};
  for (int k = 0; k < 4; k++) {
    device_array x = dense(OREPA_FLOAT64, SHAPE(2, 3, 5, 7)), y = dense(OREPA_FLOAT64, SHAPE(2, 3, 2, 3)),
                 dx = like(&x), dy = like(&y);
    put_fractions(&x);
    put_fractions(&dy);
    ASSERT_DONE(ref->avg_pool_forward(&context, &cases[k], &y, &x));
    ASSERT_DONE(ref->avg_pool_backward(&context, &cases[k], &dx, &dy));
    ASSERT_NEAR(inner_product(&x, &dx), inner_product(&y, &dy), 1e-14);
  }
}

/* ---- composition ---- */

typedef struct {
  int64_t o, t, i, na, nb, groups, kah, kaw, kbh, kbw;
} compose_case;

static const compose_case compose_cases[] = {
    {3, 4, 2, 1, 1, 1, 1, 1, 3, 3}, {4, 8, 4, 4, 2, 2, 3, 2, 2, 1}, {6, 6, 6, 2, 6, 2, 2, 3, 3, 1},
    {2, 4, 4, 2, 4, 2, 1, 1, 3, 5}, {3, 0, 2, 1, 1, 1, 1, 1, 3, 3},
};

/* The kernel (R, C/n, ...) without groups: (R, C, ...), turned if asked for. */
static device_array spread(const device_array *k, int64_t groups, bool turn) {
  device_array full = dense(k->dtype, SHAPE(k->shape[0], k->shape[1] * groups, k->shape[2], k->shape[3]));
  ASSERT_DONE(ref->fill(&context, &full, (device_number){0, 0}));
  for (int64_t r = 0; r < k->shape[0]; r++)
    for (int64_t c = 0; c < k->shape[1]; c++)
      for (int64_t h = 0; h < k->shape[2]; h++)
        for (int64_t w = 0; w < k->shape[3]; w++)
          put_element(&full, r, r / (k->shape[0] / groups) * k->shape[1] + c, h, w,
                      turn ? element(k, r, c, k->shape[2] - 1 - h, k->shape[3] - 1 - w) : element(k, r, c, h, w));
  return full;
}

/* Without groups in another way: each product is sent where it goes. */
static device_array composed_dense(const device_array *a, const device_array *b) {
  device_array w =
      dense(a->dtype, SHAPE(a->shape[0], b->shape[1], a->shape[2] + b->shape[2] - 1, a->shape[3] + b->shape[3] - 1));
  ASSERT_DONE(ref->fill(&context, &w, (device_number){0, 0}));
  for (int64_t k = 0; k < count_of(a); k++)
    for (int64_t i = 0; i < b->shape[1]; i++)
      for (int64_t h = 0; h < b->shape[2]; h++)
        for (int64_t v = 0; v < b->shape[3]; v++) {
          int64_t x = k % a->shape[3], y = k / a->shape[3] % a->shape[2],
                  t = k / a->shape[3] / a->shape[2] % a->shape[1];
          int64_t o = k / a->shape[3] / a->shape[2] / a->shape[1];
          put_element(&w, o, i, y + h, x + v, element(&w, o, i, y + h, x + v) + take(a, k) * element(b, t, i, h, v));
        }
  return w;
}

static void composition_and_its_gradients(void **state) {
  for (size_t k = 0; k < sizeof compose_cases / sizeof *compose_cases; k++)
    for (int turn = 0; turn < 2; turn++) {
      const compose_case *c = &compose_cases[k];
      device_array after = dense(OREPA_FLOAT64, SHAPE(c->o, c->t / c->na, c->kah, c->kaw));
      device_array before = dense(OREPA_FLOAT64, SHAPE(c->t, c->i / c->nb, c->kbh, c->kbw));
      device_array w = dense(OREPA_FLOAT64, SHAPE(c->o, c->i / c->groups, c->kah + c->kbh - 1, c->kaw + c->kbw - 1));
      device_array dw = like(&w), dafter = like(&after), dbefore = like(&before);
      put_integers(&after);
      put_integers(&before);
      put_integers(&dw);
      ASSERT_DONE(ref->compose(&context, &w, &after, c->na, &before, c->nb, c->groups, turn));
      device_array full_w = spread(&w, c->groups, false), full_after = spread(&after, c->na, turn),
                   full_before = spread(&before, c->nb, false);
      device_array expected = composed_dense(&full_after, &full_before);
      check_same(&full_w, &expected, 0);
      ASSERT_DONE(ref->compose_backward_after(&context, &dafter, c->na, &dw, &before, c->nb, c->groups, turn));
      ASSERT_DONE(ref->compose_backward_before(&context, &dbefore, c->nb, &dw, &after, c->na, c->groups, turn));
      ASSERT_NEAR(inner_product(&after, &dafter), inner_product(&w, &dw), 0);
      ASSERT_NEAR(inner_product(&before, &dbefore), inner_product(&w, &dw), 0);
      end(state);
      block_count = 0;
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(conv_by_hand),
      TEST(conv_forward_equals_scattering),
      TEST(conv_directions_are_adjoint),
      TEST(conv_prologue_and_moments_are_separate_kernels),
      TEST(norm_statistics_are_exact),
      TEST(norm_finalize_by_hand),
      TEST(norm_apply_has_these_bits),
      TEST(norm_gradients_are_slopes),
      TEST(norm_gradient_by_running_statistics),
      TEST(max_pool_by_hand),
      TEST(max_pool_stays_inside),
      TEST(avg_pool_divides_as_pytorch),
      TEST(adaptive_windows_overlap),
      TEST(avg_pool_is_adjoint),
      TEST(composition_and_its_gradients),
  };
  RUN_GUARDED_AND_NOT(tests);
}
