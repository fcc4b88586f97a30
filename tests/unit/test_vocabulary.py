"""A GGUF's vocabulary: cut, merged and framed as llama.cpp does, and as the libraries that it was made with."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from convert.source import locate
from qs_jax.errors import TokenizerError
from qs_jax.loading import load
from qs_jax.tokenizer import Tokenizer
from tests.ggufs import CHARACTERS, write_gguf
from tests.unit.test_conversion import run

TEXT = "It's 2024: you'LL pay  1,234½ of x_y's…\n\n  in Été McDONALD's!!\r\n\t 12345 东京タワー don't   stop "


def tokenizer(tmp_path: Path, name: str = "llama", notes: list[str] | None = None, **metadata: Any) -> Tokenizer:
    """Of the tiny model with these entries for its own."""
    file = locate(str(write_gguf(tmp_path / "m.gguf", name, **metadata)))
    found = Tokenizer.load(file)
    if notes is not None:
        notes += file.notes  # pyright: ignore[reportAttributeAccessIssue]
    return found


def trained() -> tuple[Backend, dict[str, Any]]:
    """A byte-level tokenizer without any cut that merges across words and digits, and its entries."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in model["merges"]]
    size = len(tokens)
    entries = {"tokens": [*tokens, "<s>", "</s>"], "merges": merges, "token_type": [1] * size + [3, 3]}
    entries |= {"bos_token_id": size, "eos_token_id": size + 1}
    return backend, {f"tokenizer__ggml__{key}": value for key, value in entries.items()}


PIECES = {
    "gpt-2": "It|'s| 2024|:| you|'|LL| pay| | 1|,|234½| of| x|_|y|'s|…|\n\n | in| Été| McDONALD|'s|!!|\r\n\t| 12345"
    "| 东京タワー| don|'t|  | stop| ",
    "smollm": "It|'s| |2|0|2|4|:| you|'|LL| pay|  |1|,|2|3|4|½| of| x|_|y|'s|…|\n\n | in| Été| McDONALD|'s|!!|\r\n\t "
    "|1|2|3|4|5| 东京タワー| don|'t|  | stop| ",
    "qwen2": "It|'s| |2|0|2|4|:| you|'LL| pay| | |1|,|2|3|4|½| of| x|_y|'s|…\n\n| | in| Été| McDONALD|'s|!!\r\n|\t|"
    " |1|2|3|4|5| 东京タワー| don|'t|  | stop| ",
}
"""What GPT-2's, SmolLM's and Qwen's own tokenizers cut the text into."""


