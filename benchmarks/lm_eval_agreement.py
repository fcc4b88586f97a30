"""Does lm-evaluation-harness say the same of `qs_jax` as of `hf`, and what do policies and bits cost on its tasks?

    python -m benchmarks.lm_eval_agreement                  # all of it; an hour on two cores
    python -m benchmarks.lm_eval_agreement --only agree     # `hf` and `qs_jax` alone, example by example
    python -m benchmarks.lm_eval_agreement --limit 32       # only so many examples of each task
    python -m benchmarks.lm_eval_agreement --report         # the tables of docs/lm_eval.md, from the results

Needs the extras `parity` and `lm-eval`, and nothing from a hub. SmolLM2 in float32 on the tasks of
benchmarks/lm_eval_tasks. `agree` runs the harness's own `hf` model on torch and ours, each as its command line would,
and compares every answer; the generation task also by the chat template and in exact mode. `costs` runs ours with
policies and Matryoshka codes. Calibrated policies are those of `benchmarks.quality`, whose lens is fitted again here.

Predictions, before the first run: (1) all greedy flags, generations and scores agree, log-likelihoods within 1e-3 of
one another; (2) `balanced` and `calibrated +0.2` change no score by more than two points, and save next to nothing on
contexts as short as these; (3) 8 bits change no score, 4 bits cost a few points of reciting and of the last word, more
than of choosing a sentence. Outcome: docs/lm_eval.md.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import jax

from benchmarks import real_model
from benchmarks.harness import read_result, stamp, write_result
from benchmarks.make_lm_eval_tasks import FOLDER
from benchmarks.quality import LENS_TOKENS, documents_of, studies
from benchmarks.quality_report import fill
from convert.pipeline import convert
from qs_jax.adaptive.policy import Policy
from qs_jax.console import aside, reporting_errors
from qs_jax.evaluation.lens import fit_lens
from qs_jax.evaluation.windows import whole
from qs_jax.lens import with_lens
from qs_jax.loading import load
from qs_jax.model import Model

NAME = "lm_eval"
PAGE = Path(__file__).parents[1] / "docs" / "lm_eval.md"
BATCH = 16
RECITE = "qs_recite"
SCORES = {
    "qs_last_word": ("acc,none", "perplexity,none"),
    "qs_next_sentence": ("acc,none", "acc_norm,none"),
    RECITE: ("exact_match,strict",),
    "qs_passages": ("bits_per_byte,none",),
}
"""What the harness reports of each task."""

_TITLES = {
    ("qs_last_word", "acc,none"): "last word",
    ("qs_next_sentence", "acc_norm,none"): "next sentence",
    (RECITE, "exact_match,strict"): "reciting",
    ("qs_passages", "bits_per_byte,none"): "bits per byte",
}
"""The columns of what things cost: shares of examples, and bits."""

_SHARES = ("acc", "exact_match")
"""How the names begin of scores that are shares of examples."""

_CALIBRATED = {0.2: "calibrated +0.2", 1.0: "calibrated +1"}

Answer = tuple[float, bool] | float | str


def evaluated(lm: Any, tasks: Sequence[str], limit: int | None, *, chat: bool = False) -> dict[str, dict[str, Any]]:
    """By task the harness's scores, every answer in the order of the examples, and each example's own scores."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    manager, run = TaskManager(include_path=str(FOLDER), include_defaults=False), cast(Any, evaluator).simple_evaluate
    found = run(lm, tasks=list(tasks), task_manager=manager, limit=limit, apply_chat_template=chat, bootstrap_iters=0)
    told = {}
    for task in tasks:
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        told[task] = {
            "scores": {name: found["results"][task][name] for name in SCORES[task]},
            "answers": [answer for sample in samples for asked in sample["resps"] for answer in asked],
            "examples": {
                name: [sample[name.split(",")[0]] for sample in samples]
                for name in SCORES[task]
                if name.startswith(_SHARES)
            },
        }
    return told


def compared(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """One task: by how much log-likelihoods differ, and how many flags and texts do."""
    pairs = list(zip(theirs["answers"], ours["answers"], strict=True))
    values = [(_likelihood(one), _likelihood(other)) for one, other in pairs if not isinstance(one, str)]
    differences = [abs(one - other) for one, other in values]
    flags = [(one[1], other[1]) for one, other in pairs if isinstance(one, tuple | list)]
    texts = [(one, other) for one, other in pairs if isinstance(one, str)]
    return {
        "answers": len(pairs),
        "differences": [round(value, 7) for value in differences],
        "largest": max(differences, default=None),
        "largest_share": max((abs(a - b) / max(1.0, abs(a)) for a, b in values), default=None),
        "other_flags": sum(one != other for one, other in flags) if flags else None,
        "other_texts": sum(one != other for one, other in texts) if texts else None,
        "scores_hf": theirs["scores"],
        "scores_qs_jax": ours["scores"],
    }


def _likelihood(answer: Answer) -> float:
    return float(answer[0] if isinstance(answer, tuple | list) else answer)


def agreement(folder: Path, limit: int | None) -> dict[str, Any]:
    """`hf` and `qs_jax` on every task, and on the generation task by the chat template and in exact mode."""
    from lm_eval.models import huggingface

    from qs_jax.lm_eval import QsJaxLM

    aside("hf")
    hf = cast(Any, huggingface).HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=BATCH)
    theirs = evaluated(hf, list(SCORES), limit)
    chat = evaluated(hf, [RECITE], limit, chat=True)[RECITE]
    del hf
    aside("qs_jax")
    model = load(folder, dtype="float32")
    plain, exact = (QsJaxLM(model, batch_size=BATCH, exact=exact) for exact in (False, True))
    ours = evaluated(plain, list(SCORES), limit)
    found = {task: compared(theirs[task], ours[task]) for task in SCORES}
    found[f"{RECITE}, chat template"] = compared(chat, evaluated(plain, [RECITE], limit, chat=True)[RECITE])
    found[f"{RECITE}, exact mode"] = compared(theirs[RECITE], evaluated(exact, [RECITE], limit)[RECITE])
    return found


