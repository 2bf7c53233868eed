/* random.c: the state of the random numbers; the numbers themselves are made by the devices (philox.h). */
#include <pthread.h>

#include "loader_thread.h"
#include "tensor/tensor.h"

static orepa_rng shared;
static _Thread_local orepa_rng own; /* of a loader's thread */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static orepa_rng *state(void) {
  return loader_thread_here() ? &own : &shared;
}

void orepa_manual_seed(uint64_t seed) {
  orepa_set_rng_state((orepa_rng){seed, 0});
}

orepa_rng orepa_rng_state(void) {
  pthread_mutex_lock(&lock);
  orepa_rng now = *state();
  pthread_mutex_unlock(&lock);
  return now;
}

void orepa_set_rng_state(orepa_rng wanted) {
  pthread_mutex_lock(&lock);
  *state() = wanted;
  pthread_mutex_unlock(&lock);
}

orepa_rng rng_draw(void) {
  pthread_mutex_lock(&lock);
  orepa_rng now = *state();
  state()->draws++;
  pthread_mutex_unlock(&lock);
  return now;
}

static orepa_tensor *draw(const char *op, bool normal, orepa_dtype dtype, const orepa_device *device, int rank,
                          const int64_t *shape) {
  orepa_tensor *t = tensor_new(dtype, device, rank, shape);
  if (!t)
    return NULL;
  if (dtype != OREPA_FLOAT32 && dtype != OREPA_FLOAT64) {
    error_set("%s: float32 or float64, not %s", op, orepa_dtype_name(dtype));
    return tensor_fail(t);
  }
  device_array to;
  if (tensor_writes(t, &to))
    return tensor_fail(t);
  orepa_rng rng = rng_draw();
  return DISPATCH(op, dtype, device, random, &to, normal, rng.seed, rng.draws) ? tensor_fail(t) : t;
}

orepa_tensor *orepa_rand(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape) {
  return draw("rand", false, dtype, device, rank, shape);
}

orepa_tensor *orepa_randn(orepa_dtype dtype, const orepa_device *device, int rank, const int64_t *shape) {
  return draw("randn", true, dtype, device, rank, shape);
}
