"""Conversion of small Hugging Face folders: every tensor, every way to break one."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

import convert.cli
from convert.mapping import to_hugging_face
from qs_jax.checkpoint import MANIFEST
from qs_jax.loading import load
from qs_jax.models import arrays_by_path
from tests.folders import Tensors, tensors_of, write_folder
from tests.tiny import CONFIGS


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of qs-convert."""
    result = CliRunner().invoke(convert.cli.app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def assert_same_weights(path: Path, expected: Tensors, dtype: str = "float32") -> None:
    model = load(path, dtype=dtype, compilation_cache=False)
    found = to_hugging_face(arrays_by_path(model.network), model.config)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name].astype(np.float64), array.astype(np.float64), err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_comes_back(tmp_path: Path, name: str, shards: int) -> None:
    source = write_folder(tmp_path / "hf", name, shards=shards)
    status, out, _ = run(source, tmp_path / "out", "--json")
    report = json.loads(out)
    assert (status, report["missing"], report["unexpected"]) == (0, [], [])
    assert report["parameters"] == sum(array.size for array in tensors_of(name).values())
    assert_same_weights(source, tensors_of(name))
    assert_same_weights(tmp_path / "out", tensors_of(name))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_dtypes_come_back(tmp_path: Path, dtype: Any) -> None:
    narrow = {name: array.astype(dtype) for name, array in tensors_of("llama").items()}
    narrow["model.norm.weight"] = narrow["model.norm.weight"].astype(np.float32)
    source = write_folder(tmp_path / "hf", "llama", narrow)
    assert run(source, tmp_path / "out", "--dtype", np.dtype(dtype).name)[0] == 0
    assert_same_weights(tmp_path / "out", narrow)


def test_names_without_prefix_buffers_and_tied_heads_are_understood(tmp_path: Path) -> None:
    tensors = {name.removeprefix("transformer."): array for name, array in tensors_of("gpt2").items()}
    extras = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.uint8), "lm_head.weight": tensors["wte.weight"].copy()}
    assert run(write_folder(tmp_path / "hf", "gpt2", {**tensors, **extras}), tmp_path / "out")[0] == 0
    assert_same_weights(tmp_path / "out", tensors_of("gpt2"))


def _without(name: str) -> Tensors:
    return {n: array for n, array in tensors_of("llama").items() if n != name}


def _with(name: str, array: np.ndarray) -> Tensors:
    return {**tensors_of("llama"), name: array}


def _holding(value: float, dtype: Any = np.float32) -> Tensors:
    array = tensors_of("llama")["model.norm.weight"].astype(dtype)
    array[3] = value
    return _with("model.norm.weight", array)


BROKEN = {
    "missing": (lambda: _without("model.norm.weight"), "1 missing (model.norm.weight)"),
    "unexpected": (lambda: _with("model.extra", np.ones(3, np.float32)), "1 unexpected (model.extra)"),
    "shape": (lambda: _with("model.norm.weight", np.ones(5, np.float32)), "wrong shape (model.norm.weight (5,)"),
    "nan": (lambda: _holding(np.nan), "tensor model.norm.weight holds NaN"),
    "infinity": (lambda: _holding(np.inf, np.float16), "tensor model.norm.weight holds NaN or infinity"),
    "bfloat16 nan": (lambda: _holding(np.nan, ml_dtypes.bfloat16), "tensor model.norm.weight holds NaN"),
    "beyond float32": (lambda: _holding(1e300, np.float64), "output_norm.scale does not fit float32"),
    "integers": (lambda: _with("model.norm.weight", np.ones(32, np.int32)), "is I32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_weights_that_do_not_fit_are_one_line_and_touch_nothing(tmp_path: Path, case: str) -> None:
    tensors, message = BROKEN[case]
    assert_refused(write_folder(tmp_path / "hf", "llama", tensors()), tmp_path / "out", message)


def assert_refused(source: Path, target: Path, message: str, *options: str) -> None:
    """One line on stderr, exit status 2, and nothing new beside the target."""
    before = sorted(target.parent.iterdir())
    status, out, err = run(source, target, *options)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(target.parent.iterdir()) == before


def test_all_names_are_reported_at_once(tmp_path: Path) -> None:
    tensors = {**_without("model.norm.weight"), "extra": np.ones(2, np.float32)}
    status, out, err = run(write_folder(tmp_path / "hf", "llama", tensors), tmp_path / "out", "--json")
    assert (status, json.loads(out)["missing"], json.loads(out)["unexpected"]) == (2, ["model.norm.weight"], ["extra"])
    assert "missing" in err
    assert "unexpected" in err


def test_damaged_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    truncated = write_folder(tmp_path / "truncated", "gpt2")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_refused(truncated, out, "truncated")

    shard = write_folder(tmp_path / "shard", "llama", shards=3)
    (shard / "model-00002-of-00003.safetensors").unlink()
    assert_refused(shard, out, "model-00002-of-00003.safetensors is missing")

    escaping = write_folder(tmp_path / "escaping", "llama", shards=2)
    index = escaping / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../shard/model-00001"))
    assert_refused(escaping, out, "outside the folder")

    assert_refused(write_folder(tmp_path / "unknown", "llama", model_type="mamba"), out, "'mamba' is not supported")
    assert_refused(tmp_path / "nowhere" / "at" / "all", out, "no such folder")
    pickled = write_folder(tmp_path / "pickled", "llama")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert_refused(pickled, out, "never loaded")
    assert_refused(
        write_folder(tmp_path / "dtype", "llama"),
        out,
        "invalid value for '--dtype': 'int3' is not one of",
        "--dtype",
        "int3",
    )


def test_an_existing_destination_is_refused_and_then_replaced(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a", "gpt2"), write_folder(tmp_path / "b", "llama")
    out = tmp_path / "out"
    assert run(first, out)[0] == 0
    assert_refused(second, out, "--overwrite")
    assert_same_weights(out, tensors_of("gpt2"))
    assert run(second, out, "--overwrite")[0] == 0
    assert_same_weights(out, tensors_of("llama"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_a_folder_that_is_not_ours_is_never_overwritten(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", "gpt2")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert_refused(source, mine, "holds no manifest.json", "--overwrite")
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_weights_beyond_the_stored_dtype_are_refused(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", "llama", _holding(1e6))
    assert_refused(source, tmp_path / "out", "does not fit float16", "--dtype", "float16")
    assert run(source, tmp_path / "out", "--dtype", "bfloat16")[0] == 0


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    status, out, _ = run(write_folder(tmp_path / "hf", "gpt2"), tmp_path / "out", "--dry-run", "--json")
    assert (status, json.loads(out)["missing"], (tmp_path / "out").exists()) == (0, [], False)


def test_a_changed_file_is_named_at_load(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(write_folder(tmp_path / "hf", "gpt2"), out)
    files = json.loads((out / MANIFEST).read_text())["files"]
    victim = max(files, key=lambda name: files[name]["bytes"])
    content = bytearray((out / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (out / victim).write_bytes(content)
    with pytest.raises(Exception, match=Path(victim).name):
        load(out, compilation_cache=False)
