"""A policy bound to a model: static structure, traced thresholds, and refusal of what the model has no means for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax.adaptive.policy import (
    BitsSignal,
    Distance,
    Fusion,
    Halting,
    KvRule,
    Policy,
    PositionRule,
    Precision,
    Signal,
    Thresholds1D,
)
from qs_jax.config import ModelConfig
from qs_jax.errors import PolicyError

_ID_SLOTS = 8


@dataclass(frozen=True)
class HaltingStructure:
    """`layers`: after how many layers a token may halt. `gate`: which entropy must be low as well, if any."""

    signal: Signal
    layers: tuple[int, ...]
    gate: str | None

    @property
    def reads(self) -> tuple[str, ...]:
        """The signals it looks at."""
        return (self.signal,) if self.gate in (None, self.signal) else (self.signal, self.gate)

    @property
    def probes(self) -> bool:
        """Whether it needs the entropy of intermediate logits."""
        return "entropy" in self.reads


@dataclass(frozen=True)
class FusionStructure:
    distance: Distance
    layers: tuple[int, ...]
    position: PositionRule
    size_bias: bool


@dataclass(frozen=True)
class PrecisionStructure:
    """Layers `layer` … are read at the chosen bits, all others and `pinned` ones at 8."""

    signal: BitsSignal
    layer: int
    pinned: tuple[int, ...]

    def adapts(self, layer: int) -> bool:
        return layer >= self.layer and layer not in self.pinned


@dataclass(frozen=True)
class Structure:
    """What the compiled programs are built for. Hashable; equal structures share every program."""

    num_layers: int
    prompt: HaltingStructure | None = None
    decode: HaltingStructure | None = None
    kv_rule: KvRule = "frozen"
    shallow_bits: int = 4
    fusion: FusionStructure | None = None
    precision: PrecisionStructure | None = None
    shortlist: int = 0
    protect_first: int = 0
    protect_last: int = 1

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Prefill's runs of layers: after each but the last, tokens may halt or fuse, and the rest are gathered."""
        cuts = {*(self.prompt.layers if self.prompt else ()), *(self.fusion.layers if self.fusion else ())}
        return _runs(cuts, self.num_layers)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Decode's runs of layers: each but the first rests when no row needs it."""
        cuts = set(self.decode.layers) if self.decode else set()
        if self.precision and self.precision.signal == "entropy" and 0 < self.precision.layer < self.num_layers:
            cuts.add(self.precision.layer)
        return _runs(cuts, self.num_layers)

    def demotes(self, layer: int) -> bool:
        """Whether halted tokens go on through this layer at `shallow_bits`."""
        return self.kv_rule == "shallow" and not (self.precision is not None and layer in self.precision.pinned)

    @property
    def projects_resting(self) -> bool:
        """Whether halted tokens leave keys and values projected from a state of their own."""
        return self.kv_rule in ("frozen", "affine")

    @property
    def carries_resting(self) -> bool:
        """Whether the lens carries halted tokens on through the layers they skip."""
        return self.kv_rule == "affine"

    @property
    def adapts_bits(self) -> bool:
        """Whether rows may read weights at different precisions while decoding."""
        return self.precision is not None or (self.decode is not None and self.kv_rule == "shallow")

    @property
    def needs_output_entropy(self) -> bool:
        """Whether a decode step must remember the entropy of its output for the next one."""
        halting = self.decode is not None and "previous_entropy" in self.decode.reads
        return halting or (self.precision is not None and self.precision.signal == "previous_entropy")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Thresholds:
    """Everything of a policy that may change without compiling. Unused ones are there all the same.

    `prompt_halt` and `fuse` have one entry per layer 0 … num_layers (0 where the mechanism may not act), so that the
    same program serves any of them; `decode_halt` likewise. Entropies are in bits. `special_ids` is padded with -1.
    """

    prompt_halt: Float[Array, " layers"]
    prompt_entropy: Float[Array, ""]
    decode_halt: Float[Array, " layers"]
    decode_entropy: Float[Array, ""]
    fuse: Float[Array, " layers"]
    two_below: Float[Array, ""]
    four_below: Float[Array, ""]
    special_ids: Int[Array, " slots"]


@dataclass(frozen=True)
class BoundPolicy:
    """A policy that fits a model: the source it came from, its static and its traced half."""

    policy: Policy
    structure: Structure
    thresholds: Thresholds

    @property
    def is_off(self) -> bool:
        """Whether this is the dense model."""
        structure = self.structure
        return structure.prompt is structure.decode is structure.fusion is structure.precision is None


