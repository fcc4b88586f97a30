"""The policy: which mechanisms are on, how they are built, and their thresholds.

A `Policy` is what people write, save and share: plain numbers, independent of any model where it leaves layers open.
Bound to a model (`qs_jax.adaptive.binding`) it becomes one pytree, in which what decides which programs are compiled is
static and thresholds are traced, so that changing one compiles nothing.

"After layer n" means that n blocks have run. Every threshold is neutral at 0: nothing is below it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from qs_jax.choices import BITS, is_number, is_whole
from qs_jax.errors import PolicyError
from qs_jax.files import write_whole

StateSignalName = Literal["relative_drift", "direction_drift", "raw_drift", "attention_update"]
SignalName = Literal[StateSignalName, "entropy", "previous_entropy", "random"]
KvRuleName = Literal["zero", "drop", "frozen", "affine", "direct", "shallow"]
Distance = Literal["cosine", "l2"]
PositionRule = Literal["last", "mean", "first"]
BitsSignalName = Literal["previous_entropy", "entropy", "random"]
Thresholds = float | tuple[float, ...]

FORMAT = 1


@dataclass(frozen=True)
class Halting:
    """When a token takes no further compute (paper: dynamic token halting).

    Attributes:
        signal: what is watched: `relative_drift` ‖h_l - h_{l-1}‖ / ‖h_{l-1}‖, `direction_drift` 1 - cosine,
            `raw_drift` the paper's ‖h_l - h_{l-1}‖, `attention_update` ‖attention's update‖ / ‖h_{l-1}‖, `entropy` of
            the model's own intermediate logits in bits (see `Probe`), `previous_entropy` of the output one step earlier
            (decode only, free), `random` a uniform number per token and layer (the baseline the others must beat).
        thresholds: a token halts where its signal is below; one for all layers or one per layer. 0 never halts,
            infinity always.
        layers: after which layers a token may halt; between them layers run or rest together. None: every `step`-th
            layer from the fraction `start` of the depth on. After the last but one a prompt token's halt saves no more
            than its keys and values of the last layer, if the K/V rule leaves none: the rest nobody runs.
        entropy_below: besides, the token's entropy must be below this many bits; None asks for no entropy.
        entropy_source: which entropy that is: `entropy` (the probe) or `previous_entropy` (decode only).
    """

    signal: SignalName = "relative_drift"
    thresholds: Thresholds = 0.0
    layers: tuple[int, ...] | None = None
    start: float = 0.5
    step: int = 1
    entropy_below: float | None = None
    entropy_source: Literal["entropy", "previous_entropy"] = "entropy"

    def __post_init__(self) -> None:
        _one_of("halting.signal", self.signal, get_args(SignalName))
        _one_of("halting.entropy_source", self.entropy_source, ("entropy", "previous_entropy"))
        _thresholds("halting.thresholds", self.thresholds)
        _layers("halting", self.layers, self.start, self.step)
        _require(
            self.entropy_below is None or is_number(self.entropy_below, 0),
            "halting.entropy_below",
            self.entropy_below,
            "a number of bits from 0, or null",
        )

    @property
    def sources(self) -> set[str]:
        """The signals it reads."""
        return {self.signal} | ({self.entropy_source} if self.entropy_below is not None else set())


@dataclass(frozen=True)
class Fusion:
    """When two neighbouring prompt tokens continue as one (paper: contextual token fusion).

    Attributes:
        distance: `cosine` 1 - cos(h_t, h_u), or `l2` the paper's ‖h_t - h_u‖.
        thresholds: a pair fuses where its distance is below; one for all layers or one per layer.
        layers: after which layers; None: every `step`-th from the fraction `start` of the depth on.
        position: the position of the fused token: its right token's, the floor of the pair's mean weighted by size, or
            its left token's.
        size_bias: add log(size) to its attention logits, so that it weighs as its members did (ToMe, arXiv 2210.09461).
    """

    distance: Distance = "cosine"
    thresholds: Thresholds = 0.0
    layers: tuple[int, ...] | None = None
    start: float = 0.5
    step: int = 2
    position: PositionRule = "last"
    size_bias: bool = False

    def __post_init__(self) -> None:
        _one_of("fusion.distance", self.distance, get_args(Distance))
        _one_of("fusion.position", self.position, get_args(PositionRule))
        _thresholds("fusion.thresholds", self.thresholds)
        _layers("fusion", self.layers, self.start, self.step)
        _require(isinstance(self.size_bias, bool), "fusion.size_bias", self.size_bias, "true or false")


@dataclass(frozen=True)
class Precision:
    """At how many bits a decoded token reads the weights (paper: adaptive Matryoshka quantization).

    Attributes:
        signal: `previous_entropy` in bits (free), `entropy` after layer `layer` in bits (see `Probe`), or `random`.
        two_below, four_below: 2 bits where the signal is below the first, else 4 where it is below the second, else 8.
        layer: layers from this one on (counted from 0) are read at the chosen bits, those before at all there are: 8,
            or those of dense weights beside the codes. None: the middle one.
        pinned: layers that are always read at all bits there are; negative ones count from the end.
    """

    signal: BitsSignalName = "previous_entropy"
    two_below: float = 0.0
    four_below: float = 0.0
    layer: int | None = None
    pinned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _one_of("precision.signal", self.signal, get_args(BitsSignalName))
        _thresholds("precision.two_below", self.two_below)
        _thresholds("precision.four_below", self.four_below)
        _require(
            self.layer is None or is_whole(self.layer, 0), "precision.layer", self.layer, "a layer number, or null"
        )
        _require(
            isinstance(self.pinned, tuple) and all(map(is_whole, self.pinned)),
            "precision.pinned",
            self.pinned,
            "a list of layer numbers",
        )


@dataclass(frozen=True)
class Probe:
    """How an intermediate entropy is taken: final norm and head on the hidden state (the logit lens).

    `shortlist` limits the head to that many token ids (the lowest ones: byte-pair encoders number tokens by
    frequency); 0 takes the whole vocabulary. Its cost is counted in `probe_flops`.
    """

    shortlist: int = 0

    def __post_init__(self) -> None:
        _require(is_whole(self.shortlist, 0), "probe.shortlist", self.shortlist, "a whole number from 0")


@dataclass(frozen=True)
class Policy:
    """Everything that decides how much is spent on which token. None switches a mechanism off.

    Attributes:
        name: for reports.
        prompt_halting, decode_halting: dynamic token halting, for prompt tokens and for generated ones.
        kv_rule: what deeper layers see of a halted token: `zero` a key and value of zeros (the paper, literally),
            `drop` nothing, `frozen` keys and values projected from its last state, `affine` the same from a state
            that the model's lens (`qs_jax.lens`) carries on through every layer the token skips, `direct` keys and
            values that its direct lens makes for all of them of what the token showed (of prompt tokens, which then
            stop after one layer only, one that the lens was fitted for), `shallow` its remaining layers run at
            `shallow_bits` of the same weights (halting becomes a rung of the precision ladder, not a stop).
        fusion: contextual token fusion, of prompt tokens.
        precision: adaptive Matryoshka quantization, of generated tokens.
        probe: how intermediate entropies are taken.
        protect_first: prompt tokens at the start that never halt or fuse (attention sinks).
        protect_last: prompt tokens at the end that never halt or fuse; at least the last one, whose logits are read.
        protect_special: the model's special tokens never halt or fuse.
        protect_rare: tokens of this rarity or more never halt or fuse: -log of their share of the text that the model's
            direct lens was fitted on, in nats (12 is one in 160,000). None: rarity does not count.
    """

    name: str = "off"
    prompt_halting: Halting | None = None
    decode_halting: Halting | None = None
    kv_rule: KvRuleName = "frozen"
    shallow_bits: int = 4
    fusion: Fusion | None = None
    precision: Precision | None = None
    probe: Probe = field(default_factory=Probe)
    protect_first: int = 4
    protect_last: int = 16
    protect_special: bool = True
    protect_rare: float | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.name, str), "name", self.name, "text")
        _one_of("kv_rule", self.kv_rule, get_args(KvRuleName))
        _one_of("shallow_bits", self.shallow_bits, BITS)
        _require(is_whole(self.protect_first, 0), "protect_first", self.protect_first, "a whole number from 0")
        _require(is_whole(self.protect_last, 1), "protect_last", self.protect_last, "a whole number from 1")
        _require(isinstance(self.protect_special, bool), "protect_special", self.protect_special, "true or false")
        rare = self.protect_rare
        _require(rare is None or is_number(rare, 0, 1e6), "protect_rare", rare, "a number of nats from 0, or null")
        _require(isinstance(self.probe, Probe), "probe", self.probe, "an object, or left out")
        if self.prompt_halting and "previous_entropy" in self.prompt_halting.sources:
            raise PolicyError(
                "prompt_halting cannot use previous_entropy: prompt tokens have no step before; use entropy"
            )
        if self.kv_rule == "direct":
            if self.decode_halting:
                raise PolicyError("kv_rule direct leaves no state to choose a token from: leave decode_halting out")
            if self.prompt_halting and len(self.prompt_halting.layers or ()) != 1:
                raise PolicyError("kv_rule direct needs prompt_halting.layers, with the one layer that its lens is for")

    @property
    def mechanisms(self) -> tuple[str, ...]:
        """Which of the paper's four are on."""
        halting = self.prompt_halting is not None or self.decode_halting is not None
        on = {
            "halting": halting,
            "kv_skipping": halting and self.kv_rule in ("drop", "zero"),
            "fusion": self.fusion is not None,
            "precision": self.precision is not None or (halting and self.kv_rule == "shallow"),
        }
        return tuple(name for name, is_on in on.items() if is_on)

    @classmethod
    def off(cls) -> "Policy":
        """The dense model."""
        return cls()

    @classmethod
    def paper(cls) -> "Policy":
        """The paper to the letter, as far as known, so that anyone can see what it does: raw drift below 0.045 and
        entropy below 1.15 bits halt, halted tokens leave zeroed keys and values, near-equal neighbours fuse, and the
        entropy at the middle layer chooses 2, 4 or 8 bits."""
        halting = Halting("raw_drift", 0.045, start=0.25, entropy_below=1.15)
        return cls(
            name="paper",
            prompt_halting=halting,
            decode_halting=halting,
            kv_rule="zero",
            fusion=Fusion("l2", 0.045, start=0.25, step=1),
            precision=Precision("entropy", two_below=1.15, four_below=2.3),
            protect_first=1,
            protect_last=1,
        )

    @classmethod
    def balanced(cls) -> "Policy":
        """What may be used uncalibrated: most prompt tokens stop after 93 % of the layers and leave frozen keys and
        values. It saves next to nothing, since next to nothing is safe: on SmolLM2-135M (30 layers) 2.6 % of all FLOPs
        at 512 + 64 tokens, for 0.7 % of perplexity on WikiText's test articles and 0.5 % on C4, neither of which it was
        chosen on; a stop two layers earlier cost 1.5 %. Of models with fewer than 22 layers it stops nothing
        (`python -m benchmarks.presets`). Calibration finds more (`qs_jax.calibrate`)."""
        return cls(
            name="balanced",
            prompt_halting=Halting("relative_drift", math.inf, start=0.93, step=1000),
            kv_rule="frozen",
        )

    @classmethod
    def named(cls, name: str) -> "Policy":
        """`off`, `paper` or `balanced`.

        Raises:
            PolicyError: there is no such name.
        """
        builders = {"off": cls.off, "paper": cls.paper, "balanced": cls.balanced}
        if name not in builders:
            raise PolicyError(f"policy is {name!r}, expected one of {', '.join(builders)}, or a policy file")
        return builders[name]()

    @classmethod
    def of(cls, choice: "Policy | str | Path") -> "Policy":
        """A policy as it is, by name, or from a file.

        Raises:
            PolicyError: no such name and no such file, or a file that holds no policy.
        """
        if isinstance(choice, Policy):
            return choice
        if not isinstance(choice, str | Path):
            raise PolicyError(f"policy is {choice!r}, expected a name, a policy file or a Policy")
        path = Path(choice)
        is_file = isinstance(choice, Path) or path.suffix == ".json" or path.is_file()
        return cls.load(path) if is_file else cls.named(str(choice))

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Read what `save` wrote.

        Raises:
            PolicyError: the file is missing, not JSON, or holds an unknown field or an impossible value.
        """
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PolicyError(f"{path}: no such policy file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise PolicyError(f"{path}: cannot be read as JSON ({type(error).__name__}); restore the file") from None
        try:
            return cls.from_json(raw)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the policy as JSON; the file appears whole or not at all.

        Raises:
            PolicyError: nothing can be written there.
        """
        try:
            write_whole(Path(path), json.dumps(self.to_json(), indent=1) + "\n")
        except OSError as error:
            raise PolicyError(f"{path}: cannot be written ({error.strerror}); choose another place") from None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; infinities as the text "inf"."""
        return {"format": FORMAT, **_finite(asdict(self))}

    @classmethod
    def from_json(cls, raw: Any) -> "Policy":
        """The inverse of `to_json`; fields left out keep their defaults.

        Raises:
            PolicyError: not an object, another format, an unknown field, or an impossible value.
        """
        if not isinstance(raw, Mapping):
            raise PolicyError("a policy is a JSON object")
        values = dict(raw)
        if values.pop("format", None) != FORMAT:
            raise PolicyError(f"format is {raw.get('format')!r}, this version reads {FORMAT}")
        parts = {"prompt_halting": Halting, "decode_halting": Halting, "fusion": Fusion, "precision": Precision}
        for name, part in {**parts, "probe": Probe}.items():
            if values.get(name) is not None:
                values[name] = _build(part, values[name], name)
        return _build(cls, values, "policy")

    def without(self, *mechanisms: str) -> "Policy":
        """The same policy with some of `halting`, `kv_skipping`, `fusion`, `precision` off.

        Without KV skipping, halted tokens leave frozen keys and values.
        """
        changed: dict[str, Any] = {}
        if "halting" in mechanisms:
            changed |= {"prompt_halting": None, "decode_halting": None}
        if "kv_skipping" in mechanisms and self.kv_rule in ("drop", "zero"):
            changed["kv_rule"] = "frozen"
        if "fusion" in mechanisms:
            changed["fusion"] = None
        if "precision" in mechanisms:
            changed["precision"] = None
        return replace(self, **changed)


def _build(kind: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, Mapping):
        raise PolicyError(f"{where} is {raw!r}, expected an object")
    known = [item.name for item in fields(kind)]
    unknown = sorted(str(name) for name in raw if name not in known)
    if unknown:
        raise PolicyError(f"{where} has no {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**{name: _restored(value) for name, value in raw.items()})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_finite(inner) for inner in value]
    if is_whole(value):
        return int(value)
    return "inf" if value == math.inf else value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(inner) for inner in value)
    return math.inf if value == "inf" else value


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise PolicyError(f"{name} is {value!r}, expected {expected}")


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    _require(not isinstance(value, bool) and value in choices, name, value, "one of " + ", ".join(map(str, choices)))


def _thresholds(name: str, value: Any) -> None:
    values = value if isinstance(value, tuple) else (value,)
    holds = bool(values) and all(is_number(threshold, 0) for threshold in values)
    _require(holds, name, value, "a number from 0, or a list of them, one per layer")


def _layers(name: str, layers: Any, start: Any, step: Any) -> None:
    rising = layers is None or (
        isinstance(layers, tuple) and all(is_whole(n, 1) for n in layers) and list(layers) == sorted(set(layers))
    )
    _require(rising and layers != (), f"{name}.layers", layers, "rising layer numbers from 1, or null")
    _require(is_number(start, 0, 1), f"{name}.start", start, "a fraction from 0 to 1")
    _require(is_whole(step, 1), f"{name}.step", step, "a whole number from 1")
