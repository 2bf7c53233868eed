/* loader.c: threads that make batches ahead. Batches have numbers: a thread takes the next one as long as it lies less
 * than `prefetch` beyond what was taken, and puts what it made into the number's slot of a ring; whoever takes waits
 * for the slot of the next number. So order is kept whoever is faster, and memory is bounded. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "loader_thread.h"
#include "orepa_data.h"
#include "tensor/tensor.h"

enum { MOST_THREADS = 1024, MOST_PREFETCH = 1 << 20 };

#define STOPS_AGAIN 0.1 /* seconds */

typedef struct {
  bool made;
  void *batch;   /* NULL: failed */
  char *message; /* of a failure; NULL: there was no memory for it */
  bool out_of_memory;
} batch_slot;

typedef struct {
  orepa_loader *loader;
  int number;
  pthread_t handle;
} loader_thread;

struct orepa_loader {
  orepa_loader_source source;
  pthread_mutex_t lock;
  pthread_cond_t work, made; /* something to do; something was done */
  loader_thread *threads;
  int count, begun, ended; /* threads; those whose begin has returned; those that do no more */
  bool stopping;
  batch_slot failure; /* of begin: `made` if there was one */
  uint64_t epoch;
  int64_t batches, next, taken; /* of the epoch: how many, the next to be made, the next to be taken */
  int prefetch;
  batch_slot *slots; /* prefetch of them */
  orepa_loader *older;
};

/* ---- what failed ---- */

static void note_failure(batch_slot *slot) {
  *slot = (batch_slot){.made = true, .message = strdup(orepa_error()), .out_of_memory = orepa_error_is_out_of_memory()};
}

static int tell_failure(const batch_slot *slot) {
  if (!slot->message)
    return error_out_of_memory("out of memory: no room for a loader's message");
  return slot->out_of_memory ? error_out_of_memory("%s", slot->message) : error_set("%s", slot->message);
}

static void slot_empty(const orepa_loader *loader, batch_slot *slot) {
  if (slot->batch)
    loader->source.drop(slot->batch);
  free(slot->message);
  *slot = (batch_slot){0};
}

/* ---- threads ---- */

bool orepa_on_loader_thread(void) {
  return loader_thread_here();
}

static bool may_make(const orepa_loader *loader) {
  return loader->next < loader->batches && loader->next < loader->taken + loader->prefetch;
}

/* With the lock held: makes batches until the loader stops. */
static void make_batches(orepa_loader *loader, void *state) {
  for (;;) {
    while (!loader->stopping && !may_make(loader))
      pthread_cond_wait(&loader->work, &loader->lock);
    if (loader->stopping)
      return;
    int64_t number = loader->next++;
    uint64_t epoch = loader->epoch;
    pthread_mutex_unlock(&loader->lock);
    void *batch = loader->source.make(state, epoch, number);
    pthread_mutex_lock(&loader->lock);
    batch_slot *slot = &loader->slots[number % loader->prefetch];
    if (batch)
      *slot = (batch_slot){.made = true, .batch = batch};
    else
      note_failure(slot);
    pthread_cond_broadcast(&loader->made);
  }
}

static void *thread_run(void *argument) {
  loader_thread *thread = argument;
  orepa_loader *loader = thread->loader;
  const orepa_loader_source *source = &loader->source;
  loader_thread_begin();
  void *state = source->begin ? source->begin(source->context, thread->number) : source->context;
  bool failed = source->begin && !state;
  pthread_mutex_lock(&loader->lock);
  loader->begun++;
  if (failed && !loader->failure.made)
    note_failure(&loader->failure);
  pthread_cond_broadcast(&loader->made);
  if (!failed)
    make_batches(loader, state);
  pthread_mutex_unlock(&loader->lock);
  if (!failed && source->end)
    source->end(state);
  loader_thread_end();
  pthread_mutex_lock(&loader->lock);
  loader->ended++;
  pthread_cond_broadcast(&loader->made);
  pthread_mutex_unlock(&loader->lock);
  return NULL;
}

