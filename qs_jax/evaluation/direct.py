"""Fitting the direct lens in closed form: one ridge regression of low rank for all layers that a token skips, whose
errors weigh what they change for those who read (`reading.py`)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.linalg import eigh

from qs_jax.errors import EvaluationError
from qs_jax.evaluation.lens import PENALTIES, Advance, counted_tokens, is_held_out
from qs_jax.evaluation.reading import Units, units
from qs_jax.fitting.activations import batches, embedded, run_all
from qs_jax.generation import not_finite
from qs_jax.lens import DirectMap
from qs_jax.model import Model
from qs_jax.models.base import Block, Hidden
from qs_jax.models.layers import STATE_EPSILON, normal

_LOOKED_BACK = (0.25, 0.5)
"""Of the way to the stop: where a state may be set aside, one of them."""

_SOME = 8
"""Of so many outputs one is looked at when inputs and penalty are chosen."""

Rows = Float[np.ndarray, "rows _"]


@dataclass(frozen=True)
class DirectFit:
    """A map, and by layer the share of the variance of its keys and values that it explains on held-out windows, in the
    units in which they were fitted; the same over all layers by what it might have been made of: (0, 8, 18) for the
    states after so many layers; and the map of the state at the stop `alone`, which shows what looking back brings."""

    map: DirectMap
    explained: list[float]
    by_inputs: dict[tuple[int, ...], float]
    alone: DirectMap


class _Moments:
    """Sums over tokens of products, in float64: of inputs with a constant (the last one), and with outputs."""

    def __init__(self, inputs: int, outputs: int):
        self.count = 0
        self.xx = np.zeros((inputs + 1, inputs + 1))
        self.xy = np.zeros((inputs + 1, outputs))
        self.yy = np.zeros(outputs)

    def see(self, x: Rows) -> None:
        self.count += len(x)
        self.xx += x.T @ x

    def see_outputs(self, x: Rows, y: Rows, at: slice) -> None:
        self.xy[:, at] += x.T @ y
        self.yy[at] += np.square(y, dtype=np.float64).sum(0)

    def __add__(self, other: "_Moments") -> "_Moments":
        total = _Moments(0, 0)
        total.count = self.count + other.count
        total.xx, total.xy, total.yy = self.xx + other.xx, self.xy + other.xy, self.yy + other.yy
        return total

    def of(self, places: Int[np.ndarray, " inputs"], every: int = 1) -> "_Moments":
        """Those of some inputs alone, the constant among them, and of every so many outputs."""
        part = _Moments(0, 0)
        part.count, part.yy = self.count, self.yy[::every]
        part.xx, part.xy = self.xx[np.ix_(places, places)], self.xy[places, ::every]
        return part

    def errors(self, kernel: Float[np.ndarray, "outputs inputs"]) -> Float[np.ndarray, " outputs"]:
        """Summed squared errors of predictions, constant included."""
        return self.yy - 2 * (kernel.T * self.xy).sum(0) + ((kernel @ self.xx) * kernel).sum(1)

    @property
    def variances(self) -> Float[np.ndarray, " outputs"]:
        """Summed squared differences from the mean."""
        return self.yy - np.square(self.xy[-1]) / self.count


@dataclass(frozen=True)
class Seen:
    """Of the dense model over some windows: states after so many layers, and those after the last one of the last
    tokens of every window."""

    tokens: Int[Array, "windows tokens"]
    states: Mapping[int, Float[Array, "windows tokens hidden"]]
    final: Float[Array, "windows last hidden"]


def fit_direct(
    model: Model,
    windows: Int[np.ndarray, "windows tokens"],
    stops: Sequence[int],
    *,
    rank: int | None = None,
    last: int = 0,
    advance: Advance = lambda n=1: None,
) -> tuple[list[DirectFit], Seen]:
    """The direct lens's maps for prompt tokens that stop after so many layers, and what was seen on the way.

    Args:
        model: what `qs_jax.load` returned.
        windows: token ids; not of any text that a policy is tested on.
        stops: after how many layers, rising.
        rank: numbers kept of a token; by default the hidden size, which makes a skipped layer cost about a twelfth of
            a run one.
        last: of how many tokens at the end of each window to keep the final states.
        advance: called after every layer.

    A map is made of the state at its stop, the embedding and one state between, the one that predicts best on held-out
    windows. Errors count by what they change in the residual stream of those who read. Memory holds the states of all
    windows several times.

    Raises:
        EvaluationError: fewer than two windows, a stop or a rank out of range, or states that are not finite.
    """
    hidden, depth = model.config.hidden_size, model.config.num_hidden_layers
    rank = hidden if rank is None else rank
    if not 1 <= rank <= hidden:
        raise EvaluationError(f"rank is {rank}, expected a whole number from 1 to {hidden}")
    for stop in stops:
        if not 1 <= stop < depth:
            raise EvaluationError(f"a stop after {stop} layers is none of {model.name}: 1 to {depth - 1}")
    if len(windows) < 2:
        raise EvaluationError("the text is too short to fit a lens on; give more of it")
    look_back = {stop: states_of(stop) for stop in stops}
    seen, moments, measures = _look(model, windows, look_back, last, advance)
    behind = {stop: [measures[layer] for layer in range(stop, depth)] for stop in stops}
    fits = [_best(moments[stop], inputs, behind[stop], rank) for stop, inputs in look_back.items()]
    return fits, seen


def states_of(stop: int) -> tuple[int, ...]:
    """After how many layers states may be of use to a stop: at the embedding, on the way, there."""
    return tuple(sorted({0, *(round(share * stop) for share in _LOOKED_BACK), stop}))


def _best(parts: "_Parts", inputs: tuple[int, ...], measures: Sequence[Units], rank: int) -> DirectFit:
    """The map of a stop, its inputs and its penalty chosen on held-out windows, then fitted to all; in the units of the
    layers that it stands for."""
    used, kept = parts
    stop, hidden = inputs[-1], (len(used.xx) - 1) // len(inputs)
    middle = [()] if len(inputs) < 3 else [(), *((layer,) for layer in inputs[1:-1])]
    places = {chosen: _places(chosen, inputs, hidden) for chosen in [(stop,), *((0, *m, stop) for m in middle)]}
    scores: dict[tuple[int, ...], tuple[float, float]] = {}
    for chosen, at in places.items():
        scores[chosen] = max(
            (_explained(used.of(at, _SOME), kept.of(at, _SOME), penalty), penalty) for penalty in PENALTIES
        )
    best = max(scores, key=lambda chosen: scores[chosen][0])
    at, penalty = places[best], scores[best][1]
    down, up, bias = _reduced(used.of(at), penalty, rank)
    errors = kept.of(at).errors(np.concatenate([up @ down, bias[:, None]], axis=1))
    by_layer = (part.reshape(len(measures), -1).sum(axis=1) for part in (errors, kept.variances))

    def whole(chosen: tuple[int, ...]) -> DirectMap:
        found = _reduced((used + kept).of(places[chosen]), scores[chosen][1], rank)
        down, up, bias = (part.astype(np.float32) for part in found)
        layers = zip(measures, np.split(up, len(measures)), np.split(bias, len(measures)), strict=True)
        made = [(one.undo(part.T).T, one.undo(offset[None])[0]) for one, part, offset in layers]
        return DirectMap(chosen, down, *(np.stack(arrays) for arrays in zip(*made, strict=True)))

    return DirectFit(
        map=whole(best),
        explained=(1 - np.divide(*by_layer)).tolist(),
        by_inputs={chosen: explained for chosen, (explained, _) in scores.items()},
        alone=whole((stop,)),
    )


def _places(inputs: tuple[int, ...], among: tuple[int, ...], hidden: int) -> Int[np.ndarray, " inputs"]:
    """Where the states of `inputs` stand, and the constant."""
    parts = [np.arange(hidden) + among.index(layer) * hidden for layer in inputs]
    return np.concatenate([*parts, [len(among) * hidden]])


_Parts = tuple[_Moments, _Moments]
"""Of windows to fit on, and of those held out."""


def _look(
    model: Model,
    windows: Int[np.ndarray, "windows tokens"],
    look_back: Mapping[int, tuple[int, ...]],
    last: int,
    advance: Advance,
) -> tuple[Seen, dict[int, _Parts], dict[int, Units]]:
    """Run the windows layer by layer: by stop, the moments of normalised states after so many layers with the keys and
    values of all layers behind it, each in its layer's units; and these, by layer."""
    config, counted = model.config, counted_tokens(model, windows)
    features = 2 * config.num_key_value_heads * config.head_dim
    held_out = [is_held_out(row, len(windows)) for row in range(len(windows))]
    wanted, tokens = {layer for inputs in look_back.values() for layer in inputs}, jnp.asarray(windows, jnp.int32)
    states, kept = embedded(model.network, tokens), dict[int, Hidden]()
    x: dict[int, list[Rows]] = {}
    moments: dict[int, _Parts] = {}
    measures: dict[int, Units] = {}
    for number, block in enumerate(model.network.blocks):
        if number in wanted:
            kept[number] = states
        if number in look_back:
            inputs = look_back[number]
            x[number] = [_inputs([kept[n][row] for n in inputs], chosen) for row, chosen in enumerate(counted)]
            size = len(inputs) * config.hidden_size, (config.num_hidden_layers - number) * features
            moments[number] = _Moments(*size), _Moments(*size)
            for row, rows in enumerate(x[number]):
                moments[number][held_out[row]].see(rows)
        if x:
            measures[number] = units(block, states)
        for row, y in enumerate(_outputs(block, states, counted, measures[number]) if x else ()):
            for stop, inputs in x.items():
                at = slice((number - stop) * features, (number - stop + 1) * features)
                moments[stop][held_out[row]].see_outputs(inputs[row], y, at)
        states = run_all(block, states)
        if not jnp.isfinite(states).all():
            raise EvaluationError(not_finite(model))
        advance()
    return Seen(tokens, kept, states[:, states.shape[1] - last :]), moments, measures


