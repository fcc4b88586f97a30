"""Requests through the engine in rounds of exact mode, with drafts that a script says, and every state looked at."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from qs_jax.adaptive.binding import dense
from qs_jax.engine import session as sessions
from qs_jax.engine.decode import DecodeState
from qs_jax.engine.exact import Draft, exact_chunk
from qs_jax.engine.pacing import Drafting, Way
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.session import Request, Session
from qs_jax.model import Model

COUNT = 3
CHUNK = 12
CLOSE = 1e-4


@dataclass
class Ran:
    """What a session made: per row tokens, log-probabilities and drafts that were right, by round."""

    session: Session
    tokens: list[list[int]]
    logprobs: list[list[float]]
    rows_held: list[int]

    @property
    def accepted(self) -> list[list[int]]:
        assert self.session.drafts is not None
        return self.session.drafts.accepted


def run(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    draft: Draft | None = None,
    *,
    count: int = COUNT,
    eos: Sequence[int] = (),
    sampling: Sampling | None = None,
) -> Ran:
    """Through the engine: plainly, or in rounds."""
    request = Request(
        prompts=prompts,
        copies=1,
        max_new_tokens=new_tokens,
        eos_token_ids=eos,
        seeds=[(3, row) for row in range(len(prompts))],
        sampling=sampling or Sampling.of(),
        chunk_size=CHUNK,
        policy=dense(model.config),
        drafting=Drafting((Way("named", draft, count),)) if draft else None,
    )
    session = Session(model.network, request)
    made = Ran(session, [[] for _ in prompts], [[] for _ in prompts], [])
    with validated(model, made):
        for chosen in session.chunks():
            for row in range(len(prompts)):
                emitted = chosen.emitted[:, row]
                made.tokens[row] += chosen.tokens[emitted, row].tolist()
                made.logprobs[row] += chosen.logprobs[emitted, row].tolist()
    return made


@contextmanager
def validated(model: Model, made: Ran) -> Iterator[None]:
    """Every state keeps what it promises, and what a row has in the cache is all of its text but the pending token."""

    def checked(network: Any, state: DecodeState, *args: Any, **kwargs: Any) -> Any:
        made.rows_held.append(len(state.done))
        state, chunk = exact_chunk(network, state, *args, **kwargs)
        state.validate(model.config, rising=True)
        for layer in state.cache:
            live = ~np.asarray(state.done)
            np.testing.assert_array_equal(np.asarray(layer.lengths)[live], np.asarray(state.positions)[live])
        return state, chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "exact_chunk", checked)
        yield


def assert_same(exact: Ran, plain: Ran) -> None:
    assert exact.tokens == plain.tokens
    for ours, theirs in zip(exact.logprobs, plain.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)


def script(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]], places: int = 64) -> np.ndarray:
    """The rows' whole texts by position, and nothing behind them."""
    table = np.full((len(prompts), places), -1, np.int32)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        table[row, : len(prompt) + len(text)] = [*prompt, *text]
    return table
