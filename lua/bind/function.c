/* function.c: ops written in Lua. A call runs `forward` without a graph and makes one node of it; backward calls
 * `backward` with the same context. Tensors that the context saves are kept by the node, which notices changes;
 * whatever else Lua keeps for it hangs on one reference, which is given up with the graph. */
#include <stdlib.h>

#include "bind.h"

#define BIND_FUNCTION "orepa.Function"
#define BIND_CONTEXT "orepa.Context"

/* Keys of a context that no field of the user's can meet. */
static const char saved_key, constant_key;

/* The first argument is a table of the given metatable. */
static void check_self(lua_State *L, const char *type) {
  bool is = lua_istable(L, 1) && lua_getmetatable(L, 1);
  if (is) {
    luaL_getmetatable(L, type);
    is = lua_rawequal(L, -1, -2);
    lua_pop(L, 2);
  }
  if (!is)
    bind_error(L, "argument 1: an %s expected, got %s", type, luaL_typename(L, 1));
}

static void push_field(lua_State *L, const char *name) {
  lua_pushstring(L, name);
  lua_rawget(L, 1);
}

static const char *what_is(lua_State *L, int index) {
  return luaL_testudata(L, index, BIND_TENSOR) ? "released tensor" : luaL_typename(L, index);
}

/* ---- the context ---- */

/* Appends the arguments, which must be tensors, to the context's list under `key`. */
static int append_tensors(lua_State *L, const char *key) {
  check_self(L, BIND_CONTEXT);
  int last = lua_gettop(L);
  if (lua_rawgetp(L, 1, key) == LUA_TNIL) {
    lua_newtable(L);
    lua_pushvalue(L, -1);
    lua_rawsetp(L, 1, key);
    lua_replace(L, -2);
  }
  int count = (int)lua_rawlen(L, -1);
  for (int k = 2; k <= last; k++) {
    bind_tensor(L, k);
    lua_pushvalue(L, k);
    lua_rawseti(L, -2, ++count);
  }
  return 0;
}

static int l_save(lua_State *L) {
  return append_tensors(L, &saved_key);
}

static int l_constant(lua_State *L) {
  return append_tensors(L, &constant_key);
}

static int l_saved(lua_State *L) {
  check_self(L, BIND_CONTEXT);
  lua_settop(L, 1);
  if (lua_rawgetp(L, 1, &saved_key) == LUA_TNIL)
    return 0;
  int count = (int)lua_rawlen(L, 2);
  luaL_checkstack(L, count, "ctx:saved");
  for (int k = 1; k <= count; k++)
    lua_rawgeti(L, 2, k);
  return count;
}

/* ---- backward ---- */

/* In the table that the payload, a reference, names 1 is the function, 2 the context, 3 the name. */
typedef struct {
  int reference;
  const orepa_custom_call *call;
} backward_call;

static void push_saved(lua_State *L, int context, const orepa_custom_call *call) {
  lua_createtable(L, call->saved, 0);
  for (int k = 0; k < call->saved; k++) {
    bind_push(L, call->kept[k]);
    lua_rawseti(L, -2, k + 1);
  }
  lua_rawsetp(L, context, &saved_key);
}

static void push_needs(lua_State *L, int context, int count, const bool *needs) {
  lua_createtable(L, count, 0);
  for (int k = 0; k < count; k++) {
    lua_pushboolean(L, needs[k]);
    lua_rawseti(L, -2, k + 1);
  }
  lua_setfield(L, context, "needs");
}

/* The results from `first` on are the gradients of the arguments; nil is none, and so is what is missing at the end. */
static void take_gradients(lua_State *L, const char *name, int first, const orepa_custom_call *call) {
  int count = lua_gettop(L) - first + 1;
  if (count == 0)
    bind_error(L, "%s: backward gave nothing; a gradient or nil for each of %d arguments expected", name, call->inputs);
  for (int k = 0; k < count; k++) {
    if (!lua_toboolean(L, first + k)) /* `needed and dx` may be false */
      continue;
    if (k >= call->inputs)
      bind_error(L, "%s: backward gave %d gradients for %d arguments", name, count, call->inputs);
    if (!bind_test_tensor(L, first + k))
      bind_error(L, "%s: backward gave a %s as gradient %d; a tensor or nil expected", name, what_is(L, first + k),
                 k + 1);
  }
  for (int k = 0; k < count && k < call->inputs; k++) {
    orepa_tensor *given = bind_test_tensor(L, first + k);
    call->dxs[k] = given ? orepa_retain(given) : NULL;
  }
}

