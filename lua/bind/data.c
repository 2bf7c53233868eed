/* data.c: idx files, the order of an epoch, batches. */
#include "data.h"

static int l_load_idx(lua_State *L) {
  const char *path = luaL_checkstring(L, 1);
  BIND_RETURN(L, orepa_load_idx(path));
}

static int l_permutation(lua_State *L) {
  int64_t count = bind_integer(L, 1, "permutation: the count"), seed = bind_integer(L, 2, "permutation: the seed"),
          epoch = bind_integer(L, 3, "permutation: the epoch");
  BIND_RETURN(L, orepa_permutation(count, (uint64_t)seed, (uint64_t)epoch));
}

/* A list of numbers, one a channel, in option `name`. */
static int option_channels(lua_State *L, int options, const char *name, float *values) {
  if (!bind_option(L, options, name))
    return 0;
  luaL_checktype(L, -1, LUA_TTABLE);
  int count = (int)lua_rawlen(L, -1);
  if (count > BIND_MAX_CHANNELS)
    bind_error(L, "option '%s': %d channels, at most %d", name, count, BIND_MAX_CHANNELS);
  for (int c = 0; c < count; c++) {
    lua_rawgeti(L, -1, c + 1);
    values[c] = (float)luaL_checknumber(L, -1);
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  return count;
}

void bind_image_transform(lua_State *L, int options, const char *function, bind_image_options *o) {
  static const int64_t whole[2] = {0, 0};
  orepa_image_transform *transform = &o->transform;
  *transform = (orepa_image_transform){0};
  transform->padding = bind_option_integer(L, options, "padding", 0);
  bind_option_pair(L, options, "crop", whole, transform->crop);
  transform->flip = bind_option_boolean(L, options, "flip", false);
  transform->augment = bind_option_boolean(L, options, "augment", false);
  transform->seed = (uint64_t)bind_option_integer(L, options, "seed", 0);
  transform->epoch = (uint64_t)bind_option_integer(L, options, "epoch", 0);
  int means = option_channels(L, options, "mean", o->mean),
      deviations = option_channels(L, options, "deviation", o->deviation);
  if (means && deviations && means != deviations)
    bind_error(L, "%s: %d means and %d deviations", function, means, deviations);
  transform->mean = means ? o->mean : NULL;
  transform->deviation = deviations ? o->deviation : NULL;
  transform->channels = means ? means : deviations;
}

static int l_image_batch(lua_State *L) {
  static const char *const known[] = {"padding", "crop", "flip", "augment", "mean", "deviation", "seed", "epoch", NULL};
  bind_image_options o;
  orepa_tensor *images = bind_tensor(L, 1), *indices = bind_tensor(L, 2);
  bind_image_transform(L, bind_options(L, 3, "image_batch", known), "image_batch", &o);
  BIND_RETURN(L, orepa_image_batch(images, indices, &o.transform));
}

static int l_label_batch(lua_State *L) {
  orepa_tensor *labels = bind_tensor(L, 1), *indices = bind_tensor(L, 2);
  BIND_RETURN(L, orepa_label_batch(labels, indices));
}

static void push_numbers(lua_State *L, const double *values, int count) {
  lua_createtable(L, count, 0);
  for (int c = 0; c < count; c++) {
    lua_pushnumber(L, values[c]);
    lua_rawseti(L, -2, c + 1);
  }
}

static int l_image_statistics(lua_State *L) {
  orepa_tensor *images = bind_tensor(L, 1);
  int channels = orepa_rank(images) == 4 ? (int)orepa_shape(images)[1] : 1;
  double *mean = lua_newuserdatauv(L, 2 * (size_t)channels * sizeof *mean + 1, 0), *deviation = mean + channels;
  if (orepa_image_statistics(images, mean, deviation))
    return bind_fail(L);
  push_numbers(L, mean, channels);
  push_numbers(L, deviation, channels);
  return 2;
}

static const bind_row rows[] = {
    {"load_idx", l_load_idx,
     "data.load_idx(path) -> tensor\nReads an idx file (MNIST's format), plain or compressed by gzip.\n"
     "> pcall(data.load_idx, \"missing.idx\")"},
    {"permutation", l_permutation,
     "data.permutation(count, seed, epoch) -> int64 tensor\n0 ... count-1 in an order that depends on these three "
     "alone.\n"
     "> data.permutation(5, 1, 1)"},
    {"image_batch", l_image_batch,
     "data.image_batch(images, indices, {padding=, crop=, flip=, augment=, mean=, deviation=, seed=, epoch=}) -> "
     "tensor\n"
     "float32 (B, C, h, w) of images (N, H, W) or (N, C, H, W) at int64 positions that count from 0: padded, cropped, "
     "flipped "
     "(with augment), normalised. What a sample gets depends on seed, epoch and its position alone.\n"
     "> data.image_batch(orepa.zeros(4, 8, 8), data.permutation(4, 1, 1), {mean = {0.5}, deviation = {0.2}})"},
    {"label_batch", l_label_batch,
     "data.label_batch(labels, indices) -> int64 tensor\nThe labels at int64 positions that count from 0.\n"
     "> data.label_batch(orepa.tensor({7, 8, 9}, {dtype = \"uint8\"}), orepa.tensor({2}, {dtype = \"int64\"}))"},
    {"image_statistics", l_image_statistics,
     "data.image_statistics(images) -> means, deviations\nTwo lists, a number for each channel; bytes count as x/255.\n"
     "> data.image_statistics(orepa.rand(4, 3, 8, 8))"},
    {NULL, NULL, NULL},
};

void bind_data_family(lua_State *L) {
  lua_newtable(L);
  bind_register(L, "data.", rows);
  lua_setfield(L, -2, "data");
}
