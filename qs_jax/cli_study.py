"""The commands that study a model: `qs-jax eval`, `calibrate`, `report`. Everything heavy is imported inside them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qs_jax.adaptive.policy import Policy
from qs_jax.cli_options import Debug, Dtype, Json, ModelArgument, PolicyOption, Revision, Verify
from qs_jax.console import print_json, progress, reporting_errors

Text = Annotated[
    str, typer.Option("--text", help="Text to score: txt, json, jsonl (.xz, .gz), or wikitext-103, wikitext-2, c4.")
]
Documents = Annotated[str, typer.Option(help="Which documents of the text, as a slice: 0:500, 500:, -100:.")]
Prefix = Annotated[
    int | None,
    typer.Option(help="Unscored tokens before each window; 0 scores every token. Default: 512, or what fits."),
]
WindowOption = Annotated[int, typer.Option("--window", help="Scored tokens per window.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to score, spread over the text.")]
Batch = Annotated[int, typer.Option(help="Windows run together; 1 shows what decoding alone saves.")]

EVAL_EXAMPLES = """Examples:

\b
  qs-jax eval ./model --text test.txt
  qs-jax eval ./model --text test.txt --policy policy.json --json > result.json
  qs-jax eval ./model --text stories.json --documents 500: --prefix 0 --window 256"""


def evaluate(
    model: ModelArgument,
    text: Text,
    documents: Documents = ":",
    policy: PolicyOption = "off",
    prefix: Prefix = None,
    window: WindowOption = 64,
    max_tokens: MaxTokens = 2560,
    batch: Batch = 8,
    dtype: Dtype = None,
    revision: Revision = None,
    verify: Verify = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score text: perplexity under a policy beside the dense model's, with intervals, and what was saved."""
    with reporting_errors(debug):
        chosen = Policy.of(policy)
        from qs_jax.evaluation.perplexity import evaluate, passes
        from qs_jax.evaluation.windows import Plan

        plan = Plan(prefix, window, max_tokens, batch)
        loaded, windows = _load(model, text, documents, plan, dtype=dtype, revision=revision, verify=verify)
        with progress("scoring", passes(windows, plan, 1)) as advance:
            result = evaluate(loaded, windows, chosen, plan, advance=advance)
        result = {**result, "text": Path(text).name, "documents": documents}
        if json:
            print_json(result)
        else:
            _print_evaluation(result)


def _load(model: str, text: str, documents: str, plan: Any, **loading: Any) -> tuple[Any, Any]:
    """The model and the windows; the text is read first, since it is the quicker to be wrong."""
    from qs_jax.evaluation.text import read_documents
    from qs_jax.evaluation.windows import cut
    from qs_jax.loading import load

    found = read_documents(text, documents)
    loaded = load(model, **loading)
    return loaded, cut(loaded, found, plan)


def _print_evaluation(result: dict[str, Any]) -> None:
    protocol, ledger, interval = result["protocol"], result["ledger"], result["perplexity_increase_interval"]
    between = f" (95 % interval {interval[0]:+.3f} to {interval[1]:+.3f})" if interval else ""
    print(
        f"perplexity {result['perplexity']:.3f}, dense {result['perplexity_off']:.3f}: "
        f"{result['perplexity_increase']:+.3f}{between}\n"
        f"{result['tokens_scored']} tokens in {protocol['windows']} windows of {protocol['prefix']} + "
        f"{protocol['window']} tokens, {protocol['batch']} together; "
        f"{result['bits_per_byte'] or float('nan'):.3f} bits per byte\n"
        f"same most likely token as dense {result['top1_agreement']:.1%}, KL {result['kl_nats']:.4f} nats\n"
        f"saved {ledger['flops_reduction']:.1%} of FLOPs, {ledger['bytes_reduction']:.1%} of weight bytes, "
        f"{1 - ledger['kv_slots'] / ledger['kv_slots_off']:.1%} of cache slots; "
        f"{ledger['layers_run_mean']:.2f} layers per token"
    )
