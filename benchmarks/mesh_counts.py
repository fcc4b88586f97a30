"""What a decode step is on a mesh too large to have: bytes a device holds, and collectives, of the compiled program.

    python -m benchmarks.mesh_counts            # Llama-3-70B's shape on 4 x 8 devices; results/mesh_counts.json
    python -m benchmarks.mesh_counts --quick    # two layers, nothing written

Weights, caches and state are shapes without memory; XLA's CPU backend compiles the program for as many simulated
devices as the mesh has, and what its partitioner placed is counted in the text of the compiled program. Nothing is run,
and no time is measured: what the counts would take on links of accelerators is arithmetic on published figures
(docs/scaling.md). Other backends may combine collectives or send narrower numbers; the partitioner that places them is
the same.
"""

import argparse
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

if __name__ == "__main__":  # read when jax first makes its devices
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=32"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.harness import write_result
from qs_jax.adaptive.binding import dense
from qs_jax.cache import allocate
from qs_jax.config import ModelConfig
from qs_jax.engine.decode import Controls, DecodeState, decode_chunk
from qs_jax.engine.sampling import Sampling
from qs_jax.models import abstract_arrays, network_from_arrays, parse_config
from qs_jax.sharding import Layout, make_mesh, state_sharding
from qs_jax.token_set import token_set

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
"""Llama 3 70B (arXiv 2407.21783)."""

MESH, ROWS, CAPACITY, DTYPE = "data=4,model=8", 32, 4096, "bfloat16"
STEPS = 4
DEPTHS = (1, 2, 4)
"""Compiled as well: what a layer adds."""

