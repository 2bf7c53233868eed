"""The named networks by their sizes, and the kinds of their blocks. Needs nothing, so that every peer can list them."""

REPARAMS = ("none", "dbb", "orepa", "repvgg", "orepa_vgg")

# Residual blocks of each stage, and whether they are bottlenecks.
RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}

SHALLOW, DEEP = (2, 4, 14, 1), (4, 6, 16, 1)

# Blocks of each stage, the stages' width multipliers, and the groups of every second block.
REPVGGS = {
    "repvgg_a0": (SHALLOW, (0.75, 0.75, 0.75, 2.5), 1),
    "repvgg_a1": (SHALLOW, (1, 1, 1, 2.5), 1),
    "repvgg_a2": (SHALLOW, (1.5, 1.5, 1.5, 2.75), 1),
    "repvgg_b0": (DEEP, (1, 1, 1, 2.5), 1),
}
for name, widths in {"b1": (2, 2, 2, 4), "b2": (2.5, 2.5, 2.5, 5), "b3": (3, 3, 3, 5)}.items():
    for suffix, groups in {"": 1, "g2": 2, "g4": 4}.items():
        REPVGGS[f"repvgg_{name}{suffix}"] = (DEEP, widths, groups)

MODELS = (*RESNETS, *REPVGGS)
