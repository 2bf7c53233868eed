/* signals.c: the thread's mask of signals, kept while a kernel runs. */
#include "signals.h"

#include <pthread.h>
#include <signal.h>
#include <stddef.h>

static sigset_t all_but_faults;
static _Thread_local sigset_t before;

static void fill(void) {
  static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};
  sigfillset(&all_but_faults);
  for (size_t k = 0; k < sizeof faults / sizeof *faults; k++)
    sigdelset(&all_but_faults, faults[k]);
}

void signals_hold(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, fill);
  pthread_sigmask(SIG_BLOCK, &all_but_faults, &before);
}

void signals_release(void) {
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}
