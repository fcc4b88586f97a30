"""Baselines that a policy must beat."""

from pathlib import Path

import numpy as np
import pytest

from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.evaluation.baselines import random_halting
from qs_jax.evaluation.observation import observe
from qs_jax.evaluation.perplexity import run
from qs_jax.evaluation.windows import Plan, cut
from qs_jax.loading import load
from qs_jax.request import bind_policy
from tests.study import LETTERS, model_folder

TEXT = "".join(np.random.default_rng(1).choice(list(LETTERS), 3000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    model_folder(folder / "model")
    return folder


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
