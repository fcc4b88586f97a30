"""How work that takes a while says how far it is. Imports nothing heavy."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Advance(Protocol):
    """Is called after each piece of work: `done` more pieces, of `total` where that is known by then."""

    def __call__(self, done: int = 1, *, total: int | None = None) -> None: ...


def unseen(done: int = 1, *, total: int | None = None) -> None:
    """Nobody watches."""
