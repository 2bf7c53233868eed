/* index.c: elements found by integers, and order along a dimension. */
#include "bind.h"

/* ---- found by integers ---- */

static int l_gather(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1), *index = bind_tensor(L, 3);
  int axis = bind_axis(L, 2, orepa_rank(t), "gather");
  BIND_RETURN(L, orepa_gather(t, axis, index));
}

static int l_index_select(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1), *list = bind_tensor(L, 3);
  int axis = bind_axis(L, 2, orepa_rank(t), "index_select");
  BIND_RETURN(L, orepa_index_select(t, axis, list));
}

static int l_scatter_add(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1), *index = bind_tensor(L, 3), *source = bind_tensor(L, 4);
  int axis = bind_axis(L, 2, orepa_rank(t), "scatter_add");
  BIND_RETURN(L, orepa_scatter_add(t, axis, index, source));
}

/* A tensor is taken as it is, a number in the index's shape. */
static orepa_tensor *scatter_source(lua_State *L, orepa_tensor *t, orepa_tensor *index) {
  orepa_tensor *source = bind_tensor_or_scalar(L, 4, t);
  if (lua_type(L, 4) != LUA_TNUMBER)
    return source;
  orepa_tensor **whole = bind_new(L);
  *whole = orepa_expand(source, orepa_rank(index), orepa_shape(index));
  if (!*whole)
    bind_fail(L);
  return *whole;
}

static int l_scatter(lua_State *L) {
  lua_settop(L, 4);
  orepa_tensor *t = bind_tensor(L, 1), *index = bind_tensor(L, 3), *source = scatter_source(L, t, index);
  int axis = bind_axis(L, 2, orepa_rank(t), "scatter");
  BIND_RETURN(L, orepa_scatter(t, axis, index, source));
}

static int l_scatter_(lua_State *L) {
  lua_settop(L, 4);
  orepa_tensor *t = bind_tensor(L, 1), *index = bind_tensor(L, 3), *source = scatter_source(L, t, index);
  int axis = bind_axis(L, 2, orepa_rank(t), "scatter_");
  BIND_RETURN_SELF(L, orepa_scatter_(t, axis, index, source));
}

static int l_index_copy_(lua_State *L) {
  lua_settop(L, 4);
  orepa_tensor *t = bind_tensor(L, 1), *list = bind_tensor(L, 3), *source = bind_tensor_or_scalar(L, 4, t);
  int axis = bind_axis(L, 2, orepa_rank(t), "index_copy_");
  BIND_RETURN_SELF(L, orepa_index_copy_(t, axis, list, source));
}

/* ---- order ---- */

typedef struct {
  int axis;
  int64_t count;
  bool descending;
} order;

/* A dimension, the last if none is named. */
static int dimension(lua_State *L, int argument, orepa_tensor *t, const char *function) {
  int rank = orepa_rank(t);
  if (rank == 0)
    bind_error(L, "%s: a scalar has no dimensions", function);
  return lua_isnoneornil(L, argument) || lua_istable(L, argument) ? rank - 1 : bind_axis(L, argument, rank, function);
}

/* t:sort(dim, {descending=}) and the like. */
static order sort_arguments(lua_State *L, const char *function) {
  static const char *const known[] = {"descending", NULL};
  orepa_tensor *t = bind_tensor(L, 1);
  int axis = dimension(L, 2, t, function);
  int options = bind_options(L, lua_istable(L, 2) ? 2 : 3, function, known);
  return (order){axis, orepa_shape(t)[axis], bind_option_boolean(L, options, "descending", false)};
}

/* t:topk(k, dim, {largest=}) */
static order topk_arguments(lua_State *L) {
  static const char *const known[] = {"largest", NULL};
  orepa_tensor *t = bind_tensor(L, 1);
  int axis = dimension(L, 3, t, "topk");
  int64_t count = bind_integer(L, 2, "topk: how many"), size = orepa_shape(t)[axis];
  int options = bind_options(L, lua_istable(L, 3) ? 3 : 4, "topk", known);
  if (count < 0 || count > size)
    bind_error(L, "topk: %I of a dimension of size %I", (lua_Integer)count, (lua_Integer)size);
  return (order){axis, count, bind_option_boolean(L, options, "largest", true)};
}

static int push_positions(lua_State *L, const order *o) {
  orepa_tensor *t = bind_tensor(L, 1);
  BIND_RETURN(L, orepa_argsort(t, o->axis, o->count, o->descending));
}

static int push_elements(lua_State *L, const order *o) {
  orepa_tensor *t = bind_tensor(L, 1), *positions = bind_tensor(L, -1);
  BIND_RETURN(L, orepa_gather(t, o->axis, positions));
}

