"""From documents to token windows: the tokenizer, packed streams, and the mixture that draws from them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from reference_models.data import DataError, Source

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 8192
_CYCLE = 100


def train_tokenizer(documents: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE whose token 0 is the document separator."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write the two files that transformers reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def pack(tokenizer: Tokenizer, documents: Sequence[str]) -> Int[np.ndarray, " tokens"]:
    """All documents end to end, the separator before each."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [ids for e in tokenizer.encode_batch(list(documents)) for ids in ([separator], e.ids)]
    return np.concatenate([np.asarray(ids, np.uint16) for ids in pieces])


def prepare(
    sources: Mapping[str, Source], folder: Path, *, vocab_size: int = VOCAB_SIZE, tokenizer: Tokenizer | None = None
) -> None:
    """Train the tokenizer on training text only, unless one is given, and write it and each source's packed tokens to
    `folder`.

    Every tenth stretch of the largest source stands for it when the merges are learnt: all of it would drown the
    others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer or train_tokenizer(
        (text for source in sources.values() for text in _sample(source)), vocab_size
    )
    for name, source in sources.items():
        np.save(folder / f"{name}-train.npy", pack(tokenizer, source.train))
        np.save(folder / f"{name}-held-out.npy", pack(tokenizer, source.held_out))
    tokenizer.save(str(folder / "tokenizer.json"))


def _sample(source: Source, stretch: int = 10_000, most: int = 8_000_000) -> Iterable[str]:
    stride = stretch * max(1, round(sum(map(len, source.train)) / most))
    return (text[start : start + stretch] for text in source.train for start in range(0, len(text), stride))


def load_packed(folder: Path, names: Iterable[str], split: str) -> dict[str, Int[np.ndarray, " tokens"]]:
    """The packed tokens that `prepare` wrote; `split` is "train" or "held-out".

    Raises:
        DataError: a file is missing.
    """
    try:
        return {name: np.load(folder / f"{name}-{split}.npy", allow_pickle=False) for name in names}
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: not found; run the prepare step first") from None


class Mixture:
    """Windows drawn from several packed streams at fixed shares; a pure function of the draw's number.

    Within a source, windows come in shuffled order without repetition until it is exhausted; each pass shifts the
    window borders. Shares hold exactly over every 100 draws.
    """

    def __init__(self, streams: Mapping[str, Int[np.ndarray, " tokens"]], shares: Mapping[str, float], seed: int):
        self.streams, self.seed = streams, seed
        counts = {name: round(share * _CYCLE) for name, share in shares.items()}
        if sum(counts.values()) != _CYCLE or min(counts.values()) < 1:
            raise DataError(f"mixture {dict(shares)} must be shares of at least 0.01 that add up to 1; edit the recipe")
        self.counts = counts
        cycle = [name for name, count in counts.items() for _ in range(count)]
        self.cycle = np.random.default_rng(seed).permutation(cycle).tolist()

    def window(self, draw: int, length: int) -> Int[np.ndarray, " length_plus_one"]:
        """`length` + 1 consecutive tokens of one source: inputs and, shifted by one, targets."""
        cycles, place = divmod(draw, _CYCLE)
        name = self.cycle[place]
        index = cycles * self.counts[name] + self.cycle[:place].count(name)
        stream = self.streams[name]
        windows = (len(stream) - 1) // length - 1
        if windows < 1:
            raise DataError(f"{name}: {len(stream)} tokens cannot fill two windows of {length}; give more text")
        epoch, place_in_epoch = divmod(index, windows)
        random = np.random.default_rng([self.seed, sorted(self.streams).index(name), length, epoch])
        start = int(random.integers(length)) + int(random.permutation(windows)[place_in_epoch]) * length
        return stream[start : start + length + 1].astype(np.int32)

    def batch(self, first_draw: int, size: int, length: int) -> Int[np.ndarray, "size length_plus_one"]:
        return np.stack([self.window(first_draw + row, length) for row in range(size)])
