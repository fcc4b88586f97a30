"""Who is decoded when: one thread that owns the device, and a bounded queue before it.

Rows that are alike in what is compiled for them (`Kind`) share a batch, which newcomers join between two chunks, in
the order in which they came. Batches of different kinds take turns, a chunk each; rows in exact mode have one each.
"""

import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from qs_jax.adaptive.ledger import Ledger
from qs_jax.adaptive.policy import Policy
from qs_jax.console import aside
from qs_jax.engine.places import Alone, Batch, Gain, Places
from qs_jax.engine.session import Request
from qs_jax.model import Model
from qs_jax.serving.answer import Answer, Piece
from qs_jax.serving.errors import ApiError, busy, failed

_JOINING = 4
"""Most rows that join between two chunks: while their prompts run, the others wait."""


class Kind(NamedTuple):
    """What rows must have in common to share a batch."""

    policy: Policy
    bits: int | None
    eos: tuple[int, ...]
    penalises: bool
    keeps_logits: bool
    exact: bool


class Event(NamedTuple):
    """What became of row `row` of a job: text, with the row's ledger if that was the last of it, or an error."""

    row: int
    piece: Piece | None
    ledger: Ledger | None = None
    error: ApiError | None = None


@dataclass(frozen=True)
class RowAsked:
    """A row before it runs: a request of one row, and what makes an answer of its tokens."""

    request: Request
    kind: Kind
    answer: Answer


@dataclass
class Job:
    """Rows that a client asked for together. `tell` is called from the scheduler's thread."""

    tell: Callable[[Event], None]
    gone: bool = field(default=False)

    def cancel(self) -> None:
        """The client is gone: its rows end at the next chunk."""
        self.gone = True


@dataclass
class _Row:
    job: Job
    number: int
    asked: RowAsked
    came: float


class Scheduler:
    """Runs rows in a thread of its own, from `start` to `stop`; `submit` may be called from any other."""

    def __init__(self, model: Model, *, places: int, queue: int):
        self.model, self._most, self._room = model, places, places + queue
        self._waiting: deque[_Row] = deque()
        self._batches: dict[object, Batch] = {}
        self._running: dict[object, dict[int, _Row]] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._live = 0
        self._numbers = itertools.count()
        self._seconds_a_row = 1.0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    @property
    def room(self) -> int:
        """Most rows that run and wait."""
        return self._room

    @property
    def running(self) -> int:
        return self._live

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the chunk that it is at; rows that are left are told that the server failed."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, rows: Sequence[RowAsked], tell: Callable[[Event], None]) -> Job:
        """Put all rows in the queue, or none.

        Raises:
            ApiError: there is no room (503); its `Retry-After` is when some may be expected.
        """
        job, now = Job(tell), time.monotonic()
        with self._changed:
            inside = len(self._waiting) + self.running
            if inside + len(rows) > self._room or self._stopping:
                turns = (inside + len(rows) - self._room) / self._most
                raise busy(max(1, min(60, round(turns * self._seconds_a_row))))
            self._waiting.extend(_Row(job, number, asked, now) for number, asked in enumerate(rows))
            self._changed.notify()
        return job

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._batches or self._stopping):
                    self._changed.wait()
                if self._stopping:
                    break
            self._drop_those_gone()
            self._admit()
            for key in list(self._batches):
                self._guarded(key, self._step)
        for row in [*self._waiting, *(row for rows in self._running.values() for row in rows.values())]:
            row.job.tell(Event(row.number, None, error=busy(1)))

    def _drop_those_gone(self) -> None:
        with self._changed:
            self._waiting = deque(row for row in self._waiting if not row.job.gone)
        for key in list(self._batches):
            self._guarded(key, self._drop)

    def _drop(self, key: object) -> None:
        rows = self._running[key]
        for ticket in [ticket for ticket, row in rows.items() if row.job.gone]:
            self._batches[key].leave(ticket)
            del rows[ticket]
            self._live -= 1
        self._close_if_empty(key)

    def _admit(self) -> None:
        """Let rows in, first come first served, as long as there are places; a few at a time if others are waiting for
        their next chunk."""
        for _ in range(_JOINING if self.running else self._most):
            with self._changed:
                if not self._waiting or self.running >= self._most:
                    return
                row, self._live = self._waiting.popleft(), self._live + 1
                kind = row.asked.kind
                key: object = (kind, next(self._numbers)) if kind.exact else kind
                self._running.setdefault(key, {})
            try:
                batch = self._batches.get(key) or self._batch(row.asked)
                self._batches[key] = batch
                gain = batch.join(row.asked.request)
            except Exception:
                self._live -= 1
                self._report(row)
                self._close_if_empty(key)
                continue
            self._running[key][gain.ticket] = row
            self._guarded(key, partial(self._tell, gain=gain))

    def _batch(self, asked: RowAsked) -> Batch:
        kind = asked.kind
        network = self.model.network_at(kind.bits)
        if kind.exact:
            return Alone(network, bits=kind.bits)
        return Places(network, asked.request, most=self._most, bits=kind.bits)

    def _step(self, key: object) -> None:
        for gain in self._batches[key].step():
            self._tell(key, gain)
        self._close_if_empty(key)

    def _guarded(self, key: object, run: Callable[[object], None]) -> None:
        """A batch that fails takes its own rows along and nobody else."""
        try:
            run(key)
        except Exception:
            rows = self._running.pop(key, {})
            self._batches.pop(key, None)
            self._live -= len(rows)
            for row in rows.values():
                self._report(row)

    def _tell(self, key: object, gain: Gain) -> None:
        row = self._running[key][gain.ticket]
        batch = self._batches[key]
        piece = row.asked.answer.take(gain)
        if piece.finish is None:
            row.job.tell(Event(row.number, piece))
            return
        ledger = batch.leave(gain.ticket)
        del self._running[key][gain.ticket]
        self._live -= 1
        self._seconds_a_row += 0.2 * (time.monotonic() - row.came - self._seconds_a_row)
        row.job.tell(Event(row.number, piece, ledger))
        self._close_if_empty(key)

    def _close_if_empty(self, key: object) -> None:
        if not self._running.get(key):
            self._running.pop(key, None)
            self._batches.pop(key, None)

    def _report(self, row: _Row) -> None:
        """In an exception's handler: the log gets the traceback, the client one line."""
        aside(f"a request failed: {sys.exc_info()[1]!r}")
        traceback.print_exc()
        row.job.tell(Event(row.number, None, error=failed()))
