"""What architectures of one family differ in: biases, and where a sliding window ends the context.

That they compute what Hugging Face computes is for tests/parity.
"""

from typing import Any

import pytest

import qs_jax
from qs_jax.errors import ConfigError, GenerationError
from qs_jax.models import ARCHITECTURES, arrays_by_path, parse_config
from tests.tiny import CONFIGS, tiny_model

CONTEXT = 512


def context(name: str, **options: Any) -> int:
    return parse_config({**CONFIGS[name], **options}, name).max_position_embeddings


def test_every_architecture_has_a_tiny_model() -> None:
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "biased"),
    [("gpt2", {"q", "k", "v", "o", "up", "down"}), ("llama", set()), ("mistral", set()), ("qwen2", {"q", "k", "v"})],
)
def test_which_projections_have_biases(name: str, biased: set[str]) -> None:
    paths = [path.split(".") for path in arrays_by_path(tiny_model(name).network)]
    assert {parts[2] for parts in paths if parts[0] == "blocks" and parts[3] == "bias"} - _NORMS == biased


_NORMS = {"input_norm", "mlp_norm"}


def test_a_sliding_window_ends_the_context() -> None:
    assert context("mistral", sliding_window=64) == 64
    assert context("mistral", sliding_window=CONTEXT + 1) == CONTEXT
    assert context("mistral", sliding_window=None) == CONTEXT
    unwritten = {key: value for key, value in CONFIGS["mistral"].items() if key != "sliding_window"}
    assert parse_config({**unwritten, "max_position_embeddings": 9000}, "m").max_position_embeddings == 4096


def test_a_sliding_window_counts_only_where_a_layer_uses_it() -> None:
    window = {"sliding_window": 64, "use_sliding_window": True}
    assert context("qwen2", sliding_window=64) == CONTEXT
    assert context("qwen2", **window) == CONTEXT
    assert context("qwen2", **window, max_window_layers=1) == 64
    assert context("qwen2", **window, layer_types=["full_attention", "sliding_attention"]) == 64
    assert context("qwen2", **window, max_window_layers=1, layer_types=["full_attention"] * 2) == CONTEXT
    assert context("qwen2", use_sliding_window=True, sliding_window=None, max_window_layers=0) == CONTEXT


def test_a_request_beyond_the_window_is_refused() -> None:
    with pytest.raises(GenerationError, match="context of 400"):
        qs_jax.generate(tiny_model("mistral"), [[1] * 390], max_new_tokens=11)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"sliding_window": 64}, "sliding_window=64 is not implemented"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not implemented"),
        ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1"),
        ("mistral", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type is 'yarn'"),
    ],
)
def test_what_is_not_implemented_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**CONFIGS[name], **options}, name)
