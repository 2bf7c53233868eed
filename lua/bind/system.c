/* system.c: seeds, memory, threads, the clock, and where time goes. */
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "bind.h"

static int l_manual_seed(lua_State *L) {
  lua_Integer seed = bind_integer(L, 1, "manual_seed");
  orepa_manual_seed((uint64_t)seed);
  lua_getglobal(L, "math");
  lua_getfield(L, -1, "randomseed");
  lua_pushinteger(L, seed);
  lua_call(L, 1, 0);
  return 0;
}

static int l_rng_state(lua_State *L) {
  orepa_rng state = orepa_rng_state();
  lua_createtable(L, 0, 2);
  lua_pushinteger(L, (lua_Integer)state.seed);
  lua_setfield(L, -2, "seed");
  lua_pushinteger(L, (lua_Integer)state.draws);
  lua_setfield(L, -2, "draws");
  return 1;
}

static int l_set_rng_state(lua_State *L) {
  static const char *const known[] = {"seed", "draws", NULL};
  int options = bind_options(L, 1, "set_rng_state", known);
  if (!options)
    return bind_error(L, "set_rng_state: a table {seed=, draws=} expected");
  orepa_rng state = {(uint64_t)bind_option_integer(L, options, "seed", 0),
                     (uint64_t)bind_option_integer(L, options, "draws", 0)};
  orepa_set_rng_state(state);
  return 0;
}

static const orepa_device *device_argument(lua_State *L, int index) {
  return bind_device(L, luaL_optstring(L, index, "cpu"));
}

static int l_memory(lua_State *L) {
  orepa_memory_info info = orepa_memory(device_argument(L, 1));
  const struct {
    const char *name;
    size_t value;
  } fields[] = {{"live", info.live},
                {"cached", info.cached},
                {"peak", info.peak},
                {"limit", info.limit},
                {"system", info.system}};
  lua_newtable(L);
  for (size_t k = 0; k < sizeof fields / sizeof *fields; k++) {
    lua_pushinteger(L, (lua_Integer)fields[k].value);
    lua_setfield(L, -2, fields[k].name);
  }
  lua_getfield(L, LUA_REGISTRYINDEX, "orepa.collections");
  lua_pushinteger(L, lua_tointeger(L, -1));
  lua_setfield(L, -3, "collections");
  lua_getfield(L, LUA_REGISTRYINDEX, "orepa.collection_seconds");
  lua_pushnumber(L, lua_tonumber(L, -1));
  lua_setfield(L, -4, "collection_seconds");
  lua_pop(L, 2);
  return 1;
}

static int l_reset_peak(lua_State *L) {
  orepa_reset_peak(device_argument(L, 1));
  return 0;
}

static int l_set_memory_limit(lua_State *L) {
  int64_t bytes = lua_isnoneornil(L, 1) ? 0 : bind_integer(L, 1, "set_memory_limit");
  if (bytes < 0)
    return bind_error(L, "set_memory_limit: %I bytes", (lua_Integer)bytes);
  orepa_set_memory_limit(device_argument(L, 2), (size_t)bytes);
  return 0;
}

static int l_empty_cache(lua_State *L) {
  orepa_empty_cache(device_argument(L, 1));
  return 0;
}

static int l_set_threads(lua_State *L) {
  int64_t count = bind_integer(L, 1, "set_threads");
  if (count != (int)count)
    return bind_error(L, "set_threads: %I threads", (lua_Integer)count);
  return orepa_set_threads((int)count) ? bind_fail(L) : 0;
}

static int l_threads(lua_State *L) {
  lua_pushinteger(L, orepa_threads());
  return 1;
}

static int l_set_conv_accuracy(lua_State *L) {
  const char *accuracy = luaL_checkstring(L, 1);
  bool high = !strcmp(accuracy, "high");
  if (!high && strcmp(accuracy, "fast"))
    return bind_error(L, "set_conv_accuracy: '%s'; there are fast, high", accuracy);
  orepa_set_conv_accuracy(device_argument(L, 2), high);
  return 0;
}

static int l_clock(lua_State *L) {
  lua_pushnumber(L, orepa_clock());
  return 1;
}

static int l_fma_rate(lua_State *L) {
  int64_t milliseconds = bind_integer(L, 1, "fma_rate");
  if (milliseconds != (int)milliseconds)
    return bind_error(L, "fma_rate: %I milliseconds", (lua_Integer)milliseconds);
  double rate = orepa_fma_rate((int)milliseconds);
  if (rate < 0)
    return bind_fail(L);
  lua_pushnumber(L, rate);
  return 1;
}

static void push_timing(lua_State *L, const orepa_timing *row) {
  lua_createtable(L, 0, 5);
  lua_pushstring(L, row->op);
  lua_setfield(L, -2, "op");
  lua_pushstring(L, row->entry);
  lua_setfield(L, -2, "entry");
  lua_pushstring(L, row->detail);
  lua_setfield(L, -2, "detail");
  lua_pushinteger(L, (lua_Integer)row->calls);
  lua_setfield(L, -2, "calls");
  lua_pushnumber(L, row->seconds);
  lua_setfield(L, -2, "seconds");
}

