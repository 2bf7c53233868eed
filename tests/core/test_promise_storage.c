/* test_promise_storage.c: norms that wait, from the storage's side: writes to what a promise reads and to the map
 * itself, when a map is stored, memory that runs out, other threads. */
#include "promise_test.h"

#include <pthread.h>

/* ---- writing ---- */

enum { WRITE_X, WRITE_R, WRITE_NORMED, WRITE_Z, WRITE_VIEW, WRITE_ALIAS, WRITES };

static orepa_tensor *written_tensor(trial *t, const form *f, int which) {
  switch (which) {
  case WRITE_X:
    return f->x;
  case WRITE_R:
    return f->r;
  case WRITE_NORMED:
    return f->normed;
  case WRITE_Z:
    return f->z;
  case WRITE_VIEW:
    return own(t, orepa_select(f->x, 0, 1));
  default:
    return own(t, orepa_detach(f->z));
  }
}

static void write_to(orepa_tensor *to, int how) {
  if (how == 0)
    done(orepa_apply_in_place(FUNCTION_relu, (orepa_operand[]){{.tensor = to}, {.tensor = NULL}, {.tensor = NULL}}));
  else if (how == 1)
    done(orepa_apply_in_place(FUNCTION_add, (orepa_operand[]){{.tensor = to}, {.number = 3}, {.tensor = NULL}}));
  else
    done(tensor_fill(to, (orepa_operand){.number = 2}));
}

/* Without a graph: maps are what they were before the write. */
static void written(trial *t, int variant) {
  bool was = orepa_set_grad_enabled(false);
  int kind = variant % FORMS, which = variant / FORMS % WRITES, how = variant / FORMS / WRITES % 3;
  form f = make_form(t, kind, 0, false);
  if (variant / FORMS / WRITES / 3) /* after use */
    result(t, f.z);
  write_to(written_tensor(t, &f, which), how);
  result(t, f.z);
  result(t, f.normed);
  result(t, f.x);
  number_result(t, (int64_t)orepa_version(f.x));
  number_result(t, (int64_t)orepa_version(f.z));
  orepa_set_grad_enabled(was);
}

static void test_writes_leave_promised_maps_right(void **unused) {
  (void)unused;
  check_program(written, FORMS * WRITES * 3 * 2);
}

/* In a graph: in-place ops on maps are followed by gradients, or refused, alike. */
static void written_in_a_graph(trial *t, int variant) {
  int kind = variant % FORMS, which = variant / FORMS % 2, how = variant / FORMS / 2 % 2;
  form f = make_form(t, kind, 0, true);
  orepa_tensor *use = variant / FORMS / 4 ? own(t, orepa_max_pool2d(f.z, &halving)) : NULL;
  orepa_tensor *to = which ? f.z : f.normed;
  write_to(to, how);
  orepa_tensor *w = leaf(map(t, SHAPE(4, 5, 3, 3), 7)), *y = own(t, orepa_conv2d(f.z, w, NULL, &same_size));
  orepa_tensor *ends[] = {y, use};
  for (int k = 0; k < 2; k++) {
    if (!ends[k])
      continue;
    orepa_tensor *dy = some(t, t->dtype, 4, orepa_shape(ends[k]), 9);
    number_result(t, orepa_backward(ends[k], dy, true));
  }
  result(t, y);
  result(t, orepa_grad(w));
  form_results(t, &f);
}

static void test_in_place_ops_in_a_graph(void **unused) {
  (void)unused;
  check_program(written_in_a_graph, FORMS * 2 * 2 * 2);
}

/* The input of the norm changes after the forward pass: its gradient is refused, as ever. */
static void changed_input(trial *t, int variant) {
  form f = make_form(t, variant, 0, true);
  bool was = orepa_set_grad_enabled(false);
  write_to(f.x, 1);
  orepa_set_grad_enabled(was);
  orepa_tensor *dy = some(t, t->dtype, MAP, 9);
  number_result(t, orepa_backward(f.z, dy, false));
  assert_non_null(strstr(orepa_error(), "batch_norm"));
  result(t, f.z);
}

static void test_a_changed_input_is_refused_alike(void **unused) {
  (void)unused;
  check_program(changed_input, FORMS);
}

/* ---- what is stored, and when ---- */

static orepa_tensor *normed_map(trial *t) {
  orepa_tensor *x = map(t, MAP, 1);
  return own(t, orepa_batch_norm(x, NULL, NULL, NULL, NULL, &training));
}

static bool is_promised(const orepa_tensor *t) {
  return t->storage->promise != NULL;
}

static void test_a_map_is_stored_once_and_only_if_wanted(void **unused) {
  (void)unused;
  bool was = promises_switch(true);
  trial t = {.device = fusing_device(), .dtype = OREPA_FLOAT32};
  orepa_tensor *x = normed_map(&t), *z = relu(&t, x), *alias = own(&t, orepa_detach(z));
  orepa_tensor *view = own(&t, orepa_select(z, 0, 0));
  asked.maps = 0;
  assert_true(is_promised(x) && is_promised(z) && is_promised(view));
  result(&t, view);
  assert_int_equal(asked.maps, 1);
  assert_true(is_promised(x) && !is_promised(z) && !is_promised(alias));
  result(&t, alias);
  result(&t, z);
  assert_int_equal(asked.maps, 1);
  size_t live = orepa_memory(t.device).live;
  orepa_tensor *unread = relu(&t, normed_map(&t));
  forget(&t, unread);
  assert_true(orepa_memory(t.device).live - live < 2 * 2 * 5 * 6 * 7 * sizeof(float)); /* x, and channels */
  assert_int_equal(asked.maps, 1);
  for (int k = 0; k < t.owned_count; k++)
    orepa_release(t.owned[k]);
  trial_free(&t);
  promises_switch(was);
}

