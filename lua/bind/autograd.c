/* autograd.c: backward, grad and what they call in Lua, requires_grad, and the regions: no_grad, autocast,
 * detect_anomaly. */
#include <stdlib.h>

#include "bind.h"

#define BIND_GUARD "orepa.Guard"

/* ---- callbacks ---- */

/* A call of backward; calls nest where a callback makes one. */
typedef struct backward_call {
  lua_State *L;
  int error; /* the place on L's stack for what a callback raised */
  bool raised;
  struct backward_call *outer;
} backward_call;

static _Thread_local backward_call *current;

int bind_call_back(lua_CFunction f, void *argument) {
  lua_State *L = current->L;
  lua_pushcfunction(L, f);
  lua_pushlightuserdata(L, argument);
  if (lua_pcall(L, 1, 0, 0) == LUA_OK)
    return 0;
  lua_replace(L, current->error);
  current->raised = true;
  return -1;
}

static _Thread_local bind_reference *given_up;

void bind_give_up(bind_reference *r) {
  r->next = given_up;
  given_up = r;
}

void bind_give_up_now(lua_State *L) {
  while (given_up) {
    bind_reference *r = given_up;
    given_up = r->next;
    luaL_unref(L, LUA_REGISTRYINDEX, r->reference);
    free(r);
  }
}

/* Before a pass: makes room for what a callback raises. What dead handles hold, the pass could not free on its way. */
static void begin_call(lua_State *L, backward_call *call) {
  bind_tidy(L);
  luaL_checkstack(L, 4, "backward");
  lua_pushnil(L);
  *call = (backward_call){L, lua_gettop(L), false, current};
  current = call;
}

/* Behind it: a failure is raised. */
static void end_call(lua_State *L, const backward_call *call, int failed) {
  current = call->outer;
  bind_give_up_now(L);
  if (failed && call->raised) {
    lua_settop(L, call->error);
    lua_error(L);
  }
  if (failed)
    bind_fail(L);
}

/* ---- backward ---- */

static void refuse_graph(lua_State *L, int options, const char *function) {
  if (bind_option_boolean(L, options, "create_graph", false))
    bind_error(L, "%s: create_graph: there is no double backward; gradients have no graph of their own", function);
}

static int l_backward(lua_State *L) {
  static const char *const known[] = {"retain_graph", "create_graph", NULL};
  orepa_tensor *y = bind_tensor(L, 1);
  int at = lua_istable(L, 2) ? 2 : 3;
  orepa_tensor *dy = at == 3 ? bind_tensor_or_nil(L, 2) : NULL;
  int options = bind_options(L, at, "backward", known);
  bool retain = bind_option_boolean(L, options, "retain_graph", false);
  refuse_graph(L, options, "backward");
  backward_call call;
  begin_call(L, &call);
  end_call(L, &call, orepa_backward(y, dy, retain));
  return 0;
}

/* ---- grad ---- */

/* A tensor or a list of them, with references of its own: callbacks may release and collect the user's. */
typedef struct {
  bool is_list;
  int count;
  orepa_tensor **tensors;
} tensor_list;

/* Takes what is on top of the stack as tensor k of a list, into the table at `handles`. */
static orepa_tensor *take_tensor(lua_State *L, int handles, const char *what, int k, bool may_lack) {
  if (may_lack && !lua_toboolean(L, -1)) {
    lua_pop(L, 1);
    return NULL;
  }
  orepa_tensor **given = luaL_testudata(L, -1, BIND_TENSOR);
  if (!given)
    bind_error(L, "grad: %s %d: a tensor expected, got %s", what, k + 1, luaL_typename(L, -1));
  else if (!*given)
    bind_error(L, "grad: %s %d: this tensor was released", what, k + 1);
  bind_push(L, *given);
  lua_rawseti(L, handles, k + 1);
  lua_pop(L, 1);
  return *given;
}

