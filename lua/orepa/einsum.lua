-- orepa.einsum: sums of products, written as letters. Each pair of operands becomes one batched matrix product.

local core = require "orepa.core"
local document = require "orepa.document"

local function fail(equation, ...)
  core.fail(('einsum "%s": %s'):format(equation, string.format(...)))
end

-- A factor: a tensor and the letter of each of its dimensions.
local function factor(tensor, letters)
  return { tensor = tensor, letters = letters }
end

local function position(letters, letter)
  for d, other in ipairs(letters) do
    if other == letter then return d end
  end
end

-- ---- reading the equation ----

local function letters_of(equation, part)
  local letters = {}
  for letter in part:gmatch "." do
    if not letter:find "%a" then fail(equation, "'%s' is no letter", letter) end
    letters[#letters + 1] = letter
  end
  return letters
end

-- Letters that stand once, in their order: what the result has if the equation doesn't say.
local function single_letters(inputs)
  local count, all, letters = {}, {}, {}
  for _, input in ipairs(inputs) do
    for _, letter in ipairs(input) do
      count[letter] = (count[letter] or 0) + 1
      all[#all + 1] = letter
    end
  end
  table.sort(all)
  for _, letter in ipairs(all) do
    if count[letter] == 1 then letters[#letters + 1] = letter end
  end
  return letters
end

local function read(equation)
  local bare = equation:gsub("%s", "")
  local left, right = bare:match "^([^>]*)%->([^>]*)$"
  left = left or bare
  local inputs = {}
  for part in (left .. ","):gmatch "([^,]*)," do inputs[#inputs + 1] = letters_of(equation, part) end
  local output = right and letters_of(equation, right) or single_letters(inputs)
  for d, letter in ipairs(output) do
    local known = position(output, letter) == d
    local found = false
    for _, input in ipairs(inputs) do found = found or position(input, letter) ~= nil end
    if not known then fail(equation, "'%s' stands twice in the result", letter) end
    if not found then fail(equation, "'%s' of the result is in no operand", letter) end
  end
  return inputs, output
end

local function check_operands(equation, inputs, tensors)
  if #tensors ~= #inputs then fail(equation, "%d operands are named, %d given", #inputs, #tensors) end
  local sizes = {}
  for n, letters in ipairs(inputs) do
    local t = tensors[n]
    if not core.is_tensor(t) then fail(equation, "operand %d is a %s, not a tensor", n, type(t)) end
    if #t.shape ~= #letters then
      fail(equation, "operand %d has %d dimensions (%s), its letters are '%s'", n, #t.shape, table.concat(t.shape, "x"),
        table.concat(letters))
    end
    for d, letter in ipairs(letters) do
      local size = sizes[letter] or t.shape[d]
      if size ~= t.shape[d] then
        fail(equation, "'%s' is %d in operand %d and %d before", letter, t.shape[d], n, size)
      end
      sizes[letter] = size
    end
  end
  return sizes
end

-- ---- factors ----

local function permuted(f, letters)
  local order, same = {}, true
  for d, letter in ipairs(letters) do
    order[d] = position(f.letters, letter)
    same = same and order[d] == d
  end
  return same and f.tensor or f.tensor:permute(order)
end

-- A letter that stands twice names a diagonal: every (size + 1)th element of both dimensions as one.
local function without_repeats(f)
  for d, letter in ipairs(f.letters) do
    local first = position(f.letters, letter)
    if first ~= d then
      local order, shape, letters = {}, {}, {}
      for k, other in ipairs(f.letters) do
        if k ~= d and k ~= first then
          order[#order + 1], shape[#shape + 1], letters[#letters + 1] = k, f.tensor.shape[k], other
        end
      end
      local size = f.tensor.shape[d]
      table.move({ first, d }, 1, 2, #order + 1, order)
      shape[#shape + 1], letters[#letters + 1] = size * size, letter
      local rows = f.tensor:permute(order):reshape(shape)
      if size > 0 then rows = rows:slice(#shape, 1, -1, size + 1) end
      return without_repeats(factor(rows, letters))
    end
  end
  return f
end

-- Without the letters that nothing else has.
local function summed(f, needed)
  local dims, letters = {}, {}
  for d, letter in ipairs(f.letters) do
    if needed[letter] then letters[#letters + 1] = letter else dims[#dims + 1] = d end
  end
  return #dims == 0 and f or factor(f.tensor:sum(dims), letters)
end

-- Letters that a later factor or the result has.
local function needed_after(factors, first, output)
  local needed = {}
  for _, letter in ipairs(output) do needed[letter] = true end
  for n = first, #factors do
    for _, letter in ipairs(factors[n].letters) do needed[letter] = true end
  end
  return needed
end

-- The letters of two factors by what becomes of them.
local function roles(a, b, needed)
  local both, left, right, contracted = {}, {}, {}, {}
  for _, letter in ipairs(a.letters) do
    local list = not position(b.letters, letter) and left or needed[letter] and both or contracted
    list[#list + 1] = letter
  end
  for _, letter in ipairs(b.letters) do
    if not position(a.letters, letter) then right[#right + 1] = letter end
  end
  return both, left, right, contracted
end

local function joined(...)
  local all = {}
  for _, list in ipairs { ... } do table.move(list, 1, #list, #all + 1, all) end
  return all
end

local function product(a, b, needed, sizes)
  local both, left, right, contracted = roles(a, b, needed)
  local function size(letters)
    local count = 1
    for _, letter in ipairs(letters) do count = count * sizes[letter] end
    return count
  end
  local x = permuted(a, joined(both, left, contracted)):reshape(size(both), size(left), size(contracted))
  local y = permuted(b, joined(both, contracted, right)):reshape(size(both), size(contracted), size(right))
  local letters, shape = joined(both, left, right), {}
  for d, letter in ipairs(letters) do shape[d] = sizes[letter] end
  return factor(x:matmul(y):reshape(shape), letters)
end

function core.einsum(equation, ...)
  if type(equation) ~= "string" then core.fail(("einsum: an equation expected, got %s"):format(type(equation))) end
  local inputs, output = read(equation)
  local sizes = check_operands(equation, inputs, { ... })
  local factors = {}
  for n, letters in ipairs(inputs) do factors[n] = without_repeats(factor((select(n, ...)), letters)) end
  local result = factors[1]
  for n = 2, #factors do
    result = summed(result, needed_after(factors, n, output)) -- what nothing else has is summed before the product
    local beside = needed_after({ result, table.unpack(factors, n + 1) }, 1, output)
    result = product(result, summed(factors[n], beside), needed_after(factors, n + 1, output), sizes)
  end
  result = summed(result, needed_after(factors, #factors + 1, output))
  return permuted(result, output)
end

document("orepa.einsum", [[
  einsum(equation, tensors...) -> tensor
  The sum of products that an equation names by letters, one for each dimension: operands separated by commas, "->", and the
  letters of the result in their order; letters that it lacks are summed over. Without "->" the result has the letters that
  stand once, by the alphabet. A letter that stands twice in an operand is its diagonal. Operands are multiplied from left to
  right, as matrix products.
  > orepa.einsum("ik,kj->ij", orepa.ones(2, 3), orepa.ones(3, 4))
  > orepa.einsum("bci,bcj->bij", orepa.randn(2, 5, 3), orepa.randn(2, 5, 4))
  > orepa.einsum("ii", orepa.eye(3))]])
