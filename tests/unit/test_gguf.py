"""GGUF files as a source: every tensor, every type, and what the metadata stands for."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

import qs_jax
from convert.gguf import tensors as values
from convert.gguf.names import TABLES, Place, place_of
from convert.source import locate, source_of
from qs_jax.config import RopeConfig
from qs_jax.errors import CheckpointError, ConfigError
from qs_jax.loading import load
from qs_jax.models.rope import inverse_frequencies
from tests.folders import tensors_of, write_folder
from tests.ggufs import write_gguf
from tests.study import command
from tests.tiny import CONFIGS, tiny_model
from tests.unit.test_conversion import assert_same_weights, run

PLAIN = {"F32", "F16", "F64", "BF16"}
UNREADABLE = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "Q1_0"}
"""What has a name, and nothing that de-quantises it: kernels' own working types, and whole numbers."""
BLOCKS = [kind for kind in Kind if kind.name not in PLAIN | UNREADABLE]


def with_biases(name: str) -> dict[str, np.ndarray]:
    """The tiny model's weights; norms and biases, which are all alike in a random model, drawn at random."""
    rng = np.random.default_rng(1)
    return {
        key: rng.normal(1, 0.5, array.shape).astype(np.float32) if array.ndim == 1 else array
        for key, array in tensors_of(name).items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_comes_back(tmp_path: Path, name: str) -> None:
    expected = with_biases(name)
    file = write_gguf(tmp_path / "model.gguf", name, expected)
    status, out, errors = run(file, tmp_path / "out", "--json")
    report = json.loads(out)
    assert (status, report["missing"], report["unexpected"], report["notes"]) == (0, [], [], []), errors
    assert report["bytes_in"] == file.stat().st_size
    assert_same_weights(file, expected)
    assert_same_weights(tmp_path / "out", expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_is_the_folders(tmp_path: Path, name: str) -> None:
    file = load(write_gguf(tmp_path / "model.gguf", name), compilation_cache=False)
    folder = load(write_folder(tmp_path / "hf", name), compilation_cache=False)
    ours, theirs = ({**vars(model.config)} for model in (file, folder))
    # a GGUF of a Mistral is a Llama's, and names the ends that its vocabulary has
    changed = {"model_type", "max_position_embeddings"} if name == "mistral" else set()
    changed |= {"bos_token_id", "eos_token_ids"}
    for key in ours.keys() - changed:
        assert ours[key] == pytest.approx(theirs[key]), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_file_and_its_conversion_generate_the_same(tmp_path: Path, name: str) -> None:
    file = write_gguf(tmp_path / "model.gguf", name, general__sampling__temp=0.5)
    assert run(file, tmp_path / "out")[0] == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    (direct, converted), prompt = (
        (load(place, compilation_cache=False) for place in (file, tmp_path / "out")),
        "Hi, you",
    )
    assert direct.defaults == converted.defaults
    assert (direct.defaults["eos_token_id"], direct.defaults["temperature"]) == ([96], 0.5)
    out = [qs_jax.generate(model, prompt, max_new_tokens=8) for model in (direct, converted)]
    assert out[0].tokens == out[1].tokens
    assert direct.tokenizer is not None
    assert direct.tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<user>x</s><assistant>"


def test_commands_take_a_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    status, out, errors = command("generate", file, "--prompt", "Hi", "--max-new-tokens", 3, "--json")
    assert status == 0, errors
    assert out["settings"]["eos_token_id"] == [96]
    status, _, errors = command("lens", file, "--text", tmp_path / "t.txt")
    assert (status, errors.count("\n")) == (2, 1)
    assert "is not a folder; say with --out" in errors


def blocks(kind: Kind, rows: int, width: int) -> np.ndarray:
    """Random bytes as a matrix of a type, drawn again where a scale is no finite number."""
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    drawn = rng.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    for _ in range(2000):
        with np.errstate(all="ignore"):
            found = dequantize(drawn.reshape(rows, -1), kind).reshape(rows, -1, block)
        bad = ~(np.abs(found) < 1e4).all(axis=-1)
        if not bad.any():
            return drawn.reshape(rows, -1)
        drawn[bad] = rng.integers(0, 256, (bad.sum(), size), dtype=np.uint8)
    raise AssertionError(f"no finite {kind.name}")


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_types_of_blocks_are_what_the_package_says(tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the borders of what is de-quantised at once, too."""
    monkeypatch.setattr(values, "_STRETCH", 512)
    raw = blocks(kind, 5, 768)
    file = write_gguf(tmp_path / "model.gguf", more={"extra.weight": raw}, kinds={"extra.weight": kind})
    source = source_of(locate(str(file)))
    assert source.shapes["extra.weight"] == (5, 768)
    found = source.read("extra.weight")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, dequantize(raw, kind))
    assert found.std() > 0


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.F64], ids=lambda kind: kind.name)
def test_plain_types_are_kept(tmp_path: Path, kind: Kind) -> None:
    array = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    raw = array.astype(np.float64) if kind == Kind.F64 else quantize(array, kind)
    file = write_gguf(tmp_path / "model.gguf", more={"extra.weight": raw}, kinds={"extra.weight": kind})
    found = source_of(locate(str(file))).read("extra.weight")
    assert found.dtype.name == {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}[kind.name]
    np.testing.assert_allclose(found.astype(np.float64), array, rtol=0 if kind == Kind.F64 else 4e-3)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    raw = np.zeros((1024, 4096 // 32 * 18), np.uint8)
    file = write_gguf(tmp_path / "model.gguf", more={"extra.weight": raw}, kinds={"extra.weight": Kind.Q4_0})
    source = source_of(locate(str(file)))
    tracemalloc.start()
    try:
        size = source.read("extra.weight").nbytes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 1024 * 4096 * 4
    assert peak < 1.6 * size  # a mask of what is finite is a quarter, and a stretch a sixteenth


@pytest.mark.parametrize("stored", ["equal", "another type", "different"])
def test_a_head_that_is_the_embedding_is_tied(tmp_path: Path, stored: str) -> None:
    tensors = tensors_of("qwen2")
    head = tensors["model.embed_tokens.weight"].astype(np.float16).astype(np.float32)
    tensors["model.embed_tokens.weight"] = head
    more = {"equal": head, "another type": head.astype(np.float16), "different": head + 1}[stored]
    model = load(
        write_gguf(tmp_path / "m.gguf", "qwen2", tensors, more={"output.weight": more}), compilation_cache=False
    )
    assert model.config.tie_word_embeddings == (stored != "different")
    assert model.notes == ()
    if stored == "different":
        assert model.network.lm_head is not None
        np.testing.assert_array_equal(np.asarray(model.network.lm_head.kernel)[:97], head + 1)


def factors(factor: float, context: int = 8192, theta: float = 5e5, head_dim: int = 8) -> np.ndarray:
    """As llama.cpp's converter makes them."""
    found = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < context / 4.0:
            found.append(1.0)
        elif wavelength > context / 1.0:
            found.append(factor)
        else:
            smooth = (context / wavelength - 1.0) / (4.0 - 1.0)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(found, np.float32)


LLAMA3 = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
ROPES: dict[str, tuple[dict[str, Any], np.ndarray | None, Any]] = {
    "no base": ({"llama__rope__freq_base": None}, None, RopeConfig(1e4)),
    "linear": ({"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 2.0}, None, ("linear", 2.0)),
    "older linear": ({"llama__rope__scale_linear": 4.0}, None, ("linear", 4.0)),
    "llama 3": ({"llama__rope__freq_base": 5e5}, factors(8.0), LLAMA3),
    "another context": (
        {"llama__rope__scaling__original_context_length": 64},
        factors(8.0, 64, 1e4),
        RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 64),
    ),
    "factors of one": ({}, np.ones(4, np.float32), RopeConfig(1e4)),
    "other factors": ({}, np.asarray([1, 2, 4, 9], np.float32), "otherwise than Llama 3"),
    "factors of another size": ({}, np.ones(3, np.float32), "otherwise than Llama 3"),
    "yarn": ({"llama__rope__scaling__type": "yarn"}, None, "'yarn' is not implemented"),
    "both": ({"llama__rope__scaling__type": "linear"}, factors(8.0), "scales too"),
    "a part of the head": ({"llama__rope__dimension_count": 4}, None, "expected 8, the size of a head"),
}


@pytest.mark.parametrize("case", ROPES)
def test_rotary_scaling(tmp_path: Path, case: str) -> None:
    metadata, scales, expected = ROPES[case]
    more = {} if scales is None else {"rope_freqs.weight": scales}
    file = write_gguf(tmp_path / "m.gguf", more=more, **metadata)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            load(file, compilation_cache=False)
        return
    rope = load(file, compilation_cache=False).config.rope
    assert rope is not None
    if isinstance(expected, tuple):
        assert (rope.rope_type, rope.factor) == expected
        return
    assert rope == expected
    if scales is not None:
        plain = inverse_frequencies(RopeConfig(rope.theta), 8)
        np.testing.assert_allclose(inverse_frequencies(rope, 8), plain / scales, rtol=1e-6)


def test_what_ends_a_text(tmp_path: Path) -> None:
    """Its end, a turn's and a message's."""
    file = write_gguf(tmp_path / "m.gguf", tokenizer__ggml__eot_token_id=5, tokenizer__ggml__eom_token_id=96)
    model = load(file, compilation_cache=False)
    assert model.defaults["eos_token_id"] == [96, 5]
    assert model.config.eos_token_ids == (96,)


def test_sizes_are_those_of_the_weights(tmp_path: Path) -> None:
    model = load(write_gguf(tmp_path / "m.gguf", llama__vocab_size=120), compilation_cache=False)
    assert model.config.vocab_size == 97
    (note,) = model.notes
    assert "vocab_size is 120, but token_embd.weight has 97 rows" in note


def test_entries_for_every_layer_count_where_they_agree(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", llama__attention__head_count_kv=[2, 2])
    assert load(file, compilation_cache=False).config.num_key_value_heads == 2
    file = write_gguf(tmp_path / "m.gguf", llama__attention__head_count_kv=[2, 4])
    with pytest.raises(ConfigError, match="differs between layers"):
        load(file, compilation_cache=False)


def test_a_window_makes_a_llama_a_mistral(tmp_path: Path) -> None:
    config = load(write_gguf(tmp_path / "m.gguf", llama__attention__sliding_window=40), compilation_cache=False).config
    assert (config.model_type, config.max_position_embeddings) == ("mistral", 40)
    file = write_gguf(tmp_path / "q.gguf", "qwen2", qwen2__attention__sliding_window=40)
    assert load(file, compilation_cache=False).config.max_position_embeddings == 40


def test_names_that_are_no_models_keep_theirs() -> None:
    table = TABLES["llama"]
    assert place_of(table, "blk.12.attn_k.bias") == Place(
        "model.layers.12.self_attn.k_proj.bias", "num_key_value_heads"
    )
    assert place_of(TABLES["gpt2"], "blk.0.ffn_up.weight") == Place("transformer.h.0.mlp.c_fc.weight", transposed=True)
    assert place_of(TABLES["gpt2"], "blk.0.ffn_up.bias") == Place("transformer.h.0.mlp.c_fc.bias")
    for name in ("blk.{}.attn_k.weight", "blk.01.attn_k.weight", "blk.1.blk.1.attn_k.weight", "output", "x.weight", ""):
        assert place_of(table, name) == Place(name)


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", more={"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    status, _, errors = run(file, tmp_path / "out")
    assert status == 2
    assert f"{file}: tensors 1 unexpected (blk.0.attn_sinks.weight)" in errors
    twin = {"model.norm.weight": np.ones(32, np.float32)}
    with pytest.raises(CheckpointError, match=r"is model\.norm\.weight, which is there"):
        load(write_gguf(tmp_path / "m.gguf", more=twin), compilation_cache=False)


def split(tmp_path: Path, name: str = "llama") -> list[Path]:
    """A model in two files, as llama.cpp splits it: the second has tensors and next to no metadata."""
    from tests.ggufs import RawGguf

    whole = RawGguf.of(write_gguf(tmp_path / "whole.gguf", name))
    middle = len(whole.tensors) // 2
    cut = whole.tensors[middle][3]
    architecture = [entry for entry in whole.entries if entry[0] == b"general.architecture"]
    second = [(n, shape, kind, offset - cut) for n, shape, kind, offset in whole.tensors[middle:]]
    parts = [
        RawGguf(whole.entries, whole.tensors[:middle], whole.data[:cut]),
        RawGguf(architecture, second, whole.data[cut:]),
    ]
    paths = [tmp_path / f"model-{number:05}-of-00002.gguf" for number in (1, 2)]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part.pack())
    return paths


def test_split_files_are_read_by_the_name_of_any(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:
        assert_same_weights(path, tensors_of("llama"))
    assert source_of(locate(str(paths[0]))).bytes == sum(path.stat().st_size for path in paths)
    paths[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.gguf is missing beside it; get all 2 parts"):
        load(paths[0], compilation_cache=False)


def test_a_folder_with_a_file_says_to_give_the_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"has no safetensors, but model\.gguf; give the path of it"):
        load(tmp_path, compilation_cache=False)
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"but model\.gguf, other\.gguf; give the path of one of them"):
        load(tmp_path, compilation_cache=False)


def test_a_folder_with_safetensors_is_read_as_before(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", "llama")
    write_gguf(folder / "model.gguf")
    assert_same_weights(folder, tensors_of("llama"))


@pytest.mark.slow
def test_quantised_from_a_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "t.txt").write_text("Hi, you there! " * 60)
    text = ("--calibration-text", tmp_path / "t.txt", "--calibration-tokens", 256)
    status, _, errors = run(file, tmp_path / "out", "--quantize", "matryoshka", "--group-size", 16, *text)
    assert status == 0, errors
    model = load(tmp_path / "out", compilation_cache=False)
    dense = tiny_model("llama")
    assert model.config.vocab_size == dense.config.vocab_size
    assert qs_jax.generate(model, "Hi", max_new_tokens=2, bits=4).lengths == [2]
