/* tensor.c: making tensors from Lua values and Lua values from tensors. */
#include <stdlib.h>
#include <string.h>

#include "bind.h"

/* ---- from nested tables ---- */

/* The shape of a nested table: the lengths on the way to its first number. */
static int table_shape(lua_State *L, int index, int64_t *shape) {
  int rank = 0;
  lua_pushvalue(L, index);
  while (lua_istable(L, -1)) {
    if (rank == OREPA_MAX_RANK)
      bind_error(L, "tensor: the table is nested deeper than %d", OREPA_MAX_RANK);
    shape[rank++] = (int64_t)lua_rawlen(L, -1);
    if (shape[rank - 1] == 0)
      break;
    lua_rawgeti(L, -1, 1);
    lua_remove(L, -2);
  }
  lua_pop(L, 1);
  return rank;
}

typedef struct {
  bool integers;
  double *reals;
  int64_t *wholes;
  int64_t filled;
  bool all_booleans;
} element_buffer;

static void read_element(lua_State *L, element_buffer *b) {
  if (lua_isboolean(L, -1)) {
    double truth = lua_toboolean(L, -1);
    b->integers ? (void)(b->wholes[b->filled++] = (int64_t)truth) : (void)(b->reals[b->filled++] = truth);
    return;
  }
  if (lua_type(L, -1) != LUA_TNUMBER)
    bind_error(L, "tensor: element %I is a %s, not a number", (lua_Integer)(b->filled + 1), luaL_typename(L, -1));
  b->all_booleans = false;
  if (b->integers)
    b->wholes[b->filled++] = bind_integer(L, -1, "tensor: an element");
  else
    b->reals[b->filled++] = lua_tonumber(L, -1);
}

static void read_elements(lua_State *L, int rank, const int64_t *shape, element_buffer *b) {
  if (rank == 0) {
    read_element(L, b);
    return;
  }
  if (!lua_istable(L, -1) || (int64_t)lua_rawlen(L, -1) != shape[0])
    bind_error(L, "tensor: the table is ragged: a list of %I expected, got %s of %I", (lua_Integer)shape[0],
               luaL_typename(L, -1), lua_istable(L, -1) ? (lua_Integer)lua_rawlen(L, -1) : 0);
  luaL_checkstack(L, 2, "tensor: nested too deep");
  for (int64_t k = 0; k < shape[0]; k++) {
    lua_rawgeti(L, -1, k + 1);
    read_elements(L, rank - 1, shape + 1, b);
    lua_pop(L, 1);
  }
}

/* The tensor of a buffer of doubles or integers, in the type asked for. */
static orepa_tensor *from_elements(const element_buffer *b, bind_kind kind, int rank, const int64_t *shape) {
  orepa_dtype stored = b->integers ? OREPA_INT64 : OREPA_FLOAT64;
  const void *data = b->integers ? (const void *)b->wholes : (const void *)b->reals;
  orepa_tensor *wide = orepa_from_host(stored, kind.device, rank, shape, data);
  orepa_tensor *t = wide ? orepa_to(wide, kind.dtype, kind.device) : NULL;
  orepa_release(wide);
  return t;
}

static int l_tensor(lua_State *L) {
  bind_kind kind = bind_kind_option(L, 2, "tensor");
  int64_t shape[OREPA_MAX_RANK], count = 1;
  int rank = table_shape(L, 1, shape);
  for (int d = 0; d < rank; d++)
    if (__builtin_mul_overflow(count, shape[d], &count) || count > INT64_MAX / 16)
      return bind_error(L, "tensor: the table has too many elements");
  /* The buffer is Lua's, so that an error on the way frees it. */
  element_buffer b = {.integers = kind.typed && !orepa_dtype_is_float(kind.dtype), .all_booleans = true};
  b.reals = lua_newuserdatauv(L, (size_t)count * sizeof(double) + 1, 0);
  b.wholes = (int64_t *)b.reals;
  lua_pushvalue(L, 1);
  read_elements(L, rank, shape, &b);
  if (!kind.typed && b.all_booleans && count)
    kind.dtype = OREPA_BOOL;
  BIND_RETURN(L, from_elements(&b, kind, rank, shape));
}

