/* Gradients of batch norm, in training, in evaluation and frozen; and what becomes of its running statistics. */
#include "gradient_test.h"

/* Inputs: x, then those of weight, bias, running mean and variance that there are. */
typedef struct {
  orepa_norm norm;
  bool weight, bias, running;
} norm_options;

static orepa_tensor *batch_norm(orepa_tensor *const *inputs, const void *options) {
  const norm_options *o = options;
  orepa_tensor *x = *inputs++, *weight = o->weight ? *inputs++ : NULL, *bias = o->bias ? *inputs++ : NULL;
  orepa_tensor *mean = o->running ? *inputs++ : NULL, *var = o->running ? *inputs++ : NULL;
  return orepa_batch_norm(x, weight, bias, mean, var, &o->norm);
}

static gradient_case case_of(const norm_options *o, const case_input *x) {
  gradient_case c = {CASE(o->norm.training ? "training" : "evaluation", batch_norm, o, *x), .tolerance = 1e-4};
  const int64_t channels = x->shape[1];
  if (o->weight)
    c.inputs[c.count++] = (case_input){SIZES(channels), .low = 0.5, .high = 1.5};
  if (o->bias)
    c.inputs[c.count++] = (case_input){SIZES(channels)};
  if (o->running) {
    c.inputs[c.count++] = (case_input){SIZES(channels), .constant = true};
    c.inputs[c.count++] = (case_input){SIZES(channels), .low = 0.5, .high = 2, .constant = true};
  }
  return c;
}

static const case_input maps[] = {
    {SIZES(4, 3)},       {SIZES(2, 2, 3)},    {SIZES(2, 3, 2, 2)},    {SIZES(1, 2, 3, 2), .low = -5, .high = 20},
    {SIZES(3, 1, 1, 1)}, {SIZES(1, 5, 1, 2)}, {SIZES(2, 2, 2, 1, 2)}, {SIZES(1, 2, 1, 2, 2, 2)},
    {SIZES(0, 3)},       {SIZES(0, 2, 2, 2)}, {SIZES(2, 2, 0, 3)},    {SIZES(2, 0, 2, 2)},
};

/* With each choice of weight, bias and running statistics. */
static void check_norms(bool training) {
  for (int k = 0; k < COUNT_OF(maps); k++)
    for (unsigned choice = 0; choice < 8; choice++) {
      const norm_options o = {{1e-5, 0.1, training}, choice & 1, choice & 2, choice & 4};
      for (int layout = PLAIN; layout < EXPANDED && (o.running || training); layout++) {
        case_input x = maps[k];
        x.layout = (input_layout)layout;
        gradient_case c = case_of(&o, &x);
        check_case(&c);
      }
    }
}

static void training_differentiates_through_the_statistics(void **state) {
  (void)state;
  check_norms(true);
}

static void evaluation_is_affine_and_has_all_gradients(void **state) {
  (void)state;
  check_norms(false);
}

/* A channel without variance: only eps keeps its inverse deviation finite. */
static void a_constant_channel_has_finite_gradients(void **state) {
  (void)state;
  const norm_options o = {{1e-2, 0.1, true}, true, true, false};
  gradient_case c = case_of(&o, &(case_input){SIZES(2, 2), .values = LIST(3, 1, 3, 2)});
  check_case(&c);
}

/* ---- a frozen norm between layers that train ---- */

static orepa_tensor *frozen_between(orepa_tensor *const *inputs, const void *options) {
  const norm_options *frozen = options;
  const orepa_norm training = {1e-5, 0.1, true};
  const orepa_conv same = {{1, 1}, {1, 1}, {1, 1}, 1};
  orepa_tensor *mapped = orepa_conv2d(inputs[0], inputs[1], NULL, &same);
  orepa_tensor *fixed = orepa_batch_norm(mapped, inputs[2], inputs[3], inputs[4], inputs[5], &frozen->norm);
  orepa_tensor *active = orepa_relu(fixed), *y = orepa_batch_norm(active, inputs[2], NULL, NULL, NULL, &training);
  orepa_release(mapped);
  orepa_release(fixed);
  orepa_release(active);
  return y;
}

static void a_frozen_norm_passes_gradients_on(void **state) {
  (void)state;
  const norm_options frozen = {{1e-3, 0.1, false}, true, true, true};
  const gradient_case c = {CASE("frozen", frozen_between, &frozen, {SIZES(2, 2, 3, 3)}, {SIZES(3, 2, 3, 3)},
                                {SIZES(3), .low = 0.5, .high = 1.5}, {SIZES(3)}, {SIZES(3), .constant = true},
                                {SIZES(3), .low = 0.5, .high = 2, .constant = true}),
                           .tolerance = 1e-4};
  check_case(&c);
}

/* ---- running statistics ---- */

typedef struct {
  double mean, var;
} statistics;

