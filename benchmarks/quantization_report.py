"""docs/quantization.md, its figure and README's table, from results of benchmarks.quantization and quantized_decode."""

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, read_result
from benchmarks.plots import Panel, draw
from benchmarks.quality_report import fill

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"
REAL = "smollm2"
BEST = "gptq+tune, companded"
MODELS = ("stories3M", "babyllama105", "gpt2", "llama")
BITS = ("8", "4", "2")
_DRAWN = (
    "MatQuant rounding",
    "rtn",
    "gptq, one pass",
    "gptq",
    "gptq+tune, companded",
    "independent gptq+tune, companded",
)
"""Rows of the figure: a plain shift would flatten all others."""

_NAMES = {"gpt2": "GPT-2 reference model", "llama": "Llama reference model"}

_FOUND = """
## Quick checks: small models

Trained on children's stories, and quantised also in ways that `qs-convert` does not offer. They tell ways to fit codes
apart; what bits cost a model that is worth running, the table above says.

* **Where the cost of nesting came from.** GPTQ keeps a copy of the weights for every precision, each moved by what that
  precision reads; at 2 bits the copies soon ask for codes that no longer lie in one cell. Choosing codes and grid again
  in turns (coordinate descent on the sum of all three errors in what the layer puts out) was expected to take most of
  it back. It takes half or more: compare *gptq, one pass* with *gptq* on stories3M. It costs seconds.
* **The reference models** lose 0.1 % at 4 bits and less than 1 % at 2 with *gptq+tune, companded*, and nothing
  measurable by nesting.
* **stories3M** is small and well trained, and two bits ruin it with or without nesting. Nesting costs 1 % at 4 bits and
  12 % at 2 by default; with *2 bits first* it is 9 % at 2, but 2.4 % at 4, and 8 bits are then 0.7 % above dense.
  Tried on single fits, not kept as rows, without holding all of +0.5 %, 2 % and 10 % at once: weights of (20, 1.25, 1),
  (16, 1.5, 1) and (32, 1, 1); twice the turns and half of them; three times the passes or the rate of tuning; four
  other bends; weights that go from 2 bits first to 8 bits first while turns go on. More turns and tuning were rather
  worse on the judged text.
* **Ten times better than round to nearest at 2 bits** holds where round to nearest breaks a model (stories3M: more than
  40 times). On the others it cannot: round to nearest is not ten times above the dense model there.
* **A rotation** helps what is rounded (rtn at 2 bits: half the perplexity) and not what is fitted on text, where it is
  rather worse at 4 and 2 bits. So conversion has no such option.
* **Companded levels** gain at 4 and at 2 bits. They cost arithmetic when they are read (below), which is why evenly
  spaced ones stay the default of `qs-convert`.
"""

_REAL_FOUND = """
* **8 bits** cost half a percent at most by every method; expected was 0.3 %.
* **4 bits**: rounding costs twice what was expected (53 %, expected 25), fitting takes most of it back: 9 % with
  *gptq*, as expected.
* **Groups of 32**: these weights stand on a grid of 4 bits in groups of 32 already (Q4_1). Codes in the same groups
  lose 0.6 % at 4 bits if they are refitted (expected below 2), and 6 % if they are rounded, not 53. No other model
  would.
* **2 bits** break the model by every method, as expected.
* **The head and the embedding in codes** (one table here, a fifth of the model) cost less than 0.1 % at 8 bits, and a
  step reads 141 MB in place of 225: compare *rtn, head too* with *rtn*. At 4 bits it is free as well, next to what
  the blocks lose. So `qs-convert` makes codes of them as well, unless told otherwise (`--exclude
  '^embedding|^lm_head'`, as in all rows that do not say *head too*).
* **Time and memory**: fitting *gptq* takes minutes and four times the memory of the model in float32 (compilation
  included), rounding seconds.
"""

_REQUESTS = """
A request of 512 + 64 tokens with nothing compiled before, batch 1, once each (`python -m benchmarks.quantization
requests`), on {cpu}. `qs-convert` writes *head too*. Codes at 8 bits were asked to
compile in 12 s: *head too* does, with a dense head it takes a little longer.

"""

