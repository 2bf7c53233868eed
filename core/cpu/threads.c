/* threads.c: how many threads kernels use: the user's word, else what affinity and the control group's quota allow.
 * More threads than processors is the worst case for kernels that wait for one another, so the quota counts. */
#include "cpu/threads.h"

#include <omp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "loader_thread.h"

enum { MAX_THREADS = 4096, TEXT = 4096 };

/* ---- the quota: version 2 has "cpu.max" with quota and period, version 1 a file for each ---- */

/* Up to two numbers at the start of a file; how many there are ("max" is none). */
static int numbers_in(const char *folder, const char *name, double numbers[2]) {
  char path[2 * TEXT];
  if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
    return 0;
  FILE *file = fopen(path, "r");
  if (!file)
    return 0;
  int found = fscanf(file, "%lf %lf", &numbers[0], &numbers[1]);
  fclose(file);
  return found < 0 ? 0 : found;
}

/* Processors that one group may use; 0 without a quota. */
static double quota_of(const char *folder) {
  double both[2], quota[2], period[2];
  if (numbers_in(folder, "cpu.max", both) == 2 && both[0] > 0 && both[1] > 0)
    return both[0] / both[1];
  if (numbers_in(folder, "cpu.cfs_quota_us", quota) && numbers_in(folder, "cpu.cfs_period_us", period) &&
      quota[0] > 0 && period[0] > 0)
    return quota[0] / period[0];
  return 0;
}

/* The least quota of a group and the groups it is in, up to the folder where the tree is mounted. A path that does not
 * exist there (a container sees its own group as the root) has no quota, and the walk ends at the root all the same. */
static double least_quota(const char *mount, const char *group) {
  char folder[2 * TEXT];
  size_t start = strlen(mount);
  double least = 0;
  if (snprintf(folder, sizeof folder, "%s%s", mount, group) >= (int)sizeof folder)
    return 0;
  for (;;) {
    double quota = quota_of(folder);
    if (quota > 0 && (least == 0 || quota < least))
      least = quota;
    char *slash = strrchr(folder + start, '/');
    if (!slash)
      return least;
    *slash = 0;
  }
}

/* Whether a line of /proc/self/cgroup ("4:cpu,cpuacct:/a/b") is about processors: version 2's single tree has no names.
 */
static bool names_cpu(const char *names, const char *end) {
  for (const char *name = names; name < end; name += strcspn(name, ",:") + 1)
    if (strcspn(name, ",:") == 3 && !strncmp(name, "cpu", 3))
      return true;
  return false;
}

int threads_quota(const char *root) {
  char path[TEXT], line[TEXT];
  double least = 0;
  snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
  FILE *file = fopen(path, "r");
  if (!file)
    return 0;
  while (fgets(line, sizeof line, file)) {
    char *names = strchr(line, ':'), *end = names ? strchr(names + 1, ':') : NULL;
    if (!end)
      continue;
    line[strcspn(line, "\n")] = 0;
    bool unified = end == names + 1;
    if (!unified && !names_cpu(names + 1, end))
      continue;
    snprintf(path, sizeof path, "%s/sys/fs/cgroup%s", root, unified ? "" : "/cpu");
    double quota = least_quota(path, end + 1);
    if (quota > 0 && (least == 0 || quota < least))
      least = quota;
  }
  fclose(file);
  int whole = least < MAX_THREADS ? (int)least : MAX_THREADS;
  return whole + (whole < least && whole < MAX_THREADS);
}

/* ---- the count ---- */

static void set_default(void) {
  const char *wanted = getenv("OMP_NUM_THREADS"); /* OpenMP has read it by itself */
  if (wanted && *wanted)
    return;
  int count = omp_get_num_procs(), quota = threads_quota(""); /* the first follows affinity */
  if (quota > 0 && quota < count)
    count = quota;
  omp_set_num_threads(count < 1 ? 1 : count);
}

void threads_begin(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, set_default);
}

void threads_serial(void) {
  threads_begin(); /* else a later one would have the last word */
  omp_set_num_threads(1);
}

int orepa_threads(void) {
  threads_begin();
  return omp_get_max_threads();
}

int orepa_set_threads(int count) {
  if (loader_thread_here())
    return error_set("set_threads: kernels run on one thread where a loader makes batches");
  if (count < 1 || count > MAX_THREADS)
    return error_set("set_threads: 1 to %d threads, not %d", MAX_THREADS, count);
  threads_begin();
  omp_set_num_threads(count);
  return 0;
}
