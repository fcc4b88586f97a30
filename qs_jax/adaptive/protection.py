"""Which tokens no mechanism touches: attention sinks, a prompt's end, special tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from qs_jax.adaptive.policy import Policy
from qs_jax.token_set import is_in, token_set

_MOST = int(np.iinfo(np.int32).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Protection:
    """The first and last tokens of a prompt, and special ones. All of it is traced: another number compiles nothing."""

    special_ids: Int[Array | np.ndarray, " slots"]
    first: Int[Array | np.ndarray, ""]
    last: Int[Array | np.ndarray, ""]

    @classmethod
    def bind(cls, policy: Policy, special_ids: Sequence[int]) -> "Protection":
        ids = sorted(set(special_ids)) if policy.protect_special else []
        counts = (policy.protect_first, policy.protect_last)
        first, last = (np.asarray(min(count, _MOST), np.int32) for count in counts)
        return cls(token_set(ids), first, last)

    def of_prompt(
        self, ids: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"], lengths: Int[Array, " batch"]
    ) -> Bool[Array, "batch tokens"]:
        """Of prompt tokens at these positions, where each row has so many tokens."""
        end = positions >= lengths[:, None] - self.last
        return (positions < self.first) | end | is_in(ids, self.special_ids)

    def of_generated(self, ids: Int[Array, " batch"], positions: Int[Array, " batch"]) -> Bool[Array, " batch"]:
        """Of tokens that follow a prompt, which may be shorter than what is protected."""
        return is_in(ids, self.special_ids) | (positions < self.first)
