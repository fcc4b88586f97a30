"""The direct lens on the real model: what each part of it brings at equal saving, and real time.

    python -m benchmarks.direct_lens                      # fit, tune, judge, calibrate, time; an hour on two cores
    python -m benchmarks.direct_lens --keep lens.st       # the same, and the tuned lens is written there as it improves
    python -m benchmarks.direct_lens --lens lens.st --only time      # with a lens tuned earlier, one part alone
    python -m benchmarks.direct_lens --stop 21 --only judge          # another stop, its results beside the others
    python -m benchmarks.direct_lens --lens a.st --lens b.st --only calibrate      # with lenses for several stops
    python -m benchmarks.direct_lens --report             # the tables of docs/results.md, from the results

SmolLM2, prompts of 512 tokens and 64 scored ones. Fitted on WikiText-103 training text, C4 and novels, calibrated on
other parts of the first two, judged on WikiText-103 test and C4 documents that neither saw.

Prediction, before the first run, for a stop after 18 of 30 layers: with the last 64 tokens running (26 % of all FLOPs)
frozen keys and values cost more than +5, the composed lens +1, the closed form of the direct one +0.6 of the state at
the stop alone and +0.45 with two more, tuning brings it to +0.25; with the last 128 running (21 %) to +0.1. A prefill
gets faster by nine tenths of what the ledger says. Outcome: docs/results.md.

A first run, fitted on WikiText's passages one by one, as short documents, and on no novels, came to +1.91 and +1.30 on
WikiText's test articles (64 and 128 tokens running) and +0.38 and +0.15 on C4. That this was for want of text to look
back on was wrong: running text, since then, came to the same.

Prediction, before the run of `--tokens 350208 --tune 30`, of which two fifths are novels where before it were a third
of 147,456 tokens: tuned four times as long the lens comes from +1.1 to +0.8 on WikiText, 64 tokens running; rare tokens
that run take a quarter of the cost away for an eighth of the saving; calibration for +0.2 trusts 8 to 10 %.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

from benchmarks import real_model
from benchmarks.adaptive_cost import side
from benchmarks.harness import interleaved, median_ratio, read_result, stamp, summary, write_result
from benchmarks.presets import KEPT, costs
from benchmarks.quality import C4, LENS_TOKENS, NOVELS, WIKITEXT_TRAIN, Part, documents_of, studies
from benchmarks.quality_report import write_direct_lens
from qs_jax.adaptive.policy import Halting, KvRuleName, Policy
from qs_jax.console import progress, reporting_errors
from qs_jax.evaluation.ablation import policy_row
from qs_jax.evaluation.defaults import DIRECT_LENS_TOKENS, RARE_SHARE, TUNED_LAST
from qs_jax.evaluation.direct import fit_direct
from qs_jax.evaluation.goal import Goal
from qs_jax.evaluation.lens import fit_lens
from qs_jax.evaluation.scoring import score_alone
from qs_jax.evaluation.study import calibrate_model
from qs_jax.evaluation.tuning import Tuned, tune
from qs_jax.evaluation.windows import Plan, cut, whole
from qs_jax.generation import generate
from qs_jax.lens import DirectLens, DirectMap, Lens, rarity_of, with_direct_lens, with_lens
from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.request import bind_policy

NAME = "direct_lens"
STOP = 18
"""After how many layers, unless another is asked for."""
LAST = (64, 128)
"""Of a prompt's end, how many tokens run through all layers."""
RARE = (11.0, 9.52)
"""Nats: tokens this rare do so as well, under the tuned lens."""
PARTS = ("judge", "calibrate", "time")
BUDGETS = ("0.1", "0.2", "0.5")
PROMPTS = (512, 1023)
ROUNDS = 7
FINAL_TOKENS = 2560
"""Scored of every text under calibrated policies."""


LENS_PARTS = ((WIKITEXT_TRAIN, ":500"), (C4, ":300"))
CALIBRATION_PARTS = ((WIKITEXT_TRAIN, "500:"), (C4, "300:600"))
NOVELS_READ, NOVEL_LENGTH = ":10", 60_000
"""Novels to fit on, and characters of each."""


def running(parts: tuple[Part, ...]) -> list[str]:
    """The documents of several files; WikiText's training passages, which are pieces of articles, as the running text
    that they are, so that there is as much to look back on as in the text that is judged."""
    found: list[str] = []
    for part in parts:
        documents = documents_of((part,))
        found += [" ".join(documents)] if part[0] == WIKITEXT_TRAIN else documents
    return found


