/* guarded.h: tests run with the memory of `ref` guarded, and without. Include cmocka's header before. */
#ifndef OREPA_TESTS_GUARDED_H
#define OREPA_TESTS_GUARDED_H

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

/* Runs the tests in a process that guards the memory of `ref`, then in this one without. */
#define RUN_GUARDED_AND_NOT(tests)                                                                                     \
  do {                                                                                                                 \
    int status_ = 0;                                                                                                   \
    pid_t child_ = fork();                                                                                             \
    setenv("OREPA_REF_GUARD", child_ ? "0" : "1", 1);                                                                  \
    if (child_ > 0)                                                                                                    \
      waitpid(child_, &status_, 0);                                                                                    \
    int failed_ = cmocka_run_group_tests(tests, NULL, NULL);                                                           \
    return failed_ || child_ < 0 || status_;                                                                           \
  } while (0)

#endif