/* ---- of a shape ---- */

/* The shape and options of a constructor's arguments: numbers or one list, then perhaps options. */
static int shape_arguments(lua_State *L, const char *function, int last, int64_t *shape, bind_kind *kind) {
  int options = last > 0 && bind_is_options(L, last) ? last : 0;
  *kind = bind_kind_option(L, options ? options : last + 1, function);
  return bind_shape(L, 1, options ? last - 1 : last, shape, false);
}

static int make_filled(lua_State *L, const char *function, double value) {
  int64_t shape[OREPA_MAX_RANK];
  bind_kind kind;
  int rank = shape_arguments(L, function, lua_gettop(L), shape, &kind);
  BIND_RETURN(L, orepa_full(kind.dtype, kind.device, rank, shape, value));
}

static int l_zeros(lua_State *L) {
  return make_filled(L, "zeros", 0);
}

static int l_ones(lua_State *L) {
  return make_filled(L, "ones", 1);
}

static int l_full(lua_State *L) {
  int64_t shape[OREPA_MAX_RANK];
  if (!lua_istable(L, 1))
    return bind_error(L, "full: a shape (a list of sizes) expected first, got %s", luaL_typename(L, 1));
  if (lua_type(L, 2) != LUA_TNUMBER)
    return bind_error(L, "full: a number expected second, got %s", luaL_typename(L, 2));
  bind_kind kind = bind_kind_option(L, 3, "full");
  int rank = bind_shape(L, 1, 1, shape, false);
  orepa_operand value = bind_number(L, 2);
  BIND_RETURN(L, orepa_full_of(kind.dtype, kind.device, rank, shape, value));
}

static int make_random(lua_State *L, const char *function,
                       orepa_tensor *(*draw)(orepa_dtype, const orepa_device *, int, const int64_t *)) {
  int64_t shape[OREPA_MAX_RANK];
  bind_kind kind;
  int rank = shape_arguments(L, function, lua_gettop(L), shape, &kind);
  BIND_RETURN(L, draw(kind.dtype, kind.device, rank, shape));
}

static int l_rand(lua_State *L) {
  return make_random(L, "rand", orepa_rand);
}

static int l_randn(lua_State *L) {
  return make_random(L, "randn", orepa_randn);
}

/* How many numbers from first to last: exactly if all are integers. `steps`: what their doubles say, at most 1e15. */
static int64_t steps_to(const orepa_operand *first, const orepa_operand *last, const orepa_operand *step,
                        double steps) {
  if (!first->is_integer || !last->is_integer || !step->is_integer)
    return steps >= 0 ? (int64_t)(steps + 1e-9) + 1 : 0;
  bool up = step->integer > 0;
  if (up ? last->integer < first->integer : last->integer > first->integer)
    return 0;
  uint64_t low = (uint64_t)(up ? first : last)->integer, high = (uint64_t)(up ? last : first)->integer;
  uint64_t by = up ? (uint64_t)step->integer : 0 - (uint64_t)step->integer;
  return (int64_t)((high - low) / by) + 1;
}

