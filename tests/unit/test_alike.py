"""Equal blocks of a program are traced and lowered once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from qs_jax.adaptive.binding import dense
from qs_jax.engine.stage import Entering, run_stage
from qs_jax.models import alike, random_network
from tests.tiny import tiny_model

LAYERS = 4


def test_a_program_holds_one_function_for_all_blocks_that_are_alike() -> None:
    """GPT-2 may scale attention by the layer; then every block is a function of its own."""
    llama, gpt2 = (tiny_model(name, LAYERS).config for name in ("llama", "gpt2"))
    for config, functions in ((llama, 1), (gpt2, 1), (replace(gpt2, attention_scale_by_layer=True), LAYERS - 1)):
        network, policy = random_network(config, seed=0), dense(config)
        ids, lengths = np.ones((1, 16), np.int32), np.asarray([16], np.int32)
        given = Entering(ids, np.asarray(0, np.int32), lengths, policy.protection)
        lowered = run_stage.lower(network, given, None, None, None, policy, start=0, stop=LAYERS, capacity=32)
        # and one for the last layer, which runs one token only
        assert lowered.as_text().count("func.func private @run_over") == functions + 1


def test_a_part_is_the_blocks_own() -> None:
    model = tiny_model("llama", 2)
    block, hidden = model.network.blocks[1], jnp.ones((1, 3, model.config.hidden_size))
    positions = jnp.arange(3)[None]
    for found, expected in (
        (alike.kv(block, hidden, positions), block.kv(hidden, positions)),
        (alike.run(block, hidden, positions, ()), block.run(hidden, positions, ())),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