static int call_backward(lua_State *L) {
  const backward_call *b = lua_touserdata(L, 1);
  const orepa_custom_call *call = b->call;
  bind_collect(L);
  luaL_checkstack(L, call->outputs + 8, "Function");
  lua_rawgeti(L, LUA_REGISTRYINDEX, b->reference);
  lua_rawgeti(L, 2, 3);
  lua_rawgeti(L, 2, 2);
  int context = lua_gettop(L);
  push_saved(L, context, call);
  push_needs(L, context, call->inputs, call->needs);
  lua_rawgeti(L, 2, 1);
  lua_pushvalue(L, context);
  for (int k = 0; k < call->outputs; k++)
    bind_push(L, call->dys[k]);
  int status = lua_pcall(L, call->outputs + 1, LUA_MULTRET, 0);
  lua_pushnil(L); /* the graph keeps what was saved, and it alone */
  lua_rawsetp(L, context, &saved_key);
  if (status != LUA_OK)
    return lua_error(L);
  take_gradients(L, lua_tostring(L, 3), context + 1, call);
  return 0;
}

static int custom_backward(void *payload, const orepa_custom_call *call) {
  backward_call b = {((bind_reference *)payload)->reference, call};
  return bind_call_back(call_backward, &b);
}

static void dispose(void *payload) {
  bind_give_up(payload);
}

/* ---- forward ---- */

/* Pushes a new context, which says what arguments from 2 to `last` need. */
static int push_context(lua_State *L, int last) {
  lua_newtable(L);
  luaL_setmetatable(L, BIND_CONTEXT);
  int context = lua_gettop(L);
  lua_createtable(L, last, 0);
  for (int k = 2; k <= last; k++) {
    orepa_tensor *x = luaL_testudata(L, k, BIND_TENSOR) ? bind_tensor(L, k) : NULL;
    lua_pushboolean(L, x && orepa_grad_enabled() && orepa_requires_grad(x));
    lua_rawseti(L, -2, k - 1);
  }
  lua_setfield(L, context, "needs");
  return context;
}

/* Pushes an array of the arguments' tensors, NULL where there is none, with their versions behind them. It has
 * references of its own: forward may release the user's handles. */
static orepa_tensor **push_inputs(lua_State *L, int last) {
  size_t count = (size_t)last - 1;
  orepa_tensor **xs = lua_newuserdatauv(L, count * (sizeof *xs + sizeof(uint64_t)) + 1, 1);
  uint64_t *versions = (uint64_t *)(xs + count);
  lua_createtable(L, (int)count, 0);
  for (size_t k = 0; k < count; k++) {
    xs[k] = bind_test_tensor(L, (int)k + 2);
    versions[k] = xs[k] ? orepa_version(xs[k]) : 0;
    bind_push(L, xs[k]);
    lua_rawseti(L, -2, (lua_Integer)k + 1);
  }
  lua_setiuservalue(L, -2, 1);
  return xs;
}

static void check_unchanged(lua_State *L, const char *name, int count, orepa_tensor *const *xs) {
  const uint64_t *versions = (const uint64_t *)(xs + count);
  for (int k = 0; k < count; k++)
    if (xs[k] && orepa_requires_grad(xs[k]) && orepa_version(xs[k]) != versions[k])
      bind_error(L, "%s: forward changed argument %d in place, which requires a gradient", name, k + 1);
}

/* Runs forward without a graph; its results come to the top of the stack. Gives the place of the first. */
static int run_forward(lua_State *L, int last, int context) {
  int first = lua_gettop(L) + 1;
  luaL_checkstack(L, last + 4, "Function");
  push_field(L, "forward");
  lua_pushvalue(L, context);
  for (int k = 2; k <= last; k++)
    lua_pushvalue(L, k);
  bool was = orepa_set_grad_enabled(false);
  int status = lua_pcall(L, last, LUA_MULTRET, 0);
  orepa_set_grad_enabled(was);
  if (status != LUA_OK)
    lua_error(L);
  return first;
}

