"""What a run cost and what the dense model would have cost: FLOPs, bytes of weights read, cache slots written.

Work is counted as executed, padding and empty slots of a bucket included, since that is what the machine pays for; what
the CPU saves inside attention, where it leaves out blocks of slots that no query of a prompt may see, is counted on
both sides as if it were not saved.
One multiply-add is two FLOPs; norms, activations and softmax are left out (under 2 % on real shapes; a test holds
the count against XLA's own cost analysis). What the controller does besides (probes, drifts, entropies, similarities)
is counted in full, in `flops` and apart in `probe_flops`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from qs_jax.adaptive.binding import Structure
from qs_jax.choices import BITS, FULL
from qs_jax.kernels import has_planes, plane_bytes, weights
from qs_jax.models.base import Block, CausalLM

_SIGNAL_FLOPS = 8
"""Per hidden channel and decision: two norms and a difference, or a cosine."""
_ENTROPY_FLOPS = 6
"""Per vocabulary entry: shift, exponential, two products and sums."""


@dataclass(frozen=True)
class LayerCosts:
    """One block: FLOPs per token and bytes per pass, whole and for keys and values alone; bytes by precision."""

    flops: int
    kv_flops: int
    bytes: Mapping[int, int]
    kv_bytes: Mapping[int, int]

    @classmethod
    def of(cls, block: Block) -> "LayerCosts":
        parts = (block.k, block.v)
        return cls(
            flops=_flops(block),
            kv_flops=sum(map(_flops, parts)),
            bytes={bits: plane_bytes(block, bits) for bits in BITS},
            kv_bytes={bits: sum(plane_bytes(part, bits) for part in parts) for bits in BITS},
        )


@dataclass(frozen=True)
class Costs:
    """Constants of a model, from the shapes of its weights."""

    layers: tuple[LayerCosts, ...]
    attention_flops_per_slot: int
    hidden_size: int
    vocab_size: int
    head_flops: int
    head_bytes: int
    shortcut_flops: int
    shortcut_bytes: int
    slot_bytes: int
    weight_bits: int
    planes: bool

    @classmethod
    def of(cls, model: CausalLM) -> "Costs":
        """Those of a model; walking through its modules takes longer than a decode step, so they are kept with it."""
        if model not in _COSTS:
            _COSTS[model] = cls._counted(model)
        return _COSTS[model]

    @classmethod
    def _counted(cls, model: CausalLM) -> "Costs":
        config, head = model.config, model.head_kernel
        itemsize = model.embedding.table.dtype.itemsize
        return cls(
            layers=tuple(LayerCosts.of(block) for block in model.blocks),
            attention_flops_per_slot=4 * config.num_attention_heads * config.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            head_flops=2 * head.size,
            head_bytes=head.nbytes,
            shortcut_flops=_flops(model.shortcuts[0]) if model.shortcuts else 0,
            shortcut_bytes=plane_bytes(model.shortcuts[0], FULL) if model.shortcuts else 0,
            slot_bytes=2 * config.num_key_value_heads * config.head_dim * itemsize,
            weight_bits=8 * itemsize,
            planes=has_planes(model),
        )

    def step_bytes(self, bits: int = FULL) -> int:
        """Bytes of weights that a decode step through all layers reads at one precision."""
        return sum(layer.bytes[bits] for layer in self.layers) + self.head_bytes

    def lens_flops(self, shortlist: int) -> int:
        """The entropy of one token's intermediate logits."""
        return (2 * self.hidden_size + _ENTROPY_FLOPS) * (shortlist or self.vocab_size)

    def lens_bytes(self, shortlist: int) -> int:
        return self.head_bytes * (shortlist or self.vocab_size) // self.vocab_size


_COSTS: WeakKeyDictionary[CausalLM, Costs] = WeakKeyDictionary()


class StagePass(NamedTuple):
    """One stage as it was run: `tokens` and `resting` places per row (padding included), `slots` of cache looked at."""

    start: int
    stop: int
    rows: int
    tokens: int
    resting: int
    slots: int


class Work(NamedTuple):
    """What each segment really cost: rows that were run through it (of the whole batch or of a gathered part), at which
    of 2, 4 and 8 bits they and the resting rows read weights, and on how many rows the probe behind it was taken."""

    rows_run: Int[Array, "*segments"]
    run_bits: Bool[Array, "*segments precisions"]
    rest_bits: Bool[Array, "*segments precisions"]
    rows_probed: Int[Array, "*segments"]


@dataclass
class Tally:
    """FLOPs and bytes of weights, growing."""

    flops: int = 0
    weight_bytes: int = 0
    kv_slots: int = 0


