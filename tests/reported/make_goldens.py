"""Write `goldens.json`: what transformers, on torch, generates from each folder. Greedy, from ids to ids."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.reported.folders import FOLDERS, NEW_TOKENS, PROMPT

GOLDENS = Path(__file__).with_name("goldens.json")

_LEAST_MARGIN = 2e-3
"""Between the two most likely tokens of every step: more than float32 implementations differ by."""


def reference_tokens(build: Callable[[Path], None]) -> list[int]:
    """New tokens of the folder, by transformers' own defaults."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        prompt = torch.tensor([PROMPT])
        settings = {"max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, "output_scores": True}
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    for scores in output.scores:
        best, second = scores[0].topk(2).values.tolist()
        assert best - second > _LEAST_MARGIN, "choose other weights: this golden is a matter of rounding"
    return output.sequences[0, len(PROMPT) :].tolist()


if __name__ == "__main__":
    lines = [f'"{name}": {reference_tokens(build)}' for name, build in FOLDERS.items()]
    json.loads(text := "{\n " + ",\n ".join(lines) + "\n}\n")
    GOLDENS.write_text(text)