/* A chain of conv, norm, ReLU whose convolutions fuse both stores no map between, forward and backward. */
static void test_fused_convolutions_leave_their_inputs_promised(void **unused) {
  (void)unused;
  bool was = promises_switch(true);
  trial t = {.device = fusing_device(), .dtype = OREPA_FLOAT32};
  orepa_tensor *x = leaf(normed_map(&t)),
               *z = relu(&t, own(&t, orepa_batch_norm(x, NULL, NULL, NULL, NULL, &training)));
  orepa_tensor *w = leaf(map(&t, SHAPE(4, 5, 3, 3), 7)), *y = own(&t, orepa_conv2d(z, w, NULL, &same_size));
  backward_from(&t, y);
  assert_true(is_promised(z));
  result(&t, z);
  assert_true(!is_promised(z));
  for (int k = 0; k < t.owned_count; k++)
    orepa_release(t.owned[k]);
  trial_free(&t);
  promises_switch(was);
}

/* What a device doesn't do is refused where the norm is asked for. */
static void test_a_type_that_the_device_has_not_is_refused_at_once(void **unused) {
  (void)unused;
  bool was = promises_switch(true);
  trial t = {.device = CPU, .dtype = OREPA_FLOAT64};
  orepa_tensor *x = map(&t, MAP, 1), *mean = channels(&t, 5, 2), *var = own(&t, orepa_mul(mean, mean));
  assert_null(orepa_batch_norm(x, NULL, NULL, mean, var, &evaluation));
  assert_non_null(strstr(orepa_error(), "batch_norm"));
  for (int k = 0; k < t.owned_count; k++)
    orepa_release(t.owned[k]);
  promises_switch(was);
}

/* ---- memory runs out ---- */

static void test_a_map_that_has_no_room_stays_promised(void **unused) {
  (void)unused;
  bool was = promises_switch(true);
  for_each_device(device) {
    trial t = {.device = device, .dtype = OREPA_FLOAT32}, wanted = t;
    orepa_tensor *x = map(&t, SHAPE(4, 8, 64, 64), 1), *r = map(&t, SHAPE(4, 8, 64, 64), 2);
    orepa_tensor *normed = own(&t, orepa_batch_norm(x, NULL, NULL, NULL, NULL, &training));
    orepa_tensor *z = relu(&t, apply2(&t, FUNCTION_add, normed, r));
    orepa_empty_cache(device);
    orepa_set_memory_limit(device, orepa_memory(device).live + 4096);
    size_t live = orepa_memory(device).live;
    device_array array;
    assert_int_equal(tensor_reads(z, &array), -1);
    assert_non_null(strstr(orepa_error(), "out of memory"));
    assert_true(is_promised(z));
    assert_int_equal(tensor_writes(x, &array), -1); /* neither can what it reads be written */
    assert_int_equal(orepa_version(x), 1);
    assert_int_equal(orepa_memory(device).live, live);
    orepa_set_memory_limit(device, 0);
    result(&t, z);
    promises_switch(false);
    orepa_tensor *plain = own(&t, orepa_batch_norm(x, NULL, NULL, NULL, NULL, &training));
    result(&wanted, relu(&t, apply2(&t, FUNCTION_add, plain, r)));
    promises_switch(true);
    trial_compare(&t, &wanted, 0);
    for (int k = 0; k < t.owned_count; k++)
      orepa_release(t.owned[k]);
    trial_free(&t);
    trial_free(&wanted);
  }
  promises_switch(was);
}

/* ---- threads ---- */

static void *norm_elsewhere(void *trial_) {
  trial *t = trial_;
  orepa_tensor *z = normed_map(t);
  assert_true(!is_promised(z));
  assert_true(!promises_made());
  return NULL;
}

static void test_other_threads_promise_nothing(void **unused) {
  (void)unused;
  bool was = promises_switch(true);
  trial t = {.device = CPU, .dtype = OREPA_FLOAT32};
  pthread_t thread;
  assert_true(promises_made());
  assert_int_equal(pthread_create(&thread, NULL, norm_elsewhere, &t), 0);
  assert_int_equal(pthread_join(thread, NULL), 0);
  for (int k = 0; k < t.owned_count; k++)
    orepa_release(t.owned[k]);
  promises_switch(was);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_writes_leave_promised_maps_right),
      cmocka_unit_test(test_in_place_ops_in_a_graph),
      cmocka_unit_test(test_a_changed_input_is_refused_alike),
      cmocka_unit_test(test_a_map_is_stored_once_and_only_if_wanted),
      cmocka_unit_test(test_fused_convolutions_leave_their_inputs_promised),
      cmocka_unit_test(test_a_type_that_the_device_has_not_is_refused_at_once),
      cmocka_unit_test(test_a_map_that_has_no_room_stays_promised),
      cmocka_unit_test(test_other_threads_promise_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
