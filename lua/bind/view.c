/* view.c: shapes: views and the ops that rearrange. */
#include "bind.h"

static int l_reshape(lua_State *L) {
  int64_t shape[OREPA_MAX_RANK];
  orepa_tensor *t = bind_tensor(L, 1);
  int rank = bind_shape(L, 2, lua_gettop(L), shape, true);
  BIND_RETURN(L, orepa_reshape(t, rank, shape));
}

static int l_flatten(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  int rank = orepa_rank(t);
  int first = rank == 0 || lua_isnoneornil(L, 2) ? 0 : bind_axis(L, 2, rank, "flatten"), kept = 0;
  int64_t shape[OREPA_MAX_RANK], size = 1;
  for (int d = 0; d < first; d++)
    shape[kept++] = orepa_shape(t)[d];
  for (int d = first; d < rank; d++)
    size *= orepa_shape(t)[d];
  shape[kept++] = size;
  BIND_RETURN(L, orepa_reshape(t, kept, shape));
}

/* Axes from argument `index` on: one list or several numbers. Returns how many. */
static int read_axes(lua_State *L, int index, int rank, const char *function, int *axes) {
  bool list = lua_istable(L, index);
  int count = list ? (int)lua_rawlen(L, index) : lua_gettop(L) - index + 1;
  if (count > OREPA_MAX_RANK)
    bind_error(L, "%s: %d dimensions listed, a tensor has at most %d", function, count, OREPA_MAX_RANK);
  for (int k = 0; k < count; k++) {
    if (list)
      lua_rawgeti(L, index, k + 1);
    else
      lua_pushvalue(L, index + k);
    axes[k] = bind_axis(L, -1, rank, function);
    lua_pop(L, 1);
  }
  return count;
}

static int l_permute(lua_State *L) {
  int axes[OREPA_MAX_RANK];
  orepa_tensor *t = bind_tensor(L, 1);
  int count = read_axes(L, 2, orepa_rank(t), "permute", axes);
  if (count != orepa_rank(t))
    return bind_error(L, "permute: %d dimensions listed for a tensor of %d", count, orepa_rank(t));
  BIND_RETURN(L, orepa_permute(t, axes));
}

static int l_transpose(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  int rank = orepa_rank(t);
  if (lua_isnoneornil(L, 2)) {
    if (rank != 2)
      return bind_error(L, "transpose: of a tensor of %d dimensions, which two?", rank);
    BIND_RETURN(L, orepa_transpose(t, 0, 1));
  }
  int axis = bind_axis(L, 2, rank, "transpose"), other = bind_axis(L, 3, rank, "transpose");
  BIND_RETURN(L, orepa_transpose(t, axis, other));
}

/* A bound of a slice: 1 ... size, or -1 ... -size from the end. */
static int64_t bound(lua_State *L, int index, int64_t size, int64_t otherwise) {
  if (lua_isnoneornil(L, index))
    return otherwise;
  int64_t k = bind_integer(L, index, "slice: a position");
  return k < 0 ? k + size + 1 : k;
}

static int l_slice(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  int axis = bind_axis(L, 2, orepa_rank(t), "slice");
  int64_t size = orepa_shape(t)[axis], first = bound(L, 3, size, 1), last = bound(L, 4, size, size);
  int64_t step = lua_isnoneornil(L, 5) ? 1 : bind_integer(L, 5, "slice: the step");
  if (first < 1 || last > size || first > last + 1)
    return bind_error(L, "slice: positions %I to %I of a dimension of size %I", (lua_Integer)first, (lua_Integer)last,
                      (lua_Integer)size);
  BIND_RETURN(L, orepa_slice(t, axis, first - 1, last, step));
}

static int l_select(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  int axis = bind_axis(L, 2, orepa_rank(t), "select");
  int64_t k = bind_integer(L, 3, "select: the position");
  if (k == 0)
    return bind_error(L, "select: positions count from 1, -1 is the last");
  BIND_RETURN(L, orepa_select(t, axis, k > 0 ? k - 1 : k));
}

static int l_expand(lua_State *L) {
  int64_t shape[OREPA_MAX_RANK];
  orepa_tensor *t = bind_tensor(L, 1);
  int rank = bind_shape(L, 2, lua_gettop(L), shape, false);
  BIND_RETURN(L, orepa_expand(t, rank, shape));
}

static int l_contiguous(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  BIND_RETURN(L, orepa_contiguous(t));
}

