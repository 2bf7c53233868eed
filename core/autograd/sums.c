/* sums.c: gradients that meet: at a node, at a leaf. */
#include "autograd/pass.h"
#include "elementwise.h"
#include "ops/gradient_promise.h"

bool gradient_is_own(orepa_tensor *t) {
  return atomic_load(&t->references) == 1 && atomic_load(&t->storage->references) == 1 && orepa_is_contiguous(t);
}

int gradient_accumulate(orepa_tensor **sum, orepa_tensor *g, bool may_wait) {
  if (!*sum) {
    *sum = g;
    return 0;
  }
  orepa_tensor *waiting = NULL;
  if (may_wait && gradient_promise_sum(*sum, g, &waiting)) {
    orepa_release(g);
    return -1;
  }
  if (waiting) {
    orepa_release(*sum);
    orepa_release(g);
    *sum = waiting;
    return 0;
  }
  if (gradient_is_own(*sum)) {
    orepa_operand operands[2] = {{.tensor = *sum}, {.tensor = g}};
    int failed = orepa_apply_in_place(FUNCTION_add, operands);
    orepa_release(g);
    return failed;
  }
  orepa_tensor *total = gradient_is_own(g) ? g : NULL;
  if (total) {
    orepa_operand operands[2] = {{.tensor = g}, {.tensor = *sum}};
    if (orepa_apply_in_place(FUNCTION_add, operands)) {
      orepa_release(g);
      return -1;
    }
  } else {
    total = orepa_add(*sum, g);
    orepa_release(g);
    if (!total)
      return -1;
  }
  orepa_release(*sum);
  *sum = total;
  return 0;
}

orepa_tensor *gradient_of_kind(const orepa_tensor *t, orepa_tensor *g) {
  if (g->dtype == t->dtype && g->storage->device == t->storage->device)
    return g;
  orepa_tensor *converted = orepa_to(g, t->dtype, t->storage->device);
  orepa_release(g);
  return converted;
}

orepa_tensor *gradient_of_its_own(const orepa_tensor *t, orepa_tensor *given) {
  orepa_tensor *g = gradient_of_kind(t, given);
  if (g && !gradient_is_own(g)) {
    orepa_tensor *own = orepa_clone(g);
    orepa_release(g);
    g = own;
  }
  return g && tensor_materialize(g) ? tensor_fail(g) : g;
}

int gradient_into(orepa_tensor *t, orepa_tensor *given) {
  orepa_tensor *g = t->grad ? gradient_of_kind(t, given) : gradient_of_its_own(t, given);
  if (!g)
    return -1;
  if (!t->grad) {
    t->grad = g;
    return 0;
  }
  orepa_operand operands[2] = {{.tensor = t->grad}, {.tensor = g}};
  int failed = orepa_apply_in_place(FUNCTION_add, operands);
  orepa_release(g);
  return failed;
}
