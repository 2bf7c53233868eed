/* test_cpu_norm.c: the cpu's batch norm against ref's, on every instruction set that the machine has: statistics, scale
 * and shift applied (to the bit), gradients; few and many channels and rows, all ranks, large means. */
#include "kernel_test.h"

#include <omp.h>

/* What a norm reads: maps x, dy, r (N, C, ...); parameters (C). */
typedef struct {
  orepa_norm norm;
  int64_t rows;
  test_array x, dy, r, weight, bias, mean, inverse, scale, shift, running_mean, running_var;
} norm_source;

static test_array parameter(int64_t channels, uint64_t seed, double mean) {
  test_array a = test_new(OREPA_FLOAT32, seed % 2 ? LAYOUT_DENSE : LAYOUT_GAPS, 1, &channels);
  test_fill_normal(&a, seed, mean, 0.25);
  return a;
}

static norm_source make_source(orepa_dtype dtype, int rank, const int64_t *shape, double mean, double deviation,
                               uint64_t seed) {
  norm_source s = {.norm = {.eps = 1e-5, .momentum = 0.1, .training = true}};
  int64_t channels = shape[1];
  test_array *maps[] = {&s.x, &s.dy, &s.r};
  for (int k = 0; k < 3; k++) {
    *maps[k] = test_new(dtype, LAYOUT_DENSE, rank, shape);
    test_fill_normal(maps[k], seed + (uint64_t)k, k ? 0.5 : mean, k ? 1 : deviation);
  }
  s.rows = channels ? test_count(&s.x.a) / channels : 0;
  s.weight = parameter(channels, seed + 3, 1);
  s.bias = parameter(channels, seed + 4, 0);
  s.mean = parameter(channels, seed + 5, mean);
  s.inverse = parameter(channels, seed + 6, 1 / deviation);
  s.scale = parameter(channels, seed + 7, 1);
  s.shift = parameter(channels, seed + 8, 0);
  s.running_mean = parameter(channels, seed + 9, 0);
  s.running_var = parameter(channels, seed + 10, 2);
  return s;
}

static void free_source(norm_source *s) {
  test_array *all[] = {&s->x,       &s->dy,    &s->r,     &s->weight,       &s->bias,       &s->mean,
                       &s->inverse, &s->scale, &s->shift, &s->running_mean, &s->running_var};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    test_release(all[k]);
}

/* ---- what it writes ---- */

enum {
  MOMENTS,
  MEAN,
  INVERSE,
  SCALE,
  SHIFT,
  RUNNING_MEAN,
  RUNNING_VAR,
  Z,
  Z_RELU,
  Z_ADDED,
  Z_ADDED_NORM,
  DX,
  DX_RUNNING,
  DWEIGHT,
  DBIAS,
  RESULTS
};

static const char *const result_names[RESULTS] = {"moments",
                                                  "mean",
                                                  "inverse",
                                                  "scale",
                                                  "shift",
                                                  "running_mean",
                                                  "running_var",
                                                  "z",
                                                  "relu(z)",
                                                  "relu(z + r)",
                                                  "relu(z + norm of r)",
                                                  "dx",
                                                  "dx (running)",
                                                  "dweight",
                                                  "dbias"};

typedef struct {
  test_array a[RESULTS];
} norm_result;

static norm_result make_result(const norm_source *s) {
  norm_result result;
  int64_t moments[] = {moments_chunks(s->rows), 4, s->x.a.shape[1]};
  result.a[MOMENTS] = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 3, moments);
  for (int k = MEAN; k <= SHIFT; k++)
    result.a[k] = test_copy(k % 2 ? &s->weight : &s->bias);
  result.a[RUNNING_MEAN] = test_copy(&s->running_mean);
  result.a[RUNNING_VAR] = test_copy(&s->running_var);
  for (int k = Z; k <= DX_RUNNING; k++)
    result.a[k] = test_copy(&s->x);
  result.a[DWEIGHT] = test_copy(&s->bias);
  result.a[DBIAS] = test_copy(&s->weight);
  return result;
}

static void free_result(norm_result *result) {
  for (int k = 0; k < RESULTS; k++)
    test_release(&result->a[k]);
}

