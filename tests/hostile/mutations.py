"""Ways to spoil a file: structured ones for JSON, blind ones for bytes. Deterministic for a given generator."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

ABSURD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    0.5,
    "",
    "x",
    "../../../etc/passwd",
    "\x00\n\x1b[31m",
    [],
    [-1],
    [[]],
    {},
    {"x": 1},
)


def spoil_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three places changed, removed, doubled or renamed."""
    spoilt = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(spoilt))
        if not places:
            return rng.choice(ABSURD)
        parent, key = rng.choice(places)
        action = rng.random()
        if action < 0.15:
            del parent[key]
        elif action < 0.25 and isinstance(parent, dict):
            parent[f"{key}{rng.choice(('x', '.weight', '/../y'))}"] = parent.pop(key)
        elif action < 0.5 and isinstance(parent[key], int) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * rng.choice((-1, 2, 1000)) + rng.choice((-1, 0, 1))
        else:
            parent[key] = copy.deepcopy(rng.choice(ABSURD))
    return spoilt


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(pairs):
        yield value, key
        yield from _places(child)


def spoil_bytes(data: bytes, rng: random.Random, limit: int | None = None) -> bytes:
    """A copy with bytes flipped, cut off, removed or put in, within the first `limit` bytes."""
    spoilt, end = bytearray(data), min(limit or len(data), len(data))
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(end)
        action = rng.randrange(4)
        if action == 0:
            spoilt[place % len(spoilt)] = rng.randrange(256)
        elif action == 1 and len(spoilt) > 16:
            del spoilt[rng.randrange(len(spoilt)) :]
        elif action == 2 and len(spoilt) > 16:
            del spoilt[place : place + rng.choice((1, 4, 64))]
        else:
            spoilt[place:place] = rng.randbytes(rng.choice((1, 4, 64)))
        if not spoilt:
            return b""
    return bytes(spoilt)


def spoil_text_or_json(value: Any, rng: random.Random) -> bytes:
    """A JSON file spoilt in what it says, or in how it is written."""
    if rng.random() < 0.7:
        return json.dumps(spoil_json(value, rng)).encode()
    return spoil_bytes(json.dumps(value).encode(), rng)


def spoil_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: other offsets, shapes, dtypes, names, or a wrong length of it."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    action = rng.random()
    if action < 0.6:
        written = json.dumps(spoil_header(header, rng)).encode()
        return len(written).to_bytes(8, "little") + written + body
    if action < 0.75:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), 2**40, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:]
    return spoil_bytes(data, rng, limit=8 + length)


def spoil_header(header: dict[str, Any], rng: random.Random) -> Any:
    """Half of the time with the mistakes that matter: overlaps, holes, offsets that do not fit, other dtypes."""
    if rng.random() < 0.4:
        return spoil_json(header, rng)
    spoilt = copy.deepcopy(header)
    first, second = rng.sample([name for name in spoilt if name != "__metadata__"], 2)
    entry = spoilt[first]
    changes: tuple[Callable[[], Any], ...] = (
        lambda: entry.update(data_offsets=spoilt[second]["data_offsets"]),
        lambda: entry.update(data_offsets=entry["data_offsets"][::-1]),
        lambda: entry.update(data_offsets=[n + rng.choice((-4, 4, 2**40)) for n in entry["data_offsets"]]),
        lambda: entry.update(dtype=rng.choice(("F64", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "X9", "f32"))),
        lambda: entry.update(shape=[*entry["shape"], rng.choice((0, 1, 2, 2**40))]),
        lambda: entry.update(shape=[2**32, 2**32]),
        lambda: spoilt.update({first: spoilt[second], second: entry}),
        lambda: spoilt.update({"a" * 100_000: spoilt.pop(first)}),
    )
    rng.choice(changes)()
    return spoilt
