/* file.c: files read at any position and written whole or not at all.
 *
 * A file is replaced by writing beside it, in the same folder, under a name that nobody has, bringing the bytes to the
 * disk, and renaming: whoever opens the path finds the old file or the new one, also after a crash. */
#include "io/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "orepa_io.h"

/* One system call moves at most this much: Linux stops a little below 2 GiB. */
enum { LARGEST_TRANSFER = 1 << 30 };

/* ---- reading ---- */

int file_open(file_reader *file, const char *path) {
  *file = (file_reader){.path = path};
  file->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make us wait: it is refused below */
  if (file->fd < 0)
    return error_set("%s: cannot be opened: %s", path, strerror(errno));
  struct stat status;
  if (fstat(file->fd, &status))
    error_set("%s: cannot be read: %s", path, strerror(errno));
  else if (!S_ISREG(status.st_mode))
    error_set("%s: is %s, not a file", path, S_ISDIR(status.st_mode) ? "a folder" : "a device or a pipe");
  else {
    file->size = status.st_size;
    return 0;
  }
  file_close(file);
  return -1;
}

file_reader file_in_memory(const char *path, const void *bytes, size_t size) {
  return (file_reader){.path = path, .size = (int64_t)size, .fd = -1, .bytes = bytes};
}

int file_read(const file_reader *file, int64_t offset, void *data, size_t bytes) {
  if (offset < 0 || offset > file->size || bytes > (uint64_t)(file->size - offset))
    return error_set("%s: has no %zu bytes at %lld, only %lld in all", file->path, bytes, (long long)offset,
                     (long long)file->size);
  if (file->fd < 0) {
    if (bytes)
      memcpy(data, file->bytes + offset, bytes);
    return 0;
  }
  for (char *to = data; bytes;) {
    ssize_t got = pread(file->fd, to, bytes < LARGEST_TRANSFER ? bytes : LARGEST_TRANSFER, offset);
    if (got == 0)
      return error_set("%s: became shorter while it was read", file->path);
    if (got < 0 && errno != EINTR)
      return error_set("%s: cannot be read: %s", file->path, strerror(errno));
    if (got > 0) {
      to += got;
      offset += got;
      bytes -= (size_t)got;
    }
  }
  return 0;
}

void file_close(file_reader *file) {
  if (file->fd >= 0)
    close(file->fd);
  file->fd = -1;
}

/* ---- writing ---- */

/* The length of the target's folder with its slash; 0: the current one. */
static int folder_length(const char *target) {
  const char *slash = strrchr(target, '/');
  return slash ? (int)(slash + 1 - target) : 0;
}

/* Opens a new file beside the target: .NAME.PID-COUNT.tmp, the name cut so that the whole is never too long for a
 * folder. */
static int open_temporary(file_writer *file) {
  static atomic_uint count;
  int folder = folder_length(file->target);
  size_t room = (size_t)folder + 256;
  file->temporary = malloc(room);
  if (!file->temporary)
    return error_out_of_memory("%s: cannot be written: out of memory", file->path);
  do {
    snprintf(file->temporary, room, "%.*s.%.200s.%ld-%u.tmp", folder, file->target, file->target + folder,
             (long)getpid(), atomic_fetch_add(&count, 1));
    file->fd = open(file->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (file->fd < 0 && errno == EEXIST);
  if (file->fd < 0)
    return error_set("%s: no file can be made in '%.*s': %s", file->path, folder ? folder : 1,
                     folder ? file->target : ".", strerror(errno));
  return 0;
}

/* The path behind the symbolic links at its end, whether a file is there yet or not; NULL: errno says why. */
static char *follow_links(const char *path) {
  enum { MOST_LINKS = 40 }; /* as many as the kernel follows */
  char link[PATH_MAX], *target = strdup(path);
  for (int followed = 0; target; followed++) {
    ssize_t length = readlink(target, link, sizeof link - 1);
    if (length < 0)
      return target;
    link[length] = '\0';
    int folder = link[0] == '/' ? 0 : folder_length(target);
    char *next = followed < MOST_LINKS ? malloc((size_t)folder + (size_t)length + 1) : NULL;
    if (next)
      sprintf(next, "%.*s%s", folder, target, link);
    else if (followed == MOST_LINKS)
      errno = ELOOP;
    free(target);
    target = next;
  }
  return NULL;
}

static int start(file_writer *file) {
  struct stat old;
  bool exists = !stat(file->path, &old);
  if (exists && !S_ISREG(old.st_mode))
    return error_set("%s: is %s: no file can be written there", file->path,
                     S_ISDIR(old.st_mode) ? "a folder" : "a device or a pipe");
  /* Renaming would also replace a file that its owner protected. */
  if (exists && access(file->path, W_OK))
    return error_set("%s: cannot be written: %s", file->path, strerror(errno));
  file->target = follow_links(file->path);
  if (!file->target && errno == ENOMEM)
    return error_out_of_memory("%s: cannot be written: out of memory", file->path);
  if (!file->target)
    return error_set("%s: cannot be written: %s", file->path, strerror(errno));
  if (open_temporary(file))
    return -1;
  if (exists)
    (void)!fchmod(file->fd, old.st_mode & 0777); /* some file systems have no modes */
  return 0;
}

int file_create(file_writer *file, const char *path) {
  *file = (file_writer){.path = path, .fd = -1};
  if (!start(file))
    return 0;
  free(file->target);
  free(file->temporary);
  return -1;
}

int file_write(file_writer *file, const void *data, size_t bytes) {
  for (const char *from = data; bytes;) {
    ssize_t put = write(file->fd, from, bytes < LARGEST_TRANSFER ? bytes : LARGEST_TRANSFER);
    if (put < 0 && errno != EINTR)
      return error_set("%s: cannot be written: %s", file->path, strerror(errno));
    if (put > 0) {
      from += put;
      bytes -= (size_t)put;
    }
  }
  return 0;
}

/* A rename is durable once its folder is. A folder that may not be read cannot be synced, and some file systems don't
 * know how to: then it is as durable as it gets. */
static int sync_folder(const file_writer *file) {
  int length = folder_length(file->target), failed = 0;
  file->target[length] = '\0';
  int fd = open(length ? file->target : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0)
    return 0;
  if (fsync(fd) && errno != EINVAL && errno != ENOTSUP)
    failed = error_set("%s: is written, but its folder cannot be synced: %s", file->path, strerror(errno));
  close(fd);
  return failed;
}

int file_finish(file_writer *file, bool failed) {
  if (!failed && fsync(file->fd))
    failed = error_set("%s: cannot be written: %s", file->path, strerror(errno));
  if (close(file->fd) && !failed)
    failed = error_set("%s: cannot be written: %s", file->path, strerror(errno));
  if (!failed && rename(file->temporary, file->target))
    failed = error_set("%s: cannot be replaced: %s", file->path, strerror(errno));
  if (failed)
    unlink(file->temporary);
  else
    failed = sync_folder(file);
  free(file->target);
  free(file->temporary);
  return failed ? -1 : 0;
}

int orepa_write_file(const char *path, const void *data, size_t bytes) {
  file_writer file;
  return file_create(&file, path) ? -1 : file_finish(&file, file_write(&file, data, bytes));
}
