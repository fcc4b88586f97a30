"""Onto a mesh straight from the file: nothing holds the whole model, neither a device nor a process."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

import qs_jax
from convert.folder import FolderSource
from convert.gguf.source import GgufSource
from convert.mapping import to_hugging_face
from convert.pipeline import convert
from qs_jax.generation import generate
from qs_jax.kernels import weights
from qs_jax.model import Model
from qs_jax.models import arrays_by_path
from tests.ggufs import write_gguf
from tests.mesh.models import MESHES, PROMPTS, WIDE, assert_same, wide_model

NAMES = ("gpt2", "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A wide model of an architecture as a Hugging Face folder."""

    @cache
    def written(name: str) -> Path:
        place = tmp_path_factory.mktemp(name)
        (place / "config.json").write_text(json.dumps(WIDE[name]))
        model = wide_model(name)
        save_file(to_hugging_face(arrays_by_path(model.network), model.config), place / "model.safetensors")
        return place

    return written


def bytes_by_device(model: Model) -> list[int]:
    """Of weights, what each device holds."""
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(model.network):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return list(held.values())


def total_bytes(model: Model) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(model.network))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_every_device_gets_its_part_alone(
    name: str, mesh: str, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read at once is one device's part of one array, and no tensor is read whole that is divided."""
    parts: list[int] = []
    read_part = FolderSource.read_part

    def counted(self: FolderSource, name: str, index: Any) -> np.ndarray:
        parts.append((part := read_part(self, name, index)).nbytes)
        return part

    with monkeypatch.context() as patch:
        patch.setattr(FolderSource, "read_part", counted)
        patch.setattr(FolderSource, "read", lambda *_: pytest.fail("a whole tensor was read"))
        model = qs_jax.load(folder(name), mesh=mesh)
    arrays = [array for array in jax.tree.leaves(model.network) if array.ndim]
    assert max(parts) <= max(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    # every part once, however many devices hold it; rows of the vocabulary's padding are in no file
    assert sum(parts) <= total_bytes(model)
    by_device = bytes_by_device(model)
    assert len(set(by_device)) == 1
    over = int(mesh.split("model=")[1]) if "model=" in mesh else 1
    whole = sum(array.nbytes for array in arrays if array.is_fully_replicated)
    assert by_device[0] == whole + (total_bytes(model) - whole) // over
    assert over == 1 or by_device[0] < total_bytes(model) / 2
    plain = qs_jax.load(folder(name))
    for path, array in arrays_by_path(model.network).items():
        np.testing.assert_array_equal(array, arrays_by_path(plain.network)[path])
    asked: dict[str, Any] = {"max_new_tokens": 4}
    assert_same(generate(model, PROMPTS, **asked), generate(plain, PROMPTS, **asked))


@pytest.mark.parametrize("options", [{}, {"quantize": "matryoshka", "keep_dense": True, "group_size": 8}])
def test_converted_folders(options: dict[str, Any], folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Dense weights and codes beside them, each array as the table says."""
    convert(folder("llama"), tmp_path / "own", **options)
    model = qs_jax.load(tmp_path / "own", mesh="data=2,model=4")
    plain = qs_jax.load(tmp_path / "own")
    divided = [array for kernel in weights(model.network) for array in jax.tree.leaves(kernel) if array.ndim > 1]
    assert sum(not array.is_fully_replicated for array in divided) == len(divided)
    assert max(bytes_by_device(model)) < total_bytes(model) * (1 / 4 + 0.1)
    asked: dict[str, Any] = {"max_new_tokens": 4, **({"bits": 4} if options else {})}
    assert_same(generate(model, PROMPTS, **asked), generate(plain, PROMPTS, **asked))


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is de-quantised once for all its parts."""
    file = write_gguf(tmp_path / "own.gguf", name)
    reads: list[str] = []
    read = GgufSource.read
    monkeypatch.setattr(GgufSource, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    model = qs_jax.load(file, mesh="model=8")
    assert len(reads) == len(set(reads))
    plain = arrays_by_path(qs_jax.load(file).network)
    for path, array in arrays_by_path(model.network).items():
        np.testing.assert_array_equal(array, plain[path])


def test_heads_that_do_not_divide_are_said(folder: Callable[[str], Path]) -> None:
    (note,) = qs_jax.load(folder("llama"), mesh="model=8").notes
    assert note == "mesh: 4 heads of keys and values do not divide by model=8: they lie whole on every device"
    (note,) = qs_jax.load(folder("gpt2"), mesh="model=3").notes
    assert note.startswith("mesh: 8 attention heads, 8 heads of keys and values, 256 feed-forward channels, 128 rows")
    assert not qs_jax.load(folder("llama"), mesh="data=2,model=4").notes


def test_a_mesh_that_cannot_be_is_refused(folder: Callable[[str], Path]) -> None:
    for said, complaint in (
        ("model=16", "mesh model=16 is of 16 devices, and there are 8; choose"),
        ("rows=2", "mesh is 'rows=2', expected sizes of its axes such as data=2,model=4"),
        ("data=2,data=4", "mesh is 'data=2,data=4', expected"),
        ("data=0", "mesh is 'data=0', expected"),
        ("", "mesh is '', expected"),
        (jax.make_mesh((8,), ("x",)), "mesh has axes x, expected data and model"),
    ):
        with pytest.raises(qs_jax.QsJaxError, match=complaint):
            qs_jax.load(folder("llama"), mesh=said)


def test_a_mesh_of_one_device_is_none(folder: Callable[[str], Path]) -> None:
    table = qs_jax.load(folder("llama"), mesh="data=1,model=1").network.embedding.table.get_value()
    assert isinstance(table.sharding, SingleDeviceSharding)