def _inputs(states: Sequence[Float[Array, "tokens hidden"]], counted: Bool[np.ndarray, " tokens"]) -> Rows:
    """Of one window, each state at a mean square of 1, and a constant."""
    parts = [np.asarray(normal(state, STATE_EPSILON), np.float32)[counted] for state in states]
    return np.concatenate([*parts, np.ones((int(counted.sum()), 1), np.float32)], axis=1)


def _outputs(
    block: Block, states: Hidden, counted: Bool[np.ndarray, "windows tokens"], measure: Units
) -> Iterator[Rows]:
    """Keys, without positions, and values of a layer in its units, window by window."""
    row = 0
    for batch in batches(states):
        for features in np.asarray(_features(block, batch), np.float32):
            yield measure.of(features[counted[row]])
            row += 1


@jax.jit
def _features(block: Block, states: Hidden) -> Float[Array, "windows tokens features"]:
    return jnp.concatenate(block.kv_features(states), axis=-1)


def _ridge(moments: _Moments, penalty: float) -> Float[np.ndarray, "inputs inputs"]:
    """The inputs' products, with a penalty on all but the constant: a share of their mean square."""
    diagonal = np.full(len(moments.xx), penalty * np.trace(moments.xx[:-1, :-1]) / (len(moments.xx) - 1))
    diagonal[-1] = 0
    return moments.xx + np.diag(diagonal)


