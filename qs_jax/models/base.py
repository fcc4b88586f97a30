"""The Block contract: all that the engine knows of an architecture."""

from abc import abstractmethod
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.kernels import Kernel, as_kernel
from qs_jax.models.attention import View, attention, new_segment
from qs_jax.models.layers import DirectKv, Embedding, Init, Linear, Shortcut
from qs_jax.sharding import gathered

Hidden = Float[Array, "batch tokens hidden"]
Heads = Float[Array, "batch tokens kv_heads head_dim"]
Positions = Int[Array, "batch tokens"]
Features = Float[Array, "batch tokens features"]


class LayerOutput(NamedTuple):
    """The residual stream after a layer, the keys and values it made, and what attention added on the way."""

    hidden_states: Hidden
    k: Heads
    v: Heads
    attention_update: Hidden


class Block(nnx.Module):
    """One decoder layer, callable in parts. Every part takes the residual stream and normalises it itself."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, layer: int, *, init: Init):
        hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        bias, kv_features = config.attention_bias, config.num_key_value_heads * head_dim
        residual_std = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        self.config = config
        self.scale = config.scale(layer)
        self.q = Linear(hidden, heads * head_dim, bias=bias, init=init)
        self.k = Linear(hidden, kv_features, bias=bias, init=init)
        self.v = Linear(hidden, kv_features, bias=bias, init=init)
        self.o = Linear(heads * head_dim, hidden, bias=config.attention_output_bias, init=init, std=residual_std)

    @abstractmethod
    def attention_norm(self, hidden_states: Hidden) -> Hidden:
        """Normalise the residual stream for the attention half."""

    @abstractmethod
    def place(self, heads: Heads, positions: Positions) -> Heads:
        """Mark queries or keys with their positions (rotary), or return them unchanged (learned positions)."""

    @abstractmethod
    def mlp(self, hidden_states: Hidden) -> Hidden:
        """The feed-forward half's update to the residual stream."""

    def kv(self, hidden_states: Hidden, positions: Positions) -> tuple[Heads, Heads]:
        """Keys, with positions already applied, and values of the given tokens."""
        return self.placed(*self.kv_features(hidden_states), positions)

    def kv_features(self, hidden_states: Hidden) -> tuple[Features, Features]:
        """Keys and values before they are cut into heads, and keys without positions."""
        x = self.attention_norm(hidden_states)
        return self.k(x), self.v(x)

    def placed(self, k: Features, v: Features, positions: Positions) -> tuple[Heads, Heads]:
        """Keys and values as attention reads them."""
        return self.place(self._split(k), positions), self._split(v)

    def attend(self, hidden_states: Hidden, positions: Positions, view: View) -> Hidden:
        """The attention half's update to the residual stream, over the keys and values in `view`."""
        q = self.place(self._split(self.q(self.attention_norm(hidden_states))), positions)
        return self.o(attention(q, view, self.scale))

    def run(self, hidden_states: Hidden, positions: Positions, past: View) -> LayerOutput:
        """The whole layer for new tokens that see `past` and, causally, each other."""
        k, v = self.kv(hidden_states, positions)
        return self.run_over(hidden_states, positions, (*past, new_segment(k, v)), k, v)

    def run_over(self, hidden_states: Hidden, positions: Positions, view: View, k: Heads, v: Heads) -> LayerOutput:
        """The layer for tokens that see `view`, into which their own keys and values `k` and `v` went."""
        update = self.attend(hidden_states, positions, view)
        hidden_states += update
        return LayerOutput(hidden_states + self.mlp(hidden_states), k, v, update)

    def _split(self, features: Features) -> Heads:
        return features.reshape(*features.shape[:-1], -1, self.config.head_dim)


class CausalLM(nnx.Module):
    """A decoder: `embed`, `blocks`, `head`. A pytree of its weights; nothing in it ever mutates.

    What stands in for layers that a token skips (`qs_jax.lens`), if it has any: `shortcuts` for layer 1, 2, …, one by
    one, and `direct` for all layers from one on; with `rarity`, -log of each token's share of text, in nats.
    """

    blocks: nnx.List[Block]
    shortcuts: "nnx.List[Shortcut] | None"
    direct: "nnx.List[DirectKv] | None"
    rarity: nnx.Param[Array] | None
    embedding: Embedding
    lm_head: Linear | None

    def __init__(self, config: ModelConfig, *, init: Init):
        self.config = config
        hidden, vocab = config.hidden_size, config.padded_vocab_size
        tied = config.tie_word_embeddings
        self.shortcuts = nnx.data(None)
        self.direct = nnx.data(None)
        self.rarity = nnx.data(None)
        self.embedding = Embedding(vocab, hidden, init=init)
        self.lm_head = None if tied else Linear(hidden, vocab, bias=False, init=init)

    @abstractmethod
    def embed(self, tokens: Int[Array, "batch tokens"], positions: Positions) -> Hidden:
        """The residual stream that enters the first block."""

    @abstractmethod
    def final_norm(self, hidden_states: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """Normalise the residual stream that leaves the last block."""

    def head(self, hidden_states: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocab"]:
        """Next-token logits in float32. On a mesh every device has all of a row's: what is decided by them is decided
        alike, in one order of sums."""
        kernel = self.head_kernel
        logits = gathered(kernel.matmul(self.final_norm(hidden_states)), like=kernel)
        return logits[..., : self.config.vocab_size]

    def shortcut(self, layer: int, hidden_states: Hidden) -> Hidden:
        """About what would leave a layer that enters here, without running it."""
        assert self.shortcuts is not None
        return self.shortcuts[layer - 1](hidden_states)

    @property
    def direct_stops(self) -> tuple[int, ...]:
        """After how many layers a token may stop whose keys and values come from `direct`."""
        return tuple(part.stop for part in self.direct or ())

    def direct_from(self, stop: int) -> DirectKv:
        """What stands in for all layers after so many."""
        assert self.direct is not None
        return self.direct[self.direct_stops.index(stop)]

    @property
    def head_kernel(self) -> Kernel:
        """The weights (padded_vocab, hidden) that make logits of the last hidden state: the embedding's if tied."""
        return as_kernel((self.embedding.table if self.lm_head is None else self.lm_head.kernel).get_value())


def forward(model: CausalLM, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens vocab"]:
    """Logits of every token, no cache: the plain reference that every faster path is tested against."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden_states = model.embed(tokens, positions)
    for block in model.blocks:
        hidden_states = block.run(hidden_states, positions, ()).hidden_states
    return model.head(hidden_states)
