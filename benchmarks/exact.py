"""Exact mode beside plain decoding: the same tokens? In how much time?

    python -m benchmarks.exact                     # SmolLM2, float32; adds to benchmarks/results/exact.json and README
    python -m benchmarks.exact --dtype bfloat16    # the same in bfloat16
    python -m benchmarks.exact --batch 4           # the prompts of a set together; 8: each of them twice
    python -m benchmarks.exact --sets continuation # only this set; the run's others stay
    python -m benchmarks.exact --codes             # `auto` with Matryoshka codes beside the weights, and without
    python -m benchmarks.exact --model reference_models/llama
    python -m benchmarks.exact --peers             # beside transformers' and llama.cpp's lookup, where installed
    python -m benchmarks.exact --quick             # a prompt of each set, nothing written
    python -m benchmarks.exact --same 200          # only whether tokens are the same, of 200 passages; and --sample
    python -m benchmarks.exact --report            # the tables of README and docs/method.md from the stored result

Four small sets of prompts (`benchmarks/exact_prompts.py`), greedy, 64 tokens: chat, a passage to summarise or quote,
code, WikiText to go on with. Every prompt is run plainly and with every draft in turn, until `--rounds` rounds compiled
nothing: these are for the clock, which counts decoding alone, and prompts as well where whole requests are meant.
Before, every prompt goes with every draft `--warm` times, as in a process that has served for a while: `auto` compiles
a program once that would have paid. Where tokens differ, the gap between the two logits at the first difference is
kept: it is rounding's where it is of the size of what a dtype resolves. A model without a chat template gets what a
user says as text; one without a tokenizer, which are random weights of a published shape, its first bytes.

The best that follows from the cost of a pass (`benchmarks.few_rows`, an EPYC without AMX): three tokens for 1.14 steps
of float32, five for 1.57, nine for 2.7, were every draft right: 2.6, 3.2 and 3.3 times plain decoding; in bfloat16
three, five and nine for 1.7 to 1.9 steps: 1.8, 2.9 and 4.7 times.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks import real_model
from benchmarks.exact_prompts import SETS, TEXTS
from benchmarks.gguf_peers import in_format, llama_cpp_peer
from benchmarks.harness import environment, median_ratio, read_result, write_result
from benchmarks.peers import Generate, transformers_peer
from benchmarks.quality import WIKITEXT_TRAIN, documents_of
from benchmarks.quality_report import METHOD, README, fill
from benchmarks.shapes import model_named, with_codes
from qs_jax.console import aside
from qs_jax.engine.sampling import Sampling, noisy_scores
from qs_jax.generation import GenerateOutput, generate
from qs_jax.model import Model
from qs_jax.models.base import forward

TOKENS = 64
DRAFTS = ("lookup", "auto")
PEERS_LOOK_UP = 8
"""Drafts a round of peers that look up, as of ours at most."""

_ATTEMPTS = 6
PASSAGE, _BATCH = 64, 8
"""Tokens of a passage that is continued, and how many go together."""


def ids_of(model: Model, text: str, *, said: bool) -> list[int]:
    """The tokens of a prompt: of a user's turn in the model's chat template where it is `said`, else of the text."""
    if model.tokenizer is None:
        return list(text.encode()[:PASSAGE])
    if said and model.tokenizer.has_chat_template:
        return model.tokenizer.encode_chat([{"role": "user", "content": text}])
    return model.tokenizer.encode(text)


def gap(
    model: Model,
    prompt: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
    scored: Callable[[Array, int], Array] = lambda logits, place: logits,
) -> float:
    """Between the logits of the first two tokens that differ, by the plain forward pass; or what is made of them by
    `scored`, which is told the place of the token that they follow."""
    at = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    text = [*prompt, *ours[:at]]
    padded = np.zeros((1, -(-len(text) // 256) * 256), np.int32)
    padded[0, : len(text)] = text
    logits = jax.jit(forward)(model.network, jnp.asarray(padded))[0, len(text) - 1]
    scores = scored(logits, len(text) - 1)
    return abs(float(scores[ours[at]] - scores[theirs[at]]))


def drawn(output: GenerateOutput, row: int) -> Callable[[Array, int], Array]:
    """What a row's token was the greatest of: its logits by the request's settings, with its own noise added."""
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling.of(**{name: output.settings[name] for name in names})
    key = jax.random.fold_in(jax.random.key(output.seeds[row]), 0)

    def scored(logits: Array, place: int) -> Array:
        return noisy_scores(logits[None], jnp.zeros((1, 0), bool), jax.random.fold_in(key, place)[None], sampling)[0]

    return scored


class Ran(NamedTuple):
    """What a request made and took: seconds after each row's first token, and of all of it; whether some of that was
    compiling; passes of the dense model, how many of them were plain steps, and by draft the rounds and right drafts of
    all rows."""

    tokens: list[list[int]]
    decode_s: float
    whole_s: float
    compiled: bool = False
    passes: int = 0
    plain_steps: int = 0
    rounds_by: dict[str, list[int]] = {}

    @property
    def decoded(self) -> int:
        """Tokens after each row's first."""
        return sum(map(len, self.tokens)) - len(self.tokens)


