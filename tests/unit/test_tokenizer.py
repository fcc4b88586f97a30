"""Text to token ids and back, and chat templates."""

import pytest

from qs_jax.errors import TokenizerError
from qs_jax.tokenizer import Tokenizer
from tests.tiny import character_tokenizer, tiny_tokenizer


def test_chat_without_a_template_or_against_it_is_refused() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer(character_tokenizer()).encode_chat(messages)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokenizerError, match="roles must alternate"):
        Tokenizer(character_tokenizer(), chat_template=refusing).encode_chat(messages)


def test_the_tiny_tokenizer_is_what_the_tests_take_it_for() -> None:
    assert tiny_tokenizer().vocab_size == 97
    assert tiny_tokenizer().encode(" ~") == [0, 94]
    assert tiny_tokenizer().decode([0, 94, 96]) == " ~"
