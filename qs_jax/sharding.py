"""Where arrays lie on several devices: one table of what their axes are, for loading, initialisation and programs.

A *mesh* has two axes. Over `data` the rows of a batch are divided; over `model` what a layer has many of: heads, the
channels of its feed-forward half, the vocabulary, the channels of a lens. XLA's partitioner makes one program of it for
all devices and places the collectives (arXiv 2105.04663).

What does not divide evenly lies whole on every device of its axis: `Layout.notes` says which weights. Numbers of rows
that do not divide lie whole likewise, so that ledger and results are those of a single device.

Programs ask arrays for their mesh (`mesh_of`), which is part of an array's type and so of what a program is compiled
for. Without a mesh nothing here adds anything to a program.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qs_jax.config import ModelConfig
from qs_jax.errors import ConfigError

Tree = TypeVar("Tree")
Axes = tuple[str | None, ...]

DATA, MODEL = "data", "model"

OVER = {"rows": DATA, "heads": MODEL, "kv_heads": MODEL, "inner": MODEL, "vocab": MODEL, "rank": MODEL}
"""The axis of the mesh that an array's axis is divided over, by what it is; what is not named here is never divided."""

WEIGHTS: Mapping[str, Axes] = {
    r"embedding\.table|lm_head\.kernel": ("vocab", "hidden"),
    r"blocks\.\d+\.q\.kernel": ("heads", "hidden"),
    r"blocks\.\d+\.q\.bias": ("heads",),
    r"blocks\.\d+\.[kv]\.kernel": ("kv_heads", "hidden"),
    r"blocks\.\d+\.[kv]\.bias": ("kv_heads",),
    r"blocks\.\d+\.o\.kernel": ("hidden", "heads"),
    r"blocks\.\d+\.(gate|up)\.kernel": ("inner", "hidden"),
    r"blocks\.\d+\.(gate|up)\.bias": ("inner",),
    r"blocks\.\d+\.down\.kernel": ("hidden", "inner"),
    r"(shortcuts|direct)\.\d+\.down": ("rank", "hidden"),
    r"shortcuts\.\d+\.up|direct\.\d+\.up\.\d+": ("hidden", "rank"),
}
"""Axes of weights by module path, kernels as (outputs, inputs); those of no line lie whole on every device."""

CODES: Mapping[str, Axes] = {
    **dict.fromkeys(("high", "middle", "low"), ("inputs", None, "outputs")),
    **dict.fromkeys(("scales", "offsets"), (None, "inputs", "outputs")),
}
"""Axes of a nested kernel's arrays, in terms of the kernel's own; its inputs are divided by whole groups."""

STATES: Mapping[str, Axes] = dict.fromkeys(("keys", "values"), ("rows", "kv_heads", "slots", "head_dim"))
"""Axes of what is neither weight nor first of all rows: caches, by the names of their fields. Everything else that
programs hold (tokens, decode state, states of a prompt, logits) has rows first and is divided by them alone."""


def make_mesh(said: str | Mesh | None) -> Mesh | None:
    """The mesh of a text such as `data=2,model=4`; an axis left out has one device. One device in all is no mesh.

    XLA's partitioner is left to place what is not said (axes of a given mesh are made `Auto`, too).

    Raises:
        ConfigError: the text is no mesh, or there are other numbers of devices.
    """
    if said is None:
        return None
    types = (AxisType.Auto, AxisType.Auto)
    if isinstance(said, Mesh):
        if set(said.axis_names) != {DATA, MODEL}:
            raise ConfigError(f"mesh has axes {', '.join(map(str, said.axis_names))}, expected {DATA} and {MODEL}")
        return None if said.size == 1 else Mesh(said.devices, said.axis_names, axis_types=types)
    sizes = _sizes(said)
    wanted, there = sizes[DATA] * sizes[MODEL], jax.device_count()
    if wanted > there or (jax.process_count() > 1 and wanted != there):
        raise ConfigError(
            f"mesh {said} is of {wanted} devices, and there are {there}; choose sizes whose product it is"
        )
    shape, devices = (sizes[DATA], sizes[MODEL]), jax.devices()[:wanted]
    return None if wanted == 1 else jax.make_mesh(shape, (DATA, MODEL), axis_types=types, devices=devices)


