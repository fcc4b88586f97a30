"""What errors in keys and values count for: forms by hand, and that a fit spends itself on what is read."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.evaluation import direct as fitting
from qs_jax.evaluation.direct import fit_direct
from qs_jax.evaluation.reading import Units, units
from qs_jax.fitting.activations import embedded
from qs_jax.models.base import Block, CausalLM
from tests.tiny import tiny_model
from tests.unit.test_direct import features

LAYERS, STOP = 4, 2
WINDOWS = np.random.default_rng(5).integers(12, 97, (12, 64))


def states_of(network: CausalLM) -> jnp.ndarray:
    return embedded(network, jnp.asarray(WINDOWS[:4], jnp.int32))


def groups_of(block: Block) -> tuple[int, int]:
    """Key-value heads, and query heads of each."""
    return block.config.num_key_value_heads, block.config.num_attention_heads // block.config.num_key_value_heads


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_there_and_back(name: str) -> None:
    model = tiny_model(name, LAYERS)
    found, block = units(model.network.blocks[1], states_of(model.network)), model.network.blocks[1]
    heads = block.config.num_key_value_heads
    features = np.random.default_rng(1).normal(size=(7, 2 * heads * block.config.head_dim)).astype(np.float32)
    np.testing.assert_allclose(found.undo(found.of(features)), features, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_value_counts_by_what_the_output_projection_makes_of_it(name: str) -> None:
    network = tiny_model(name, LAYERS).network
    block, states = network.blocks[1], states_of(network)
    (heads, shared), head_dim = groups_of(block), block.config.head_dim
    error = np.random.default_rng(2).normal(size=(heads, head_dim)).astype(np.float32)
    projection = np.asarray(block.o.kernel.get_value()).reshape(-1, heads, shared, head_dim)
    changed = np.einsum("ohsd,hd->hso", projection, error)
    by_hand = np.square(changed).sum() / np.square(np.asarray(states)).sum(axis=-1).mean()
    mine = units(block, states).of(np.concatenate([np.zeros_like(error), error]).reshape(1, -1))
    np.testing.assert_allclose(np.square(mine).sum(), by_hand, rtol=1e-3)


def test_a_key_counts_by_the_queries_that_meet_it() -> None:
    """Without positions in them (GPT-2), against numpy."""
    network = tiny_model("gpt2", LAYERS).network
    block, states = network.blocks[1], states_of(network)
    heads, head_dim = groups_of(block)[0], block.config.head_dim
    x = block.attention_norm(states)
    q = np.asarray(block.q(x)).reshape(-1, heads, head_dim)
    v = np.asarray(block.kv_features(states)[1]).reshape(-1, heads, head_dim)
    projection = np.asarray(block.o.kernel.get_value()).reshape(-1, heads, head_dim)
    mixed = np.square(np.einsum("ohd,nhd->nho", projection, v - v.mean(axis=0))).sum(axis=-1).mean(axis=0)
    error = np.random.default_rng(3).normal(size=(heads, head_dim)).astype(np.float32)
    moved = np.square(np.einsum("nhd,hd->nh", q, error) * block.scale).mean(axis=0)
    by_hand = (moved * mixed).sum() / np.square(np.asarray(states)).sum(axis=-1).mean()
    mine = units(block, states).of(np.concatenate([error, np.zeros_like(error)]).reshape(1, -1))
    np.testing.assert_allclose(np.square(mine).sum(), by_hand, rtol=1e-3)


def test_a_query_placed_at_the_distance_meets_a_key_as_both_do_where_they_stand() -> None:
    """What lets keys be judged before they have positions."""
    block = tiny_model("llama", LAYERS).network.blocks[0]
    random = np.random.default_rng(4)
    q, k = (jnp.asarray(random.normal(size=(1, 5, 1, block.config.head_dim)), jnp.float32) for _ in range(2))
    there, here = (jnp.asarray([places], jnp.int32) for places in ([70, 81, 93, 99, 64], [0, 3, 20, 11, 1]))
    apart = (block.place(q, there - here) * k).sum(-1)
    both = (block.place(q, there) * block.place(k, here)).sum(-1)
    np.testing.assert_allclose(apart, both, rtol=0, atol=1e-4)


def test_a_fit_spends_its_rank_on_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of one head of which the output projection reads nothing leave the rank to those of the other: they are
    met more closely than by a fit to which all outputs are alike."""
    model = tiny_model("llama", LAYERS)
    (_, shared), head_dim = groups_of(model.network.blocks[0]), model.config.head_dim
    network: CausalLM = jax.tree.map(lambda leaf: leaf, model.network)  # others read this model as well
    for block in network.blocks:
        kernel = block.o.kernel.get_value()
        block.o.kernel.set_value(kernel.at[:, : shared * head_dim].set(0))
    deaf = replace(model, network=network)
    normal, made = features(deaf, WINDOWS)
    wanted = made.reshape(*WINDOWS.shape, LAYERS, -1)[:, 4:, STOP:, -head_dim:]

    def error() -> float:
        (fit,), _ = fit_direct(deaf, WINDOWS, [STOP], rank=3)
        x = np.concatenate([normal[layer] for layer in fit.map.inputs], axis=-1)[:, 4:]
        found = np.einsum("wtr,lfr->wtlf", x @ fit.map.down.T, fit.map.up) + fit.map.biases
        return float(np.square(found[..., -head_dim:] - wanted).sum())

    by_reading = error()
    alike = np.tile(np.eye(head_dim, dtype=np.float32), (2 * model.config.num_key_value_heads, 1, 1))
    monkeypatch.setattr(fitting, "units", lambda block, states: Units(alike, alike))
    assert np.isfinite(by_reading)
    assert (model.network.blocks[0].o.kernel.get_value() != 0).all()
    assert by_reading < error()
