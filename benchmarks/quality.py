"""What do the mechanisms save on real text, at what quality? Calibrated on some documents, judged on others.

    python -m benchmarks.quality smollm2           # writes benchmarks/results/quality_smollm2.json
    python -m benchmarks.quality smollm2-planes    # the same with its weights in nested codes: precision acts too
    python -m benchmarks.quality llama --ship      # the same of a small model, and reference_models/llama/policy.json
    python -m benchmarks.quality llama --html llama.html     # the same, and a page to look at
    python -m benchmarks.quality llama --quick     # a few windows, nothing written
    python -m benchmarks.quality llama --table     # the stored result as Markdown, nothing run
    python -m benchmarks.quality --report          # the tables of docs/results.md and README, from the results

One run gives all of it: the lens, calibration at four budgets, the 2^4 combinations, the presets, the baselines at
equal work, the oracle, free running, the policy for +0.2 on further text it was not calibrated on, and what bfloat16
adds of its own; then the same with every token scored and no prefix, the paper's protocol. The lens, calibration and
the judged texts share no document. The real model is judged on four texts. `qs-jax report` shows the file. Products
are taken in full float32 also where a device would by default round their inputs.

Predictions, before the first run: (1) a prompt that stops one layer early is free, since the last layer's keys and
values do not need that layer; (2) a uniform stop with frozen keys and values is hard to beat, per-token choices add a
few points at most; (3) halting tokens that are scored costs more than it saves; (4) dropping keys and values costs more
still; (5) 39.6 % within +0.2 is out of reach for models of 6 to 16 layers. Before the first run with a lens, after a
simulation on 16 windows of the Llama model (stop after 7 layers: +0.34 frozen, +0.02 with a lens) and 32 of stories3M
(after 4 of 6: +0.13 and +0.08): (6) with a lens the prompt of the reference models may stop twice as early within +0.2,
beyond 39.6 % of FLOPs; (7) on the shallow, well-trained stories3M it gains one layer at most. Before the first run in
the paper's protocol: (8) nothing beyond 2 % is saved within +0.2 there, as the prompt is all that may stop early.

Before the first run on SmolLM2, after a simulation on 32 windows (docs/results.md): (9) calibration for +0.2 saves
between 8 and 15 % of FLOPs, all of it by a uniform stop of the prompt with the lens; 39.6 % costs more than +5;
(10) `paper` costs more than +10 and saves less than 10 %; (11) combinations of mechanisms add their costs, and none is
within +0.2; (12) in percent of perplexity the four texts agree within a factor of two, stories least; (13) in the
paper's protocol nothing is saved within +0.2; (14) bfloat16 alone adds less than 0.5 % of perplexity.
Outcome: docs/results.md.
"""

import argparse
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import jax

from benchmarks import real_model
from benchmarks.harness import RESULTS, environment, read_result, write_result
from benchmarks.quality_report import table, write_report
from convert.pipeline import convert
from qs_jax.adaptive.policy import Policy
from qs_jax.console import progress, reporting_errors
from qs_jax.corpus import read_documents
from qs_jax.evaluation.ablation import BUDGETS, MAIN_BUDGET
from qs_jax.evaluation.calibration import Calibrated
from qs_jax.evaluation.defaults import DIRECT_LENS_TOKENS
from qs_jax.evaluation.direct import fit_direct
from qs_jax.evaluation.lens import fit_lens
from qs_jax.evaluation.perplexity import evaluate
from qs_jax.evaluation.report import render
from qs_jax.evaluation.scoring import score_alone
from qs_jax.evaluation.statistics import summary
from qs_jax.evaluation.study import calibrated_on, study
from qs_jax.evaluation.windows import Plan, cut, whole
from qs_jax.files import DIRECT_LENS_FILE, LENS_FILE, write_whole
from qs_jax.lens import DirectLens, Lens, rarity_of, with_direct_lens, with_lens
from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.request import bind_policy
from reference_models.data import text_folder

