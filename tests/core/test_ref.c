/* test_ref.c: the reference device's memory, copies, random numbers and element-wise functions, against numbers worked
 * out by hand or in another way. Its other entries are in test_ref_sums.c and test_ref_maps.c. */
#include "ref_test.h"

#include <signal.h>
#include <sys/stat.h>

#include "elementwise.h"
#include "host_memory.h"

/* ---- memory ---- */

static void memory_is_aligned_and_kept(void **state) {
  (void)state;
  enum { COUNT = 24 };
  unsigned char *memory[COUNT], bytes[1000], back[1000];
  size_t size[COUNT];
  for (int round = 0; round < 3; round++) {
    for (int k = round; k < COUNT; k += round + 1) { /* later rounds fill holes */
      size[k] = 1 + (size_t)(next_random() % sizeof bytes);
      memory[k] = ref->allocate(&context, size[k]);
      assert_non_null(memory[k]);
      assert_int_equal((uintptr_t)memory[k] % 64, 0);
      memset(bytes, k, size[k]);
      ASSERT_DONE(ref->upload(&context, memory[k], bytes, size[k]));
    }
    for (int k = 0; k < COUNT; k++) {
      ASSERT_DONE(ref->download(&context, back, memory[k], size[k]));
      for (size_t n = 0; n < size[k]; n++)
        assert_int_equal(back[n], k);
    }
    for (int k = round + 1; k < COUNT && round < 2; k += round + 2)
      ref->deallocate(&context, memory[k], size[k]);
  }
  for (int k = COUNT; k-- > 0;)
    ref->deallocate(&context, memory[k], size[k]);
  ASSERT_DONE(ref->upload(&context, NULL, NULL, 0));
  ASSERT_DONE(ref->download(&context, NULL, NULL, 0));
#ifndef __SANITIZE_ADDRESS__ /* which ends the process */
  assert_null(ref->allocate(&context, SIZE_MAX / 4));
#endif
  assert_true(ref->available(&context) > 0);
}

static bool guarded(void) {
  return !strcmp(getenv("OREPA_REF_GUARD"), "1");
}

static void guard_joins_free_blocks(void **state) {
  (void)state;
  static const int order[3] = {0, 2, 1};
  const size_t size = 1 << 20;
  char *memory[3];
  if (!guarded())
    skip();
  for (int k = 0; k < 3; k++) {
    memory[k] = ref->allocate(&context, size);
    assert_ptr_equal(memory[k], memory[0] + (size_t)k * size);
  }
  for (int k = 0; k < 3; k++)
    ref->deallocate(&context, memory[order[k]], size);
  assert_true((char *)block_new(3 * size) <= memory[0]); /* with what was free before them, if it was */
}

/* The host may touch device memory only where there is no guard. */
static void guard_stops_the_host(void **state) {
  (void)state;
  int status;
  volatile char *memory = block_new(1 << 16);
  pid_t child = fork();
  assert_true(child >= 0);
  if (!child) {
    fclose(stderr); /* a sanitizer would say much */
    signal(SIGSEGV, SIG_DFL);
    memory[100] = 1;
    _exit(0);
  }
  waitpid(child, &status, 0);
  assert_int_equal(status == 0, !guarded());
}

static void write_file(const char *root, const char *path, const char *text) {
  char name[512];
  snprintf(name, sizeof name, "%s%s", root, path);
  for (char *at = name + strlen(root) + 1; (at = strchr(at, '/')); at++) {
    *at = 0;
    mkdir(name, 0700);
    *at = '/';
  }
  FILE *file = fopen(name, "w");
  assert_non_null(file);
  fputs(text, file);
  fclose(file);
}

