"""Fits of nested codes against plain references, and conversions that look at text."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert.calibrated
from qs_jax.checkpoint import MANIFEST
from qs_jax.choices import BITS, METHODS
from qs_jax.errors import CheckpointError
from qs_jax.fitting.activations import hessians, kernels_of, run, run_all, with_kernels
from qs_jax.fitting.fit import Fit, Streams, fit_block
from qs_jax.fitting.gptq import DAMPING, compensated_codes
from qs_jax.fitting.grid import (
    COMPANDED,
    EVEN,
    Bend,
    Grid,
    across,
    best_codes,
    between_extremes,
    least_squares,
    read,
    refit,
    storable,
)
from qs_jax.fitting.refine import refined
from qs_jax.fitting.rounding import grouped, nearest_codes, packed
from qs_jax.fitting.tune import Tuning
from qs_jax.loading import load
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.matryoshka.slices import bent, straightened
from qs_jax.matryoshka.streaming import multiply_streams
from qs_jax.models import arrays_by_path
from tests.tiny import tiny_model
from tests.unit.test_conversion import assert_refused, write_folder
from tests.unit.test_conversion import run as convert_folder

rng = np.random.default_rng(0)
ALL = (1.0, 1.0, 1.0)
_START = rng.bit_generator.state


@pytest.fixture(autouse=True)
def _the_same_numbers_whatever_ran_before() -> None:
    rng.bit_generator.state = _START


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def correlated(tokens: int, inputs: int) -> np.ndarray:
    """Inputs that go together, as a real layer's do: what error compensation lives on."""
    return rng.standard_normal((tokens, inputs // 4)) @ rng.standard_normal((inputs // 4, inputs)) + 0.3 * (
        rng.standard_normal((tokens, inputs))
    )


def hidden(windows: int = 8, window: int = 32) -> jax.Array:
    return normal(windows, window, 32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("inputs", "group_size", "bend"),
    [
        pytest.param(128, 128, 0.0, marks=pytest.mark.slow),
        (60, 32, 0.3),
        pytest.param(192, 32, 0.0, marks=pytest.mark.slow),
    ],
)
def test_streamed_products_are_those_of_the_weights(inputs: int, group_size: int, bend: float, bits: int) -> None:
    values = grouped(normal(24, inputs), group_size)
    grid = between_extremes(values)
    codes = jnp.asarray(rng.integers(0, 256, values.shape), jnp.uint8)
    kernel = replace(packed(codes, grid, inputs=inputs), bend=(bend,) * 3)
    x = normal(2, inputs)
    expected = x @ kernel.dequantise(bits).T
    found = jax.jit(multiply_streams)(kernel.padded(x), kernel.slice(bits))
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))


def test_a_nan_in_a_row_is_not_lost_on_the_way() -> None:
    kernel = packed(jnp.zeros((1, 64, 8), jnp.uint8), between_extremes(normal(1, 64, 8)), inputs=64)
    assert np.isnan(multiply_streams(normal(1, 64).at[0, 3].set(jnp.nan), kernel.slice(4))).all()


@pytest.mark.parametrize("bend", [EVEN, COMPANDED])
def test_the_best_codes_are_those_of_trying_all(bend: Bend) -> None:
    grid = Grid(jnp.asarray([1.0, 15.0, 70.0]), jnp.asarray([3.0, 0.2, -0.1]), bend)
    targets, weights = 80 * normal(3, 200), jnp.asarray([4.0, 2.0, 1.0])
    every = jnp.arange(256, dtype=jnp.uint8)
    errors = [weights[s] * jnp.square(read(every, grid, s)[:, None] - targets[s]) for s in range(3)]
    cost = jnp.stack(errors).sum(axis=0)
    found = best_codes(targets, jax.tree.map(lambda part: part[:, None], grid), weights)
    chosen = jnp.take_along_axis(cost, found[None].astype(jnp.int32), 0)[0]
    np.testing.assert_allclose(chosen, cost.min(axis=0), rtol=1e-4, atol=1e-3)


