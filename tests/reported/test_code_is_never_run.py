"""Nothing from a model's folder is executed, by any door, and no command waits for an answer.

ml-explore/mlx-examples issue 950: a conversion stopped at the question whether to run a repository's code until its
alarm went off. huggingface/transformers pull 46483: a local folder's `custom_generate` ran without being allowed to.
"""

import builtins
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import convert.cli
import qs_jax
import qs_jax.cli
from qs_jax.tokenizer import Tokenizer
from tests.folders import write_folder

CODE = "import pathlib\n(pathlib.Path(__file__).parent / 'RAN').write_text('ran')\n"
AUTO_MAP = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": [None, "own.Own"]}

RUN = "import sys, qs_jax.cli; sys.argv[0] = 'qs-jax'; qs_jax.cli.main()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama whose tokenizer, configuration and generation each name code of the folder's own, which leaves a mark."""
    folder = write_folder(tmp_path / "hf", "llama", tokenizer=True, auto_map=AUTO_MAP, bos_token_id=95)
    for code in (folder / "own.py", folder / "custom_generate" / "generate.py"):
        code.parent.mkdir(exist_ok=True)
        code.write_text(CODE)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Own", "auto_map": AUTO_MAP}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    generation = {"custom_generate": "custom_generate", "auto_map": AUTO_MAP, "trust_remote_code": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", ask)


def assert_nothing_ran(folder: Path) -> None:
    assert list(folder.rglob("RAN")) == []
    assert "own" not in sys.modules


def test_by_the_python_api(folder: Path) -> None:
    model = qs_jax.load(folder, compilation_cache=False)
    assert model.tokenizer is not None
    assert qs_jax.generate(model, "Hi", max_new_tokens=2).lengths == [2]
    assert qs_jax.generate(model, [{"role": "user", "content": "Hi"}], max_new_tokens=2).lengths == [2]
    assert_nothing_ran(folder)


@pytest.mark.parametrize("verify", [(), pytest.param(("--verify",), marks=pytest.mark.parity)])
def test_by_conversion(folder: Path, tmp_path: Path, verify: tuple[str, ...]) -> None:
    """With torch the original is run by transformers."""
    result = CliRunner().invoke(convert.cli.app, [str(folder), str(tmp_path / "out"), "--json", *verify], input="y\n")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["missing"] == []
    assert_nothing_ran(folder)
    assert not list((tmp_path / "out").rglob("*.py"))


@pytest.mark.parametrize("command", ["generate", "eval", "bench", "lens"])
def test_by_every_command(folder: Path, tmp_path: Path, command: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a folder that wanted to be run. " * 200)
    options = {
        "generate": ("--prompt", "Hi", "--max-new-tokens", "2"),
        "eval": ("--text", text, "--prefix", "8", "--window", "8", "--max-tokens", "16"),
        "bench": ("--prompt-tokens", "4", "--new-tokens", "2"),
        "lens": ("--text", text),
    }[command]
    arguments = [command, str(folder), *map(str, options), "--json"]
    result = CliRunner().invoke(qs_jax.cli.app, arguments, input="y\n")
    assert result.exit_code == 0, result.stderr
    assert "custom code" not in result.stdout + result.stderr
    assert_nothing_ran(folder)


def _command(folder: Path, stdin: Any) -> tuple[int, str]:
    """Exit status and stdout of a real process that generates; it may take a minute, and never waits."""
    command = [sys.executable, "-c", RUN, "generate", str(folder), "--prompt", "Hi", "--max-new-tokens", "2", "--json"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdin=stdin, capture_output=True, timeout=120, text=True, env=environment)
    return done.returncode, done.stdout


@pytest.mark.parametrize("answer", ["closed", "y", "a silent terminal"])
def test_by_a_process_with_any_input(folder: Path, tmp_path: Path, answer: str) -> None:
    if answer == "closed":
        status, out = _command(folder, subprocess.DEVNULL)
    elif answer == "y":
        (tmp_path / "yes").write_text("y\n" * 9)
        with (tmp_path / "yes").open() as yes:
            status, out = _command(folder, yes)
    else:
        mine, its = pty.openpty()
        status, out = _command(folder, its)
        os.close(mine)
        os.close(its)
    assert status == 0
    assert json.loads(out)["lengths"] == [2]
    assert_nothing_ran(folder)


def test_a_vocabulary_whose_class_is_the_folders_own_is_refused(folder: Path) -> None:
    """internlm and others: without a tokenizer.json only their own code can read it; token ids still work."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x05")
    model = qs_jax.load(folder, compilation_cache=False)
    assert model.tokenizer is None
    with pytest.raises(qs_jax.QsJaxError, match=r"tokenizer_class is Own, and tokenizer\.model alone"):
        qs_jax.generate(model, "Hi", max_new_tokens=2)
    assert qs_jax.generate(model, [[1, 2]], max_new_tokens=2).lengths == [2]
    assert_nothing_ran(folder)


def test_a_template_runs_in_a_sandbox(folder: Path) -> None:
    """llama-cpp-python's advisory on chat templates: Python's own objects cannot be reached from one."""
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": escape}))
    with pytest.raises(qs_jax.QsJaxError, match="the chat template refuses"):
        Tokenizer.load(folder).encode_chat([{"role": "user", "content": "Hi"}])