static norm_result run(const orepa_device *device, const norm_source *s, int threads) {
  device_context context = test_context(device);
  norm_result result = make_result(s);
  device_array *out[RESULTS];
  for (int k = 0; k < RESULTS; k++)
    out[k] = &result.a[k].a;
  omp_set_num_threads(threads);
  assert_int_equal(device->norm_moments(&context, out[MOMENTS], &s->x.a), DEVICE_DONE);
  assert_int_equal(device->norm_finalize(&context, &s->norm, s->rows, out[MOMENTS], &s->weight.a, &s->bias.a,
                                         out[RUNNING_MEAN], out[RUNNING_VAR], out[MEAN], out[INVERSE], out[SCALE],
                                         out[SHIFT]),
                   DEVICE_DONE);
  for (int k = Z; k <= Z_ADDED_NORM; k++)
    assert_int_equal(device->norm_apply(&context, out[k], &s->x.a, &s->scale.a, &s->shift.a,
                                        k >= Z_ADDED ? &s->r.a : NULL, k > Z_ADDED ? &s->inverse.a : NULL,
                                        k > Z_ADDED ? &s->mean.a : NULL, k != Z),
                     DEVICE_DONE);
  assert_int_equal(device->norm_backward(&context, true, out[DX], out[DWEIGHT], out[DBIAS],
                                         &(device_gradient){.dy = &s->dy.a}, &s->x.a, &s->mean.a, &s->inverse.a,
                                         &s->weight.a),
                   DEVICE_DONE);
  assert_int_equal(device->norm_backward(&context, false, out[DX_RUNNING], NULL, NULL,
                                         &(device_gradient){.dy = &s->dy.a}, &s->x.a, &s->mean.a, &s->inverse.a,
                                         &s->weight.a),
                   DEVICE_DONE);
  test_context_free(&context);
  return result;
}

static void compare(const norm_source *s, const norm_result *found, const norm_result *wanted) {
  bool half = s->x.a.dtype == OREPA_BFLOAT16;
  for (int k = MEAN; k < RESULTS; k++) { /* each device chooses its pivots: moments may differ */
    double most = half && (k == DX || k == DX_RUNNING) ? 1e-2 : 2e-6;
    bool exact = k >= Z && k <= Z_ADDED_NORM;
    double error = test_error(&found->a[k].a, &wanted->a[k].a);
    if (exact ? !test_same(&found->a[k].a, &wanted->a[k].a) : !(error <= most)) {
      print_error("%s of %s %s: error %g\n", result_names[k], orepa_dtype_name(s->x.a.dtype),
                  shape_text(s->x.a.rank, s->x.a.shape), error);
      fail();
    }
    assert_true(test_clean(&found->a[k]));
  }
}

static void check_with(orepa_dtype dtype, int rank, const int64_t *shape, double mean, double deviation) {
  norm_source s = make_source(dtype, rank, shape, mean, deviation, 17);
  norm_result wanted = run(ref_device(), &s, 1);
  for_each_isa(device) {
    norm_result found = run(device, &s, 1);
    compare(&s, &found, &wanted);
    for (int threads = 2; threads <= 3; threads++) {
      norm_result again = run(device, &s, threads);
      for (int k = 0; k < RESULTS; k++)
        assert_true(test_same(&again.a[k].a, &found.a[k].a));
      free_result(&again);
    }
    free_result(&found);
  }
  free_result(&wanted);
  free_source(&s);
}

static void check(int rank, const int64_t *shape) {
  check_with(OREPA_FLOAT32, rank, shape, 3, 1.5);
  check_with(OREPA_BFLOAT16, rank, shape, 3, 1.5);
}

/* ---- the tests ---- */

static void maps(void **unused) {
  (void)unused;
  static const int64_t shapes[][4] = {{128, 16, 7, 7}, {128, 32, 4, 4}, {128, 64, 2, 2}, {128, 128, 1, 1},
                                      {2, 64, 56, 56}, {16, 512, 7, 7}, {3, 13, 29, 31}, {2, 2048, 3, 5},
                                      {2, 1001, 9, 1}, {5, 3, 40, 40},  {1, 1, 1, 2},    {7, 1, 33, 65}};
  for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
    check(4, shapes[k]);
}

/* So large that results go past the caches. */
static void large_maps(void **unused) {
  (void)unused;
  check_with(OREPA_FLOAT32, 4, (int64_t[]){6, 64, 56, 57}, 3, 1.5);
  check_with(OREPA_FLOAT32, 4, (int64_t[]){3, 1040, 20, 21}, 3, 1.5);
  check_with(OREPA_FLOAT32, 4, (int64_t[]){25, 17, 56, 56}, 3, 1.5);
}

static void other_ranks(void **unused) {
  (void)unused;
  check(2, (int64_t[]){300, 33});
  check(3, (int64_t[]){40, 17, 29});
  check(3, (int64_t[]){700, 5, 1});
  check(3, (int64_t[]){3, 70, 1500});
  check(5, (int64_t[]){6, 9, 5, 4, 7});
  check(6, (int64_t[]){3, 4, 2, 5, 3, 2});
}