def bind(
    policy: Policy, config: ModelConfig, *, planes: bool, lens: bool = False, special_ids: Sequence[int] = ()
) -> BoundPolicy:
    """Fit a policy to a model.

    Args:
        policy: what to fit.
        config: the model's configuration.
        planes: whether the model's weights are Matryoshka codes. Without them `precision` is left out, since there is
            nothing to read at fewer bits.
        lens: whether the model has an affine lens.
        special_ids: ids of the model's special tokens.

    Raises:
        PolicyError: layers beyond the model's depth, a number of thresholds that is not the number of layers,
            `shallow` without Matryoshka weights, or `affine` without a lens.
    """
    depth = config.num_hidden_layers
    halts = policy.prompt_halting is not None or policy.decode_halting is not None
    if policy.kv_rule == "shallow" and halts and not planes:
        raise PolicyError("kv_rule shallow needs Matryoshka weights; convert with --quantize matryoshka")
    if policy.kv_rule == "affine" and halts and not lens:
        raise PolicyError("kv_rule affine needs a lens; fit one with qs-jax lens")
    if not planes:
        policy = replace(policy, precision=None)
    ids = sorted(set(special_ids)) if policy.protect_special else []
    prompt, prompt_halt = _halting(policy.prompt_halting, "prompt_halting", depth)
    decode, decode_halt = _halting(policy.decode_halting, "decode_halting", depth)
    fusion, fuse = _fusion(policy.fusion, depth)
    structure = Structure(
        num_layers=depth,
        prompt=prompt,
        decode=decode,
        kv_rule=policy.kv_rule,
        shallow_bits=policy.shallow_bits,
        fusion=fusion,
        precision=_precision(policy.precision, depth),
        shortlist=min(policy.probe.shortlist, config.vocab_size),
        protect_first=policy.protect_first,
        protect_last=policy.protect_last,
    )
    precision = policy.precision or Precision()
    thresholds = Thresholds(
        prompt_halt=prompt_halt,
        prompt_entropy=_entropy(policy.prompt_halting),
        decode_halt=decode_halt,
        decode_entropy=_entropy(policy.decode_halting),
        fuse=fuse,
        two_below=jnp.float32(precision.two_below),
        four_below=jnp.float32(precision.four_below),
        special_ids=jnp.asarray([*ids, *[-1] * (-len(ids) % _ID_SLOTS or (0 if ids else _ID_SLOTS))], jnp.int32),
    )
    return BoundPolicy(policy, structure, thresholds)


def dense(config: ModelConfig) -> BoundPolicy:
    """The policy that is off."""
    return bind(Policy.off(), config, planes=False)


def _halting(halting: Halting | None, name: str, depth: int) -> tuple[HaltingStructure | None, Float[Array, " layers"]]:
    if halting is None:
        return None, jnp.zeros(depth + 1, jnp.float32)
    layers = _resolved(halting.layers, halting.start, halting.step, depth, name)
    gate = halting.entropy_source if halting.entropy_below is not None else None
    return HaltingStructure(halting.signal, layers, gate), _per_layer(halting.thresholds, layers, depth, name)


def _fusion(fusion: Fusion | None, depth: int) -> tuple[FusionStructure | None, Float[Array, " layers"]]:
    if fusion is None:
        return None, jnp.zeros(depth + 1, jnp.float32)
    layers = _resolved(fusion.layers, fusion.start, fusion.step, depth, "fusion")
    structure = FusionStructure(fusion.distance, layers, fusion.position, fusion.size_bias)
    return structure, _per_layer(fusion.thresholds, layers, depth, "fusion")


def _precision(precision: Precision | None, depth: int) -> PrecisionStructure | None:
    if precision is None:
        return None
    layer = depth // 2 if precision.layer is None else precision.layer
    if layer >= depth or any(not -depth <= pinned < depth for pinned in precision.pinned):
        raise PolicyError(f"precision names layers beyond the model's {depth}")
    if precision.signal == "entropy" and layer == 0:
        raise PolicyError("precision.layer is 0, but the entropy of intermediate logits needs at least one layer")
    return PrecisionStructure(precision.signal, layer, tuple(sorted(pinned % depth for pinned in precision.pinned)))


def _entropy(halting: Halting | None) -> Float[Array, ""]:
    return jnp.float32(np.inf if halting is None or halting.entropy_below is None else halting.entropy_below)


def _resolved(layers: tuple[int, ...] | None, start: float, step: int, depth: int, name: str) -> tuple[int, ...]:
    """Layer numbers from 1 to depth - 1: after the last layer there is nothing left to save."""
    if layers is None:
        return tuple(range(min(max(1, round(start * depth)), max(1, depth - 1)), depth, step))
    if layers[-1] >= depth:
        raise PolicyError(f"{name}.layers reach {layers[-1]}, with {depth} layers the last to name is {depth - 1}")
    return layers


def _per_layer(values: Thresholds1D, layers: tuple[int, ...], depth: int, name: str) -> Float[Array, " layers"]:
    numbers = values if isinstance(values, tuple) else (values,) * len(layers)
    if len(numbers) != len(layers):
        raise PolicyError(f"{name} has {len(numbers)} thresholds for {len(layers)} layers; give one, or one per layer")
    table = np.zeros(depth + 1, np.float32)
    table[list(layers)] = numbers
    return jnp.asarray(table)


def _runs(cuts: set[int], depth: int) -> tuple[tuple[int, int], ...]:
    edges = [0, *sorted(cuts), depth]
    return tuple(pairwise(edges))
