"""Quality where the model follows itself: how long it agrees with the dense model, and whether it repeats itself."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from qs_jax.adaptive.policy import Policy
from qs_jax.evaluation.windows import Window
from qs_jax.generation import generate
from qs_jax.model import Model

_REPEATED = 4


def free_run(
    model: Model, windows: Sequence[Window], policy: Policy, *, prompts: int = 8, new_tokens: int = 64
) -> dict[str, Any]:
    """Continue the windows' prefixes greedily with and without a policy.

    Returns:
        `agreement_length`: tokens until the first difference, on average; for both, `repetition`, the share of
        4-grams that have occurred in the row before, and `distinct_1`, `distinct_2` (Li et al. 2016,
        arXiv 1510.03055), different n-grams per n-gram over all rows.
    """
    starts = [window.prompt for window in windows[:prompts]]
    settings = {"max_new_tokens": new_tokens, "eos_token_id": []}
    rows = {
        name: generate(model, starts, policy=choice, **settings).tokens
        for name, choice in (("off", Policy.off()), ("policy", policy))
    }
    lengths = [agreement(*pair) for pair in zip(rows["off"], rows["policy"], strict=True)]
    return {
        "prompts": len(starts),
        "new_tokens": new_tokens,
        "agreement_length": float(np.mean(lengths)),
        **{name: variety(tokens) for name, tokens in rows.items()},
    }


def agreement(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens up to the first difference."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def variety(rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Repetition and distinct-n of some rows of tokens."""
    repeated = [sum(Counter(grams(row, _REPEATED)).values()) - len(set(grams(row, _REPEATED))) for row in rows]
    total = sum(len(grams(row, _REPEATED)) for row in rows)
    distinct = {}
    for n in (1, 2):
        every = [gram for row in rows for gram in grams(row, n)]
        distinct[f"distinct_{n}"] = len(set(every)) / len(every) if every else 0.0
    return {"repetition": sum(repeated) / total if total else 0.0, **distinct}


def grams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n tokens."""
    return [tuple(row[start : start + n]) for start in range(len(row) - n + 1)]
