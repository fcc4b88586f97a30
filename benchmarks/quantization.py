"""What do 8, 4 and 2 bits cost in perplexity, by which method, and what does it cost that all three are one code?

    python -m benchmarks.quantization smollm2    # the real model, see benchmarks/conversions.py
    python -m benchmarks.quantization requests   # what requests to it need, into the same result
    python -m benchmarks.quantization stories3M babyllama105 gpt2 llama      # small ones, quick checks
    python -m benchmarks.quantization kernels    # SQNR of the real GPT-2 124M attention kernels, no perplexity
    python -m benchmarks.quantization --report   # docs/quantization.md and .png from the results there are
    python -m benchmarks.quantization stories3M --methods rtn gptq         # only these rows, the others stay

Each writes benchmarks/results/quantization_NAME.json.

Fitted on training text, judged on other text (the documents of benchmarks/quality.py), every document from its start.
All kernels of all blocks are quantised, group 64; embedding and head stay dense. `independent` fits one model for each
precision, all else equal: what nesting costs is the difference to the same method.

Prediction, before the rows with a companded codebook, from single fits of stories3M: 4 bits a percent better, 2 bits a
tenth. Before turns of codes and grid followed GPTQ: that its three copies of the weights drift apart is most of what
nesting costs at 2 bits. Outcome: docs/quantization.md.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file

from benchmarks import conversions, real_model
from benchmarks.harness import environment, read_result, write_result
from benchmarks.judged_text import perplexity, scored_text, scored_tokens
from benchmarks.quality import documents_of, studies
from benchmarks.quantization_report import write_report
from convert.calibrated import Calibration
from qs_jax.choices import BITS
from qs_jax.console import reporting_errors
from qs_jax.fitting.fit import Fit, Streams, fit_block
from qs_jax.fitting.grid import COMPANDED, EVEN, Bend, Grid, between_extremes, refit
from qs_jax.fitting.rounding import grouped, nearest_codes
from qs_jax.fitting.tune import Coded
from qs_jax.kernels import at_bits, has_planes, is_nested
from qs_jax.loading import load
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.model import Model
from qs_jax.models import CausalLM, arrays_by_path, network_from_arrays
from reference_models.data import text_folder

GROUP = 64
CALIBRATION_TOKENS = 8192
SHIFT, MATQUANT = "plain shift", "MatQuant rounding"
FITS: dict[str, Fit] = {
    "rtn": Fit("rtn", GROUP),
    "refit": Fit("refit", GROUP),
    "refit+tune": Fit("refit+tune", GROUP),
    "gptq, one pass": Fit("gptq", GROUP, rounds=0),
    "gptq": Fit("gptq", GROUP),
    "gptq+tune": Fit("gptq+tune", GROUP),
    "gptq, one pass, companded": Fit("gptq", GROUP, rounds=0, bend=COMPANDED),
    "gptq, companded": Fit("gptq", GROUP, bend=COMPANDED),
    "gptq+tune, companded": Fit("gptq+tune", GROUP, bend=COMPANDED),
    "gptq+tune, companded, 4 bits first": Fit("gptq+tune", GROUP, (64.0, 4.0, 1.0), bend=COMPANDED),
    "gptq+tune, companded, 2 bits first": Fit("gptq+tune", GROUP, (16.0, 1.0, 1.0), bend=COMPANDED),
}
"""Rows by name. What comes first is a matter of what the squared error counts at each precision."""
INDEPENDENT = {
    f"independent {name}": FITS[name] for name in ("gptq, one pass", "gptq", "gptq+tune", "gptq+tune, companded")
}
ROTATED = {f"{name}, rotated": FITS[name] for name in ("rtn", "gptq, companded", "gptq+tune, companded")}
"""Fits of the model with its heads turned: see `rotated`."""
ROWS = (SHIFT, MATQUANT, *FITS, *INDEPENDENT, *ROTATED)
_REQUESTS = "requests"

Weights = Float[Array, "outputs inputs"]
Networks = dict[int, CausalLM]


def shifted(weights: Weights, bits: int, *, rounds: bool) -> Weights:
    """The top bits of the 8-bit code, followed by zeros: cut off (the paper), or rounded and clamped (MatQuant)."""
    values = grouped(weights, GROUP)
    grid = between_extremes(values)
    unit = 2 ** (8 - bits)
    codes = nearest_codes(values, grid).astype(jnp.float32) / unit
    top = jnp.clip(jnp.round(codes), 0, 2**bits - 1) if rounds else jnp.floor(codes)
    plain = grid.scales[0][:, None] * (top * unit - 127.5 + grid.offsets[0][:, None])
    return plain.reshape(-1, weights.shape[0]).T[:, : weights.shape[1]]


_shifted = jax.jit(shifted, static_argnames=("bits", "rounds"))


def by_rounding(model: Model, rounds: bool) -> tuple[Networks, float]:
    """The network at every precision, its kernels as `shifted` leaves them."""
    started, networks = time.perf_counter(), {}
    for bits in BITS:
        arrays = arrays_by_path(model.network)
        chosen = [path for path in arrays if path.startswith("blocks.") and path.endswith(".kernel")]
        arrays |= {path: _shifted(arrays[path], bits=bits, rounds=rounds) for path in chosen}
        networks[bits] = network_from_arrays(model.config, arrays, dtype=model.dtype)
    return networks, time.perf_counter() - started


def by_fit(model: Model, tokens: Int[np.ndarray, "windows window"], fit: Fit) -> tuple[Networks, float]:
    """The network fitted once, read at every precision."""
    started = time.perf_counter()
    network = fitted_network(model, tokens, fit)
    return {bits: at_bits(network, bits) for bits in BITS}, time.perf_counter() - started


def by_rotated_fit(model: Model, tokens: Int[np.ndarray, "windows window"], fit: Fit) -> tuple[Networks, float]:
    """The same of the model with its heads turned."""
    return by_fit(rotated(model), tokens, fit)


def by_independent_fits(model: Model, tokens: Int[np.ndarray, "windows window"], fit: Fit) -> tuple[Networks, float]:
    """One network for each precision, each fitted for it alone."""
    started, networks = time.perf_counter(), {}
    for slice_, bits in enumerate(BITS):
        alone = tuple(1.0 if other == slice_ else 0.0 for other in range(len(BITS)))
        only = replace(fit, weights=(alone[0], alone[1], alone[2]))
        networks[bits] = at_bits(fitted_network(model, tokens, only), bits)
    return networks, time.perf_counter() - started


def fitted_network(model: Model, tokens: Int[np.ndarray, "windows window"], fit: Fit) -> CausalLM:
    """All blocks, one after the other, as a conversion fits them."""
    arrays, ids = arrays_by_path(model.network), jnp.asarray(tokens)
    streams = Streams.start(model.network.embed(ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)))
    for number, block in enumerate(model.network.blocks):
        fitted = fit_block(block, streams, fit)
        streams = streams.after(block, {name: found.kernel for name, found in fitted.items()})
        arrays |= {f"blocks.{number}.{name}.kernel": found.kernel for name, found in fitted.items()}
    return network_from_arrays(model.config, arrays, dtype=model.dtype)


def rotated(model: Model) -> Model:
    """The same model in exact arithmetic, the values of every head turned by one random rotation.

    Nothing stands between values and the output projection, so the one absorbs it and the other takes it back.
    """
    config, arrays = model.config, arrays_by_path(model.network)
    size = config.head_dim
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0], jnp.float32)
    for layer in range(config.num_hidden_layers):
        for part in ("kernel", "bias"):
            values = arrays.get(path := f"blocks.{layer}.v.{part}")
            if values is not None:
                heads = values.reshape(config.num_key_value_heads, size, -1)
                arrays[path] = jnp.einsum("de,kei->kdi", turn, heads).reshape(values.shape)
        output = arrays[path := f"blocks.{layer}.o.kernel"]
        heads = output.reshape(output.shape[0], -1, size)
        arrays[path] = jnp.einsum("ohd,ed->ohe", heads, turn).reshape(output.shape)
    return replace(model, network=network_from_arrays(config, arrays, dtype=model.dtype))


def study(name: str, rows: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Perplexity of a model at every precision, beside the dense model's; once more after every row."""
    chosen = studies()[name]
    model = load(real_model.place(chosen.model), dtype="float32")
    documents = [documents_of(parts) for parts in (chosen.calibration, chosen.texts[:1])]
    assert model.tokenizer is not None
    calibration = Calibration.of(
        documents[0], model.tokenizer, model.config, name=chosen.calibration[0][0], tokens=CALIBRATION_TOKENS
    )
    text = scored_text(model, documents[1])
    makers: dict[str, Callable[[], tuple[Networks, float]]] = {
        SHIFT: partial(by_rounding, model, rounds=False),
        MATQUANT: partial(by_rounding, model, rounds=True),
        **{row: partial(by_fit, model, calibration.tokens, fit) for row, fit in FITS.items()},
        **{row: partial(by_rotated_fit, model, calibration.tokens, fit) for row, fit in ROTATED.items()},
        **{row: partial(by_independent_fits, model, calibration.tokens, fit) for row, fit in INDEPENDENT.items()},
    }
    result: dict[str, Any] = {
        "model": name,
        "tokens_scored": scored_tokens(text),
        "calibration_tokens": calibration.tokens.size,
        "dense": perplexity(model.network, text),
        "rows": {},
    }
    for row in rows:
        networks, seconds = makers[row]()
        result["rows"][row] = {
            "perplexity": {str(bits): perplexity(network, text) for bits, network in networks.items()},
            "encode_s": seconds,
            "date": environment()["date"],
        }
        if has_planes(networks[8]):
            result["bytes_fraction"] = stored_fraction(networks[8])
        print(name, row, result["dense"], result["rows"][row], flush=True)
        yield result


