"""The tiny models as GGUF files, laid out as llama.cpp's converter lays them out."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFValueType

from tests.folders import Tensors, tensors_of
from tests.tiny import CHAT_TEMPLATE, CONFIGS

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GPT2 = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_LAYER = re.compile(r"(model\.layers|transformer\.h)\.(\d+)\.(.*)")


def as_stored(name: str, tensors: Tensors) -> Tensors:
    """Hugging Face's tensors by the names, and in the layout, that a GGUF has them."""
    config, table = CONFIGS[name], _GPT2 if name == "gpt2" else _LLAMA
    stored = {}
    for full, array in tensors.items():
        stem, leaf = full.rsplit(".", 1)
        matched = _LAYER.fullmatch(stem)
        theirs = f"blk.{matched[2]}.{table[matched[3]]}" if matched else table[stem]
        if name == "gpt2" and leaf == "weight" and "c_" in stem:
            array = array.T
        if ARCHITECTURES[name] == "llama" and ("q_proj" in stem or "k_proj" in stem):
            heads = config["num_attention_heads" if "q_proj" in stem else "num_key_value_heads"]
            halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        stored[f"{theirs}.{leaf}"] = np.ascontiguousarray(array)
    return stored


def metadata_of(name: str) -> dict[str, Any]:
    """What llama.cpp's converter writes of a tiny model's configuration."""
    config, kind = CONFIGS[name], ARCHITECTURES[name]
    if name == "gpt2":
        return {
            "gpt2.block_count": config["n_layer"],
            "gpt2.context_length": config["n_positions"],
            "gpt2.embedding_length": config["n_embd"],
            "gpt2.feed_forward_length": 4 * config["n_embd"],
            "gpt2.attention.head_count": config["n_head"],
            "gpt2.attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    return {
        f"{kind}.block_count": config["num_hidden_layers"],
        f"{kind}.context_length": config["max_position_embeddings"],
        f"{kind}.embedding_length": config["hidden_size"],
        f"{kind}.feed_forward_length": config["intermediate_size"],
        f"{kind}.attention.head_count": config["num_attention_heads"],
        f"{kind}.attention.head_count_kv": config["num_key_value_heads"],
        f"{kind}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{kind}.rope.freq_base": config["rope_theta"],
        f"{kind}.rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
    }


CHARACTERS = [chr(code) for code in range(33, 126)] + ["Ġ", "ou", "<s>", "</s>"]
"""A byte-level vocabulary of 97: ASCII's printable characters but the last, a pair, and two tokens with a meaning."""

VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": CHARACTERS,
    "tokenizer.ggml.token_type": [1] * 95 + [3, 3],
    "tokenizer.ggml.merges": ["o u"],
    "tokenizer.ggml.bos_token_id": 95,
    "tokenizer.ggml.eos_token_id": 96,
    "tokenizer.chat_template": CHAT_TEMPLATE,
}


def write_gguf(
    path: Path,
    name: str = "llama",
    tensors: Tensors | None = None,
    *,
    kinds: Mapping[str, Kind] | None = None,
    vocabulary: bool = True,
    more: Mapping[str, np.ndarray] | None = None,
    **metadata: Any,
) -> Path:
    """A tiny model as a GGUF.

    Args:
        path: the file.
        name: of the tiny model.
        tensors: its weights, by Hugging Face's names; its own by default.
        kinds: types of tensors by their names in the file, whose arrays are then bytes; float32 otherwise.
        vocabulary: whether it has a tokenizer.
        more: further tensors by their names in the file, or others in place of the model's.
        metadata: entries by key, with `__` for `.`; None takes one away.
    """
    stored = {**as_stored(name, tensors_of(name) if tensors is None else tensors), **(more or {})}
    entries = {**metadata_of(name), **(VOCABULARY if vocabulary else {})}
    entries |= {key.replace("__", "."): value for key, value in metadata.items()}
    write_raw(path, ARCHITECTURES[name], entries, stored, kinds or {})
    return path


def write_raw(
    path: Path, architecture: str, entries: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kinds: Any
) -> None:
    writer = GGUFWriter(path, architecture)
    for key, value in entries.items():
        if value is None:
            continue
        kind = GGUFValueType.get_type(value)
        if kind == GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=kinds.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@dataclass
class RawGguf:
    """A GGUF taken apart, so that it can be put together wrongly: values of entries and places of tensors as bytes
    and numbers that nobody checks."""

    entries: list[tuple[bytes, int, bytes]]
    tensors: list[tuple[bytes, list[int], int, int]]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    counts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, path: Path) -> "RawGguf":
        """A sound file, apart."""
        blob, place = path.read_bytes(), 4
        version, tensors, entries = struct.unpack_from("<IQQ", blob, place)
        place += 20

        def text() -> bytes:
            nonlocal place
            (size,) = struct.unpack_from("<Q", blob, place)
            place += 8 + size
            return blob[place - size : place]

        def size_of(kind: int, place: int) -> int:
            if kind == 8:
                return 8 + struct.unpack_from("<Q", blob, place)[0]
            if kind == 9:
                inner, number = struct.unpack_from("<IQ", blob, place)
                start = place
                place += 12
                for _ in range(number):
                    place += size_of(inner, place)
                return place - start
            return (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)[kind]

        found: list[tuple[bytes, int, bytes]] = []
        for _ in range(entries):
            key = text()
            (kind,) = struct.unpack_from("<I", blob, place)
            size = size_of(kind, place + 4)
            found.append((key, kind, blob[place + 4 : place + 4 + size]))
            place += 4 + size
        places = []
        for _ in range(tensors):
            name = text()
            (axes,) = struct.unpack_from("<I", blob, place)
            shape = struct.unpack_from(f"<{axes}Q", blob, place + 4)
            kind, offset = struct.unpack_from("<IQ", blob, place + 4 + 8 * axes)
            place += 16 + 8 * axes
            places.append((name, list(shape), kind, offset))
        return cls(found, places, blob[-(-place // 32) * 32 :], version=version)

    def pack(self, alignment: int = 32) -> bytes:
        counts = self.counts or [len(self.tensors), len(self.entries)]
        head = self.magic + struct.pack("<I2Q", self.version, *counts)
        for key, kind, value in self.entries:
            head += _text(key) + struct.pack("<I", kind) + value
        for name, shape, kind, offset in self.tensors:
            head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)
        return head + bytes(-len(head) % alignment) + self.data
