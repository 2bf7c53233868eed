/* Gradients of cross-entropy: smoothing, ignored labels, one loss a row, their sum and mean; and what it says of labels
 * that are none. */
#include "gradient_test.h"

enum { IGNORED = 255 };

typedef struct {
  orepa_cross_entropy_options loss;
  int64_t labels[12]; /* in logical order */
  bool sum;           /* over the rows */
} loss_options;

/* Labels of the logits' shape without the classes. */
static orepa_tensor *labels_for(orepa_tensor *logits, const int64_t *labels) {
  int64_t shape[OREPA_MAX_RANK];
  int rank = 0;
  for (int d = 0; d < orepa_rank(logits); d++)
    if (d != 1)
      shape[rank++] = orepa_shape(logits)[d];
  return orepa_from_host(OREPA_INT64, orepa_tensor_device(logits), rank, shape, labels);
}

static orepa_tensor *cross_entropy(orepa_tensor *const *inputs, const void *options) {
  const loss_options *o = options;
  orepa_tensor *labels = labels_for(inputs[0], o->labels), *y = orepa_cross_entropy(inputs[0], labels, &o->loss);
  orepa_release(labels);
  if (!y || !o->sum)
    return y;
  orepa_tensor *sum = orepa_reduce(OREPA_SUM, y, 0, NULL, false);
  orepa_release(y);
  return sum;
}

static const case_input logits[] = {{SIZES(4, 3), .low = -4, .high = 4},
                                    {SIZES(2, 3, 2, 2)},
                                    {SIZES(3, 1)},
                                    {SIZES(1, 5), .low = -9, .high = 9},
                                    {SIZES(2, 4, 3)},
                                    {SIZES(1, 3, 1, 2, 1, 2)},
                                    {SIZES(0, 3)},
                                    {SIZES(2, 3, 0, 2)}};

/* Labels in turn; every third is ignored, if any. */
static loss_options options_of(const case_input *x, double smoothing, bool ignoring, int reduction) {
  loss_options o = {{smoothing, IGNORED, reduction == 2}, {0}, reduction == 1};
  for (int k = 0; k < COUNT_OF(o.labels); k++)
    o.labels[k] = ignoring && k % 3 == 1 ? IGNORED : (k * 2 + 1) % x->shape[1];
  return o;
}

static void cross_entropy_has_its_gradient(void **state) {
  (void)state;
  const double smoothings[] = {0, 0.1, 1};
  for (int k = 0; k < COUNT_OF(logits); k++)
    for (int s = 0; s < COUNT_OF(smoothings); s++)
      for (int choice = 0; choice < 6; choice++) {
        const loss_options o = options_of(&logits[k], smoothings[s], choice % 2, choice / 2);
        const gradient_case c = {CASE("cross_entropy", cross_entropy, &o, logits[k])};
        check_cases_in_layouts(1, &c);
      }
}

static void the_mean_counts_only_rows_with_labels(void **state) {
  (void)state;
  const loss_options o = {{0, IGNORED, true}, {1, IGNORED, 0}, false};
  const gradient_case c = {CASE("cross_entropy", cross_entropy, &o, {SIZES(3, 2), .values = LIST(0, 0, 9, 7, 0, 0)}),
                           .rough = true, .dy = LIST(4)};
  check_values(&c, LIST(log(2)), LIST(1, -1, 0, 0, -1, 1));
}

static void without_any_label_loss_and_gradient_are_zero(void **state) {
  (void)state;
  const loss_options o = {{0.1, -1, true}, {-1, -1}, false};
  const gradient_case c = {CASE("cross_entropy", cross_entropy, &o, {SIZES(2, 2), .values = LIST(1, 2, 3, 4)}),
                           .rough = true, .dy = LIST(1)};
  check_values(&c, LIST(0), LIST(0, 0, 0, 0));
}

/* NaN in a row that counts shows; the gradient of other rows stays. */
static void nan_fills_its_row_alone(void **state) {
  (void)state;
  const loss_options o = {{0, IGNORED, false}, {0, 0, 1}, false};
  const gradient_case c = {CASE("cross_entropy", cross_entropy, &o, {SIZES(3, 2), .values = LIST(1, 1, NAN, 1, 0, 0)}),
                           .rough = true, .dy = LIST(1, 1, 1)};
  check_values(&c, LIST(log(2), NAN, log(2)), LIST(-0.5, 0.5, NAN, NAN, 0.5, -0.5));
}

static void cross_entropy_is_safe_from_overflow(void **state) {
  (void)state;
  const loss_options o = {{0, IGNORED, false}, {0, 1, 0}, false};
  const gradient_case c = {CASE("cross_entropy", cross_entropy, &o,
                                {SIZES(3, 2), .values = LIST(10000, -10000, 10000, -10000, -INFINITY, -INFINITY)}),
                           .rough = true, .dy = LIST(1, 1, 0)};
  case_values v = values_new(&c);
  for (int k = 0; k < 2; k++) {
    case_run run = {device_named(k ? "cpu" : "ref"), OREPA_FLOAT32, 1, false};
    case_result r = run_case(&c, &v, &run);
    case_same(&c, "loss", 2, r.y, LIST(0, 20000), 0);
    case_same(&c, "gradient", 4, r.gradients[0], LIST(0, 0, 1, -1), 0);
    result_free(&r);
  }
  values_free(&v);
}

