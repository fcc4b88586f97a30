"""Processed scores equal those of Hugging Face's logits processors, as stored by make_goldens.py. Needs no torch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qs_jax.engine.sampling import Sampling, process_logits
from tests.parity.variants import GOLDENS, SAMPLING

_CASES = sorted(key for key in load_file(GOLDENS / "sampling.safetensors") if "." in key)

process_jit = jax.jit(process_logits)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return load_file(GOLDENS / "sampling.safetensors")


def _sampling(of_field: Callable[[str], object]) -> Sampling:
    def traced(name: str) -> jax.Array:
        return jnp.asarray(of_field(name), np.int32 if name == "top_k" else np.float32)

    return Sampling(
        temperature=traced("temperature"),
        top_k=traced("top_k"),
        top_p=traced("top_p"),
        min_p=traced("min_p"),
        repetition_penalty=traced("repetition_penalty"),
    )


def _seen(golden: dict[str, np.ndarray]) -> np.ndarray:
    seen = np.zeros(golden["spread"].shape, bool)
    np.put_along_axis(seen, golden["input_ids"], True, axis=1)
    return seen


def _assert_same_scores(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_setting_has_a_golden() -> None:
    assert {case.split(".")[1] for case in _CASES} == set(SAMPLING)


@pytest.mark.parametrize("case", _CASES)
def test_scores(case: str, golden: dict[str, np.ndarray]) -> None:
    source, name = case.split(".")
    scores = process_jit(golden[source], _seen(golden), _sampling(lambda field: SAMPLING[name][field]))
    _assert_same_scores(np.asarray(scores), golden[case])


def test_each_row_has_its_own_sampling(golden: dict[str, np.ndarray]) -> None:
    """All settings in one batch, one group of rows each, in place of one number for all."""
    rows, count = len(golden["spread"]), len(SAMPLING)
    sampling = _sampling(lambda field: np.repeat([setting[field] for setting in SAMPLING.values()], rows))
    scores = process_jit(np.tile(golden["spread"], (count, 1)), np.tile(_seen(golden), (count, 1)), sampling)
    _assert_same_scores(np.asarray(scores), np.concatenate([golden[f"spread.{name}"] for name in SAMPLING]))
