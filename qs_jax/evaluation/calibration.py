"""`qs-jax calibrate`: the policy that saves most within a perplexity budget, tested on text it was not chosen on."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from scipy import stats

from qs_jax.adaptive.policy import KvRuleName, Policy
from qs_jax.evaluation.candidates import (
    BITS_SHARES,
    DECODE_SHARES,
    FUSED_SHARES,
    Space,
    direct_orders,
    fuse_prompt,
    joined,
    lower_bits,
    neighbours,
    stop_decode,
    stop_prompt,
    stripped,
    uniform_stops,
)
from qs_jax.evaluation.goal import Goal
from qs_jax.evaluation.measurements import Measured, Part
from qs_jax.evaluation.observation import Observed
from qs_jax.evaluation.risk import Estimate, accepted, ladder, pareto_path, rungs
from qs_jax.evaluation.statistics import excess_p_value, increase, linearised_increase, perplexity

_TESTED = 12
"""Most policies that are tested, in equal steps of what they save."""

_COMBINED_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the budget: how close to it the combinations come that are tried."""

_GIVE_UP = 2.0
"""A family of ever more halting is left when its increase is this many budgets."""


@runtime_checkable
class Bench(Protocol):
    """Where policies are measured: `qs_jax.evaluation.measurements.Measurements`, or a stand-in in tests."""

    def of(self, policy: Policy, part: Part) -> Measured: ...
    def stops(self, policies: Sequence[Policy], part: Part) -> None: ...
    def dense(self, part: Part) -> Measured: ...
    def by_text(self, part: Part) -> list[Int[np.ndarray, " windows"]]: ...
    def increase(self, policy: Policy, part: Part) -> float: ...
    def cost(self, policy: Policy) -> float: ...


@dataclass(frozen=True)
class Calibrated:
    """The policy chosen for a goal (off, if none could be trusted) and how it was arrived at: `tested` in order, path
    by path, and of that what is said of the `chosen` one.
    `searched` is the same policy as the search ran it, idle mechanisms included: programs for it are compiled.
    `uniform` is the best stop of the whole prompt, frozen keys and values, and `uniform_with_lens` with those of the
    lens."""

    policy: Policy
    searched: Policy
    goal: Goal
    tested: list[dict[str, Any]]
    chosen: dict[str, Any] | None
    uniform: dict[str, Any] | None
    uniform_with_lens: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy.to_json(),
            "max_ppl_increase": self.goal.said if self.goal.relative else self.goal.budget,
            "confidence": self.goal.confidence,
            "chosen": self.chosen,
            "best_uniform_stop": self.uniform,
            "best_uniform_stop_with_lens": self.uniform_with_lens,
            "tested": self.tested,
        }


def calibrate(bench: Bench, space: Space, observed: Observed, prefix: int, goals: Sequence[Goal]) -> list[Calibrated]:
    """The best policy for each goal.

    Args:
        bench: measures policies on a search part and a test part of the calibration text.
        space: what may be varied.
        observed: what the dense model shows on calibration text, to place thresholds.
        prefix: tokens of the prompts; with a single one only generated tokens can be saved on.
        goals: budgets.

    The search tries uniform stops of the prompt, per-token choices around the best of them, fusion, halting of
    generated tokens and fewer bits, each alone, then the combinations that should be best if increases add up; and
    the uniform stops with frozen keys and values, where the space has another rule. Of stops under a direct lens, whose
    order is known beforehand, nothing is searched: all are measured at once. The test then follows
    `qs_jax.evaluation.risk`.
    """
    dense = perplexity(bench.dense("search").values)
    pool = search(bench, space, observed, prefix, [goal.points(dense) for goal in goals])
    orders = _orders(pool, space, prefix)
    bench.stops([policy for order in orders.get("direct", ()) for policy in order], "test")
    return [_choose(bench, pool, orders, goal) for goal in goals]


