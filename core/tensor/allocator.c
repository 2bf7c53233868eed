/* allocator.c: the caching allocator: freed blocks are kept and reused, so that a training step after the first asks
 * the system for no memory; and the contexts of the devices, which hold its books.
 *
 * Blocks are kept by size class: eight steps to each power of two, at least 64 bytes, so that at most an eighth of a
 * block is wasted. Where the device lets large ones be divided, they are whole pages instead, cut from what was freed
 * and joined again: a network's maps grow smaller from stage to stage, and the memory of one stage serves the others.
 */
#include <pthread.h>
#include <stdlib.h>

#include "loader_thread.h"
#include "ranges.h"
#include "tensor/tensor.h"

enum { STEPS = 8, CLASSES = 64 * STEPS, SMALLEST = 64, MAX_DEVICES = 8 };

/* Kept blocks of one class. The list is host memory: a block may be one that the host cannot touch. */
typedef struct {
  void **blocks;
  size_t count, capacity;
} block_list;

typedef struct {
  device_context context;
  pthread_mutex_t lock;
  block_list free[CLASSES];
  range_set free_ranges;
  char *end; /* of the last block that the system gave for them */
  orepa_memory_info info;
  size_t wanted_limit; /* set by the user; 0: follow the system */
} device_books;

static device_books books[MAX_DEVICES];
static atomic_int devices; /* only the books before it are looked at without the lock */
static atomic_size_t live_everywhere;
static pthread_mutex_t devices_lock = PTHREAD_MUTEX_INITIALIZER;

/* A loader's thread has contexts of its own: scratch and offences belong to the call. */
static _Thread_local device_context own_contexts[MAX_DEVICES];

static void *workspace(device_context *context, size_t bytes) {
  if (bytes > context->workspace_bytes) {
    allocator_put(context->device, context->workspace_memory, context->workspace_bytes);
    context->workspace_bytes = 0;
    context->workspace_memory = allocator_get(context->device, bytes);
    if (!context->workspace_memory)
      return NULL;
    context->workspace_bytes = bytes;
  }
  return context->workspace_memory;
}

static device_books *books_of(const orepa_device *device) {
  for (int k = 0; k < devices; k++)
    if (books[k].context.device == device)
      return &books[k];
  pthread_mutex_lock(&devices_lock);
  device_books *found = NULL;
  for (int k = 0; k < devices && !found; k++)
    if (books[k].context.device == device)
      found = &books[k];
  if (!found) {
    found = &books[devices];
    found->context.device = device;
    found->context.workspace = workspace;
    found->context.offence_position = -1;
    pthread_mutex_init(&found->lock, NULL);
    devices++;
  }
  pthread_mutex_unlock(&devices_lock);
  return found;
}

device_context *device_context_of(const orepa_device *device) {
  device_books *b = books_of(device);
  if (!loader_thread_here())
    return &b->context;
  device_context *own = &own_contexts[b - books];
  if (!own->device)
    *own = (device_context){
        .device = device, .workspace = workspace, .accurate = b->context.accurate, .offence_position = -1};
  return own;
}

void allocator_end_thread(void) {
  for (int k = 0; k < MAX_DEVICES; k++) {
    device_context *own = &own_contexts[k];
    if (own->device)
      allocator_put(own->device, own->workspace_memory, own->workspace_bytes);
    *own = (device_context){0};
  }
}

/* The class of a size, and the size rounded up to it. */
static int size_class(size_t *bytes) {
  size_t size = *bytes < SMALLEST ? SMALLEST : *bytes;
  int power = 63 - __builtin_clzll(size);
  size_t step = (size_t)1 << power >> 3; /* an eighth of the power of two below */
  size_t steps = (size - ((size_t)1 << power) + step - 1) / step;
  *bytes = ((size_t)1 << power) + steps * step;
  return power * STEPS + (int)steps; /* steps == 8 is the next power's class 0 */
}