static void available_is_the_least_limit(void **state) {
  (void)state;
  const size_t MiB = 1 << 20;
  char root[] = "/tmp/orepa_test_XXXXXX", command[64];
  assert_non_null(mkdtemp(root));
  write_file(root, "/proc/meminfo", "MemTotal: 9999999 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\n");
  assert_int_equal(host_available(root), 4096 * MiB - 512 * MiB);
  write_file(root, "/proc/self/cgroup", "4:cpu,memory:/a/b\n3:freezer:/x\n0::/c/d\n");
  assert_int_equal(host_available(root), 4096 * MiB - 512 * MiB);
  write_file(root, "/sys/fs/cgroup/c/d/memory.max", "max\n");
  write_file(root, "/sys/fs/cgroup/c/d/memory.current", "1048576\n");
  write_file(root, "/sys/fs/cgroup/c/memory.max", "3221225472\n");
  write_file(root, "/sys/fs/cgroup/c/memory.current", "1073741824\n");
  assert_int_equal(host_available(root), 2048 * MiB - 512 * MiB);
  write_file(root, "/sys/fs/cgroup/c/memory.stat", "anon 5\ninactive_file 1048576\nactive_file 7\n");
  assert_int_equal(host_available(root), 2049 * MiB - 512 * MiB);
  write_file(root, "/sys/fs/cgroup/memory/memory.limit_in_bytes", "1073741824\n");
  write_file(root, "/sys/fs/cgroup/memory/memory.usage_in_bytes", "1048576\n");
  assert_int_equal(host_available(root), 1023 * MiB - 512 * MiB);
  write_file(root, "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "10485760\n");
  write_file(root, "/sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "20971520\n");
  assert_int_equal(host_available(root), 0);
  snprintf(command, sizeof command, "rm -r %s", root);
  assert_int_equal(system(command), 0);
}

static void host_blocks_are_aligned(void **state) {
  (void)state;
  static const size_t sizes[] = {0, 1, 1000, (4 << 20) - 1, 4 << 20, (9 << 20) + 3};
  for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
    char *memory = host_allocate(sizes[k]);
    assert_non_null(memory);
    assert_int_equal((uintptr_t)memory % (sizes[k] >= 4 << 20 ? 2 << 20 : 64), 0);
    memset(memory, 1, sizes[k]);
    host_deallocate(memory, sizes[k]);
  }
  host_deallocate(NULL, 0);
}

static void table_says_what_there_is(void **state) {
  (void)state;
  assert_int_equal(ref->version, DEVICE_TABLE_VERSION);
  assert_string_equal(ref->name, "ref");
  assert_null(ref->synchronize);
  assert_null(ref->squeeze);
  assert_null(ref->squeeze_backward);
}

/* ---- copies ---- */

static uint64_t copied_bits(orepa_dtype to, orepa_dtype from, double value) {
  device_array src = dense(from, SCALAR), dst = dense(to, SCALAR);
  put(&src, 0, value);
  ASSERT_DONE(ref->copy(&context, &dst, &src));
  return take_bits(&dst, 0);
}

static int64_t copied_integer(orepa_dtype to, orepa_dtype from, int64_t value) {
  device_array src = dense(from, SCALAR), dst = dense(to, SCALAR);
  put_bits(&src, 0, (uint64_t)value);
  ASSERT_DONE(ref->copy(&context, &dst, &src));
  return orepa_dtype_is_float(to) ? (int64_t)take(&dst, 0) : take_integer(&dst, 0);
}

static void copy_follows_strides(void **state) {
  (void)state;
  device_array src = strided(OREPA_FLOAT32, 2, (int64_t[]){2, 3}, (int64_t[]){1, -2});
  device_array dst = strided(OREPA_INT64, 2, (int64_t[]){2, 3}, (int64_t[]){7, 2});
  put_all(&src, VALUES(1, 2, 3, 4, 5, 6));
  ASSERT_DONE(ref->copy(&context, &dst, &src));
  check_values(&dst, 0, VALUES(1, 2, 3, 4, 5, 6));
  device_array repeated = src;
  repeated.strides[0] = 0;
  ASSERT_DONE(ref->copy(&context, &dst, &repeated));
  check_values(&dst, 0, VALUES(1, 2, 3, 1, 2, 3));
  device_array none = dense(OREPA_FLOAT32, SHAPE(2, 0, 3));
  ASSERT_DONE(ref->copy(&context, &none, &none));
}

static void copy_rounds_to_nearest_even(void **state) {
  (void)state;
  assert_int_equal(copied_bits(OREPA_BFLOAT16, OREPA_FLOAT32, 1 + 0x1p-8), 0x3f80);
  assert_int_equal(copied_bits(OREPA_BFLOAT16, OREPA_FLOAT32, 1 + 0x3p-8), 0x3f82);
  assert_int_equal(copied_bits(OREPA_BFLOAT16, OREPA_FLOAT64, 1 + 0x1p-8 + 0x1p-40), 0x3f81); /* once, not twice */
  assert_int_equal(copied_bits(OREPA_BFLOAT16, OREPA_FLOAT64, -1 - 0x3p-8 + 0x1p-40), 0xbf81);
  assert_int_equal(copied_bits(OREPA_BFLOAT16, OREPA_FLOAT64, 1e300), 0x7f80);
  assert_int_equal(copied_bits(OREPA_BFLOAT16, OREPA_FLOAT64, -1e-300), 0x8000);
  assert_int_equal(copied_bits(OREPA_FLOAT16, OREPA_FLOAT32, 65519), 0x7bff);
  assert_int_equal(copied_bits(OREPA_FLOAT16, OREPA_FLOAT32, -65520), 0xfc00);
  assert_int_equal(copied_bits(OREPA_FLOAT16, OREPA_FLOAT32, 0x1p-25), 0);
  assert_int_equal(copied_bits(OREPA_FLOAT16, OREPA_FLOAT64, 0x1p-25 + 0x1p-60), 1);
  assert_int_equal(copied_bits(OREPA_FLOAT16, OREPA_FLOAT64, 0x3p-25), 2);
  assert_int_equal(copied_bits(OREPA_FLOAT16, OREPA_BFLOAT16, -0.0), 0x8000);
  device_array nan = dense(OREPA_BFLOAT16, SCALAR), same = like(&nan);
  put_bits(&nan, 0, 0x7f81);
  ASSERT_DONE(ref->copy(&context, &same, &nan));
  assert_int_equal(take_bits(&same, 0), 0x7f81); /* one type: bit for bit */
  static const orepa_dtype floats[] = {OREPA_FLOAT32, OREPA_FLOAT64, OREPA_FLOAT16};
  for (int k = 0; k < 3; k++) {
    device_array to = dense(floats[k], SCALAR);
    ASSERT_DONE(ref->copy(&context, &to, &nan));
    assert_true(isnan(take(&to, 0)));
  }
}

static void copy_between_integers_is_exact(void **state) {
  (void)state;
  int64_t large = ((int64_t)1 << 53) + 1;
  device_array src = strided(OREPA_INT64, 1, (int64_t[]){3}, (int64_t[]){-2}), dst = dense(OREPA_INT64, SHAPE(3));
  for (int k = 0; k < 3; k++)
    put_bits(&src, k, (uint64_t)(large + 2 * k));
  ASSERT_DONE(ref->copy(&context, &dst, &src));
  for (int k = 0; k < 3; k++)
    assert_true(take_integer(&dst, k) == large + 2 * k);
  assert_true(copied_integer(OREPA_FLOAT32, OREPA_INT64, ((int64_t)1 << 60) + ((int64_t)1 << 36) + 1) ==
              ((int64_t)1 << 60) + ((int64_t)1 << 37)); /* by way of double it would be 2^60 */
  assert_true(copied_integer(OREPA_FLOAT64, OREPA_INT64, large) == large - 1);
  assert_true(copied_integer(OREPA_BFLOAT16, OREPA_INT32, (1 << 24) + (1 << 16) + 1) == (1 << 24) + (1 << 17));
  assert_int_equal(copied_integer(OREPA_INT32, OREPA_INT64, large), INT32_MAX);
  assert_int_equal(copied_integer(OREPA_INT32, OREPA_INT64, -large), INT32_MIN);
  assert_int_equal(copied_integer(OREPA_UINT8, OREPA_INT64, 256), 255);
  assert_int_equal(copied_integer(OREPA_UINT8, OREPA_INT32, -1), 0);
  assert_int_equal(copied_integer(OREPA_BOOL, OREPA_INT64, 256), 1);
  assert_int_equal(copied_integer(OREPA_INT64, OREPA_BOOL, 1), 1);
}

static void copy_from_floats_saturates(void **state) {
  (void)state;
  assert_int_equal(copied_bits(OREPA_INT32, OREPA_FLOAT32, 3e10), INT32_MAX);
  assert_int_equal(copied_bits(OREPA_INT32, OREPA_FLOAT64, -2.9), (uint32_t)-2);
  assert_int_equal(copied_bits(OREPA_INT32, OREPA_BFLOAT16, NAN), 0);
  assert_true((int64_t)copied_bits(OREPA_INT64, OREPA_FLOAT32, INFINITY) == INT64_MAX);
  assert_true((int64_t)copied_bits(OREPA_INT64, OREPA_FLOAT32, -1e30) == INT64_MIN);
  assert_int_equal(copied_bits(OREPA_UINT8, OREPA_FLOAT16, -0.9), 0);
  assert_int_equal(copied_bits(OREPA_UINT8, OREPA_FLOAT32, 255.9), 255);
  assert_int_equal(copied_bits(OREPA_UINT8, OREPA_FLOAT32, 1e9), 255);
  assert_int_equal(copied_bits(OREPA_BOOL, OREPA_FLOAT32, 0.25), 1);
  assert_int_equal(copied_bits(OREPA_BOOL, OREPA_FLOAT32, -0.0), 0);
}

static void fill_leaves_gaps_alone(void **state) {
  (void)state;
  device_array whole = dense(OREPA_INT64, SHAPE(6)), part = whole;
  put_all(&whole, VALUES(1, 2, 3, 4, 5, 6));
  part.shape[0] = 3;
  part.strides[0] = 2;
  int64_t large = ((int64_t)1 << 53) + 1;
  ASSERT_DONE(ref->fill(&context, &part, (device_number){(double)large, large}));
  assert_true(take_integer(&whole, 4) == large);
  assert_int_equal(take_integer(&whole, 5), 6);
  device_array narrow = dense(OREPA_INT32, SCALAR), truth = dense(OREPA_BOOL, SCALAR),
               half = dense(OREPA_BFLOAT16, SCALAR);
  ASSERT_DONE(ref->fill(&context, &narrow, (device_number){(double)large, large}));
  assert_int_equal(take_integer(&narrow, 0), INT32_MAX);
  ASSERT_DONE(ref->fill(&context, &truth, (device_number){0.5, 0}));
  assert_int_equal(take_integer(&truth, 0), 1);
  ASSERT_DONE(ref->fill(&context, &half, (device_number){1 + 0x3p-8, 1}));
  assert_int_equal(take_bits(&half, 0), 0x3f82);
  device_array none = dense(OREPA_FLOAT32, SHAPE(0));
  ASSERT_DONE(ref->fill(&context, &none, (device_number){1, 1}));
}

/* ---- random: the published answers of Philox 4x32-10 for a key and counter of zeros ---- */

static void random_is_philox(void **state) {
  (void)state;
  static const uint32_t words[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  device_array columns = strided(OREPA_FLOAT32, 2, (int64_t[]){3, 2}, (int64_t[]){1, 3});
  device_array wide = dense(OREPA_FLOAT64, SHAPE(2)), none = dense(OREPA_FLOAT32, SHAPE(0)),
               integers = dense(OREPA_INT64, SHAPE(2));
  ASSERT_DONE(ref->random(&context, &columns, false, 0, 0));
  for (int k = 0; k < 4; k++)
    assert_true(take(&columns, k) == floor(words[k] / 256.0) / 16777216);
  ASSERT_DONE(ref->random(&context, &wide, false, 0, 0));
  assert_true(take(&wide, 1) == (words[3] * 0x1p21 + floor(words[2] / 2048.0)) * 0x1p-53);
  ASSERT_DONE(ref->random(&context, &columns, true, 0, 0));
  double u = floor(words[2] / 256.0) / 16777216, v = floor(words[3] / 256.0) / 16777216;
  ASSERT_NEAR(take(&columns, 2), sqrt(-2 * log(1 - u)) * cos(2 * acos(-1.0) * v), 1e-6);
  ASSERT_NEAR(take(&columns, 3), sqrt(-2 * log(1 - u)) * sin(2 * acos(-1.0) * v), 1e-6);
  ASSERT_DONE(ref->random(&context, &none, true, 0, 0));
  assert_int_equal(ref->random(&context, &integers, false, 0, 0), DEVICE_UNSUPPORTED);
}

/* ---- element-wise ---- */

static const struct {
  const char *name;
  int operands, types, needs[3];
} rows[FUNCTION_COUNT] = {
#define ROW(name, operands, types, forward, needs_a, da, needs_b, db, needs_c, dc)                                     \
  {#name, operands, ELEMENTWISE_##types, {needs_a, needs_b, needs_c}},
    ELEMENTWISE_ROWS(ROW)
#undef ROW
};

/* f(a, b, c) of numbers of one type; the result's type is `to`. */
static device_array apply3(int f, orepa_dtype from, orepa_dtype to, double a, double b, double c) {
  device_array sources[3], dst = dense(to, SCALAR);
  const device_number numbers[3] = {{0, 0}};
  double values[3] = {a, b, c};
  for (int k = 0; k < 3; k++) {
    sources[k] = dense(from, SCALAR);
    put(&sources[k], 0, values[k]);
  }
  ASSERT_DONE(ref->elementwise(&context, f, 0, &dst, sources, numbers));
  return dst;
}

static double real3(int f, double a, double b, double c) {
  device_array y = apply3(f, OREPA_FLOAT64, rows[f].types == ELEMENTWISE_COMPARE ? OREPA_BOOL : OREPA_FLOAT64, a, b, c);
  return take(&y, 0);
}

static void functions_have_their_values(void **state) {
  (void)state;
  ASSERT_NEAR(real3(FUNCTION_add, 2, 3, 0), 5, 0);
  ASSERT_NEAR(real3(FUNCTION_sub, 2, 3, 0), -1, 0);
  ASSERT_NEAR(real3(FUNCTION_mul, 2, 3, 0), 6, 0);
  ASSERT_NEAR(real3(FUNCTION_div, 3, -2, 0), -1.5, 0);
  ASSERT_NEAR(real3(FUNCTION_pow, 2, -2, 0), 0.25, 0);
  ASSERT_NEAR(real3(FUNCTION_maximum, NAN, 3, 0), NAN, 0);
  ASSERT_NEAR(real3(FUNCTION_maximum, 3, NAN, 0), NAN, 0);
  ASSERT_NEAR(real3(FUNCTION_minimum, 3, -INFINITY, 0), -INFINITY, 0);
  ASSERT_NEAR(real3(FUNCTION_neg, 2, 0, 0), -2, 0);
  ASSERT_NEAR(real3(FUNCTION_abs, -2, 0, 0), 2, 0);
  ASSERT_NEAR(real3(FUNCTION_sign, -2, 0, 0), -1, 0);
  ASSERT_NEAR(real3(FUNCTION_sign, NAN, 0, 0), NAN, 0);
  ASSERT_NEAR(real3(FUNCTION_floor, -1.5, 0, 0), -2, 0);
  ASSERT_NEAR(real3(FUNCTION_ceil, -1.5, 0, 0), -1, 0);
  ASSERT_NEAR(real3(FUNCTION_round, 2.5, 0, 0), 2, 0);
  ASSERT_NEAR(real3(FUNCTION_floor_divide, -7, 2, 0), -4, 0);
  ASSERT_NEAR(real3(FUNCTION_remainder, -7, 2, 0), 1, 0);
  ASSERT_NEAR(real3(FUNCTION_remainder, 7, -2, 0), -1, 0);
  ASSERT_NEAR(real3(FUNCTION_sin, 1, 0, 0), 0.8414709848078965, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_cos, 1, 0, 0), 0.5403023058681398, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_isnan, NAN, 0, 0), 1, 0);
  ASSERT_NEAR(real3(FUNCTION_logical_and, 2, 0, 0), 0, 0);
  ASSERT_NEAR(real3(FUNCTION_logical_or, 2, 0, 0), 1, 0);
  ASSERT_NEAR(real3(FUNCTION_logical_xor, 2, 3, 0), 0, 0);
  ASSERT_NEAR(real3(FUNCTION_logical_not, 0, 0, 0), 1, 0);
  ASSERT_NEAR(real3(FUNCTION_sqrt, 2, 0, 0), 1.4142135623730951, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_exp, 1, 0, 0), 2.718281828459045, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_log, 0, 0, 0), -INFINITY, 0);
  ASSERT_NEAR(real3(FUNCTION_tanh, 1, 0, 0), 0.7615941559557649, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_softplus, 1, 0, 0), 1.3132616875182228, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_softplus, -40, 0, 0), 4.248354255291589e-18, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_silu, 1, 0, 0), 0.7310585786300049, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_gelu, 1, 0, 0), 0.8413447460685429, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_hardswish, 1, 0, 0), 0.6666666666666666, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_leaky_relu, -2, 0.25, 0), -0.5, 0);
  ASSERT_NEAR(real3(FUNCTION_leaky_relu, 2, 0.25, 0), 2, 0);
  ASSERT_NEAR(real3(FUNCTION_xlogy, 2, 3, 0), 2.1972245773362196, 1e-15);
  ASSERT_NEAR(real3(FUNCTION_xlogy, 0, 0, 0), 0, 0);
  ASSERT_NEAR(real3(FUNCTION_xlogy, 0, NAN, 0), NAN, 0);
  ASSERT_NEAR(real3(FUNCTION_relu, -3, 0, 0), 0, 0);
  ASSERT_NEAR(real3(FUNCTION_relu, NAN, 0, 0), NAN, 0);
  ASSERT_NEAR(real3(FUNCTION_clamp, 5, 1, 4), 4, 0);
  ASSERT_NEAR(real3(FUNCTION_multiply_add, 2, 3, 4), 10, 0);
  ASSERT_NEAR(real3(FUNCTION_eq, NAN, NAN, 0), 0, 0);
  ASSERT_NEAR(real3(FUNCTION_ne, NAN, NAN, 0), 1, 0);
  ASSERT_NEAR(real3(FUNCTION_lt, 1, 2, 0), 1, 0);
  ASSERT_NEAR(real3(FUNCTION_le, 2, 2, 0), 1, 0);
  ASSERT_NEAR(real3(FUNCTION_gt, 2, 2, 0), 0, 0);
  ASSERT_NEAR(real3(FUNCTION_ge, 2, NAN, 0), 0, 0);
  ASSERT_NEAR(real3(FUNCTION_isfinite, INFINITY, 0, 0), 0, 0);
  ASSERT_NEAR(real3(FUNCTION_isfinite, 1e308, 0, 0), 1, 0);
}

