"""Continuations of contexts scored by the programs that generate, as `scoring.py` scores windows; of any lengths."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.ledger import Ledger
from qs_jax.engine.decode import Chosen
from qs_jax.engine.prefill import piece_width
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.session import Request, Session
from qs_jax.errors import EvaluationError
from qs_jax.generation import not_finite
from qs_jax.model import Model
from qs_jax.progress import Advance, unseen

_CHUNK = 16
"""Steps at once. Of every one the logits of a whole batch come to the host."""


@dataclass(frozen=True)
class Continuation:
    """Token ids of a context, of which there is at least one, and of what is scored after it."""

    context: tuple[int, ...]
    scored: tuple[int, ...]

    @classmethod
    def fitted(cls, context: Sequence[int], scored: Sequence[int], limit: int) -> "Continuation":
        """The context's beginning is cut off where both are longer than `limit` tokens and the last one, which is
        scored and never run.

        Raises:
            EvaluationError: nothing to score, or more of it than `limit` tokens.
        """
        if not context or not scored or len(scored) > limit:
            raise EvaluationError(
                f"a context has {len(context)} tokens and its continuation {len(scored)}, expected at least one of "
                f"each and a continuation of at most {limit}; shorten it, or look for an empty one in the task"
            )
        return cls(tuple(context[-(limit + 1 - len(scored)) :]), tuple(scored))


class Scored(NamedTuple):
    """Natural log-likelihood of a continuation, and whether greedy decoding would have written it."""

    logprob: float
    greedy: bool


class _Pass(NamedTuple):
    """Contexts that run together, each with as many continuations; `wanted` are the numbers of these, row by row."""

    contexts: list[tuple[int, ...]]
    wanted: list[int]


def score_continuations(
    model: Model,
    asked: Sequence[Continuation],
    bound: BoundPolicy,
    *,
    batch: int,
    bits: int | None = None,
    advance: Advance = unseen,
) -> tuple[list[Scored], Ledger]:
    """Score continuations under a policy, in the order asked for, and say what that took.

    A context goes through the prefill once for all its continuations, which are then forced token by token: decisions
    look at what stands before a token and never at the token. Passes are of few shapes, so that few programs are
    compiled: contexts of one padded width run together, and a last pass is filled up with repeats.

    Args:
        model: what `qs_jax.load` returned.
        asked: contexts and continuations, as `Continuation.fitted` cuts them.
        bound: the policy.
        batch: most rows that run together.
        bits: the precision at which Matryoshka weights are read.
        advance: called after every pass with the number of continuations scored.

    Raises:
        GenerationError: bits are asked for and the model's weights are not Matryoshka.
        EvaluationError: logits are NaN or infinite in the model's dtype.
    """
    network = model.network_at(bits)
    costs = Costs.of(network)
    ledger = Ledger(costs, bound, bits or costs.bits)
    found: dict[int, Scored] = {}
    for one in _passes(asked, batch, model.config.max_position_embeddings):
        session = Session(network, _request(one, asked, bound), bits=bits)
        scores = _forced(session, [len(asked[number].scored) for number in one.wanted])
        if not all(np.isfinite(score.logprob) for score in scores):
            raise EvaluationError(not_finite(model))
        new = dict(zip(one.wanted, scores, strict=True))
        advance(len(new.keys() - found.keys()))
        found |= new
        ledger.add(session.ledger)
    return [found[number] for number in range(len(asked))], ledger


def _passes(asked: Sequence[Continuation], batch: int, limit: int) -> Iterator[_Pass]:
    """All that is asked, in passes of at most `batch` rows, the widest first."""
    by_context = defaultdict(list)
    for number, one in enumerate(asked):
        by_context[one.context].append(number)
    by_count = defaultdict(list)
    for context, numbers in by_context.items():
        numbers.sort(key=lambda number: -len(asked[number].scored))
        for first in range(0, len(numbers), batch):
            some = numbers[first : first + batch]
            by_count[len(some)].append((context, some))

    def width(one: tuple[tuple[int, ...], list[int]]) -> tuple[int, int]:
        context, numbers = one
        return -piece_width(len(context), limit), -len(asked[numbers[0]].scored)

    for count, groups in sorted(by_count.items(), reverse=True):
        size = min(batch // count, len(groups))
        groups.sort(key=width)
        for first in range(0, len(groups), size):
            part = groups[first : first + size]
            part += part[-1:] * (size - len(part))
            yield _Pass([context for context, _ in part], [number for _, some in part for number in some])


def _request(one: _Pass, asked: Sequence[Continuation], bound: BoundPolicy) -> Request:
    """No token ends a row: text is scored beyond an end of text within it."""
    forced = [asked[number].scored for number in one.wanted]
    return Request(
        prompts=one.contexts,
        copies=len(forced) // len(one.contexts),
        max_new_tokens=max(map(len, forced)),
        eos_token_ids=(),
        seeds=[(0, 0)] * len(forced),
        sampling=Sampling.of(),
        chunk_size=_CHUNK,
        policy=bound,
        forced=forced,
        keep_logits=True,
    )


def _forced(session: Session, lengths: Sequence[int]) -> list[Scored]:
    """Every row's score. What a row writes behind its own length is nobody's."""
    ends, place = np.asarray(lengths), 0
    logprobs, greedy = np.zeros(len(ends)), np.ones(len(ends), bool)
    for chunk in session.chunks():
        counts, agrees = _counted(chunk, ends - place)
        logprobs += np.where(counts, chunk.logprobs, 0).sum(axis=0, dtype=np.float64)
        greedy &= (agrees | ~counts).all(axis=0)
        place += len(counts)
        for row in np.flatnonzero(ends <= place):
            session.finish(int(row))
    return [Scored(float(total), bool(same)) for total, same in zip(logprobs, greedy, strict=True)]


def _counted(
    chunk: Chosen, left: Int[np.ndarray, " rows"]
) -> tuple[Bool[np.ndarray, "steps rows"], Bool[np.ndarray, "steps rows"]]:
    """Which tokens of a chunk are still to be scored, and which of them are the most likely ones."""
    counts = chunk.emitted & (np.arange(len(chunk.tokens))[:, None] < left)
    return np.asarray(counts), np.asarray(chunk.logits).argmax(axis=-1) == np.asarray(chunk.tokens)
