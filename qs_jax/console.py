"""What both command lines share: one-line errors, JSON on stdout, progress on stderr. Imports nothing heavy."""

import _thread
import gc
import io
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, cast

from qs_jax.errors import QsJaxError
from qs_jax.hosts import is_first
from qs_jax.progress import Advance, unseen

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_LONGEST_MESSAGE = 1000
_AGAIN_S = 0.05
_OBJECTS = 200_000


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Look for unreachable objects seldom while a command runs, and not once more at its end.

    Tracing makes objects by the hundred thousand and leaves few behind: of a short command's time the collector takes a
    tenth, half of it when the process ends.
    """
    gc.set_threshold(_OBJECTS)
    try:
        yield
    finally:
        gc.freeze()


@contextmanager
def reporting_errors(debug: bool) -> Iterator[None]:
    """Turn exceptions into one line on stderr and an exit status: 2 for the user's, 1 for ours, 130 for Ctrl-C."""
    _show_what_can_be_shown()
    try:
        with _interrupts_insist():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(EXIT_ERROR) from None
    except QsJaxError as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
    except Exception as error:
        if debug:
            raise
        print(f"error: internal: {type(error).__name__}: {one_line(error)} (rerun with --debug)", file=sys.stderr)
        raise SystemExit(EXIT_ERROR) from None


def run_command(main: Callable[..., Any], *arguments: Any, **settings: Any) -> NoReturn:
    """Run a command line, `main` being that of typer's command, and end the process.

    A wrong option, choice or command is one line like every other error, where typer would print several.
    """
    import typer

    # click's own base class, which some versions of typer take from click and others bring along
    click_error = cast(type[Exception], typer.BadParameter.__mro__[2])
    _show_what_can_be_shown()
    status: Any
    try:
        status = main(*arguments, **{**settings, "standalone_mode": False})
    except typer.Abort:
        status = EXIT_INTERRUPTED
    except click_error as raised:
        error, status = cast(Any, raised), EXIT_USAGE
        if type(raised).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            where = f"{error.ctx.command_path} " if getattr(error, "ctx", None) else ""
            message = error.format_message().rstrip(".")
            print(f"error: {one_line(f'{message[:1].lower()}{message[1:]}; see {where}--help')}", file=sys.stderr)
    if status == EXIT_INTERRUPTED:
        print("interrupted", file=sys.stderr)
    raise SystemExit(status if isinstance(status, int) else 0)


@contextmanager
def _interrupts_insist() -> Iterator[None]:
    """A Ctrl-C that falls into a destructor or a weak reference's callback, where Python only prints it, comes again.

    A little later and from another thread: raised inside the hook it would be lost for good.
    """
    before = sys.unraisablehook
    repeats: list[threading.Timer] = []

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        again = threading.Timer(_AGAIN_S, _interrupt_main)
        again.daemon = True
        repeats.append(again)
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for again in repeats:
            again.cancel()


def _interrupt_main() -> None:
    """As a real signal where there are such, which also ends a system call that waits."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()


def one_line(error: BaseException | str) -> str:
    """The message with line breaks and control characters taken out, and no longer than a screen: it may quote a
    hostile file. What is cut is the middle; the end says what to do."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE // 2]} … {text[-_LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else "�" for c in text)


def print_json(payload: Any) -> None:
    """Print one JSON object on stdout, in ASCII, which any terminal shows; what JSON has no number for becomes null."""
    print(json.dumps(_finite(payload), allow_nan=False), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def aside(text: str) -> None:
    """A dim line on stderr, of several processes the first's: what a person may want to know beside the result."""
    if not is_first():
        return
    line = one_line(text)
    print(f"\x1b[2m{line}\x1b[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def own_stdout(*, silent: bool) -> None:
    """Keep stdout for results: what libraries of other languages print there goes to stderr from here on. With `silent`
    results go nowhere, as another process prints the same."""
    sys.stdout.flush()
    results = os.open(os.devnull, os.O_WRONLY) if silent else os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", encoding=sys.stdout.encoding, errors="replace")


def _show_what_can_be_shown() -> None:
    """A character that the terminal's encoding lacks becomes a question mark and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        # not where somebody took the file away or put another under it
        with suppress(AttributeError, OSError, ValueError):
            cast(io.TextIOWrapper, stream).reconfigure(errors="replace")


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Advance]:
    """A progress bar on stderr, when that is a terminal; yields what advances it."""
    if not is_first() or not sys.stderr.isatty():
        yield unseen
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(done: int = 1, *, total: int | None = None) -> None:
            bar.update(task, advance=done, total=total)

        yield advance
