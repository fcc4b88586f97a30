"""Exact mode beside plain decoding: the same tokens? In how much time?

    python -m benchmarks.exact                                  # SmolLM2, float32; prints, and writes nothing
    python -m benchmarks.exact --dtype bfloat16 --draft lookup --draft auto --rounds 3

Three small sets of prompts of this file, batch 1, greedy, 64 tokens: chat, a summary of a passage, code. Every prompt
is run plainly and with every draft in turn, first once for programs to be compiled and tokens to be compared, then
`--rounds` times for the clock. Where tokens differ, the gap between the two logits at the first difference is printed:
it is rounding's where it is of the size of what a dtype resolves.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import model_named
from qs_jax.generation import generate
from qs_jax.model import Model
from qs_jax.models.base import forward

_PASSAGE = (
    "The Antikythera mechanism is an ancient Greek hand-powered model of the Solar System, described as the "
    "oldest known example of an analogue computer. It could be used to predict astronomical positions and "
    "eclipses decades in advance. It could also be used to track the four-year cycle of athletic games similar to "
    "an Olympiad, the cycle of the ancient Olympic Games. The artefact was among wreckage retrieved from a "
    "shipwreck off the coast of the Greek island Antikythera in 1901. In 1902, it was identified by archaeologist "
    "Spyridon Stais as containing a gear. The device, housed in the remains of a wooden-framed case of uncertain "
    "overall size, was found as one lump, later separated into three main fragments which are now divided into 82 "
    "separate fragments after conservation efforts."
)
_CODE = """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    centre = mean(values)
    total = 0.0
    for value in values:
        total += (value - centre) ** 2
    return total / len(values)
"""

SETS: dict[str, tuple[str, ...]] = {
    "chat": (
        "What is the capital of France, and what is it known for?",
        "Give me three tips for sleeping better.",
        "Explain to a child why the sky is blue.",
        "Write a short poem about the sea.",
    ),
    "summary": (
        f"Summarise this passage in three sentences:\n\n{_PASSAGE}",
        f"List the facts in this passage, one per line:\n\n{_PASSAGE}",
        f"Correct the spelling of this passage and repeat it:\n\n{_PASSAGE}",
        f"What was found in 1901 and in 1902? Quote the passage.\n\n{_PASSAGE}",
    ),
    "code": (
        f"Add type annotations to this Python code:\n\n{_CODE}",
        f"Rename total to accumulated in this Python code:\n\n{_CODE}",
        f"Write a function standard_deviation in the style of this Python code:\n\n{_CODE}",
        "Write a Python function that reverses a linked list.",
    ),
}
TOKENS = 64


def gap(model: Model, prompt: str, ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Between the logits of the first two tokens that differ, by the plain forward pass."""
    assert model.tokenizer is not None
    at = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    text = [*model.tokenizer.encode_chat([{"role": "user", "content": prompt}]), *ours[:at]]
    padded = np.zeros((1, -(-len(text) // 256) * 256), np.int32)
    padded[0, : len(text)] = text
    logits = jax.jit(forward)(model.network, jnp.asarray(padded))[0, len(text) - 1]
    return abs(float(logits[ours[at]] - logits[theirs[at]]))


def measured(model: Model, prompt: str, candidates: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Tokens, and median tokens per second of decoding, by candidate; all take their turns."""
    chat = [{"role": "user", "content": prompt}]
    runs: dict[str, list[Any]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, options in candidates.items():
            runs[name].append(generate(model, [chat], max_new_tokens=TOKENS, do_sample=False, **options))
    return {
        name: {
            "tokens": outputs[0].tokens[0],
            "speed": statistics.median((o.lengths[0] - 1) / o.timing["decode_s"] for o in outputs[1:] or outputs),
            "passes": outputs[-1].timing["decode_steps"],
            "timing": outputs[-1].timing,
        }
        for name, outputs in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft", action="append", help="repeat for several; not a cascade")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    asked = parser.parse_args()
    model = model_named(asked.model, asked.dtype)
    drafts = asked.draft or ["lookup", "auto"]
    candidates = {"plain": {}, **{draft: {"exact": True, "draft": draft} for draft in drafts}}
    for name in asked.sets:
        ratios: dict[str, list[float]] = {draft: [] for draft in drafts}
        for prompt in SETS[name]:
            results = measured(model, prompt, candidates, asked.rounds)
            plain = results["plain"]
            print(f"{name}: {prompt[:40]!r}, {len(plain['tokens'])} tokens, plain {plain['speed']:.1f} tokens/s")
            for draft in drafts:
                ours = results[draft]
                ratio = ours["speed"] / plain["speed"]
                ratios[draft].append(ratio)
                same = ours["tokens"] == plain["tokens"]
                said = (
                    "same"
                    if same
                    else f"differs, logits {gap(model, prompt, ours['tokens'], plain['tokens']):.2g} apart"
                )
                print(
                    f"  {draft}: {ours['speed']:.1f} tokens/s, {ratio:.2f} x; {said}; "
                    f"{(len(ours['tokens']) - 1) / max(ours['passes'], 1):.2f} tokens a pass, "
                    f"{ours['timing']['fallback']} plain steps",
                    flush=True,
                )
        print(f"{name}: " + ", ".join(f"{draft} {statistics.mean(r):.2f} x" for draft, r in ratios.items()), flush=True)


if __name__ == "__main__":
    main()
