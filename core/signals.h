/* signals.h: signals wait while a kernel runs. A handler runs on the stack of the thread that it interrupts, and
 * kernels of oneDNN's (sgemm in 2.6.3, seen) keep other things than a stack in the stack pointer: a signal's frame then
 * lies in the heap, over whatever is there. OpenMP's threads are made in kernels, so all signals are blocked on them.
 */
#ifndef OREPA_CORE_SIGNALS_H
#define OREPA_CORE_SIGNALS_H

/* Around each call of a kernel, on its thread; not one inside another. What a fault raises is not held. */
void signals_hold(void);
void signals_release(void);

#endif