LINKS = {
    "TPU v5e": {"sends": 100e9, "memory": 819e9, "memory_bytes": 16e9},
    "H100 SXM": {"sends": 450e9, "memory": 3.35e12, "memory_bytes": 80e9},
}
"""Bytes per second that a device of a ring sends, and reads of its memory, and how much it has of that. Cloud TPU says
of v5e: 400 GB/s both ways over four links, of which a ring along one axis of the torus takes two, and half is sending.
NVIDIA says of the H100 SXM: NVLink 900 GB/s both ways."""

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One of a compiled program: numbers and bytes of its result on a device, how many devices take part, and whether
    it is within the loop over steps."""

    kind: str
    elements: int
    bytes: int
    group: int
    in_step: bool


def abstract_step(config: ModelConfig, mesh: Mesh, *, rows: int, capacity: int) -> tuple[Any, ...]:
    """The arguments of `decode_chunk` as shapes, each with where it lies."""
    dtype, layout = jnp.dtype(DTYPE), Layout(mesh, config)
    shapes = abstract_arrays(config, dtype=dtype)
    places = layout.weights(shapes)
    weights = {path: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=places[path]) for path, one in shapes.items()}
    network = network_from_arrays(config, weights, dtype=dtype)

    def state() -> DecodeState:
        none, cache = jnp.zeros(rows, jnp.int32), allocate(config, rows, capacity, dtype)
        noise = jax.random.split(jax.random.key(0), rows)
        seen, entropy = jnp.zeros((rows, 0), bool), jnp.zeros(rows)
        return DecodeState(none, none, (cache,) * config.num_hidden_layers, none > 0, none, noise, seen, entropy)

    held = jax.tree_util.tree_map_with_path(
        lambda path, one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=state_sharding(path, one.shape, mesh)),
        jax.eval_shape(state),
    )
    controls = Controls(Sampling.of(), token_set(config.eos_token_ids), dense(config))
    return network, held, np.full((STEPS, rows), -1, np.int32), controls


def compiled_step(config: ModelConfig, mesh: Mesh, *, rows: int, capacity: int) -> jax.stages.Compiled:
    """The program of a chunk of dense decode steps."""
    return decode_chunk.lower(*abstract_step(config, mesh, rows=rows, capacity=capacity)).compile()


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """Every collective of a program."""
    text = program.as_text()
    assert text is not None
    return list(collectives_of(text))


def collectives_of(text: str) -> Iterator[Collective]:
    """The same, of a compiled program's text."""
    kinds = "|".join(KINDS)
    for line in text.splitlines():
        matched = re.search(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", line)
        if matched is None:
            continue
        arrays = re.findall(r"([a-z]+)(\d*)\[([\d,]*)\]", matched[1])
        counts = [math.prod(map(int, filter(None, dims.split(",")))) for _, _, dims in arrays]
        # a boolean has no number of bits in its name
        sizes = [count * max(1, int(bits or 8) // 8) for count, (_, bits, _) in zip(counts, arrays, strict=True)]
        yield Collective(matched[2], sum(counts), sum(sizes), _group(line), "/while/body" in line)


def _group(line: str) -> int:
    """Devices that take part, from any of the ways in which XLA writes groups; pairs of a permutation are two."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return listed[1].count(",") + 1 if listed else 2


def held_bytes(arguments: Sequence[Any]) -> dict[str, int]:
    """What a device holds of the weights and of the caches."""

    def held(tree: Any) -> int:
        arrays = [one for one in jax.tree.leaves(tree) if one.sharding is not None]
        return sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in arrays)

    network, state, *_ = arguments
    return {"weights": held(network), "caches": held(state.cache)}


def tallied(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Alike ones together."""
    return [{**asdict(one), "times": times} for one, times in Counter(found).items()]


def measure(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """One depth."""
    started = time.perf_counter()
    program = compiled_step(config, mesh, rows=ROWS, capacity=CAPACITY)
    found = collectives(program)
    in_step = [one for one in found if one.in_step]
    memory: Any = program.memory_analysis()
    return {
        "layers": config.num_hidden_layers,
        "held_bytes": held_bytes(abstract_step(config, mesh, rows=ROWS, capacity=CAPACITY)),
        "compiler_argument_bytes": memory.argument_size_in_bytes,
        "collectives_in_step": dict(Counter(one.kind for one in in_step)),
        "bytes_in_step": sum(one.bytes for one in in_step),
        "outside_steps": dict(Counter(one.kind for one in found if not one.in_step)),
        "tally": tallied(in_step),
        "compile_s": round(time.perf_counter() - started, 1),
    }


def on_paper(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a step would take by the published figures, were nothing lost: its collectives in rings (of an all-reduce
    2 (n - 1) / n of the bytes are sent in 2 (n - 1) hops, of an all-gather (n - 1) / n of the result in n - 1), and the
    reading of weights and caches. What a hop takes before it sends is not published; the hops are counted."""
    sent, hops = 0.0, 0
    for one in measured["tally"]:
        own = (one["group"] - 1) * (2 if one["kind"] == "all-reduce" else 1)
        sent += one["times"] * one["bytes"] * own / one["group"]
        hops += one["times"] * own
    read = sum(measured["held_bytes"].values())
    found = {
        name: {"sending_ms": 1e3 * sent / link["sends"], "reading_ms": 1e3 * read / link["memory"]}
        | {"fits": read < link["memory_bytes"]}
        for name, link in LINKS.items()
    }
    return {"sent_bytes": round(sent), "hops": hops, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, nothing written")
    quick = parser.parse_args().quick
    mesh, whole = make_mesh(MESH), parse_config(SHAPE, "Llama 3 70B")
    assert mesh is not None
    depths = (2,) if quick else (*DEPTHS, whole.num_hidden_layers)
    rows = []
    for layers in depths:
        rows.append(measure(replace(whole, num_hidden_layers=layers), mesh))
        print(rows[-1])
    if not quick:
        asked = {"shape": SHAPE, "mesh": MESH, "rows": ROWS, "capacity": CAPACITY, "dtype": DTYPE}
        found = {"depths": rows, "on_paper": on_paper(rows[-1])}
        write_result("mesh_counts", {**asked, "notes": Layout(mesh, whole).notes, **found})


if __name__ == "__main__":
    main()
