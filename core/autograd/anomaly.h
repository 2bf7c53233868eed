/* anomaly.h: looking for the op that makes the first number that is not finite. While the mode is on, the result of
 * every op and every gradient is looked at when it is made; off, that costs the look at one flag. */
#ifndef OREPA_CORE_ANOMALY_H
#define OREPA_CORE_ANOMALY_H

#include "tensor/tensor.h"

typedef struct autograd_node autograd_node;

extern _Thread_local orepa_anomaly anomaly_wanted;

/* For anomaly_check_... */
int anomaly_look_at_result(const char *op, orepa_tensor *y, int count, orepa_tensor *const *inputs);
int anomaly_look_at_gradient(orepa_tensor *g, const char *what, const char *op);
int anomaly_look_at_gradients(const autograd_node *node, orepa_tensor *const *dx);

/* y, which the op made of inputs (some may be NULL). 0, or -1 with a message. */
static inline int anomaly_check_result(const char *op, orepa_tensor *y, int count, orepa_tensor *const *inputs) {
  return anomaly_wanted ? anomaly_look_at_result(op, y, count, inputs) : 0;
}

/* A gradient that no backward function made: `what` says what it is, of which op's result. */
static inline int anomaly_check_gradient(orepa_tensor *g, const char *what, const char *op) {
  return anomaly_wanted ? anomaly_look_at_gradient(g, what, op) : 0;
}

/* What the node's backward function made. */
static inline int anomaly_check_gradients(const autograd_node *node, orepa_tensor *const *dx) {
  return anomaly_wanted ? anomaly_look_at_gradients(node, dx) : 0;
}

/* Results of ops are not looked at: backward functions compute gradients by ops, which are looked at when they are
 * whole. Gives back what was. */
bool anomaly_set_quiet(bool quiet);

/* Where the user's program is now, for a new node: malloc's; NULL: unknown, or the mode is off. */
char *anomaly_place(void);

#endif
