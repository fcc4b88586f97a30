"""From the names of drafts to what a round asks: bound to a model, and refused where the model lacks the means."""

import math
from collections.abc import Callable, Iterator

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.choices import BITS
from qs_jax.engine.drafts import Cascade, Lookup, Steps
from qs_jax.engine.exact import Draft
from qs_jax.engine.pacing import Drafting, Way
from qs_jax.errors import GenerationError
from qs_jax.generation_config import GenerationSettings
from qs_jax.kernels import has_planes, most_bits
from qs_jax.model import Model

_LOOKED_UP = (8, 4, 2)
"""Drafts a round among which `auto` chooses, where they cost nothing but a longer pass."""

_TRIED = 2
"""Drafts a round that `auto` tries where each is a step of its own: every other number is another program, and two
need be right least often."""

_FEWEST_BITS = 4
"""Of codes that `auto` tries: at two next to no draft is right."""

_BESIDE = 4
"""What a step takes beside reading weights, in bits of each: so fast it is hoped to be, as of wide layers it is."""

_NAMED = 4
"""Looked up a round where nobody chooses: more pay on text that repeats itself at length, fewer on any other."""

_RUN = 3
"""Drafts a round where each is a step of its own."""

_CHECKED = 6
"""Drafts a round of a cascade, whose own rounds have `_AHEAD`."""

_AHEAD = 3

_LENS_AT = 2 / 3
"""After which share of its layers generated tokens leave to the lens, where nobody says."""


def drafting(model: Model, asked: GenerationSettings, bind: Callable[[Policy], BoundPolicy]) -> Drafting:
    """How a request of exact mode drafts.

    Raises:
        GenerationError: a draft that needs what the model or the request lacks, or a cascade out of order.
    """
    names = asked.draft
    if "policy" not in names and asked.policy != Policy.off():
        raise GenerationError(
            f"exact mode decides by the dense model: policy {asked.policy.name} is at most a draft; "
            "give draft='policy' (--draft policy), or leave the policy out"
        )
    if names == ("auto",):
        looked_up = (Way("lookup", Lookup(), count) for count in _LOOKED_UP)
        return Drafting((*looked_up, *_coded(model, asked, bind(Policy.off()))), adapts=True)
    draft = _draft(names[0], model, asked, bind)
    for name in names[1:]:
        draft = Cascade(draft, _bits(name, model, asked), _AHEAD)
    count = _CHECKED if len(names) > 1 else _NAMED if names == ("lookup",) else _RUN
    return Drafting((Way(" → ".join(names), draft, count),))


def _coded(model: Model, asked: GenerationSettings, off: BoundPolicy) -> Iterator[Way]:
    """Ways that read codes at fewer bits, where the model has any."""
    most = asked.bits or most_bits(model.network)
    for bits in BITS if has_planes(model.network) else ():
        if _FEWEST_BITS <= bits < most:
            yield Way(f"bits:{bits}", Steps(off, bits), _TRIED, price=(bits + _BESIDE) / (most + _BESIDE))


def _draft(name: str, model: Model, asked: GenerationSettings, bind: Callable[[Policy], BoundPolicy]) -> Draft:
    kind, _, number = name.partition(":")
    if kind == "lookup":
        return Lookup()
    if kind == "bits":
        return Steps(bind(Policy.off()), _bits(name, model, asked))
    policy = asked.policy if kind == "policy" else _through_lens(model, int(number) if number else None)
    bound = bind(policy)
    if not bound.on_generated:
        raise GenerationError(
            f"policy {policy.name} does nothing on generated tokens, so that its drafts would cost what they save; "
            "give one with decode_halting or precision"
        )
    return Steps(bound)


def _bits(name: str, model: Model, asked: GenerationSettings) -> int:
    bits = int(name.partition(":")[2])
    if not has_planes(model.network):
        raise GenerationError(
            f"draft {name} needs Matryoshka codes, which {model.name} has not; "
            "make a model with both: qs-convert --quantize matryoshka --keep-dense"
        )
    if bits >= (asked.bits or most_bits(model.network)):
        raise GenerationError(
            f"draft {name} reads no fewer bits than the model it drafts for; lower it, or keep dense weights beside "
            "the codes: qs-convert --quantize matryoshka --keep-dense"
        )
    return bits


def _through_lens(model: Model, layer: int | None) -> Policy:
    """Generated tokens halt after so many layers, and the lens carries them on."""
    depth = model.config.num_hidden_layers
    if model.network.shortcuts is None:
        raise GenerationError(f"draft lens needs a lens, which {model.name} has not; fit one with qs-jax lens")
    layer = max(1, round(_LENS_AT * depth)) if layer is None else layer
    if not 0 < layer < depth:
        raise GenerationError(f"draft lens:{layer} is not between the layers of {model.name}: 1 to {depth - 1}")
    halting = Halting("relative_drift", math.inf, layers=(layer,))
    return Policy("lens", decode_halting=halting, kv_rule="affine", protect_first=0, protect_special=False)
