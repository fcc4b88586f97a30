"""GPT-2's and Llama's mathematics in numpy float64, one token at a time: the oracle's model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qs_jax.config import ModelConfig

Arrays = Mapping[str, np.ndarray]


@dataclass
class Slot:
    """What a token left in a layer: key (position applied) and value (kv_heads, head_dim); `bias` on its logits."""

    place: int
    key: np.ndarray
    value: np.ndarray
    bias: float


class Network:
    """GPT-2's or Llama's mathematics from weights by module path (kernels are (outputs, inputs))."""

    def __init__(self, config: ModelConfig, arrays: Arrays):
        self.config = config
        self.arrays = {path: np.asarray(array, np.float64) for path, array in arrays.items()}

    def embed(self, token: int, position: int) -> np.ndarray:
        state = self.arrays["embedding.table"][token]
        return state + self.arrays["position_embedding.table"][position] if self._gpt2 else state

    def kv(self, layer: int, state: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        x = self._norm(f"blocks.{layer}.input_norm", state)
        k, v = (self._heads(self._linear(f"blocks.{layer}.{name}", x)) for name in "kv")
        return self._rotated(k, position), v

    def attend(self, layer: int, state: np.ndarray, position: int, slots: Sequence[Slot]) -> np.ndarray:
        """What attention over the slots adds to the state."""
        config = self.config
        x = self._norm(f"blocks.{layer}.input_norm", state)
        queries = self._rotated(self._heads(self._linear(f"blocks.{layer}.q", x)), position)
        scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
        if config.attention_scale_by_layer:
            scale /= layer + 1
        mixed = []
        for head, query in enumerate(queries):
            shared = head * config.num_key_value_heads // config.num_attention_heads
            scores = np.array([scale * query @ slot.key[shared] + slot.bias for slot in slots])
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            mixed.append(sum(w * slot.value[shared] for w, slot in zip(weights, slots, strict=True)))
        return self._linear(f"blocks.{layer}.o", np.concatenate(mixed))

    def mlp(self, layer: int, state: np.ndarray) -> np.ndarray:
        at = f"blocks.{layer}"
        x = self._norm(f"{at}.mlp_norm", state)
        up = self._linear(f"{at}.up", x)
        inner = self._activate(up) if self._gpt2 else self._activate(self._linear(f"{at}.gate", x)) * up
        return self._linear(f"{at}.down", inner)

    def shortcut(self, layer: int, state: np.ndarray) -> np.ndarray:
        """The lens's stand-in for a layer; there is none for the first."""
        down, up, bias = (self.arrays[f"shortcuts.{layer - 1}.{name}"] for name in ("down", "up", "bias"))
        return state + up @ (down @ state) + bias

    def latent(self, states: Sequence[np.ndarray]) -> np.ndarray:
        """What the direct lens keeps of a token, of its states at the embedding and where it stops."""
        x = np.concatenate([state / np.sqrt((state**2).mean() + 1e-6) for state in states])
        return self.arrays["direct.0.down"] @ x

    def direct_kv(self, layer: int, latent: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """What the direct lens makes of that in a layer, counted from the one after the stop."""
        k, v = np.split(self.arrays[f"direct.0.up.{layer}"] @ latent + self.arrays[f"direct.0.bias.{layer}"], 2)
        return self._rotated(self._heads(k), position), self._heads(v)

    def logits(self, state: np.ndarray) -> np.ndarray:
        kernel = self.arrays.get("lm_head.kernel", self.arrays["embedding.table"])
        return (kernel @ self._norm("output_norm", state))[: self.config.vocab_size]

    @property
    def _gpt2(self) -> bool:
        return self.config.model_type == "gpt2"

    def _linear(self, path: str, x: np.ndarray) -> np.ndarray:
        return self.arrays[f"{path}.kernel"] @ x + self.arrays.get(f"{path}.bias", 0.0)

    def _norm(self, path: str, x: np.ndarray) -> np.ndarray:
        if self._gpt2:
            x = (x - x.mean()) / np.sqrt(x.var() + self.config.norm_epsilon)
            return x * self.arrays[f"{path}.scale"] + self.arrays[f"{path}.bias"]
        return x / np.sqrt((x**2).mean() + self.config.norm_epsilon) * self.arrays[f"{path}.scale"]

    def _heads(self, features: np.ndarray) -> np.ndarray:
        return features.reshape(-1, self.config.head_dim)

    def _rotated(self, heads: np.ndarray, position: int) -> np.ndarray:
        """Channel i turns together with channel i + half."""
        rope = self.config.rope
        if rope is None:
            return heads
        assert rope.rope_type == "default"
        half = self.config.head_dim // 2
        turn = np.exp(1j * position * rope.theta ** (-np.arange(half) / half))
        turned = (heads[:, :half] + 1j * heads[:, half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=1)

    def _activate(self, x: np.ndarray) -> np.ndarray:
        if self.config.activation == "silu":
            return x / (1 + np.exp(-x))
        assert self.config.activation == "gelu_new"
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
