"""docs/speed.md with its figure, and README's table, from whatever result files are there. Measures nothing.

python -m benchmarks.speed_report
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import goals, real_model
from benchmarks.harness import RESULTS, read_result
from benchmarks.plots import Panel, draw
from benchmarks.quality_report import replaced
from benchmarks.speed import OURS, table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_TITLES = {"decode": "A decode step", "prefill": "Time to the first token", "request": "A whole request"}


def measured() -> list[dict[str, Any]]:
    """Every model's results on every machine, the real model's first, and the machine that most is known of."""
    files = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("speed_*.json"))]
    files.sort(key=lambda file: file["model"] != real_model.NAME)
    return [part for file in files for part in sorted(by_machine(file), key=_known, reverse=True)]


def _known(result: dict[str, Any]) -> tuple[int, str]:
    """How many studies there are, and of when."""
    studies = [rows for study in _TITLES if (rows := result.get(study))]
    return len(studies), max(row.get("date", "") for rows in studies for row in rows)


def by_machine(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One result for each machine that rows come from, a row's own or the file's."""
    machine, studies = result["environment"], [study for study in _TITLES if study in result]
    cpus = dict.fromkeys(row.get("cpu", machine["cpu"]) for study in studies for row in result[study])
    return [
        {"model": result["model"], "environment": {**machine, "cpu": cpu}}
        | {study: [row for row in result[study] if row.get("cpu", machine["cpu"]) == cpu] for study in studies}
        for cpu in cpus
    ]


def decode_panel(result: dict[str, Any]) -> Panel:
    """Time per step of every side against the batch."""
    rows = result["decode"]
    names = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    lines = {}
    for name in names:
        points = [(row["batch"], row["sides"][name]["median_ms"]) for row in rows if name in row["sides"]]
        lines[name] = ([batch for batch, _ in points], [ms for _, ms in points])
    return Panel(
        f"{result['model']}, {result['environment']['cpu']}", "batch", "ms per step", lines, log_x=True, log_y=True
    )


def section(result: dict[str, Any], *, first: bool = True) -> str:
    """One model's tables, of its first machine with what they say; a dash where a side was not measured."""
    machine = result["environment"]
    parts = [
        f"## {result['model']}, {machine['cpu']}\n\n{machine['cores']} cores, float32 unless the side says otherwise.\n"
    ]
    if result["model"] == real_model.NAME:
        parts += [_REAL, by_side(result)] if first else [by_side(result)]
    else:
        parts += by_study(result)
    shares = ", ".join(
        f"{row['bandwidth_fraction']:.0%} of {row['measured_bandwidth_gb_s']:.0f} GB/s at batch {row['batch']}"
        for row in result.get("decode", [])
    )
    if shares:
        parts.append(f"Share of the memory bandwidth measured in the same run that {OURS} reaches: {shares}.\n")
    return "\n".join(parts)


def by_study(result: dict[str, Any]) -> list[str]:
    """One model's measurements, a table for each study."""
    return [
        f"{title}; in brackets, how many times faster qs_jax's float32 is:\n\n"
        f"{table(result[study], 'batch' if study == 'decode' else 'tokens')}\n"
        for study, title in _TITLES.items()
        if result.get(study)
    ]


def by_side(result: dict[str, Any]) -> str:
    """One model's measurements with a row for each side, the fastest in bold, and how far it says what we say."""
    columns = {f"step, batch {row['batch']}": row for row in result.get("decode", [])}
    columns |= {f"first token after {row['tokens']}": row for row in result.get("prefill", [])}
    columns |= {f"{row['tokens']} + {row['new_tokens']} tokens": row for row in result.get("request", [])}
    names = dict.fromkeys(name for row in columns.values() for name in row["sides"])
    lines = [f"| ms | {' | '.join(columns)} | same tokens |", "|" + "---|" * (len(columns) + 2)]
    fastest = [min(side["median_ms"] for side in row["sides"].values()) for row in columns.values()]
    for name in names:
        times = [row["sides"].get(name, {}).get("median_ms") for row in columns.values()]
        cells = [
            "–" if ms is None else f"**{ms:.1f}**" if ms == least else f"{ms:.1f}"
            for ms, least in zip(times, fastest, strict=True)
        ]
        judged = [(row["agreement"][name], row.get("batch", 1)) for row in columns.values() if name in row["sides"]]
        share = sum(agreed * rows for agreed, rows in judged) / sum(rows for _, rows in judged)
        lines.append(f"| {name} | {' | '.join(cells)} | {share:.0%} |")
    return "\n".join([*lines, ""])


