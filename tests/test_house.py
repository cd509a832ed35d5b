"""The form of the project: what stands in the root, what may import what, how long and dense the six scripts are."""

import ast
import io
import re
import sys
import tokenize

import pytest

import train
from support.config import ROOT

SCRIPTS = ("train", "replay", "rollout", "reward", "grpo", "eval")
FOLDERS = ("tasks", "support", "lab", "tests", "docs")
FILES = ("test_replay.py", "README.md", "LICENSE", "CONTRIBUTING.md", "pyproject.toml")


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def imported(tree: ast.AST) -> set[str]:
    """The first words of all modules that a file imports, inside of functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def comment_lines(text: str) -> set[int]:
    """The numbers of the lines that are a comment and nothing else."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            found.add(token.start[0])
    return found


def code_lines(text: str) -> list[str]:
    """The lines that are no comment, docstring or blank."""
    skipped = comment_lines(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [line for i, line in enumerate(text.splitlines(), 1) if line.strip() and i not in skipped]


def test_the_root_holds_the_six_scripts_and_little_else():
    wanted = {f"{name}.py" for name in SCRIPTS} | set(FILES) | set(FOLDERS)
    wanted |= {"requirements.txt", "requirements-cpu.txt"}
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__"))} - {"out"}
    assert there == wanted


def test_scripts_are_short_enough_to_be_read_in_one_sitting():
    lines = {name: len(source(name).splitlines()) for name in SCRIPTS}
    nodes = 0
    for name in SCRIPTS:
        for node in ast.walk(ast.parse(source(name))):
            nodes += not isinstance(node, ast.Load | ast.Store | ast.Del)
    assert max(lines.values()) <= 400 and sum(lines.values()) <= 2000 and nodes <= 11_000


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_function_is_longer_than_a_screen(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_paragraphs_are_opened_by_comments_and_lines_are_not_long():
    texts = [source(name) for name in SCRIPTS]
    comments = sum(len(comment_lines(text)) for text in texts)
    assert comments >= 0.04 * sum(len(text.splitlines()) for text in texts)
    lines = [line for text in texts for line in code_lines(text)]
    assert sum(len(line) > 100 for line in lines) <= 0.06 * len(lines)
    assert not [line for line in lines if "fmt: skip" in line or "fmt: off" in line]


def test_the_readme_is_short_enough_to_be_read_before_the_first_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1500
    for name in SCRIPTS:
        said = re.search(rf"\| \[{name}\.py\]\({name}\.py\) \| (\d+) \|", text)
        assert abs(int(said[1]) - len(source(name).splitlines())) <= 5, f"lines of {name}.py in README.md"


@pytest.mark.parametrize("folder", ["support", "tasks"])
def test_support_and_tasks_know_nothing_of_the_scripts(folder):
    for path in (ROOT / folder).glob("*.py"):
        assert not imported(ast.parse(path.read_text())) & {*SCRIPTS, "lab", "tests"}, path.name


def test_support_knows_nothing_of_tasks_and_scripts_nothing_of_the_lab():
    for path in (ROOT / "support").glob("*.py"):
        assert "tasks" not in imported(ast.parse(path.read_text())), path.name
    for name in SCRIPTS:
        assert "lab" not in imported(ast.parse(source(name))), name  # METHODS names its rules, for --replay alone


def test_a_step_of_replay_goes_through_few_functions_and_files(tmp_path):
    calls = []
    marks = []

    def note(frame, event, _):
        code = frame.f_code
        ours = code.co_filename.startswith(str(ROOT)) and "site-packages" not in code.co_filename
        if event == "call" and ours and not code.co_name.startswith("<"):
            if code.co_qualname == "PromptReplay.draw":
                marks.append(len(calls))
            calls.append((code.co_filename, code.co_qualname))

    flags = [
        "--replay",
        "--steps",
        "6",
        "--prompts-per-step",
        "8",
        "--answers-per-prompt",
        "4",
        "--eval-every",
        "0",
        "--cooldown",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    sys.setprofile(note)
    try:
        assert train.main(flags) == 0
    finally:
        sys.setprofile(None)
    step = calls[marks[-2] : marks[-1]]
    changes = sum(before[0] != after[0] for before, after in zip(step, step[1:], strict=False))
    assert len(set(step)) <= 50 and changes <= 28