def _sizes(said: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in said.split(","):
        name, _, number = (text.strip() for text in part.partition("="))
        if name not in (DATA, MODEL) or name in sizes or not re.fullmatch("[1-9][0-9]{0,5}", number):
            raise ConfigError(f"mesh is {said!r}, expected sizes of its axes such as data=2,model=4")
        sizes[name] = int(number)
    return {DATA: 1, MODEL: 1, **sizes}


@dataclass(frozen=True)
class Layout:
    """Where the weights of a model lie on a mesh."""

    mesh: Mesh
    config: ModelConfig

    @cached_property
    def _units(self) -> dict[str, int]:
        """What an axis can be divided into at most: heads are never cut."""
        config = self.config
        return {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "inner": config.intermediate_size,
            "vocab": config.padded_vocab_size,
        }

    @property
    def notes(self) -> list[str]:
        """What lies whole on every device, because it does not divide; a line."""
        called = {
            "heads": "attention heads",
            "kv_heads": "heads of keys and values",
            "inner": "feed-forward channels",
            "vocab": "rows of the vocabulary",
        }
        size = self.mesh.shape[MODEL]
        whole = [f"{units} {called[name]}" for name, units in self._units.items() if units % size]
        if not whole:
            return []
        return [f"mesh: {', '.join(whole)} do not divide by model={size}: they lie whole on every device"]

    def weight(self, path: str, shape: tuple[int, ...], leaf: str | None = None) -> NamedSharding:
        """Of a weight at a module path, or (`leaf`) of one of a nested kernel's arrays there."""
        axes = next((axes for pattern, axes in WEIGHTS.items() if re.fullmatch(pattern, path)), ())
        if leaf is not None and axes:
            own = {"outputs": axes[0], "inputs": axes[1], None: None}
            axes = tuple(own[axis] for axis in CODES[leaf])
        named = (axis if axis is None or not self._units.get(axis, 0) % self._size(axis) else None for axis in axes)
        return NamedSharding(self.mesh, _spec(tuple(named), shape, self.mesh))

    def _size(self, axis: str) -> int:
        return self.mesh.shape[OVER[axis]] if axis in OVER else 1

    def weights(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Shardings of weights by module path, as pytrees like the weights: plain arrays, or kernels of codes."""

        def of(path: str, within: tuple[Any, ...], leaf: Any) -> NamedSharding:
            names = [key.name for key in within if isinstance(key, jax.tree_util.GetAttrKey)]
            return self.weight(path, leaf.shape, next((name for name in names if name in CODES), None))

        with_path = jax.tree_util.tree_map_with_path
        return {p: with_path(lambda within, leaf, p=p: of(p, within, leaf), array) for p, array in arrays.items()}


def _spec(axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """What divides evenly is divided."""
    over = (OVER.get(axis) if axis is not None else None for axis in axes)
    return PartitionSpec(
        *(name if name and size % mesh.shape[name] == 0 else None for name, size in zip(over, shape, strict=False))
    )


def mesh_of(tree: Any) -> Mesh | AbstractMesh | None:
    """The mesh that arrays of a tree lie on, concrete or (in a program) abstract; None for a single device's."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer):
            mesh = jax.typeof(leaf).sharding.mesh
        elif isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
        else:
            continue
        if not mesh.empty and mesh.size > 1:
            return mesh
    return None


def state_sharding(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Of an array of a state, by its place in the tree."""
    name = path[-1].name if path and isinstance(path[-1], jax.tree_util.GetAttrKey) else ""
    return NamedSharding(mesh, _spec(STATES.get(name, ("rows",)), shape, mesh))


def laid_out(tree: Tree, like: Any) -> Tree:
    """In a program: states as the table says, on the mesh that arrays of `like` are on. Without one, what is given."""
    if (mesh := mesh_of(like)) is None:
        return tree

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        place = state_sharding(path, np.shape(leaf), mesh)
        return jax.lax.with_sharding_constraint(leaf, place) if np.ndim(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, tree)


def gathered(logits: Float[Array, "*rows vocab"], like: Any) -> Float[Array, "*rows vocab"]:
    """In a program: logits as the head's shards make them, then whole rows on every device. It is they that are brought
    together, not weights."""
    if (mesh := mesh_of(like)) is None:
        return logits
    spec = _spec(("rows", *[None] * (logits.ndim - 2), "vocab"), logits.shape, mesh)
    return laid_out(jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, spec)), like)


def placed_like(host: np.ndarray, old: jax.Array) -> jax.Array:
    """New values, which every process has, where an array's old ones lie."""
    return jax.make_array_from_callback(host.shape, old.sharding, lambda index: host[index])


def on_host(tree: Any) -> Any:
    """Arrays of a tree as every process's own, whole."""
    if jax.process_count() > 1 and (mesh := mesh_of(tree)) is not None:
        tree = _whole(mesh)(tree)
    return jax.device_get(tree)


@cache
def _whole(mesh: Any) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
