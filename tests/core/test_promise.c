/* test_promise.c: norms that wait: whatever follows a norm, and whoever looks at its map and when, results and
 * gradients have the bits that they have without deferral. */
#include "promise_test.h"

/* ---- readers ---- */

static orepa_tensor *read_map(trial *t, const form *f) {
  (void)t;
  return orepa_retain(f->z);
}

static orepa_tensor *read_by_convolution(trial *t, const form *f) {
  orepa_tensor *w = leaf(map(t, SHAPE(4, 5, 3, 3), 7));
  orepa_tensor *y = own(t, orepa_conv2d(f->z, w, NULL, &same_size));
  return orepa_retain(y);
}

static orepa_tensor *read_by_grouped_strided_convolution(trial *t, const form *f) {
  static const orepa_conv conv = {{2, 2}, {0, 0}, {1, 1}, 5};
  orepa_tensor *w = leaf(map(t, SHAPE(5, 1, 1, 1), 7)), *bias = leaf(map(t, SHAPE(5), 8));
  return orepa_conv2d(f->z, w, bias, &conv);
}

static orepa_tensor *read_by_max_pool(trial *t, const form *f) {
  (void)t;
  return orepa_max_pool2d(f->z, &halving);
}

static orepa_tensor *read_by_adaptive_max_pool(trial *t, const form *f) {
  (void)t;
  return orepa_adaptive_max_pool2d(f->z, 2, 3);
}

static orepa_tensor *read_by_average_pool(trial *t, const form *f) {
  (void)t;
  return orepa_avg_pool2d(f->z, &halving);
}

static orepa_tensor *read_by_global_average(trial *t, const form *f) {
  (void)t;
  return orepa_adaptive_avg_pool2d(f->z, 1, 1);
}

static orepa_tensor *read_by_norm(trial *t, const form *f) {
  orepa_tensor *y = own(t, orepa_batch_norm(f->z, f->weight, NULL, NULL, NULL, &training));
  return orepa_relu(y);
}

static orepa_tensor *read_by_frozen_norm(trial *t, const form *f) {
  orepa_tensor *one = own(t, orepa_full(orepa_tensor_dtype(f->var), t->device, SHAPE(5), 1));
  return orepa_batch_norm(f->z, f->weight, f->bias, f->bias, one, &evaluation);
}

static orepa_tensor *read_by_relu(trial *t, const form *f) {
  orepa_tensor *y = own(t, orepa_relu(f->z));
  return orepa_relu(y);
}

static orepa_tensor *read_by_addition_to_itself(trial *t, const form *f) {
  (void)t;
  return orepa_add(f->z, f->z);
}

static orepa_tensor *read_by_addition_of_a_slice(trial *t, const form *f) {
  orepa_tensor *s = own(t, orepa_slice(f->z, 0, 0, 1, 1));
  return orepa_add(f->z, s);
}

static orepa_tensor *read_by_addition_of_its_norm(trial *t, const form *f) {
  orepa_tensor *sum = apply2(t, FUNCTION_add, f->z, f->normed);
  return orepa_relu(sum);
}

static orepa_tensor *read_twice(trial *t, const form *f) {
  orepa_tensor *w = leaf(map(t, SHAPE(5, 5, 3, 3), 7)), *v = leaf(map(t, SHAPE(5, 5, 1, 1), 8));
  static const orepa_conv point = {{1, 1}, {0, 0}, {1, 1}, 1};
  orepa_tensor *a = own(t, orepa_conv2d(f->z, w, NULL, &same_size)), *b = own(t, orepa_conv2d(f->z, v, NULL, &point));
  return orepa_add(a, b);
}

static orepa_tensor *read_three_times(trial *t, const form *f) {
  orepa_tensor *pool = own(t, orepa_adaptive_avg_pool2d(f->z, 6, 7)), *twice = own(t, read_twice(t, f));
  return orepa_mul(twice, pool);
}

static orepa_tensor *read_by_product(trial *t, const form *f) {
  (void)t;
  return orepa_mul(f->z, f->x);
}

static orepa_tensor *read_by_sum(trial *t, const form *f) {
  (void)t;
  return orepa_reduce(OREPA_SUM, f->z, 2, AXES(0, 2), false);
}

static orepa_tensor *read_by_softmax(trial *t, const form *f) {
  orepa_tensor *flat = own(t, orepa_reshape(f->z, SHAPE(2, 5 * 6 * 7)));
  return orepa_softmax(flat, 1);
}

