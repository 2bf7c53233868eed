/* bind.c: handles, errors, arguments, and when to collect garbage. */
#include "bind.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "orepa_trace.h"

/* ---- registration ---- */

void bind_document(lua_State *L, const char *name, const char *documentation) {
  luaL_getsubtable(L, LUA_REGISTRYINDEX, "orepa.documentation");
  lua_pushstring(L, documentation);
  lua_setfield(L, -2, name);
  lua_pop(L, 1);
}

void bind_register(lua_State *L, const char *prefix, const bind_row *rows) {
  for (; rows->name; rows++) {
    lua_pushcfunction(L, rows->function);
    bind_name(L, rows->name);
    lua_setfield(L, -2, rows->name);
    if (rows->documentation) {
      bind_document(L, lua_pushfstring(L, "%s%s", prefix, rows->name), rows->documentation);
      lua_pop(L, 1);
    }
  }
}

void bind_end_with(lua_State *L, const char *type, const char *method, lua_CFunction function) {
  luaL_newmetatable(L, type);
  lua_pushcfunction(L, function);
  lua_setfield(L, -2, method);
  lua_pop(L, 1);
}

/* ---- errors ---- */

/* Pushes "file:line: " of the innermost Lua function outside the library, else of the innermost one. */
static void push_where(lua_State *L) {
  lua_Debug ar;
  int found = -1;
  for (int level = 1; lua_getstack(L, level, &ar); level++) {
    lua_getinfo(L, "Sl", &ar);
    if (ar.currentline < 0)
      continue;
    bool library = strstr(ar.source, "/lua/5.4/orepa/") != NULL;
    if (found < 0 || !library)
      found = level;
    if (!library)
      break;
  }
  if (found < 0)
    lua_pushliteral(L, "");
  else
    luaL_where(L, found);
}

int bind_error(lua_State *L, const char *format, ...) {
  va_list arguments;
  push_where(L);
  va_start(arguments, format);
  lua_pushvfstring(L, format, arguments);
  va_end(arguments);
  lua_concat(L, 2);
  return lua_error(L);
}

int bind_fail(lua_State *L) {
  return bind_error(L, "%s", orepa_error());
}

/* ---- handles ---- */

orepa_tensor *bind_test_tensor(lua_State *L, int index) {
  orepa_tensor **handle = luaL_testudata(L, index, BIND_TENSOR);
  return handle ? *handle : NULL;
}

orepa_tensor *bind_tensor(lua_State *L, int index) {
  orepa_tensor **handle = luaL_testudata(L, index, BIND_TENSOR);
  if (!handle)
    bind_error(L, "argument %d: a tensor expected, got %s", index, luaL_typename(L, index));
  else if (!*handle)
    bind_error(L, "argument %d: this tensor was released", index);
  return *handle;
}

orepa_tensor *bind_tensor_or_nil(lua_State *L, int index) {
  return lua_isnoneornil(L, index) ? NULL : bind_tensor(L, index);
}

orepa_tensor **bind_new(lua_State *L) {
  orepa_tensor **handle = lua_newuserdatauv(L, sizeof *handle, 0);
  *handle = NULL;
  luaL_setmetatable(L, BIND_TENSOR);
  return handle;
}

void bind_push(lua_State *L, orepa_tensor *t) {
  if (t)
    *bind_new(L) = orepa_retain(t);
  else
    lua_pushnil(L);
}

/* ---- garbage ----
 * Lua sees handles of a few bytes where the engine holds maps of megabytes. What drives collection is the engine's live
 * bytes: `left` is the most that an earlier collection left, sinking by 1% at each, so that a peak is forgotten after a
 * while. A collection walks Lua's whole heap, so that as many bytes again may be lost before the next. */

static _Thread_local double left; /* a worker of a loader has a heap of its own */

static size_t heap_bytes(lua_State *L) {
  return (size_t)lua_gc(L, LUA_GCCOUNT) << 10;
}

static void collect(lua_State *L) {
  double start = orepa_clock();
  int64_t event = orepa_event_open(OREPA_EVENT_OP, "collect garbage", 0);
  lua_gc(L, LUA_GCCOLLECT);
  orepa_event_close(event, 0);
  double seconds = orepa_clock() - start;
  double live = (double)orepa_memory_live();
  left = live > 0.99 * left ? live : 0.99 * left;
  lua_getfield(L, LUA_REGISTRYINDEX, "orepa.collections");
  lua_pushinteger(L, lua_tointeger(L, -1) + 1);
  lua_setfield(L, LUA_REGISTRYINDEX, "orepa.collections");
  lua_getfield(L, LUA_REGISTRYINDEX, "orepa.collection_seconds");
  lua_pushnumber(L, lua_tonumber(L, -1) + seconds);
  lua_setfield(L, LUA_REGISTRYINDEX, "orepa.collection_seconds");
  lua_pop(L, 2);
}

