"""`make demo`: convert the shipped Llama, generate from two prompts, show text, speed and ledger side by side.

python -m reference_models.demo
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from convert.pipeline import convert
from qs_jax.console import progress, reporting_errors
from qs_jax.errors import CheckpointError
from qs_jax.generation import GenerateOutput, generate
from qs_jax.loading import load
from qs_jax.model import Model

MODEL = Path(__file__).parent / "llama"
PROMPTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine with her dog. "
    "One day, Lily and her dog went to the park. They saw a big tree with many red apples. Lily was very happy. "
    'She said, "Look, there are so many apples!" Her mom smiled and said, "Yes, Lily. You can take one." Lily',
    "One day, a boy named Tom found a small box in the garden. He was very excited and wanted to see what was inside. "
    'He ran to his mom and showed her the box. His mom looked at it and said, "Be careful, Tom. Let us open it '
    'together." Tom sat down on the soft grass and they opened the box. Inside, they saw',
)
SETTINGS = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.4, "top_p": 0.9, "seed": 3}
WAYS = {"dense": "off", "QuickSilver": str(MODEL / "policy.json")}
"""The shipped policy was calibrated for at most +0.2 perplexity."""


def converted(folder: Path, console: Console) -> Model:
    """The shipped model, converted into `folder` and loaded from there."""
    if not (MODEL / "config.json").is_file():
        raise CheckpointError(f"{MODEL}: the reference model is not here; clone the whole repository")
    with progress("converting") as advance:
        report = convert(MODEL, folder, advance=advance)
    console.print(f"converted {report.parameters:,} parameters in {report.seconds:.1f} s")
    return load(folder)


def texts(outputs: Mapping[str, GenerateOutput]) -> Table:
    """Every prompt and its continuations, one column per way of decoding."""
    table = Table(show_lines=True, expand=True)
    for name in outputs:
        table.add_column(name, ratio=1)
    for row, prompt in enumerate(PROMPTS):
        table.add_row(*(Text.assemble((prompt, "bold"), (o.texts[row], "green")) for o in outputs.values()))
    return table


def figures(outputs: Mapping[str, GenerateOutput]) -> Table:
    """What each way cost and, where there is more than one, what the last saved against the first."""
    compared = len(outputs) > 1
    table = Table("", *outputs, *(("saved",) if compared else ()), box=None, pad_edge=False)
    for label, unit, key, scale in (
        ("work", "GFLOP", "flops", 1e9),
        ("weights read", "GB", "weight_bytes", 1e9),
        ("cache slots written", "", "kv_slots", 1),
        ("layers run per token", "", "layers_run_mean", 1),
        ("bits per weight", "", "bits_mean", 1),
    ):
        values = [output.ledger[key] / scale for output in outputs.values()]
        table.add_row(label, *(f"{value:.4g} {unit}" for value in values), *saved(values))
    seconds = [output.timing["prefill_s"] + output.timing["decode_s"] for output in outputs.values()]
    per_token = [1e3 * s / sum(output.lengths) for s, output in zip(seconds, outputs.values(), strict=True)]
    table.add_row("time per token", *(f"{value:.2f} ms" for value in per_token), *saved(per_token))
    table.add_row("speed", *(f"[bold green]{1e3 / value:.0f} tokens/s[/bold green]" for value in per_token))
    return table


def saved(values: list[float]) -> list[str]:
    """The last value's saving against the first, in colour; nothing where there is only one."""
    if len(values) < 2:
        return []
    share = round(1 - values[-1] / values[0], 2) or 0.0  # never -0 %
    return [f"[{'green' if share > 0 else 'yellow'}]{share:.0%}[/]"]


def main() -> None:
    console = Console()
    with reporting_errors(debug=False), tempfile.TemporaryDirectory() as folder:
        model = converted(Path(folder) / "llama", console)
        outputs = {}
        for name, policy in WAYS.items():
            with console.status(f"compiling {name} …"):
                generate(model, PROMPTS, policy=policy, **SETTINGS)
            outputs[name] = generate(model, PROMPTS, policy=policy, **SETTINGS)
        console.print(texts(outputs), figures(outputs))


if __name__ == "__main__":
    main()
