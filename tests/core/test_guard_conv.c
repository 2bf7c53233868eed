/* test_guard_conv.c: convolutions whose arrays and scratch end, or begin, at pages without access: in both precisions,
 * for several numbers of threads, under each limit of instructions that this machine can keep. oneDNN's weight
 * gradient of a strided 1x1 kernel writes beyond its scratch for few channels on plain channels-last maps; for which,
 * hangs on all of these. Each limit is a process of its own, since the library reads it once. */
#define _GNU_SOURCE
#include <omp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "conv_test.h"

enum { PAGE = 4096, MOST_THREADS = 4 };

/* ---- guarded memory ---- */

typedef struct {
  char *region, *memory;
  size_t bytes;
} guarded;

/* `bytes` that end (or begin) where pages without access begin (or end). */
static guarded guarded_new(size_t bytes, bool at_end) {
  size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
  guarded b = {mmap(NULL, room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), NULL, room + 2 * PAGE};
  assert_ptr_not_equal(b.region, MAP_FAILED);
  assert_int_equal(mprotect(b.region + PAGE, room, PROT_READ | PROT_WRITE), 0);
  b.memory = b.region + PAGE + (at_end ? room - bytes : 0);
  memset(b.region + PAGE, 0xFF, room); /* NaN, should it be read */
  return b;
}

static void guarded_free(guarded *b) {
  munmap(b->region, b->bytes);
}

static struct {
  guarded block;
  bool at_end;
} guarded_scratch;

static void *guarded_workspace(device_context *context, size_t bytes) {
  if (context->workspace_memory)
    guarded_free(&guarded_scratch.block);
  guarded_scratch.block = guarded_new((bytes + 63) / 64 * 64, guarded_scratch.at_end);
  context->workspace_bytes = bytes;
  return context->workspace_memory = guarded_scratch.block.memory;
}

/* Moves an array's elements to guarded memory; bits outside are not there to be kept. */
static guarded guard(test_array *t, bool at_end) {
  size_t bytes = (size_t)test_count(&t->a) * orepa_dtype_size(t->a.dtype);
  guarded b = guarded_new(bytes, at_end);
  memcpy(b.memory, t->a.data, bytes);
  t->a.data = b.memory;
  return b;
}

/* ---- one geometry ---- */

static void compare(const geometry *g, const operands *found, const operands *wanted) {
  const test_array *pairs[][2] = {{&found->y, &wanted->y}, {&found->dx, &wanted->dx}, {&found->dw, &wanted->dw}};
  for (int k = 0; k < 3; k++) {
    double error = test_error(&pairs[k][0]->a, &pairs[k][1]->a);
    if (!(error <= tolerance[found->x.a.dtype])) {
      explain(g, "guarded", error);
      fail();
    }
  }
}

static const geometry *running;

/* Threads other than the test's come here too, where cmocka's own handler would leave the others waiting. */
static void touched(int signal) {
  explain(running, signal == SIGSEGV || signal == SIGBUS ? "touches memory that is not its own" : "stopped", 0);
  _exit(1);
}

static void run_guarded(const geometry *g, const operands *given, const operands *wanted, bool at_end, bool prologue) {
  device_context cpu = test_context(cpu_device());
  operands found = copy_operands(given);
  test_array *arrays[] = {&found.x, &found.w, &found.y, &found.bias, &found.dy, &found.dx, &found.dw, &found.dbias};
  enum { ARRAYS = sizeof arrays / sizeof *arrays };
  guarded blocks[ARRAYS];
  guarded_scratch.at_end = at_end;
  cpu.workspace = guarded_workspace;
  for (int k = 0; k < ARRAYS; k++)
    blocks[k] = guard(arrays[k], at_end);
  running = g;
  signal(SIGSEGV, touched);
  signal(SIGBUS, touched);
  signal(SIGABRT, touched);
  assert_int_equal(run(&cpu, g, &found, prologue, false), DEVICE_DONE);
  compare(g, &found, wanted);
  for (int k = 0; k < ARRAYS; k++)
    guarded_free(&blocks[k]);
  if (cpu.workspace_memory)
    guarded_free(&guarded_scratch.block);
  release_operands(&found);
}

/* At both ends, with the numbers of threads from `first` on, `step` apart. */
static void check(const geometry *g, orepa_dtype dtype, uint64_t seed, int first, int step, bool prologue) {
  device_context ref = test_context(ref_device());
  operands given = make_operands(g, dtype, 2 * seed), wanted = copy_operands(&given);
  assert_int_equal(run(&ref, g, &wanted, prologue, false), DEVICE_DONE);
  for (int threads = first; threads <= MOST_THREADS; threads += step) {
    omp_set_num_threads(threads);
    run_guarded(g, &given, &wanted, false, prologue);
    run_guarded(g, &given, &wanted, true, prologue);
  }
  release_operands(&given);
  release_operands(&wanted);
  test_context_free(&ref);
}

/* ---- geometries ---- */

static void any(void **unused) {
  (void)unused;
  uint64_t state = 3;
  for (int k = 0; k < RANDOM_CASES(60); k++) {
    geometry g = random_geometry(&state);
    check(&g, k % 2 ? OREPA_BFLOAT16 : OREPA_FLOAT32, (uint64_t)k, 1 + k % 3, 3, k % 5 == 0);
  }
}

