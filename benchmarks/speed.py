"""Decoding, prefill and whole requests of one model against what a user would run instead, in one run.

    python -m benchmarks.speed decode --model gpt2-124m --batch 1 2     # adds to results/speed_gpt2-124m.json
    python -m benchmarks.speed prefill --model gpt2-124m --tokens 128 512 1023
    python -m benchmarks.speed request --model smollm2 --tokens 512     # the real model, with every peer
    python -m benchmarks.speed request --model reference_models/llama --tokens 512 --bits --policy FILE
    python -m benchmarks.speed decode --quick                           # two rounds, nothing written

All sides have the same weights and decode greedily from the same prompts on all cores, end of text ignored; prompts are
random where weights are, and held-out stories where they are trained. Time per decode step is (time of a long request -
time of a one-token request) / steps, so that prefill and fixed costs cancel on every side; prefill is a one-token
request, a request is prefill and `--steps` new tokens. Rounds are interleaved, the first warms up, and a ratio is the
median of the ratios round by round. A call adds its rows to the result file and leaves the others, each with its
machine and date.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks import real_model
from benchmarks.gguf_peers import gguf_makers
from benchmarks.harness import environment, interleaved, median_ratio, read_result, summary, write_result
from benchmarks.peers import Generate, Prompts, torch_makers, write_hugging_face
from benchmarks.quality import STORIES
from benchmarks.shapes import NAMES, SHAPES, model_named, nested_model
from qs_jax.adaptive.costs import Costs
from qs_jax.console import reporting_errors
from qs_jax.corpus import read_documents
from qs_jax.evaluation.benchmark import bandwidth_probe
from qs_jax.evaluation.windows import Plan, cut
from qs_jax.generation import generate
from qs_jax.model import Model
from reference_models.data import text_folder

OURS = "qs_jax float32"
PROMPT_TOKENS = 32
HELD_OUT = "-100:"
"""Stories that the reference models were not trained on."""
_COMPARED_TOKENS = 8
_PROBE, _PROBES = "bandwidth", 10


def our_generate(model: Model, **settings: Any) -> Generate:
    """Our side of the comparison."""
    settings = {"eos_token_id": [], "use_model_defaults": False, **settings}
    return lambda prompts, new: generate(model, prompts, max_new_tokens=new, **settings).tokens


def our_sides(model: Model, dtypes: Sequence[str], bits: Sequence[int], policies: Sequence[str]) -> dict[str, Generate]:
    """The dense model, also in `dtypes`, the same weights as nested codes read at each of `bits`, and every policy."""
    sides = {OURS: our_generate(model)}
    sides |= {f"qs_jax {dtype}": our_generate(model_named(model.name, dtype)) for dtype in dtypes}
    if bits:
        nested = nested_model(model)
        sides |= {f"qs_jax {b}-bit": our_generate(nested, bits=b) for b in bits}
    return sides | {f"qs_jax {policy}": our_generate(model, policy=policy) for policy in policies}


def peer_sides(model: Model, work: Path, wanted: Sequence[str] | None) -> dict[str, Generate]:
    """Every peer that is installed and can run the model, or those `wanted`; their copies of the weights in `work`.

    A folder of one's own has transformers beside it, unless others are wanted.
    """
    threads = environment()["cores"]
    if model.name in SHAPES:
        source = write_hugging_face(model, SHAPES[model.name], work / "hugging_face")
        makers = torch_makers(source, work, threads)
    elif model.name == real_model.NAME:
        makers = torch_makers(real_model.folder(), work, threads) | gguf_makers(real_model.gguf_file(), work, threads)
    elif (Path(model.name) / "model.safetensors").is_file():
        makers = torch_makers(Path(model.name), work, threads)
        wanted = wanted or ["transformers float32"]
    else:
        makers = {}
    return {name: make() for name, make in makers.items() if wanted is None or name in wanted}


def same_prompts(model: Model, batch: int, tokens: int) -> Prompts:
    """The same prompts for every side and every run: text for a model that can read it, else random tokens."""
    if model.tokenizer is not None:
        documents = read_documents(text_folder() / STORIES, HELD_OUT)
        windows = cut(model, documents, Plan(prefix=tokens, window=1, max_tokens=batch, batch=batch))
        return [list(window.prompt) for window in windows]
    return np.random.default_rng(batch).integers(3, model.config.vocab_size, (batch, tokens)).tolist()


def seconds_per_step(
    sides: dict[str, Generate],
    prompts: Prompts,
    steps: int,
    rounds: int,
    beside: Mapping[str, Callable[[], Any]] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Seconds per decode step of the whole batch, one figure per round; and per call of what is timed `beside`."""
    candidates = dict(beside)
    for name, side in sides.items():
        candidates[f"{name}/long"] = lambda side=side: side(prompts, steps + 1)
        candidates[f"{name}/short"] = lambda side=side: side(prompts, 1)
    seconds = interleaved(candidates, rounds)
    pairs = {name: zip(seconds[f"{name}/long"], seconds[f"{name}/short"], strict=True) for name in sides}
    per_step = {name: [(long - short) / steps for long, short in both] for name, both in pairs.items()}
    return {**per_step, **{name: seconds[name] for name in beside}}


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Summary of every side, and how many times faster than it we are."""
    return {
        name: {**summary(values), "speedup": median_ratio(values, seconds[OURS])} for name, values in seconds.items()
    }


def agreement(sides: dict[str, Generate], prompts: Prompts, room: int = _COMPARED_TOKENS) -> dict[str, float]:
    """Share of the first greedy tokens, of those there is `room` for, in which a side agrees with ours.

    Do all run the same model?
    """
    tokens = {name: np.asarray(side(prompts, min(_COMPARED_TOKENS, room))) for name, side in sides.items()}
    if any(t.shape != tokens[OURS].shape for t in tokens.values()):
        raise AssertionError(f"sides produce different numbers of tokens: { {n: t.shape for n, t in tokens.items()} }")
    return {name: float((t == tokens[OURS]).mean()) for name, t in tokens.items()}


def decode_row(model: Model, sides: dict[str, Generate], batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """One batch size: time per step of every side, and our share of the bandwidth measured in the same rounds."""
    prompts = same_prompts(model, batch, PROMPT_TOKENS)
    agreed = agreement(sides, prompts)
    probe, size = bandwidth_probe()
    probes = {_PROBE: lambda: [probe() for _ in range(_PROBES)]}
    seconds = seconds_per_step(sides, prompts, steps, rounds, probes)
    bandwidth = [_PROBES * size / taken for taken in seconds.pop(_PROBE)]
    ideal = [Costs.of(model.network).step_bytes() / reached for reached in bandwidth]
    return {
        "batch": batch,
        "prompt_tokens": PROMPT_TOKENS,
        "steps": steps,
        "rounds": rounds,
        "sides": compared(seconds),
        "agreement": agreed,
        "measured_bandwidth_gb_s": statistics.median(bandwidth) / 1e9,
        "bandwidth_fraction": median_ratio(ideal, seconds[OURS]),
        **_here_and_now(),
    }


def request_row(model: Model, sides: dict[str, Generate], tokens: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """One prompt length at batch 1: time to the last new token."""
    prompts = same_prompts(model, 1, tokens)
    agreed = agreement(sides, prompts, model.config.max_position_embeddings - tokens)
    seconds = interleaved({name: lambda side=side: side(prompts, new_tokens) for name, side in sides.items()}, rounds)
    facts = {"tokens": tokens, "new_tokens": new_tokens, "rounds": rounds}
    return {**facts, "sides": compared(seconds), "agreement": agreed, **_here_and_now()}


def _here_and_now() -> dict[str, str]:
    """A row's own machine and date: rows of one file come from several."""
    return {name: environment()[name] for name in ("cpu", "date")}


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows by machine and key, new ones in place of old."""
    table = {(row.get("cpu", ""), row[key]): row for row in [*rows, *new]}
    return [table[value] for value in sorted(table)]


def add_rows(model: str, study: str, key: str, new: list[dict[str, Any]]) -> Path:
    """Put rows into the model's result file."""
    name = f"speed_{Path(model).name}"
    result = read_result(name)
    return write_result(name, {"model": model, **result, study: merged(result.get(study, []), new, key)})


