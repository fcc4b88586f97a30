"""`make demo`: convert the shipped Llama, generate from two prompts, show text, speed and ledger.

python -m reference_models.demo
"""

import tempfile
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from convert.parts import Parts
from convert.pipeline import convert
from convert.source import Source
from qs_jax.console import progress, reporting_errors
from qs_jax.errors import CheckpointError
from qs_jax.generation import GenerateOutput, generate
from qs_jax.loading import load

MODEL = Path(__file__).parent / "llama"
PROMPTS = ("Once upon a time, there was a little girl who", "The old man looked at the sea and")


def figures(output: GenerateOutput) -> Table:
    """What the run cost, as a table."""
    table = Table(show_header=False, box=None)
    ledger, timing = output.ledger, output.timing
    decoding = sum(output.lengths) / (timing["decode_s"] + timing["prefill_s"])
    table.add_row("speed", f"{decoding:.0f} tokens/s for {len(output.texts)} prompts together")
    table.add_row("layers run per token", f"{ledger['layers_run_mean']:.1f}")
    table.add_row("work", f"{ledger['flops'] / 1e9:.2f} GFLOP")
    table.add_row("weights read", f"{ledger['weight_bytes'] / 1e9:.2f} GB at {ledger['bits_mean']:.0f} bits")
    table.add_row("cache slots written", f"{ledger['kv_slots']}")
    return table


def main() -> None:
    console = Console()
    with reporting_errors(debug=False), tempfile.TemporaryDirectory() as folder:
        if not (MODEL / "config.json").is_file():
            raise CheckpointError(f"{MODEL}: the reference model is not here; clone the whole repository")
        target, parts = Path(folder) / "llama", Parts(Source(MODEL))
        with progress("converting", total=len(parts.names)) as advance:
            report = convert(parts, target, dtype="float32", name=str(MODEL), overwrite=False, advance=advance)
        console.print(f"converted {report.parameters:,} parameters in {report.seconds:.1f} s")
        model = load(target)
        console.print("compiling …", style="dim")
        settings = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 1}
        generate(model, PROMPTS, **settings)
        output = generate(model, PROMPTS, **settings)
        for prompt, text in zip(PROMPTS, output.texts, strict=True):
            console.print(Panel(f"[bold]{prompt}[/bold][green]{text}[/green]", title="dense"))
        console.print(figures(output))


if __name__ == "__main__":
    main()
