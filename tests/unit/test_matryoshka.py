"""Nested codes, kernels that carry them, and models that read them at any precision."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.adaptive.costs import Costs
from qs_jax.checkpoint import MANIFEST
from qs_jax.choices import BITS
from qs_jax.errors import GenerationError
from qs_jax.fitting.rounding import relative_errors, round_to_nearest
from qs_jax.kernels import at_bits, has_planes, is_nested, plane_bytes, weights
from qs_jax.loading import load
from qs_jax.matryoshka.codec import pack, slice_of, unpack
from qs_jax.matryoshka.kernel import NestedKernel, nested_kernel
from qs_jax.model import Model
from qs_jax.models import arrays_by_path, forward
from tests.tiny import PROMPTS, quantised, tiny_model
from tests.unit.test_conversion import assert_refused, run, write_folder

rng = np.random.default_rng(0)
GROUP_SIZES = (16, 64, 128)


def all_codes(group_size: int) -> jax.Array:
    """Every code at every place of a group: outputs run through the 256 codes."""
    places = np.arange(group_size)[:, None] + np.arange(256)
    return jnp.asarray(np.stack([places % 256, (7 * places) % 256]), jnp.uint8)


def random_kernel(outputs: int = 48, inputs: int = 100, group_size: int = 64) -> NestedKernel:
    return round_to_nearest(jnp.asarray(rng.standard_t(5, (outputs, inputs)), jnp.float32), group_size=group_size)


def random_rows(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_all_codes_come_back_and_their_top_bits_are_the_slices(group_size: int, bits: int) -> None:
    codes = all_codes(group_size)
    np.testing.assert_array_equal(unpack(pack(codes), bits), np.asarray(codes) >> (8 - bits))
    np.testing.assert_array_equal(slice_of(codes, bits), np.asarray(codes) >> (8 - bits))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_planes_are_those_of_a_plain_loop(group_size: int) -> None:
    """A numpy oracle that places one code at a time, by the layout that the codec documents."""
    codes = all_codes(group_size)
    high, middle, low = (np.asarray(plane) for plane in pack(codes))
    expected = [np.zeros_like(plane) for plane in (high, middle, low)]
    for place in range(group_size):
        block, i = divmod(place, 8)
        code = np.asarray(codes)[:, place].astype(np.uint16)
        expected[0][:, block] |= (code >> 6) << (2 * i)
        expected[1][:, block] |= (code >> 4 & 3) << (2 * i)
        expected[2][:, 2 * block + i % 2] |= (code & 15) << (4 * (i // 2))
    for found, wanted in zip((high, middle, low), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_group_that_words_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(jnp.zeros((1, 20, 3), jnp.uint8))


@pytest.mark.parametrize("bend", [0.0, 0.3])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_read_as_documented(bits: int, bend: float) -> None:
    codes = jnp.asarray(rng.integers(0, 256, (2, 32, 5)), jnp.uint8)
    scales = jnp.asarray(rng.uniform(0.5, 2, (3, 2, 5)), jnp.bfloat16)
    offsets = jnp.asarray(rng.integers(-128, 128, (3, 2, 5)), jnp.int8)
    kernel = nested_kernel(codes, scales, offsets, inputs=50, bend=(bend,) * 3)
    slice_ = BITS.index(bits)
    t = (np.asarray(codes) >> (8 - bits)).astype(np.float64) - (2**bits - 1) / 2
    level = t + bend * t**3 / (2**bits / 2) ** 2
    offset = np.asarray(offsets[slice_], np.float64) * 2**bits / 256
    expected = (level + offset[:, None]) * np.asarray(scales[slice_], np.float64)[:, None]
    np.testing.assert_allclose(kernel.dequantise(bits), expected.reshape(64, 5).T[:, :50], rtol=1e-5, atol=1e-5)


def test_rounding_errs_by_half_a_step_and_never_more_with_more_bits() -> None:
    weights = jnp.asarray(rng.standard_t(5, (64, 256)), jnp.float32)
    kernel = round_to_nearest(weights)
    step = np.repeat(np.asarray(kernel.scales[0], np.float32), 64, axis=0).T
    assert (np.abs(kernel.dequantise(8) - weights) <= step * 1.01).all()
    assert np.mean(np.abs(kernel.dequantise(8) - weights) <= step * 0.501) > 0.98
    errors = relative_errors(weights, kernel)
    assert errors["8"] < 1e-4 < errors["4"] < 0.02 < errors["2"] < 0.5


@pytest.mark.parametrize("weights", [np.zeros((4, 70)), np.full((4, 70), -3.0), np.full((4, 70), 1e-30)])
def test_groups_without_spread_are_exact(weights: np.ndarray) -> None:
    kernel = round_to_nearest(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(kernel.dequantise(8), weights, rtol=0.01, atol=1e-37)


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (70,)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [64, 100, 172])
def test_products_are_those_of_the_weights(rows: tuple[int, ...], bits: int, inputs: int) -> None:
    kernel = random_kernel(inputs=inputs)
    x = random_rows(*rows, inputs)
    expected = x @ kernel.dequantise(bits).T
    np.testing.assert_allclose(kernel.at(bits).matmul(x), expected, atol=2e-5 * float(jnp.abs(expected).max()))


def test_weights_are_not_written_out_before_they_are_needed() -> None:
    """Else a prompt through a large model would need all of it as floats beside its codes."""
    kernel = random_kernel(512, 512)
    kernels, x = [kernel] * 12, random_rows(70, 512)

    def chain(kernels: list[NestedKernel], x: jax.Array) -> jax.Array:
        for kernel in kernels:
            x = jnp.tanh(kernel.matmul(x))
        return x

    memory = jax.jit(chain).lower(kernels, x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 3 * 4 * kernel.size


def test_rows_of_mixed_precision_equal_each_row_alone() -> None:
    kernel, x, bits = random_kernel(), random_rows(5, 3, 100), [8, 2, 4, 2, 8]
    mixed = jax.jit(lambda kernel, x, bits: kernel.at(bits).matmul(x))(kernel, x, jnp.asarray(bits))
    for row, own in enumerate(bits):
        np.testing.assert_allclose(mixed[row], kernel.at(own).matmul(x[row : row + 1])[0], atol=1e-5)


def test_a_row_of_nan_leaves_the_others_alone() -> None:
    kernel, x = random_kernel(), random_rows(3, 100)
    product = jax.jit(NestedKernel.matmul)
    np.testing.assert_array_equal(product(kernel, x.at[0].set(jnp.nan))[1:], product(kernel, x)[1:])


def test_a_pinned_kernel_is_always_read_at_eight_bits() -> None:
    kernel, x = replace(random_kernel(), least=8), random_rows(2, 100)
    for bits in (2, jnp.asarray([2, 4])):
        np.testing.assert_array_equal(kernel.at(bits).matmul(x), kernel.at(8).matmul(x))
    assert kernel.at(2).nbytes == kernel.nbytes


@pytest.fixture(params=("gpt2", "llama"), scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return quantised(tiny_model(request.param))


def test_bits_reach_every_kernel_and_nothing_else(model: Model) -> None:
    tokens = jnp.asarray([PROMPTS[0]])
    assert has_planes(model.network)
    assert not has_planes(tiny_model("gpt2").network)
    assert at_bits(tiny_model("gpt2").network, 4).embedding is not None
    dense = forward(tiny_model(model.config.model_type).network, tokens)
    errors = [float(jnp.abs(forward(at_bits(model.network, b), tokens) - dense).mean()) for b in BITS]
    assert errors[0] < errors[1] < errors[2]
    with pytest.raises(ValueError, match="bits is 3"):
        at_bits(model.network, 3)


def test_fewer_bits_read_fewer_bytes(model: Model) -> None:
    block = model.network.blocks[0]
    dense = sum(leaf.nbytes for leaf in weights(block) if not is_nested(leaf))
    size = sum(leaf.size for leaf in weights(block) if is_nested(leaf))
    plain = Costs.of(tiny_model(model.config.model_type).network)
    for bits in BITS:
        assert plane_bytes(block, bits) == dense + size * bits // 8 + size // 16 * 3
        assert Costs.of(model.network).layers[0].bytes[bits] == plane_bytes(block, bits)
    assert Costs.of(model.network).layers[0].flops == plain.layers[0].flops


@pytest.mark.slow
def test_generation_at_every_precision(model: Model) -> None:
    for bits in BITS:
        output = qs_jax.generate(model, PROMPTS, bits=bits, max_new_tokens=12)
        for prompt, tokens in zip(PROMPTS, output.tokens, strict=True):
            logits = forward(at_bits(model.network, bits), jnp.asarray([*prompt, *tokens])[None])
            assert tokens == np.asarray(logits)[0, len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        assert output.ledger["bits_mean"] == bits


def test_rows_of_a_whole_model_at_their_own_precision(model: Model) -> None:
    tokens, bits = jnp.asarray([PROMPTS[0]] * 3), [4, 8, 2]
    mixed = jax.jit(lambda network, bits: forward(at_bits(network, bits), tokens))(model.network, jnp.asarray(bits))
    for row, own in enumerate(bits):
        alone = forward(at_bits(model.network, own), tokens[:1])[0]
        np.testing.assert_allclose(mixed[row], alone, atol=2e-4)
        np.testing.assert_array_equal(mixed[row].argmax(-1), alone.argmax(-1))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.slow
def test_a_converted_folder_comes_back(tmp_path: Path, name: str) -> None:
    options = ("--quantize", "matryoshka", "--group-size", "16", "--pin", r"blocks\.1\.o")
    status, _, err = run(write_folder(tmp_path / "hf", name), tmp_path / "out", *options)
    assert (status, err) == (0, "")
    loaded, expected = load(tmp_path / "out", compilation_cache=False), arrays_by_path(tiny_model(name).network)
    for path, array in arrays_by_path(loaded.network).items():
        if not isinstance(array, NestedKernel):
            assert not path.endswith("kernel") or path.startswith("lm_head")
            np.testing.assert_array_equal(array[:97], expected[path][:97])
            continue
        assert array.least == (8 if path == "blocks.1.o.kernel" else 2)
        wanted = round_to_nearest(expected[path], group_size=16)
        for found, leaf in zip(jax.tree.leaves(array), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(found, leaf)
    entry = json.loads((tmp_path / "out" / MANIFEST).read_text())["quantization"]
    assert (entry["method"], entry["bits_per_weight"]) == ("rtn", 8 + 3 * 24 / 16)
    assert entry["kernels"]["blocks.0.q.kernel"]["errors"]["weights"]["8"] < 1e-4
    assert qs_jax.generate(loaded, PROMPTS[:1], bits=4, max_new_tokens=4).lengths == [4]


@pytest.mark.slow
def test_embedding_and_head_may_be_kept_at_eight_bits(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", "gpt2")
    assert run(source, tmp_path / "out", "--quantize", "matryoshka", "--group-size", "16", "--exclude", "(?!)")[0] == 0
    loaded = load(tmp_path / "out", compilation_cache=False)
    tokens = jnp.asarray([PROMPTS[0]])
    blocks_only = forward(quantised(tiny_model("gpt2")).network, tokens)
    np.testing.assert_allclose(forward(loaded.network, tokens), blocks_only, atol=0.3)
    assert qs_jax.generate(loaded, PROMPTS[:1], bits=2, max_new_tokens=4).lengths == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "int3"), "invalid value for '--quantize': 'int3' is not"),
        (
            ("--quantize", "matryoshka", "--method", "magic"),
            "invalid value for '--method': 'magic' is not one of",
        ),
        (("--quantize", "matryoshka", "--group-size", "20"), "--group-size is 20"),
        (("--quantize", "matryoshka", "--exclude", "("), "no regular expression"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    assert_refused(write_folder(tmp_path / "hf", "gpt2"), tmp_path / "out", message, *options)


def test_bits_need_matryoshka_weights() -> None:
    with pytest.raises(GenerationError, match="no Matryoshka weights"):
        qs_jax.generate(tiny_model("gpt2"), PROMPTS[:1], bits=4)
    with pytest.raises(GenerationError, match="bits is 3"):
        qs_jax.generate(tiny_model("gpt2"), PROMPTS[:1], bits=3)
