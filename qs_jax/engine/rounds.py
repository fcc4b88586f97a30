"""The host's book of a request in exact mode: its text so far, and which of it was drafted, in which round, by what."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from qs_jax.engine.decode import Chosen
from qs_jax.engine.exact import Round
from qs_jax.engine.pacing import Drafting, Pacing, Way
from qs_jax.models.base import CausalLM


class Drafts:
    """The host's side of exact mode in a request: the text so far, what became of drafts, and who paces them.

    `drafted`, `accepted` and `by` (the name of what drafted) are per row of the request, and by round that the row was
    live in; `from_draft` and `in_round` by token: whether it was a draft that was right, and of which of these rounds
    it is, -1 of none.
    """

    def __init__(self, drafting: Drafting, model: CausalLM, prompts: Sequence[Sequence[int]]):
        self.pacing = Pacing(drafting, model, prompts)
        self._text = np.zeros((len(prompts), model.config.max_position_embeddings), np.int32)
        self._lengths = np.asarray([len(prompt) for prompt in prompts])
        self._prompt_lengths = self._lengths.copy()
        for row, prompt in enumerate(prompts):
            self._text[row, : len(prompt)] = prompt
        self.drafted: list[list[int]] = [[] for _ in prompts]
        self.accepted: list[list[int]] = [[] for _ in prompts]
        self.by: list[list[str]] = [[] for _ in prompts]
        self.from_draft: list[list[bool]] = [[] for _ in prompts]
        self.in_round: list[list[int]] = [[] for _ in prompts]

    @property
    def trace(self) -> dict[str, list[Any]]:
        """Per row: rounds, drafts and those that were right; the latter two by round, and what drafted; and by token
        where it is from."""
        return {
            "rounds": list(map(len, self.drafted)),
            "drafted": list(map(sum, self.drafted)),
            "accepted": list(map(sum, self.accepted)),
            "drafted_by_round": self.drafted,
            "accepted_by_round": self.accepted,
            "draft_by_round": self.by,
            "from_draft": self.from_draft,
            "in_round": self.in_round,
        }

    def history(self, rows: Int[np.ndarray, " batch"], places: int) -> Int[np.ndarray, "batch places"]:
        """The rows' tokens by position; as far as there are places."""
        return self._text[rows, :places]

    def see(self, chosen: Chosen) -> None:
        """Text that rows gained, in whatever way."""
        gained = []
        for row, length in enumerate(self._lengths.tolist()):
            tokens = chosen.tokens[chosen.emitted[:, row], row]
            self._text[row, length : length + len(tokens)] = tokens
            self._lengths[row] += len(tokens)
            self._place(row, -1, 0, int(self._lengths[row] - self._prompt_lengths[row]) - len(self.in_round[row]))
            gained.append(tokens.tolist())
        self.pacing.see(gained)

    def count(self, way: Way, rounds: Round, rows: Int[np.ndarray, " batch"]) -> None:
        """Take in what became of the drafts of a chunk, before its text is seen."""
        gained = rounds.chosen.emitted.sum(axis=1)
        live = gained > 0
        for place, row in enumerate(rows.tolist()):
            right = rounds.accepted[live[:, place], place].tolist()
            for accepted, tokens in zip(right, gained[live[:, place], place].tolist(), strict=True):
                self.accepted[row].append(accepted)
                self._place(row, len(self.accepted[row]) - 1, accepted, tokens - accepted)
            self.drafted[row] += rounds.drafted[live[:, place], place].tolist()
            self.by[row] += [way.name] * len(right)
        # a round that goes on behind its last right draft, though there were more, had a wrong one
        wrong = (rounds.accepted < rounds.drafted) & (gained > rounds.accepted)
        self.pacing.learn(way, int(rounds.accepted.sum()), int(wrong.sum()))

    def _place(self, row: int, number: int, drafts: int, chosen: int) -> None:
        """A row's next tokens, of a round or of none (-1): so many drafts, then so many of the dense model's own."""
        self.from_draft[row] += [True] * drafts + [False] * chosen
        self.in_round[row] += [number] * (drafts + chosen)
