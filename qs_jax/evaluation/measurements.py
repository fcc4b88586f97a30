"""Scores of policies on the two parts of the calibration text, kept on disk so that an interrupted search goes on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from qs_jax.adaptive.policy import Policy
from qs_jax.errors import EvaluationError
from qs_jax.evaluation.perplexity import Advance
from qs_jax.evaluation.resting import score_stops
from qs_jax.evaluation.scoring import score_alone
from qs_jax.evaluation.statistics import PerWindow, increase
from qs_jax.evaluation.windows import Window
from qs_jax.files import remove_whole, write_whole
from qs_jax.kernels import has_planes, most_bits
from qs_jax.model import Model
from qs_jax.models import arrays_by_path
from qs_jax.request import bind_policy
from qs_jax.sharding import on_host

Part = Literal["search", "test"]

SEARCH_SHARE = 4
"""One window in so many is searched with."""
_FEWEST_TO_TEST = 8


@dataclass(frozen=True)
class Measured:
    """`nll` per window, in nats per token; means over all tokens of the layers run, over generated ones of the bits
    read, and the shares of FLOPs and of bytes of weights saved as executed."""

    nll: list[float]
    layers_run: float
    bits: float
    flops_reduction: float
    bytes_reduction: float

    @property
    def values(self) -> PerWindow:
        return np.asarray(self.nll)


def split(windows: Sequence[Window], batch: int, share: int = SEARCH_SHARE) -> dict[Part, list[Window]]:
    """One window in so many to search with, the rest to test with, in whole batches, evenly mixed, and so of each of
    several texts its share.

    Raises:
        EvaluationError: too few windows to tell anything.
    """
    count = len(windows)
    search = max(batch, count // share // batch * batch)
    if count - search < max(batch, _FEWEST_TO_TEST):
        raise EvaluationError(
            f"the text gives {count} windows, calibration needs at least {search + max(batch, _FEWEST_TO_TEST)}: "
            "give more text, raise max-tokens, or lower batch, prefix or window"
        )
    chosen = set(np.linspace(0, count - 1, search).round().astype(int).tolist())
    parts = {True: list[Window](), False: list[Window]()}
    for number, window in enumerate(windows):
        parts[number in chosen].append(window)
    return {"search": parts[True], "test": parts[False]}


class Measurements:
    """Policies' scores by part. Each is measured once, and written down at once if there is a file to write to."""

    def __init__(
        self,
        model: Model,
        windows: Sequence[Window],
        batch: int,
        file: Path | None,
        advance: Advance = lambda n=1: None,
        *,
        search: int = SEARCH_SHARE,
    ):
        self.model, self.batch, self.file, self.advance = model, batch, file, advance
        self.parts = split(windows, batch, search)
        self.planes = has_planes(model.network)
        self._fingerprint = self._taken_of()
        self._known: dict[str, Measured] = self._resumed()
        self.resumed = len(self._known)

    def of(self, policy: Policy, part: Part) -> Measured:
        """A policy's scores on a part."""
        key = self._key(policy, part)
        if key not in self._known:
            self._known[key] = self._measure(policy, part)
            self._write()
            self.advance()
        return self._known[key]

    def stops(self, policies: Sequence[Policy], part: Part) -> None:
        """Measure stops under the direct lens, and the dense model, all at once (`qs_jax.evaluation.resting`). What
        they save is what the engine saves on the search part."""
        dense = Policy.off()
        missing = [policy for policy in policies if self._key(policy, part) not in self._known]
        if not missing:
            return
        named = {self._key(policy, part): policy for policy in missing}
        nll, found = score_stops(self.model, self.parts[part], named, batch=self.batch, advance=self.advance)
        for key, policy in named.items():
            self._known[key] = replace(self.of(policy, "search"), nll=found[key].tolist())
        self._known[self._key(dense, part)] = replace(self.of(dense, "search"), nll=nll.tolist())
        self._write()

    def dense(self, part: Part) -> Measured:
        return self.of(Policy.off(), part)

    def by_text(self, part: Part) -> list[Int[np.ndarray, " windows"]]:
        """Of a part, the places of each text's windows."""
        texts = np.asarray([window.text for window in self.parts[part]])
        return [np.flatnonzero(texts == text) for text in np.unique(texts)]

    def increase(self, policy: Policy, part: Part) -> float:
        """Perplexity above the dense model's, on the text where that is most."""
        values, dense = self.of(policy, part).values, self.dense(part).values
        return max(increase(values[places], dense[places]) for places in self.by_text(part))

    def cost(self, policy: Policy) -> float:
        """Share of the FLOPs executed and, where weights can be read at fewer bits, of their bytes, on the search part:
        what the search makes small. Executed means that choices which the buckets round away count for nothing, and
        that rows of a batch which read at fewer bits save nothing where others read all.
        """
        measured = self.of(policy, "search")
        return 1 - measured.flops_reduction + (1 - measured.bytes_reduction if self.planes else 0.0)

    @staticmethod
    def _key(policy: Policy, part: Part) -> str:
        return f"{part} {json.dumps(policy.to_json(), sort_keys=True)}"

    def _measure(self, policy: Policy, part: Part) -> Measured:
        scores = score_alone(self.model, self.parts[part], bind_policy(self.model, policy), batch=self.batch)
        ledger = scores.ledger.to_json()
        return Measured(
            nll=scores.nll.tolist(),
            layers_run=ledger["layers_run_mean"],
            bits=ledger["bits_mean"],
            flops_reduction=ledger["flops_reduction"],
            bytes_reduction=ledger["bytes_reduction"],
        )

    def _taken_of(self) -> str:
        """A digest of the weights' names and kind, the head's and the lens's values and all that is scored: what
        measurements hold for."""
        digest = hashlib.sha256()
        for array in jax.tree.leaves(self.model.network.head_kernel):
            digest.update(np.asarray(on_host(array)).tobytes())
        for shortcut in self.model.network.shortcuts or ():
            digest.update(np.asarray(on_host(shortcut.up.get_value())).tobytes())
        for direct in self.model.network.direct or ():
            digest.update(np.asarray(on_host(direct.down.get_value())).tobytes())
        shapes = [(name, array.shape, str(array.dtype)) for name, array in arrays_by_path(self.model.network).items()]
        text = [(window.prompt, window.scored) for part in self.parts.values() for window in part]
        kind = self.planes, most_bits(self.model.network)
        digest.update(repr((sorted(shapes), kind, self.model.config, self.batch, text)).encode())
        return digest.hexdigest()

    def _resumed(self) -> dict[str, Measured]:
        if self.file is None or not self.file.is_file():
            return {}
        try:
            raw: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
            known = {key: Measured(**value) for key, value in raw["measured"].items()}
            return known if raw["fingerprint"] == self._fingerprint else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        if self.file is None:
            return
        known = {key: asdict(value) for key, value in self._known.items()}
        try:
            write_whole(self.file, json.dumps({"fingerprint": self._fingerprint, "measured": known}))
        except OSError as error:
            raise EvaluationError(f"{self.file}: cannot be written ({error.strerror}); choose another place") from None

    def finish(self) -> None:
        """The search is over: nothing is left to resume."""
        if self.file is not None:
            remove_whole(self.file)
