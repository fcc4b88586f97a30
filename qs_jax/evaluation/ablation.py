"""`qs-jax eval --ablate`: every combination of the four mechanisms, calibrated policies, and what they must beat."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import jax
import numpy as np

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.policy import Policy
from qs_jax.evaluation.baselines import direct_stops, fixed_depths, oracle, random_bits, random_halting, uniform_stops
from qs_jax.evaluation.calibration import Calibrated
from qs_jax.evaluation.candidates import Space, part_of_everything, stripped
from qs_jax.evaluation.observation import Observed, observe
from qs_jax.evaluation.perplexity import Advance, run
from qs_jax.evaluation.scoring import OFF, Scores
from qs_jax.evaluation.statistics import summary
from qs_jax.evaluation.windows import Plan, Window
from qs_jax.kernels import has_planes
from qs_jax.model import Model
from qs_jax.request import bind_policy

MECHANISMS = ("halting", "kv_skipping", "fusion", "precision")
PRESETS = ("paper", "balanced")
BUDGETS = (0.05, 0.2, 0.5, 1.0)
MAIN_BUDGET = 0.2


def switched(policy: Policy, on: Sequence[str]) -> Policy:
    """The policy with only these mechanisms acting. Thresholds of the others are neutral, so that all combinations
    share the compiled programs of two K/V rules; the cost of signals that nobody needs is counted all the same."""
    skips = policy.kv_rule in ("drop", "zero")
    rule, kept = (policy.kv_rule, "frozen") if skips else ("drop", policy.kv_rule)
    return replace(
        policy,
        name=" + ".join(on) or "none",
        prompt_halting=_kept(policy.prompt_halting, "halting" in on),
        decode_halting=_kept(policy.decode_halting, "halting" in on),
        kv_rule=rule if "kv_skipping" in on and "halting" in on else kept,
        fusion=_kept(policy.fusion, "fusion" in on),
        precision=policy.precision
        if "precision" in on or policy.precision is None
        else replace(policy.precision, two_below=0.0, four_below=0.0),
    )


def _kept(part: Any, on: bool) -> Any:
    if part is None or on:
        return part
    neutral = tuple(0.0 for _ in part.thresholds) if isinstance(part.thresholds, tuple) else 0.0
    return replace(part, thresholds=neutral)


def ablate(
    model: Model,
    windows: Sequence[Window],
    plan: Plan,
    *,
    subject: Policy | None = None,
    calibrated: Sequence[Calibrated] = (),
    observed: Observed | None = None,
    space: Space | None = None,
    advance: Advance = lambda n=1: None,
) -> dict[str, Any]:
    """The table.

    Args:
        model: what `qs_jax.load` returned.
        windows: unseen text, not that of any calibration.
        plan: how it was cut.
        subject: whose mechanisms are switched on and off; by default one in which each acts on a part of the tokens.
        calibrated: policies to set beside, with what they were calibrated for.
        observed: signals on calibration text, to place the default subject's thresholds.
        space: the layers that baselines stop at; by default as for calibration.
        advance: called after every pass of a batch.

    Returns:
        `table`, one row per policy: `name`, `kind` (off, ablation, preset, calibrated, baseline), `mechanisms`,
        perplexity with interval, what was saved, and seconds per batch; `subject`; and `oracle`.
    """
    space = space or Space.of(model.config.num_hidden_layers, planes=has_planes(model.network))
    seen = observed or observe(model, windows, protect_first=4, protect_last=16)
    if subject is None:
        subject = part_of_everything(space, seen, len(windows[0].prompt))
    kinds: dict[str, tuple[str, Policy]] = {}
    for count in range(len(MECHANISMS) + 1):
        for on in combinations(MECHANISMS, count):
            policy = switched(subject, on)
            kinds[policy.name] = ("ablation", policy)
    kinds |= {name: ("preset", Policy.named(name)) for name in PRESETS}
    for one in calibrated:
        kinds[one.policy.name] = ("calibrated", one.searched)
    prefix, lens = len(windows[0].prompt), model.network.shortcuts is not None
    direct = replace(space, kv_rule="direct", direct_stops=model.network.direct_stops)
    stops = *uniform_stops(space, prefix, lens=lens), *direct_stops(direct, prefix)
    for policy in (*stops, *fixed_depths(space, prefix)):
        kinds[policy.name] = ("baseline", policy)
    scores = _scores(model, windows, {name: policy for name, (_, policy) in kinds.items()}, plan, advance)
    best = next((one.searched for one in calibrated if one.goal.budget == MAIN_BUDGET and one.policy.mechanisms), None)
    random = random_bits(subject, scores) + (random_halting(best, scores[best.name]) if best else [])
    if random:
        scores |= _scores(model, windows, {policy.name: policy for policy in random}, plan, advance)
        kinds |= {policy.name: ("baseline", policy) for policy in random}
    total = sum(window.scored_bytes for window in windows)
    rows = [policy_row(name, kind, policy, scores[name], scores[OFF], total) for name, (kind, policy) in kinds.items()]
    return {
        "table": [policy_row("off", "off", Policy.off(), scores[OFF], scores[OFF], total), *rows],
        "subject": subject.to_json(),
        "oracle": oracle(model, windows),
        "calibrated": [one.to_json() for one in calibrated],
    }


def _scores(
    model: Model, windows: Sequence[Window], policies: Mapping[str, Policy], plan: Plan, advance: Advance
) -> dict[str, Scores]:
    """Scores by name; policies that come to the same once bound to the model are run once."""
    bound = {name: bind_policy(model, policy) for name, policy in policies.items()}
    firsts: dict[str, str] = {}
    same = {name: firsts.setdefault(_identity(policy), name) for name, policy in bound.items()}
    found = run(model, windows, {name: bound[name] for name in firsts.values()}, plan, advance)
    return {OFF: found[OFF], **{name: found[first] for name, first in same.items()}}


def _identity(bound: BoundPolicy) -> str:
    thresholds, structure = jax.tree.flatten(bound)
    return repr((structure, [np.asarray(leaf).tolist() for leaf in thresholds]))


def policy_row(
    name: str, kind: str, policy: Policy, scores: Scores, dense: Scores, scored_bytes: int
) -> dict[str, Any]:
    """A row of the table; `scores` and `dense` are of windows with so many UTF-8 bytes of scored text."""
    found = summary(scores, dense, scored_bytes)
    ledger = found["ledger"]
    return {
        "name": name,
        "kind": kind,
        "mechanisms": []
        if kind == "off"
        else name.split(" + ")
        if kind == "ablation"
        else list(stripped(policy, name).mechanisms),
        **found,
        "flops_reduction": ledger["flops_reduction"],
        "bytes_reduction": ledger["bytes_reduction"],
        "kv_reduction": 1 - ledger["kv_slots"] / ledger["kv_slots_off"],
    }
