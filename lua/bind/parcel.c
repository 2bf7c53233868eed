/* parcel.c: values in the order in which they are met, a table being a mark, its keys and values in turn, and a mark.
 */
#include "parcel.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "orepa_data.h"

#define HOLDER "orepa.Parcel"

enum { DEEPEST = 64, MOST_ITEMS = 1 << 24, ROOM = 256 };

typedef enum { NIL, BOOLEAN, INTEGER, NUMBER, STRING, TENSOR, TABLE, END } item_kind;

typedef struct {
  item_kind kind;
  union {
    bool boolean;
    lua_Integer integer;
    lua_Number number;
    struct {
      char *bytes;
      size_t length;
    } string;
    orepa_tensor *tensor;
    int list; /* of a table: how many of its keys will be 1, 2, ... */
  } as;
} parcel_item;

struct parcel {
  parcel_item *items;
  int count, capacity;
  int values;
};

void parcel_free(parcel *p) {
  for (int k = 0; p && k < p->count; k++) {
    if (p->items[k].kind == STRING)
      free(p->items[k].as.string.bytes);
    if (p->items[k].kind == TENSOR)
      orepa_release(p->items[k].as.tensor);
  }
  if (p)
    free(p->items);
  free(p);
}

/* ---- packing ---- */

typedef struct {
  parcel *p;
  char place[ROOM], problem[ROOM]; /* of what can't cross: ".boxes[2]", "a function" */
} packing;

static bool fail(packing *w, const char *problem) {
  snprintf(w->problem, sizeof w->problem, "%s", problem);
  return false;
}

static bool add(packing *w, parcel_item item) {
  parcel *p = w->p;
  if (p->count == p->capacity) {
    int capacity = p->capacity ? 2 * p->capacity : 8;
    parcel_item *items = capacity <= MOST_ITEMS ? realloc(p->items, (size_t)capacity * sizeof *items) : NULL;
    if (!items)
      return fail(w, capacity <= MOST_ITEMS ? "there is no memory for it" : "there are too many values");
    p->items = items;
    p->capacity = capacity;
  }
  p->items[p->count++] = item;
  return true;
}

static bool add_string(packing *w, lua_State *L, int index) {
  size_t length;
  const char *bytes = lua_tolstring(L, index, &length);
  parcel_item item = {STRING, .as.string = {malloc(length + 1), length}};
  if (!item.as.string.bytes)
    return fail(w, "there is no memory for it");
  memcpy(item.as.string.bytes, bytes, length);
  if (add(w, item))
    return true;
  free(item.as.string.bytes);
  return false;
}

static bool add_tensor(packing *w, lua_State *L, int index) {
  orepa_tensor *t = bind_test_tensor(L, index);
  if (!t && luaL_testudata(L, index, BIND_TENSOR))
    return fail(w, "a tensor that was released");
  if (!t)
    return fail(w, "a userdata");
  t = orepa_hand_over(t);
  if (!t)
    return fail(w, orepa_error());
  if (add(w, (parcel_item){TENSOR, .as.tensor = t}))
    return true;
  orepa_release(t);
  return false;
}

static bool add_value(packing *w, lua_State *L, int index, int depth);

/* Puts the key at the top before the place of what is within. */
static void put_key(packing *w, lua_State *L) {
  char inner[ROOM];
  memcpy(inner, w->place, sizeof inner);
  if (lua_isinteger(L, -1))
    snprintf(w->place, ROOM, "[%lld]%.200s", (long long)lua_tointeger(L, -1), inner);
  else if (lua_type(L, -1) == LUA_TSTRING)
    snprintf(w->place, ROOM, ".%.50s%.200s", lua_tostring(L, -1), inner);
}

static bool add_table(packing *w, lua_State *L, int index, int depth) {
  size_t length = lua_rawlen(L, index);
  if (lua_getmetatable(L, index)) {
    lua_pop(L, 1);
    return fail(w, "a table with a metatable");
  }
  if (depth == DEEPEST || !lua_checkstack(L, 6))
    return fail(w, "a table nested too deep");
  if (!add(w, (parcel_item){TABLE, .as.list = length < MOST_ITEMS ? (int)length : 0}))
    return false;
  for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1)) {
    int key = lua_gettop(L) - 1;
    if (lua_type(L, key) == LUA_TSTRING || lua_type(L, key) == LUA_TNUMBER || lua_type(L, key) == LUA_TBOOLEAN) {
      if (add_value(w, L, key, depth + 1) && add_value(w, L, key + 1, depth + 1))
        continue;
      lua_pop(L, 1);
      put_key(w, L);
    } else {
      lua_pop(L, 1);
      fail(w, "a table with a key that is neither a string nor a number");
    }
    lua_pop(L, 1);
    return false;
  }
  return add(w, (parcel_item){.kind = END});
}

