/* error.c: the thread's last message, and shapes as text for messages. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "tensor/tensor.h"

enum { MESSAGE_SIZE = 2048, TEXTS = 8, TEXT_SIZE = 160 };

static _Thread_local char message[MESSAGE_SIZE];
static _Thread_local bool out_of_memory;

const char *orepa_error(void) {
  return message;
}

bool orepa_error_is_out_of_memory(void) {
  return out_of_memory;
}

int orepa_fail(const char *text) {
  return error_set("%s", text);
}

/* Formatted aside first: an argument may be the old message. */
static void leave(const char *format, va_list arguments, bool memory) {
  char text[MESSAGE_SIZE];
  vsnprintf(text, sizeof text, format, arguments);
  memcpy(message, text, sizeof message);
  out_of_memory = memory;
}

int error_set(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  leave(format, arguments, false);
  va_end(arguments);
  return -1;
}

int error_out_of_memory(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  leave(format, arguments, true);
  va_end(arguments);
  return -1;
}

int error_prefix(const char *format, ...) {
  char prefix[MESSAGE_SIZE / 4], text[MESSAGE_SIZE];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(prefix, sizeof prefix, format, arguments);
  va_end(arguments);
  snprintf(text, sizeof text, "%s%.*s", prefix, (int)(MESSAGE_SIZE - sizeof prefix - 1), message);
  memcpy(message, text, sizeof message);
  return -1;
}

static char *text_buffer(void) {
  static _Thread_local char texts[TEXTS][TEXT_SIZE];
  static _Thread_local int next;
  next = (next + 1) % TEXTS;
  return texts[next];
}

static void append_shape(char *text, size_t used, int rank, const int64_t *shape) {
  if (rank == 0)
    snprintf(text + used, TEXT_SIZE - used, "scalar");
  for (int d = 0; d < rank && used < TEXT_SIZE; d++)
    used += (size_t)snprintf(text + used, TEXT_SIZE - used, d ? "x%lld" : "%lld", (long long)shape[d]);
}

const char *shape_text(int rank, const int64_t *shape) {
  char *text = text_buffer();
  append_shape(text, 0, rank, shape);
  return text;
}

const char *tensor_text(const orepa_tensor *t) {
  char *text = text_buffer();
  int used = snprintf(text, TEXT_SIZE, "%s ", orepa_dtype_name(t->dtype));
  append_shape(text, (size_t)used, t->rank, t->shape);
  return text;
}
