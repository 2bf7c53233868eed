-- What `luarocks make` builds and installs: the module, its Lua files, the program, and the library beside the module. The
-- system packages that scripts/setup installs must be there; two of them, lua-cjson and lua-filesystem, are Lua modules that
-- are not asked of luarocks, so that it needs no network.
--
-- OREPA_BUILD names the folder to build in. One that is configured already is used as it is.
rockspec_format = "3.0"
package = "orepa"
version = "0.1.0-1"
source = { url = "file://orepa-0.1.0.tar.gz" }
description = {
  summary = "Training of convolutional networks from Lua, with blocks that squeeze to one convolution",
  detailed = [[
Blocks of many linear branches are trained as one convolution (online re-parameterization, OREPA) and deployed as one.
Tensors, autograd, layers, optimizers and data; the engine is C.]],
  license = "MIT",
}
supported_platforms = { "linux" }
dependencies = { "lua ~> 5.4" }
build = {
  type = "command",
  build_command = [[
set -e
build=${OREPA_BUILD:-build-rock}
[ -e "$build/CMakeCache.txt" ] || cmake -S . -B "$build" -DOREPA_TESTS=OFF
cmake --build "$build" -j "`nproc`" -t orepa_program orepa_lua]],
  install_command = [[
set -e
build=${OREPA_BUILD:-build-rock}
cmake --install "$build" --prefix "$(PREFIX)/installed" >/dev/null
cd "$(PREFIX)/installed"
mkdir -p "$(LUADIR)" "$(LIBDIR)" "$(BINDIR)"
mv share/lua/5.4/orepa "$(LUADIR)"
mv lib/lua/5.4/orepa "$(LIBDIR)"
mv lib/liborepa.so "$(LIBDIR)/orepa"
mv bin/orepa "$(BINDIR)"
mv share/doc/orepa "$(PREFIX)/doc"
cd .. && rm -r installed]],
}