static double derivative_at(int f, int operand, const double *x) {
  device_array sources[ELEMENTWISE_MAX_SOURCES], dst = dense(OREPA_FLOAT64, SCALAR);
  const device_number numbers[ELEMENTWISE_MAX_SOURCES] = {{0, 0}};
  double values[ELEMENTWISE_MAX_SOURCES] = {1.7, x[0], x[1], x[2], real3(f, x[0], x[1], x[2])};
  for (int k = 0; k < ELEMENTWISE_MAX_SOURCES; k++) {
    sources[k] = dense(OREPA_FLOAT64, SCALAR);
    put(&sources[k], 0, values[k]);
  }
  ASSERT_DONE(ref->elementwise(&context, f, operand + 1, &dst, sources, numbers));
  return take(&dst, 0);
}

static void derivatives_are_slopes(void **state) {
  static const double points[][3] = {{0.7, 1.3, 2.1}, {1.7, 0.4, 2.1}, {2.6, 0.4, 1.1}};
  for (int f = 0; f < FUNCTION_COUNT; f++)
    for (int operand = 0; operand < rows[f].operands; operand++)
      for (int p = 0; p < 3 && rows[f].needs[operand] != NO_GRADIENT; p++) {
        double low[3], high[3], step = 1e-5;
        memcpy(low, points[p], sizeof low);
        memcpy(high, points[p], sizeof high);
        low[operand] -= step;
        high[operand] += step;
        double slope = (real3(f, high[0], high[1], high[2]) - real3(f, low[0], low[1], low[2])) / (2 * step);
        if (!near(derivative_at(f, operand, points[p]), 1.7 * slope, 1e-8))
          fail_msg("%s, operand %d, point %d: %g, not %g", rows[f].name, operand, p,
                   derivative_at(f, operand, points[p]), 1.7 * slope);
        end(state);
        block_count = 0;
      }
}

