/* elementwise.c: every function of elementwise.h and its derivatives, one element at a time: floats in double, integers
 * in int64. */
#include "elementwise.h"

#include <tgmath.h>

#include "ref/ref.h"

static const int row_types[FUNCTION_COUNT] = {
#define ROW(name, operands, types, ...) [FUNCTION_##name] = ELEMENTWISE_##types,
    ELEMENTWISE_ROWS(ROW)
#undef ROW
};

static const int row_operands[FUNCTION_COUNT] = {
#define ROW(name, operands, ...) [FUNCTION_##name] = operands,
    ELEMENTWISE_ROWS(ROW)
#undef ROW
};

static double forward_of(int function, double a, double b, double c) {
  switch (function) {
#define ROW(name, operands, types, forward, ...)                                                                       \
  case FUNCTION_##name:                                                                                                \
    return forward;
    ELEMENTWISE_ROWS(ROW)
#undef ROW
  }
  return 0;
}

static double derivative_of(int function, int derivative, double dy, double a, double b, double c, double y) {
  switch (function) {
#define ROW(name, operands, types, forward, needs_a, da, needs_b, db, needs_c, dc)                                     \
  case FUNCTION_##name:                                                                                                \
    return derivative == 1 ? (da) : derivative == 2 ? (db) : (dc);
    ELEMENTWISE_ROWS(ROW)
#undef ROW
  }
  return 0;
}

static int64_t integer_of(int function, int64_t a, int64_t b, int64_t c) {
  switch (function) {
#define INTEGER_REAL(name, forward)
#define INTEGER_ANY(name, forward)                                                                                     \
  case FUNCTION_##name:                                                                                                \
    return forward;
#define INTEGER_COMPARE INTEGER_ANY
#define INTEGER_CHOICE INTEGER_ANY
#define ROW(name, operands, types, forward, ...) INTEGER_##types(name, forward)
    ELEMENTWISE_ROWS(ROW)
#undef ROW
#undef INTEGER_CHOICE
#undef INTEGER_COMPARE
#undef INTEGER_ANY
#undef INTEGER_REAL
  }
  return 0;
}

/* The type that all sources have: that of the first array, else the result's. */
static orepa_dtype type_of(const device_array *dst, int count, const device_array *sources) {
  for (int s = 0; s < count; s++)
    if (sources[s].data)
      return sources[s].dtype;
  return dst->dtype;
}

/* A number takes the type that is computed in, which is float32 for the short floats. */
static double number_as(orepa_dtype dtype, device_number number) {
  return dtype == OREPA_FLOAT64 ? number.real : (double)(float)number.real;
}

device_status ref_elementwise(device_context *context, int function, int derivative, const device_array *dst,
                              const device_array *sources, const device_number *numbers) {
  REF_ENTRY;
  (void)context;
  int count = derivative ? ELEMENTWISE_MAX_SOURCES : row_operands[function];
  orepa_dtype dtype = type_of(dst, count, sources);
  bool real = orepa_dtype_is_float(dtype);
  if (!real && (derivative || row_types[function] == ELEMENTWISE_REAL))
    return DEVICE_UNSUPPORTED;
  for (int64_t k = 0; k < ref_count(dst); k++) {
    double x[ELEMENTWISE_MAX_SOURCES] = {0};
    int64_t n[ELEMENTWISE_MAX_SOURCES] = {0};
    for (int s = 0; s < count; s++) {
      if (real)
        x[s] = sources[s].data ? ref_get(&sources[s], ref_at(&sources[s], k)) : number_as(dtype, numbers[s]);
      else
        n[s] = sources[s].data ? ref_get_integer(&sources[s], ref_at(&sources[s], k)) : numbers[s].integer;
    }
    if (derivative)
      ref_set(dst, ref_at(dst, k), derivative_of(function, derivative, x[0], x[1], x[2], x[3], x[4]));
    else if (real)
      ref_set(dst, ref_at(dst, k), forward_of(function, x[0], x[1], x[2]));
    else
      ref_set_integer(dst, ref_at(dst, k), integer_of(function, n[0], n[1], n[2]));
  }
  return DEVICE_DONE;
}