def test_bent_levels_straighten_back_and_the_nearest_is_the_nearest() -> None:
    t = jnp.linspace(-200, 200, 1001)
    np.testing.assert_allclose(straightened(bent(t, 8, 0.5), 8, 0.5), t, rtol=2e-5, atol=1e-3)
    values = grouped(normal(6, 64), 64)
    grid = between_extremes(values, bend=COMPANDED)
    every = jnp.stack([read(jnp.full(values.shape, code, jnp.uint8), across(grid), 0) for code in range(256)])
    best = jnp.abs(every - values).min(axis=0)
    found = read(nearest_codes(values, grid), across(grid), 0)
    np.testing.assert_allclose(jnp.abs(found - values), best, atol=1e-6)
    np.testing.assert_array_equal(
        packed(nearest_codes(values, grid), grid, inputs=64).dequantise(8), found.reshape(64, 6).T
    )


@pytest.mark.slow
def test_a_companded_codebook_loses_less_at_few_bits() -> None:
    """Gaussian weights, all three precisions from one code: measured 0.17 and 0.24 dB better at 2 and 4 bits."""
    values, weights = grouped(normal(256, 256), 64), jnp.asarray([256.0, 16.0, 1.0])

    def noise(bend: Bend) -> list[float]:
        codes, grid = refit(values, jnp.ones(values.shape[:2]), weights, bend)
        return [float(jnp.square(read(codes, across(grid), s) - values).mean()) for s in range(3)]

    even, companded = noise(EVEN), noise(COMPANDED)
    assert companded[1] < 0.985 * even[1]
    assert companded[2] < 0.985 * even[2]
    assert companded[0] < 1.1 * even[0]


def test_least_squares_beat_any_other_scale_and_offset() -> None:
    values, importance = grouped(normal(6, 64), 32), jnp.asarray(rng.uniform(0.1, 2, (2, 32)), jnp.float32)
    codes = jnp.asarray(np.clip(np.round(40 * values + 130), 0, 255), jnp.uint8)
    grid = least_squares(values, codes, importance)
    for slice_, bits in enumerate(BITS):
        level = np.asarray(codes >> (8 - bits), np.float64) - (2**bits - 1) / 2
        for group, output in np.ndindex(2, 6):
            root = np.sqrt(importance[group])
            columns = np.stack([level[group, :, output], np.ones(32)], axis=1) * root[:, None]
            scale, shift = np.linalg.lstsq(columns, np.asarray(values[group, :, output]) * root, rcond=None)[0]
            np.testing.assert_allclose(grid.scales[slice_, group, output], scale, rtol=0.01)
            np.testing.assert_allclose(
                grid.scales[slice_, group, output] * grid.offsets[slice_, group, output],
                shift,
                atol=scale * (2**bits / 500 + 0.05),
            )