def lens_text() -> list[str]:
    """What the lenses are fitted on."""
    return [*running(LENS_PARTS), *(novel[:NOVEL_LENGTH] for novel in documents_of(((NOVELS, NOVELS_READ),)))]


def stop(rule: KvRuleName, after: int, last: int, rare: float | None = None) -> Policy:
    """All of the prompt but its ends, and tokens of this rarity, stops after so many layers."""
    halting = Halting(thresholds=math.inf, layers=(after,))
    return Policy(f"{rule}, last {last}", prompt_halting=halting, kv_rule=rule, protect_last=last, protect_rare=rare)


def lensed(model: Model, lens: DirectLens) -> Model:
    return replace(model, network=with_direct_lens(model.network, lens))


def fitted(
    model: Model, after: int, tokens: int, minutes: float, spared: float, keep: Path | None
) -> tuple[dict[str, Any], dict[str, DirectMap], np.ndarray]:
    """What was seen on the way, maps of the stop by how they were made, and how rare tokens are in their text."""
    windows = whole(model, lens_text(), tokens)
    rarity = rarity_of(windows, model.config.vocab_size)
    with progress("fitting", model.config.num_hidden_layers + 11) as advance:
        (fit,), seen = fit_direct(model, windows, [after], last=TUNED_LAST, advance=advance)

        def write(found: Tuned) -> None:
            if keep:
                DirectLens((found.map,), rarity).save(keep)

        tuned = tune(model.network, fit.map, seen, minutes, share=spared, keep=write, advance=advance)
    facts = {
        "tokens": windows.size,
        "spared": spared,
        "looks_back": fit.map.inputs,
        "rank": len(fit.map.down),
        "explained": fit.explained,
        "explained_by_inputs": [{"inputs": inputs, "share": share} for inputs, share in fit.by_inputs.items()],
        "curve": tuned.curve,
    }
    return facts, {"of the stop alone": fit.alone, "closed form": fit.map, "tuned": tuned.map}, rarity


def composed(model: Model) -> Lens:
    """The affine lens, as `qs-jax lens` fits it."""
    windows = whole(model, lens_text(), LENS_TOKENS)
    with progress("the affine lens", model.config.num_hidden_layers) as advance:
        return fit_lens(model, windows, advance=advance).lens


