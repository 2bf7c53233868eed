/* interrupt.c: the signal sets a hook on the states that run, which a list knows (running.h). */
#include "interrupt.h"

#include <signal.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <lauxlib.h>

#include "orepa.h"
#include "running.h"

enum { LEAVES = 130, SOON = 2 /* seconds between two signals */ };

static running_list states;
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
  running_stop(&states, stop);
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

/* ---- calls ---- */

void interrupt_begin(lua_State *L) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal; /* no SA_RESTART: a line that is read ends */
  has_terminal = tcgetattr(STDIN_FILENO, &terminal) == 0;
  running_begin(&states, L);
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
  running_reset(&states);
  orepa_interrupt(false);
  *interrupted = interrupt_came();
  return status;
}
