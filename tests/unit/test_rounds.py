"""The book of a request in exact mode: who made which token."""

from typing import Any

import jax
import numpy as np

from qs_jax.engine.decode import Chosen
from qs_jax.engine.drafts import Lookup
from qs_jax.engine.exact import Round
from qs_jax.engine.pacing import Drafting, Way
from qs_jax.engine.rounds import Drafts
from tests.tiny import tiny_model

WAY = Way("lookup", Lookup(), 2)
PERIOD = [3, 1, 4, 1, 5, 9, 2, 6]
LIVE = np.asarray([0])


def gained(tokens: list[int]) -> Chosen:
    """A chunk in which the only row chose these."""
    column = np.asarray(tokens, np.int32)[:, None]
    numbers = np.zeros(column.shape, np.float32)
    logits = np.zeros((*column.shape, 0), np.float32)
    on_the_host: tuple[Any, ...] = (column, numbers, column >= 0, column, column, numbers, logits)
    return Chosen(*on_the_host)


def test_tokens_of_rounds_and_of_plain_steps_are_told_apart() -> None:
    """The prompt's token, a plain step, two rounds of which the second has no draft right, a plain step."""
    made = Drafts(Drafting((WAY,)), tiny_model("llama").network, [PERIOD])
    made.see(gained([5]))
    made.see(gained([6]))
    chosen = gained([7, 8, 9, 10, 0, 0])
    emitted = np.asarray([True, True, True, True, False, False])
    chosen = chosen._replace(emitted=emitted[:, None])
    rounds: Any = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), chosen)
    drafted: Any = np.asarray([[2], [2]])
    accepted: Any = np.asarray([[2], [0]])
    made.count(WAY, Round(rounds, drafted, accepted, None), LIVE)
    made.see(chosen)
    made.see(gained([11]))
    assert made.trace["from_draft"] == [[False, False, True, True, False, False, False]]
    assert made.trace["in_round"] == [[-1, -1, 0, 0, 0, 1, -1]]
    assert (made.trace["rounds"], made.trace["accepted"]) == ([2], [2])
    assert made.trace["draft_by_round"] == [["lookup", "lookup"]]
    assert made.history(LIVE, 16).tolist() == [[*PERIOD, 5, 6, 7, 8, 9, 10, 11, 0]]
