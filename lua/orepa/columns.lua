-- columns: numbers as people read them, and rows of words as a table.

local columns = {}

-- 11,689,512
function columns.grouped(n)
  local text = tostring(n):reverse():gsub("(%d%d%d)", "%1,"):reverse()
  return (text:gsub("^,", ""):gsub("^%-,", "-"))
end

local function scaled(n, step, units, digits)
  local k = 1
  while math.abs(n) >= step and k < #units do n, k = n / step, k + 1 end
  return (k == 1 and "%g%s" or digits):format(n, units[k])
end

-- 1.814 G
function columns.short(n)
  return scaled(n, 1000, { "", " k", " M", " G", " T", " P" }, "%.4g%s")
end

-- 12.3 MiB
function columns.bytes(n)
  return scaled(n, 1024, { " B", " KiB", " MiB", " GiB", " TiB" }, "%.1f%s")
end

local function width_of(text)
  return utf8.len(text) or #text
end

-- Rows of words as text, each column as wide as its widest word. The first `left` columns begin at the left, the others end at
-- the right.
function columns.text(rows, left)
  local widths, lines = {}, {}
  for _, row in ipairs(rows) do
    for k, word in ipairs(row) do widths[k] = math.max(widths[k] or 0, width_of(word)) end
  end
  for n, row in ipairs(rows) do
    local words = {}
    for k, word in ipairs(row) do
      local space = (" "):rep(widths[k] - width_of(word))
      words[k] = k <= left and word .. space or space .. word
    end
    lines[n] = table.concat(words, "  "):gsub("%s+$", "")
  end
  return table.concat(lines, "\n")
end

return columns