static void integers_are_exact(void **state) {
  (void)state;
  int64_t large = ((int64_t)1 << 53) + 1;
  device_array a = dense(OREPA_INT64, SHAPE(2)), dst = like(&a), truth = dense(OREPA_BOOL, SHAPE(2));
  device_array sources[2] = {a, {.data = NULL}};
  const device_number numbers[2] = {{0, 0}, {(double)large, large}};
  put_bits(&a, 0, (uint64_t)large);
  put_bits(&a, 1, (uint64_t)(large - 1));
  ASSERT_DONE(ref->elementwise(&context, FUNCTION_sub, 0, &dst, sources, numbers));
  check_values(&dst, 0, VALUES(0, -1));
  ASSERT_DONE(ref->elementwise(&context, FUNCTION_eq, 0, &truth, sources, numbers));
  check_values(&truth, 0, VALUES(1, 0));
  ASSERT_DONE(ref->elementwise(&context, FUNCTION_isfinite, 0, &truth, sources, numbers));
  check_values(&truth, 0, VALUES(1, 1));
  assert_int_equal(ref->elementwise(&context, FUNCTION_div, 0, &dst, sources, numbers), DEVICE_UNSUPPORTED);
  assert_int_equal(ref->elementwise(&context, FUNCTION_neg, 1, &dst, sources, numbers), DEVICE_UNSUPPORTED);
  device_array sum = apply3(FUNCTION_add, OREPA_UINT8, OREPA_UINT8, 200, 100, 0);
  assert_int_equal(take_integer(&sum, 0), 255);
  sum = apply3(FUNCTION_add, OREPA_BOOL, OREPA_INT64, 1, 1, 0);
  assert_int_equal(take_integer(&sum, 0), 2);
  sum = apply3(FUNCTION_clamp, OREPA_INT32, OREPA_INT32, -7, -3, 3);
  assert_int_equal(take_integer(&sum, 0), -3);
}