static bool is_divided(const device_books *b, size_t bytes) {
  size_t least = b->context.device->divisible;
  return least && bytes >= least;
}

static size_t whole_pages(size_t bytes) {
  return (bytes + DEVICE_PAGE - 1) / DEVICE_PAGE * DEVICE_PAGE;
}

/* The size of the block for so many bytes. */
static size_t block_size(const device_books *b, size_t wanted) {
  if (is_divided(b, wanted))
    return whole_pages(wanted);
  size_class(&wanted);
  return wanted;
}

static void give_back_all(device_books *b) {
  while (b->free_ranges.count) {
    address_range range = b->free_ranges.list[--b->free_ranges.count];
    b->context.device->deallocate(&b->context, range.start, range.bytes);
    b->info.cached -= range.bytes;
  }
  for (int k = 0; k < CLASSES; k++) {
    block_list *list = &b->free[k];
    size_t size = ((size_t)1 << k / STEPS) + (size_t)(k % STEPS) * ((size_t)1 << k / STEPS >> 3);
    for (size_t n = 0; n < list->count; n++) {
      b->context.device->deallocate(&b->context, list->blocks[n], size);
      b->info.cached -= size;
    }
    list->count = 0;
  }
}

enum { LARGE = 1 << 20, SLACK = 16 /* a part of what is held */ };
#define TOO_LARGE (SIZE_MAX / 4) /* bytes that are refused unasked: sums of smaller ones don't overflow */

/* The limit is read again whenever the system is asked for a large block: others use memory too. */
static size_t limit_of(device_books *b, size_t bytes) {
  if (b->wanted_limit)
    return b->info.limit = b->wanted_limit;
  if (!b->info.limit || bytes >= LARGE)
    b->info.limit = b->info.live + b->info.cached + b->context.device->available(&b->context);
  return b->info.limit;
}

static void *ask_system(device_books *b, size_t bytes) {
  if (b->info.live + b->info.cached + bytes > limit_of(b, bytes)) {
    give_back_all(b);
    if (b->info.live + bytes > limit_of(b, LARGE))
      return NULL;
  }
  b->info.system++;
  void *memory = b->context.device->allocate(&b->context, bytes);
  if (!memory) {
    give_back_all(b);
    memory = b->context.device->allocate(&b->context, bytes);
  }
  return memory;
}

/* ---- blocks that are kept; `bytes` is a block's size ---- */

static void *take_kept(device_books *b, size_t bytes) {
  void *memory = NULL;
  block_list *list = &b->free[size_class(&(size_t){bytes})];
  if (is_divided(b, bytes))
    memory = ranges_take(&b->free_ranges, bytes);
  else if (list->count)
    memory = list->blocks[--list->count];
  if (memory)
    b->info.cached -= bytes;
  return memory;
}

static bool list_has_room(block_list *list) {
  if (list->count < list->capacity)
    return true;
  size_t capacity = list->capacity ? 2 * list->capacity : 16;
  void **blocks = realloc(list->blocks, capacity * sizeof *blocks);
  if (!blocks)
    return false;
  list->blocks = blocks;
  list->capacity = capacity;
  return true;
}

/* False: there is no memory for the list. */
static bool keep_range(device_books *b, void *memory, size_t bytes) {
  if (!ranges_put(&b->free_ranges, memory, bytes))
    return false;
  b->info.cached += bytes;
  return true;
}

static bool keep(device_books *b, void *memory, size_t bytes) {
  if (is_divided(b, bytes))
    return keep_range(b, memory, bytes);
  block_list *list = &b->free[size_class(&(size_t){bytes})];
  if (!list_has_room(list))
    return false;
  list->blocks[list->count++] = memory;
  b->info.cached += bytes;
  return true;
}

/* A block where no range has room. The last range grows by what it lacks, if the system's next memory lies behind it;
 * and by some more: where blocks lie differs a little from step to step, and what a step leaves free is in pieces. Less
 * than is divided would be a small block, which lies elsewhere. */
