"""What the partitioner makes of a decode step: few collectives, and none that moves weights or caches."""

from collections import Counter
from typing import Any

import pytest

from benchmarks.mesh_counts import collectives, compiled_step
from qs_jax.models import parse_config
from qs_jax.sharding import make_mesh
from tests.mesh.models import WIDE

LAYERS = 2
ROWS = 8


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        # of every layer two sums, of attention and of the feed-forward half; the embedding's, and the logits
        ("model=8", {"all-reduce": 2 * LAYERS + 1, "all-gather": 1}),
        # and whether all rows are done, and at how many bits some row ran
        ("data=2,model=4", {"all-reduce": 2 * LAYERS + 3, "all-gather": 1}),
        ("data=8", {"all-reduce": 2}),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_collectives_of_a_decode_step(name: str, mesh: str, expected: dict[str, int]) -> None:
    config, devices = parse_config(WIDE[name], name), make_mesh(mesh)
    assert devices is not None
    found: list[Any] = collectives(compiled_step(config, devices, rows=ROWS, capacity=128))
    assert Counter(one.kind for one in found if one.in_step) == expected
    rows = ROWS // devices.shape["data"]
    # nothing that is moved is larger than the logits of a device's rows
    assert max(one.elements for one in found) <= rows * config.padded_vocab_size
