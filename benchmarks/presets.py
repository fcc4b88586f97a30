"""What do the presets and calibrated policies cost on every model and two kinds of text, and which could `balanced` be?

    python -m benchmarks.presets                 # judges them; writes results/presets.json
    python -m benchmarks.presets --models gpt2   # only this model, the others stay in the file
    python -m benchmarks.presets --search        # tries what `balanced` might be on calibration text of the real model
    python -m benchmarks.presets --report        # the tables of docs/results.md and README, from the results

Five models, each dense, and those with nested codes again; 512 unscored + 64 scored tokens or what a model's context
holds. Calibrated policies are those that `benchmarks.quality` found with a prefix; their text is never judged. The
search looks at calibration text only, of the real model only: it is the one that reacts.

Prediction, before the search: what costs at most 1 % on SmolLM2 is a prompt that stops at nine tenths of the depth,
which saves 5 to 6 % of all FLOPs there and nothing on models of 12 layers or fewer, and 4 bits for the surest half of
the generated tokens, which saves no time in a batch; everything earlier, dropped or fused costs more.
Outcome: docs/results.md.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from benchmarks import real_model
from benchmarks.harness import environment, read_result, write_result
from benchmarks.quality import C4, Study, Subject, documents_of, quantised, studies
from benchmarks.quality_report import write_presets
from qs_jax.adaptive.policy import Fusion, Halting, KvRuleName, Policy, Precision
from qs_jax.console import progress, reporting_errors
from qs_jax.evaluation.ablation import PRESETS, policy_row
from qs_jax.evaluation.perplexity import run
from qs_jax.evaluation.scoring import OFF
from qs_jax.evaluation.windows import Plan, cut
from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.request import bind_policy

SCORED_TOKENS = 2560
"""Of every text that policies are judged on; a search scores as many as the model's study."""

KEPT = (
    *("perplexity", "perplexity_off", "perplexity_increase", "perplexity_increase_interval", "windows"),
    *("flops_reduction", "bytes_reduction", "kv_reduction"),
)


def second_text(chosen: Study) -> tuple[str, str]:
    """Another kind of text than the first."""
    return chosen.texts[1] if len(chosen.texts) > 1 else next(iter(chosen.further), (C4, "-100:"))


def loaded(chosen: Study) -> Model:
    """The study's model, dense or in codes."""
    source = real_model.place(chosen.model)
    if not chosen.planes:
        return load(source, dtype="float32")
    with TemporaryDirectory() as folder:
        return load(quantised(source, documents_of(chosen.lens), Path(folder) / "planes"), dtype="float32")


def calibrated(name: str) -> dict[str, Policy]:
    """The policies that the study of a model found with a prefix, by name; not those that do nothing."""
    policies = (Policy.from_json(one["policy"]) for one in read_result(f"quality_{name}").get("calibrated", ()))
    return {policy.name: policy for policy in policies if policy.mechanisms}


def costs(model: Model, documents: list[str], policies: dict[str, Policy], plan: Plan) -> dict[str, dict[str, Any]]:
    """What every policy costs and saves on a text."""
    windows = cut(model, documents, plan)
    bound = {name: bind_policy(model, policy) for name, policy in policies.items()}
    size = sum(window.scored_bytes for window in windows)
    with progress("scoring", -(-len(windows) // plan.batch) * (len(bound) + 1)) as advance:
        scores = run(model, windows, bound, plan, advance)
    rows = {name: policy_row(name, "preset", p, scores[name], scores[OFF], size) for name, p in policies.items()}
    return {name: {key: row[key] for key in KEPT} for name, row in rows.items()}


def judged(name: str, chosen: Study, plan: Plan) -> Iterator[dict[str, Any]]:
    """Presets and calibrated policies on two kinds of text that nothing was calibrated on."""
    model, presets, found = Subject.of(name, chosen).model, {p: Policy.named(p) for p in PRESETS}, calibrated(name)
    for part in (chosen.texts[0], second_text(chosen)):
        rows = costs(model, documents_of((part,)), presets | found, plan)
        kinds = {"presets": presets, "calibrated": found}
        yield {"model": name, "text": part[0], **{k: {p: rows[p] for p in names} for k, names in kinds.items()}}


def candidates(planes: bool) -> dict[str, Policy]:
    """What `balanced` might be made of, mechanism by mechanism."""
    found: dict[str, Policy] = {}
    rules: tuple[KvRuleName, ...] = ("frozen", "drop")
    for rule in rules:
        for start in (0.8, 0.85, 0.9, 0.93):
            for last in (16, 128):
                halting = Halting("relative_drift", math.inf, start=start, step=1000)
                name = f"stop at {start:.2f}, {rule}, last {last} run"
                found[name] = Policy(name, prompt_halting=halting, kv_rule=rule, protect_last=last)
    for start in (0.5, 0.9):
        for threshold in (0.02, 0.05):
            name = f"fuse below {threshold} at {start:.2f}"
            found[name] = Policy(name, fusion=Fusion("cosine", threshold, start=start, step=1000))
    for below in (0.1, 0.25, 0.5, 1.0) if planes else ():
        name = f"4 bits below {below}"
        found[name] = Policy(name, precision=Precision("previous_entropy", four_below=below, layer=0))
    return found


def search(name: str, chosen: Study, plan: Plan) -> dict[str, Any]:
    """Every candidate, on two kinds of calibration text."""
    model = loaded(chosen)
    tried = candidates(chosen.planes)
    return {
        "model": name,
        "texts": {
            part[0]: {"documents": part[1], "candidates": costs(model, documents_of((part,)), tried, plan)}
            for part in chosen.calibration
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(studies()), default=list(studies()))
    parser.add_argument("--search", action="store_true", help="try candidates on calibration text of the real model")
    parser.add_argument("--report", action="store_true", help="write the tables, run nothing")
    parser.add_argument("--quick", action="store_true", help="a few windows, nothing written")
    arguments = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    with reporting_errors(debug=True):
        found = read_result("presets")
        if arguments.report:
            write_presets(found)
            return
        for name in arguments.models:
            chosen = studies()[name]
            tokens = chosen.scored_tokens if arguments.search else SCORED_TOKENS
            plan = Plan(max_tokens=512 if arguments.quick else tokens)
            facts = {"date": environment()["date"], "device": environment()["device"]}
            if arguments.search and str(chosen.model) != real_model.NAME:
                continue
            kind = "search" if arguments.search else "judged"
            new = search(name, chosen, plan) if arguments.search else {"rows": list(judged(name, chosen, plan))}
            found[kind] = {**found.get(kind, {}), name: {**facts, **new}}
            print(json.dumps(found[kind][name], indent=1), flush=True)
            if not arguments.quick:
                print(write_result("presets", found))


if __name__ == "__main__":
    main()
