/* autograd.c: backward, requires_grad and no_grad. */
#include "bind.h"

#define BIND_GUARD "orepa.NoGradGuard"

static int l_backward(lua_State *L) {
  static const char *const known[] = {"retain_graph", NULL};
  orepa_tensor *y = bind_tensor(L, 1);
  int at = lua_istable(L, 2) ? 2 : 3;
  orepa_tensor *dy = at == 3 ? bind_tensor_or_nil(L, 2) : NULL;
  bool retain = bind_option_boolean(L, bind_options(L, at, "backward", known), "retain_graph", false);
  if (orepa_backward(y, dy, retain))
    return bind_fail(L);
  return 0;
}

static int l_requires_grad(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  bool on = lua_isnone(L, 2) || lua_toboolean(L, 2);
  if (orepa_set_requires_grad(t, on))
    return bind_fail(L);
  lua_settop(L, 1);
  return 1;
}

/* ---- no_grad(f) gives back what f returns; no_grad() is a guard for `local _ <close> =` ---- */

typedef struct {
  bool was, open;
} grad_guard;

static int close_guard(lua_State *L) {
  grad_guard *guard = luaL_checkudata(L, 1, BIND_GUARD);
  if (guard->open)
    orepa_set_grad_enabled(guard->was);
  guard->open = false;
  return 0;
}

static int finish_no_grad(lua_State *L, int status, lua_KContext was) {
  orepa_set_grad_enabled(was != 0);
  if (status != LUA_OK && status != LUA_YIELD)
    return lua_error(L);
  return lua_gettop(L);
}

static int l_no_grad(lua_State *L) {
  bool was = orepa_grad_enabled();
  if (lua_isnoneornil(L, 1)) {
    grad_guard *guard = lua_newuserdatauv(L, sizeof *guard, 0);
    *guard = (grad_guard){was, true};
    luaL_setmetatable(L, BIND_GUARD);
    orepa_set_grad_enabled(false);
    return 1;
  }
  luaL_checktype(L, 1, LUA_TFUNCTION);
  lua_settop(L, 1);
  orepa_set_grad_enabled(false);
  return finish_no_grad(L, lua_pcallk(L, 0, LUA_MULTRET, 0, was, finish_no_grad), was);
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
    {"is_grad_enabled", l_is_grad_enabled,
     "is_grad_enabled() -> boolean\nWhether ops record a graph now.\n> orepa.is_grad_enabled()"},
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
  luaL_newmetatable(L, BIND_GUARD);
  lua_pushcfunction(L, close_guard);
  lua_setfield(L, -2, "__close");
  lua_pop(L, 1);
  bind_push_methods(L);
  bind_register(L, "t:", methods);
  lua_pop(L, 1);
}
