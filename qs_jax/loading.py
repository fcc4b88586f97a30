"""`qs_jax.load`: a converted folder, a Hugging Face folder, a GGUF file or a hub id becomes a model on the device."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from convert.reading import read_network
from convert.source import locate
from qs_jax.choices import DTYPES, not_among
from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError, ConfigError, TokenizerError
from qs_jax.files import ModelFiles, cache_folder
from qs_jax.generation_defaults import read_generation_defaults
from qs_jax.model import Model
from qs_jax.sharding import make_mesh
from qs_jax.tokenizer import Tokenizer

_CACHE_SWITCH = "QS_JAX_COMPILATION_CACHE"


def load(
    path_or_id: str | Path,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    verify: bool = True,
    compilation_cache: bool = True,
    mesh: str | Mesh | None = None,
) -> Model:
    """Load a model part by part, straight onto the default device, or onto the devices of a mesh.

    Args:
        path_or_id: a folder made by `qs-convert`, a Hugging Face folder with safetensors, a .gguf file,
            or a hub id.
        dtype: "float32", "bfloat16" or "float16"; by default float32 on CPU and bfloat16 elsewhere.
        revision: branch, tag or commit of a hub id.
        verify: compare a converted folder with its checksums first.
        compilation_cache: keep compiled programs in the user's cache folder, unless JAX is already told where.
            The environment variable QS_JAX_COMPILATION_CACHE may name another folder, or be `off`.
        mesh: several devices, such as "data=2,model=4": rows of a batch are divided over `data`; heads, feed-forward
            channels and the vocabulary over `model`. Each device gets its part straight from the file; what does not
            divide lies whole on each, and `Model.notes` says so. Of one device: as without.

    Raises:
        CheckpointError: the folder or a file in it (its lens, too) is missing, damaged, or does not fit its
            configuration.
        ConfigError: the architecture or an option is not supported, the dtype unknown, or there are no devices for the
            mesh.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(not_among("dtype", dtype, DTYPES))
    started = time.perf_counter()
    chosen = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    devices = make_mesh(mesh)
    files = locate(str(path_or_id), revision)
    if compilation_cache:
        _use_compilation_cache()
    notes: list[str] = []
    network = read_network(files, chosen, notes, checksums=verify, mesh=devices)
    config = network.config
    defaults = read_generation_defaults(files, config.vocab_size, notes)
    tokenizer, problem = _tokenizer(files, notes)
    _note_other_end(files, tokenizer, config, defaults, notes)
    return Model(
        *(config, network, tokenizer, chosen, str(path_or_id), problem, defaults, tuple(dict.fromkeys(notes))),
        load_seconds=time.perf_counter() - started,
    )


def _tokenizer(files: ModelFiles, notes: list[str]) -> tuple[Tokenizer | None, str]:
    """The folder's tokenizer, or why there is none: a folder without one still generates from token ids."""
    try:
        return Tokenizer.load(files, notes), ""
    except (TokenizerError, CheckpointError) as error:
        return None, str(error)


def _note_other_end(
    files: ModelFiles,
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
            f"{files / 'tokenizer_config.json'}: eos_token is {end}, but generation ends at {ends} as config.json and "
            "generation_config.json say, as in transformers; eos_token_id and stop_strings change that"
        )


def _use_compilation_cache() -> None:
    wanted = os.environ.get(_CACHE_SWITCH, "")
    if wanted.lower() == "off" or getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    jax.config.update("jax_compilation_cache_dir", wanted or str(cache_folder() / "xla"))
