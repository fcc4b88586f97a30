"""How often must drafts be right to pay, by model, number of drafts and what a draft costs?

    python -m benchmarks.break_even                                          # SmolLM2, float32 and bfloat16
    python -m benchmarks.break_even --model llama-1.1b --dtype bfloat16      # published shapes, random weights
    python -m benchmarks.break_even --model llama-2-7b --dtype bfloat16 --prompt 64 --tokens 17
    python -m benchmarks.break_even --report                                 # the table from stored results

Adds to benchmarks/results/break_even.json and fills in docs/method.md. Acceptance is forced: the text of plain decoding
is known, and a draft that costs nothing proposes its tokens, each replaced by a wrong one with a given probability. So
rounds are those of exact mode, to the last program, on any model; `--prompt` tokens, then `--tokens` more, greedy,
batch 1.

A round of K drafts that takes r plain steps, of which each draft takes another c, brings 1 + a + ... + a^K tokens where
a draft is right with probability a if those before it were: it pays where that is more than r + K c (Leviathan et al.,
arXiv 2211.17192, section 3.3). The table has the least such a; the measured gain at a = 0.8 and 1 says whether the
formula holds.

Predictions, before it was run: a round costs what its pass costs (`benchmarks.few_rows`), so that two free drafts pay
on SmolLM2 in float32 from a = 0.15 on, four from 0.4, eight from 0.65; in bfloat16, whose passes of several tokens take
1.7 steps, two from 0.5, eight from 0.5 too; a model of 1.1 billion parameters, whose weights take all the time, from
0.1 to 0.3, so that drafts of 4 bits at a third of a step pay there if 75 % are right, and on SmolLM2 they do not.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from benchmarks.harness import environment, read_result, write_result
from benchmarks.quality_report import METHOD, fill
from benchmarks.shapes import NAMES, model_named
from qs_jax.adaptive.binding import dense
from qs_jax.adaptive.ledger import PassCosts, Tally
from qs_jax.engine.decode import Controls, DecodeState
from qs_jax.engine.exact import History, Proposal
from qs_jax.engine.pacing import Drafting, Way
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.session import Request, Session
from qs_jax.model import Model
from qs_jax.models.base import CausalLM
from qs_jax.pytree import STATIC

COUNTS = (2, 4, 8)
FORCED = (0.0, 0.8, 1.0)
COSTS = (0.0, 0.125, 0.25, 0.5)
"""What a draft takes, in plain steps: nothing where it is looked up, an eighth to a half where it is the model at fewer
bits or layers."""

_CHUNK = 16

_FOLLOWED = 0.8
"""Of the tokens that a round brings if all drafts are right: where it is less, the text is another one than that of
plain decoding, and the script knows nothing. Random weights in bfloat16 have logits as near as rounding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scripted:
    """Drafts what a script says stands there, -1 for nothing: one program, whatever is right or wrong."""

    script: Int[Array, "batch places"]
    remembers: bool = field(default=False, metadata=STATIC)

    def propose(
        self, model: CausalLM, state: DecodeState, history: History, controls: Controls, count: int
    ) -> Proposal:
        places = state.positions[:, None] + 1 + jnp.arange(count, dtype=jnp.int32)
        return Proposal(jnp.take_along_axis(self.script, places, axis=1, mode="clip"), state.cache, ())

    def spent(self, costs: PassCosts, work: Any) -> Tally:
        return Tally()


@dataclass(frozen=True)
class Ran:
    tokens: list[int]
    seconds: float
    passes: int


def decoded(model: Model, prompt: list[int], tokens: int, draft: Scripted | None = None, count: int = 0) -> Ran:
    """So many tokens, and how long they took after the first, plainly or in rounds of so many drafts."""
    request = Request(
        prompts=[prompt],
        copies=1,
        max_new_tokens=tokens,
        eos_token_ids=(),
        seeds=[(0, 0)],
        sampling=Sampling.of(),
        chunk_size=_CHUNK,
        policy=dense(model.config),
        drafting=Drafting((Way("script", draft, count),)) if draft else None,
    )
    session = Session(model.network, request)
    made = [token for chosen in session.chunks() for token in chosen.tokens[chosen.emitted[:, 0], 0].tolist()]
    return Ran(made, session.decode_seconds, session.decode_steps)