/* Pushes the list of tensors under `key` as an array; it is the context's no longer. */
static orepa_tensor **take_list(lua_State *L, int context, const char *key, int *count) {
  bool some = lua_rawgetp(L, context, key) == LUA_TTABLE;
  *count = some ? (int)lua_rawlen(L, -1) : 0;
  orepa_tensor **list = lua_newuserdatauv(L, (size_t)*count * sizeof *list + 1, 1);
  for (int k = 0; k < *count; k++) {
    lua_rawgeti(L, -2, k + 1);
    list[k] = bind_test_tensor(L, -1);
    if (!list[k])
      bind_error(L, "Function: a tensor that the context was given has been released");
    lua_pop(L, 1);
  }
  lua_insert(L, -2); /* the array keeps the handles alive */
  lua_setiuservalue(L, -2, 1);
  lua_pushnil(L);
  lua_rawsetp(L, context, key);
  return list;
}

static bind_reference *payload_new(lua_State *L, int context) {
  lua_createtable(L, 3, 0);
  push_field(L, "backward");
  lua_rawseti(L, -2, 1);
  lua_pushvalue(L, context);
  lua_rawseti(L, -2, 2);
  push_field(L, "name");
  lua_rawseti(L, -2, 3);
  int reference = luaL_ref(L, LUA_REGISTRYINDEX);
  bind_reference *payload = calloc(1, sizeof *payload);
  if (!payload) {
    luaL_unref(L, LUA_REGISTRYINDEX, reference);
    bind_error(L, "Function: out of memory: no room for a call");
  }
  payload->reference = reference;
  return payload;
}

static bool is_in(const orepa_tensor *t, int count, orepa_tensor *const *list) {
  while (count > 0 && list[count - 1] != t)
    count--;
  return count > 0;
}

/* Puts tensors with a history in the place of what forward computed, from `first` to the top. */
static void exchange_results(lua_State *L, const char *name, int context, int first, int inputs,
                             orepa_tensor *const *xs) {
  static const orepa_custom custom = {custom_backward, dispose};
  int count = lua_gettop(L) - first + 1, saved, constants;
  luaL_checkstack(L, count + 8, "Function");
  orepa_tensor **ys = lua_newuserdatauv(L, 2 * (size_t)count * sizeof *ys, 0), **results = ys + count;
  bool *constant = lua_newuserdatauv(L, (size_t)count, 0);
  orepa_tensor **kept = take_list(L, context, &saved_key, &saved);
  orepa_tensor **marked = take_list(L, context, &constant_key, &constants);
  for (int k = 0; k < count; k++) {
    ys[k] = bind_test_tensor(L, first + k);
    constant[k] = is_in(ys[k], constants, marked);
  }
  int handles = lua_gettop(L) + 1;
  for (int k = 0; k < count; k++) /* made before anything is done */
    bind_new(L);
  orepa_custom_forward f = {name, inputs, saved, count, xs, kept, ys, constant};
  if (orepa_custom_results(&custom, payload_new(L, context), &f, results)) {
    bind_give_up_now(L);
    bind_fail(L);
  }
  bind_give_up_now(L);
  for (int k = 0; k < count; k++)
    *(orepa_tensor **)lua_touserdata(L, handles + k) = results[k];
  for (int k = 0; k < count; k++) {
    lua_pushvalue(L, handles + k);
    lua_replace(L, first + k);
  }
  lua_settop(L, first + count - 1);
}

static void check_results(lua_State *L, const char *name, int first) {
  int count = lua_gettop(L) - first + 1;
  if (count == 0)
    bind_error(L, "%s: forward gave nothing; a tensor expected", name);
  for (int k = 0; k < count; k++)
    if (!bind_test_tensor(L, first + k))
      bind_error(L, "%s: forward gave a %s as result %d; all must be tensors", name, what_is(L, first + k), k + 1);
}

static int l_call(lua_State *L) {
  int last = lua_gettop(L);
  check_self(L, BIND_FUNCTION);
  bind_collect(L);
  push_field(L, "name");
  if (lua_type(L, -1) != LUA_TSTRING)
    return bind_error(L, "Function: its name is a %s", luaL_typename(L, -1));
  const char *name = lua_tostring(L, -1); /* stays on the stack, and so alive */
  int context = push_context(L, last);
  orepa_tensor **xs = push_inputs(L, last);
  int first = run_forward(L, last, context);
  check_results(L, name, first);
  check_unchanged(L, name, last - 1, xs);
  bind_note_place(L); /* not that of forward's last op */
  exchange_results(L, name, context, first, last - 1, xs);
  return lua_gettop(L) - first + 1;
}

