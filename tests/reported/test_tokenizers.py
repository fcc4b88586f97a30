"""Tokenizers as folders bring them: by vocabulary alone, with a chat template anywhere, with settings of whoever saved
them. Ids are what transformers gives, written down as numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2 as sentencepiece
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

import qs_jax
from qs_jax.errors import TokenizerError
from qs_jax.tokenizer import Tokenizer as Ours
from tests.reported.folders import bytes_tokenizer, llama

SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|bot|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)
CHAT = [{"role": "user", "content": "hi"}]


def chat_tokenizer() -> Tokenizer:
    """Bytes and the special tokens, of which the first is put before every text."""
    tokenizer = bytes_tokenizer(*SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<|begin|> $A", special_tokens=[("<|begin|>", 256)]
    )
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or chat_tokenizer()).save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    return folder


def _jinja(folder: Path) -> None:
    write_tokenizer(folder, chat_template="not this one")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


TEMPLATES: dict[str, tuple[Callable[[Path], Any], list[int]]] = {
    "in the configuration": (
        lambda folder: write_tokenizer(folder, chat_template=TEMPLATE),
        [256, 258, 71, 72, 257, 259],
    ),
    "one of several": (
        lambda folder: write_tokenizer(
            folder,
            chat_template=[{"name": "tool_use", "template": "TOOLS"}, {"name": "default", "template": TEMPLATE}],
        ),
        [256, 258, 71, 72, 257, 259],
    ),
    "in a file of its own": (_jinja, [256, 258, 71, 72, 257, 259]),
    # vllm-project/vllm pull 27515: a template that begins a text and a tokenizer that does so again
    "an object of several": (
        lambda folder: write_tokenizer(folder, chat_template={"default": TEMPLATE, "tool_use": "TOOLS"}),
        [256, 258, 71, 72, 257, 259],
    ),
    "without a beginning": (
        lambda folder: write_tokenizer(folder, chat_template=TEMPLATE.removeprefix("{{ bos_token }}")),
        [258, 71, 72, 257, 259],
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_wherever_it_stands(name: str, tmp_path: Path) -> None:
    build, expected = TEMPLATES[name]
    build(tmp_path)
    assert Ours.load(tmp_path).encode_chat(CHAT) == expected


def test_a_template_that_refuses_a_role_says_why(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=TEMPLATE)
    with pytest.raises(TokenizerError, match="System role not supported"):
        Ours.load(tmp_path).encode_chat([{"role": "system", "content": "x"}, *CHAT])


def test_truncation_and_padding_of_whoever_saved_it_are_not_ours(tmp_path: Path) -> None:
    """huggingface/tokenizers keeps the last call's truncation in tokenizer.json: long prompts were cut silently."""
    tokenizer = chat_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    assert len(Ours.load(write_tokenizer(tmp_path, tokenizer)).encode("0123456789")) == 11


def test_classes_of_transformers_5_and_lists_of_extra_tokens(tmp_path: Path) -> None:
    """ml-explore/mlx-lm issue 683: folders that transformers 5 saves name a class that nobody else knows."""
    write_tokenizer(
        tmp_path, tokenizer_class="TokenizersBackend", extra_special_tokens=["<|user|>"], backend="tokenizers"
    )
    tokenizer = Ours.load(tmp_path)
    assert tokenizer.special_ids == [256, 257, 258, 259]
    assert tokenizer.decode(tokenizer.encode("hi<|user|>")) == "hi"
    assert tokenizer.decode(tokenizer.encode("hi<|user|>"), special=True) == "<|begin|>hi<|user|>"


def test_tokens_that_only_the_configuration_names(tmp_path: Path) -> None:
    """jzhang38/TinyLlama issue 41: a token for padding was added after the tokenizer was saved."""
    added = {"260": {"content": "[PAD]", "special": True, "normalized": False}}
    write_tokenizer(tmp_path, added_tokens_decoder=added, pad_token="[PAD]")
    assert Ours.load(tmp_path).encode("[PAD]") == [256, 260]
    write_tokenizer(tmp_path, added_tokens_decoder={"300": added["260"]})
    with pytest.raises(TokenizerError, match=r"'\[PAD\]' has id 300 .* and 260 in the vocabulary"):
        Ours.load(tmp_path)


