"""The commands that study a model: `qs-jax eval`, `calibrate`, `report`. Everything heavy is imported inside them."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from qs_jax.adaptive.policy import Policy
from qs_jax.choices import DOCUMENTS
from qs_jax.cli_options import (
    Batch,
    Bits,
    Common,
    Documents,
    KvRuleOption,
    MaxTokens,
    ModelArgument,
    Overwrite,
    PolicyOption,
    Prefix,
    Signal,
    Text,
    WindowOption,
    common_options,
    load_model,
)
from qs_jax.console import print_json, progress, reporting_errors
from qs_jax.errors import EvaluationError
from qs_jax.evaluation.defaults import (
    BATCH,
    CALIBRATION_TOKENS,
    CONFIDENCE,
    DIRECT_CALIBRATION_TOKENS,
    DIRECT_LENS_TOKENS,
    LENS_TOKENS,
    MAX_PPL_INCREASE,
    SCORED_TOKENS,
    SIGNAL,
    WINDOW,
)
from qs_jax.evaluation.goal import Goal, broken
from qs_jax.evaluation.target import free_target
from qs_jax.files import DIRECT_LENS_FILE, LENS_FILE

EVAL_EXAMPLES = """Examples:

\b
  qs-jax eval ./model --text test.txt
  qs-jax eval ./model --text test.txt --policy policy.json --json > result.json
  qs-jax eval ./model --text stories.json --documents 500: --prefix 0 --window 256
  qs-jax eval ./model --text test.txt --ablate --calibration-text train.txt --json > table.json"""


CALIBRATE_EXAMPLES = """Examples:

\b
  qs-jax calibrate ./model --text train.txt
  qs-jax calibrate ./model --text train.jsonl --max-ppl-increase 1% --out generous.json
  qs-jax calibrate ./model --text articles.txt --further-text stories.json --further-text code.txt
An interrupted calibration goes on where it was when the same command is given again."""


@common_options()
def evaluate(
    model: ModelArgument,
    text: Text,
    documents: Documents = DOCUMENTS,
    policy: PolicyOption = "off",
    bits: Bits = None,
    prefix: Prefix = None,
    window: WindowOption = WINDOW,
    max_tokens: MaxTokens = SCORED_TOKENS,
    batch: Batch = BATCH,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also every combination of the mechanisms, and baselines.")
    ] = False,
    calibration_text: Annotated[
        str | None, typer.Option(help="With --ablate: other text, to calibrate policies for several budgets on.")
    ] = None,
    calibration_documents: Documents = DOCUMENTS,
    calibration_tokens: Annotated[int, typer.Option(help="Most tokens of it to score.")] = CALIBRATION_TOKENS,
    free_run: Annotated[int, typer.Option(min=0, help="Prefixes to continue greedily, beside the dense model.")] = 0,
    *,
    common: Common,
) -> None:
    """Score text: perplexity under a policy beside the dense model's, with intervals, and what was saved."""
    with reporting_errors(common.debug):
        chosen = Policy.of(policy)
        from qs_jax.corpus import Corpus
        from qs_jax.evaluation import api
        from qs_jax.evaluation.windows import Plan

        # what can be wrong without the model is, before it is loaded
        Plan(prefix, window, max_tokens, batch)
        if calibration_text is not None and not ablate:
            raise EvaluationError("--calibration-text is for --ablate; qs-jax calibrate makes a policy to score")
        other = Corpus.of(calibration_text, calibration_documents) if calibration_text is not None else None
        corpus = Corpus.of(text, documents)
        loaded = load_model(model, common)
        with progress("scoring") as advance:
            found = api.evaluate(
                loaded,
                corpus,
                policy=chosen,
                bits=bits,
                prefix=prefix,
                window=window,
                max_tokens=max_tokens,
                batch=batch,
                ablate=ablate,
                calibration_text=other,
                calibration_tokens=calibration_tokens,
                free_run=free_run,
                advance=advance,
            )
        result = found.to_json()
        if common.json:
            print_json(result)
            return
        _print_evaluation(result)
        for row in result.get("table", ()):
            over = broken(row["name"], row["perplexity_increase"], result["perplexity_off"])
            print(
                f"{row['name']:40} perplexity {row['perplexity']:.3f} ({row['perplexity_increase']:+z.3f}), saved "
                f"{row['flops_reduction']:z.1%} of FLOPs, {row['bytes_reduction']:z.1%} of weight bytes"
                + (f"; {over}" if over else "")
            )


