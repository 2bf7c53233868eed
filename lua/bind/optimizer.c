/* optimizer.c: the step of SGD and the sums of squares; the classes are Lua (optim.lua). */
#include "bind.h"

/* The tensors of a list, in a userdata that stays on the stack; the list keeps them alive. */
static orepa_tensor **tensor_list(lua_State *L, int index, int *count) {
  luaL_checktype(L, index, LUA_TTABLE);
  *count = (int)lua_rawlen(L, index);
  orepa_tensor **tensors = lua_newuserdatauv(L, (size_t)*count * sizeof *tensors + 1, 0);
  for (int k = 0; k < *count; k++) {
    lua_rawgeti(L, index, k + 1);
    tensors[k] = bind_test_tensor(L, -1);
    if (!tensors[k])
      bind_error(L, "item %d of a list of tensors is a %s", k + 1, luaL_typename(L, -1));
    lua_pop(L, 1);
  }
  return tensors;
}

/* Of a list of numbers the k-th, counted from 0. */
static double number_at(lua_State *L, int index, int k, const char *what) {
  lua_rawgeti(L, index, k + 1);
  if (lua_type(L, -1) != LUA_TNUMBER)
    bind_error(L, "sgd_step: %s %d is a %s", what, k + 1, luaL_typename(L, -1));
  double number = lua_tonumber(L, -1);
  lua_pop(L, 1);
  return number;
}

/* The velocity of a parameter: from the list, or zeros that are put there. */
static orepa_tensor *velocity_at(lua_State *L, int index, int k, const orepa_tensor *p) {
  if (lua_rawgeti(L, index, k + 1) == LUA_TNIL) {
    orepa_tensor **fresh = bind_new(L);
    *fresh = orepa_full(orepa_tensor_dtype(p), orepa_tensor_device(p), orepa_rank(p), orepa_shape(p), 0);
    if (!*fresh)
      bind_fail(L);
    lua_pushvalue(L, -1);
    lua_rawseti(L, index, k + 1);
    lua_remove(L, -2); /* the nil */
  }
  orepa_tensor *v = bind_test_tensor(L, -1);
  if (!v)
    bind_error(L, "sgd_step: velocity %d is a %s", k + 1, luaL_typename(L, -1));
  lua_pop(L, 1);
  return v;
}

/* sgd_step(parameters, velocities, rate_factors, decay_factors, {lr=, weight_decay=, momentum=, nesterov=}) */
static int l_sgd_step(lua_State *L) {
  static const char *const known[] = {"lr", "weight_decay", "momentum", "nesterov", NULL};
  enum { PARAMETERS = 1, VELOCITIES, RATES, DECAYS, OPTIONS };
  lua_settop(L, OPTIONS); /* lists are pushed above */
  for (int k = VELOCITIES; k <= DECAYS; k++)
    luaL_checktype(L, k, LUA_TTABLE);
  int options = bind_options(L, OPTIONS, "sgd_step", known), count, moved = 0;
  double lr = bind_option_number(L, options, "lr", 0), decay = bind_option_number(L, options, "weight_decay", 0);
  orepa_sgd_options o = {bind_option_number(L, options, "momentum", 0),
                         bind_option_boolean(L, options, "nesterov", false)};
  orepa_tensor **p = tensor_list(L, PARAMETERS, &count);
  size_t room = (size_t)count * sizeof(orepa_tensor *) + 1;
  orepa_tensor **g = lua_newuserdatauv(L, room, 0), **v = lua_newuserdatauv(L, room, 0);
  double *rates = lua_newuserdatauv(L, (size_t)count * sizeof *rates + 1, 0);
  double *decays = lua_newuserdatauv(L, (size_t)count * sizeof *decays + 1, 0);
  for (int k = 0; k < count; k++) { /* those with a gradient move together */
    orepa_tensor *gradient = orepa_grad(p[k]);
    if (!gradient)
      continue;
    g[moved] = gradient;
    v[moved] = o.momentum != 0 ? velocity_at(L, VELOCITIES, k, p[k]) : NULL;
    rates[moved] = lr * number_at(L, RATES, k, "rate factor");
    decays[moved] = decay * number_at(L, DECAYS, k, "decay factor");
    p[moved++] = p[k];
  }
  int64_t event = bind_begin_op(L);
  int failed = orepa_sgd_step(moved, p, g, v, rates, decays, &o);
  bind_end_op(event, NULL);
  return failed ? bind_fail(L) : 0;
}

static int l_square_sums(lua_State *L) {
  int count;
  orepa_tensor **tensors = tensor_list(L, 1, &count);
  BIND_RETURN(L, orepa_square_sums(count, tensors));
}

/* gradient_square_sums(parameters) */
static int l_gradient_square_sums(lua_State *L) {
  int count, found = 0;
  lua_settop(L, 1);
  orepa_tensor **p = tensor_list(L, 1, &count);
  orepa_tensor **g = lua_newuserdatauv(L, (size_t)count * sizeof *g + 1, 0), **sums = bind_new(L);
  double *values = lua_newuserdatauv(L, (size_t)count * sizeof *values + 1, 0);
  for (int k = 0; k < count; k++)
    if (orepa_grad(p[k]))
      g[found++] = orepa_grad(p[k]);
  int64_t event = bind_begin_op(L);
  *sums = found ? orepa_square_sums(found, g) : NULL;
  bool failed = found && (!*sums || orepa_to_host(*sums, values, (size_t)found * sizeof *values));
  bind_end_op(event, *sums);
  if (failed)
    return bind_fail(L);
  lua_createtable(L, count, 0);
  for (int k = 0, at = 0; k < count; k++) {
    lua_pushnumber(L, orepa_grad(p[k]) ? values[at++] : 0);
    lua_rawseti(L, -2, k + 1);
  }
  return 1;
}

static const bind_row rows[] = {
    {"sgd_step", l_sgd_step,
     "sgd_step(parameters, velocities, rate_factors, decay_factors, {lr=, weight_decay=, momentum=, nesterov=})\nOne "
     "step of "
     "SGD over all parameters of a list that have a gradient, in one pass; optim.SGD is the class around it. With "
     "momentum, "
     "velocities that are missing are made. lr and weight_decay are multiplied by each parameter's factors.\n"
     "> local p = nn.Parameter(orepa.ones(2)); p:sum():backward(); orepa.sgd_step({p}, {}, {1}, {1}, {lr = 0.1})"},
    {"gradient_square_sums", l_gradient_square_sums,
     "gradient_square_sums(parameters) -> list of numbers\nThe sum of squares of each parameter's gradient, 0 where it "
     "has "
     "none; finite where the gradient is. One copy from the device.\n"
     "> local p = nn.Parameter(orepa.ones(2)); p:sum():backward(); return orepa.gradient_square_sums({p})"},
    {"square_sums", l_square_sums,
     "square_sums(tensors) -> float64 tensor\nThe sum of squares of each tensor of a list; finite where the tensor "
     "is.\n"
     "> orepa.square_sums({orepa.ones(2), orepa.ones(3)})"},
    {NULL, NULL, NULL},
};

void bind_optimizer_family(lua_State *L) {
  bind_register(L, "orepa.", rows);
}
