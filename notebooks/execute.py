"""Run the notebooks and save their outputs beside their sources.

    python -m notebooks.execute            # all of them
    python -m notebooks.execute 03 04      # those whose names begin so

The sources are the `.py` files (jupytext's percent format); each `.ipynb` is made from one, with what it printed.
A figure whose cell is tagged `docs=NAME` is also written to `docs/NAME.png`.
"""

import base64
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
SECONDS_PER_CELL = 3600
_TAG = "docs="


def sources() -> list[Path]:
    """The notebooks in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(source: Path) -> Any:
    """A notebook without outputs. Cell ids are their places, so that a rerun changes only what was printed."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02}"
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def execute(source: Path) -> float:
    """Run a notebook and save it with its outputs; seconds of wall clock.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; nothing is saved.
    """
    notebook, started = read(source), time.perf_counter()
    NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(HERE)}},
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            _tidy(output)
            _publish(cell, output)
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    return time.perf_counter() - started


def _tidy(output: Any) -> None:
    """Take out what only this machine knows: folders of the checkout and of temporary files."""
    if output.get("output_type") == "stream":
        text = output["text"].replace(str(HERE.parent), "…")
        output["text"] = re.sub(r"/tmp/tmp\w+", "…", text)


def _publish(cell: Any, output: Any) -> None:
    names = [tag.removeprefix(_TAG) for tag in cell.metadata.get("tags", ()) if tag.startswith(_TAG)]
    image = output.get("data", {}).get("image/png")
    for name in names if image else ():
        (DOCS / f"{name}.png").write_bytes(base64.b64decode(image))


def main() -> None:
    # the hub client's progress bars ask for widgets that no saved notebook could show
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    wanted = tuple(sys.argv[1:])
    total = 0.0
    for source in sources():
        if not wanted or source.name.startswith(wanted):
            seconds = execute(source)
            total += seconds
            print(f"{source.stem}: {seconds:.0f} s", flush=True)
    print(f"all: {total:.0f} s")


if __name__ == "__main__":
    main()