Prompts = list[list[int]]

Candidate = Callable[[Prompts, Sequence[int]], Ran]
"""Prompts and how many tokens plain decoding made of each -> what came of them."""


def ours(model: Model, options: dict[str, Any]) -> Candidate:
    """What the model says to prompts."""

    def run(prompts: Prompts, _: Sequence[int] = ()) -> Ran:
        output = generate(model, prompts, max_new_tokens=TOKENS, do_sample=False, **options)
        timing = output.timing
        whole = timing["prefill_s"] + timing["decode_s"]
        compiled, passes = bool(timing["compile_s"]), int(timing["decode_steps"])
        plain_steps, by = int(timing.get("fallback", passes)), rounds_by(output.trace) if options else {}
        return Ran(output.tokens, timing["decode_s"], whole, compiled, passes, plain_steps, by)

    return run


def rounds_by(trace: dict[str, Any]) -> dict[str, list[int]]:
    """By draft: rounds, and drafts that were right, over all rows."""
    found: dict[str, list[int]] = {}
    for name, right in zip(chain(*trace["draft_by_round"]), chain(*trace["accepted_by_round"]), strict=True):
        rounds, accepted = found.get(name, (0, 0))
        found[name] = [rounds + 1, accepted + right]
    return found


def theirs(peer: Generate) -> Candidate:
    """A peer's tokens, as many as plain decoding made; decoding is what they take beyond the first one."""

    def run(prompts: Prompts, lengths: Sequence[int]) -> Ran:
        (length,), times = lengths, [time.perf_counter()]
        for count in (1, length):
            tokens = peer(prompts, count)
            times.append(time.perf_counter())
        whole = times[2] - times[1]
        return Ran(tokens, whole - (times[1] - times[0]), whole)

    return run


def peers(work: Path) -> dict[str, Candidate]:
    """Peers that look up, and the same without, each where it is installed."""
    source, threads = real_model.place(real_model.NAME), environment()["cores"]
    found: dict[str, Candidate] = {}
    if importlib.util.find_spec("torch"):
        found["transformers float32"] = theirs(transformers_peer(source, "float32", threads))
        looking = transformers_peer(source, "float32", threads, lookup=PEERS_LOOK_UP)
        found["transformers float32, lookup"] = theirs(looking)
    if importlib.util.find_spec("xllamacpp"):
        file = in_format(real_model.gguf_file(), work, "F16")
        found["llama.cpp F16"] = theirs(llama_cpp_peer(file, threads))
        found["llama.cpp F16, lookup"] = theirs(llama_cpp_peer(file, threads, lookup=PEERS_LOOK_UP))
    return found


