"""The models that have goldens, loaded once, and what the golden files say of them."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.models import forward
from tests.parity.variants import GOLDENS

LOGIT_TOLERANCE = 2e-4
"""Largest absolute difference of any float32 logit; measured on CPU: 6.5e-5 at most.

What it must tell apart, measured on the goldens: a layer norm's epsilon of 1e-6 for 1e-5 is off by 3.9e-4, tanh for
exact gelu by 1.1e-3, a rotary base 0.01 % too large by 5.7e-3.
"""

forward_jit = nnx.jit(forward)


@cache
def load_model(folder: Path) -> Model:
    """The model in float32."""
    return load(folder, dtype="float32", compilation_cache=False)


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """Logits (tokens, vocab) of one sequence of ids (tokens,), by the plain forward pass."""
    return np.asarray(forward_jit(model.network, jax.numpy.asarray(tokens)[None])[0])


def golden_of(name: str) -> dict[str, np.ndarray]:
    """A variant's golden lies in its folder, a real model's by its name: its weights are not in the repository."""
    folder = GOLDENS / name
    return load_file(folder / "golden.safetensors" if folder.is_dir() else GOLDENS / f"{name}.safetensors")
