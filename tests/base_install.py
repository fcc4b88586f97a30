"""The package alone, as `pip install .` makes it, in a new environment: every command of README works there.

    python tests/base_install.py newest     # with the newest versions that pyproject.toml allows
    python tests/base_install.py lowest     # with the lowest

Needs nothing but Python; the model and the texts are tiny and made on the way.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]

MAKE_MODEL = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.folders import write_folder
write_folder(Path("model-of-yours"), "llama", tokenizer=True, bos_token_id=95)
"""
TEXTS = ("some.txt", "train.txt", "test.txt")
ELSEWHERE = ("qs-lm-eval", "--distributed")
"""What needs more than the package alone: its extra, or several hosts; tests/parity/ and tests/integration/ run it."""

DEVICES = "--xla_force_host_platform_device_count=8"
"""So that README's meshes have something to be of."""

WORDS = (
    "the old man walked to the sea and told his dog a story of a small boat that came home late at night".split()  # noqa: SIM905
)


def lowest_versions() -> list[str]:
    """Constraints: every dependency at the bound that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.match(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in project["dependencies"])
    return [f"{match[1]}=={match[2]}" for match in found if match]


def install(venv: Path, versions: str) -> None:
    """The package in a new environment, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    constraints = venv / "constraints.txt"
    constraints.write_text("\n".join(lowest_versions() if versions == "lowest" else ()))
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-c", str(constraints), str(ROOT)], check=True)
    installed = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    print(" ".join(line for line in installed.splitlines() if "@" not in line), flush=True)


def commands() -> Iterator[str]:
    """README's commands of the installed package, and its Python example, with the tiny model in the place of yours."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("path/to/model", "model-of-yours")
    for line in text.splitlines():
        if line.startswith("    qs-") and not any(part in line for part in ELSEWHERE):
            yield line.split("  #")[0].strip()
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        yield f"python - <<'END'\n{block}END"


def run(venv: Path, work: Path, every: Sequence[str]) -> int:
    """Run the commands one after another; returns how many failed."""
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment["QS_JAX_COMPILATION_CACHE"] = str(work / "compiled")
    subprocess.run(["python", "-c", MAKE_MODEL, str(ROOT)], cwd=work, env=environment, check=True)
    for number, name in enumerate(TEXTS):
        words = (WORDS[(7 * i + i // 5 + number) % len(WORDS)] for i in range(4000))
        (work / name).write_text(" ".join(words))
    failed = 0
    for command in every:
        print(f"$ {command}", flush=True)
        env = {**environment, "XLA_FLAGS": DEVICES} if "--mesh" in command else environment
        done = subprocess.run(["bash", "-c", command], cwd=work, env=env, stdin=subprocess.DEVNULL)
        failed += done.returncode != 0
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", choices=("newest", "lowest"))
    versions = parser.parse_args().versions
    every = list(commands())
    with tempfile.TemporaryDirectory() as folder:
        venv, work = Path(folder) / "venv", Path(folder) / "work"
        work.mkdir()
        install(venv, versions)
        failed = run(venv, work, every)
    print(f"\n{len(every) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