static orepa_tensor *read_by_linear(trial *t, const form *f) {
  orepa_tensor *flat = own(t, orepa_reshape(f->z, SHAPE(2, 5 * 6 * 7))), *w = leaf(map(t, SHAPE(3, 210), 7));
  return orepa_linear(flat, w, NULL);
}

static orepa_tensor *read_as_view(trial *t, const form *f) {
  orepa_tensor *turned = own(t, orepa_permute(f->z, (int[]){0, 2, 3, 1}));
  return orepa_mul(turned, turned);
}

static orepa_tensor *read_as_part(trial *t, const form *f) {
  orepa_tensor *part = own(t, orepa_slice(f->z, 1, 1, 4, 2));
  return orepa_relu(part);
}

static orepa_tensor *read_as_copy(trial *t, const form *f) {
  orepa_tensor *copy = own(t, orepa_clone(f->z));
  return orepa_relu(copy);
}

static orepa_tensor *read_as_other_type(trial *t, const form *f) {
  return orepa_to(f->z, t->dtype == OREPA_FLOAT32 ? OREPA_BFLOAT16 : OREPA_FLOAT32, t->device);
}

static orepa_tensor *read_detached_as_well(trial *t, const form *f) {
  orepa_tensor *alone = own(t, orepa_detach(f->z));
  return orepa_mul(alone, f->z);
}

static orepa_tensor *(*const readers[])(trial *, const form *) = {
    read_map,
    read_by_convolution,
    read_by_grouped_strided_convolution,
    read_by_max_pool,
    read_by_adaptive_max_pool,
    read_by_average_pool,
    read_by_global_average,
    read_by_norm,
    read_by_frozen_norm,
    read_by_relu,
    read_by_addition_to_itself,
    read_by_addition_of_a_slice,
    read_by_addition_of_its_norm,
    read_twice,
    read_three_times,
    read_by_product,
    read_by_sum,
    read_by_softmax,
    read_by_linear,
    read_as_view,
    read_as_part,
    read_as_copy,
    read_as_other_type,
    read_detached_as_well,
};
enum { READERS = sizeof readers / sizeof *readers };

static void every_reader(trial *t, int variant) {
  form f = make_form(t, variant % FORMS, 0, true);
  orepa_tensor *y = own(t, readers[variant / FORMS](t, &f));
  int owned = t->owned_count;
  backward_from(t, y);
  result(t, y);
  form_results(t, &f);
  for (int k = 0; k < owned; k++) /* the kernels of convolutions and products */
    if (t->owned[k] && orepa_requires_grad(t->owned[k]) && orepa_is_leaf(t->owned[k]))
      result(t, orepa_grad(t->owned[k]));
}

static void test_every_op_over_a_promise(void **unused) {
  (void)unused;
  check_program(every_reader, FORMS * READERS);
}

static void every_reader_without_a_graph(trial *t, int variant) {
  bool was = orepa_set_grad_enabled(false);
  form f = make_form(t, variant % FORMS, 0, false);
  orepa_tensor *y = own(t, readers[variant / FORMS](t, &f));
  result(t, y);
  number_result(t, (int64_t)orepa_version(f.z));
  orepa_set_grad_enabled(was);
}

static void test_every_op_without_a_graph(void **unused) {
  (void)unused;
  check_program(every_reader_without_a_graph, FORMS * READERS);
}

/* ---- looking ---- */

static void looked_at(trial *t, int variant) {
  form f = make_form(t, variant % FORMS, variant / FORMS, true);
  orepa_tensor *y = own(t, read_by_convolution(t, &f));
  result(t, f.normed);
  backward_from(t, y);
  result(t, y);
  result(t, f.z);
  form_results(t, &f);
}

static void test_looking_changes_no_bit(void **unused) {
  (void)unused;
  check_program(looked_at, FORMS * LOOKS);
}

/* Also against nobody having looked. */
static void test_looking_changes_nothing_that_follows(void **unused) {
  (void)unused;
  for (int kind = 0; kind < FORMS; kind++)
    for (int looks = 0; looks < LOOKS; looks++) {
      trial blind = {.device = fusing_device(), .dtype = OREPA_BFLOAT16}, seen = blind;
      trial_run(&blind, looked_at, kind, true);
      trial_run(&seen, looked_at, kind + looks * FORMS, true);
      for (int k = 1; k <= blind.count; k++)
        assert_memory_equal(blind.results[blind.count - k], seen.results[seen.count - k], blind.bytes[blind.count - k]);
      trial_free(&blind);
      trial_free(&seen);
    }
}

