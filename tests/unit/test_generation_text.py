"""Text in, text out: stop strings, streaming and chat."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import qs_jax
from qs_jax.errors import GenerationError
from qs_jax.generation import GenerateOutput, StreamPiece
from qs_jax.model import Model
from tests.tiny import tiny_model

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
        assert streamed.pieces == whole.pieces
        assert ["".join(row) for row in whole.pieces] == whole.texts
        assert list(map(len, whole.pieces)) == whole.lengths
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
