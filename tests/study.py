"""A small model with a tokenizer in a folder, so that studies run as users run them."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from typer.testing import CliRunner

import qs_jax.cli
from convert.mapping import to_hugging_face
from qs_jax.models import arrays_by_path
from tests.tiny import CONFIGS, tiny_model

LETTERS = " abcdefghijklmnopqrstuvwxyz.é"
START = "<s>"


def model_folder(folder: Path, name: str = "llama", layers: int = 2) -> Path:
    """The random tiny model with one token per letter; token 0 starts a text."""
    folder.mkdir(parents=True)
    model = tiny_model(name, layers)
    depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
    config = {**CONFIGS[name], depth: layers, "bos_token_id": 0, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(to_hugging_face(arrays_by_path(model.network), model.config), folder / "model.safetensors")
    tokenizer = Tokenizer(BPE(vocab={START: 0} | {letter: n for n, letter in enumerate(LETTERS, 1)}, merges=[]))
    tokenizer.decoder = Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": START, "eos_token": START}))
    return folder


def command(*arguments: object) -> tuple[int, Any, str]:
    """Exit status, JSON (or text) on stdout, and stderr of `qs-jax`."""
    result = CliRunner().invoke(qs_jax.cli.app, [str(argument) for argument in arguments])
    try:
        return result.exit_code, json.loads(result.stdout), result.stderr
    except ValueError:
        return result.exit_code, result.stdout, result.stderr