def search(bench: Bench, space: Space, observed: Observed, prefix: int, budgets: Sequence[float]) -> list[Policy]:
    """All policies tried on the search part, whatever came of them."""
    neutral, most = space.neutral(prefix), max(budgets)
    parts: list[list[Policy]] = []
    if space.kv_rule == "direct":
        parts.append([policy for order in direct_orders(space, prefix) for policy in order])
    if neutral.fusion:
        parts.append(_prompt_pool(bench, space, observed, prefix, budgets))
        parts.append(_until(bench, [fuse_prompt(neutral, observed, share) for share in FUSED_SHARES], most))
    decode: list[Policy] = []
    for layer in reversed(space.decode_layers if neutral.decode_halting else ()):
        decode += _until(bench, [stop_decode(neutral, observed, layer, share) for share in DECODE_SHARES], most)
    parts.append(decode)
    if neutral.precision:
        parts.append(_until(bench, [lower_bits(neutral, observed, share) for share in BITS_SHARES], most))
    found = [policy for part in parts for policy in part] + _combinations(bench, neutral, parts, budgets)
    frozen = uniform_stops(replace(space, kv_rule="frozen"), prefix) if space.kv_rule != "direct" else []
    return found + [policy for policy in _until(bench, frozen, most) if policy not in found]


def _prompt_pool(bench: Bench, space: Space, observed: Observed, prefix: int, budgets: Sequence[float]) -> list[Policy]:
    """Uniform stops until they cost too much, and per-token choices around the last affordable one of each budget."""
    neutral = space.neutral(prefix)
    uniform = _until(bench, uniform_stops(space, prefix), max(budgets))
    layers = tuple(reversed(space.prompt_layers))
    shares: list[dict[int, float]] = []
    for budget in budgets:
        affordable = [
            n for n, policy in zip(layers, uniform, strict=False) if bench.increase(policy, "search") <= budget
        ]
        around = neighbours(space.prompt_layers, min(affordable, default=layers[0]))
        shares += [choice for choice in around if choice not in shares]
    chosen = [stop_prompt(neutral, observed, choice) for choice in shares]
    for policy in chosen:
        bench.of(policy, "search")
    return uniform + chosen


def _until(bench: Bench, policies: Sequence[Policy], budget: float) -> list[Policy]:
    """Policies of growing effect, up to the first that costs far too much."""
    kept: list[Policy] = []
    for policy in policies:
        kept.append(policy)
        if bench.increase(policy, "search") > _GIVE_UP * budget:
            break
    return kept


def _combinations(
    bench: Bench, neutral: Policy, parts: Sequence[Sequence[Policy]], budgets: Sequence[float]
) -> list[Policy]:
    """Policies that join one choice of each part, the best by the sum of what each part did alone; measured."""
    base = bench.cost(Policy.off())

    def alone(policy: Policy | None) -> tuple[float, float]:
        return (0.0, 0.0) if policy is None else (bench.increase(policy, "search"), bench.cost(policy) - base)

    options = [[(policy, *alone(policy)) for policy in (None, *part)] for part in parts]
    choices = [choice for choice in product(*options) if sum(policy is not None for policy, *_ in choice) > 1]
    sums = [
        Estimate(place, sum(risk for _, risk, _ in choice), sum(cost for *_, cost in choice))
        for place, choice in enumerate(choices)
    ]
    front, found = pareto_path(sums), list[Policy]()
    for budget in budgets:
        for estimate in rungs(front, budget, _COMBINED_SHARES):
            policy = joined(neutral, [policy for policy, *_ in choices[estimate.place] if policy])
            if policy not in found:
                bench.of(policy, "search")
                found.append(policy)
    return found


def _orders(pool: Sequence[Policy], space: Space, prefix: int) -> dict[KvRuleName, list[list[Policy]]]:
    """The uniform stops of the pool by K/V rule, in orders that are known beforehand: the search has no say in them."""
    if space.kv_rule == "direct":
        return {"direct": direct_orders(space, prefix)}
    rules: tuple[KvRuleName, ...] = ("frozen", "affine") if space.kv_rule == "affine" else ("frozen",)
    found: dict[KvRuleName, list[list[Policy]]] = {}
    for rule in rules:
        stops = uniform_stops(replace(space, kv_rule=rule), prefix)
        found[rule] = [[policy for policy in stops if policy in pool]]
    return found