static bool add_value(packing *w, lua_State *L, int index, int depth) {
  switch (lua_type(L, index)) {
  case LUA_TNIL:
    return add(w, (parcel_item){.kind = NIL});
  case LUA_TBOOLEAN:
    return add(w, (parcel_item){BOOLEAN, .as.boolean = lua_toboolean(L, index)});
  case LUA_TSTRING:
    return add_string(w, L, index);
  case LUA_TTABLE:
    return add_table(w, L, index, depth);
  case LUA_TUSERDATA:
    return add_tensor(w, L, index);
  case LUA_TNUMBER:
    return lua_isinteger(L, index) ? add(w, (parcel_item){INTEGER, .as.integer = lua_tointeger(L, index)})
                                   : add(w, (parcel_item){NUMBER, .as.number = lua_tonumber(L, index)});
  default: {
    char text[32];
    snprintf(text, sizeof text, "a %s", luaL_typename(L, index));
    return fail(w, text);
  }
  }
}

static bool add_values(packing *w, lua_State *L, int first) {
  w->p->values = lua_gettop(L) - first + 1;
  for (int k = 0; k < w->p->values; k++)
    if (!add_value(w, L, first + k, 0)) {
      char inner[ROOM];
      memcpy(inner, w->place, sizeof inner);
      snprintf(w->place, ROOM, "value %d%.200s", k + 1, inner);
      return false;
    }
  return true;
}

/* The name of a type is looked up, for which Lua may lack memory. */
static int pack_protected(lua_State *L) {
  packing *w = lua_touserdata(L, lua_gettop(L));
  lua_pop(L, 1);
  lua_pushboolean(L, add_values(w, L, 1));
  return 1;
}

parcel *parcel_pack(lua_State *L, int first) {
  packing w = {.p = calloc(1, sizeof(parcel))};
  int count = lua_gettop(L) - first + 1;
  bool packed = false;
  if (w.p && lua_checkstack(L, count + 3)) {
    lua_pushcfunction(L, pack_protected);
    for (int k = 0; k < count; k++)
      lua_pushvalue(L, first + k);
    lua_pushlightuserdata(L, &w);
    if (lua_pcall(L, count + 1, 1, 0) == LUA_OK)
      packed = lua_toboolean(L, -1);
    else
      fail(&w, "there is no memory for it");
    lua_pop(L, 1);
  } else {
    fail(&w, "there is no memory for it");
  }
  if (packed)
    return w.p;
  parcel_free(w.p);
  char message[3 * ROOM];
  snprintf(message, sizeof message,
           "%s: %s; only tensors, numbers, strings, booleans and tables of these can go from one Lua state to another",
           w.place, w.problem);
  orepa_fail(message);
  return NULL;
}

/* ---- unpacking ---- */

static void push_item(lua_State *L, const parcel_item *item) {
  switch (item->kind) {
  case BOOLEAN:
    lua_pushboolean(L, item->as.boolean);
    break;
  case INTEGER:
    lua_pushinteger(L, item->as.integer);
    break;
  case NUMBER:
    lua_pushnumber(L, item->as.number);
    break;
  case STRING:
    lua_pushlstring(L, item->as.string.bytes, item->as.string.length);
    break;
  case TENSOR:
    bind_push(L, item->as.tensor);
    break;
  case TABLE:
    lua_createtable(L, item->as.list, 0);
    break;
  default:
    lua_pushnil(L);
  }
}

/* Pushes the value that begins with item k; the item behind it. */
static int push_value(lua_State *L, const parcel *p, int k) {
  luaL_checkstack(L, 3, "values from another state");
  push_item(L, &p->items[k]);
  if (p->items[k++].kind != TABLE)
    return k;
  while (p->items[k].kind != END) {
    k = push_value(L, p, k);
    k = push_value(L, p, k);
    lua_rawset(L, -3);
  }
  return k + 1;
}

int parcel_unpack(lua_State *L, const parcel *p) {
  luaL_checkstack(L, p->values, "values from another state");
  for (int value = 0, k = 0; value < p->values; value++)
    k = push_value(L, p, k);
  return p->values;
}

/* ---- the holder ---- */

static int free_held(lua_State *L) {
  parcel **held = luaL_checkudata(L, 1, HOLDER);
  parcel_free(*held);
  *held = NULL;
  return 0;
}

parcel **parcel_push_holder(lua_State *L) {
  parcel **held = lua_newuserdatauv(L, sizeof *held, 0);
  *held = NULL;
  luaL_setmetatable(L, HOLDER);
  return held;
}

void bind_parcel_type(lua_State *L) {
  bind_end_with(L, HOLDER, "__gc", free_held);
}