def judged(
    model: Model, maps: dict[str, DirectMap], rarity: np.ndarray | None, tokens: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """By text, what every map costs and saves, at the usual stop other rules as well, and under the tuned one what rare
    tokens that run bring."""
    after, sides = maps["tuned"].stop, dict[str, tuple[Model, KvRuleName]]()
    if after == STOP:
        affine = replace(model, network=with_lens(model.network, composed(model)))
        sides |= {"frozen": (model, "frozen"), "affine": (affine, "affine")}
    sides |= {
        f"direct, {name}": (lensed(model, DirectLens((found,), rarity)), "direct") for name, found in maps.items()
    }
    texts: dict[str, dict[str, Any]] = {}
    for part in studies()[real_model.NAME].texts[:2]:
        windows, plan = cut(model, documents_of((part,)), Plan(max_tokens=tokens)), Plan()
        dense = score_alone(model, windows, bind_policy(model, Policy.off()), batch=plan.batch)
        size, rows = sum(window.scored_bytes for window in windows), dict[str, Any]()
        for name, (one, rule) in sides.items():
            ways = {str(last): stop(rule, after, last) for last in LAST}
            if name == "direct, tuned":
                ways |= {
                    f"{last}, and rarer than {rare} nats": stop(rule, after, last, rare)
                    for last in LAST
                    for rare in RARE
                }
            for way, policy in ways.items():
                scores = score_alone(one, windows, bind_policy(one, policy), batch=plan.batch)
                row = policy_row(name, "baseline", policy, scores, dense, size)
                rows.setdefault(name, {})[way] = {key: row[key] for key in KEPT}
        texts[part[0]] = rows
    return texts


def calibrated(model: Model, tokens: int) -> dict[str, Any]:
    """Policies calibrated with the lens, so that budgets hold on either text, how long that took, and what they cost on
    text that nothing was chosen on."""
    chosen, plan = studies()[real_model.NAME], Plan(max_tokens=tokens)
    windows = [
        replace(window, text=number)
        for number, part in enumerate(CALIBRATION_PARTS)
        for window in cut(model, running((part,)), plan)
    ]
    began = perf_counter()
    with progress("calibrating", 40) as advance:
        found = calibrate_model(model, windows, plan, [Goal.of(budget) for budget in BUDGETS], advance=advance)
    seconds = perf_counter() - began
    policies = {one.goal.name: one.policy for one in found if one.policy.mechanisms}
    texts = {
        part[0]: costs(model, documents_of((part,)), policies, replace(plan, max_tokens=FINAL_TOKENS))
        for part in chosen.texts[:2]
    }
    return {
        "windows": len(windows),
        "seconds": seconds,
        "stops": model.network.direct_stops,
        "tested": {one.goal.name: one.tested for one in found},
        "policies": {name: policy.to_json() for name, policy in policies.items()},
        "texts": texts,
    }


def timed(model: Model, after: int) -> dict[str, Any]:
    """Prefill of prompts of judged text under a policy and dense, in turn; and by how much the ledger says it should be
    faster. Rare tokens run, and the last 64."""
    found: dict[str, Any] = {}
    last, rare = LAST[0], RARE[0]
    sides = {"dense": Policy.off(), "direct": stop("direct", after, last, rare)}
    text = documents_of(studies()[real_model.NAME].texts[:1])
    for tokens in PROMPTS:
        prompt = list(cut(model, text, Plan(prefix=tokens, window=1, max_tokens=3))[1].prompt)
        runs = {name: partial(side(model, policy), [prompt], 1) for name, policy in sides.items()}
        seconds = interleaved(runs, ROUNDS)
        ledger = generate(model, [prompt], max_new_tokens=1, eos_token_id=[], policy=sides["direct"]).ledger
        found[str(tokens)] = {
            "last": last,
            "rare": rare,
            **{name: summary(values) for name, values in seconds.items()},
            "speedup": median_ratio(seconds["dense"], seconds["direct"]),
            "ledger": ledger["flops_off"] / ledger["flops"],
        }
    return found


def named(part: str, after: int) -> str:
    """What a part is called among the results: those of another stop are kept apart."""
    return part if after == STOP else f"{part}, {after}"


def joined(lenses: Sequence[DirectLens]) -> DirectLens:
    """One of several, each for other stops; the first is that which is judged."""
    return DirectLens(tuple(one for lens in lenses for one in lens.maps), lenses[0].rarity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=DIRECT_LENS_TOKENS, help="most to fit on")
    parser.add_argument("--tune", type=float, default=10.0, help="minutes")
    parser.add_argument("--spare", type=float, default=RARE_SHARE, help="tune with this share running, the rarest")
    parser.add_argument("--scored-tokens", type=int, default=2560, help="of every text")
    parser.add_argument("--calibration-tokens", type=int, default=6144, help="of either text")
    parser.add_argument("--keep", type=Path, help="where to write the tuned lens")
    parser.add_argument("--stop", type=int, default=STOP, help="after how many layers")
    parser.add_argument("--lens", type=Path, action="append", help="this one, fit none; calibration takes several")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part alone")
    parser.add_argument("--report", action="store_true", help="write the tables, run nothing")
    asked = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    with reporting_errors(debug=True):
        result = read_result(NAME)
        if asked.report:
            write_direct_lens(result)
            return
        model = load(real_model.place(real_model.NAME), dtype="float32")
        if asked.lens:
            lens = joined([DirectLens.load(path, model.config) for path in asked.lens])
            maps = {"tuned": lens.maps[0]}
        else:
            fit, maps, rarity = fitted(model, asked.stop, asked.tokens, asked.tune, asked.spare, asked.keep)
            lens = DirectLens((maps["tuned"],), rarity)
            if asked.stop != STOP:
                maps.pop("of the stop alone")
            result[named("fit", asked.stop)] = fit
        after = maps["tuned"].stop
        result["settings"] = {"stop": STOP, "scored_tokens": asked.scored_tokens}
        made = {
            "judge": lambda: judged(model, maps, lens.rarity, asked.scored_tokens),
            "calibrate": lambda: calibrated(lensed(model, lens), asked.calibration_tokens),
            "time": lambda: timed(lensed(model, lens), after),
        }
        for part in asked.only or PARTS:
            name = part if part == "calibrate" else named(part, after)
            result[name] = {**stamp(), **made[part]()}
            print(json.dumps(result[name], indent=1), flush=True)
            print(write_result(NAME, result))


if __name__ == "__main__":
    main()
