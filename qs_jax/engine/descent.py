"""One decode step's way down the layers: rows halt, rest and change precision as the policy says.

Layers run in segments. A segment that no row needs is skipped by a scalar `lax.cond`: its weights are not read. A
segment that few rows need runs on those rows alone, gathered into a smaller static batch. A row that has halted keeps
its state; what deeper layers see of it is the K/V rule's business.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive import signals
from qs_jax.adaptive.binding import Structure, Thresholds
from qs_jax.adaptive.halting import halts
from qs_jax.adaptive.ledger import Work
from qs_jax.adaptive.precision import choose_bits, precisions_in_use
from qs_jax.cache import Cache, LayerCache, segment
from qs_jax.choices import FULL
from qs_jax.kernels import at_bits
from qs_jax.models.base import Block, CausalLM, Heads, Hidden

PerRow = Bool[Array, " batch"]
Bits = Int[Array, " batch"]

_FEWEST_ROWS_TO_GATHER = 4


class Context(NamedTuple):
    """What the rows carry unchanged through all layers; `previous_entropy` in bits."""

    tokens: Int[Array, " batch"]
    positions: Int[Array, "batch 1"]
    protected: PerRow
    idle: PerRow
    previous_entropy: Float[Array, " batch"]


class Rows(NamedTuple):
    """The batch on its way down.

    `halted` rows keep their state from here on (under the shallow rule they go on at fewer bits). `bits_read` sums the
    precision over the layers run. `signal` is what a row showed at its last decision.
    """

    hidden_states: Float[Array, "batch 1 hidden"]
    halted: PerRow
    bits: Int[Array, " batch"]
    layers_run: Int[Array, " batch"]
    bits_read: Int[Array, " batch"]
    signal: Float[Array, " batch"]


class Written(NamedTuple):
    """Keys and values of one layer, and which rows write them."""

    k: Float[Array, "batch 1 kv_heads head_dim"]
    v: Float[Array, "batch 1 kv_heads head_dim"]
    writes: Bool[Array, "batch 1"]


class Descent(NamedTuple):
    """The end of the way down."""

    rows: Rows
    written: tuple[Written, ...]
    work: Work


class _Input(NamedTuple):
    """What a segment works on; every leaf has one row per row of the batch, so that rows can be gathered.

    `bits` holds each row's precision by layer, None where every row reads all bits, so that nothing is traced for it.
    """

    hidden_states: Hidden
    positions: Int[Array, "batch 1"]
    active: PerRow
    layers: tuple[LayerCache, ...]
    bits: tuple[Bits | None, ...]


class _Ran(NamedTuple):
    """A segment's outcome; the last layer's input and attention update are what signals look at."""

    hidden_states: Hidden
    last_input: Hidden
    last_update: Hidden
    kv: tuple[tuple[Heads, Heads], ...]


def descend(model: CausalLM, cache: Cache, context: Context, structure: Structure, thresholds: Thresholds) -> Descent:
    """Run the pending token of every row through as many layers as it needs.

    The cache is read here and written by the caller: a conditional that returned it would have to copy it.
    """
    zeros = jnp.zeros(context.idle.shape, jnp.int32)
    rows = Rows(
        hidden_states=model.embed(context.tokens[:, None], context.positions),
        halted=jnp.zeros_like(context.idle),
        bits=_first_bits(context, structure, thresholds),
        layers_run=zeros,
        bits_read=zeros,
        signal=zeros.astype(jnp.float32),
    )
    written: list[Written] = []
    work: list[Work] = []
    for start, stop in structure.segments:
        rows, ran, new, cost = _segment(model, cache[start:stop], rows, context, structure, start)
        written += new
        if stop < structure.num_layers:
            rows, probed = _decide(model, rows, ran, context, structure, thresholds, stop)
            cost = cost._replace(rows_probed=probed)
        work.append(cost)
    return Descent(rows, tuple(written), jax.tree.map(lambda *parts: jnp.stack(parts), *work))


def _first_bits(context: Context, structure: Structure, thresholds: Thresholds) -> Int[Array, " batch"]:
    """Precision as far as it is known before the first layer."""
    precision = structure.precision
    if precision is None or precision.signal == "entropy":
        return jnp.full(context.idle.shape, FULL, jnp.int32)
    if precision.signal == "random":
        value = signals.uniform(context.positions[:, 0], context.tokens, 0)
    else:
        value = context.previous_entropy
    return jnp.where(context.protected, FULL, choose_bits(value, thresholds.two_below, thresholds.four_below))


def _segment(
    model: CausalLM,
    layers: Sequence[LayerCache],
    rows: Rows,
    context: Context,
    structure: Structure,
    start: int,
) -> tuple[Rows, _Ran, list[Written], Work]:
    """Run the layers `start` … for the rows that need them; say what was done."""
    shallow = structure.kv_rule == "shallow"
    active = ~context.idle if shallow else ~context.idle & ~rows.halted
    bits = jnp.where(rows.halted, jnp.minimum(rows.bits, structure.shallow_bits), rows.bits) if shallow else rows.bits
    numbers = range(start, start + len(layers))
    per_layer = tuple(_bits_of(layer, bits, rows.halted, structure) for layer in numbers)
    given = _Input(rows.hidden_states, context.positions, active, tuple(layers), per_layer)
    batch = active.shape[0]
    mixed = structure.decode is not None and not shallow and start > 0 and batch > 1
    run = partial(_run, model, numbers, structure=structure, mixed=mixed)
    if structure.decode is None or start == 0 or shallow:
        ran, rows_run = run(given), jnp.int32(batch)
    else:
        rest = partial(_rest, model, numbers, structure=structure)
        sizes = [0, batch // 2, batch] if batch >= _FEWEST_ROWS_TO_GATHER else [0, batch]
        branches = [rest, *(partial(_run_gathered, run, rest, size) for size in sizes[1:-1]), run]
        branch = (active.sum(dtype=jnp.int32) > jnp.asarray(sizes[:-1], jnp.int32)).sum(dtype=jnp.int32)
        ran = jax.lax.switch(branch, branches, given)
        rows_run = jnp.asarray(sizes, jnp.int32)[branch]
    read = sum((jnp.full((batch,), FULL, jnp.int32) if b is None else b for b in per_layer), jnp.zeros_like(bits))
    rows = rows._replace(
        hidden_states=ran.hidden_states,
        layers_run=rows.layers_run + jnp.where(active, len(numbers), 0).astype(jnp.int32),
        bits_read=rows.bits_read + jnp.where(active, read, 0),
    )
    resting = ~context.idle & ~active
    written = [_written(k, v, context.idle, resting, structure) for k, v in ran.kv]
    idle = jnp.zeros_like(resting)
    rests = resting if structure.projects_resting else idle
    work = Work(rows_run, precisions_in_use(bits, active), precisions_in_use(bits, rests), jnp.int32(0))
    return rows, ran, written, work


def _bits_of(layer: int, bits: Bits, halted: PerRow, structure: Structure) -> Bits | None:
    """Each row's precision in a layer, or None: see `_Input`."""
    precision = structure.precision
    adapts = precision is not None and precision.adapts(layer)
    if structure.decode is not None and structure.demotes(layer):
        return bits if adapts else jnp.where(halted, bits, FULL)
    return bits if adapts else None


