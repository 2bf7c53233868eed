/* module.c: luaopen_orepa_core, the module that orepa/init.lua builds on. */
#include "bind.h"

__attribute__((visibility("default"))) int luaopen_orepa_core(lua_State *L);

int luaopen_orepa_core(lua_State *L) {
  bind_stress(L);
  lua_newtable(L);
  bind_tensor_family(L);
  bind_view_family(L);
  bind_index_family(L);
  bind_elementwise_family(L);
  bind_functional_family(L);
  bind_autograd_family(L);
  bind_checkpoint_family(L);
  bind_hook_family(L);
  bind_function_family(L);
  bind_system_family(L);
  bind_interrupt_family(L);
  bind_optimizer_family(L);
  bind_file_family(L);
  bind_data_family(L);
  bind_image_family(L);
  bind_loader_family(L);
  bind_reparam_family(L);
  bind_push_indexing(L);
  lua_setfield(L, -2, "indexing");
  bind_trace_family(L);
  bind_push_methods(L);
  lua_setfield(L, -2, "methods");
  luaL_getsubtable(L, LUA_REGISTRYINDEX, "orepa.documentation");
  lua_setfield(L, -2, "documentation");
  lua_pushliteral(L, OREPA_VERSION);
  lua_setfield(L, -2, "version");
  return 1;
}
