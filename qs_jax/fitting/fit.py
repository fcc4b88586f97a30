"""Fitting one block: from dense kernels and what they see to nested codes, by any of the methods.

* rtn: round to nearest between each group's extremes; needs no text.
* refit: ranges, codes and per-slice scales and offsets that suit the inputs' mean squares.
* gptq: the same, then codes again with error compensation (gptq.py), and codes and grid in turns (refine.py).
* gptq+tune: that, then scales and offsets by gradient against the block's output (tune.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qs_jax.choices import BITS
from qs_jax.fitting.activations import hessians, kernels_of, run_all, with_kernels
from qs_jax.fitting.gptq import compensated_codes
from qs_jax.fitting.grid import EVEN, Bend, Grid, SliceWeights, between_extremes, refit
from qs_jax.fitting.refine import refined
from qs_jax.fitting.rounding import grouped, nearest_codes, packed
from qs_jax.fitting.tune import Coded, Tuning, tuned
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.models.base import Block, Hidden


@dataclass(frozen=True)
class Fit:
    """How to fit.

    Attributes:
        method: one of METHODS.
        group_size: inputs that share a scale and an offset.
        weights: what the squared error of weights counts at 8, 4 and 2 bits.
        rounds: turns of codes and grid in gptq.
        tuning: the budget of the last step of gptq+tune.
        bend: curvature of the codebook: `EVEN` or `COMPANDED`.
    """

    method: str = "gptq+tune"
    group_size: int = 64
    weights: SliceWeights = (24.0, 1.5, 1.0)
    rounds: int = 4
    tuning: Tuning = field(default_factory=Tuning)
    bend: Bend = EVEN


class Streams(NamedTuple):
    """What enters a block on calibration text: in the dense model, and in the fitted one at each of BITS."""

    dense: Hidden
    fitted: tuple[Hidden, ...]

    @classmethod
    def start(cls, hidden_states: Hidden) -> "Streams":
        """Before the first block, where nothing is quantised yet."""
        return cls(hidden_states, (hidden_states,) * len(BITS))

    def after(self, block: Block, kernels: Mapping[str, NestedKernel]) -> "Streams":
        """What leaves the block."""
        nested = {bits: with_kernels(block, {n: k.at(bits) for n, k in kernels.items()}) for bits in BITS}
        fitted = tuple(run_all(nested[bits], x) for bits, x in zip(BITS, self.fitted, strict=True))
        return Streams(run_all(block, self.dense), fitted)


class Fitted(NamedTuple):
    """A kernel, and the relative squared error of its output at each of BITS on the dense model's inputs."""

    kernel: NestedKernel
    output_errors: dict[str, float]


def fit_block(block: Block, streams: Streams, fit: Fit, names: frozenset[str] | None = None) -> dict[str, Fitted]:
    """Quantise a block's kernels, or those named, on what enters it."""
    kernels = {name: kernel for name, kernel in kernels_of(block).items() if names is None or name in names}
    dense = hessians(block, streams.dense)
    method, _, refinement = fit.method.partition("+")
    if method != "gptq":
        seen = {name: dense[name][None] for name in kernels}
    else:
        each = [hessians(block, stream) for stream in streams.fitted]
        seen = {name: jnp.stack([own[name] for own in each]) for name in kernels}
    coded = {name: _coded(kernel, seen[name], fit) for name, kernel in kernels.items()}
    if refinement:
        coded = tuned(block, coded, streams.fitted, run_all(block, streams.dense), fit.tuning)
    nested = {name: packed(c.codes, c.grid, inputs=c.shape[1]) for name, c in coded.items()}
    return {name: Fitted(k, output_errors(kernels[name], k, dense[name])) for name, k in nested.items()}


def _coded(kernel: Float[Array, "outputs inputs"], seen: Float[Array, "seen inputs inputs"], fit: Fit) -> Coded:
    weights = kernel.astype(jnp.float32)
    settings = {"group_size": fit.group_size, "bend": fit.bend}
    importance = jnp.asarray(fit.weights, jnp.float32)
    method = fit.method.partition("+")[0]
    codes, grid = _CODES[method](weights, seen, importance, **settings)
    if method == "gptq" and fit.rounds:
        values = grouped(weights, fit.group_size)
        codes, grid = _refined(values, seen, codes, grid, importance, rounds=fit.rounds)
    return Coded((kernel.shape[0], kernel.shape[1]), codes, grid)


@partial(jax.jit, static_argnames=("group_size", "bend"))
def _rounded(weights: Array, seen: Array, importance: Array, *, group_size: int, bend: Bend) -> tuple[Array, Grid]:
    values = grouped(weights, group_size)
    grid = between_extremes(values, bend=bend)
    return nearest_codes(values, grid), grid


@partial(jax.jit, static_argnames=("group_size", "bend"))
def _refitted(weights: Array, seen: Array, importance: Array, *, group_size: int, bend: Bend) -> tuple[Array, Grid]:
    return refit(grouped(weights, group_size), _mean_squares(seen, group_size), importance, bend)


@partial(jax.jit, static_argnames=("group_size", "bend"))
def _compensated(weights: Array, seen: Array, importance: Array, *, group_size: int, bend: Bend) -> tuple[Array, Grid]:
    _, grid = refit(grouped(weights, group_size), _mean_squares(seen, group_size), importance, bend)
    return compensated_codes(weights, seen, grid, importance, group_size=group_size), grid


_refined = jax.jit(refined, static_argnames="rounds")

_CODES = {"rtn": _rounded, "refit": _refitted, "gptq": _compensated}


def _mean_squares(seen: Float[Array, "seen inputs inputs"], group_size: int) -> Float[Array, "groups group_size"]:
    diagonal = jnp.einsum("sii->i", seen) / seen.shape[0]
    return grouped(diagonal[None], group_size)[..., 0]


@jax.jit
def _output_error(weights: Array, read: Array, hessian: Array) -> Array:
    def power(w: Array) -> Array:
        return jnp.einsum("oi,ij,oj->", w, hessian, w)

    return power(read.astype(jnp.float32) - weights) / power(weights)


def output_errors(
    kernel: Float[Array, "outputs inputs"], nested: NestedKernel, hessian: Float[Array, "inputs inputs"]
) -> dict[str, float]:
    """Per precision, the mean squared error of the kernel's output over its mean square."""
    weights = kernel.astype(jnp.float32)
    return {str(b): float(_output_error(weights, nested.dequantise(b), hessian)) for b in BITS}