STORIES, WIKITEXT, C4 = "tinystories_train_first1000.json", "wikitext103-test.raw.txt", "c4-sample.jsonl"
WIKITEXT_TRAIN, NOVELS = "wikitext_train_1000_passages.json", "novels.txt.xz"
HEAD = "^embedding|^lm_head"
"""What stays dense in studies of codes: what bits cost the blocks."""
FURTHER_TOKENS = 1024
LENS_TOKENS = 32768
PLANES_TOKENS = 8192
DIRECT_STOPS = (0.3, 0.45, 0.6, 0.7, 0.8)
"""Of the depth, where prompts may stop under the direct lens."""
DIRECT_WINDOWS = 3
"""As many windows as others are calibrations with the direct lens tested on, which scores them together."""
EVERY_TOKEN = Plan(prefix=0, window=128)
"""The paper's protocol, in windows that every model's context holds and of which there are enough to calibrate on."""
_ROUNDED = ("perplexity", "perplexity_off", "perplexity_increase", "perplexity_increase_interval")
_PASSES = 400
"""About how many one protocol takes on one text, for the progress bar."""

Part = tuple[str, str]
"""A file of the text folder, and which of its documents."""


@dataclass(frozen=True)
class Study:
    """A model (a folder, or `smollm2`) and its texts. Reference models were trained on all stories but the last 100.

    Every one of `texts` is judged in full, the first on `scored_tokens`; of `further` only the policy for +0.2. With
    `planes` the weights are first quantised (gptq, on the lens's text), so that precision can adapt as well.
    """

    model: Path | str
    lens: tuple[Part, ...]
    calibration: tuple[Part, ...]
    texts: tuple[Part, ...]
    further: tuple[Part, ...] = ()
    planes: bool = False
    scored_tokens: int = Plan().max_tokens
    calibration_tokens: int = 4096
    direct_tokens: int = LENS_TOKENS


def studies() -> dict[str, Study]:
    """The models there are; those that do not belong to the repository lie beside the texts."""
    ours, theirs = Path(__file__).parents[1] / "reference_models", text_folder().parent / "models"
    further = ((C4, "-100:"), (WIKITEXT, ":"))
    stories = ((STORIES, ":300"),), ((STORIES, "300:600"),)
    real = Study(
        model=real_model.NAME,
        lens=((WIKITEXT_TRAIN, ":500"), (C4, ":300")),
        calibration=((WIKITEXT_TRAIN, "500:"), (C4, "300:600")),
        texts=((WIKITEXT, ":"), (C4, "600:"), (NOVELS, "-3:"), (STORIES, "600:")),
        scored_tokens=5120,
        calibration_tokens=6144,
        direct_tokens=DIRECT_LENS_TOKENS,
    )
    return {
        real_model.NAME: real,
        f"{real_model.NAME}-planes": replace(real, texts=real.texts[:2], planes=True),
        "stories3M-planes": Study(theirs / "stories3M", *stories, ((STORIES, "600:"),), planes=True),
        "stories3M": Study(theirs / "stories3M", *stories, ((STORIES, "600:"),)),
        "babyllama105": Study(theirs / "babyllama105", *stories, ((STORIES, "900:"),)),
        "gpt2": Study(ours / "gpt2", *stories, ((STORIES, "-100:"),), further),
        "llama": Study(ours / "llama", *stories, ((STORIES, "-100:"),), further),
    }


def documents_of(parts: tuple[Part, ...]) -> list[str]:
    """The documents of several files, one after the other."""
    return [document for file, which in parts for document in read_documents(text_folder() / file, which)]


def quantised(folder: Path, documents: list[str], target: Path) -> Path:
    """The model converted to Matryoshka codes, fitted on the documents."""
    convert(
        folder,
        target,
        quantize="matryoshka",
        method="gptq",
        exclude=HEAD,
        calibration_text=documents,
        calibration_tokens=PLANES_TOKENS,
    )
    return target


