/* autograd.c: backward and what it calls in Lua, requires_grad, and the regions: no_grad and autocast. */
#include <stdlib.h>

#include "bind.h"

#define BIND_GUARD "orepa.Guard"

/* ---- callbacks ---- */

/* A call of backward; calls nest where a callback makes one. */
typedef struct backward_call {
  lua_State *L;
  int error; /* the place on L's stack for what a callback raised */
  bool raised;
  struct backward_call *outer;
} backward_call;

static _Thread_local backward_call *current;

int bind_call_back(lua_CFunction f, void *argument) {
  lua_State *L = current->L;
  lua_pushcfunction(L, f);
  lua_pushlightuserdata(L, argument);
  if (lua_pcall(L, 1, 0, 0) == LUA_OK)
    return 0;
  lua_replace(L, current->error);
  current->raised = true;
  return -1;
}

static _Thread_local bind_reference *given_up;

void bind_give_up(bind_reference *r) {
  r->next = given_up;
  given_up = r;
}

void bind_give_up_now(lua_State *L) {
  while (given_up) {
    bind_reference *r = given_up;
    given_up = r->next;
    luaL_unref(L, LUA_REGISTRYINDEX, r->reference);
    free(r);
  }
}

/* ---- backward ---- */

static int l_backward(lua_State *L) {
  static const char *const known[] = {"retain_graph", NULL};
  orepa_tensor *y = bind_tensor(L, 1);
  int at = lua_istable(L, 2) ? 2 : 3;
  orepa_tensor *dy = at == 3 ? bind_tensor_or_nil(L, 2) : NULL;
  bool retain = bind_option_boolean(L, bind_options(L, at, "backward", known), "retain_graph", false);
  bind_tidy(L); /* what dead handles hold, the pass could not free on its way */
  luaL_checkstack(L, 4, "backward");
  lua_pushnil(L);
  backward_call call = {L, lua_gettop(L), false, current};
  current = &call;
  int failed = orepa_backward(y, dy, retain);
  current = call.outer;
  bind_give_up_now(L);
  if (failed && call.raised)
    return lua_error(L);
  return failed ? bind_fail(L) : 0;
}

static int l_requires_grad(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  bool on = lua_isnone(L, 2) || lua_toboolean(L, 2);
  if (orepa_set_requires_grad(t, on))
    return bind_fail(L);
  lua_settop(L, 1);
  return 1;
}

/* ---- regions: f(...) gives back what its function returns; without one it is a guard for `local _ <close> =` ---- */

static void set_grad(int on) {
  orepa_set_grad_enabled(on != 0);
}

static void set_autocast(int dtype) {
  orepa_set_autocast((orepa_dtype)dtype);
}

typedef struct {
  void (*set)(int);
  int was;
  bool open;
} region_guard;

static int close_guard(lua_State *L) {
  region_guard *guard = luaL_checkudata(L, 1, BIND_GUARD);
  if (guard->open)
    guard->set(guard->was);
  guard->open = false;
  return 0;
}

/* The region is entered already; it was `was` before. */
static int push_guard(lua_State *L, void (*set)(int), int was) {
  region_guard *guard = lua_newuserdatauv(L, sizeof *guard, 0);
  *guard = (region_guard){set, was, true};
  luaL_setmetatable(L, BIND_GUARD);
  return 1;
}

static int finish(lua_State *L, int status) {
  if (status != LUA_OK && status != LUA_YIELD)
    return lua_error(L);
  return lua_gettop(L);
}

static int finish_no_grad(lua_State *L, int status, lua_KContext was) {
  set_grad((int)was);
  return finish(L, status);
}

static int l_no_grad(lua_State *L) {
  int was = orepa_grad_enabled();
  if (lua_isnoneornil(L, 1)) {
    push_guard(L, set_grad, was);
    set_grad(false);
    return 1;
  }
  luaL_checktype(L, 1, LUA_TFUNCTION);
  lua_settop(L, 1);
  set_grad(false);
  return finish_no_grad(L, lua_pcallk(L, 0, LUA_MULTRET, 0, was, finish_no_grad), was);
}

