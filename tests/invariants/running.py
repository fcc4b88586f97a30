"""One request through the engine, and the same through the oracle, with everything that tests compare."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from qs_jax.adaptive import signals
from qs_jax.adaptive.binding import bind
from qs_jax.adaptive.kv_rules import Means
from qs_jax.adaptive.policy import Policy
from qs_jax.cache import allocate
from qs_jax.choices import BITS
from qs_jax.config import ModelConfig
from qs_jax.engine import prefill as prefills
from qs_jax.engine import session as sessions
from qs_jax.engine.decode import Controls, DecodeState
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.session import Request, Session
from qs_jax.engine.stage import Tokens
from qs_jax.kernels import has_planes, is_nested, most_bits
from qs_jax.model import Model
from qs_jax.models import arrays_by_path
from qs_jax.token_set import token_set
from tests.oracle import Decoder, Outcome

SPECIAL_IDS = (7, 11)
CLOSE = 1e-4
"""Log-probabilities: float32 against the oracle's float64."""
DECIDED = 3e-5
"""A decision closer to its threshold than this (relative) may go either way in float32; such examples prove nothing."""
CLOSE_NARROW, DECIDED_NARROW = 0.04, 0.02
"""The same in bfloat16, whose eight bits are a step of 0.004 of every state. Measured off by 0.021 at most, in 18 runs
of two models whose logits' deviation is 0.9; programs that are fused differently differ by up to 0.009."""

_PER_ROW = ("tokens", "logprobs", "layers_run", "bits_read", "signal")


@dataclass
class Run:
    """What the engine did. Lists are per row; `slots` holds (layers, rows) after the prompt and after every chunk,
    `rows_held` how many rows the device held in every chunk, `rows_run` how many went through its segments."""

    session: Session
    tokens: list[list[int]]
    logprobs: list[list[float]]
    layers_run: list[list[int]]
    bits_read: list[list[int]]
    signal: list[list[float]]
    slots: list[np.ndarray] = field(default_factory=list)
    capacities: list[list[int]] = field(default_factory=list)
    rows_held: list[int] = field(default_factory=list)
    rows_run: list[np.ndarray] = field(default_factory=list)

    @property
    def prompt(self) -> Any:
        assert self.session.prefilled is not None
        return self.session.prefilled.trace


def request(
    model: Model,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    forced: Sequence[Sequence[int]] | None = None,
    chunk_size: int = 8,
    eos: Sequence[int] = (),
) -> Request:
    """Greedy and unadorned."""
    return Request(
        prompts=prompts,
        copies=1,
        max_new_tokens=new_tokens,
        eos_token_ids=eos,
        seeds=[(0, 0)] * len(prompts),
        sampling=Sampling.of(),
        chunk_size=chunk_size,
        policy=bind(
            policy,
            model.config,
            Means.of(model.network),
            special_ids=SPECIAL_IDS,
        ),
        forced=forced,
    )


