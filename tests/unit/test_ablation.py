"""The ablation's table, its baselines, and what free running measures."""

from pathlib import Path

import jax
import numpy as np
import pytest

from qs_jax.adaptive.policy import Fusion, Halting, Policy, Precision
from qs_jax.evaluation.ablation import MECHANISMS, switched
from qs_jax.evaluation.baselines import random_halting
from qs_jax.evaluation.freerun import agreement, grams, variety
from qs_jax.evaluation.observation import observe
from qs_jax.evaluation.perplexity import run
from qs_jax.evaluation.windows import Plan, cut
from qs_jax.loading import load
from qs_jax.request import bind_policy
from tests.study import LETTERS, command, model_folder
from tests.tiny import tiny_model

TEXT = "".join(np.random.default_rng(1).choice(list(LETTERS), 3000))
CUT = ("--prefix", 40, "--window", 8, "--batch", 8, "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    model_folder(folder / "model")
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
    assert {row["kind"] for row in result["table"]} == {"off", "ablation", "calibrated", "baseline"}
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


@pytest.mark.slow
def test_random_halting_halts_as_many(folder: Path) -> None:
    model = load(folder / "model", compilation_cache=False)
    plan = Plan(128, 8, 64)
    windows = cut(model, [TEXT], plan)
    drift = observe(model, windows, protect_first=4, protect_last=16).prompt["relative_drift"][0]
    halting = Halting("relative_drift", float(np.quantile(drift, 0.4)), layers=(1,))
    policy = Policy("chosen", prompt_halting=halting)
    scores = run(model, windows, {"chosen": bind_policy(model, policy)}, plan, lambda n=1: None)
    random = random_halting(policy, scores["chosen"])[0]
    again = run(model, windows, {"random": bind_policy(model, random)}, plan, lambda n=1: None)["random"]
    stopped = [np.mean(np.concatenate(s.prompts.layers_run) == 1) for s in (scores["chosen"], again)]
    assert stopped[0] == pytest.approx(0.4 * 108 / 128, abs=0.05)
    assert stopped[1] == pytest.approx(stopped[0], abs=0.07)
    uniform = Policy(prompt_halting=Halting(thresholds=float("inf"), layers=(1,)))
    assert random_halting(uniform, scores["chosen"]) == []


def test_free_running_is_measured_by_its_definitions() -> None:
    assert agreement([1, 2, 3], [1, 2, 4]) == 2
    assert agreement([1, 2], [1, 2]) == 2
    assert grams([1, 2, 3], 2) == [(1, 2), (2, 3)]
    assert variety([[1, 2, 3, 4, 5]]) == {"repetition": 0.0, "distinct_1": 1.0, "distinct_2": 1.0}
    assert variety([[7] * 8]) == {"repetition": 4 / 5, "distinct_1": 1 / 8, "distinct_2": 1 / 7}