def own(name: str) -> Any:
    """The pre-tokenizer that a model's own `tokenizer.json` has."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }[name]


@pytest.mark.parametrize("name", ["gpt-2", "smollm"])
def test_text_is_cut_as_the_models_own_tokenizer_cuts_it(tmp_path: Path, name: str) -> None:
    backend, entries = trained()
    backend.pre_tokenizer = own(name)
    found = tokenizer(tmp_path, tokenizer__ggml__pre=name, **entries)
    assert found.encode(TEXT) == backend.encode(TEXT).ids
    assert found.decode(found.encode(TEXT)) == TEXT


CASES = {
    "default": ("a 1234567 b!!c", "a| |123|456|7| b|!!|c"),
    "gpt-2": (TEXT, PIECES["gpt-2"]),
    "smollm": (TEXT, PIECES["smollm"]),
    "qwen2": (TEXT, PIECES["qwen2"]),
    "llama-bpe": ("I'LL 12345  x\n\n y", "I|'LL| |123|45| | x|\n\n| y"),
    "smaug-bpe": ("I'LL 12345  x\n\n y", "I|'LL| |123|45| | x|\n\n| y"),
    "tekken": ("I'LL 123 camelCase/\n", "I|'LL| |1|2|3| camel|Case|/\n"),
    "gpt-4o": ("I'LL 1234 camelCase's", "I'LL| |123|4| camel|Case's"),
    "deepseek-coder": ("a1 b!\n", "a|1| b|!|\n"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_names_of_cuts(tmp_path: Path, name: str) -> None:
    _, entries = trained()
    text, expected = CASES[name]
    found = tokenizer(tmp_path, tokenizer__ggml__pre=name, tokenizer__ggml__add_bos_token=False, **entries)
    cut = found._backend.pre_tokenizer.pre_tokenize_str(text)
    assert "|".join(text[start:end] for _, (start, end) in cut) == expected


def test_a_cut_that_is_not_known_is_refused_and_token_ids_still_work(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", tokenizer__ggml__pre="novel")
    model = load(file, compilation_cache=False)
    assert model.tokenizer is None
    with pytest.raises(
        TokenizerError, match=r"m\.gguf: tokenizer\.ggml\.pre is 'novel', a way to cut text that is not"
    ):
        Tokenizer.load(locate(str(file)))
    status, out, errors = run(file, tmp_path / "out", "--json")
    assert status == 0, errors
    assert "converted without a tokenizer" in out
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(("name", "assumed"), [("gpt2", "gpt-2"), ("qwen2", "qwen2"), ("llama", "default")])
def test_a_file_that_does_not_say_how_to_cut(tmp_path: Path, name: str, assumed: str) -> None:
    _, entries = trained()
    notes: list[str] = []
    found = tokenizer(tmp_path, name, notes, tokenizer__ggml__pre=None, **entries)
    assert found.encode(TEXT) == tokenizer(tmp_path, name, tokenizer__ggml__pre=assumed, **entries).encode(TEXT)
    (note,) = notes
    assert f"tokenizer.ggml.pre is missing; {assumed!r} is taken" in note


def test_tokens_with_a_meaning_are_matched_whole(tmp_path: Path) -> None:
    kinds = [1] * 97
    kinds[95], kinds[96], kinds[94] = 3, 3, 4
    found = tokenizer(tmp_path, tokenizer__ggml__token_type=kinds)
    assert found.special_ids == [95, 96]
    assert found.encode("a<s>you</s>") == [64, 95, CHARACTERS.index("y"), 94, 96]
    assert found.decode([64, 95, 94]) == "aou"
    assert found.eos_id == 96


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, []),
        ({"add_bos_token": True}, [95]),
        ({"add_bos_token": True, "add_eos_token": True}, [95, 96]),
        ({"pre": "llama-bpe"}, [95]),
        ({"pre": "llama-bpe", "bos_token_id": None}, []),
        ({"pre": "llama-bpe", "add_bos_token": False}, []),
    ],
)
def test_what_frames_a_text(tmp_path: Path, entries: dict[str, Any], expected: list[int]) -> None:
    found = tokenizer(tmp_path, **{f"tokenizer__ggml__{key}": value for key, value in entries.items()})
    assert [token for token in found.encode("hi") if token >= 95] == expected
    assert found.encode_chat([{"role": "user", "content": "x"}]).count(95) == 0


def test_tokens_are_taken_whole_where_the_model_takes_them_so(tmp_path: Path) -> None:
    """Llama 3's vocabulary has words that no merges make."""
    tokens = [*CHARACTERS[:94], "Ġyou", "<s>", "</s>"]
    entries: dict[str, Any] = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__merges": ["Ġ y"]}
    entries["tokenizer__ggml__tokens"] = [*tokens[:92], "Ġy", "Ġ", *tokens[94:]]
    frame: dict[str, Any] = {"tokenizer__ggml__add_bos_token": False}
    assert tokenizer(tmp_path, tokenizer__ggml__pre="llama-bpe", **entries, **frame).encode(" you") == [94]
    assert len(tokenizer(tmp_path, tokenizer__ggml__pre="smaug-bpe", **entries, **frame).encode(" you")) == 3