static void every_small_number_of_channels(void **unused) {
  (void)unused;
  for (int64_t channels = 1; channels < 40; channels++)
    check_with(channels % 2 ? OREPA_FLOAT32 : OREPA_BFLOAT16, 4, (int64_t[]){3, channels, 7, 9}, 3, 1.5);
}

static void large_means(void **unused) {
  (void)unused;
  check_with(OREPA_FLOAT32, 4, (int64_t[]){8, 16, 40, 40}, 1e4, 1);
  check_with(OREPA_FLOAT32, 4, (int64_t[]){2, 70, 56, 56}, -1e4, 1);
  check_with(OREPA_FLOAT32, 3, (int64_t[]){4, 5, 999}, 1e4, 1);
}

/* One row has no unbiased variance; ref leaves NaN there, the cpu what it is. */
static void one_row(void **unused) {
  (void)unused;
  for_each_isa(device) {
    norm_source s = make_source(OREPA_FLOAT32, 2, (int64_t[]){1, 37}, 2, 1, 5);
    norm_result found = run(device, &s, 1);
    for (int64_t c = 0; c < 37; c++) {
      assert_true(test_get(&found.a[MEAN].a, c) == test_get(&s.x.a, c));
      assert_float_equal(test_get(&found.a[INVERSE].a, c), 1 / sqrt(1e-5), 1e-4);
      assert_float_equal(test_get(&found.a[RUNNING_VAR].a, c), 0.9 * test_get(&s.running_var.a, c), 1e-6);
    }
    free_result(&found);
    free_source(&s);
  }
}

static void nothing(void **unused) {
  (void)unused;
  for_each_isa(device) for (int axis = 0; axis < 3; axis++) {
    int64_t shape[] = {3, 4, 5, 6};
    shape[axis] = 0;
    norm_source s = make_source(OREPA_FLOAT32, 4, shape, 0, 1, 5);
    norm_result found = run(device, &s, 2);
    for (int64_t c = 0; c < shape[1]; c++) {
      assert_true(test_get(&found.a[DWEIGHT].a, c) == 0);
      assert_true(test_get(&found.a[DBIAS].a, c) == 0);
    }
    free_result(&found);
    free_source(&s);
  }
}

/* Products that are a tie of the map's type and a shift far below it: rounding twice would lose which side of the tie
 * it is. Values that are not finite, and such that are 0 once they are rounded to bfloat16. Forward, and as a mask. */
static void check_rounding(orepa_dtype dtype) {
  static const float values[] = {1 + 0x1p-12f, -1 - 0x1p-12f, 0x1.8p0f,  NAN, INFINITY,   -INFINITY,
                                 -0.0f,        0x1p-140f,     0x1p-133f, 0.5, -0x1p-133f, 0x1.02p0f};
  static const float shifts[] = {0x1p-60f,  -0x1p-60f, 0,         -0.0f,      INFINITY,         NAN,
                                 0x1p-149f, -1.5f,     0x1p-134f, -0x1p-134f, 0x1.000002p-134f, -0x1.000002p-134f};
  enum { VALUES = sizeof values / sizeof *values };
  int64_t channels = VALUES * VALUES, shape[] = {VALUES, channels};
  test_array y = test_new(dtype, LAYOUT_DENSE, 2, shape), wanted = test_copy(&y), found = test_copy(&y);
  test_array dy = test_copy(&y), scale = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 1, &channels);
  test_array shift = test_copy(&scale), zeros = test_copy(&scale), ones = test_copy(&scale);
  for (int64_t c = 0; c < channels; c++) {
    test_set(&scale.a, c, values[c % VALUES]);
    test_set(&shift.a, c, shifts[c / VALUES]);
    test_set(&ones.a, c, 1);
    for (int64_t n = 0; n < VALUES; n++) {
      test_set(&y.a, n * channels + c, values[n]);
      test_set(&dy.a, n * channels + c, 3);
    }
  }
  device_context ref = test_context(ref_device());
  for (int kind = 0; kind < 4; kind++) /* with and without ReLU; of a sum; masked backward */
    for_each_isa(device) {
      device_context cpu = test_context(device);
      for (int k = 0; k < 2; k++) {
        device_context *context = k ? &cpu : &ref;
        device_array *to = k ? &found.a : &wanted.a;
        device_gradient gradient = {.dy = &dy.a, .scale = &scale.a, .shift = &shift.a};
        device_status status = kind < 3 ? context->device->norm_apply(context, to, &y.a, &scale.a, &shift.a,
                                                                      kind == 2 ? &y.a : NULL, NULL, NULL, kind > 0)
                                        : context->device->norm_backward(context, false, to, NULL, NULL, &gradient,
                                                                         &y.a, &zeros.a, &ones.a, NULL);
        assert_int_equal(status, DEVICE_DONE);
      }
      assert_true(test_same(&found.a, &wanted.a));
      test_context_free(&cpu);
    }
  test_context_free(&ref);
  test_array *all[] = {&y, &wanted, &found, &dy, &scale, &shift, &zeros, &ones};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    test_release(all[k]);
}

