"""The model `qs_jax` of lm-evaluation-harness (extra `lm-eval`). Importing this module registers it there.

Released harnesses look for models in their own list alone, so that somebody has to import this first: the command
`qs-lm-eval`, which is `lm_eval` with the model in its list, or a program of one's own that calls `simple_evaluate`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qs_jax.adaptive.policy import Policy
from qs_jax.choices import is_whole
from qs_jax.engine.stopping import StopStrings
from qs_jax.errors import EvaluationError, GenerationError, TokenizerError
from qs_jax.evaluation.continuations import Continuation, score_continuations
from qs_jax.evaluation.windows import start_token
from qs_jax.generation import generate, not_finite
from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.request import bind_policy
from qs_jax.tokenizer import Tokenizer

_AUTO_BATCH = 16
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class QsJaxLM(TemplateLM):
    """Scores and generates as the harness's own `hf` model does, with the engine's mechanisms on or off.

    Args:
        pretrained: what `qs_jax.load` takes, or what it returned.
        policy: `off`, `paper`, `balanced`, or a policy file.
        bits: 8, 4 or 2, at which Matryoshka weights are read.
        exact: generate in exact mode, `draft` proposing. Likelihoods are then the dense model's.
        dtype: of the weights; None or "auto" for float32 on CPU and bfloat16 elsewhere.
        revision: branch, tag or commit of a hub id.
        batch_size: rows that run together; "auto" for 16.
        max_length: tokens that a context and its continuation may have; None for the model's context.
        max_gen_toks: most tokens to generate where a task does not say.
        add_bos_token: whether texts begin with the model's special tokens; None as its tokenizer has it.
        prefix_token_id: what stands before a text that has no context; None for the token that starts a text.
        seed: of sampled text; the request's number is added.
        device, max_batch_size: what the harness passes to every model. JAX chooses the device (JAX_PLATFORMS).

    Raises:
        GenerationError: an argument that is unknown or out of range.
        TokenizerError: the model has no tokenizer.
        QsJaxError: as `qs_jax.load`.
    """

    def __init__(
        self,
        pretrained: str | Path | Model = "",
        *,
        policy: Policy | str | Path = "off",
        bits: int | None = None,
        exact: bool = False,
        draft: str = "auto",
        dtype: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown or not pretrained:
            what = f"unknown: {', '.join(unknown)}" if unknown else "pretrained is missing"
            raise GenerationError(
                f"--model_args: {what}; known: pretrained, policy, bits, exact, draft, dtype, revision, max_length, "
                "max_gen_toks, add_bos_token, prefix_token_id, seed"
            )
        if not isinstance(pretrained, Model):
            pretrained = load(pretrained, dtype=None if dtype == "auto" else dtype, revision=revision)
        self.model, self.bits, self.seed = pretrained, bits, seed
        self.model.network_at(bits)
        self.policy = Policy.of(policy)
        self.drafting = {"exact": True, "draft": draft} if exact else {}
        self.batch_size = _batch(batch_size)
        self.max_length = _within(max_length, self.model)
        self.max_gen_toks, self.add_bos_token = max_gen_toks, add_bos_token
        self._prefix, self._spent = prefix_token_id, Counter[str]()
        self._bound = bind_policy(self.model, Policy.off() if exact else self.policy)
        self.tokenizer = cast(Any, _tokenizer(self.model))

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        own = self._tokenizer.eos_id
        return start_token(self.model) if own is None else own

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        own = [token for token in (self._prefix, self._tokenizer.bos_id) if token is not None]
        return own[0] if own else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The model's, as a name of a file may have it."""
        return self.model.name.replace("/", "__")

    @property
    def _tokenizer(self) -> Tokenizer:
        return cast(Tokenizer, self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with the prefix token, as chat templates write it, gets no other."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        starts = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
        if add_special_tokens is None and starts and string.startswith(starts):
            special = False
        ids = self._tokenizer.encode(string, special=special is not False)
        start = self._tokenizer.bos_id
        return [start, *ids] if special and start is not None and ids[:1] != [start] else ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(tokens, special=not skip_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. A template that refuses it may be one without a system's role: then without that."""
        unfinished = not add_generation_prompt
        try:
            return self._tokenizer.render_chat(chat_history, unfinished=unfinished)
        except TokenizerError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            return self._tokenizer.render_chat(others, unfinished=unfinished)

    def get_model_info(self) -> dict[str, Any]:
        """What goes beside the harness's results: settings, and what was executed and saved."""
        return {
            "model_dtype": str(self.model.dtype),
            "policy": self.policy.to_json(),
            "bits": self.bits,
            **self.drafting,
            "spent": self.spent,
        }

    @property
    def spent(self) -> dict[str, float]:
        """What all requests so far took, beside the dense model's, and the shares saved."""
        totals = dict(self._spent)
        shares = {"flops_reduction": "flops", "bytes_reduction": "weight_bytes", "slots_reduction": "kv_slots"}
        saved = {name: 1 - totals[of] / totals[f"{of}_off"] for name, of in shares.items() if totals}
        return {**totals, **saved}

    def _count(self, ledger: Mapping[str, float]) -> None:
        names = ("flops", "flops_off", "weight_bytes", "weight_bytes_off", "kv_slots", "kv_slots_off")
        self._spent.update({name: int(ledger[name]) for name in names})

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and whether it is the greedy text, for (what to cache it under or None, context, tokens)."""
        asked = [Continuation.fitted(context, tokens, self.max_length) for _, context, tokens in requests]
        with tqdm(total=len(asked), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:

            def advance(done: int = 1, *, total: int | None = None) -> None:
                bar.update(done)

            scores, ledger = score_continuations(
                self.model, asked, self._bound, batch=self.batch_size, bits=self.bits, advance=advance
            )
        self._count(ledger.to_json())
        answers = [(score.logprob, score.greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each in windows of the model's context of which none overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(_arguments(request)[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first stop sequence."""
        found = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for settings, numbers in self._alike(requests):
                texts = self._generated([_arguments(requests[number])[0] for number in numbers], settings, numbers)
                for number, text in zip(dict.fromkeys(numbers), texts, strict=False):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(set(numbers)))
        return found

    def _alike(self, requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Numbers of requests with the same settings, a batch at a time, the longest contexts first; a last batch is
        filled up with repeats, as another number of rows would be another program."""
        by_settings = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[json.dumps(_arguments(request)[1], sort_keys=True, default=str)].append(number)
        for numbers in by_settings.values():
            numbers.sort(key=lambda number: -len(_arguments(requests[number])[0]))
            size = min(self.batch_size, len(numbers))
            for first in range(0, len(numbers), size):
                part = numbers[first : first + size]
                yield _arguments(requests[part[0]])[1], part + part[-1:] * (size - len(part))

    def _generated(self, contexts: Sequence[str], asked: Mapping[str, Any], numbers: Sequence[int]) -> list[str]:
        """A batch. The engine's stop strings may begin in the prompt, the harness's may not: where one could, rows run
        on behind it, and are cut here."""
        settings: dict[str, Any] = {**normalize_gen_kwargs(dict(asked), self.max_gen_toks)}
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = [stop for stop in handle_stop_sequences(settings.pop("until"), eos=end) if stop]
        longest = settings.pop("max_gen_toks")
        if longest >= self.max_length:
            raise GenerationError(
                f"max_gen_toks is {longest}, and the model's context {self.max_length} tokens; lower max_gen_toks"
            )
        prompts = [(self.tok_encode(text) or [self.prefix_token_id])[longest - self.max_length :] for text in contexts]
        if not settings["do_sample"] or settings.get("temperature") == 0:
            settings = {name: value for name, value in settings.items() if name not in _OF_SAMPLING}
            settings["do_sample"] = False
        output = generate(
            self.model,
            prompts,
            policy=self.policy,
            bits=self.bits,
            max_new_tokens=longest,
            stop_strings=[stop for stop in until if not any(self._may_begin(stop, prompt) for prompt in prompts)],
            seed=[self.seed + number for number in numbers],
            **{**self.drafting, **settings},
        )
        if "not_finite" in output.finish_reasons:
            raise EvaluationError(not_finite(self.model))
        self._count(output.ledger)
        return [self._cut(tokens, until) for tokens in output.tokens]

    def _may_begin(self, stop: str, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with what a stop sequence begins with."""
        end = self.tok_decode(prompt[-4 * len(stop) :], skip_special_tokens=False)
        return any(end.endswith(stop[:length]) for length in range(1, len(stop)))

    def _cut(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        """The text before the first stop sequence, which may be of special tokens and then is no text."""
        if until:
            watch = StopStrings(self._tokenizer, (), until)
            tokens = tokens[: next((n for n, token in enumerate(tokens, 1) if watch.push(token)), len(tokens))]
        return postprocess_generated_text(self.tok_decode(tokens), list(until), None)


register_model("qs_jax")(QsJaxLM)


def _arguments(request: Instance) -> tuple[Any, ...]:
    """A context and its continuation, a whole text, or a context and how to generate."""
    return cast(tuple[Any, ...], request.args)


def _batch(asked: int | str) -> int:
    if str(asked).startswith("auto"):
        return _AUTO_BATCH
    if not str(asked).isdigit() or int(asked) < 1:
        raise GenerationError(f"batch_size is {asked!r}, expected a whole number from 1, or auto")
    return int(asked)


def _within(asked: int | None, model: Model) -> int:
    """Most tokens of a context and its continuation."""
    limit = model.config.max_position_embeddings
    if asked is not None and not (is_whole(asked, 2) and asked <= limit):
        raise GenerationError(f"max_length is {asked!r}, expected a whole number from 2 to the model's {limit}")
    return asked or limit


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise TokenizerError(model.no_tokenizer)
    return model.tokenizer
