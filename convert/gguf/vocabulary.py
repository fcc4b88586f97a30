"""A GGUF's vocabulary as the `tokenizer.json` and `tokenizer_config.json` that it stands for.

Built with the tokenizers library from what the metadata lists. Where transformers' reading and llama.cpp's differ, this
is llama.cpp's, for which files are made: how text is cut before merging, and the space that a SentencePiece vocabulary
has before a text and after every special token.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.gguf.entries import Entries
from convert.gguf.header import short
from convert.gguf.splits import ASSUMED, CUTS, Cut
from qs_jax.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER = 3, 4
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
"""With llama.cpp's spelling."""

_BEGINNING = "tokenizer.ggml.bos_token_id"
_SPACE = "▁"
_LONGEST_PIECE = 256
"""Characters of a token that merges make; the longest that models have are runs of some dozens of spaces."""


def has_vocabulary(entries: Entries) -> bool:
    """Some files are made without one, and say so."""
    return entries.has("tokenizer.ggml.tokens") and entries.text("tokenizer.ggml.model", "") not in ("none", "no_vocab")


def tokenizer_config_of(entries: Entries) -> dict[str, Any]:
    """The special tokens that have a name."""
    tokens = _tokens(entries)
    ids = {name: entries.token_id(key) for name, key in _NAMED.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None and 0 <= index < len(tokens)}


def tokenizer_of(entries: Entries, notes: list[str]) -> "Tokenizer":
    """The tokenizer; `notes` takes a line for what was decided that the file leaves open.

    Raises:
        TokenizerError: a kind of vocabulary that is not read, or one that contradicts itself; by entries, too.
    """
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = entries.text("tokenizer.ggml.model")
    if kind not in kinds:
        raise TokenizerError(
            f"{entries.path}: tokenizer.ggml.model is {short(kind)}, expected {' or '.join(kinds)}; give token ids, or "
            "take the model as a Hugging Face folder"
        )
    tokens = _tokens(entries)
    backend, begins = kinds[kind](entries, tokens, notes)
    _mark_special(entries, backend, tokens)
    _frame(entries, backend, tokens, begins=begins)
    return backend


def _tokens(entries: Entries) -> list[str]:
    """The vocabulary by id; a token without text is named as llama.cpp names it."""
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(entries.texts("tokenizer.ggml.tokens"))]
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise TokenizerError(f"{entries.path}: token {short(twice)} is in the vocabulary twice; get the file again")
    return tokens


def _numbers(entries: Entries, key: str, size: int) -> np.ndarray | None:
    """One number for each token, where the file has them."""
    value = entries.metadata.get(key)
    if value is not None and (not isinstance(value, np.ndarray) or len(value) != size):
        raise TokenizerError(f"{entries.path}: {key} has not one number for each of {size} tokens; get the file again")
    return value


def _byte_level(entries: Entries, tokens: list[str], notes: list[str]) -> tuple["Tokenizer", bool]:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers

    cut = _cut(entries, notes)
    merges = [_pair(entries, merge) for merge in entries.texts("tokenizer.ggml.merges")]
    model = _bpe(entries, tokens, merges, ignore_merges=cut.whole)
    backend = Tokenizer(model)
    splits: list[Any] = [pre_tokenizers.Split(Regex(text), "isolated") for text in cut.expressions]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, cut.begins


def _cut(entries: Entries, notes: list[str]) -> Cut:
    name = entries.text("tokenizer.ggml.pre", "")
    if not name:
        name = ASSUMED.get(entries.architecture, "default")
        notes.append(f"{entries.path}: tokenizer.ggml.pre is missing; {name!r} is taken, and may cut text otherwise")
    if name not in CUTS:
        raise TokenizerError(
            f"{entries.path}: tokenizer.ggml.pre is {short(name)}, a way to cut text that is not known; give token "
            "ids, or take the model as a Hugging Face folder"
        )
    return CUTS[name]