def test_special_tokens_that_no_file_gives_an_id_come_in_transformers_order(tmp_path: Path) -> None:
    """The named ones first, then the others as they are listed; ones that are there already stay what they are."""
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens([AddedToken("plain", normalized=False)])
    pad = {"content": "[PAD]", "lstrip": True, "rstrip": True}
    write_tokenizer(tmp_path, tokenizer, additional_special_tokens=["NEW", "AAA", "plain"], pad_token=pad)
    ours = Ours.load(tmp_path)
    assert ours.encode(" [PAD] xNEWAAAplain") == [256, 261, 87, 262, 263, 260]
    assert ours.decode([260, 261, 262]) == "plain"
    write_tokenizer(tmp_path, extra_special_tokens=["ONE"], additional_special_tokens=["TWO"])
    assert Ours.load(tmp_path).encode("ONETWO") == [256, 260, 51, 54, 46]


def test_names_that_only_the_class_gives(tmp_path: Path) -> None:
    """A template writes what transformers' class calls the beginning of text, where the folder does not name it."""
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "chat_template": "{{ bos_token }}hi{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Ours.load(tmp_path).encode_chat(CHAT) == [260, 71, 72, 261]


def test_a_prompt_that_needs_a_token_the_model_lacks_is_refused(tmp_path: Path) -> None:
    """ggml-org/llama.cpp issue 8682: tokens beyond the embedding; only a prompt that has one cannot be run."""
    llama(vocab_size=96)(tmp_path)
    write_tokenizer(tmp_path)
    model = qs_jax.load(tmp_path, compilation_cache=False)
    with pytest.raises(qs_jax.QsJaxError, match="token id is 256, expected a whole number from 0 to 95"):
        qs_jax.generate(model, "hi")


def sentencepiece_model() -> bytes:
    """A SentencePiece vocabulary as Llama 1 and 2 bring it: byte pairs with scores, bytes for everything else."""
    model = sentencepiece.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, **{f"<0x{byte:02X}>": 6 for byte in range(256)}}
    merges = ["▁t", "he", "▁the", "in", "er"]
    pieces = [*kinds, *merges, "▁", *"abcdefghijklmnopqrstuvwxyz"]
    for number, piece in enumerate(pieces):
        score = 0.0 if piece in kinds else -float(number)
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    return model.SerializeToString()


SENTENCE = "the inner wé"
PIECES = [261, 264, 262, 278, 263, 264, 287, 198, 172]
"""▁the, ▁, in, n, er, ▁, w and the two bytes of é: what transformers' LlamaTokenizer gives."""


def test_a_sentencepiece_vocabulary_alone(tmp_path: Path) -> None:
    """huggingface/transformers issue 36291: without its package the file was read as another format, and the error was
    about that one. A beginning of text is put first unless the folder says not to."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    tokenizer = Ours.load(tmp_path)
    assert tokenizer.encode(SENTENCE) == [1, *PIECES]
    Ours.load(tmp_path, notes := [])
    assert "nothing says add_bos_token" in notes[0]
    assert tokenizer.decode([1, *PIECES]) == SENTENCE
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": False, "add_eos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Ours.load(tmp_path).encode(SENTENCE) == [*PIECES, 2]


def test_a_byte_pair_vocabulary_alone(tmp_path: Path) -> None:
    """ggml-org/llama.cpp issue 3732: a Llama with vocab.json and merges.txt was converted and could not be loaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{c: i for i, c in enumerate(alphabet)}, "th": 256, "the": 257, "<|endoftext|>": 258}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2TokenizerFast"}))
    with pytest.raises(TokenizerError, match=r"vocab\.json needs merges\.txt"):
        Ours.load(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    assert Ours.load(tmp_path).encode("the<|endoftext|>") == [257, 258]
    options = {"add_bos_token": True, "add_prefix_space": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **options}))
    assert Ours.load(tmp_path).encode("the") == [258, vocabulary["\u0120"], 257]


def test_a_vocabulary_that_cannot_be_read_leaves_token_ids(tmp_path: Path) -> None:
    """The first Llama 3 folders keep a tiktoken vocabulary under SentencePiece's name."""
    llama(bos_token_id=1)(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    model = qs_jax.load(tmp_path, compilation_cache=False)
    assert qs_jax.generate(model, [[3, 4]], max_new_tokens=3).lengths == [3]
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: cannot be read; a tiktoken vocabulary is not"):
        qs_jax.generate(model, "hi")