def _read_at(block: Block, bits: Bits | None) -> Block:
    return block if bits is None else at_bits(block, bits)


def _run(model: CausalLM, numbers: Sequence[int], given: _Input, *, structure: Structure, mixed: bool) -> _Ran:
    """All layers of a segment for the whole batch, `mixed` if some of its rows may be inactive: they only rest."""
    hidden_states = last_input = given.hidden_states
    kv, update = [], jnp.zeros_like(hidden_states)
    for number, layer, bits in zip(numbers, given.layers, given.bits, strict=True):
        last_input, block = hidden_states, _read_at(model.blocks[number], bits)
        hidden_states, k, v, update = block.run(last_input, given.positions, (segment(layer),))
        if mixed:
            rested = _carried(model, number, last_input, structure)
            hidden_states = jnp.where(given.active[:, None, None], hidden_states, rested)
        kv.append((k, v))
    return _Ran(hidden_states, last_input, update, tuple(kv))


def _carried(model: CausalLM, number: int, hidden_states: Hidden, structure: Structure) -> Hidden:
    """The states of resting rows after a layer."""
    return model.shortcut(number, hidden_states) if structure.carries_resting else hidden_states


def _rest(model: CausalLM, numbers: Sequence[int], given: _Input, *, structure: Structure) -> _Ran:
    """What is left to do where no row runs: keys and values from the rows' own states, or nothing."""
    hidden_states = given.hidden_states
    batch, kv_heads, _, head_dim = given.layers[0].keys.shape
    empty = jnp.zeros((batch, 1, kv_heads, head_dim), hidden_states.dtype)
    kv: list[tuple[Heads, Heads]] = []
    for number, bits in zip(numbers, given.bits, strict=True):
        block = _read_at(model.blocks[number], bits)
        kv.append(block.kv(hidden_states, given.positions) if structure.projects_resting else (empty, empty))
        hidden_states = _carried(model, number, hidden_states, structure)
    return _Ran(hidden_states, hidden_states, jnp.zeros_like(hidden_states), tuple(kv))


