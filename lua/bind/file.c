/* file.c: files of weights as Lua tables. */
#include "bind.h"
#include "orepa_io.h"

#define BIND_ARCHIVE "orepa.Archive"

/* An archive that the collector frees, so that an error in between leaks nothing. */
static orepa_archive **new_archive(lua_State *L) {
  orepa_archive **archive = lua_newuserdatauv(L, sizeof *archive, 0);
  *archive = NULL;
  luaL_setmetatable(L, BIND_ARCHIVE);
  return archive;
}

static int free_archive(lua_State *L) {
  orepa_archive **archive = luaL_checkudata(L, 1, BIND_ARCHIVE);
  orepa_archive_free(*archive);
  *archive = NULL;
  return 0;
}

/* load(path, {device=}) -> {name = tensor}, {key = value}, {names in the file's order} */
static int l_load(lua_State *L) {
  static const char *const known[] = {"device", NULL};
  const char *path = luaL_checkstring(L, 1);
  int options = bind_options(L, 2, "load", known);
  const orepa_device *device = bind_device(L, bind_option(L, options, "device") ? luaL_checkstring(L, -1) : "cpu");
  orepa_archive **archive = new_archive(L);
  *archive = orepa_load(path, device);
  if (!*archive)
    return bind_fail(L);
  size_t count = orepa_archive_count(*archive), entries = orepa_archive_metadata_count(*archive);
  lua_createtable(L, 0, (int)count);
  lua_createtable(L, 0, (int)entries);
  lua_createtable(L, (int)count, 0);
  for (size_t k = 0; k < count; k++) {
    lua_pushstring(L, orepa_archive_name(*archive, k));
    lua_pushvalue(L, -1);
    lua_rawseti(L, -3, (lua_Integer)k + 1);
    bind_push(L, orepa_archive_tensor(*archive, k));
    lua_rawset(L, -5);
  }
  for (size_t k = 0; k < entries; k++) {
    lua_pushstring(L, orepa_archive_metadata_value(*archive, k));
    lua_setfield(L, -3, orepa_archive_metadata_key(*archive, k));
  }
  return 3;
}

static int compare_names(lua_State *L) {
  lua_pushboolean(L, lua_compare(L, 1, 2, LUA_OPLT));
  return 1;
}

/* Pushes the keys of the table at `index` as a sorted list. */
static void push_sorted_keys(lua_State *L, int index, const char *what) {
  lua_newtable(L);
  for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1)) {
    if (lua_type(L, -2) != LUA_TSTRING)
      bind_error(L, "save: %s are named by strings, not by a %s", what, luaL_typename(L, -2));
    lua_pushvalue(L, -2);
    lua_rawseti(L, -4, (lua_Integer)lua_rawlen(L, -4) + 1);
  }
  lua_getglobal(L, "table");
  lua_getfield(L, -1, "sort");
  lua_remove(L, -2);
  lua_pushvalue(L, -2);
  lua_pushcfunction(L, compare_names);
  lua_call(L, 2, 0);
}

/* save(path, {name = tensor}, {key = value}, order) */
static int l_save(lua_State *L) {
  const char *path = luaL_checkstring(L, 1);
  luaL_checktype(L, 2, LUA_TTABLE);
  lua_settop(L, 4);
  orepa_archive **archive = new_archive(L);
  *archive = orepa_archive_new();
  if (!*archive)
    return bind_fail(L);
  if (lua_istable(L, 4))
    lua_pushvalue(L, 4);
  else
    push_sorted_keys(L, 2, "tensors");
  for (lua_Integer k = 1, count = (lua_Integer)lua_rawlen(L, -1); k <= count; k++) {
    lua_rawgeti(L, -1, k);
    const char *name = lua_tostring(L, -1);
    lua_pushvalue(L, -1);
    lua_rawget(L, 2);
    orepa_tensor *t = bind_test_tensor(L, -1);
    if (!name || !t)
      return bind_error(L, "save: '%s' is a %s, not a tensor", name ? name : "?", luaL_typename(L, -1));
    if (orepa_archive_add(*archive, name, t))
      return bind_fail(L);
    lua_pop(L, 2);
  }
  lua_pop(L, 1);
  if (lua_istable(L, 3)) {
    push_sorted_keys(L, 3, "metadata");
    for (lua_Integer k = 1, count = (lua_Integer)lua_rawlen(L, -1); k <= count; k++) {
      lua_rawgeti(L, -1, k);
      lua_pushvalue(L, -1);
      if (lua_rawget(L, 3) != LUA_TSTRING)
        return bind_error(L, "save: metadata '%s' is a %s, not a string", lua_tostring(L, -2), luaL_typename(L, -1));
      if (orepa_archive_set_metadata(*archive, lua_tostring(L, -2), lua_tostring(L, -1)))
        return bind_fail(L);
      lua_pop(L, 2);
    }
  }
  return orepa_save_safetensors(path, *archive) ? bind_fail(L) : 0;
}

static int l_write_file(lua_State *L) {
  size_t bytes;
  const char *path = luaL_checkstring(L, 1), *text = luaL_checklstring(L, 2, &bytes);
  return orepa_write_file(path, text, bytes) ? bind_fail(L) : 0;
}

static const bind_row rows[] = {
    {"load", l_load,
     "load(path, {device=}) -> tensors, metadata, names\nReads a safetensors file, or a checkpoint that torch.save "
     "wrote "
     "(.pth, .pt, .pth.tar; of any version, nothing in it is run): a table from names to tensors, one of strings, and "
     "the "
     "names in the file's order. A checkpoint's dictionaries and lists become paths: `state_dict.conv1.weight`; its "
     "numbers and "
     "strings are metadata, and what is neither is kept out: metadata.__kept_out__ has a line for each, `args: "
     "argparse.Namespace`. orepa.state_dict takes a network's weights out.\n"
     "> local p = os.tmpname(); orepa.save(p, {x = orepa.ones(2)}); return orepa.load(p)"},
    {"save", l_save,
     "save(path, tensors, metadata, names)\nWrites a safetensors file: beside the path, synced, then renamed, so that "
     "the "
     "path never holds half a file. `names` gives the order, sorted if it is left out.\n"
     "> orepa.save(os.tmpname(), {x = orepa.ones(2)}, {origin = \"example\"})"},
    {"write_file", l_write_file,
     "write_file(path, text)\n"
     "Writes a file of any bytes as orepa.save does: beside the path, synced, then renamed, so that the path never "
     "holds half a file.\n"
     "> orepa.write_file(os.tmpname(), \"all or nothing\")"},
    {NULL, NULL, NULL},
};

void bind_file_family(lua_State *L) {
  bind_end_with(L, BIND_ARCHIVE, "__gc", free_archive);
  bind_register(L, "orepa.", rows);
}
