-- Memory that runs out: calls of every family with each of their allocations failing in turn, and random calls with failing
-- ones, in a program whose allocations can be made to fail; tensors until the limit at the prompt.

local process = require "tests.spec.process"

local again = os.getenv "OREPA_AGAIN" and not os.getenv "ASAN_OPTIONS" -- other kernels: nothing new

local function failing(what)
  local build = process.program:match "^(.*)/[^/]*$"
  local path = build .. "/share/lua/5.4/?.lua;" .. build .. "/share/lua/5.4/?/init.lua"
  local text, code = process.run({ process.root .. "/tests/spec/failing_allocations.lua", what }, nil, nil,
    "env LUA_PATH='" .. path .. "' " .. build .. "/tests/failing")
  assert(code == 0, text)
  return tonumber(text:match "(%d+) errors")
end

describe("an allocation that fails", function()
  if again then return end

  it("is an error that says so, wherever it is, and changes and loses nothing", function()
    assert.is_true(failing "calls" > 5000)
  end)

  it("in one of random calls leaves the others right", function()
    assert.is_true(failing "sequences" > 500)
  end)
end)

it("tensors that are kept until memory is full end in an error, and the session goes on", function()
  local text = process.run_text([[
local orepa = require "orepa"
orepa.set_memory_limit(5 << 29)
local kept, message = {}
for k = 1, 100 do
  local ok, t = pcall(orepa.ones, 1 << 28)
  if not ok then message = t break end
  kept[k] = t
end
print(#kept, message)
kept = nil
do
  local again <close> = orepa.ones(1 << 28)
  print(again:sum():item(), orepa.memory().live < (1 << 30) + (1 << 20))
end
orepa.empty_cache()
print(orepa.memory().cached)
]])
  local count, message = text:match "^(%d+)\t([^\n]*)"
  assert.equal("2", count)
  assert.matches("out of memory", message)
  assert.matches("\n268435456.0\ttrue\n0", text)
end)
