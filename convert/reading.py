"""A model's network on its device or devices, from a converted folder or from a source of weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from convert.parts import Parts, hf_config, stored_as
from convert.sharded import read_sharded
from convert.source import source_of
from qs_jax.checkpoint import is_converted, read_manifest, read_parts
from qs_jax.config import ModelConfig
from qs_jax.files import DIRECT_LENS_FILE, LENS_FILE, ModelFiles
from qs_jax.kernels import TwofoldKernel
from qs_jax.lens import DirectLens, Lens, with_direct_lens, with_lens
from qs_jax.matryoshka.stored import StoredKernels, collect, dense_path, expand, from_manifest, split_path
from qs_jax.models import abstract_arrays, network_from_arrays, placed
from qs_jax.models.base import CausalLM
from qs_jax.sharding import Layout


def read_network(
    files: ModelFiles, dtype: jnp.dtype, notes: list[str], *, checksums: bool = True, mesh: Mesh | None = None
) -> CausalLM:
    """Weights part by part, and the lens if there is one.

    Args:
        files: what `locate` found.
        dtype: of dense weights, on the device.
        notes: takes one line for each value that was supplied, chosen or passed over.
        checksums: compare a converted folder with those in its manifest first.
        mesh: the devices to lay them out on; None for the default device.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit its configuration.
        ConfigError: the configuration cannot be used.
    """
    folder = files if isinstance(files, Path) else None
    if folder is not None and is_converted(folder):
        config, arrays = _read_converted(folder, dtype, notes, mesh, checksums=checksums)
    else:
        config, arrays = _read_source(files, dtype, notes, mesh)
    network = network_from_arrays(config, arrays, dtype=dtype)
    if folder is not None and (folder / LENS_FILE).is_file():
        network = with_lens(network, Lens.load(folder / LENS_FILE, config))
    if folder is not None and (folder / DIRECT_LENS_FILE).is_file():
        network = with_direct_lens(network, DirectLens.load(folder / DIRECT_LENS_FILE, config))
    if mesh is None:
        return network
    layout = Layout(mesh, config)
    notes += layout.notes
    return placed(network, layout)


def _read_converted(
    folder: Path, dtype: jnp.dtype, notes: list[str], mesh: Mesh | None, *, checksums: bool
) -> tuple[ModelConfig, dict[str, Any]]:
    stored = from_manifest(read_manifest(folder, verify=checksums).get("quantization"), str(folder))
    config = hf_config(folder, notes)
    shapes = expand(abstract_arrays(config, dtype=dtype), stored, str(folder))
    if mesh is not None:
        shapes = _laid_out(shapes, stored, Layout(mesh, config))
    arrays: dict[str, Any] = read_parts(folder, shapes)
    for path, codes in collect(arrays, stored, dtype).items():
        arrays[path] = TwofoldKernel(arrays.pop(dense_path(path)), codes) if stored.dense else codes
    return config, arrays


def _laid_out(shapes: Mapping[str, Any], stored: StoredKernels, layout: Layout) -> dict[str, Any]:
    """The same shapes, and where each array is to lie."""

    def laid_out(path: str, shape: Any) -> jax.ShapeDtypeStruct:
        whole, leaf = split_path(path, stored)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=layout.weight(whole, shape.shape, leaf))

    return {path: laid_out(path, shape) for path, shape in shapes.items()}


def _read_source(
    files: ModelFiles, dtype: jnp.dtype, notes: list[str], mesh: Mesh | None
) -> tuple[ModelConfig, dict[str, Any]]:
    parts = Parts(source_of(files))
    notes += parts.notes
    if mesh is not None:
        return parts.config, read_sharded(parts, Layout(mesh, parts.config), dtype)
    arrays: dict[str, Any] = {}
    for _, part in parts:
        arrays |= jax.device_put({path: stored_as(array, dtype, path) for path, array in part.items()})
    return parts.config, arrays
