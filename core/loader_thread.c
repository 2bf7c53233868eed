/* loader_thread.c: a mark in the thread's storage, which the engine looks at where such threads differ. */
#include "loader_thread.h"

#include "cpu/threads.h"
#include "orepa.h"
#include "tensor/tensor.h"

static _Thread_local bool here;

bool loader_thread_here(void) {
  return here;
}

void loader_thread_begin(void) {
  threads_serial();
  orepa_set_grad_enabled(false);
  here = true;
}

void loader_thread_end(void) {
  allocator_end_thread();
  here = false;
}
