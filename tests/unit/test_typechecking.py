"""The checker that the tests put around all of the package: it sees wrong types and shapes, on every floor."""

import pkgutil
from collections.abc import Callable
from inspect import iscoroutinefunction, isfunction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import convert
import qs_jax
from qs_jax import files
from qs_jax.engine.sampling import most_likely
from qs_jax.errors import GenerationError
from qs_jax.evaluation.statistics import perplexity
from qs_jax.lens import Lens
from qs_jax.models.rope import inverse_frequencies
from tests.modules import modules_of
from tests.tiny import tiny_model
from tests.typechecking import REFUSING


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (files.read_json, ("a string is no path",)),
        (most_likely, (jnp.zeros(3),)),
        (most_likely, (jnp.zeros((2, 3), jnp.int32),)),
        (perplexity, ("x",)),
        (inverse_frequencies, (None, 8)),
        (Lens.load, (None, tiny_model("gpt2").config)),
    ],
)
def test_what_is_wrong_is_seen(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeCheckError):
        function(*arguments)


def test_a_result_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "with_name", lambda self, name: name)
    with pytest.raises(TypeCheckError):
        files._partial(Path("a"))


@pytest.mark.parametrize("name", sorted(REFUSING))
def test_those_left_alone_are_there(name: str) -> None:
    assert callable(pkgutil.resolve_name(name))


def test_and_refuse_in_words_of_their_own() -> None:
    prompts: Any = [[1.5]]
    for function in (qs_jax.generate, qs_jax.stream):
        with pytest.raises(GenerationError, match="from 0 to"):
            function(tiny_model("gpt2"), prompts)
    with pytest.raises(TypeCheckError):
        qs_jax.load(3)  # pyright: ignore[reportArgumentType]


def test_no_module_escapes_it() -> None:
    """Every function with annotations carries jaxtyping's wrapper, but coroutines, which it leaves alone."""
    loose = []
    for package in (qs_jax, convert):
        for module in modules_of(package):
            name = module.__name__
            own = [v for v in vars(module).values() if callable(v) and getattr(v, "__module__", "") == name]
            functions = [f for f in own if isfunction(f) and f.__annotations__ and not iscoroutinefunction(f)]
            loose += [f"{name}.{f.__name__}" for f in functions if not hasattr(f, "__wrapped__")]
    assert loose == []
