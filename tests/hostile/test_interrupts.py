"""Ctrl-C, of commands in this process and of real ones: one line, status 130, text that was printed stays.

Conversions and calibrations that are interrupted are in test_faults.py.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qs_jax.console import EXIT_INTERRUPTED, reporting_errors
from tests.study import LETTERS, command, model_folder

TEXT = "once upon a time " * 200
CUT = ("--prefix", "40", "--window", "8", "--max-tokens", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = model_folder(tmp_path_factory.mktemp("models") / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch, form: tuple[str, ...]) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[object]:
        signal.raise_signal(signal.SIGINT)
        yield {}

    monkeypatch.setattr("qs_jax.evaluation.perplexity.score", interrupted)
    status, out, errors = command("eval", folder, "--text", folder / "text.txt", *CUT, *form)
    assert (status, out, errors) == (130, "", "interrupted\n")


class Careless:
    """Is interrupted while it is destroyed, where Python ignores exceptions."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_one_that_python_would_ignore(capsys: pytest.CaptureFixture[str]) -> None:
    def destroy() -> None:
        Careless()
        time.sleep(60)

    with pytest.raises(SystemExit) as ended, reporting_errors(debug=False):
        destroy()
    assert ended.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


def started(*arguments: object) -> subprocess.Popen[str]:
    """The command as it is installed: `python -m` ends by the signal itself if it fell into an `exec` on import."""
    script = Path(sys.executable).with_name("qs-jax")
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


@pytest.mark.slow
def test_a_real_generation_keeps_its_text(folder: Path) -> None:
    prompt = "once upon a time"
    process = started("generate", folder, "--prompt", prompt, "--max-new-tokens", 480)
    assert process.stdout is not None
    seen = process.stdout.read(len(prompt) + 4)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert seen.startswith(prompt)
    assert set(seen + rest) <= {*LETTERS, "\n"}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for JAX in /proc")
def test_a_real_evaluation(folder: Path) -> None:
    process = started("eval", folder, "--text", folder / "text.txt", *CUT)
    while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=120)
    assert (process.returncode, out, errors) == (130, "", "interrupted\n")
