/* interrupt.h: Ctrl-C stops what Lua computes, and nothing else. */
#ifndef OREPA_CLI_INTERRUPT_H
#define OREPA_CLI_INTERRUPT_H

#include <stdbool.h>

#include <lua.h>

/* Takes the signal over, for the state and its coroutines: coroutine.resume and wrap are replaced by ones that say
 * which coroutine runs. */
void interrupt_begin(lua_State *L);

/* Calls the function on top of the stack (no arguments, one result), which Ctrl-C ends from now on: with an error that
 * is raised again at the next instruction wherever it is caught, so that no pcall holds it. A second Ctrl-C within two
 * seconds ends the process with 130. Returns lua_pcall's status; *interrupted says whether there was one. */
int interrupt_call(lua_State *L, bool *interrupted);

/* Outside of such calls: whether Ctrl-C came since this was asked last. */
bool interrupt_came(void);

#endif
