"""What both endpoints answer, as OpenAI's objects: whole, or as the events of a stream."""

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

from qs_jax.serving.answer import Finish, PromptTold, Told
from qs_jax.serving.bodies import Asked
from qs_jax.serving.scheduler import Event

DONE = b"data: [DONE]\n\n"


@dataclass
class _Choice:
    told: list[Told] = field(default_factory=list)
    produced: int = 0
    finish: Finish | None = None
    ledger: dict[str, float] | None = None
    prompt: tuple[PromptTold, ...] = ()


class Reply:
    """Grows with the events of a request. `spell` is the text of a token on its own, for log-probabilities."""

    def __init__(self, asked: Asked, name: str, prompt_tokens: Sequence[int], spell: Callable[[int], str]):
        self._asked, self._name, self._prompt_tokens, self._spell = asked, name, sum(prompt_tokens), spell
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._choices = [_Choice() for _ in range(len(prompt_tokens) * asked.sequences)]

    @property
    def complete(self) -> bool:
        return all(choice.finish for choice in self._choices)

    @property
    def usage(self) -> dict[str, int]:
        produced = sum(choice.produced for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": produced,
            "total_tokens": self._prompt_tokens + produced,
        }

    def take(self, event: Event) -> dict[str, Any] | None:
        """What of an event goes into a stream, if anything does."""
        assert event.piece is not None
        choice, piece = self._choices[event.row], event.piece
        before = len("".join(told.text for told in choice.told)) if self._asked.top is not None else 0
        choice.told += piece.told
        choice.produced, choice.finish = piece.produced, piece.finish
        choice.prompt = piece.prompt or choice.prompt
        choice.ledger = event.ledger.to_json() if event.ledger else None
        if not piece.told and not piece.finish and not piece.prompt:
            return None
        said = self._choice(event.row, piece.told, piece.finish, before, delta=True)
        return self._chunk([{**said, **self._prompt(piece.prompt)}])

    def opening(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with: in a chat, who speaks."""
        if self._asked.chat:
            for index in range(len(self._choices)):
                delta = {"role": "assistant", "content": ""}
                yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def closing(self) -> Iterator[dict[str, Any]]:
        """What it ends with, where usage is asked for."""
        if self._asked.include_usage:
            yield {**self._chunk([]), "usage": self.usage}

    def whole(self) -> dict[str, Any]:
        choices = [
            {**self._choice(i, one.told, one.finish, 0, delta=False), **self._prompt(one.prompt)}
            for i, one in enumerate(self._choices)
        ]
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        usage = {"usage": None} if self._asked.include_usage else {}
        return {**self._head(kind), "choices": choices, **usage}

    def _choice(
        self, index: int, told: Sequence[Told], finish: Finish | None, before: int, *, delta: bool
    ) -> dict[str, Any]:
        text = "".join(token.text for token in told)
        if not self._asked.chat:
            said: dict[str, Any] = {"text": text}
        elif delta:
            said = {"delta": {"content": text} if told else {}}
        else:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = None if self._asked.top is None else self._logprobs(told, before)
        own = self._spent(told, self._choices[index].ledger if finish else None) if self._asked.spent else {}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish, **own}

    def _spent(self, told: Sequence[Told], ledger: dict[str, float] | None) -> dict[str, Any]:
        spent = [
            {"text": t.text, "layers_run": t.layers_run, "bits": round(t.bits, 2), "drafted": t.drafted} for t in told
        ]
        return {"spent": spent, **({"ledger": ledger} if ledger else {})}

    def _prompt(self, told: Sequence[PromptTold]) -> dict[str, Any]:
        return {"prompt_spent": [asdict(token) for token in told]} if told else {}

    def _logprobs(self, told: Sequence[Told], before: int) -> dict[str, Any]:
        spell = self._spell
        if self._asked.chat:
            content = [
                {
                    **_token(spell(token.id), token.logprob),
                    "top_logprobs": [_token(spell(other), logprob) for other, logprob in token.top],
                }
                for token in told
            ]
            return {"content": content, "refusal": None}
        lengths = [len(token.text) for token in told]
        offsets = [before + end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        return {
            "tokens": [spell(token.id) for token in told],
            "token_logprobs": [token.logprob for token in told],
            "top_logprobs": [{spell(other): logprob for other, logprob in token.top} for token in told],
            "text_offset": offsets,
        }


def event(payload: dict[str, Any]) -> bytes:
    """As a server-sent event."""
    return b"data: " + json.dumps(payload, allow_nan=False).encode() + b"\n\n"


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