def measured(prompts: Prompts, candidates: dict[str, Candidate], rounds: int) -> dict[str, dict[str, Any]]:
    """By candidate: what it made last, and what it took in every round; all take their turns.

    What `auto` runs depends on what it measured before, so that it may meet a program late: a round in which anything
    was compiled is run again, `_ATTEMPTS` times at most.
    """
    lengths = [len(tokens) for tokens in candidates["plain"](prompts, ()).tokens]
    kept: list[dict[str, Ran]] = []
    for _ in range(rounds + _ATTEMPTS):
        ran = {name: run(prompts, lengths) for name, run in candidates.items()}
        if not any(one.compiled for one in ran.values()):
            kept.append(ran)
        if len(kept) == rounds:
            break
    else:
        raise AssertionError(f"prompt {prompts[0][:9]}…: programs are still compiled after {rounds + _ATTEMPTS} rounds")
    return {
        name: {
            "last": kept[-1][name],
            "speed": [one[name].decoded / one[name].decode_s for one in kept],
            "whole": [(one[name].decoded + len(prompts)) / one[name].whole_s for one in kept],
        }
        for name in candidates
    }


def judged(model: Model, results: dict[str, dict[str, Any]], prompts: Prompts) -> dict[str, Any]:
    """Every draft's speed over that of the same side's plain decoding, and where our tokens part from plain ones."""
    plain: Ran = results["plain"]["last"]
    made = plain.decoded + len(prompts)
    row: dict[str, Any] = {"tokens": made, "plain": _median(results["plain"]), "drafts": {}}
    for name, found in results.items():
        if f"{name}, lookup" in results:  # a peer that decodes plainly
            row.setdefault("peers", {})[name] = _median(found)
        if name == "plain" or f"{name}, lookup" in results:
            continue
        own = results[name.partition(",")[0] if "," in name else "plain"]
        ran: Ran = found["last"]
        texts = zip(prompts, ran.tokens, plain.tokens, strict=True)
        gaps = [gap(model, p, a, b) for p, a, b in texts if a != b and "," not in name]
        row["drafts"][name] = {
            "ratio": median_ratio(found["speed"], own["speed"]),
            "whole": median_ratio(found["whole"], own["whole"]),
            "speed": _median(found),
            **({"tokens_per_pass": ran.decoded / ran.passes} if ran.passes else {}),
            "plain_steps": ran.plain_steps,
            **({"rounds_by": ran.rounds_by} if ran.rounds_by else {}),
            "gaps": gaps,
        }
    return row


def _median(found: dict[str, Any]) -> float:
    """Tokens per second of decoding."""
    return statistics.median(found["speed"])


def same(model: Model, count: int, **sampling: Any) -> Iterator[dict[str, Any]]:
    """How many of `count` continuations of passages, eight at a time, are those of plain decoding, token for token:
    after every eight what holds so far.

    Those that are not come with the gap between the two logits, or where tokens were drawn between what was compared:
    these by the settings, with the noise.
    """
    assert model.tokenizer is not None
    passages = documents_of(((WIKITEXT_TRAIN, ":"),))[:count]
    prompts = [model.tokenizer.encode(passage)[:PASSAGE] for passage in passages]
    gaps: list[float] = []
    for first in range(0, count, _BATCH):
        part = prompts[first : first + _BATCH]
        asked = {"max_new_tokens": TOKENS, "seed": list(range(first, first + len(part))), **sampling}
        plain = generate(model, part, **asked)
        ours = generate(model, part, exact=True, draft="lookup", **asked)
        for row, (prompt, a, b) in enumerate(zip(part, ours.tokens, plain.tokens, strict=True)):
            if a != b:
                gaps.append(gap(model, prompt, a, b, *([drawn(ours, row)] if sampling["do_sample"] else ())))
                aside(f"other text than plain of passage {first + row}; scores apart by {gaps[-1]}")
        done = first + len(part)
        aside(f"{done - len(gaps)} of {done} alike")
        yield {"prompts": done, "identical": done - len(gaps), "gaps": gaps, "date": environment()["date"]}


