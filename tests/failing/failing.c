/* failing.c: a Lua program in which allocations can be made to fail: the engine's and the bindings', which are linked
 * so that their malloc() is ours, and Lua's. Its script has the global `failing`:
 *
 *   failing.call(n, count, f, ...)   pcall(f, ...), of whose allocations the n-th fails and `count` - 1 more behind it;
 *                                    gives first how many it asked for, then what pcall gives
 *
 * Allocations that make a block smaller never fail, as Lua wants it. */
#include <errno.h>
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

static atomic_llong asked, first = -1, count;

static bool fails_of(long long most) {
  long long n = ++asked, from = first;
  if (from < 0 || n < from || n - from >= most)
    return false;
  errno = ENOMEM;
  return true;
}

static bool fails(void) {
  return fails_of(count);
}

/* ---- the linker calls the first for each malloc() of the objects, and the second is what it was ---- */

void *__wrap_malloc(size_t bytes);
void *__real_malloc(size_t bytes);
void *__wrap_calloc(size_t number, size_t bytes);
void *__real_calloc(size_t number, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t bytes);
int __real_posix_memalign(void **memory, size_t alignment, size_t bytes);

void *__wrap_malloc(size_t bytes) {
  return fails() ? NULL : __real_malloc(bytes);
}

void *__wrap_calloc(size_t number, size_t bytes) {
  return fails() ? NULL : __real_calloc(number, bytes);
}

void *__wrap_realloc(void *old, size_t bytes) {
  return fails() ? NULL : __real_realloc(old, bytes);
}

int __wrap_posix_memalign(void **memory, size_t alignment, size_t bytes) {
  return fails() ? ENOMEM : __real_posix_memalign(memory, alignment, bytes);
}

/* Of Lua's at most two fail: after the first it collects and asks again. It finalizes nothing without a few bytes. */
static void *lua_memory(void *unused, void *old, size_t old_bytes, size_t bytes) {
  (void)unused;
  if (bytes == 0) {
    free(old);
    return NULL;
  }
  return (!old || bytes > old_bytes) && fails_of(count < 2 ? count : 2) ? NULL : __real_realloc(old, bytes);
}

/* ---- the script's side ---- */

static int l_call(lua_State *L) {
  long long from = luaL_checkinteger(L, 1), number = luaL_checkinteger(L, 2);
  lua_remove(L, 1); /* number's place is left for how many */
  luaL_checkstack(L, 8, NULL);
  asked = 0;
  count = number;
  first = from;
  int status = lua_pcall(L, lua_gettop(L) - 2, LUA_MULTRET, 0);
  first = -1;
  luaL_checkstack(L, 2, NULL);
  lua_pushinteger(L, asked);
  lua_replace(L, 1);
  lua_pushboolean(L, status == LUA_OK);
  lua_insert(L, 2);
  return lua_gettop(L);
}

int luaopen_orepa_core(lua_State *L);

static int run(lua_State *L) {
  int argc = (int)lua_tointeger(L, 1);
  char **argv = lua_touserdata(L, 2);
  luaL_openlibs(L);
  luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_PRELOAD_TABLE);
  lua_pushcfunction(L, luaopen_orepa_core);
  lua_setfield(L, -2, "orepa.core");
  luaL_newlib(L, ((const luaL_Reg[]){{"call", l_call}, {NULL, NULL}}));
  lua_setglobal(L, "failing");
  if (luaL_loadfile(L, argv[1]))
    return lua_error(L);
  for (int k = 2; k < argc; k++)
    lua_pushstring(L, argv[k]);
  lua_call(L, argc - 2, 0);
  return 0;
}

static void warned(void *unused, const char *message, int more) {
  (void)unused;
  fprintf(stderr, more ? "%s" : "%s\n", message);
}

int main(int argc, char **argv) {
  lua_State *L = argc > 1 ? lua_newstate(lua_memory, NULL) : NULL;
  if (!L) {
    fputs("usage: failing SCRIPT [ARGUMENT...]\n", stderr);
    return EXIT_FAILURE;
  }
  lua_setwarnf(L, warned, NULL);
  lua_pushcfunction(L, run);
  lua_pushinteger(L, argc);
  lua_pushlightuserdata(L, argv);
  int status = lua_pcall(L, 2, 0, 0);
  first = -1;
  if (status)
    fprintf(stderr, "%s\n", lua_tostring(L, -1));
  lua_close(L);
  return status ? EXIT_FAILURE : EXIT_SUCCESS;
}
