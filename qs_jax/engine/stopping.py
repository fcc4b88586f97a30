"""Text of a row as it grows, and the stop strings that end it."""

from collections.abc import Sequence
from functools import partial

from qs_jax.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6
_BYTES_OF_A_CHARACTER = 4
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of a growing token sequence, piece by piece.

    A piece is held back until it decodes to whole characters: tokens may split a UTF-8 sequence. The tokens before a
    piece are decoded along and cut off, because tokenizers drop a space at the start of a text. That context always
    begins with a whole character, since some tokenizers decode a run of bytes that begins in the middle of one to
    nothing but replacement characters. `special` spells out special tokens, which are left out otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, special: bool = False):
        self._decode = partial(tokenizer.decode, special=special)
        self._pending = _clean_end(tokenizer, prompt)
        self._context = len(self._pending)
        self._shown = self._decode(self._pending)

    def push(self, token: int) -> str:
        """Add a token; returns the text it completes, possibly empty."""
        self._pending.append(token)
        return self._emit(final=False)

    def flush(self) -> str:
        """The text still held back at the end, incomplete characters included."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        whole = self._decode(self._pending)
        if len(whole) <= len(self._shown) or (whole.endswith(_REPLACEMENT) and not final):
            return ""
        piece = whole[len(self._shown) :]
        # what was just completed becomes the context of what comes next
        self._pending = self._pending[self._context :]
        self._context = len(self._pending)
        self._shown = self._decode(self._pending)
        return piece


def _clean_end(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens, from a whole character on; all of it if there is no such place."""
    width = _CONTEXT_TOKENS
    while width < len(prompt) and _REPLACEMENT in tokenizer.decode(prompt[-width:]):
        width *= 2
    return list(prompt[-width:])


class StopStrings:
    """Notices the token that completes a stop string, as Hugging Face does: anywhere in the text, which begins with the
    prompt, special tokens spelled out."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str]):
        self._stop_strings = tuple(stop_strings)
        self._kept = max(map(len, self._stop_strings)) - 1
        self._detokenizer = Detokenizer(tokenizer, prompt, special=True)
        end = prompt[-(_BYTES_OF_A_CHARACTER * self._kept + _CONTEXT_TOKENS) :]
        self._tail = self._end_of(tokenizer.decode(end, special=True))

    def push(self, token: int) -> bool:
        """Add a token; returns whether a stop string ends in it."""
        piece = self._detokenizer.push(token)
        before, seen = len(self._tail), self._tail + piece
        self._tail = self._end_of(seen)
        return any(stop in seen[max(0, before - len(stop) + 1) :] for stop in self._stop_strings)

    def _end_of(self, text: str) -> str:
        """As much as may be the beginning of a stop string."""
        return text[max(0, len(text) - self._kept) :]
