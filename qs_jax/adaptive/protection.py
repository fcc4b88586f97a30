"""Which tokens no mechanism touches: attention sinks, a prompt's end, special tokens, rare ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.policy import Policy
from qs_jax.sharding import on_host
from qs_jax.token_set import is_in, token_set

_MOST = int(np.iinfo(np.int32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Protection:
    """The first and last tokens of a prompt, special ones, and by id whether a token is rare, where that counts. All of
    it is traced: another number compiles nothing."""

    special_ids: Int[Array | np.ndarray, " slots"]
    first: Int[Array | np.ndarray, ""]
    last: Int[Array | np.ndarray, ""]
    rare: Bool[Array | np.ndarray, " vocabulary"] | None = None

    @classmethod
    def bind(
        cls, policy: Policy, special_ids: Sequence[int], rarity: Float[Array | np.ndarray, " vocabulary"] | None
    ) -> "Protection":
        """That of a policy, by how rare each token is where that is known."""
        ids = sorted(set(special_ids)) if policy.protect_special else []
        counts = (policy.protect_first, policy.protect_last)
        first, last = (np.asarray(min(count, _MOST), np.int32) for count in counts)
        least, rare = policy.protect_rare, None
        if least is not None and rarity is not None:
            rare = np.asarray(on_host(rarity), np.float64) >= least
        return cls(token_set(ids), first, last, rare)

    def of_prompt(
        self, ids: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"], lengths: Int[Array, " batch"]
    ) -> Bool[Array, "batch tokens"]:
        """Of prompt tokens at these positions, where each row has so many tokens."""
        end = positions >= lengths[:, None] - self.last
        return (positions < self.first) | end | self._by_id(ids)

    def of_generated(self, ids: Int[Array, " batch"], positions: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        """Of tokens that follow a prompt, which may be shorter than what is protected."""
        return self._by_id(ids) | (positions < self.first)

    def _by_id(self, ids: Int[Array, "*tokens"]) -> Bool[Array, "*tokens"]:
        special = is_in(ids, self.special_ids)
        return special if self.rare is None else special | jnp.asarray(self.rare)[ids]
