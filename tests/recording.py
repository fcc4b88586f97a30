"""Which jitted programs a piece of work runs, and with what: seen from outside, whatever the engine's inside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.core import Tracer

import qs_jax
from tests.modules import modules_of


@dataclass(frozen=True)
class Call:
    """One call of a jitted program: its name below `qs_jax`, and its arguments with shapes in place of arrays."""

    name: str
    program: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def lower(self, platform: str = "cpu") -> Any:
        return self.program.trace(*self.args, **self.kwargs).lower(lowering_platforms=(platform,))


def jitted_programs() -> dict[str, tuple[Any, list[tuple[Any, str]]]]:
    """Every jitted function of the package by its name at home, and the (module, attribute) pairs it goes by."""
    found: dict[int, tuple[Any, list[tuple[Any, str]]]] = {}
    for module in modules_of(qs_jax):
        for attribute, value in vars(module).items():
            if isinstance(value, jax.stages.Wrapped):
                found.setdefault(id(value), (value, []))[1].append((module, attribute))
    named = {}
    for value, places in found.values():
        module, attribute = next((p for p in places if p[0].__name__ == value.__module__), places[0])
        named[f"{module.__name__.removeprefix('qs_jax.')}.{attribute}"] = (value, places)
    return named


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls made from outside other programs while the block runs."""
    calls: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, (program, places) in jitted_programs().items():
            for module, attribute in places:
                patch.setattr(module, attribute, _recorder(name, program, calls))
        yield calls


def _recorder(name: str, program: Any, calls: list[Call]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            args_seen, kwargs_seen = jax.tree.map(_shape_of, (args, kwargs))
            calls.append(Call(name, program, args_seen, kwargs_seen))
        return program(*args, **kwargs)

    return call


def _shape_of(leaf: Any) -> Any:
    """Arrays may be donated to the call: what is kept of them is their shape."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array | np.ndarray) else leaf
