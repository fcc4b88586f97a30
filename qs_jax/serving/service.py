"""A model as it is served: by which names it and its policies are known, and requests made of what clients ask."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.policy import Policy
from qs_jax.choices import BITS, DRAFTS
from qs_jax.console import aside
from qs_jax.engine.session import Request
from qs_jax.errors import GenerationError, QsJaxError, TokenizerError
from qs_jax.kernels import has_planes
from qs_jax.model import Model
from qs_jax.request import bind_policy, prepare
from qs_jax.serving.answer import Answer
from qs_jax.serving.bodies import Asked, Prompt, read_body
from qs_jax.serving.errors import refused, too_long
from qs_jax.serving.options import ServeError, ServeOptions
from qs_jax.serving.scheduler import Event, Job, Kind, RowAsked, Scheduler
from qs_jax.settings import in_force

_CONTEXT = 2048
_CHARACTERS_A_TOKEN = 256
_PRESETS = ("off", "balanced", "paper")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class Service:
    """Everything behind the HTTP faces; `scheduler` runs what `submit` is given."""

    def __init__(self, model: Model, options: ServeOptions):
        self.model, self.options = model, options
        self.name = options.name or Path(model.name).name or "model"
        limit = model.config.max_position_embeddings
        self.context = min(limit, options.context or _CONTEXT)
        self.policies = served_policies(model, options.policies)
        self.scheduler = Scheduler(model, places=options.places, queue=options.queue)

    @property
    def _sampled(self) -> dict[str, Any]:
        """OpenAI's default is to sample at temperature 1; the model's own file may say at which else."""
        own = {name: value for name, value in self.model.defaults.items() if name in _SAMPLING}
        return {"temperature": 1.0, **own}

    def read(self, raw: dict[str, Any], *, chat: bool) -> Asked:
        """Raises:
        ApiError: see `read_body`.
        """
        return read_body(raw, chat=chat, names=(self.name,), policies=self.policies, sampled=self._sampled)

    def rows(self, asked: Asked) -> list[RowAsked]:
        """The rows of a request, tokenised and checked.

        Raises:
            ApiError: they are more than there is room for, or too long.
            GenerationError, PolicyError, TokenizerError: what the engine refuses.
        """
        if (count := len(asked.prompts) * asked.sequences) > self.scheduler.room:
            most = self.scheduler.room
            raise refused(f"{count} answers are asked for, and the server holds {most}; ask for fewer", "n")
        if asked.top and asked.settings["exact"]:
            raise refused("the most likely tokens are not known in exact mode; leave out one of both", "exact")
        return [row for prompt in asked.prompts for row in self._rows_of(asked, prompt)]

    def submit(self, rows: Sequence[RowAsked], tell: Callable[[Event], None]) -> Job:
        """Raises:
        ApiError: the queue is full.
        """
        return self.scheduler.submit(rows, tell)

    def _rows_of(self, asked: Asked, prompt: Prompt) -> list[RowAsked]:
        what = "messages" if asked.chat else "prompt"
        ids = self._encoded(prompt, what)
        left = self.context - len(ids)
        wanted = asked.max_new_tokens or max(left, 1)
        if wanted > left:
            raise too_long(
                f"{what} of {len(ids)} tokens and max_tokens of {wanted} are together more than this server's context "
                f"of {self.context}; shorten one of them",
                what,
            )
        settings = in_force(asked.config(wanted), self.model.defaults, self.model.config)
        network = self.model.network_at(settings.bits)
        request = replace(
            prepare(self.model, [ids], settings, chunk_size=self.options.chunk), keep_logits=bool(asked.top)
        )
        kind = Kind(
            policy=settings.policy,
            bits=settings.bits,
            eos=tuple(request.eos_token_ids),
            penalises=request.sampling.penalise,
            keeps_logits=request.keep_logits,
            exact=settings.exact,
        )
        (seed, _) = request.seeds[0]
        bits = float(settings.bits or Costs.of(network).bits)
        return [
            RowAsked(replace(request, seeds=[(seed, copy)]), kind, self._answer(asked, request, bits))
            for copy in range(asked.sequences)
        ]

    def _answer(self, asked: Asked, request: Request, bits: float) -> Answer:
        return Answer(
            self.model,
            request.prompts[0],
            eos=request.eos_token_ids,
            max_new_tokens=request.max_new_tokens,
            bits=bits,
            stops=asked.stops,
            top=asked.top or 0,
            tells_prompt=asked.spent,
        )

    def _encoded(self, prompt: Prompt, what: str) -> list[int]:
        if isinstance(prompt, tuple):
            return list(prompt)
        length = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)
        if length > _CHARACTERS_A_TOKEN * self.context:
            raise too_long(f"{what} of {length} characters is more than {self.context} tokens; shorten it", what)
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise TokenizerError(self.model.no_tokenizer)
        return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)

    def described(self) -> dict[str, Any]:
        """What a client may ask of this model, beside OpenAI's fields."""
        model = self.model
        codes = has_planes(model.network)
        return {
            "depth": model.config.num_hidden_layers,
            "context": self.context,
            "vocabulary": model.config.vocab_size,
            "dtype": str(model.dtype),
            "policies": {name: policy.name for name, policy in self.policies.items()},
            "bits": list(BITS) if codes else [],
            "drafts": [name for name in DRAFTS if codes or not name.startswith("bits:")],
            "chat": model.tokenizer is not None and model.tokenizer.has_chat_template,
        }


def served_policies(model: Model, asked: Sequence[str]) -> dict[str, Policy]:
    """The policies that clients may name: presets, those in the model's folder, and `NAME=FILE` of the command line.

    A client's text is a key here and never a path. What the model has no means for is left out; asked for by name, it
    is an error.

    Raises:
        ServeError: not of that form, or a name twice.
        PolicyError: a file that holds no policy, or one that the model has no means for.
    """
    found = {name: Policy.of(name) for name in _PRESETS}
    folder = Path(model.name)
    for file in sorted(folder.glob("policy*.json")) if folder.is_dir() else ():
        name = "calibrated" if file.stem == "policy" else file.stem.removeprefix("policy").strip("-_.") or file.stem
        try:
            found[name] = Policy.of(file)
        except QsJaxError as error:
            aside(f"note: {error}; not served")
    served = {name: policy for name, policy in found.items() if _fits(model, name, policy)}
    for text in asked:
        name, equals, file = text.partition("=")
        if not equals or not name or not file or name in served:
            raise ServeError(f"--policy {text} is not NAME=FILE with a name that is free; served: {', '.join(served)}")
        served[name] = Policy.of(Path(file))
        bind_policy(model, served[name])
    return served


def _fits(model: Model, name: str, policy: Policy) -> bool:
    try:
        bind_policy(model, policy)
    except GenerationError as error:
        aside(f"note: policy {name} is not served: {error}")
        return False
    return True