def run(model: Model, policy: Policy, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> Run:
    """Through the engine."""
    session = Session(model.network, request(model, policy, prompts, new_tokens, **options))
    rows = range(len(prompts))
    result = Run(
        session, [[] for _ in rows], [[] for _ in rows], [[] for _ in rows], [[] for _ in rows], [[] for _ in rows]
    )
    with _watched(result), _validated(model.config, policy):
        for chosen in session.chunks():
            for row in rows:
                emitted = chosen.emitted[:, row]
                for name in _PER_ROW:
                    getattr(result, name)[row].extend(getattr(chosen, name)[emitted, row].tolist())
    assert session.prefilled is not None
    result.slots.insert(0, session.prefilled.filled)
    return result


def step_arguments(model: Model, policy: Policy, *, rows: int, capacity: int) -> tuple[Any, ...]:
    """What `decode_step` takes, with nothing in it: for programs that are looked at, not run."""
    asked, config, zeros = request(model, policy, [[0]] * rows, 1), model.config, jnp.zeros(rows, jnp.int32)
    state = DecodeState(
        tokens=zeros,
        positions=zeros,
        cache=tuple(allocate(config, rows, capacity, model.dtype) for _ in range(config.num_hidden_layers)),
        done=zeros > 0,
        remaining=zeros,
        noise=jax.random.split(jax.random.key(0), rows),
        seen=jnp.zeros((rows, 0), bool),
        entropy=zeros.astype(jnp.float32),
    )
    return model.network, state, zeros, Controls(asked.sampling, token_set(()), asked.policy)


@contextmanager
def _watched(result: Run) -> Iterator[None]:
    """Note each layer's slots and capacity after every chunk: the state is gone once the next chunk has it."""
    decode_chunk = sessions.decode_chunk

    def watching(*args: Any, **kwargs: Any) -> Any:
        state, chunk = decode_chunk(*args, **kwargs)
        result.slots.append(np.asarray([layer.lengths for layer in state.cache]))
        result.capacities.append([layer.capacity for layer in state.cache])
        result.rows_held.append(len(state.done))
        result.rows_run.append(np.asarray(chunk.work.rows_run))
        return state, chunk

    with mock.patch.object(sessions, "decode_chunk", watching):
        yield


@contextmanager
def _validated(config: ModelConfig, policy: Policy) -> Iterator[None]:
    """Every state that the device hands back keeps what it promises."""
    run_stage, decode_chunk = prefills.run_stage, sessions.decode_chunk
    # in a second piece of a prompt, too, halted tokens come after those that went on
    rising = policy.prompt_halting is None or policy.kv_rule == "drop"

    def staged(model: Any, active: Any, resting: Any, *args: Any, **kwargs: Any) -> Any:
        # a group as it comes out of a stage still holds those that a decision takes away
        if isinstance(active, Tokens):
            active.validate(active=True)
        if resting is not None:
            resting.validate(active=False)
        staged = run_stage(model, active, resting, *args, **kwargs)
        for layer in staged.cache:
            layer.validate(rising=rising)
        return staged

    def checked(model: Any, state: DecodeState, *args: Any) -> Any:
        state.validate(config, rising=rising)
        state, rest = decode_chunk(model, state, *args)
        state.validate(config, rising=rising)
        return state, rest

    with (
        mock.patch.object(prefills, "run_stage", staged),
        mock.patch.object(sessions, "decode_chunk", checked),
    ):
        yield


def imagine(
    model: Model,
    policy: Policy,
    prompt: Sequence[int],
    new_tokens: int,
    forced: Sequence[int] = (),
    *,
    piece: int = 1024,
) -> Outcome:
    """Through the oracle."""
    whole = most_bits(model.network)
    decoder = Decoder(
        model.config, _kernels(model), policy, _uniform, special_ids=SPECIAL_IDS, piece=piece, whole=whole
    )
    return decoder.run(prompt, new_tokens, forced)


def imagine_rounds(
    model: Model, prompt: Sequence[int], new_tokens: int, propose: Callable[[list[int]], list[int]]
) -> tuple[list[int], list[int], float]:
    """The oracle's rounds: tokens, right drafts by round, and the gap between the best logits where it was least."""
    decoder = Decoder(model.config, _kernels(model), Policy.off(), _uniform, special_ids=SPECIAL_IDS)
    return *decoder.rounds(prompt, new_tokens, propose), decoder.margin


def assert_same(engine: Run, row: int, oracle: Outcome, *, narrow: bool = False) -> None:
    """Every decision equal, every number close."""
    steps, trace = oracle.steps, engine.prompt
    assert engine.tokens[row] == [step.token for step in steps]
    assert engine.layers_run[row] == [step.layers_run for step in steps]
    assert engine.bits_read[row][1:] == [step.bits_read for step in steps[1:]]
    assert trace.layers_run[row].tolist() == oracle.prompt_layers_run
    assert trace.fused_with[row].tolist() == oracle.fused_with
    rtol, atol = (DECIDED_NARROW, 0.0) if narrow else (1e-3, 1e-4)
    np.testing.assert_allclose(trace.signal[row], oracle.prompt_signal, rtol=rtol, atol=atol)
    np.testing.assert_allclose(engine.signal[row], [step.signal for step in steps], rtol=rtol, atol=atol)
    close = CLOSE_NARROW if narrow else CLOSE
    np.testing.assert_allclose(engine.logprobs[row], [step.logprob for step in steps], rtol=0, atol=close)


def assert_same_slots(engine: Run, oracle: Outcome, chunk_size: int) -> None:
    """A lone row's slots per layer, after the prompt and after every chunk; none beyond what there is room for."""
    prompt, *chunks = engine.slots
    assert prompt[:, 0].tolist() == oracle.prompt_slots
    for number, (slots, capacity) in enumerate(zip(chunks, engine.capacities, strict=True), start=1):
        last = min(number * chunk_size, len(oracle.steps) - 1)
        assert slots[:, 0].tolist() == oracle.steps[last].slots
        assert (slots[:, 0] <= capacity).all()


def _uniform(place: int, token: int, layer: int) -> float:
    return float(_uniforms(layer)[place, token])


@cache
def _uniforms(layer: int) -> np.ndarray:
    """The random signal of every place and token id that tests use."""
    places, tokens = jnp.meshgrid(jnp.arange(128), jnp.arange(512), indexing="ij")
    return np.asarray(signals.uniform(places, tokens, layer))


_KERNELS: dict[str, dict[int, dict[str, np.ndarray]]] = {}


def _kernels(model: Model) -> Mapping[int, Mapping[str, np.ndarray]]:
    """The model's weights by precision, as plain arrays."""
    if model.name not in _KERNELS:
        arrays = arrays_by_path(model.network)

        def plain(bits: int) -> dict[str, np.ndarray]:
            return {path: np.asarray(x.dequantise(bits) if is_nested(x) else x) for path, x in arrays.items()}

        _KERNELS[model.name] = {bits: plain(bits) for bits in (BITS if has_planes(model.network) else (8,))}
    return _KERNELS[model.name]
