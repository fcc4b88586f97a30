"""The real model, converted in every way that `qs-convert` has: what it loses, how long that takes, what it needs.

Run by `python -m benchmarks.quantization smollm2`; every conversion, scoring and request is a process of its own, so
that its peak of resident memory is its own. Codes are fitted on WikiText's training passages and C4's first documents
in turn, and judged on the first window of WikiText's test articles and of C4's last documents.

Predictions, before the first run: (1) at 8 bits nothing loses more than 0.3 %, and the head at 8 bits costs nothing
measurable (below 0.1 %) and saves 84 of the 113 MB that a step reads of it; (2) at 4 bits rtn loses about 25 %, gptq 9,
gptq+tune 7, and companded levels gain a percent or two; (3) two bits break the model by every method (more than twice
the perplexity); (4) this model's weights are numbers on a grid of 4 bits in groups of 32 with an offset (Q4_1), so that
codes in such groups whose 4-bit reading is fitted (refit) say them nearly exactly: below 2 % at 4 bits, far better than
any other model would; groups of 64 hold two such grids and gain nothing by it; (5) a cold request in codes needs less
than 1.5 times the memory of one in float32. Outcome: docs/quantization.md.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from benchmarks import real_model
from benchmarks.harness import environment, stamp
from benchmarks.judged_text import articles, nats, scored_text
from benchmarks.quality import C4, HEAD, WIKITEXT, WIKITEXT_TRAIN
from convert.pipeline import convert
from qs_jax.adaptive.costs import Costs
from qs_jax.choices import BITS, FULL, METHODS
from qs_jax.corpus import read_documents
from qs_jax.evaluation.benchmark import peak_rss_mb
from qs_jax.evaluation.statistics import increase_interval
from qs_jax.generation import GenerateOutput, generate
from qs_jax.loading import load
from reference_models.data import text_folder

NAME = real_model.NAME
CALIBRATION_TOKENS = 8192
PROMPT_TOKENS, NEW_TOKENS = 512, 64
_HEAD_TOO = {"exclude": None}
_BEST = {"method": "gptq+tune", "codebook": "companded"}

ROWS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "gptq, companded": {"method": "gptq", "codebook": "companded"},
    "gptq+tune, companded": _BEST,
    "rtn, head too": {"method": "rtn", **_HEAD_TOO},
    "gptq+tune, companded, head too": {**_BEST, **_HEAD_TOO},
    "rtn, groups of 32": {"method": "rtn", "group_size": 32},
    "refit, groups of 32": {"method": "refit", "group_size": 32},
}
"""Options of a conversion, by the row's name."""

Outcome = TypeVar("Outcome")
Scores = dict[str, dict[str, Float[np.ndarray, " windows"]]]
"""Nats per token of every window, by text and precision."""


