"""Options that several commands share, so that their names, texts and defaults cannot drift."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from qs_jax.console import aside

ModelArgument = Annotated[str, typer.Argument(help="Converted folder, Hugging Face folder, or hub id.")]
PolicyOption = Annotated[str, typer.Option("--policy", help="Mechanisms: off, paper, balanced, or a policy file.")]
Bits = Annotated[int | None, typer.Option(help="8, 4 or 2: precision of Matryoshka weights for every token.")]

_LOADING: dict[str, tuple[Any, Any]] = {
    "dtype": (
        Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default what suits the device.")],
        None,
    ),
    "revision": (Annotated[str | None, typer.Option(help="Branch, tag or commit, for a hub id.")], None),
    "verify": (
        Annotated[bool, typer.Option("--verify/--no-verify", help="Check a converted folder against its checksums.")],
        True,
    ),
}
_PRINTING: dict[str, tuple[Any, Any]] = {
    "json": (Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks.")], False),
}


@dataclass(frozen=True)
class Common:
    """How a command loads its model (arguments of `qs_jax.load`), and how it prints."""

    loading: dict[str, Any]
    json: bool
    debug: bool


def load_model(name: str, common: Common) -> Any:
    """The model, as `qs_jax.load` returns it; what was supplied or chosen in its files is said on stderr."""
    from qs_jax.loading import load

    model = load(name, **common.loading)
    for note in model.notes:
        aside(f"note: {note}")
    return model


def common_options(*, loads: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command `--json` and `--debug` and, if it `loads` a model, how; all arrive as its argument `common`."""
    added = {**(_LOADING if loads else {}), **_PRINTING}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "common"]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for name, (kind, default) in added.items()
        ]
        signature = inspect.Signature([*own, *shared])

        @wraps(command)
        def run(*positional: Any, **named: Any) -> None:
            bound = signature.bind(*positional, **named)
            bound.apply_defaults()
            given = dict(bound.arguments)
            loading = {name: given.pop(name) for name in _LOADING if name in added}
            common = Common(loading, **{name: given.pop(name) for name in _PRINTING})
            command(**given, common=common)

        # typer reads both of these
        run.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *shared)}
        return run

    return decorate
