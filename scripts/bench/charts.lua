-- Charts of numbers, drawn by gnuplot as SVG: on a transparent ground, in colours that are read on white and on black; or as PNG,
-- on white, where the path ends in .png.

local gnuplot = require "orepa.gnuplot"
local measure = require "measure"
local orepa = require "orepa"

local charts = { can_draw = gnuplot.is_there }
local quoted = gnuplot.quoted

local TEXT, LINES = "#808890", "#90808080"
local OURS, OTHERS = 0x3b82f6, 0x8b949e
local SERIES = { "#3b82f6", "#e8590c", "#2f9e44", "#ae3ec9", "#8b949e", "#d6336c" }

-- `lines` are gnuplot's, after what all charts have in common.
local function draw(path, height, lines)
  local terminal = path:find "%.png$" and "pngcairo" or "svg"
  local size = terminal == "svg" and 13 or 10
  local head = { ("set terminal %s size 860,%d font 'sans-serif,%d' noenhanced"):format(terminal, height, size),
    ("set border 3 lc rgb '%s'"):format(LINES), ("set tics nomirror textcolor rgb '%s'"):format(TEXT),
    ("set grid lc rgb '%s'"):format(LINES) }
  orepa.write_file(path, gnuplot.run(path, table.concat(measure.append(head, lines), "\n") .. "\n"))
end

-- A horizontal bar for each of `rows`, {label, summary, is_ours}, with its quartiles; `unit` is written under the axis, which
-- begins at `from` (0).
function charts.bars(path, rows, unit, from)
  from = from or 0
  local lines = { "$rows << END" }
  for k, row in ipairs(rows) do
    local s = row[2]
    lines[k + 1] = ('%d "%s" %.6g %.6g %.6g %d'):format(k, row[1], s.median, s.lower, s.upper, row[3] and OURS or OTHERS)
  end
  draw(path, 80 + 24 * #rows, measure.append(lines, { "END", "unset key", "set grid noytics",
    ("set xrange [%.6g:*]"):format(from), ("from = %.6g"):format(from),
    ("set yrange [%d.5:0.5]"):format(#rows), "set offsets graph 0, graph 0.12, 0, 0",
    ("set xlabel %s textcolor rgb '%s'"):format(quoted(unit), TEXT),
    "plot $rows using ((from+$3)/2):1:(($3-from)/2):(0.36):6:ytic(2) with boxxyerror fill solid noborder lc rgb variable \\",
    "  notitle, \\",
    ("  '' using 3:1:4:5 with xerrorbars pt 0 lc rgb '%s' notitle, \\"):format(TEXT),
    ("  '' using 5:1:(sprintf('%%.4g', $3)) with labels left offset 0.8,0 textcolor rgb '%s' notitle"):format(TEXT) }))
end

-- A line for each name among `points`, {name, {x, y}}; x doubles from mark to mark, or is linear.
function charts.lines(path, points, x_name, y_name, linear)
  local names, lines, plots = {}, {}, {}
  for k, point in ipairs(points) do names[k] = { text = point[1] } end
  for k, name in ipairs(measure.distinct(names)) do
    lines[#lines + 1] = ("$series%d << END"):format(k)
    for _, point in ipairs(points) do
      if point[1] == name.text then lines[#lines + 1] = ("%.6g %.6g"):format(point[2][1], point[2][2]) end
    end
    lines[#lines + 1] = "END"
    plots[k] = ("$series%d using 1:2 with linespoints pt 7 ps 0.6 lw 2 lc rgb '%s' title %s"):format(k,
      SERIES[(k - 1) % #SERIES + 1], quoted(name.text))
  end
  draw(path, 380, measure.append(lines, { linear and "set xtics 1" or "set logscale x 2", "set yrange [0:*]",
    ("set key outside textcolor rgb '%s'"):format(TEXT), ("set xlabel %s textcolor rgb '%s'"):format(quoted(x_name), TEXT),
    ("set ylabel %s textcolor rgb '%s'"):format(quoted(y_name), TEXT), "plot " .. table.concat(plots, ", ") }))
end

-- Square matrices of numbers from -1 to 1 as coloured maps, {title, names, matrix}, `across` of them side by side.
function charts.maps(path, maps, across)
  local down = math.ceil(#maps / across)
  local lines = { ("set multiplot layout %d,%d"):format(down, across), "unset key", "unset grid", "set size square",
    "set cbrange [-1:1]", "set palette defined (-1 '#2f6fde', 0 '#f2f2f2', 1 '#d9480f')", "set xtics rotate by 45 right" }
  for k, map in ipairs(maps) do
    local tics = {}
    for n, name in ipairs(map.names) do tics[n] = ("%s %d"):format(quoted(name), n - 1) end
    lines[#lines + 1] = ("$map%d << END"):format(k)
    for _, row in ipairs(map.matrix) do
      local numbers = {}
      for n, value in ipairs(row) do numbers[n] = ("%.4g"):format(value) end
      lines[#lines + 1] = table.concat(numbers, " ")
    end
    measure.append(lines, { "END", ("set title %s textcolor rgb '%s'"):format(quoted(map.title), TEXT),
      ("set xtics (%s) textcolor rgb '%s'"):format(table.concat(tics, ", "), TEXT),
      ("set ytics (%s) textcolor rgb '%s'"):format(table.concat(tics, ", "), TEXT),
      ("set yrange [%g:-0.5]"):format(#map.matrix - 0.5), ("set xrange [-0.5:%g]"):format(#map.matrix - 0.5),
      ("plot $map%d matrix with image"):format(k) })
  end
  draw(path, 240 * down, measure.append(lines, { "unset multiplot" }))
end

return charts
