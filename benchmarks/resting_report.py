"""The tables of docs/resting.md, from what `benchmarks.resting` measured. Measures nothing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.quality_report import PAGE, fill

Row = Mapping[str, Any]
RESTING = PAGE.with_name("resting.md")


def write_resting(found: Mapping[str, Any]) -> None:
    """Put every table between its markers."""
    made = {"tokens": _tokens, "tokens, tuned": _tokens, "depths": _depths, "halves": _halves, "exits": _exits}
    fill(RESTING, {f"resting {part}": "\n".join(made[part](found[part])) for part in made if part in found})


def _cost(row: Row) -> str:
    return f"{row['nats']:z.4f} ± {row['error']:.4f}"


def _rows(part: Mapping[str, Any]) -> list[Row]:
    return [row for row in part.values() if isinstance(row, Mapping)]


def _tokens(part: Mapping[str, Any]) -> Iterator[str]:
    shares = {share: one for share, one in part.items() if isinstance(one, Mapping)}
    none, *others = shares.items()
    heads = [f"{float(share):.0%} run on, {one['flops_reduction']:.1%} saved" for share, one in others]
    yield f"| chosen by | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    names = sorted(others[0][1]["by"], key=lambda name: others[0][1]["by"][name]["nats"])
    for name in names:
        yield f"| {name} | {' | '.join(_cost(one['by'][name]) for _, one in others)} |"
    all_rest = f" {_cost(none[1]['by']['none'])} |"
    yield f"| *all rest, {none[1]['flops_reduction']:.1%} saved* |{all_rest * len(others)}"


def _depths(part: Mapping[str, Any]) -> Iterator[str]:
    """Those that nothing beats: whatever saves as much costs more."""
    yield "| stop after | last tokens that run | of the others run | FLOPs saved | nats per token | points |"
    yield "|---" * 6 + "|"
    least = math.inf
    for row in sorted(_rows(part), key=lambda row: -row["flops_reduction"]):
        if row["nats"] < least:
            least = row["nats"]
            cells = row["stop"], row["last"], f"{row['share']:.0%}", f"{row['flops_reduction']:.1%}", _cost(row)
            yield f"| {' | '.join(map(str, cells))} | {row['points']:+.2f} |"


def _halves(part: Mapping[str, Any]) -> Iterator[str]:
    yield "| no feed-forward after | FLOPs saved | nats per token |"
    yield "|---|---|---|"
    for stop, row in part.items():
        if isinstance(row, Mapping):
            yield f"| {stop} | {row['flops_reduction']:.1%} | {_cost(row)} |"


def _exits(part: Mapping[str, Any]) -> Iterator[str]:
    ways: Sequence[str] = ("surest", "random", "oracle")
    yield f"| leave after | leave | layers saved | same token, surest | {' | '.join(ways)} |"
    yield "|---" * (len(ways) + 4) + "|"
    found: dict[tuple[int, float], dict[str, Row]] = {}
    for row in _rows(part):
        found.setdefault((row["stop"], row["share"]), {})[row["way"]] = row
    for (stop, share), by in sorted(found.items()):
        one = by[ways[0]]
        cells = " | ".join(_cost(by[way]) for way in ways)
        yield f"| {stop} | {share:.0%} | {one['layers_saved']:.1%} | {one['same_token']:.1%} | {cells} |"