static int l_is_contiguous(lua_State *L) {
  lua_pushboolean(L, orepa_is_contiguous(bind_tensor(L, 1)));
  return 1;
}

static int l_clone(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  BIND_RETURN(L, orepa_clone(t));
}

static int l_detach(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  BIND_RETURN(L, orepa_detach(t));
}

/* "cpu", "bfloat16" or {dtype=, device=}, over what t is. */
static bind_kind kind_argument(lua_State *L, orepa_tensor *t) {
  bind_kind kind = {orepa_tensor_dtype(t), orepa_tensor_device(t), true};
  if (lua_istable(L, 2)) {
    bind_kind asked = bind_kind_option(L, 2, "to");
    if (asked.typed)
      kind.dtype = asked.dtype;
    if (bind_option(L, 2, "device"))
      kind.device = asked.device;
  } else if (lua_type(L, 2) != LUA_TSTRING) {
    bind_error(L, "to: a type, a device or {dtype=, device=} expected, got %s", luaL_typename(L, 2));
  } else if (orepa_dtype_by_name(lua_tostring(L, 2), &kind.dtype)) {
    kind.device = orepa_device_by_name(lua_tostring(L, 2));
    if (!kind.device)
      bind_error(L, "to: '%s' is neither a type nor a device", lua_tostring(L, 2));
  }
  return kind;
}

static int l_to(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  bind_kind kind = kind_argument(L, t);
  BIND_RETURN(L, orepa_to(t, kind.dtype, kind.device));
}

static int l_move(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  bind_kind kind = kind_argument(L, t);
  BIND_RETURN_SELF(L, orepa_move_(t, kind.dtype, kind.device));
}

/* Of a function of a list of tensors and perhaps a dimension: the tensors, in memory that is pushed behind these. */
static orepa_tensor **read_parts(lua_State *L, const char *function, int *count) {
  luaL_checktype(L, 1, LUA_TTABLE);
  lua_settop(L, 2);
  *count = (int)lua_rawlen(L, 1);
  if (!*count)
    bind_error(L, "%s: a list of at least one tensor expected", function);
  orepa_tensor **parts = lua_newuserdatauv(L, (size_t)*count * sizeof *parts, 0);
  luaL_checkstack(L, 8, function);
  for (int k = 0; k < *count; k++) {
    lua_rawgeti(L, 1, k + 1);
    parts[k] = bind_test_tensor(L, -1);
    if (!parts[k])
      bind_error(L, "%s: part %d is a %s, not a tensor", function, k + 1, luaL_typename(L, -1));
    lua_pop(L, 1);
  }
  return parts;
}

/* t with a new dimension of size 1, pushed. */
static orepa_tensor *push_unsqueezed(lua_State *L, orepa_tensor *t, int axis) {
  int64_t shape[OREPA_MAX_RANK];
  for (int d = 0; d <= orepa_rank(t); d++)
    shape[d] = d == axis ? 1 : orepa_shape(t)[d - (d > axis)];
  orepa_tensor **made = bind_new(L);
  *made = orepa_reshape(t, orepa_rank(t) + 1, shape);
  if (!*made)
    bind_fail(L);
  return *made;
}

/* A dimension of t with one more, the first if none is named. */
static int new_axis(lua_State *L, int index, orepa_tensor *t, const char *function) {
  if (orepa_rank(t) == OREPA_MAX_RANK)
    bind_error(L, "%s: a tensor has at most %d dimensions", function, OREPA_MAX_RANK);
  return lua_isnoneornil(L, index) ? 0 : bind_axis(L, index, orepa_rank(t) + 1, function);
}

/* stack({a, b, ...}, dim) */
static int l_stack(lua_State *L) {
  int count;
  orepa_tensor **parts = read_parts(L, "stack", &count);
  int axis = new_axis(L, 2, parts[0], "stack");
  for (int k = 1; k < count; k++)
    if (orepa_rank(parts[k]) != orepa_rank(parts[0]))
      return bind_error(L, "stack: part %d has %d dimensions, the first %d", k + 1, orepa_rank(parts[k]),
                        orepa_rank(parts[0]));
  luaL_checkstack(L, count + 8, "stack: too many parts");
  for (int k = 0; k < count; k++)
    parts[k] = push_unsqueezed(L, parts[k], axis);
  BIND_RETURN(L, orepa_concatenate(count, parts, axis));
}

