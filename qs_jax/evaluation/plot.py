"""Coordinates of the report's two figures; the page draws them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 20, 52
BUDGET, PAPER_SAVING = 0.2, 0.396
"""The paper's claim: 39.6 % of FLOPs at a perplexity increase of at most 0.2."""

_LEAST_CEILING = 0.5
_TICKS = 5


@dataclass(frozen=True)
class Mark:
    """A policy: where it is drawn, its interval, and what is said of it. `outside` marks lie above the figure."""

    x: float
    y: float
    low: float
    high: float
    kind: str
    label: str
    outside: bool


@dataclass(frozen=True)
class Pareto:
    """Perplexity increase over FLOPs saved. Ticks are (place, text); `front` joins the marks no other beats."""

    marks: list[Mark]
    front: list[tuple[float, float]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    budget_y: float
    paper_x: float


def pareto(rows: Sequence[Mapping[str, Any]]) -> Pareto:
    """The figure for a table's rows."""
    savings = [row["flops_reduction"] for row in rows]
    trusted = [row["perplexity_increase"] for row in rows if row["kind"] == "calibrated"]
    ceiling = max(_LEAST_CEILING, 1.5 * BUDGET, *(1.3 * value for value in trusted)) if trusted else 1.0
    floor = min(-0.1 * ceiling, *(max(row["perplexity_increase"], -ceiling) for row in rows))
    start, end = min(0.0, *savings), max(PAPER_SAVING + 0.04, *savings)

    def x(saving: float) -> float:
        return round(LEFT + (saving - start) / (end - start) * (WIDTH - LEFT - RIGHT), 1)

    def y(increase: float) -> float:
        part = (min(max(increase, floor), ceiling) - floor) / (ceiling - floor)
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1)

    marks = []
    for row in rows:
        low, high = row["perplexity_increase_interval"] or (row["perplexity_increase"],) * 2
        increase = row["perplexity_increase"]
        label = (
            f"{row['name']}: {row['flops_reduction']:.1%} saved, perplexity {increase:+.3f} ({low:+.3f}, {high:+.3f})"
        )
        marks.append(
            Mark(x(row["flops_reduction"]), y(increase), y(low), y(high), row["kind"], label, increase > ceiling)
        )
    front: list[tuple[float, float]] = []
    best = float("inf")
    for row in sorted(rows, key=lambda row: (-row["flops_reduction"], row["perplexity_increase"])):
        if row["perplexity_increase"] < best and row["perplexity_increase"] <= ceiling:
            best = row["perplexity_increase"]
            front.append((x(row["flops_reduction"]), y(best)))
    return Pareto(
        marks=marks,
        front=front,
        x_ticks=[(x(tens / 10), f"{10 * tens} %") for tens in range(math.ceil(10 * start), math.floor(10 * end) + 1)],
        y_ticks=[
            (y(value), f"{value:+.2f}" if value else "0")
            for value in (0.0, *(ceiling * n / _TICKS for n in range(1, _TICKS + 1)))
        ],
        budget_y=y(BUDGET),
        paper_x=x(PAPER_SAVING),
    )


@dataclass(frozen=True)
class Bar:
    """Tokens that ran `layers` layers."""

    x: float
    y: float
    width: float
    height: float
    layers: int
    tokens: int
    share: str


def histogram(counts: Sequence[int]) -> list[Bar]:
    """One bar per number of layers, from 1 up."""
    counts, total = counts[1:], sum(counts) or 1
    slot = (WIDTH - LEFT - RIGHT) / max(1, len(counts))
    tallest, room = max([*counts, 1]), 200 - TOP - BOTTOM
    return [
        Bar(
            x=round(LEFT + place * slot + 0.1 * slot, 1),
            y=round(200 - BOTTOM - room * count / tallest, 1),
            width=round(0.8 * slot, 1),
            height=round(room * count / tallest, 1),
            layers=place + 1,
            tokens=count,
            share=f"{count / total:.1%}",
        )
        for place, count in enumerate(counts)
    ]
