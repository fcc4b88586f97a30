"""The checker that tests put around the package's functions: shapes, dtypes and plain types."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

REFUSING = frozenset(
    {
        *(f"qs_jax.generation.{name}" for name in ("generate", "stream")),
        *(f"qs_jax.evaluation.api.{name}" for name in ("evaluate", "calibrate", "fit_lens")),
        "convert.pipeline.convert",
        "qs_jax.request.prepare",
        *(f"qs_jax.corpus.{name}" for name in ("Corpus.of", "read_documents")),
    }
)
"""What a user's prompts and texts go through before they are looked at: refusing wrong ones, with a message, is its
work."""

# an int where a float is asked for is no mistake (PEP 484)
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Constructors are left alone: JAX rebuilds pytrees with placeholders where the arrays were."""
    if function.__name__ == "__init__" or f"{function.__module__}.{function.__qualname__}" in REFUSING:
        return function
    return _checked(function)
