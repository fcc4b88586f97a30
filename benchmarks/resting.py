"""Which prompt tokens should stop, how early, and what else could a token do than stop? Forced, on the real model.

    python -m benchmarks.resting                        # all parts; an hour on two cores
    python -m benchmarks.resting --only tokens          # which tokens run on, by what they show, beside random ones
    python -m benchmarks.resting --only depths          # early stops of common tokens beside late ones of all
    python -m benchmarks.resting --only halves          # tokens that attend on, their feed-forward from a linear map
    python -m benchmarks.resting --only exits           # generated tokens that leave through a lens where it is sure
    python -m benchmarks.resting --lens lens.st --only tokens     # with a lens that was tuned, `direct_lens --keep`
    python -m benchmarks.resting --report               # the tables of docs/resting.md, from the results

SmolLM2 in float32, 512 + 64 tokens of calibration text, on which policies are chosen: no text that is judged. The
dense model runs every window; then layers run again in which those that rest leave what a stand-in makes
(`benchmarks.forced`). FLOPs of prompt and scored tokens together, counted as the ledger does. The direct lens in closed
form unless one is given.

Predictions, after trials by hand with lenses of fewer tokens: (1) how rare a token is in text at large tells better
than states, norms or attention paid so far which tokens should run on; only the attention that will be paid, an oracle,
is better; (2) at equal saving common tokens that stop early beat all tokens that stop late; (3) a token that attends on
leaves better keys and values than the lens makes, but at equal FLOPs it loses; (4) generated tokens that leave where
the lens is sure, at 1 % of perplexity, save less than 3 % of a step. Outcome: docs/resting.md.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks import forced, real_model
from benchmarks.direct_lens import CALIBRATION_PARTS, lens_text, lensed, running
from benchmarks.forced import FIRST, LAST, PROMPT, SCORED, Losses, Seen
from benchmarks.harness import read_result, stamp, write_result
from benchmarks.resting_report import write_resting
from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.kv_rules import Direct, Frozen
from qs_jax.adaptive.signals import angle, norm
from qs_jax.console import progress, reporting_errors
from qs_jax.evaluation.defaults import DIRECT_LENS_TOKENS
from qs_jax.evaluation.direct import fit_direct
from qs_jax.evaluation.windows import Plan, cut, whole
from qs_jax.lens import DirectLens, rarity_of
from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.models.attention import new_segment
from qs_jax.models.base import Block, CausalLM, Heads, Hidden
from qs_jax.models.layers import STATE_EPSILON, normal

NAME = "resting"
BATCH = 8
STOP = 18
STOPS = (12, 15, 18, 21)
SHARES = (0.15,)
"""Of the tokens that might rest, those that run on."""
LASTS, DEPTH_SHARES = (64, 128), (0.0, 0.08, 0.15, 0.3)
HALVES = (6, 12, 18)
EXITS, EXIT_SHARES = (18, 21, 24, 27), (0.05, 0.1, 0.25)
"""After how many layers a generated token may leave, and how many of them do."""
OBSERVED = 32
"""Tokens at a prompt's end whose attention is looked at."""
MAP_WINDOWS = 96
"""To fit other stand-ins than the direct lens on."""
PENALTY = 1e-3

Values = Float[np.ndarray, "windows tokens"]


@dataclass(frozen=True)
class Bench:
    """The model with its lens, the windows to look at, and token ids that lenses are fitted on."""

    model: Model
    windows: list[Int[np.ndarray, "windows tokens"]]
    fitted_on: Int[np.ndarray, "windows tokens"]

    @property
    def network(self) -> CausalLM:
        return self.model.network

    @property
    def rarity(self) -> Float[np.ndarray, " vocabulary"]:
        """In the text that lenses are fitted on."""
        return rarity_of(self.fitted_on, self.model.config.vocab_size)

    def seen(self, name: str) -> Iterator[Seen]:
        """Of the dense model, batch by batch."""
        with progress(name, len(self.windows)) as advance:
            for ids in self.windows:
                yield forced.seen(self.network, ids)
                advance()


