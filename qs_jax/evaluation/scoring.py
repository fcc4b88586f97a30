"""Windows scored by the programs that generate: prefill of the prefix, then decode steps with the tokens forced."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.binding import BoundPolicy, dense
from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.ledger import Ledger
from qs_jax.engine.decode import Chosen
from qs_jax.engine.prefill import PromptTrace
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.session import Request, Session
from qs_jax.errors import EvaluationError
from qs_jax.evaluation.windows import Window
from qs_jax.generation import CHUNK, not_finite
from qs_jax.model import Model

OFF = "off"


@dataclass
class Scores:
    """What one policy gave, one row per window.

    `logprobs` are natural logarithms. `kl` is KL(dense ‖ policy) in nats and `agrees` whether both have the same most
    likely token; both are empty for the dense model itself. `layers_run` and `bits_read` (summed over those layers)
    belong to the pass that predicted the token. Seconds are per batch and include compilation.
    """

    ledger: Ledger
    logprobs: Float[np.ndarray, "windows tokens"]
    layers_run: Int[np.ndarray, "windows tokens"]
    bits_read: Int[np.ndarray, "windows tokens"]
    kl: Float[np.ndarray, "windows tokens"]
    agrees: Bool[np.ndarray, "windows tokens"]
    prompts: PromptTrace = field(default_factory=lambda: PromptTrace([], [], []))
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0

    @classmethod
    def empty(cls, model: Model, bound: BoundPolicy, tokens: int, bits: int | None = None) -> "Scores":
        none, whole = np.zeros((0, tokens), np.float32), np.zeros((0, tokens), np.int32)
        costs = Costs.of(model.network_at(bits))
        return cls(Ledger(costs, bound, bits or costs.bits), none, whole, whole, none, none.astype(bool))

    @property
    def nll(self) -> Float[np.ndarray, " windows"]:
        """Mean negative log-likelihood of each window, in nats per token."""
        return -self.logprobs.mean(axis=1, dtype=np.float64)

    def add(self, session: Session, chosen: Chosen, against: Array | None) -> None:
        """Take in a finished batch; `against` holds the dense model's logits of the same tokens."""

        def grown(name: str, by_step: Array | np.ndarray) -> None:
            setattr(self, name, np.concatenate([getattr(self, name), np.asarray(by_step).T]))

        grown("logprobs", chosen.logprobs)
        grown("layers_run", chosen.layers_run)
        grown("bits_read", chosen.bits_read)
        if against is not None:
            kl, agrees = jax.device_get(_compare(against, jnp.asarray(chosen.logits)))
            grown("kl", kl)
            grown("agrees", agrees)
        assert session.prefilled is not None
        for name in ("layers_run", "fused_with", "signal"):
            getattr(self.prompts, name).extend(getattr(session.prefilled.trace, name))
        self.ledger.add(session.ledger)
        self.prefill_seconds.append(session.prefill_seconds)
        self.decode_seconds.append(session.decode_seconds)
        self.compile_seconds += session.compile_seconds


def score(
    model: Model, windows: Sequence[Window], policies: Mapping[str, BoundPolicy], *, batch: int, bits: int | None = None
) -> Iterator[dict[str, Scores]]:
    """Score all windows under the dense model and each policy; yields the growing scores after every pass of a batch.

    The dense model comes first in every batch, so that its logits are there to compare with; its scores are under
    `OFF`. Windows must be of equal lengths, so that no row of a batch is padding. The policies' weights are read at
    `bits`, if given, the dense model's in full.

    Raises:
        GenerationError: bits are asked for and the model's weights are not Matryoshka.
        EvaluationError: logits are NaN or infinite in the model's dtype.
    """
    model.network_at(bits)
    every = {OFF: dense(model.config), **policies}
    scores = {
        name: Scores.empty(model, bound, len(windows[0].scored), None if name == OFF else bits)
        for name, bound in every.items()
    }
    for first in range(0, len(windows), batch):
        part, against = windows[first : first + batch], None
        for name, bound in every.items():
            session, chosen = _run(model, part, bound, None if name == OFF else bits)
            scores[name].add(session, chosen, against)
            if name == OFF and policies:
                against = jnp.asarray(chosen.logits)
            yield scores


def score_alone(model: Model, windows: Sequence[Window], bound: BoundPolicy, *, batch: int) -> Scores:
    """Score windows under one policy, by the same programs, without comparing logits."""
    scores = Scores.empty(model, bound, len(windows[0].scored))
    for first in range(0, len(windows), batch):
        scores.add(*_run(model, windows[first : first + batch], bound), None)
    return scores


def _run(
    model: Model, windows: Sequence[Window], bound: BoundPolicy, bits: int | None = None
) -> tuple[Session, Chosen]:
    """One batch through a session; steps are joined."""
    session = Session(model.network_at(bits), forced_request(windows, bound), bits=bits)
    chunks = []
    for chunk in session.chunks():
        if not np.isfinite(chunk.logprobs[chunk.emitted]).all():
            raise EvaluationError(not_finite(model))
        chunks.append(jax.tree.map(lambda leaf, e=chunk.emitted.any(axis=1): leaf[e], chunk))
    return session, jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


def forced_request(windows: Sequence[Window], bound: BoundPolicy) -> Request:
    """The request that scores windows. No token ends a row: text is scored beyond an end of text within it."""
    return Request(
        prompts=[window.prompt for window in windows],
        copies=1,
        max_new_tokens=len(windows[0].scored),
        eos_token_ids=(),
        seeds=[(0, 0)] * len(windows),
        sampling=Sampling.of(),
        chunk_size=CHUNK,
        policy=bound,
        forced=[window.scored for window in windows],
        keep_logits=True,
    )


@jax.jit
def _compare(
    dense: Float[Array, "tokens windows vocab"], policy: Float[Array, "tokens windows vocab"]
) -> tuple[Float[Array, "tokens windows"], Bool[Array, "tokens windows"]]:
    """KL(dense ‖ policy) in nats, and whether the most likely token is the same."""
    p, q = (jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1) for logits in (dense, policy))
    return (jnp.exp(p) * (p - q)).sum(axis=-1), p.argmax(axis=-1) == q.argmax(axis=-1)
