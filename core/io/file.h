/* file.h: files as the readers and writers of formats want them: read at any position, written whole or not at all.
 * Every message begins with the path. */
#ifndef OREPA_CORE_IO_FILE_H
#define OREPA_CORE_IO_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A regular file that is open, or bytes in memory that stand for one. */
typedef struct {
  const char *path; /* borrowed */
  int64_t size;     /* real, whatever the file says of itself */
  int fd;           /* -1: in memory */
  const unsigned char *bytes;
} file_reader;

int file_open(file_reader *file, const char *path);
file_reader file_in_memory(const char *path, const void *bytes, size_t size);
/* All of the bytes at the offset, or -1. */
int file_read(const file_reader *file, int64_t offset, void *data, size_t bytes);
void file_close(file_reader *file);

/* A file being written under a temporary name in the folder of the one it is to replace. */
typedef struct {
  const char *path; /* as the caller spelled it; borrowed */
  char *target;     /* the same behind symbolic links */
  char *temporary;
  int fd;
} file_writer;

/* After -1 nothing is left behind; after 0 the caller must come to file_finish. */
int file_create(file_writer *file, const char *path);
int file_write(file_writer *file, const void *data, size_t bytes);
/* Puts the new file in the old one's place, durably; or, if `failed` or anything fails here, removes it: then -1, and
 * the message is that of the first failure. */
int file_finish(file_writer *file, bool failed);

#endif