_INTRODUCTION = """# Matryoshka quantization: what it costs

One set of integer codes, read at 8, 4 or 2 bits. This page is written by `python -m benchmarks.quantization --report`
from `benchmarks/results/quantization_*.json` and `quantized_decode.json`, which hold hardware, versions and dates.

* **plain shift** cuts the 8-bit code; **MatQuant rounding** rounds and clamps it (arXiv 2502.06786).
* **rtn** reads the middle of a coarser code's cell. **refit** chooses ranges, codes, and scales and offsets per slice
  by what inputs weigh. **gptq, one pass** also makes up for each input's error, for all three readings at once.
  **gptq** goes on from there: every code and every scale and offset is chosen again, in turns, until all three readings
  together are near the layer's output. **+tune** moves scales and offsets by gradient against the block's output.
* **companded** levels stand closer where weights are many (`qs-convert --codebook companded`); all others are evenly
  spaced. **4 bits first** and **2 bits first** weigh the three precisions otherwise.
* **independent** is three models, each fitted for one precision alone: the difference to the same method is what
  nesting costs.
* **rotated** turns the values of every head by a random rotation that the output projection takes back, the one place
  where a rotation folds away exactly in every architecture here.

Fitted on training text, judged on other text; all kernels of the blocks, group 64, embedding and head dense.
"""


def results() -> dict[str, dict[str, Any]]:
    """Result files of models, by name."""
    return {name: found for name in MODELS if (found := read_result(f"quantization_{name}"))}


def real() -> dict[str, Any]:
    """The result of the real model; empty where there is none."""
    return read_result(f"quantization_{REAL}")


def conversions_table(result: dict[str, Any]) -> str:
    """What every conversion loses on both texts, and what it takes."""
    texts = {"wikitext": "", "c4": ", C4"}
    heads = [f"{bits} bits{text}" for text in texts.values() for bits in BITS]
    lines = [f"| conversion | {' | '.join(heads)} | minutes | memory, MB | stored, MB |"]
    lines.append("|" + "---|" * (len(heads) + 4))
    for name, row in result["rows"].items():
        cells = [_increased(row["increase"][text][bits], text == "wikitext") for text in texts for bits in BITS]
        costs = [f"{row['encode_s'] / 60:.1f}", f"{row['encode_peak_rss_mb']:,.0f}", f"{row['bytes'] / 1e6:.0f}"]
        lines.append(f"| {name} | " + " | ".join([*cells, *costs]) + " |")
    return "\n".join(lines) + "\n"


def _increased(found: dict[str, Any], interval: bool) -> str:
    share = found["share"]
    if share >= 1:
        return f"{share + 1:,.0f} ×"
    low, high = found["interval"]
    return f"{share:+.1%}" + (f" ({low:+.1%} to {high:+.1%})" if interval else "")


