/* loader.c: loaders as Lua's own code sees them (orepa.data does the rest): handles of what the engine opens, and the
 * random numbers of a sample. */
#include <stdlib.h>
#include <string.h>

#include "data.h"
#include "worker.h"

#define HANDLE "orepa.LoaderThreads"

typedef struct {
  orepa_loader *loader; /* NULL: closed */
  worker_set *workers;  /* NULL: its batches are images with labels */
} loader_handle;

static loader_handle *push_handle(lua_State *L) {
  loader_handle *h = lua_newuserdatauv(L, sizeof *h, 0);
  *h = (loader_handle){NULL, NULL};
  luaL_setmetatable(L, HANDLE);
  return h;
}

static loader_handle *check_handle(lua_State *L) {
  loader_handle *h = luaL_checkudata(L, 1, HANDLE);
  if (!h->loader)
    bind_error(L, "data.loader: it was closed");
  return h;
}

static int l_close(lua_State *L) {
  loader_handle *h = luaL_checkudata(L, 1, HANDLE);
  orepa_loader *loader = h->loader;
  h->loader = NULL;
  orepa_loader_close(loader);
  return 0;
}

/* nil, the engine's message, whether memory ran out */
static int push_failure(lua_State *L) {
  bool out_of_memory = orepa_error_is_out_of_memory();
  lua_pushnil(L);
  lua_pushstring(L, orepa_error());
  lua_pushboolean(L, out_of_memory);
  return 3;
}

/* ---- opening ---- */

static int count_argument(lua_State *L, int index, const char *what) {
  int64_t count = bind_integer(L, index, what);
  return count > INT32_MAX ? INT32_MAX : count < 0 ? 0 : (int)count;
}

/* open_images(images, labels, threads, prefetch, {batch_size=, shuffle=, drop_last=, order_seed=, ...image_batch's}) */
static int l_open_images(lua_State *L) {
  bind_image_options o;
  orepa_tensor *images = bind_tensor(L, 1), *labels = bind_tensor(L, 2);
  int threads = count_argument(L, 3, "data.loader: workers"), prefetch = count_argument(L, 4, "data.loader: prefetch");
  bind_image_transform(L, 5, "data.loader", &o);
  const orepa_image_epochs epochs = {.batch_size = bind_option_integer(L, 5, "batch_size", 1),
                                     .shuffle = bind_option_boolean(L, 5, "shuffle", false),
                                     .drop_last = bind_option_boolean(L, 5, "drop_last", false),
                                     .seed = o.transform.seed,
                                     .transform = o.transform};
  loader_handle *h = push_handle(L);
  h->loader = orepa_image_loader(images, labels, &epochs, threads, prefetch);
  return h->loader ? 1 : bind_fail(L);
}

/* open_workers(threads, prefetch, ...): orepa.worker gets the rest in each of them */
static int l_open_workers(lua_State *L) {
  int threads = count_argument(L, 1, "data.loader: workers"), prefetch = count_argument(L, 2, "data.loader: prefetch");
  loader_handle *h = push_handle(L);
  lua_insert(L, 3);
  h->loader = worker_open(L, 4, threads, prefetch, &h->workers);
  lua_settop(L, 3);
  return h->loader ? 1 : bind_fail(L);
}

/* ---- methods ---- */

/* ready(seconds): false if it is not yet; the number of samples of workers; or a failure */
static int l_ready(lua_State *L) {
  loader_handle *h = check_handle(L);
  int status = orepa_loader_ready(h->loader, luaL_checknumber(L, 2));
  int64_t size = status == 1 && h->workers ? worker_size(h->workers) : 0;
  if (status < 0 || size < 0)
    return push_failure(L);
  if (status == 0)
    lua_pushboolean(L, false);
  else
    lua_pushinteger(L, size);
  return 1;
}

/* start(epoch, batches) */
static int l_start(lua_State *L) {
  loader_handle *h = check_handle(L);
  uint64_t epoch = (uint64_t)bind_integer(L, 2, "epoch");
  if (h->workers)
    worker_set_batches(h->workers, bind_integer(L, 3, "batches"));
  if (orepa_loader_start(h->loader, epoch) < 0 && (!bind_retry(L) || orepa_loader_start(h->loader, epoch) < 0))
    return bind_fail(L);
  return 0;
}

static int take_images(lua_State *L, orepa_loader *loader, double seconds) {
  void *taken = NULL;
  lua_pushboolean(L, true);
  orepa_tensor **images = bind_new(L), **labels = bind_new(L);
  int status = orepa_loader_take(loader, seconds, &taken);
  if (status < 1)
    return status;
  orepa_image_batch_pair *pair = taken;
  *images = orepa_retain(pair->images);
  *labels = orepa_retain(pair->labels);
  orepa_image_batch_pair_free(pair);
  return 3;
}

