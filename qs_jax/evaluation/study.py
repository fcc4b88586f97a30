"""Calibration of a real model: windows, observation, measurements on disk, and the search over them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qs_jax.evaluation.calibration import Calibrated, Goal, calibrate
from qs_jax.evaluation.candidates import Space
from qs_jax.evaluation.measurements import Measurements
from qs_jax.evaluation.observation import Observed, observe
from qs_jax.evaluation.perplexity import Advance
from qs_jax.evaluation.windows import Plan, Window
from qs_jax.loading import Model


def calibrate_model(
    model: Model,
    windows: Sequence[Window],
    plan: Plan,
    goals: Sequence[Goal],
    *,
    signal: Any = "relative_drift",
    kv_rule: Any = "frozen",
    target: Path | None = None,
    advance: Advance = lambda n=1: None,
) -> list[Calibrated]:
    """The best policy of a model for each goal, on windows of calibration text.

    What was measured is kept in a hidden file beside `target` until the end, so that an interrupted calibration goes on
    where it was.

    Raises:
        EvaluationError: too few windows, or no place to write.
    """
    file = target.with_name(f".{target.name}.progress") if target else None
    bench = Measurements(model, windows, plan.batch, file, advance)
    space = Space.of(bench.depth, planes=bench.planes, signal=signal, kv_rule=kv_rule)
    prefix = len(windows[0].prompt)
    found = calibrate(bench, space, observe_for(model, bench.parts["search"], space), prefix, goals)
    bench.finish()
    return found


def observe_for(model: Model, windows: Sequence[Window], space: Space) -> Observed:
    """What the dense model shows of the tokens that policies of a space may act on."""
    policy = space.neutral(len(windows[0].prompt))
    return observe(model, windows, protect_first=policy.protect_first, protect_last=policy.protect_last)