static int l_arange(lua_State *L) {
  int top = lua_gettop(L), numbers = top > 0 && bind_is_options(L, top) ? top - 1 : top;
  bind_kind kind = bind_kind_option(L, numbers + 1, "arange");
  if (numbers < 1 || numbers > 3)
    return bind_error(L, "arange: one to three numbers expected: (last), (first, last), (first, last, step)");
  for (int k = 1; k <= numbers; k++)
    if (lua_type(L, k) != LUA_TNUMBER)
      return bind_error(L, "arange: argument %d: a number expected, got %s", k, luaL_typename(L, k));
  const orepa_operand one = {.number = 1, .integer = 1, .is_integer = true};
  orepa_operand first = numbers > 1 ? bind_number(L, 1) : one, last = bind_number(L, numbers > 1 ? 2 : 1);
  orepa_operand step = numbers > 2 ? bind_number(L, 3) : one;
  double steps = (last.number - first.number) / step.number;
  if (step.number == 0 || !(steps <= 1e15)) /* NaN is neither */
    return bind_error(L, "arange: from %f to %f in steps of %f is no finite list", first.number, last.number,
                      step.number);
  int64_t count = steps_to(&first, &last, &step, steps);
  BIND_RETURN(L, orepa_arange_of(kind.dtype, kind.device, first, step, count));
}

/* ---- to Lua ---- */

typedef struct {
  bool integers;
  const double *reals;
  const int64_t *wholes;
  orepa_dtype dtype;
} element_source;

/* The elements in logical order, as doubles or exact integers, in a userdata that this pushes. */
static element_source push_elements(lua_State *L, orepa_tensor *t) {
  int64_t count = orepa_count(t);
  bool integers = !orepa_dtype_is_float(orepa_tensor_dtype(t));
  void *data = lua_newuserdatauv(L, (size_t)count * 8 + 1, 0);
  orepa_tensor **wide = bind_new(L);
  bool was = orepa_set_grad_enabled(false);
  *wide = orepa_to(t, integers ? OREPA_INT64 : OREPA_FLOAT64, orepa_tensor_device(t));
  orepa_set_grad_enabled(was);
  if (!*wide || orepa_to_host(*wide, data, (size_t)count * 8))
    bind_fail(L);
  lua_pop(L, 1);
  return (element_source){integers, data, data, orepa_tensor_dtype(t)};
}

static void push_element(lua_State *L, const element_source *s, int64_t k) {
  if (s->dtype == OREPA_BOOL)
    lua_pushboolean(L, s->wholes[k] != 0);
  else if (s->integers)
    lua_pushinteger(L, s->wholes[k]);
  else
    lua_pushnumber(L, s->reals[k]);
}

static int64_t push_list(lua_State *L, const element_source *s, int rank, const int64_t *shape, int64_t k) {
  if (rank == 0) {
    push_element(L, s, k);
    return k + 1;
  }
  luaL_checkstack(L, 2, "tolist: nested too deep");
  lua_createtable(L, (int)(shape[0] < 1 << 24 ? shape[0] : 0), 0);
  for (int64_t n = 0; n < shape[0]; n++) {
    k = push_list(L, s, rank - 1, shape + 1, k);
    lua_rawseti(L, -2, n + 1);
  }
  return k;
}

static int l_tolist(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  element_source s = push_elements(L, t);
  push_list(L, &s, orepa_rank(t), orepa_shape(t), 0);
  return 1;
}

static int l_item(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  if (orepa_count(t) != 1)
    return bind_error(L, "item: a tensor of %I elements is not a single number", (lua_Integer)orepa_count(t));
  element_source s = push_elements(L, t);
  push_element(L, &s, 0);
  return 1;
}

/* ---- as text ---- */

enum { SHOWN_AT_ENDS = 3, SHOWN_WHOLE = 8 };

static void add_number(luaL_Buffer *b, const element_source *s, int64_t k) {
  char text[40];
  if (s->dtype == OREPA_BOOL)
    snprintf(text, sizeof text, "%s", s->wholes[k] ? "true" : "false");
  else if (s->integers)
    snprintf(text, sizeof text, "%lld", (long long)s->wholes[k]);
  else
    snprintf(text, sizeof text, "%.5g", s->reals[k]);
  luaL_addstring(b, text);
}

/* What is shown of t, pushed: its long axes are cut to their ends, so that a large tensor costs no more than a small
 * one. */
