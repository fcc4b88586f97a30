"""What both command lines share: one line, one JSON object, one exit status."""

import gc
import json
import math
from typing import Any

import pytest

from qs_jax.console import aside, collecting_rarely, one_line, print_json, progress, reporting_errors
from qs_jax.errors import CheckpointError


def test_garbage_is_collected_rarely_while_a_command_runs_and_not_once_more_at_its_end() -> None:
    before, usual = gc.get_threshold(), 700
    try:
        gc.set_threshold(usual)
        with collecting_rarely():
            assert gc.get_threshold()[0] > 10 * usual
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CheckpointError("a file\n is broken"), 2, "error: a file is broken\n"),
        (KeyError("x"), 1, "error: internal: KeyError: 'x' (rerun with --debug)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, reporting_errors(debug=False):
        raise error
    assert ended.value.code == status
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("error", [CheckpointError("x"), KeyError("x")])
def test_with_debug_it_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)), reporting_errors(debug=True):
        raise error


def test_a_line_holds_no_control_characters_and_keeps_both_its_ends() -> None:
    assert one_line("a\n\tb\x1b[31mc\u202e") == "a b�[31mc�"
    cut = one_line("x" * 5000 + "do this")
    assert len(cut) < 1010
    assert cut.startswith("xxx")
    assert cut.endswith("do this")


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ({"a": math.nan, "b": [math.inf, 1.5], "c": (1, "é")}, {"a": None, "b": [None, 1.5], "c": [1, "é"]}),
        ({"deep": {"deeper": [{"x": -math.inf}]}}, {"deep": {"deeper": [{"x": None}]}}),
    ],
)
def test_json_is_ascii_and_has_no_numbers_that_are_none(
    value: Any, printed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    print_json(value)
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == (printed, "")
    assert out.isascii()
    assert out.count("\n") == 1


def test_where_no_terminal_is_asides_are_plain_and_progress_silent(capsys: pytest.CaptureFixture[str]) -> None:
    aside("two\nlines")
    with progress("work", 3) as advance:
        advance()
        advance(2)
    assert capsys.readouterr() == ("", "two lines\n")
