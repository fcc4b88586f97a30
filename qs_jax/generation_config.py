"""How to generate: Hugging Face's names, checked once. Imports nothing heavy, so the command line can show defaults."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qs_jax.adaptive.policy import Policy
from qs_jax.choices import BITS, is_number, is_whole
from qs_jax.errors import GenerationError

_LEAST, _MOST = 1e-10, 1e10
"""Logits divided by such a temperature and such a penalty are still float32 numbers."""


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate; names and meanings are Hugging Face's.

    Attributes:
        policy: which mechanisms are on: a `Policy`, the name of one (`off` is the dense model, `paper`, `balanced`), or
            a file that `Policy.save` or `qs-jax calibrate` wrote.
        bits: 8, 4 or 2, the precision at which every token reads Matryoshka weights; None for all their bits.
        max_new_tokens: most tokens to produce per row.
        do_sample: draw from the distribution instead of taking the most likely token.
        temperature: divides the logits before sampling; above 0.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the most likely tokens that together reach this probability; 1 for all.
        min_p: leave out tokens less likely than this fraction of the most likely one; 0 for none.
        repetition_penalty: divides (or, if negative, multiplies) the logits of tokens already in the row; 1 for none.
        eos_token_id: id or ids that end a row; None for the model's own, an empty list for none.
        pad_token_id: fills `GenerateOutput.sequences` behind rows that ended; None for the model's own.
        stop_strings: texts that end a row once a new token completes them, as in Hugging Face: they may lie over
            several tokens, begin in the prompt, and name special tokens (`<|im_end|>`). The text keeps them.
        num_return_sequences: sequences per prompt; needs `do_sample`.
        seed: a number, or one per prompt. A row's tokens depend on its own prompt, seed and sequence number only, so
            equal prompts with equal seeds give equal text. None draws one and reports it in `GenerateOutput.seeds`.
        use_model_defaults: what is not asked for is taken from the model's `generation_config.json`, as Hugging Face
            does: `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, and the ids of end and
            padding.
    """

    policy: Policy | str | Path = "off"
    bits: int | None = None
    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: Sequence[str] = ()
    num_return_sequences: int = 1
    seed: int | Sequence[int] | None = None
    use_model_defaults: bool = True

    @classmethod
    def of(cls, **settings: Any) -> "GenerationConfig":
        """Like the constructor, but an unknown name is a `GenerationError` that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise GenerationError(f"unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
        if isinstance(settings.get("stop_strings"), str):
            settings["stop_strings"] = (settings["stop_strings"],)
        return cls(**{**settings, "stop_strings": tuple(settings.get("stop_strings") or ())})

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", Policy.of(self.policy))
        self._require("bits", self.bits in (None, *BITS), "one of " + ", ".join(map(str, BITS)))
        self._require("max_new_tokens", is_whole(self.max_new_tokens, 1), "a whole number from 1")
        self._require("num_return_sequences", is_whole(self.num_return_sequences, 1), "a whole number from 1")
        self._require("top_k", is_whole(self.top_k, 0), "a whole number from 0 (0 for no limit)")
        self._require(
            "temperature",
            is_number(self.temperature, _LEAST, _MOST),
            f"a number from {_LEAST:g} to {_MOST:g} (for greedy decoding set do_sample=False)",
        )
        self._require("top_p", is_number(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1")
        self._require("min_p", is_number(self.min_p, 0, 1), "from 0 to 1")
        penalty = self.repetition_penalty
        between = is_number(penalty, _LEAST, _MOST)
        self._require("repetition_penalty", between, f"a number from {_LEAST:g} to {_MOST:g}")
        self._require("eos_token_id", _are_ids(self.eos_token_id), "a token id or a list of them")
        pad = self.pad_token_id
        self._require("pad_token_id", pad is None or is_whole(pad, 0), "a token id")
        self._require("use_model_defaults", isinstance(self.use_model_defaults, bool), "true or false")
        self._require("do_sample", isinstance(self.do_sample, bool), "true or false")
        self._require("stop_strings", all(isinstance(s, str) and s for s in self.stop_strings), "non-empty strings")
        if not self.do_sample:
            sampling = (self.temperature, self.top_k, self.top_p, self.min_p, self.num_return_sequences)
            if sampling != (1.0, 0, 1.0, 0.0, 1):
                names = "temperature, top_k, top_p, min_p and num_return_sequences"
                raise GenerationError(f"{names} need do_sample=True; greedy decoding would ignore them")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise GenerationError(f"{name} is {getattr(self, name)!r}, expected {expected}")


def _are_ids(value: Any) -> bool:
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    return value is None or is_whole(value) or (several and all(is_whole(token) for token in value))
