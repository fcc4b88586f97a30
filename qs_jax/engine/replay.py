"""How rounds of lookups would have gone on text that is there, whoever decoded it.

The host finds out by replaying it, which takes microseconds and no pass of the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qs_jax.engine.drafts import LONGEST

MEMORY = 0.75
"""How much what was seen weighs after as many tokens as a chunk has."""


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
        self.tokens, self.rounds = MEMORY * self.tokens, MEMORY * self.rounds