static int take_parcel(lua_State *L, orepa_loader *loader, double seconds) {
  void *taken = NULL;
  parcel **held = parcel_push_holder(L);
  int status = orepa_loader_take(loader, seconds, &taken);
  if (status < 1)
    return status;
  *held = taken;
  lua_pushboolean(L, true);
  int count = parcel_unpack(L, *held);
  parcel_free(*held);
  *held = NULL;
  return 1 + count;
}

/* take(seconds): false if there is none yet; true and the batch; or a failure */
static int l_take(lua_State *L) {
  loader_handle *h = check_handle(L);
  double seconds = luaL_checknumber(L, 2);
  bind_collect(L);
  int results = h->workers ? take_parcel(L, h->loader, seconds) : take_images(L, h->loader, seconds);
  if (results < 0)
    return push_failure(L);
  if (results > 0)
    return results;
  lua_pushboolean(L, false);
  return 1;
}

/* ---- whether values can cross ---- */

/* crosses(...): true, or nil and what can't */
static int l_crosses(lua_State *L) {
  parcel **held = parcel_push_holder(L);
  lua_insert(L, 1);
  *held = parcel_pack(L, 2);
  if (!*held)
    return push_failure(L);
  lua_pushboolean(L, true);
  return 1;
}

/* ---- random numbers ---- */

enum { MOST_STATE = 128 };

/* Pushes the first upvalue of a function of Lua's math library, or nil; the memory of a userdata of a size that will
 * do.
 */
static void *push_upvalue(lua_State *L, const char *name, size_t *bytes) {
  lua_getglobal(L, "math");
  bool found = lua_istable(L, -1) && lua_getfield(L, -1, name) == LUA_TFUNCTION && lua_iscfunction(L, -1) &&
               lua_getupvalue(L, -1, 1) && lua_type(L, -1) == LUA_TUSERDATA;
  *bytes = found ? lua_rawlen(L, -1) : 0;
  return found && *bytes <= MOST_STATE ? lua_touserdata(L, -1) : NULL;
}

/* What math.random keeps its state in, which it shares with randomseed; NULL if they are none of Lua's own, and then
 * they are left alone. It lives as long as what is on the stack. */
static void *math_state(lua_State *L, size_t *bytes) {
  luaL_checkstack(L, 6, NULL);
  void *state = push_upvalue(L, "random", bytes);
  return state && state == push_upvalue(L, "randomseed", bytes) ? state : NULL;
}

static void seed_math(lua_State *L, uint64_t seed) {
  lua_getglobal(L, "math");
  lua_getfield(L, -1, "randomseed");
  lua_pushinteger(L, (lua_Integer)seed);
  lua_call(L, 1, 0);
  lua_pop(L, 1);
}

/* seeded(seed, epoch, sample, f, ...): true and what f(...) gives, or false and its error. Meanwhile all random numbers
 * follow from the first three, and no graph is recorded; afterwards they go on as if nothing had been drawn. */
static int l_seeded(lua_State *L) {
  char kept[MOST_STATE];
  size_t bytes = 0;
  const int last = lua_gettop(L), function = 4;
  const orepa_rng sample = orepa_sample_rng((uint64_t)bind_integer(L, 1, "seed"), (uint64_t)bind_integer(L, 2, "epoch"),
                                            bind_integer(L, 3, "sample"));
  void *state = math_state(L, &bytes);
  if (state) {
    memcpy(kept, state, bytes);
    seed_math(L, sample.seed);
  }
  const int below = lua_gettop(L); /* what keeps the state alive stays there */
  const orepa_rng before = orepa_rng_state();
  const bool recorded = orepa_grad_enabled();
  luaL_checkstack(L, last, NULL);
  for (int k = function; k <= last; k++)
    lua_pushvalue(L, k);
  orepa_set_rng_state(sample);
  orepa_set_grad_enabled(false);
  int status = lua_pcall(L, last - function, LUA_MULTRET, 0);
  orepa_set_grad_enabled(recorded);
  orepa_set_rng_state(before);
  if (state)
    memcpy(state, kept, bytes);
  lua_pushboolean(L, status == LUA_OK);
  lua_replace(L, below);
  return lua_gettop(L) - below + 1;
}

static const luaL_Reg methods[] = {{"close", l_close}, {"ready", l_ready}, {"start", l_start},
                                   {"take", l_take},   {"__gc", l_close},  {NULL, NULL}};

static const luaL_Reg functions[] = {{"open_images", l_open_images},
                                     {"open_workers", l_open_workers},
                                     {"crosses", l_crosses},
                                     {"seeded", l_seeded},
                                     {NULL, NULL}};

void bind_loader_family(lua_State *L) {
  bind_parcel_type(L);
  luaL_newmetatable(L, HANDLE);
  luaL_setfuncs(L, methods, 0);
  lua_pushvalue(L, -1);
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
  luaL_newlib(L, functions);
  lua_setfield(L, -2, "loading");
}