def page(
    results: list[dict[str, Any]],
    overhead: dict[str, Any] | None,
    scaling: dict[str, Any] | None,
    profiles: dict[str, Any] | None = None,
    starts: dict[str, Any] | None = None,
    few: dict[str, Any] | None = None,
    asked: str | None = None,
) -> str:
    """docs/speed.md."""
    parts = [_INTRODUCTION, *(section(result, first=result is results[0]) for result in results)]
    if few:
        parts.append(few_rows(few["passes"]))
    if starts:
        parts.append(starting(starts["rows"]) + traced(starts.get("traced", {})) + fitted(starts.get("fits", {})))
    if overhead:
        host, share, cpu = overhead["host_per_chunk"]["median_ms"], overhead["share"], overhead["environment"]["cpu"]
        parts.append(
            f"## Between chunks\n\nOn {cpu} the host costs {host:.2f} ms per chunk of 32 steps, {share:.2%} of the "
            "time (`python -m benchmarks.host_overhead`).\n"
        )
    if scaling:
        parts.append(
            "## How it scales\n\n![scaling](scaling.png)\n\n`python -m benchmarks.scaling`, one process per point, "
            f"on {scaling['environment']['cpu']}.\n" + _flatness(scaling)
        )
    if profiles:
        parts.append(_profiled(profiles["profiles"]))
    return "\n".join([*parts, *([] if asked is None else [asked]), _TRIED])


