/* hooks.c: functions that are called with the gradient of a tensor, and tensors that retain theirs. */
#include <stdlib.h>

#include "bind.h"

#define BIND_HOOK "orepa.Hook"

/* ---- calling ---- */

typedef struct {
  int reference; /* of the function */
  orepa_tensor *gradient, **instead;
} hook_call;

static int call_function(lua_State *L) {
  hook_call *call = lua_touserdata(L, 1);
  lua_rawgeti(L, LUA_REGISTRYINDEX, call->reference);
  bind_push(L, call->gradient);
  lua_call(L, 1, 1);
  if (!lua_toboolean(L, -1))
    return 0;
  orepa_tensor **given = luaL_testudata(L, -1, BIND_TENSOR);
  if (!given || !*given)
    return bind_error(L, "register_hook: the hook gave a %s; a tensor or nothing expected",
                      given ? "released tensor" : luaL_typename(L, -1));
  *call->instead = orepa_retain(*given);
  return 0;
}

static int call_hook(void *payload, orepa_tensor *gradient, orepa_tensor **instead) {
  hook_call call = {((bind_reference *)payload)->reference, gradient, instead};
  return bind_call_back(call_function, &call);
}

static void dispose(void *payload) {
  bind_give_up(payload);
}

/* ---- making ---- */

static int l_register_hook(lua_State *L) {
  static const orepa_hook_kind kind = {call_hook, dispose};
  orepa_tensor *t = bind_tensor(L, 1);
  if (lua_type(L, 2) != LUA_TFUNCTION && !luaL_getmetafield(L, 2, "__call"))
    return bind_error(L, "register_hook: a function expected, got %s", luaL_typename(L, 2));
  orepa_hook **handle = lua_newuserdatauv(L, sizeof *handle, 0);
  *handle = NULL;
  luaL_setmetatable(L, BIND_HOOK);
  lua_pushvalue(L, 2);
  int reference = luaL_ref(L, LUA_REGISTRYINDEX);
  bind_reference *payload = calloc(1, sizeof *payload);
  if (!payload) {
    luaL_unref(L, LUA_REGISTRYINDEX, reference);
    return bind_error(L, "register_hook: out of memory: no room for a hook");
  }
  payload->reference = reference;
  *handle = orepa_register_hook(t, &kind, payload);
  if (!*handle) {
    bind_give_up_now(L);
    return bind_fail(L);
  }
  return 1;
}

static orepa_hook **check_hook(lua_State *L) {
  orepa_hook **handle = luaL_testudata(L, 1, BIND_HOOK);
  if (!handle)
    bind_error(L, "argument 1: a hook expected, as register_hook gives it, got %s", luaL_typename(L, 1));
  return handle;
}

static int l_remove(lua_State *L) {
  orepa_hook **handle = check_hook(L);
  if (*handle)
    orepa_hook_remove(*handle);
  bind_give_up_now(L);
  return 0;
}

/* The handle alone ends: the hook is called as before. */
static int l_end(lua_State *L) {
  orepa_hook **handle = check_hook(L), *h = *handle;
  *handle = NULL;
  orepa_hook_release(h);
  return 0;
}

static int l_retain_grad(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  if (orepa_retain_grad(t))
    return bind_fail(L);
  lua_settop(L, 1);
  return 1;
}

static const bind_row tensor_methods[] = {
    {"register_hook", l_register_hook,
     "t:register_hook(f) -> hook\nLets every backward pass call f with the gradient of t once that is whole; what f "
     "returns, if it returns something, is the gradient from then on, and must have its shape, type and device. Hooks "
     "are called in the order in which they were registered; those of leaves at the end of the pass, before the "
     "gradient is added to t.grad. f must not change its argument in place, and runs on the Lua state that called "
     "backward; an error in it ends the pass. It belongs to the graph: after t was changed in place it still gets the "
     "gradient of what t was.\n"
     "> local x = orepa.ones(2):requires_grad_()\n"
     "> x:register_hook(function(g) return g:clamp(-1, 1) end)\n"
     "> local loss = (x * 3):sum(); loss:backward(); return x.grad"},
    {"retain_grad", l_retain_grad,
     "t:retain_grad() -> t\nLets backward add the gradient of t to t.grad also if an op made t, as it does for leaves; "
     "what hooks made of it counts.\n"
     "> local h = orepa.ones(2):requires_grad_() * 2; h:retain_grad(); h:sum():backward(); return h.grad"},
    {NULL, NULL, NULL},
};

static const bind_row hook_methods[] = {
    {"remove", l_remove,
     "hook:remove()\nThe function is not called any more.\n"
     "> local hook = orepa.ones(2):requires_grad_():register_hook(print); hook:remove()"},
    {NULL, NULL, NULL},
};

void bind_hook_family(lua_State *L) {
  bind_end_with(L, BIND_HOOK, "__gc", l_end);
  luaL_getmetatable(L, BIND_HOOK);
  lua_newtable(L);
  bind_register(L, "hook:", hook_methods);
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
  bind_push_methods(L);
  bind_register(L, "t:", tensor_methods);
  lua_pop(L, 1);
}
