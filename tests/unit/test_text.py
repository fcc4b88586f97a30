"""Text in, text out: stop strings, streaming, chat, and characters that lie over several tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import qs_jax
from qs_jax.engine.stopping import Detokenizer, StopStrings
from qs_jax.errors import GenerationError, TokenizerError
from qs_jax.generation import GenerateOutput, StreamPiece
from qs_jax.model import Model
from qs_jax.tokenizer import Tokenizer
from tests.tiny import character_tokenizer, tiny_model, tiny_tokenizer

PROMPTS = ["Once upon a time", "The old man", "x"]


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param, tokenizer=True)


@pytest.fixture(scope="module")
def free(model: Model) -> GenerateOutput:
    return qs_jax.generate(model, PROMPTS, max_new_tokens=40)


def collect(model: Model, prompts: Sequence[str], **settings: Any) -> tuple[list[StreamPiece], GenerateOutput]:
    """Every piece of a stream, and what it returns."""
    pieces, generator = [], qs_jax.stream(model, prompts, **settings)
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as finished:
            return pieces, finished.value


def test_text_and_tokens_agree(model: Model, free: GenerateOutput) -> None:
    assert model.tokenizer is not None
    assert free.texts == [model.tokenizer.decode(tokens) for tokens in free.tokens]
    again = qs_jax.generate(model, [model.tokenizer.encode(prompt) for prompt in PROMPTS], max_new_tokens=40)
    assert again.texts == free.texts


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_stop_string_over_several_tokens_ends_its_row(model: Model, free: GenerateOutput, length: int) -> None:
    assert model.tokenizer is not None
    stop = free.texts[0][11 : 11 + length]
    output = qs_jax.generate(model, PROMPTS, max_new_tokens=40, stop_strings=["never this", stop])
    for before, after, tokens, reason in zip(
        free.texts, output.texts, output.tokens, output.finish_reasons, strict=True
    ):
        expected = before[: before.index(stop) + length] if stop in before else before
        assert (after, model.tokenizer.decode(tokens)) == (expected, expected)
        assert reason == ("stop_string" if stop in before else "length")
    assert "stop_string" in output.finish_reasons


def test_a_stop_string_in_the_prompt_ends_nothing_and_one_that_begins_there_does(
    model: Model, free: GenerateOutput
) -> None:
    output = qs_jax.generate(model, PROMPTS[:1], max_new_tokens=40, stop_strings="upon a")
    assert (output.texts, output.finish_reasons) == (free.texts[:1], ["length"])
    output = qs_jax.generate(model, PROMPTS[:1], max_new_tokens=40, stop_strings=["x", "time" + free.texts[0][:2]])
    assert (output.texts, output.finish_reasons) == ([free.texts[0][:2]], ["stop_string"])


def test_a_stream_is_what_generate_returns(model: Model, free: GenerateOutput) -> None:
    eos = free.tokens[1][9]
    cases: tuple[dict[str, Any], ...] = ({}, {"stop_strings": free.texts[0][20:23]}, {"eos_token_id": eos})
    for settings in cases:
        pieces, streamed = collect(model, PROMPTS, max_new_tokens=40, **settings)
        whole = qs_jax.generate(model, PROMPTS, max_new_tokens=40, **settings)
        assert (streamed.texts, streamed.tokens) == (whole.texts, whole.tokens)
        assert (streamed.logprobs, streamed.finish_reasons) == (whole.logprobs, whole.finish_reasons)
        for row in range(len(PROMPTS)):
            own = [piece for piece in pieces if piece.row == row]
            assert "".join(piece.text for piece in own) == whole.texts[row]
            assert [token for piece in own for token in piece.tokens] == whole.tokens[row]
            assert [piece.finish_reason for piece in own[:-1]] == [None] * (len(own) - 1)
            assert own[-1].finish_reason == whole.finish_reasons[row]
        assert len(pieces) > 2 * len(PROMPTS)


def test_a_stream_refuses_before_its_first_piece(model: Model) -> None:
    with pytest.raises(GenerationError, match="context"):
        qs_jax.stream(model, "a", max_new_tokens=10_000)


def test_chat_messages_go_through_the_template(model: Model) -> None:
    assert model.tokenizer is not None
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    written = model.tokenizer.encode("<user>Hi</s><assistant>Yo</s><assistant>")
    assert model.tokenizer.encode_chat(messages) == written
    for prompts in (messages, [messages]):
        output = qs_jax.generate(model, prompts, max_new_tokens=8)
        assert output.tokens == qs_jax.generate(model, [written], max_new_tokens=8).tokens


def test_chat_without_a_template_or_against_it_is_refused() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer(character_tokenizer()).encode_chat(messages)
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TokenizerError, match="roles must alternate"):
        Tokenizer(character_tokenizer(), chat_template=refusing).encode_chat(messages)


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
    assert detokenizer.text == text


def test_bytes_that_never_become_a_character_come_out_at_the_end() -> None:
    detokenizer = Detokenizer(byte_tokenizer(), list(b"prompt"))
    assert [detokenizer.push(byte) for byte in b"a\xe2\x82"] == ["a", "", ""]
    assert set(detokenizer.flush()) == {"\ufffd"}
    assert detokenizer.text.startswith("a")


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


def test_real_stop_string_over_tokens(data_dir: Path) -> None:
    """A stop string that begins and ends inside tokens of a SentencePiece vocabulary."""
    model = qs_jax.load(data_dir / "models" / "stories260K")
    assert model.tokenizer is not None
    free = qs_jax.generate(model, "Once upon a time", max_new_tokens=64)
    ends = [len(model.tokenizer.decode(free.tokens[0][:count])) for count in range(1, 65)]
    start, stop = next(
        (a, b) for a in range(40, 90) for b in range(a + 5, a + 12) if a not in ends and b not in ends and b < ends[-1]
    )
    needle = free.texts[0][start:stop]
    output = qs_jax.generate(model, "Once upon a time", max_new_tokens=64, stop_strings=needle)
    cut = free.texts[0].index(needle) + len(needle)
    assert output.finish_reasons == ["stop_string"]
    assert free.texts[0].startswith(output.texts[0])
    assert cut <= len(output.texts[0]) < cut + 8
    assert output.tokens[0] == free.tokens[0][: output.lengths[0]]


def test_the_tiny_tokenizer_is_what_the_tests_take_it_for() -> None:
    assert tiny_tokenizer().vocab_size == 97
    assert tiny_tokenizer().encode(" ~") == [0, 94]
    assert tiny_tokenizer().decode([0, 94, 96]) == " ~"
