/* host_memory.c: how much memory is left and blocks of it. Linux kills where malloc never fails, so what may be
 * allocated is asked of /proc/meminfo and of the control groups (version 1 or 2) before. */
#define _GNU_SOURCE
#include "host_memory.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"
#include "ranges.h"

enum { TEXT = 4096, ALIGNMENT = 64, SPARE = 512 << 20 };
enum { IN_REGION = 256 << 10, LARGE = 4 << 20, HUGE_PAGE = 2 << 20, SLAB = 32 << 20, LEAST_REGION = 1 << 30 };

/* ---- what is left ---- */

/* The number after `key` at the start of a line; -1 where there is no such file, line or number ("max"). */
static int64_t number_in(const char *path, const char *key) {
  FILE *file = fopen(path, "r");
  char line[256];
  int64_t number = -1;
  if (!file)
    return -1;
  while (fgets(line, sizeof line, file))
    if (!strncmp(line, key, strlen(key))) {
      char *start = line + strlen(key), *end;
      number = strtoll(start, &end, 10);
      if (end == start)
        number = -1;
      break;
    }
  fclose(file);
  return number;
}

/* How the two versions of control groups spell the same; `controller` is "" in version 2, which has one tree. */
typedef struct {
  const char *controller, *mount, *limit, *usage, *cache;
} group_tree;

static const group_tree trees[] = {
    {"", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "},
    {"", "/sys/fs/cgroup/unified", "memory.max", "memory.current", "inactive_file "},
    {"memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "},
};

/* This process's group in the tree, from a line like "4:cpu,memory:/a/b"; "" if none. */
static void group_of(const char *root, const group_tree *tree, char *group) {
  char path[TEXT + 32], line[TEXT];
  group[0] = 0;
  snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
  FILE *file = fopen(path, "r");
  if (!file)
    return;
  while (fgets(line, sizeof line, file)) {
    char *controllers = strchr(line, ':'), *end = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!end)
      continue;
    *controllers = *end = ',';
    line[strcspn(line, "\n")] = 0;
    size_t length = strlen(tree->controller);
    for (char *at = controllers; at < end; at = strchr(at + 1, ','))
      if (!strncmp(at + 1, tree->controller, length) && at[1 + length] == ',' && end[1] == '/')
        strcpy(group, end[2] ? end + 1 : "");
  }
  fclose(file);
}

/* What one group still allows; INT64_MAX without a limit. The kernel drops unused file pages when it must. */
static int64_t left_in_group(const char *root, const group_tree *tree, const char *group) {
  char path[3 * TEXT];
  int start = snprintf(path, sizeof path, "%s%s%s/", root, tree->mount, group);
  if (start < 0 || (size_t)start + 64 > sizeof path)
    return INT64_MAX;
  strcpy(path + start, tree->limit);
  int64_t limit = number_in(path, "");
  strcpy(path + start, tree->usage);
  int64_t usage = number_in(path, "");
  strcpy(path + start, "memory.stat");
  int64_t cache = number_in(path, tree->cache);
  return limit < 0 || usage < 0 ? INT64_MAX : limit - usage + (cache > 0 ? cache : 0);
}

size_t host_available(const char *root) {
  char path[TEXT + 32], group[TEXT];
  snprintf(path, sizeof path, "%s/proc/meminfo", root);
  int64_t kibibytes = number_in(path, "MemAvailable:");
  int64_t least = kibibytes < 0 ? INT64_MAX : kibibytes * 1024;
  for (size_t k = 0; k < sizeof trees / sizeof *trees; k++) {
    group_of(root, &trees[k], group);
    for (char *last = group + strlen(group); last; last = strrchr(group, '/')) { /* it, what it is in, ..., the root */
      *last = 0;
      int64_t left = left_in_group(root, &trees[k], group);
      least = left < least ? left : least;
    }
  }
  return least > SPARE ? (size_t)(least - SPARE) : 0;
}

/* ---- blocks ----
 *
 * Large ones lie in one region of addresses, cut from its free ranges: they are neighbours, and may be given back in
 * other pieces. Small ones are cut from slabs, one behind the other. So all lie on huge pages: a network's parameters
 * and gradients are some hundred small blocks, and a step walks through all of them. A freed block's pages go back at
 * once, a slab's addresses when it is empty; reuse is the business of the engine's allocator. Under the address
 * sanitizer every block is malloc's, so that what lies beyond its end is known; where no region can be had, large ones
 * are.
 */

#ifdef MADV_HUGEPAGE
static void want_huge_pages(void *memory, size_t bytes) {
  madvise(memory, bytes, MADV_HUGEPAGE);
}
#else
static void want_huge_pages(void *memory, size_t bytes) {
  (void)memory, (void)bytes;
}
#endif

static void *allocate_alone(size_t bytes) {
  void *memory;
  if (posix_memalign(&memory, bytes >= LARGE ? HUGE_PAGE : ALIGNMENT, bytes))
    return NULL;
  if (bytes >= LARGE)
    want_huge_pages(memory, bytes);
  return memory;
}

