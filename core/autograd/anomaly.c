/* anomaly.c: naming the op that made a number that is not finite, in forward or in backward. */
#include "autograd/anomaly.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "autograd/autograd.h"
#include "elementwise.h"

_Thread_local orepa_anomaly anomaly_wanted;
static _Thread_local bool is_quiet;
static _Thread_local char place[200];

orepa_anomaly orepa_set_anomaly(orepa_anomaly wanted) {
  orepa_anomaly was = anomaly_wanted;
  anomaly_wanted = wanted;
  place[0] = '\0';
  return was;
}

orepa_anomaly orepa_anomaly_wanted(void) {
  return anomaly_wanted;
}

void orepa_set_place(const char *text) {
  snprintf(place, sizeof place, "%s", text);
}

bool anomaly_set_quiet(bool quiet) {
  bool was = is_quiet;
  is_quiet = quiet;
  return was;
}

char *anomaly_place(void) {
  if (!anomaly_wanted || !place[0])
    return NULL;
  size_t bytes = strlen(place) + 1;
  char *copy = malloc(bytes);
  return copy ? memcpy(copy, place, bytes) : NULL; /* a name less in a message */
}

/* ---- looking ---- */

static bool is_bad(double x) {
  return anomaly_wanted == OREPA_ANOMALY_NAN ? isnan(x) : !isfinite(x);
}

/* Whether all elements are right, by the device; false if it can't say: -1 then. */
static int all_are_right(orepa_tensor *t, bool *right) {
  bool finite = anomaly_wanted == OREPA_ANOMALY_FINITE;
  double value;
  orepa_operand operands[ELEMENTWISE_MAX_OPERANDS] = {{.tensor = t}, {.tensor = t}};
  orepa_tensor *each = orepa_apply(finite ? FUNCTION_isfinite : FUNCTION_eq, operands);
  orepa_tensor *all = each ? orepa_reduce(OREPA_ALL, each, 0, NULL, false) : NULL;
  int failed = !all || orepa_item(all, &value);
  *right = !failed && value != 0;
  orepa_release(each);
  orepa_release(all);
  return failed ? -1 : 0;
}

/* The wrong elements, one of which there is. */
typedef struct {
  int64_t count, first;
  double value; /* of the first */
} wrong_elements;

static int count_wrong(orepa_tensor *t, wrong_elements *w) {
  size_t count = (size_t)orepa_count(t);
  double *values = malloc(count * sizeof *values);
  orepa_tensor *wide = values ? orepa_to(t, OREPA_FLOAT64, t->storage->device) : NULL;
  int failed = !wide || orepa_to_host(wide, values, count * sizeof *values);
  if (!values)
    error_out_of_memory("detect_anomaly: out of memory: no room for %zu numbers", count);
  for (size_t k = 0; k < count && !failed; k++)
    if (is_bad(values[k]) && w->count++ == 0) {
      w->first = (int64_t)k;
      w->value = values[k];
    }
  orepa_release(wide);
  free(values);
  return failed ? -1 : 0;
}

/* Leaves w->count at 0 where all is right. -1 with a message if it can't be known. */
static int look(orepa_tensor *t, wrong_elements *w) {
  *w = (wrong_elements){0, 0, 0};
  if (!orepa_dtype_is_float(t->dtype) || orepa_count(t) == 0)
    return 0;
  bool was = orepa_set_grad_enabled(false), was_quiet = anomaly_set_quiet(true), right;
  int failed = all_are_right(t, &right) && orepa_error_is_out_of_memory();
  failed = failed || (!right && count_wrong(t, w));
  anomaly_set_quiet(was_quiet);
  orepa_set_grad_enabled(was);
  return failed ? -1 : 0;
}

/* ---- saying so ---- */

/* "nan at {1, 3} of float32 2x3, and 2 more": positions count from 1. */
static void describe(char *text, size_t size, const orepa_tensor *t, const wrong_elements *w) {
  int64_t at[OREPA_MAX_RANK], left = w->first;
  for (int d = t->rank; d-- > 0; left /= t->shape[d])
    at[d] = left % t->shape[d] + 1;
  size_t n = (size_t)snprintf(text, size, "%s", isnan(w->value) ? "nan" : w->value < 0 ? "-inf" : "inf");
  for (int d = 0; d < t->rank && n < size; d++)
    n += (size_t)snprintf(text + n, size - n, d ? ", %lld" : " at {%lld", (long long)at[d]);
  if (n < size)
    n += (size_t)snprintf(text + n, size - n, t->rank ? "} of %s" : " as %s", tensor_text(t));
  if (n < size && w->count > 1)
    snprintf(text + n, size - n, ", and %lld more", (long long)w->count - 1);
}

enum { DESCRIPTION = 200 };

/* Whether the op only brings numbers to another place: what is made of numbers that were wrong before says more. */
static bool only_moves(const char *op) {
  static const char *const names[] = {"to", "autocast", "clone", "reshape", "permute", "slice", "select", "expand"};
  for (size_t k = 0; k < sizeof names / sizeof *names; k++)
    if (!strcmp(op, names[k]))
      return true;
  return false;
}

/* The first input that was wrong before; -1: none, -2 with a message if it can't be known. */
static int wrong_input(orepa_tensor *y, int count, orepa_tensor *const *inputs, bool moves, wrong_elements *w) {
  for (int k = 0; k < count; k++) {
    if (!inputs[k] || (inputs[k]->storage == y->storage && !moves)) /* written over */
      continue;
    if (look(inputs[k], w))
      return -2;
    if (w->count)
      return k;
  }
  return -1;
}

int anomaly_look_at_result(const char *op, orepa_tensor *y, int count, orepa_tensor *const *inputs) {
  wrong_elements w, before;
  char text[DESCRIPTION], given[DESCRIPTION];
  if (is_quiet)
    return 0;
  if (look(y, &w))
    return -1;
  if (!w.count)
    return 0;
  int k = wrong_input(y, count, inputs, only_moves(op), &before);
  if (k < -1 || (k >= 0 && only_moves(op)))
    return k < -1 ? -1 : 0;
  describe(text, sizeof text, y, &w);
  if (k < 0)
    return error_set("detect_anomaly: '%s' gives %s", op, text);
  describe(given, sizeof given, inputs[k], &before);
  return error_set("detect_anomaly: '%s' gives %s; its input %d was not finite before: %s", op, text, k + 1, given);
}

int anomaly_look_at_gradient(orepa_tensor *g, const char *what, const char *op) {
  wrong_elements w;
  char text[DESCRIPTION];
  if (look(g, &w))
    return -1;
  if (!w.count)
    return 0;
  describe(text, sizeof text, g, &w);
  return error_set("detect_anomaly: %s '%s' has %s", what, op, text);
}

int anomaly_look_at_gradients(const autograd_node *node, orepa_tensor *const *dx) {
  for (int k = 0; k < node->inputs; k++) {
    wrong_elements w = {0, 0, 0};
    char text[DESCRIPTION];
    if (dx[k] && look(dx[k], &w))
      return -1;
    if (!w.count)
      continue;
    describe(text, sizeof text, dx[k], &w);
    return error_set("detect_anomaly: the backward of '%s'%s%s%s gives its input %d a gradient that has %s",
                     node->op->name, node->place ? " (called at " : "", node->place ? node->place : "",
                     node->place ? ")" : "", k + 1, text);
  }
  return 0;
}
