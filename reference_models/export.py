"""A run's best weights as a Hugging Face folder, with all that the model card says of how they came about."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from convert.mapping import to_hugging_face
from qs_jax.checkpoint import replacing
from qs_jax.config import ModelConfig, read_config_json
from qs_jax.loading import load
from qs_jax.models import CausalLM, arrays_by_path, parse_config, random_network
from reference_models.checkpoints import Checkpoints
from reference_models.data import DataError
from reference_models.tokens import save_tokenizer

RECORD = "training.json"

_DECIMALS = 4


def export(work_dir: Path, tokens: Path, target: Path, *, hardware: str, overwrite: bool) -> dict[str, Any]:
    """Write the weights of the validation minimum, bfloat16, as a folder that transformers and `qs_jax.load` read.

    Beside config, weights and tokenizer it holds `training.json`: recipe, progress, hardware and the loss log.

    Args:
        work_dir: the folder of a run; the run may still be going on.
        tokens: the folder that `prepare` wrote, for the tokenizer.
        target: the folder to make; it appears whole, or not at all.
        hardware: what the run was trained on, in words, for the model card.
        overwrite: replace an exported folder that is there.

    Raises:
        DataError: the run has no best weights yet, or its log or the tokenizer is missing.
        CheckpointError: the target exists, or cannot be written.
    """
    raw = read_config_json(work_dir)
    network = random_network(parse_config(raw, str(work_dir)), seed=0)
    graph, template = nnx.split(network)
    if not (work_dir / "best").is_dir():
        raise DataError(f"{work_dir}: no best weights; train at least to the first validation")
    weights, progress = Checkpoints(work_dir / "best", keep=1, read_only=True).restore(template)
    tensors = to_hugging_face(arrays_by_path(nnx.merge(graph, weights)), network.config)
    tokenizer = read_tokenizer(tokens / "tokenizer.json")
    record = {
        "hardware": hardware,
        "best": progress,
        "recipe": json.loads((work_dir / "recipe.json").read_text("utf-8")),
        **loss_columns(_rows(work_dir / "loss.jsonl")),
    }
    with replacing(target, overwrite=overwrite, marker=RECORD) as work:
        stored = {name: np.asarray(tensor, ml_dtypes.bfloat16) for name, tensor in tensors.items()}
        save_file(stored, work / "model.safetensors", metadata={"format": "pt"})
        (work / "model.safetensors").chmod(0o644)
        _write_json(work / "config.json", {**raw, "dtype": "bfloat16"})
        _write_json(work / "generation_config.json", {name: raw[name] for name in ("bos_token_id", "eos_token_id")})
        save_tokenizer(tokenizer, work, network.config.max_position_embeddings)
        (work / RECORD).write_text(json.dumps(record, separators=(",", ":")) + "\n", "utf-8")
    size = (target / "model.safetensors").stat().st_size
    return {"step": progress["step"], "validation": progress["best"], "bytes": size, "out": str(target)}


class Earlier(NamedTuple):
    """What a run goes on from: an exported model, how far it had come, and its loss log."""

    network: CausalLM
    progress: dict[str, Any]
    rows: list[dict[str, Any]]


def read_export(folder: Path, tokens: Path, config: ModelConfig) -> Earlier:
    """An export, to train it further on tokens packed with its own tokenizer.

    Raises:
        DataError: no record of the training, another shape than `config`, or another tokenizer than the tokens'.
        CheckpointError: the weights cannot be read.
    """
    if not (folder / RECORD).is_file():
        raise DataError(f"{folder / RECORD}: not found; give a folder that export wrote")
    record = json.loads((folder / RECORD).read_text("utf-8"))
    network = load(folder, dtype="float32", compilation_cache=False).network
    if network.config != config:
        raise DataError(f"{folder} is another model than --config describes; give its own config.json")
    used, packed = (read_tokenizer(place / "tokenizer.json").to_str() for place in (folder, tokens))
    if used != packed:
        raise DataError(f"{tokens}: packed with another tokenizer than {folder}'s; prepare with --tokenizer")
    return Earlier(network, record["best"], _rows_of(record))


def _rows_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The loss log that `loss_columns` made columns of."""
    training, validation = (
        [dict(zip(record[part], values, strict=True)) for values in zip(*record[part].values(), strict=True)]
        for part in ("training", "validation")
    )
    validated = [
        {
            "step": row["step"],
            "tokens": row["tokens"],
            "validation_mean": row["mean"],
            "validation": {name: loss for name, loss in row.items() if name not in ("step", "tokens", "mean")},
        }
        for row in validation
    ]
    return sorted([*training, *validated], key=lambda row: row["step"])


def loss_columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """The loss log, column by column: `training` and `validation`, losses in nats per token."""
    training: dict[str, list[float]] = {"step": [], "tokens": [], "loss": []}
    validation: dict[str, list[float]] = {"step": [], "tokens": [], "mean": []}
    for row in rows:
        columns, losses = training, {"loss": row.get("loss")}
        if "validation" in row:
            columns, losses = validation, {"mean": row["validation_mean"], **row["validation"]}
        for name, value in {"step": row["step"], "tokens": row["tokens"], **losses}.items():
            columns.setdefault(name, []).append(round(value, _DECIMALS))
    return {"training": training, "validation": validation}


def _rows(log: Path) -> list[dict[str, Any]]:
    if not log.is_file():
        raise DataError(f"{log}: not found; restore the run's loss log")
    return [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.endswith("}")]


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json.

    Raises:
        DataError: there is none.
    """
    if not path.is_file():
        raise DataError(f"{path}: not found; run the prepare step first")
    return Tokenizer.from_file(str(path))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
