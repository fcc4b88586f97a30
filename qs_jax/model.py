"""A model as its host sees it: the network, and what was read beside its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from qs_jax.config import ModelConfig
from qs_jax.errors import GenerationError
from qs_jax.kernels import at_bits, has_planes
from qs_jax.models.base import CausalLM
from qs_jax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """A model ready to generate.

    `name` is what the user asked for; `tokenizer` is None where the folder has none or none that can be read, and
    `no_tokenizer` says why. `defaults` are the settings of `generation_config.json`, for what a call leaves out.
    `notes` says, one line each, what was supplied, chosen among contradictions or passed over in the folder's files.
    `load_seconds` is how long `qs_jax.load` took.
    """

    config: ModelConfig
    network: CausalLM
    tokenizer: Tokenizer | None
    dtype: jnp.dtype
    name: str
    no_tokenizer: str = "no tokenizer; copy tokenizer.json beside the weights or give token ids"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    load_seconds: float = field(default=0.0, compare=False)
    _read_at: dict[int, CausalLM] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def special_ids(self) -> list[int]:
        """Tokens that are no text: the tokenizer's, and those that start, end and pad."""
        config, ids = self.config, self.tokenizer.special_ids if self.tokenizer else []
        own = (*config.eos_token_ids, config.bos_token_id, config.pad_token_id)
        return sorted({*ids, *(token for token in own if token is not None)})

    def network_at(self, bits: int | None) -> CausalLM:
        """The network, every kernel read at `bits`; the same object in every call, so that its costs are counted once.

        Raises:
            GenerationError: bits are asked for and the model's weights are not Matryoshka.
        """
        if bits is None:
            return self.network
        if not has_planes(self.network):
            raise GenerationError(f"bits is {bits}, but {self.name} has no Matryoshka weights; qs-convert --quantize")
        if bits not in self._read_at:
            self._read_at[bits] = at_bits(self.network, bits)
        return self._read_at[bits]
