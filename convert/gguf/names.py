"""Which Hugging Face tensor a GGUF's is, and how llama.cpp laid it out, by architecture.

llama.cpp's converter reorders the rows of Llama's queries and keys, for rotary pairs that lie side by side, and
transposes GPT-2's `Conv1D` kernels.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Place:
    """`name` in Hugging Face's checkpoints. `heads` is the entry of `config.json` that says how many heads the rows
    are of, where their rotary pairs lie side by side; `transposed` marks what is stored (outputs, inputs) and expected
    (inputs, outputs)."""

    name: str
    heads: str = ""
    transposed: bool = False


Table = Mapping[str, Place]
"""By the GGUF's name, with `{}` for a layer's number and without the `.weight` or `.bias` that both names end in."""


def _decoder(*, paired: bool) -> Table:
    layer = "model.layers.{}."
    queries, keys = ("num_attention_heads", "num_key_value_heads") if paired else ("", "")
    return {
        "token_embd": Place("model.embed_tokens"),
        "output_norm": Place("model.norm"),
        "output": Place("lm_head"),
        "blk.{}.attn_norm": Place(layer + "input_layernorm"),
        "blk.{}.ffn_norm": Place(layer + "post_attention_layernorm"),
        "blk.{}.attn_q": Place(layer + "self_attn.q_proj", queries),
        "blk.{}.attn_k": Place(layer + "self_attn.k_proj", keys),
        "blk.{}.attn_v": Place(layer + "self_attn.v_proj"),
        "blk.{}.attn_output": Place(layer + "self_attn.o_proj"),
        "blk.{}.ffn_gate": Place(layer + "mlp.gate_proj"),
        "blk.{}.ffn_up": Place(layer + "mlp.up_proj"),
        "blk.{}.ffn_down": Place(layer + "mlp.down_proj"),
    }


_GPT2: Table = {
    "token_embd": Place("transformer.wte"),
    "position_embd": Place("transformer.wpe"),
    "output_norm": Place("transformer.ln_f"),
    "output": Place("lm_head"),
    "blk.{}.attn_norm": Place("transformer.h.{}.ln_1"),
    "blk.{}.ffn_norm": Place("transformer.h.{}.ln_2"),
    "blk.{}.attn_qkv": Place("transformer.h.{}.attn.c_attn", transposed=True),
    "blk.{}.attn_output": Place("transformer.h.{}.attn.c_proj", transposed=True),
    "blk.{}.ffn_up": Place("transformer.h.{}.mlp.c_fc", transposed=True),
    "blk.{}.ffn_down": Place("transformer.h.{}.mlp.c_proj", transposed=True),
}

TABLES: Mapping[str, Table] = {
    "llama": _decoder(paired=True),
    "qwen2": _decoder(paired=False),
    "gpt2": _GPT2,
}
"""By `general.architecture`. Mistral's files say that they are a llama."""

_NAME = re.compile(r"(?P<stem>.+)\.(?P<leaf>weight|bias)", re.DOTALL)
_LAYER = re.compile(r"(?<=^blk\.)(0|[1-9]\d{0,5})(?=\.)")


def place_of(table: Table, name: str) -> Place:
    """Where a tensor goes; one that the table does not know keeps its name, which the model then does not expect."""
    matched = _NAME.fullmatch(name)
    if matched is None:
        return Place(name)
    stem, leaf = matched["stem"], matched["leaf"]
    layer = _LAYER.search(stem)
    place = table.get(_LAYER.sub("{}", stem, count=1))
    if place is None or (layer is None) != ("{}" not in place.name):
        return Place(name)
    full = place.name.format(layer[0] if layer else "") + f".{leaf}"
    return Place(full, place.heads, place.transposed and leaf == "weight")


def unpaired(rows: int, heads: int) -> Int[np.ndarray, " rows"]:
    """Of `heads` heads' rows, where each of Hugging Face's lies in a file whose rotary pairs are side by side."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
