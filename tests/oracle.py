"""The oracle: the whole adaptive decoder, slowly, in numpy float64, one row and one token at a time.

Written from docs/design.md and the docstrings of `qs_jax.adaptive.policy`, not from the engine: nothing here is
padded, batched, gathered or masked. A token either does something or it does not; the cache is a list of slots per
layer; what a token may see is what stands before it in the text.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qs_jax.adaptive.policy import Fusion, Halting, Policy
from qs_jax.config import ModelConfig
from tests.oracle_model import Arrays, Network, Slot

Uniform = Callable[[int, int, int], float]
"""(place, token id, layer) to a number from 0 to 1: the random signal's source is given, everything else computed."""


@dataclass
class Token:
    """A token on its way down; `position` is what the model is told, `place` where it stands in the text."""

    place: int
    id: int
    position: int
    state: np.ndarray
    protected: bool
    size: int = 1
    embedded: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass
class Step:
    """A generated token: what it cost to choose it, and how many slots each layer holds after that."""

    token: int
    logprob: float
    layers_run: int
    bits_read: int
    signal: float
    logits: np.ndarray
    slots: list[int]


@dataclass
class Outcome:
    """All that one row did. `margin` is how close any decision came to going the other way, relative to its
    threshold (for a choice of token: the gap between the two best logits). `observed` are the values that were
    compared with each kind of threshold, so that tests can put thresholds among them."""

    prompt_layers_run: list[int]
    fused_with: list[int]
    prompt_signal: list[float]
    prompt_slots: list[int]
    steps: list[Step] = field(default_factory=list)
    margin: float = math.inf
    observed: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass
class _Pass:
    """A layer's input, attention update and output for one token: what signals look at."""

    before: np.ndarray
    update: np.ndarray
    after: np.ndarray


