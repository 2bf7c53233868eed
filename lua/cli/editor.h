/* editor.h: lines from a terminal, by libedit. */
#ifndef OREPA_CLI_EDITOR_H
#define OREPA_CLI_EDITOR_H

#include <lua.h>

/* Pushes a table {read =, enter =} for the terminal on standard input: read(prompt) gives a line without its end, or a
 * pasted piece of several; nil at the end; nil and "interrupted" after Ctrl-C. enter(text) adds to the history. Tab
 * calls the function complete(text) at `complete`, which gives what is there of the last name, and the list of what it
 * may become. */
void editor_push(lua_State *L, int complete);

#endif
