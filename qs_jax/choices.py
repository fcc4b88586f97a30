"""What people choose among, and what counts as a number. Imports nothing heavy: the command line shows these."""

import math
import re
from collections.abc import Iterable
from typing import Any

BITS = (8, 4, 2)
"""The precisions at which Matryoshka codes can be read, finest first."""

FULL = BITS[0]
"""The precision that reads all of a code."""

DTYPES = ("float32", "bfloat16", "float16")
"""The types that weights may have."""

METHODS = ("rtn", "refit", "refit+tune", "gptq", "gptq+tune")
"""How Matryoshka codes are fitted: the first looks at weights alone, the others at text; the last does best."""

CODEBOOK_NAMES = ("even", "companded")
"""How the levels of codes lie: evenly, or nearer to each other where most weights are."""

SCHEMES = ("matryoshka",)
"""How weights may be quantised."""

DRAFTS = ("auto", "lookup", "bits:8", "bits:4", "bits:2", "policy", "lens", "lens:LAYER")
"""What may propose tokens in exact mode."""

DOCUMENTS = ":"
"""Which documents of a text, as a slice, where nobody says: all of them."""


def not_among(name: str, value: Any, values: Iterable[Any]) -> str:
    """What to say of a value that is none of those to choose among."""
    return f"{name} is {value!r}, expected one of {', '.join(map(str, values))}"


def is_whole(value: Any, least: int | None = None) -> bool:
    """Whole numbers of Python and numpy; booleans are not numbers here."""
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    return whole and (least is None or value >= least)


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Numbers between two bounds, infinities among them only where a bound is infinite; not NaN, no booleans."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def is_draft(name: Any) -> bool:
    """Whether something is one of `DRAFTS`, with a number in place of LAYER."""
    return isinstance(name, str) and (name in DRAFTS[:-1] or re.fullmatch(r"lens:[0-9]{1,6}", name) is not None)