def _print_evaluation(result: dict[str, Any]) -> None:
    protocol, ledger, interval = result["protocol"], result["ledger"], result["perplexity_increase_interval"]
    between = f" (95 % interval {interval[0]:+z.3f} to {interval[1]:+z.3f})" if interval else ""
    print(
        f"perplexity {result['perplexity']:.3f}, dense {result['perplexity_off']:.3f}: "
        f"{result['perplexity_increase']:+z.3f}{between}\n"
        f"{result['tokens_scored']} tokens in {protocol['windows']} windows of {protocol['prefix']} + "
        f"{protocol['window']} tokens, {protocol['batch']} together; "
        f"{result['bits_per_byte'] or float('nan'):.3f} bits per byte\n"
        f"same most likely token as dense {result['top1_agreement']:.1%}, KL {result['kl_nats']:.4f} nats\n"
        f"saved {ledger['flops_reduction']:z.1%} of FLOPs, {ledger['bytes_reduction']:z.1%} of weight bytes, "
        f"{1 - ledger['kv_slots'] / ledger['kv_slots_off']:z.1%} of cache slots; "
        f"{ledger['layers_run_mean']:.2f} layers per token"
    )
    if over := broken(result["policy"]["name"], result["perplexity_increase"], result["perplexity_off"]):
        print(over)


def _points_or_percent(said: str | float) -> float | str:
    """What is no number is left to the function that knows what else it may be."""
    try:
        return float(said)
    except ValueError:
        return said


@common_options()
def calibrate(
    model: ModelArgument,
    text: Text,
    documents: Documents = DOCUMENTS,
    max_ppl_increase: Annotated[
        Any, typer.Option(parser=_points_or_percent, metavar="N", help="Perplexity may rise by N points, or by N%.")
    ] = MAX_PPL_INCREASE,
    confidence: Annotated[float, typer.Option(help="That it does not rise more, from 0.5 to below 1.")] = CONFIDENCE,
    out: Annotated[str | None, typer.Option(help="Policy file to write; by default policy.json in MODEL.")] = None,
    signal: Signal = SIGNAL,
    kv_rule: KvRuleOption = None,
    prefix: Prefix = None,
    window: WindowOption = WINDOW,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Most tokens to score: {CALIBRATION_TOKENS}; {DIRECT_CALIBRATION_TOKENS} with a direct lens."
        ),
    ] = None,
    batch: Batch = BATCH,
    further_text: Annotated[
        list[str] | None,
        typer.Option(help="Text of another kind: the budget is to hold there too; may be repeated."),
    ] = None,
    overwrite: Overwrite = False,
    *,
    common: Common,
) -> None:
    """Find the policy that saves most while perplexity rises no more than allowed, tested on text held back."""
    with reporting_errors(common.debug):
        target = _target(model, out, "policy.json", overwrite=overwrite)
        from qs_jax.corpus import Corpus
        from qs_jax.evaluation import api
        from qs_jax.evaluation.windows import Plan

        # what can be wrong without the model is, before it is loaded
        Goal.of(max_ppl_increase, confidence)
        Plan(prefix, window, CALIBRATION_TOKENS if max_tokens is None else max_tokens, batch)
        corpus, further = Corpus.of(text, documents), [Corpus.of(one) for one in further_text or ()]
        loaded = load_model(model, common)
        with progress("calibrating") as advance:
            found = api.calibrate(
                loaded,
                corpus,
                max_ppl_increase=max_ppl_increase,
                confidence=confidence,
                out=target,
                signal=cast(Any, signal),
                kv_rule=cast(Any, kv_rule),
                prefix=prefix,
                window=window,
                max_tokens=max_tokens,
                batch=batch,
                further_text=further,
                overwrite=overwrite,
                advance=advance,
            )
        result = found.to_json()
        if common.json:
            print_json(result)
        else:
            _print_calibration(result)


def _target(model: str, out: str | None, name: str, *, overwrite: bool) -> Path:
    """Where a result goes."""
    if out is None and not Path(model).is_dir():
        raise EvaluationError(f"{model} is not a folder; say with --out where {name} goes")
    return free_target(Path(out) if out is not None else Path(model) / name, overwrite=overwrite)