/* Starts threads with all signals blocked; whether all could be. */
static bool start_threads(orepa_loader *loader, int count) {
  sigset_t all, before;
  int error = 0;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  for (; loader->count < count && !error; loader->count += !error) {
    loader_thread *thread = &loader->threads[loader->count];
    *thread = (loader_thread){.loader = loader, .number = loader->count};
    error = pthread_create(&thread->handle, NULL, thread_run, thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error)
    error_set("loader: thread %d of %d can't be started: %s", loader->count + 1, count, strerror(error));
  return !error;
}

static struct timespec after(double seconds) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  const double most = 1e9;
  seconds = seconds > 0 ? seconds < most ? seconds : most : 0;
  at.tv_sec += (time_t)seconds;
  at.tv_nsec += (long)(1e9 * (seconds - (double)(time_t)seconds));
  at.tv_sec += at.tv_nsec / 1000000000;
  at.tv_nsec %= 1000000000;
  return at;
}

/* Whether all threads have ended, within so many seconds. */
static bool have_ended(orepa_loader *loader, double seconds) {
  const struct timespec end = after(seconds);
  pthread_mutex_lock(&loader->lock);
  while (loader->ended < loader->count && pthread_cond_timedwait(&loader->made, &loader->lock, &end) != ETIMEDOUT)
    ;
  bool ended = loader->ended == loader->count;
  pthread_mutex_unlock(&loader->lock);
  return ended;
}

static void stop_threads(orepa_loader *loader) {
  pthread_mutex_lock(&loader->lock);
  loader->stopping = true;
  pthread_cond_broadcast(&loader->work);
  pthread_mutex_unlock(&loader->lock);
  do
    for (int k = 0; k < loader->count && loader->source.stop; k++)
      loader->source.stop(loader->source.context, k);
  while (!have_ended(loader, STOPS_AGAIN));
  for (int k = 0; k < loader->count; k++)
    pthread_join(loader->threads[k].handle, NULL);
  loader->count = loader->ended = 0;
}

/* ---- all that are open, for exit() ---- */

static struct {
  pthread_once_t once;
  pthread_mutex_t lock;
  orepa_loader *newest;
} open_loaders = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER};

static void stop_all(void) {
  if (loader_thread_here())
    return;
  pthread_mutex_lock(&open_loaders.lock);
  for (orepa_loader *loader = open_loaders.newest; loader; loader = loader->older)
    stop_threads(loader);
  pthread_mutex_unlock(&open_loaders.lock);
}

static void stop_all_at_exit(void) {
  atexit(stop_all);
}

static void list_loader(orepa_loader *loader) {
  pthread_once(&open_loaders.once, stop_all_at_exit);
  pthread_mutex_lock(&open_loaders.lock);
  loader->older = open_loaders.newest;
  open_loaders.newest = loader;
  pthread_mutex_unlock(&open_loaders.lock);
}

static void unlist_loader(orepa_loader *loader) {
  pthread_mutex_lock(&open_loaders.lock);
  for (orepa_loader **link = &open_loaders.newest; *link; link = &(*link)->older)
    if (*link == loader) {
      *link = loader->older;
      break;
    }
  pthread_mutex_unlock(&open_loaders.lock);
}

/* ---- opening and closing ---- */

static void loader_free(orepa_loader *loader) {
  for (int k = 0; k < loader->prefetch && loader->slots; k++)
    slot_empty(loader, &loader->slots[k]);
  slot_empty(loader, &loader->failure);
  pthread_cond_destroy(&loader->made);
  pthread_cond_destroy(&loader->work);
  pthread_mutex_destroy(&loader->lock);
  free(loader->threads);
  free(loader->slots);
  free(loader);
}

static orepa_loader *loader_allocate(const orepa_loader_source *source, int threads, int prefetch) {
  orepa_loader *loader = calloc(1, sizeof *loader);
  if (!loader)
    return NULL;
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_mutex_init(&loader->lock, NULL);
  pthread_cond_init(&loader->work, NULL);
  pthread_cond_init(&loader->made, &monotonic);
  pthread_condattr_destroy(&monotonic);
  loader->source = *source;
  loader->prefetch = prefetch;
  loader->slots = calloc((size_t)prefetch, sizeof *loader->slots);
  loader->threads = calloc((size_t)threads, sizeof *loader->threads);
  if (loader->slots && loader->threads)
    return loader;
  loader_free(loader);
  return NULL;
}

