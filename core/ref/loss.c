/* loss.c: softmax, its logarithm and cross-entropy, over the last axis. A row is one position of the other axes. */
#include "ref/ref.h"

/* One row of an array: where it starts and how it goes on. */
typedef struct {
  const device_array *array;
  int64_t start, stride, size;
} array_row;

static array_row row_of(const device_array *a, int64_t row) {
  device_array rows = ref_without(a, a->rank - 1);
  return (array_row){a, ref_at(&rows, row), a->strides[a->rank - 1], a->shape[a->rank - 1]};
}

static int64_t rows_of(const device_array *a) {
  device_array rows = ref_without(a, a->rank - 1);
  return ref_count(&rows);
}

static double row_get(array_row row, int64_t c) {
  return ref_get(row.array, row.start + c * row.stride);
}

static void row_set(array_row row, int64_t c, double value) {
  ref_set(row.array, row.start + c * row.stride, value);
}

/* log(sum of exp(x)), safe from overflow. */
static double log_sum(array_row x) {
  double largest = -INFINITY, sum = 0;
  for (int64_t c = 0; c < x.size; c++)
    largest = row_get(x, c) > largest ? row_get(x, c) : largest;
  for (int64_t c = 0; c < x.size; c++)
    sum += exp(row_get(x, c) - largest);
  return largest + log(sum);
}

/* ---- softmax ---- */

device_status ref_softmax_forward(device_context *context, bool log, const device_array *y, const device_array *x) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(x->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t r = 0; r < rows_of(x); r++) {
    array_row from = row_of(x, r), to = row_of(y, r);
    double z = log_sum(from);
    for (int64_t c = 0; c < from.size; c++)
      row_set(to, c, log ? row_get(from, c) - z : exp(row_get(from, c) - z));
  }
  return DEVICE_DONE;
}

device_status ref_softmax_backward(device_context *context, bool log, const device_array *dx, const device_array *dy,
                                   const device_array *y) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(y->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t r = 0; r < rows_of(y); r++) {
    array_row result = row_of(y, r), from = row_of(dy, r), to = row_of(dx, r);
    double sum = 0;
    for (int64_t c = 0; c < result.size; c++)
      sum += log ? row_get(from, c) : row_get(from, c) * row_get(result, c);
    for (int64_t c = 0; c < result.size; c++)
      row_set(to, c,
              log ? row_get(from, c) - exp(row_get(result, c)) * sum : row_get(result, c) * (row_get(from, c) - sum));
  }
  return DEVICE_DONE;
}

/* ---- cross-entropy: the target is (1 - smoothing) on the label, and smoothing / C on every class ---- */

static double row_loss(double smoothing, array_row logits, int64_t label, double logz) {
  double loss = (1 - smoothing) * (logz - row_get(logits, label));
  for (int64_t c = 0; c < logits.size && smoothing != 0; c++)
    loss += smoothing / (double)logits.size * (logz - row_get(logits, c));
  return loss;
}

device_status ref_cross_entropy_forward(device_context *context, double smoothing, int64_t ignore,
                                        const device_array *loss, const device_array *logz, const device_array *logits,
                                        const device_array *labels) {
  REF_ENTRY;
  if (!orepa_dtype_is_float(logits->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t r = 0; r < rows_of(logits); r++) {
    array_row from = row_of(logits, r);
    int64_t label = ref_get_integer(labels, ref_at(labels, r));
    bool ignored = label == ignore, offends = !ignored && (label < 0 || label >= from.size);
    double z = log_sum(from);
    if (!offends)
      ref_set(logz, ref_at(logz, r), z);
    if (offends && context->offence_position < 0) {
      context->offence = label;
      context->offence_position = r;
    }
    ref_set(loss, ref_at(loss, r), ignored || offends ? 0 : row_loss(smoothing, from, label, z));
  }
  return DEVICE_DONE;
}

device_status ref_cross_entropy_backward(device_context *context, double smoothing, int64_t ignore,
                                         const device_array *dlogits, const device_array *dloss,
                                         const device_array *logits, const device_array *labels,
                                         const device_array *logz) {
  REF_ENTRY;
  (void)context;
  if (!orepa_dtype_is_float(logits->dtype))
    return DEVICE_UNSUPPORTED;
  for (int64_t r = 0; r < rows_of(logits); r++) {
    array_row from = row_of(logits, r), to = row_of(dlogits, r);
    int64_t label = ref_get_integer(labels, ref_at(labels, r));
    double weight = ref_get(dloss, ref_at(dloss, r)), z = ref_get(logz, ref_at(logz, r));
    for (int64_t c = 0; c < from.size; c++) {
      double target = smoothing / (double)from.size + (c == label ? 1 - smoothing : 0);
      row_set(to, c, label == ignore ? 0 : weight * (exp(row_get(from, c) - z) - target));
    }
  }
  return DEVICE_DONE;
}
