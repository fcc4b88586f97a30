"""The model card of a reference model: measure every figure in it, draw its loss curve, write its README.md.

    python -m reference_models.card reference_models/gpt2     # writes benchmarks/results/reference_gpt2.json too
    python -m reference_models.card reference_models/llama

Perplexity is per token of the model's own vocabulary; bits per byte compare across vocabularies. Both count the
separators between documents. Of each slice the first 16,384 tokens are scored, in windows of 512 that overlap by half.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import write_result
from benchmarks.plots import Panel, draw
from convert.parts import Parts
from convert.source import source_of
from qs_jax.console import progress, reporting_errors
from qs_jax.errors import CheckpointError
from qs_jax.loading import load
from qs_jax.model import Model
from reference_models import held_out
from reference_models.export import RECORD

_SMOOTHED = 15
_ARCHITECTURES = {"gpt2": "GPT-2", "llama": "Llama"}


def measure(model: Model, folder: Path) -> list[dict[str, Any]]:
    """Perplexity and bits per byte of every held-out slice."""
    found = held_out.slices()
    rows = []
    with progress("scoring", total=len(found)) as advance:
        for piece in found:
            stream, size = held_out.packed(folder / "tokenizer.json", piece.documents)
            nats, tokens = held_out.total_nats(model.network, stream)
            rows.append(
                {
                    "slice": piece.name,
                    "note": piece.note,
                    "tokens": tokens,
                    "bytes": size,
                    "perplexity": math.exp(nats / tokens),
                    "bits_per_byte": nats / math.log(2) / size,
                }
            )
            advance()
    return rows


def loss_panels(record: dict[str, Any]) -> list[Panel]:
    """Training loss beside validation, and validation slice by slice, against tokens seen."""
    training, validation = record["training"], record["validation"]
    millions = [tokens / 1e6 for tokens in training["tokens"]]
    seen = [tokens / 1e6 for tokens in validation["tokens"]]
    smooth = (moving_average(millions, _SMOOTHED), moving_average(training["loss"], _SMOOTHED))
    lines = {
        "batch": (millions, training["loss"]),
        f"mean of {_SMOOTHED}": smooth,
        "validation": (seen, validation["mean"]),
    }
    slices = {name: (seen, values) for name, values in validation.items() if name not in ("step", "tokens", "mean")}
    labels = ("tokens seen, millions", "loss, nats per token")
    return [
        Panel("training and validation", *labels, lines, faint=("batch", f"mean of {_SMOOTHED}")),
        Panel("validation by source", *labels, slices),
    ]


def moving_average(values: list[float], width: int) -> list[float]:
    """Means of every `width` neighbours, or the mean of all where they are fewer."""
    width = min(width, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid").tolist()


def card(model: Model, parameters: int, record: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The model card, in Markdown."""
    config, best, recipe = model.config, record["best"], record["recipe"]
    name = Path(model.name).name
    kv = config.num_key_value_heads
    heads = f"{config.num_attention_heads} heads" + (
        f" ({kv} of keys and values)" if kv < config.num_attention_heads else ""
    )
    shares = ", ".join(f"{source} {share:.0%}" for source, share in recipe["mixture"].items())
    slices = "\n".join(f"* {row['slice']}: {row['note']}" for row in rows)
    table = "\n".join(
        f"| {row['slice']} | {row['tokens']:,} | {row['perplexity']:.2f} | {row['bits_per_byte']:.3f} |" for row in rows
    )
    return f"""# {_ARCHITECTURES[config.model_type]}, {parameters / 1e6:.1f} M parameters

A small {_ARCHITECTURES[config.model_type]} that ships with qs_jax, so that every claim can be tried on a trained
model without a download. {config.num_hidden_layers} layers, {config.hidden_size} wide, {heads}, vocabulary
{config.vocab_size:,}, context {config.max_position_embeddings}, tied embeddings, bfloat16. It has seen children's
stories, novels and some of the web; it knows no facts.

```python
import qs_jax

model = qs_jax.load("reference_models/{name}")
print(qs_jax.generate(model, "Once upon a time", max_new_tokens=64).texts[0])
```

## Training

Trained on: {record["hardware"]}. These are the weights of the validation minimum: step {best["step"]:,},
{best["tokens"] / 1e6:.2f} M tokens seen, {best["seconds"] / 3600:.2f} hours of compute. That is far from what the
architecture can reach; it is to be retrained when an accelerator is there (`configs/{name}.json`).

Mixture: {shares}. AdamW, peak learning rate {recipe["peak_learning_rate"]}, cosine to
{recipe["final_learning_rate"]:.0%} of it, weight decay {recipe["weight_decay"]}, clipping at {recipe["clip_norm"]}. The
recipe, the loss log and how far the run went are in `training.json`.

![loss](loss.png)

Sources: 90 English novels of 1839–1930 (public domain), C4 (ODC-BY), WikiText-103 (CC BY-SA 3.0), TinyStories
(CDLA-Sharing-1.0). Held out, never trained on:

{slices}

## Perplexity

| text | tokens scored | perplexity per token | bits per byte |
|---|---|---|---|
{table}

The first {held_out.LIMIT:,} tokens of each, in windows of {held_out.WINDOW} that overlap by half,
separators between documents counted; float32. `python -m reference_models.card reference_models/{name}` measures
all of it again and writes this page and `benchmarks/results/reference_{name}.json`.

`policy.json` was calibrated for at most +0.2 perplexity, and needs `lens.safetensors`; both are written by
`python -m benchmarks.quality {name} --ship`, see `docs/results.md`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported folder, such as reference_models/gpt2")
    arguments = parser.parse_args()
    folder: Path = arguments.model
    with reporting_errors(debug=False):
        if not (folder / RECORD).is_file():
            raise CheckpointError(f"{folder}: no {RECORD}; give a folder that reference_models.train exported")
        record = json.loads((folder / RECORD).read_text("utf-8"))
        model = load(folder, dtype="float32")
        rows = measure(model, folder)
        settings = {"window": held_out.WINDOW, "most_tokens_per_slice": held_out.LIMIT, "dtype": "float32"}
        print(
            write_result(
                f"reference_{folder.name}",
                {"model": folder.name, "best": record["best"], "settings": settings, "rows": rows},
            )
        )
        draw(loss_panels(record), folder / "loss.png")
        (folder / "README.md").write_text(card(model, Parts(source_of(folder)).parameters, record, rows), "utf-8")


if __name__ == "__main__":
    main()
