"""When to draft, by what, and how much: what the host finds out while a request runs.

Of every way to make rounds (`Way`) it expects a time and a number of tokens, and takes the way with the least time per
token, or plain steps. Times are measured. What lookups bring is foretold from the text, whoever decoded it (`Replay`),
so that text that does not repeat itself is decoded by plain steps, at the cost of the replay. How often any other draft
is right only its own rounds tell (`Rightness`). So these are tried, and with caution: a small share of all time is put
aside for it, what they lose against what would have been done without them is taken from that, what they gain is added,
and where rounds of wrong drafts would cost more than there is, they wait. So that share is all that they ever lose,
whatever they promise.

A round of another size or draft is another program. It is compiled once it would have saved a share of the time that
compiling takes: were it the whole time, both together would be at most twice what would have been best, had one known
what comes (ski rental; Karlin et al., 1988). It is less where what is saved is foretold, as programs stay: in memory
for the next request, on disk for the next process.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from jaxtyping import Int
from numpy import ndarray

from qs_jax.engine.compilation import CompileMeter
from qs_jax.engine.drafts import Lookup
from qs_jax.engine.exact import Draft
from qs_jax.engine.replay import MEMORY, Replay, TextIndex
from qs_jax.models.base import CausalLM

_WORTH = 0.95
"""Rounds are gone on with where a token takes at most this share of a plain step's time."""

_HOPED = 0.15
"""What a draft adds to the time of a round, as a share of a step's, before any was measured: little, as where reading
weights takes all the time."""

_HOPED_RIGHT = 0.8
"""How often a draft is right that was not tried yet: as codes at 4 bits are (0.79 to 0.87 on SmolLM2)."""

_FAITH = 4.0
"""How many drafts it takes to believe what they show as much as what was hoped."""

_STAKE = 0.02
"""What share of the time of plain steps may be lost on rounds before any text was seen."""

_ASIDE = 0.01
"""The share of all time that is put aside for drafts that only rounds can judge."""

_EARNED = 0.25
"""The share of compiling a program that it must have missed saving; all of it where saving anything is but a hope."""

ROUNDS = 4
"""Of a chunk."""

Shape = tuple[int, bool, bool]
"""What times depend on beside the model and what is drafted: rows held, and whether they sample and penalise."""

_ANEW = 64
"""Requests after which rounds are measured anew: the machine may have been busy when they were found too slow."""

_FEWEST_TIMES = 2
_MOST_TIMES = 5


@dataclass(frozen=True)
class Way:
    """One way to make rounds: what drafts, by which name it is known, and how many a round.

    `price` is what each draft is hoped to take until it is measured, in plain steps.
    """

    name: str
    draft: Draft
    count: int
    price: float = 0.0

    @property
    def foretold(self) -> bool:
        """Whether the text tells how its rounds would have gone."""
        return isinstance(self.draft, Lookup)


@dataclass(frozen=True)
class Drafting:
    """How a request drafts: the ways there are, foretold ones first, and whether to choose among them and plain steps
    while it runs; without `adapts` the first way is used throughout."""

    ways: tuple[Way, ...]
    adapts: bool = False


@dataclass
class Rightness:
    """How often a draft is right if those before it in the round were: of late, and at first as is hoped."""

    right: float = 0.0
    wrong: float = 0.0

    def see(self, right: float, wrong: float) -> None:
        self.fade()
        self.right, self.wrong = self.right + right, self.wrong + wrong

    def fade(self) -> None:
        """What lies further back counts less."""
        self.right, self.wrong = MEMORY * self.right, MEMORY * self.wrong

    def tokens(self, count: int) -> float:
        """What a round of so many drafts brings."""
        share = (self.right + _FAITH * _HOPED_RIGHT) / (self.right + self.wrong + _FAITH)
        return sum(share**drafts for drafts in range(count + 1))


_Key = tuple[str, int, Shape]


def _key(way: Way | None, shape: Shape) -> _Key:
    """What a program's time is known by; None for plain steps."""
    return (way.name, way.count, shape) if way else ("", 0, shape)


@dataclass
class _Known:
    """What a process learned of a model in so many requests: the last times of rounds and of plain steps, how often
    drafts were right, seconds put aside for trying, seconds that it took to compile one of these programs, and what
    those not yet compiled would have saved."""

    requests: int = 0
    times: dict[_Key, list[float]] = field(default_factory=dict)
    rightness: dict[str, Rightness] = field(default_factory=dict)
    aside: float = 0.0
    compiling: float = 0.0
    foregone: dict[_Key, float] = field(default_factory=dict)

    def another_request(self) -> None:
        """It may be another matter than those before: what they showed counts less."""
        self.requests += 1
        for rightness in self.rightness.values():
            rightness.fade()
        for (_, count, _), times in self.times.items():
            if count and not self.requests % _ANEW:
                times.clear()


_KNOWN: WeakKeyDictionary[CausalLM, _Known] = WeakKeyDictionary()


