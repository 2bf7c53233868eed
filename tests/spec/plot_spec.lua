-- orepa.plot: what it draws where, and that nothing in its strings is a command.

local lfs = require "lfs"
local orepa = require "orepa"
local fails = require "tests.spec.fails"
local gnuplot = require "orepa.gnuplot"
local process = require "tests.spec.process"

local place
local function count_files()
  local count = 0
  for name in lfs.dir(place) do count = count + (name:find "^%.+$" and 0 or 1) end
  return count
end

-- The script of a plot, instead of its picture.
local function script_of(given)
  local run, write, script = gnuplot.run, orepa.write_file, nil
  gnuplot.run = function(_, text)
    script = text
    return ""
  end
  orepa.write_file = function() end
  given.path = given.path or "x.png"
  local done, problem = pcall(orepa.plot, given)
  gnuplot.run, orepa.write_file = run, write
  if not done then error(problem, 0) end
  return script
end

local function has(text, part) assert(text:find(part, 1, true), ("%q is not in %s"):format(part, text)) end

describe("plot's script", function()
  it("has the numbers, exactly", function()
    local script = script_of { { y = { 1, 0.1, 1 / 0, -(1 << 40) }, x = { 3, 2, 1, 0 } } }
    has(script, "$series1 << END\n3 1\n2 0.10000000000000001\n1 NaN\n0 -1099511627776\nEND\n")
    has(script, "plot $series1 using 1:2 with lines lw 2 notitle\n")
    has(script_of { orepa.tensor({ 5, 7 }, { dtype = "int64" }) }, "<< END\n1 5\n2 7\nEND")
    has(script_of { 5, 7 }, "<< END\n1 5\n2 7\nEND")
    has(script_of { { 5 }, orepa.ones(1):requires_grad_() }, "$series2 << END\n1 1")
  end)

  it("has axes, labels and sizes", function()
    local script = script_of { { 1, 2 }, title = "a_b", x_label = "step", y_label = "loss", x_log = true, y_range = { 0.5, 3 },
      width = 300, height = 200 }
    for _, part in ipairs { 'set title "a_b"', 'set xlabel "step"', 'set ylabel "loss"', "set logscale x", "set yrange [0.5:3]",
      "size 300,200", "pngcairo noenhanced", "unset key" } do
      has(script, part)
    end
    has(script_of { { 1, 2 }, path = "x.pdf" }, "pdfcairo noenhanced background 'white' size 8.6in,4.8in")
    has(script_of { { y = { 1 }, label = "b" } }, "title \"b\"")
  end)

  it("counts a histogram", function()
    local script = script_of { { y = { 0, 1, 1.5, 4, 4, 0 / 0 }, type = "histogram", bins = 4 } }
    has(script, "<< END\n0.5 1 1\n1.5 2 1\n2.5 0 1\n3.5 2 1\nEND\n")
    has(script_of { { y = { 7, 7 }, type = "histogram", bins = 1 } }, "<< END\n7 2 1\nEND")
  end)

  it("puts bars of several series side by side, at names", function()
    local script = script_of { { y = { 1, 2 }, x = { "a", "50% of 'b'" }, type = "bars" },
      { y = { 3, 4 }, x = { "c", "a" }, type = "bars" } }
    has(script, 'set xtics ("a" 1, "50\\045\\045 of \\047b\\047" 2, "c" 3)')
    has(script, "$series1 << END\n0.80000000000000004 1 0.40000000000000002\n1.8 2 0.40000000000000002\nEND")
    has(script, "$series2 << END\n3.2000000000000002 3 0.40000000000000002\n1.2 4 0.40000000000000002\nEND")
    has(script_of { { y = { 1, 2 }, x = { 10, 20 }, type = "bars" } }, "10 1 8\n20 2 8")
  end)

  it("holds no command but its own", function()
    assert.equal([["it\047s \140date\140 \100x \044y \042 \134 "]], gnuplot.quoted "it's `date` @x $y \" \\\n")
    assert.equal('"a b c"', gnuplot.quoted "a\0b\rc")
    assert.equal([["\303\274"]], gnuplot.quoted "ü")
  end)
end)