static orepa_tensor *push_shown(lua_State *L, orepa_tensor *t) {
  orepa_tensor **shown = bind_new(L);
  *shown = orepa_detach(t);
  for (int d = 0; *shown && d < orepa_rank(t); d++) {
    int64_t size = orepa_shape(t)[d];
    if (size <= SHOWN_WHOLE)
      continue;
    orepa_tensor *ends[] = {orepa_slice(*shown, d, 0, SHOWN_AT_ENDS, 1),
                            orepa_slice(*shown, d, size - SHOWN_AT_ENDS, size, 1)};
    orepa_tensor *cut = ends[0] && ends[1] ? orepa_concatenate(2, ends, d) : NULL;
    orepa_release(ends[0]);
    orepa_release(ends[1]);
    orepa_release(*shown);
    *shown = cut;
  }
  if (!*shown)
    bind_fail(L);
  return *shown;
}

static void add_break(luaL_Buffer *b, int rank, int depth) {
  luaL_addstring(b, rank == 1 ? ", " : ",\n");
  for (int d = 0; rank > 1 && d <= depth; d++)
    luaL_addchar(b, ' ');
}

/* One axis of what is shown of a tensor of `shape`, from element k on; gives back the element behind it. */
static int64_t add_axis(luaL_Buffer *b, const element_source *s, int rank, const int64_t *shape, int64_t k, int depth) {
  if (rank == 0) {
    add_number(b, s, k);
    return k + 1;
  }
  bool cut = shape[0] > SHOWN_WHOLE;
  luaL_addchar(b, '{');
  for (int64_t n = 0; n < (cut ? 2 * SHOWN_AT_ENDS : shape[0]); n++) {
    if (n > 0)
      add_break(b, rank, depth);
    if (cut && n == SHOWN_AT_ENDS) {
      luaL_addstring(b, "...");
      add_break(b, rank, depth);
    }
    k = add_axis(b, s, rank - 1, shape + 1, k, depth + 1);
  }
  luaL_addchar(b, '}');
  return k;
}

static int l_tostring(lua_State *L) {
  orepa_tensor **handle = luaL_checkudata(L, 1, BIND_TENSOR), *t = *handle;
  if (!t) {
    lua_pushliteral(L, "tensor (released)");
    return 1;
  }
  element_source s = push_elements(L, push_shown(L, t));
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  add_axis(&b, &s, orepa_rank(t), orepa_shape(t), 0, 0);
  luaL_addstring(&b, "  (");
  luaL_addstring(&b, orepa_dtype_name(orepa_tensor_dtype(t)));
  for (int d = 0; d < orepa_rank(t); d++) {
    char size[24];
    snprintf(size, sizeof size, d ? "x%lld" : " %lld", (long long)orepa_shape(t)[d]);
    luaL_addstring(&b, size);
  }
  luaL_addstring(&b, " on ");
  luaL_addstring(&b, orepa_device_name(orepa_tensor_device(t)));
  luaL_addstring(&b, orepa_requires_grad(t) ? ", requires grad)" : ")");
  luaL_pushresult(&b);
  return 1;
}

/* ---- fields, positions, life ---- */

static void push_shape(lua_State *L, orepa_tensor *t) {
  lua_createtable(L, orepa_rank(t), 0);
  for (int d = 0; d < orepa_rank(t); d++) {
    lua_pushinteger(L, orepa_shape(t)[d]);
    lua_rawseti(L, -2, d + 1);
  }
}

/* A position counted from 1, or from the end as -1, counted from 0. */
static int64_t position(lua_State *L, int index, orepa_tensor *t) {
  int64_t k = bind_integer(L, index, "a position");
  if (orepa_rank(t) == 0)
    bind_error(L, "a scalar has no positions");
  int64_t size = orepa_shape(t)[0];
  if (k == 0 || k > size || k < -size)
    bind_error(L, "there is no position %I in a dimension of size %I (they count from 1, -1 is the last)",
               (lua_Integer)k, (lua_Integer)size);
  return k > 0 ? k - 1 : k + size;
}

