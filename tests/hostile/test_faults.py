"""Conversions that are killed, interrupted, short of disk or in each other's way: nothing half-written is loadable."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import convert.cli
import qs_jax.cli
from qs_jax.adaptive.policy import Policy
from qs_jax.checkpoint import MANIFEST, is_converted, read_manifest
from qs_jax.errors import CheckpointError
from tests.folders import tensors_of, write_folder
from tests.hostile.forking import Worker, kill
from tests.unit.test_conversion import assert_same_weights, run

Count = Callable[[str, int], None]
KILLS = 20
CALIBRATION_KILLS = 50

needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and limits files as Linux does")


@pytest.fixture(scope="module")
def converter() -> Iterator[Worker]:
    worker = Worker("tests.hostile.converting")
    yield worker
    worker.close()


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
def test_killed_at_any_point(tmp_path: Path, converter: Worker, sources: dict[str, Path], count: Count) -> None:
    """First into an empty place, then over a model that is there; every rerun succeeds and sweeps up."""
    target, rng = tmp_path / "out", random.Random(0)
    converter.start(target, source=sources["gpt2"])
    started = time.perf_counter()
    assert converter.end() == 0
    whole = time.perf_counter() - started
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    killed = 0
    for number in range(10 * KILLS):
        name, overwrite = ("gpt2", "llama")[number % 2], number >= KILLS
        before = sound(target) if target.exists() else None
        pid = converter.start(target, source=sources[name], overwrite=True)
        time.sleep(rng.random() * whole)
        killed += kill(pid)
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
    converter.start(target, source=sources["llama"], overwrite=True)
    assert converter.end() == 0
    assert leftovers(target) == []
    assert_same_weights(target, tensors_of("llama"))
    count("kills", killed)


@needs_fork
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, converter: Worker, sources: dict[str, Path]
) -> None:
    """No file may grow beyond a few kilobytes, as on a disk that fills up in the middle of a part."""
    for number, limit in enumerate((300, 2000, 8000)):
        target = tmp_path / f"out{number}"
        converter.start(target, source=sources["llama"], file_limit=limit)
        status, log = converter.end(), (tmp_path / f"out{number}.log").read_text()
        assert status == 2, log
        assert "cannot be written" in log
        assert "Traceback" not in log
        assert not target.exists()
        assert leftovers(target) == []


@needs_fork
@pytest.mark.parametrize("moment", [".out.*.partial", ".out.*.partial/weights/*", ".out.*.partial/weights/*/*"])
def test_a_conversion_that_is_interrupted_says_so_and_leaves_nothing(
    tmp_path: Path, converter: Worker, sources: dict[str, Path], moment: str
) -> None:
    """As soon as the folder is there, and while Orbax's own threads are writing into it."""
    target = tmp_path / "out"
    pid = converter.start(target, source=sources["gpt2"])
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(moment)) and not target.exists():
        assert time.monotonic() < deadline, (tmp_path / "out.log").read_text()
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    status, log = converter.end(), (tmp_path / "out.log").read_text()
    assert (status, log) == (130, "interrupted\n")
    assert not target.exists()
    assert leftovers(target) == []


@needs_fork
def test_two_conversions_to_one_target(tmp_path: Path, converter: Worker, sources: dict[str, Path]) -> None:
    """One of them wins, whole; neither takes the other's work for rubbish."""
    other, target = Worker("tests.hostile.converting"), tmp_path / "out"
    for attempt in range(4):
        converter.start(target, source=sources["gpt2"], overwrite=attempt > 1)
        other.start(target, source=sources["llama"], overwrite=attempt > 1)
        statuses = {converter.end(), other.end()}
        assert 0 in statuses
        assert statuses <= {0, 2}
        assert sound(target) in ("gpt2", "llama")
        assert leftovers(target) == []
        if attempt == 0:
            target.rename(tmp_path / "first")
    other.close()


@pytest.fixture(scope="module")
def calibrator() -> Iterator[Worker]:
    worker = Worker("tests.hostile.calibrating")
    yield worker
    worker.close()


@needs_fork
@pytest.mark.slow
def test_calibration_killed_at_any_point(tmp_path: Path, calibrator: Worker, count: Count) -> None:
    """The policy is there whole or not at all, and a rerun ends where an undisturbed calibration ends."""
    target, rng, killed = tmp_path / "policy.json", random.Random(1), 0
    calibrator.start(target)
    started = time.perf_counter()
    assert calibrator.end() == 0, (tmp_path / "policy.json.log").read_text()
    whole = time.perf_counter() - started
    undisturbed = target.read_bytes()
    target.unlink()
    for _ in range(10 * CALIBRATION_KILLS):
        pid = calibrator.start(target)
        time.sleep(rng.random() * whole)
        killed += kill(pid)
        assert calibrator.end() in (0, -signal.SIGKILL)
        if target.exists():
            assert target.read_bytes() == undisturbed
            target.unlink()
        if killed == CALIBRATION_KILLS:
            break
    assert killed == CALIBRATION_KILLS
    calibrator.start(target)
    assert calibrator.end() == 0
    assert target.read_bytes() == undisturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.json.log"]
    count("kills", killed)


@needs_fork
def test_a_calibration_on_a_full_disk_is_one_line_and_keeps_the_old_policy(tmp_path: Path, calibrator: Worker) -> None:
    target = tmp_path / "policy.json"
    Policy.paper().save(target)
    before = target.read_bytes()
    calibrator.start(target, file_limit=400)
    status, log = calibrator.end(), (tmp_path / "policy.json.log").read_text()
    assert (status, log.count("\n")) == (2, 1), log
    assert "cannot be written" in log
    assert target.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.json.log"]


@needs_fork
def test_a_calibration_that_is_interrupted_goes_on_when_it_is_run_again(tmp_path: Path, calibrator: Worker) -> None:
    target, progress = tmp_path / "policy.json", tmp_path / ".policy.json.progress"
    pid = calibrator.start(target)
    while not progress.exists():
        time.sleep(0.001)
    os.kill(pid, signal.SIGINT)
    assert (calibrator.end(), (tmp_path / "policy.json.log").read_text()) == (130, "interrupted\n")
    assert progress.exists()
    assert not target.exists()
    calibrator.start(target)
    assert calibrator.end() == 0
    assert not progress.exists()


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
