std = "lua54"
max_line_length = 130
files["tests/spec"] = { std = "+busted" }
