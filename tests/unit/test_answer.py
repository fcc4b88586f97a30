"""Where an answer ends, and what of it may be told before it does."""

from collections.abc import Sequence

import numpy as np
import pytest

from qs_jax.engine.decode import Chosen
from qs_jax.engine.places import Gain
from qs_jax.serving.answer import Answer, Piece
from tests.tiny import tiny_model

MODEL = tiny_model("llama", tokenizer=True)
END = 96


def gain(tokens: Sequence[int], *, logprob: float = -1.0, drafted: bool = False) -> Gain:
    count = len(tokens)
    ones = np.ones(count, np.int32)
    chosen = Chosen(
        tokens=np.asarray(tokens, np.int32),  # pyright: ignore[reportArgumentType]
        logprobs=np.full(count, logprob, np.float32),  # pyright: ignore[reportArgumentType]
        emitted=ones > 0,  # pyright: ignore[reportArgumentType]
        layers_run=2 * ones,  # pyright: ignore[reportArgumentType]
        bits_read=8 * ones,  # pyright: ignore[reportArgumentType]
        signal=np.zeros(count, np.float32),  # pyright: ignore[reportArgumentType]
        logits=np.tile(np.arange(97, dtype=np.float32), (count, 1)),  # pyright: ignore[reportArgumentType]
    )
    return Gain(0, chosen, [drafted] * count, False)


def answered(text: str, *, most: int = 99, step: int = 3, end: bool = False, stops: Sequence[str] = ()) -> list[Piece]:
    """What is told of a text that comes a few characters at a time."""
    assert MODEL.tokenizer is not None
    tokens = MODEL.tokenizer.encode(text) + [END] * end
    answer = Answer(MODEL, [1], eos=[END], max_new_tokens=most, bits=32.0, stops=stops)
    pieces = []
    for first in range(0, len(tokens), step):
        pieces.append(answer.take(gain(tokens[first : first + step])))
        if pieces[-1].finish:
            break
    return pieces


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("step", [1, 2, 5, 50])
def test_a_stop_is_no_part_of_the_text(step: int) -> None:
    pieces = answered("one two, three two", step=step, stops=["two", "three"])
    assert joined(pieces) == "one "
    assert (pieces[-1].finish, pieces[-1].produced) == ("stop", 7)


@pytest.mark.parametrize("step", [1, 4])
def test_what_only_begins_a_stop_is_told_later(step: int) -> None:
    pieces = answered("a ENtire EN", step=step, stops=["END"])
    assert joined(pieces[:-1]) in ("a ENtire ", "a ENtire")
    assert pieces[-1].finish is None
    finished = answered("a ENtire EN", most=11, step=step, stops=["END"])
    assert joined(finished) == "a ENtire EN"
    assert finished[-1].finish == "length"


def test_the_end_of_text_is_no_part_of_it() -> None:
    pieces = answered("whole", end=True)
    assert (joined(pieces), pieces[-1].finish, pieces[-1].produced) == ("whole", "stop", 6)


def test_nothing_follows_the_length_asked_for() -> None:
    pieces = answered("abcdefgh", most=4, step=3)
    assert (joined(pieces), pieces[-1].finish, pieces[-1].produced) == ("abcd", "length", 4)


def test_the_first_of_several_stops_counts() -> None:
    assert joined(answered("abcdef", step=6, stops=["ef", "cd", "de"])) == "ab"


def test_tokens_are_told_with_what_they_took() -> None:
    answer = Answer(MODEL, [1], eos=[END], max_new_tokens=9, bits=32.0, top=2)
    (token,) = answer.take(gain([40], drafted=True)).told
    assert (token.text, token.layers_run, token.bits, token.drafted) == ("H", 2, 4.0, True)
    assert [place for place, _ in token.top] == [96, 95]
    assert token.top[0][1] - token.top[1][1] == pytest.approx(1.0)
    assert np.exp(token.top[0][1]) == pytest.approx(1 - np.exp(-1), rel=1e-3)


def test_what_is_not_finite_ends_an_answer() -> None:
    answer = Answer(MODEL, [1], eos=[END], max_new_tokens=9, bits=32.0)
    piece = answer.take(gain([40], logprob=float("nan")))
    assert (piece.told, piece.finish) == ((), "not_finite")
