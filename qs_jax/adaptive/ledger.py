"""What a run cost and what the dense model would have cost: FLOPs, bytes of weights read, cache slots written.

Work is counted as executed, padding and empty slots of a bucket included, since that is what the machine pays for; what
the CPU saves inside attention, where it leaves out blocks of slots that no query of a prompt may see, is counted on
both sides as if it were not saved. Of a prompt's last layer both sides count keys and values of all tokens, and the
rest for one token a row. What the controller does besides (probes, drifts, entropies, similarities) is
counted in full, in `flops` and apart in `probe_flops`. What the parts of a model cost: `qs_jax.adaptive.costs`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from qs_jax.adaptive.binding import BoundPolicy, Mechanism
from qs_jax.adaptive.costs import ENTROPY_FLOPS, Costs
from qs_jax.choices import BITS


class StagePass(NamedTuple):
    """One stage as it was run: `tokens` and `resting` places per row (padding included), `slots` of cache looked at.

    Of a prompt's last layer these leave keys and values, and one place per row runs the rest of it.
    """

    start: int
    stop: int
    rows: int
    tokens: int
    resting: int
    slots: int


class Work(NamedTuple):
    """What each span of layers really cost: rows that were run through it (of the whole batch or of a gathered part),
    at which of BITS they and the resting rows read weights, and on how many rows the probe behind it was taken."""

    rows_run: Int[Array, "*spans"]
    run_bits: Bool[Array, "*spans precisions"]
    rest_bits: Bool[Array, "*spans precisions"]
    rows_probed: Int[Array, "*spans"]


@dataclass
class Tally:
    """FLOPs and bytes of weights, growing."""

    flops: int = 0
    weight_bytes: int = 0
    kv_slots: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


@dataclass(frozen=True)
class PassCosts:
    """What passes of the dense model over several tokens a row cost: `rows` of a batch, at `bits`, over caches of so
    many `slots` by layer."""

    costs: Costs
    rows: int
    slots: Sequence[int]
    bits: int

    def of(self, passes: int, tokens: int) -> Tally:
        """So many passes over `tokens` tokens a row, whether they were kept or not; each reads the weights once."""
        costs = self.costs
        per_token = costs.head_flops + sum(
            layer.flops + costs.attention_flops_per_slot * (slots + tokens)
            for layer, slots in zip(costs.layers, self.slots, strict=True)
        )
        return Tally(passes * self.rows * tokens * per_token, passes * costs.step_bytes(self.bits))


@dataclass
class Ledger:
    """Totals of one request, beside its dense twin's: the same prompts and steps with every mechanism off.

    `bits` is the precision that rows read where no policy chooses it; the twin reads all bits there are, `Costs.bits`.
    """

    costs: Costs
    policy: BoundPolicy
    bits: int
    run: Tally = field(default_factory=Tally)
    twin: Tally = field(default_factory=Tally)
    probe_flops: int = 0
    draft_flops: int = 0
    draft_bytes: int = 0
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
            self.run.weight_bytes += read + heads * costs.head_bytes[self.bits]
            self._count_decision(part)
        for tokens, slots in twin:
            flops, _ = self._stage(StagePass(0, depth, rows, tokens, 0, slots))
            self.twin.flops += flops + rows * costs.head_flops
            self.twin.weight_bytes += costs.step_bytes()

    def _stage(self, part: StagePass) -> tuple[int, int]:
        flops, read, costs, rule = 0, 0, self.costs, self.policy.kv_rule
        seen = part.slots + part.tokens + part.resting
        if part.resting:
            flops += part.rows * part.resting * rule.settle_flops(costs, part.start)
            read += rule.settle_bytes(costs, part.start)
        for number in range(part.start, part.stop):
            layer, is_last = costs.layers[number], number + 1 == len(costs.layers)
            rest = layer.flops - layer.kv_flops + costs.attention_flops_per_slot * seen
            running = 1 if is_last else part.tokens + rule.keeps_running * part.resting
            flops += part.rows * (
                part.tokens * layer.kv_flops + part.resting * rule.kv_flops(costs, number) + running * rest
            )
            read += layer.bytes[self.bits]
            if not part.resting:
                continue
            read += rule.kv_bytes_beside(costs)
            if rule.resting_bits is not None and self.policy.demotes(number):
                read += (layer.kv_bytes if is_last else layer.bytes)[rule.resting_bits]
            if not is_last:
                flops += part.rows * part.resting * rule.carry_flops(costs)
                read += rule.carry_bytes(costs)
        return flops, read

    def _count_decision(self, part: StagePass) -> None:
        mechanisms, places = self.policy.on_prompt, part.rows * part.tokens
        self._control(places * self._decision_flops(mechanisms, part.stop))
        if any(mechanism.probes for mechanism in mechanisms if part.stop in mechanism.layers):
            self._probe(places)

    def _decision_flops(self, mechanisms: Iterable[Mechanism], layer: int) -> int:
        """What deciding about one token costs after a layer, the probe apart."""
        return sum(mechanism.flops(self.costs.hidden_size) for mechanism in mechanisms if layer in mechanism.layers)

    def _control(self, flops: int) -> None:
        """Count what deciding costs."""
        self.run.flops += flops
        self.probe_flops += flops

    def _probe(self, tokens: int) -> None:
        self._control(tokens * self.costs.probe_flops(self.policy.shortlist))
        self.run.weight_bytes += self.costs.probe_bytes(self.policy.shortlist, self.bits)

    def add_decode(self, work: Work, steps: int, rows: int, slots: Sequence[int]) -> None:
        """Count a chunk of decode steps.

        Args:
            work: what was run.
            steps: how many of its steps had a live row; the others ran nothing.
            rows: rows of the batch.
            slots: capacity of each layer's cache, all of which attention looks at.
        """
        costs, spans = self.costs, self.policy.spans
        decisions = [self._decision_flops(self.policy.on_generated, stop) for _, stop in spans]
        for step in range(steps):
            for index, (start, stop) in enumerate(spans):
                self._span(work, step, index, rows, range(start, stop), slots)
                self._control(rows * decisions[index])
                if work.rows_probed[step, index]:
                    self._probe(int(work.rows_probed[step, index]))
        self.add_output_entropy(steps * rows)
        self.run.flops += steps * rows * costs.head_flops
        self.run.weight_bytes += steps * costs.head_bytes[self.bits]

    def add_output_entropy(self, tokens: int) -> None:
        """Count the entropy of what so many tokens were chosen from, where the policy remembers it."""
        if self.policy.remembers:
            self._control(tokens * ENTROPY_FLOPS * self.costs.vocab_size)

    def _span(self, work: Work, step: int, index: int, rows: int, layers: Iterable[int], slots: Sequence[int]) -> None:
        ran, costs, rule = int(work.rows_run[step, index]), self.costs, self.policy.kv_rule
        rests = ran < rows
        for number in layers:
            layer = costs.layers[number]
            whole = layer.flops + costs.attention_flops_per_slot * (slots[number] + 1)
            self.run.flops += ran * whole + rests * rows * rule.kv_flops(costs, number)
            if self.policy.decode_halting and index > 0 and (rests or rows > 1):
                carried = rests * rows + (ran if rows > 1 else 0)
                self.run.flops += carried * rule.carry_flops(costs)
                self.run.weight_bytes += rule.carry_bytes(costs)
            if ran:
                self.run.weight_bytes += self._read(layer.bytes.__getitem__, number, work.run_bits[step, index])
            if rests:
                read = partial(rule.kv_bytes, costs, number)
                self.run.weight_bytes += self._read(read, number, work.rest_bits[step, index])

    def _read(
        self, bytes_at: Callable[[int], int], number: int, in_use: Bool[Array | np.ndarray, " precisions"]
    ) -> int:
        """Bytes of a layer's weights: once for every precision that some row asked for."""
        precision = self.policy.precision
        demotes = self.policy.decode_halting is not None and self.policy.demotes(number)
        if not demotes and (precision is None or not precision.adapts(number)):
            return bytes_at(self.bits)
        return sum(bytes_at(bits) for bits, used in zip(BITS, in_use, strict=True) if used)

    def add_rounds(self, verifying: Tally, drafting: Tally) -> None:
        """Count rounds of exact mode: passes of the dense model, and what it took to draft for them."""
        spent = verifying + drafting
        self.run.flops += spent.flops
        self.run.weight_bytes += spent.weight_bytes
        self.draft_flops += drafting.flops
        self.draft_bytes += drafting.weight_bytes

    def add_twin(self, steps: int, rows: int, slots: int) -> None:
        """Count decode steps of the dense twin, whose caches have so many slots in every layer."""
        twin = PassCosts(self.costs, rows, [slots] * len(self.costs.layers), self.costs.bits).of(steps, 1)
        self.twin.flops += twin.flops
        self.twin.weight_bytes += twin.weight_bytes

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
        and layers, `layers_run_mean` over all tokens, the prompt's included: those after which they halted or fused, or
        else all. Of the last one a prompt token costs `flops` of keys and values only, unless its logits are read."""
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
            "draft_flops": self.draft_flops,
            "draft_bytes": self.draft_bytes,
            "layers_run_mean": layers / tokens if tokens else float(depth),
            "prompt_layers_run_mean": self.prompt_layers / self.prompt_tokens if self.prompt_tokens else float(depth),
            "decode_layers_run_mean": self.decode_layers / self.decode_tokens if self.decode_tokens else float(depth),
            "bits_mean": self._bits_mean(),
        }

    def _bits_mean(self) -> float:
        adapts = self.policy.adapts_bits and self.decode_layers
        return self.decode_bits / self.decode_layers if adapts else float(self.bits)


def _reduction(run: int, twin: int) -> float:
    return 1.0 - run / twin if twin else 0.0