class Pacing:
    """The choices of a request, chunk by chunk: `choose`, then `took` and `see` what came of it."""

    def __init__(self, drafting: Drafting, model: CausalLM, prompts: Sequence[Sequence[int]]):
        self._ways, self._adapts = drafting.ways, drafting.adapts
        self._known = _KNOWN.setdefault(model, _Known())
        self._lookups = {way.count: way for way in drafting.ways if way.foretold and drafting.adapts}
        self._opened = False
        self._paid = self._made = self._untried = 0.0
        self._ran: tuple[Way | None, float] | None = None
        self._indices = [TextIndex(prompt if self._lookups else ()) for prompt in prompts]
        self._replays = [{count: Replay(index, count) for count in self._lookups} for index in self._indices]
        self._known.another_request()

    def choose(self, live: Int[ndarray, " live"], shape: Shape, left: int) -> Way | None:
        """The way of these rows' next rounds, of which some may still gain `left` tokens; None for plain steps."""
        if not self._adapts:
            return self._ways[0]
        step = self._seconds(None, shape)
        if step is None:
            return None
        self._paid = self._paid or step
        if not self._opened:
            self._opened = True
            return self._opening(shape, step, left)
        best, least, self._untried = None, _WORTH * step, step
        for way in self._ways:
            rounds = self._rounds_a_token(way, live)
            if rounds is None:
                continue
            per_token = self._expected(way, shape, step) * rounds
            if not self._compiles(way, shape, per_token) or per_token >= least:
                continue
            if way.foretold:
                best, least, self._untried = way, per_token, per_token
            elif self._affords(way, shape, step):
                best, least = way, per_token
        for row in live:
            for replay in self._replays[row].values():
                replay.fade()
        self._paid, self._made = least if best else step, 0.0
        return best

    def took(self, way: Way | None, shape: Shape, seconds: float, passes: int, compiled: CompileMeter) -> None:
        """So many rounds of a way, or plain steps (None), took so long, or had their program compiled first: no time to
        go by, but it tells what another program would cost."""
        times = self._known.times.setdefault(_key(way, shape), [])
        if compiled.programs:
            self._known.compiling = compiled.seconds + compiled.trace_seconds
            return
        times.append(seconds / passes)
        del times[:-_MOST_TIMES]
        self._ran = (way, seconds) if self._adapts else None

    def learn(self, way: Way, right: int, wrong: int) -> None:
        """Of a way's drafts so many were right, and so many the first of a round that was not."""
        if not way.foretold:
            self._known.rightness.setdefault(way.name, Rightness()).see(right, wrong)

    def see(self, gained: Sequence[Sequence[int]]) -> None:
        """Text that each row gained, in whatever way."""
        lengths = [len(tokens) for tokens in gained if tokens]
        made = sum(lengths) / max(1, len(lengths))
        self._made += made
        self._settle(made)
        for index, replays, tokens in zip(self._indices, self._replays, gained, strict=True):
            for token in tokens if replays else ():
                for replay in replays.values():
                    replay.see(token)
                index.push(token)
                for replay in replays.values():
                    replay.begin()

    def _settle(self, made: float) -> None:
        """Put aside a share of the time that the last chunk takes at best, or what a trial gained or lost."""
        if self._ran:
            way, seconds = self._ran
            due, tried = made * self._untried, way is not None and not way.foretold
            self._known.aside += due - seconds if tried else _ASIDE * due
        self._ran = None

    def _rounds_a_token(self, way: Way, live: Int[ndarray, " live"]) -> float | None:
        """None where nothing can be said yet."""
        if not way.foretold:
            return 1 / self._known.rightness.get(way.name, Rightness()).tokens(way.count)
        replays = [self._replays[row][way.count] for row in live]
        tokens = sum(replay.tokens for replay in replays)
        return sum(replay.rounds for replay in replays) / max(tokens, 1.0) if tokens else None

    def _compiles(self, way: Way, shape: Shape, per_token: float) -> bool:
        """Whether a program is compiled, or would have saved enough by now to be."""
        known, which = self._known, _key(way, shape)
        if which in known.times:
            return True
        saved = max(0.0, self._paid - per_token) * self._made
        known.foregone[which] = known.foregone.get(which, 0.0) + saved
        return known.foregone[which] >= (_EARNED if way.foretold else 1.0) * known.compiling

    def _affords(self, way: Way, shape: Shape, step: float) -> bool:
        """Whether there is enough for rounds of a way that bring a token each."""
        return self._known.aside >= ROUNDS * (self._expected(way, shape, step) - self._untried)

    def _opening(self, shape: Shape, step: float, left: int) -> Way | None:
        """Before there is any text to replay: as many lookups as are known to cost little even where none is right."""

        def lost(way: Way) -> float:
            seconds = self._seconds(way, shape)
            return math.inf if seconds is None else ROUNDS * (seconds - step)

        return next((way for way in self._lookups.values() if lost(way) <= _STAKE * step * left), None)

    def _seconds(self, way: Way | None, shape: Shape) -> float | None:
        """The least of the last times: what else the machine does only ever adds to them."""
        return min(self._known.times.get(_key(way, shape), ()), default=None)

    def _expected(self, way: Way, shape: Shape, step: float) -> float:
        """Seconds of a round; until there are measurements enough hopefully those of its drafts, and of a pass as after
        as many lookups."""
        times = self._known.times.get(_key(way, shape), [])
        if len(times) >= _FEWEST_TIMES:
            return min(times)
        looked_up = None if way.foretold else self._lookups.get(way.count)
        passing = self._expected(looked_up, shape, step) if looked_up else step * (1 + _HOPED * way.count)
        return min([*times, passing + way.count * way.price * step])
