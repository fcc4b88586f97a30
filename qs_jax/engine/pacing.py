"""When to draft, and how much: what the host finds out while a request runs.

Whether text could have been looked up shows as soon as it is there, whoever decoded it: the host replays it as rounds
would have gone (`Replay`), which costs next to nothing and no pass of the model. A round is tried where that promises a
gain, and gone on with where its measured time keeps the promise. So text that does not draft well is decoded by plain
steps, at the cost of the replay.

A round of another size is another program. It is compiled once it would have saved a share of the time that compiling
takes: were it the whole time, both together would be at most twice what would have been best, had one known what comes
(ski rental; Karlin et al., 1988). It is less, as programs stay: in memory for the next request, on disk for the next
process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Int

from qs_jax.engine.compilation import CompileMeter
from qs_jax.engine.decode import Chosen
from qs_jax.engine.drafts import LONGEST
from qs_jax.engine.exact import Draft, Round
from qs_jax.models.base import CausalLM

_MEMORY = 0.75
"""How much what was seen weighs after as many tokens as a chunk has."""

_WORTH = 0.95
"""Rounds are gone on with where a token takes at most this share of a plain step's time."""

_HOPED = 0.15
"""What a draft adds to the time of a round, as a share of a step's, before any was measured: little, as where reading
weights takes all the time."""

_STAKE = 0.02
"""What share of the time of plain steps may be lost on rounds before any text was seen."""

_EARNED = 0.25
"""The share of compiling a program that it must have missed saving."""

ROUNDS = 4
"""Of a chunk."""

Shape = tuple[int, bool, bool]
"""What times depend on beside the model and the number of drafts: rows held, and whether they sample and penalise."""

_FEWEST_TIMES = 2
_MOST_TIMES = 5


@dataclass(frozen=True)
class Drafting:
    """How a request drafts: what proposes, in how many drafts a round, and whether only where it pays.

    `counts` are the numbers to choose among while the text is made; without `adapts` the first one is used throughout.
    With it, `draft` must look text up: it is what can be foretold.
    """

    draft: Draft
    counts: tuple[int, ...]
    adapts: bool = False


