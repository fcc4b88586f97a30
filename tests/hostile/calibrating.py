"""Calibrations for `tests.hostile.forking`, as the command makes them, but of policies whose worth is known.

Only the scores are made up: a real one takes seconds of compiled code, and what a killed process can break is what it
writes between scores.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from qs_jax import cli_study
from qs_jax.adaptive.policy import Policy
from qs_jax.corpus import Corpus
from qs_jax.evaluation import api, measurements, study
from qs_jax.evaluation.measurements import Measured, Measurements, Part
from qs_jax.evaluation.windows import Window
from tests.hostile.forking import serve
from tests.unit.test_calibration import DEPTH, PREFIX, FakeBench, observed

BENCH = FakeBench(seed=0)
PAUSE = 0.001
"""Seconds that a score takes."""

_NETWORK = SimpleNamespace(shortcuts=None, direct_stops=(), rarity=None)
_MODEL = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=DEPTH), network=_NETWORK, name="known")
_WINDOWS = [Window((0,) * PREFIX, (number,), ("",) * PREFIX, ("",)) for number in range(40)]


def _score(self: Measurements, policy: Policy, part: Part) -> Measured:
    time.sleep(PAUSE)
    return BENCH.of(policy, part)


def work(order: dict[str, Any]) -> None:
    with (
        patch.object(cli_study, "load_model", lambda *_: _MODEL),
        patch.object(Corpus, "of", lambda text, *_: Corpus(("",), "text.txt", ":")),
        patch.object(api, "cut", lambda *_: _WINDOWS),
        patch.object(study, "observe_for", lambda *_: observed()),
        patch.object(measurements, "has_planes", lambda _: False),
        patch.object(Measurements, "_taken_of", lambda self: "known"),
        patch.object(Measurements, "_measure", _score),
    ):
        target = Path(order["target"])
        cli_study.calibrate(str(target.parent), "text.txt", out=str(target), overwrite=True)


if __name__ == "__main__":
    serve(work)
