/* reparam.c: descriptions of blocks as trees, and their squeezing. The language in which users describe them is Lua
 * (orepa/reparam.lua); what arrives here is checked already, up to shapes. */
#include <string.h>

#include "bind.h"
#include "orepa_reparam.h"

#define BIND_TREE "orepa.Tree"

static orepa_tree **new_tree(lua_State *L) {
  orepa_tree **handle = lua_newuserdatauv(L, sizeof *handle, 0);
  *handle = NULL;
  luaL_setmetatable(L, BIND_TREE);
  return handle;
}

static orepa_tree *check_tree(lua_State *L, int index) {
  orepa_tree **handle = luaL_testudata(L, index, BIND_TREE);
  if (!handle || !*handle)
    bind_error(L, "argument %d: a tree expected, got %s", index, luaL_typename(L, index));
  return *handle;
}

static int l_tree_gc(lua_State *L) {
  orepa_tree **handle = luaL_checkudata(L, 1, BIND_TREE);
  orepa_tree_release(*handle);
  *handle = NULL;
  return 0;
}

/* Trees of a list, each with a new reference, for a constructor to take over. */
enum { MAX_CHILDREN = 256 };
static int tree_list(lua_State *L, int index, orepa_tree **trees) {
  luaL_checktype(L, index, LUA_TTABLE);
  int count = (int)lua_rawlen(L, index);
  if (count > MAX_CHILDREN)
    bind_error(L, "%d layers or branches in one list, at most %d", count, MAX_CHILDREN);
  for (int k = 0; k < count; k++) { /* first all checks, */
    lua_rawgeti(L, index, k + 1);
    trees[k] = check_tree(L, -1);
    lua_pop(L, 1);
  }
  for (int k = 0; k < count; k++) /* then the references */
    orepa_tree_retain(trees[k]);
  return count;
}

static void pair_argument(lua_State *L, int index, int64_t pair[2]) {
  luaL_checktype(L, index, LUA_TTABLE);
  for (int k = 0; k < 2; k++) {
    lua_rawgeti(L, index, k + 1);
    pair[k] = bind_integer(L, -1, "a size");
    lua_pop(L, 1);
  }
}

static orepa_leaf_kind leaf_kind(lua_State *L, int options) {
  const char *kind = bind_option(L, options, "kind") ? lua_tostring(L, -1) : "parameter";
  if (kind && !strcmp(kind, "parameter"))
    return OREPA_LEAF_PARAMETER;
  if (kind && !strcmp(kind, "pattern"))
    return OREPA_LEAF_PATTERN;
  if (!kind || strcmp(kind, "identity"))
    bind_error(L, "leaf: option 'kind': there are parameter, pattern and identity");
  return OREPA_LEAF_IDENTITY;
}

/* Slots are counted from 1 in Lua, from 0 in the engine, where an int holds them. */
static int slot_of(lua_State *L, int64_t slot) {
  if (slot < 0 || slot > INT32_MAX)
    bind_error(L, "there is no slot %I", (lua_Integer)slot);
  return (int)slot - 1;
}

static int l_leaf(lua_State *L) {
  static const char *const known[] = {"kind",   "slot",          "input",      "output", "groups",
                                      "kernel", "plus_identity", "interleave", NULL};
  static const int64_t one[2] = {1, 1};
  int options = bind_options(L, 1, "leaf", known);
  if (!options)
    return bind_error(L, "leaf: options expected");
  orepa_leaf leaf = {.slot = slot_of(L, bind_option_integer(L, options, "slot", 0)),
                     .in = bind_option_integer(L, options, "input", 0),
                     .out = bind_option_integer(L, options, "output", 0),
                     .groups = bind_option_integer(L, options, "groups", 1),
                     .plus_identity = bind_option_boolean(L, options, "plus_identity", false),
                     .interleave = bind_option_boolean(L, options, "interleave", false)};
  bind_option_pair(L, options, "kernel", one, leaf.kernel);
  leaf.kind = leaf_kind(L, options);
  orepa_tree **handle = new_tree(L);
  *handle = orepa_tree_leaf(&leaf);
  return *handle ? 1 : bind_fail(L);
}

static int l_chain(lua_State *L) {
  lua_settop(L, 3);
  orepa_tree *layers[MAX_CHILDREN], **handle = new_tree(L);
  int64_t groups = bind_integer(L, 2, "chain: the groups");
  bool correlate = lua_toboolean(L, 3);
  int count = tree_list(L, 1, layers);
  *handle = orepa_tree_chain(count, layers, groups, correlate);
  return *handle ? 1 : bind_fail(L);
}

