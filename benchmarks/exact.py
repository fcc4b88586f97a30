"""Exact mode beside plain decoding: the same tokens? In how much time?

    python -m benchmarks.exact                     # SmolLM2, float32; adds to benchmarks/results/exact.json and README
    python -m benchmarks.exact --dtype bfloat16    # the same in bfloat16
    python -m benchmarks.exact --quick             # a prompt of each set, nothing written
    python -m benchmarks.exact --same 200          # only whether tokens are the same, of 200 passages; and --sample
    python -m benchmarks.exact --report            # README's table from the stored result

Three small sets of prompts of this file, batch 1, greedy, 64 tokens: chat, a passage to summarise or quote, code. Every
prompt is run plainly and with every draft in turn, until `--rounds` rounds compiled nothing: these are for the clock,
which counts decoding alone. Before, every prompt goes with every draft `WARM` times, as in a process that has served
for a while: `auto` compiles a program once that would have paid. Where tokens differ, the gap between the two logits at
the first difference is kept: it is rounding's where it is of the size of what a dtype resolves.

The best that follows from the cost of a pass (`benchmarks.few_rows`, an EPYC without AMX): three tokens for 1.14 steps
of float32, five for 1.57, nine for 2.7, were every draft right: 2.6, 3.2 and 3.3 times plain decoding; in bfloat16
three, five and nine for 1.7 to 1.9 steps: 1.8, 2.9 and 4.7 times.
"""

import argparse
import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import environment, read_result, write_result
from benchmarks.quality import WIKITEXT_TRAIN, documents_of
from benchmarks.quality_report import README, fill
from benchmarks.shapes import model_named
from qs_jax.generation import GenerateOutput, generate
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
DRAFTS = ("lookup", "auto")
WARM = 4
_ATTEMPTS = 6
PASSAGE, _BATCH = 64, 8
"""Tokens of a passage that is continued, and how many go together."""


def ids_of(model: Model, prompt: str) -> list[int]:
    """The tokens of a prompt in the model's chat template."""
    assert model.tokenizer is not None
    return model.tokenizer.encode_chat([{"role": "user", "content": prompt}])


