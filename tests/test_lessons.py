"""The lessons: each runs from top to bottom, and what it states holds, because its asserts state it too.

python -m pytest tests/test_lessons.py -m "slow or not slow" -k 01_one_step      one lesson
"""

import base64
import io
import os
import random
import re

import nbformat
import pytest
from PIL import Image

from lab import lessons
from support.config import ROOT

FOLDER = lessons.FOLDER
LESSONS = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
LONGEST = 25  # lines of a cell of code
LARGEST = 150_000  # bytes of a notebook
COPIED = 5  # so many lines in a row that stand in the project too are no longer chance

every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
every_notebook = pytest.mark.parametrize(
    "path", LESSONS + SOLUTIONS, ids=lambda path: f"{path.stem}{'-solution' * (path in SOLUTIONS)}"
)


def cells_of(path, kind: str) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def outputs_of(path, kind: str) -> list:
    return [output for cell in cells_of(path, "code") for output in cell.outputs if output.output_type == kind]


@pytest.mark.slow
@every_notebook
def test_it_runs_from_top_to_bottom(path):
    """In a kernel of its own; the file stays as it is."""
    lessons.execute(path)


@every_notebook
def test_its_outputs_are_committed_and_clean(path):
    code = cells_of(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not outputs_of(path, "error")
    assert not [output for output in outputs_of(path, "stream") if output.name == "stderr"]
    assert path.stat().st_size < LARGEST
    text = path.read_text()
    assert "/tmp/" not in text and "/home/" not in text and "/root/" not in text

    # What changes with each execution, or with the machine, would make noise in every diff.
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert not any(cell.metadata for cell in notebook.cells)


def test_cleaning_keeps_outputs_makes_figures_small_and_drops_what_changes_with_the_machine():
    cell = nbformat.v4.new_code_cell("1", metadata={"execution": {"iopub.busy": "2026"}})
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))
    file = io.BytesIO()
    noise.save(file, "PNG")
    figure = base64.b64encode(file.getvalue()).decode()
    shown = nbformat.v4.new_output("display_data", {"image/png": figure})
    cell.outputs = [nbformat.v4.new_output("stream", text="one"), shown]
    language = {"name": "python", "version": "3"}
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel, "language_info": language})
    notebook = lessons.cleaned(notebook)
    stream, shown = notebook.cells[0].outputs
    assert notebook.cells[0].metadata == {} and stream.text == "one"
    assert len(shown.data["image/png"]) < 0.5 * len(figure)
    with Image.open(io.BytesIO(base64.b64decode(shown.data["image/png"]))) as image:
        assert image.size == (64, 64)
    assert notebook.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}


@every_notebook
def test_its_cells_are_short_and_copy_nothing(path):
    ours = set()
    for file in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("tasks/*.py"), *ROOT.glob("lab/*.py")):
        lines = [line.strip() for line in file.read_text().splitlines() if len(line.strip()) > 8]
        ours |= {tuple(lines[i : i + COPIED]) for i in range(len(lines) - COPIED + 1)}
    for cell in cells_of(path, "code"):
        assert len(cell.source.splitlines()) <= LONGEST, cell.source
        lines = [line.strip() for line in cell.source.splitlines() if len(line.strip()) > 8]
        assert not {tuple(lines[i : i + COPIED]) for i in range(len(lines) - COPIED + 1)} & ours, cell.source


@every_lesson
def test_it_has_the_form_of_a_lesson(path):
    texts = [cell.source for cell in cells_of(path, "markdown")]
    code = "\n".join(cell.source for cell in cells_of(path, "code"))
    assert re.match(rf"# Lesson {int(path.stem[:2])}\. ", texts[0])
    for word in ("After this lesson you can", "You need", "Time"):
        assert f"**{word}**" in texts[0], word
    assert "## What to inspect" in texts[-1] and "## Exercises" in texts[-1]
    exercises = re.findall(r"^\d\. ", texts[-1].partition("## Exercises")[2], re.MULTILINE)
    assert 2 <= len(exercises) <= 3
    assert re.search(r"^(from|import) (train|replay|rollout|reward|grpo|eval|lab)\b", code, re.MULTILINE)
    assert len(re.findall(r"^\s*assert ", code, re.MULTILINE)) >= 3
    assert any("image/png" in output.data for output in outputs_of(path, "display_data")), "it has no figure"


@every_notebook
def test_its_links_lead_somewhere(path):
    for text in (cell.source for cell in cells_of(path, "markdown")):
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (path.parent / link).exists(), link


@every_notebook
def test_its_first_cell_finds_the_root(path, monkeypatch):
    first = cells_of(path, "code")[0].source
    assert first == cells_of(LESSONS[0], "code")[0].source  # the same in all of them
    for start in (ROOT, FOLDER, FOLDER / "solutions"):
        monkeypatch.chdir(start)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        exec(first, {"sys": None})
        assert os.getcwd() == str(ROOT)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_the_table_names_every_lesson_and_every_lesson_has_solutions():
    table = re.findall(r"^\| \[(\d)\. .*\]\((.*)\)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert [name for _, name in table] == [path.name for path in LESSONS]
    assert [f"{int(number):02d}" for number, _ in table] == [path.name[:2] for path in LESSONS]
    assert {path.name for path in SOLUTIONS} <= {path.name for path in LESSONS}
    for path in LESSONS:
        assert list((FOLDER / "solutions").glob(f"{path.stem}.*")), path.stem
