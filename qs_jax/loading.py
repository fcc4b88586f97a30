"""`qs_jax.load`: a converted folder, a Hugging Face folder or a hub id becomes a model on the device."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from convert.parts import Parts, hf_config, stored_as
from convert.source import Source, locate
from qs_jax.checkpoint import is_converted, part_of, read_manifest, read_part
from qs_jax.choices import DTYPES
from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError, ConfigError, TokenizerError
from qs_jax.generation_defaults import read_generation_defaults
from qs_jax.lens import LENS_FILE, Lens, with_lens
from qs_jax.matryoshka.stored import collect, expand, from_manifest
from qs_jax.models import abstract_arrays, network_from_arrays
from qs_jax.models.base import CausalLM
from qs_jax.tokenizer import Tokenizer

_CACHE_SWITCH = "QS_JAX_COMPILATION_CACHE"


@dataclass(frozen=True)
class Model:
    """A model ready to generate.

    `name` is what the user asked for; `tokenizer` is None where the folder has none or none that can be read, and
    `no_tokenizer` says why. `defaults` are the settings of `generation_config.json`, for what a call leaves out.
    `notes` says, one line each, what was supplied, chosen among contradictions or passed over in the folder's files.
    """

    config: ModelConfig
    network: CausalLM
    tokenizer: Tokenizer | None
    dtype: jnp.dtype
    name: str
    no_tokenizer: str = "no tokenizer; copy tokenizer.json beside the weights or give token ids"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def special_ids(self) -> list[int]:
        """Tokens that are no text: the tokenizer's, and those that start, end and pad."""
        config, ids = self.config, self.tokenizer.special_ids if self.tokenizer else []
        own = (*config.eos_token_ids, config.bos_token_id, config.pad_token_id)
        return sorted({*ids, *(token for token in own if token is not None)})


def load(
    path_or_id: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    verify: bool = True,
    compilation_cache: bool = True,
) -> Model:
    """Load a model part by part, straight onto the default device.

    Args:
        path_or_id: a folder made by `qs-convert`, a Hugging Face folder with safetensors, or a hub id.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on CPU and bfloat16 elsewhere.
        revision: branch, tag or commit of a hub id.
        verify: compare a converted folder with its checksums first.
        compilation_cache: keep compiled programs in the user's cache folder, unless JAX is already told where.
            The environment variable QS_JAX_COMPILATION_CACHE may name another folder, or be `off`.

    Raises:
        CheckpointError: the folder or a file in it (its lens, too) is missing, damaged, or does not fit its
            configuration.
        ConfigError: the architecture or an option is not supported, or the dtype unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    chosen = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    folder = locate(str(path_or_id), revision)
    if compilation_cache:
        _use_compilation_cache()
    notes: list[str] = []
    read = partial(_read_converted, verify=verify) if is_converted(folder) else _read_source
    config, arrays = read(folder, chosen, notes)
    network = network_from_arrays(config, arrays, dtype=chosen)
    if (folder / LENS_FILE).is_file():
        network = with_lens(network, Lens.load(folder / LENS_FILE, config))
    defaults = read_generation_defaults(folder, config.vocab_size, notes)
    tokenizer, problem = _tokenizer(folder, notes)
    _note_other_end(folder, tokenizer, config, defaults, notes)
    return Model(config, network, tokenizer, chosen, str(path_or_id), problem, defaults, tuple(dict.fromkeys(notes)))


def _read_converted(
    folder: Path, dtype: jnp.dtype, notes: list[str], *, verify: bool
) -> tuple[ModelConfig, dict[str, Any]]:
    kernels = from_manifest(read_manifest(folder, verify=verify).get("quantization"), str(folder))
    config = hf_config(folder, notes)
    shapes = expand(abstract_arrays(config, dtype=dtype), kernels, str(folder))
    arrays: dict[str, Any] = {}
    for part in sorted({part_of(path) for path in shapes}):
        arrays |= read_part(folder, part, {path: s for path, s in shapes.items() if part_of(path) == part})
    return config, collect(arrays, kernels, dtype)


def _read_source(folder: Path, dtype: jnp.dtype, notes: list[str]) -> tuple[ModelConfig, dict[str, Any]]:
    parts = Parts(Source(folder))
    notes += parts.notes
    arrays: dict[str, Any] = {}
    for _, part in parts:
        arrays |= {path: jnp.asarray(stored_as(array, dtype, path)) for path, array in part.items()}
    return parts.config, arrays


def _tokenizer(folder: Path, notes: list[str]) -> tuple[Tokenizer | None, str]:
    """The folder's tokenizer, or why there is none: a folder without one still generates from token ids."""
    try:
        return Tokenizer.load(folder, notes), ""
    except (TokenizerError, CheckpointError) as error:
        return None, str(error)


def _note_other_end(
    folder: Path,
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    defaults: Mapping[str, Any],
    notes: list[str],
) -> None:
    """Say so where the tokenizer's end of text ends no row: chat models often end with a token of their own."""
    end = tokenizer.eos_id if tokenizer else None
    ends = defaults.get("eos_token_id") or config.eos_token_ids
    if end is not None and end not in (ends if isinstance(ends, list | tuple) else (ends,)):
        notes.append(
            f"{folder / 'tokenizer_config.json'}: eos_token is {end}, but generation ends at {ends} as config.json and "
            "generation_config.json say, as in transformers; eos_token_id and stop_strings change that"
        )


def _use_compilation_cache() -> None:
    wanted = os.environ.get(_CACHE_SWITCH, "")
    if wanted.lower() == "off" or getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", wanted or str(home / "qs_jax" / "xla"))
