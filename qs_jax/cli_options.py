"""Options of `qs-jax` and `qs-convert`: those that several commands share, and those with choices.

So that their names, texts and choices stand once. Commands annotate what they take with plain types: `OneOf` becomes an
enumeration that typer shows and checks, and its members plain values again before the command sees them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

import qs_jax
from qs_jax.adaptive.policy import KvRuleName, StateSignalName
from qs_jax.choices import BITS, CODEBOOK_NAMES, DRAFTS, DTYPES, METHODS, SCHEMES
from qs_jax.console import aside, own_stdout, run_command
from qs_jax.hosts import Hosts, is_first, join


@dataclass(frozen=True)
class OneOf:
    """Beside a type in `Annotated`: the values that an option may have."""

    values: tuple[Any, ...]


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Converted folder, Hugging Face folder, .gguf file, or hub id.")
]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy",
        help="Mechanisms: off, paper (costs much), balanced (safe, saves little), or a policy file: calibrate.",
    ),
]
Bits = Annotated[int | None, OneOf(BITS), typer.Option(help="Precision of Matryoshka weights for every token.")]
Exact = Annotated[
    bool, typer.Option("--exact", help="Same text as without, faster where drafts of it are often right: --draft.")
]
DraftOption = Annotated[
    list[str] | None,
    typer.Option(
        "--draft",
        metavar="DRAFT",
        help=f"With --exact: {', '.join(DRAFTS)}; the first unless given; repeat for a cascade.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a hub id.")]

Text = Annotated[
    str, typer.Option("--text", help="Text to study on: txt, json, jsonl (.xz, .gz), or wikitext-103, wikitext-2, c4.")
]
Documents = Annotated[str, typer.Option(help="Which documents of the text, as a slice: 0:500, 500:, -100:.")]
Prefix = Annotated[
    int | None,
    typer.Option(
        help="Unscored tokens before each window; 0 scores every token. Default: 512, or the power of 2 that fits."
    ),
]
WindowOption = Annotated[int, typer.Option("--window", help="Scored tokens per window.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to take, spread over the text.")]
Batch = Annotated[int, typer.Option(help="Windows run together; 1 shows what decoding alone saves.")]
Signal = Annotated[str, OneOf(get_args(StateSignalName)), typer.Option(help="What halting looks at.")]
KvRuleOption = Annotated[
    str | None,
    OneOf(get_args(KvRuleName)),
    typer.Option(
        "--kv-rule",
        help="What deeper layers see of halted tokens; by default as the model's lens says, else frozen.",
    ),
]

Dtype = Annotated[str, OneOf(DTYPES), typer.Option(help="In which weights are stored.")]
Scheme = Annotated[
    str | None, OneOf(SCHEMES), typer.Option(help="Codes that can be read at 8, 4 or 2 bits (see --method).")
]
Method = Annotated[
    str | None,
    OneOf(METHODS),
    typer.Option(help="With --quantize: all but rtn need text; gptq+tune is the default where there is text."),
]
Codebook = Annotated[
    str,
    OneOf(CODEBOOK_NAMES),
    typer.Option(help="With --quantize: companded is nearer at 4 and 2 bits, and more to compute."),
]

Added = dict[str, tuple[Any, Any]]
"""Options that commands get without naming them: what they are, and their defaults."""

_LOADING: Added = {
    "dtype": (
        Annotated[str | None, OneOf(DTYPES), typer.Option(help="Of the weights; by default what suits the device.")],
        None,
    ),
    "revision": (Revision, None),
    "verify": (
        Annotated[bool, typer.Option("--verify/--no-verify", help="Check a converted folder against its checksums.")],
        True,
    ),
    "mesh": (
        Annotated[
            str | None,
            typer.Option(metavar="MESH", help="Several devices: data=2,model=4 divides rows among 2, layers among 4."),
        ],
        None,
    ),
}
_JOINING: Added = {
    "distributed": (
        Annotated[
            bool, typer.Option("--distributed", help="One of several processes, each on its host; the first prints.")
        ],
        False,
    ),
    "coordinator": (
        Annotated[
            str | None,
            typer.Option(metavar="HOST:PORT", help="Where the first process is; else as the environment says."),
        ],
        None,
    ),
    "processes": (Annotated[int | None, typer.Option(min=1, help="How many there are, likewise.")], None),
    "process": (Annotated[int | None, typer.Option(min=0, help="Which this one is, from 0, likewise.")], None),
}
_PRINTING: Added = {
    "json": (Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")], False),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks.")], False),
}


def _show_version(asked: bool) -> bool:
    if asked:
        print(f"qs_jax {qs_jax.__version__}")
        raise typer.Exit
    return asked


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
]


class Command(TyperCommand):
    """A command whose errors are one line."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        run_command(super().main, *arguments, **settings)


