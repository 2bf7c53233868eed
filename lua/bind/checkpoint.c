/* checkpoint.c: a call whose maps are not kept for the backward pass: it is made again in it. */
#include <stdlib.h>

#include "bind.h"

#define BIND_CHECKPOINT "orepa.Checkpoint"

/* What is called again. In the table that the reference names, 1 is the function, k + 1 argument k unless that is a
 * tensor: tensors are kept by the graph, and come back from it. */
typedef struct {
  bind_reference call;
  int arguments;
  bool is_tensor[];
} kept_call;

/* ---- again ---- */

typedef struct {
  const kept_call *call;
  int inputs, outputs;
  orepa_tensor *const *xs;
  orepa_tensor **ys;
} repetition;

static void push_call(lua_State *L, const repetition *r) {
  int tensors = 0;
  luaL_checkstack(L, r->call->arguments + 2, "checkpoint");
  lua_rawgeti(L, LUA_REGISTRYINDEX, r->call->call.reference);
  int kept = lua_gettop(L);
  lua_rawgeti(L, kept, 1);
  for (int k = 0; k < r->call->arguments; k++)
    if (r->call->is_tensor[k])
      bind_push(L, r->xs[tensors++]);
    else
      lua_rawgeti(L, kept, k + 2);
  lua_remove(L, kept);
}

static int repeat(lua_State *L) {
  repetition *r = lua_touserdata(L, 1);
  bind_tidy(L); /* the maps of the part that was computed again before this one */
  push_call(L, r);
  lua_call(L, r->call->arguments, LUA_MULTRET);
  int results = lua_gettop(L) - 1;
  if (results != r->outputs)
    return bind_error(L, "checkpoint: the function gives %d results when it is called again, and gave %d", results,
                      r->outputs);
  for (int k = 0; k < results; k++)
    bind_tensor(L, k + 2);
  for (int k = 0; k < results; k++)
    r->ys[k] = orepa_retain(bind_test_tensor(L, k + 2));
  return 0;
}

static int recompute(void *payload, int inputs, orepa_tensor *const *xs, int outputs, orepa_tensor **ys) {
  repetition r = {payload, inputs, outputs, xs, ys};
  return bind_call_back(repeat, &r);
}

static void dispose(void *payload) {
  bind_give_up(payload);
}

/* ---- the first call ---- */

static int close_checkpoint(lua_State *L) {
  orepa_checkpoint **handle = luaL_checkudata(L, 1, BIND_CHECKPOINT);
  orepa_checkpoint_release(*handle);
  *handle = NULL;
  bind_give_up_now(L);
  return 0;
}

/* Pushes a handle that owns the checkpoint of the call on the stack: function and arguments from 1 to `last`. */
static orepa_checkpoint **begin(lua_State *L, int last) {
  orepa_checkpoint **handle = lua_newuserdatauv(L, sizeof *handle, 0);
  *handle = NULL;
  luaL_setmetatable(L, BIND_CHECKPOINT);
  orepa_tensor **inputs = lua_newuserdatauv(L, (size_t)last * sizeof *inputs, 0);
  lua_createtable(L, last, 0);
  int count = 0;
  for (int k = 1; k <= last; k++) {
    if (k > 1 && luaL_testudata(L, k, BIND_TENSOR)) {
      inputs[count++] = bind_tensor(L, k);
      continue;
    }
    lua_pushvalue(L, k);
    lua_rawseti(L, -2, k);
  }
  int reference = luaL_ref(L, LUA_REGISTRYINDEX);
  kept_call *call = malloc(sizeof *call + (size_t)last * sizeof *call->is_tensor);
  if (!call) {
    luaL_unref(L, LUA_REGISTRYINDEX, reference);
    bind_error(L, "checkpoint: out of memory: no room for %d arguments", last - 1);
  }
  call->call.reference = reference;
  call->arguments = last - 1;
  for (int k = 1; k < last; k++)
    call->is_tensor[k - 1] = luaL_testudata(L, k + 1, BIND_TENSOR) != NULL;
  *handle = orepa_checkpoint_begin(&(orepa_recompute){recompute, dispose}, call, count, inputs);
  if (!*handle) {
    bind_give_up_now(L);
    bind_fail(L);
  }
  lua_pop(L, 1);
  return handle;
}

/* Puts what leaves the checkpoint in the place of the results from `first` to the top. */
static void exchange_results(lua_State *L, orepa_checkpoint *c, int first) {
  int count = lua_gettop(L) - first + 1;
  luaL_checkstack(L, count + 1, "checkpoint");
  orepa_tensor **ys = lua_newuserdatauv(L, 2 * (size_t)count * sizeof *ys + 1, 0), **results = ys + count;
  for (int k = 0; k < count; k++) {
    if (!luaL_testudata(L, first + k, BIND_TENSOR))
      bind_error(L, "checkpoint: result %d is a %s; all must be tensors", k + 1, luaL_typename(L, first + k));
    ys[k] = bind_tensor(L, first + k);
  }
  for (int k = 0; k < count; k++) /* handles for the results that are others, made before anything is done */
    bind_new(L);
  if (orepa_checkpoint_results(c, count, ys, results))
    bind_fail(L);
  for (int k = count; k-- > 0;) {
    if (results[k] == ys[k]) {
      orepa_release(results[k]);
      lua_pop(L, 1);
    } else {
      *(orepa_tensor **)lua_touserdata(L, -1) = results[k];
      lua_replace(L, first + k);
    }
  }
  lua_pop(L, 1);
}

static int finish_plain(lua_State *L, int status, lua_KContext unused) {
  (void)status, (void)unused;
  return lua_gettop(L);
}

static int l_checkpoint(lua_State *L) {
  int last = lua_gettop(L);
  luaL_checkany(L, 1);
  if (!orepa_is_recording()) {
    lua_callk(L, last - 1, LUA_MULTRET, 0, finish_plain);
    return lua_gettop(L);
  }
  bind_collect(L);
  orepa_checkpoint **handle = begin(L, last);
  lua_insert(L, 1); /* the handle goes below the call */
  int status = lua_pcall(L, last - 1, LUA_MULTRET, 0);
  orepa_checkpoint_end(*handle);
  if (status != LUA_OK)
    return lua_error(L);
  exchange_results(L, *handle, 2);
  orepa_checkpoint_release(*handle);
  *handle = NULL;
  bind_give_up_now(L);
  return lua_gettop(L) - 1;
}

static int l_is_recomputing(lua_State *L) {
  lua_pushboolean(L, orepa_is_recomputing());
  return 1;
}

static const bind_row functions[] = {
    {"checkpoint", l_checkpoint,
     "checkpoint(f, ...) -> what f(...) returns\nCalls f and keeps of its maps only the tensors among the arguments; "
     "backward calls f again, with the same random numbers of tensors, and goes on through what it computes then. f "
     "must "
     "compute the same both times and return tensors; running statistics of norms are updated the first time only. "
     "Without gradients it is just the call. nn.checkpoint does it for a module.\n"
     "> local x = orepa.ones(2):requires_grad_()\n"
     "> orepa.checkpoint(function(t) return (t * t):exp() end, x):sum():backward(); return x.grad"},
    {"is_recomputing", l_is_recomputing,
     "is_recomputing() -> boolean\nWhether a checkpoint's part is being computed for the second time, by backward: "
     "what is "
     "counted or updated in forward should not be then.\n> orepa.is_recomputing()"},
    {NULL, NULL, NULL},
};

void bind_checkpoint_family(lua_State *L) {
  bind_register(L, "orepa.", functions);
  bind_end_with(L, BIND_CHECKPOINT, "__gc", close_checkpoint);
}
