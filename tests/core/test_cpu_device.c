/* test_cpu_device.c: the table of the cpu, the choice of an instruction set, the number of threads. */
#define _GNU_SOURCE
#include <ftw.h>
#include <omp.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cpu/threads.h"
#include "kernel_test.h"

static void test_table(void **state) {
  (void)state;
  device_context context = test_context(cpu_device());
  assert_ptr_equal(cpu_device(), cpu_device());
  for_each_isa(device) {
    assert_int_equal(device->version, DEVICE_TABLE_VERSION);
    assert_string_equal(device->name, "cpu");
    assert_non_null(device->copy);
    assert_non_null(device->squeeze_backward);
    assert_non_null(device->conv_backward_weight);
    assert_null(device->synchronize);
    char text[5] = "", *memory = device->allocate(&context, 5);
    assert_non_null(memory);
    assert_int_equal((uintptr_t)memory % 64, 0);
    assert_int_equal(device->upload(&context, memory, "four", 5), DEVICE_DONE);
    assert_int_equal(device->download(&context, text, memory, 5), DEVICE_DONE);
    assert_string_equal(text, "four");
    assert_int_equal(device->upload(&context, NULL, NULL, 0), DEVICE_DONE);
    device->deallocate(&context, memory, 5);
    assert_true(device->available(&context) > 0);
  }
}

/* main() asked for one that no processor has. */
static void test_features(void **state) {
  (void)state;
  assert_true(cpu_isa_available(CPU_BASE));
  assert_false(cpu_isa_available(CPU_ISAS));
  assert_null(cpu_device_for(CPU_ISAS));
  assert_true(cpu_isa_available(cpu_isa_used()));
  assert_false(cpu_isa_limited());
  assert_ptr_equal(cpu_device(), cpu_device_for(cpu_isa_used()));
  assert_non_null(strstr(cpu_features_text(), "OREPA_ISA=abacus is not available here"));
}

static void test_set_threads(void **state) {
  (void)state;
  int before = orepa_threads();
  assert_true(before >= 1);
  assert_int_equal(orepa_set_threads(3), 0);
  assert_int_equal(orepa_threads(), 3);
  assert_int_equal(omp_get_max_threads(), 3);
  assert_int_equal(orepa_set_threads(0), -1);
  assert_string_equal(orepa_error(), "set_threads: 1 to 4096 threads, not 0");
  assert_int_equal(orepa_set_threads(4097), -1);
  assert_int_equal(orepa_threads(), 3);
  assert_int_equal(orepa_set_threads(before), 0);
}

/* ---- quotas, from a folder that looks like /proc and /sys ---- */

static int drop(const char *path, const struct stat *info, int flag, struct FTW *walk) {
  (void)info, (void)flag, (void)walk;
  return remove(path);
}

static void put_file(const char *root, const char *path, const char *text) {
  char whole[512];
  snprintf(whole, sizeof whole, "%s%s", root, path);
  for (char *slash = whole + strlen(root) + 1; (slash = strchr(slash, '/')); slash++) {
    *slash = 0;
    mkdir(whole, 0700);
    *slash = '/';
  }
  FILE *file = fopen(whole, "w");
  assert_non_null(file);
  fputs(text, file);
  fclose(file);
}

/* The quota where /proc/self/cgroup is `groups` and the files are as listed: path, text, ..., NULL. */
static int quota_with(const char *groups, const char *const *files) {
  char root[] = "/tmp/test_cpu_device_XXXXXX";
  assert_non_null(mkdtemp(root));
  if (groups)
    put_file(root, "/proc/self/cgroup", groups);
  for (; files && *files; files += 2)
    put_file(root, files[0], files[1]);
  int quota = threads_quota(root);
  nftw(root, drop, 8, FTW_DEPTH | FTW_PHYS);
  return quota;
}

#define FILES(...) ((const char *const[]){__VA_ARGS__, NULL})

static void test_quota(void **state) {
  (void)state;
  assert_int_equal(quota_with(NULL, NULL), 0);
  assert_int_equal(quota_with("0::/\n", NULL), 0);
  assert_int_equal(quota_with("0::/\n", FILES("/sys/fs/cgroup/cpu.max", "max 100000\n")), 0);
  assert_int_equal(quota_with("0::/\n", FILES("/sys/fs/cgroup/cpu.max", "200000 100000\n")), 2);
  assert_int_equal(quota_with("0::/\n", FILES("/sys/fs/cgroup/cpu.max", "150000 100000\n")), 2);
  assert_int_equal(quota_with("0::/\n", FILES("/sys/fs/cgroup/cpu.max", "1000 100000\n")), 1);
  /* the least of a group and those it is in */
  assert_int_equal(quota_with("0::/a/b\n", FILES("/sys/fs/cgroup/a/b/cpu.max", "800000 100000\n",
                                                 "/sys/fs/cgroup/a/cpu.max", "300000 100000\n")),
                   3);
  /* a path of the host's, not seen in here */
  assert_int_equal(quota_with("0::/docker/x\n", FILES("/sys/fs/cgroup/cpu.max", "400000 100000\n")), 4);
  /* version 1, beside other controllers */
  assert_int_equal(
      quota_with("7:memory:/m\n4:cpuset:/s\n3:cpu,cpuacct:/c\n",
                 FILES("/sys/fs/cgroup/cpu/c/cpu.cfs_quota_us", "250000\n", "/sys/fs/cgroup/cpu/c/cpu.cfs_period_us",
                       "100000\n", "/sys/fs/cgroup/cpu/s/cpu.cfs_quota_us", "100000\n")),
      3);
  assert_int_equal(quota_with("3:cpuacct,cpu:/\n", FILES("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n",
                                                         "/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")),
                   0);
}

int main(void) {
  setenv("OREPA_ISA", "abacus", 1);
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_table),
      cmocka_unit_test(test_features),
      cmocka_unit_test(test_set_threads),
      cmocka_unit_test(test_quota),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
