"""What a run cost and what the dense model would have cost: FLOPs, bytes of weights read, cache slots written.

Work is counted as executed, padding and empty slots of a bucket included, since that is what the machine pays for.
One multiply-add is two FLOPs; norms, activations and softmax are left out (under 2 % on real shapes; a test holds
the count against XLA's own cost analysis).
"""

from dataclasses import dataclass

from qs_jax.matryoshka.linear import is_nested, weights
from qs_jax.models.base import CausalLM


@dataclass(frozen=True)
class Costs:
    """Constants of a model, from the shapes of its weights."""

    layers: int
    block_flops_per_token: int
    attention_flops_per_slot: int
    head_flops: int
    block_bytes: int
    head_bytes: int
    weight_bits: int

    @classmethod
    def of(cls, model: CausalLM) -> "Costs":
        config, block, head = model.config, model.blocks[0], model.head_kernel
        return cls(
            layers=config.num_hidden_layers,
            block_flops_per_token=sum(2 * leaf.size for leaf in weights(block) if leaf.ndim == 2),
            attention_flops_per_slot=4 * config.num_attention_heads * config.head_dim,
            head_flops=2 * head.size,
            block_bytes=sum(leaf.nbytes for leaf in weights(block)),
            head_bytes=head.nbytes,
            weight_bits=min((w.bits for w in weights(block) if is_nested(w)), default=8 * head.dtype.itemsize),
        )


@dataclass
class Ledger:
    """Totals of one request."""

    costs: Costs
    flops: int = 0
    weight_bytes: int = 0
    kv_slots: int = 0

    def add_pass(self, *, rows: int, tokens: int, slots: int, logit_rows: int, times: int = 1) -> None:
        """Count `times` passes of `tokens` tokens per row through all layers.

        Args:
            rows: rows of the batch.
            tokens: tokens per row, padding included.
            slots: cached slots each token's attention looks at, beside the pass's own tokens.
            logit_rows: rows whose logits are computed, over the whole batch.
        """
        costs = self.costs
        per_token = costs.block_flops_per_token + costs.attention_flops_per_slot * (slots + tokens)
        self.flops += times * (costs.layers * rows * tokens * per_token + logit_rows * costs.head_flops)
        self.weight_bytes += times * (costs.layers * costs.block_bytes + costs.head_bytes)

    def add_writes(self, tokens: int) -> None:
        """Count the cache slots that `tokens` tokens fill, one in every layer."""
        self.kv_slots += self.costs.layers * tokens

    def to_json(self) -> dict[str, float]:
        """The ledger beside its dense twin; for the dense engine the two are the same."""
        return {
            "flops": self.flops,
            "flops_off": self.flops,
            "flops_reduction": 0.0,
            "weight_bytes": self.weight_bytes,
            "weight_bytes_off": self.weight_bytes,
            "bytes_reduction": 0.0,
            "kv_slots": self.kv_slots,
            "kv_slots_off": self.kv_slots,
            "probe_flops": 0,
            "layers_run_mean": float(self.costs.layers),
            "bits_mean": float(self.costs.weight_bits),
        }