static int l_unsqueeze(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  push_unsqueezed(L, t, new_axis(L, 2, t, "unsqueeze"));
  return 1;
}

/* Without one dimension of size 1, or without all of them. */
static int l_squeeze(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  int64_t shape[OREPA_MAX_RANK];
  int rank = 0, axis = lua_isnoneornil(L, 2) ? -1 : bind_axis(L, 2, orepa_rank(t), "squeeze");
  if (axis >= 0 && orepa_shape(t)[axis] != 1)
    return bind_error(L, "squeeze: dimension %d has size %I, not 1", axis + 1, (lua_Integer)orepa_shape(t)[axis]);
  for (int d = 0; d < orepa_rank(t); d++)
    if (axis >= 0 ? d != axis : orepa_shape(t)[d] != 1)
      shape[rank++] = orepa_shape(t)[d];
  BIND_RETURN(L, orepa_reshape(t, rank, shape));
}

/* t:split(size or {sizes}, dim): views, in a list. */
static int l_split(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  int axis = lua_isnoneornil(L, 3) ? (orepa_rank(t) ? 0 : bind_error(L, "split: a scalar has no dimensions"))
                                   : bind_axis(L, 3, orepa_rank(t), "split");
  bool list = lua_istable(L, 2);
  int64_t size = orepa_shape(t)[axis], each = list ? 0 : bind_integer(L, 2, "split: the size"), first = 0;
  if (!list && each < 1)
    return bind_error(L, "split: the size is %I, at least 1 expected", (lua_Integer)each);
  int64_t parts = list ? (int64_t)lua_rawlen(L, 2) : (size + each - 1) / each;
  lua_createtable(L, (int)(parts < 1 << 20 ? parts : 0), 0);
  for (int64_t k = 0; k < parts; k++) {
    int64_t length = each;
    if (list) {
      lua_rawgeti(L, 2, k + 1);
      length = bind_integer(L, -1, "split: a size");
      lua_pop(L, 1);
    }
    length = !list && length > size - first ? size - first : length;
    if (length < 0 || length > size - first)
      return bind_error(L, "split: size %I of part %I does not fit into the %I that are left of dimension %d",
                        (lua_Integer)length, (lua_Integer)(k + 1), (lua_Integer)(size - first), axis + 1);
    orepa_tensor **part = bind_new(L);
    *part = orepa_slice(t, axis, first, first + length, 1);
    if (!*part)
      return bind_fail(L);
    lua_rawseti(L, -2, k + 1);
    first += length;
  }
  if (first != size)
    return bind_error(L, "split: the sizes come to %I, dimension %d has %I", (lua_Integer)first, axis + 1,
                      (lua_Integer)size);
  return 1;
}

/* cat({a, b, ...}, dim) */
static int l_cat(lua_State *L) {
  int count;
  orepa_tensor **parts = read_parts(L, "cat", &count);
  int axis = lua_isnoneornil(L, 2) ? 0 : bind_axis(L, 2, orepa_rank(parts[0]), "cat");
  BIND_RETURN(L, orepa_concatenate(count, parts, axis));
}

/* pad(x, {before1, after1, ...} from the first dimension on, or a number for the last two, value) */
static int l_pad(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  int64_t before[OREPA_MAX_RANK] = {0}, after[OREPA_MAX_RANK] = {0};
  int rank = orepa_rank(t);
  if (!lua_istable(L, 2) || (int)lua_rawlen(L, 2) != 2 * rank)
    return bind_error(L, "pad: a list of %d numbers expected: before and after, for each of %d dimensions", 2 * rank,
                      rank);
  for (int d = 0; d < 2 * rank; d++) {
    lua_rawgeti(L, 2, d + 1);
    (d % 2 ? after : before)[d / 2] = bind_integer(L, -1, "pad: a width");
    lua_pop(L, 1);
  }
  orepa_operand value = lua_isnoneornil(L, 3) ? (orepa_operand){0} : bind_number(L, 3);
  BIND_RETURN(L, orepa_pad(t, before, after, value));
}