/* ---- gradients ---- */

/* Only some of the leaves ask; backward twice over a retained graph; gradients looked at. */
static void some_ask(trial *t, int variant) {
  int kind = variant % FORMS, asks = variant / FORMS;
  form f = make_form(t, kind, 0, false);
  orepa_tensor *all[] = {f.x, f.r, f.weight, f.bias};
  for (int k = 0; k < 4; k++)
    if (asks >> k & 1)
      leaf(all[k]);
  orepa_tensor *normed = own(t, orepa_batch_norm(f.x, f.weight, f.bias, f.mean, f.var, &training));
  orepa_tensor *z = relu(t, apply2(t, FUNCTION_add, normed, f.r)), *w = leaf(map(t, SHAPE(5, 5, 3, 3), 7));
  orepa_tensor *y = relu(t, apply2(t, FUNCTION_add, own(t, orepa_conv2d(z, w, NULL, &same_size)), z));
  orepa_tensor *dy = some(t, t->dtype, MAP, 9);
  done(orepa_backward(y, dy, true));
  done(orepa_backward(y, dy, false));
  result(t, orepa_grad(w));
  form_results(t, &f);
}

static void test_gradients_of_some_leaves(void **unused) {
  (void)unused;
  check_program(some_ask, 16 * FORMS);
}

/* A norm's map itself has two consumers, and so has the input of a ReLU in front of nothing else. */
static void shared_maps(trial *t, int variant) {
  form f = make_form(t, variant % FORMS, 0, true);
  orepa_tensor *a = relu(t, f.normed), *b = relu(t, f.normed), *c = apply2(t, FUNCTION_mul, f.normed, a);
  orepa_tensor *all = apply2(t, FUNCTION_add, apply2(t, FUNCTION_add, a, b), apply2(t, FUNCTION_add, c, f.z));
  backward_from(t, all);
  result(t, all);
  form_results(t, &f);
}

static void test_maps_with_many_consumers(void **unused) {
  (void)unused;
  check_program(shared_maps, FORMS);
}

/* Gradients that arrive expanded: of a mean. */
static void expanded_gradient(trial *t, int variant) {
  form f = make_form(t, variant, 0, true);
  orepa_tensor *mean = own(t, orepa_reduce(OREPA_MEAN, f.z, 0, NULL, false));
  done(orepa_backward(mean, NULL, false));
  form_results(t, &f);
}

static void test_expanded_gradients(void **unused) {
  (void)unused;
  check_program(expanded_gradient, FORMS);
}

/* Maps of other ranks, and empty ones. */
static void other_ranks(trial *t, int variant) {
  static const struct {
    int rank;
    int64_t shape[5];
  } shapes[] = {{2, {6, 5}}, {3, {2, 5, 7}}, {5, {2, 5, 2, 1, 3}}, {2, {0, 5}}, {4, {0, 5, 2, 2}}, {4, {2, 5, 0, 2}}};
  orepa_tensor *x = leaf(map(t, shapes[variant].rank, shapes[variant].shape, 1)), *w = leaf(channels(t, 5, 2));
  orepa_tensor *r = leaf(map(t, shapes[variant].rank, shapes[variant].shape, 3));
  orepa_tensor *normed = own(t, orepa_batch_norm(x, w, NULL, NULL, NULL, &training));
  orepa_tensor *z = relu(t, apply2(t, FUNCTION_add, normed, r));
  backward_from(t, z);
  result(t, z);
  result(t, orepa_grad(x));
  result(t, orepa_grad(w));
  result(t, orepa_grad(r));
}

static void test_other_ranks_and_nothing(void **unused) {
  (void)unused;
  check_program(other_ranks, 6);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_every_op_over_a_promise),  cmocka_unit_test(test_every_op_without_a_graph),
      cmocka_unit_test(test_looking_changes_no_bit),   cmocka_unit_test(test_looking_changes_nothing_that_follows),
      cmocka_unit_test(test_gradients_of_some_leaves), cmocka_unit_test(test_maps_with_many_consumers),
      cmocka_unit_test(test_expanded_gradients),       cmocka_unit_test(test_other_ranks_and_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
