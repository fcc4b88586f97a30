"""What do the mechanisms save on real text, at what quality? Calibrated on some documents, judged on others.

    python -m benchmarks.quality stories3M         # writes benchmarks/results/quality_stories3M.json
    python -m benchmarks.quality llama --ship      # the same, and reference_models/llama/policy.json
    python -m benchmarks.quality llama --html llama.html     # the same, and a page to look at
    python -m benchmarks.quality llama --quick     # a few windows, nothing written
    python -m benchmarks.quality llama --table     # the stored result as Markdown, nothing run
    python -m benchmarks.quality --report          # the tables of docs/results.md, from the results there are

One run gives all of it: the lens, calibration at four budgets, the 2^4 combinations, the baselines at equal work, the
oracle, free running, and the policy for +0.2 on further text it was not calibrated on; then the same with every token
scored and no prefix, the paper's protocol. The lens, calibration and the judged text share no document. `qs-jax report`
shows the file.

Predictions, before the first run: (1) a prompt that stops one layer early is free, since the last layer's keys and
values do not need that layer; (2) a uniform stop with frozen keys and values is hard to beat, per-token choices add a
few points at most; (3) halting tokens that are scored costs more than it saves; (4) dropping keys and values costs more
still; (5) 39.6 % within +0.2 is out of reach for models of 6 to 16 layers. Before the first run with a lens, after a
simulation on 16 windows of the Llama model (stop after 7 layers: +0.34 frozen, +0.02 with a lens) and 32 of stories3M
(after 4 of 6: +0.13 and +0.08): (6) with a lens the prompt of the reference models may stop twice as early within +0.2,
beyond 39.6 % of FLOPs; (7) on the shallow, well-trained stories3M it gains one layer at most. Before the first run in
the paper's protocol: (8) nothing beyond 2 % is saved within +0.2 there, as the prompt is all that may stop early.
Outcome: docs/results.md.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks.harness import RESULTS, write_result
from benchmarks.quality_report import table, write_report
from convert.pipeline import convert
from qs_jax.adaptive.policy import Policy
from qs_jax.console import progress
from qs_jax.corpus import read_documents
from qs_jax.evaluation.ablation import BUDGETS, MAIN_BUDGET
from qs_jax.evaluation.lens import fit_lens
from qs_jax.evaluation.perplexity import evaluate
from qs_jax.evaluation.report import render
from qs_jax.evaluation.study import study
from qs_jax.evaluation.windows import Plan, cut, whole
from qs_jax.files import write_whole
from qs_jax.lens import LENS_FILE, Lens, with_lens
from qs_jax.loading import load
from qs_jax.model import Model
from reference_models.data import text_folder

STORIES = "tinystories_train_first1000.json"
FURTHER_TOKENS = 1024
LENS_TOKENS = 32768
PLANES_TOKENS = 8192
EVERY_TOKEN = Plan(prefix=0, window=128)
"""The paper's protocol, in windows that every model's context holds and of which there are enough to calibrate on."""
_PASSES = 400
"""About how many one protocol takes, for the progress bar."""


@dataclass(frozen=True)
class Study:
    """A model and its texts: (file, documents). Reference models were trained on all stories but the last 100.

    With `planes` the weights are first quantised (gptq, on the lens's text), so that precision can adapt as well.
    """

    model: Path
    lens: tuple[str, str]
    calibration: tuple[str, str]
    text: tuple[str, str]
    further: tuple[tuple[str, str], ...] = ()
    planes: bool = False


def studies() -> dict[str, Study]:
    """The models there are; those that do not belong to the repository lie beside the texts."""
    ours, theirs = Path(__file__).parents[1] / "reference_models", text_folder().parent / "models"
    further = (("c4-sample.jsonl", "-100:"), ("wikitext103-test.raw.txt", ":"))
    stories = (STORIES, ":300"), (STORIES, "300:600"), (STORIES, "600:")
    return {
        "stories3M-planes": Study(theirs / "stories3M", *stories, planes=True),
        "stories3M": Study(theirs / "stories3M", *stories),
        "babyllama105": Study(theirs / "babyllama105", (STORIES, ":300"), (STORIES, "300:600"), (STORIES, "900:")),
        "gpt2": Study(ours / "gpt2", (STORIES, ":300"), (STORIES, "300:600"), (STORIES, "-100:"), further),
        "llama": Study(ours / "llama", (STORIES, ":300"), (STORIES, "300:600"), (STORIES, "-100:"), further),
    }


def quantised(folder: Path, documents: list[str], target: Path) -> Path:
    """The model converted to Matryoshka codes, fitted on the documents."""
    convert(
        folder,
        target,
        quantize="matryoshka",
        method="gptq",
        calibration_text=documents,
        calibration_tokens=PLANES_TOKENS,
    )
    return target


def run(name: str, chosen: Study, plan: Plan, calibration_tokens: int) -> tuple[dict[str, Any], Lens]:
    """The whole study of a model, and the lens it was made with."""
    parts = {"lens": chosen.lens, "calibration": chosen.calibration, "text": chosen.text}
    documents = {part: read_documents(text_folder() / file, which) for part, (file, which) in parts.items()}
    with TemporaryDirectory() as temporary:
        folder = (
            quantised(chosen.model, documents["lens"], Path(temporary) / "planes") if chosen.planes else chosen.model
        )
        model = load(folder)
    fit = fit_lens(model, whole(model, documents["lens"], LENS_TOKENS))
    model = replace(model, network=with_lens(model.network, fit.lens))
    result = _judged(name, model, documents, plan, calibration_tokens, free_runs=8)
    policy = Policy.from_json(result["policy"])
    further = {}
    for file, which in chosen.further:
        less = Plan(plan.prefix, plan.window, min(FURTHER_TOKENS, plan.max_tokens), plan.batch)
        windows = cut(model, read_documents(text_folder() / file, which), less)
        found = evaluate(model, windows, policy, less)
        further[file] = {**found, "model": name, "samples": [], "logprobs": []}
    plain = replace(EVERY_TOKEN, max_tokens=plan.max_tokens)
    every_token = _judged(f"{name}, every token scored", model, documents, plain, calibration_tokens, free_runs=0)
    result |= {"text": chosen.text[0], "lens_explained": fit.explained, "further": further}
    return {**result, "every_token": {**every_token, "text": chosen.text[0]}}, fit.lens


def _judged(
    name: str, model: Model, documents: dict[str, list[str]], plan: Plan, calibration_tokens: int, *, free_runs: int
) -> dict[str, Any]:
    """All that `qs-jax eval --ablate` reports, in one protocol."""
    with progress(name, _PASSES) as advance:
        result = study(
            model,
            cut(model, documents["text"], plan),
            Policy.off(),
            plan,
            ablated=True,
            calibration=(documents["calibration"], calibration_tokens),
            free_runs=free_runs,
            target=RESULTS / f"quality_{name}.json",
            advance=advance,
        )
    return {**result, "model": name, "logprobs": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=sorted(studies()))
    parser.add_argument("--ship", action="store_true", help="write policy.json and the lens beside the model")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report of both protocols there as well")
    parser.add_argument("--quick", action="store_true", help="a few windows, nothing written")
    parser.add_argument("--table", action="store_true", help="print the stored result, run nothing")
    parser.add_argument("--report", action="store_true", help="write the tables of docs/results.md, run nothing")
    arguments = parser.parse_args()
    if arguments.report:
        write_report({name: RESULTS / f"quality_{name}.json" for name in studies()})
        return
    if arguments.model is None:
        parser.error("say which model, or --report")
    if arguments.table:
        print(table(json.loads((RESULTS / f"quality_{arguments.model}.json").read_text())))
        return
    chosen = studies()[arguments.model]
    plan, calibration_tokens = (Plan(max_tokens=512), 2048) if arguments.quick else (Plan(), 4096)
    started = perf_counter()
    result, lens = run(arguments.model, chosen, plan, calibration_tokens)
    result["seconds"] = round(perf_counter() - started, 1)
    print(table(result))
    if arguments.html:
        write_whole(arguments.html, render([result, result["every_token"]]))
    if arguments.quick:
        return
    settings = {"calibration": chosen.calibration, "text": chosen.text, "calibration_tokens": calibration_tokens}
    settings |= {"lens": chosen.lens, "lens_tokens": LENS_TOKENS}
    print(write_result(f"quality_{arguments.model}", {"settings": settings, **result}))
    if arguments.ship:
        calibrated = result["calibrated"][BUDGETS.index(MAIN_BUDGET)]
        Policy.from_json(calibrated["policy"]).save(chosen.model / "policy.json")
        lens.save(chosen.model / LENS_FILE)


if __name__ == "__main__":
    main()