def of_sets(found: dict[str, Any], draft: str, value: str) -> list[list[Any]]:
    """One value of every row of a draft, by set."""
    rows = (found["sets"].get(name, []) for name in SETS)
    return [[row["drafts"][draft][value] for row in part if draft in row["drafts"]] for part in rows]


def table(runs: dict[str, Any]) -> str:
    """Mean speed over plain decoding's of our own drafts on every set, the least of a prompt in brackets."""
    lines = [f"| | {' | '.join(SETS)} | other text than plain |", "|" + "---|" * (len(SETS) + 2)]
    for run, found in runs.items():
        for draft in filter(lambda name: "," not in name, drafts_of(found)):
            ratios = of_sets(found, draft, "ratio")
            cells = [f"{statistics.mean(part):.2f} ({min(part):.2f})" if part else "–" for part in ratios]
            gaps: list[float] = list(chain(*chain(*of_sets(found, draft, "gaps"))))
            rows = found["batch"] * sum(map(len, ratios))
            parted = f"{len(gaps)} of {rows}" + (f", {max(gaps):.2g} apart" if gaps else "")
            lines.append(f"| {run}, `{draft}` | {' | '.join(cells)} | {parted} |")
    return "\n".join(lines)


def short(runs: dict[str, Any]) -> str:
    """README's first word on it: what `auto` brings in the first run."""
    name, found = next(iter(runs.items()))
    gains = [statistics.mean(part) for part in of_sets(found, "auto", "ratio")]
    said = ", ".join(f"{gain:.2f} on {of}" for gain, of in zip(gains, SETS, strict=True))
    return (
        f"**The same text in less time**: `--exact` decodes {statistics.mean(gains):.2f} times as fast, mean of "
        f"{len(SETS)} kinds of text:\n{said} ({name}; [below](#the-same-text-in-less-time)).\n"
        "What is saved at a cost in quality comes after."
    )


def details(runs: dict[str, Any]) -> str:
    """Of every draft and of peers' lookup: tokens per second of the same side's plain decoding, and by how much drafts
    raise them, of decoding and of whole requests."""
    lines = [f"| | plain, tokens/s | {' | '.join(SETS)} |", "|" + "---|" * (len(SETS) + 2)]
    for run, found in runs.items():
        for draft in drafts_of(found):
            decoding, whole = (of_sets(found, draft, value) for value in ("ratio", "whole"))
            pairs = zip(decoding, whole, strict=True)
            cells = [f"{statistics.mean(a):.2f}, {statistics.mean(b):.2f}" if a else "–" for a, b in pairs]
            side = draft.partition(",")[0] if "," in draft else ""
            rows: list[dict[str, Any]] = list(chain(*found["sets"].values()))
            plain = statistics.mean(
                row["peers"][side] if side else row["plain"] for row in rows if draft in row["drafts"]
            )
            lines.append(f"| {run}, {draft if side else f'`{draft}`'} | {plain:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def alike(texts: dict[str, Any]) -> str:
    """How many continuations of passages are those of plain decoding, and how near two logits were where not."""
    lines = []
    for name, found in texts.items():
        gaps = [gap for gap in found["gaps"] if gap is not None]
        near = f", logits apart by at most {max(gaps):.2g} elsewhere" if gaps else ""
        lines.append(f"* {name}: {found['identical']:,} of {found['prompts']:,}{near}")
    return "\n".join(lines)


def drafts_of(found: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(chain(*(row["drafts"] for rows in found["sets"].values() for row in rows))))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft", action="append", help="repeat for several; not a cascade")
    parser.add_argument("--batch", type=int, default=1, choices=(1, 2, 4, 8), help="prompts of a set that go together")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=tuple(SETS), help="others stay as stored")
    parser.add_argument("--codes", action="store_true", help="with codes beside the weights, rounded to nearest")
    parser.add_argument("--warm", type=int, default=4, help="times that every prompt is run before it counts")
    parser.add_argument("--peers", action="store_true", help="with transformers' and llama.cpp's lookup; batch 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one prompt of each set, nothing written")
    parser.add_argument("--report", action="store_true", help="the tables from the stored result, run nothing")
    parser.add_argument("--same", type=int, metavar="N", help="only compare tokens, of N continuations of WikiText")
    parser.add_argument("--sample", action="store_true", help="with --same: drawn at temperature 0.8")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "qs_jax-peers", help="for peers")
    asked = parser.parse_args()
    if asked.peers and (asked.model, asked.batch, asked.codes) != (real_model.NAME, 1, False):
        parser.error(f"peers have the weights of {real_model.NAME}, and their lookup one prompt at a time")
    return asked