def _explained(used: _Moments, kept: _Moments, penalty: float) -> float:
    """The share of the variance of all outputs that the full solution explains on held-out windows."""
    kernel = np.linalg.solve(_ridge(used, penalty), used.xy).T
    return float(1 - kept.errors(kernel).sum() / kept.variances.sum())


def _reduced(moments: _Moments, penalty: float, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reduced-rank ridge regression (Izenman 1975): down, up and bias.

    Of all maps of a rank the one whose predictions err least: the ridge solution, projected on the leading directions
    of what it predicts. Means are taken out first, so that the constant does not count as one.
    """
    mean_x, mean_y = moments.xx[-1, :-1] / moments.count, moments.xy[-1] / moments.count
    whole = _ridge(moments, penalty)[:-1, :-1] - moments.count * np.outer(mean_x, mean_x)
    cross = moments.xy[:-1] - moments.count * np.outer(mean_x, mean_y)
    values, vectors = eigh(whole)
    white = vectors / np.sqrt(np.maximum(values, values[-1] * 1e-12))
    halfway = white.T @ cross
    _, left = eigh(halfway @ halfway.T)
    leading = left[:, ::-1][:, :rank]
    unit = np.sqrt(moments.count)  # of what is kept of a token, so that it has a variance of 1
    down, up = (white @ leading).T * unit, (halfway.T @ leading) / unit
    return down, up, mean_y - up @ (down @ mean_x)