#ifdef __SANITIZE_ADDRESS__
enum { SANITIZED = true };
#else
enum { SANITIZED = false };
#endif

/* ---- large ones ---- */

static struct {
  pthread_once_t once;
  pthread_mutex_t lock;
  char *start; /* NULL: there is none */
  size_t bytes;
  range_set free;
} region = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER};

/* Addresses alone: a few times what the machine has, so that holes don't matter; less where a process may not. */
static void region_make(void) {
  size_t wanted = 4 * (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / HUGE_PAGE * HUGE_PAGE;
  for (; !SANITIZED && !region.start && wanted >= LEAST_REGION; wanted = wanted / 2 / HUGE_PAGE * HUGE_PAGE) {
    char *memory = mmap(NULL, wanted, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
      continue;
    size_t before = (size_t)(-(uintptr_t)memory % HUGE_PAGE);
    region.start = memory + before;
    region.bytes = wanted - before;
    want_huge_pages(region.start, region.bytes);
    if (!ranges_put(&region.free, region.start, region.bytes))
      region.start = NULL;
  }
}

static bool is_in_region(const char *memory) {
  return region.start && memory >= region.start && memory < region.start + region.bytes;
}

static size_t whole_pages(size_t bytes) {
  return (bytes + DEVICE_PAGE - 1) / DEVICE_PAGE * DEVICE_PAGE;
}

static void *region_allocate(size_t bytes) {
  pthread_mutex_lock(&region.lock);
  void *memory = ranges_take(&region.free, bytes);
  if (memory && mprotect(memory, bytes, PROT_READ | PROT_WRITE)) {
    ranges_put(&region.free, memory, bytes); /* what cannot be put there is lost: addresses, no memory */
    memory = NULL;
  }
  pthread_mutex_unlock(&region.lock);
  return memory;
}

static void region_deallocate(void *memory, size_t bytes) {
  madvise(memory, bytes, MADV_DONTNEED);
  pthread_mutex_lock(&region.lock);
  ranges_put(&region.free, memory, bytes);
  pthread_mutex_unlock(&region.lock);
}

size_t host_divisible(void) {
  pthread_once(&region.once, region_make);
  return region.start ? IN_REGION : 0;
}

/* ---- small ones ---- */

static bool is_cut(size_t bytes) {
  return !SANITIZED && bytes < LARGE;
}

/* At the start of SLAB bytes that are aligned to their size. */
typedef struct {
  size_t used; /* bytes, this included */
  size_t live; /* blocks */
} slab;

static struct {
  pthread_mutex_t lock;
  slab *current; /* the one that is cut */
} slabs = {.lock = PTHREAD_MUTEX_INITIALIZER};

static slab *slab_new(void) {
  char *mapped = mmap(NULL, 2 * (size_t)SLAB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED)
    return NULL;
  size_t before = (size_t)(-(uintptr_t)mapped % SLAB);
  if (before)
    munmap(mapped, before);
  munmap(mapped + before + SLAB, SLAB - before);
  want_huge_pages(mapped + before, SLAB);
  slab *s = (slab *)(mapped + before);
  s->used = ALIGNMENT;
  return s;
}

static void *cut(size_t bytes) {
  bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  slab *s = slabs.current;
  if (!s || s->used + bytes > SLAB) {
    s = slab_new();
    if (!s)
      return NULL;
    if (slabs.current && !slabs.current->live)
      munmap(slabs.current, SLAB);
    slabs.current = s;
  }
  void *memory = (char *)s + s->used;
  s->used += bytes;
  s->live++;
  return memory;
}

static void give_back(char *memory, size_t bytes) {
  slab *s = (slab *)((uintptr_t)memory / SLAB * SLAB);
  size_t page = (size_t)sysconf(_SC_PAGESIZE), start = -(uintptr_t)memory % page;
  if (--s->live == 0 && s != slabs.current)
    munmap(s, SLAB);
  else if (bytes >= start + page)
    madvise(memory + start, (bytes - start) / page * page, MADV_DONTNEED);
  if (s == slabs.current && s->live == 0)
    s->used = ALIGNMENT;
}

void *host_allocate(size_t bytes) {
  bytes = bytes ? bytes : 1;
  if (host_divisible() && bytes >= IN_REGION)
    return region_allocate(whole_pages(bytes));
  if (!is_cut(bytes))
    return allocate_alone(bytes);
  pthread_mutex_lock(&slabs.lock);
  void *memory = cut(bytes);
  pthread_mutex_unlock(&slabs.lock);
  return memory;
}

void host_deallocate(void *memory, size_t bytes) {
  bytes = bytes ? bytes : 1;
  if (!memory)
    return;
  if (is_in_region(memory)) {
    region_deallocate(memory, whole_pages(bytes));
    return;
  }
  if (!is_cut(bytes)) {
    free(memory);
    return;
  }
  pthread_mutex_lock(&slabs.lock);
  give_back(memory, bytes);
  pthread_mutex_unlock(&slabs.lock);
}
