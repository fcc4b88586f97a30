"""How to generate: Hugging Face's names, checked once. Imports nothing heavy, so the command line can show defaults."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from qs_jax.adaptive.policy import Policy
from qs_jax.choices import BITS, DRAFTS, is_draft, is_number, is_whole
from qs_jax.errors import GenerationError
from qs_jax.generation_defaults import SAMPLING

_LEAST, _MOST = 1e-10, 1e10
"""Logits divided by such a temperature and such a penalty are still float32 numbers."""


class GenerationOptions(TypedDict, total=False):
    """What `generate` and `stream` take by name: the fields of `GenerationConfig`, which says what they mean."""

    policy: Policy | str | Path
    bits: int | None
    max_new_tokens: int
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str]
    num_return_sequences: int
    seed: int | Sequence[int] | None
    use_model_defaults: bool
    exact: bool
    draft: str | Sequence[str]


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate; names and meanings are Hugging Face's.

    What is None is not said: of `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`,
    `eos_token_id` and `pad_token_id` the model's `generation_config.json` may then speak, as in Hugging Face, and where
    it does not, greedy decoding without penalty counts, and the ids of the model's `config.json`.

    Attributes:
        policy: which mechanisms are on: a `Policy`, the name of one (`off` is the dense model, `paper`, `balanced`), or
            a file that `Policy.save` or `qs-jax calibrate` wrote, which is read here and becomes a `Policy`.
        bits: 8, 4 or 2, the precision at which every token reads Matryoshka weights; None for all their bits.
        max_new_tokens: most tokens to produce per row.
        do_sample: draw from the distribution instead of taking the most likely token.
        temperature: divides the logits before sampling; 1e-10 to 1e10, 1 changes nothing.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the most likely tokens that together reach this probability; 1 for all.
        min_p: leave out tokens less likely than this fraction of the most likely one; 0 for none.
        repetition_penalty: divides (or, if negative, multiplies) the logits of tokens already in the row; 1 for none.
        eos_token_id: id or ids that end a row; an empty list for none.
        pad_token_id: fills `GenerateOutput.sequences` behind rows that ended.
        stop_strings: texts that end a row once a new token completes them, as in Hugging Face: they may lie over
            several tokens, begin in the prompt, and name special tokens (`<|im_end|>`). The text keeps them.
        num_return_sequences: sequences per prompt; more than one needs sampling.
        seed: a number, or one per prompt. A row's tokens depend on its own prompt, seed and sequence number only, so
            equal prompts with equal seeds give equal text. None draws one and reports it in `GenerateOutput.seeds`.
        use_model_defaults: whether the model's `generation_config.json` may speak at all.
        exact: the dense model decides on every token, and drafts only let it decide on several at once. The text is
            that of plain decoding with the same settings and seed, but for rounding (docs/method.md).
        draft: what proposes tokens in exact mode: `lookup` (what followed the last tokens where they occurred before),
            `bits:8`, `bits:4` or `bits:2` (Matryoshka codes, at fewer bits than the model is read at), `policy` (the
            model under the policy), `lens` or `lens:LAYER` (early exit through the model's lens), or a list, cheapest
            first, in which each `bits:N` checks what stands before it. `auto` looks up where that pays, tries
            codes at fewer bits where the model has them, and decodes plainly where neither pays.

    Raises:
        GenerationError: a value out of range, or a setting of sampling where decoding is sure to be greedy.
        PolicyError: no such policy, or a file that holds none.

    Example:
        >>> chat = GenerationConfig(max_new_tokens=200, do_sample=True, temperature=0.7)
        >>> qs_jax.generate(model, prompts, chat, seed=3)
    """

    policy: Policy | str | Path = "off"
    bits: int | None = None
    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] = ()
    num_return_sequences: int = 1
    seed: int | Sequence[int] | None = None
    use_model_defaults: bool = True
    exact: bool = False
    draft: str | Sequence[str] = "auto"

    @classmethod
    def of(cls, config: "GenerationConfig | None" = None, **overrides: Any) -> "GenerationConfig":
        """A configuration, or the default one, with some fields replaced. None leaves a field that cannot be None.

        Raises:
            GenerationError: an unknown name (the known ones are listed), or what the constructor refuses.
        """
        config = _DEFAULT if config is None else config
        if not isinstance(config, cls):
            raise GenerationError(f"config is {config!r}, expected a GenerationConfig; settings are given by name")
        known = {field.name: field.default for field in fields(cls)}
        if unknown := sorted(set(overrides) - set(known)):
            raise GenerationError(f"unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
        said = {name: value for name, value in overrides.items() if value is not None or known[name] is None}
        return replace(config, **said) if said else config

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", Policy.of(self.policy))
        for name, value in (("stop_strings", self.stop_strings), ("eos_token_id", self.eos_token_id)):
            if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.stop_strings, str):
            object.__setattr__(self, "stop_strings", (self.stop_strings,))
        self._check_drafts()
        self._require("bits", self.bits in (None, *BITS), "one of " + ", ".join(map(str, BITS)))
        self._require("max_new_tokens", is_whole(self.max_new_tokens, 1), "a whole number from 1")
        self._require("num_return_sequences", is_whole(self.num_return_sequences, 1), "a whole number from 1")
        self._require_said("top_k", lambda k: is_whole(k, 0), "a whole number from 0 (0 for no limit)")
        self._require_said(
            "temperature",
            lambda temperature: is_number(temperature, _LEAST, _MOST),
            f"a number from {_LEAST:g} to {_MOST:g} (for greedy decoding set do_sample=False)",
        )
        self._require_said("top_p", lambda share: is_number(share, 0, 1) and share > 0, "above 0 and at most 1")
        self._require_said("min_p", lambda share: is_number(share, 0, 1), "from 0 to 1")
        between = f"a number from {_LEAST:g} to {_MOST:g}"
        self._require_said("repetition_penalty", lambda penalty: is_number(penalty, _LEAST, _MOST), between)
        self._require_said("eos_token_id", _are_ids, "a token id or a list of them")
        self._require_said("pad_token_id", lambda token: is_whole(token, 0), "a token id")
        self._require("use_model_defaults", isinstance(self.use_model_defaults, bool), "true or false")
        self._require_said("do_sample", lambda value: isinstance(value, bool), "true or false")
        strings = isinstance(self.stop_strings, tuple) and all(isinstance(s, str) and s for s in self.stop_strings)
        self._require("stop_strings", strings, "non-empty strings")
        if self.do_sample is False or (self.do_sample is None and not self.use_model_defaults):
            self.refuse_sampling()

    def _check_drafts(self) -> None:
        self._require("exact", isinstance(self.exact, bool), "true or false")
        several = isinstance(self.draft, Sequence) and not isinstance(self.draft, str)
        names: list[Any] = list(self.draft) if several else [self.draft]
        self._require(
            "draft", bool(names) and all(map(is_draft, names)), f"one of {', '.join(DRAFTS)}, or a list of them"
        )
        checking = [name for name in names[1:] if name.startswith("bits:")]
        bits = [name for name in names if name.startswith("bits:")]
        in_order = len(checking) == len(names) - 1 and bits == sorted(set(bits))
        self._require(
            "draft",
            len(names) == 1 or (in_order and names[0] != "auto"),
            "a cascade, cheapest first: any draft but auto, then bits:2, bits:4 or bits:8, bits rising",
        )
        if not self.exact and self.draft != "auto":
            raise GenerationError("draft needs exact=True (--exact); plain decoding drafts nothing")
        object.__setattr__(self, "draft", names[0] if len(names) == 1 else tuple(names))

    def refuse_sampling(self) -> None:
        """Decoding is greedy, whatever else is said.

        Raises:
            GenerationError: a setting that only sampling would heed.
        """
        said = any(getattr(self, name) not in (None, neutral) for name, neutral in SAMPLING.items())
        if said or self.num_return_sequences != 1:
            names = "temperature, top_k, top_p, min_p and num_return_sequences"
            raise GenerationError(f"{names} need do_sample=True; greedy decoding would ignore them")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise GenerationError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def _require_said(self, name: str, holds: Callable[[Any], bool], expected: str) -> None:
        self._require(name, getattr(self, name) is None or holds(getattr(self, name)), expected)


@dataclass(frozen=True)
class GenerationSettings:
    """The settings in force of a call on a model: nothing is left open. Meanings are those of `GenerationConfig`.

    `bits` is None where weights are read as they are stored, and `seed` where one is to be drawn.
    `from_generation_config` names the settings that the model's file gave.
    """

    policy: Policy
    bits: int | None
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    stop_strings: tuple[str, ...]
    num_return_sequences: int
    seed: int | Sequence[int] | None
    exact: bool
    draft: tuple[str, ...]
    from_generation_config: tuple[str, ...]


def _are_ids(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, tuple) and all(is_whole(token) for token in value))


_DEFAULT = GenerationConfig()
