/* worker.c: a thread's state is opened, used and closed on that thread alone. What stops it from outside is a signal to
 * the thread, whose handler sets a hook on what runs there: a hook that is always on would make Lua half as fast, and
 * one that another thread sets could meet a call that just ends. It is the only signal that is not blocked there. */
#include "worker.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <lualib.h>

#include "running.h"

#define STOPS SIGURG /* nothing happens where nobody handles it */

typedef struct {
  worker_set *set;
  lua_State *L;
  running_list running;
  int make; /* the registry's reference to the function that makes batches */
  lua_Integer size;
  pthread_mutex_t lock;
  pthread_t thread;
  bool runs, stopped;
} worker;

struct worker_set {
  parcel *settings;
  char *path, *cpath;
  int64_t batches;
  int count;
  worker workers[];
};

/* ---- the signal ---- */

static _Thread_local worker *volatile here;

static struct {
  pthread_mutex_t lock;
  int sets; /* that are open */
  struct sigaction before;
} handling = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void stop_hook(lua_State *L, lua_Debug *ar) {
  (void)ar;
  luaL_error(L, "the loader was closed");
}

static void on_signal(int number) {
  (void)number;
  if (here)
    running_stop(&here->running, stop_hook);
}

static void handle_signal(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = on_signal; /* no SA_RESTART: a read that waits ends */
  pthread_mutex_lock(&handling.lock);
  if (handling.sets++ == 0)
    sigaction(STOPS, &action, &handling.before);
  pthread_mutex_unlock(&handling.lock);
}

static void handle_signal_no_more(void) {
  pthread_mutex_lock(&handling.lock);
  if (--handling.sets == 0)
    sigaction(STOPS, &handling.before, NULL);
  pthread_mutex_unlock(&handling.lock);
}

static void let_signal_through(int how) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, STOPS);
  pthread_sigmask(how, &set, NULL);
}

/* ---- a state ---- */

static int l_no_exit(lua_State *L) {
  return luaL_error(L, "os.exit: a worker of a loader can't end the program");
}

static void set_field(lua_State *L, const char *library, const char *name, const char *text) {
  lua_getglobal(L, library);
  lua_pushstring(L, text);
  lua_setfield(L, -2, name);
  lua_pop(L, 1);
}

/* Of a light userdata, the worker. */
static int open_state(lua_State *L) {
  worker *w = lua_touserdata(L, 1);
  luaL_openlibs(L);
  running_begin(&w->running, L);
  set_field(L, "package", "path", w->set->path);
  set_field(L, "package", "cpath", w->set->cpath);
  lua_getglobal(L, "os");
  lua_pushcfunction(L, l_no_exit);
  lua_setfield(L, -2, "exit");
  let_signal_through(SIG_UNBLOCK);
  lua_getglobal(L, "require");
  lua_pushliteral(L, "orepa.worker");
  lua_call(L, 1, 1);
  lua_call(L, parcel_unpack(L, w->set->settings), 2);
  w->size = luaL_checkinteger(L, -2);
  w->make = luaL_ref(L, LUA_REGISTRYINDEX);
  return 0;
}

/* Calls a function with arguments, all on the stack. False: its message is left, and the stack empty. */
static bool call(lua_State *L, int arguments, int results) {
  if (lua_pcall(L, arguments, results, 0) == LUA_OK)
    return true;
  orepa_fail(lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : "an error without a message");
  lua_settop(L, 0);
  return false;
}

static void leave(worker *w) {
  let_signal_through(SIG_BLOCK);
  pthread_mutex_lock(&w->lock);
  w->runs = false;
  pthread_mutex_unlock(&w->lock);
  here = NULL;
  lua_close(w->L);
}

/* From here on `stop` finds the thread. False: it was called before. */
static bool enter(worker *w) {
  here = w;
  pthread_mutex_lock(&w->lock);
  w->thread = pthread_self();
  bool enters = w->runs = !w->stopped;
  pthread_mutex_unlock(&w->lock);
  if (!enters)
    orepa_fail("the loader was closed");
  return enters;
}

static void *begin(void *context, int thread) {
  worker *w = &((worker_set *)context)->workers[thread];
  w->L = luaL_newstate();
  if (!w->L) {
    orepa_fail("out of memory: no room for a Lua state");
    return NULL;
  }
  lua_pushcfunction(w->L, open_state);
  lua_pushlightuserdata(w->L, w);
  if (enter(w) && call(w->L, 1, 0))
    return w;
  leave(w);
  return NULL;
}

static void end(void *state) {
  leave(state);
}