def _print_calibration(result: dict[str, Any]) -> None:
    chosen, uniform = result["chosen"], result["best_uniform_stop"]
    for row in result["tested"]:
        verdict = "trusted" if row["accepted"] else "not trusted"
        print(
            f"{row['flops_reduction']:z6.1%} of FLOPs saved: perplexity {row['perplexity_increase']:+z.3f}, "
            f"at most {row['upper']:+z.3f} with {result['confidence']:.0%} confidence: {verdict}"
        )
    if chosen is None:
        print(f"nothing can be trusted to stay within +{result['max_ppl_increase']}; the policy is off")
    elif uniform is not None:
        print(f"best uniform stop of the prompt within the budget: {uniform['flops_reduction']:z.1%}")
    print(f"written to {result['out']}")


LENS_EXAMPLES = """Examples:

\b
  qs-jax lens ./model --text train.txt
  qs-jax lens ./model --text train.txt --direct 18 --tune 10
  qs-jax calibrate ./model --text other.txt
A lens in the model's folder is found there; calibrate then lets halted tokens follow it, the direct one if there are
two. A tuning that was interrupted goes on with --resume: the file always holds the best so far."""


@common_options()
def lens(
    model: ModelArgument,
    text: Text,
    documents: Documents = DOCUMENTS,
    out: Annotated[
        str | None, typer.Option(help="File to write; by default lens.safetensors or direct_lens.safetensors in MODEL.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the maps; by default a quarter of the hidden size, with --direct all of it.")
    ] = None,
    direct: Annotated[
        list[int] | None,
        typer.Option(help="Fit a direct lens, for prompt tokens that stop after so many layers; may be repeated."),
    ] = None,
    tune: Annotated[
        float, typer.Option(help="With --direct: minutes to lower what it costs the text that follows, for each stop.")
    ] = 0.0,
    max_tokens: Annotated[
        int | None,
        typer.Option(help=f"Most tokens to fit on: by default {LENS_TOKENS}, with --direct {DIRECT_LENS_TOKENS}."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --tune: go on from what the file holds.")] = False,
    overwrite: Overwrite = False,
    *,
    common: Common,
) -> None:
    """Fit a lens, stand-ins for layers that halted tokens skip, to a model that stays as it is; beyond the paper.

    The affine lens carries a token's state on, layer by layer. The direct lens makes keys and values of all later
    layers of what a prompt token showed, and can be tuned.
    """
    with reporting_errors(common.debug):
        if not direct and (tune or resume):
            raise EvaluationError("--tune and --resume are of the direct lens; name a stop with --direct")
        target = _target(model, out, DIRECT_LENS_FILE if direct else LENS_FILE, overwrite=overwrite or resume)
        from qs_jax.corpus import Corpus
        from qs_jax.evaluation import api, api_direct

        corpus = Corpus.of(text, documents)
        loaded = load_model(model, common)
        options: dict[str, Any] = {"out": target, "rank": rank, "overwrite": overwrite}
        options |= {} if max_tokens is None else {"max_tokens": max_tokens}
        with progress("fitting") as advance:
            if direct:
                options |= {"tune": tune, "resume": resume}
                fit = api_direct.fit_direct_lens(loaded, corpus, direct, advance=advance, **options)
            else:
                fit = api.fit_lens(loaded, corpus, advance=advance, **options)
        if common.json:
            print_json(fit.to_json())
            return
        for line in fit.lines():
            print(line)
        print(f"written to {target}")


REPORT_EXAMPLES = """Examples:

\b
  qs-jax eval ./model --text test.txt --ablate --json > table.json
  qs-jax generate ./model --prompt "Once upon a time" --exact --json > text.json
  qs-jax report table.json text.json --out report.html"""


@common_options(loads=False)
def report(
    results: Annotated[list[Path], typer.Argument(help="What generate, eval or calibrate printed with --json.")],
    out: Annotated[Path, typer.Option(help="Page to write.")],
    overwrite: Overwrite = False,
    *,
    common: Common,
) -> None:
    """Show results on one self-contained page: tables, figures, and the text coloured by what was spent on it."""
    with reporting_errors(common.debug):
        free_target(out, overwrite=overwrite)
        from qs_jax.evaluation.report import read_result, write_report

        write_report([read_result(path) for path in results], out)
        if common.json:
            print_json({"out": str(out), "results": len(results)})
        else:
            print(f"written to {out}")
