"""`qs-jax eval`: perplexity of a model under a policy, beside the dense model, on text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.policy import Policy
from qs_jax.evaluation.scoring import OFF, Scores, score
from qs_jax.evaluation.statistics import summary
from qs_jax.evaluation.windows import Plan, Window
from qs_jax.kernels import has_planes
from qs_jax.model import Model
from qs_jax.request import bind_policy

Advance = Callable[..., None]

_SAMPLES = 4
_JUDGED = "judged"


def evaluate(
    model: Model,
    windows: Sequence[Window],
    policy: Policy,
    plan: Plan,
    *,
    bits: int | None = None,
    advance: Advance = lambda n=1: None,
) -> dict[str, Any]:
    """Score windows under a policy and under the dense model.

    Args:
        model: what `qs_jax.load` returned.
        windows: from `qs_jax.evaluation.windows.cut`.
        policy: what to judge; with `Policy.off()` only the dense model runs.
        plan: how the windows were cut; its batch is how many run together.
        bits: the precision at which the policy's run reads Matryoshka weights; the dense model's are read in full.
        advance: called after every pass of a batch, for a progress bar.

    Returns:
        The keys of the command line's JSON contract, with intervals, what was spent (`ledger`), the first windows'
        `logprobs` and traces token by token (`samples`).

    Raises:
        PolicyError: the policy asks for what the model does not have.
        GenerationError: bits are asked for and the model's weights are not Matryoshka.
    """
    bound = bind_policy(model, policy)
    named = {} if bound.is_off and bits is None else {_JUDGED: bound}
    results = run(model, windows, named, plan, advance, bits)
    dense, scores = results[OFF], results.get(_JUDGED, results[OFF])
    return {
        "model": model.name,
        "policy": policy.to_json(),
        "mechanisms": list((policy if has_planes(model.network) else policy.without("precision")).mechanisms),
        "bits": bits,
        "protocol": protocol(windows, plan),
        **summary(scores, dense, sum(window.scored_bytes for window in windows)),
        "logprobs": scores.logprobs.round(5).tolist(),
        "samples": samples(scores, windows),
    }


def run(
    model: Model,
    windows: Sequence[Window],
    policies: Mapping[str, BoundPolicy],
    plan: Plan,
    advance: Advance,
    bits: int | None = None,
) -> dict[str, Scores]:
    """All scores, reporting every pass."""
    scores: dict[str, Scores] = {}
    for scores in score(model, windows, policies, batch=plan.batch, bits=bits):  # noqa: B007
        advance()
    return scores


def passes(windows: Sequence[Window], plan: Plan) -> int:
    """How often `evaluate` reports: batches of the policy and of the dense model."""
    return -(-len(windows) // plan.batch) * 2


def protocol(windows: Sequence[Window], plan: Plan) -> dict[str, Any]:
    """How the figures were taken."""
    first = windows[0]
    return {
        "name": "paper" if plan.prefix == 0 else "prefix",
        "prefix": len(first.prompt),
        "window": len(first.scored),
        "batch": min(plan.batch, len(windows)),
        "windows": len(windows),
    }


def samples(scores: Scores, windows: Sequence[Window], most: int = _SAMPLES) -> list[dict[str, Any]]:
    """The first windows token by token, as the report colours them. `bits` is the mean over the layers run."""
    depth = scores.ledger.policy.num_layers
    ledger = scores.ledger
    told = []
    for row, window in enumerate(windows[:most]):
        layers, read = scores.layers_run[row], scores.bits_read[row]
        bits = [
            r / n if ledger.policy.adapts_bits and r else float(ledger.bits)
            for r, n in zip(read.tolist(), layers.tolist(), strict=True)
        ]
        told.append(
            {
                "depth": depth,
                "prompt": list(window.prompt_pieces),
                "prompt_layers_run": scores.prompts.layers_run[row].tolist(),
                "prompt_fused_with": scores.prompts.fused_with[row].tolist(),
                "text": list(window.scored_pieces),
                "layers_run": layers.tolist(),
                "bits": [round(b, 3) for b in bits],
                "logprobs": scores.logprobs[row].round(4).tolist(),
            }
        )
    return told