def requests_table(requests: dict[str, Any]) -> str:
    """What a cold request needs, and how much more memory that is than in float32."""
    lines = [
        "| weights | peak memory, MB | cold request, s | of it compiling | a step, ms | weights a step reads, MB |",
        "|---|---|---|---|---|---|",
    ]
    base = requests["float32"]["peak_rss_mb"]
    for name, found in requests.items():
        memory = f"{found['peak_rss_mb']:,.0f} ({found['peak_rss_mb'] / base:.2f} ×)"
        times = f"{found['cold_s']:.1f} | {found['compile_s']:.1f} | {found['decode_ms_per_step']:.1f}"
        lines.append(f"| {name} | {memory} | {times} | {found['weight_bytes_per_step'] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def readme_table(found: dict[str, dict[str, Any]]) -> str:
    """README's table: the best conversion of every model, and what nesting costs where that was measured."""
    lines = ["| model | 8 bits | 4 bits | 2 bits |", "|---|---|---|---|"]
    rows = real().get("rows", {})
    if best := next((method for method in (BEST, "gptq") if method in rows), None):
        cells = [_increased(rows[best]["increase"]["wikitext"][bits], interval=True) for bits in BITS]
        lines.append(f"| SmolLM2-135M-Instruct ({best}) | " + " | ".join(cells) + " |")
    for name in ("gpt2", "llama", "babyllama105", "stories3M"):
        if name in found:
            rows, dense = found[name]["rows"], found[name]["dense"]
            nested, alone = rows[BEST]["perplexity"], rows[f"independent {BEST}"]["perplexity"]
            cells = [f"{nested[b] / dense - 1:+.1%} ({nested[b] / alone[b] - 1:+.1%})" for b in BITS]
            lines.append(f"| {_NAMES.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """Perplexity, and how far above the dense model's; seconds to encode, compilation included."""
    lines = ["| method | 8 bits | 4 bits | 2 bits | encode, s |", "|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        cells = [_cell(row["perplexity"][b], result["dense"]) for b in BITS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {row['encode_s']:.0f} |")
    return "\n".join(lines) + "\n"


def nesting(result: dict[str, Any]) -> str:
    """How far the nested readings lie above those of models fitted for one precision alone."""
    rows, lines = result["rows"], []
    for name, row in rows.items():
        alone = rows.get(f"independent {name.removesuffix(', 4 bits first').removesuffix(', 2 bits first')}")
        if alone is not None:
            costs = (f"{row['perplexity'][b] / alone['perplexity'][b] - 1:+.1%}" for b in BITS)
            lines.append(f"| {name} | " + " | ".join(costs) + " |")
    head = "What nesting costs, against independent fits by the same method:\n\n| method | 8 bits | 4 bits | 2 bits |\n"
    return head + "|---|---|---|---|\n" + "\n".join(lines) + "\n" if lines else ""


def _cell(perplexity: float, dense: float) -> str:
    ratio = perplexity / dense
    return f"{perplexity:,.3f} ({ratio - 1:+.1%})" if ratio < 2 else f"{perplexity:,.1f} ({ratio:,.0f} ×)"


def panels(found: dict[str, dict[str, Any]]) -> list[Panel]:
    """Perplexity over bits, one panel for each model."""
    return [
        Panel(
            name,
            "bits",
            "perplexity",
            {
                row: ([2, 4, 8], [values["perplexity"][b] for b in reversed(BITS)])
                for row, values in result["rows"].items()
                if row in _DRAWN
            }
            | {"dense": ([2, 8], [result["dense"]] * 2)},
            log_x=True,
            log_y=True,
            faint=("dense",),
        )
        for name, result in found.items()
    ]


def kernels() -> str:
    """Signal to noise of real kernels."""
    path = RESULTS / "quantization_kernels.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    lines = [f"\n## Real GPT-2 124M kernels\n\nSQNR of the weights, dB, over {result['kernels']} attention kernels:\n"]
    lines += ["| method | 8 bits | 4 bits | 2 bits |", "|---|---|---|---|"]
    lines += [f"| {n} | " + " | ".join(f"{r[b]:.1f}" for b in BITS) + " |" for n, r in result["sqnr_db"].items()]
    return "\n".join(lines) + "\n"


def decode() -> str:
    """Time of a decode step."""
    path = RESULTS / "quantized_decode.json"
    if not path.exists():
        return ""
    rows = json.loads(path.read_text())["rows"]
    machines = " and ".join(dict.fromkeys(row["cpu"] for row in rows))
    lines = [
        "\n## A decode step on CPU, batch 1\n\n`python -m benchmarks.quantized_decode`, milliseconds, in brackets how "
        f"many times as fast as float32, on {machines}:\n"
    ]
    names = list(rows[0]["sides"])
    lines += ["| model | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = [f"{s['median_ms']:.1f} ({s['speedup']:.2f} ×)" for s in row["sides"].values()]
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(found: dict[str, dict[str, Any]]) -> str:
    """docs/quantization.md."""
    parts = [_INTRODUCTION]
    if result := real():
        dense = result["dense_of"]
        parts.append(
            f"\n## SmolLM2-135M-Instruct\n\nDense perplexity {dense['wikitext']:.3f} on WikiText-103's test articles "
            f"and {dense['c4']:.3f} on C4, over at least {result['tokens_scored']:,} tokens each; fitted on "
            f"{result['calibration_tokens']:,} tokens of other text of both kinds. Perplexity above the dense model's, "
            "in brackets its 95 % interval (windows resampled):\n\n"
        )
        parts += [conversions_table(result), _REAL_FOUND]
        if requests := result.get("requests"):
            parts += [_REQUESTS.format(cpu=requests["float32"]["cpu"]), requests_table(requests)]
    parts += [_FOUND, "\n![perplexity over bits](quantization.png)\n"]
    for name, one in found.items():
        parts.append(
            f"\n## {name}\n\nDense perplexity {one['dense']:.3f} over {one['tokens_scored']:,} tokens, "
            f"calibrated on {one['calibration_tokens']:,}. "
            f"Stored kernels take {one['bytes_fraction']:.3f} of float32.\n\n"
        )
        parts += [table(one), f"\n{cost}" if (cost := nesting(one)) else ""]
    return "".join((*parts, kernels(), decode()))


def write_report() -> None:
    """The page, its figure, and README's table."""
    found = results()
    draw(panels(found), DOCS / "quantization.png")
    (DOCS / "quantization.md").write_text(page(found), "utf-8")
    fill(README, {"bits": readme_table(found)})