def table(rows: list[dict[str, Any]], key: str) -> str:
    """Rows as a Markdown table: milliseconds of every side, and in brackets how many times faster we are."""
    names = list(dict.fromkeys([OURS, *(name for row in rows for name in row["sides"])]))
    lines = [f"| {key} | " + " | ".join(f"{name}, ms" for name in names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        sides = [row["sides"].get(name) for name in names]
        cells = [f"{side['median_ms']:.1f} ({side['speedup']:.2f} ×)" if side else "–" for side in sides]
        lines.append(f"| {row[key]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("decode", "prefill", "request"))
    parser.add_argument("--model", default="gpt2-124m", help=f"one of {', '.join(NAMES)}, or a model folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"], help="also our dense model in these")
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4], help="also our nested codes at these")
    parser.add_argument("--policy", nargs="*", default=[], help="also our adaptive decoding under these")
    parser.add_argument("--peers", nargs="*", default=None, help="only these, such as 'ctranslate2 int8'")
    parser.add_argument("--folder", type=Path, help="keep the peers' copies of the weights here, for the next call")
    parser.add_argument("--quick", action="store_true", help="two rounds of 16 steps, nothing written")
    arguments = parser.parse_args(argv)
    steps, rounds = (16, 2) if arguments.quick else (arguments.steps, arguments.rounds)
    with reporting_errors(debug=True), tempfile.TemporaryDirectory() as temporary:
        model = model_named(arguments.model)
        sides = our_sides(model, arguments.dtypes, arguments.bits, arguments.policy)
        sides |= peer_sides(model, (arguments.folder or Path(temporary)) / Path(arguments.model).name, arguments.peers)
        key = "batch" if arguments.study == "decode" else "tokens"
        for value in getattr(arguments, key):
            if arguments.study == "decode":
                row = decode_row(model, sides, value, steps, rounds)
            else:
                new_tokens = 1 if arguments.study == "prefill" else steps
                row = request_row(model, sides, value, new_tokens, rounds)
            print(table([row], key), flush=True)
            if not arguments.quick:
                print(add_rows(arguments.model, arguments.study, key, [row]), flush=True)


if __name__ == "__main__":
    main()