/* Of one channel of x (n, channels, inner), as the formula has it; the variance is the unbiased one. */
static statistics channel_statistics(const double *x, int64_t n, int64_t channels, int64_t inner, int64_t c) {
  double sum = 0, squares = 0, count = (double)(n * inner);
  for (int64_t k = 0; k < n * inner; k++)
    sum += x[(k / inner * channels + c) * inner + k % inner];
  for (int64_t k = 0; k < n * inner; k++)
    squares += pow(x[(k / inner * channels + c) * inner + k % inner] - sum / count, 2);
  return (statistics){sum / count, squares / (count - 1)};
}

static void expect_channels(orepa_tensor *t, const double *wanted, double tolerance) {
  double *got = doubles_of(t);
  for (int64_t c = 0; c < orepa_count(t); c++)
    if (!case_near(got[c], wanted[c], tolerance, fabs(wanted[c])))
      fail_msg("channel %d is %.17g, not %.17g", (int)c, got[c], wanted[c]);
  free(got);
}

/* Three steps of training, and what the formula says after each. */
static void train_and_follow(const case_run *run, const case_input *in, double momentum) {
  const int64_t channels = in->shape[1], inner = sizes_product(in->rank - 2, in->shape + 2);
  const norm_options training = {{1e-5, momentum, true}, false, false, true};
  const double zeros[] = {0, 0, 0}, ones[] = {1, 1, 1};
  double means[] = {0, 0, 0}, vars[] = {1, 1, 1}, tolerance = run->dtype == OREPA_FLOAT64 ? 1e-12 : 1e-5;
  orepa_tensor *mean = tensor_of(run->dtype, run->device, 1, &channels, zeros),
               *var = tensor_of(run->dtype, run->device, 1, &channels, ones);
  for (int step = 0; step < 3; step++) {
    double *x = doubles_new(sizes_product(in->rank, in->shape));
    spread_values(x, sizes_product(in->rank, in->shape), -1 - step, 3, step);
    orepa_tensor *map = tensor_of(run->dtype, run->device, in->rank, in->shape, x);
    uint64_t mean_version = orepa_version(mean), var_version = orepa_version(var);
    orepa_tensor *y = batch_norm((orepa_tensor *[]){map, mean, var}, &training);
    assert_non_null(y);
    assert_true(orepa_version(mean) > mean_version && orepa_version(var) > var_version);
    for (int64_t c = 0; c < channels; c++) {
      statistics batch = channel_statistics(x, in->shape[0], channels, inner, c);
      means[c] = (1 - momentum) * means[c] + momentum * batch.mean;
      vars[c] = (1 - momentum) * vars[c] + momentum * batch.var;
    }
    expect_channels(mean, means, tolerance);
    expect_channels(var, vars, tolerance);
    orepa_release(y);
    orepa_release(map);
    free(x);
  }
  orepa_release(mean);
  orepa_release(var);
}

static void running_statistics_follow_the_formula(void **state) {
  (void)state;
  const case_input inputs[] = {{SIZES(2, 3)},       {SIZES(3, 2, 5)},       {SIZES(4, 3, 3, 2)},
                               {SIZES(1, 2, 1, 2)}, {SIZES(2, 2, 2, 1, 3)}, {SIZES(40, 3, 3, 3)}};
  const double momenta[] = {0.1, 0, 1};
  for (int k = 0; k < COUNT_OF(inputs); k++)
    for (int m = 0; m < COUNT_OF(momenta); m++) {
      train_and_follow(&(case_run){device_named("ref"), OREPA_FLOAT64, 0, false}, &inputs[k], momenta[m]);
      train_and_follow(&(case_run){device_named("ref"), OREPA_FLOAT32, 0, false}, &inputs[k], momenta[m]);
      train_and_follow(&(case_run){device_named("cpu"), OREPA_FLOAT32, 0, false}, &inputs[k], momenta[m]);
    }
}

/* Evaluation, and training on nothing. */
static void running_statistics_stay_when_nothing_is_learned(void **state) {
  (void)state;
  const int64_t channels = 2;
  const double before[] = {0.5, 3};
  for (int k = 0; k < 4; k++) {
    bool training = k % 2;
    const orepa_device *device = device_named(k < 2 ? "ref" : "cpu");
    const norm_options o = {{1e-5, 0.1, training}, false, false, true};
    orepa_tensor *mean = tensor_of(OREPA_FLOAT32, device, 1, &channels, before),
                 *var = tensor_of(OREPA_FLOAT32, device, 1, &channels, before),
                 *x = orepa_full(OREPA_FLOAT32, device, 2, (int64_t[]){training ? 0 : 4, 2}, 7);
    uint64_t version = orepa_version(mean);
    orepa_tensor *y = batch_norm((orepa_tensor *[]){x, mean, var}, &o);
    assert_non_null(y);
    assert_int_equal(orepa_version(mean), version);
    expect_channels(mean, before, 0);
    expect_channels(var, before, 0);
    orepa_release(y);
    orepa_release(x);
    orepa_release(mean);
    orepa_release(var);
  }
}

