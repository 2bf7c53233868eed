/* optimizer.c: the step of SGD and the sums of squares; the classes are Lua (optim.lua). */
#include <string.h>

#include "bind.h"

/* The tensors of a list, in a userdata that stays on the stack; the list keeps them alive. NULLs make a list shorter than
 * `least` as long. */
static orepa_tensor **tensor_list(lua_State *L, int index, int least, int *count) {
  luaL_checktype(L, index, LUA_TTABLE);
  *count = (int)lua_rawlen(L, index);
  size_t size = (size_t)(*count > least ? *count : least) * sizeof(orepa_tensor *);
  orepa_tensor **tensors = memset(lua_newuserdatauv(L, size + 1, 0), 0, size);
  for (int k = 0; k < *count; k++) {
    lua_rawgeti(L, index, k + 1);
    tensors[k] = bind_test_tensor(L, -1);
    if (!tensors[k])
      bind_error(L, "item %d of a list of tensors is a %s", k + 1, luaL_typename(L, -1));
    lua_pop(L, 1);
  }
  return tensors;
}

static double *number_list(lua_State *L, int index, int count) {
  luaL_checktype(L, index, LUA_TTABLE);
  double *numbers = lua_newuserdatauv(L, (size_t)count * sizeof *numbers + 1, 0);
  for (int k = 0; k < count; k++) {
    lua_rawgeti(L, index, k + 1);
    numbers[k] = luaL_checknumber(L, -1);
    lua_pop(L, 1);
  }
  return numbers;
}

/* sgd_step(parameters, gradients, velocities, rates, decays, {momentum=, nesterov=}) */
static int l_sgd_step(lua_State *L) {
  static const char *const known[] = {"momentum", "nesterov", NULL};
  int count, gradients, velocities;
  lua_settop(L, 6); /* lists are pushed above the options */
  orepa_tensor **p = tensor_list(L, 1, 0, &count), **g = tensor_list(L, 2, 0, &gradients);
  orepa_tensor **v = tensor_list(L, 3, count, &velocities);
  double *rates = number_list(L, 4, count), *decays = number_list(L, 5, count);
  int options = bind_options(L, 6, "sgd_step", known);
  orepa_sgd_options o = {bind_option_number(L, options, "momentum", 0), bind_option_boolean(L, options, "nesterov", false)};
  if (gradients != count || (o.momentum != 0 && velocities != count))
    return bind_error(L, "sgd_step: %d parameters, %d gradients, %d velocities", count, gradients, velocities);
  if (orepa_sgd_step(count, p, g, v, rates, decays, &o))
    return bind_fail(L);
  return 0;
}

static int l_square_sums(lua_State *L) {
  int count;
  orepa_tensor **tensors = tensor_list(L, 1, 0, &count);
  BIND_RETURN(L, orepa_square_sums(count, tensors));
}

static const bind_row rows[] = {
    {"sgd_step", l_sgd_step,
     "sgd_step(parameters, gradients, velocities, rates, decays, {momentum=, nesterov=})\nOne step of SGD over lists of "
     "equal length, in one pass; optim.SGD is the class around it. With momentum there is a velocity for each.\n"
     "> orepa.sgd_step({orepa.ones(2)}, {orepa.ones(2)}, {}, {0.1}, {0})"},
    {"square_sums", l_square_sums,
     "square_sums(tensors) -> float64 tensor\nThe sum of squares of each tensor of a list; finite where the tensor is.\n"
     "> orepa.square_sums({orepa.ones(2), orepa.ones(3)})"},
    {NULL, NULL, NULL},
};

void bind_optimizer_family(lua_State *L) {
  bind_register(L, "orepa.", rows);
}