/* The elements and where they were. */
static int push_both(lua_State *L, const order *o) {
  push_positions(L, o);
  push_elements(L, o);
  lua_rotate(L, -2, 1);
  return 2;
}

static int l_sort(lua_State *L) {
  order o = sort_arguments(L, "sort");
  return push_both(L, &o);
}

static int l_argsort(lua_State *L) {
  order o = sort_arguments(L, "argsort");
  return push_positions(L, &o);
}

static int l_topk(lua_State *L) {
  order o = topk_arguments(L);
  return push_both(L, &o);
}

static int l_cumsum(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  int axis = dimension(L, 2, t, "cumsum");
  BIND_RETURN(L, orepa_cumsum(t, axis));
}

static int l_flat_nonzero(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  BIND_RETURN(L, orepa_nonzero(t));
}

static const bind_row methods[] = {
    {"gather", l_gather,
     "t:gather(dim, index) -> tensor\nOf each place of an int64 tensor the element of t whose position along `dim` is "
     "the integer there, counted from 0, and along other dimensions its own. The index is no larger than t along "
     "those.\n> orepa.arange(6):reshape(2, 3):gather(2, orepa.tensor({{0}, {2}}, {dtype = \"int64\"}))"},
    {"index_select", l_index_select,
     "t:index_select(dim, index) -> tensor\nThe positions along `dim` that a list of integers names, which count from "
     "0.\n> orepa.arange(6):reshape(3, 2):index_select(1, orepa.tensor({2, 0, 2}, {dtype = \"int64\"}))"},
    {"scatter", l_scatter,
     "t:scatter(dim, index, source) -> tensor\nt with each element of `source` (or one number) written where the "
     "index, "
     "of the same shape, says: the reverse of gather. Where integers are equal the last one stays, and it alone has a "
     "gradient.\n> orepa.zeros(2, 3):scatter(2, orepa.tensor({{0}, {2}}, {dtype = \"int64\"}), 1)"},
    {"scatter_", l_scatter_,
     "t:scatter_(dim, index, source) -> t\nt:scatter(dim, index, source) written into t.\n"
     "> orepa.zeros(3):scatter_(1, orepa.tensor({2}, {dtype = \"int64\"}), 5)"},
    {"scatter_add", l_scatter_add,
     "t:scatter_add(dim, index, source) -> tensor\nt with each element of `source` added where the index, of the same "
     "shape, says. Equal integers add up, in their order.\n"
     "> orepa.zeros(3):scatter_add(1, orepa.tensor({1, 1, 2}, {dtype = \"int64\"}), orepa.arange(3))"},
    {"index_copy_", l_index_copy_,
     "t:index_copy_(dim, index, source) -> t\nWrites a source, broadcast and converted, or a number into the positions "
     "along `dim` that a list of integers names, which count from 0.\n"
     "> orepa.zeros(3, 2):index_copy_(1, orepa.tensor({2, 0}, {dtype = \"int64\"}), orepa.ones(2, 2))"},
    {"sort", l_sort,
     "t:sort(dim, {descending=}) -> tensor, int64 tensor\nThe elements along a dimension (the last) in order, and "
     "where "
     "they were, counted from 0. Equals stay in their order; NaN counts as the largest.\n"
     "> orepa.tensor({3, 1, 2}):sort()\n> orepa.randn(2, 3):sort(1, {descending = true})"},
    {"argsort", l_argsort,
     "t:argsort(dim, {descending=}) -> int64 tensor\nWhere the elements are that t:sort puts in order, counted from "
     "0.\n> orepa.tensor({3, 1, 2}):argsort()"},
    {"topk", l_topk,
     "t:topk(k, dim, {largest=}) -> tensor, int64 tensor\nThe k largest elements along a dimension (the last), the "
     "largest first, and where they are, counted from 0; or with largest = false the smallest.\n"
     "> orepa.tensor({3, 1, 2}):topk(2)\n> orepa.randn(2, 9):topk(3, 2, {largest = false})"},
    {"cumsum", l_cumsum,
     "t:cumsum(dim) -> tensor\nThe sum of each element and all before it along a dimension (the last); integers and "
     "bools give int64.\n> orepa.arange(4):cumsum()"},
    {"flat_nonzero", l_flat_nonzero,
     "t:flat_nonzero() -> int64 tensor\nWhere, in t:reshape(-1), the elements are that are not 0, counted from 0.\n"
     "> orepa.tensor({{0, 3}, {5, 0}}):flat_nonzero()"},
    {NULL, NULL, NULL},
};

void bind_index_family(lua_State *L) {
  bind_push_methods(L);
  bind_register(L, "t:", methods);
  lua_pop(L, 1);
}
