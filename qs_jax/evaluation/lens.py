"""Fitting the affine lens: per layer a ridge regression of low rank, of what the layer adds on what enters it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.linalg import eigh, svd

from qs_jax.errors import EvaluationError
from qs_jax.fitting.activations import embedded, run_all
from qs_jax.generation import not_finite
from qs_jax.hosts import refuse_several
from qs_jax.lens import Lens
from qs_jax.model import Model

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


def fit_lens(
    model: Model,
    windows: Int[np.ndarray, "windows tokens"],
    *,
    rank: int | None = None,
    advance: Advance = lambda n=1: None,
) -> Fit:
    """The lens of a model.

    Args:
        model: what `qs_jax.load` returned.
        windows: token ids; not of any text that a policy is tested on.
        rank: of every map, which is what carrying a token costs; by default a quarter of the hidden size.
        advance: called after every layer.

    One pass over the text, a layer at a time: memory holds the states of all windows and two matrices of moments.

    Raises:
        EvaluationError: fewer than two windows, a model of one layer, a rank outside 1 to the hidden size, or states
            that are not finite in the model's dtype.
    """
    refuse_several("a lens is fitted")
    hidden = model.config.hidden_size
    rank = max(1, hidden // 4) if rank is None else rank
    if not 1 <= rank <= hidden:
        raise EvaluationError(f"rank is {rank}, expected a whole number from 1 to {hidden}")
    if len(windows) < 2:
        raise EvaluationError("the text is too short to fit a lens on; give more of it")
    if model.config.num_hidden_layers < 2:
        raise EvaluationError("a model of one layer has nothing to skip; it needs no lens")
    tokens = jnp.asarray(windows, jnp.int32)
    counted = counted_tokens(model, windows)
    states = embedded(model.network, tokens)
    maps: list[_Map] = []
    for number, block in enumerate(model.network.blocks):
        after = run_all(block, states)
        if not jnp.isfinite(after).all():
            raise EvaluationError(not_finite(model))
        if number:
            maps.append(_fit(np.asarray(states, np.float32), np.asarray(after, np.float32), counted, rank))
        states = after
        advance()
    arrays = (np.stack([getattr(found, name) for found in maps]) for name in ("down", "up", "bias"))
    return Fit(Lens(*arrays), [found.explained for found in maps])


def counted_tokens(model: Model, windows: Int[np.ndarray, "windows tokens"]) -> Bool[np.ndarray, "windows tokens"]:
    """Those that a lens is fitted on."""
    counted = ~np.isin(windows, model.special_ids)
    counted[:, :_SINKS] = False
    return counted


def is_held_out(number: int, windows: int) -> bool:
    """Whether this one of so many windows is kept to choose on."""
    return number % _HELD_OUT == _HELD_OUT - 1 or number == windows - 1


class _Map(NamedTuple):
    """One layer's map, and the share of the update's variance that it explains on held-out windows."""

    down: Float[np.ndarray, "rank hidden"]
    up: Float[np.ndarray, "hidden rank"]
    bias: Float[np.ndarray, " hidden"]
    explained: float


def _fit(
    before: Float[np.ndarray, "windows tokens hidden"],
    after: Float[np.ndarray, "windows tokens hidden"],
    counted: Bool[np.ndarray, "windows tokens"],
    rank: int,
) -> _Map:
    """Reduced-rank ridge regression (Izenman 1975) on most windows, its penalty chosen on the others.

    Of all maps of a rank the one whose predictions err least: the ridge solution, projected on the leading right
    singular vectors of what it predicts.
    """
    used, kept = _Moments(), _Moments()
    for number, (x, y, chosen) in enumerate(zip(before, after - before, counted, strict=True)):
        (kept if is_held_out(number, len(before)) else used).add(x[chosen], y[chosen])
    mean_x, mean_y = used.x / used.count, used.y / used.count
    values, vectors = eigh(used.xx / used.count - np.outer(mean_x, mean_x))
    cross = vectors.T @ (used.xy / used.count - np.outer(mean_x, mean_y))
    variance = kept.yy - float(np.square(kept.y).sum()) / kept.count
    found = []
    for penalty in PENALTIES:
        root = np.sqrt(np.maximum(values, 0) + penalty * values.mean())
        left, size, right = svd(cross / root[:, None], full_matrices=False)
        down = ((vectors / root) @ (left[:, :rank] * size[:rank])).T
        up = right[:rank].T
        bias = mean_y - up @ (down @ mean_x)
        found.append(_Map(down, up, bias, 1 - _error(kept, up @ down, bias) / variance))
    best = max(found, key=lambda entry: entry.explained)
    down, up, bias = (array.astype(np.float32) for array in best[:3])
    return _Map(down, up, bias, best.explained)


def _error(of: _Moments, kernel: np.ndarray, bias: np.ndarray) -> float:
    """Summed squared error of a map on tokens known by their moments."""
    total = of.yy + ((kernel @ of.xx) * kernel).sum() + of.count * bias @ bias
    return float(total - 2 * (kernel * np.asarray(of.xy).T).sum() - 2 * bias @ (of.y - kernel @ of.x))
