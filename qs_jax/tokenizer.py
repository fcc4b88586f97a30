"""Text to token ids and back. Wraps the tokenizer files of a Hugging Face folder; transformers is imported lazily."""

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from qs_jax.errors import TokenizerError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

Message = Mapping[str, str]


class Tokenizer:
    """Encode prompts, decode tokens, apply a chat template."""

    def __init__(self, backend: Any):
        self._backend = backend

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer of a model folder.

        Raises:
            TokenizerError: there are no tokenizer files, or they cannot be read.
        """
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            raise TokenizerError(
                f"{folder}: no tokenizer files; copy tokenizer.json beside the weights or give token ids"
            )
        # it advises torch, which is not missing here
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        except Exception as error:  # transformers raises almost anything on a damaged file
            reason = " ".join(str(error).split())[:200]
            raise TokenizerError(f"{folder}: tokenizer cannot be read ({reason}); restore its files") from error

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._backend)

    @property
    def special_ids(self) -> list[int]:
        """Ids of the special tokens: end of text, padding and the like."""
        return list(self._backend.all_special_ids)

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self._backend, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens the model expects around a prompt.

        Raises:
            TokenizerError: the text holds half a surrogate pair, as text read from a wrong encoding does.
        """
        _require_unicode(text)
        return list(self._backend(text, verbose=False)["input_ids"])

    def encode_with_pieces(self, text: str) -> tuple[list[int], list[str]]:
        """Token ids as `encode` gives them, and the stretch of the text that each stands for; the stretches join to
        the text. Of tokens that share a character the first has it; special tokens have none.

        Raises:
            TokenizerError: a tokenizer without `tokenizer.json`, which cannot tell, or text as `encode` refuses it.
        """
        _require_unicode(text)
        try:
            encoded = self._backend(text, return_offsets_mapping=True, verbose=False)
        except NotImplementedError:
            raise TokenizerError(
                "this tokenizer cannot map tokens to text; save it with a tokenizer.json (use_fast=True)"
            ) from None
        ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max))
        starts = [0, *ends[:-1]] if ends else []
        pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        return list(encoded["input_ids"]), pieces

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ending where the assistant speaks next.

        Raises:
            TokenizerError: the tokenizer has no chat template, the template refuses the messages, or text as `encode`
                refuses it.
        """
        if not self.has_chat_template:
            raise TokenizerError("this tokenizer has no chat template; give a plain text prompt")
        try:
            text = self._backend.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the template language is open-ended
            raise TokenizerError(
                f"the chat template refuses the messages: {' '.join(str(error).split())[:200]}"
            ) from error
        _require_unicode(text)
        return list(self._backend(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens; special tokens (end of text and the like) are left out."""
        return self._backend.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise TokenizerError("the text is not valid Unicode; read it as UTF-8") from None
