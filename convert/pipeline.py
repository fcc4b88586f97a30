"""Conversion, part by part: a model larger than memory passes through."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.defaults import CALIBRATION_TOKENS, CODEBOOK, DTYPE, GROUP_SIZE
from convert.parts import Parts, stored_as
from convert.quantize import QuantizeOptions, Quantizer
from convert.source import locate, source_of
from convert.verify import verify as compared
from qs_jax.checkpoint import replacing, write_manifest, write_part
from qs_jax.choices import DTYPES, SCHEMES, not_among
from qs_jax.errors import CheckpointError, ConfigError, TokenizerError
from qs_jax.files import LENS_FILES
from qs_jax.progress import Advance, unseen
from qs_jax.tokenizer_files import TOKENIZER_FILES

_COPIED = ("generation_config.json", *LENS_FILES, *TOKENIZER_FILES)
_CALIBRATED = "policy.json"
"""Copied with the weights it was calibrated on, not with codes of them."""


class IncompleteError(CheckpointError):
    """The source lacks tensors, has some too many, or of a wrong shape; `report` names them all."""

    def __init__(self, message: str, report: "Report"):
        super().__init__(message)
        self.report = report


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
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = DTYPE,
    revision: str | None = None,
    verify: bool = False,
    golden: str | Path | None = None,
    overwrite: bool = False,
    quantize: str | None = None,
    method: str | None = None,
    calibration_text: str | Path | Sequence[str] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    group_size: int = GROUP_SIZE,
    codebook: str = CODEBOOK,
    exclude: str | None = None,
    pin: str | None = None,
    keep_dense: bool = False,
    dry_run: bool = False,
    advance: Advance = unseen,
) -> Report:
    """Convert Hugging Face weights (GPT-2, Llama, Mistral, Qwen2), part by part, into a folder for `qs_jax.load`.

    The folder appears whole, or not at all. What `qs-convert` does, by the same names.

    Args:
        source: a Hugging Face folder with safetensors, a .gguf file, or a hub id.
        target: the folder to make.
        dtype: "float32", "bfloat16" or "float16", in which weights are stored.
        revision: branch, tag or commit of a hub id.
        verify: compare logits on 500 tokens, and refuse what differs.
        golden: with `verify`, a safetensors file with tokens, positions and logits to compare with.
        overwrite: replace a converted folder that is there.
        quantize: "matryoshka" for codes that can be read at 8, 4 or 2 bits.
        method: with `quantize`: "rtn", or with text "refit", "refit+tune", "gptq", or "gptq+tune", which is the default
            where there is text.
        calibration_text: with `quantize`, text to fit codes on: a file, a name of a data set, or a list of documents.
            Not what the model is evaluated on.
        calibration_tokens: how many tokens of it to take.
        group_size: with `quantize`, inputs that share a scale; a multiple of 8.
        codebook: with `quantize`, "even" levels, or "companded": nearer at 4 and 2 bits, more to compute.
        exclude: with `quantize`, module paths that stay dense, as a regular expression; none by default.
        pin: with `quantize`, module paths that are always read at 8 bits, as a regular expression.
        keep_dense: with `quantize`, store the dense weights beside the codes: the model is read dense unless bits are
            asked for, and its codes draft for it in exact mode.
        dry_run: check names and shapes, and write nothing.
        advance: called once per part written, for a progress bar.

    Returns:
        What was done; sizes in bytes, times in seconds.

    Raises:
        IncompleteError: names or shapes do not fit the model.
        CheckpointError: the source cannot be read, the target not be written, or `verify` found another model.
        ConfigError: an architecture that is not supported, or an option out of range.
        EvaluationError: calibration text that cannot be read.

    Example:
        >>> qs_jax.convert("path/to/model", "model", quantize="matryoshka", calibration_text="train.txt").notes
    """
    if dtype not in DTYPES:
        raise ConfigError(not_among("dtype", dtype, DTYPES))
    if quantize not in (None, *SCHEMES):
        raise ConfigError(not_among("quantize", quantize, SCHEMES))
    if keep_dense and quantize is None:
        raise ConfigError("--keep-dense keeps dense weights beside codes; it needs --quantize matryoshka")
    shaped = {"method": method, "group_size": group_size, "exclude": exclude, "pin": pin, "codebook": codebook}
    shaped |= {"keep_dense": keep_dense, "text": calibration_text is not None}
    options = QuantizeOptions.of(**shaped) if quantize is not None else None
    name, target = str(source), Path(target)
    files = locate(name, revision)
    parts = Parts(source_of(files))
    report = inspect(parts)
    try:
        parts.plan.raise_if_incomplete(name)
    except CheckpointError as error:
        raise IncompleteError(str(error), report) from None
    if dry_run:
        return report
    quantizer = _quantizer(options, parts, target, calibration_text, calibration_tokens)

    def check(work: Path) -> dict[str, Any]:
        reference = None if golden is None else Path(golden)
        quantised = quantizer is not None and not keep_dense
        return compared(work, files, reference, dtype, quantised=quantised, name=str(target))

    advance(0, total=len(parts.names))
    report = write_converted(
        parts,
        target,
        dtype=dtype,
        name=name,
        overwrite=overwrite,
        advance=advance,
        quantizer=quantizer,
        verify=check if verify else None,
    )
    if quantizer is not None:
        quantizer.done()
    return report


def _quantizer(
    options: QuantizeOptions | None,
    parts: Parts,
    target: Path,
    text: str | Path | Sequence[str] | None,
    tokens: int,
) -> Quantizer | None:
    """What turns dense kernels into quantised ones, if that is asked for."""
    if options is None or text is None:
        return None if options is None else Quantizer(options)
    # the optimiser it needs is slow to import
    from convert.calibrated import calibrated_quantizer
    from qs_jax.corpus import Corpus

    corpus = Corpus.of(text)
    name = str(text) if isinstance(text, str | Path) else corpus.name
    return calibrated_quantizer(options, parts, target, corpus.documents, name=name, tokens=tokens)


def write_converted(
    parts: Parts,
    target: Path,
    *,
    dtype: str,
    name: str,
    overwrite: bool,
    advance: Advance = unseen,
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
    parts.plan.raise_if_incomplete(str(parts.source.files))
    with replacing(target, overwrite=overwrite) as work:
        for part, arrays in parts:
            stored = {path: stored_as(array, np.dtype(dtype), path) for path, array in arrays.items()}
            if quantizer:
                stored = quantizer.store(part, arrays, stored)
            report.bytes_out += sum(array.nbytes for array in stored.values())
            write_part(work, part, stored)
            advance()
        config = {**parts.source.raw_config, **parts.corrections}
        (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _copy_small_files(parts, work, () if quantizer and not quantizer.options.keep_dense else (_CALIBRATED,))
        facts: dict[str, Any] = {"source": name, "dtype": dtype}
        facts |= {"parameters": report.parameters, "bytes": report.bytes_out, "notes": parts.notes}
        if quantizer:
            facts["quantization"] = quantizer.manifest(dtype)
        write_manifest(work, **facts)
        if verify:
            report.verification = verify(work)
    report.seconds = time.perf_counter() - started
    return report


def _copy_small_files(parts: Parts, work: Path, more: Sequence[str]) -> None:
    """What stands beside the weights. A vocabulary that cannot be read is left out: token ids work without."""
    for name in (*_COPIED, *more):
        file = parts.source.files / name
        try:
            if file.is_file():
                (work / name).write_bytes(file.read_bytes())
        except TokenizerError as error:
            parts.notes.append(f"{error}; converted without a tokenizer")
