"""What calibration measures, keeps and takes up again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qs_jax.adaptive.policy import Policy
from qs_jax.errors import EvaluationError
from qs_jax.evaluation import measurements
from qs_jax.evaluation.measurements import Measured, Measurements, split
from qs_jax.evaluation.observation import observe
from qs_jax.evaluation.windows import Plan, cut
from qs_jax.loading import load
from tests.study import LETTERS, model_folder

TEXT = "".join(np.random.default_rng(0).choice(list(LETTERS), 2000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measurements")
    model_folder(folder / "model")
    return folder


def test_progress_of_another_model_or_text_is_not_taken_up(folder: Path, tmp_path: Path) -> None:
    model = load(folder / "model", compilation_cache=False)
    windows = cut(model, [TEXT], Plan(40, 8, 256))
    bench = Measurements(model, windows, 8, tmp_path / "progress")
    bench._known["test x"] = Measured([1.0], 1.0, 8.0, 0.0, 0.0)
    bench._write()
    assert Measurements(model, windows, 8, tmp_path / "progress").resumed == 1
    assert Measurements(model, windows[8:], 8, tmp_path / "progress").resumed == 0
    (tmp_path / "progress").write_text("{")
    assert Measurements(model, windows, 8, tmp_path / "progress").resumed == 0


def test_fewer_bits_that_read_more_bytes_are_no_saving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch at different precisions: each precision is a product of its own."""
    model = load(folder / "model", compilation_cache=False)
    bench = Measurements(model, cut(model, [TEXT], Plan(40, 8, 256)), 8, None)
    bench.planes = True
    found = {"dense": Measured([1.0], 2.0, 8.0, 0.0, 0.0), "mixed": Measured([1.0], 2.0, 6.0, 0.0, -0.2)}
    monkeypatch.setattr(bench, "of", lambda policy, part: found[policy.name])
    assert bench.cost(Policy(name="mixed")) > bench.cost(Policy(name="dense"))


def test_of_several_texts_the_increase_is_the_largest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder / "model", compilation_cache=False)
    windows = [replace(w, text=number) for number in (0, 1) for w in cut(model, [TEXT], Plan(40, 8, 256))]
    bench = Measurements(model, windows, 8, None)
    for part in ("search", "test"):
        places = bench.by_text(part)
        assert [len(at) for at in places] == [len(bench.parts[part]) // 2] * 2
        assert all(bench.parts[part][place].text == text for text, at in enumerate(places) for place in at)
    count = len(bench.parts["test"])
    worse = np.where([window.text == 1 for window in bench.parts["test"]], 0.1, 0.3)
    nll = {"off": [1.0] * count, "one": (1 + worse).tolist()}
    monkeypatch.setattr(bench, "of", lambda policy, part: Measured(nll[policy.name], 2.0, 8.0, 0.0, 0.0))
    assert bench.increase(Policy(name="one"), "test") == pytest.approx(np.exp(1.3) - np.exp(1.0))


def test_the_parts_share_no_window(folder: Path) -> None:
    model = load(folder / "model", compilation_cache=False)
    windows = cut(model, [TEXT], Plan(40, 8, 256))
    parts = split(windows, 8)
    assert sorted(map(repr, parts["search"] + parts["test"])) == sorted(map(repr, windows))
    assert len(parts["search"]) % 8 == len(parts["test"]) % 8 == 0
    seen = observe(model, windows, protect_first=4, protect_last=16)
    assert seen.prompt["relative_drift"].shape == (2, 8 * 20)
    assert seen.scored["raw_drift"].shape == (2, 8 * 8)
    assert seen.settled.min() >= 1
    assert seen.settled.max() <= 2


def test_a_bench_that_cannot_write_says_so(folder: Path) -> None:
    model = load(folder / "model", compilation_cache=False)
    bench = measurements.Measurements(model, cut(model, [TEXT], Plan(40, 8, 256)), 8, Path("/nowhere/progress"))
    with pytest.raises(EvaluationError, match="cannot be written"):
        bench._write()
