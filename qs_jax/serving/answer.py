"""A row's tokens as a client gets them: text up to a stop, and what each token cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from qs_jax.engine.places import Gain
from qs_jax.engine.prefill import PromptTrace
from qs_jax.engine.stopping import Detokenizer
from qs_jax.model import Model

Finish = Literal["stop", "length", "not_finite"]


@dataclass(frozen=True)
class Told:
    """A token and the text that it completed, which is less where a stop cut it. `top` are the most likely tokens in
    its place with their log-probabilities; `bits` is the mean over the layers it ran."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...]
    layers_run: int
    bits: float
    drafted: bool


@dataclass(frozen=True)
class PromptTold:
    """A token of the prompt: the layers it ran, and whether it went on in its right neighbour."""

    text: str
    layers_run: int
    fused: bool


class Piece(NamedTuple):
    """What a client may be told of a row by now; `produced` counts all of its tokens, those not told included. With the
    first goes what the prompt's took, where that is asked for."""

    told: tuple[Told, ...]
    produced: int
    finish: Finish | None
    prompt: tuple[PromptTold, ...] = ()

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.told)


class Answer:
    """Takes in what a row gained, and says what may be told.

    A stop is searched in the answer's own text, without special tokens, and is not part of it, as in OpenAI's API.
    Tokens whose text may be the beginning of one are held back. `bits` is the precision where no policy chooses it.
    """

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        *,
        eos: Sequence[int],
        max_new_tokens: int,
        bits: float,
        stops: Sequence[str] = (),
        top: int = 0,
        tells_prompt: bool = False,
    ):
        self._detokenizer = Detokenizer(model.tokenizer, prompt) if model.tokenizer else None
        self._model, self._prompt, self._tells_prompt = model, prompt, tells_prompt
        self._eos, self._left, self._stops, self._top = frozenset(eos), max_new_tokens, tuple(stops), top
        self._bits, self._held = bits, list[Told]()
        self._produced = 0

    def take(self, gain: Gain) -> Piece:
        """What may be told after this."""
        finish: Finish | None = None
        for step in range(len(gain.chosen.tokens)):
            if not np.isfinite(gain.chosen.logprobs[step]):
                finish = "not_finite"
                break
            self._produced += 1
            token = int(gain.chosen.tokens[step])
            ends = token in self._eos
            if not ends:
                self._held.append(self._told(gain, step, token))
            finish = self._ends(ends=ends)
            if finish:
                break
        if finish:
            told, self._held = tuple(self._held), []
        else:
            told = self._settled()
        prompt = self._prompt_told(gain.prompt) if gain.prompt and self._tells_prompt else ()
        return Piece(told, self._produced, finish, prompt)

    def _prompt_told(self, trace: PromptTrace) -> tuple[PromptTold, ...]:
        """Text that a token leaves open is the next one's."""
        spelled = Detokenizer(self._model.tokenizer, (), special=True) if self._model.tokenizer else None
        texts = [spelled.push(token) if spelled else "" for token in self._prompt]
        shown = zip(texts, trace.layers_run[0].tolist(), trace.fused_with[0].tolist(), strict=True)
        return tuple(PromptTold(text, layers, other >= 0) for text, layers, other in shown)

    def _told(self, gain: Gain, step: int, token: int) -> Told:
        chosen = gain.chosen
        layers, read = int(chosen.layers_run[step]), int(chosen.bits_read[step])
        return Told(
            token,
            self._detokenizer.push(token) if self._detokenizer else "",
            float(chosen.logprobs[step]),
            _most_likely(np.asarray(chosen.logits[step]), self._top) if self._top else (),
            layers,
            read / layers if read and layers else self._bits,
            bool(gain.from_draft[step]),
        )

    def _ends(self, *, ends: bool) -> Finish | None:
        last = ends or self._produced >= self._left
        if last and self._detokenizer and self._held:
            rest = self._detokenizer.flush()
            self._held[-1] = replace(self._held[-1], text=self._held[-1].text + rest)
        if self._cut():
            return "stop"
        return None if not last else "stop" if ends else "length"

    def _cut(self) -> bool:
        """Drop the first stop and what follows it, if there is one."""
        text = "".join(told.text for told in self._held)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if not places:
            return False
        left, kept = min(places), []
        for told in self._held:
            if left <= 0:
                break
            kept.append(replace(told, text=told.text[:left]))
            left -= len(told.text)
        self._held = kept
        return True

    def _settled(self) -> tuple[Told, ...]:
        """Held tokens up to the first whose text may belong to a stop."""
        text = "".join(told.text for told in self._held)
        safe, count = len(text) - _open_end(text, self._stops), 0
        for told in self._held:
            safe -= len(told.text)
            if safe < 0:
                break
            count += 1
        told, self._held = tuple(self._held[:count]), self._held[count:]
        return told


def _open_end(text: str, stops: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop."""
    longest = max(map(len, stops), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)


def _most_likely(logits: Float[np.ndarray, " vocab"], count: int) -> tuple[tuple[int, float], ...]:
    """The most likely tokens under the model's own distribution, first the greatest."""
    places = np.argsort(-logits, kind="stable")[:count]
    shifted = logits.astype(np.float64) - logits.max()
    normaliser = np.log(np.exp(shifted).sum())
    return tuple((int(place), float(shifted[place] - normaliser)) for place in places)
