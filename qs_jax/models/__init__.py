"""The architectures, by the `model_type` that Hugging Face's `config.json` names."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from qs_jax.config import ModelConfig, refuse_quantised
from qs_jax.config_reader import ConfigReader
from qs_jax.errors import ConfigError
from qs_jax.models import gpt2, llama, mistral, qwen2
from qs_jax.models.base import Block, CausalLM, forward
from qs_jax.models.layers import AbstractInit, RandomInit
from qs_jax.sharding import Layout


class Architecture(NamedTuple):
    """How to read an architecture's configuration and build its module.

    `supplied` is what Hugging Face's configuration class supplies for values that `config.json` leaves out.
    """

    config_from_hf: Callable[[ConfigReader], ModelConfig]
    supplied: Mapping[str, Any]
    network: type[CausalLM]


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(gpt2.config_from_hf, gpt2.SUPPLIED, gpt2.GPT2),
    "llama": Architecture(llama.config_from_hf, llama.SUPPLIED, llama.Llama),
    "mistral": Architecture(mistral.config_from_hf, mistral.SUPPLIED, llama.Llama),
    "qwen2": Architecture(qwen2.config_from_hf, qwen2.SUPPLIED, llama.Llama),
}


def parse_config(raw: Mapping[str, Any], source: str, notes: list[str] | None = None) -> ModelConfig:
    """Read a Hugging Face `config.json` of any known architecture.

    Args:
        raw: the parsed file.
        source: what to call it.
        notes: takes one line for each value that was supplied, chosen among several, or passed over.

    Raises:
        ConfigError: `model_type` is missing or unknown, the architecture refuses the configuration, or the weights are
            quantised in a format of their own.
    """
    refuse_quantised(raw, source)
    model_type = raw.get("model_type")
    inner = next((key for key in _NESTED if isinstance(raw.get(key), dict)), None)
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        advice = f"; its {inner} is a model of its own: save that part alone" if inner else ""
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not supported; known: {', '.join(ARCHITECTURES)}{advice}"
        )
    if inner:
        raise ConfigError(f"{source}: model_type {model_type!r} and {inner} are two models; keep one of them")
    architecture = ARCHITECTURES[model_type]
    reader = ConfigReader(raw, source, supplied=architecture.supplied, notes=notes)
    reader.refuse("is_causal", True)
    reader.refuse("use_bidirectional_attention", False)
    return architecture.config_from_hf(reader)


_NESTED = ("text_config", "llm_config", "language_config", "decoder")
"""Where configurations of models that also see or hear keep that of their text model."""


def random_network(
    config: ModelConfig, *, seed: int, dtype: Any = jnp.float32, layout: Layout | None = None
) -> CausalLM:
    """A network with random weights, as at the start of training (normal, std 0.02, scaled residual outputs).

    With a layout each device of the mesh makes its own part of them.
    """

    def made() -> CausalLM:
        return ARCHITECTURES[config.model_type].network(config, init=RandomInit(jnp.dtype(dtype), nnx.Rngs(seed)))

    if layout is None:
        return made()
    shardings = layout.weights(abstract_arrays(config, dtype=dtype))
    arrays = jax.jit(lambda: arrays_by_path(made()), out_shardings=shardings)()
    return network_from_arrays(config, arrays, dtype=dtype)


def abstract_network(config: ModelConfig, *, dtype: Any = jnp.float32) -> CausalLM:
    """The network with shapes in place of weights: nothing is allocated."""
    return ARCHITECTURES[config.model_type].network(config, init=AbstractInit(jnp.dtype(dtype)))


def abstract_arrays(config: ModelConfig, *, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every weight, by module path such as `blocks.3.q.kernel`."""
    return arrays_by_path(abstract_network(config, dtype=dtype))


def arrays_by_path(network: CausalLM) -> dict[str, Any]:
    """Every weight of a network, by module path."""
    leaves = nnx.to_flat_state(nnx.state(network, nnx.Param))
    return {".".join(map(str, path)): param.get_value() for path, param in leaves}


def network_from_arrays(config: ModelConfig, arrays: Mapping[str, Any], *, dtype: Any) -> CausalLM:
    """The network that holds the given weights, by module path; every path must be there."""
    network = abstract_network(config, dtype=dtype)
    state = nnx.state(network, nnx.Param)
    for path, param in nnx.to_flat_state(state):
        param.set_value(arrays[".".join(map(str, path))])
    nnx.update(network, state)
    return network


def placed(network: CausalLM, layout: Layout) -> CausalLM:
    """A network of the same weights, each where the layout wants it; arrays that lie there already stay. The given one
    stays as it is.

    Every process has the weights that move.
    """

    def move(array: Any, place: NamedSharding) -> Any:
        if array.sharding == place:
            return array
        return jax.make_array_from_callback(array.shape, place, lambda index: np.asarray(array[index]))

    graph, state = nnx.split(network)
    state = jax.tree.map(lambda leaf: leaf, state)  # variables of its own: those of a split are the network's
    places = layout.weights(arrays_by_path(network))
    for path, param in nnx.to_flat_state(state):
        param.set_value(jax.tree.map(move, param.get_value(), places[".".join(map(str, path))]))
    return nnx.merge(graph, state)


__all__ = [
    "ARCHITECTURES",
    "Block",
    "CausalLM",
    "abstract_arrays",
    "abstract_network",
    "arrays_by_path",
    "forward",
    "network_from_arrays",
    "parse_config",
    "placed",
    "random_network",
]