/* 1x1 with a step of two, from a few channels, odd ones too, to more and to fewer. What is overwritten inside the
 * library depends on how it shares the work out: one thread or three, small maps or larger ones. */
static void points(void **unused) {
  (void)unused;
  for (int64_t in = 1; in <= 17; in++) {
    geometry small = SQUARE(1, in, 8, 8, 1, 2, 0), large = SQUARE(16, in, 16, 32 + in, 1, 2, 0);
    geometry uneven = SQUARE(3, in, 7, 1 + in * 5 % 21, 1, 2, 0);
    uneven.conv.stride[1] = 1 + in % 3;
    uneven.conv.padding[0] = in % 2;
    for (int dtype = OREPA_FLOAT32; dtype <= OREPA_BFLOAT16; dtype++) {
      check(&small, (orepa_dtype)dtype, (uint64_t)in, 1, 2, false);
      check(&large, (orepa_dtype)dtype, (uint64_t)in, 3, 2, false);
      check(&uneven, (orepa_dtype)dtype, (uint64_t)in, 1 + (int)in % 3, 3, false);
    }
  }
}

/* The convolutions of residual networks of `width` channels, basic and with bottlenecks, from the first layer on. */
static void narrow_network(int64_t width) {
  const geometry first = SQUARE(2, 3, 32, width, 7, 2, 3);
  check(&first, width % 2 ? OREPA_FLOAT32 : OREPA_BFLOAT16, (uint64_t)width, 2, 4, false);
  for (int64_t stage = 0; stage < 4; stage++) {
    int64_t size = 8 >> stage, channels = width << stage, batch = 2 + 3 * stage;
    const geometry layers[] = {
        SQUARE(batch, channels, size, channels, 3, 1, 1),         SQUARE(batch, channels, size, 2 * channels, 3, 2, 1),
        SQUARE(batch, channels, size, 2 * channels, 1, 2, 0),     SQUARE(batch, 4 * channels, size, channels, 1, 1, 0),
        SQUARE(batch, 4 * channels, size, 8 * channels, 1, 2, 0),
    };
    for (size_t k = 0; k < sizeof layers / sizeof *layers; k++)
      for (int dtype = OREPA_FLOAT32; dtype <= OREPA_BFLOAT16; dtype++)
        if (fits(&layers[k]))
          check(&layers[k], (orepa_dtype)dtype, (uint64_t)stage, 1 + ((int)k + dtype) % 3, 2, false);
  }
}

static void narrow_networks(void **unused) {
  (void)unused;
  static const int64_t widths[] = {1, 3, 4, 5, 8, 13};
  for (size_t k = 0; k < sizeof widths / sizeof *widths; k++)
    narrow_network(widths[k]);
}

static void network_shapes(void **unused) {
  (void)unused;
  for (size_t k = 0; k < sizeof network / sizeof *network; k++)
    check(&network[k], k % 2 ? OREPA_BFLOAT16 : OREPA_FLOAT32, k, 2, 4, false);
}

/* So many tiles that gradients of 3x3 kernels with a step of two go by Winograd's way, both or that of the kernel. */
static void strided(void **unused) {
  (void)unused;
  static const geometry all[] = {
      {25, 65, 9, 10, 128, {3, 3}, {{2, 2}, {1, 1}, {1, 1}, 1}, true},
      {13, 33, 12, 10, 70, {3, 3}, {{2, 2}, {1, 0}, {1, 1}, 1}, false},
      {12, 34, 11, 9, 64, {3, 3}, {{2, 2}, {0, 2}, {1, 1}, 1}, true},
  };
  for (size_t k = 0; k < sizeof all / sizeof *all; k++)
    check(&all[k], OREPA_FLOAT32, k, 1 + (int)k, 2, k == 1);
}

/* ---- limits ---- */

typedef struct {
  const char *ours, *library;
  cpu_isa isa;
} limit;

static const limit limits[] = {{"avx512", "ALL", CPU_AVX512},
                               {"avx512", "AVX512_CORE", CPU_AVX512},
                               {"avx2", "AVX2", CPU_AVX2},
                               {"base", "SSE41", CPU_BASE}};

/* This program again, with an argument: the tests under the limit of that number. True if they passed. */
static bool passes(const char *number, const limit *l) {
  int status = 1;
  pid_t child = fork();
  if (child == 0) {
    setenv("OREPA_ISA", l->ours, 1);
    setenv("ONEDNN_MAX_CPU_ISA", l->library, 1);
    execl("/proc/self/exe", "test_guard_conv", number, (char *)NULL);
    _exit(127);
  }
  return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

int main(int count, char **words) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(any), cmocka_unit_test(points), cmocka_unit_test(narrow_networks),
                                     cmocka_unit_test(network_shapes), cmocka_unit_test(strided)};
  if (count == 2) {
    const limit *l = &limits[words[1][0] - '0'];
    char name[64];
    snprintf(name, sizeof name, "cpu convolution, guarded, at most %s", l->library);
    return cpu_isa_available(l->isa) ? cmocka_run_group_tests_name(name, tests, NULL, NULL) : 0;
  }
  bool passed = true;
  for (size_t k = 0; k < sizeof limits / sizeof *limits; k++)
    passed = passes((const char[]){(char)('0' + k), 0}, &limits[k]) && passed;
  return !passed;
}
