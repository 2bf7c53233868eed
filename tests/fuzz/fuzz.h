/* fuzz.h: what the fuzz targets share. A condition that doesn't hold ends the process, which is how a target tells. */
#ifndef OREPA_TESTS_FUZZ_H
#define OREPA_TESTS_FUZZ_H

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "orepa.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static inline void require(int condition) {
  if (!condition)
    abort();
}

static inline const orepa_device *cpu(void) {
  return orepa_device_by_name("cpu");
}

/* UTF-8. */
static inline void check_text(const char *text) {
  json_t *json = json_string(text);
  require(json != NULL);
  json_decref(json);
}

/* A message that can be shown: it names the file, is UTF-8 and has no control characters. */
static inline void check_message(const char *name) {
  const char *message = orepa_error();
  require(!strncmp(message, name, strlen(name)) && !strncmp(message + strlen(name), ": ", 2));
  check_text(message);
  for (; *message; message++)
    require((unsigned char)*message >= 0x20 && *message != 0x7f);
}

/* All elements in logical order, in memory of malloc's: one byte more than there are. */
static inline unsigned char *elements_of(orepa_tensor *t) {
  size_t bytes = (size_t)orepa_count(t) * orepa_dtype_size(orepa_tensor_dtype(t));
  unsigned char *elements = malloc(bytes + 1);
  require(elements && !orepa_to_host(t, elements, bytes));
  return elements;
}

#endif
