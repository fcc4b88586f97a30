"""Llama, Mistral, Qwen2: every tensor already lies as the module wants it; which have biases, the config says."""

from collections.abc import Iterator

from convert.rules import Rule, Table
from qs_jax.config import ModelConfig

_ATTENTION = {"self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v"}
_OUTPUT = {"self_attn.o_proj": "o"}
_MLP = {"mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down"}
_NORMS = {"input_layernorm": "input_norm", "post_attention_layernorm": "mlp_norm"}


def _rules(config: ModelConfig) -> Iterator[Rule]:
    yield Rule("embed_tokens.weight", ("embedding.table",), padded=True)
    for names, bias in (
        (_ATTENTION, config.attention_bias),
        (_OUTPUT, config.attention_output_bias),
        (_MLP, config.mlp_bias),
    ):
        for theirs, ours in names.items():
            yield Rule(f"layers.{{layer}}.{theirs}.weight", (f"blocks.{{layer}}.{ours}.kernel",))
            if bias:
                yield Rule(f"layers.{{layer}}.{theirs}.bias", (f"blocks.{{layer}}.{ours}.bias",))
    for theirs, ours in _NORMS.items():
        yield Rule(f"layers.{{layer}}.{theirs}.weight", (f"blocks.{{layer}}.{ours}.scale",))
    yield Rule("norm.weight", ("output_norm.scale",))


TABLE = Table("model.", _rules, "embed_tokens.weight", ignored=("rotary_emb.inv_freq",))