def plain_gptq(
    weights: np.ndarray, hessian: np.ndarray, scale: np.ndarray, offset: np.ndarray, bits: int
) -> np.ndarray:
    """The paper's loop, one input after the other, for a single precision; scale and offset per group and output."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    damped = hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    factor = np.linalg.cholesky(np.linalg.inv(damped[order][:, order])).T
    left, codes = weights[:, order].copy(), np.zeros(weights.shape, np.int64)
    for i, column in enumerate(order):
        s, o = scale[column // 32], offset[column // 32]
        code = np.clip(np.round(left[:, i] / s - o + (2**bits - 1) / 2), 0, 2**bits - 1)
        error = (left[:, i] - s * (code - (2**bits - 1) / 2 + o)) / factor[i, i]
        left[:, i:] -= error[:, None] * factor[i, i:]
        codes[:, column] = code
    return codes


@pytest.mark.parametrize("slice_", [1, 2])
@pytest.mark.slow
def test_with_all_weight_on_one_slice_it_is_plain_gptq(slice_: int) -> None:
    x, weights = correlated(400, 96), np.asarray(normal(7, 96), np.float64)
    hessian = x.T @ x / len(x)
    grid = between_extremes(grouped(jnp.asarray(weights, jnp.float32), 32))
    only = jnp.zeros(3).at[slice_].set(1.0)
    three = jnp.asarray(np.broadcast_to(hessian, (3, 96, 96)), jnp.float32)
    codes = compensated_codes(jnp.asarray(weights, jnp.float32), three, grid, only, group_size=32)
    scale, offset = (np.asarray(part[slice_], np.float64) for part in (grid.scales, grid.offsets))
    expected = plain_gptq(weights, hessian, scale, offset, BITS[slice_])
    found = np.asarray(codes).reshape(96, 7).T >> (8 - BITS[slice_])
    assert (found == expected).mean() > 0.97


def test_compensated_codes_err_less_in_what_the_layer_puts_out() -> None:
    x, weights = correlated(400, 128), normal(16, 128)
    hessian = jnp.asarray(x.T @ x / len(x), jnp.float32)
    grid = between_extremes(grouped(weights, 64))
    codes = compensated_codes(weights, jnp.stack([hessian] * 3), grid, jnp.ones(3), group_size=64)
    plain = best_codes(jnp.broadcast_to(grouped(weights, 64), (3, 2, 64, 16)), across(grid), jnp.ones(3))

    def error(codes: jax.Array, bits: int) -> float:
        difference = packed(codes, grid, inputs=128).dequantise(bits) - weights
        return float(jnp.einsum("oi,ij,oj->", difference, hessian, difference))

    assert error(codes, 2) < 0.6 * error(plain, 2)
    assert error(codes, 4) < 0.8 * error(plain, 4)


_refined = jax.jit(refined, static_argnames="rounds")


def weighed(codes: jax.Array, grid: Grid, values: jax.Array, seen: jax.Array) -> np.ndarray:
    """Per slice and output, the damped squared error of what the layer puts out, in double precision."""
    inputs = values.shape[0] * values.shape[1]
    reads = np.stack([read(codes, across(grid), s) for s in range(3)]).astype(np.float64).reshape(3, inputs, -1)
    wrong = (reads - np.asarray(values, np.float64).reshape(inputs, -1))[:, : seen.shape[1]]
    wide = np.asarray(seen, np.float64)
    wide += DAMPING * np.einsum("sii->s", wide)[:, None, None] / wide.shape[1] * np.eye(wide.shape[1])
    return np.einsum("sio,sij,sjo->so", wrong, wide, wrong)


@pytest.mark.parametrize("bend", [EVEN, COMPANDED])
@pytest.mark.parametrize("importance", [(24.0, 1.5, 1.0), (0.0, 0.0, 1.0)])
def test_turns_of_codes_and_grid_never_raise_what_they_lower(bend: Bend, importance: tuple[float, ...]) -> None:
    x, weights, counts = correlated(400, 80), normal(16, 80), jnp.asarray(importance)
    seen = jnp.asarray([(x + noise).T @ (x + noise) / len(x) for noise in (0.0, 0.1, 0.5)], jnp.float32)
    values = grouped(weights, 32)
    grid = between_extremes(values, bend=bend)
    codes = nearest_codes(values, grid)
    sums = [weighed(codes, grid, values, seen).T @ np.asarray(importance)]
    for _ in range(3):
        codes, grid = _refined(values, seen, codes, grid, counts, rounds=1)
        sums.append(weighed(codes, grid, values, seen).T @ np.asarray(importance))
    assert all(np.all(after <= before * 1.001) for before, after in pairwise(sums))
    assert sums[1].sum() < 0.8 * sums[0].sum()
    np.testing.assert_array_equal(grid.scales, storable(grid.scales, grid.scales * grid.offsets, bend).scales)


@pytest.mark.slow
def test_no_single_code_can_be_bettered_after_many_turns() -> None:
    x, weights, counts = correlated(200, 16), normal(3, 16), jnp.asarray([4.0, 1.0, 1.0])
    seen = jnp.asarray(np.stack([x.T @ x / len(x)] * 3), jnp.float32)
    values = grouped(weights, 8)
    codes, grid = _refined(values, seen, nearest_codes(values, g := between_extremes(values)), g, counts, rounds=40)
    least = weighed(codes, grid, values, seen).T @ np.asarray(counts)
    for group, i in np.ndindex(2, 8):
        for code in range(256):
            other = weighed(codes.at[group, i].set(code), grid, values, seen).T @ np.asarray(counts)
            assert np.all(other >= least * (1 - 1e-4))


def test_hessians_are_those_of_the_inputs() -> None:
    block, x = tiny_model("llama").network.blocks[0], hidden(6)
    found = hessians(block, x)
    inputs = block.attention_norm(x).reshape(-1, 32)
    np.testing.assert_allclose(found["q"], inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-3)
    assert found["k"] is found["v"]
    assert found["gate"] is found["up"]
    assert found["down"].shape == (64, 64)


@pytest.mark.parametrize("name", ["gpt2"])
@pytest.mark.slow
def test_each_step_brings_the_blocks_output_nearer(name: str) -> None:
    block, x = tiny_model(name).network.blocks[0], hidden()
    streams, exact = Streams.start(x), run_all(tiny_model(name).network.blocks[0], x)
    errors: dict[str, list[float]] = {}
    for method in ("rtn", "refit", "refit+tune"):
        fitted = fit_block(block, streams, Fit(method, group_size=16, tuning=Tuning(passes=10)))
        assert set(fitted) == set(kernels_of(block))
        after = streams.after(block, {n: f.kernel for n, f in fitted.items()})
        np.testing.assert_allclose(after.dense, exact, atol=1e-5)
        errors[method] = [float(jnp.square(part - exact).mean()) for part in after.fitted]
    assert errors["refit"][2] < 0.9 * errors["rtn"][2]
    assert sum(a / b for a, b in zip(errors["refit+tune"], errors["refit"], strict=True)) < 2.9


def test_a_block_with_other_kernels_is_a_copy() -> None:
    block, x = tiny_model("gpt2").network.blocks[0], hidden(1)
    before = run(block, x)
    changed = with_kernels(block, {"q": jnp.zeros_like(kernels_of(block)["q"])})
    assert float(jnp.abs(run(changed, x) - before).max()) > 0
    np.testing.assert_array_equal(run(block, x), before)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "hf", "llama", tokenizer=True)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(c) for c in rng.integers(32, 127, 1500)), "utf-8")
    return path


def options(text: Path, method: str) -> tuple[str, ...]:
    wanted = ("--quantize", "matryoshka", "--group-size", "16", "--method", method)
    return (*wanted, "--calibration-text", str(text), "--calibration-tokens", "1024")


@pytest.mark.slow
def test_a_killed_conversion_goes_on_where_it_was(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, fit = options(text, "refit"), convert.calibrated.fit_block
    assert convert_folder(source, tmp_path / "straight", *whole)[0] == 0
    fitted = []

    def killed(*arguments: Any) -> Any:
        if fitted:
            raise KeyboardInterrupt
        fitted.append(1)
        return fit(*arguments)

    monkeypatch.setattr(convert.calibrated, "fit_block", killed)
    assert convert_folder(source, tmp_path / "out", *whole)[0] == 130
    assert not (tmp_path / "out").exists()
    fitted.clear()
    assert convert_folder(source, tmp_path / "out", *whole)[0] == 0
    assert not list(tmp_path.glob(".out*"))
    left, right = (
        arrays_by_path(load(tmp_path / name, compilation_cache=False).network) for name in ("straight", "out")
    )
    for one, two in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, two)
    kernel = left["blocks.0.q.kernel"]
    assert isinstance(kernel, NestedKernel)
    entry = json.loads((tmp_path / "out" / MANIFEST).read_text())["quantization"]
    assert entry["method"] == "refit"
    assert entry["calibration"]["tokens"] == 1024
    errors = entry["kernels"]["blocks.1.down.kernel"]["errors"]
    assert errors["output"]["8"] < errors["output"]["4"] < errors["output"]["2"]


def test_codes_of_another_format_are_refused(tmp_path: Path) -> None:
    assert convert_folder(write_folder(tmp_path / "hf", "gpt2"), tmp_path / "out", "--quantize", "matryoshka")[0] == 0
    manifest = tmp_path / "out" / MANIFEST
    content = json.loads(manifest.read_text())
    del content["quantization"]["format"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="codes are of format 1"):
        load(tmp_path / "out", compilation_cache=False)


def test_text_and_method_must_go_together(source: Path, text: Path, tmp_path: Path) -> None:
    for method in METHODS[1:]:
        wanted = ("--quantize", "matryoshka", "--method", method)
        assert_refused(source, tmp_path / "out", f"--method {method} needs --calibration-text", *wanted)
    assert_refused(source, tmp_path / "out", "--method rtn takes no", *options(text, "rtn"))
    text.write_text("short", "utf-8")
    assert_refused(source, tmp_path / "out", "no document has 128 tokens", *options(text, "refit"))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