def gap(model: Model, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> float:
    """Between the logits of the first two tokens that differ, by the plain forward pass."""
    at = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    text = [*prompt, *ours[:at]]
    padded = np.zeros((1, -(-len(text) // 256) * 256), np.int32)
    padded[0, : len(text)] = text
    logits = jax.jit(forward)(model.network, jnp.asarray(padded))[0, len(text) - 1]
    return abs(float(logits[ours[at]] - logits[theirs[at]]))


def continued(model: Model, prompt: str, options: dict[str, Any]) -> GenerateOutput:
    """What the model says to a prompt."""
    return generate(model, [[{"role": "user", "content": prompt}]], max_new_tokens=TOKENS, do_sample=False, **options)


def measured(model: Model, prompt: str, candidates: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Tokens, and median tokens per second of decoding, by candidate; all take their turns.

    What `auto` runs depends on what it measured before, so that it may meet a program late: a round in which anything
    was compiled is run again, `_ATTEMPTS` times at most.
    """
    first: dict[str, Any] = {}
    kept: list[dict[str, Any]] = []
    for _ in range(rounds + _ATTEMPTS):
        outputs = {name: continued(model, prompt, options) for name, options in candidates.items()}
        first = first or outputs
        if not any(output.timing["compile_s"] for output in outputs.values()):
            kept.append(outputs)
        if len(kept) == rounds:
            break
    else:
        raise AssertionError(f"{prompt[:40]!r}: programs are still compiled after {rounds + _ATTEMPTS} rounds")
    return {
        name: {
            "tokens": first[name].tokens[0],
            "speed": statistics.median((o[name].lengths[0] - 1) / o[name].timing["decode_s"] for o in kept),
            "timing": kept[-1][name].timing,
        }
        for name in candidates
    }


def judged(model: Model, results: dict[str, dict[str, Any]], prompt: str) -> dict[str, Any]:
    """Of one prompt: every draft's speed over plain decoding's, its tokens a pass, and where it parts from plain."""
    plain = results["plain"]
    row: dict[str, Any] = {"prompt": prompt[:40], "tokens": len(plain["tokens"]), "plain": plain["speed"], "drafts": {}}
    for name, ours in results.items():
        if name != "plain":
            parted = ours["tokens"] != plain["tokens"]
            row["drafts"][name] = {
                "ratio": ours["speed"] / plain["speed"],
                "tokens_per_pass": (len(ours["tokens"]) - 1) / max(ours["timing"]["decode_steps"], 1),
                "plain_steps": ours["timing"]["fallback"],
                "gap": gap(model, ids_of(model, prompt), ours["tokens"], plain["tokens"]) if parted else None,
            }
    return row


def same(model: Model, count: int, **sampling: Any) -> dict[str, Any]:
    """How many of `count` continuations of passages, eight at a time, are those of plain decoding, token for token.

    Greedy ones that are not come with the gap between the two logits; where noise was drawn, that says nothing.
    """
    assert model.tokenizer is not None
    passages = documents_of(((WIKITEXT_TRAIN, ":"),))[:count]
    prompts = [model.tokenizer.encode(passage)[:PASSAGE] for passage in passages]
    gaps: list[float | None] = []
    for first in range(0, count, _BATCH):
        part = prompts[first : first + _BATCH]
        asked = {"max_new_tokens": TOKENS, "seed": list(range(first, first + len(part))), **sampling}
        plain = generate(model, part, **asked)
        ours = generate(model, part, exact=True, draft="lookup", **asked)
        for prompt, a, b in zip(part, ours.tokens, plain.tokens, strict=True):
            if a != b:
                gaps.append(None if sampling["do_sample"] else gap(model, prompt, a, b))
                print(f"other text than plain; logits apart by {gaps[-1]}", flush=True)
    return {"prompts": count, "identical": count - len(gaps), "gaps": gaps, "date": environment()["date"]}


def table(runs: dict[str, Any]) -> str:
    """Mean speed over plain decoding's of every draft on every set, the least of a prompt in brackets."""
    names = list(SETS)
    lines = [f"| | {' | '.join(names)} | other text than plain |", "|" + "---|" * (len(names) + 2)]
    for run, found in runs.items():
        drafts = next(iter(found["sets"].values()))[0]["drafts"]
        for draft in drafts:
            rows = {name: [row["drafts"][draft] for row in found["sets"].get(name, [])] for name in names}
            ratios = [[row["ratio"] for row in part] for part in rows.values()]
            cells = [f"{statistics.mean(part):.2f} ({min(part):.2f})" if part else "–" for part in ratios]
            gaps = [row["gap"] for part in rows.values() for row in part if row["gap"] is not None]
            parted = f"{len(gaps)} of {sum(map(len, rows.values()))}" + (f", {max(gaps):.2g} apart" if gaps else "")
            lines.append(f"| {run}, `{draft}` | {' | '.join(cells)} | {parted} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft", action="append", help="repeat for several; not a cascade")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one prompt of each set, nothing written")
    parser.add_argument("--report", action="store_true", help="README's table from the stored result, run nothing")
    parser.add_argument("--same", type=int, metavar="N", help="only compare tokens, of N continuations of WikiText")
    parser.add_argument("--sample", action="store_true", help="with --same: drawn at temperature 0.8")
    asked = parser.parse_args()
    stored = read_result("exact")
    runs, compared = stored.get("runs", {}), stored.get("same", {})
    settings = {"tokens": TOKENS, "rounds": asked.rounds}
    if asked.same:
        sampling = {"do_sample": True, "temperature": 0.8} if asked.sample else {"do_sample": False}
        name = f"{asked.model} {asked.dtype}, {'sampled' if asked.sample else 'greedy'}"
        compared[name] = same(model_named(asked.model, asked.dtype), asked.same, **sampling)
        print(name, compared[name])
        print(write_result("exact", {**settings, "runs": runs, "same": compared}))
        return
    if not asked.report:
        model = model_named(asked.model, asked.dtype)
        candidates = {"plain": {}, **{name: {"exact": True, "draft": name} for name in asked.draft or DRAFTS}}
        sets: dict[str, list[dict[str, Any]]] = {}
        for prompt in WARM * (not asked.quick) * list(chain(*SETS.values())):
            for options in filter(None, candidates.values()):
                continued(model, prompt, options)
        for name, prompts in SETS.items():
            for prompt in prompts[:1] if asked.quick else prompts:
                row = judged(model, measured(model, prompt, candidates, asked.rounds), prompt)
                sets.setdefault(name, []).append(row)
                print(name, row, flush=True)
        run = f"{asked.model} {asked.dtype}, {environment()['cpu']}"
        runs = {**({} if asked.quick else runs), run: {"date": environment()["date"], "sets": sets}}
        print(table(runs))
        if asked.quick:
            return
        print(write_result("exact", {**settings, "runs": runs, "same": compared}))
    fill(README, {"exact": table(runs)})


if __name__ == "__main__":
    main()