static void *grow(device_books *b, size_t bytes) {
  if (!is_divided(b, bytes))
    return ask_system(b, bytes);
  const range_set *set = &b->free_ranges;
  const address_range *last = set->count ? &set->list[set->count - 1] : NULL;
  size_t held = b->info.live + b->info.cached, wanted = bytes, more = whole_pages(held / SLACK);
  if (last && last->start + last->bytes == b->end)
    wanted -= last->bytes;
  if (held + wanted + more <= limit_of(b, wanted + more))
    wanted += more;
  if (wanted < b->context.device->divisible)
    wanted = b->context.device->divisible;
  char *memory = ask_system(b, wanted);
  if (!memory)
    return wanted == bytes ? NULL : ask_system(b, bytes);
  b->end = memory + wanted;
  if (!keep_range(b, memory, wanted)) {
    b->context.device->deallocate(&b->context, memory, wanted);
    return NULL;
  }
  memory = take_kept(b, bytes);
  return memory ? memory : ask_system(b, bytes); /* it lies elsewhere */
}

/* ---- blocks that are used ---- */

void *allocator_get(const orepa_device *device, size_t wanted) {
  device_books *b = books_of(device);
  size_t bytes = block_size(b, wanted < TOO_LARGE ? wanted : TOO_LARGE);
  pthread_mutex_lock(&b->lock);
  void *memory = take_kept(b, bytes);
  if (!memory && wanted < TOO_LARGE)
    memory = grow(b, bytes);
  if (memory) {
    b->info.live += bytes;
    atomic_fetch_add_explicit(&live_everywhere, bytes, memory_order_relaxed);
    if (b->info.live > b->info.peak)
      b->info.peak = b->info.live;
  } else {
    limit_of(b, LARGE); /* for the message */
  }
  orepa_memory_info info = b->info;
  pthread_mutex_unlock(&b->lock);
  if (!memory)
    error_out_of_memory("out of memory: %zu bytes wanted on '%s', where %zu are in use, %zu kept for reuse, and the "
                        "limit is %zu",
                        wanted, device->name, info.live, info.cached, info.limit);
  return memory;
}

void allocator_put(const orepa_device *device, void *memory, size_t wanted) {
  if (!memory)
    return;
  device_books *b = books_of(device);
  size_t bytes = block_size(b, wanted);
  pthread_mutex_lock(&b->lock);
  b->info.live -= bytes;
  atomic_fetch_sub_explicit(&live_everywhere, bytes, memory_order_relaxed);
  bool fits = !b->wanted_limit || b->info.live + b->info.cached + bytes <= b->wanted_limit;
  if (!fits || !keep(b, memory, bytes))
    device->deallocate(&b->context, memory, bytes);
  pthread_mutex_unlock(&b->lock);
}

size_t orepa_memory_live(void) {
  return atomic_load_explicit(&live_everywhere, memory_order_relaxed);
}

orepa_memory_info orepa_memory(const orepa_device *device) {
  device_books *b = books_of(device);
  pthread_mutex_lock(&b->lock);
  limit_of(b, LARGE);
  orepa_memory_info info = b->info;
  pthread_mutex_unlock(&b->lock);
  return info;
}

void orepa_reset_peak(const orepa_device *device) {
  device_books *b = books_of(device);
  pthread_mutex_lock(&b->lock);
  b->info.peak = b->info.live;
  pthread_mutex_unlock(&b->lock);
}

void orepa_set_memory_limit(const orepa_device *device, size_t bytes) {
  device_books *b = books_of(device);
  pthread_mutex_lock(&b->lock);
  b->wanted_limit = bytes;
  b->info.limit = bytes;
  if (bytes && b->info.live + b->info.cached > bytes)
    give_back_all(b);
  pthread_mutex_unlock(&b->lock);
}

void orepa_empty_cache(const orepa_device *device) {
  device_books *b = books_of(device);
  pthread_mutex_lock(&b->lock);
  give_back_all(b);
  pthread_mutex_unlock(&b->lock);
}
