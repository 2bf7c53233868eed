/* replay.c: runs a fuzz target without a fuzzer: on every file named, or in a folder that is named, and on mutations of
 * each, which depend on nothing but the file's name, its bytes and the number of the mutation.
 *
 *     fuzz_idx_replay [-n MUTATIONS] [-s SEED] PATH...
 *
 * An input that ends the program is left in the folder for temporary files, for `fuzz_idx_replay -n 0 INPUT`. */
#include <dirent.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

enum { LARGEST_SEED = 1 << 16, ROOM = 2 * LARGEST_SEED, MOST_FILES = 1024, LARGEST_BLOCK = 1 << 26 };

typedef struct {
  char *path;
  uint8_t *bytes;
  size_t size;
} seed_file;

static seed_file files[MOST_FILES];
static size_t file_count;

/* ---- the input at hand, and what is left of it when the program ends ---- */

static struct {
  uint8_t bytes[ROOM];
  size_t size;
  const char *path;
  uint64_t mutation;
  volatile sig_atomic_t running;
} input;

static void keep_input(void) {
  if (!input.running)
    return;
  input.running = 0;
  char path[512];
  const char *folder = getenv("TMPDIR");
  snprintf(path, sizeof path, "%s/fuzz-input-XXXXXX", folder ? folder : P_tmpdir);
  int fd = mkstemp(path);
  bool kept = fd >= 0 && write(fd, input.bytes, input.size) == (ssize_t)input.size;
  fprintf(stderr, "failed on mutation %llu of %s, %zu bytes, %s %s\n", (unsigned long long)input.mutation, input.path,
          input.size, kept ? "kept in" : "not kept: cannot write", path);
}

static void on_signal(int number) {
  keep_input();
  signal(number, SIG_DFL);
  raise(number);
}

/* There in programs with a sanitizer only. */
__attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)(void));
__attribute__((weak)) int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void *, size_t),
                                                                    void (*on_free)(const volatile void *));

/* Seeds are small: whoever asks for this much believes what a header says. */
static void on_malloc(const volatile void *memory, size_t bytes) {
  if (memory && input.running && bytes > LARGEST_BLOCK) {
    fprintf(stderr, "%zu bytes of memory asked for at once\n", bytes);
    abort();
  }
}

static void on_free(const volatile void *memory) {
  (void)memory;
}

/* The undefined-behaviour sanitizer's end is then a signal as well. */
__attribute__((visibility("default"))) const char *__ubsan_default_options(void);
const char *__ubsan_default_options(void) {
  return "abort_on_error=1:print_stacktrace=1";
}

static void watch(void) {
  signal(SIGABRT, on_signal);
  if (__sanitizer_set_death_callback) {
    __sanitizer_set_death_callback(keep_input); /* the other signals are the sanitizer's */
  } else {
    signal(SIGSEGV, on_signal);
    signal(SIGBUS, on_signal);
    signal(SIGFPE, on_signal);
  }
  if (__sanitizer_install_malloc_and_free_hooks)
    __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
}

/* ---- random numbers: splitmix64 ---- */

static uint64_t state;

