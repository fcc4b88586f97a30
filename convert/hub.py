"""Models from the hub: which files of a repository are fetched."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.weight_files import INDEX, SINGLE, no_weights
from qs_jax.errors import CheckpointError
from qs_jax.files import read_json
from qs_jax.tokenizer_files import TOKENIZER_FILES

SMALL = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
"""Files of a model besides its weights."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHARDS = "model-*-of-*.safetensors"
_TIMEOUT_S = 10.0


def fetch(path_or_id: str, revision: str | None) -> Path:
    """The folder of a hub id's files, downloaded or found in the hub's local cache.

    Raises:
        CheckpointError: it is no hub id that can be fetched, or has no safetensors.
    """
    if not _HUB_ID.fullmatch(path_or_id) or path_or_id.startswith("."):
        raise CheckpointError(f"{path_or_id}: no such folder")
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return _snapshot(path_or_id, revision)
    except GatedRepoError:
        raise CheckpointError(
            f"{path_or_id}: is gated; accept its licence on its hub page and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{path_or_id}: no such folder and no such model on the hub (or it is private)") from None
    except HFValidationError:
        raise CheckpointError(f"{path_or_id}: no such folder, and no id that a model on the hub can have") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{path_or_id}: no such folder, and the hub cannot be reached or refuses ({type(error).__name__})"
        ) from None


def _snapshot(repository: str, revision: str | None) -> Path:
    """The snapshot's folder, with the files that are read."""
    from huggingface_hub import snapshot_download

    names = _listed(repository, revision)
    if names is None:
        patterns = [*SMALL, SINGLE, _SHARDS]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    if SINGLE not in names and INDEX not in names:
        raise CheckpointError(f"{repository}: {no_weights(names)}")
    small = [name for name in SMALL if name in names and (name != INDEX or SINGLE not in names)]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=small))
    weights: list[str] = [SINGLE]
    if SINGLE not in names:
        shards: Any = read_json(folder / INDEX).get("weight_map")
        weights = sorted({str(file) for file in shards.values()}) if isinstance(shards, dict) else [_SHARDS]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=[*small, *weights]))


def _listed(repository: str, revision: str | None) -> Sequence[str] | None:
    """The names of a repository's files; None where the hub cannot be asked, and the local cache may still help."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S).siblings
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None
    except Exception:  # what a network raises is its client's own, which has changed before
        return None
    return [file.rfilename for file in found or ()]