class Commands(TyperGroup):
    """Commands whose errors are one line."""

    def main(self, *arguments: Any, **settings: Any) -> Any:
        run_command(super().main, *arguments, **settings)


@dataclass(frozen=True)
class Common:
    """How a command loads its model (arguments of `qs_jax.load`), among which processes, and how it prints."""

    loading: dict[str, Any]
    json: bool
    debug: bool
    hosts: Hosts | None = None


def load_model(name: str, common: Common) -> Any:
    """The model, as `qs_jax.load` returns it; what was supplied or chosen in its files is said on stderr.

    Of several processes, which join before, only the first says anything from here on, but for errors.
    """
    if common.hosts is not None:
        join(common.hosts)
        own_stdout(silent=not is_first())
    from qs_jax.loading import load

    model = load(name, **common.loading)
    for note in model.notes:
        aside(f"note: {note}")
    return model


def common_options(
    *, loads: bool = True, versioned: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command `--json` and `--debug` and, if it `loads` a model, how; all arrive as its argument `common`.
    With `versioned` also `--version`, for a command that is a whole program."""
    added = {
        **({**_LOADING, **_JOINING} if loads else {}),
        **_PRINTING,
        **({"version": (Version, False)} if versioned else {}),
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "common"]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for name, (kind, default) in added.items()
        ]
        signature = inspect.Signature([*own, *shared])
        values = {name: _values(parameter.annotation) for name, parameter in signature.parameters.items()}

        @wraps(command)
        def run(*positional: Any, **named: Any) -> None:
            bound = signature.bind(*positional, **named)
            bound.apply_defaults()
            given = {name: _plain(value, values[name]) for name, value in bound.arguments.items()}
            taken = {name: given.pop(name) for name in added}
            loading = {name: taken[name] for name in _LOADING if loads}
            command(**given, common=Common(loading, taken["json"], taken["debug"], _hosts(taken)))

        # typer reads both of these
        shown = [_shown(parameter) for parameter in signature.parameters.values()]
        run.__signature__ = inspect.Signature(shown)  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
        return run

    return decorate


def _hosts(taken: dict[str, Any]) -> Hosts | None:
    """None for a process that is alone; to say where others are asks for them."""
    found = Hosts(*(taken.get(name) for name in ("coordinator", "processes", "process")))
    return found if taken.get("distributed") or found != Hosts() else None


def _values(annotation: Any) -> tuple[Any, ...]:
    """What an option may be; nothing where that is not a choice."""
    notes = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((note.values for note in notes if isinstance(note, OneOf)), ())


def _plain(value: Any, values: tuple[Any, ...]) -> Any:
    """A member of an option's enumeration as the value it stands for; anything else as it is."""
    return next((plain for plain in values if str(plain) == value), value) if isinstance(value, StrEnum) else value


def _shown(parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter as typer is to see it: a choice as an enumeration, which all its versions know."""
    values = _values(parameter.annotation)
    if not values:
        return parameter
    kind, *notes = get_args(parameter.annotation)
    members: Any = StrEnum(parameter.name, {str(value): str(value) for value in values})
    shown: Any = members | None if type(None) in get_args(kind) else members
    option = next(note for note in notes if not isinstance(note, OneOf))
    default = parameter.default if parameter.default is None else members(str(parameter.default))
    return parameter.replace(annotation=Annotated[shown, option], default=default)
