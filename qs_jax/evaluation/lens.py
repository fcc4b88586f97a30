"""Fitting the affine lens: per layer a ridge regression of what the layer adds on what enters it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.linalg import eigh

from qs_jax.errors import EvaluationError
from qs_jax.lens import Lens
from qs_jax.loading import Model
from qs_jax.matryoshka.calibration import batches, run
from qs_jax.models.base import CausalLM

Tokens = Float[np.ndarray, "tokens hidden"]
Advance = Callable[..., None]

PENALTIES = tuple(10.0**power for power in range(-7, 0))
"""Ridge penalties to choose among, as a share of the inputs' variance; the one that predicts best on other text."""

_SINKS = 4
"""Tokens at the start of a window that are left out, as special ones are: attention sinks, which policies protect, with
norms that would rule the fit."""

_HELD_OUT = 4
"""Every so many windows one is kept to choose the penalty on."""


@dataclass
class _Moments:
    """Sums over tokens, in float64: of inputs x and updates y, and of their products."""

    count: int = 0
    x: Float[np.ndarray, " hidden"] | float = 0.0
    y: Float[np.ndarray, " hidden"] | float = 0.0
    xx: Float[np.ndarray, "hidden hidden"] | float = 0.0
    xy: Float[np.ndarray, "hidden hidden"] | float = 0.0
    yy: float = 0.0

    def add(self, x: Tokens, y: Tokens) -> None:
        self.count += len(x)
        self.x, self.y = self.x + x.sum(0, dtype=np.float64), self.y + y.sum(0, dtype=np.float64)
        self.xx, self.xy = self.xx + (x.T @ x).astype(np.float64), self.xy + (x.T @ y).astype(np.float64)
        self.yy += float(np.square(y, dtype=np.float64).sum())


@dataclass
class Fit:
    """A lens, and of each layer the share of its update's variance that the lens explains on held-out windows."""

    lens: Lens
    explained: list[float] = field(default_factory=list)


def fit_lens(model: Model, windows: Int[np.ndarray, "windows tokens"], advance: Advance = lambda n=1: None) -> Fit:
    """The lens of a model.

    Args:
        model: what `qs_jax.load` returned.
        windows: token ids; not of any text that a policy is tested on.
        advance: called after every layer.

    One pass over the text, a layer at a time: memory holds the states of all windows and two matrices of moments.

    Raises:
        EvaluationError: fewer than two windows, or a model of one layer.
    """
    if len(windows) < 2:
        raise EvaluationError("the text is too short to fit a lens on; give more of it")
    if model.config.num_hidden_layers < 2:
        raise EvaluationError("a model of one layer has nothing to skip; it needs no lens")
    tokens = jnp.asarray(windows, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    counted = ~np.isin(windows, model.special_ids)
    counted[:, :_SINKS] = False
    states = [np.asarray(batch, np.float32) for batch in batches(_embed(model.network, tokens, positions))]
    kernels, biases, explained = [], [], []
    for number, block in enumerate(model.network.blocks):
        after = [np.asarray(_run(block, jnp.asarray(batch, model.dtype)), np.float32) for batch in states]
        if number:
            kernel, bias, share = _fit(np.concatenate(states), np.concatenate(after), counted)
            kernels.append(kernel)
            biases.append(bias)
            explained.append(share)
        states = after
        advance()
    return Fit(Lens(np.stack(kernels), np.stack(biases)), explained)


@jax.jit
def _embed(model: CausalLM, tokens: Int[Array, "windows tokens"], positions: Int[Array, "windows tokens"]) -> Array:
    return model.embed(tokens, positions)


_run = jax.jit(run)


def _fit(
    before: Float[np.ndarray, "windows tokens hidden"],
    after: Float[np.ndarray, "windows tokens hidden"],
    counted: Bool[np.ndarray, "windows tokens"],
) -> tuple[Float[np.ndarray, "hidden hidden"], Float[np.ndarray, " hidden"], float]:
    """Kernel, bias and explained share of one layer: ridge on most windows, its penalty chosen on the others."""
    used, kept = _Moments(), _Moments()
    for number, (x, y, chosen) in enumerate(zip(before, after - before, counted, strict=True)):
        held_out = number % _HELD_OUT == _HELD_OUT - 1 or number == len(before) - 1
        (kept if held_out else used).add(x[chosen], y[chosen])
    mean_x, mean_y = used.x / used.count, used.y / used.count
    values, vectors = eigh(used.xx / used.count - np.outer(mean_x, mean_x))
    cross = vectors.T @ (used.xy / used.count - np.outer(mean_x, mean_y))
    spread = values.mean()
    found = []
    for penalty in PENALTIES:
        kernel = (vectors @ (cross / (np.maximum(values, 0) + penalty * spread)[:, None])).T
        bias = mean_y - kernel @ mean_x
        found.append((_error(kept, kernel, bias), kernel, bias))
    error, kernel, bias = min(found, key=lambda entry: entry[0])
    variance = kept.yy - float(np.square(kept.y).sum()) / kept.count
    return kernel.astype(np.float32), bias.astype(np.float32), 1 - error / variance


def _error(of: _Moments, kernel: np.ndarray, bias: np.ndarray) -> float:
    """Summed squared error of a map on tokens known by their moments."""
    total = of.yy + ((kernel @ of.xx) * kernel).sum() + of.count * bias @ bias
    return float(total - 2 * (kernel * np.asarray(of.xy).T).sum() - 2 * bias @ (of.y - kernel @ of.x))
