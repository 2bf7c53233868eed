/* test_convert.c: conversions between all pairs of types against a calculation of their own, element by element. */
#include "engine_test.h"

enum { MOST = 64 };

/* ---- what a conversion should give, from the definitions of the types alone ---- */

/* `value` rounded to nearest even: `bits` of fraction, no step finer than 2^least, beyond `most` infinite. */
static double rounded(long double value, int bits, int least, double most) {
  if (value == 0 || !isfinite(value))
    return (double)value;
  int exponent;
  frexpl(value, &exponent);
  int step = exponent - bits < least ? least : exponent - bits;
  long double near = ldexpl(rintl(ldexpl(value, -step)), step);
  return fabsl(near) > most ? copysign(INFINITY, (double)value) : copysign((double)near, (double)value);
}

/* Toward zero, to the nearest number that the type has; NaN is 0. */
static long double clipped(long double value, long double low, long double high) {
  if (isnan(value))
    return 0;
  value = truncl(value);
  return value < low ? low : value > high ? high : value + 0;
}

static long double converted(long double value, orepa_dtype to) {
  switch (to) {
  case OREPA_FLOAT32:
    return rounded(value, 24, -149, FLT_MAX);
  case OREPA_BFLOAT16:
    return rounded(value, 8, -133, 0x1.fep127);
  case OREPA_FLOAT16:
    return rounded(value, 11, -24, 65504);
  case OREPA_FLOAT64:
    return rounded(value, 53, -1074, DBL_MAX);
  case OREPA_INT64:
    return clipped(value, INT64_MIN, INT64_MAX);
  case OREPA_INT32:
    return clipped(value, INT32_MIN, INT32_MAX);
  case OREPA_UINT8:
    return clipped(value, 0, 255);
  default:
    return value != 0; /* NaN is not zero */
  }
}

/* ---- host memory of any type; int64 is kept exactly ---- */

static long double element(orepa_dtype dtype, const void *data, size_t k) {
  return dtype == OREPA_INT64 ? (long double)((const int64_t *)data)[k] : (long double)value_at(dtype, data, k);
}

static void set_element(orepa_dtype dtype, void *data, size_t k, long double value) {
  switch (dtype) {
  case OREPA_FLOAT32:
    ((float *)data)[k] = (float)value;
    break;
  case OREPA_BFLOAT16:
    ((uint16_t *)data)[k] = float_to_bfloat16((float)value);
    break;
  case OREPA_FLOAT16:
    ((uint16_t *)data)[k] = float_to_float16((float)value);
    break;
  case OREPA_FLOAT64:
    ((double *)data)[k] = (double)value;
    break;
  case OREPA_INT64:
    ((int64_t *)data)[k] = (int64_t)value;
    break;
  case OREPA_INT32:
    ((int32_t *)data)[k] = (int32_t)value;
    break;
  default:
    ((uint8_t *)data)[k] = (uint8_t)value;
  }
}

/* The edges of all types: what saturates, ties, subnormals, what overflows to infinity. */
static const double edges[] = {0,
                               -0.0,
                               1,
                               -1,
                               2.5,
                               -2.5,
                               0.5,
                               0.99,
                               -0.99,
                               127.5,
                               254.999,
                               255,
                               255.5,
                               256,
                               -0.001,
                               300,
                               1000.7,
                               -1000.7,
                               2147483647,
                               2147483648.0,
                               -2147483648.0,
                               -2147483649.0,
                               0x1.fffffffffffffp62,
                               -0x1p63,
                               0x1p63,
                               1e19,
                               -1e19,
                               65504,
                               65519.99,
                               65520,
                               -65520,
                               1e5,
                               0x1p-14,
                               0x1p-24,
                               0x1p-25,
                               0x1.8p-25,
                               0x1.8p-24,
                               6e-8,
                               0x1.01p0,
                               0x1.03p0,
                               0x1.010001p0,
                               0x1.002p0,
                               0x1.006p0,
                               0x1.0020000001p0,
                               0x1.0000010000001p0,
                               0x1.000001p0,
                               0x1.000003p0,
                               3.4e38,
                               3.5e38,
                               -1e300,
                               1e-45,
                               1e-46,
                               3e-39,
                               0x1p-133,
                               0x1p-134,
                               NAN,
                               INFINITY,
                               -INFINITY};

static bool fits(orepa_dtype dtype, double value) {
  switch (dtype) {
  case OREPA_INT64:
    return value >= -0x1p63 && value < 0x1p63;
  case OREPA_INT32:
    return value >= INT32_MIN && value <= INT32_MAX;
  case OREPA_UINT8:
    return value >= 0 && value <= 255;
  case OREPA_BOOL:
    return value == 0 || value == 1;
  default:
    return true;
  }
}

/* The edges that the type has; how many they are. */
static size_t fill_edges(orepa_dtype dtype, void *data) {
  size_t count = 0;
  for (size_t k = 0; k < sizeof edges / sizeof *edges; k++)
    if (fits(dtype, edges[k]))
      set_element(dtype, data, count++, edges[k]);
  if (dtype == OREPA_INT64)
    ((int64_t *)data)[count++] = INT64_MAX;
  return count;
}