/* t[key] and t[key] = value of a list or a tensor: orepa/indexing.lua says what they are. */
static int call_indexing(lua_State *L, const char *name, int results) {
  bind_push_indexing(L);
  lua_getfield(L, -1, name);
  lua_replace(L, -2);
  lua_insert(L, 1);
  lua_call(L, lua_gettop(L) - 1, results);
  return results;
}

static bool is_list_or_tensor(lua_State *L, int index) {
  return lua_istable(L, index) || luaL_testudata(L, index, BIND_TENSOR);
}

static int l_index(lua_State *L) {
  if (is_list_or_tensor(L, 2))
    return call_indexing(L, "get", 1);
  if (lua_type(L, 2) == LUA_TNUMBER) {
    orepa_tensor *t = bind_tensor(L, 1);
    int64_t k = position(L, 2, t);
    BIND_RETURN(L, orepa_select(t, 0, k));
  }
  lua_pushvalue(L, 2);
  if (lua_rawget(L, lua_upvalueindex(1)) != LUA_TNIL)
    return 1;
  const char *name = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  orepa_tensor *t = bind_tensor(L, 1);
  if (!strcmp(name, "shape"))
    push_shape(L, t);
  else if (!strcmp(name, "dtype"))
    lua_pushstring(L, orepa_dtype_name(orepa_tensor_dtype(t)));
  else if (!strcmp(name, "device"))
    lua_pushstring(L, orepa_device_name(orepa_tensor_device(t)));
  else if (!strcmp(name, "grad"))
    bind_push(L, orepa_grad(t));
  else if (!strcmp(name, "requires_grad"))
    lua_pushboolean(L, orepa_requires_grad(t));
  else if (!strcmp(name, "is_leaf"))
    lua_pushboolean(L, orepa_is_leaf(t));
  else
    return bind_error(L, "a tensor has no field or method '%s'", luaL_tolstring(L, 2, NULL));
  return 1;
}

/* t[i] = v, or t.grad = g. */
static int l_newindex(lua_State *L) {
  if (is_list_or_tensor(L, 2))
    return call_indexing(L, "set", 0);
  orepa_tensor *t = bind_tensor(L, 1);
  if (lua_type(L, 2) == LUA_TNUMBER) {
    int64_t k = position(L, 2, t);
    bind_note_place(L);
    return orepa_assign_(t, 0, k, k + 1, bind_tensor_or_scalar(L, 3, t)) ? bind_fail(L) : 0;
  }
  const char *name = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  if (!strcmp(name, "grad"))
    return orepa_set_grad(t, bind_tensor_or_nil(L, 3)) ? bind_fail(L) : 0;
  return bind_error(L, "a tensor's field '%s' can't be assigned", luaL_tolstring(L, 2, NULL));
}

static int l_release(lua_State *L) {
  orepa_tensor **handle = luaL_checkudata(L, 1, BIND_TENSOR), *t = *handle;
  *handle = NULL;
  orepa_release(t);
  bind_give_up_now(L);
  return 0;
}

/* `==` is identity: two handles of one tensor are equal. */
static int l_eq(lua_State *L) {
  orepa_tensor *a = bind_test_tensor(L, 1), *b = bind_test_tensor(L, 2);
  lua_pushboolean(L, a && a == b);
  return 1;
}

static int l_len(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  if (orepa_rank(t) == 0)
    return bind_error(L, "a scalar has no length");
  lua_pushinteger(L, orepa_shape(t)[0]);
  return 1;
}

static int l_count(lua_State *L) {
  lua_pushinteger(L, orepa_count(bind_tensor(L, 1)));
  return 1;
}

static int l_version(lua_State *L) {
  lua_pushinteger(L, (lua_Integer)orepa_version(bind_tensor(L, 1)));
  return 1;
}

