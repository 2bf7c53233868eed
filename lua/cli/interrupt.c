/* interrupt.c: the signal sets a hook on the states that run. Which these are is known by a list: a coroutine stands on
 * it while it is resumed. */
#include "interrupt.h"

#include <signal.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <lauxlib.h>

#include "orepa.h"

enum { LEAVES = 130, SOON = 2 /* seconds between two signals */ };

typedef struct running {
  lua_State *L;
  struct running *outer;
} running;

static running base;
static running *volatile innermost = &base;
static volatile sig_atomic_t computes, came;
static struct timespec last;
static struct termios terminal; /* as it was when the program began */
static bool has_terminal;

static void stop(lua_State *L, lua_Debug *ar) {
  (void)ar;
  luaL_error(L, "interrupted");
}

static void leave(void) {
  if (has_terminal)
    tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
  (void)!write(STDERR_FILENO, "\n", 1);
  _exit(LEAVES);
}

static void stop_all(void) {
  orepa_interrupt(true);
  for (running *r = innermost; r; r = r->outer)
    lua_sethook(r->L, stop, LUA_MASKCALL | LUA_MASKRET | LUA_MASKLINE | LUA_MASKCOUNT, 1);
}

static void on_signal(int number) {
  struct timespec now;
  (void)number;
  clock_gettime(CLOCK_MONOTONIC, &now);
  if (computes && came && now.tv_sec - last.tv_sec < SOON)
    leave();
  last = now;
  came = 1;
  if (computes)
    stop_all();
}

/* ---- coroutines ---- */

/* upvalue 1: Lua's own resume. Its errors are results, but for a first argument that is no coroutine. */
static int l_resume(lua_State *L) {
  running r = {lua_tothread(L, 1), innermost};
  luaL_argexpected(L, r.L, 1, "coroutine");
  lua_pushvalue(L, lua_upvalueindex(1));
  lua_insert(L, 1);
  innermost = &r;
  lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
  innermost = r.outer;
  return lua_gettop(L);
}

/* upvalues: Lua's own resume and close, the coroutine. An error goes on with its place in front, like wrap's. */
static int l_wrapped(lua_State *L) {
  running r = {lua_tothread(L, lua_upvalueindex(3)), innermost};
  lua_pushvalue(L, lua_upvalueindex(1));
  lua_pushvalue(L, lua_upvalueindex(3));
  lua_rotate(L, 1, 2);
  innermost = &r;
  lua_call(L, lua_gettop(L) - 1, LUA_MULTRET);
  innermost = r.outer;
  if (lua_toboolean(L, 1))
    return lua_gettop(L) - 1;
  int status = lua_status(r.L);
  if (status != LUA_OK && status != LUA_YIELD) { /* what it left to be closed */
    lua_pushvalue(L, lua_upvalueindex(2));
    lua_pushvalue(L, lua_upvalueindex(3));
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

/* upvalues: Lua's own resume, close and create. */
static int l_wrap(lua_State *L) {
  luaL_checktype(L, 1, LUA_TFUNCTION);
  lua_pushvalue(L, lua_upvalueindex(1));
  lua_pushvalue(L, lua_upvalueindex(2));
  lua_pushvalue(L, lua_upvalueindex(3));
  lua_pushvalue(L, 1);
  lua_call(L, 1, 1);
  lua_pushcclosure(L, l_wrapped, 3);
  return 1;
}

static void follow_coroutines(lua_State *L) {
  lua_getglobal(L, "coroutine");
  int library = lua_gettop(L);
  lua_getfield(L, library, "resume");
  lua_getfield(L, library, "close");
  lua_getfield(L, library, "create");
  lua_pushcclosure(L, l_wrap, 3);
  lua_getfield(L, library, "resume");
  lua_pushcclosure(L, l_resume, 1);
  lua_setfield(L, library, "resume");
  lua_setfield(L, library, "wrap");
  lua_settop(L, library - 1);
}

/* ---- calls ---- */

void interrupt_begin(lua_State *L) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal; /* no SA_RESTART: a line that is read ends */
  base.L = L;
  has_terminal = tcgetattr(STDIN_FILENO, &terminal) == 0;
  follow_coroutines(L);
  sigaction(SIGINT, &action, NULL);
}

bool interrupt_came(void) {
  bool was = came;
  came = 0;
  return was;
}

int interrupt_call(lua_State *L, bool *interrupted) {
  computes = 1;
  if (came) /* just before */
    stop_all();
  int status = lua_pcall(L, 0, 1, 0);
  computes = 0;
  innermost = &base; /* an error that is none of the coroutine's leaves it on the list */
  lua_sethook(L, NULL, 0, 0);
  orepa_interrupt(false);
  *interrupted = interrupt_came();
  return status;
}
