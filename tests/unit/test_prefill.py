"""The host's side of reading a prompt."""

import pytest

from qs_jax.engine.prefill import piece_width


@pytest.mark.parametrize(
    ("tokens", "limit", "width"),
    [
        (1, 1024, 16),
        (17, 1024, 24),
        (25, 1024, 32),
        (700, 1024, 768),
        (769, 1024, 1024),
        (1500, 2048, 1024),
        (90, 95, 95),
    ],
)
def test_prompts_are_padded_to_two_widths_per_octave(tokens: int, limit: int, width: int) -> None:
    assert piece_width(tokens, limit) == width
