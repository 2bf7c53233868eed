/* image.c: pictures from files and strings, and back. */
#include <stdlib.h>
#include <string.h>

#include "bind.h"
#include "orepa_image.h"

/* ---- reading ---- */

static bool option_is_float(lua_State *L, int options) {
  if (!bind_option(L, options, "dtype"))
    return false;
  const char *name = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : luaL_typename(L, -1);
  bool is_float = !strcmp(name, "float32");
  if (!is_float && strcmp(name, "uint8"))
    bind_error(L, "option 'dtype': '%s'; a picture is read as uint8 or float32", name);
  lua_pop(L, 1);
  return is_float;
}

static orepa_image_options reading_options(lua_State *L, int index, const char *function) {
  static const char *const known[] = {"channels", "dtype", "orientation", "indices", "at_least", NULL};
  static const int64_t whole[2] = {0, 0};
  int options = bind_options(L, index, function, known);
  orepa_image_options o = {0};
  int64_t channels = bind_option_integer(L, options, "channels", 0);
  if (bind_option(L, options, "channels") && channels != 1 && channels != 3 && channels != 4)
    bind_error(L, "%s: channels is %I; there are 1, 3 and 4", function, (lua_Integer)channels);
  o.channels = (int)channels;
  o.as_float = option_is_float(L, options);
  o.as_stored = !bind_option_boolean(L, options, "orientation", true);
  o.indices = bind_option_boolean(L, options, "indices", false);
  bind_option_pair(L, options, "at_least", whole, o.at_least);
  return o;
}

static int l_load(lua_State *L) {
  const char *path = luaL_checkstring(L, 1);
  orepa_image_options options = reading_options(L, 2, "image.load");
  BIND_RETURN(L, orepa_load_image(path, &options));
}

static int l_decode(lua_State *L) {
  size_t size;
  const char *bytes = luaL_checklstring(L, 1, &size);
  orepa_image_options options = reading_options(L, 2, "image.decode");
  BIND_RETURN(L, orepa_decode_image("a picture in memory", bytes, size, &options));
}

/* ---- writing ---- */

static orepa_image_format option_format(lua_State *L, int options) {
  if (!bind_option(L, options, "format"))
    return OREPA_IMAGE_BY_NAME;
  const char *name = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : luaL_typename(L, -1);
  bool png = !strcmp(name, "png");
  if (!png && strcmp(name, "jpeg"))
    bind_error(L, "option 'format': '%s'; there are png and jpeg", name);
  lua_pop(L, 1);
  return png ? OREPA_IMAGE_PNG : OREPA_IMAGE_JPEG;
}

/* An integer from 1 to `most`; 0 if it is not given. */
static int option_level(lua_State *L, int options, const char *name, int most) {
  int64_t level = bind_option_integer(L, options, name, 0);
  if (bind_option(L, options, name) && (level < 1 || level > most))
    bind_error(L, "option '%s': %I; it goes from 1 to %d", name, (lua_Integer)level, most);
  return (int)level;
}

static orepa_image_encoding writing_options(lua_State *L, int index, const char *function) {
  static const char *const known[] = {"format", "quality", "compression", NULL};
  int options = bind_options(L, index, function, known);
  return (orepa_image_encoding){option_format(L, options), option_level(L, options, "quality", 100),
                                option_level(L, options, "compression", 9)};
}

static int l_save(lua_State *L) {
  const char *path = luaL_checkstring(L, 1);
  orepa_tensor *t = bind_tensor(L, 2);
  orepa_image_encoding how = writing_options(L, 3, "image.save");
  bind_collect(L);
  if (orepa_save_image(path, t, &how) && (!bind_retry(L) || orepa_save_image(path, t, &how)))
    return bind_fail(L);
  return 0;
}

#define BIND_BYTES "orepa.Bytes"

/* Bytes of malloc's that the collector frees, should they not become a string. */
static int free_bytes(lua_State *L) {
  void **bytes = luaL_checkudata(L, 1, BIND_BYTES);
  free(*bytes);
  *bytes = NULL;
  return 0;
}

static int l_encode(lua_State *L) {
  orepa_tensor *t = bind_tensor(L, 1);
  orepa_image_encoding how = writing_options(L, 2, "image.encode");
  if (how.format == OREPA_IMAGE_BY_NAME)
    how.format = OREPA_IMAGE_PNG;
  size_t size;
  void **bytes = lua_newuserdatauv(L, sizeof *bytes, 0);
  *bytes = NULL;
  luaL_setmetatable(L, BIND_BYTES);
  bind_collect(L);
  if (orepa_encode_image(t, &how, bytes, &size) && (!bind_retry(L) || orepa_encode_image(t, &how, bytes, &size)))
    return bind_fail(L);
  lua_pushlstring(L, *bytes, size);
  free(*bytes);
  *bytes = NULL;
  return 1;
}

static const bind_row rows[] = {
    {"load", l_load,
     "image.load(path, {channels=, dtype=, orientation=, indices=, at_least=}) -> tensor\n"
     "A PNG or JPEG picture, which its first bytes say, as uint8 (C, H, W): 3 channels for colour, 1 for gray. With "
     "dtype = \"float32\" from 0 to 1: bytes / 255, and 16-bit samples / 65535, which are rounded to 8 bits else. "
     "channels = 1, 3 or 4 converts: gray is 0.299 R + 0.587 G + 0.114 B, the fourth is opacity, 255 where there is "
     "none. Without 4 channels opacity is dropped, not mixed with a background. The picture is turned as EXIF says "
     "unless orientation = false. indices = true gives the indices of a PNG's palette, (1, H, W), in place of its "
     "colours. at_least = {height, width} lets a JPEG come at 1/2, 1/4 or 1/8 of its size, which is faster, where "
     "that is as large still; others come whole. CMYK becomes colour; gamma and colour profiles are not applied. A "
     "file that is cut off or damaged is an error.\n"
     "> local p = os.tmpname(); orepa.image.save(p, orepa.rand(3, 4, 5), {format = \"png\"}); return "
     "orepa.image.load(p)"},
    {"decode", l_decode,
     "image.decode(bytes, {channels=, dtype=, orientation=, indices=, at_least=}) -> tensor\n"
     "As orepa.image.load, of a string that holds what such a file does.\n"
     "> orepa.image.decode(orepa.image.encode(orepa.rand(3, 4, 5)))"},
    {"save", l_save,
     "image.save(path, t, {format=, quality=, compression=})\n"
     "Writes a picture (H, W) or (C, H, W), C being 1, 3 or, for PNG, 4 with opacity: uint8 as it is; floats from 0 "
     "to 1, rounded to bytes, where what is outside is clamped and NaN is 0; bool as black and white. The name's "
     "ending says .png, .jpg or .jpeg, unless format = \"png\" or \"jpeg\" does. quality (90) is a JPEG's, 1 to "
     "100; compression (6) a PNG's, 1 to 9. The file is written beside the path, synced, then renamed.\n"
     "> orepa.image.save(os.tmpname(), orepa.rand(3, 4, 5), {format = \"jpeg\", quality = 75})"},
    {"encode", l_encode,
     "image.encode(t, {format=, quality=, compression=}) -> string\n"
     "The bytes that orepa.image.save would write; PNG if no format is named.\n"
     "> #orepa.image.encode(orepa.rand(3, 4, 5))"},
    {NULL, NULL, NULL},
};

void bind_image_family(lua_State *L) {
  bind_end_with(L, BIND_BYTES, "__gc", free_bytes);
  lua_newtable(L);
  bind_register(L, "image.", rows);
  lua_setfield(L, -2, "image");
}
