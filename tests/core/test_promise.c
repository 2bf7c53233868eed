/* test_promise.c: norms that wait: whatever follows a norm, whoever looks at its map and when, and whatever is written
 * in between, results and gradients have the bits that they have without deferral. */
#include "promise_test.h"

#include <pthread.h>

#include "elementwise.h"

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

static orepa_tensor *apply2(trial *t, int f, orepa_tensor *a, orepa_tensor *b) {
  return own(t, orepa_apply(f, (orepa_operand[]){{.tensor = a}, {.tensor = b}, {.tensor = NULL}}));
}

static orepa_tensor *relu(trial *t, orepa_tensor *x) {
  return own(t, orepa_relu(x));
}

/* Places in a form where somebody may look at a map. */
enum { LOOK_NORM = 1, LOOK_SUM = 2, LOOK_RELU = 4, LOOK_LATER = 8, LOOKS = 16 };

static void look(trial *t, int looks, int at, orepa_tensor *map_) {
  if (map_ && (looks & at))
    result(t, map_);
}

static form make_form(trial *t, int kind, int looks, bool graph) {
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

static void form_results(trial *t, const form *f) {
  orepa_tensor *leaves[] = {f->x, f->r, f->weight, f->bias};
  for (int k = 0; k < 4; k++)
    result(t, orepa_grad(leaves[k]));
  result(t, f->mean);
  result(t, f->var);
}

/* Backward from y with a gradient that differs everywhere. */
static void backward_from(trial *t, orepa_tensor *y) {
  orepa_tensor *dy = some(t, orepa_tensor_dtype(y), orepa_rank(y), orepa_shape(y), 9);
  done(orepa_backward(y, dy, false));
}

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
    done(tensor_fill(to, 2));
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
  orepa_tensor *use = variant / FORMS / 4 ? own(t, read_by_max_pool(t, &f)) : NULL;
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
      cmocka_unit_test(test_every_op_over_a_promise),
      cmocka_unit_test(test_every_op_without_a_graph),
      cmocka_unit_test(test_looking_changes_no_bit),
      cmocka_unit_test(test_looking_changes_nothing_that_follows),
      cmocka_unit_test(test_writes_leave_promised_maps_right),
      cmocka_unit_test(test_in_place_ops_in_a_graph),
      cmocka_unit_test(test_a_changed_input_is_refused_alike),
      cmocka_unit_test(test_gradients_of_some_leaves),
      cmocka_unit_test(test_maps_with_many_consumers),
      cmocka_unit_test(test_expanded_gradients),
      cmocka_unit_test(test_other_ranks_and_nothing),
      cmocka_unit_test(test_a_map_is_stored_once_and_only_if_wanted),
      cmocka_unit_test(test_fused_convolutions_leave_their_inputs_promised),
      cmocka_unit_test(test_a_map_that_has_no_room_stays_promised),
      cmocka_unit_test(test_other_threads_promise_nothing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
