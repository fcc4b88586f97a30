"""Which of many policies may be trusted to stay within a budget, decided on text they were not chosen on.

Learn then test (Angelopoulos et al. 2021, arXiv 2110.01052) with Pareto testing (Laufer-Goldshtein et al. 2023,
arXiv 2210.07913): one part of the calibration text finds the policies that are best at their cost and puts them in
order, another tests them in that order. Since testing stops at the first policy that cannot be trusted, the chance
that any accepted one is truly above the budget is at most the level, however many were tried in the search. There may
be several orders, each with its share of the level (fixed sequences with several starts, ibid.).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Estimate(NamedTuple):
    """What the search found of a candidate, by its place in the pool: estimated risk, and cost (smaller is better)."""

    place: int
    risk: float
    cost: float


def pareto_path(estimates: Iterable[Estimate]) -> list[Estimate]:
    """The estimates that no other beats in both risk and cost, from the safest to the cheapest."""
    front: list[Estimate] = []
    for estimate in sorted(estimates, key=lambda e: (e.risk, e.cost)):
        if not front or estimate.cost < front[-1].cost:
            front.append(estimate)
    return front


def rungs(path: Sequence[Estimate], budget: float, shares: Sequence[float]) -> list[Estimate]:
    """Of a path, the cheapest estimate within each share of the budget: few, but from safe to bold.

    Looks at the search's estimates only, so that the test stays valid.
    """
    found: list[Estimate] = []
    for share in shares:
        within = [estimate for estimate in path if estimate.risk <= share * budget]
        if within and within[-1] not in found:
            found.append(within[-1])
    return found


def ladder(estimates: Iterable[Estimate], budget: float, dense_cost: float, steps: int) -> list[Estimate]:
    """Of what seems affordable, the safest estimate of each equal step of saving: from saving little to saving most.

    Ordered by saving, which is known, and not by risk, which the search only guesses: one bold candidate that happens
    to look harmless must not push the timid ones off the path, for if it fails the test nothing is left. Left out is
    only what takes more than half of the budget though a later step takes less: failing there would hide the better.
    """
    affordable = [estimate for estimate in estimates if estimate.risk <= budget and estimate.cost < dense_cost]
    most = max((dense_cost - estimate.cost for estimate in affordable), default=0.0)
    safest: dict[int, Estimate] = {}
    for estimate in sorted(affordable, key=lambda e: (e.risk, e.cost)):
        safest.setdefault(math.ceil(steps * (dense_cost - estimate.cost) / most), estimate)
    path = [safest[step] for step in sorted(safest)]
    return [
        estimate
        for place, estimate in enumerate(path)
        if estimate.risk <= budget / 2 or all(estimate.risk <= later.risk for later in path[place + 1 :])
    ]


def accepted(path: Sequence[T], p_value: Callable[[T], float], level: float) -> list[T]:
    """Fixed-sequence testing: candidates in order, up to the first whose p-value is above the level."""
    trusted: list[T] = []
    for candidate in path:
        if p_value(candidate) > level:
            break
        trusted.append(candidate)
    return trusted