def direct_lens(model: Model, documents: list[str], tokens: int) -> DirectLens:
    """In closed form, for stops that save two layers at least."""
    depth, windows = model.config.num_hidden_layers, whole(model, documents, tokens)
    stops = sorted({min(round(share * depth), depth - 2) for share in DIRECT_STOPS})
    fits, _ = fit_direct(model, windows, stops)
    return DirectLens(tuple(one.map for one in fits), rarity_of(windows, model.config.vocab_size))


@dataclass(frozen=True)
class Subject:
    """A study's model with its lenses, in float32 and in bfloat16, and how well the affine one fits."""

    name: str
    model: Model
    narrow: Model
    lens: Lens
    direct: DirectLens
    explained: list[float]

    @classmethod
    def of(cls, name: str, chosen: Study) -> "Subject":
        """Loaded, a lens fitted to the dense weights, and those quantised if the study says so."""
        source, documents = real_model.place(chosen.model), documents_of(chosen.lens)
        model = load(source, dtype="float32")
        fit = fit_lens(model, whole(model, documents, LENS_TOKENS))
        direct = direct_lens(model, documents, chosen.direct_tokens)
        with TemporaryDirectory() as temporary:
            folder = quantised(source, documents, Path(temporary) / "planes") if chosen.planes else source
            model, narrow = (load(folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
        model, narrow = (
            replace(one, network=with_direct_lens(with_lens(one.network, fit.lens), direct)) for one in (model, narrow)
        )
        return cls(name, model, narrow, fit.lens, direct, fit.explained)


def with_prefix(subject: Subject, chosen: Study, plan: Plan, calibration_tokens: int) -> dict[str, Any]:
    """The protocol with an unscored prefix, and what is measured in it alone."""
    result = _judged(subject.name, subject.model, chosen, plan, calibration_tokens, free_runs=8)
    policy = Policy.from_json(result["policy"])
    result["bfloat16"] = {part[0]: rounding(subject, part, policy, plan) for part in chosen.texts}
    further = {}
    for part in chosen.further:
        less = replace(plan, max_tokens=min(FURTHER_TOKENS, plan.max_tokens))
        found = evaluate(subject.model, cut(subject.model, documents_of((part,)), less), policy, less)
        further[part[0]] = {**found, "model": subject.name, "samples": [], "logprobs": []}
    return {**result, "lens_explained": subject.explained, "further": further}


def every_token(subject: Subject, chosen: Study, plan: Plan, calibration_tokens: int) -> dict[str, Any]:
    """The paper's protocol: every token scored."""
    plain = replace(EVERY_TOKEN, max_tokens=plan.max_tokens)
    name = f"{subject.name}, every token scored"
    return {"every_token": _judged(name, subject.model, chosen, plain, calibration_tokens, free_runs=0)}


PROTOCOLS = {"prefix": with_prefix, "every": every_token}


def _judged(
    name: str, model: Model, chosen: Study, plan: Plan, calibration_tokens: int, *, free_runs: int
) -> dict[str, Any]:
    """All that `qs-jax eval --ablate` reports of the first text, in one protocol; under `texts` of the others, of which
    half as much is scored."""
    half = replace(plan, max_tokens=plan.max_tokens // 2)
    windows = {
        part[0]: cut(model, documents_of((part,)), half if number else plan) for number, part in enumerate(chosen.texts)
    }
    with progress(name, _PASSES * len(windows)) as advance:
        on = partial(
            calibrated_on,
            model,
            documents_of(chosen.calibration),
            plan,
            judged=[window for part in windows.values() for window in part],
            target=RESULTS / f"quality_{name}.json",
            advance=advance,
        )
        found = on(calibration_tokens, kv_rule="affine")
        if plan.prefix != 0:
            jax.clear_caches()  # a process can map only so many programs, and two calibrations are too many
            direct = on(DIRECT_WINDOWS * calibration_tokens, kv_rule="direct").calibrated
            found = replace(found, calibrated=[*found.calibrated, *map(with_direct, direct)])
        jax.clear_caches()
        texts = {}
        for file, part in windows.items():
            runs = free_runs if not texts else 0
            judged = study(model, part, Policy.off(), plan, ablated=True, found=found, free_runs=runs, advance=advance)
            texts[file] = {**judged, "model": name, "text": file, "logprobs": []}
    first, *others = texts
    return {**texts[first], "texts": {file: {**texts[file], "samples": []} for file in others}}


def with_direct(found: Calibrated) -> Calibrated:
    """Under a name that says by which lens."""
    policy, searched = (replace(one, name=f"{found.goal.name}, direct") for one in (found.policy, found.searched))
    return replace(found, policy=policy, searched=searched)


def rounding(subject: Subject, part: Part, policy: Policy, plan: Plan) -> dict[str, Any]:
    """What bfloat16 does to perplexity: the dense model and the policy in it, both beside the dense float32 model."""
    model, narrow = subject.model, subject.narrow
    windows = cut(model, documents_of((part,)), replace(plan, max_tokens=plan.max_tokens // 2))
    size = sum(window.scored_bytes for window in windows)
    exact = score_alone(model, windows, bind_policy(model, Policy.off()), batch=plan.batch)
    found = {}
    for name, judged in {"dense": Policy.off(), "policy": policy}.items():
        scores = score_alone(narrow, windows, bind_policy(narrow, judged), batch=plan.batch)
        found[name] = {key: summary(scores, exact, size)[key] for key in _ROUNDED}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=sorted(studies()))
    parser.add_argument("--protocol", choices=PROTOCOLS, help="only this one; the other stays in the file")
    parser.add_argument("--scored-tokens", type=int, metavar="N", help="judge fewer windows of every text")
    parser.add_argument("--ship", action="store_true", help="write policy.json and the lens beside the model")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report of both protocols there as well")
    parser.add_argument("--quick", action="store_true", help="a few windows, nothing written")
    parser.add_argument("--table", action="store_true", help="print the stored result as Markdown, run nothing")
    parser.add_argument("--report", action="store_true", help="write the tables of docs/results.md, run nothing")
    arguments = parser.parse_args()
    if arguments.report:
        write_report({name: RESULTS / f"quality_{name}.json" for name in studies()})
    elif arguments.model is None:
        parser.error("say which model, or --report")
    elif arguments.table:
        print(table(json.loads((RESULTS / f"quality_{arguments.model}.json").read_text())))
    else:
        with reporting_errors(debug=True):
            measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Run the study, in one protocol or both, and write what it found."""
    jax.config.update("jax_default_matmul_precision", "highest")
    name, chosen = arguments.model, studies()[arguments.model]
    plan, tokens = Plan(max_tokens=arguments.scored_tokens or chosen.scored_tokens), chosen.calibration_tokens
    if arguments.quick:
        plan, tokens = replace(plan, max_tokens=512), 2048
    subject, found, runs = Subject.of(name, chosen), {}, {}
    for protocol in [arguments.protocol] if arguments.protocol else PROTOCOLS:
        started = perf_counter()
        found |= PROTOCOLS[protocol](subject, chosen, plan, tokens)
        runs[protocol] = {"seconds": round(perf_counter() - started, 1), "environment": environment()}
    judged = [one for one in (found, found.get("every_token", {})) if "table" in one]
    print(table(judged[0]))
    if arguments.html:
        write_whole(arguments.html, render(judged))
    if arguments.quick:
        return
    settings = {"calibration": chosen.calibration, "texts": chosen.texts, "calibration_tokens": tokens}
    settings |= {"lens": chosen.lens, "lens_tokens": LENS_TOKENS}
    before = read_result(f"quality_{name}") if arguments.protocol else {}
    runs = {**before.get("runs", {}), **runs}
    print(write_result(f"quality_{name}", {**before, **found, "settings": settings, "runs": runs}))
    if arguments.ship:
        calibrated = found["calibrated"][BUDGETS.index(MAIN_BUDGET)]
        Policy.from_json(calibrated["policy"]).save(Path(chosen.model) / "policy.json")
        subject.lens.save(Path(chosen.model) / LENS_FILE)
        subject.direct.save(Path(chosen.model) / DIRECT_LENS_FILE)


if __name__ == "__main__":
    main()
