"""Whole studies of a model: a calibration, and an evaluation with all that was asked for beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qs_jax.adaptive.policy import KvRuleName, Policy, StateSignalName
from qs_jax.errors import EvaluationError
from qs_jax.evaluation.ablation import BUDGETS, MAIN_BUDGET, ablate
from qs_jax.evaluation.calibration import Calibrated, calibrate
from qs_jax.evaluation.candidates import Space, rare_above
from qs_jax.evaluation.defaults import CALIBRATION_TOKENS, DIRECT_CALIBRATION_TOKENS, RARE_SHARE, SIGNAL
from qs_jax.evaluation.freerun import free_run
from qs_jax.evaluation.goal import Goal
from qs_jax.evaluation.measurements import SEARCH_SHARE, Measurements
from qs_jax.evaluation.observation import Observed, observe
from qs_jax.evaluation.perplexity import Advance, evaluate
from qs_jax.evaluation.windows import Plan, Window, cut
from qs_jax.kernels import has_planes
from qs_jax.model import Model
from qs_jax.sharding import on_host

_DIRECT_SEARCH_SHARE = 16
"""With a direct lens the search part shows no more than how rare tokens are, and what stops save."""


def best_rule(model: Model) -> KvRuleName:
    """What halted tokens leave where nothing else is asked for: by the best lens that the model has."""
    network = model.network
    return "direct" if network.direct_stops else "affine" if network.shortcuts is not None else "frozen"


def tokens_to_calibrate_on(model: Model, kv_rule: KvRuleName | None) -> int:
    """How many tokens a calibration scores where nothing else is asked for."""
    return DIRECT_CALIBRATION_TOKENS if (kv_rule or best_rule(model)) == "direct" else CALIBRATION_TOKENS


def calibrate_model(
    model: Model,
    windows: Sequence[Window],
    plan: Plan,
    goals: Sequence[Goal],
    *,
    signal: StateSignalName = SIGNAL,
    kv_rule: KvRuleName | None = None,
    target: Path | None = None,
    advance: Advance = lambda n=1: None,
) -> list[Calibrated]:
    """The best policy of a model for each goal, on windows of calibration text. Without a `kv_rule` halted tokens leave
    what the model's direct lens makes of them, if it has one, else follow its affine one, else are frozen.

    What was measured is kept in a hidden file beside `target` until the end, so that an interrupted calibration goes on
    where it was.

    Raises:
        EvaluationError: too few windows, or no place to write.
    """
    file = target.with_name(f".{target.name}.progress") if target else None
    kv_rule, stops = kv_rule or best_rule(model), model.network.direct_stops
    share = _DIRECT_SEARCH_SHARE if kv_rule == "direct" else SEARCH_SHARE
    bench = Measurements(model, windows, plan.batch, file, advance, search=share)
    space = Space.of(
        model.config.num_hidden_layers,
        planes=bench.planes,
        signal=signal,
        kv_rule=kv_rule,
        direct_stops=stops,
        rare=_rare(model, bench.parts["search"]),
    )
    prefix = len(windows[0].prompt)
    found = calibrate(bench, space, observe_for(model, bench.parts["search"], space), prefix, goals)
    bench.finish()
    return found


def _rare(model: Model, windows: Sequence[Window]) -> float | None:
    """How rare tokens are that are spared where others stop (`RARE_SHARE` of these prompts), if the model knows."""
    rarity = model.network.rarity
    if rarity is None:
        return None
    prompts = np.asarray([window.prompt for window in windows])
    return rare_above(on_host(rarity.get_value())[prompts].ravel(), RARE_SHARE)


@dataclass(frozen=True)
class Found:
    """Policies calibrated for `BUDGETS`, and what the dense model shows on the text they were calibrated on."""

    calibrated: list[Calibrated]
    observed: Observed


def calibrated_on(
    model: Model,
    documents: Sequence[str],
    plan: Plan,
    tokens: int,
    *,
    judged: Sequence[Window],
    kv_rule: KvRuleName | None = None,
    target: Path | None = None,
    advance: Advance = lambda n=1: None,
) -> Found:
    """Policies for `BUDGETS`, calibrated on `tokens` scored tokens of documents that are cut as `plan` says.

    Args:
        model, plan, advance: as for `study`.
        documents: calibration text.
        tokens: how many of its tokens to score at most.
        kv_rule: as for `calibrate_model`.
        judged: the windows that the policies will be judged on; figures on what was calibrated on would flatter.
        target: where the result will be; an interrupted calibration goes on from a hidden file beside it.

    Raises:
        EvaluationError: text that is too short or among what is judged, or no place to write.
    """
    windows = cut(model, documents, replace(plan, max_tokens=tokens))
    _require_unseen(judged, windows)
    goals = [Goal(budget) for budget in BUDGETS]
    found = calibrate_model(model, windows, plan, goals, kv_rule=kv_rule, target=target, advance=advance)
    space = Space.of(model.config.num_hidden_layers, planes=has_planes(model.network))
    return Found(found, observe_for(model, windows, space))


def _require_unseen(judged: Sequence[Window], windows: Sequence[Window]) -> None:
    seen = {window.scored for window in windows}
    if any(window.scored in seen for window in judged):
        raise EvaluationError("the calibration text is part of what is scored; choose other --calibration-documents")


def study(
    model: Model,
    windows: Sequence[Window],
    policy: Policy,
    plan: Plan,
    *,
    bits: int | None = None,
    ablated: bool = False,
    found: Found | None = None,
    free_runs: int = 0,
    advance: Advance = lambda n=1: None,
) -> dict[str, Any]:
    """What `qs-jax eval` reports.

    Args:
        model, windows, policy, plan, bits, advance: as for `qs_jax.evaluation.perplexity.evaluate`.
        ablated: also the table of `qs_jax.evaluation.ablation.ablate`.
        found: for the table, policies calibrated on other text. If the policy is off, the one for a budget of 0.2 is
            judged in its place.
        free_runs: how many of the windows' prefixes to continue greedily under the policy.
    """
    table: dict[str, Any] = {}
    if ablated:
        calibrated, observed = (found.calibrated, found.observed) if found else ((), None)
        if calibrated and policy == Policy.off():
            policy = calibrated[BUDGETS.index(MAIN_BUDGET)].policy
        subject = None if found or policy == Policy.off() else policy
        table = ablate(model, windows, plan, subject=subject, calibrated=calibrated, observed=observed, advance=advance)
    result = evaluate(model, windows, policy, plan, bits=bits, advance=advance)
    if free_runs:
        result["free_run"] = free_run(model, windows, policy, prompts=free_runs)
    return {**result, **table}


def observe_for(model: Model, windows: Sequence[Window], space: Space) -> Observed:
    """What the dense model shows of the tokens that policies of a space may act on."""
    policy = space.neutral(len(windows[0].prompt))
    return observe(model, windows, protect_first=policy.protect_first, protect_last=policy.protect_last)
