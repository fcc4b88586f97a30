"""The ablation's table and what it switches."""

from pathlib import Path

import jax
import numpy as np
import pytest

from qs_jax.adaptive.policy import Fusion, Halting, Policy, Precision
from qs_jax.evaluation.ablation import MECHANISMS, switched
from qs_jax.request import bind_policy
from tests.study import LETTERS, command, model_folder
from tests.tiny import tiny_model

TEXT = "".join(np.random.default_rng(1).choice(list(LETTERS), 3000))
CUT = ("--prefix", 40, "--window", 8, "--batch", 8, "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    model_folder(folder / "model", layers=4)
    (folder / "text.txt").write_text(TEXT[:1000])
    (folder / "other.txt").write_text(TEXT[1000:])
    return folder


@pytest.mark.slow
def test_the_table_has_every_combination_and_what_they_must_beat(folder: Path) -> None:
    arguments = ("--max-tokens", 128, "--calibration-tokens", 256, "--free-run", 2)
    status, result, errors = command(
        "eval", folder / "model", "--text", folder / "text.txt", "--ablate",
        "--calibration-text", folder / "other.txt", *CUT, *arguments,
    )  # fmt: skip
    assert status == 0, errors
    rows = {row["name"]: row for row in result["table"]}
    assert sum(row["kind"] == "ablation" for row in result["table"]) == 16
    assert {tuple(row["mechanisms"]) for row in result["table"] if row["kind"] == "ablation"} >= {("none",), MECHANISMS}
    assert rows["none"]["perplexity"] == pytest.approx(rows["off"]["perplexity"])
    assert rows["precision"]["perplexity"] == rows["none"]["perplexity"]  # these weights cannot be read at fewer bits
    assert rows["halting"]["flops_reduction"] > rows["none"]["flops_reduction"]
    assert rows["halting + kv_skipping"]["kv_reduction"] > rows["halting"]["kv_reduction"]
    assert {row["kind"] for row in result["table"]} == {"off", "ablation", "preset", "calibrated", "baseline"}
    for row in result["table"]:
        low, high = row["perplexity_increase_interval"]
        assert low - 1e-9 <= row["perplexity_increase"] <= high + 1e-9
    assert 0 < result["oracle"]["layers_share"] <= 1
    assert result["free_run"]["agreement_length"] <= result["free_run"]["new_tokens"]


def test_calibration_text_may_not_be_scored(folder: Path) -> None:
    status, _, errors = command(
        "eval", folder / "model", "--text", folder / "text.txt", "--ablate",
        "--calibration-text", folder / "text.txt", *CUT, "--max-tokens", 128,
    )  # fmt: skip
    assert status == 2
    assert "part of what is scored" in errors


def test_switching_keeps_the_structure() -> None:
    """All combinations without KV skipping, and all with it, run the same programs."""
    model = tiny_model("llama")
    subject = Policy(
        "all",
        prompt_halting=Halting(thresholds=0.5, layers=(1,)),
        decode_halting=Halting(thresholds=(0.5,), layers=(1,)),
        kv_rule="drop",
        fusion=Fusion(thresholds=0.3, layers=(1,)),
        precision=Precision(four_below=1.0),
    )
    everything = switched(subject, MECHANISMS)
    assert (everything.kv_rule, everything.mechanisms) == ("drop", MECHANISMS)
    bound = (bind_policy(model, switched(subject, on)) for on in ((), ("halting",), ("fusion",)))
    structures = {jax.tree.structure(policy) for policy in bound}
    assert len(structures) == 1
    none = switched(subject, ())
    assert none.prompt_halting is not None
    assert none.decode_halting is not None
    assert none.fusion is not None
    assert {none.prompt_halting.thresholds, *(none.decode_halting.thresholds,)} == {0.0, (0.0,)}
    assert none.fusion.thresholds == 0.0
    assert switched(subject, ("kv_skipping",)).kv_rule == "frozen"
