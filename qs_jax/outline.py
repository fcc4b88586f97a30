"""Functions that a compiled program calls, where it would otherwise hold a copy for every use."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array


def outlined(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function, traced and compiled once for all its uses in a program that are alike, and called there. For CPU.

    XLA inlines every call, then optimises thirty equal functions and holds them in memory thirty times. It keeps a call
    that is marked as here and compiles what is called as a unit of its own; an XLA that does not know the second mark
    passes over it. On a GPU a call that is left means something else: choose by platform before.

    Args:
        function: of pytrees, all given by position, to one array; of several, XLA (jax 0.10) fails within a
            conditional. What is static in the pytrees tells uses apart, as shapes do.
    """

    @jax.jit
    @wraps(function)
    def body(*args: Any) -> Array:
        with set_xla_metadata(inlineable=None, compilation_unit=None):  # calls within are inlined as ever
            return function(*args)

    @wraps(function)
    def call(*args: Any) -> Array:
        with set_xla_metadata(inlineable="false", compilation_unit=function.__name__):
            return body(*args)

    return call
