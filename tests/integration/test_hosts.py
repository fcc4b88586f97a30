"""Two processes, each with two simulated devices, as on two hosts."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import qs_jax
from tests.folders import write_folder

ROOT = Path(__file__).parents[2]
PROMPTS = ("Once upon a time", "Two hosts")
NEW = 8

LOADING = """
import sys
import jax
from convert.folder import FolderSource
from qs_jax.console import own_stdout, print_json
from qs_jax.hosts import Hosts, agreed, join
from qs_jax.loading import load

join(Hosts(sys.argv[2], 2, int(sys.argv[3])))
own_stdout(silent=False)
read, parts = FolderSource.read_part, []
def counted(self, name, index):
    parts.append((part := read(self, name, index)).nbytes)
    return part
FolderSource.read_part = counted
model = load(sys.argv[1], mesh="model=4")
held = sum(s.data.nbytes for a in jax.tree.leaves(model.network) for s in a.addressable_shards)
whole = sum(a.nbytes for a in jax.tree.leaves(model.network))
print_json({"read": sum(parts), "held": held, "whole": whole, "seed": agreed(7 + jax.process_index())})
"""


def in_two(arguments: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
    """A Python command in two processes; `{address}` and `{process}` stand for where the first is and for which one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "QS_JAX_COMPILATION_CACHE": "off", "JAX_PLATFORMS": "cpu"}
    started = []
    for process in range(2):
        command = [text.replace("{address}", address).replace("{process}", str(process)) for text in arguments]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, **pipes))
    ended = []
    for child in started:
        out, err = child.communicate(timeout=600)
        ended.append(subprocess.CompletedProcess(child.args, child.returncode, out, err))
    assert [one.returncode for one in ended] == [0, 0], [one.stderr[-3000:] for one in ended]
    return ended


def generated_in_two(folder: Path, mesh: str, *more: str) -> dict[str, Any]:
    """What the first of two processes prints; the other must print nothing."""
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    asked += ["--max-new-tokens", str(NEW), "--json", "--mesh", mesh, *more]
    asked += ["--coordinator", "{address}", "--processes", "2", "--process", "{process}"]
    first, second = in_two(["-m", "qs_jax", "generate", str(folder), *asked])
    assert second.stdout == ""
    return json.loads(first.stdout)


def test_two_hosts_generate_what_one_does_and_the_first_prints(tmp_path: Path) -> None:
    """Sampled with a seed that one of them draws; rows are divided among them."""
    folder = write_folder(tmp_path / "model", "llama", tokenizer=True)
    found = generated_in_two(folder, "data=2,model=2", "--temperature", "1")
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "seed": found["seeds"][0]}
    own = qs_jax.generate(qs_jax.load(folder), list(PROMPTS), max_new_tokens=NEW, **settings)
    assert found["tokens"] == own.tokens
    assert found["ledger"] == own.ledger


def test_a_converted_folder_and_drafts_that_are_paced_by_the_clock(tmp_path: Path) -> None:
    """Heads are divided among the hosts, and of what each measures the first's counts."""
    folder = write_folder(tmp_path / "model", "gpt2", tokenizer=True)
    qs_jax.convert(folder, tmp_path / "own", quantize="matryoshka", group_size=8, keep_dense=True)
    found = generated_in_two(tmp_path / "own", "model=4", "--exact", "--max-new-tokens", "40")
    assert found["tokens"] == qs_jax.generate(qs_jax.load(folder), list(PROMPTS), max_new_tokens=40).tokens


def test_no_host_reads_or_holds_the_whole_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "llama")
    for one in in_two(["-c", LOADING, str(folder), "{address}", "{process}"]):
        told = json.loads(one.stdout)
        assert told["read"] < 0.7 * told["whole"]
        assert told["held"] < 0.8 * told["whole"]  # by both devices; what is not divided twice
        assert told["seed"] == 7