def compared(asked: argparse.Namespace) -> dict[str, Any]:
    """The sets asked for by every candidate."""
    dense, sets = model_named(asked.model, asked.dtype), {}
    model = with_codes(dense) if asked.codes else dense
    candidates, names = {"plain": ours(model, {})}, asked.draft or (DRAFTS[1:] if asked.codes else DRAFTS)
    drafts = {name: ours(model, {"exact": True, "draft": name}) for name in names}
    if asked.codes:
        drafts["auto without codes"] = ours(dense, {"exact": True, "draft": "auto"})
    groups = {name: batches(model, name, asked.batch) for name in asked.sets}
    for prompts in asked.warm * (not asked.quick) * list(chain(*groups.values())):
        for run in drafts.values():
            run(prompts, ())
    candidates |= drafts | (peers(asked.work) if asked.peers else {})
    for name, parts in groups.items():
        for prompts in parts[:1] if asked.quick else parts:
            row = judged(model, measured(prompts, candidates, asked.rounds), prompts)
            sets.setdefault(name, []).append({"date": environment()["date"], **row})
            print(name, row, flush=True)
    return {"date": environment()["date"], "batch": asked.batch, "rounds": asked.rounds, "sets": sets}


def batches(model: Model, name: str, size: int) -> list[Prompts]:
    """The prompts of a set, so many together; each of them twice where there are not as many."""
    prompts = [ids_of(model, text, said=name not in TEXTS) for text in SETS[name]]
    prompts *= -(-size // len(prompts))
    return [prompts[first : first + size] for first in range(0, len(prompts), size)]


def named(asked: argparse.Namespace) -> str:
    """What a run is known by: another with the same name takes its place, set by set."""
    codes = " with codes" if asked.codes else ""
    batch = f", batch {asked.batch}" if asked.batch > 1 else ""
    model = asked.model.replace("reference_models/", "reference ")
    return f"{model} {asked.dtype}{codes}{batch}, {environment()['cpu']}"


def joined(stored: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A run with the sets that were run now, and those of before that were not."""
    return {**found, "sets": stored.get("sets", {}) | found["sets"]}


def main() -> None:
    asked, stored = parsed(), read_result("exact")
    runs, texts = stored.get("runs", {}), stored.get("same", {})
    settings = {"tokens": TOKENS}
    if asked.same:
        sampling = {"do_sample": True, "temperature": 0.8} if asked.sample else {"do_sample": False}
        name = f"{asked.model} {asked.dtype}, {'sampled' if asked.sample else 'greedy'}"
        for texts[name] in same(model_named(asked.model, asked.dtype), asked.same, **sampling):
            write_result("exact", {**settings, "runs": runs, "same": texts})  # an interrupted run has said something
        print(name, texts[name])
        fill(METHOD, {"exact same": alike(texts)})
        return
    if not asked.report:
        name, found = named(asked), compared(asked)
        if asked.quick:
            print(table({name: found}), details({name: found}), sep="\n")
            return
        runs[name] = joined(runs.get(name, {}), found)
        print(write_result("exact", {**settings, "runs": runs, "same": texts}))
    fill(README, {"exact": table(runs), "exact short": short(runs)})
    fill(METHOD, {"exact details": details(runs), "exact same": alike(texts)})


if __name__ == "__main__":
    main()