static void take_callable(lua_State *L, const char *name) {
  lua_getfield(L, 1, name);
  if (lua_isnil(L, -1))
    bind_error(L, "Function: option '%s' is missing", name);
  if (lua_type(L, -1) != LUA_TFUNCTION)
    bind_error(L, "Function: option '%s': a function expected, got %s", name, luaL_typename(L, -1));
  lua_setfield(L, 2, name);
}

static int l_function(lua_State *L) {
  static const char *const known[] = {"forward", "backward", "name", NULL};
  if (!lua_istable(L, 1))
    return bind_error(L, "Function: a table {forward=, backward=} expected, got %s", luaL_typename(L, 1));
  bind_options(L, 1, "Function", known);
  lua_settop(L, 1);
  lua_createtable(L, 0, 3);
  take_callable(L, "forward");
  take_callable(L, "backward");
  if (!bind_option(L, 1, "name"))
    lua_pushliteral(L, "Function");
  if (lua_type(L, -1) != LUA_TSTRING)
    return bind_error(L, "Function: option 'name': a string expected, got %s", luaL_typename(L, -1));
  lua_setfield(L, 2, "name");
  luaL_setmetatable(L, BIND_FUNCTION);
  return 1;
}

static const bind_row functions[] = {
    {"Function", l_function,
     "Function{forward=, backward=, name=} -> function\nAn op written in Lua. forward(ctx, ...) gets the arguments of "
     "a "
     "call and returns tensors, of which no graph is recorded. backward(ctx, ...) gets the gradient of each of them "
     "(zeros where none arrived; nil for integers) and returns that of each argument, nil where there is none; shapes, "
     "types and devices must fit. Tensors for backward are saved with ctx:save, so that a change in place is noticed; "
     "anything else may be a field of ctx. ctx.needs[k] tells whether argument k needs its gradient. Results are no "
     "arguments: give back a new tensor. backward runs on the Lua state that called t:backward(). The name is for "
     "messages. orepa.gradcheck compares the two.\n"
     "> local double = orepa.Function{\n"
     ">   forward = function(ctx, x) return x * 2 end,\n"
     ">   backward = function(ctx, dy) return dy * 2 end}\n"
     "> local x = orepa.ones(2):requires_grad_(); double(x):sum():backward(); return x.grad"},
    {NULL, NULL, NULL},
};

static const bind_row context_methods[] = {
    {"save", l_save,
     "ctx:save(t, ...)\nIn forward of an orepa.Function: keeps tensors for backward. One that is changed in place "
     "before "
     "is an error there. They may be arguments, results or others.\n"
     "> orepa.Function{forward = function(ctx, x) local y = x:exp(); ctx:save(y); return y end,\n"
     ">   backward = function(ctx, dy) return dy * ctx:saved() end}"},
    {"saved", l_saved,
     "ctx:saved() -> tensors\nIn backward of an orepa.Function: what ctx:save was given, in its order, without a "
     "graph.\n"
     "> orepa.Function{forward = function(ctx, a, b) ctx:save(a, b); return a * b end,\n"
     ">   backward = function(ctx, dy) local a, b = ctx:saved(); return dy * b, dy * a end}"},
    {"mark_non_differentiable", l_constant,
     "ctx:mark_non_differentiable(y, ...)\nIn forward of an orepa.Function: these results have no gradient, as "
     "integers "
     "have none anyway; backward gets nil for theirs.\n"
     "> orepa.Function{forward = function(ctx, x) local m = x:gt(0):to(\"float32\"); ctx:mark_non_differentiable(m);\n"
     ">   return x * m, m end, backward = function(ctx, dy) return dy end}"},
    {NULL, NULL, NULL},
};

void bind_function_family(lua_State *L) {
  bind_register(L, "orepa.", functions);
  bind_end_with(L, BIND_FUNCTION, "__call", l_call);
  luaL_newmetatable(L, BIND_CONTEXT);
  lua_newtable(L);
  bind_register(L, "ctx:", context_methods);
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
}
