"""Lenses: stand-ins for layers that a halted token skips, fitted on text. Nothing of the model is trained or changed.

Beyond the paper. **The affine lens** carries the token's state on, a layer at a time: layer l is approximated by
h + U D h + b, D and U of low rank, fitted in closed form (`qs_jax.evaluation.lens`); keys, values and, if the token is
generated, logits come from where these maps lead. Shortcuts of this kind: Din et al. 2023 (arXiv 2303.09435); read as
a lens: Belrose et al. 2023 (arXiv 2303.08112).

**The direct lens** makes keys and values of all skipped layers at once of what a prompt token showed by the time it
stopped: one map brings its normalised states together into a few numbers, and every layer reads its own of them. It is
optimal for what is really read, and there is no state to carry. SwiftKV distils projections for this purpose (Qiao et
al. 2024, arXiv 2410.03960). Fitted in closed form (`qs_jax.evaluation.direct`), then tuned for the continuation
(`qs_jax.evaluation.tuning`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError
from qs_jax.files import write_whole
from qs_jax.models.base import CausalLM
from qs_jax.models.layers import DirectKv, Shortcut

_RARITY = "rarity"
"""What it is called in a file."""


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
        _write(path, vars(self))

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig) -> "Lens":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or belongs to a model of another shape.
        """
        arrays = _read(path)
        layers, hidden = config.num_hidden_layers - 1, config.hidden_size
        rank = arrays["down"].shape[1] if "down" in arrays and arrays["down"].ndim == 3 else 0
        expected = {"down": (layers, rank, hidden), "up": (layers, hidden, rank), "biases": (layers, hidden)}
        if {name: array.shape for name, array in arrays.items()} != expected:
            raise CheckpointError(f"{path}: is no lens for {layers + 1} layers, {hidden} wide; fit it again")
        return cls(**arrays)


@dataclass(frozen=True)
class DirectMap:
    """For tokens that stop after the last of `inputs` layers: `down` of their states after as many layers as `inputs`
    says, each at a mean square of 1; then, in every layer from there on, `up` of that + `biases` are its keys, without
    positions, and its values."""

    inputs: tuple[int, ...]
    down: Float[np.ndarray, "rank states"]
    up: Float[np.ndarray, "layers features rank"]
    biases: Float[np.ndarray, "layers features"]

    @property
    def stop(self) -> int:
        """After how many layers."""
        return self.inputs[-1]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"down": self.down, "up": self.up, "biases": self.biases}

    def fits(self, config: ModelConfig) -> bool:
        """Whether it is of a model of this shape."""
        layers = config.num_hidden_layers - self.stop
        features = 2 * config.num_key_value_heads * config.head_dim
        rank = self.down.shape[0] if self.down.ndim == 2 else 0
        shapes = (rank, len(self.inputs) * config.hidden_size), (layers, features, rank), (layers, features)
        rising = all(one < next_ for one, next_ in pairwise(self.inputs)) and self.inputs[0] >= 0
        return rising and layers > 0 and self.stop > 0 and tuple(a.shape for a in self.arrays.values()) == shapes


@dataclass(frozen=True)
class DirectLens:
    """Of a model, a map for every stop that policies may use, in order; and how rare each token of the vocabulary is in
    the text that they were fitted on (`rarity_of`), by which policies may protect tokens. None in older files."""

    maps: tuple[DirectMap, ...]
    rarity: Float[np.ndarray, " vocabulary"] | None = None

    def save(self, path: str | Path) -> None:
        """Write it as safetensors; the file appears whole or not at all.

        Raises:
            CheckpointError: nothing can be written there.
        """
        named = {".".join(map(str, one.inputs)): one.arrays for one in self.maps}
        arrays = {f"{name}/{part}": array for name, arrays in named.items() for part, array in arrays.items()}
        _write(path, arrays if self.rarity is None else {**arrays, _RARITY: self.rarity})

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig) -> "DirectLens":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or belongs to a model of another shape.
        """
        found: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
        arrays = _read(path)
        rarity = arrays.pop(_RARITY, None)
        for name, array in arrays.items():
            inputs, _, part = name.partition("/")
            if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})*", inputs) or part not in ("down", "up", "biases"):
                raise CheckpointError(f"{path}: is no direct lens; fit it again")
            found.setdefault(tuple(map(int, inputs.split("."))), {})[part] = array
        maps = sorted(
            (DirectMap(inputs, **part) for inputs, part in found.items() if len(part) == 3), key=attrgetter("stop")
        )
        distinct = len({one.stop for one in maps}) == len(found)
        known = rarity is None or rarity.shape == (config.vocab_size,)
        if not maps or not distinct or not known or not all(one.fits(config) for one in maps):
            of = f"{config.num_hidden_layers} layers, {config.hidden_size} wide"
            raise CheckpointError(f"{path}: is no direct lens for {of}; fit it again")
        return cls(tuple(maps), rarity)


def rarity_of(tokens: Int[np.ndarray, "*windows tokens"], vocab_size: int) -> Float[np.ndarray, " vocabulary"]:
    """-log of each token's share of some text, in nats; every one counts as half a time more than it was seen."""
    counts = np.bincount(tokens.ravel(), minlength=vocab_size) + 0.5
    return (-np.log(counts / counts.sum())).astype(np.float32)  # as models and files hold it: equals stay equal


def _write(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    # safetensors writes memory as it lies, whatever the strides say
    whole = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    try:
        write_whole(Path(path), save(whole))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def _read(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a lens, all of finite numbers."""
    try:
        arrays = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such lens; fit one with qs-jax lens") from None
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: cannot be read as a lens ({reason}); fit it again") from None
    if not all(np.issubdtype(a.dtype, np.floating) and np.isfinite(a).all() for a in arrays.values()):
        raise CheckpointError(f"{path}: holds what is no finite number; fit it again")
    return arrays


def with_lens(network: CausalLM, lens: Lens) -> CausalLM:
    """The same weights, and shortcuts beside them."""
    copy: CausalLM = nnx.merge(*nnx.split(network))
    dtype = network.embedding.table.dtype
    parts = zip(lens.down, lens.up, lens.biases, strict=True)
    copy.shortcuts = nnx.List([Shortcut(*(jnp.asarray(array, dtype) for array in part)) for part in parts])
    return copy


def with_direct_lens(network: CausalLM, lens: DirectLens) -> CausalLM:
    """The same weights, and the direct lens beside them."""
    copy: CausalLM = nnx.merge(*nnx.split(network))
    dtype = network.embedding.table.dtype
    copy.direct = nnx.List([stand_in(one, dtype) for one in lens.maps])
    copy.rarity = nnx.data(None) if lens.rarity is None else nnx.Param(jnp.asarray(lens.rarity, jnp.float32))
    return copy


def stand_in(one: DirectMap, dtype: jnp.dtype) -> DirectKv:
    """A map on the device."""
    up, biases = ([jnp.asarray(part, dtype) for part in whole] for whole in (one.up, one.biases))
    return DirectKv(one.inputs, jnp.asarray(one.down, dtype), up, biases)
