"""The checker that tests put around the package's functions: shapes, dtypes and plain types."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# an int where a float is asked for is no mistake (PEP 484)
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Constructors are left alone: JAX rebuilds pytrees with placeholders where the arrays were."""
    return function if function.__name__ == "__init__" else _checked(function)
