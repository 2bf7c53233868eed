/* interrupt.c: Ctrl-C held back, for loops that end in their own way. */
#include <signal.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bind.h"
#include "orepa_data.h"

#define HELD "orepa.held_interrupt"

enum { LEAVES = 130, SOON = 2 /* seconds between two signals */ };

static int holders;
static struct sigaction usual; /* what was done without holders */
static volatile sig_atomic_t came;
static struct timespec last;

static void on_signal(int number) {
  struct timespec now;
  (void)number;
  clock_gettime(CLOCK_MONOTONIC, &now);
  if (came && now.tv_sec - last.tv_sec < SOON) {
    (void)!write(STDERR_FILENO, "\n", 1);
    _exit(LEAVES);
  }
  last = now;
  came = 1;
}

static int let_go(lua_State *L) {
  bool *held = luaL_checkudata(L, 1, HELD);
  if (*held && --holders == 0)
    sigaction(SIGINT, &usual, NULL);
  *held = false;
  return 0;
}

static int l_hold_interrupt(lua_State *L) {
  struct sigaction action;
  if (orepa_on_loader_thread())
    return bind_error(L, "hold_interrupt: a worker of a loader gets no signals");
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  bool *held = lua_newuserdatauv(L, sizeof *held, 0);
  *held = false;
  luaL_setmetatable(L, HELD);
  if (holders == 0) {
    came = 0;
    sigaction(SIGINT, &action, &usual);
  }
  holders++;
  *held = true;
  return 1;
}

static int l_interrupt_came(lua_State *L) {
  lua_pushboolean(L, holders > 0 && came);
  return 1;
}

static const bind_row rows[] = {
    {"hold_interrupt", l_hold_interrupt,
     "hold_interrupt() -> guard\nUntil the scope of `local _ <close> = orepa.hold_interrupt()` ends, Ctrl-C stops "
     "nothing but makes interrupt_came() true; a second one within two seconds ends the program with 130.\n"
     "> do local _ <close> = orepa.hold_interrupt() end"},
    {"interrupt_came", l_interrupt_came,
     "interrupt_came() -> boolean\nWhether Ctrl-C came since it is held back by hold_interrupt().\n"
     "> orepa.interrupt_came()"},
    {NULL, NULL, NULL},
};

void bind_interrupt_family(lua_State *L) {
  bind_end_with(L, HELD, "__gc", let_go);
  bind_end_with(L, HELD, "__close", let_go);
  bind_register(L, "orepa.", rows);
}
