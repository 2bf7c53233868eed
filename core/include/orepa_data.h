/* orepa_data.h: from dataset files to batches: idx files, the order of an epoch, batches of images and labels, and
 * loaders, whose threads make batches ahead.
 *
 * Everything here works on tensors of the device "cpu" and refuses others by name; batches go to another device with
 * orepa_to. No graph is recorded. What is random is a function of its arguments alone (Philox, keyed by `seed`): not of
 * threads, of the composition of batches, of the order of calls, nor of the generator behind orepa_rand, which it
 * leaves untouched. All functions may be called from several threads at once. As in orepa.h, a function that fails
 * returns NULL or -1 and leaves a message for orepa_error. */
#ifndef OREPA_DATA_H
#define OREPA_DATA_H

#include "orepa.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- idx files --------------------------------------------------------------------------------------------------- */

/* Reads an idx file, the format of MNIST (yann.lecun.com/exdb/mnist): two zero bytes, a type code, the rank, the sizes
 * (32 bits each), the elements in logical order; all big-endian. The file may be compressed by gzip, whatever its name.
 *
 * Codes 0x08 0x0C 0x0D 0x0E give uint8 int32 float32 float64; 0x09 and 0x0B, int8 and int16, are refused. The rank is 1
 * to OREPA_MAX_RANK; sizes of 0 are legal. A file that is shorter or longer than its header says is an error, and so is
 * a gzip stream that is damaged, cut off or followed by other bytes. Memory follows the bytes that are really there,
 * never what a header claims. */
OREPA_API orepa_tensor *orepa_load_idx(const char *path);
/* The same of a file's `size` bytes in memory; `name` stands for the path in messages. */
OREPA_API orepa_tensor *orepa_parse_idx(const char *name, const void *bytes, size_t size);

/* ---- the order of an epoch --------------------------------------------------------------------------------------- */

/* int64 (count): the numbers 0 ... count-1, shuffled by unbiased numbers (Fisher and Yates). */
OREPA_API orepa_tensor *orepa_permutation(int64_t count, uint64_t seed, uint64_t epoch);

/* ---- batches ----------------------------------------------------------------------------------------------------- */

/* How an image becomes a sample: padded, cropped, mirrored, normalised. {0}: the image as it is, bytes over 255. */
typedef struct {
  int64_t padding; /* pixels on each side; they are 0 after normalisation: in the image they would be the mean */
  int64_t crop[2]; /* height, width of the sample, at most those of the padded image; 0: as the image without padding */
  bool flip;       /* mirror left and right with probability 1/2 */
  bool augment;    /* true: random crops and flips; false: the centre of the image (the upper left of two), no flip */
  int channels;    /* entries of mean and deviation: the images' channels; not looked at if both are NULL */
  const float *mean, *deviation; /* by channel, in units of x/255 for bytes; NULL: all 0, all 1 */
  uint64_t seed, epoch;          /* with the image's index, what decides on crop and flip */
} orepa_image_transform;

/* images: uint8 or float32, (N, H, W) or (N, C, H, W), any strides. indices: int64 (B), positions from 0 to N-1.
 * Gives float32 (B, C, h, w), where x is (x/255 - mean[c]) / deviation[c] for uint8, rounded once, and
 * (x - mean[c]) * (1/deviation[c]) for float32. Every offset of the crop is equally likely, to within 2^-32 each. */
OREPA_API orepa_tensor *orepa_image_batch(orepa_tensor *images, orepa_tensor *indices,
                                          const orepa_image_transform *transform);
/* labels: int64, int32 or uint8 (N). indices as above. Gives int64 (B). */
OREPA_API orepa_tensor *orepa_label_batch(orepa_tensor *labels, orepa_tensor *indices);

/* The mean and the deviation (of the whole, divided by the number of pixels) of each channel, of x/255 for uint8: what
 * a transform wants. Images as above, at least one pixel; mean and deviation have room for C numbers, 1 for rank 3.
 * Bytes are counted in integers; floats are summed in float64 in two passes. The same bits at any number of threads. */
OREPA_API int orepa_image_statistics(orepa_tensor *images, double *mean, double *deviation);

/* ---- loaders ----------------------------------------------------------------------------------------------------- */