def _pair(entries: Entries, merge: str) -> tuple[str, str]:
    place = merge.find(" ", 1)
    if place < 0:
        raise TokenizerError(f"{entries.path}: merge {short(merge)} is no two tokens; get the file again")
    return merge[:place], merge[place + 1 :]


def _bpe(entries: Entries, tokens: list[str], merges: Sequence[tuple[str, str]], **options: Any) -> Any:
    from tokenizers import models

    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return models.BPE(vocab=vocabulary, merges=list(merges), **options)
    except Exception as error:  # the library's own class has no name
        raise TokenizerError(f"{entries.path}: merges do not fit the vocabulary ({short(str(error))})") from None


def _sentencepiece(entries: Entries, tokens: list[str], notes: list[str]) -> tuple["Tokenizer", bool]:
    """Merged in the order of the scores, which is what SentencePiece does; bytes stand for what no token has."""
    from tokenizers import Tokenizer, decoders, normalizers

    scores = _numbers(entries, "tokenizer.ggml.scores", len(tokens))
    if scores is None or not np.isfinite(scores).all():
        raise TokenizerError(f"{entries.path}: tokenizer.ggml.scores is no list of numbers; get the file again")
    unknown = entries.token_id("unknown_token_id")
    named = tokens[unknown] if unknown is not None and 0 <= unknown < len(tokens) else None
    merges = list(_merges(entries, tokens, scores))
    backend = Tokenizer(_bpe(entries, tokens, merges, unk_token=named, fuse_unk=True, byte_fallback=True))
    prefixed = entries.flag("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefixed else parts)
    return backend, True


def _merges(entries: Entries, tokens: list[str], scores: np.ndarray) -> Iterator[tuple[str, str]]:
    """Every two tokens that make a third, the best third first; of one third longer first halves first."""
    if (longest := max(map(len, tokens), default=0)) > _LONGEST_PIECE:
        raise TokenizerError(f"{entries.path}: a token has {longest} characters, more than {_LONGEST_PIECE}; not read")
    known = set(tokens)
    found = [
        (-score, -cut, token)
        for token, score in zip(tokens, scores.tolist(), strict=True)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
    found.sort(key=lambda entry: entry[:2])
    return ((token[:-cut], token[-cut:]) for _, cut, token in found)


def _mark_special(entries: Entries, backend: "Tokenizer", tokens: list[str]) -> None:
    """Tokens that are matched before text is cut: those that mean something, and those that users added."""
    from tokenizers import AddedToken

    kinds = _numbers(entries, "tokenizer.ggml.token_type", len(tokens))
    if kinds is None:
        return
    for kind, add, special in ((_CONTROL, backend.add_special_tokens, True), (_USER, backend.add_tokens, False)):
        add([AddedToken(tokens[i], normalized=False, special=special) for i in np.flatnonzero(kinds == kind)])


def _frame(entries: Entries, backend: "Tokenizer", tokens: list[str], *, begins: bool) -> None:
    """What is put before and after every text."""
    from tokenizers import processors

    wanted = {
        "bos": ("bos_token_id", entries.flag("tokenizer.ggml.add_bos_token", begins and entries.has(_BEGINNING))),
        "eos": ("eos_token_id", entries.flag("tokenizer.ggml.add_eos_token", False)),
    }
    ids = {name: entries.token_id(key) for name, (key, put) in wanted.items() if put}
    for name, index in ids.items():
        if index is None or not 0 <= index < len(tokens):
            raise TokenizerError(
                f"{entries.path}: tokenizer.ggml.add_{name}_token is true, and {name}_token_id is {index}; get the "
                "file again"
            )
    if not ids:
        return
    single = ["bos"] * ("bos" in ids) + ["$A"] + ["eos"] * ("eos" in ids)
    special: list[Any] = [{"id": name, "ids": [index], "tokens": [tokens[index or 0]]} for name, index in ids.items()]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