static uint64_t next_random(void) {
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

static size_t below(size_t limit) {
  return limit ? (size_t)(next_random() % limit) : 0;
}

/* ---- mutations ---- */

/* Replaces `old` bytes at a position by others; nothing where there is no room. */
static void replace(size_t at, size_t old, const uint8_t *bytes, size_t size) {
  size_t rest = input.size - at - old;
  if (at + size > ROOM || rest > ROOM - at - size)
    return;
  memmove(input.bytes + at + size, input.bytes + at + old, rest);
  if (size)
    memcpy(input.bytes + at, bytes, size);
  input.size = at + size + rest;
}

static void flip_bit(void) {
  if (input.size)
    input.bytes[below(input.size)] ^= (uint8_t)(1 << below(8));
}

static void change_byte(void) {
  static const uint8_t bytes[] = "\0\1\x7f\x80\xff \"\\{}[]:,-0e";
  if (input.size)
    input.bytes[below(input.size)] = below(2) ? (uint8_t)next_random() : bytes[below(sizeof bytes - 1)];
}

static void truncate_input(void) {
  input.size = below(input.size + 1);
}

static void insert(void) {
  uint8_t bytes[16];
  size_t size = 1 + below(sizeof bytes);
  uint8_t first = (uint8_t)next_random();
  bool same = below(2);
  for (size_t k = 0; k < size; k++)
    bytes[k] = same ? first : (uint8_t)next_random();
  replace(below(input.size + 1), 0, bytes, size);
}

static void delete_some(void) {
  size_t at = below(input.size), most = input.size - at;
  replace(at, below((most < 32 ? most : 32) + 1), NULL, 0);
}

static void repeat_some(void) {
  uint8_t bytes[64];
  size_t at = below(input.size), most = input.size - at, size = below((most < 64 ? most : 64) + 1);
  memcpy(bytes, input.bytes + at, size);
  replace(below(input.size + 1), 0, bytes, size);
}

/* Numbers at the edges of types, or near the old one. */
static uint64_t odd_number(uint64_t old) {
  uint64_t power = (uint64_t)1 << below(64);
  switch (below(4)) {
  case 0:
    return old + below(17) - 8;
  case 1:
    return power + below(3) - 1;
  case 2:
    return 0 - power;
  default:
    return old * (below(9));
  }
}

/* A number in binary: 2, 4 or 8 bytes, either end first. */
static void change_binary(void) {
  size_t width = (size_t)2 << below(3);
  if (input.size < width)
    return;
  uint8_t *at = input.bytes + below(input.size < 64 ? input.size - width + 1 : 64 - width);
  bool little = below(2);
  uint64_t number = 0;
  for (size_t k = 0; k < width; k++)
    number = number << 8 | at[little ? width - 1 - k : k];
  number = odd_number(number);
  for (size_t k = 0; k < width; k++, number >>= 8)
    at[little ? k : width - 1 - k] = (uint8_t)number;
}

static bool is_digit(uint8_t byte) {
  return byte >= '0' && byte <= '9';
}

/* A number in digits: the first at or behind a random position. */
static void change_digits(void) {
  size_t at = below(input.size), end;
  while (at < input.size && !is_digit(input.bytes[at]))
    at++;
  for (end = at; end < input.size && is_digit(input.bytes[end]);)
    end++;
  if (at == end)
    return;
  char digits[64];
  size_t length = end - at < 20 ? end - at : 20;
  memcpy(digits, input.bytes + at, length);
  digits[length] = '\0';
  uint64_t number = odd_number(strtoull(digits, NULL, 10));
  const char *format = below(2) ? "%llu" : below(2) ? "%lld" : below(2) ? "%llu.5" : "%llue9";
  int size = snprintf(digits, sizeof digits, format, (unsigned long long)number);
  replace(at, end - at, (const uint8_t *)digits, (size_t)size);
}

/* A piece of another file in place of a piece of this one, or all that follows. */
static void splice(void) {
  const seed_file *other = &files[below(file_count)];
  size_t from = below(other->size), at = below(input.size);
  if (below(2))
    replace(at, input.size - at, other->bytes + from, other->size - from);
  else
    replace(at, below(input.size - at + 1), other->bytes + from, below(other->size - from + 1));
}

static void mutate(void) {
  static void (*const ways[])(void) = {flip_bit,    change_byte,   truncate_input, insert, delete_some,
                                       repeat_some, change_binary, change_digits,  splice};
  for (size_t left = 1 + below(4); left; left--)
    ways[below(sizeof ways / sizeof *ways)]();
}

/* ---- files ---- */

static void give_up(const char *path, const char *what) {
  fprintf(stderr, "%s: %s\n", path, what);
  exit(2);
}

static void add_file(const char *path) {
  static uint8_t bytes[LARGEST_SEED + 1];
  FILE *file = fopen(path, "rb");
  if (!file || file_count == MOST_FILES)
    give_up(path, file ? "one file too many" : "cannot be opened");
  size_t size = fread(bytes, 1, sizeof bytes, file);
  fclose(file);
  if (size > LARGEST_SEED)
    give_up(path, "is too large for a seed");
  seed_file *added = &files[file_count++];
  *added = (seed_file){strdup(path), malloc(size + 1), size};
  if (!added->path || !added->bytes)
    give_up(path, "out of memory");
  memcpy(added->bytes, bytes, size);
}

static int by_path(const void *a, const void *b) {
  return strcmp(((const seed_file *)a)->path, ((const seed_file *)b)->path);
}

static void add_folder(const char *path) {
  DIR *folder = opendir(path);
  if (!folder)
    give_up(path, "cannot be opened");
  for (struct dirent *entry; (entry = readdir(folder));) {
    char name[4096];
    if (entry->d_name[0] == '.')
      continue;
    snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
    add_file(name);
  }
  closedir(folder);
}

static void add(const char *path) {
  struct stat status;
  if (!stat(path, &status) && S_ISDIR(status.st_mode))
    add_folder(path);
  else
    add_file(path);
}

/* ---- the run ---- */

static uint64_t hash(const char *text) {
  uint64_t value = 0xcbf29ce484222325u; /* FNV-1a */
  for (; *text; text++)
    value = (value ^ (uint8_t)*text) * 0x100000001b3u;
  return value;
}

/* The target gets memory of its own, so that a sanitizer sees it read one byte too many. */
static void run_target(void) {
  uint8_t *copy = malloc(input.size ? input.size : 1);
  if (!copy)
    give_up(input.path, "out of memory");
  memcpy(copy, input.bytes, input.size);
  input.running = 1;
  LLVMFuzzerTestOneInput(copy, input.size);
  input.running = 0;
  free(copy);
}

static void run_file(const seed_file *file, uint64_t mutations, uint64_t seed) {
  const char *slash = strrchr(file->path, '/');
  input.path = file->path;
  for (uint64_t k = 0; k <= mutations; k++) { /* 0: as it is */
    memcpy(input.bytes, file->bytes, file->size);
    input.size = file->size;
    input.mutation = k;
    state = hash(slash ? slash + 1 : file->path) ^ (seed << 32) ^ k;
    if (k)
      mutate();
    run_target();
  }
}

int main(int argc, char **argv) {
  uint64_t mutations = 200, seed = 1;
  for (int option; (option = getopt(argc, argv, "n:s:")) != -1;) {
    if (option == '?')
      return 2;
    *(option == 'n' ? &mutations : &seed) = strtoul(optarg, NULL, 10);
  }
  for (int k = optind; k < argc; k++)
    add(argv[k]);
  if (!file_count)
    give_up(argv[0], "no seeds were given");
  qsort(files, file_count, sizeof *files, by_path);
  watch();
  for (size_t k = 0; k < file_count; k++)
    run_file(&files[k], mutations, seed);
  printf("%zu files and %llu mutations of each\n", file_count, (unsigned long long)mutations);
  for (size_t k = 0; k < file_count; k++) {
    free(files[k].path);
    free(files[k].bytes);
  }
  return 0;
}
