"""The saved notebooks are what their sources say, ran to the end, and show nothing of the machine that ran them."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))

pytestmark = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def cells(source: Path) -> list[dict[str, Any]]:
    return json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]


def outputs(source: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(source) for output in cell.get("outputs", ())]


def test_the_saved_notebook_is_its_source(source: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="pip install 'qs_jax[notebooks]'")
    written = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells(source)] == written


def test_it_ran_to_the_end_and_shows_something(source: Path) -> None:
    code = [cell for cell in cells(source) if cell["cell_type"] == "code" and cell["source"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = [output["output_type"] for output in outputs(source)]
    assert "error" not in kinds
    assert "stream" in kinds
    if source.name.startswith(("03", "04")):
        assert sum("image/png" in output.get("data", {}) for output in outputs(source)) >= 2


def test_it_shows_nothing_of_the_machine(source: Path) -> None:
    text = json.dumps([output for output in outputs(source) if output["output_type"] == "stream"])
    assert not re.search(r"/(home|root|work|Users|tmp)/", text)
    assert "Traceback" not in text
    assert "Warning" not in text


def test_it_keeps_the_jax_of_its_runtime(source: Path) -> None:
    """Colab's jax is built for its accelerator: installation pins what is there."""
    text = source.read_text(encoding="utf-8")
    assert 'startswith(("jax", "libtpu", "numpy"))' in text
    assert not re.search(r"pip.*(-U|--upgrade)", text)


def commands_of_the_first_cell(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What it runs in a folder where the package is not installed."""
    run: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: run.append(command))
    monkeypatch.setattr(Path, "cwd", lambda: folder)
    monkeypatch.setattr(Path, "write_text", lambda *_: None)
    first = next(cell for cell in cells(source) if cell["cell_type"] == "code")
    exec("".join(first["source"]), {})
    return run


def test_a_clone_installs_itself(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (install,) = commands_of_the_first_cell(source, source.parent, monkeypatch)
    assert install[1:4] == ["-m", "pip", "install"]
    assert install[-1] == str(ROOT)


def test_elsewhere_the_repository_is_fetched_from_where_the_user_says(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QS_JAX_REPOSITORY", "https://example.org/qs_jax")
    clone, install = commands_of_the_first_cell(source, tmp_path, monkeypatch)
    place = str(tmp_path / "qs_jax_repository")
    assert clone[:2] == ["git", "clone"]
    assert clone[-2:] == ["https://example.org/qs_jax", place]
    assert install[-1] == place
    monkeypatch.delenv("QS_JAX_REPOSITORY")
    with pytest.raises(AssertionError, match="set REPOSITORY"):
        commands_of_the_first_cell(source, tmp_path, monkeypatch)
