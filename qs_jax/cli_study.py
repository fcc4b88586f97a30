"""The commands that study a model: `qs-jax eval`, `calibrate`, `report`. Everything heavy is imported inside them."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.cli_options import Bits, Common, ModelArgument, PolicyOption, common_options, load_model
from qs_jax.console import print_json, progress, reporting_errors
from qs_jax.errors import EvaluationError

Text = Annotated[
    str, typer.Option("--text", help="Text to score: txt, json, jsonl (.xz, .gz), or wikitext-103, wikitext-2, c4.")
]
Documents = Annotated[str, typer.Option(help="Which documents of the text, as a slice: 0:500, 500:, -100:.")]
Prefix = Annotated[
    int | None,
    typer.Option(
        help="Unscored tokens before each window; 0 scores every token. Default: 512, or the power of 2 that fits."
    ),
]
WindowOption = Annotated[int, typer.Option("--window", help="Scored tokens per window.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to score, spread over the text.")]
Batch = Annotated[int, typer.Option(help="Windows run together; 1 shows what decoding alone saves.")]

_MEASUREMENTS = 40
"""About how many a calibration takes, for the progress bar."""

EVAL_EXAMPLES = """Examples:

\b
  qs-jax eval ./model --text test.txt
  qs-jax eval ./model --text test.txt --policy policy.json --json > result.json
  qs-jax eval ./model --text stories.json --documents 500: --prefix 0 --window 256
  qs-jax eval ./model --text test.txt --ablate --calibration-text train.txt --json > table.json"""


CALIBRATE_EXAMPLES = """Examples:

\b
  qs-jax calibrate ./model --text train.txt
  qs-jax calibrate ./model --text train.jsonl --max-ppl-increase 0.5 --out generous.json
An interrupted calibration goes on where it was when the same command is given again."""


@common_options()
def evaluate(
    model: ModelArgument,
    text: Text,
    documents: Documents = ":",
    policy: PolicyOption = "off",
    bits: Bits = None,
    prefix: Prefix = None,
    window: WindowOption = 64,
    max_tokens: MaxTokens = 2560,
    batch: Batch = 8,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also every combination of the mechanisms, and baselines.")
    ] = False,
    calibration_text: Annotated[
        str | None, typer.Option(help="With --ablate: other text, to calibrate policies for several budgets on.")
    ] = None,
    calibration_documents: Documents = ":",
    calibration_tokens: Annotated[int, typer.Option(help="Most tokens of it to score.")] = 4096,
    free_run: Annotated[int, typer.Option(min=0, help="Prefixes to continue greedily, beside the dense model.")] = 0,
    *,
    common: Common,
) -> None:
    """Score text: perplexity under a policy beside the dense model's, with intervals, and what was saved."""
    with reporting_errors(common.debug):
        chosen = Policy.of(policy)
        from qs_jax.evaluation.perplexity import passes
        from qs_jax.evaluation.study import study
        from qs_jax.evaluation.text import read_documents
        from qs_jax.evaluation.windows import Plan

        plan = Plan(prefix, window, max_tokens, batch)
        if calibration_text is not None and not ablate:
            raise EvaluationError("--calibration-text is for --ablate; qs-jax calibrate makes a policy to score")
        other = read_documents(calibration_text, calibration_documents) if calibration_text else None
        loaded, windows = _load(model, text, documents, plan, common)
        with progress("scoring", _MEASUREMENTS if ablate else passes(windows, plan)) as advance:
            result = study(
                loaded,
                windows,
                chosen,
                plan,
                bits=bits,
                ablated=ablate,
                calibration=(other, calibration_tokens) if other else None,
                free_runs=free_run,
                advance=advance,
            )
        result = {**result, "text": Path(text).name, "documents": documents}
        if common.json:
            print_json(result)
            return
        _print_evaluation(result)
        for row in result.get("table", ()):
            print(
                f"{row['name']:40} perplexity {row['perplexity']:.3f} ({row['perplexity_increase']:+z.3f}), saved "
                f"{row['flops_reduction']:z.1%} of FLOPs, {row['bytes_reduction']:z.1%} of weight bytes"
            )


def _load(model: str, text: str, documents: str, plan: Any, common: Common) -> tuple[Any, Any]:
    """The model and the windows; the text is read first, since it is the quicker to be wrong."""
    from qs_jax.evaluation.text import read_documents
    from qs_jax.evaluation.windows import cut

    found = read_documents(text, documents)
    loaded = load_model(model, common)
    return loaded, cut(loaded, found, plan)


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


