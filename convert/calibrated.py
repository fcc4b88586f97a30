"""Quantization that looks at text: block by block, each fitted on what the blocks before it let through.

A killed run loses one block: finished ones lie beside the target until it is there, and the next call with the same
source, text and options takes them from there.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from convert.parts import Parts
from convert.quantize import Arrays, QuantizeOptions, Quantizer
from qs_jax.config import ModelConfig
from qs_jax.errors import ConfigError
from qs_jax.fitting.activations import with_kernels
from qs_jax.fitting.fit import Fit, Fitted, Streams, fit_block
from qs_jax.fitting.grid import CODEBOOKS
from qs_jax.matryoshka.kernel import SCALE_DTYPE, abstract_kernel
from qs_jax.matryoshka.stored import LEAVES, StoredKernel, kernel_arrays
from qs_jax.models import abstract_network
from qs_jax.tokenizer import Tokenizer

WINDOW = 128
"""Tokens of a calibration window: few enough that short texts fill one."""

_HELD_OUT = "perplexity on this text is not held out"


@dataclass(frozen=True)
class Calibration:
    """Text as tokens, and what the manifest says of it."""

    tokens: Int[np.ndarray, "windows window"]
    name: str
    digest: str

    @classmethod
    def of(
        cls, documents: Sequence[str], tokenizer: Tokenizer, config: ModelConfig, *, name: str, tokens: int
    ) -> "Calibration":
        """Windows of the documents' tokens, `tokens` in all: every document's first window, then every second one.

        So each window starts where a text does, as far as they last; models trained on whole texts behave otherwise
        in the middle of one.

        Raises:
            ConfigError: fewer tokens than one window.
        """
        window = min(WINDOW, config.max_position_embeddings)
        digest, wanted = hashlib.sha256(), max(1, tokens // window)
        starts = [token for token in (config.bos_token_id, *config.eos_token_ids) if token is not None][:1]
        turns: list[list[list[int]]] = []
        for document in documents:
            digest.update(document.encode())
            ids = tokenizer.encode(document)
            ids = ids if ids[:1] == starts else starts + ids
            for turn in range(len(ids) // window):
                if turn == len(turns):
                    turns.append([])
                turns[turn].append(ids[turn * window : (turn + 1) * window])
            if turns and len(turns[0]) >= wanted:
                break
        windows = [found for turn in turns for found in turn][:wanted]
        if not windows:
            raise ConfigError(f"{name}: no document has {window} tokens, which calibration needs; give other text")
        return cls(np.asarray(windows, np.int32), name, digest.hexdigest())

    def to_manifest(self) -> dict[str, Any]:
        return {"text": self.name, "sha256": self.digest, "tokens": self.tokens.size, "note": _HELD_OUT}


class CalibratedQuantizer(Quantizer):
    """A `Quantizer` whose blocks are fitted on text. Parts must come in the order in which the model runs.

    One dense block and its Hessians are in memory at a time, beside the hidden states of all calibration tokens in
    the dense model and at each precision.
    """

    def __init__(
        self, options: QuantizeOptions, config: ModelConfig, calibration: Calibration, unfinished: "Unfinished"
    ):
        super().__init__(options)
        self._network = abstract_network(config)
        self._calibration = calibration
        self._unfinished = unfinished
        self._embeddings: Arrays = {}
        self._streams: Streams | None = None

    def __call__(self, part: str, arrays: Arrays) -> tuple[Set[str], Arrays]:
        kind, _, number = part.partition(".")
        if kind == "blocks":
            return self._block(part, int(number), arrays)
        if self._streams is None:
            self._embeddings |= arrays
        return super().__call__(part, arrays)

    def manifest(self, dtype: str) -> dict[str, Any]:
        return {**super().manifest(dtype), "calibration": self._calibration.to_manifest()}

    def done(self) -> None:
        self._unfinished.remove()

    def _block(self, part: str, number: int, arrays: Arrays) -> tuple[Set[str], Arrays]:
        chosen = [path for path, array in arrays.items() if self.options.selects(path, array)]
        prefix, suffix = f"{part}.", ".kernel"
        local = {path.removeprefix(prefix): array for path, array in arrays.items()}
        block = _filled(with_kernels(self._network.blocks[number], {}), local)
        names = {path.removeprefix(prefix).removesuffix(suffix): path for path in chosen}
        streams = self._streams or self._first_streams()
        fitted = self._unfinished.load(part, names.keys()) or self._fit(part, block, streams, names)
        stored: Arrays = {}
        for name, path in names.items():
            kernel = replace(fitted[name].kernel, least=self.options.least(path))
            errors = self.errors(jnp.asarray(local[name + suffix], jnp.float32), kernel)
            self.kernels[path] = StoredKernel.of(kernel, {**errors, "output": fitted[name].output_errors})
            stored |= kernel_arrays(path, kernel)
            fitted[name] = fitted[name]._replace(kernel=kernel)
        self._streams = streams.after(block, {name: found.kernel for name, found in fitted.items()})
        return arrays.keys() - set(chosen), stored

    def _fit(self, part: str, block: Any, streams: Streams, names: dict[str, str]) -> dict[str, Fitted]:
        fit = Fit(self.options.method, self.options.group_size, bend=CODEBOOKS[self.options.codebook])
        fitted = fit_block(block, streams, fit, frozenset(names))
        self._unfinished.save(part, fitted)
        return fitted

    def _first_streams(self) -> Streams:
        network = _filled(self._network, self._embeddings)
        tokens = jnp.asarray(self._calibration.tokens)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        self._embeddings = {}
        return Streams.start(network.embed(tokens, positions))


def calibrated_quantizer(
    options: QuantizeOptions, parts: Parts, target: Path, documents: Sequence[str], *, name: str, tokens: int
) -> CalibratedQuantizer:
    """What quantises a source on the first `tokens` tokens of documents; `name` says where they are from.

    Raises:
        ConfigError: too little text.
        TokenizerError: the source has no tokenizer.
    """
    tokenizer = Tokenizer.load(parts.source.files)
    calibration = Calibration.of(documents, tokenizer, parts.config, name=name, tokens=tokens)
    unfinished = Unfinished(target, parts.source.paths, options, calibration)
    return CalibratedQuantizer(options, parts.config, calibration, unfinished)


class Unfinished:
    """Fitted blocks of a conversion that is not done, in a folder beside its target."""

    def __init__(self, target: Path, source: Sequence[Path], options: QuantizeOptions, calibration: Calibration):
        key = hashlib.sha256()
        for file in source:
            key.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
        key.update(f"{options} {calibration.digest} {calibration.tokens.shape}".encode())
        self.folder = target.parent / f".{target.name}.fit-{key.hexdigest()[:16]}"

    def save(self, part: str, fitted: dict[str, Fitted]) -> None:
        """Keep a block; the file appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for name, (kernel, errors) in fitted.items():
            arrays |= {f"{name}.{leaf}": np.asarray(getattr(kernel, leaf)) for leaf in LEAVES}
            arrays[f"{name}.scales"] = arrays[f"{name}.scales"].view(np.uint16)
            about = {"shape": kernel.shape, "group_size": kernel.group_size, "bend": kernel.bend, "errors": errors}
            arrays[f"{name}.about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        partial = self.folder / f".{part}.npz"
        np.savez(partial, **arrays)
        partial.replace(self._file(part))

    def load(self, part: str, names: Set[str]) -> dict[str, Fitted]:
        """The block if it was kept, nothing otherwise."""
        if not self._file(part).is_file():
            return {}
        fitted = {}
        with np.load(self._file(part)) as arrays:
            for name in names:
                about = json.loads(arrays[f"{name}.about"].tobytes())
                leaves = {leaf: arrays[f"{name}.{leaf}"] for leaf in LEAVES}
                leaves["scales"] = leaves["scales"].view(SCALE_DTYPE)
                kernel = abstract_kernel(tuple(about["shape"]), about["group_size"])
                leaves = {leaf: jnp.asarray(array) for leaf, array in leaves.items()}
                fitted[name] = Fitted(replace(kernel, bend=tuple(about["bend"]), **leaves), about["errors"])
        return fitted

    def remove(self) -> None:
        """Once the target is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.npz"


def _filled(module: Any, arrays: Arrays) -> Any:
    """The module, in place, with the arrays whose paths it has, as float32."""
    state = nnx.state(module, nnx.Param)
    for path, param in nnx.to_flat_state(state):
        if (found := arrays.get(".".join(map(str, path)))) is not None:
            param.set_value(jnp.asarray(found, jnp.float32))
    nnx.update(module, state)
    return module
