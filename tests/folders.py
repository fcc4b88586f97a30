"""The tiny models as Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.mapping import to_hugging_face
from qs_jax.models import arrays_by_path
from tests.tiny import CHAT_TEMPLATE, CONFIGS, NAMED, character_tokenizer, tiny_model

Tensors = dict[str, np.ndarray]


def tensors_of(name: str) -> Tensors:
    model = tiny_model(name)
    return to_hugging_face(arrays_by_path(model.network), model.config)


def write_folder(
    folder: Path, name: str, tensors: Tensors | None = None, shards: int = 1, tokenizer: bool = False, **config: Any
) -> Path:
    """A Hugging Face folder, in one file or in shards with an index."""
    folder.mkdir()
    if tokenizer:
        character_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**NAMED, "chat_template": CHAT_TEMPLATE}))
    (folder / "config.json").write_text(json.dumps({**CONFIGS[name], **config}))
    tensors = tensors_of(name) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{shard + 1:05}-of-{shards:05}.safetensors" for shard in range(shards)]
    homes = {tensor: files[number % shards] for number, tensor in enumerate(tensors)}
    for file in files:
        save_file({t: array for t, array in tensors.items() if homes[t] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return folder