static int l_scale(lua_State *L) {
  orepa_tree *child = check_tree(L, 1), **handle = new_tree(L);
  int slot = slot_of(L, bind_integer(L, 2, "scale: the slot"));
  int64_t row = bind_integer(L, 3, "scale: the row") - 1;
  *handle = orepa_tree_scale(orepa_tree_retain(child), slot, row);
  return *handle ? 1 : bind_fail(L);
}

static int l_sum(lua_State *L) {
  orepa_tree *branches[MAX_CHILDREN], **handle = new_tree(L);
  int64_t groups = bind_integer(L, 2, "sum: the groups"), kernel[2];
  pair_argument(L, 3, kernel);
  int count = tree_list(L, 1, branches);
  *handle = orepa_tree_sum(count, branches, groups, kernel);
  return *handle ? 1 : bind_fail(L);
}

/* The tensors of a list, kept alive by it, in a userdata. */
static orepa_tensor **slot_list(lua_State *L, int index, int *count) {
  luaL_checktype(L, index, LUA_TTABLE);
  *count = (int)lua_rawlen(L, index);
  orepa_tensor **slots = lua_newuserdatauv(L, (size_t)*count * sizeof *slots + 1, 0);
  for (int k = 0; k < *count; k++) {
    lua_rawgeti(L, index, k + 1);
    slots[k] = bind_test_tensor(L, -1);
    if (!slots[k])
      bind_error(L, "squeeze: slot %d holds a %s, not a tensor", k + 1, luaL_typename(L, -1));
    lua_pop(L, 1);
  }
  return slots;
}

/* squeeze(tree, slots [, x, {stride=, ...}]): with x, for a convolution of x alone */
static int l_squeeze(lua_State *L) {
  int count;
  orepa_taps taps;
  orepa_tree *tree = check_tree(L, 1);
  lua_settop(L, 4); /* the list is pushed above */
  orepa_tensor **slots = slot_list(L, 2, &count), *x = bind_tensor_or_nil(L, 3);
  bool some = x && orepa_rank(x) == 4;
  if (some) {
    orepa_conv conv = bind_conv_options(L, 4, "squeeze");
    taps = orepa_conv2d_taps(&conv, orepa_tree_kernel(tree), orepa_shape(x) + 2);
  }
  BIND_RETURN(L, orepa_squeeze(tree, count, slots, some ? &taps : NULL));
}

static int l_branch(lua_State *L) {
  int count;
  orepa_tree *tree = check_tree(L, 1);
  int branch = slot_of(L, bind_integer(L, 2, "branch"));
  orepa_tensor **slots = slot_list(L, 3, &count);
  BIND_RETURN(L, orepa_tree_branch(tree, branch, count, slots));
}

static int l_set_fast(lua_State *L) {
  orepa_tree_set_fast(check_tree(L, 1), lua_toboolean(L, 2));
  return 0;
}

static int l_prior(lua_State *L) {
  int64_t channels = bind_integer(L, 1, "prior: the channels"), kernel[2];
  pair_argument(L, 2, kernel);
  bind_kind kind = bind_kind_option(L, 3, "prior");
  BIND_RETURN(L, orepa_frequency_prior(kind.dtype, kind.device, channels, kernel));
}

static int l_identity_kernel(lua_State *L) {
  int64_t rows = bind_integer(L, 1, "identity_kernel: the rows"),
          columns = bind_integer(L, 2, "identity_kernel: the columns");
  int64_t kernel[2];
  pair_argument(L, 3, kernel);
  bind_kind kind = bind_kind_option(L, 4, "identity_kernel");
  if (rows < 1 || columns < 1 || kernel[0] < 1 || kernel[1] < 1)
    return bind_error(L, "identity_kernel: sizes must be at least 1");
  BIND_RETURN(L, orepa_identity_kernel(kind.dtype, kind.device, rows, columns, kernel));
}

/* Not for users: the language of blocks is built on these. */
static const bind_row rows[] = {
    {"leaf", l_leaf, NULL},
    {"chain", l_chain, NULL},
    {"scale", l_scale, NULL},
    {"sum", l_sum, NULL},
    {"branch", l_branch, NULL},
    {"squeeze", l_squeeze, NULL},
    {"set_fast", l_set_fast, NULL},
    {"prior", l_prior, NULL},
    {"identity_kernel", l_identity_kernel, NULL},
    {NULL, NULL, NULL},
};

void bind_reparam_family(lua_State *L) {
  bind_end_with(L, BIND_TREE, "__gc", l_tree_gc);
  lua_newtable(L);
  bind_register(L, "tree.", rows);
  lua_setfield(L, -2, "tree");
}