/* Pushes what keeps the list alive. Entries may be missing where `count` is given, which says how many there are. */
static tensor_list push_list(lua_State *L, int index, const char *what, int count) {
  tensor_list list = {lua_istable(L, index), count ? count : 1, NULL};
  if (list.is_list && !count)
    list.count = (int)lua_rawlen(L, index);
  if (!list.count)
    bind_error(L, "grad: %s: an empty list", what);
  if (list.is_list ? count && (int)lua_rawlen(L, index) > count : list.count > 1)
    bind_error(L, "grad: %s: a list of %d expected, one for each tensor that is differentiated", what, count);
  list.tensors = lua_newuserdatauv(L, (size_t)list.count * sizeof *list.tensors, 1);
  lua_createtable(L, list.count, 0);
  int handles = lua_gettop(L);
  for (int k = 0; k < list.count; k++) {
    if (list.is_list)
      lua_rawgeti(L, index, k + 1);
    else
      lua_pushvalue(L, index);
    list.tensors[k] = take_tensor(L, handles, what, k, count > 0);
  }
  lua_setiuservalue(L, -2, 1);
  return list;
}

/* What takes the results: pushes a table of empty handles, and an array of them. */
static orepa_tensor **push_results(lua_State *L, int count) {
  lua_createtable(L, count, 0);
  for (int k = 0; k < count; k++) {
    bind_new(L);
    lua_rawseti(L, -2, k + 1);
  }
  return lua_newuserdatauv(L, (size_t)count * sizeof(orepa_tensor *), 0);
}

static void refuse_unused(lua_State *L, int k, const orepa_tensor *x) {
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  for (int d = 0; d < orepa_rank(x); d++) {
    lua_pushfstring(L, d ? "x%I" : " %I", (lua_Integer)orepa_shape(x)[d]);
    luaL_addvalue(&b);
  }
  luaL_pushresult(&b);
  bind_error(L,
             "grad: tensor %d of those asked for (%s%s) was not used for what is differentiated; {allow_unused = true} "
             "gives nil for it",
             k, orepa_dtype_name(orepa_tensor_dtype(x)), lua_tostring(L, -1));
}

/* Fills the handles of the table; where no gradient came there is nil, or an error. */
static void exchange_results(lua_State *L, int table, const tensor_list *xs, orepa_tensor *const *dxs,
                             bool allow_unused) {
  int unused = 0;
  for (int k = 0; k < xs->count; k++) {
    lua_rawgeti(L, table, k + 1);
    *(orepa_tensor **)lua_touserdata(L, -1) = dxs[k];
    lua_pop(L, 1);
    if (!dxs[k]) {
      unused = unused ? unused : k + 1;
      lua_pushnil(L);
      lua_rawseti(L, table, k + 1);
    }
  }
  if (unused && !allow_unused)
    refuse_unused(L, unused, xs->tensors[unused - 1]);
}

static int l_grad(lua_State *L) {
  static const char *const known[] = {"grads", "retain_graph", "allow_unused", "create_graph", NULL};
  lua_settop(L, 3);
  int options = bind_options(L, 3, "grad", known);
  bool retain = bind_option_boolean(L, options, "retain_graph", false);
  bool allow_unused = bind_option_boolean(L, options, "allow_unused", false);
  refuse_graph(L, options, "grad");
  tensor_list ys = push_list(L, 1, "what is differentiated", 0), xs = push_list(L, 2, "what is asked for", 0),
              dys = {0};
  if (bind_option(L, options, "grads"))
    dys = push_list(L, lua_gettop(L), "option 'grads'", ys.count);
  orepa_tensor **dxs = push_results(L, xs.count);
  int table = lua_gettop(L) - 1;
  backward_call call;
  begin_call(L, &call);
  end_call(L, &call, orepa_gradients(ys.count, ys.tensors, dys.tensors, xs.count, xs.tensors, retain, dxs));
  exchange_results(L, table, &xs, dxs, allow_unused);
  lua_settop(L, table);
  if (!xs.is_list)
    lua_rawgeti(L, table, 1);
  return 1;
}

