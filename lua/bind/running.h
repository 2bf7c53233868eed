/* running.h: the states that run Lua on a thread now, for a signal's handler to stop. */
#ifndef OREPA_RUNNING_H
#define OREPA_RUNNING_H

#include <lua.h>

typedef struct running_state {
  lua_State *L;
  struct running_state *outer;
} running_state;

/* The innermost first: a coroutine is on the list while it is resumed. */
typedef struct {
  running_state base;
  running_state *volatile innermost;
  volatile lua_Hook hook; /* what all of them got; NULL: nothing */
} running_list;

/* From now on L and the coroutines that its `coroutine` library resumes keep the list, which must outlive L. */
void running_begin(running_list *list, lua_State *L);
/* Calls the hook wherever one of them is, again and again. From a signal's handler, on the thread that runs them. */
void running_stop(running_list *list, lua_Hook hook);
/* Nothing is called any more, when nothing runs within L. */
void running_reset(running_list *list);

#endif