void bind_note_place(lua_State *L) {
  if (orepa_anomaly_wanted() == OREPA_ANOMALY_OFF)
    return;
  push_where(L);
  orepa_set_place(luaL_gsub(L, lua_tostring(L, -1), ": ", ""));
  lua_pop(L, 2);
}

static bool stressed; /* a collection before each op */

void bind_stress(lua_State *L) {
  const char *how = getenv("OREPA_STRESS");
  bool each = how && !strcmp(how, "gc");
  if (stressed != each) /* workers' states read it meanwhile */
    stressed = each;
  if (how && !strcmp(how, "generational"))
    lua_gc(L, LUA_GCGEN, 0, 0);
  else if (how && *how && !each)
    bind_error(L, "OREPA_STRESS is '%s'; gc or generational expected", how);
}

void bind_collect(lua_State *L) {
  bind_note_place(L);
  double lost = (double)orepa_memory_live() - 1.05 * left - (16 << 20);
  if (stressed || (lost > 0 && lost > (double)heap_bytes(L)))
    collect(L);
}

/* A collection takes about as long as work on a few times the heap's bytes. */
enum { HEAPS = 32 };

void bind_tidy(lua_State *L) {
  if (orepa_memory_live() / HEAPS > heap_bytes(L))
    collect(L);
}

bool bind_retry(lua_State *L) {
  if (!orepa_error_is_out_of_memory())
    return false;
  collect(L);
  return true;
}

/* ---- options ---- */

bool bind_is_options(lua_State *L, int index) {
  if (!lua_istable(L, index))
    return false;
  bool strings = false, others = false;
  index = lua_absindex(L, index);
  for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1)) {
    if (lua_type(L, -2) == LUA_TSTRING)
      strings = true;
    else
      others = true;
  }
  if (strings && others)
    bind_error(L, "argument %d: a table with both named and numbered entries is neither a list nor options", index);
  return strings || (!others && index > 1);
}

int bind_options(lua_State *L, int index, const char *function, const char *const *known) {
  if (lua_isnoneornil(L, index))
    return 0;
  if (!lua_istable(L, index))
    bind_error(L, "%s: argument %d: a table of options expected, got %s", function, index, luaL_typename(L, index));
  for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1)) {
    const char *key = lua_type(L, -2) == LUA_TSTRING ? lua_tostring(L, -2) : "(a number)";
    const char *const *name = known;
    while (*name && strcmp(*name, key))
      name++;
    if (!*name)
      bind_error(L, "%s: unknown option '%s'", function, key);
  }
  return index;
}

bool bind_option(lua_State *L, int options, const char *name) {
  if (!options)
    return false;
  if (lua_getfield(L, options, name) != LUA_TNIL)
    return true;
  lua_pop(L, 1);
  return false;
}

double bind_option_number(lua_State *L, int options, const char *name, double otherwise) {
  if (!bind_option(L, options, name))
    return otherwise;
  if (lua_type(L, -1) != LUA_TNUMBER)
    bind_error(L, "option '%s': a number expected, got %s", name, luaL_typename(L, -1));
  double value = lua_tonumber(L, -1);
  lua_pop(L, 1);
  return value;
}

int64_t bind_option_integer(lua_State *L, int options, const char *name, int64_t otherwise) {
  if (!bind_option(L, options, name))
    return otherwise;
  int64_t value = bind_integer(L, -1, name);
  lua_pop(L, 1);
  return value;
}

bool bind_option_boolean(lua_State *L, int options, const char *name, bool otherwise) {
  if (!bind_option(L, options, name))
    return otherwise;
  if (!lua_isboolean(L, -1))
    bind_error(L, "option '%s': true or false expected, got %s", name, luaL_typename(L, -1));
  bool value = lua_toboolean(L, -1);
  lua_pop(L, 1);
  return value;
}

void bind_option_pair(lua_State *L, int options, const char *name, const int64_t otherwise[2], int64_t pair[2]) {
  memcpy(pair, otherwise, 2 * sizeof *pair);
  if (!bind_option(L, options, name))
    return;
  if (lua_istable(L, -1)) {
    if (lua_rawlen(L, -1) != 2)
      bind_error(L, "option '%s': a number or {height, width} expected, got a table of %d", name,
                 (int)lua_rawlen(L, -1));
    for (int k = 0; k < 2; k++) {
      lua_rawgeti(L, -1, k + 1);
      pair[k] = bind_integer(L, -1, name);
      lua_pop(L, 1);
    }
  } else {
    pair[0] = pair[1] = bind_integer(L, -1, name);
  }
  lua_pop(L, 1);
}

