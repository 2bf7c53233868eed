/* format.c: messages about files, and files known by their first bytes. */
#include "io/format.h"

#include <jansson.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "error.h"

/* ---- messages ---- */

int format_is_text(const char *text, size_t length) {
  if (memchr(text, '\0', length))
    return 0;
  json_t *checked = json_stringn(text, length), *plain = checked ? NULL : json_stringn_nocheck(text, length);
  int valid = checked ? 1 : plain ? 0 : -1;
  json_decref(checked);
  json_decref(plain);
  return valid;
}

const char *format_printable(const char *text, size_t length, char printed[FORMAT_QUOTED_BYTES]) {
  bool cut = length >= FORMAT_QUOTED_BYTES - 3;
  if (cut)
    for (length = FORMAT_QUOTED_BYTES - 4; length && ((unsigned char)text[length] & 0xc0) == 0x80;)
      length--;
  for (size_t k = 0; k < length; k++)
    printed[k] = (unsigned char)text[k] < 0x20 || text[k] == 0x7f ? '?' : text[k];
  if (format_is_text(printed, length) != 1)
    for (size_t k = 0; k < length; k++)
      if (printed[k] & 0x80)
        printed[k] = '?';
  strcpy(printed + length, cut ? "..." : "");
  return printed;
}

int format_refuse(const file_reader *file, const char *tensor, const char *format, ...) {
  char text[1024], name[FORMAT_QUOTED_BYTES];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (!tensor)
    return error_set("%s: %s", file->path, text);
  return error_set("%s: tensor \"%s\": %s", file->path, format_printable(tensor, strlen(tensor), name), text);
}

/* ---- what lies under such a name by mistake ---- */

/* None is the length of a possible safetensors header, but for a ZIP archive, a pickle and a gzip stream. */
static const struct {
  const char *start, *what;
} strangers[] = {
    {"PK\3\4", "a ZIP archive, such as PyTorch's .pth"},
    {"version https://git-lfs", "a Git LFS pointer, which stands for the file (git lfs pull fetches it)"},
    {"<", "an HTML or XML page"},
    {"\x80\2", "a Python pickle, such as an old .pth"},
    {"\x1f\x8b", "compressed with gzip"},
    {"\x89HDF", "an HDF5 file"},
    {"\x93NUMPY", "a NumPy array"},
    {"GGUF", "a GGUF file"},
    {"{", "JSON text, such as the index of several files"},
};

/* A tar archive names itself behind its first entry's name and sizes. */
static bool is_tar(const file_reader *file) {
  enum { MARK = 257 };
  char mark[5];
  return file->size >= MARK + (int64_t)sizeof mark && !file_read(file, MARK, mark, sizeof mark) &&
         !memcmp(mark, "ustar", sizeof mark);
}

const char *format_stranger(const file_reader *file) {
  char start[64] = "";
  size_t bytes = file->size < (int64_t)sizeof start ? (size_t)file->size : sizeof start - 1;
  if (file_read(file, 0, start, bytes))
    return NULL;
  const char *text = start + strspn(start, " \t\r\n");
  for (size_t k = 0; k < sizeof strangers / sizeof *strangers; k++)
    if (!strncmp(text, strangers[k].start, strlen(strangers[k].start)))
      return strangers[k].what;
  return is_tar(file) ? "a tar archive" : NULL;
}

bool format_is_safetensors(const file_reader *file) {
  char brace;
  return file->size > 8 && !file_read(file, 8, &brace, 1) && brace == '{';
}

/* ---- tensors ---- */

int64_t format_count_bytes(size_t size, int rank, const int64_t *shape) {
  int64_t bytes = (int64_t)size, nonzero = bytes;
  for (int d = 0; d < rank; d++) {
    if (__builtin_mul_overflow(nonzero, shape[d] ? shape[d] : 1, &nonzero))
      return -1;
    bytes = shape[d] ? nonzero * (bytes != 0) : 0;
  }
  return bytes;
}

int format_check_bools(const file_reader *file, const char *tensor, const unsigned char *values, int64_t count) {
  for (int64_t k = 0; k < count; k++)
    if (values[k] > 1)
      return format_refuse(file, tensor, "element %lld of a BOOL is %d, neither 0 nor 1", (long long)k, values[k]);
  return 0;
}
