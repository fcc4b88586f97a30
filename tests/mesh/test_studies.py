"""Studies on eight devices find what they find on one."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qs_jax
from tests.study import LETTERS, model_folder

MESH = "data=2,model=4"
TEXT = "".join(np.random.default_rng(0).choice(list(LETTERS), 2000))
CUT: dict[str, Any] = {"prefix": 40, "window": 10, "batch": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[qs_jax.Model, qs_jax.Model]:
    """One model, on a mesh and on one device."""
    folder = model_folder(tmp_path_factory.mktemp("studies") / "model")
    load = partial(qs_jax.load, folder, compilation_cache=False)
    return load(mesh=MESH), load()


@pytest.mark.parametrize("batch", [2, 3])
def test_scores_of_text(batch: int, models: tuple[qs_jax.Model, qs_jax.Model]) -> None:
    """In batches that divide and that do not."""
    asked: dict[str, Any] = {"policy": "balanced", "max_tokens": 60, **CUT, "batch": batch}
    there, here = (qs_jax.evaluate(model, [TEXT], **asked) for model in models)
    assert there.tokens_scored == here.tokens_scored == 60
    assert there.perplexity == pytest.approx(here.perplexity, rel=1e-5)
    assert there.ledger == here.ledger


def test_a_calibration_chooses_the_same(models: tuple[qs_jax.Model, qs_jax.Model]) -> None:
    asked: dict[str, Any] = {"max_tokens": 120, "max_ppl_increase": 5.0, **CUT}
    there, here = (qs_jax.calibrate(model, [TEXT], **asked) for model in models)
    ours, theirs = (found.policy.to_json() for found in (there, here))
    assert ours["kv_rule"] == theirs["kv_rule"]
    assert [row["flops_reduction"] for row in there.to_json()["tested"]] == pytest.approx(
        [row["flops_reduction"] for row in here.to_json()["tested"]]
    )


def test_stops_of_a_direct_lens_are_calibrated_alike(tmp_path: Path) -> None:
    """Rare tokens run on either."""
    folder = model_folder(tmp_path / "model", layers=4)
    load = partial(qs_jax.load, folder, compilation_cache=False)
    qs_jax.fit_direct_lens(load(), [TEXT], [1, 2], out=folder / "direct_lens.safetensors")
    asked: dict[str, Any] = {"max_tokens": 120, "max_ppl_increase": 50.0, **CUT}
    there, here = (qs_jax.calibrate(model, [TEXT], **asked).to_json() for model in (load(mesh=MESH), load()))
    assert there["policy"] == here["policy"]
    assert {row["policy"]["protect_rare"] is None for row in here["tested"]} == {False, True}
    for name in ("flops_reduction", "perplexity_increase"):
        ours, theirs = ([row[name] for row in found["tested"]] for found in (there, here))
        assert ours == pytest.approx(theirs, abs=1e-3)


def test_a_lens_is_fitted_alike(models: tuple[qs_jax.Model, qs_jax.Model]) -> None:
    there, here = (qs_jax.fit_lens(model, [TEXT], rank=4) for model in models)
    assert there.explained == pytest.approx(here.explained, abs=1e-4)
