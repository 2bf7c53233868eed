/* error.h: the message of the last failure, one per thread. Everything in the engine that fails leaves one here. */
#ifndef OREPA_CORE_ERROR_H
#define OREPA_CORE_ERROR_H

#include "orepa.h"

#if defined(__GNUC__)
#define ERROR_PRINTF __attribute__((format(printf, 1, 2)))
#else
#define ERROR_PRINTF
#endif

/* Leaves the message; returns -1, so that `return error_set(...)` reads well. */
int error_set(const char *format, ...) ERROR_PRINTF;
/* The same for memory that ran out: orepa_error_is_out_of_memory tells it apart. */
int error_out_of_memory(const char *format, ...) ERROR_PRINTF;
/* Puts words in front of the message: "stage1.0.conv1: " and the like. */
int error_prefix(const char *format, ...) ERROR_PRINTF;

/* "8x3x32x32", "scalar" for rank 0. The text lives in one of a few rotating buffers of the thread. */
const char *shape_text(int rank, const int64_t *shape);
const char *tensor_text(const orepa_tensor *t); /* "float32 8x3x32x32" */

#endif