static void rounded_once(void **unused) {
  (void)unused;
  check_rounding(OREPA_FLOAT32);
  check_rounding(OREPA_BFLOAT16);
}

static void parts_that_may_be_absent(void **unused) {
  (void)unused;
  norm_source s = make_source(OREPA_FLOAT32, 4, (int64_t[]){5, 24, 6, 7}, 0.5, 1, 3);
  norm_result wanted = run(ref_device(), &s, 1);
  device_context ref = test_context(ref_device());
  for_each_isa(device) {
    device_context cpu = test_context(device);
    norm_result found = run(device, &s, 1), again = make_result(&s);
    device_array *out[RESULTS];
    for (int k = 0; k < RESULTS; k++)
      out[k] = &again.a[k].a;
    for (int given = 0; given < 8; given++) {
      assert_int_equal(device->norm_backward(&cpu, true, given & 1 ? out[DX] : NULL, given & 2 ? out[DWEIGHT] : NULL,
                                             given & 4 ? out[DBIAS] : NULL, &(device_gradient){.dy = &s.dy.a}, &s.x.a,
                                             &s.mean.a, &s.inverse.a, &s.weight.a),
                       DEVICE_DONE);
      assert_true(!(given & 1) || test_same(out[DX], &found.a[DX].a));
      assert_true(!(given & 2) || test_same(out[DWEIGHT], &found.a[DWEIGHT].a));
      assert_true(!(given & 4) || test_same(out[DBIAS], &found.a[DBIAS].a));
    }
    assert_int_equal(device->norm_finalize(&cpu, &s.norm, s.rows, &found.a[MOMENTS].a, NULL, NULL, NULL, NULL,
                                           out[MEAN], out[INVERSE], out[SCALE], out[SHIFT]),
                     DEVICE_DONE);
    assert_true(test_same(out[SCALE], out[INVERSE]));
    assert_true(test_error(out[MEAN], &wanted.a[MEAN].a) < 1e-6);
    for (int batch = 0; batch < 2; batch++) {
      assert_int_equal(device->norm_backward(&cpu, batch, out[DX], NULL, NULL, &(device_gradient){.dy = &s.dy.a},
                                             &s.x.a, &s.mean.a, &s.inverse.a, NULL),
                       DEVICE_DONE);
      assert_int_equal(ref.device->norm_backward(&ref, batch, out[Z], NULL, NULL, &(device_gradient){.dy = &s.dy.a},
                                                 &s.x.a, &s.mean.a, &s.inverse.a, NULL),
                       DEVICE_DONE);
      assert_true(test_error(out[DX], out[Z]) < 1e-6);
    }
    free_result(&found);
    free_result(&again);
    test_context_free(&cpu);
  }
  test_context_free(&ref);
  free_result(&wanted);
  free_source(&s);
}

/* Whether the moments of chunk k and channel c of a channels-last map are the sums around its pivot. */
static void check_moments(const norm_source *s, const device_array *moments, int64_t k, int64_t c) {
  int64_t channels = s->x.a.shape[1], first = k * moments_rows(s->rows), last = first + moments_rows(s->rows);
  double pivot = test_get(moments, (4 * k + 1) * channels + c), sum = 0, square = 0, rows = 0;
  for (int64_t r = first; r < last && r < s->rows; r++) {
    double difference = ((const float *)s->x.a.data)[r * channels + c] - pivot;
    sum += difference;
    square += difference * difference;
    rows++;
  }
  assert_true(test_get(moments, 4 * k * channels + c) == rows);
  assert_true(fabs(test_get(moments, (4 * k + 2) * channels + c) - sum) < 1e-6 * square);
  assert_true(fabs(test_get(moments, (4 * k + 3) * channels + c) - square) < 1e-6 * square);
}