def stored_fraction(network: CausalLM) -> float:
    """Bytes of the quantised kernels, planes, scales and offsets, over those of the same kernels in float32."""
    kernels = [leaf for leaf in jax.tree.leaves(network, is_leaf=is_nested) if isinstance(leaf, NestedKernel)]
    return sum(leaf.nbytes for kernel in kernels for leaf in jax.tree.leaves(kernel)) / sum(4 * k.size for k in kernels)


def kernel_study() -> dict[str, Any]:
    """Signal to noise, dB, of real GPT-2 124M attention kernels: power of the weights over that of their error."""
    kernels = load_file(text_folder().parent / "models" / "gpt2-124m-attention-kernels.safetensors")
    ways: dict[str, Callable[[Weights, int], Weights]] = {
        SHIFT: lambda w, bits: _shifted(w, bits=bits, rounds=False),
        MATQUANT: lambda w, bits: _shifted(w, bits=bits, rounds=True),
        "rtn": lambda w, bits: _read_at(w, _rounded(w), bits),
        "refit": lambda w, bits: _read_at(w, _refitted(w, jnp.asarray(Fit().weights)), bits),
        "refit, companded": lambda w, bits: _read_at(w, _refitted(w, jnp.asarray(Fit().weights), COMPANDED), bits),
        "independent refit": lambda w, bits: _read_at(w, _refitted(w, jnp.eye(3)[BITS.index(bits)]), bits),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, way in ways.items():
        power, noise = 0.0, dict.fromkeys(BITS, 0.0)
        for kernel in kernels.values():
            weights = jnp.asarray(np.asarray(kernel, np.float32).T)
            power += float(jnp.square(weights).sum())
            for bits in BITS:
                noise[bits] += float(jnp.square(way(weights, bits) - weights).sum())
        rows[name] = {str(bits): 10 * math.log10(power / noise[bits]) for bits in BITS}
    return {"kernels": len(kernels), "sqnr_db": rows}


@jax.jit
def _rounded(weights: Weights) -> tuple[Array, Grid]:
    values = grouped(weights, GROUP)
    grid = between_extremes(values)
    return nearest_codes(values, grid), grid


@partial(jax.jit, static_argnames="bend")
def _refitted(weights: Weights, importance: Float[Array, " slices"], bend: Bend = EVEN) -> tuple[Array, Grid]:
    values = grouped(weights, GROUP)
    return refit(values, jnp.ones(values.shape[:2]), importance, bend)


def _read_at(weights: Weights, coded: tuple[Array, Grid], bits: int) -> Weights:
    codes, grid = coded
    return Coded((weights.shape[0], weights.shape[1]), codes, grid).weights(BITS.index(bits))


def merged(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result with what an earlier call found and this one did not run; no rows where the model itself differs."""
    before = read_result(f"quantization_{name}")
    if "rows" not in result:
        return {**before, **result}
    same = math.isclose(before.get("dense", 0.0), result["dense"], rel_tol=1e-6)
    rows = {**(before["rows"] if same else {}), **result["rows"]}
    order = conversions.ROWS if name == conversions.NAME else ROWS
    return {**before, **result, "rows": {row: rows[row] for row in order if row in rows}}


def found(name: str, methods: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """What is found about a model, once more after every row."""
    if name == _REQUESTS:
        return conversions.requests(real_model.folder())
    if name == conversions.NAME:
        return conversions.study(real_model.folder(), methods or list(conversions.ROWS))
    return study(name, methods or ROWS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = sorted(name for name, chosen in studies().items() if not chosen.planes and name != conversions.NAME)
    parser.add_argument("models", nargs="*", choices=[conversions.NAME, _REQUESTS, *models, "kernels", []])
    parser.add_argument("--methods", nargs="+", choices=sorted({*ROWS, *conversions.ROWS}), help="only these rows")
    parser.add_argument("--report", action="store_true", help="write docs/quantization.md and .png, after what is run")
    arguments = parser.parse_args(argv)
    with reporting_errors(debug=True):
        for name in arguments.models:
            if name == "kernels":
                print(write_result("quantization_kernels", kernel_study()))
            else:
                model = conversions.NAME if name == _REQUESTS else name
                for result in found(name, arguments.methods):
                    whole = merged(model, result)
                    write_result(f"quantization_{model}", {k: v for k, v in whole.items() if k != "environment"})
        if arguments.report:
            write_report()


if __name__ == "__main__":
    main()