def study(source: Path, rows: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What each row loses and costs; once more after every row."""
    dense, tokens = alone(scored, source, (None,))
    result: dict[str, Any] = {
        "model": NAME,
        "calibration_tokens": CALIBRATION_TOKENS,
        "tokens_scored": tokens,
        "dense": _perplexity(dense["wikitext"]["None"]),
        "dense_of": {text: _perplexity(found["None"]) for text, found in dense.items()},
        "rows": {},
    }
    with TemporaryDirectory() as temporary:
        for row in rows:
            target = Path(temporary) / row.replace(" ", "_")
            cost = alone(converted, source, target, ROWS[row])
            found, _ = alone(scored, target, BITS)
            result["rows"][row] = {**cost, **_lost(found, dense), "date": environment()["date"]}
            print(NAME, row, result["dense"], result["rows"][row], flush=True)
            yield result


def requests(source: Path) -> Iterator[dict[str, Any]]:
    """What a cold request needs, dense and at every precision, the head dense and in codes; once more after each."""
    folders: dict[str, tuple[dict[str, Any] | None, Sequence[int | None]]] = {
        "float32": (None, (None,)),
        "codes": (ROWS["rtn"], BITS),
        "codes, head too": (ROWS["rtn, head too"], BITS),
    }
    found: dict[str, Any] = {}
    with TemporaryDirectory() as temporary:
        for name, (options, precisions) in folders.items():
            folder = source if options is None else Path(temporary) / name.replace(" ", "_")
            if options is not None:
                alone(converted, source, folder, options)
            for bits in precisions:
                key = f"{name}, {bits} bits" if bits else name
                found[key] = alone(request, folder, bits)
                print(NAME, key, found[key], flush=True)
                yield {"model": NAME, "requests": found}


def alone(function: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """The outcome of a function in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def converted(source: Path, target: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert, compiling what is needed, and say what it took."""
    text = fitting_text() if options["method"] != METHODS[0] else None
    started = time.perf_counter()
    report = convert(
        source,
        target,
        quantize="matryoshka",
        calibration_text=text,
        calibration_tokens=CALIBRATION_TOKENS,
        **{"exclude": HEAD, **options},
    )
    return {
        "encode_s": time.perf_counter() - started,
        "encode_peak_rss_mb": peak_rss_mb(),
        "bytes": report.bytes_out,
    }


def fitting_text() -> list[str]:
    """Documents of both kinds in turn."""
    wikitext = read_documents(text_folder() / WIKITEXT_TRAIN)
    web = read_documents(text_folder() / C4, ":700")
    return list(chain.from_iterable(zip(wikitext, web, strict=False)))


def judged_text() -> dict[str, list[str]]:
    """Other documents of both kinds."""
    wikitext = (text_folder() / WIKITEXT).read_text("utf-8")
    return {"wikitext": articles(wikitext), "c4": read_documents(text_folder() / C4, "-200:")}


def scored(folder: Path, precisions: Sequence[int | None]) -> tuple[Scores, int]:
    """Every text at every precision, and how many tokens of each were scored at least."""
    model, found, fewest = load(folder, dtype="float32", compilation_cache=False), {}, []
    for name, documents in judged_text().items():
        text = scored_text(model, documents, whole=True)
        counts = text[1][:, 1:].sum(axis=1)
        found[name] = {
            str(bits): (nats(model.network_at(bits), text) / np.maximum(counts, 1))[counts > 0] for bits in precisions
        }
        fewest.append(int(counts.sum()))
    return found, min(fewest)


def request(folder: Path, bits: int | None) -> dict[str, Any]:
    """One request of random tokens with nothing compiled, then the same once more."""
    model = load(folder, dtype="float32", compilation_cache=False)
    prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PROMPT_TOKENS)).tolist()

    def timed() -> tuple[float, GenerateOutput]:
        started = time.perf_counter()
        output = generate(model, prompts, bits=bits, max_new_tokens=NEW_TOKENS, eos_token_id=[])
        return time.perf_counter() - started, output

    (cold, first), (warm, output) = timed(), timed()
    return {
        "peak_rss_mb": peak_rss_mb(),
        "cold_s": cold,
        "trace_s": first.timing["trace_s"],
        "compile_s": first.timing["compile_s"],
        "warm_s": warm,
        "decode_ms_per_step": 1e3 * output.timing["decode_s"] / output.timing["decode_steps"],
        "weight_bytes_per_step": Costs.of(model.network).step_bytes(bits or FULL),
        **stamp(),
    }


def _perplexity(found: Float[np.ndarray, " windows"]) -> float:
    return float(np.exp(found.mean(dtype=np.float64)))


def _lost(found: Scores, dense: Scores) -> dict[str, Any]:
    """Perplexity on WikiText, and on every text how far above the dense model's it is, in shares of that."""
    increases = {
        text: {bits: _increase(nats, dense[text]["None"]) for bits, nats in by_bits.items()}
        for text, by_bits in found.items()
    }
    return {
        "perplexity": {bits: _perplexity(nats) for bits, nats in found["wikitext"].items()},
        "increase": increases,
    }


def _increase(nats: Float[np.ndarray, " windows"], dense: Float[np.ndarray, " windows"]) -> dict[str, Any]:
    whole = _perplexity(dense)
    interval = increase_interval(nats.astype(np.float64), dense.astype(np.float64))
    return {
        "share": _perplexity(nats) / whole - 1,
        "interval": [end / whole for end in interval] if interval else None,
    }
