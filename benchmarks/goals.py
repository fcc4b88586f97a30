"""The goals of "first token fast, deep narrow models fast, bits that pay", and what the result files say of them.

A part of docs/speed.md, which `python -m benchmarks.speed_report` writes. Measures nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import read_result

Rows = dict[tuple[str, int], dict[str, Any]]
"""Rows of a study of one model, by machine and batch, or tokens."""


@dataclass(frozen=True)
class Goal:
    """One figure that was asked for: at most `most`, and what was measured on each machine."""

    name: str
    most: float
    unit: str
    measured: Mapping[str, float]
    tried: str = ""

    def cells(self, machines: list[str]) -> list[str]:
        """A line of the table; in bold what misses the goal, and only then what was tried."""
        missed = any(value > self.most for value in self.measured.values())
        return [self.name, f"≤ {self._said(self.most)}", *map(self._cell, machines), self.tried if missed else ""]

    def _cell(self, machine: str) -> str:
        if machine not in self.measured:
            return "–"
        said = self._said(self.measured[machine])
        return said if self.measured[machine] <= self.most else f"**{said}**"

    def _said(self, value: float) -> str:
        if self.unit == "%":
            return f"{value:.0%}"
        if self.unit == "×":
            return f"{value:.2f} ×"
        return f"{value:.1f} {self.unit}" if self.unit == "ms" else f"{value:.2f} {self.unit}"


def goals() -> list[Goal]:
    """All of them, in the order of the work."""
    return [*_starting(), *_steps(), *_few_rows(), *_eight_prompts(), *_codes(), *_prompts()]


def table() -> str:
    """The page's section; empty where nothing is measured."""
    found = [goal for goal in goals() if goal.measured]
    machines = sorted({machine for goal in found for machine in goal.measured})
    heads = ["smollm2 unless said", "goal", *machines, "what was tried"]
    lines = [_SECTION, f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    lines += [f"| {' | '.join(goal.cells(machines))} |" for goal in found]
    return "\n".join([*lines, ""])


def _starting() -> Iterator[Goal]:
    """A command's phases, and how much of the long ones is compiling."""
    starts = read_result("start")
    row = starts.get("rows", {}).get("smollm2 float32")
    for name, side, phase, most in (
        ("30 tokens, warm", "warm", "whole_s", 4),
        ("30 tokens, cold", "cold", "whole_s", 10),
        ("loading", "warm", "load_s", 1.5),
    ):
        measured = {row["cpu"]: row["sides"][side][phase]} if row else {}
        yield Goal(name, most, "s", measured, "*Starting*, *A command's end*")
    traced = starts.get("traced", {}).get("llama-2-7b bfloat16")
    took = {traced["cpu"]: sum(traced["sides"].values())} if traced else {}
    yield Goal("tracing and lowering, llama-2-7b", 3, "s", took, "*Starting*")
    for command in ("lens", "calibrate"):
        fit = starts.get("fits", {}).get(f"smollm2 float32 {command}")
        seconds = fit["sides"][command] if fit else {}
        share = {fit["cpu"]: seconds["compile_s"] / seconds["total_s"]} if fit else {}
        yield Goal(f"compiling, of `{command}`", 0.25, "%", share)
    cold = read_result("quantization_smollm2").get("requests", {}).get("codes, head too, 8 bits", {})
    took = {cold["cpu"]: cold["compile_s"]} if "compile_s" in cold else {}
    yield Goal("compiling, codes at 8 bits", 12, "s", took, "*Starting*")


def _steps() -> Iterator[Goal]:
    """A step at batch 1."""
    for model, side, most, tried in (
        ("smollm2", "float32", 24, ""),
        ("smollm2", "bfloat16", 16, "*One row of bfloat16 without AMX*"),
        ("smollm2", "8-bit", 16, "*Small kernels as codes*"),
        ("smollm2", "4-bit", 13.5, "*Small kernels as codes*"),
        ("llama-1.1b", "8-bit", 50, "*8 bits against CTranslate2's int8*, *Another EPYC*"),
        ("llama-1.1b", "4-bit", 35, "*Vectors of 512 bits on AVX-512*, *Another EPYC*"),
    ):
        rows = _rows(model, "decode", "batch")
        measured = {cpu: _ms(row, f"qs_jax {side}") for (cpu, batch), row in rows.items() if batch == 1}
        found = _beside_codes(model, side) | _known(measured)
        yield Goal(f"a step, {_of(model)}{side}", most, "ms", found, tried)
    rows = _rows("smollm2", "decode", "batch")
    beside = {
        cpu: ours / theirs
        for (cpu, batch), row in rows.items()
        if batch == 1 and (ours := _ms(row, "qs_jax 4-bit")) and (theirs := _ms(row, "llama.cpp Q4_1"))
    }
    tried = "*llama.cpp and OpenVINO beside us*, *Small kernels as codes*"
    yield Goal("a step, 4-bit, over llama.cpp's Q4_1", 1, "×", beside, tried)


def _beside_codes(model: str, side: str) -> dict[str, float]:
    """The same step as `benchmarks.quantized_decode` has it."""
    name = {"float32": "qs_jax float32", "8-bit": "8 bits", "4-bit": "4 bits"}.get(side)
    rows = [row for row in read_result("quantized_decode").get("rows", []) if row["model"] == model]
    return {row["cpu"]: row["sides"][name]["median_ms"] for row in rows if name in row["sides"]}


def _few_rows() -> Iterator[Goal]:
    """Passes of several tokens or rows, over a pass of one."""
    passes = read_result("few_rows").get("passes", {})
    for what, rows, tokens, most in (("5 tokens", 1, 5, 1.4), ("9 tokens", 1, 9, 1.8), ("8 rows", 8, 1, 2)):
        for dtype in ("float32", "bfloat16"):
            measured = {}
            for name, found in passes.items():
                if name.startswith(f"smollm2 {dtype}, "):
                    ms = {(row["rows"], row["tokens"]): row["lanes_ms"] for row in found["passes"]}
                    measured[found["cpu"]] = ms[rows, tokens] / ms[1, 1]
            tried = "*Few rows of float32*" if dtype == "float32" else "*One row of bfloat16 without AMX*"
            yield Goal(f"{what} over a step, {dtype}", most, "×", measured, tried)


def _eight_prompts() -> Iterator[Goal]:
    """Prompts of several rows, over one."""
    found = read_result("few_rows").get("prompts", {})
    for dtype in ("float32", "bfloat16"):
        rows = [row for name, row in found.items() if name.startswith(f"smollm2 {dtype}, ")]
        measured = {row["cpu"]: row["prompts"]["8"] / row["prompts"]["1"] for row in rows}
        yield Goal(f"512 tokens of 8 rows over one row's, {dtype}", 8, "×", measured, "*Prompts of eight rows*")


def _codes() -> Iterator[Goal]:
    """Codes of several rows, over float32."""
    for side in ("8-bit", "4-bit"):
        rows = _rows("smollm2", "decode", "batch")
        measured = {
            cpu: ours / dense
            for (cpu, batch), row in rows.items()
            if batch == 8 and (ours := _ms(row, f"qs_jax {side}")) and (dense := _ms(row, "qs_jax float32"))
        }
        tried = "*Three to sixty-four rows of codes*"
        yield Goal(f"8 rows, {side}, over float32", 1.1, "×", measured, tried)


def _prompts() -> Iterator[Goal]:
    """Time to the first token in bfloat16, over transformers'."""
    for model in ("smollm2", "gpt2-124m", "llama-1.1b"):
        rows = _rows(model, "prefill", "tokens")
        for tokens in sorted({tokens for _, tokens in rows}):
            measured = {
                cpu: ours / theirs
                for (cpu, length), row in rows.items()
                if length == tokens
                and (ours := _ms(row, "qs_jax bfloat16"))
                and (theirs := _ms(row, "transformers bfloat16"))
            }
            name = f"{_of(model)}{tokens:,} tokens, bfloat16, over transformers"
            tried = "*bfloat16 prompts*, *The last layer of a prompt*, *Another EPYC*"
            yield Goal(name, 1, "×", measured, tried)


def _rows(model: str, study: str, key: str) -> Rows:
    return {(row["cpu"], row[key]): row for row in read_result(f"speed_{model}").get(study, [])}


def _ms(row: dict[str, Any], side: str) -> float | None:
    return row["sides"].get(side, {}).get("median_ms")


def _known(measured: dict[str, float | None]) -> dict[str, float]:
    return {machine: value for machine, value in measured.items() if value is not None}


def _of(model: str) -> str:
    return "" if model == "smollm2" else f"{model}, "


_SECTION = """## Goals

What was asked of starting, of a deep narrow model and of bits; in bold what misses it, with the paragraphs of
[tried.md](tried.md) that say what was tried. Figures are those of the tables above or, for compiling of codes and steps
that stand in none, of [quantization.md](quantization.md). The milliseconds were asked of a Xeon with AMX; machines
differ in what they read per second, as the tables say. Figures of the Xeon, and of llama-1.1b on *AMD EPYC*, precede
most of what was tried.
"""