/* Moments are merged whoever took them. */
static void moments(void **unused) {
  (void)unused;
  norm_source s = make_source(OREPA_FLOAT32, 4, (int64_t[]){4, 20, 9, 11}, 0.5, 1, 3);
  norm_result wanted = run(ref_device(), &s, 1);
  for_each_isa(device) {
    device_context cpu = test_context(device);
    norm_result found = run(device, &s, 1);
    for (int64_t k = 0; k < moments_chunks(s.rows); k++)
      for (int64_t c = 0; c < 20; c++)
        check_moments(&s, &found.a[MOMENTS].a, k, c);
    assert_int_equal(device->norm_finalize(&cpu, &s.norm, s.rows, &wanted.a[MOMENTS].a, &s.weight.a, &s.bias.a, NULL,
                                           NULL, &found.a[MEAN].a, &found.a[INVERSE].a, &found.a[SCALE].a,
                                           &found.a[SHIFT].a),
                     DEVICE_DONE);
    compare(&s, &found, &wanted);
    free_result(&found);
    test_context_free(&cpu);
  }
  free_result(&wanted);
  free_source(&s);
}

/* Chunks may be any sets of rows, and some may be empty, whatever stands in them. */
static void chunks_of_any_rows(void **unused) {
  (void)unused;
  enum { ROWS = 60, CHANNELS = 70, CHUNKS = 5 };
  static const int sizes[CHUNKS] = {0, 13, 1, 0, 46};
  static const double nothing[] = {NAN, INFINITY, -3};
  const int64_t shape[] = {CHUNKS, 4, CHANNELS};
  norm_source s = make_source(OREPA_FLOAT32, 2, (int64_t[]){ROWS, CHANNELS}, 1e4, 1, 3);
  test_array moments = test_new(OREPA_FLOAT32, LAYOUT_DENSE, 3, shape);
  for (int64_t c = 0; c < CHANNELS; c++)
    for (int k = 0, first = 0; k < CHUNKS; first += sizes[k++]) {
      double pivot = sizes[k] ? test_get(&s.x.a, first * CHANNELS + c) : nothing[c % 3], sum = 0, square = 0;
      for (int r = first; r < first + sizes[k]; r++) {
        sum += test_get(&s.x.a, r * CHANNELS + c) - pivot;
        square += pow(test_get(&s.x.a, r * CHANNELS + c) - pivot, 2);
      }
      const double parts[] = {sizes[k], pivot, sizes[k] ? sum : nothing[(c + 1) % 3], square};
      for (int part = 0; part < 4; part++)
        test_set(&moments.a, (4 * k + part) * CHANNELS + c, parts[part]);
    }
  norm_result wanted = run(ref_device(), &s, 1);
  for_each_isa(device) {
    device_context cpu = test_context(device);
    norm_result found = run(device, &s, 1);
    assert_int_equal(device->norm_finalize(&cpu, &s.norm, s.rows, &moments.a, &s.weight.a, &s.bias.a, NULL, NULL,
                                           &found.a[MEAN].a, &found.a[INVERSE].a, &found.a[SCALE].a, &found.a[SHIFT].a),
                     DEVICE_DONE);
    compare(&s, &found, &wanted);
    free_result(&found);
    test_context_free(&cpu);
  }
  free_result(&wanted);
  test_release(&moments);
  free_source(&s);
}

static void types_it_leaves(void **unused) {
  (void)unused;
  norm_source s = make_source(OREPA_FLOAT64, 2, (int64_t[]){5, 4}, 0, 1, 3);
  for_each_isa(device) {
    device_context cpu = test_context(device);
    norm_result result = make_result(&s);
    test_array before = test_copy(&result.a[Z]);
    assert_int_equal(device->norm_moments(&cpu, &result.a[MOMENTS].a, &s.x.a), DEVICE_UNSUPPORTED);
    assert_int_equal(device->norm_apply(&cpu, &result.a[Z].a, &s.x.a, &s.scale.a, &s.shift.a, NULL, NULL, NULL, false),
                     DEVICE_UNSUPPORTED);
    assert_int_equal(device->norm_backward(&cpu, true, &result.a[Z].a, NULL, NULL, &(device_gradient){.dy = &s.dy.a},
                                           &s.x.a, &s.mean.a, &s.inverse.a, NULL),
                     DEVICE_UNSUPPORTED);
    assert_true(test_same(&result.a[Z].a, &before.a));
    test_release(&before);
    free_result(&result);
    test_context_free(&cpu);
  }
  free_source(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(maps),
      cmocka_unit_test(large_maps),
      cmocka_unit_test(other_ranks),
      cmocka_unit_test(every_small_number_of_channels),
      cmocka_unit_test(large_means),
      cmocka_unit_test(one_row),
      cmocka_unit_test(nothing),
      cmocka_unit_test(rounded_once),
      cmocka_unit_test(parts_that_may_be_absent),
      cmocka_unit_test(moments),
      cmocka_unit_test(chunks_of_any_rows),
      cmocka_unit_test(types_it_leaves),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