def script(prompt: list[int], text: list[int], right: float, vocab: int) -> Scripted:
    """A draft that knows the text, and is right about each of its tokens with this probability."""
    random = np.random.default_rng(0)
    wrong = random.random(len(text)) >= right
    tokens = np.where(wrong, (np.asarray(text) + 1) % vocab, text)
    places = np.full((1, len(prompt) + len(text) + max(COUNTS) + 1), -1, np.int32)
    places[0, len(prompt) : len(prompt) + len(text)] = tokens
    return Scripted(jnp.asarray(places))


def measured(model: Model, prompt_tokens: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a plain step, and by number of drafts those of a round and the gain at each acceptance."""
    vocab = model.config.vocab_size
    prompt = np.random.default_rng(1).integers(3, vocab, prompt_tokens).tolist()
    text = decoded(model, prompt, tokens).tokens
    plain: list[float] = []
    took = {(count, right): [] for count in COUNTS for right in FORCED}
    passes = dict.fromkeys(took, 0)
    for turn in range(rounds + 1):  # the first compiles
        plain += [decoded(model, prompt, tokens).seconds] if turn else []
        for count, right in took:
            ran = decoded(model, prompt, tokens, script(prompt, text, right, vocab), count)
            passes[count, right] = ran.passes
            took[count, right] += [ran.seconds] if turn else []
    step = statistics.median(plain) / (tokens - 1)
    counts = {
        str(count): {
            "round_ms": 1e3 * statistics.median(took[count, 0.0]) / passes[count, 0.0],
            "gain": {str(a): statistics.median(plain) / statistics.median(took[count, a]) for a in FORCED},
            "tokens_per_pass": {str(a): (tokens - 1) / passes[count, a] for a in FORCED},
        }
        for count in COUNTS
    }
    return {"step_ms": 1e3 * step, "prompt": prompt_tokens, "tokens": tokens, "counts": counts}


def needed(ratio: float, count: int, cost: float) -> float | None:
    """The least acceptance at which a round of so many plain steps, and drafts at this cost each, pays; None: never."""
    price = ratio + count * cost
    if price > count + 1:
        return None
    grid = np.linspace(0, 1, 1001)
    return float(grid[np.argmax(sum(grid**power for power in range(count + 1)) >= price - 1e-9)])


def table(runs: dict[str, Any]) -> str:
    """A row per model and number of drafts."""
    heads = ["drafts", "a round, in steps", *(f"drafts at {cost:g}" if cost else "free drafts" for cost in COSTS)]
    lines = [f"| | {' | '.join([*heads, 'gain at 0.8', 'at 1'])} |", "|" + "---|" * (len(heads) + 3)]
    for name, found in runs.items():
        for count, one in found["counts"].items():
            ratio = one["round_ms"] / found["step_ms"]
            least = [needed(ratio, int(count), cost) for cost in COSTS]
            cells = ["never" if a is None else f"{a:.2f}" for a in least]
            followed = one["tokens_per_pass"]["1.0"] > _FOLLOWED * (int(count) + 1)
            gains = [f"{one['gain'][a]:.2f}" if followed else "–" for a in ("0.8", "1.0")]
            lines.append(f"| {name} | {count} | {ratio:.2f} | {' | '.join([*cells, *gains])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=NAMES)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of it")
    parser.add_argument("--tokens", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="the table from stored results, run nothing")
    asked = parser.parse_args()
    runs = read_result("break_even").get("runs", {})
    for dtype in () if asked.report else asked.dtype:
        started = time.perf_counter()
        found = measured(model_named(asked.model, dtype), asked.prompt, asked.tokens, asked.rounds)
        facts = environment()
        runs[f"{asked.model} {dtype}, {facts['cpu']}"] = {"date": facts["date"], **found}
        print(write_result("break_even", {"forced": FORCED, "runs": runs}))
        print(f"{asked.model} {dtype}: {time.perf_counter() - started:.0f} s", flush=True)
    print(table(runs))
    fill(METHOD, {"break even": table(runs)})


if __name__ == "__main__":
    main()
