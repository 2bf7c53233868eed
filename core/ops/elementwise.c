/* elementwise.c: every function of elementwise.h as an op: broadcasting, types, the call, the gradient. */
#include "autograd/anomaly.h"
#include "ops/norm_promise.h"

#include <string.h>

/* ---- the rows, as a table ---- */

static const struct {
  const char *name;
  int operands, types;
  int needs[ELEMENTWISE_MAX_OPERANDS];
} functions[FUNCTION_COUNT] = {
#define ROW(name, operands, types, forward, needs_a, da, needs_b, db, needs_c, dc)                                     \
  [FUNCTION_##name] = {#name, operands, ELEMENTWISE_##types, {needs_a, needs_b, needs_c}},
    ELEMENTWISE_ROWS(ROW)
#undef ROW
};

orepa_function orepa_function_by_name(const char *name) {
  for (int f = 0; f < FUNCTION_COUNT; f++)
    if (!strcmp(functions[f].name, name))
      return f;
  return error_set("no element-wise function is called '%s'", name);
}

int orepa_function_count(void) {
  return FUNCTION_COUNT;
}

const char *orepa_function_name(orepa_function f) {
  return functions[f].name;
}

int orepa_function_arity(orepa_function f) {
  return functions[f].operands;
}

/* ---- shape and type ---- */

int op_broadcast(const char *op, int rank_a, const int64_t *a, int rank_b, const int64_t *b, int *rank,
                 int64_t *shape) {
  int64_t result[OREPA_MAX_RANK];
  int most = rank_a > rank_b ? rank_a : rank_b;
  for (int d = 0; d < most; d++) {
    int64_t m = d + rank_a - most >= 0 ? a[d + rank_a - most] : 1,
            n = d + rank_b - most >= 0 ? b[d + rank_b - most] : 1;
    if (m != n && m != 1 && n != 1)
      return error_set("%s: shapes %s and %s don't broadcast", op, shape_text(rank_a, a), shape_text(rank_b, b));
    result[d] = m == 1 ? n : m;
  }
  *rank = most;
  memcpy(shape, result, (size_t)most * sizeof *shape);
  return 0;
}

static bool is_short_float(orepa_dtype t) {
  return t == OREPA_BFLOAT16 || t == OREPA_FLOAT16;
}

typedef struct {
  orepa_dtype compute; /* of all sources */
  orepa_dtype result;
  const orepa_device *device;
  int rank;
  int64_t shape[OREPA_MAX_RANK];
} elementwise_plan;

/* bfloat16 or float16 with float32 is float32; else equal types only. */
static int promote(const char *op, orepa_dtype a, orepa_dtype b, orepa_dtype *result) {
  if (a == b)
    *result = a;
  else if ((is_short_float(a) && b == OREPA_FLOAT32) || (a == OREPA_FLOAT32 && is_short_float(b)))
    *result = OREPA_FLOAT32;
  else
    return error_set("%s: %s and %s don't mix; convert one with to()", op, orepa_dtype_name(a), orepa_dtype_name(b));
  return 0;
}

/* Where only the condition of a choice is a tensor, its numbers say the type. */
static orepa_dtype type_of_numbers(orepa_function f, const orepa_operand *operands) {
  for (int k = 1; k < functions[f].operands; k++)
    if (!operands[k].is_integer)
      return OREPA_FLOAT32;
  return OREPA_INT64;
}

static bool is_int64(double x) {
  return x >= -0x1p63 && x < 0x1p63 && x == (double)(int64_t)x;
}

/* Whether the numbers among the operands need more than integers. */
static bool has_fraction(orepa_function f, const orepa_operand *operands) {
  for (int k = 0; k < functions[f].operands; k++)
    if (!operands[k].tensor && !operands[k].is_integer && !is_int64(operands[k].number))
      return true;
  return false;
}

/* A bool condition takes no part in the type. */
static int plan_type(orepa_function f, const orepa_operand *operands, elementwise_plan *plan) {
  const char *op = functions[f].name;
  const orepa_tensor *condition = functions[f].types == ELEMENTWISE_CHOICE ? operands[0].tensor : NULL;
  bool typed = false;
  plan->device = NULL;
  for (int k = 0; k < functions[f].operands; k++) {
    const orepa_tensor *t = operands[k].tensor;
    if (!t)
      continue;
    if (plan->device && plan->device != t->storage->device)
      return error_set("%s: one tensor is on '%s', another on '%s'", op, plan->device->name, t->storage->device->name);
    plan->device = t->storage->device;
    if (t == condition && k == 0)
      continue;
    if (promote(op, typed ? plan->compute : t->dtype, t->dtype, &plan->compute))
      return -1;
    typed = true;
  }
  if (!plan->device)
    return error_set("%s: no operand is a tensor", op);
  if (!typed)
    plan->compute = condition->dtype == OREPA_BOOL ? type_of_numbers(f, operands) : condition->dtype;
  if (!orepa_dtype_is_float(plan->compute) && (functions[f].types == ELEMENTWISE_REAL || has_fraction(f, operands)))
    plan->compute = OREPA_FLOAT32;
  if (condition && condition->dtype != OREPA_BOOL && condition->dtype != plan->compute)
    return error_set("%s: the condition is %s beside %s; a bool tensor expected", op, tensor_text(condition),
                     orepa_dtype_name(plan->compute));
  plan->result = plan->compute;
  if (functions[f].types == ELEMENTWISE_COMPARE)
    plan->result = OREPA_BOOL;
  else if (plan->compute == OREPA_BOOL) /* true + true is 2 */
    plan->compute = plan->result = OREPA_INT64;
  return 0;
}

static int make_plan(orepa_function f, const orepa_operand *operands, elementwise_plan *plan) {
  if (plan_type(f, operands, plan))
    return -1;
  plan->rank = 0;
  for (int k = 0; k < functions[f].operands; k++) {
    const orepa_tensor *t = operands[k].tensor;
    if (t && op_broadcast(functions[f].name, plan->rank, plan->shape, t->rank, t->shape, &plan->rank, plan->shape))
      return -1;
  }
  return 0;
}

/* ---- the call ---- */

/* Lets an array repeat where `shape` is larger. */
static void broadcast_array(device_array *array, int rank, const int64_t *shape) {
  device_array old = *array;
  array->rank = rank;
  for (int d = 0, k = old.rank - rank; d < rank; d++, k++) {
    array->strides[d] = k < 0 || (old.shape[k] == 1 && shape[d] != 1) ? 0 : old.strides[k];
    array->shape[d] = shape[d];
  }
}

/* Calls the kernel with sources as it wants them: of one type, of y's shape. */
static int run(int f, int derivative, orepa_tensor *y, int count, const orepa_operand *operands, orepa_dtype compute) {
  device_array sources[ELEMENTWISE_MAX_SOURCES] = {{0}}, dst;
  device_number numbers[ELEMENTWISE_MAX_SOURCES] = {{0}};
  orepa_tensor *converted[ELEMENTWISE_MAX_SOURCES] = {NULL};
  bool was = orepa_set_grad_enabled(false);
  int failed = tensor_materialize(y);
  for (int k = 0; k < count && !failed; k++) {
    if (!operands[k].tensor) {
      numbers[k] = tensor_number(&operands[k]);
      continue;
    }
    converted[k] = orepa_to(operands[k].tensor, compute, y->storage->device);
    failed = !converted[k] || tensor_reads(converted[k], &sources[k]);
    if (!failed)
      broadcast_array(&sources[k], y->rank, y->shape);
  }
  failed = failed || tensor_writes(y, &dst) ||
           DISPATCH(functions[f].name, compute, y->storage->device, elementwise, f, derivative, &dst, sources, numbers);
  for (int k = 0; k < count; k++)
    orepa_release(converted[k]);
  orepa_set_grad_enabled(was);
  return failed ? -1 : 0;
}

/* ---- the gradient ---- */

typedef struct {
  orepa_function function;
  orepa_dtype compute;
  orepa_operand numbers[ELEMENTWISE_MAX_OPERANDS];
  struct {
    orepa_dtype dtype;
    int rank;
    int64_t shape[OREPA_MAX_RANK];
  } operands[ELEMENTWISE_MAX_OPERANDS];
} elementwise_payload;

enum { SLOT_Y = ELEMENTWISE_MAX_OPERANDS, SLOTS };

/* One operand's gradient. Sources that its derivative does not read are numbers: nothing is loaded for them. */
static orepa_tensor *gradient_of(autograd_node *node, int operand, orepa_tensor *dy) {
  const elementwise_payload *p = node->payload;
  int needs = functions[p->function].needs[operand];
  if (needs == PASSES)
    return orepa_retain(dy);
  orepa_operand sources[ELEMENTWISE_MAX_SOURCES] = {OPERAND(dy)};
  for (int k = 0; k <= SLOT_Y; k++) {
    if (k < SLOT_Y && (needs >> k & 1) && !node->saved[k].tensor.storage)
      sources[k + 1] = p->numbers[k];
    else if (needs >> k & 1 && !(sources[k + 1].tensor = autograd_saved_tensor(node, k)))
      return NULL;
  }
  orepa_tensor *dx = tensor_new(p->compute, dy->storage->device, dy->rank, dy->shape);
  if (dx && run(p->function, operand + 1, dx, ELEMENTWISE_MAX_SOURCES, sources, p->compute))
    return tensor_fail(dx);
  return dx;
}

static int elementwise_backward(autograd_node *node, orepa_tensor *dy, orepa_tensor **dx) {
  const elementwise_payload *p = node->payload;
  for (int k = 0; k < node->inputs; k++) {
    if (!autograd_needs(node, k))
      continue;
    orepa_tensor *full = gradient_of(node, k, dy);
    orepa_tensor *summed = full ? op_sum_to(full, p->operands[k].rank, p->operands[k].shape) : NULL;
    orepa_release(full);
    dx[k] = summed ? orepa_to(summed, p->operands[k].dtype, dy->storage->device) : NULL;
    orepa_release(summed);
    if (!dx[k])
      return -1;
  }
  return 0;
}

static const autograd_op elementwise_ops[FUNCTION_COUNT] = {
#define ROW(name, ...) [FUNCTION_##name] = {#name, elementwise_backward, NULL},
    ELEMENTWISE_ROWS(ROW)
#undef ROW
};

static int inputs_of(orepa_function f, const orepa_operand *operands, orepa_tensor **inputs) {
  for (int k = 0; k < functions[f].operands; k++)
    inputs[k] = functions[f].needs[k] == NO_GRADIENT ? NULL : operands[k].tensor;
  return functions[f].operands;
}

/* `a` is what the first operand was before an op wrote over it, where that is needed. */
static int record(orepa_function f, const orepa_operand *operands, orepa_tensor *a, orepa_dtype compute,
                  orepa_tensor *y) {
  orepa_tensor *inputs[ELEMENTWISE_MAX_OPERANDS];
  int count = inputs_of(f, operands, inputs);
  int needs = 0; /* what some gradient reads: an addition keeps nothing, and has no slots */
  for (int k = 0; k < count; k++)
    if (inputs[k] && inputs[k]->requires_grad)
      needs |= functions[f].needs[k];
  int slots = needs & NEEDS_Y ? SLOTS : needs & (NEEDS_A + NEEDS_B + NEEDS_C) ? SLOT_Y : 0;
  autograd_node *node;
  if (autograd_record(&elementwise_ops[f], y, inputs, count, slots, sizeof(elementwise_payload), &node))
    return -1;
  if (!node)
    return 0;
  elementwise_payload *p = node->payload;
  p->function = f;
  p->compute = compute;
  for (int k = 0; k < count; k++) {
    p->numbers[k] = operands[k];
    p->numbers[k].tensor = NULL;
    if (!operands[k].tensor)
      continue;
    p->operands[k].dtype = operands[k].tensor->dtype;
    p->operands[k].rank = operands[k].tensor->rank;
    memcpy(p->operands[k].shape, operands[k].tensor->shape, sizeof p->operands[k].shape);
  }
  for (int k = 0; k < count; k++)
    if (needs >> k & 1)
      autograd_save(node, k, k == 0 ? a : operands[k].tensor);
  if (needs & NEEDS_Y)
    autograd_save(node, SLOT_Y, y);
  return 0;
}

orepa_tensor *orepa_apply(orepa_function f, const orepa_operand *operands) {
  elementwise_plan plan;
  orepa_tensor *y;
  if (make_plan(f, operands, &plan) || norm_promise_extend(f, operands, &y))
    return NULL;
  if (y) { /* it waits */
    bool relu = f == FUNCTION_relu;
    int failed = relu ? norm_promise_record_relu(operands[0].tensor, y)
                      : record(f, operands, operands[0].tensor, plan.compute, y);
    return failed ? tensor_fail(y) : y;
  }
  y = tensor_new(plan.result, plan.device, plan.rank, plan.shape);
  if (!y)
    return NULL;
  if (run(f, 0, y, functions[f].operands, operands, plan.compute) ||
      record(f, operands, operands[0].tensor, plan.compute, y))
    return tensor_fail(y);
  return y;
}

/* t is written by f of operands, the first of which is t; no other shares its memory if this is recorded. */
static int write_recorded(orepa_function f, orepa_tensor *t, const orepa_operand *operands, orepa_dtype compute) {
  orepa_tensor *inputs[ELEMENTWISE_MAX_OPERANDS];
  bool needs_a = false; /* the gradient of some operand reads what t was */
  for (int k = inputs_of(f, operands, inputs); k-- > 0;)
    needs_a = needs_a || (inputs[k] && inputs[k]->requires_grad && (functions[f].needs[k] & NEEDS_A));
  orepa_tensor *before = needs_a ? tensor_like(t) : orepa_retain(t);
  orepa_tensor *made = before ? orepa_detach(t) : NULL;
  int failed = !made || (needs_a && tensor_copy_into(before, t)) ||
               run(f, 0, made, functions[f].operands, operands, compute) || record(f, operands, before, compute, made);
  if (!failed)
    autograd_rebase(t, made);
  orepa_release(before);
  orepa_release(made);
  return failed ? -1 : 0;
}

int orepa_apply_in_place(orepa_function f, const orepa_operand *given) {
  const char *op = functions[f].name;
  orepa_tensor *t = given[0].tensor;
  elementwise_plan plan;
  if (!t)
    return error_set("%s_: the first operand must be a tensor", op);
  if (make_plan(f, given, &plan))
    return -1;
  if (plan.result != t->dtype || plan.rank != t->rank ||
      memcmp(plan.shape, t->shape, (size_t)t->rank * sizeof *t->shape))
    return error_set("%s_: the result is %s %s, which does not fit into %s", op, orepa_dtype_name(plan.result),
                     shape_text(plan.rank, plan.shape), tensor_text(t));
  orepa_tensor *inputs[ELEMENTWISE_MAX_OPERANDS];
  bool recorded = autograd_wanted(inputs, inputs_of(f, given, inputs));
  if (autograd_check_in_place(op, t, recorded))
    return -1;
  orepa_operand operands[ELEMENTWISE_MAX_OPERANDS] = {{NULL}};
  int failed = 0;
  for (int k = 0; k < functions[f].operands; k++) { /* an operand that overlaps t is read from a copy */
    operands[k] = given[k];
    if (k > 0 && given[k].tensor && given[k].tensor->storage == t->storage)
      failed = failed || !(operands[k].tensor = orepa_clone(given[k].tensor));
  }
  if (!failed)
    failed = recorded ? write_recorded(f, t, operands, plan.compute)
                      : run(f, 0, t, functions[f].operands, operands, plan.compute);
  for (int k = 1; k < functions[f].operands; k++)
    if (operands[k].tensor != given[k].tensor)
      orepa_release(operands[k].tensor);
  if (!failed && !recorded)
    failed = anomaly_check_result(op, t, functions[f].operands, inputs);
  return failed ? -1 : 0;
}

/* ---- by name, for the engine itself ---- */

orepa_tensor *op_apply2(orepa_function f, orepa_operand a, orepa_operand b) {
  orepa_operand operands[ELEMENTWISE_MAX_OPERANDS] = {a, b};
  return orepa_apply(f, operands);
}

orepa_tensor *orepa_add(orepa_tensor *a, orepa_tensor *b) {
  return op_apply2(FUNCTION_add, OPERAND(a), OPERAND(b));
}

orepa_tensor *orepa_mul(orepa_tensor *a, orepa_tensor *b) {
  return op_apply2(FUNCTION_mul, OPERAND(a), OPERAND(b));
}

orepa_tensor *orepa_relu(orepa_tensor *x) {
  return orepa_apply(FUNCTION_relu, &OPERAND(x));
}
