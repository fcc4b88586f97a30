"""When a row ends: an end-of-text id on the device, a stop string on the host."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from qs_jax.tokenizer import Tokenizer

_EOS_SLOTS = 8
_CONTEXT_TOKENS = 6
_REPLACEMENT = "\ufffd"


def eos_array(eos_token_ids: Sequence[int]) -> Int[Array, " slots"]:
    """End-of-text ids padded with -1 to a multiple of 8, so that another list compiles nothing."""
    slots = max(1, -(-len(eos_token_ids) // _EOS_SLOTS)) * _EOS_SLOTS
    return jnp.asarray([*eos_token_ids, *[-1] * (slots - len(eos_token_ids))], jnp.int32)


def is_eos(tokens: Int[Array, " batch"], eos: Int[Array, " slots"]) -> Bool[Array, " batch"]:
    return (tokens[:, None] == eos).any(axis=-1)


class Detokenizer:
    """Text of a growing token sequence, piece by piece.

    A piece is held back until it decodes to whole characters: tokens may split a UTF-8 sequence. The tokens before a
    piece are decoded along and cut off, because tokenizers drop a space at the start of a text. That context always
    begins with a whole character, since some tokenizers decode a run of bytes that begins in the middle of one to
    nothing but replacement characters.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._pending = _clean_end(tokenizer, prompt)
        self._context = len(self._pending)
        self._shown = tokenizer.decode(self._pending)
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text it completes, possibly empty."""
        self._pending.append(token)
        return self._emit(final=False)

    def flush(self) -> str:
        """The text still held back at the end, incomplete characters included."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        whole = self._tokenizer.decode(self._pending)
        if len(whole) <= len(self._shown) or (whole.endswith(_REPLACEMENT) and not final):
            return ""
        piece = whole[len(self._shown) :]
        self.text += piece
        # what was just completed becomes the context of what comes next
        self._pending = self._pending[self._context :]
        self._context = len(self._pending)
        self._shown = self._tokenizer.decode(self._pending)
        return piece


def _clean_end(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens, from a whole character on; all of it if there is no such place."""
    width = _CONTEXT_TOKENS
    while width < len(prompt) and _REPLACEMENT in tokenizer.decode(prompt[-width:]):
        width *= 2
    return list(prompt[-width:])


def ends_with_stop(text: str, piece: str, stop_strings: Sequence[str]) -> bool:
    """Whether a stop string was completed by the last piece of the text."""
    longest = max(map(len, stop_strings), default=0)
    tail = text[max(0, len(text) - len(piece) - longest + 1) :]
    return any(stop in tail for stop in stop_strings)