static int l_timings(lua_State *L) {
  if (!lua_isboolean(L, 1))
    return bind_error(L, "timings: true or false expected, got %s", luaL_typename(L, 1));
  orepa_timing row;
  lua_newtable(L);
  for (int k = 0; orepa_timing_at(k, &row); k++) {
    push_timing(L, &row);
    lua_rawseti(L, -2, k + 1);
  }
  orepa_set_timings(lua_toboolean(L, 1));
  return 1;
}

static int l_build_info(lua_State *L) {
  lua_pushstring(L, orepa_build_info());
  return 1;
}

static int l_is_terminal(lua_State *L) {
  struct winsize size;
  lua_pushboolean(L, isatty(STDOUT_FILENO));
  if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) || !size.ws_col)
    return 1;
  lua_pushinteger(L, size.ws_col);
  return 2;
}

/* fail(message): an error at the user's line, for the library's own Lua code. */
static int l_fail(lua_State *L) {
  return bind_error(L, "%s", luaL_checkstring(L, 1));
}

static const bind_row rows[] = {
    {"manual_seed", l_manual_seed,
     "manual_seed(seed)\nStarts the random numbers of tensors and of math.random anew.\n> orepa.manual_seed(1)"},
    {"rng_state", l_rng_state,
     "rng_state() -> {seed=, draws=}\nThe state of the tensors' random numbers.\n> orepa.rng_state()"},
    {"set_rng_state", l_set_rng_state,
     "set_rng_state(state)\nGoes back to a state that rng_state gave.\n> orepa.set_rng_state(orepa.rng_state())"},
    {"memory", l_memory,
     "memory(device) -> {live=, cached=, peak=, limit=, system=, collections=, collection_seconds=}\nBytes in use by "
     "tensors and by kernels' scratch; freed and kept for reuse; the most that was in use since the start or "
     "reset_peak; the most that live and cached may be together. Then how often the system was asked for memory, how "
     "often Lua's collector was run for it, and how long that took. The process itself holds little beside live and "
     "cached.\n"
     "> orepa.memory().live"},
    {"reset_peak", l_reset_peak,
     "reset_peak(device)\nLets memory().peak start again from what is live.\n> orepa.reset_peak()"},
    {"set_memory_limit", l_set_memory_limit,
     "set_memory_limit(bytes, device)\nThe most that may be held; nil goes back to what the system allows.\n"
     "> orepa.set_memory_limit(nil)"},
    {"empty_cache", l_empty_cache,
     "empty_cache(device)\nGives memory kept for reuse back to the system.\n"
     "> orepa.empty_cache()"},
    {"set_threads", l_set_threads,
     "set_threads(count)\nHow many threads kernels use.\n> orepa.set_threads(orepa.threads())"},
    {"threads", l_threads, "threads() -> integer\nHow many threads kernels use.\n> orepa.threads()"},
    {"set_conv_accuracy", l_set_conv_accuracy,
     "set_conv_accuracy(\"fast\" | \"high\", device)\nWhich way a device's convolutions go: the fastest (at first), "
     "whose "
     "float32 error may be 5e-6 of the largest magnitude, or the most accurate.\n> orepa.set_conv_accuracy(\"high\")"},
    {"clock", l_clock, "clock() -> seconds\nA monotonic clock.\n> orepa.clock()"},
    {"fma_rate", l_fma_rate,
     "fma_rate(milliseconds) -> operations a second\nWhat the processor reaches in float32 on all threads() with the "
     "instruction set in use, a multiply-add counted as two operations: the best of what is seen in 1 to 1000 "
     "milliseconds of multiply-adds on registers.\n> orepa.fma_rate(1)"},
    {"timings", l_timings,
     "timings(on) -> {{op=, entry=, detail=, calls=, seconds=}, ...}\nStarts or stops taking the time of every call of "
     "the device, and gives what was taken since it was started last: by op, by entry of the device's table and, for "
     "convolutions, by kernel, channels and size of the input.\n"
     "> orepa.timings(true); orepa.ones(2):sum(); return orepa.timings(false)"},
    {"build_info", l_build_info,
     "build_info() -> string\nLibraries with their versions, and the processor's features.\n"
     "> orepa.build_info()"},
    {"is_terminal", l_is_terminal,
     "is_terminal() -> boolean, columns\nWhether standard output is a terminal, and how wide it is, if it says so.\n"
     "> orepa.is_terminal()"},
    {"fail", l_fail,
     "fail(message)\nRaises an error at the line of the user's code that led here.\n"
     "> pcall(orepa.fail, \"no\")"},
    {NULL, NULL, NULL},
};

void bind_system_family(lua_State *L) {
  bind_register(L, "orepa.", rows);
}
