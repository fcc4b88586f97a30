"""Products with nested kernels, and the precision at which rows and modules read them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.adaptive.costs import Costs
from qs_jax.choices import BITS
from qs_jax.fitting.rounding import round_to_nearest
from qs_jax.kernels import (
    DenseKernel,
    Kernel,
    TwofoldKernel,
    as_kernel,
    at_bits,
    has_planes,
    is_nested,
    most_bits,
    plane_bytes,
    weights,
)
from qs_jax.lens import DirectLens, DirectMap, with_direct_lens
from qs_jax.matryoshka import product
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.model import Model
from qs_jax.models import forward
from tests.tiny import PROMPTS, narrowed, quantised, tiny_model

rng = np.random.default_rng(0)


def random_kernel(outputs: int = 48, inputs: int = 100, group_size: int = 64) -> NestedKernel:
    return round_to_nearest(jnp.asarray(rng.standard_t(5, (outputs, inputs)), jnp.float32), group_size=group_size)


def random_rows(*shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (70,)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [pytest.param(64, marks=pytest.mark.slow), 100, 172])
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


def test_equal_products_with_large_kernels_are_in_a_program_once() -> None:
    """Each would take half a second to compile, and megabytes; only the CPU reads them so."""
    kernels = [random_kernel(1024, 512) for _ in range(3)]

    def products(kernels: list[NestedKernel], x: jax.Array) -> list[jax.Array]:
        return [kernel.matmul(x) for kernel in kernels]

    traced = jax.jit(products).trace(kernels, jnp.ones((1, 512)))
    on_cpu, elsewhere = (str(traced.lower(lowering_platforms=(name,)).as_text()) for name in ("cpu", "cuda"))
    assert on_cpu.count("func.func private @multiply_streams") == 1
    assert on_cpu.count('inlineable = "false"') == 3
    assert "inlineable" not in elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["balanced", "paper"])
def test_products_may_stand_wherever_a_policy_puts_them(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In spans that are skipped, on gathered rows, at several precisions: streamed kernels give what others give."""
    model, tokens = quantised(tiny_model("llama", 3)), []
    for tiny in (2**19, 0):
        monkeypatch.setattr(product, "_TINY", tiny)
        jax.clear_caches()
        tokens.append(qs_jax.generate(model, PROMPTS, max_new_tokens=12, policy=policy).tokens)
    jax.clear_caches()
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("outputs", [64, 100, 192, 333])
def test_products_in_blocks_are_whole_ones(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 outputs; a number that they do not divide is covered by a last one that overlaps."""
    kernel, x = random_kernel(outputs, 128), random_rows(5, 128)
    whole = jax.jit(NestedKernel.matmul)(kernel.at(4), x)
    monkeypatch.setattr(product, "_IN_CACHE", 128 * 64)
    in_blocks = jax.jit(lambda kernel, x: kernel.at(4).matmul(x))(kernel, x)
    np.testing.assert_allclose(in_blocks, whole, rtol=1e-5, atol=1e-5)
    assert in_blocks.shape == (5, outputs)


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


@pytest.fixture(params=(pytest.param("gpt2", marks=pytest.mark.slow), "llama"), scope="module")
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


def test_rows_of_a_whole_model_at_their_own_precision(model: Model) -> None:
    tokens, bits = jnp.asarray([PROMPTS[0]] * 3), [4, 8, 2]
    mixed = jax.jit(lambda network, bits: forward(at_bits(network, bits), tokens))(model.network, jnp.asarray(bits))
    for row, own in enumerate(bits):
        alone = forward(at_bits(model.network, own), tokens[:1])[0]
        np.testing.assert_allclose(mixed[row], alone, atol=2e-4)
        np.testing.assert_array_equal(mixed[row].argmax(-1), alone.argmax(-1))


def test_a_kernel_that_holds_both_is_dense_until_bits_are_asked_for() -> None:
    """To the last bit the one or the other: products, rows, and the bytes they read."""
    codes = random_kernel()
    dense = jnp.asarray(rng.standard_normal(codes.shape), jnp.float32)
    both, x, ids = TwofoldKernel(dense, codes), random_rows(3, 100), jnp.asarray([[4, 99], [0, 7]])
    assert isinstance(both, Kernel)
    assert as_kernel(both) is both
    assert (both.shape, both.ndim, both.size, both.dtype) == (codes.shape, 2, codes.size, dense.dtype)
    assert both.nbytes == dense.nbytes
    np.testing.assert_array_equal(both.matmul(x), DenseKernel(dense).matmul(x))
    np.testing.assert_array_equal(both.rows(ids), DenseKernel(dense).rows(ids))
    for bits in BITS:
        assert both.at(bits).nbytes == codes.at(bits).nbytes < both.nbytes
        np.testing.assert_array_equal(both.at(bits).matmul(x), codes.at(bits).matmul(x))
        np.testing.assert_array_equal(both.at(bits).rows(ids), codes.at(bits).rows(ids))
    by_row = jnp.asarray([8, 2, 4])
    np.testing.assert_array_equal(both.at(by_row).matmul(x), codes.at(by_row).matmul(x))
    with pytest.raises(ValueError, match="bits is 3"):
        both.at(3)


def test_a_module_with_both_counts_what_a_pass_reads(model: Model) -> None:
    """As it stands what the dense one reads, at fewer bits what codes alone do; never the sum of the two."""
    plain = tiny_model(model.config.model_type)
    both = quantised(plain, keep_dense=True).network
    assert has_planes(both)
    assert [most_bits(network) for network in (plain.network, both, model.network)] == [32, 32, 8]
    costs, dense, codes = (Costs.of(network) for network in (both, plain.network, model.network))
    assert (costs.step_bytes(), costs.bits) == (dense.step_bytes(), 32)
    assert costs.layers[0].flops == dense.layers[0].flops
    for bits in BITS:
        assert costs.step_bytes(bits) == codes.step_bytes(bits) < costs.step_bytes()
        assert Costs.of(at_bits(both, bits)) == Costs.of(at_bits(model.network, bits))
    assert plane_bytes(both.blocks[0], None) == plane_bytes(plain.network.blocks[0], None)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_head_that_holds_both_is_counted_as_it_is_read(bits: int | None) -> None:
    """A tied table: drafts read its codes, the model itself does not."""
    copy = jax.tree.map(lambda leaf: leaf, tiny_model("gpt2").network)
    table = copy.embedding.table.get_value()
    head = TwofoldKernel(table, replace(round_to_nearest(table, group_size=16), least=8))
    copy.embedding.table.set_value(head)
    expected = head.nbytes if bits is None else head.codes.nbytes
    costs = Costs.of(copy)
    blocks = sum(layer.bytes[bits or costs.bits] for layer in costs.layers)
    assert costs.step_bytes(bits) - blocks == expected
    assert costs.probe_bytes(0, bits or costs.bits) == expected


def test_what_else_a_model_knows_does_not_count_as_bits_of_its_weights() -> None:
    """How rare tokens are stays in float32 beside weights in bfloat16."""
    narrow = narrowed(tiny_model("llama"))
    arrays = np.zeros((4, 64)), np.zeros((1, 32, 4)), np.zeros((1, 32))
    lens = DirectLens((DirectMap((0, 1), *arrays),), np.zeros(97, np.float32))
    network = with_direct_lens(narrow.network, lens)
    assert network.rarity is not None
    assert (network.rarity.get_value().dtype, most_bits(network)) == (jnp.float32, 16)
