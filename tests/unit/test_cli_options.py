"""Options that commands share: choices that help shows, one line for what is wrong, plain values for what is right."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

import convert.cli
import qs_jax
import qs_jax.cli
from qs_jax.adaptive.policy import KvRuleName, SignalName, StateSignalName
from qs_jax.choices import BITS, CODEBOOK_NAMES, DTYPES, METHODS, SCHEMES
from qs_jax.cli_options import Bits, Codebook, common_options
from qs_jax.console import run_command
from qs_jax.fitting.grid import CODEBOOKS

STUDY = ("m", "--text", "t")
CHOICES = [
    (("qs-jax", "generate", "m", "--prompt", "x"), "--dtype", DTYPES),
    (("qs-jax", "generate", "m", "--prompt", "x"), "--bits", BITS),
    (("qs-jax", "bench", "m"), "--bits", BITS),
    (("qs-jax", "eval", *STUDY), "--bits", BITS),
    (("qs-jax", "lens", *STUDY), "--dtype", DTYPES),
    (("qs-jax", "calibrate", *STUDY), "--signal", get_args(StateSignalName)),
    (("qs-jax", "calibrate", *STUDY), "--kv-rule", get_args(KvRuleName)),
    (("qs-convert", "a", "b"), "--dtype", DTYPES),
    (("qs-convert", "a", "b"), "--quantize", SCHEMES),
    (("qs-convert", "a", "b"), "--method", METHODS),
    (("qs-convert", "a", "b"), "--codebook", CODEBOOK_NAMES),
]


def run(program: str, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of either program."""
    app = qs_jax.cli.app if program == "qs-jax" else convert.cli.app
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(("start", "option", "values"), CHOICES, ids=lambda part: str(part))
def test_choices_are_shown_and_nothing_else_is_taken(
    start: tuple[str, ...], option: str, values: Sequence[object]
) -> None:
    name = start[:2] if start[0] == "qs-jax" else start[:1]
    status, shown, _ = run(*name, "--help")
    assert status == 0
    assert "|".join(map(str, values)) in shown.replace(option, "")
    status, out, errors = run(*start, option, "mood")
    assert (status, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"error: invalid value for '{option}': 'mood' is not ")
    assert all(str(value) in errors for value in values)
    assert errors.endswith(f"; see {' '.join(name)} --help\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qs-jax", "generate", "m", "--bogus"), "no such option: --bogus"),
        (("qs-jax", "generate", "m"), "missing option '--prompt'"),
        (("qs-jax", "generate"), "missing argument"),
        (("qs-jax", "generate", "m", "n", "--prompt", "x"), "unexpected extra argument"),
        (("qs-jax", "generate", "m", "--prompt", "x", "--top-k", "many"), "invalid value for '--top-k': 'many'"),
        (("qs-jax", "generate", "m", "--prompt"), "--prompt"),
        (("qs-jax", "bench", "m", "--batch", "0"), "invalid value for '--batch': 0"),
        (("qs-jax", "bogus"), "no such command 'bogus'"),
        (("qs-jax", "--bogus"), "no such option: --bogus"),
        (("qs-convert", "a"), "missing argument"),
        (("qs-convert", "a", "b", "--bogus"), "no such option: --bogus"),
    ],
)
def test_what_is_typed_wrongly_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    status, out, errors = run(*arguments)
    assert (status, out, errors.count("\n")) == (2, "", 1), errors
    assert errors.startswith("error: ")
    assert message in errors.lower()
    assert "--help" in errors


@pytest.mark.parametrize("program", ["qs-jax", "qs-convert"])
def test_help_and_version(program: str) -> None:
    status, out, errors = run(program, "--help")
    assert (status, errors) == (0, "")
    assert "--version" in out
    assert run(program, "--version") == (0, f"qs_jax {qs_jax.__version__}\n", "")
    status, out, errors = run(program)
    assert "Usage: " in out + errors
    assert "error" not in out + errors


@pytest.mark.parametrize("module", ["qs_jax", "convert"])
def test_the_packages_run_as_programs(module: str) -> None:
    command = [sys.executable, "-m", module]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qs_jax {qs_jax.__version__}\n"
    done = subprocess.run([*command, "--bogus"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no such option: --bogus")


@pytest.mark.parametrize("given", [["--bits", "4", "--codebook", "companded"], [4, "companded"]])
def test_commands_get_plain_values(given: list[Any]) -> None:
    """From the command line as from Python."""
    seen: list[Any] = []

    @common_options(loads=False)
    def command(bits: Bits = None, codebook: Codebook = "even", *, common: Any) -> None:
        seen.extend((bits, codebook))

    if isinstance(given[0], int):
        command(*given)
    else:
        app = typer.Typer()
        app.command()(command)
        assert CliRunner().invoke(app, given).exit_code == 0
    assert seen == [4, "companded"]
    assert [type(value) for value in seen] == [int, str]
    command()
    assert seen[2:] == [None, "even"]


def _aborted(**_: Any) -> None:
    raise typer.Abort


def _interrupted(**_: Any) -> int:
    return 130


@pytest.mark.parametrize("main", [_aborted, _interrupted])
def test_an_interrupt_outside_of_commands(main: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Versions of typer either raise or return then."""
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_names_stand_once() -> None:
    assert tuple(CODEBOOKS) == CODEBOOK_NAMES
    assert get_args(SignalName)[: len(get_args(StateSignalName))] == get_args(StateSignalName)
