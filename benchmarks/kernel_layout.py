"""How should a kernel lie in memory, how should a small product be divided among cores, and in which dtype?

    python -m benchmarks.kernel_layout layouts   # writes benchmarks/results/kernel_layout.json
    python -m benchmarks.kernel_layout dtypes    # writes benchmarks/results/kernel_dtypes.json
    python -m benchmarks.kernel_layout --quick   # layouts, two rounds, nothing written

Chains the products of a GPT-2-124M's feed-forward halves (weights far larger than the caches, each product waiting
for the one before) for several row counts. Layouts, in float32: kernels stored (in, out) as `x @ W`; stored (out, in)
as one product; and stored (out, in) with outputs in one block per core, which is what
`qs_jax.kernels.DenseKernel` does on CPU. Dtypes, stored (out, in): what `DenseKernel` does in float32 and bfloat16, a
plain product of bfloat16 that asks for no wider sum, and int8 times int8, which would need activations of 8 bits.

Predictions, before the first run: (out, in) loses at batch 1, as measured with an earlier jax; it does not. Products of
bfloat16 are slower than float32 on a CPU, as measured before; where sums are asked for in float32, they are not.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.harness import interleaved, write_result
from qs_jax.kernels import DenseKernel

HIDDEN, INNER, LAYERS = 768, 3072, 12
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)

Product = Callable[[jax.Array, jax.Array], jax.Array]


class Candidate(NamedTuple):
    product: Product
    layout: str = "out_in"
    dtype: str = "float32"


def in_out(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def out_in(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))


def integers(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32).astype(jnp.int8)


def on_cores(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return DenseKernel(kernel).matmul(x).astype(x.dtype)


STUDIES = {
    "layouts": {
        "in_out": Candidate(in_out, "in_out"),
        "out_in": Candidate(out_in),
        "out_in_per_core": Candidate(on_cores),
    },
    "dtypes": {
        "float32": Candidate(on_cores),
        "bfloat16": Candidate(on_cores, dtype="bfloat16"),
        "bfloat16_plain": Candidate(out_in, dtype="bfloat16"),
        "int8": Candidate(integers, dtype="int8"),
    },
}
_RESULTS = {"layouts": "kernel_layout", "dtypes": "kernel_dtypes"}


@partial(jax.jit, static_argnames="product")
def chain(x: jax.Array, kernels: list[tuple[jax.Array, jax.Array]], product: Product) -> jax.Array:
    for up, down in kernels:
        x = x + product(jax.nn.relu(product(x, up)), down)
    return x


def run(x: jax.Array, kernels: list[tuple[jax.Array, jax.Array]], product: Product) -> None:
    chain(x, kernels, product).block_until_ready()


def random_kernels(layout: str, dtype: str) -> list[tuple[jax.Array, jax.Array]]:
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS)
    shapes = [(INNER, HIDDEN), (HIDDEN, INNER)] * LAYERS
    kernels = [_random(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    if layout == "in_out":
        kernels = [jnp.array(kernel.T) for kernel in kernels]
    return list(zip(kernels[::2], kernels[1::2], strict=True))


def _random(key: jax.Array, shape: tuple[int, int], dtype: str) -> jax.Array:
    if dtype == "int8":
        return jax.random.randint(key, shape, -128, 128, jnp.int8)
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=tuple(STUDIES), default="layouts")
    parser.add_argument("--quick", action="store_true", help="two rounds, nothing written")
    arguments = parser.parse_args()
    rounds, study = 2 if arguments.quick else 15, STUDIES[arguments.study]
    places = dict.fromkeys((candidate.layout, candidate.dtype) for candidate in study.values())
    kernels = {place: random_kernels(*place) for place in places}
    results: list[dict[str, Any]] = []
    print("| rows | " + " | ".join(f"{name}, ms" for name in study) + " |\n|" + "---|" * (len(study) + 1))
    for rows in ROWS:
        calls = {}
        for name, (product, layout, dtype) in study.items():
            x = _random(jax.random.key(1), (rows, HIDDEN), dtype)
            calls[name] = partial(run, x, kernels[layout, dtype], product)
        seconds = {name: statistics.median(values) for name, values in interleaved(calls, rounds).items()}
        gb_s = {name: _gigabytes(kernels[study[name][1:]]) / value for name, value in seconds.items()}
        results.append({"rows": rows, "ms": {name: 1e3 * value for name, value in seconds.items()}, "gb_s": gb_s})
        print(f"| {rows} | " + " | ".join(f"{1e3 * value:.1f}" for value in seconds.values()) + " |", flush=True)
    if not arguments.quick:
        settings = {"hidden": HIDDEN, "inner": INNER, "layers": LAYERS, "rounds": rounds}
        print(write_result(_RESULTS[arguments.study], {"settings": settings, "rows": results}))


def _gigabytes(kernels: list[tuple[jax.Array, jax.Array]]) -> float:
    return sum(kernel.nbytes for pair in kernels for kernel in pair) / 1e9


if __name__ == "__main__":
    main()
