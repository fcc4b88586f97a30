"""The models that have goldens, loaded once, and what the golden files say of them."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors.numpy import load_file

from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.models import forward
from qs_jax.models.base import CausalLM
from tests.parity.variants import GOLDENS

LOGIT_TOLERANCE = 2e-4
"""Largest absolute difference of any float32 logit; measured on CPU: 6.5e-5 at most.

What it must tell apart, measured on the goldens: a layer norm's epsilon of 1e-6 for 1e-5 is off by 3.9e-4, tanh for
exact gelu by 1.1e-3, a rotary base 0.01 % too large by 5.7e-3.
"""

STATE_TOLERANCE = {"gpt2": 1e-5, "rotary": 4e-5}
"""Largest difference of any number of a state after the first layer, relative to the states' deviation there; after n
layers n times that, for each adds its own rounding. What enters the first layer is a lookup and a sum, and equal.

Measured on CPU over all variants: 0.7e-5 after one layer of GPT-2, 1.1e-5 after two; with rotary positions, whose
angles in float32 are known to 3e-5 at position 500, 3.0e-5 and 4.5e-5.
"""

forward_jit = nnx.jit(forward)


@cache
def load_model(folder: Path) -> Model:
    """The model in float32."""
    return load(folder, dtype="float32", compilation_cache=False)


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits (tokens, vocab) of one sequence of ids (tokens,), by the plain forward pass."""
    return np.asarray(forward_jit(model.network, jax.numpy.asarray(tokens)[None])[0])


@jax.jit
def _states(network: CausalLM, tokens: jax.Array) -> jax.Array:
    positions = jax.numpy.arange(tokens.shape[1], dtype=jax.numpy.int32)[None]
    states = [network.embed(tokens, positions)]
    for block in network.blocks:
        states.append(block.run(states[-1], positions, ()).hidden_states)
    return jax.numpy.concatenate(states)


def states(model: Model, tokens: np.ndarray) -> np.ndarray:
    """(layers + 1, tokens, hidden) of one sequence: what enters the first layer, and what leaves each."""
    return np.asarray(_states(model.network, jax.numpy.asarray(tokens)[None]))


def first_that_differs(
    ours: Float[np.ndarray, "stages tokens hidden"],
    theirs: Float[np.ndarray, "stages tokens hidden"],
    model_type: str,
) -> str | None:
    """Where two streams part beyond rounding: "embedding", "layer 1", …"""
    assert ours.shape == theirs.shape
    errors = np.abs(ours - theirs).max(axis=(1, 2)) / theirs.std(axis=(1, 2))
    tolerance = STATE_TOLERANCE["gpt2" if model_type == "gpt2" else "rotary"]
    for number, error in enumerate(errors):
        if not error <= number * tolerance:
            return f"layer {number}" if number else "embedding"
    return None


def golden_of(name: str) -> dict[str, np.ndarray]:
    """A variant's golden lies in its folder, a real model's by its name: its weights are not in the repository."""
    folder = GOLDENS / name
    return load_file(folder / "golden.safetensors" if folder.is_dir() else GOLDENS / f"{name}.safetensors")