/* ---- numbers, axes, shapes, kinds ---- */

int64_t bind_integer(lua_State *L, int index, const char *what) {
  int integral;
  lua_Integer value = lua_tointegerx(L, index, &integral);
  if (lua_type(L, index) != LUA_TNUMBER)
    bind_error(L, "%s: an integer expected, got %s", what, luaL_typename(L, index));
  if (!integral)
    bind_error(L, "%s: %f is not an integer", what, lua_tonumber(L, index));
  return value;
}

int bind_axis(lua_State *L, int index, int rank, const char *function) {
  int64_t axis = bind_integer(L, index, function);
  if (axis == 0 || axis > rank || axis < -rank)
    bind_error(L, "%s: there is no dimension %I in a tensor of %d (they count from 1, -1 is the last)", function,
               (lua_Integer)axis, rank);
  return (int)(axis > 0 ? axis - 1 : axis + rank);
}

int bind_shape(lua_State *L, int index, int last, int64_t *shape, bool allow_unknown) {
  bool list = lua_istable(L, index);
  int rank = list ? (int)lua_rawlen(L, index) : last - index + 1;
  if (rank > OREPA_MAX_RANK)
    bind_error(L, "a tensor has at most %d dimensions, not %d", OREPA_MAX_RANK, rank);
  for (int d = 0; d < rank; d++) {
    if (list)
      lua_rawgeti(L, index, d + 1);
    else
      lua_pushvalue(L, index + d);
    shape[d] = bind_integer(L, -1, "a size");
    lua_pop(L, 1);
    if (shape[d] < 0 && !(allow_unknown && shape[d] == -1))
      bind_error(L, "a size is negative: %I", (lua_Integer)shape[d]);
  }
  return rank < 0 ? 0 : rank;
}

orepa_dtype bind_dtype(lua_State *L, const char *name) {
  orepa_dtype dtype = OREPA_FLOAT32;
  if (orepa_dtype_by_name(name, &dtype))
    bind_fail(L);
  return dtype;
}

const orepa_device *bind_device(lua_State *L, const char *name) {
  const orepa_device *device = orepa_device_by_name(name);
  if (!device)
    bind_fail(L);
  return device;
}

static const char *option_string(lua_State *L, int options, const char *name) {
  if (!bind_option(L, options, name))
    return NULL;
  if (lua_type(L, -1) != LUA_TSTRING)
    bind_error(L, "option '%s': a string expected, got %s", name, luaL_typename(L, -1));
  return lua_tostring(L, -1); /* stays on the stack, and so alive */
}

bind_kind bind_kind_option(lua_State *L, int index, const char *function) {
  static const char *const known[] = {"dtype", "device", NULL};
  int options = bind_options(L, index, function, known);
  const char *dtype = option_string(L, options, "dtype"), *device = option_string(L, options, "device");
  return (bind_kind){dtype ? bind_dtype(L, dtype) : OREPA_FLOAT32, bind_device(L, device ? device : "cpu"),
                     dtype != NULL};
}

orepa_operand bind_number(lua_State *L, int index) {
  orepa_operand operand = {.number = luaL_checknumber(L, index), .is_integer = lua_isinteger(L, index)};
  operand.integer = operand.is_integer ? lua_tointeger(L, index) : 0;
  return operand;
}

orepa_operand bind_operand(lua_State *L, int index) {
  orepa_operand operand = {NULL, 0, 0, false};
  if (lua_type(L, index) == LUA_TNUMBER) {
    operand = bind_number(L, index);
  } else if (luaL_testudata(L, index, BIND_TENSOR)) {
    operand.tensor = bind_tensor(L, index);
  } else {
    bind_error(L, "argument %d: a tensor or a number expected, got %s", index, luaL_typename(L, index));
  }
  return operand;
}

orepa_tensor *bind_tensor_or_scalar(lua_State *L, int index, const orepa_tensor *t) {
  orepa_operand value = bind_operand(L, index);
  if (value.tensor)
    return value.tensor;
  orepa_tensor **made = bind_new(L);
  *made = orepa_full_of(orepa_tensor_dtype(t), orepa_tensor_device(t), 0, NULL, value);
  if (!*made)
    bind_fail(L);
  return *made;
}
