"""Conversions that are killed, interrupted, short of disk or in each other's way: nothing half-written is loadable."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import convert.cli
import qs_jax.cli
from qs_jax.checkpoint import MANIFEST, is_converted, read_manifest
from qs_jax.errors import CheckpointError
from tests.folders import tensors_of, write_folder
from tests.unit.test_conversion import assert_same_weights, run

Count = Callable[[str, int], None]
KILLS = 20

needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and limits files as Linux does")


class Converter:
    """Runs conversions in forks of one warm process."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "tests.hostile.converting"]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def _line(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self, source: Path, target: Path, **order: object) -> int:
        """The process id of a conversion that has begun; its output goes to target.log."""
        assert self.process.stdin is not None
        log = target.with_name(f"{target.name}.log")
        self.process.stdin.write(json.dumps({"source": str(source), "target": str(target), "log": str(log), **order}))
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        pid = self._line()
        assert pid > 1
        return pid

    def end(self) -> int:
        """Exit status of the conversion, negative where a signal ended it."""
        return self._line()


@pytest.fixture(scope="module")
def converter() -> Iterator[Converter]:
    converter = Converter()
    yield converter
    converter.process.communicate("", timeout=60)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: write_folder(folder / name, name) for name in ("gpt2", "llama")}


def leftovers(target: Path) -> list[Path]:
    return [path for path in target.parent.iterdir() if path.name.startswith(f".{target.name}.")]


def sound(target: Path) -> str:
    """Which model a converted folder holds; fails if its files are not all there and unchanged."""
    read_manifest(target, verify=True)
    return json.loads((target / "config.json").read_text())["model_type"]


@needs_fork
@pytest.mark.slow
def test_killed_at_any_point(tmp_path: Path, converter: Converter, sources: dict[str, Path], count: Count) -> None:
    """First into an empty place, then over a model that is there; every rerun succeeds and sweeps up."""
    target, rng = tmp_path / "out", random.Random(0)
    started = time.perf_counter()
    converter.start(sources["gpt2"], target)
    assert converter.end() == 0
    whole = time.perf_counter() - started
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    killed = 0
    for number in range(10 * KILLS):
        name, overwrite = ("gpt2", "llama")[number % 2], number >= KILLS
        before = sound(target) if target.exists() else None
        pid = converter.start(sources[name], target, overwrite=True)
        time.sleep(rng.random() * whole)
        killed += _kill(pid)
        status = converter.end()
        if status == 0:
            assert sound(target) == name
        else:
            assert status == -signal.SIGKILL
            assert (sound(target) if target.exists() else None) in (before, name)
        if not overwrite and target.exists():
            target.rename(tmp_path / f"done-{number}")
        if killed >= KILLS and number > KILLS:
            break
    assert killed >= KILLS
    converter.start(sources["llama"], target, overwrite=True)
    assert converter.end() == 0
    assert leftovers(target) == []
    assert_same_weights(target, tensors_of("llama"))
    count("kills", killed)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@needs_fork
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, converter: Converter, sources: dict[str, Path]
) -> None:
    """No file may grow beyond a few kilobytes, as on a disk that fills up in the middle of a part."""
    for number, limit in enumerate((300, 2000, 8000)):
        target = tmp_path / f"out{number}"
        converter.start(sources["llama"], target, file_limit=limit)
        status, log = converter.end(), (tmp_path / f"out{number}.log").read_text()
        assert status == 2, log
        assert "cannot be written" in log
        assert "Traceback" not in log
        assert not target.exists()
        assert leftovers(target) == []


@needs_fork
def test_a_conversion_that_is_interrupted_says_so_and_leaves_nothing(
    tmp_path: Path, converter: Converter, sources: dict[str, Path]
) -> None:
    target = tmp_path / "out"
    pid = converter.start(sources["gpt2"], target)
    while not leftovers(target):
        time.sleep(0.002)
    os.kill(pid, signal.SIGINT)
    status, log = converter.end(), (tmp_path / "out.log").read_text()
    assert (status, log) == (130, "interrupted\n")
    assert not target.exists()
    assert leftovers(target) == []


@needs_fork
def test_two_conversions_to_one_target(tmp_path: Path, converter: Converter, sources: dict[str, Path]) -> None:
    """One of them wins, whole; neither takes the other's work for rubbish."""
    other, target = Converter(), tmp_path / "out"
    for attempt in range(4):
        converter.start(sources["gpt2"], target, overwrite=attempt > 1)
        other.start(sources["llama"], target, overwrite=attempt > 1)
        statuses = {converter.end(), other.end()}
        assert 0 in statuses
        assert statuses <= {0, 2}
        assert sound(target) in ("gpt2", "llama")
        assert leftovers(target) == []
        if attempt == 0:
            target.rename(tmp_path / "first")
    other.process.communicate("", timeout=60)


def test_a_place_that_cannot_be_written(tmp_path: Path, sources: dict[str, Path]) -> None:
    (tmp_path / "file").write_text("x")
    places = [tmp_path / "file" / "out"]
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked" / "out")
    for place in places:
        status, out, err = run(sources["gpt2"], place)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "cannot be written" in err


def test_a_flipped_bit_anywhere_is_reported_with_the_file(tmp_path: Path, sources: dict[str, Path]) -> None:
    target = tmp_path / "out"
    assert run(sources["gpt2"], target)[0] == 0
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        spoilt = bytearray(content)
        spoilt[len(spoilt) // 2] ^= 0x10
        file.write_bytes(spoilt)
        if file.name != MANIFEST:
            with pytest.raises(CheckpointError, match="is not as converted") as error:
                read_manifest(target, verify=True)
            assert str(file) in str(error.value)
        file.write_bytes(content)
    assert sound(target) == "gpt2"


def test_a_folder_without_its_manifest_is_no_converted_folder(tmp_path: Path, sources: dict[str, Path]) -> None:
    target = tmp_path / "out"
    assert run(sources["gpt2"], target)[0] == 0
    (target / MANIFEST).unlink()
    assert not is_converted(target)
    result = CliRunner().invoke(qs_jax.cli.app, ["generate", str(target), "--prompt", "x"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_a_generation_that_is_interrupted_keeps_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "hf", "llama", tokenizer=True)
    whole = CliRunner().invoke(qs_jax.cli.app, ["generate", str(folder), "--prompt", "Hi", "--max-new-tokens", "40"])
    stream = qs_jax.generation.stream

    def interrupted(*arguments: object, **settings: object) -> Iterator[object]:
        for number, piece in enumerate(stream(*arguments, **settings)):  # pyright: ignore[reportArgumentType]
            yield piece
            if number == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(qs_jax.generation, "stream", interrupted)
    result = CliRunner().invoke(qs_jax.cli.app, ["generate", str(folder), "--prompt", "Hi", "--max-new-tokens", "40"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert len(result.stdout) > 10
    assert whole.stdout.startswith(result.stdout.rstrip("\n"))


def test_stdin_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", "llama", tokenizer=True)
    result = CliRunner().invoke(qs_jax.cli.app, ["generate", str(folder), "--prompt", "-"], input=b"caf\xe9 \xff")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "UTF-8" in result.stderr


def test_an_interrupted_conversion_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two parts, when the manifest is still to be written."""
    source = write_folder(tmp_path / "hf", "gpt2")
    monkeypatch.setattr("convert.pipeline.write_manifest", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = CliRunner().invoke(convert.cli.app, [str(source), str(tmp_path / "out")])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
