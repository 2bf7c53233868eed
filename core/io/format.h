/* format.h: what the readers of formats share: messages about files that somebody else made up, and what a file is by
 * its first bytes. */
#ifndef OREPA_CORE_IO_FORMAT_H
#define OREPA_CORE_IO_FORMAT_H

#include "io/file.h"
#include "orepa.h"

enum { FORMAT_QUOTED_BYTES = 96 };

/* Text from a file, made fit for a message: UTF-8, cut where a character ends, no control characters. */
const char *format_printable(const char *text, size_t length, char printed[FORMAT_QUOTED_BYTES]);
/* Whether the bytes are UTF-8 without NUL; -1: out of memory. */
int format_is_text(const char *text, size_t length);

/* "PATH: tensor "NAME": " and what is wrong; without a tensor: "PATH: ". Returns -1. */
int format_refuse(const file_reader *file, const char *tensor, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* What the file is by its first bytes: "an HTML or XML page" and the like; NULL: none of those. */
const char *format_stranger(const file_reader *file);

/* Behind the 8 bytes of its header's length, which may look like the start of anything, a safetensors file has '{'. */
bool format_is_safetensors(const file_reader *file);

/* The bytes of a shape; -1: too many to count, even where another size is 0. */
int64_t format_count_bytes(size_t size, int rank, const int64_t *shape);
/* A BOOL's elements are 0 or 1. */
int format_check_bools(const file_reader *file, const char *tensor, const unsigned char *values, int64_t count);

#endif