/* Threads that make the batches of an epoch ahead, each batch on one thread; they are taken one by one, in order. On
 * such a thread kernels run alone, ops record no graph, orepa_rand has a state of its own, and all signals are blocked.
 *
 * A loader is used by one thread, the one that opened it. exit() stops and joins the threads of all that are open; so
 * whoever calls it from one of these threads leaves without. */
typedef struct orepa_loader orepa_loader;

/* Whether the calling thread is one of those. */
OREPA_API bool orepa_on_loader_thread(void);

/* What makes the batches. Functions may be NULL but for start, make and drop; where one fails it leaves a message. */
typedef struct {
  void *context;
  /* Where epochs begin, while no thread makes a batch: how many batches there are, or -1. */
  int64_t (*start)(void *context, uint64_t epoch);
  /* On each thread (from 0) first: what make and end get; NULL: failed, and so does all that is taken. Without it they
   * get the context. */
  void *(*begin)(void *context, int thread);
  /* Batch `number` (from 0); NULL: failed, which the one who takes this batch is told. */
  void *(*make)(void *state, uint64_t epoch, int64_t number);
  /* On each thread last, if begin did not fail. */
  void (*end)(void *state);
  /* On the thread that closes, again and again: begin and make of this thread, if it is in one, are to end soon, with a
   * failure or not. */
  void (*stop)(void *context, int thread);
  /* A batch that nobody took; on any thread. */
  void (*drop)(void *batch);
  /* After the last thread has ended. */
  void (*close)(void *context);
} orepa_loader_source;

/* `threads` at least 1. `prefetch`, at least 1: how many batches may be made or being made that were not taken yet.
 * NULL: failed, and the source is not closed. */
OREPA_API orepa_loader *orepa_loader_open(const orepa_loader_source *source, int threads, int prefetch);
/* Waits until begin has returned on all threads, or for so many seconds. 1: it has; 0: not yet; -1: one failed. */
OREPA_API int orepa_loader_ready(orepa_loader *loader, double seconds);
/* Begins an epoch when the one before is taken to its end. How many batches it has; -1: failed. */
OREPA_API int64_t orepa_loader_start(orepa_loader *loader, uint64_t epoch);
/* The next batch of the epoch, which belongs to the caller. Waits for it, or for so many seconds. 1: here it is; 0: not
 * yet; -1: it failed, was the last one before, or the loader was stopped by exit(). */
OREPA_API int orepa_loader_take(orepa_loader *loader, double seconds, void **batch);
/* Stops and joins the threads, drops what was not taken, and frees the loader. NULL is legal. */
OREPA_API void orepa_loader_close(orepa_loader *loader);

/* The same elements for another thread: the same storage, computed now, outside of any graph. Threads of loaders can't
 * write to that storage from now on (an error); another thread that does so changes what all of them see. */
OREPA_API orepa_tensor *orepa_hand_over(orepa_tensor *t);

/* How the epochs of a dataset in memory are cut into batches. */
typedef struct {
  int64_t batch_size; /* at least 1 */
  bool shuffle;       /* by orepa_permutation of `seed` and the epoch; else in order */
  bool drop_last;     /* no batch is smaller than the others */
  uint64_t seed;
  orepa_image_transform transform; /* `epoch` is set for each */
} orepa_image_epochs;

typedef struct {
  orepa_tensor *images, *labels;
} orepa_image_batch_pair;

/* A loader whose batches are orepa_image_batch_pairs: what orepa_image_batch and orepa_label_batch give for the same
 * positions, to the bit. Images and labels must not be written while it is open. */
OREPA_API orepa_loader *orepa_image_loader(orepa_tensor *images, orepa_tensor *labels, const orepa_image_epochs *epochs,
                                           int threads, int prefetch);
OREPA_API void orepa_image_batch_pair_free(orepa_image_batch_pair *pair);

/* ---- random numbers of samples ----------------------------------------------------------------------------------- */

/* A state for what a sample draws: a function of these three alone. */
OREPA_API orepa_rng orepa_sample_rng(uint64_t seed, uint64_t epoch, int64_t sample);

#ifdef __cplusplus
}
#endif
#endif