def settings(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is judged, the dense model first."""
    from qs_jax.lm_eval import QsJaxLM

    model = load(folder, dtype="float32")

    def judged(of: Model, **how: Any) -> Callable[[], Any]:
        return lambda: QsJaxLM(of, batch_size=BATCH, **how)

    yield "off", judged(model)
    yield "balanced", judged(model, policy="balanced")
    with TemporaryDirectory() as temporary:
        aside("converting")
        convert(folder, Path(temporary) / "codes", quantize="matryoshka")
        codes = load(Path(temporary) / "codes", dtype="float32")
    for bits in (8, 4):
        yield f"{bits} bits", judged(codes, bits=bits)
    aside("fitting the lens")
    lens = fit_lens(model, whole(model, documents_of(studies()[real_model.NAME].lens), LENS_TOKENS)).lens
    lensed = replace(model, network=with_lens(model.network, lens))
    for one in read_result(f"quality_{real_model.NAME}")["calibrated"]:
        if name := _CALIBRATED.get(one["max_ppl_increase"]):
            yield name, judged(lensed, policy=Policy.from_json(one["policy"]))
    yield "paper", judged(model, policy="paper")


def cost(name: str, make: Callable[[], Any], dense: Mapping[str, Any] | None, limit: int | None) -> dict[str, Any]:
    """One setting's scores on every task, beside the dense model's, and what was saved of all their work."""
    aside(name)
    lm = make()
    found = evaluated(lm, list(SCORES), limit)
    rows = {task: {"scores": one["scores"], "examples": one["examples"]} for task, one in found.items()}
    beside = {}
    for task, row in rows.items() if dense else ():
        assert dense is not None
        beside[task] = {
            metric: interval(values, dense["tasks"][task]["examples"][metric])
            for metric, values in row["examples"].items()
        }
    saved = {key: value for key, value in lm.spent.items() if key.endswith("reduction")}
    return {"saved": saved, "tasks": rows, "beside": beside}


def interval(values: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """The mean difference of the examples' scores, and half the width of its 95 % interval."""
    differences = [float(value) - float(off) for value, off in zip(values, dense, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return {"mean": statistics.fmean(differences), "half": 1.96 * spread / math.sqrt(len(differences))}


def costs(folder: Path, limit: int | None, known: Mapping[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
    """Every setting that is not known yet, written as it is."""
    made = dict(known)
    for name, make in settings(folder):
        if name in made:
            continue
        made[name] = cost(name, make, made.get("off"), limit)
        write(made)


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """What the page shows of the results."""
    made = {}
    if "agree" in found:
        made["lm_eval agreement"] = _agreement_table(found["agree"]["tasks"])
    if "costs" in found:
        made["lm_eval costs"] = _cost_table(found["costs"]["settings"])
    return made


def _agreement_table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| task | answers | largest difference, nats | other greedy flags | other texts | `hf` | `qs_jax` |"]
    lines.append("|" + "---|" * 7)
    for task, one in tasks.items():
        cells = ["–" if value is None else str(value) for value in (one["other_flags"], one["other_texts"])]
        largest = "–" if one["largest"] is None else f"{one['largest']:.1e}"
        scores = [_scores(one[f"scores_{side}"]) for side in ("hf", "qs_jax")]
        lines.append(f"| {task} | {one['answers']} | {largest} | {' | '.join([*cells, *scores])} |")
    return "\n".join(lines)


def _scores(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name.split(',')[0]} {value:.4f}" for name, value in scores.items())


def _cost_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["setting", "FLOPs saved", "weight bytes saved", *_TITLES.values()]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        cells = [f"{row['saved'][key]:z.1%}" for key in ("flops_reduction", "bytes_reduction")]
        for task, metric in _TITLES:
            value = row["tasks"][task]["scores"][metric]
            beside = row["beside"].get(task, {}).get(metric)
            share = metric.startswith(_SHARES)
            difference = f" ({100 * beside['mean']:+.1f} ± {100 * beside['half']:.1f})" if beside else ""
            cells.append(f"{100 * value:.1f}%{difference}" if share else f"{value:.4f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("agree", "costs"), help="this part alone; the other stays in the file")
    parser.add_argument("--limit", type=int, metavar="N", help="so many examples of each task")
    parser.add_argument("--resume", action="store_true", help="go on from the costs in the file, of the same limit")
    parser.add_argument("--report", action="store_true", help="write the tables, run nothing")
    asked = parser.parse_args()
    result = read_result(NAME)
    if asked.report:
        fill(PAGE, tables(result))
        return
    jax.config.update("jax_default_matmul_precision", "highest")
    facts = {**stamp(), "limit": asked.limit}

    def write(part: str, found: dict[str, Any]) -> None:
        result[part] = {**facts, **found}
        print("\n".join(tables({part: result[part]}).values()), flush=True)
        print(write_result(NAME, result))
        fill(PAGE, tables(result))

    with reporting_errors(debug=True):
        folder = real_model.folder()
        if asked.only != "costs":
            write("agree", {"tasks": agreement(folder, asked.limit)})
        if asked.only != "agree":
            before = result.get("costs", {}) if asked.resume else {}
            known = before.get("settings", {}) if before.get("limit") == asked.limit else {}
            costs(folder, asked.limit, known, lambda made: write("costs", {"settings": made}))


if __name__ == "__main__":
    main()
