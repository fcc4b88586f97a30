"""Small Hugging Face folders, each with one peculiarity of real ones; `goldens.json` has what transformers makes of it.

Weights come from numpy's legacy generator, whose numbers never change. `python -m tests.reported.make_goldens` writes
the goldens anew, with torch.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.folders import tensors_of
from tests.tiny import CONFIGS

Tensors = dict[str, np.ndarray]

PROMPT = list(range(3, 43))
"""Long enough for a wrong rotary embedding to show."""

NEW_TOKENS = 12

LLAMA = {**CONFIGS["llama"], "vocab_size": 96, "eos_token_id": 2, "bos_token_id": 1}
GPT2 = {**CONFIGS["gpt2"], "vocab_size": 96, "eos_token_id": 2, "bos_token_id": 1}


def bytes_tokenizer(*special: str) -> Tokenizer:
    """One token per byte, in the order of the characters that stand for them; then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tensors(name: str, seed: int = 0) -> Tensors:
    """Weights of a tiny model of 96 tokens, by Hugging Face's names."""
    random, scale = np.random.RandomState(seed), {"llama": 0.35, "gpt2": 0.7}[name]
    found: Tensors = {}
    for tensor, array in sorted(tensors_of(name).items()):
        shape = tuple(96 if size == 97 else size for size in array.shape)
        offset = 1.0 if tensor.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0
        found[tensor] = (offset + scale * random.standard_normal(shape)).astype(np.float32)
    return found


def write(folder: Path, config: dict[str, Any], weights: Tensors, metadata: dict[str, str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt", **(metadata or {})})


def write_shards(folder: Path, config: dict[str, Any], shards: dict[str, Tensors]) -> None:
    """Shards by file name, and the index; of a tensor in several, the index names the last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file, weights in shards.items():
        save_file(weights, folder / file, metadata={"format": "pt"})
    names = {name: file for file, weights in shards.items() for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def halves(weights: Tensors) -> dict[str, Tensors]:
    """Two shards, named as transformers names them."""
    names = sorted(weights)
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    return {f"model-0000{n + 1}-of-00002.safetensors": {k: weights[k] for k in part} for n, part in enumerate(parts)}


def llama(*without: str, **options: Any) -> Callable[[Path], None]:
    """A Llama whose `config.json` lacks some keys and has others."""
    config = {key: value for key, value in {**LLAMA, **options}.items() if key not in without}
    return lambda folder: write(folder, config, tensors("llama"))


def gpt2(*without: str, **options: Any) -> Callable[[Path], None]:
    config = {key: value for key, value in {**GPT2, **options}.items() if key not in without}
    return lambda folder: write(folder, config, tensors("gpt2"))


def _tied_but_differs(name: str, config: dict[str, Any]) -> Callable[[Path], None]:
    head = {"lm_head.weight": tensors("llama", seed=5)["lm_head.weight"]}
    return lambda folder: write(folder, {**config, "tie_word_embeddings": True}, {**tensors(name), **head})


def _tied_and_equal(folder: Path) -> None:
    weights = tensors("llama")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    write(folder, {**LLAMA, "tie_word_embeddings": True}, weights)


def _only_the_head(metadata: bool) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        weights = tensors("llama")
        weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
        shared = {"model.embed_tokens.weight": "lm_head.weight"} if metadata else {}
        write(folder, {**LLAMA, "tie_word_embeddings": True}, weights, shared)

    return build


def _stale_index(kept: bool) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        write_shards(folder, LLAMA, halves(tensors("llama", seed=1)))
        for shard in folder.glob("model-*") if not kept else ():
            shard.unlink()
        write(folder, LLAMA, tensors("llama"))

    return build


def _twice_the_same(folder: Path) -> None:
    first, second = halves(tensors("llama")).items()
    write_shards(folder, LLAMA, {first[0]: first[1], second[0]: {**second[1], **dict(list(first[1].items())[:2])}})


def _buffers(folder: Path) -> None:
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for layer in range(2)}
    write(folder, LLAMA, {**tensors("llama"), **extra, "model.rotary_emb.inv_freq": np.ones(4, np.float32)})


def _ends(folder: Path) -> None:
    """End of text in three files: 2 in config.json, [2, 14] in generation_config.json, 5 in tokenizer_config.json."""
    llama()(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 14]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "%"}))


def _no_epsilon(folder: Path) -> None:
    """With an embedding so small that the epsilon decides."""
    config = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"}
    weights = tensors("llama")
    weights["model.embed_tokens.weight"] *= 3e-3
    write(folder, config, weights)


def _penalty(folder: Path) -> None:
    llama()(folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5, "temperature": 0.6}))


_THETA, _DEFAULT = {"rope_theta": 10000.0}, {"rope_type": "default", "rope_theta": 10000.0}
_LINEAR = {"rope_type": "linear", "factor": 2.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

FOLDERS: dict[str, Callable[[Path], None]] = {
    "plain_llama": llama(),
    "plain_gpt2": gpt2(),
    # files that contradict each other
    "tied_but_differs_llama": _tied_but_differs("llama", LLAMA),
    "tied_but_differs_gpt2": _tied_but_differs("gpt2", GPT2),
    "tied_and_equal": _tied_and_equal,
    "only_the_head": _only_the_head(metadata=False),
    "only_the_head_with_metadata": _only_the_head(metadata=True),
    "stale_index": _stale_index(kept=False),
    "stale_index_and_shards": _stale_index(kept=True),
    "tensor_twice_the_same": _twice_the_same,
    "rope_theta_twice": llama(rope_theta=10000.0, rope_parameters={**_DEFAULT, "rope_theta": 500000.0}),
    "rope_scaling_beside_parameters": llama(rope_parameters=_DEFAULT, rope_scaling=_LINEAR),
    "rope_type_and_type": llama(rope_scaling={"rope_type": "linear", "type": "yarn", "factor": 4.0}),
    "gpt2_by_other_names": gpt2("n_embd", "n_layer", hidden_size=32, num_hidden_layers=2),
    "ends_in_three_files": _ends,
    # what is left out, and what does not matter
    "no_rope_theta": llama("rope_theta", rope_scaling=None),
    "pretraining_tp": llama(pretraining_tp=2),
    "no_norm_epsilon": _no_epsilon,
    "llama3_without_original_context": llama(rope_scaling=_LLAMA3),
    "dynamic_rope": llama(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "null_sizes": llama(head_dim=None, num_key_value_heads=2, rope_scaling=None, pad_token_id=None),
    "padding_nobody_has": llama(pad_token_id=-1),
    "padding_beyond_the_vocabulary": llama(pad_token_id=None, eos_token_id=[2, 96]),
    "swish": llama(hidden_act="swish"),
    "buffers": _buffers,
    # defaults of generation
    "penalty_of_the_file": _penalty,
}
"""Folders that load."""