describe("plot", function()
  it("is refused in words", function()
    fails("plot: a table of series and options expected, got nil", orepa.plot)
    fails("plot: there is no series", orepa.plot, {})
    fails("plot: unknown option 'titel'", orepa.plot, { { 1 }, titel = "x" })
    fails("plot: series 2: unknown option 'z'", orepa.plot, { { 1 }, { y = { 1 }, z = 3 } })
    fails("plot: series 1: option 'y' is missing", orepa.plot, { { x = { 1 } } })
    fails("series 1: y: element 2 is a string, a number expected", orepa.plot, { { 1, "2" } })
    fails("series 1: y: a tensor of one dimension expected, got 2x2", orepa.plot, { orepa.ones(2, 2) })
    fails("series 1: y: numbers expected, got bools", orepa.plot, { orepa.tensor { true } })
    fails("series 1: 1 numbers x and 2 numbers y", orepa.plot, { { x = { 1 }, y = { 1, 2 } } })
    fails("series 1: type is pie; there are bars, histogram, line, points", orepa.plot, { { y = { 1 }, type = "pie" } })
    fails("series 1: there is no number", orepa.plot, { {} })
    fails("series 1: x: element 2 is a number, a string expected", orepa.plot, { { x = { "a", 2 }, y = { 1, 2 } } })
    fails("bins is 0", orepa.plot, { { y = { 1 }, type = "histogram", bins = 0 } })
    fails("bins are a histogram's", orepa.plot, { { y = { 1 }, bins = 3 } })
    fails("a histogram has no x", orepa.plot, { { y = { 1 }, x = { 1 }, type = "histogram" } })
    fails("path 'x.gif': it ends in .png, .svg or .pdf", orepa.plot, { { 1 }, path = "x.gif" })
    fails("y_log: true or false expected", orepa.plot, { { 1 }, y_log = 2 })
    fails("x_range: {low, high} expected", orepa.plot, { { 1 }, x_range = { 1 } })
    fails("width is 3", orepa.plot, { { 1 }, width = 3 })
    fails("a file and a window", orepa.plot, { { 1 }, path = "x.png", window = true })
    fails("title: a string expected", orepa.plot, { { 1 }, title = {} })
  end)

  it("says which package is missing", function()
    local text = process.run({ "-e", 'print(pcall(require("orepa").plot, {{1, 2}}))' }, nil, { PATH = "/nowhere" })
    has(text, "gnuplot is not installed (Debian's package gnuplot-nox")
  end)

  it("says where there is no window", function()
    local text = process.run({ "-e", 'print(pcall(require("orepa").plot, {{1, 2}, window = true}))' }, nil,
      { DISPLAY = "", WAYLAND_DISPLAY = "" })
    has(text, "there is no display for a window")
  end)
end)

describe("plot through gnuplot", function()
  if not gnuplot.is_there() then return it("draws", function() pending "gnuplot is not installed" end) end
  setup(function() place = process.folder() end)
  teardown(function() process.remove(place) end)

  local everything = { { y = { 3, 1, 0.5, 0 / 0, 0.2 }, label = "loss's" },
    { y = orepa.rand(5), type = "points", label = "größer" }, { y = { 1, 2 }, type = "bars" },
    { y = orepa.randn(100), type = "histogram" }, title = "all\nof it", y_label = "`y`" }

  it("draws files of each kind", function()
    for ending, start in pairs { png = "\x89PNG", svg = "<?xml", pdf = "%PDF" } do
      local path = place .. "/a." .. ending
      everything.path = path
      orepa.plot(everything)
      assert.equal(start, process.read(path):sub(1, #start))
    end
    assert.same({ 3, 480, 860 }, orepa.image.load(place .. "/a.png").shape)
    local svg = process.read(place .. "/a.svg")
    for _, part in ipairs { "all of it", "loss's", "`y`", "größer" } do has(svg, part) end
    assert.equal(3, count_files())
  end)

  it("draws what it is told: a line rises", function()
    local path = place .. "/line.png"
    orepa.plot { { 0, 1 }, path = path, width = 200, height = 200 }
    local picture = orepa.image.load(path):to "float32"
    local function coloured(t) return (t[1] - t[2]):abs():sum():item() end -- violet: gray has as much red as green
    local left, right = picture:slice(3, 60, 90), picture:slice(3, 150, 180)
    assert.is_true(coloured(left:slice(2, 110, 199)) > 100 and coloured(left:slice(2, 1, 90)) == 0)
    assert.is_true(coloured(right:slice(2, 1, 90)) > 100 and coloured(right:slice(2, 110, 199)) == 0)
  end)

  it("leaves the old file where it fails", function()
    local path = place .. "/old.png"
    process.write(path, "old")
    local before = count_files()
    fails("gnuplot could not draw: all points y value undefined!", orepa.plot, { { -1, -2 }, y_log = true, path = path })
    fails("no file can be made in", orepa.plot, { { 1, 2 }, path = place .. "/none/x.png" })
    assert.equal("old", process.read(path))
    assert.equal(before, count_files())
  end)

  it("does nothing that a string says", function()
    local victim = place .. "/victim"
    local nasty = ("'; system('touch V'); ` touch V` $(touch V) \" @x\n!touch V\nEND\n'"):gsub("V", victim)
    orepa.plot { { y = { 1, 2 }, label = nasty }, { y = { 1, 2 }, x = { nasty, "b" }, type = "bars" }, title = nasty,
      x_label = nasty, y_label = nasty, path = place .. "/n'as ty$(touch victim).svg" }
    assert.is_nil(lfs.attributes(victim))
    assert.is_nil(lfs.attributes "victim")
    assert.is_truthy(lfs.attributes(place .. "/n'as ty$(touch victim).svg"))
  end)

  it("draws characters where there is no terminal", function()
    local text, code = process.run { "-e", 'require("orepa").plot{{1, 4, 9}, title = "squares"}' }
    assert.equal(0, code)
    has(text, "squares")
    assert.is_nil(text:find "[\27\f]")
    local lines = select(2, text:gsub("\n", ""))
    assert.is_true(lines >= 18 and lines <= 24 and text:find "%*%*%*" ~= nil)
  end)

  it("leaves no file of its own behind", function()
    local path = place .. "/last.png"
    local names, tmpname = {}, os.tmpname
    os.tmpname = function() -- luacheck: ignore
      names[#names + 1] = tmpname()
      return names[#names]
    end
    orepa.plot { { 1, 2 }, path = path }
    pcall(orepa.plot, { { -1, -2 }, y_log = true, path = path })
    os.tmpname = tmpname -- luacheck: ignore
    assert.equal(4, #names)
    for _, name in ipairs(names) do assert.is_nil(lfs.attributes(name)) end
  end)
end)
