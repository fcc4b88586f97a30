"""Damaged GGUF files: each is read soundly, or refused with one line, in bounded memory and time."""

import copy
import random
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.parts import Parts
from convert.source import locate, source_of
from qs_jax.errors import QsJaxError, TokenizerError
from qs_jax.tokenizer import Tokenizer
from tests.ggufs import CHARACTERS, RawGguf, write_gguf
from tests.hostile.mutations import spoil_bytes
from tests.hostile.test_commands import refused
from tests.hostile.test_fuzz import survive

Count = Callable[[str, int], None]
Change = Callable[[RawGguf], None]

MEMORY = 4 << 20
"""Bytes of Python's and numpy's that a file of 0.2 MB may make us take."""


def read_all(file: Path) -> None:
    """Everything that a load reads of it."""
    source = source_of(locate(str(file)))
    for name, shape in source.shapes.items():
        tensor = source.read(name)
        assert tensor.shape == shape
        assert np.isfinite(tensor.astype(np.float64)).all()
    Parts(source).plan.raise_if_incomplete(str(file))
    try:
        tokenizer = Tokenizer.load(source.files)
    except TokenizerError:
        return  # token ids still work
    tokenizer.decode(tokenizer.encode("Hi, you<s>"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")
    read_all(file)
    return file


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(raw: RawGguf, key: str, kind: int, value: bytes) -> None:
    """Another value, or a further entry."""
    raw.entries = [found for found in raw.entries if found[0] != key.encode()] + [(key.encode(), kind, value)]


def without(key: str) -> Change:
    def change(raw: RawGguf) -> None:
        raw.entries = [found for found in raw.entries if found[0] != key.encode()]

    return change


def put(key: str, kind: int, value: bytes) -> Change:
    return lambda raw: entry(raw, key, kind, value)


def place(at: int, **changed: Any) -> Change:
    """A tensor with another name, shape, kind or offset."""

    def change(raw: RawGguf) -> None:
        name, shape, kind, offset = raw.tensors[at]
        fields: dict[str, Any] = {"name": name, "shape": shape, "kind": kind, "offset": offset, **changed}
        raw.tensors[at] = fields["name"], fields["shape"], fields["kind"], fields["offset"]

    return change


def field(**changed: Any) -> Change:
    return lambda raw: raw.__dict__.update(changed)


def poison(value: float) -> Change:
    def change(raw: RawGguf) -> None:
        raw.data = struct.pack("<f", value) + raw.data[4:]

    return change


def overlap(raw: RawGguf) -> None:
    place(2, offset=raw.tensors[1][3])(raw)


def same_name(raw: RawGguf) -> None:
    place(2, name=raw.tensors[1][0])(raw)


def named(number: int) -> bytes:
    return struct.pack("<I", number)


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


DAMAGES: dict[str, tuple[Change, str]] = {
    "another file": (field(magic=b"GGML"), "is no GGUF file"),
    "the first version": (field(version=1), "is GGUF version 1, expected 2 or 3"),
    "a later version": (field(version=9), "is GGUF version 9"),
    "the other endianness": (field(version=3 << 24), "is a big-endian GGUF"),
    "tensors without end": (field(counts=[2**63, 3]), "9223372036854775808 tensors, more than"),
    "metadata without end": (field(counts=[1, 2**64 - 1]), "metadata, more than"),
    "fewer tensors": (lambda raw: raw.__dict__.update(counts=[3, len(raw.entries)]), "missing"),
    "more entries than there are": (lambda raw: raw.__dict__.update(counts=[1, 60]), "the file is damaged"),
    "no architecture": (without("general.architecture"), "architecture is None, which is not read; known: llama"),
    "an architecture that is not known": (put("general.architecture", 8, text(b"rwkv7")), "architecture is 'rwkv7'"),
    "an architecture that is a number": (put("general.architecture", 4, named(7)), "architecture is 7"),
    "no depth": (without("llama.block_count"), "llama.block_count is missing"),
    "no epsilon": (without("llama.attention.layer_norm_rms_epsilon"), "rms_epsilon is missing"),
    "a depth that is a word": (put("llama.block_count", 8, text(b"two")), "is 'two', expected a whole number"),
    "a depth that is true": (put("llama.block_count", 7, b"\1"), "is True, expected a whole number"),
    "an absurd depth": (put("llama.block_count", 4, named(2**31)), "num_hidden_layers is 2147483648, expected"),
    "no heads": (put("llama.attention.head_count", 4, named(0)), "rope.dimension_count is 8, expected 32"),
    "heads that do not fit": (put("llama.attention.head_count_kv", 4, named(3)), "is no 3 heads of pairs"),
    "heads that do not fit rows": (put("llama.attention.head_count", 4, named(6)), "rope.dimension_count is 8"),
    "an epsilon that is none": (
        put("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", float("nan"))),
        "rms_norm_eps is nan, expected a positive number",
    ),
    "a base that is none": (put("llama.rope.freq_base", 6, struct.pack("<f", 0.0)), "rope_theta is 0.0"),
    "experts": (put("llama.expert_count", 4, named(8)), "mixture of experts"),
    "a type that GGUF has not": (put("x", 13, named(1)), "x has type 13, which GGUF has not"),
    "arrays in an array": (put("x", 9, named(9) + number(1) + named(4) + number(0)), "is an array of type 9"),
    "an array without end": (put("x", 9, named(4) + number(2**62)), "elements in x, more than"),
    "an array that does not lie in the file": (put("x", 9, named(12) + number(2**22)), "in the middle of its header"),
    "strings that do not lie in the file": (put("x", 9, named(8) + number(2**22)), "x does not lie in the file"),
    "a string without end": (put("x", 8, number(2**64 - 1)), "bytes in x, more than"),
    "a string in an array without end": (put("x", 9, named(8) + number(1) + number(2**63)), "x does not lie in"),
    "a string that is not UTF-8": (put("x", 8, text(b"\xff\xfe")), "x is not UTF-8"),
    "a string in an array that is not UTF-8": (put("x", 9, named(8) + number(1) + text(b"\xff")), "x is not UTF-8"),
    "a key that is not UTF-8": (lambda raw: raw.entries.append((b"\xff", 4, named(1))), "a metadata key is not UTF-8"),
    "a key twice": (lambda raw: raw.entries.append(raw.entries[1]), "is there twice"),
    "an alignment that is none": (put("general.alignment", 4, named(0)), "general.alignment is 0, expected a power"),
    "an odd alignment": (put("general.alignment", 4, named(33)), "general.alignment is 33"),
    "an alignment that is a word": (put("general.alignment", 8, text(b"32")), "general.alignment is '32'"),
    "a huge alignment": (put("general.alignment", 4, named(2**30)), "general.alignment is 1073741824"),
    "a name that is not UTF-8": (place(1, name=b"\xff"), "a tensor's name is not UTF-8"),
    "a name without end": (place(1, name=b"a" * 1000), "a tensor's name is too long"),
    "no name": (place(1, name=b""), "a tensor's name is too long"),
    "a name twice": (same_name, "is there twice"),
    "tensors on each other": (overlap, "overlap"),
    "an offset beyond the file": (place(1, offset=2**40), "ends at byte"),
    "an offset that overflows": (place(1, offset=2**64 - 32), "ends at byte"),
    "an offset off the alignment": (place(1, offset=33), "no multiple of 32"),
    "no dimensions": (place(1, shape=[]), "has 0 dimensions, expected 1 to 4"),
    "nine dimensions": (place(1, shape=[1] * 9), "has 9 dimensions"),
    "a dimension of nothing": (place(1, shape=[0, 32]), "which cannot be"),
    "a huge dimension": (place(1, shape=[2**63, 2]), "which cannot be"),
    "dimensions whose product overflows": (place(1, shape=[2**20, 2**20, 2**20, 2**20]), "which cannot be"),
    "another shape": (place(0, shape=[16, 97]), "of the wrong shape"),
    "a vector for an embedding": (lambda raw: _embedding(raw, shape=[32]), "holds no token_embd.weight, a matrix"),
    "no embedding": (lambda raw: _embedding(raw, name=b"x"), "holds no token_embd.weight"),
    "a type that is not known": (place(1, kind=99), "has type 99, which is not read"),
    "a type that was taken away": (place(1, kind=4), "has type 4, which is not read"),
    "whole numbers": (place(1, kind=26), "has type 26, which is not read"),
    "rows that no block fits": (place(1, kind=12), "no multiple of Q4_K's blocks of 256"),
    "a weight that is no number": (poison(float("nan")), "holds NaN or infinity"),
    "a weight without bound": (poison(float("inf")), "holds NaN or infinity"),
}


def _embedding(raw: RawGguf, **changed: Any) -> None:
    place(next(n for n, tensor in enumerate(raw.tensors) if tensor[0] == b"token_embd.weight"), **changed)(raw)


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_is_named(sound: Path, tmp_path: Path, case: str) -> None:
    change, message = DAMAGES[case]
    raw, file = RawGguf.of(sound), tmp_path / "model.gguf"
    change(raw)
    file.write_bytes(raw.pack())
    refused(message, "generate", file, "--prompt", "once", "--max-new-tokens", 2)
    with pytest.raises(QsJaxError, match=re.escape(str(file))):
        read_all(file)


def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    for name, content in {"empty": b"", "short": b"GG", "magic": b"GGUF", "noise": bytes(range(256)) * 40}.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        refused(str(file), "generate", file, "--prompt", "once")
    refused("no such file", "generate", tmp_path / "no.gguf", "--prompt", "once")
    refused("is a file, expected a model folder, a .gguf file or a hub id", "generate", __file__, "--prompt", "once")


def test_cut_off_anywhere(sound: Path, tmp_path: Path, count: Count) -> None:
    """At every byte of the header's ends and every thousandth of the rest."""
    data, file = sound.read_bytes(), tmp_path / "model.gguf"
    header = len(data) - len(RawGguf.of(sound).data)
    places = sorted(
        {*range(200), *range(200, header, 17), *range(header - 100, header), *range(header, len(data), 997)}
    )
    for cut in places:
        file.write_bytes(data[:cut])
        assert not survive(lambda: locate(str(file)), cut), cut
    count("mutated inputs", len(places))


@pytest.mark.parametrize("tokens", [CHARACTERS[:90], [*CHARACTERS, *(f"<{n}>" for n in range(40))]])
def test_a_vocabulary_of_another_size_than_the_embedding(tmp_path: Path, tokens: list[str]) -> None:
    """What no token has is never written, what no row has is refused when it is asked for; ids work either way."""
    metadata: dict[str, Any] = {"tokenizer__ggml__bos_token_id": 88, "tokenizer__ggml__eos_token_id": 89}
    kinds = [1] * (len(tokens) - 1) + [3]
    file = write_gguf(
        tmp_path / "m.gguf",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=kinds,
        tokenizer__ggml__merges=["a b"] if "ab" in tokens else ["o u"] if "ou" in tokens else [],
        **metadata,
    )
    read_all(file)
    if len(tokens) > 97:
        refused("token id is 136, expected a whole number from 0 to 96", "generate", file, "--prompt", f"a{tokens[-1]}")


def spoil(raw: RawGguf, rng: random.Random) -> bytes:
    """A file wrong in what it says, or in how it is written."""
    spoilt, action = copy.deepcopy(raw), rng.random()
    odd = (0, 1, 2, 3, 7, 31, 97, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
    if action < 0.35:
        for _ in range(rng.choice((1, 1, 2))):
            number = rng.randrange(len(spoilt.entries))
            key, kind, value = spoilt.entries[number]
            changes: tuple[Callable[[], tuple[bytes, int, bytes]], ...] = (
                lambda key=key, kind=kind, value=value: (key, kind, spoil_bytes(value, rng, limit=24)),
                lambda key=key, kind=kind, value=value: (key, rng.randrange(15), value),
                lambda key=key, kind=kind, value=value: (spoil_bytes(key, rng), kind, value),
                lambda key=key, kind=kind, value=value: (rng.choice(spoilt.entries)[0], kind, value),
                lambda key=key, kind=kind, value=value: (key, kind, rng.choice(spoilt.entries)[2]),
                lambda key=key, kind=kind, value=value: (key, 4, struct.pack("<I", rng.choice(odd) % 2**32)),
            )
            spoilt.entries[number] = rng.choice(changes)()
    elif action < 0.7:
        number = rng.randrange(len(spoilt.tensors))
        name, shape, kind, offset = spoilt.tensors[number]
        shapes = (shape[::-1], [*shape, rng.choice(odd)], [rng.choice(odd), *shape[1:]], shape[1:])
        spoilt.tensors[number] = rng.choice(
            (
                (name, rng.choice(shapes), kind, offset),
                (name, shape, rng.randrange(45), offset),
                (name, shape, kind, rng.choice((*odd, offset + 32, offset - 32)) % 2**64),
                (rng.choice(spoilt.tensors)[0], shape, kind, offset),
                (spoil_bytes(name, rng), shape, kind, offset),
            )
        )
    elif action < 0.8:
        spoilt.counts = [rng.choice((*odd, len(raw.tensors))), rng.choice((*odd, len(raw.entries)))]
    elif action < 0.9:
        spoilt.data = spoil_bytes(spoilt.data, rng)
    else:
        return spoil_bytes(raw.pack(), rng, limit=5000)
    return spoilt.pack()


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(100, 600), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_mutated_files(tmp_path: Path, name: str, seeds: range, count: Count) -> None:
    file = write_gguf(tmp_path / "model.gguf", name)
    raw, read = RawGguf.of(file), 0
    assert raw.pack() == file.read_bytes()
    for seed in seeds:
        file.write_bytes(spoil(raw, random.Random(seed)))
        tracemalloc.start()
        try:
            read += survive(lambda: read_all(file), seed)
            assert tracemalloc.get_traced_memory()[1] < MEMORY, seed
        finally:
            tracemalloc.stop()
    assert 0 < read < len(seeds) / 2
    count("mutated inputs", len(seeds))
