"""What `benchmarks.resting` forces is what the engine runs, and counts as the ledger counts."""

import math

import numpy as np
import pytest

from benchmarks import forced
from qs_jax.adaptive.kv_rules import Direct
from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.evaluation.scoring import score_alone
from qs_jax.evaluation.windows import Window
from qs_jax.request import bind_policy
from tests.tiny import tiny_model, with_random_direct_lens

STOP, PROMPT, SCORED, LAST = 2, 256, 8, 60  # 64 tokens run on: a size of its own, without padding


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPT": PROMPT, "SCORED": SCORED, "LAST": LAST}.items():
        monkeypatch.setattr(forced, name, value)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_stop_is_the_engines(name: str) -> None:
    model = with_random_direct_lens(tiny_model(name, 4), stop=STOP)
    ids = np.random.default_rng(0).integers(0, 90, (2, PROMPT + SCORED))
    windows = [Window(tuple(row[:PROMPT]), tuple(row[PROMPT:]), ("",) * PROMPT, ("",) * SCORED) for row in ids.tolist()]
    halting = Halting(thresholds=math.inf, layers=(STOP,))
    policy = Policy(prompt_halting=halting, kv_rule="direct", protect_last=LAST, protect_special=False)
    scores = score_alone(model, windows, bind_policy(model, policy), batch=2)
    seen = forced.seen(model.network, ids)
    rule, rests = Direct(STOP), forced.all_but(LAST, 2)
    found = forced.resting(model.network, forced.left_by(model.network, rule, STOP, seen), seen, rests)
    np.testing.assert_allclose(found, -scores.logprobs, atol=2e-4)
    assert np.abs(found - seen.nll).max() > 0.01
    saved = forced.saved(model, rule, STOP, int(rests[0].sum()))
    assert saved == pytest.approx(scores.ledger.to_json()["flops_reduction"], abs=0.005)


def test_the_highest_run_on() -> None:
    values = np.random.default_rng(1).normal(size=(3, PROMPT + SCORED))
    rests = forced.but_highest(values, 0.25, LAST)
    among = slice(forced.FIRST, PROMPT - LAST)
    for row, rest in zip(values[:, among], rests[:, among], strict=True):
        assert sorted(row[~rest]) == sorted(row)[-48:]
    assert not rests[:, : forced.FIRST].any()
    assert not rests[:, PROMPT - LAST :].any()
