/* promise_test.h: small programs that are run with deferral and without, and must leave the same bits. */
#ifndef OREPA_TESTS_PROMISE_TEST_H
#define OREPA_TESTS_PROMISE_TEST_H

#include "engine_test.h"

#include "fusing_device.h"
#include "tensor/promise.h"

enum { MOST_RESULTS = 64, MOST_OWNED = 96 };

/* What a program runs on, what it leaves to be compared, and the handles that it made. */
typedef struct {
  const orepa_device *device;
  orepa_dtype dtype;
  orepa_tensor *owned[MOST_OWNED];
  int owned_count;
  void *results[MOST_RESULTS];
  size_t bytes[MOST_RESULTS];
  int count;
} trial;

/* Keeps a handle until the program's end; borrowed from then on. */
static orepa_tensor *own(trial *t, orepa_tensor *made) {
  assert_true(t->owned_count < MOST_OWNED);
  return t->owned[t->owned_count++] = must(made);
}

/* The handle goes now. */
static void forget(trial *t, orepa_tensor *made) {
  for (int k = 0; k < t->owned_count; k++)
    if (t->owned[k] == made) {
      orepa_release(made);
      t->owned[k] = NULL;
      return;
    }
  fail_msg("not a handle of this trial");
}

/* A tensor's elements are a result; of NULL, that there is none. */
static void result(trial *t, orepa_tensor *of) {
  assert_true(t->count < MOST_RESULTS);
  size_t bytes = of ? (size_t)orepa_count(of) * orepa_dtype_size(orepa_tensor_dtype(of)) : 0;
  t->results[t->count] = malloc(bytes + 1);
  assert_non_null(t->results[t->count]);
  if (of)
    done(orepa_to_host(of, t->results[t->count], bytes));
  t->bytes[t->count++] = bytes;
}

static void number_result(trial *t, int64_t number) {
  assert_true(t->count < MOST_RESULTS);
  t->results[t->count] = malloc(sizeof number);
  assert_non_null(t->results[t->count]);
  memcpy(t->results[t->count], &number, sizeof number);
  t->bytes[t->count++] = sizeof number;
}

/* Values that repeat nowhere, of mean 0 or so. */
static orepa_tensor *some(trial *t, orepa_dtype dtype, int rank, const int64_t *shape, double seed) {
  size_t count = count_in(rank, shape);
  float *values = malloc(count * sizeof *values + 1);
  assert_non_null(values);
  for (size_t k = 0; k < count; k++)
    values[k] = (float)(1.5 * sin(seed + 1.7 * (double)k) + 0.3 * cos(2.9 * seed * (double)k));
  orepa_tensor *wide = must(orepa_from_host(OREPA_FLOAT32, t->device, rank, shape, values));
  orepa_tensor *made = own(t, orepa_to(wide, dtype, t->device));
  orepa_release(wide);
  free(values);
  return made;
}

static orepa_tensor *map(trial *t, int rank, const int64_t *shape, double seed) {
  return some(t, t->dtype, rank, shape, seed);
}

static orepa_tensor *channels(trial *t, int64_t count, double seed) {
  return some(t, t->dtype == OREPA_FLOAT64 ? OREPA_FLOAT64 : OREPA_FLOAT32, 1, &count, seed);
}

/* Gradients reach a tensor without a node. */
static orepa_tensor *leaf(orepa_tensor *t) {
  return wanting(t);
}

typedef void program(trial *t, int variant);

static void trial_run(trial *t, program *run, int variant, bool deferred) {
  bool was = promises_switch(deferred);
  size_t live = orepa_memory(t->device).live;
  size_t workspace = device_context_of(t->device)->workspace_bytes;
  run(t, variant);
  for (int k = 0; k < t->owned_count; k++)
    orepa_release(t->owned[k]);
  t->owned_count = 0;
  promises_switch(was);
  if (device_context_of(t->device)->workspace_bytes == workspace)
    assert_int_equal(orepa_memory(t->device).live, live);
}

static void trial_compare(const trial *a, const trial *b, int variant) {
  assert_int_equal(a->count, b->count);
  for (int k = 0; k < a->count; k++)
    if (a->bytes[k] != b->bytes[k] || memcmp(a->results[k], b->results[k], a->bytes[k]))
      fail_msg("result %d of variant %d differs with deferral, on %s in %s", k, variant, orepa_device_name(a->device),
               orepa_dtype_name(a->dtype));
}

static void trial_free(trial *t) {
  for (int k = 0; k < t->count; k++)
    free(t->results[k]);
  t->count = 0;
}

/* Runs the program both ways on each device and type. */
static void check_program(program *run, int variants) {
  const struct {
    const orepa_device *device;
    orepa_dtype dtype;
  } places[] = {{CPU, OREPA_FLOAT32},
                {CPU, OREPA_BFLOAT16},
                {fusing_device(), OREPA_FLOAT32},
                {fusing_device(), OREPA_BFLOAT16},
                {REF, OREPA_FLOAT32},
                {REF, OREPA_FLOAT64},
                {REF, OREPA_BFLOAT16}};
  for (size_t place = 0; place < sizeof places / sizeof *places; place++)
    for (int variant = 0; variant < variants; variant++) {
      trial plain = {.device = places[place].device, .dtype = places[place].dtype}, deferred = plain;
      trial_run(&plain, run, variant, false);
      trial_run(&deferred, run, variant, true);
      trial_compare(&deferred, &plain, variant);
      trial_free(&plain);
      trial_free(&deferred);
    }
}

#endif
