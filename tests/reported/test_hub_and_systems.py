"""What is fetched of a repository, and systems that lack what Linux has."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import filter_repo_objects

from convert.source import locate
from qs_jax.errors import CheckpointError
from tests.folders import write_folder

SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


class Hub:
    """A hub of one repository; `fetched` is what was asked of it. Nothing leaves this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, files: list[str], reachable: bool = True):
        self.fetched: set[str] = set()

        def info(*_: Any, **__: Any) -> Any:
            if not reachable:
                raise OSError("no network")
            return type("Info", (), {"siblings": [RepoSibling(rfilename=file) for file in files]})

        def download(*_: Any, allow_patterns: list[str], **__: Any) -> str:
            self.fetched |= set(filter_repo_objects(files, allow_patterns=allow_patterns))
            return str(folder)

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


REPOSITORIES: dict[str, tuple[list[str], list[str]]] = {
    # vllm-project/vllm issue 7523: Mistral's repositories hold the weights twice, and both were fetched
    "consolidated": (
        [*SMALL, *SHARDS, INDEX, "consolidated.safetensors", "params.json"],
        [*SMALL, *SHARDS, INDEX],
    ),
    # unslothai/unsloth pull 11227: copies in folders of their own made a download three times as large
    "nested": ([*SMALL, *SHARDS, INDEX, "original/model.safetensors", "onnx/config.json"], [*SMALL, *SHARDS, INDEX]),
    "single beside shards": ([*SMALL, "model.safetensors", *SHARDS, INDEX], [*SMALL, "model.safetensors"]),
    # vllm-project/vllm pull 2480: pickles came along
    "pickles too": ([*SMALL, "model.safetensors", "pytorch_model.bin", "run.py"], [*SMALL, "model.safetensors"]),
}


@pytest.mark.parametrize("name", REPOSITORIES)
@pytest.mark.parametrize("reachable", [True, False])
def test_the_weights_are_fetched_once_and_nothing_else(
    name: str, reachable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the hub cannot be asked what it has, the local cache is looked through for the same names."""
    files, expected = REPOSITORIES[name]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip("abc", SHARDS, strict=True))}))
    hub = Hub(monkeypatch, tmp_path, files, reachable)
    assert locate("owner/model") == tmp_path
    if reachable or name != "single beside shards":
        assert sorted(hub.fetched) == sorted(expected)


def test_a_repository_of_pickles_gets_the_message_that_a_folder_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blaizzy/mlx-vlm issue 14: no safetensors, said without saying what there was."""
    hub = Hub(monkeypatch, tmp_path, ["config.json", "pytorch_model.bin", "vocab.json"])
    with pytest.raises(CheckpointError, match="owner/model: only pickled weights, which are never loaded; save"):
        locate("owner/model")
    assert hub.fetched == set()


HIDE = """
import builtins, sys
hidden, real = set(sys.argv.pop().split()), builtins.__import__
def importing(name, globals=None, *rest):
    if name in hidden and (globals or {}).get("__name__", "").partition(".")[0] in ("qs_jax", "convert"):
        raise ImportError(name)
    return real(name, globals, *rest)
builtins.__import__ = importing
import json
from pathlib import Path
from convert.cli import convert
import qs_jax
from qs_jax import checkpoint
from qs_jax.evaluation import benchmark
assert (checkpoint.fcntl is None, benchmark.resource is None) == ("fcntl" in hidden, "resource" in hidden)
source, target = sys.argv[1:]
convert(source, Path(target), json=True)
model = qs_jax.load(target, compilation_cache=False)
print(json.dumps(benchmark.benchmark(model, prompt_tokens=4, new_tokens=2, repeats=1)["peak_rss_mb"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["fcntl resource", "fcntl", "resource", "termios pwd grp"])
def test_a_system_without_fcntl_and_resource_converts_and_measures(tmp_path: Path, lacks: str) -> None:
    """zylon-ai/private-gpt issue 2350 and vllm-project/vllm issue 12858: Windows has neither, and nothing started."""
    folder = write_folder(tmp_path / "hf", "llama")
    command = [sys.executable, "-W", "ignore", "-c", HIDE, str(folder), str(tmp_path / "out"), lacks]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.splitlines()[-1] == "null") == ("resource" in lacks)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
