/* running.c: the list is kept by the functions that resume coroutines, which stand in for Lua's own. */
#include "running.h"

#include <lauxlib.h>

/* upvalues of all three: the list, Lua's own resume, close and create; of l_wrapped: the coroutine */
enum { LIST = 1, RESUME, CLOSE, CREATE, LIBRARY = CREATE, COROUTINE };

static void set_hook(lua_State *L, lua_Hook hook) {
  lua_sethook(L, hook, LUA_MASKCALL | LUA_MASKRET | LUA_MASKLINE | LUA_MASKCOUNT, 1);
}

/* Calls resume, which with its arguments is on the stack, while L is on the list: protected, so that L leaves it. */
static void resume(lua_State *from, lua_State *L) {
  running_list *list = lua_touserdata(from, lua_upvalueindex(LIST));
  running_state r = {L, list->innermost};
  list->innermost = &r;
  if (list->hook) /* since a moment ago */
    set_hook(L, list->hook);
  int status = lua_pcall(from, lua_gettop(from) - 1, LUA_MULTRET, 0);
  list->innermost = r.outer;
  if (status != LUA_OK)
    lua_error(from);
}

/* Lua's errors are results. */
static int l_resume(lua_State *L) {
  lua_State *coroutine = lua_tothread(L, 1);
  luaL_argexpected(L, coroutine, 1, "coroutine");
  lua_pushvalue(L, lua_upvalueindex(RESUME));
  lua_insert(L, 1);
  resume(L, coroutine);
  return lua_gettop(L);
}

/* An error goes on with its place in front, like wrap's. */
static int l_wrapped(lua_State *L) {
  lua_State *coroutine = lua_tothread(L, lua_upvalueindex(COROUTINE));
  lua_pushvalue(L, lua_upvalueindex(RESUME));
  lua_pushvalue(L, lua_upvalueindex(COROUTINE));
  lua_rotate(L, 1, 2);
  resume(L, coroutine);
  if (lua_toboolean(L, 1))
    return lua_gettop(L) - 1;
  int status = lua_status(coroutine);
  if (status != LUA_OK && status != LUA_YIELD) { /* what it left to be closed */
    lua_pushvalue(L, lua_upvalueindex(CLOSE));
    lua_pushvalue(L, lua_upvalueindex(COROUTINE));
    lua_call(L, 1, 2);
    lua_remove(L, -2);
  }
  if (lua_type(L, -1) == LUA_TSTRING) {
    luaL_where(L, 1);
    lua_insert(L, -2);
    lua_concat(L, 2);
  }
  return lua_error(L);
}

static int l_wrap(lua_State *L) {
  luaL_checktype(L, 1, LUA_TFUNCTION);
  for (int k = LIST; k <= LIBRARY; k++)
    lua_pushvalue(L, lua_upvalueindex(k));
  lua_pushvalue(L, lua_upvalueindex(CREATE));
  lua_pushvalue(L, 1);
  lua_call(L, 1, 1);
  lua_pushcclosure(L, l_wrapped, COROUTINE);
  return 1;
}

static void stand_in(lua_State *L, int library, running_list *list, const char *name, lua_CFunction function) {
  lua_pushlightuserdata(L, list);
  for (int k = RESUME; k <= LIBRARY; k++)
    lua_pushvalue(L, library + k - 1);
  lua_pushcclosure(L, function, LIBRARY);
  lua_setfield(L, library, name);
}

void running_begin(running_list *list, lua_State *L) {
  static const char *const own[] = {"resume", "close", "create"};
  *list = (running_list){.base.L = L};
  list->innermost = &list->base;
  lua_getglobal(L, "coroutine");
  int library = lua_gettop(L);
  for (int k = 0; k < 3; k++)
    lua_getfield(L, library, own[k]);
  stand_in(L, library, list, "resume", l_resume);
  stand_in(L, library, list, "wrap", l_wrap);
  lua_settop(L, library - 1);
}

void running_stop(running_list *list, lua_Hook hook) {
  list->hook = hook;
  for (running_state *r = list->innermost; r; r = r->outer)
    set_hook(r->L, hook);
}

void running_reset(running_list *list) {
  list->hook = NULL;
  lua_sethook(list->base.L, NULL, 0, 0);
}