static int l_requires_grad(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  bool on = lua_isnone(L, 2) || lua_toboolean(L, 2);
  if (orepa_set_requires_grad(t, on))
    return bind_fail(L);
  lua_settop(L, 1);
  return 1;
}

/* ---- regions: f(...) gives back what its function returns; without one it is a guard for `local _ <close> =` ---- */

static int get_grad(void) {
  return orepa_grad_enabled();
}

static int set_grad(int on) {
  orepa_set_grad_enabled(on != 0);
  return 0;
}

static int get_autocast(void) {
  return (int)orepa_autocast();
}

static int set_autocast(int dtype) {
  return orepa_set_autocast((orepa_dtype)dtype);
}

static int get_anomaly(void) {
  return (int)orepa_anomaly_wanted();
}

static int set_anomaly(int wanted) {
  orepa_set_anomaly((orepa_anomaly)wanted);
  return 0;
}

/* What is different inside a region. Setting it to what it was never fails. */
typedef enum { GRAD, AUTOCAST, ANOMALY, SETTINGS } setting;

static const struct {
  int (*get)(void);
  int (*set)(int);
} settings[SETTINGS] = {
    [GRAD] = {get_grad, set_grad}, [AUTOCAST] = {get_autocast, set_autocast}, [ANOMALY] = {get_anomaly, set_anomaly}};

typedef struct {
  setting which;
  int was;
  bool open;
} region_guard;

static int close_guard(lua_State *L) {
  region_guard *guard = luaL_checkudata(L, 1, BIND_GUARD);
  if (guard->open)
    settings[guard->which].set(guard->was);
  guard->open = false;
  return 0;
}

static int enter_with_guard(lua_State *L, setting which, int value) {
  region_guard *guard = lua_newuserdatauv(L, sizeof *guard, 0);
  *guard = (region_guard){which, settings[which].get(), true};
  luaL_setmetatable(L, BIND_GUARD);
  return settings[which].set(value) ? bind_fail(L) : 1;
}

/* The context is the setting, and what it was. */
static int leave(lua_State *L, int status, lua_KContext context) {
  settings[context % SETTINGS].set((int)(context / SETTINGS));
  if (status != LUA_OK && status != LUA_YIELD)
    return lua_error(L);
  return lua_gettop(L);
}

/* With another value while the function at `index` runs, whose results are given back; without one until the guard that
 * is given back ends. */
static int enter(lua_State *L, setting which, int value, int index) {
  if (lua_isnoneornil(L, index))
    return enter_with_guard(L, which, value);
  luaL_checktype(L, index, LUA_TFUNCTION);
  lua_pushvalue(L, index);
  lua_replace(L, 1);
  lua_settop(L, 1);
  lua_KContext context = (lua_KContext)settings[which].get() * SETTINGS + which;
  if (settings[which].set(value))
    return bind_fail(L);
  return leave(L, lua_pcallk(L, 0, LUA_MULTRET, 0, context, leave), context);
}

static int l_no_grad(lua_State *L) {
  return enter(L, GRAD, false, 1);
}

static int l_autocast(lua_State *L) {
  orepa_dtype dtype;
  if (lua_type(L, 1) != LUA_TSTRING)
    return bind_error(L, "autocast: the name of a type expected, got %s", luaL_typename(L, 1));
  if (orepa_dtype_by_name(lua_tostring(L, 1), &dtype))
    return bind_fail(L);
  return enter(L, AUTOCAST, (int)dtype, 2);
}

static int l_detect_anomaly(lua_State *L) {
  static const char *const known[] = {"nan_only", NULL};
  bool options_alone = lua_istable(L, 1);
  int options = bind_options(L, options_alone ? 1 : 2, "detect_anomaly", known);
  int wanted = bind_option_boolean(L, options, "nan_only", false) ? OREPA_ANOMALY_NAN : OREPA_ANOMALY_FINITE;
  if (options_alone)
    lua_settop(L, 0);
  return enter(L, ANOMALY, wanted, 1);
}

static int l_get_autocast(lua_State *L) {
  lua_pushstring(L, orepa_dtype_name(orepa_autocast()));
  return 1;
}