static int l_is_tensor(lua_State *L) {
  lua_pushboolean(L, luaL_testudata(L, 1, BIND_TENSOR) != NULL);
  return 1;
}

static const bind_row functions[] = {
    {"tensor", l_tensor,
     "tensor(values, {dtype=, device=}) -> tensor\n"
     "A tensor of a number or of nested lists of numbers; float32 unless a type is named, bool if all are booleans.\n"
     "> orepa.tensor({{1, 2}, {3, 4}})\n"
     "> orepa.tensor({1, 2}, {dtype = \"int64\"})"},
    {"zeros", l_zeros,
     "zeros(sizes..., {dtype=, device=}) -> tensor\nZeros of a shape, given as numbers or as one list.\n"
     "> orepa.zeros(2, 3)\n> orepa.zeros({2, 3}, {dtype = \"int64\"})"},
    {"ones", l_ones, "ones(sizes..., {dtype=, device=}) -> tensor\nOnes of a shape.\n> orepa.ones(2, 3)"},
    {"full", l_full,
     "full(shape, value, {dtype=, device=}) -> tensor\nOne value everywhere.\n> orepa.full({2, 3}, 0.5)"},
    {"rand", l_rand,
     "rand(sizes..., {dtype=, device=}) -> tensor\n"
     "Uniform numbers in [0, 1): the same on every device for one seed. float32 or float64.\n> orepa.rand(2, 3)"},
    {"randn", l_randn,
     "randn(sizes..., {dtype=, device=}) -> tensor\nNormal numbers of mean 0 and deviation 1.\n> orepa.randn(2, 3)"},
    {"arange", l_arange,
     "arange([first,] last[, step], {dtype=, device=}) -> tensor\nfirst, first + step, ... up to last, which is "
     "included; "
     "first and step are 1 if not given.\n> orepa.arange(5)\n> orepa.arange(0, 1, 0.25)"},
    {"is_tensor", l_is_tensor, "is_tensor(x) -> boolean\nWhether x is a tensor.\n> orepa.is_tensor(1)"},
    {NULL, NULL, NULL},
};

static const bind_row methods[] = {
    {"tolist", l_tolist,
     "t:tolist() -> table\nThe elements as nested lists (a number for a scalar); int64 exactly.\n"
     "> orepa.ones(2, 2):tolist()"},
    {"item", l_item, "t:item() -> number\nThe value of a tensor of one element.\n> orepa.ones(1):item()"},
    {"count", l_count, "t:count() -> integer\nHow many elements it has.\n> orepa.ones(2, 3):count()"},
    {"version", l_version,
     "t:version() -> integer\nGrows with every write to the tensor's storage, which views share.\n"
     "> orepa.ones(1):version()"},
    {"release", l_release,
     "t:release()\nGives up this handle's reference before the collector does. What graphs or other handles hold "
     "stays.\n"
     "> orepa.ones(1):release()"},
    {NULL, NULL, NULL},
};

static const luaL_Reg metamethods[] = {
    {"__tostring", l_tostring},
    {"__newindex", l_newindex},
    {"__gc", l_release},
    {"__close", l_release},
    {"__eq", l_eq},
    {"__len", l_len},
    {NULL, NULL},
};

void bind_push_indexing(lua_State *L) {
  luaL_getsubtable(L, LUA_REGISTRYINDEX, "orepa.indexing");
}

void bind_push_methods(lua_State *L) {
  luaL_getsubtable(L, LUA_REGISTRYINDEX, "orepa.methods");
}

void bind_tensor_family(lua_State *L) {
  bind_register(L, "orepa.", functions);
  luaL_newmetatable(L, BIND_TENSOR);
  luaL_setfuncs(L, metamethods, 0);
  bind_push_methods(L);
  bind_register(L, "t:", methods);
  lua_pushcclosure(L, l_index, 1);
  lua_setfield(L, -2, "__index");
  lua_pop(L, 1);
}
