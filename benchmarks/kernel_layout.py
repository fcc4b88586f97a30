"""How should a kernel lie in memory, and how should a small product be divided among cores?

    python -m benchmarks.kernel_layout           # writes benchmarks/results/kernel_layout.json
    python -m benchmarks.kernel_layout --quick   # two rounds, nothing written

Chains the products of a GPT-2-124M's feed-forward halves (weights far larger than the caches, each product waiting
for the one before) for several row counts: kernels stored (in, out) as `x @ W`; stored (out, in) as one product; and
stored (out, in) with outputs in one block per core, which is what `qs_jax.models.layers.project` does on CPU.

Prediction, before the first run: (out, in) loses at batch 1, as measured with an earlier jax. Outcome: it does not.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import interleaved, write_result
from qs_jax.models.layers import project

HIDDEN, INNER, LAYERS = 768, 3072, 12
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)

Product = Callable[[jax.Array, jax.Array], jax.Array]


def in_out(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def out_in(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))


PRODUCTS: dict[str, Product] = {"in_out": in_out, "out_in": out_in, "out_in_per_core": project}


@partial(jax.jit, static_argnames="product")
def chain(x: jax.Array, kernels: list[tuple[jax.Array, jax.Array]], product: Product) -> jax.Array:
    for up, down in kernels:
        x = x + product(jax.nn.relu(product(x, up)), down)
    return x


def run(x: jax.Array, kernels: list[tuple[jax.Array, jax.Array]], product: Product) -> None:
    chain(x, kernels, product).block_until_ready()


def random_kernels(layout: str) -> list[tuple[jax.Array, jax.Array]]:
    keys = jax.random.split(jax.random.key(0), 2 * LAYERS)
    shapes = [(INNER, HIDDEN), (HIDDEN, INNER)] * LAYERS
    kernels = [0.02 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    if layout == "in_out":
        kernels = [jnp.array(kernel.T) for kernel in kernels]
    return list(zip(kernels[::2], kernels[1::2], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, nothing written")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 15
    kernels = {"in_out": random_kernels("in_out"), "out_in": random_kernels("out_in")}
    bytes_read = sum(kernel.nbytes for pair in kernels["in_out"] for kernel in pair)
    results: list[dict[str, Any]] = []
    print("| rows | " + " | ".join(f"{name}, GB/s" for name in PRODUCTS) + " |\n|" + "---|" * (len(PRODUCTS) + 1))
    for rows in ROWS:
        x = jax.random.normal(jax.random.key(1), (rows, HIDDEN))
        candidates = {
            name: partial(run, x, kernels["in_out" if name == "in_out" else "out_in"], product)
            for name, product in PRODUCTS.items()
        }
        seconds = interleaved(candidates, rounds)
        gb_s = {name: bytes_read / statistics.median(values) / 1e9 for name, values in seconds.items()}
        results.append({"rows": rows, "gb_s": gb_s})
        print(f"| {rows} | " + " | ".join(f"{gb_s[name]:.1f}" for name in PRODUCTS) + " |", flush=True)
    if not arguments.quick:
        settings = {"hidden": HIDDEN, "inner": INNER, "layers": LAYERS, "dtype": "float32", "rounds": rounds}
        print(write_result("kernel_layout", {"settings": settings, "rows": results}))


if __name__ == "__main__":
    main()
