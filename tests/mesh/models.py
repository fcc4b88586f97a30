"""Tiny models on eight simulated devices, and what must be the same there as on one."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from qs_jax.fitting.rounding import round_to_nearest
from qs_jax.generation import GenerateOutput
from qs_jax.kernels import TwofoldKernel
from qs_jax.model import Model
from qs_jax.models import arrays_by_path, network_from_arrays, parse_config, placed, random_network
from qs_jax.sharding import Layout, make_mesh, mesh_of
from tests.tiny import CONFIGS

MESHES = ("model=8", "data=2,model=4", "data=8")

WIDE = {
    "gpt2": {**CONFIGS["gpt2"], "n_embd": 64, "n_head": 8},
    "llama": {
        **CONFIGS["llama"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
"""Eight heads, which divide by 8; of Llama four of keys and values, which divide by 4."""

_random = np.random.default_rng(5)
PROMPTS = [_random.integers(0, 97, length).tolist() for length in (40, 5, 70, 17, 16, 33, 64, 2)]
"""Eight, which divide by 8."""

CLOSE = 2e-5


@cache
def wide_model(name: str, layers: int = 2) -> Model:
    """A random model with a healthy spread of logits."""
    config = replace(parse_config(WIDE[name], name), num_hidden_layers=layers)
    network = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim == 2 else leaf, random_network(config, seed=0))
    return Model(config, network, None, jnp.dtype("float32"), f"wide {name}")


def coded(model: Model, *, keep_dense: bool = False) -> Model:
    """The model in codes, whose groups divide by 8."""
    arrays = arrays_by_path(model.network)
    for path, array in arrays.items():
        if path.startswith("blocks.") and array.ndim == 2:
            codes = round_to_nearest(array, group_size=8)
            arrays[path] = TwofoldKernel(array, codes) if keep_dense else codes
    return replace(model, network=network_from_arrays(model.config, arrays, dtype=model.dtype))


def divided(model: Model, mesh: str) -> Model:
    """The model on a mesh; the given one stays on one device, or it would be compared with itself."""
    devices = make_mesh(mesh)
    assert devices is not None
    there = replace(model, network=placed(model.network, Layout(devices, model.config)))
    assert mesh_of(there.network) is not None
    assert mesh_of(model.network) is None
    return there


def assert_same(one: GenerateOutput, other: GenerateOutput) -> None:
    """Tokens, what was spent on them and the ledger exactly, log-probabilities to rounding."""
    assert one.tokens == other.tokens
    assert one.finish_reasons == other.finish_reasons
    spent = ("layers_run", "bits", "prompt_layers_run", "prompt_fused_with", "drafted", "accepted")
    assert {name: one.trace.get(name) for name in spent} == {name: other.trace.get(name) for name in spent}
    assert one.ledger == other.ledger
    for ours, theirs in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=CLOSE)