static void check(const orepa_device *device, const orepa_device *target, orepa_dtype from, orepa_dtype to) {
  double source[MOST], result[MOST];
  int64_t count = (int64_t)fill_edges(from, source);
  assert_true(count <= MOST);
  orepa_tensor *t = must(orepa_from_host(from, device, 1, &count, source)), *y = must(orepa_to(t, to, target));
  assert_int_equal(orepa_tensor_dtype(y), to);
  done(orepa_to_host(y, result, (size_t)count * orepa_dtype_size(to)));
  for (size_t k = 0; k < (size_t)count; k++) {
    long double value = element(from, source, k), wanted = from == to ? value : converted(value, to);
    long double found = element(to, result, k);
    bool same = isnan(wanted) ? isnan(found) : found == wanted && signbit(found) == signbit(wanted);
    if (!same)
      fail_msg("%s to %s on '%s': %.20Lg gives %.20Lg, not %.20Lg", orepa_dtype_name(from), orepa_dtype_name(to),
               orepa_device_name(device), value, found, wanted);
  }
  orepa_release(t);
  orepa_release(y);
}

static void test_every_pair_of_types(void **unused) {
  (void)unused;
  for_each_device(device) {
    for (int from = 0; from < OREPA_DTYPES; from++)
      for (int to = 0; to < OREPA_DTYPES; to++)
        check(device, device, from, to);
  }
}

static void test_every_pair_of_types_across_devices(void **unused) {
  (void)unused;
  for_each_device(device) {
    for (int from = 0; from < OREPA_DTYPES; from++)
      for (int to = 0; to < OREPA_DTYPES; to++)
        check(device, device == CPU ? REF : CPU, from, to);
  }
}

/* All 65536 elements of a short type survive the way to float32 and back, bit for bit; NaNs stay NaNs. */
static void test_short_floats_survive_float32(void **unused) {
  (void)unused;
  enum { COUNT = 1 << 16 };
  static uint16_t bits[COUNT], back[COUNT];
  static float wide[COUNT];
  const orepa_dtype shorts[2] = {OREPA_BFLOAT16, OREPA_FLOAT16};
  for (int k = 0; k < COUNT; k++)
    bits[k] = (uint16_t)k;
  for_each_device(device) {
    for (int s = 0; s < 2; s++) {
      orepa_tensor *t = must(orepa_from_host(shorts[s], device, SHAPE(COUNT), bits));
      orepa_tensor *w = must(orepa_to(t, OREPA_FLOAT32, device)), *b = must(orepa_to(w, shorts[s], device));
      done(orepa_to_host(w, wide, sizeof wide));
      done(orepa_to_host(b, back, sizeof back));
      int exponent = s ? 5 : 8, fraction = 15 - exponent, bias = (1 << (exponent - 1)) - 1;
      for (int k = 0; k < COUNT; k++) {
        int e = k >> fraction & ((1 << exponent) - 1), f = k & ((1 << fraction) - 1);
        double size = e == (1 << exponent) - 1 ? (f ? NAN : INFINITY)
                      : e                      ? ldexp((1 << fraction) + f, e - bias - fraction)
                                               : ldexp(f, 1 - bias - fraction);
        double wanted = k >> 15 ? -size : size;
        assert_true(isnan(wanted) ? isnan(wide[k]) : wide[k] == wanted);
        assert_true(isnan(wanted) ? isnan(value_at(shorts[s], back, (size_t)k)) : back[k] == k);
      }
      orepa_release(t);
      orepa_release(w);
      orepa_release(b);
    }
  }
}

/* Copying without conversion keeps all bits, those of NaNs too. */
static void test_copies_keep_the_bits(void **unused) {
  (void)unused;
  static const uint32_t bits[6] = {0x7fc00001, 0xffc12345, 0x7f800001, 0x80000000, 1, 0x7f800000};
  for_each_device(device) {
    orepa_tensor *t = must(orepa_from_host(OREPA_FLOAT32, device, SHAPE(2, 3), bits));
    orepa_tensor *turned = must(orepa_transpose(t, 0, 1)), *back = must(orepa_transpose(turned, 0, 1));
    orepa_tensor *copy = must(orepa_clone(turned)), *again = must(orepa_transpose(copy, 0, 1));
    uint32_t found[6];
    done(orepa_to_host(again, found, sizeof found));
    assert_memory_equal(found, bits, sizeof bits);
    orepa_tensor *made[] = {t, turned, back, copy, again};
    for (int k = 0; k < 5; k++)
      orepa_release(made[k]);
  }
}

/* Types meet only as promised: the short floats widen to float32, nothing else is promoted. */
static void test_promotion_between_tensors(void **unused) {
  (void)unused;
  for (int a = 0; a < OREPA_DTYPES; a++)
    for (int b = 0; b < OREPA_DTYPES; b++) {
      orepa_tensor *x = must(orepa_full(a, REF, SHAPE(2), 1)), *y = must(orepa_full(b, REF, SHAPE(2), 1));
      orepa_tensor *sum = orepa_add(x, y);
      bool short_a = a == OREPA_BFLOAT16 || a == OREPA_FLOAT16, short_b = b == OREPA_BFLOAT16 || b == OREPA_FLOAT16;
      if (a == b || (short_a && b == OREPA_FLOAT32) || (a == OREPA_FLOAT32 && short_b)) {
        assert_values(sum, 2, 2);
        assert_int_equal(orepa_tensor_dtype(sum), a == OREPA_BOOL ? OREPA_INT64 : a == b ? a : OREPA_FLOAT32);
      } else {
        assert_no_tensor(sum, orepa_dtype_name(a));
        assert_no_tensor(sum, orepa_dtype_name(b));
      }
      orepa_release(x);
      orepa_release(y);
      orepa_release(sum);
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_pair_of_types),          cmocka_unit_test(test_every_pair_of_types_across_devices),
      cmocka_unit_test(test_short_floats_survive_float32), cmocka_unit_test(test_copies_keep_the_bits),
      cmocka_unit_test(test_promotion_between_tensors),
  };
  RUN_GUARDED_AND_NOT(tests);
}
