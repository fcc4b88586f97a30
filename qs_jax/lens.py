"""The affine lens: stand-ins for whole layers, so that a halted token goes on at the price of one small product.

Beyond the paper. Layer l is approximated by h + U D h + b, D and U of low rank, fitted in closed form on text
(`qs_jax.evaluation.lens`); a token that halts after layer s is carried through every later layer by these maps, and its
keys, values and, if it is generated, logits come from where they lead. Shortcuts of this kind: Din et al. 2023
(arXiv 2303.09435); read as a lens: Belrose et al. 2023 (arXiv 2303.08112). Nothing of the model is trained or changed.
"""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError
from qs_jax.files import write_whole
from qs_jax.models.base import CausalLM
from qs_jax.models.layers import Shortcut

LENS_FILE = "lens.safetensors"
"""Its name in a model's folder, where `qs_jax.load` finds it."""


@dataclass(frozen=True)
class Lens:
    """For layers 1, 2, … of a model, counted from 0 (no token halts before the first): h + `up` `down` h + `biases`."""

    down: Float[np.ndarray, "layers rank hidden"]
    up: Float[np.ndarray, "layers hidden rank"]
    biases: Float[np.ndarray, "layers hidden"]

    def save(self, path: str | Path) -> None:
        """Write it as safetensors; the file appears whole or not at all.

        Raises:
            CheckpointError: nothing can be written there.
        """
        # safetensors writes memory as it lies, whatever the strides say
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in vars(self).items()}
        try:
            write_whole(Path(path), save(arrays))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose another place") from None

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig) -> "Lens":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or belongs to a model of another shape.
        """
        try:
            arrays = load_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such lens; fit one with qs-jax lens") from None
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{path}: cannot be read as a lens ({reason}); fit it again") from None
        layers, hidden = config.num_hidden_layers - 1, config.hidden_size
        rank = arrays["down"].shape[1] if "down" in arrays and arrays["down"].ndim == 3 else 0
        expected = {"down": (layers, rank, hidden), "up": (layers, hidden, rank), "biases": (layers, hidden)}
        if {name: array.shape for name, array in arrays.items()} != expected:
            raise CheckpointError(f"{path}: is no lens for {layers + 1} layers, {hidden} wide; fit it again")
        if not all(np.issubdtype(a.dtype, np.floating) and np.isfinite(a).all() for a in arrays.values()):
            raise CheckpointError(f"{path}: holds what is no finite number; fit it again")
        return cls(**arrays)


def with_lens(network: CausalLM, lens: Lens) -> CausalLM:
    """The same weights, and shortcuts beside them."""
    copy: CausalLM = nnx.merge(*nnx.split(network))
    dtype = network.embedding.table.dtype
    parts = zip(lens.down, lens.up, lens.biases, strict=True)
    copy.shortcuts = nnx.List([Shortcut(*(jnp.asarray(array, dtype) for array in part)) for part in parts])
    return copy
