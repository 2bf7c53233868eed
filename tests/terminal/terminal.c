/* terminal.c: a Lua module for specs: runs a program on a pseudo-terminal, as someone who sits at it.
 *
 *     local terminal = require "terminal"
 *     local t = terminal.open({"build/orepa"}, {TERM = "xterm"})
 *     t:send("1 + 1\r"); t:receive()
 *
 * send(text) types; receive(seconds) waits for what is shown and gives it, nil at the end of the program, "" if nothing
 * came in that time; wait() gives the exit code, 128 and more for a signal; mode() tells how the terminal is set: a
 * table {canonical =, echo =}. A program that still runs when its terminal is closed or collected is killed. */
#include <errno.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>

#define KIND "terminal"

enum { ROWS = 40, COLUMNS = 132, MOST_WORDS = 64 };

typedef struct {
  int master, slave; /* the slave is held too, so that its mode can be asked for when the program is gone; -1: closed */
  pid_t program;     /* 0: waited for */
} terminal;

static int fail(lua_State *L, const char *what) {
  return luaL_error(L, "%s: %s", what, strerror(errno));
}

/* In the child: the slave becomes its terminal. */
static void become(int slave, char *const *words) {
  setsid();
  ioctl(slave, TIOCSCTTY, 0);
  for (int k = 0; k <= 2; k++)
    dup2(slave, k);
  for (int k = 3; k < 256; k++)
    close(k);
  signal(SIGINT, SIG_DFL);
  execv(words[0], words);
  _exit(127);
}

static int l_open(lua_State *L) {
  char *words[MOST_WORDS + 1] = {NULL};
  struct winsize size = {.ws_row = ROWS, .ws_col = COLUMNS};
  lua_Integer count = luaL_len(L, 1);
  luaL_argcheck(L, count >= 1 && count <= MOST_WORDS, 1, "one word to 64");
  for (lua_Integer k = 0; k < count; k++) {
    lua_geti(L, 1, k + 1); /* stays on the stack */
    words[k] = (char *)luaL_checkstring(L, -1);
  }
  terminal *t = lua_newuserdatauv(L, sizeof *t, 0);
  *t = (terminal){-1, -1, 0};
  luaL_setmetatable(L, KIND);
  if (openpty(&t->master, &t->slave, NULL, NULL, &size))
    return fail(L, "openpty");
  t->program = fork();
  if (t->program < 0)
    return fail(L, "fork");
  if (t->program == 0) {
    lua_pushnil(L);
    while (lua_istable(L, 2) && lua_next(L, 2)) {
      setenv(lua_tostring(L, -2), lua_tostring(L, -1), 1);
      lua_pop(L, 1);
    }
    become(t->slave, words);
  }
  return 1;
}

static terminal *check_terminal(lua_State *L) {
  terminal *t = luaL_checkudata(L, 1, KIND);
  luaL_argcheck(L, t->master >= 0, 1, "the terminal is closed");
  return t;
}

static int l_send(lua_State *L) {
  terminal *t = check_terminal(L);
  size_t length;
  const char *text = luaL_checklstring(L, 2, &length);
  while (length) {
    ssize_t count = write(t->master, text, length);
    if (count < 0 && errno != EINTR)
      return fail(L, "write");
    text += count < 0 ? 0 : count;
    length -= count < 0 ? 0 : (size_t)count;
  }
  return 0;
}

static bool has_ended(terminal *t) {
  siginfo_t info = {0};
  return !t->program || (waitid(P_PID, (id_t)t->program, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid != 0);
}

/* As the slave is held, the end of the program is not the end of what can be read. */
static int l_receive(lua_State *L) {
  terminal *t = check_terminal(L);
  int left = (int)(luaL_optnumber(L, 2, 1) * 1000), step = 20;
  char bytes[4096];
  for (;;) {
    bool ended = has_ended(t);
    struct pollfd poll_for = {t->master, POLLIN, 0};
    int ready = poll(&poll_for, 1, ended || left < step ? (ended ? 0 : left) : step);
    if (ready > 0) {
      ssize_t count = read(t->master, bytes, sizeof bytes);
      if (count > 0) {
        lua_pushlstring(L, bytes, (size_t)count);
        return 1;
      }
    }
    if (ended) {
      lua_pushnil(L);
      return 1;
    }
    if ((left -= step) <= 0) {
      lua_pushliteral(L, "");
      return 1;
    }
  }
}

static int l_wait(lua_State *L) {
  terminal *t = check_terminal(L);
  int status;
  if (!t->program)
    return luaL_error(L, "the program was waited for");
  while (waitpid(t->program, &status, 0) < 0)
    if (errno != EINTR)
      return fail(L, "waitpid");
  t->program = 0;
  lua_pushinteger(L, WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
  return 1;
}

static int l_mode(lua_State *L) {
  terminal *t = check_terminal(L);
  struct termios mode;
  if (tcgetattr(t->slave, &mode))
    return fail(L, "tcgetattr");
  lua_createtable(L, 0, 2);
  lua_pushboolean(L, (mode.c_lflag & ICANON) != 0);
  lua_setfield(L, -2, "canonical");
  lua_pushboolean(L, (mode.c_lflag & ECHO) != 0);
  lua_setfield(L, -2, "echo");
  return 1;
}

static int l_close(lua_State *L) {
  terminal *t = luaL_checkudata(L, 1, KIND);
  if (t->program) {
    kill(t->program, SIGKILL);
    waitpid(t->program, NULL, 0);
  }
  if (t->slave >= 0)
    close(t->slave);
  if (t->master >= 0)
    close(t->master);
  *t = (terminal){-1, -1, 0};
  return 0;
}

LUAMOD_API int luaopen_terminal(lua_State *L) {
  static const luaL_Reg methods[] = {{"send", l_send},   {"receive", l_receive}, {"wait", l_wait},     {"mode", l_mode},
                                     {"close", l_close}, {"__gc", l_close},      {"__close", l_close}, {NULL, NULL}};
  luaL_newmetatable(L, KIND);
  luaL_setfuncs(L, methods, 0);
  lua_pushvalue(L, -1);
  lua_setfield(L, -2, "__index");
  lua_createtable(L, 0, 1);
  lua_pushcfunction(L, l_open);
  lua_setfield(L, -2, "open");
  return 1;
}