def _choose(
    bench: Bench, pool: Sequence[Policy], orders: Mapping[KvRuleName, Sequence[Sequence[Policy]]], goal: Goal
) -> Calibrated:
    """Test the search's best in order, and uniform stops beside them, one by one from the latest; of what holds, the
    cheapest.

    Every path has its share of the level, so that a mechanism that fails hides only what stands on its own. What
    uniform stops alone would come to is reported as if theirs had been the only paths.
    """
    level = 1 - goal.confidence
    stops = [order for of_rule in orders.values() for order in of_rule if order]
    searched = [policy for policy in pool if not any(policy in order for order in orders.get("direct", ()))]
    paths = [*([_climbing(bench, pool, goal)] if searched else []), *stops]
    p_value = _p_value(bench, goal)
    tests = [(path, accepted(path, p_value, level / len(paths))) for path in paths]
    trusted = [policy for _, held in tests for policy in held]
    tried = [policy for path, held in tests for policy in path[: len(held) + 1]]
    alone = {
        rule: [policy for order in found for policy in accepted(order, p_value, level / len(found))]
        for rule, found in orders.items()
    }
    best = {rule: _row(bench, min(held, key=bench.cost), goal, True) for rule, held in alone.items() if held}
    chosen, name = min(trusted, key=bench.cost, default=None), goal.name
    return Calibrated(
        policy=stripped(chosen, name) if chosen else Policy(name=name),
        searched=replace(chosen or Policy.off(), name=name),
        goal=goal,
        tested=[_row(bench, p, goal, p in trusted) for n, p in enumerate(tried) if p not in tried[:n]],
        chosen=_row(bench, chosen, goal, True) if chosen else None,
        uniform=best.get("frozen"),
        uniform_with_lens=best.get("affine", best.get("direct")),
    )


def _climbing(bench: Bench, pool: Sequence[Policy], goal: Goal) -> list[Policy]:
    """The ladder through the pool: from saving little to saving most, by what the search part says."""
    estimates = [Estimate(n, bench.increase(p, "search"), bench.cost(p)) for n, p in enumerate(pool)]
    budget = goal.points(perplexity(bench.dense("search").values))
    return [pool[e.place] for e in ladder(estimates, budget, bench.cost(Policy.off()), _TESTED)]


def _p_value(bench: Bench, goal: Goal) -> Callable[[Policy], float]:
    """Of several texts the largest: that the budget holds is rejected only where it holds on each of them."""
    dense, texts = bench.dense("test").values, bench.by_text("test")
    # in percent against the dense model's scores raised by the share, so that how sure these are counts as well
    compared, budget = (dense + math.log1p(goal.budget), 0.0) if goal.relative else (dense, goal.budget)

    def p_value(policy: Policy) -> float:
        values = bench.of(policy, "test").values
        return max(excess_p_value(values[places], compared[places], budget) for places in texts)

    return p_value


def _row(bench: Bench, policy: Policy, goal: Goal, is_accepted: bool) -> dict[str, Any]:
    """A tested policy as the report shows it, on the text where it costs most; `upper` bounds the increase there at the
    goal's confidence."""
    measured, dense = bench.of(policy, "test"), bench.dense("test").values
    texts = [(measured.values[places], dense[places]) for places in bench.by_text("test")]
    values, dense = max(texts, key=lambda pair: increase(*pair))
    estimate = increase(values, dense)
    error = float(stats.sem(linearised_increase(values, dense)))
    return {
        "policy": stripped(policy, "tested").to_json(),
        "accepted": is_accepted,
        "perplexity_increase_search": bench.increase(policy, "search"),
        "perplexity_increase": estimate,
        "upper": estimate + float(stats.t.ppf(goal.confidence, len(dense) - 1)) * error,
        "layers_run_mean": measured.layers_run,
        "flops_reduction": measured.flops_reduction,
        "bits_mean": measured.bits,
    }
