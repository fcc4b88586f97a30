"""What both command lines share: one-line errors, JSON on stdout, progress on stderr. Imports nothing heavy."""

import _thread
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qs_jax.errors import QsJaxError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

_LONGEST_MESSAGE = 1000
_AGAIN_S = 0.05


@contextmanager
def reporting_errors(debug: bool) -> Iterator[None]:
    """Turn exceptions into one line on stderr and an exit status: 2 for the user's, 1 for ours, 130 for Ctrl-C."""
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
        again = threading.Timer(_AGAIN_S, _thread.interrupt_main)
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


def one_line(error: BaseException) -> str:
    """The message with line breaks and control characters taken out, and no longer than a screen: it may quote a
    hostile file. What is cut is the middle; the end says what to do."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST_MESSAGE:
        text = f"{text[: _LONGEST_MESSAGE // 2]} … {text[-_LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else "�" for c in text)


def print_json(payload: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(payload, ensure_ascii=False, allow_nan=False), flush=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, when that is a terminal; yields `advance(n=1)`."""
    if not sys.stderr.isatty():
        yield lambda n=1: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n=1: bar.advance(task, n)