class Decoder:
    """One row. `kernels` are the weights at 8 bits and, where the policy asks for them, at 4 and 2.

    `piece` is how many prompt tokens go through the layers together: fusion looks no further. `whole` are the bits of a
    weight where no fewer are asked for.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Mapping[int, Arrays],
        policy: Policy,
        uniform: Uniform,
        *,
        special_ids: Sequence[int] = (),
        piece: int = 1024,
        whole: int = 8,
    ):
        self.whole = whole
        self.config, self.policy, self.uniform, self.piece = config, policy, uniform, piece
        self.networks = {bits: Network(config, arrays) for bits, arrays in kernels.items()}
        self.special = set(special_ids) if policy.protect_special else set()
        if policy.protect_rare is not None:
            rarity = self.networks[8].arrays["rarity"]
            self.special |= {*np.flatnonzero(rarity >= policy.protect_rare).tolist()}
        self.depth = config.num_hidden_layers
        self.cache: list[list[Slot]] = [[] for _ in range(self.depth)]
        self.margin = math.inf
        self.observed: defaultdict[str, list[float]] = defaultdict(list)

    def run(self, prompt: Sequence[int], new_tokens: int, forced: Sequence[int] = ()) -> Outcome:
        """Read the prompt, then choose (or take from `forced`) as many tokens as asked for."""
        outcome = Outcome([self.depth] * len(prompt), [-1] * len(prompt), [0.0] * len(prompt), [])
        state = np.empty(0)
        for start in range(0, len(prompt), self.piece):
            state = self._read(prompt, start, outcome)
        outcome.prompt_slots = self._slots()
        logits = self.networks[8].logits(state)
        layers_run, bits_read, signal = self.depth, 0, 0.0
        for number in range(new_tokens):
            token = forced[number] if forced else self._best(logits)
            logprob = float(logits[token] - _log_sum_exp(logits))
            outcome.steps.append(Step(token, logprob, layers_run, bits_read, signal, logits, self._slots()))
            if number + 1 < new_tokens:
                state, layers_run, bits_read, signal = self._decode(token, len(prompt) + number, entropy(logits))
                logits = self.networks[8].logits(state)
        outcome.margin, outcome.observed = self.margin, self.observed
        return outcome

    def rounds(
        self, prompt: Sequence[int], new_tokens: int, propose: Callable[[list[int]], list[int]]
    ) -> tuple[list[int], list[int]]:
        """The same text in rounds of exact mode, the policy off: tokens, and how many drafts of each round were right.

        Drafts of a text, by `propose`, are run before it is known what they are worth; slots of wrong ones are cut off.
        """
        outcome = Outcome([self.depth] * len(prompt), [-1] * len(prompt), [0.0] * len(prompt), [])
        tokens, accepted = [self._best(self.networks[8].logits(self._read(prompt, 0, outcome)))], []
        while len(tokens) < new_tokens:
            text = [*prompt, *tokens]
            drafts, chosen, kept = propose(text), [], len(text)
            for ahead, token in enumerate([text[-1], *drafts]):
                state, *_ = self._decode(token, len(text) - 1 + ahead, 0.0)
                chosen.append(self.networks[8].logits(state))
            right = 0
            while right < len(drafts) and int(chosen[right].argmax()) == drafts[right]:
                right += 1
            for slots in self.cache:
                del slots[kept + right :]
            new = [self._best(logits) for logits in chosen[: right + 1]][: new_tokens - len(tokens)]
            tokens += new
            accepted.append(min(right, len(new)))
        return tokens, accepted

    def _slots(self) -> list[int]:
        return [len(slots) for slots in self.cache]

    def _best(self, logits: np.ndarray) -> int:
        second, first = np.sort(logits)[-2:]
        self.margin = min(self.margin, float(first - second))
        return int(logits.argmax())

    # The prompt: all of a piece's tokens go through a layer before any goes through the next.

    def _read(self, prompt: Sequence[int], start: int, outcome: Outcome) -> np.ndarray:
        """A piece of the prompt through all layers; the state of its last token, if it is the prompt's."""
        policy, network = self.policy, self.networks[8]
        going, resting = [], []
        for place in range(start, min(start + self.piece, len(prompt))):
            ends = place < policy.protect_first or place >= len(prompt) - policy.protect_last
            protected = ends or prompt[place] in self.special
            state = network.embed(prompt[place], place)
            going.append(Token(place, prompt[place], place, state, protected, embedded=state))
        for layer in range(self.depth):
            passes = self._layer(layer, going, resting)
            after = layer + 1
            if after == self.depth:
                break
            halted = self._halted(going, passes, after, outcome)
            absorbed = self._fused(going, halted, after, outcome)
            for place in halted:
                outcome.prompt_layers_run[place] = after
            for token in going:
                if token.place in halted and policy.kv_rule == "direct":
                    token.state = network.latent([token.embedded, token.state])
            resting += [token for token in going if token.place in halted]
            going = [token for token in going if token.place not in halted | absorbed]
        return going[-1].state if start + self.piece >= len(prompt) else np.empty(0)

    def _layer(self, layer: int, going: list[Token], resting: list[Token]) -> list[_Pass]:
        """A layer for every token of the piece; returns what those that are going showed."""
        network, rule = self.networks[8], self.policy.kv_rule
        lower = self.networks[self._bits_at(layer, 8, halted=True)] if rule == "shallow" else network
        for token in going:
            self._leave(layer, token, *network.kv(layer, token.state, token.position))
        if rule != "drop":
            for token in resting:
                if rule == "direct":
                    k, v = network.direct_kv(layer - self._stop, token.state, token.position)
                else:
                    k, v = lower.kv(layer, token.state, token.position)
                zero = rule == "zero"
                self._leave(layer, token, *((np.zeros_like(k), np.zeros_like(v)) if zero else (k, v)))
        passes = [self._pass(network, layer, token) for token in going]
        if rule == "shallow":
            after = [self._pass(lower, layer, token).after for token in resting]
            for token, state in zip(resting, after, strict=True):
                token.state = state
        if rule == "affine":
            for token in resting:
                token.state = network.shortcut(layer, token.state)
        for token, seen in zip(going, passes, strict=True):
            token.state = seen.after
        return passes

    @property
    def _stop(self) -> int:
        """After which layer prompt tokens halt, where there is one."""
        halting = self.policy.prompt_halting
        assert halting is not None
        assert halting.layers is not None
        return halting.layers[0]

    def _leave(self, layer: int, token: Token, key: np.ndarray, value: np.ndarray) -> None:
        fusion = self.policy.fusion
        bias = math.log(token.size) if fusion is not None and fusion.size_bias else 0.0
        self.cache[layer].append(Slot(token.place, key, value, bias))

    def _pass(self, network: Network, layer: int, token: Token) -> _Pass:
        visible = [slot for slot in self.cache[layer] if slot.place <= token.place]
        update = network.attend(layer, token.state, token.position, visible)
        middle = token.state + update
        return _Pass(token.state, update, middle + network.mlp(layer, middle))

    def _halted(self, going: list[Token], passes: list[_Pass], after: int, outcome: Outcome) -> set[int]:
        """Places of the tokens that halt after so many layers."""
        halting = self.policy.prompt_halting
        threshold = _threshold(halting, after, self.depth)
        if halting is None or threshold is None:
            return set()
        halted = set()
        for token, seen in zip(going, passes, strict=True):
            value = self._value(halting.signal, token, seen, after, None)
            outcome.prompt_signal[token.place] = value
            if self._halts(halting, value, threshold, token, seen, after, None):
                halted.add(token.place)
        return halted

    def _fused(self, going: list[Token], halted: set[int], after: int, outcome: Outcome) -> set[int]:
        """Merge pairs, left to right; places of the tokens that are no more."""
        fusion = self.policy.fusion
        threshold = _threshold(fusion, after, self.depth)
        if fusion is None or threshold is None:
            return set()
        absorbed, before = set(), [(token.state, token.position, token.size) for token in going]
        for index in range(1, len(going)):
            left, right = going[index - 1], going[index]
            free = not any(token.protected or token.place in halted for token in (left, right))
            (a, p, m), (b, q, n) = before[index - 1], before[index]
            distance = 1 - _cosine(a, b) if fusion.distance == "cosine" else float(np.linalg.norm(a - b))
            left_is_fused = index > 1 and going[index - 2].place in absorbed
            if free and self._below("fuse", distance, threshold) and not left_is_fused:
                absorbed.add(left.place)
                right.state, right.size = (m * a + n * b) / (m + n), m + n
                right.position = {"last": q, "first": p, "mean": (m * p + n * q) // (m + n)}[fusion.position]
                outcome.fused_with[left.place], outcome.prompt_layers_run[left.place] = right.place, after
        return absorbed

    # Decoding: one token at a time, all the way down.

    def _decode(self, id: int, place: int, previous: float) -> tuple[np.ndarray, int, int, float]:
        """Run a token; its last state, layers run, bits read over those layers, and last signal."""
        policy = self.policy
        protected = place < policy.protect_first or id in self.special
        token = Token(place, id, place, self.networks[8].embed(id, place), protected)
        halted, layers_run, bits_read, signal = False, 0, 0, 0.0
        bits = self._bits(token, None, previous)
        shallow = policy.kv_rule == "shallow"
        for layer in range(self.depth):
            at = self._bits_at(layer, bits, halted=halted)
            network, after = self.networks[at], layer + 1
            if halted and not shallow:
                if policy.kv_rule != "drop":
                    k, v = network.kv(layer, token.state, place)
                    zero = policy.kv_rule == "zero"
                    self._leave(layer, token, *((np.zeros_like(k), np.zeros_like(v)) if zero else (k, v)))
                if policy.kv_rule == "affine":
                    token.state = network.shortcut(layer, token.state)
                continue
            self._leave(layer, token, *network.kv(layer, token.state, place))
            seen = self._pass(network, layer, token)
            token.state = seen.after
            layers_run, bits_read = layers_run + 1, bits_read + (self.whole if at == 8 else at)
            if halted:
                continue
            precision = policy.precision
            if precision is not None and precision.signal == "entropy" and after == self._first_adapted:
                bits = self._bits(token, seen, previous)
            halting, threshold = policy.decode_halting, _threshold(policy.decode_halting, after, self.depth)
            if halting is not None and threshold is not None:
                signal = self._value(halting.signal, token, seen, after, previous)
                halted = self._halts(halting, signal, threshold, token, seen, after, previous)
        return token.state, layers_run, bits_read, signal

    @property
    def _first_adapted(self) -> int:
        precision = self.policy.precision
        assert precision is not None
        return self.depth // 2 if precision.layer is None else precision.layer

    def _bits(self, token: Token, seen: _Pass | None, previous: float) -> int:
        """The precision a token has earned: before the first layer (nothing seen), or by the entropy it shows."""
        precision = self.policy.precision
        if precision is None or token.protected or (seen is None and precision.signal == "entropy"):
            return 8
        if seen is not None:
            value = self._lens(seen.after)
        elif precision.signal == "random":
            value = self.uniform(token.place, token.id, 0)
        else:
            value = previous
        if self._below("two_bits", value, precision.two_below):
            return 2
        return 4 if self._below("four_bits", value, precision.four_below) else 8

    def _bits_at(self, layer: int, bits: int, *, halted: bool) -> int:
        """At what precision a layer is read."""
        policy, precision = self.policy, self.policy.precision
        pinned = precision is not None and layer in [n % self.depth for n in precision.pinned]
        own = bits if precision is not None and layer >= self._first_adapted and not pinned else 8
        return min(bits, policy.shallow_bits) if halted and not pinned and policy.kv_rule == "shallow" else own

    # Signals and rules.

    def _value(self, name: str, token: Token, seen: _Pass, after: int, previous: float | None) -> float:
        before = float(np.linalg.norm(seen.before))
        if name == "entropy":
            return self._lens(seen.after)
        if name == "previous_entropy":
            assert previous is not None
            return previous
        if name == "random":
            return self.uniform(token.place, token.id, after)
        if name == "attention_update":
            return float(np.linalg.norm(seen.update)) / before
        if name == "direction_drift":
            return 1 - _cosine(seen.before, seen.after)
        drift = float(np.linalg.norm(seen.after - seen.before))
        return {"raw_drift": drift, "relative_drift": drift / before}[name]

    def _halts(
        self,
        halting: Halting,
        value: float,
        threshold: float,
        token: Token,
        seen: _Pass,
        after: int,
        previous: float | None,
    ) -> bool:
        if token.protected:
            return False
        when = "prompt" if previous is None else "decode"
        low = self._below(f"{when}_halt", value, threshold)
        if halting.entropy_below is None:
            return low
        doubt = self._value(halting.entropy_source, token, seen, after, previous)
        return self._below(f"{when}_entropy", doubt, halting.entropy_below) and low

    def _below(self, kind: str, value: float, threshold: float) -> bool:
        self.observed[kind].append(value)
        if 0 < threshold < math.inf:
            self.margin = min(self.margin, abs(value - threshold) / threshold)
        return value < threshold

    def _lens(self, state: np.ndarray) -> float:
        return entropy(self.networks[8].logits(state)[: self.policy.probe.shortlist or None])


def entropy(logits: np.ndarray) -> float:
    """Of softmax(logits), in bits."""
    logprobs = logits - _log_sum_exp(logits)
    return float(-(np.exp(logprobs) * logprobs).sum() / math.log(2))


def _threshold(mechanism: Halting | Fusion | None, after: int, depth: int) -> float | None:
    """The mechanism's threshold after so many layers; None where it does not act."""
    if mechanism is None:
        return None
    layers = mechanism.layers
    if layers is None:
        first = min(max(1, round(mechanism.start * depth)), max(1, depth - 1))
        layers = tuple(range(first, depth, mechanism.step))
    if after not in layers:
        return None
    values = mechanism.thresholds
    return values[layers.index(after)] if isinstance(values, tuple) else values


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _log_sum_exp(logits: np.ndarray) -> float:
    return float(logits.max() + np.log(np.exp(logits - logits.max()).sum()))
