"""Text of a growing token sequence, and where a stop string ends it: characters that lie over several tokens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from qs_jax.engine.stopping import Detokenizer, StopStrings
from qs_jax.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token per byte: every character beyond ASCII is split. Id n is byte n."""
    backend = Backend(models.BPE(vocab={f"<0x{byte:02X}>": byte for byte in range(256)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(backend)


@pytest.mark.parametrize("text", ["naïve café", "日本語 text", "👩🏽‍🚀 in space", "\u2028 line"])
def test_a_character_over_several_tokens_comes_out_whole(text: str) -> None:
    detokenizer = Detokenizer(byte_tokenizer(), list(b"prompt"))
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert [piece for piece in pieces if piece] == list(text)
    assert detokenizer.flush() == ""
    assert "".join(pieces) == text


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    detokenizer = Detokenizer(byte_tokenizer(), list(b"prompt"))
    pieces = [detokenizer.push(byte) for byte in b"a\xe2\x82"]
    assert pieces == ["a", "", ""]
    assert set(detokenizer.flush()) == {"\ufffd"}


def test_a_stop_string_is_found_where_it_is_completed_and_only_there() -> None:
    text = "one two three"
    stops = StopStrings(byte_tokenizer(), list(b"two, bey"), ["two", "e t", "beyon"])
    found = [end for end, byte in enumerate(text.encode(), start=1) if stops.push(byte)]
    assert found == [len("on"), len("one t"), len("one two")]


def test_real_tokenizer_joins_pieces_as_it_decodes(data_dir: Path) -> None:
    """SentencePiece drops the space at the start of a text: pieces must keep it."""
    tokenizer = Tokenizer.load(data_dir / "models" / "stories260K")
    prompt, text = "Once upon a time", "Once upon a time, there was a café. \nThey said: “Hi”  twice!"
    tokens = tokenizer.encode(text)
    start = len(tokenizer.encode(prompt))
    assert tokens[:start] == tokenizer.encode(prompt)
    detokenizer = Detokenizer(tokenizer, tokens[:start])
    pieces = [detokenizer.push(token) for token in tokens[start:]]
    assert "".join(pieces) + detokenizer.flush() == text[len(prompt) :]
    assert len([piece for piece in pieces if piece]) > 15


@given(prompt=st.text(max_size=12), text=st.text(max_size=12))
def test_pieces_join_to_the_text_and_hold_whole_characters(prompt: str, text: str) -> None:
    detokenizer = Detokenizer(byte_tokenizer(), list(prompt.encode()))
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    # U+FFFD of the text's own looks like half a character, and comes out with what follows it
    if "\ufffd" not in prompt + text:
        assert [piece for piece in pieces if piece] == list(text)
    assert "".join(pieces) + detokenizer.flush() == text


@given(
    prompt=st.text("ab ", max_size=9),
    text=st.text("ab ", max_size=20),
    stops=st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_stop_strings_end_where_they_do_in_the_whole_text(prompt: str, text: str, stops: list[str]) -> None:
    """They may begin in the prompt, but not end there."""
    watch = StopStrings(byte_tokenizer(), list(prompt.encode()), stops)
    found = [watch.push(byte) for byte in text.encode()]
    ends = [(prompt + text[: count + 1]).endswith(tuple(stops)) for count in range(len(text))]
    assert found == ends