static const bind_row functions[] = {
    {"cat", l_cat,
     "cat({a, b, ...}, dim) -> tensor\nPuts tensors together along a dimension, the first if none is given. All other "
     "sizes agree.\n> orepa.cat({orepa.ones(1, 2), orepa.zeros(2, 2)}, 1)"},
    {"stack", l_stack,
     "stack({a, b, ...}, dim) -> tensor\nPuts tensors of one shape side by side along a new dimension, the first if "
     "none is given.\n> orepa.stack({orepa.ones(3), orepa.zeros(3)}, 2)"},
    {"pad", l_pad,
     "pad(x, {before, after, ...}, value) -> tensor\nSurrounds each dimension with elements of one value (0); negative "
     "widths crop.\n> orepa.pad(orepa.ones(2), {1, 2})"},
    {NULL, NULL, NULL},
};

static const bind_row methods[] = {
    {"reshape", l_reshape,
     "t:reshape(sizes...) -> tensor\nThe elements in logical order under another shape; one size may be -1. A view "
     "where "
     "strides allow, else a copy.\n> orepa.arange(6):reshape(2, -1)"},
    {"flatten", l_flatten,
     "t:flatten(dim) -> tensor\nDimensions from `dim` (the first) on become one.\n> orepa.ones(2, 3, 4):flatten(2)"},
    {"permute", l_permute,
     "t:permute(dims...) -> tensor\nA view with dimensions in another order.\n"
     "> orepa.ones(2, 3, 4):permute(3, 1, 2)"},
    {"transpose", l_transpose,
     "t:transpose(dim, other) -> tensor\nA view with two dimensions exchanged; a matrix needs none named.\n"
     "> orepa.ones(2, 3):transpose()"},
    {"slice", l_slice,
     "t:slice(dim, first, last, step) -> tensor\nA view of positions first to last, both included; they count from 1, "
     "-1 "
     "is the last.\n> orepa.arange(5):slice(1, 2, -1)"},
    {"select", l_select,
     "t:select(dim, position) -> tensor\nA view of one position; the dimension goes away.\n"
     "> orepa.ones(2, 3):select(2, -1)"},
    {"unsqueeze", l_unsqueeze,
     "t:unsqueeze(dim) -> tensor\nA view with a new dimension of size 1, which will be the first if none is named.\n"
     "> orepa.ones(2, 3):unsqueeze(-1)"},
    {"squeeze", l_squeeze,
     "t:squeeze(dim) -> tensor\nA view without a dimension of size 1, or without all that have it.\n"
     "> orepa.ones(2, 1, 3):squeeze(2)"},
    {"split", l_split,
     "t:split(size, dim) -> {tensors}\nViews of `size` positions each along a dimension, the first if none is given; "
     "the "
     "last may be shorter. A list of sizes gives one for each.\n> orepa.arange(7):split(3)\n"
     "> orepa.ones(4, 5):split({2, 3}, 2)"},
    {"expand", l_expand,
     "t:expand(sizes...) -> tensor\nA view that repeats dimensions of size 1; new ones come first.\n"
     "> orepa.ones(3, 1):expand(3, 4)"},
    {"contiguous", l_contiguous,
     "t:contiguous() -> tensor\nThe tensor itself, or a contiguous copy of it.\n"
     "> orepa.ones(2, 3):transpose():contiguous()"},
    {"is_contiguous", l_is_contiguous,
     "t:is_contiguous() -> boolean\nWhether its memory is dense: channels-last for 4 dimensions, else row-major.\n"
     "> orepa.ones(2, 3):is_contiguous()"},
    {"clone", l_clone, "t:clone() -> tensor\nA contiguous copy, with gradients.\n> orepa.ones(2):clone()"},
    {"detach", l_detach, "t:detach() -> tensor\nThe same storage without history.\n> orepa.ones(2):detach()"},
    {"to", l_to,
     "t:to(type or device) -> tensor\nConverted or moved; the tensor itself if nothing changes. Also t:to{dtype=, "
     "device=}.\n> orepa.ones(2):to(\"bfloat16\")\n> orepa.ones(2):to{dtype = \"float64\", device = \"ref\"}"},
    {"move_", l_move,
     "t:move_(type or device) -> t\nConverts or moves a leaf and its gradient in place: what else holds the tensor "
     "sees it "
     "there. Arguments as of t:to.\n> orepa.ones(2):move_(\"float64\")"},
    {NULL, NULL, NULL},
};

void bind_view_family(lua_State *L) {
  bind_register(L, "orepa.", functions);
  bind_push_methods(L);
  bind_register(L, "t:", methods);
  lua_getfield(L, -1, "squeeze");
  bind_name(L, "squeeze dimensions"); /* in a trace "squeeze" is what blocks do */
  lua_pop(L, 2);
}
