/* image_loader.c: a loader of labelled images in memory: its threads cut, mirror and normalise (batch.c). */
#include <stdlib.h>
#include <string.h>

#include "orepa_data.h"
#include "tensor/tensor.h"

typedef struct {
  orepa_tensor *images, *labels;
  orepa_image_epochs epochs;
  float *statistics;   /* where epochs.transform's mean and deviation lie */
  orepa_tensor *order; /* of the epoch */
} image_source;

static void source_close(void *context) {
  image_source *source = context;
  orepa_release(source->images);
  orepa_release(source->labels);
  orepa_release(source->order);
  free(source->statistics);
  free(source);
}

static int64_t source_start(void *context, uint64_t epoch) {
  image_source *source = context;
  const int64_t size = source->images->shape[0], batch = source->epochs.batch_size;
  orepa_tensor *order = source->epochs.shuffle ? orepa_permutation(size, source->epochs.seed, epoch)
                                               : orepa_arange(OREPA_INT64, cpu_device(), 0, 1, size);
  if (!order)
    return -1;
  orepa_release(source->order);
  source->order = order;
  return size / batch + (!source->epochs.drop_last && size % batch > 0);
}

void orepa_image_batch_pair_free(orepa_image_batch_pair *pair) {
  if (!pair)
    return;
  orepa_release(pair->images);
  orepa_release(pair->labels);
  free(pair);
}

static void drop(void *pair) {
  orepa_image_batch_pair_free(pair);
}

static orepa_image_batch_pair *make_pair(image_source *source, orepa_tensor *indices, uint64_t epoch) {
  orepa_image_transform transform = source->epochs.transform;
  transform.epoch = epoch;
  orepa_image_batch_pair *pair = calloc(1, sizeof *pair);
  if (!pair) {
    error_out_of_memory("loader: out of memory: no room for a batch");
    return NULL;
  }
  pair->images = orepa_image_batch(source->images, indices, &transform);
  pair->labels = pair->images ? orepa_label_batch(source->labels, indices) : NULL;
  if (pair->labels)
    return pair;
  orepa_image_batch_pair_free(pair);
  return NULL;
}

static void *make(void *state, uint64_t epoch, int64_t number) {
  image_source *source = state;
  const int64_t first = number * source->epochs.batch_size, left = source->order->shape[0] - first;
  const int64_t count = left < source->epochs.batch_size ? left : source->epochs.batch_size;
  orepa_tensor *indices = tensor_alias(source->order, 1, &count, &(int64_t){1}, first);
  orepa_image_batch_pair *pair = indices ? make_pair(source, indices, epoch) : NULL;
  orepa_release(indices);
  return pair;
}

/* The transform's mean and deviation as memory of the source's own. */
static int copy_statistics(image_source *source) {
  orepa_image_transform *transform = &source->epochs.transform;
  const size_t channels = (size_t)(transform->channels > 0 ? transform->channels : 0), bytes = channels * sizeof(float);
  source->statistics = malloc(2 * bytes + 1);
  if (!source->statistics)
    return error_out_of_memory("loader: out of memory: no room for %zu channels", channels);
  if (transform->mean)
    transform->mean = memcpy(source->statistics, transform->mean, bytes);
  if (transform->deviation)
    transform->deviation = memcpy(source->statistics + channels, transform->deviation, bytes);
  return 0;
}

static int epochs_check(const orepa_tensor *images, const orepa_tensor *labels, const orepa_image_epochs *epochs) {
  if (epochs->batch_size < 1)
    return error_set("loader: a batch of %lld images", (long long)epochs->batch_size);
  if (!images->rank || !labels->rank || images->shape[0] != labels->shape[0])
    return error_set("loader: images %s and labels %s: not as many of both", tensor_text(images), tensor_text(labels));
  return 0;
}

orepa_loader *orepa_image_loader(orepa_tensor *images, orepa_tensor *labels, const orepa_image_epochs *epochs,
                                 int threads, int prefetch) {
  if (epochs_check(images, labels, epochs))
    return NULL;
  image_source *source = calloc(1, sizeof *source);
  if (!source) {
    error_out_of_memory("loader: out of memory: no room for a source");
    return NULL;
  }
  source->epochs = *epochs;
  source->images = orepa_hand_over(images);
  source->labels = orepa_hand_over(labels);
  const orepa_loader_source functions = {
      .context = source, .start = source_start, .make = make, .drop = drop, .close = source_close};
  orepa_loader *loader = NULL;
  if (source->images && source->labels && !copy_statistics(source))
    loader = orepa_loader_open(&functions, threads, prefetch);
  if (!loader)
    source_close(source);
  return loader;
}
