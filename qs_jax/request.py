"""From what a user asks to what the engine runs: prompts tokenised, and all that cannot work refused."""

import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from qs_jax.adaptive.binding import BoundPolicy, bind
from qs_jax.adaptive.kv_rules import Means
from qs_jax.adaptive.policy import Policy
from qs_jax.choices import is_whole
from qs_jax.drafting import drafting
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.session import Request
from qs_jax.errors import GenerationError, TokenizerError
from qs_jax.generation_config import GenerationSettings
from qs_jax.hosts import agreed
from qs_jax.model import Model
from qs_jax.tokenizer import Message

_LONGEST_TOKEN = 256
"""Characters that no vocabulary's token exceeds: longer prompts are refused before they are tokenised."""

Prompt = str | Sequence[int] | Sequence[Message]


def prepare(model: Model, prompts: Prompt | Sequence[Prompt], asked: GenerationSettings, *, chunk_size: int) -> Request:
    """Tokenise and check a request against the model.

    Raises:
        GenerationError: no prompt, an empty one, ids outside the vocabulary, or prompt and new tokens together
            beyond the model's context.
        TokenizerError: the model has no tokenizer but text or stop strings were given.
    """
    if asked.stop_strings and model.tokenizer is None:
        raise TokenizerError(f"stop_strings need a tokenizer: {model.no_tokenizer}")
    ids = [_encode(model, prompt) for prompt in _as_batch(prompts)]
    limit = model.config.max_position_embeddings
    for number, prompt in enumerate(ids, start=1):
        if len(prompt) + asked.max_new_tokens > limit:
            raise GenerationError(
                f"prompt {number} has {len(prompt)} tokens and max_new_tokens is {asked.max_new_tokens}, together "
                f"more than the model's context of {limit}; shorten the prompt or lower max_new_tokens"
            )
    seeds = _seeds(asked.seed, len(ids))
    return Request(
        prompts=ids,
        copies=asked.num_return_sequences,
        max_new_tokens=asked.max_new_tokens,
        eos_token_ids=_checked(asked.eos_token_ids, model.config.vocab_size, "eos_token_id"),
        seeds=[(seed, copy) for seed in seeds for copy in range(asked.num_return_sequences)],
        sampling=Sampling.of(
            do_sample=asked.do_sample,
            temperature=asked.temperature,
            top_k=min(asked.top_k, model.config.vocab_size),
            top_p=asked.top_p,
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
        ),
        chunk_size=chunk_size,
        policy=bind_policy(model, Policy.off() if asked.exact else asked.policy),
        drafting=drafting(model, asked, partial(bind_policy, model)) if asked.exact else None,
    )


def bind_policy(model: Model, policy: Policy) -> BoundPolicy:
    """Fit a policy to a model: its depth, its special tokens, and whether it has Matryoshka weights and a lens.

    Raises:
        PolicyError: the policy asks for what the model does not have.
    """
    return bind(
        policy,
        model.config,
        Means.of(model.network),
        special_ids=model.special_ids,
    )


def _as_batch(prompts: Any) -> list[Any]:
    """A batch from a batch or a single prompt of any kind."""
    if isinstance(prompts, str):
        return [prompts]
    batch = list(prompts)
    if not batch:
        raise GenerationError("there is no prompt; give at least one")
    return [batch] if is_whole(batch[0]) or isinstance(batch[0], Mapping) else batch


def _encode(model: Model, prompt: Any) -> list[int]:
    if not isinstance(prompt, str):
        prompt = list(prompt)
    elif not prompt.strip():
        raise GenerationError("a prompt is empty; give at least one word, or token ids")
    elif len(prompt) > _LONGEST_TOKEN * model.config.max_position_embeddings:
        raise GenerationError(
            f"a prompt has {len(prompt)} characters, more than the model's context of "
            f"{model.config.max_position_embeddings} tokens can hold; shorten it"
        )
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
        if model.tokenizer is None:
            raise TokenizerError(model.no_tokenizer)
        tokenizer = model.tokenizer
        prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
    if not prompt:
        raise GenerationError("a prompt has no tokens; give at least one")
    return list(_checked(prompt, model.config.vocab_size, "a prompt's token id"))


def _checked(ids: Sequence[Any], vocab_size: int, what: str) -> tuple[int, ...]:
    for token in ids:
        if not is_whole(token, 0) or token >= vocab_size:
            raise GenerationError(f"{what} is {token!r}, expected a whole number from 0 to {vocab_size - 1}")
    return tuple(int(token) for token in ids)


def _seeds(asked: int | Sequence[int] | None, prompts: int) -> list[int]:
    seed = agreed(secrets.randbits(31)) if asked is None else asked
    seeds = [seed] * prompts if isinstance(seed, int) else list(seed)
    if len(seeds) != prompts or not all(is_whole(s, 0) and s < 2**31 for s in seeds):
        raise GenerationError(f"seed is {asked!r}, expected one number from 0 to {2**31 - 1}, or one per prompt")
    return seeds
