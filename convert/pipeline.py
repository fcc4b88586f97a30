"""Conversion, part by part: a model larger than memory passes through."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.parts import Parts, stored_as
from convert.quantize import Quantizer
from qs_jax.checkpoint import replacing, write_manifest, write_part
from qs_jax.lens import LENS_FILE
from qs_jax.tokenizer_files import TOKENIZER_FILES

_COPIED = ("generation_config.json", LENS_FILE, *TOKENIZER_FILES)
_CALIBRATED = "policy.json"
"""Copied with the weights it was calibrated on, not with codes of them."""

Advance = Callable[..., None]


@dataclass
class Report:
    """What a conversion did; the keys of `--json`. Sizes are bytes of weights, times seconds. `notes` says what was
    supplied, chosen among contradictions, or passed over."""

    parameters: int
    bytes_in: int
    bytes_out: int = 0
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verification: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name != "verification"}
        return {**fields, **self.verification}


def inspect(parts: Parts) -> Report:
    """The report before anything is written."""
    plan = parts.plan
    return Report(
        parameters=parts.parameters,
        bytes_in=parts.source.bytes,
        missing=plan.missing,
        unexpected=plan.unexpected,
        mismatched=plan.mismatched,
        notes=parts.notes,
    )


def convert(
    parts: Parts,
    target: Path,
    *,
    dtype: str,
    name: str,
    overwrite: bool,
    advance: Advance,
    quantizer: Quantizer | None = None,
    verify: Callable[[Path], dict[str, Any]] | None = None,
) -> Report:
    """Write a converted folder; it appears whole, or not at all.

    Args:
        parts: the source.
        target: the folder to make.
        dtype: one of `DTYPES`, in which weights are stored.
        name: what the user called the source, for the manifest.
        overwrite: replace a converted folder that is there.
        advance: called once per part written.
        quantizer: what turns dense kernels into quantised ones, if any.
        verify: checks the finished folder before it takes its place; its findings join the report.

    Raises:
        CheckpointError: the source does not fit its configuration or cannot be read, or the target not be written.
    """
    started = time.perf_counter()
    report = inspect(parts)
    parts.plan.raise_if_incomplete(str(parts.source.folder))
    with replacing(target, overwrite=overwrite) as work:
        for part, arrays in parts:
            stored = {path: stored_as(array, np.dtype(dtype), path) for path, array in arrays.items()}
            if quantizer:
                dense, quantised = quantizer(part, arrays)
                stored = {path: stored[path] for path in dense} | quantised
            report.bytes_out += sum(array.nbytes for array in stored.values())
            write_part(work, part, stored)
            advance()
        config = {**parts.source.raw_config, **parts.corrections}
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in (*_COPIED, *(() if quantizer else (_CALIBRATED,))):
            if (parts.source.folder / file).is_file():
                shutil.copyfile(parts.source.folder / file, work / file)
        facts: dict[str, Any] = {"source": name, "dtype": dtype}
        facts |= {"parameters": report.parameters, "bytes": report.bytes_out, "notes": parts.notes}
        if quantizer:
            facts["quantization"] = quantizer.manifest()
        write_manifest(work, **facts)
        if verify:
            report.verification = verify(work)
    report.seconds = time.perf_counter() - started
    return report
