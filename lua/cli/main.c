/* main.c: the program `orepa`: runs a Lua script with the library beside it. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#include "orepa.h"

static const char usage[] = "usage: orepa script.lua [argument ...]\n"
                            "       orepa --version | --help\n"
                            "\n"
                            "Runs a Lua " LUA_VERSION_MAJOR "." LUA_VERSION_MINOR
                            " script. `require \"orepa\"` finds the library that belongs to this program;\n"
                            "the script finds its arguments in `arg`, and in `...`.\n";

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

static int print_version(void) {
  printf("orepa %s, %s\n%s\n", OREPA_VERSION, LUA_RELEASE, orepa_build_info());
  return EXIT_SUCCESS;
}

int main(int argc, char **argv) {
  if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")) {
    fputs(usage, argc < 2 ? stderr : stdout);
    return argc < 2 ? EXIT_FAILURE : EXIT_SUCCESS;
  }
  if (!strcmp(argv[1], "--version"))
    return print_version();
  if (argv[1][0] == '-' && argv[1][1]) {
    fprintf(stderr, "orepa: unknown option '%s'\n%s", argv[1], usage);
    return EXIT_FAILURE;
  }
  lua_State *L = luaL_newstate();
  if (!L) {
    fputs("orepa: no memory for Lua\n", stderr);
    return EXIT_FAILURE;
  }
  luaL_openlibs(L);
  set_paths(L);
  int status = run_script(L, argc, argv);
  lua_close(L);
  return status;
}
