"""Defaults of a conversion, of the function and of the command alike. Imports nothing heavy: `--help` shows them."""

DTYPE = "float32"
"""In which weights are stored."""

CALIBRATION_TOKENS = 16384
"""Of the text on which codes are fitted."""

GROUP_SIZE = 64
"""Inputs that share a scale and an offset."""

CODEBOOK = "even"