orepa_loader *orepa_loader_open(const orepa_loader_source *source, int threads, int prefetch) {
  if (loader_thread_here()) {
    error_set("loader: a thread that makes batches for one can't open another with threads");
    return NULL;
  }
  if (threads < 1 || threads > MOST_THREADS) {
    error_set("loader: 1 to %d threads, not %d", MOST_THREADS, threads);
    return NULL;
  }
  if (prefetch < 1 || prefetch > MOST_PREFETCH) {
    error_set("loader: a prefetch of 1 to %d batches, not %d", MOST_PREFETCH, prefetch);
    return NULL;
  }
  orepa_loader *loader = loader_allocate(source, threads, prefetch);
  if (!loader) {
    error_out_of_memory("loader: out of memory: no room for %d threads and %d batches", threads, prefetch);
    return NULL;
  }
  if (!start_threads(loader, threads)) {
    stop_threads(loader);
    loader_free(loader);
    return NULL;
  }
  list_loader(loader);
  return loader;
}

void orepa_loader_close(orepa_loader *loader) {
  if (!loader)
    return;
  unlist_loader(loader);
  stop_threads(loader);
  const orepa_loader_source source = loader->source;
  loader_free(loader);
  if (source.close)
    source.close(source.context);
}

/* ---- taking ---- */

/* With the lock held: 1 as soon as `done` is true, 0 when time is up, -1 if there is nothing to wait for any more. */
static int wait_for(orepa_loader *loader, bool (*done)(const orepa_loader *), double seconds) {
  const struct timespec end = after(seconds);
  bool in_time = true;
  while (!loader->failure.made && !loader->stopping && !done(loader)) {
    if (!in_time)
      return 0;
    in_time = pthread_cond_timedwait(&loader->made, &loader->lock, &end) != ETIMEDOUT;
  }
  if (loader->failure.made)
    return tell_failure(&loader->failure);
  return loader->stopping ? error_set("loader: it was stopped") : 1;
}

static bool is_ready(const orepa_loader *loader) {
  return loader->begun == loader->count;
}

static bool is_made(const orepa_loader *loader) {
  return loader->slots[loader->taken % loader->prefetch].made;
}

int orepa_loader_ready(orepa_loader *loader, double seconds) {
  pthread_mutex_lock(&loader->lock);
  int result = wait_for(loader, is_ready, seconds);
  pthread_mutex_unlock(&loader->lock);
  return result;
}

int64_t orepa_loader_start(orepa_loader *loader, uint64_t epoch) {
  if (loader->taken < loader->batches) /* only this thread changes them */
    return error_set("loader: %lld of %lld batches of epoch %llu were not taken",
                     (long long)(loader->batches - loader->taken), (long long)loader->batches,
                     (unsigned long long)loader->epoch);
  int64_t batches = loader->source.start(loader->source.context, epoch);
  if (batches < 0)
    return -1;
  pthread_mutex_lock(&loader->lock);
  loader->epoch = epoch;
  loader->batches = batches;
  loader->next = loader->taken = 0;
  pthread_cond_broadcast(&loader->work);
  pthread_mutex_unlock(&loader->lock);
  return batches;
}

int orepa_loader_take(orepa_loader *loader, double seconds, void **batch) {
  if (loader->taken == loader->batches)
    return error_set("loader: epoch %llu has no more batches", (unsigned long long)loader->epoch);
  pthread_mutex_lock(&loader->lock);
  int result = wait_for(loader, is_made, seconds);
  if (result == 1) {
    batch_slot *slot = &loader->slots[loader->taken % loader->prefetch];
    *batch = slot->batch;
    slot->batch = NULL;
    if (!*batch)
      result = tell_failure(slot);
    slot_empty(loader, slot);
    loader->taken++;
    pthread_cond_signal(&loader->work);
  }
  pthread_mutex_unlock(&loader->lock);
  return result;
}

/* ---- from thread to thread ---- */

orepa_tensor *orepa_hand_over(orepa_tensor *t) {
  if (tensor_materialize(t))
    return NULL;
  orepa_tensor *same = tensor_alias(t, t->rank, t->shape, t->strides, t->offset);
  if (!same)
    return NULL;
  same->is_view = t->is_view;
  if (!t->storage->handed_over) /* not written where others may read it */
    t->storage->handed_over = true;
  return same;
}
