/* sgd.c: a step of stochastic gradient descent in one pass over all parameters. They are cut into pieces of one size as
 * if they lay behind each other, so that many small ones and a few large ones keep all threads busy alike. */
#include "cpu/kernels/kernels.h"

enum {
  PIECE = 8192,         /* elements */
  PARALLEL_FROM = 32768 /* elements */
};

/* g = gradient + decay * p; v = momentum * v + g; p -= rate * (nesterov ? g + momentum * v : v). */
typedef struct {
  float rate, decay, momentum;
  bool nesterov;
} sgd_step;

static void step_plain(float *restrict p, const float *restrict gradient, int64_t count, sgd_step s) {
  float factor = s.nesterov ? 1 + s.momentum : 1; /* v is g */
  for (int64_t k = 0; k < count; k++)
    p[k] -= s.rate * (factor * (gradient[k] + s.decay * p[k]));
}

static void step_momentum(float *restrict p, const float *restrict gradient, float *restrict v, int64_t count,
                          sgd_step s) {
  for (int64_t k = 0; k < count; k++) {
    v[k] = s.momentum * v[k] + (gradient[k] + s.decay * p[k]);
    p[k] -= s.rate * v[k];
  }
}

static void step_nesterov(float *restrict p, const float *restrict gradient, float *restrict v, int64_t count,
                          sgd_step s) {
  for (int64_t k = 0; k < count; k++) {
    float g = gradient[k] + s.decay * p[k];
    v[k] = s.momentum * v[k] + g;
    p[k] -= s.rate * (g + s.momentum * v[k]);
  }
}

/* Elements first ... last - 1 of a parameter. */
static void step_some(const orepa_sgd_options *options, const device_sgd_item *item, int64_t first, int64_t last) {
  sgd_step s = {(float)item->rate, (float)item->decay, (float)options->momentum, options->nesterov};
  float *p = (float *)item->parameter.data + first, *v = (float *)item->velocity.data;
  const float *gradient = (const float *)item->gradient.data + first;
  if (!v)
    step_plain(p, gradient, last - first, s);
  else if (s.nesterov)
    step_nesterov(p, gradient, v + first, last - first, s);
  else
    step_momentum(p, gradient, v + first, last - first, s);
}

static int64_t count_of(const device_array *a) {
  int64_t count = 1;
  for (int d = 0; d < a->rank; d++)
    count *= a->shape[d];
  return count;
}

/* The last parameter that starts at or before an element. */
static int item_at(const int64_t *starts, int count, int64_t element) {
  int low = 0, high = count;
  while (high - low > 1) {
    int middle = low + (high - low) / 2;
    if (starts[middle] <= element)
      low = middle;
    else
      high = middle;
  }
  return low;
}

device_status KERNEL(sgd)(device_context *context, const orepa_sgd_options *options, int count,
                          const device_sgd_item *items) {
  for (int n = 0; n < count; n++) {
    const device_sgd_item *item = &items[n];
    if (item->parameter.dtype != OREPA_FLOAT32 || item->gradient.dtype != OREPA_FLOAT32 ||
        (item->velocity.data && item->velocity.dtype != OREPA_FLOAT32))
      return DEVICE_UNSUPPORTED;
  }
  int64_t *starts = context->workspace(context, (size_t)(count + 1) * sizeof *starts); /* starts[count]: the end */
  if (!starts)
    return DEVICE_FAILED;
  starts[0] = 0;
  for (int n = 0; n < count; n++)
    starts[n + 1] = starts[n] + count_of(&items[n].parameter);
  int64_t total = starts[count];
#pragma omp parallel for schedule(static) if (total >= PARALLEL_FROM)
  for (int64_t first = 0; first < total; first += PIECE) {
    int64_t last = total - first < PIECE ? total : first + PIECE;
    for (int n = item_at(starts, count, first); n < count && starts[n] < last; n++) {
      int64_t low = first > starts[n] ? first : starts[n], high = last < starts[n + 1] ? last : starts[n + 1];
      if (low < high)
        step_some(options, &items[n], low - starts[n], high - starts[n]);
    }
  }
  return DEVICE_DONE;
}