@dataclass
class Ledger:
    """Totals of one request, beside its dense twin's: the same prompts and steps with every mechanism off.

    `bits` is the precision that rows read where no policy chooses it; the twin reads all bits there are.
    """

    costs: Costs
    structure: Structure
    bits: int = FULL
    run: Tally = field(default_factory=Tally)
    twin: Tally = field(default_factory=Tally)
    probe_flops: int = 0
    prompt_tokens: int = 0
    prompt_layers: int = 0
    decode_tokens: int = 0
    decode_layers: int = 0
    decode_bits: int = 0

    def add_prefill(self, passes: Sequence[StagePass], twin: Iterable[tuple[int, int]], rows: int) -> None:
        """Count a prefill.

        Args:
            passes: what was run.
            twin: (tokens per row, slots of cache looked at) of every piece of the dense prefill.
            rows: rows of the batch.
        """
        depth, costs = len(self.costs.layers), self.costs
        for part in passes:
            flops, read = self._stage(part)
            heads = part.stop == depth
            self.run.flops += flops + heads * rows * costs.head_flops
            self.run.weight_bytes += read + heads * costs.head_bytes
            self._count_verdict(part)
        for tokens, slots in twin:
            attention = depth * costs.attention_flops_per_slot * (slots + tokens)
            per_token = sum(layer.flops for layer in costs.layers) + attention
            self.twin.flops += rows * (tokens * per_token + costs.head_flops)
            self.twin.weight_bytes += costs.step_bytes()

    def _stage(self, part: StagePass) -> tuple[int, int]:
        flops, read = 0, 0
        seen = part.slots + part.tokens + part.resting
        for number in range(part.start, part.stop):
            layer = self.costs.layers[number]
            whole = layer.flops + self.costs.attention_flops_per_slot * seen
            resting = layer.kv_flops if self.structure.projects_resting else 0
            if self.structure.kv_rule == "shallow":
                resting = whole
            read += layer.bytes[self.bits]
            if part.resting and self.structure.demotes(number):
                read += layer.bytes[self.structure.shallow_bits]
            if part.resting and self.structure.carries_resting and number + 1 < len(self.costs.layers):
                resting += self.costs.shortcut_flops
                read += self.costs.shortcut_bytes
            flops += part.rows * (part.tokens * whole + part.resting * resting)
        return flops, read

    def _count_verdict(self, part: StagePass) -> None:
        structure, places = self.structure, part.rows * part.tokens
        halting, fusion = structure.prompt, structure.fusion
        if halting and part.stop in halting.layers:
            self._probe(places * self._signal_flops(halting.signal))
            if halting.probes:
                self._lens(places)
        if fusion and part.stop in fusion.layers:
            self._probe(places * _SIGNAL_FLOPS * self.costs.hidden_size)

    def _signal_flops(self, signal: str) -> int:
        free = ("entropy", "previous_entropy", "random")
        return 0 if signal in free else _SIGNAL_FLOPS * self.costs.hidden_size

    def _probe(self, flops: int) -> None:
        self.run.flops += flops
        self.probe_flops += flops

    def _lens(self, tokens: int) -> None:
        self._probe(tokens * self.costs.lens_flops(self.structure.shortlist))
        self.run.weight_bytes += self.costs.lens_bytes(self.structure.shortlist)

    def add_decode(self, work: Work, steps: int, rows: int, slots: Sequence[int], twin_slots: int) -> None:
        """Count a chunk of decode steps.

        Args:
            work: what was run.
            steps: how many of its steps had a live row; the others ran nothing.
            rows: rows of the batch.
            slots: capacity of each layer's cache, all of which attention looks at.
            twin_slots: the same for the dense twin, equal in all layers.
        """
        costs, structure = self.costs, self.structure
        for step in range(steps):
            for index, (start, stop) in enumerate(structure.segments):
                self._segment(work, step, index, rows, range(start, stop), slots)
                if structure.decode and stop in structure.decode.layers:
                    self._probe(rows * self._signal_flops(structure.decode.signal))
                if work.rows_probed[step, index]:
                    self._lens(int(work.rows_probed[step, index]))
        self.add_output_entropy(steps * rows)
        self.run.flops += steps * rows * costs.head_flops
        self.run.weight_bytes += steps * costs.head_bytes
        per_row = sum(layer.flops for layer in costs.layers) + costs.head_flops
        per_row += len(costs.layers) * costs.attention_flops_per_slot * (twin_slots + 1)
        self.twin.flops += steps * rows * per_row
        self.twin.weight_bytes += steps * costs.step_bytes()

    def add_output_entropy(self, tokens: int) -> None:
        """Count the entropy of what so many tokens were chosen from, where the policy remembers it."""
        if self.structure.needs_output_entropy:
            self._probe(tokens * _ENTROPY_FLOPS * self.costs.vocab_size)

    def _segment(
        self, work: Work, step: int, index: int, rows: int, layers: Iterable[int], slots: Sequence[int]
    ) -> None:
        ran = int(work.rows_run[step, index])
        rests = ran < rows and self.structure.projects_resting
        for number in layers:
            layer = self.costs.layers[number]
            whole = layer.flops + self.costs.attention_flops_per_slot * (slots[number] + 1)
            self.run.flops += ran * whole + rests * rows * layer.kv_flops
            if self.structure.decode and self.structure.carries_resting and index > 0 and (rests or rows > 1):
                carried = rests * rows + (ran if rows > 1 else 0)
                self.run.flops += carried * self.costs.shortcut_flops
                self.run.weight_bytes += self.costs.shortcut_bytes
            if ran:
                self.run.weight_bytes += self._read(layer.bytes, number, work.run_bits[step, index])
            if rests:
                self.run.weight_bytes += self._read(layer.kv_bytes, number, work.rest_bits[step, index])

    def _read(self, by_bits: Mapping[int, int], number: int, in_use: Bool[Array | np.ndarray, " precisions"]) -> int:
        """Bytes of a layer's weights: once for every precision that some row asked for."""
        precision = self.structure.precision
        demotes = self.structure.decode is not None and self.structure.demotes(number)
        if not demotes and (precision is None or not precision.adapts(number)):
            return by_bits[self.bits]
        return sum(by_bits[bits] for bits, used in zip(BITS, in_use, strict=True) if used)

    def add_tokens(self, *, prompt: bool, layers: int, bits: int, tokens: int, slots: int) -> None:
        """Count tokens by what they got: layers run and bits read, summed over all, and cache slots they filled."""
        depth = len(self.costs.layers)
        if prompt:
            self.prompt_tokens, self.prompt_layers = self.prompt_tokens + tokens, self.prompt_layers + layers
        else:
            self.decode_tokens, self.decode_layers = self.decode_tokens + tokens, self.decode_layers + layers
            self.decode_bits += bits
        self.run.kv_slots += slots
        self.twin.kv_slots += depth * tokens

    def add(self, other: "Ledger") -> None:
        """Count another request of the same model and policy as well."""
        for mine, theirs in ((self, other), (self.run, other.run), (self.twin, other.twin)):
            for item in fields(mine):
                value = getattr(mine, item.name)
                if isinstance(value, int) and item.name != "bits":
                    setattr(mine, item.name, value + getattr(theirs, item.name))

    def to_json(self) -> dict[str, float]:
        """The ledger beside its dense twin. Reductions are fractions of the twin; `bits_mean` is over generated tokens
        and layers, `layers_run_mean` over all tokens, the prompt's included."""
        costs, run, twin = self.costs, self.run, self.twin
        depth, tokens = len(costs.layers), self.prompt_tokens + self.decode_tokens
        layers = self.prompt_layers + self.decode_layers
        return {
            "flops": run.flops,
            "flops_off": twin.flops,
            "flops_reduction": _reduction(run.flops, twin.flops),
            "weight_bytes": run.weight_bytes,
            "weight_bytes_off": twin.weight_bytes,
            "bytes_reduction": _reduction(run.weight_bytes, twin.weight_bytes),
            "kv_slots": run.kv_slots,
            "kv_slots_off": twin.kv_slots,
            "kv_bytes": run.kv_slots * costs.slot_bytes,
            "kv_bytes_off": twin.kv_slots * costs.slot_bytes,
            "probe_flops": self.probe_flops,
            "layers_run_mean": layers / tokens if tokens else float(depth),
            "prompt_layers_run_mean": self.prompt_layers / self.prompt_tokens if self.prompt_tokens else float(depth),
            "decode_layers_run_mean": self.decode_layers / self.decode_tokens if self.decode_tokens else float(depth),
            "bits_mean": self._bits_mean(),
        }

    def _bits_mean(self) -> float:
        if not self.costs.planes:
            return float(self.costs.weight_bits)
        adapts = self.structure.adapts_bits and self.decode_layers
        return self.decode_bits / self.decode_layers if adapts else float(self.bits)


def _reduction(run: int, twin: int) -> float:
    return 1.0 - run / twin if twin else 0.0


def _flops(module: nnx.Module) -> int:
    """FLOPs per token of all products in a module."""
    return sum(2 * kernel.size for kernel in weights(module) if kernel.ndim == 2)