/* A later step of training changes the running statistics; the graph of an earlier evaluation keeps its own. */
static void a_graph_survives_the_next_update(void **state) {
  (void)state;
  const norm_options evaluation = {{1e-5, 0.5, false}, false, false, true},
                     training = {{1e-5, 0.5, true}, false, false, true};
  for (int k = 0; k < 2; k++) {
    const orepa_device *device = device_named(k ? "cpu" : "ref");
    const int64_t one = 1;
    const double four = 4, zero = 0, wanted[] = {0.5 / sqrt(1 + 1e-5 / 4), 0.5 / sqrt(1 + 1e-5 / 4)};
    orepa_tensor *x = orepa_arange(OREPA_FLOAT32, device, 1, 1, 2), *map = orepa_reshape(x, 2, (int64_t[]){2, 1}),
                 *mean = tensor_of(OREPA_FLOAT32, device, 1, &one, &zero),
                 *var = tensor_of(OREPA_FLOAT32, device, 1, &one, &four);
    assert_int_equal(orepa_set_requires_grad(map, true), 0);
    orepa_tensor *y = batch_norm((orepa_tensor *[]){map, mean, var}, &evaluation),
                 *z = batch_norm((orepa_tensor *[]){map, mean, var}, &training);
    orepa_tensor *dy = orepa_full(OREPA_FLOAT32, device, 2, (int64_t[]){2, 1}, 1);
    assert_int_equal(orepa_backward(y, dy, false), 0);
    expect_channels(orepa_grad(map), wanted, 1e-6);
    assert_int_equal(orepa_backward(z, dy, false), 0);
    orepa_tensor *all[] = {x, map, mean, var, y, z, dy};
    for (int n = 0; n < COUNT_OF(all); n++)
      orepa_release(all[n]);
  }
}

/* ---- wrong input ---- */

static orepa_tensor *norm_without_var(orepa_tensor *const *inputs, const void *options) {
  return orepa_batch_norm(inputs[0], NULL, NULL, inputs[1], NULL, &((const norm_options *)options)->norm);
}

static orepa_tensor *norm_types(orepa_tensor *const *inputs, const void *options) {
  orepa_tensor *wide = orepa_to(inputs[1], OREPA_FLOAT64, orepa_tensor_device(inputs[1]));
  orepa_tensor *y = orepa_batch_norm(inputs[0], wide, NULL, NULL, NULL, &((const norm_options *)options)->norm);
  orepa_release(wide);
  return y;
}

static void wrong_norms_are_named(void **state) {
  (void)state;
  const norm_options plain = {{1e-5, 0.1, true}, false, false, false}, weight = {{1e-5, 0.1, true}, true, false, false},
                     bias = {{1e-5, 0.1, true}, false, true, false}, running = {{1e-5, 0.1, true}, false, false, true},
                     evaluation = {{1e-5, 0.1, false}, false, false, false};
#define OF(options, ...)                                                                                               \
  { CASE("batch_norm", batch_norm, options, __VA_ARGS__) }
  const error_case cases[] = {
      {OF(&plain, {SIZES(3)}), WORDS("batch_norm", "input 3", "channels")},
      {OF(&plain, {SIZES(1, 3)}), WORDS("batch_norm", "1x3", "one value")},
      {OF(&plain, {SIZES(1, 3, 1, 1)}), WORDS("batch_norm", "1x3x1x1", "one value")},
      {OF(&evaluation, {SIZES(2, 3)}), WORDS("batch_norm", "evaluation", "running")},
      {OF(&weight, {SIZES(2, 3)}, {SIZES(2)}), WORDS("batch_norm", "weight", "float32 2", "float32 2x3")},
      {OF(&weight, {SIZES(2, 3)}, {SIZES(1, 3)}), WORDS("batch_norm", "weight", "float32 1x3")},
      {OF(&bias, {SIZES(2, 3)}, {SIZES(4)}), WORDS("batch_norm", "bias", "float32 4", "2x3")},
      {OF(&running, {SIZES(2, 3)}, {SIZES(2), .constant = true}, {SIZES(3), .constant = true}),
       WORDS("batch_norm", "running_mean", "float32 2", "2x3")},
      {OF(&running, {SIZES(2, 3)}, {SIZES(3), .constant = true}, {SIZES(4), .constant = true}),
       WORDS("batch_norm", "running_var", "float32 4", "2x3")},
      {{CASE("no variance", norm_without_var, &plain, {SIZES(2, 3)}, {SIZES(3)})},
       WORDS("batch_norm", "running_mean", "running_var")},
      {{CASE("types", norm_types, &plain, {SIZES(2, 3)}, {SIZES(3)})}, WORDS("batch_norm", "float64 3", "float32 2x3")},
  };
#undef OF
  check_errors(COUNT_OF(cases), cases);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(training_differentiates_through_the_statistics),
      cmocka_unit_test(evaluation_is_affine_and_has_all_gradients),
      cmocka_unit_test(a_constant_channel_has_finite_gradients),
      cmocka_unit_test(a_frozen_norm_passes_gradients_on),
      cmocka_unit_test(running_statistics_follow_the_formula),
      cmocka_unit_test(running_statistics_stay_when_nothing_is_learned),
      cmocka_unit_test(a_graph_survives_the_next_update),
      cmocka_unit_test(wrong_norms_are_named),
  };
  return RUN_GUARDED(tests);
}
