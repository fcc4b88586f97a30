"""Text to token ids and back, by the tokenizers library; chat templates by transformers, imported where one is used."""

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from qs_jax.errors import TokenizerError
from qs_jax.files import ModelFiles
from qs_jax.tokenizer_files import read_tokenizer_files

Message = Mapping[str, str]

_NONE: Mapping[str, str] = MappingProxyType({})


class Tokenizer:
    """Encode prompts, decode tokens, apply a chat template.

    `backend` is a `tokenizers.Tokenizer`; `named` are the special tokens that a template may use, such as `bos_token`.
    """

    def __init__(self, backend: Any, *, named: Mapping[str, str] = _NONE, chat_template: str | None = None):
        self._backend = backend
        self._named: dict[str, Any] = dict(named)
        self._chat_template = chat_template

    @classmethod
    def load(cls, folder: ModelFiles, notes: list[str] | None = None) -> "Tokenizer":
        """Read the tokenizer of a model folder; nothing in it is run. `notes` takes what was decided in reading.

        Raises:
            TokenizerError: there are no tokenizer files, they cannot be read, or they contradict each other.
        """
        files = read_tokenizer_files(folder, notes)
        return cls(files.backend, named=files.named, chat_template=files.chat_template)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> list[int]:
        """Ids of the special tokens: end of text, padding and the like."""
        return sorted(index for index, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @property
    def eos_id(self) -> int | None:
        """The id of what the tokenizer names its end of text, if it names one. Generation ends where the model's
        configuration says, as in Hugging Face, which may be another."""
        return self._id_of("eos_token")

    @property
    def bos_id(self) -> int | None:
        """The id of what the tokenizer names its beginning of text, if it names one."""
        return self._id_of("bos_token")

    def _id_of(self, name: str) -> int | None:
        return self._backend.token_to_id(self._named[name]) if name in self._named else None

    @property
    def chat_template(self) -> str | None:
        return self._chat_template

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the special tokens the model expects around a prompt unless `special` is false.

        Raises:
            TokenizerError: the text holds half a surrogate pair, as text read from a wrong encoding does.
        """
        _require_unicode(text)
        return self._backend.encode(text, add_special_tokens=special).ids

    def encode_with_pieces(self, text: str) -> tuple[list[int], list[str]]:
        """Token ids as `encode` gives them, and the stretch of the text that each stands for; the stretches join to
        the text. Of tokens that share a character the first has it; special tokens have none.

        Raises:
            TokenizerError: text as `encode` refuses it.
        """
        _require_unicode(text)
        encoded = self._backend.encode(text)
        ends = list(accumulate((end for _, end in encoded.offsets), max))
        starts = [0, *ends[:-1]] if ends else []
        pieces = [text[start:end] for start, end in zip(starts, ends, strict=True)]
        return encoded.ids, pieces

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ending where the assistant speaks next.

        Raises:
            TokenizerError: the tokenizer has no chat template, the template refuses the messages, or text as `encode`
                refuses it.
        """
        return self.encode(self.render_chat(messages), special=False)

    def render_chat(self, messages: Sequence[Message], *, unfinished: bool = False) -> str:
        """A conversation as the chat template writes it; templates run in Jinja's sandbox.

        It ends where the assistant speaks next or, where its last message is `unfinished`, with that message.

        Raises:
            TokenizerError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if self._chat_template is None:
            raise TokenizerError("this tokenizer has no chat template; give a plain text prompt")
        # it advises torch, which is not missing here
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._chat_template,
                add_generation_prompt=not unfinished,
                continue_final_message=unfinished,
                **self._named,
            )
        except Exception as error:  # the template language is open-ended
            raise TokenizerError(
                f"the chat template refuses the messages: {' '.join(str(error).split())[:200]}"
            ) from error
        return rendered[0]

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of generated tokens; special tokens (end of text and the like) are left out unless `special`."""
        return self._backend.decode(list(tokens), skip_special_tokens=not special)


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise TokenizerError("the text is not valid Unicode; read it as UTF-8") from None
