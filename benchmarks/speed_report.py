"""docs/speed.md with its figure, and README's table, from whatever result files are there. Measures nothing.

python -m benchmarks.speed_report
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import real_model
from benchmarks.harness import RESULTS
from benchmarks.plots import Panel, draw
from benchmarks.speed import OURS, table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
_FIRST = (OURS, "qs_jax bfloat16", "qs_jax 8-bit", "qs_jax 4-bit")
_COMPARED = "transformers float32"
_MARKS = "<!-- python -m benchmarks.speed_report -->", "<!-- end -->"
_TITLES = {"decode": "A decode step", "prefill": "Time to the first token", "request": "A whole request"}


def read(name: str) -> dict[str, Any] | None:
    """A result file, or None where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def measured() -> list[dict[str, Any]]:
    """Every model's results on every machine, the real model's first."""
    files = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("speed_*.json"))]
    files.sort(key=lambda file: file["model"] != real_model.NAME)
    return [part for file in files for part in by_machine(file)]


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


def section(result: dict[str, Any]) -> str:
    """One model's tables; a dash where a side was not measured."""
    machine = result["environment"]
    parts = [
        f"## {result['model']}, {machine['cpu']}\n\n{machine['cores']} cores, float32 unless the side says otherwise.\n"
    ]
    if result["model"] == real_model.NAME:
        parts += [_REAL, by_side(result)]
    for study, title in () if result["model"] == real_model.NAME else _TITLES.items():
        key = "batch" if study == "decode" else "tokens"
        rows = result.get(study, [])
        if rows:
            parts.append(f"{title}; in brackets, how many times faster qs_jax's float32 is:\n\n{table(rows, key)}\n")
    shares = ", ".join(f"{row['bandwidth_fraction']:.0%} at batch {row['batch']}" for row in result.get("decode", []))
    if shares:
        parts.append(f"Share of the memory bandwidth measured in the same run that {OURS} reaches: {shares}.\n")
    return "\n".join(parts)


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