static void stop(void *context, int thread) {
  worker *w = &((worker_set *)context)->workers[thread];
  pthread_mutex_lock(&w->lock);
  w->stopped = true;
  if (w->runs)
    pthread_kill(w->thread, STOPS);
  pthread_mutex_unlock(&w->lock);
}

/* ---- batches ---- */

/* Of the worker, epoch and number: whether nobody else has the tensors, and the batch's values. */
static int call_make(lua_State *L) {
  worker *w = lua_touserdata(L, 3);
  lua_rawgeti(L, LUA_REGISTRYINDEX, w->make);
  lua_insert(L, 1);
  lua_settop(L, 3);
  lua_call(L, 2, LUA_MULTRET);
  return lua_gettop(L);
}

static int release_tensors(lua_State *L) {
  luaL_checkstack(L, 4, NULL);
  orepa_tensor **handle = luaL_testudata(L, 1, BIND_TENSOR);
  if (handle) {
    orepa_release(*handle);
    *handle = NULL;
  } else if (lua_istable(L, 1)) {
    for (lua_pushnil(L); lua_next(L, 1);) {
      lua_pushcfunction(L, release_tensors);
      lua_insert(L, -2);
      lua_call(L, 1, 0);
    }
  }
  return 0;
}

/* What a dead handle keeps, the next collection would free: too late for whole batches. */
static void release_batch(lua_State *L) {
  for (int k = lua_gettop(L); k > 1; k--) {
    lua_pushcfunction(L, release_tensors);
    lua_pushvalue(L, k);
    if (lua_pcall(L, 1, 0, 0) != LUA_OK)
      lua_pop(L, 1);
  }
}

static void *make(void *state, uint64_t epoch, int64_t number) {
  worker *w = state;
  lua_State *L = w->L;
  lua_pushcfunction(L, call_make);
  lua_pushinteger(L, (lua_Integer)epoch);
  lua_pushinteger(L, number);
  lua_pushlightuserdata(L, w);
  if (!call(L, 3, LUA_MULTRET))
    return NULL;
  parcel *batch = parcel_pack(L, 2);
  if (batch && lua_toboolean(L, 1))
    release_batch(L);
  lua_settop(L, 0);
  return batch;
}

static void drop(void *batch) {
  parcel_free(batch);
}

/* ---- the set ---- */

static int64_t start(void *context, uint64_t epoch) {
  (void)epoch;
  return ((worker_set *)context)->batches;
}

static void set_free(worker_set *set) {
  for (int k = 0; k < set->count; k++)
    pthread_mutex_destroy(&set->workers[k].lock);
  parcel_free(set->settings);
  free(set->path);
  free(set->cpath);
  free(set);
}

static void close_set(void *context) {
  handle_signal_no_more();
  set_free(context);
}

static worker_set *set_new(const char *path, const char *cpath, int threads) {
  worker_set *set = calloc(1, sizeof *set + (size_t)threads * sizeof *set->workers);
  if (!set)
    return NULL;
  for (; set->count < threads; set->count++) {
    set->workers[set->count].set = set;
    pthread_mutex_init(&set->workers[set->count].lock, NULL);
  }
  set->path = strdup(path);
  set->cpath = strdup(cpath);
  if (set->path && set->cpath)
    return set;
  set_free(set);
  return NULL;
}

orepa_loader *worker_open(lua_State *L, int first, int threads, int prefetch, worker_set **opened) {
  lua_getglobal(L, "package");
  lua_getfield(L, -1, "path");
  lua_getfield(L, -2, "cpath");
  lua_remove(L, -3);
  const char *path = luaL_checkstring(L, -2), *cpath = luaL_checkstring(L, -1);
  worker_set *set = set_new(path, cpath, threads);
  lua_pop(L, 2);
  if (!set) {
    orepa_fail("out of memory: no room for the states of workers");
    return NULL;
  }
  const orepa_loader_source source = {set, start, begin, make, end, stop, drop, close_set};
  set->settings = parcel_pack(L, first);
  orepa_loader *loader = NULL;
  if (set->settings) {
    handle_signal();
    loader = orepa_loader_open(&source, threads, prefetch);
    if (!loader)
      handle_signal_no_more();
  }
  if (!loader)
    set_free(set);
  *opened = loader ? set : NULL;
  return loader;
}

int64_t worker_size(const worker_set *set) {
  for (int k = 1; k < set->count; k++)
    if (set->workers[k].size != set->workers[0].size) {
      char message[128];
      snprintf(message, sizeof message, "the dataset has %lld samples in worker 1 and %lld in worker %d",
               (long long)set->workers[0].size, (long long)set->workers[k].size, k + 1);
      return orepa_fail(message);
    }
  return set->workers[0].size;
}

void worker_set_batches(worker_set *set, int64_t batches) {
  set->batches = batches;
}