/* ---- labels that are none ---- */

static void labels_out_of_range_are_named_and_forgotten(void **state) {
  (void)state;
  const loss_options high = {{0, IGNORED, true}, {0, 1, 3, 7}, false},
                     low = {{0, IGNORED, false}, {0, -1, 9, 0}, false}, minus = {{0, -1, true}, {0, -1, -2, 0}, false},
                     good = {{0, IGNORED, true}, {0, 1, 2, 0}, false};
  const error_case cases[] = {
      {{CASE("cross_entropy", cross_entropy, &high, {SIZES(4, 3)})},
       WORDS("cross_entropy", "label 3", "position 3", "0 ... 2", "4x3")},
      {{CASE("cross_entropy", cross_entropy, &low, {SIZES(1, 3, 2, 2)})},
       WORDS("cross_entropy", "label -1", "position 2", "0 ... 2", "1x3x2x2")},
      {{CASE("cross_entropy", cross_entropy, &minus, {SIZES(4, 2)})},
       WORDS("cross_entropy", "label -2", "position 3", "0 ... 1", "4x2")},
      {{CASE("cross_entropy", cross_entropy, &high, {SIZES(4, 3), .layout = PERMUTED})}, WORDS("label 3")},
  };
  const gradient_case fine = {CASE("cross_entropy", cross_entropy, &good, {SIZES(4, 3)})};
  check_errors(COUNT_OF(cases), cases);
  check_case(&fine);
}

/* ---- wrong input ---- */

/* Labels of the type and shape that the options of the case say. */
typedef struct {
  orepa_cross_entropy_options loss;
  orepa_dtype dtype;
  int rank;
  int64_t shape[OREPA_MAX_RANK];
  bool elsewhere; /* on the other device */
} wrong_options;

static orepa_tensor *with_labels(orepa_tensor *const *inputs, const void *options) {
  const wrong_options *o = options;
  const orepa_device *device = orepa_tensor_device(inputs[0]);
  if (o->elsewhere)
    device = device_named(strcmp(orepa_device_name(device), "cpu") ? "cpu" : "ref");
  orepa_tensor *labels = orepa_full(o->dtype, device, o->rank, o->shape, 0);
  orepa_tensor *y = orepa_cross_entropy(inputs[0], labels, &o->loss);
  orepa_release(labels);
  return y;
}

static void wrong_losses_are_named(void **state) {
  (void)state;
  const wrong_options rows = {{0, IGNORED, true}, OREPA_INT64, SIZES(3), .elsewhere = false},
                      rank = {{0, IGNORED, true}, OREPA_INT64, SIZES(2, 1), .elsewhere = false},
                      type = {{0, IGNORED, true}, OREPA_INT32, SIZES(2), .elsewhere = false},
                      device = {{0, IGNORED, true}, OREPA_INT64, SIZES(2), .elsewhere = true},
                      much = {{1.5, IGNORED, true}, OREPA_INT64, SIZES(2), .elsewhere = false},
                      nan = {{NAN, IGNORED, true}, OREPA_INT64, SIZES(2), .elsewhere = false};
#define OF(options, ...)                                                                                               \
  { CASE("cross_entropy", with_labels, options, {__VA_ARGS__}) }
  const error_case cases[] = {
      {OF(&rows, SIZES(2, 4)), WORDS("cross_entropy", "float32 2x4", "int64 3")},
      {OF(&rank, SIZES(2, 4)), WORDS("cross_entropy", "float32 2x4", "int64 2x1")},
      {OF(&rows, SIZES(3)), WORDS("cross_entropy", "float32 3", "int64 3")},
      {OF(&type, SIZES(2, 4)), WORDS("cross_entropy", "float32 2x4", "int32 2")},
      {OF(&device, SIZES(2, 4)), WORDS("cross_entropy", "'ref'", "'cpu'")},
      {OF(&much, SIZES(2, 4)), WORDS("cross_entropy", "label_smoothing", "1.5")},
      {OF(&nan, SIZES(2, 4)), WORDS("cross_entropy", "label_smoothing", "nan")},
  };
#undef OF
  check_errors(COUNT_OF(cases), cases);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(cross_entropy_has_its_gradient),
      cmocka_unit_test(the_mean_counts_only_rows_with_labels),
      cmocka_unit_test(without_any_label_loss_and_gradient_are_zero),
      cmocka_unit_test(nan_fills_its_row_alone),
      cmocka_unit_test(cross_entropy_is_safe_from_overflow),
      cmocka_unit_test(labels_out_of_range_are_named_and_forgotten),
      cmocka_unit_test(wrong_losses_are_named),
  };
  return RUN_GUARDED(tests);
}
