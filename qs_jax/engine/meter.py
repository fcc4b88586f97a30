"""The accounts of a request: what prefill and chunks of steps report goes into the ledger, beside the dense twin."""

from collections.abc import Sequence

import jax

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.ledger import Ledger, PassCosts
from qs_jax.cache import bucket
from qs_jax.engine.decode import Chosen, Chunk
from qs_jax.engine.exact import Draft, Rounds
from qs_jax.engine.prefill import Prefilled


class Meter:
    """Counts what was run, and what the dense twin of the request would have run.

    `twin_capacity` are the slots that the twin's caches have from the start; `limit` is the model's. `bits` are those
    at which the model is read, None for all there are.
    """

    def __init__(self, costs: Costs, policy: BoundPolicy, *, twin_capacity: int, limit: int, bits: int | None = None):
        self.ledger = Ledger(costs, policy, bits or costs.bits)
        self._policy, self._limit = policy, limit
        self._twin_capacity = twin_capacity

    def prefill(self, prefilled: Prefilled, *, rows: int) -> None:
        """Count the prompts, and for each of `rows` rows the choice of its first token."""
        trace = prefilled.trace.layers_run
        twin = [(piece.width, self._twin_capacity if piece.start else 0) for piece in prefilled.pieces]
        passes = [run for piece in prefilled.pieces for run in piece.passes]
        self.ledger.add_prefill(passes, twin, len(trace))
        layers, tokens = sum(int(row.sum()) for row in trace), sum(map(len, trace))
        self.ledger.add_tokens(prompt=True, layers=layers, bits=0, tokens=tokens, slots=int(prefilled.filled.sum()))
        self.ledger.add_output_entropy(rows)

    def decode(self, chunk: Chunk, capacities: Sequence[int], longest: int, *, twin_steps: int) -> int:
        """Count a chunk that looked at caches of these capacities; returns how many of its steps ran a layer.

        Args:
            chunk: what was run, on the host.
            capacities: of each layer's cache.
            longest: slots that the twin's longest row needs for the chunk.
            twin_steps: how many the twin takes for the same text.
        """
        emitted = chunk.chosen.emitted
        steps, rows = int(emitted.any(axis=1).sum()), emitted.shape[1]
        self.ledger.add_decode(chunk.work, steps, rows, capacities)
        self._tokens(chunk.chosen, twin_steps, longest)
        return steps

    def rounds(self, chunk: Rounds, draft: Draft, capacities: Sequence[int], longest: int, *, twin_steps: int) -> int:
        """Count a chunk of exact mode's rounds likewise; returns how many of them ran a layer."""
        chosen, ledger = chunk.rounds.chosen, self.ledger
        _, passed, rows = chosen.emitted.shape
        ran = chosen.emitted.any(axis=(1, 2))
        costs = PassCosts(ledger.costs, rows, capacities, ledger.bits)
        work = jax.tree.map(lambda leaf: leaf[ran], chunk.rounds.work)
        ledger.add_rounds(costs.of(int(ran.sum()), passed), draft.spent(costs, work))
        self._tokens(chosen, twin_steps, longest)
        return int(ran.sum())

    def _tokens(self, chosen: Chosen, twin_steps: int, longest: int) -> None:
        """Count what came of a chunk, and the twin's way to it."""
        if longest > self._twin_capacity:
            self._twin_capacity = bucket(longest, self._limit)
        emitted, depth = chosen.emitted, self._policy.num_layers
        self.ledger.add_twin(twin_steps, emitted.shape[-1], self._twin_capacity)
        layers, tokens = int(chosen.layers_run[emitted].sum()), int(emitted.sum())
        slots = depth * tokens if self._policy.kv_rule.keeps_slots else layers
        bits = int(chosen.bits_read[emitted].sum())
        self.ledger.add_tokens(prompt=False, layers=layers, bits=bits, tokens=tokens, slots=slots)


def share(whole: Ledger, chosen: Chosen, part: float) -> Ledger:
    """Of what a batch spent on a chunk, what falls to a row that produced `part` of its tokens.

    Args:
        whole: the chunk's own ledger.
        chosen: of this row alone, (steps,), only what it emitted.
        part: between 0 and 1.
    """
    own = Ledger(whole.costs, whole.policy, whole.bits)
    for mine, all_rows in ((own.run, whole.run), (own.twin, whole.twin)):
        mine.flops, mine.weight_bytes = round(part * all_rows.flops), round(part * all_rows.weight_bytes)
    own.probe_flops = round(part * whole.probe_flops)
    layers, tokens, depth = int(chosen.layers_run.sum()), len(chosen.tokens), whole.policy.num_layers
    slots = depth * tokens if whole.policy.kv_rule.keeps_slots else layers
    own.add_tokens(prompt=False, layers=layers, bits=int(chosen.bits_read.sum()), tokens=tokens, slots=slots)
    return own