class TextIndex:
    """A text, and where its last tokens occurred before: what `Lookup` finds, token by token and on the host."""

    def __init__(self, tokens: Sequence[int], longest: int = LONGEST):
        self._tokens: list[int] = []
        self._longest = longest
        self._latest: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The text goes on; what it ended in so far counts as an earlier occurrence from now on."""
        last = len(self._tokens) - 1
        for length in range(1, min(self._longest, last + 1) + 1):
            self._latest[tuple(self._tokens[-length:])] = last
        self._tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """What followed the latest occurrence of the longest ending that there is one of; empty if there is none."""
        last = len(self._tokens) - 1
        for length in range(min(self._longest, last + 1), 0, -1):
            at = self._latest.get(tuple(self._tokens[-length:]))
            if at is not None:
                return [self._tokens[at + 1 + ahead % (last - at)] for ahead in range(count)]
        return []


@dataclass
class Replay:
    """Rounds of `count` looked-up drafts as they would have gone on text that is there: tokens, and rounds for them."""

    index: TextIndex
    count: int
    tokens: float = 0.0
    rounds: float = 0.0
    _drafts: list[int] = field(default_factory=list)
    _right: int = 0

    def __post_init__(self) -> None:
        self._drafts = self.index.continuation(self.count)

    def see(self, token: int) -> None:
        """The next token of the text, which a round in progress had either drafted or ends with."""
        self.tokens += 1
        if self._right < len(self._drafts) and self._drafts[self._right] == token:
            self._right += 1
        else:
            self.rounds += 1
            self._right = -1  # a new round begins behind this token, once the index knows of it

    def begin(self) -> None:
        """Draft anew where the last token seen ended a round."""
        if self._right < 0:
            self._drafts, self._right = self.index.continuation(self.count), 0

    def fade(self) -> None:
        """What lies further back counts less."""
        self.tokens, self.rounds = _MEMORY * self.tokens, _MEMORY * self.rounds


@dataclass
class _Known:
    """What a process learned of a model: the last times of rounds and of plain steps, seconds that it took to compile
    one of these programs, and what those not yet compiled would have saved."""

    times: dict[tuple[int, Shape], list[float]] = field(default_factory=dict)
    compiling: float = 0.0
    foregone: dict[tuple[int, Shape], float] = field(default_factory=dict)


_KNOWN: WeakKeyDictionary[CausalLM, _Known] = WeakKeyDictionary()


class Drafts:
    """The host's side of exact mode in a request: the text so far, what became of drafts, and when to draft.

    `drafted` and `accepted` are per row of the request, and by round that the row was live in; `from_draft` and
    `in_round` by token: whether it was a draft that was right, and of which of these rounds it is, -1 of none.
    """

    def __init__(self, drafting: Drafting, model: CausalLM, prompts: Sequence[Sequence[int]]):
        self._drafting, self._known = drafting, _KNOWN.setdefault(model, _Known())
        self._text = np.zeros((len(prompts), model.config.max_position_embeddings), np.int32)
        self._opened = False
        self._paid = self._made = 0.0
        self._lengths = np.asarray([len(prompt) for prompt in prompts])
        self._prompt_lengths = self._lengths.copy()
        self._replays: list[list[Replay]] = []
        for row, prompt in enumerate(prompts):
            self._text[row, : len(prompt)] = prompt
            index = TextIndex(prompt if drafting.adapts else ())
            self._replays.append([Replay(index, count) for count in drafting.counts if drafting.adapts])
        self.drafted: list[list[int]] = [[] for _ in prompts]
        self.accepted: list[list[int]] = [[] for _ in prompts]
        self.from_draft: list[list[bool]] = [[] for _ in prompts]
        self.in_round: list[list[int]] = [[] for _ in prompts]

    @property
    def trace(self) -> dict[str, list[Any]]:
        """Per row: rounds, drafts and those that were right; the latter two by round; and by token where it is from."""
        return {
            "rounds": list(map(len, self.drafted)),
            "drafted": list(map(sum, self.drafted)),
            "accepted": list(map(sum, self.accepted)),
            "drafted_by_round": self.drafted,
            "accepted_by_round": self.accepted,
            "from_draft": self.from_draft,
            "in_round": self.in_round,
        }

    @property
    def draft(self) -> Draft:
        return self._drafting.draft

    def history(self, rows: Int[np.ndarray, " batch"], places: int) -> Int[np.ndarray, "batch places"]:
        """The rows' tokens by position; as far as there are places."""
        return self._text[rows, :places]

    def see(self, chosen: Chosen) -> None:
        """Text that rows gained, in whatever way."""
        self._made += float(chosen.emitted.sum() / max(1, chosen.emitted.any(axis=0).sum()))
        for row, replays in enumerate(self._replays):
            tokens = chosen.tokens[chosen.emitted[:, row], row]
            length = self._lengths[row]
            self._text[row, length : length + len(tokens)] = tokens
            self._lengths[row] += len(tokens)
            self._place(row, -1, 0, int(self._lengths[row] - self._prompt_lengths[row]) - len(self.in_round[row]))
            for token in tokens.tolist() if replays else ():
                for replay in replays:
                    replay.see(token)
                replays[0].index.push(token)
                for replay in replays:
                    replay.begin()

    def count(self, rounds: Round, rows: Int[np.ndarray, " batch"]) -> None:
        """Take in what became of the drafts of a chunk, before its text is seen."""
        gained = rounds.chosen.emitted.sum(axis=1)
        live = gained > 0
        for place, row in enumerate(rows.tolist()):
            right = rounds.accepted[live[:, place], place].tolist()
            for accepted, tokens in zip(right, gained[live[:, place], place].tolist(), strict=True):
                self.accepted[row].append(accepted)
                self._place(row, len(self.accepted[row]) - 1, accepted, tokens - accepted)
            self.drafted[row] += rounds.drafted[live[:, place], place].tolist()

    def _place(self, row: int, number: int, drafts: int, chosen: int) -> None:
        """A row's next tokens, of a round or of none (-1): so many drafts, then so many of the dense model's own."""
        self.from_draft[row] += [True] * drafts + [False] * chosen
        self.in_round[row] += [number] * (drafts + chosen)

    def choose(self, live: Int[np.ndarray, " live"], shape: Shape, left: int) -> int:
        """Drafts a round for these rows, of which some may still gain `left` tokens; 0 for plain steps."""
        if not self._drafting.adapts:
            return self._drafting.counts[0]
        step = self._seconds(0, shape)
        if step is None:
            return 0
        self._paid = self._paid or step
        if not self._opened:
            self._opened = True
            return self._opening(shape, step, left)
        best, least = 0, _WORTH * step
        for place, count in enumerate(self._drafting.counts):
            replays = [self._replays[row][place] for row in live]
            tokens, rounds = sum(r.tokens for r in replays), sum(r.rounds for r in replays)
            per_token = self._expected(count, shape, step) * rounds / max(tokens, 1.0)
            if tokens and self._compiles(count, shape, per_token) and per_token < least:
                best, least = count, per_token
        for row in live:
            for replay in self._replays[row]:
                replay.fade()
        self._paid, self._made = least if best else step, 0.0
        return best

    def _compiles(self, count: int, shape: Shape, per_token: float) -> bool:
        """Whether a program is compiled, or would have saved enough by now to be."""
        known, which = self._known, (count, shape)
        if which in known.times:
            return True
        saved = max(0.0, self._paid - per_token) * self._made
        known.foregone[which] = known.foregone.get(which, 0.0) + saved
        return known.foregone[which] >= _EARNED * known.compiling

    def _opening(self, shape: Shape, step: float, left: int) -> int:
        """Before there is any text to replay: as many drafts as are known to cost little even where none is right."""

        def lost(count: int) -> float:
            seconds = self._seconds(count, shape)
            return math.inf if seconds is None else ROUNDS * (seconds - step)

        return next((count for count in self._drafting.counts if lost(count) <= _STAKE * step * left), 0)

    def took(self, count: int, shape: Shape, seconds: float, compiled: CompileMeter) -> None:
        """A round of so many drafts, or a plain step (0), took so long, or had its program compiled first: no time to
        go by, but it tells what another program would cost."""
        times = self._known.times.setdefault((count, shape), [])
        if compiled.programs:
            self._known.compiling = compiled.seconds + compiled.trace_seconds
            return
        times.append(seconds)
        del times[:-_MOST_TIMES]

    def _seconds(self, count: int, shape: Shape) -> float | None:
        """The least of the last times: what else the machine does only ever adds to them."""
        return min(self._known.times.get((count, shape), ()), default=None)

    def _expected(self, count: int, shape: Shape, step: float) -> float:
        """Seconds of a round; hopefully few until there are measurements enough."""
        times = self._known.times.get((count, shape), [])
        hoped = step * (1 + _HOPED * count)
        return min([*times, hoped] if len(times) < _FEWEST_TIMES else times)