def _run_gathered(run: partial, rest: partial, size: int, given: _Input) -> _Ran:
    """The active rows alone, gathered into a batch of `size`; the others rest."""
    chosen = jnp.argsort(~given.active, stable=True)[:size]
    part = run(jax.tree.map(lambda leaf: leaf[chosen], given))
    return jax.tree.map(lambda all_rows, some: all_rows.at[chosen].set(some), rest(given), part)


def _written(k: Heads, v: Heads, idle: PerRow, resting: PerRow, structure: Structure) -> Written:
    """The K/V rule for one layer: what the cache gets of rows that run and of rows that rest."""
    writes = ~idle
    if structure.kv_rule == "drop":
        writes &= ~resting
    elif structure.kv_rule == "zero":
        k, v = (jnp.where(resting[:, None, None, None], 0, x) for x in (k, v))
    return Written(k, v, writes[:, None])


def _decide(
    model: CausalLM,
    rows: Rows,
    ran: _Ran,
    context: Context,
    structure: Structure,
    thresholds: Thresholds,
    layer: int,
) -> tuple[Rows, Int[Array, ""]]:
    """After `layer` layers: which rows halt, and at how many bits the others go on; rows the probe was taken on."""
    halting = structure.decode if structure.decode and layer in structure.decode.layers else None
    precision = structure.precision
    chooses = precision is not None and precision.signal == "entropy" and layer == precision.layer
    running = ~context.idle & ~rows.halted
    entropy, probed = jnp.zeros_like(rows.signal), jnp.int32(0)
    if chooses or (halting and halting.probes):
        take = partial(signals.lens_entropy, model, shortlist=structure.shortlist)
        entropy = jax.lax.cond(running.any(), take, lambda h: jnp.zeros_like(h[:, 0]), ran.hidden_states[:, 0])
        probed = jnp.where(running.any(), running.shape[0], 0).astype(jnp.int32)
    if chooses:
        bits = choose_bits(entropy, thresholds.two_below, thresholds.four_below)
        # a row that has halted keeps its bits: whether its entropy was taken at all depends on its batch mates
        rows = rows._replace(bits=jnp.where(running, jnp.where(context.protected, FULL, bits), rows.bits))
    if halting:
        before, after, update, place = (
            x[:, 0] for x in (ran.last_input, ran.hidden_states, ran.last_update, context.positions)
        )
        seen = signals.Evidence(before, after, update, place, context.tokens, entropy, context.previous_entropy)
        values = {name: seen.value(name, layer) for name in halting.reads}
        halt = halts(halting, values, thresholds.decode_halt[layer], thresholds.decode_entropy, context.protected)
        rows = rows._replace(
            halted=rows.halted | (halt & running), signal=jnp.where(running, values[halting.signal], rows.signal)
        )
    return rows, probed
