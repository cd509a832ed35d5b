"""Runs lessons from top to bottom, writes their outputs, and says what each took.

    python -m lab.lessons                                    all of them, and the solutions
    python -m lab.lessons docs/lessons/04_prompt_replay.ipynb

A notebook that raises stays as it was. The seconds are of processor time, of the kernel and of what it starts, so that
other work on the machine does not count. Of lesson 9 the runs of lab.compare are left out, about 18: a server starts
them. The first lesson that needs an embedded model makes it, once: run that one twice.
"""

import base64
import io
import resource
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from support.config import ROOT, exits

FOLDER = ROOT / "docs" / "lessons"


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(path: Path, timeout: int = 900):
    """The notebook in `path`, with new outputs. CellExecutionError if a cell raises, an assert among them."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=where).execute()
    return notebook


def smaller(png: str) -> str:
    """The figure `png`, in base64, with 64 colours: it takes a third of the room."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        few = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
    file = io.BytesIO()
    few.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def cleaned(notebook):
    """Without what changes with each run, or with the machine: it would make noise in every diff. Figures are made
    smaller."""
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    return notebook


@exits(2, OSError, CellExecutionError)
def main(argv: list[str]) -> int:
    for path in map(Path, argv or sorted(FOLDER.glob("**/*.ipynb"))):
        print(path, end="  ", flush=True)
        before = cpu_seconds()
        nbformat.write(cleaned(execute(path)), path)
        print(f"{cpu_seconds() - before:.0f} CPU seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