static void elementwise_broadcasts_rounds_and_writes_in_place(void **state) {
  (void)state;
  const device_number numbers[2] = {{0, 0}, {0.1, 0}};
  device_array a = strided(OREPA_FLOAT32, 2, (int64_t[]){2, 3}, (int64_t[]){1, 2}),
               row = dense(OREPA_FLOAT32, SHAPE(2, 3));
  row.strides[0] = 0;
  put_all(&a, VALUES(1, 2, 3, 4, 5, 6));
  put_all(&row, VALUES(0, 0, 0, 10, 20, 30));
  ASSERT_DONE(ref->elementwise(&context, FUNCTION_add, 0, &a, (device_array[]){a, row}, numbers));
  check_values(&a, 0, VALUES(11, 22, 33, 14, 25, 36));
  ASSERT_DONE(ref->elementwise(&context, FUNCTION_mul, 0, &a, (device_array[]){a, {.data = NULL}}, numbers));
  assert_true(take(&a, 5) == 36 * 0.1f);
  device_array y = apply3(FUNCTION_add, OREPA_BFLOAT16, OREPA_BFLOAT16, 256, 1, 0);
  assert_true(take(&y, 0) == 256);
  y = apply3(FUNCTION_add, OREPA_BFLOAT16, OREPA_BFLOAT16, 256, 3, 0);
  assert_true(take(&y, 0) == 260);
  y = apply3(FUNCTION_mul, OREPA_FLOAT16, OREPA_FLOAT16, 60000, 2, 0);
  assert_true(take(&y, 0) == INFINITY);
  device_array none = dense(OREPA_FLOAT32, SHAPE(3, 0));
  ASSERT_DONE(ref->elementwise(&context, FUNCTION_exp, 0, &none, &none, numbers));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEST(memory_is_aligned_and_kept),
      TEST(guard_joins_free_blocks),
      TEST(guard_stops_the_host),
      TEST(available_is_the_least_limit),
      TEST(host_blocks_are_aligned),
      TEST(table_says_what_there_is),
      TEST(copy_follows_strides),
      TEST(copy_rounds_to_nearest_even),
      TEST(copy_between_integers_is_exact),
      TEST(copy_from_floats_saturates),
      TEST(fill_leaves_gaps_alone),
      TEST(random_is_philox),
      TEST(functions_have_their_values),
      TEST(derivatives_are_slopes),
      TEST(integers_are_exact),
      TEST(elementwise_broadcasts_rounds_and_writes_in_place),

  };
  RUN_GUARDED_AND_NOT(tests);
}
