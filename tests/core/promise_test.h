/* promise_test.h: small programs that are run with deferral and without, and must leave the same bits. */
#ifndef OREPA_TESTS_PROMISE_TEST_H
#define OREPA_TESTS_PROMISE_TEST_H

#include "engine_test.h"

#include "elementwise.h"
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
static inline orepa_tensor *own(trial *t, orepa_tensor *made) {
  assert_true(t->owned_count < MOST_OWNED);
  return t->owned[t->owned_count++] = must(made);
}

/* The handle goes now. */
static inline void forget(trial *t, orepa_tensor *made) {
  for (int k = 0; k < t->owned_count; k++)
    if (t->owned[k] == made) {
      orepa_release(made);
      t->owned[k] = NULL;
      return;
    }
  fail_msg("not a handle of this trial");
}

/* A tensor's elements are a result; of NULL, that there is none. */
static inline void result(trial *t, orepa_tensor *of) {
  assert_true(t->count < MOST_RESULTS);
  size_t bytes = of ? (size_t)orepa_count(of) * orepa_dtype_size(orepa_tensor_dtype(of)) : 0;
  t->results[t->count] = malloc(bytes + 1);
  assert_non_null(t->results[t->count]);
  if (of)
    done(orepa_to_host(of, t->results[t->count], bytes));
  t->bytes[t->count++] = bytes;
}

static inline void number_result(trial *t, int64_t number) {
  assert_true(t->count < MOST_RESULTS);
  t->results[t->count] = malloc(sizeof number);
  assert_non_null(t->results[t->count]);
  memcpy(t->results[t->count], &number, sizeof number);
  t->bytes[t->count++] = sizeof number;
}

/* Values that repeat nowhere, of mean 0 or so. */
static inline orepa_tensor *some(trial *t, orepa_dtype dtype, int rank, const int64_t *shape, double seed) {
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

static inline orepa_tensor *map(trial *t, int rank, const int64_t *shape, double seed) {
  return some(t, t->dtype, rank, shape, seed);
}

static inline orepa_tensor *channels(trial *t, int64_t count, double seed) {
  return some(t, t->dtype == OREPA_FLOAT64 ? OREPA_FLOAT64 : OREPA_FLOAT32, 1, &count, seed);
}

/* Gradients reach a tensor without a node. */
static inline orepa_tensor *leaf(orepa_tensor *t) {
  return wanting(t);
}

typedef void program(trial *t, int variant);

static inline void trial_run(trial *t, program *run, int variant, bool deferred) {
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

static inline void trial_compare(const trial *a, const trial *b, int variant) {
  assert_int_equal(a->count, b->count);
  for (int k = 0; k < a->count; k++)
    if (a->bytes[k] != b->bytes[k] || memcmp(a->results[k], b->results[k], a->bytes[k]))
      fail_msg("result %d of variant %d differs with deferral, on %s in %s", k, variant, orepa_device_name(a->device),
               orepa_dtype_name(a->dtype));
}

static inline void trial_free(trial *t) {
  for (int k = 0; k < t->count; k++)
    free(t->results[k]);
  t->count = 0;
}

/* Runs the program both ways on each device and type. */
static inline void check_program(program *run, int variants) {
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

/* ---- a norm, and what may follow it ---- */

static const orepa_norm training = {1e-5, 0.1, true}, evaluation = {1e-5, 0.1, false};
static const orepa_conv same_size = {{1, 1}, {1, 1}, {1, 1}, 1};
static const orepa_pool halving = {{3, 3}, {2, 2}, {1, 1}, {1, 1}, false, false};

#define MAP SHAPE(2, 5, 6, 7)

/* ---- forms of promises: what stands before a reader ---- */

enum { NORM, NORM_RELU, NORM_PLUS, NORM_PLUS_RELU, NORM_NORM, NORM_NORM_RELU, PLUS_NORM_RELU, FROZEN_RELU, FORMS };

typedef struct {
  orepa_tensor *x, *r, *weight, *bias, *mean, *var;
  orepa_tensor *normed, *second, *sum, *z; /* z is the last of them; NULL: not in this form */
} form;

static inline orepa_tensor *apply2(trial *t, int f, orepa_tensor *a, orepa_tensor *b) {
  return own(t, orepa_apply(f, (orepa_operand[]){{.tensor = a}, {.tensor = b}, {.tensor = NULL}}));
}

static inline orepa_tensor *relu(trial *t, orepa_tensor *x) {
  return own(t, orepa_relu(x));
}

/* Places in a form where somebody may look at a map. */
enum { LOOK_NORM = 1, LOOK_SUM = 2, LOOK_RELU = 4, LOOK_LATER = 8, LOOKS = 16 };

static inline void look(trial *t, int looks, int at, orepa_tensor *map_) {
  if (map_ && (looks & at))
    result(t, map_);
}

static inline form make_form(trial *t, int kind, int looks, bool graph) {
  bool frozen = kind == FROZEN_RELU, later = looks & LOOK_LATER;
  form f = {.x = map(t, MAP, 1), .r = map(t, MAP, 2), .weight = channels(t, 5, 3), .bias = channels(t, 5, 4)};
  f.mean = channels(t, 5, 5);
  f.var = channels(t, 5, 6);
  orepa_tensor *squared = must(orepa_mul(f.var, f.var));
  done(tensor_copy_into(f.var, squared));
  orepa_release(squared);
  if (graph) {
    leaf(f.x);
    leaf(f.r);
    leaf(f.weight);
    leaf(f.bias);
  }
  f.normed = f.z = own(t, orepa_batch_norm(f.x, f.weight, f.bias, f.mean, f.var, frozen ? &evaluation : &training));
  if (!later)
    look(t, looks, LOOK_NORM, f.normed);
  if (kind == NORM_NORM || kind == NORM_NORM_RELU) {
    f.second = own(t, orepa_batch_norm(f.r, f.bias, f.weight, NULL, NULL, &training));
    f.z = f.sum = apply2(t, FUNCTION_add, f.normed, f.second);
  } else if (kind == NORM_PLUS || kind == NORM_PLUS_RELU) {
    f.z = f.sum = apply2(t, FUNCTION_add, f.normed, f.r);
  } else if (kind == PLUS_NORM_RELU) {
    f.z = f.sum = apply2(t, FUNCTION_add, f.r, f.normed);
  }
  if (!later)
    look(t, looks, LOOK_SUM, f.sum);
  if (kind != NORM && kind != NORM_PLUS && kind != NORM_NORM)
    f.z = relu(t, f.z);
  if (!later)
    look(t, looks, LOOK_RELU, f.z);
  if (later) {
    look(t, looks, LOOK_NORM, f.normed);
    look(t, looks, LOOK_SUM, f.sum);
    look(t, looks, LOOK_RELU, f.z);
  }
  return f;
}

static inline void form_results(trial *t, const form *f) {
  orepa_tensor *leaves[] = {f->x, f->r, f->weight, f->bias};
  for (int k = 0; k < 4; k++)
    result(t, orepa_grad(leaves[k]));
  result(t, f->mean);
  result(t, f->var);
}

/* Backward from y with a gradient that differs everywhere. */
static inline void backward_from(trial *t, orepa_tensor *y) {
  orepa_tensor *dy = some(t, orepa_tensor_dtype(y), orepa_rank(y), orepa_shape(y), 9);
  done(orepa_backward(y, dy, false));
}

#endif
