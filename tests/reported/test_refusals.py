"""Folders that cannot be read rightly: one line that names both sides of a contradiction, or the format, and advice."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import convert.cli
import qs_jax
from qs_jax.errors import QsJaxError
from tests.reported.folders import GPT2, LLAMA, gpt2, halves, llama, tensors, write, write_shards

Build = Callable[[Path], None]


def _twice_and_different(folder: Path) -> None:
    first, second = halves(tensors("llama")).items()
    stray = {"model.embed_tokens.weight": tensors("llama", seed=3)["model.embed_tokens.weight"]}
    write_shards(folder, LLAMA, {first[0]: {**first[1], **stray}, second[0]: {**second[1], **stray}})
    other = {"model.embed_tokens.weight": tensors("llama", seed=4)["model.embed_tokens.weight"]}
    write_shards(folder, LLAMA, {first[0]: {**first[1], **other}, second[0]: {**second[1], **stray}})


def _with_and_without_prefix(folder: Path) -> None:
    weights = tensors("gpt2")
    write(folder, GPT2, {**weights, "wte.weight": weights["transformer.wte.weight"] * 2})


def _untied_without_head(folder: Path) -> None:
    weights = tensors("llama")
    del weights["lm_head.weight"]
    write(folder, {**LLAMA, "tie_word_embeddings": False}, weights)


def _pickled_beside_an_index(folder: Path) -> None:
    write_shards(folder, LLAMA, halves(tensors("llama")))
    for shard in folder.glob("*.safetensors"):
        shard.rename(shard.with_suffix(".bin"))


def _file_beside(name: str, content: dict[str, Any]) -> Build:
    def build(folder: Path) -> None:
        llama()(folder)
        (folder / name).write_text(json.dumps(content))

    return build


def _codes(dtype: Any, **more: np.ndarray) -> Build:
    """As bitsandbytes, MLX and GPTQ store weights: integers and what belongs to them."""

    def build(folder: Path) -> None:
        weights = tensors("llama")
        name = "model.layers.0.mlp.up_proj.weight"
        weights[name] = np.ones(weights[name].shape, dtype)
        write(folder, LLAMA, {**weights, **{f"{name}.{key}": value for key, value in more.items()}})

    return build


def _float8(folder: Path) -> None:
    """Eight-bit floats, which numpy does not have: the header is written by hand."""
    header = {"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    written = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").write_bytes(len(written).to_bytes(8, "little") + written + bytes(4))


_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR = {"type": "linear", "factor": 2.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

CONTRADICTIONS: dict[str, tuple[Build, str]] = {
    "yarn beside parameters": (
        llama(rope_parameters=_DEFAULT, rope_scaling=_YARN),
        "before rope_parameters: rope_type is 'yarn'",
    ),
    # marin-community/marin pull 7156 writes both; transformers would go on with 10,000
    "a base in the one and not in the other": (
        llama(
            "rope_theta", rope_parameters={**_DEFAULT, "rope_theta": 5e5}, rope_scaling={"type": "linear", "factor": 2}
        ),
        "rope_scaling names no rope_theta, and rope_parameters beside it says 500000.0",
    ),
    "rotary embedding by kind of layer": (
        llama(rope_parameters={"full_attention": _DEFAULT}),
        "differs between layers",
    ),
    "an attention that sees what follows": (llama(is_causal=False), "is_causal=False is not implemented"),
    "frequencies the wrong way round": (llama(rope_scaling=_LLAMA3), "low_freq_factor is 4"),
    # nntile/nntile pull 370: general names of GPT-2's sizes beside its own
    "sizes under two names": (gpt2(hidden_size=64), "n_embd is 32 and hidden_size is 64"),
    "heads under two names": (gpt2(num_attention_heads=2), "n_head is 4 and num_attention_heads is 2"),
    # ggml-org/llama.cpp issue 10756: a tensor in two files
    "a tensor in two files": (_twice_and_different, "model.embed_tokens.weight is also in"),
    "a tensor under two names": (_with_and_without_prefix, "unexpected"),
    # vllm-project/vllm pull 53020: the missing head stayed random and the server started
    "untied without a head": (_untied_without_head, "tie_word_embeddings false asks for a head"),
    # mlx-lm issue 648: a text model inside another
    "a model inside the model": (llama(text_config={"model_type": "llama"}), "model_type 'llama' and text_config"),
    "the text model of another": (
        llama(model_type="mistral3", text_config={"model_type": "mistral"}),
        "its text_config is a model of its own: save that part alone",
    ),
    # liltom-eth/llama2-webui issue 7: an index left beside pickled weights
    "pickled weights beside an index": (_pickled_beside_an_index, "only pickled weights, which are never loaded"),
}

FORMATS: dict[str, tuple[Build, str]] = {
    "GPTQ": (llama(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised (gptq)"),
    "FP8": (llama(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}), "quantised (fp8)"),
    # Blaizzy/mlx-vlm pull 692: logged as not supported, and loaded all the same
    "bitsandbytes": (
        llama(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "(bitsandbytes)",
    ),
    # ggml-org/llama.cpp pull 5647: the codes' own tensors cannot be mapped
    "codes of bitsandbytes": (_codes(np.uint8, absmax=np.ones(4, np.float32)), "is U8"),
    "MLX": (llama(quantization={"group_size": 64, "bits": 4}), "quantised (quantization)"),
    "codes of MLX": (_codes(np.uint32), "is U32"),
    "AWQ's own file": (_file_beside("quant_config.json", {"w_bit": 4, "q_group_size": 128}), "quant_config.json"),
    "AutoGPTQ's own file": (_file_beside("quantize_config.json", {"bits": 4}), "quantize_config.json"),
    # Lightricks/LTX-2 pull 172: eight-bit floats cast without their scales
    "eight-bit floats": (_float8, "is F8_E4M3"),
}


PIPES_AND_LINKS = ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "policy.json")


@pytest.mark.parametrize("name", PIPES_AND_LINKS)
def test_a_folder_cannot_make_us_read_what_lies_outside_it_or_wait(name: str, tmp_path: Path) -> None:
    """A link out of the folder would be copied into the converted one; a pipe is never written to."""
    (tmp_path / "secret").write_text("{}")

    def linked(folder: Path) -> None:
        llama()(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")

    def piped(folder: Path) -> None:
        llama()(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    for build, message in ((linked, "is a link out of its folder"), (piped, "is no file")):
        place = tmp_path / build.__name__
        place.mkdir()
        assert message in _refusal(build, place)


@pytest.mark.parametrize(
    "name", ["/tmp/" + "x" * 5000, "~nobody_of_that_name/y", "a--b/..", "x" * 120 + "/y", "a/b--c"]
)
def test_names_that_cannot_be_are_one_line(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(convert.cli.app, [name, str(tmp_path / "out")], env={"HF_HUB_OFFLINE": "1"})
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "no such folder" in result.stderr
    long = CliRunner().invoke(convert.cli.app, [str(tmp_path), str(tmp_path / ("y" * 300))])
    assert (long.exit_code, long.stderr.count("\n")) == (2, 1)


def test_what_is_converted_already_and_what_only_has_a_manifest(tmp_path: Path) -> None:
    llama()(tmp_path / "hf")
    (tmp_path / "hf" / "manifest.json").write_text('{"written": "by another program"}')
    assert qs_jax.load(tmp_path / "hf", compilation_cache=False).config.model_type == "llama"
    assert CliRunner().invoke(convert.cli.app, [str(tmp_path / "hf"), str(tmp_path / "out")]).exit_code == 0
    result = CliRunner().invoke(convert.cli.app, [str(tmp_path / "out"), str(tmp_path / "again")])
    assert (result.exit_code, "is converted already" in result.stderr) == (2, True)


def _refusal(build: Build, folder: Path) -> str:
    """What the package says, which is what both commands print in one line, with exit status 2 and nothing written."""
    build(folder / "hf")
    with pytest.raises(QsJaxError) as error:
        qs_jax.load(folder / "hf", compilation_cache=False)
    result = CliRunner().invoke(convert.cli.app, [str(folder / "hf"), str(folder / "out")])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert [path.name for path in folder.iterdir()] == ["hf"]
    assert result.stderr.startswith("error: ")
    return str(error.value)


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_one_line_that_names_both_sides(name: str, tmp_path: Path) -> None:
    build, message = CONTRADICTIONS[name]
    assert message in _refusal(build, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_quantised_by_others_are_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    build, message = FORMATS[name]
    said = _refusal(build, tmp_path)
    assert message in said
    assert "unquantised model" in said