static int l_is_grad_enabled(lua_State *L) {
  lua_pushboolean(L, orepa_grad_enabled());
  return 1;
}

static const bind_row functions[] = {
    {"no_grad", l_no_grad,
     "no_grad(f) -> what f returns\nRuns f without recording a graph. Without argument it gives a guard: `local _ "
     "<close> = "
     "orepa.no_grad()` records nothing until its scope ends, by an error too.\n"
     "> orepa.no_grad(function() return orepa.ones(2) end)"},
    {"autocast", l_autocast,
     "autocast(dtype, f) -> what f returns\nRuns f with convolutions, linear layers and what is between them in dtype: "
     "\"bfloat16\", or \"float32\" to switch that off within. Parameters, their gradients, statistics of norms, the "
     "average pool before a classifier and losses stay float32. Without f it gives a guard: `local _ <close> = "
     "orepa.autocast(\"bfloat16\")`. Where float32 is faster (a processor without AMX) it is used instead, and one "
     "line "
     "on stderr says so; with OREPA_BFLOAT16=1 in the environment bfloat16 is used everywhere, with 0 nowhere.\n"
     "> orepa.autocast(\"bfloat16\", function() return F.linear(orepa.ones(2, 3), orepa.ones(4, 3)) end)"},
    {"detect_anomaly", l_detect_anomaly,
     "detect_anomaly(f, {nan_only=}) -> what f returns\nRuns f, and looks at the result of every op and at every "
     "gradient: the first number that is NaN or infinite (with nan_only: NaN) is an error that names the op that made "
     "it, and where it is. In backward it names the op whose gradient it is, and the line where that was called, if "
     "this was in the region too. Without f it gives a guard: `local _ <close> = orepa.detect_anomaly()`. Much slower "
     "than without; a mask of infinities wants nan_only.\n"
     "> pcall(orepa.detect_anomaly, function() return orepa.zeros(2):log() end)"},
    {"grad", l_grad,
     "grad(ys, xs, {grads=, retain_graph=, allow_unused=}) -> tensor or list\nThe gradients of ys (a tensor or a list, "
     "whose gradients are added up) with respect to xs (a tensor, or a list for a list), leaves or what ops made. They "
     "are new tensors; no tensor's own grad changes, and only what leads to xs is computed. grads are the gradients "
     "that it starts from, as backward's dy. An x that has no part in ys is an error, or nil with allow_unused. The "
     "graph that was used is freed unless retain_graph. Hooks of xs and of what is between count. There is no double "
     "backward: gradients have no graph of their own.\n"
     "> local x = orepa.tensor({1, 2}):requires_grad_(); return orepa.grad((x * x):sum(), x)"},
    {"get_autocast", l_get_autocast,
     "get_autocast() -> string\nThe type of the autocast that is entered now; \"float32\": none.\n"
     "> orepa.get_autocast()"},
    {"is_grad_enabled", l_is_grad_enabled,
     "is_grad_enabled() -> boolean\nWhether ops record a graph now (or would, in a checkpoint).\n> "
     "orepa.is_grad_enabled()"},
    {NULL, NULL, NULL},
};

static const bind_row methods[] = {
    {"backward", l_backward,
     "t:backward(dy, {retain_graph=})\nAdds gradients to the leaves that t was computed from; a single number needs no "
     "dy. The graph is freed on the way unless it is retained.\n"
     "> local x = orepa.ones(2):requires_grad_(); (x * x):sum():backward(); return x.grad"},
    {"requires_grad_", l_requires_grad,
     "t:requires_grad_(on) -> t\nAsks for t's gradient, or no longer. Of floats, and of tensors that no op made.\n"
     "> orepa.ones(2):requires_grad_()"},
    {NULL, NULL, NULL},
};

void bind_autograd_family(lua_State *L) {
  bind_register(L, "orepa.", functions);
  bind_end_with(L, BIND_GUARD, "__close", close_guard);
  bind_push_methods(L);
  bind_register(L, "t:", methods);
  lua_pop(L, 1);
}