@common_options()
def calibrate(
    model: ModelArgument,
    text: Text,
    documents: Documents = ":",
    max_ppl_increase: Annotated[float, typer.Option(help="Perplexity may rise by this much.")] = 0.2,
    confidence: Annotated[float, typer.Option(help="That it does not rise more, from 0.5 to below 1.")] = 0.9,
    out: Annotated[str | None, typer.Option(help="Policy file to write; by default policy.json in MODEL.")] = None,
    signal: Annotated[
        str, typer.Option(help="What halting looks at: relative_drift, direction_drift, raw_drift, attention_update.")
    ] = "relative_drift",
    kv_rule: Annotated[
        str | None,
        typer.Option(
            help="What deeper layers see of halted tokens: affine (default where there is a lens), frozen, drop, zero."
        ),
    ] = None,
    prefix: Prefix = None,
    window: WindowOption = 64,
    max_tokens: MaxTokens = 4096,
    batch: Batch = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the policy file if it is there.")] = False,
    *,
    common: Common,
) -> None:
    """Find the policy that saves most while perplexity rises no more than allowed, tested on text held back."""
    with reporting_errors(common.debug):
        target = _target(model, out, "policy.json", overwrite=overwrite)
        from qs_jax.evaluation.calibration import Goal
        from qs_jax.evaluation.study import calibrate_model
        from qs_jax.evaluation.windows import Plan

        goal = Goal(max_ppl_increase, confidence)
        Policy(decode_halting=Halting(cast(Any, signal)), kv_rule=cast(Any, kv_rule or "frozen"))
        plan = Plan(prefix, window, max_tokens, batch)
        loaded, windows = _load(model, text, documents, plan, common)
        with progress("calibrating", _MEASUREMENTS) as advance:
            found = calibrate_model(
                loaded, windows, plan, [goal], signal=signal, kv_rule=kv_rule, target=target, advance=advance
            )[0]
        found.policy.save(target)
        result = {**found.to_json(), "text": Path(text).name, "documents": documents, "out": str(target)}
        if common.json:
            print_json(result)
        else:
            _print_calibration(result)


def _target(model: str, out: str | None, name: str, *, overwrite: bool) -> Path:
    """Where a result goes."""
    if out is None and not Path(model).is_dir():
        raise EvaluationError(f"{model} is not a folder; say with --out where {name} goes")
    target = Path(out) if out is not None else Path(model) / name
    if target.exists() and not overwrite:
        raise EvaluationError(f"{target} is there already; give --overwrite or another --out")
    if not target.parent.is_dir():
        raise EvaluationError(f"{target.parent}: no such folder; make it first")
    return target


def _print_calibration(result: dict[str, Any]) -> None:
    chosen, uniform = result["chosen"], result["best_uniform_stop"]
    for row in result["tested"]:
        verdict = "trusted" if row["accepted"] else "not trusted"
        print(
            f"{row['flops_reduction']:z6.1%} of FLOPs saved: perplexity {row['perplexity_increase']:+z.3f}, "
            f"at most {row['upper']:+z.3f} with {result['confidence']:.0%} confidence: {verdict}"
        )
    if chosen is None:
        print(f"nothing can be trusted to stay within {result['max_ppl_increase']:+g}; the policy is off")
    elif uniform is not None:
        print(f"best uniform stop of the prompt within the budget: {uniform['flops_reduction']:z.1%}")
    print(f"written to {result['out']}")


LENS_EXAMPLES = """Examples:

\b
  qs-jax lens ./model --text train.txt
  qs-jax calibrate ./model --text other.txt
A lens in the model's folder is found there; calibrate then lets halted tokens follow it."""


@common_options()
def lens(
    model: ModelArgument,
    text: Text,
    documents: Documents = ":",
    out: Annotated[str | None, typer.Option(help="File to write; by default lens.safetensors in MODEL.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the maps; by default a quarter of the hidden size.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to fit on, spread over the text.")] = 32768,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the lens if it is there.")] = False,
    *,
    common: Common,
) -> None:
    """Fit the affine lens: what layers do to halted tokens, in closed form. Nothing is trained; beyond the paper."""
    with reporting_errors(common.debug):
        target = _target(model, out, "lens.safetensors", overwrite=overwrite)
        from qs_jax.evaluation.lens import fit_lens
        from qs_jax.evaluation.text import read_documents
        from qs_jax.evaluation.windows import whole

        found = read_documents(text, documents)
        loaded = load_model(model, common)
        windows = whole(loaded, found, max_tokens)
        with progress("fitting", loaded.config.num_hidden_layers) as advance:
            fit = fit_lens(loaded, windows, rank=rank, advance=advance)
        fit.lens.save(target)
        result = {"out": str(target), "tokens": windows.size, "explained": fit.explained}
        if common.json:
            print_json(result)
            return
        for layer, share in enumerate(fit.explained, start=2):
            print(f"layer {layer:3}: {share:z6.1%} of what it adds is affine in what enters it")
        print(f"written to {target}")


REPORT_EXAMPLES = """Examples:

\b
  qs-jax eval ./model --text test.txt --ablate --json > table.json
  qs-jax report table.json --out report.html"""


@common_options(loads=False)
def report(
    results: Annotated[list[Path], typer.Argument(help="What eval or calibrate printed with --json.")],
    out: Annotated[Path, typer.Option(help="Page to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page if it is there.")] = False,
    *,
    common: Common,
) -> None:
    """Show results on one self-contained page: tables, figures, and the text coloured by what was spent on it."""
    with reporting_errors(common.debug):
        if out.exists() and not overwrite:
            raise EvaluationError(f"{out} is there already; give --overwrite or another --out")
        from qs_jax.evaluation.report import read_result, write_report

        write_report([read_result(path) for path in results], out)
        if common.json:
            print_json({"out": str(out), "results": len(results)})
        else:
            print(f"written to {out}")
