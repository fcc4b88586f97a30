"""What the scores say, and how sure it is. The window is the unit: tokens within one depend on each other."""

import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from qs_jax.evaluation.scoring import Scores

PerWindow = Float[np.ndarray, " windows"]

CONFIDENCE = 0.95
_RESAMPLES = 2000


def perplexity(nll: PerWindow) -> float:
    """exp of the mean negative log-likelihood (nats per token) of equally long windows."""
    return math.exp(min(float(nll.mean()), 700.0))


def standard_error(nll: PerWindow) -> float | None:
    """Standard error of the perplexity: that of the mean times the slope of exp. None for a single window."""
    return perplexity(nll) * float(stats.sem(nll)) if len(nll) > 1 else None


def increase(nll: PerWindow, dense: PerWindow) -> float:
    """Perplexity above the dense model's."""
    return perplexity(nll) - perplexity(dense)


def increase_interval(nll: PerWindow, dense: PerWindow, *, seed: int = 0) -> tuple[float, float] | None:
    """Paired bootstrap interval of `increase`, at `CONFIDENCE`: whole windows are resampled, with both models' scores
    (percentile method; Efron and Tibshirani 1993, chapter 13). None for a single window."""
    if len(nll) < 2:
        return None

    def resampled(nll: np.ndarray, dense: np.ndarray, axis: int) -> np.ndarray:
        return np.exp(nll.mean(axis=axis)) - np.exp(dense.mean(axis=axis))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (nll, dense),
            resampled,
            paired=True,
            vectorized=True,
            confidence_level=CONFIDENCE,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(interval.low), float(interval.high)


def linearised_increase(nll: PerWindow, dense: PerWindow) -> PerWindow:
    """One number per window whose mean is `increase` and whose spread is its sampling error (delta method)."""
    policy, reference = perplexity(nll), perplexity(dense)
    return policy * (1 + nll - nll.mean()) - reference * (1 + dense - dense.mean())


def excess_p_value(nll: PerWindow, dense: PerWindow, budget: float) -> float:
    """How likely an increase this small would be if the true one were above `budget`: one-sided t-test on
    `linearised_increase`. Valid for many windows (central limit), not for a handful."""
    values = linearised_increase(nll, dense)
    error = float(stats.sem(values))
    margin = budget - float(values.mean())
    if error < 1e-12 * max(1.0, abs(margin)):
        return 0.0 if margin >= 0 else 1.0
    return float(stats.t.sf(margin / error, len(values) - 1))


def bits_per_byte(nll: PerWindow, tokens: int, scored_bytes: int) -> float | None:
    """Bits of information per UTF-8 byte of scored text, which compares across tokenizers; `tokens` per window."""
    return float(nll.sum()) * tokens / math.log(2) / scored_bytes if scored_bytes else None


def layers_histogram(scores: Scores) -> list[int]:
    """How many tokens, of the prompts and generated, ran each number of layers from 0 to all; a fused token counts
    where it was absorbed. The first scored token of a window comes from the prompt's last pass and is counted there."""
    layers = np.concatenate([*scores.prompts.layers_run, scores.layers_run[:, 1:].reshape(-1)])
    return np.bincount(layers, minlength=scores.ledger.policy.num_layers + 1).tolist()


def summary(scores: Scores, dense: Scores, scored_bytes: int) -> dict[str, Any]:
    """Quality of a policy beside the dense model's, in plain JSON values."""
    nll, reference = scores.nll, dense.nll
    interval = increase_interval(nll, reference)
    return {
        "perplexity": perplexity(nll),
        "perplexity_off": perplexity(reference),
        "perplexity_standard_error": standard_error(nll),
        "perplexity_increase": increase(nll, reference),
        "perplexity_increase_interval": list(interval) if interval else None,
        "bits_per_byte": bits_per_byte(nll, scores.logprobs.shape[1], scored_bytes),
        "bits_per_byte_off": bits_per_byte(reference, dense.logprobs.shape[1], scored_bytes),
        "kl_nats": float(scores.kl.mean()) if scores.kl.size else 0.0,
        "top1_agreement": float(scores.agrees.mean()) if scores.agrees.size else 1.0,
        "tokens_scored": scores.logprobs.size,
        "windows": len(nll),
        "ledger": scores.ledger.to_json(),
        "layers_histogram": layers_histogram(scores),
        "prefill_s_per_batch": float(np.median(scores.prefill_seconds)),
        "decode_s_per_batch": float(np.median(scores.decode_seconds)),
        "compile_s": scores.compile_seconds,
    }