def starting(rows: dict[str, Any]) -> str:
    """What a whole process takes, and its phases where it is ours."""
    lines = [_STARTING, f"| | {' | '.join(_PHASES.values())} |", "|" + "---|" * (len(_PHASES) + 1)]
    for name, row in rows.items():
        for side, seconds in row["sides"].items():
            cells = [f"{seconds[phase]:.2f}" if phase in seconds else "–" for phase in _PHASES]
            lines.append(f"| {name}, {side}, {row['cpu']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def traced(shapes: dict[str, Any]) -> str:
    """What tracing and lowering a dense request of a shape takes."""
    return "".join(
        f"\n{name}, {row['cpu']}: tracing and lowering the programs of a request takes "
        f"{sum(row['sides'].values()):.2f} s (`python -m benchmarks.start --trace`).\n"
        for name, row in shapes.items()
    )


def fitted(fits: dict[str, Any]) -> str:
    """What a fit takes that has nothing compiled, and how much of it is compiling."""
    return "".join(
        f"\n`qs-jax {command}` of {name.removesuffix(command).strip()} with nothing compiled before, {row['cpu']}"
        f"{_limited(row)}: {seconds['total_s'] / 60:.1f} minutes, "
        f"{seconds['compile_s'] / seconds['total_s']:.0%} of them compiling, "
        f"{seconds['trace_s'] / seconds['total_s']:.0%} tracing (`python -m benchmarks.start --fit {command}`).\n"
        for name, row in fits.items()
        for command, seconds in row["sides"].items()
    )


def _limited(row: dict[str, Any]) -> str:
    """How much text a fit was given, where that is not what it takes by default."""
    return f", {row['max_tokens']:,} tokens of text" if row.get("max_tokens") else ""


def few_rows(passes: dict[str, Any]) -> str:
    """Passes of several tokens and rows, in milliseconds and over a pass of one."""
    shapes = [(row["rows"], row["tokens"]) for row in next(iter(passes.values()))["passes"]]
    heads = [f"{rows} x {tokens}" for rows, tokens in shapes]
    lines = [_FEW_ROWS, f"| rows x tokens of each | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for name, found in passes.items():
        for side, label in (("lanes_ms", "as it is"), ("backend_ms", "without lanes")):
            ms = [row[side] for row in found["passes"]]
            cells = [f"{value:.1f} ({value / ms[0]:.2f} ×)" for value in ms]
            lines.append(f"| {name}, {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _profiled(profiles: dict[str, Any]) -> str:
    """The longest kinds of operation of every profiled step, side by side."""
    parts = [_PROFILES]
    for name, profile in profiles.items():
        lines = [f"{name}, {profile['cpu']}:\n", "| operation | result | times | ms |", "|---|---|---|---|"]
        for row in profile["kinds"][:_LONGEST]:
            lines.append(f"| {row['kind']} | {row['result']} | {row['count']} | {row['ms']:.2f} |")
        parts.append("\n".join([*lines, f"| all | | | {profile['total_ms']:.2f} |", ""]))
    return "\n".join(parts)


def _flatness(scaling: dict[str, Any]) -> str:
    """Whether a token costs more the more are generated, attention over a longer context apart."""
    if "flatness" not in scaling:
        return ""
    found = scaling["flatness"]
    steps = {name: row["median_ms"] for name, row in found["sides"].items()}
    return (
        f"\nA step takes {steps['short']:.1f} ms over 64 tokens after 32, {steps['long']:.1f} over 512 after 32, and "
        f"{steps['same context']:.1f} over 64 after 256, whose mean context is that of the 512: the median of rounds "
        f"is {found['growth']:+.1%} from 64 to 512 tokens, {found['growth_at_same_context']:+.1%} at the same context "
        "(`python -m benchmarks.scaling flat`).\n"
    )


_INTRODUCTION = """# Speed

Against what a user would run instead, on the same weights, greedily, all cores, interleaved rounds, medians;
`benchmarks/results/speed_*.json` holds versions, dates and spreads. `python -m benchmarks.speed decode`, `prefill` and
`request` measure, with the peers that are installed (`pip install "qs_jax[peers]"`); `python -m
benchmarks.speed_report` writes this page.

![speed](speed.png)
"""

_REAL = """SmolLM2-135M-Instruct (`python -m benchmarks.real_model`), milliseconds, the fastest in bold. A column is one
run of `python -m benchmarks.speed decode`, `prefill` or `request` with `--model smollm2`; steps follow a prompt of 32
tokens. `same tokens` is the share of the first 8 greedy tokens, over all columns, that are those of qs_jax's float32.
Every side has the weights of one Q4_1 file, as they stand or written out in its own format: fewer bits than their own
lose some of them again, and int8 products round what is multiplied. Our codes are rounded to nearest in groups of 64,
which is why 4 bits say something else; fitted ones of that size take the same time. llama.cpp is the wheel `xllamacpp`,
which is built for any machine with AVX2; it and OpenVINO read GGUF, in the format that they are named with. None keeps
a prompt for the next call.
"""

_PHASES = {
    "whole_s": "whole process, s",
    "imports_s": "imports",
    "load_s": "loading",
    "prefill_s": "prompt",
    "decode_s": "29 steps",
    "trace_s": "tracing",
    "compile_s": "compiling",
}
_STARTING = """## Starting

`python -m benchmarks.start`: `qs-jax generate` of 30 tokens from the shell, with nothing compiled (cold) and with the
compilation cache that leaves (warm), and transformers, one process each, in turn, medians. Tracing and compiling (or
loading what was compiled) are part of the prompt's time and of the steps'.
"""

_FEW_ROWS = """## Few rows

`python -m benchmarks.few_rows`: milliseconds of a pass over a cache of 512 tokens, in brackets over a pass of one token
of one row in the same line. Exact mode verifies several tokens of a row at once, a batch decodes one of each. Some go
in lanes (`qs_jax/lanes.py`), the rest through the backend's products.
"""

_LONGEST = 8
_PROFILES = """## Where a step's time goes

`python -m benchmarks.step_profile`: the longest kinds of operation, summed over a step as the backend reports them.
Those that run side by side are each counted in full, and tracing slows all. `dot` and `ynn_fusion` are products, the
latter by XLA's library YNNPACK; `f32[2,384,32]` is a product for 32 rows with outputs in a block per core.
"""

_TRIED = """## What was tried

[tried.md](tried.md): what was expected of each change, and what came of it.
"""


def documents() -> dict[Path, str]:
    """docs/speed.md and README as the result files have them."""
    results, readme = measured(), ROOT / "README.md"
    others = map(read_result, ("host_overhead", "scaling", "step_profile", "start", "few_rows"))
    return {
        DOCS / "speed.md": page(results, *others, asked=goals.table()),
        readme: replaced(readme.read_text("utf-8"), "speed", by_side(results[0]).rstrip()),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    # more sides than colours stand beside the real model
    drawn = [r for r in measured() if len(r.get("decode", [])) > 1 and r["model"] != real_model.NAME]
    draw([decode_panel(result) for result in drawn], DOCS / "speed.png")
    for path, text in documents().items():
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
