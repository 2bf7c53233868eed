/* main.c: the program `orepa`: runs Lua scripts with the library beside it, and is its prompt. */
#include <errno.h>
#include <limits.h>
#include <locale.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#include "editor.h"
#include "interrupt.h"
#include "orepa.h"

static const char usage[] =
    "usage: orepa [-i] [-e code] [script.lua [argument ...]]\n"
    "       orepa --version | --help\n"
    "\n"
    "Runs a Lua " LUA_VERSION_MAJOR "." LUA_VERSION_MINOR
    " script. `require \"orepa\"` finds the library that belongs to this program;\n"
    "the script finds its arguments in `arg`, and in `...`. Without one it is a prompt, or evaluates\n"
    "what comes from a pipe.\n"
    "  -e code   runs the code, before the script; may be repeated\n"
    "  -i        goes on with the prompt afterwards\n";

/* The folder that holds bin/orepa: of an installation or a build tree, which look alike. */
static int find_root(char *root, size_t size) {
  ssize_t length = readlink("/proc/self/exe", root, size - 1);
  if (length < 0)
    return -1;
  root[length] = '\0';
  for (int up = 0; up < 2; up++) {
    char *slash = strrchr(root, '/');
    if (!slash)
      return -1;
    *slash = '\0';
  }
  return 0;
}

/* Puts the library of this tree before whatever else Lua would find. */
static void set_paths(lua_State *L) {
  char root[PATH_MAX];
  if (find_root(root, sizeof root))
    return;
  lua_getglobal(L, "package");
  lua_getfield(L, -1, "path");
  lua_pushfstring(L, "%s/share/lua/5.4/?.lua;%s/share/lua/5.4/?/init.lua;%s", root, root, lua_tostring(L, -1));
  lua_setfield(L, -3, "path");
  lua_getfield(L, -2, "cpath");
  lua_pushfstring(L, "%s/lib/lua/5.4/?.so;%s", root, lua_tostring(L, -1));
  lua_setfield(L, -4, "cpath");
  lua_pop(L, 3);
}

static int with_traceback(lua_State *L) {
  const char *message = luaL_tolstring(L, 1, NULL);
  luaL_traceback(L, L, message, 1);
  return 1;
}

static int report(lua_State *L) {
  fprintf(stderr, "orepa: %s\n", lua_tostring(L, -1));
  return EXIT_FAILURE;
}

static int run_script(lua_State *L, int argc, char **argv) {
  luaL_checkstack(L, argc + 8, "too many arguments");
  lua_createtable(L, argc, 1);
  for (int k = 0; k < argc; k++) {
    lua_pushstring(L, argv[k]);
    lua_rawseti(L, -2, k - 1); /* arg[0] is the script */
  }
  lua_setglobal(L, "arg");
  lua_pushcfunction(L, with_traceback);
  if (luaL_loadfile(L, argv[1]))
    return report(L);
  for (int k = 2; k < argc; k++)
    lua_pushstring(L, argv[k]);
  if (lua_pcall(L, argc - 2, 0, 1))
    return report(L);
  return EXIT_SUCCESS;
}

static int run_code(lua_State *L, const char *code) {
  lua_pushcfunction(L, with_traceback);
  int handler = lua_gettop(L);
  int status = luaL_loadbuffer(L, code, strlen(code), "=(command line)") || lua_pcall(L, 0, 0, handler) ? report(L)
                                                                                                        : EXIT_SUCCESS;
  lua_settop(L, handler - 1);
  return status;
}

/* ---- the prompt: lua/orepa/repl.lua, with what only C can do ---- */

/* call(f): f(), ended by Ctrl-C. Gives what it gives, or false. */
static int l_call(lua_State *L) {
  bool interrupted;
  lua_settop(L, 1);
  int status = interrupt_call(L, &interrupted);
  if (interrupted)
    fputs("interrupted\n", stderr);
  else if (status != LUA_OK)
    report(L);
  if (interrupted || status != LUA_OK)
    lua_pushboolean(L, false);
  return 1;
}

static int l_prompt(lua_State *L) {
  bool terminal = isatty(STDIN_FILENO) && isatty(STDOUT_FILENO);
  setlocale(LC_CTYPE, "");
  interrupt_begin(L);
  lua_getglobal(L, "require");
  lua_pushliteral(L, "orepa.repl");
  lua_call(L, 1, 1);
  int repl = lua_gettop(L);
  lua_newtable(L);
  if (terminal) {
    lua_getfield(L, repl, "complete");
    editor_push(L, lua_gettop(L));
    lua_setfield(L, -3, "editor");
    lua_pop(L, 1);
  }
  lua_pushcfunction(L, l_call);
  lua_setfield(L, -2, "call");
  lua_getfield(L, repl, "start");
  lua_insert(L, -2);
  lua_call(L, 1, 1);
  return 1;
}

static int run_prompt(lua_State *L) {
  lua_pushcfunction(L, with_traceback);
  lua_pushcfunction(L, l_prompt);
  if (lua_pcall(L, 0, 1, lua_gettop(L) - 1))
    return report(L);
  return lua_toboolean(L, -1) ? EXIT_SUCCESS : EXIT_FAILURE;
}

/* ---- the command line ---- */

static int print_version(void) {
  printf("orepa %s, %s\n%s\n", OREPA_VERSION, LUA_RELEASE, orepa_build_info());
  return EXIT_SUCCESS;
}

/* `first` is the first word that is no option. */
static int run(lua_State *L, int argc, char **argv, int first, bool prompts) {
  int status = EXIT_SUCCESS;
  for (int k = 1; k < first && !status; k++)
    if (!strcmp(argv[k], "-e"))
      status = run_code(L, argv[++k]);
  if (first < argc && !status)
    status = run_script(L, argc - first + 1, argv + first - 1);
  return prompts && (!status || first < argc) ? run_prompt(L) : status;
}

int main(int argc, char **argv) {
  bool prompts = false, code = false;
  int first = 1;
  for (; first < argc && argv[first][0] == '-' && argv[first][1]; first++) {
    const char *option = argv[first];
    if (!strcmp(option, "--help") || !strcmp(option, "-h")) {
      fputs(usage, stdout);
      return EXIT_SUCCESS;
    }
    if (!strcmp(option, "--version"))
      return print_version();
    if (!strcmp(option, "-i")) {
      prompts = true;
    } else if (!strcmp(option, "-e") && first + 1 < argc) {
      code = true;
      first++;
    } else {
      fprintf(stderr, "orepa: %s '%s'\n%s", strcmp(option, "-e") ? "unknown option" : "no code behind", option, usage);
      return EXIT_FAILURE;
    }
  }
  lua_State *L = luaL_newstate();
  if (!L) {
    fputs("orepa: no memory for Lua\n", stderr);
    return EXIT_FAILURE;
  }
  luaL_openlibs(L);
  set_paths(L);
  int status = run(L, argc, argv, first, prompts || (first == argc && !code));
  lua_close(L);
  return status;
}
