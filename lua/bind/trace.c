/* trace.c: what runs while a function does, as events for the library's Lua code (orepa/trace.lua). */
#include "bind.h"
#include "orepa_trace.h"

#define BIND_TRACE "orepa.Trace"
#define BIND_EVENT "orepa.Event"
#define NAMES "orepa.op_names" /* in the registry: from functions to their names */

/* ---- ops ---- */

void bind_name(lua_State *L, const char *name) {
  luaL_getsubtable(L, LUA_REGISTRYINDEX, NAMES);
  lua_pushvalue(L, -2);
  lua_pushstring(L, name);
  lua_rawset(L, -3);
  lua_pop(L, 1);
}

/* The name of the function that runs: the noted one, else what its caller calls it, which is noted then. */
static const char *running_name(lua_State *L) {
  lua_Debug ar;
  lua_getstack(L, 0, &ar);
  lua_getinfo(L, "fn", &ar);
  luaL_getsubtable(L, LUA_REGISTRYINDEX, NAMES);
  lua_pushvalue(L, -2);
  if (lua_rawget(L, -2) == LUA_TNIL) {
    lua_pushvalue(L, -3);
    bind_name(L, ar.name ? ar.name : "?");
    lua_rawget(L, -3);
    lua_replace(L, -2);
  }
  const char *name = lua_tostring(L, -1); /* the table keeps it */
  lua_pop(L, 3);
  return name;
}

int64_t bind_begin_op(lua_State *L) {
  if (!orepa_is_traced())
    return -1;
  luaL_checkstack(L, 6, "trace");
  return orepa_event_open(OREPA_EVENT_OP, running_name(L), 0);
}

void bind_end_op(int64_t event, const orepa_tensor *result) {
  if (event >= 0)
    orepa_event_close(event, result ? (size_t)orepa_count(result) * orepa_dtype_size(orepa_tensor_dtype(result)) : 0);
}

/* ---- modules: open(number) gives a guard that ends the event ---- */

static int l_open(lua_State *L) {
  int64_t number = bind_integer(L, 1, "trace: the module's number");
  int64_t *event = lua_newuserdatauv(L, sizeof *event, 0);
  *event = -1;
  luaL_setmetatable(L, BIND_EVENT);
  *event = orepa_event_open(OREPA_EVENT_MODULE, "module", number);
  return 1;
}

static int close_event(lua_State *L) {
  int64_t *event = luaL_checkudata(L, 1, BIND_EVENT);
  orepa_event_close(*event, 0);
  *event = -1;
  return 0;
}

/* ---- the trace ---- */

typedef struct {
  orepa_trace *trace;
  bool running;
} trace_handle;

/* The end of a trace by an error, and of a handle. */
static int close_trace(lua_State *L) {
  trace_handle *handle = luaL_checkudata(L, 1, BIND_TRACE);
  if (handle->running) {
    handle->running = false;
    orepa_trace_free(orepa_trace_stop());
  }
  return 0;
}

static int free_trace(lua_State *L) {
  trace_handle *handle = luaL_checkudata(L, 1, BIND_TRACE);
  orepa_trace_free(handle->trace);
  handle->trace = NULL;
  return 0;
}

/* run(f, ...) -> trace, what f returns. f can't yield; an error in it goes on as it is, and ends the trace. */
static int l_run(lua_State *L) {
  luaL_checktype(L, 1, LUA_TFUNCTION);
  trace_handle *handle = lua_newuserdatauv(L, sizeof *handle, 0);
  *handle = (trace_handle){NULL, false};
  luaL_setmetatable(L, BIND_TRACE);
  lua_insert(L, 1);
  lua_toclose(L, 1);
  if (orepa_trace_start())
    return bind_fail(L);
  handle->running = true;
  lua_call(L, lua_gettop(L) - 2, LUA_MULTRET);
  handle->running = false;
  handle->trace = orepa_trace_stop();
  return lua_gettop(L);
}

static orepa_trace *check_trace(lua_State *L) {
  trace_handle *handle = luaL_checkudata(L, 1, BIND_TRACE);
  if (!handle->trace)
    bind_error(L, "trace: it is not over");
  return handle->trace;
}

/* count(trace) -> how many events there are, how many were lost for want of memory */
static int l_count(lua_State *L) {
  const orepa_trace *trace = check_trace(L);
  lua_pushinteger(L, orepa_trace_count(trace));
  lua_pushinteger(L, orepa_trace_lost(trace));
  return 2;
}

static void set_integer(lua_State *L, const char *name, int64_t value) {
  lua_pushinteger(L, (lua_Integer)value);
  lua_setfield(L, 3, name);
}

static void set_string(lua_State *L, const char *name, const char *value) {
  lua_pushstring(L, value); /* NULL: nil */
  lua_setfield(L, 3, name);
}

static void set_number(lua_State *L, const char *name, double value) {
  lua_pushnumber(L, value);
  lua_setfield(L, 3, name);
}

/* event(trace, k, table) -> table, whose fields are those of event k; `around` counts from 1, 0: nothing */
static int l_event(lua_State *L) {
  static const char *const kinds[] = {"module", "op", "node", "kernel"};
  const orepa_event *e = orepa_trace_event(check_trace(L), bind_integer(L, 2, "trace: the event") - 1);
  luaL_checktype(L, 3, LUA_TTABLE);
  lua_settop(L, 3);
  if (!e)
    return bind_error(L, "trace: there is no event %I", lua_tointeger(L, 2));
  set_string(L, "kind", kinds[e->kind]);
  set_string(L, "name", e->name);
  set_string(L, "op", e->op);
  set_string(L, "detail", e->detail);
  set_integer(L, "number", e->number);
  set_integer(L, "around", e->around + 1);
  set_number(L, "start", e->start);
  set_number(L, "stop", e->end);
  set_number(L, "seconds", e->end - e->start);
  set_integer(L, "macs", e->macs);
  set_integer(L, "bytes", (int64_t)e->bytes);
  set_integer(L, "kept", (int64_t)e->kept);
  set_integer(L, "live_at_start", (int64_t)e->live_at_start);
  set_integer(L, "live_at_end", (int64_t)e->live_at_end);
  set_integer(L, "nodes_at_start", (int64_t)e->nodes_at_start);
  set_integer(L, "nodes_at_end", (int64_t)e->nodes_at_end);
  return 1;
}

/* Not for users: orepa.profile and nn.summary are built on these. */
static const bind_row rows[] = {
    {"run", l_run, NULL},     {"open", l_open, NULL}, {"count", l_count, NULL},
    {"event", l_event, NULL}, {NULL, NULL, NULL},
};

void bind_trace_family(lua_State *L) {
  bind_end_with(L, BIND_EVENT, "__close", close_event);
  bind_end_with(L, BIND_TRACE, "__gc", free_trace);
  luaL_getmetatable(L, BIND_TRACE);
  lua_pushcfunction(L, close_trace);
  lua_setfield(L, -2, "__close");
  lua_pop(L, 1);
  lua_newtable(L);
  bind_register(L, "tracing.", rows);
  lua_setfield(L, -2, "tracing");
}