def sentencepiece_model(prefix: bool) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT.replace("\n", " "), "once upon a time there was a king", "the kings of old"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def entries_of(model: sentencepiece.SentencePieceProcessor, prefix: bool) -> dict[str, Any]:
    """As llama.cpp's converter writes them."""
    ids = range(model.get_piece_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    entries: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [float(model.get_score(i)) for i in ids],
        "token_type": kinds,
        "merges": None,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
        "add_space_prefix": prefix,
    }
    return {f"tokenizer__ggml__{key}": value for key, value in entries.items()}


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_is_sentencepieces(tmp_path: Path, prefix: bool) -> None:
    model = sentencepiece_model(prefix)
    found = tokenizer(tmp_path, **entries_of(model, prefix))
    for text in (TEXT, "the king's time", "  twice", " once", "☃ upon\n\na", "", "aaaa bbbb kingking"):
        ids = list(model.encode(text))
        assert found.encode(text) == [model.bos_id(), *ids], text
        assert found.decode(found.encode(text)) == text
    assert found.encode("<s>once") == [1, 1, *model.encode("once")]


VOCABULARIES: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"model": "bert"}, "tokenizer.ggml.model is 'bert', expected gpt2 or llama"),
    "no kind": ({"model": None}, "tokenizer.ggml.model is missing"),
    "a kind that is a number": ({"model": 3}, "tokenizer.ggml.model is 3, expected a string"),
    "numbers for tokens": ({"tokens": [1, 2]}, "expected an array of strings"),
    "a token twice": ({"tokens": ["a", "b", "a"], "token_type": None}, "token 'a' is in the vocabulary twice"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges is missing"),
    "a merge of one": ({"merges": ["ab"]}, "merge 'ab' is no two tokens"),
    "a merge of what is not there": ({"merges": ["a §"]}, "merges do not fit the vocabulary"),
    "too few types": ({"token_type": [1, 1]}, "has not one number for each of 97 tokens"),
    "types that are words": ({"token_type": ["a"] * 97}, "has not one number for each of 97 tokens"),
    "no scores": ({"model": "llama"}, "tokenizer.ggml.scores is no list of numbers"),
    "scores that are none": ({"model": "llama", "scores": [float("nan")] * 97}, "is no list of numbers"),
    "a very long piece": (
        {"model": "llama", "scores": [0.0] * 97, "tokens": [*CHARACTERS[:96], "a" * 300]},
        "a token has 300 characters, more than 256",
    ),
    "a beginning that is none": ({"add_bos_token": True, "bos_token_id": 97}, "bos_token_id is 97"),
    "a flag that is a number": ({"add_bos_token": 1}, "expected true or false"),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_vocabularies_that_contradict_themselves(tmp_path: Path, case: str) -> None:
    changed, message = VOCABULARIES[case]
    with pytest.raises(TokenizerError, match=message.replace(".", r"\.")) as error:
        tokenizer(tmp_path, **{f"tokenizer__ggml__{key}": value for key, value in changed.items()})
    assert "\n" not in str(error.value)
    assert str(tmp_path / "m.gguf") in str(error.value)


def test_a_token_without_text_has_a_name(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, tokenizer__ggml__tokens=[*CHARACTERS[:93], "", *CHARACTERS[94:]])
    assert found._backend.id_to_token(93) == "[EMPTY_93]"


@pytest.mark.parametrize("kind", ["none", "no_vocab"])
def test_a_file_without_a_vocabulary(tmp_path: Path, kind: str) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer files"):
        tokenizer(tmp_path, tokenizer__ggml__model=kind)
    assert load(write_gguf(tmp_path / "m.gguf", vocabulary=False), compilation_cache=False).tokenizer is None


def test_scores_may_be_of_any_width(tmp_path: Path) -> None:
    """Ties are broken by which half is longer, as transformers breaks them."""
    tokens = [*CHARACTERS[:90], "aa", "aaa", "▁", "<unk>", "<s>", "</s>", "▁a"]
    scores = np.linspace(0, -1, 97).tolist()
    entries: dict[str, Any] = {"model": "llama", "tokens": tokens, "scores": scores, "unknown_token_id": 93}
    entries |= {"token_type": None, "bos_token_id": 94, "eos_token_id": 95, "add_bos_token": False}
    found = tokenizer(tmp_path, **{f"tokenizer__ggml__{key}": value for key, value in entries.items()})
    assert found.encode("aaa") == [92, 91]
