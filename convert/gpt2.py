"""GPT-2: fused q, k, v; `Conv1D` kernels stored (inputs, outputs)."""

from collections.abc import Iterator

from convert.rules import Rule, Table
from qs_jax.config import ModelConfig

_PROJECTIONS = {
    "attn.c_attn": ("q", "k", "v"),
    "attn.c_proj": ("o",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
}


def _rules(config: ModelConfig) -> Iterator[Rule]:
    yield Rule("wte.weight", ("embedding.table",), padded=True)
    yield Rule("wpe.weight", ("position_embedding.table",))
    for theirs, ours in _PROJECTIONS.items():
        kernels, biases = (tuple(f"blocks.{{layer}}.{p}.{leaf}" for p in ours) for leaf in ("kernel", "bias"))
        yield Rule(f"h.{{layer}}.{theirs}.weight", kernels, transposed=True)
        yield Rule(f"h.{{layer}}.{theirs}.bias", biases)
    norms = {"h.{layer}.ln_1": "blocks.{layer}.input_norm", "h.{layer}.ln_2": "blocks.{layer}.mlp_norm"}
    for theirs, ours in {**norms, "ln_f": "output_norm"}.items():
        yield Rule(f"{theirs}.weight", (f"{ours}.scale",))
        yield Rule(f"{theirs}.bias", (f"{ours}.bias",))


TABLE = Table("transformer.", _rules, "wte.weight", ignored=(".attn.bias", ".attn.masked_bias"))