def prepared(asked: argparse.Namespace) -> Bench:
    """Model, text and lenses."""
    model = load(real_model.place(real_model.NAME), dtype="float32")
    plan = Plan(prefix=PROMPT, window=SCORED, max_tokens=SCORED * asked.windows, batch=BATCH)
    ids = np.asarray([w.prompt + w.scored for w in cut(model, running(CALIBRATION_PARTS), plan)], np.int32)
    text = whole(model, lens_text(), asked.tokens)
    if asked.lens:
        lens = DirectLens.load(asked.lens, model.config)
    else:
        stops = sorted({*((STOP,) if "tokens" in asked.only else ()), *(STOPS if "depths" in asked.only else ())})
        with progress("fitting", model.config.num_hidden_layers * len(stops)) as advance:
            lens = DirectLens(tuple(fit_direct(model, text, [stop], advance=advance)[0][0].map for stop in stops))
    return Bench(lensed(model, lens), np.split(ids, len(ids) // BATCH), text)


# Which tokens


@jax.jit
def _paid(
    block: Block, states: Hidden, looks: Int[Array, "2"]
) -> tuple[Float[Array, "windows heads tokens"], Float[Array, "windows tokens"], Float[Array, "windows tokens"]]:
    """Attention that tokens get of those from one place to before another, by head; norms of keys and values."""
    x, at = block.attention_norm(states), forced.places(states)
    q, (k, v) = block.place(block.q(x).reshape(*x.shape[:2], -1, block.config.head_dim), at), block.kv(states, at)
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    scores = jnp.einsum("nqgsd,ntgd->ngsqt", q, k) * block.scale
    slots = jnp.arange(states.shape[1])
    weights = jax.nn.softmax(jnp.where(slots[None, :] <= slots[:, None], scores, -1e30), axis=-1)
    looking = (slots >= looks[0]) & (slots < looks[1])
    got = jnp.where(looking[:, None], weights, 0).sum(axis=3).reshape(len(states), -1, len(slots))
    return got, norm(k.reshape(*k.shape[:2], -1)), norm(v.reshape(*v.shape[:2], -1))


@jax.jit
def _error(block: Block, states: Hidden, left: tuple[Heads, Heads]) -> Float[Array, "windows tokens"]:
    """By how much keys and values differ from the layer's own, relative to these."""
    own = block.kv(states, forced.places(states))
    apart = (norm(a - b) / norm(b).mean() for a, b in zip(left, own, strict=True))
    return jnp.stack([one.sum(axis=-1) for one in apart]).sum(axis=0)


def signals(
    bench: Bench, of: Seen, rare: Float[np.ndarray, " vocabulary"], rng: np.random.Generator
) -> dict[str, Values]:
    """By name what could be asked of tokens at the stop; the highest run on. Oracles look at what comes later."""
    blocks, stop = bench.network.blocks, STOP
    ids = np.asarray(of.tokens)
    observed, later = jnp.asarray([PROMPT - OBSERVED, PROMPT]), jnp.asarray([PROMPT - 1, PROMPT + SCORED])
    paid = [_paid(blocks[n], of.states[n], observed) for n in range(stop)]
    future = [_paid(blocks[n], of.states[n], later)[0] for n in range(stop, len(blocks))]
    _, keys, values = paid[-1]
    left = forced.left_by(bench.network, Direct(stop), stop, of)
    wrong = [
        _error(block, states, one) for block, states, one in zip(blocks[stop:], of.states[stop:-1], left, strict=True)
    ]
    before, after = of.states[stop - 1], of.states[stop]
    again = np.array([[token in row[:at] for at, token in enumerate(row)] for row in ids.tolist()])
    unsure = 1e-6 * rng.random(ids.shape)  # so that equal tokens are drawn among
    found: dict[str, Any] = {
        "random": rng.random(ids.shape),
        "the last ones": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
        "rarity": rare[ids] + unsure,
        "rarity, occurred before": rare[ids] + 3 * again + unsure,
        "rarity and recency": rare[ids] + np.arange(ids.shape[1]) / 128,
        "id of the token": ids + unsure,
        "drift of the last layer": norm(after - before) / norm(before),
        "turn of the last layer": angle(before, after),
        "norm of keys": keys,
        "norm of keys, lowest": -keys,
        "norm of values": values,
        "norm of values, lowest": -values,
        "attention received, last layer": paid[-1][0].mean(axis=1),
        "attention received, mean of layers": sum(one.mean(axis=1) for one, _, _ in paid),
        "attention received, largest head, mean of layers": sum(one.max(axis=1) for one, _, _ in paid),
        "attention received, value-weighted, mean of layers": sum(one.mean(axis=1) * v for one, _, v in paid),
        "error of the lens in the next layer": wrong[0],
        "error of the lens in all layers (oracle)": sum(wrong),
        "attention that will be paid (oracle)": sum(one.mean(axis=1) for one in future),
    }
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def which_tokens(bench: Bench) -> dict[str, Any]:
    """By share that runs on, the cost by what chooses it."""
    rare, rng, rule = bench.rarity, np.random.default_rng(0), Direct(STOP)
    dense, found = list[Losses](), dict[float, dict[str, list[Losses]]]()
    for of in bench.seen("which tokens"):
        dense.append(of.nll)
        left, shown = forced.left_by(bench.network, rule, STOP, of), signals(bench, of, rare, rng)
        for share in (0.0, *SHARES):
            for name, values in shown.items() if share else [("none", np.zeros(of.tokens.shape))]:
                rests = forced.but_highest(values, share, LAST)
                found.setdefault(share, {}).setdefault(name, []).append(forced.resting(bench.network, left, of, rests))
    rows = {share: round((1 - share) * (PROMPT - FIRST - LAST)) for share in found}
    return {
        str(share): {
            "flops_reduction": forced.saved(bench.model, rule, STOP, rows[share]),
            "by": forced.outcome(parts, dense),
        }
        for share, parts in found.items()
    }


def depths(bench: Bench) -> dict[str, Any]:
    """By stop, last tokens that run, and share of the others that does, the rarest: what it costs and saves."""
    rare, dense, found = bench.rarity, list[Losses](), dict[tuple[int, int, float], list[Losses]]()
    for of in bench.seen("how early"):
        dense.append(of.nll)
        values = rare[np.asarray(of.tokens)]
        for stop in STOPS:
            left = forced.left_by(bench.network, Direct(stop), stop, of)
            for last, share in product(LASTS, DEPTH_SHARES):
                lost = forced.resting(bench.network, left, of, forced.but_highest(values, share, last))
                found.setdefault((stop, last, share), []).append(lost)
    result: dict[str, Any] = {}
    for (stop, last, share), parts in found.items():
        rests = round((1 - share) * (PROMPT - FIRST - last))
        row = forced.outcome({"": parts}, dense)[""]
        row["flops_reduction"] = forced.saved(bench.model, Direct(stop), stop, rests)
        result[f"{stop}, {last}, {share}"] = {"stop": stop, "last": last, "share": share, **row}
    return result


# What else a token could do


@jax.jit
def _attended(block: Block, states: Hidden) -> tuple[Hidden, Hidden]:
    """States after the attention half, and the feed-forward's update to them."""
    at = forced.places(states)
    middle = states + block.attend(states, at, (new_segment(*block.kv(states, at)),))
    return middle, block.mlp(middle)


def _linear(x: Float[Array, "rows inputs"], y: Float[Array, "rows outputs"]) -> tuple[Array, Array]:
    """Ridge regression, constant apart."""
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    a, b = x - mean_x, y - mean_y
    square = np.asarray(a.T @ a, np.float64)
    kernel = np.linalg.solve(square + PENALTY * np.trace(square) / len(square) * np.eye(len(square)), a.T @ b)
    kernel = jnp.asarray(kernel, jnp.float32)
    return kernel, mean_y - mean_x @ kernel


@jax.jit
def _half(block: Block, states: Hidden, rests: Array, kernel: Array, bias: Array) -> Hidden:
    """A layer in which those that rest attend, and take the feed-forward's update from a linear map."""
    middle, update = _attended(block, states)
    return middle + jnp.where(rests[..., None], normal(middle, STATE_EPSILON) @ kernel + bias, update)


def half_maps(bench: Bench, stop: int) -> list[tuple[Array, Array]]:
    """A map for every layer from the stop on but the last, fitted on those that rest, with the maps before it."""
    windows = [bench.fitted_on[at : at + BATCH] for at in range(0, MAP_WINDOWS, BATCH)]
    states = [forced.seen(bench.network, ids).states[stop] for ids in windows]
    rests = jnp.asarray(forced.all_but(LAST, BATCH))
    maps = []
    for block in bench.network.blocks[stop:-1]:
        halves = [_attended(block, one) for one in states]
        x, y = (jnp.concatenate([one[rests] for one in part]) for part in zip(*halves, strict=True))
        kernel, bias = _linear(normal(x, STATE_EPSILON), y)
        maps.append((kernel, bias))
        states = [_half(block, one, rests, kernel, bias) for one in states]
    return maps


def halves(bench: Bench) -> dict[str, Any]:
    """Tokens that attend on in all layers, but run no feed-forward after so many."""
    network = bench.network
    maps = {stop: half_maps(bench, stop) for stop in HALVES}
    dense, found = list[Losses](), dict[str, list[Losses]]()
    for of in bench.seen("half skips"):
        dense.append(of.nll)
        rests = jnp.asarray(forced.all_but(LAST, len(of.nll)))
        for stop, of_stop in maps.items():
            states = of.states[stop]
            for block, (kernel, bias) in zip(network.blocks[stop:-1], of_stop, strict=True):
                states = _half(block, states, rests, kernel, bias)
            last = forced.layer(network.blocks[-1], states)
            found.setdefault(str(stop), []).append(np.asarray(forced.losses(network, last, of.tokens)))
    result: dict[str, Any] = forced.outcome(found, dense)
    block, width = network.blocks[0], bench.model.config.hidden_size
    attends = sum(2 * part.kernel.get_value().size for part in (block.q, block.k, block.v, block.o))
    feed_forward = Costs.of(network).layers[0].flops - attends
    rests, dense_flops = PROMPT - FIRST - LAST, forced.dense_flops(bench.model)
    for stop, row in result.items():
        layers = len(network.blocks) - 1 - int(stop)
        row["flops_reduction"] = rests * layers * (feed_forward - 2 * width**2) / dense_flops
    return result


# Generated tokens


def exits(bench: Bench) -> dict[str, Any]:
    """Generated tokens that leave after so many layers, their next token from a linear map to the final state: the
    surest, as many at random, and an oracle's, which the dense model would have told nearest to the lens. Deeper
    layers see what their projections make of its last state.

    Thresholds are placed on the windows themselves, and what it takes to know (the map, and the head for every token)
    is not counted: no policy could save more.
    """
    network, depth = bench.network, bench.model.config.num_hidden_layers
    windows = [bench.fitted_on[at : at + BATCH] for at in range(0, MAP_WINDOWS, BATCH)]
    counted, shown = slice(FIRST, None), list[dict[int, Hidden]]()  # sinks would rule the fit
    for ids in windows:
        states = forced.seen(network, ids).states
        shown.append({n: states[n][:, counted].reshape(-1, states[n].shape[-1]) for n in (*EXITS, depth)})
    flat = {n: jnp.concatenate([one[n] for one in shown]) for n in shown[0]}
    maps = {stop: _linear(normal(flat[stop], STATE_EPSILON), flat[depth]) for stop in EXITS}
    rng, dense, found = np.random.default_rng(0), list[Losses](), dict[str, list[Losses]]()
    agreed: dict[str, list[float]] = {}
    for of in bench.seen("exits"):
        dense.append(of.nll)
        for stop, (kernel, bias) in maps.items():
            left = forced.left_by(network, Frozen(), stop, of)
            early = normal(of.states[stop], STATE_EPSILON) @ kernel + bias
            lost, margin, apart, same = (np.array(p) for p in _leaving(network, early, of.states[-1], of.tokens))
            ways = {"surest": margin, "random": rng.random(margin.shape), "oracle": -apart}
            for way, values in ways.items():
                values[:, 0] = -np.inf  # the prompt's last, which decides on the first scored one
                order = np.sort(values[:, 1:].ravel())[::-1]
                for share in EXIT_SHARES:
                    leaves = values >= order[round(share * order.size) - 1]
                    rests = np.zeros(of.tokens.shape, bool)
                    rests[:, PROMPT - 1 : -1] = leaves
                    others = forced.resting(network, left, of, rests)
                    name = f"{stop} {way} {share}"
                    found.setdefault(name, []).append(np.where(leaves, lost, others))
                    agreed.setdefault(name, []).append(float(same[leaves].mean()))
    result: dict[str, Any] = forced.outcome(found, dense)
    for name, row in result.items():
        stop, way, share = name.split()
        saved = float(share) * (depth - int(stop)) / depth
        row |= {"stop": int(stop), "way": way, "share": float(share), "layers_saved": saved}
        row["same_token"] = float(np.mean(agreed[name]))
    return result


@jax.jit
def _leaving(model: CausalLM, early: Hidden, final: Hidden, tokens: forced.Tokens) -> tuple[Array, ...]:
    """Of scored tokens: what they cost early, the margin between the two likeliest, the KL divergence from the dense
    model's next token, and whether the likeliest is the same."""
    logits = [model.head(states[:, PROMPT - 1 : -1]) for states in (early, final)]
    found, right = (jax.nn.log_softmax(one, axis=-1) for one in logits)
    two = jax.lax.top_k(found, 2)[0]
    lost = -jnp.take_along_axis(found, tokens[:, PROMPT:, None], axis=-1)[..., 0]
    apart = (jnp.exp(right) * (right - found)).sum(axis=-1)
    return lost, two[..., 0] - two[..., 1], apart, found.argmax(axis=-1) == right.argmax(axis=-1)


MADE: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "tokens": which_tokens, "depths": depths, "halves": halves, "exits": exits,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=tuple(MADE), action="append", help="this part alone; others stay as stored")
    parser.add_argument("--windows", type=int, default=96, help="to look at")
    parser.add_argument("--tokens", type=int, default=DIRECT_LENS_TOKENS, help="most to fit lenses on")
    parser.add_argument("--lens", type=Path, help="this direct lens, for tokens alone; its results are kept apart")
    parser.add_argument("--report", action="store_true", help="write the tables, run nothing")
    asked = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    with reporting_errors(debug=True):
        result = read_result(NAME)
        if asked.report:
            write_resting(result)
            return
        asked.only = ["tokens"] if asked.lens else asked.only or list(MADE)
        bench = prepared(asked)
        for part in asked.only:
            name = f"{part}, tuned" if asked.lens else part
            result[name] = {**stamp(), **MADE[part](bench)}
            print(json.dumps(result[name], indent=1), flush=True)
            print(write_result(NAME, result))


if __name__ == "__main__":
    main()