static int finish_autocast(lua_State *L, int status, lua_KContext was) {
  set_autocast((int)was);
  return finish(L, status);
}

static int l_autocast(lua_State *L) {
  int was = (int)orepa_autocast();
  orepa_dtype dtype;
  if (lua_type(L, 1) != LUA_TSTRING)
    return bind_error(L, "autocast: the name of a type expected, got %s", luaL_typename(L, 1));
  bool guards = lua_isnoneornil(L, 2);
  if (!guards)
    luaL_checktype(L, 2, LUA_TFUNCTION);
  lua_settop(L, guards ? 1 : 2);
  if (guards)
    push_guard(L, set_autocast, was);
  if (orepa_dtype_by_name(lua_tostring(L, 1), &dtype) || orepa_set_autocast(dtype))
    return bind_fail(L);
  if (guards)
    return 1;
  lua_remove(L, 1);
  return finish_autocast(L, lua_pcallk(L, 0, LUA_MULTRET, 0, was, finish_autocast), was);
}

static int l_get_autocast(lua_State *L) {
  lua_pushstring(L, orepa_dtype_name(orepa_autocast()));
  return 1;
}

static int l_is_grad_enabled(lua_State *L) {
  lua_pushboolean(L, orepa_grad_enabled());
  return 1;
}

static const bind_row functions[] = {
    {"no_grad", l_no_grad,
     "no_grad(f) -> what f returns\nRuns f without recording a graph. Without argument it gives a guard: `local _ "
     "<close> = "
     "orepa.no_grad()` records nothing until its scope ends, by an error too.\n"
     "> orepa.no_grad(function() return orepa.ones(2) end)"},
    {"autocast", l_autocast,
     "autocast(dtype, f) -> what f returns\nRuns f with convolutions, linear layers and what is between them in dtype: "
     "\"bfloat16\", or \"float32\" to switch that off within. Parameters, their gradients, statistics of norms, the "
     "average pool before a classifier and losses stay float32. Without f it gives a guard: `local _ <close> = "
     "orepa.autocast(\"bfloat16\")`. Where float32 is faster (a processor without AMX) it is used instead, and one "
     "line "
     "on stderr says so; with OREPA_BFLOAT16=1 in the environment bfloat16 is used everywhere, with 0 nowhere.\n"
     "> orepa.autocast(\"bfloat16\", function() return F.linear(orepa.ones(2, 3), orepa.ones(4, 3)) end)"},
    {"get_autocast", l_get_autocast,
     "get_autocast() -> string\nThe type of the autocast that is entered now; \"float32\": none.\n"
     "> orepa.get_autocast()"},
    {"is_grad_enabled", l_is_grad_enabled,
     "is_grad_enabled() -> boolean\nWhether ops record a graph now (or would, in a checkpoint).\n> "
     "orepa.is_grad_enabled()"},
    {NULL, NULL, NULL},
};

static const bind_row methods[] = {
    {"backward", l_backward,
     "t:backward(dy, {retain_graph=})\nAdds gradients to the leaves that t was computed from; a single number needs no "
     "dy. The graph is freed on the way unless it is retained.\n"
     "> local x = orepa.ones(2):requires_grad_(); (x * x):sum():backward(); return x.grad"},
    {"requires_grad_", l_requires_grad,
     "t:requires_grad_(on) -> t\nAsks for t's gradient, or no longer. Of floats, and of tensors that no op made.\n"
     "> orepa.ones(2):requires_grad_()"},
    {NULL, NULL, NULL},
};

void bind_autograd_family(lua_State *L) {
  bind_register(L, "orepa.", functions);
  bind_end_with(L, BIND_GUARD, "__close", close_guard);
  bind_push_methods(L);
  bind_register(L, "t:", methods);
  lua_pop(L, 1);
}
