"""After which layers a mechanism acts, and with which threshold."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qs_jax.adaptive.policy import Thresholds
from qs_jax.errors import PolicyError


@runtime_checkable
class Placed(Protocol):
    """A part of a policy that acts after some layers, or from a fraction of the depth on, below thresholds."""

    @property
    def thresholds(self) -> Thresholds: ...
    @property
    def layers(self) -> tuple[int, ...] | None: ...
    @property
    def start(self) -> float: ...
    @property
    def step(self) -> int: ...


def acting_layers(part: Placed, name: str, depth: int) -> tuple[int, ...]:
    """Layer numbers from 1 to depth - 1: after the last layer there is nothing left to save.

    Raises:
        PolicyError: the policy names layers beyond the model's depth.
    """
    if part.layers is None:
        return tuple(range(min(max(1, round(part.start * depth)), max(1, depth - 1)), depth, part.step))
    if part.layers[-1] >= depth:
        raise PolicyError(f"{name}.layers reach {part.layers[-1]}, with {depth} layers the last to name is {depth - 1}")
    return part.layers


def threshold_table(part: Placed, layers: tuple[int, ...], name: str, depth: int) -> Float[Array, " layers_run"]:
    """The threshold after 0, 1, … `depth` layers: 0, which is neutral, where the mechanism may not act.

    Raises:
        PolicyError: a number of thresholds that is not the number of layers.
    """
    values = part.thresholds
    numbers = values if isinstance(values, tuple) else (values,) * len(layers)
    if len(numbers) != len(layers):
        raise PolicyError(f"{name} has {len(numbers)} thresholds for {len(layers)} layers; give one, or one per layer")
    table = np.zeros(depth + 1, np.float32)
    table[list(layers)] = numbers
    return jnp.asarray(table)