def headline(results: list[dict[str, Any]]) -> str:
    """README's table: a decode step of one model on every machine, the fastest side of a row in bold."""
    rows = [(result["environment"]["cpu"], row) for result in results for row in result.get("decode", [])]
    names = list(dict.fromkeys([*_FIRST, *(name for _, row in rows for name in row["sides"])]))
    lines = ["| machine, batch | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for cpu, row in rows:
        shown = {name: f"{side['median_ms']:.1f}" for name, side in row["sides"].items()}
        fastest = min(map(float, shown.values()))
        shown = {name: f"**{ms}**" if float(ms) == fastest else ms for name, ms in shown.items()}
        if _COMPARED in shown:
            shown[_COMPARED] += f" ({row['sides'][_COMPARED]['speedup']:.2f} ×)"
        cells = [shown.get(name, "–") for name in names]
        lines.append(f"| {cpu.replace('Intel(R) ', '').split('(')[0]}, {row['batch']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_headline(readme: str, table: str) -> str:
    """README with its table between the two marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    before, rest = readme.split(_MARKS[0])
    _, after = rest.split(_MARKS[1])
    return f"{before}{_MARKS[0]}\n{table}\n{_MARKS[1]}{after}"


def page(
    results: list[dict[str, Any]],
    overhead: dict[str, Any] | None,
    scaling: dict[str, Any] | None,
    profiles: dict[str, Any] | None = None,
    starts: dict[str, Any] | None = None,
) -> str:
    """docs/speed.md."""
    parts = [_INTRODUCTION, *(section(result) for result in results)]
    if starts:
        parts.append(starting(starts["rows"]))
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
    return "\n".join([*parts, _TRIED])


def starting(rows: dict[str, Any]) -> str:
    """What a whole process takes, and its phases where it is ours."""
    lines = [_STARTING, f"| | {' | '.join(_PHASES.values())} |", "|" + "---|" * (len(_PHASES) + 1)]
    for name, row in rows.items():
        for side, seconds in row["sides"].items():
            cells = [f"{seconds[phase]:.2f}" if phase in seconds else "–" for phase in _PHASES]
            lines.append(f"| {name}, {side}, {row['cpu']} | {' | '.join(cells)} |")
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

_LONGEST = 8
_PROFILES = """## Where a step's time goes

`python -m benchmarks.step_profile`: the longest kinds of operation, summed over a step as the backend reports them.
Those that run side by side are each counted in full, and tracing slows all. `dot` and `ynn_fusion` are products, the
latter by XLA's library YNNPACK; `f32[2,384,32]` is a product for 32 rows with outputs in a block per core.
"""

_TRIED = """## What was tried

Before and after are the same command on the commits before and after, minutes apart on a machine that drifts. Figures
of prompts, from "Slots that no query may see" to "Prompts through codes", and memory are of scratch scripts that time
the request of `prefill`.

* **Codes of 768 inputs.** At 8 bits a step of the GPT-2 124M shape took 4.5 times its float32, though a 4096-wide model
  was near it. The sum over 32 spans or fewer had swallowed the loop over the codes, which was then not vectorised. A
  barrier was expected to part them and did nothing: XLA drops it before it fuses. A product with ones, which must read
  its terms from memory, was expected to bring all kernels to the rate of the wide ones: a step at 8 bits went from 111
  to 26.5 ms, at 4 bits from 89 to 16 (`decode --batch 1`).
* **Attention of grouped heads.** Rows of a product that share keys are packed first; one by one they read memory as it
  lies. Expected from the product alone: 2 times faster attention; a whole request of the Llama reference model, dense,
  went from 711 to 503 ms (`request`, EPYC). On the Xeon up to 4 rows gain (1.5 times for two over 1,024 slots) and 8
  lose as much, so that 4 is the limit.
* **bfloat16 on a CPU** took 58 ms per step at batch 1 and 197 at batch 32, three times float32: asked for products in
  bfloat16, XLA writes every weight out as float32 at every step. Asked for sums in float32 it has kernels that read
  bfloat16 as it is, from two rows on. Expected: half of float32's time at every batch, as half is read. See the tables:
  0.75 of it at batch 1, half at batch 2 and 8. Two more things stood in the way. One row goes as two. A scatter of
  bfloat16 turned the whole cache into float32 and back (24 ms per step at batch 32); to choose between old and new in
  every slot, by their bits, takes 0.6.
* **Cache writes.** Values lay with slots last, for products that contract over a contiguous axis, and a token wrote one
  number per cache line: 6.9 of 83 ms at batch 32 in a profile. Expected with channels last: 5 ms less at batch 32, and
  attention over long contexts up to 10 % slower. Outcome, alternating with the commit before: 70.6 ms against 74.9 at
  batch 32, 36.4 against 38.1 at batch 8, level at batch 1 with 32, 200 and 512 tokens before.
* **Logits of several rows** come out of the head's product with rows side by side; to turn them over for `argmax` and
  the softmax's sum took 9 ms at batch 32. Expected from the reductions alone: 5 ms less. Outcome: 2.5 (68.0 against
  70.6), nothing at batch 8.
* **Prompts.** In a profile of 1,023 tokens in float32 products of weights take 617 of 830 ms, at 270 to 310 GFLOP/s.
  Queries attend 256 at a time, so that fewer scores are written out. Expected: 150 ms less. Outcome, alternating:
  nothing in float32 for one prompt, 8 % less for eight of 512, a quarter less in bfloat16 (460 ms against 616). The
  same blocks without a loop: a twentieth.
* **Slots that no query may see.** Slots go in blocks as well, with the softmax summed on the way, and blocks after the
  queries are left out. Expected: half of attention, 70 of 450 ms in bfloat16, 80 of 880 in float32. Outcome: 22 and 30,
  as the loops themselves cost; 512 queries at a time by 256 slots a further 43 ms in float32, nothing in bfloat16.
* **bfloat16 prompts** took 450 ms at 1,023 tokens, products alone about 140. A profile showed activations rounded to
  bfloat16 after each of their operations (54 ms in all), keys and values turned into float32 and back by a scatter (65)
  and weights of attention written in float32 before they are rounded (20). Expected without these: 100 ms less.
  Outcome: 428 to 366. Activations are taken of float32, narrow floats are scattered by their bits. Steps at batch 1
  gain as well (15.4 ms against 16.7), at 8 not.
* **Rotary angles** are computed anew for every head of every layer, as XLA fuses a cosine into whatever needs it, and
  a barrier is dropped before. A product with ones and zeros keeps them: expected 60 ms of 1,018 for 512 tokens of the
  1.1 B shape in bfloat16, outcome 51; nothing in decoding.
* **The last layer of a prompt** ran whole for all tokens, though nobody reads what comes out of it but for a row's last
  one. Keys and values are enough for the others: equal to rounding. Expected from the ledger, which says 3.2 % of the
  FLOPs for 512 tokens of SmolLM2-135M, 5.8 % for 448 of the reference Llama and 7.1 % for 192 of the reference GPT-2:
  3.0, 5 and 6 % less time. Outcome, CPU time on a busy machine, pairs in turn: 3.2 (bfloat16 3.2), 5 and 5 %.
* **Widths of prompts.** 700 tokens took as long as 1,024, to which they were padded. With two widths per octave they
  are padded to 768: 646 ms against 872, for one more program to compile per octave.
* **Prompts through codes** took twice the time of float32 at 128 tokens of the GPT-2 shape, and 1.8 times at 512 of the
  1.1 B one, far more than the same products alone. The program's memory told why: weights depend on codes only, so that
  the compiler wrote out those of all layers at once (340 MB of 436; of the 1.1 B shape 4 GB), and drops a barrier meant
  to prevent it. Scales that wait for the rows, by a condition on one of them, do: 124 MB, at 8 bits 203 to 145 ms for
  128 tokens in float32, 132 to 88 in bfloat16; 552 to 476 and 257 to 225 for 512. Before that they were turned over as
  well: 224 ms in bfloat16 for 128. Loops over parts of inputs or blocks of outputs bound the memory too, but no longer
  run queries, keys and values side by side: 166 and 176 ms for 128 tokens, 543 and 545 for 512. Steps of more than 4
  rows in bfloat16 now write weights out as well: 57 ms against 65 at batch 8, 74 against 119 at 32.
* **85 % of the bandwidth at batch 1** is not reached by this shape; the 1.1 B one, whose kernels are larger, does. Its
  products alone, in a chain, reach 91 %, and attention and all that is small take the rest. Tried: 4, 8 or 16 blocks of
  outputs in place of one per core, 26.7, 27.1 and 26.6 GB/s against 27.1; queries, keys and values as one product, 14.6
  ms for all layers against 14.7; vectors of 512 bits, below.
* **Two groups of codes at a time** from five rows on. Expected from the product alone: 18 % at 8 rows. Outcome: a step
  at batch 8 and 8 bits went from 64.1 to 57.4 ms. Four at a time leave the cache.
* **Codes through bfloat16 products** (levels are exact in it, inputs as a sum of three parts, so that the result is
  that of float32): expected twice as fast at 8 rows; 4.9 ms per kernel against 1.25, as every group's result is
  written out before its scale. int8 times int8 in three parts: 7.2. Weights and inputs rounded to bfloat16: 1.0, no
  faster than two groups at a time in float32, and not the stored weights.
* **Attention on both cores.** Its many small products run on one core, at 12 GB/s. As sums written out by span they ran
  on both: 18.4 ms against 26.0 at batch 32, 5.2 against 6.6 at batch 8, level at batch 1 and slower over 1,024 slots
  (6.9 ms against 4.0); they need keys with slots last, which are slow to write. The batch's halves as arrays of their
  own are not run side by side: 24.0 against 26.8. Not used; products only, in a scratch script.
* **8 bits against CTranslate2's int8**: level at batch 1 on a Xeon with AVX-512, not on an EPYC without, where both
  cores are busy decoding codes, not waiting for them. At 4 bits a step is the faster on both. At batch 8 weights are
  decoded into cache and multiplied as float32, which costs more than reading float32 does.
* **Vectors of 512 bits on AVX-512**, which XLA leaves at 256. Expected, from products alone: codes 20 % faster.
  `XLA_FLAGS=--xla_cpu_prefer_vector_width=512 python -m benchmarks.speed decode --batch 1 8 --peers --quick` in turn
  with 256, twice each: batch 1 float32 18.9 and 19.6 ms against 19.3 and 20.0, 8 bits 9.5 and 10.3 against 10.7 and
  11.5, 4 bits 6.9 and 7.7 against 7.3 and 8.5; batch 8 the same within noise. 10 % at batch 1 does not earn a compiler
  option that only one kind of machine has; whoever has one can set the flag.
* **Eight rows through codes one by one**, as up to four are: expected to be a little faster, as a product of 768 x 3072
  alone took 1.9 ms against 2.2 in a scratch script on a busy machine. A whole model was still compiling after six
  minutes (its program holds every row's loop) and was given up. Codes of all places of a block side by side, so that
  one product needs neither scale nor offset: 5.0 ms against 2.2 in the same script.
* **Starting** (`python -m benchmarks.start`, before and after on a quiet EPYC): 14.2 s cold and 7.6 warm,
  transformers 6.5. Half of loading traced random initialisers that nobody runs: 3.0 s to 0.7. A dense request ran
  eighteen programs, of which fifteen embedded, allocated, cast or took logits; now three. Equal layers were traced
  and lowered thirty times: 2.4 s to 0.5, and XLA compiles what is traced once in less time too. Expected: 5 s warm.
  Outcome: 5.0, and 10.8 cold. Not reached: 4 and 10. Of the 5.0, imports take 0.9 (jax alone 0.6), loading two
  compiled programs of some 600 kernels each 1.2, the tokens themselves 0.9, and half a second goes by after the last
  token, while the process gives its memory back.
* **One row of bfloat16 without AMX.** On an EPYC with AVX-512 a step of SmolLM2-135M takes 34 ms in bfloat16 and 25
  in float32, though it reads half: YNNPACK's kernels reach 5 to 11 GB/s of 26. A loop of our own, in which every 16th
  input goes into the same lane, reads them at 16 to 24 once the weights are given as integers (a view of the same
  memory: what is made of narrow floats in a loop is written out before it, at 1 to 2 GB/s) and the terms of an output
  are written out, up to 36 of them (with 8 or 12 and more lanes: 63 to 76 ms). Expected: 17 ms a step. Outcome: 22.1,
  and 17 s to compile against 4.5, which 1,000 tokens earn back. Not used; scratch script.
* **Equal layers as one compiled unit** (`outline.py`), with what a layer returns packed into one array: expected to
  compile in a tenth of the time. 4.5 s against 5.4, and nothing when loaded from the cache: XLA compiles equal
  kernels once either way, and clones the rest. Compiler options: without fusion emitters 17.7 s in place of 7.2,
  without the expensive passes of LLVM 9.0, its split count nothing. Not used.
* **llama.cpp and OpenVINO beside us**, SmolLM2-135M on an EPYC with AVX-512 and its bfloat16 products. Expected: a step
  of ours 24 ms in float32, 33 in bfloat16, 26 and 20 at 8 and 4 bits, llama.cpp 10 to 13, OpenVINO 9 to 16; 512 tokens
  480 ms in float32 and 350 in bfloat16, llama.cpp 1,000 to 1,800, OpenVINO 350 to 450. At 8 rows: ours 70 in float32
  and 110 at 4 bits, OpenVINO 25. Outcome: llama.cpp and OpenVINO at one row as expected, ours faster but in bfloat16
  (31.1), at 8 rows all faster (44, 47 and 18); CTranslate2, expected at 30 and 15, slower (39.1 and 26.5). Prompts of
  ours are slower (738 and 417), OpenVINO's faster (266 to 307): a whole request takes it 0.87 to 1.29 s, ours 1.69 to
  2.37. In its wheel, for AVX2, llama.cpp loses on prompts what its steps gain. Its `llama-bench`, compiled on the
  machine, takes 730 ms for 512 tokens and 8.0 for a step of Q8_0, in F16 860 and 9.4 (a scratch build of another
  version, no prompt before the steps; Q4_1 was disturbed). Eight rows take OpenVINO 17 to 18 ms in every format, 1.2 to
  2.0 times one; ours 2.2 times in float32, 1.1 in bfloat16 and 3.2 as codes; llama.cpp 3.3 to 4.0. A first run of the
  steps at one row, beside other work, had 37 ms where this one has 20.5, and 25 GB/s of bandwidth for 35; it was thrown
  away.
* **OpenVINO's Q4_1** says something else than the file: 23 % of the first tokens after 8 prompts are ours, where Q8_0
  has 80 and F16 97. Guess: it stores where a group begins as a whole number of its steps, which moves the weights by 8
  % of their norm. With weights so rounded and written as F16 it agrees with itself at 73 %, which int8 products and a
  cache of 8 bits can explain. It reads neither F32 nor BF16 ("Unsupported quantization type"). optimum-intel, which
  would convert the folder, requires transformers below 5.6 and was left out, as the GGUF needs no converter.
* **Whole requests of the reference models**: calibration saves the prompt's work only. Of a dense Llama request of 284
  ms the prompt takes 100, so that 1.5 times would be out of reach if the prompt cost next to nothing (1.54), while no
  generated token may stop early within +0.2. Codes do not help models of 256 to 320: their kernels are too small to be
  streamed.
"""


def documents() -> dict[Path, str]:
    """docs/speed.md and README as the result files have them."""
    results, readme = measured(), ROOT / "README.md"
    table = headline([result for result in results if result["model"] == "gpt2-124m"])
    return {
        DOCS / "speed.md": page(results, *map(read, ("host_overhead", "scaling", "step_profile", "start"))),
        readme: with_headline(readme.read_text("utf-8"), table),
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
