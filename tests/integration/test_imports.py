"""What importing costs: `--help` pulls in no jax, the package no torch, transformers or matplotlib."""

import subprocess
import sys

import pytest

HEAVY = ("jax", "flax", "numpy", "torch", "transformers", "matplotlib", "rich", "orbax", "safetensors")


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter that ran the code."""
    command = [
        sys.executable,
        "-c",
        f"{code}\nimport sys\nprint('\\n' + ' '.join({{m.split('.')[0] for m in sys.modules}}))",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_the_package_pulls_in_no_torch_transformers_or_matplotlib() -> None:
    loaded = loaded_after("import qs_jax; [getattr(qs_jax, name) for name in qs_jax.__all__]")
    assert "jax" in loaded
    assert not loaded & {"torch", "transformers", "matplotlib", "tokenizers", "typer", "lm_eval"}


def test_what_reads_gguf_files_is_imported_for_one_alone() -> None:
    loaded = loaded_after("import qs_jax.loading, convert.pipeline, convert.verify\nqs_jax.loading.locate('.')")
    assert "jax" in loaded
    assert "gguf" not in loaded


def test_importing_the_package_alone_is_nearly_free() -> None:
    assert not loaded_after("import qs_jax") & set(HEAVY)


@pytest.mark.parametrize("module", ["qs_jax.cli", "convert.cli"])
def test_help_imports_nothing_heavy(module: str) -> None:
    code = f"import sys\nfrom {module} import main\nsys.argv = ['x', '--help']\ntry: main()\nexcept SystemExit: pass"
    loaded = loaded_after(code)
    assert "typer" in loaded
    assert not loaded & set(HEAVY)
