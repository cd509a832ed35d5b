"""Every regular expression of the project that meets foreign text takes linear time, whatever the text.

The patterns are found by reading the code, so that a new one is tried without anybody's thinking of it. Each is run
over long texts of its own characters, which are the worst for it.
"""

import ast
import importlib
import re
import time
from itertools import product

import pytest

from support.config import ROOT

# Patterns in tables, by the file that has them.
TABLES = {"tasks/data.py": ("WRAPPERS",), "tasks/answers.py": ("REWRITES", "FOR_SYMPY", "MISREAD")}
FILES = ["reward.py", "eval.py", "train.py", "replay.py", "rollout.py", "grpo.py"]
for _folder in ("tasks", "support"):
    FILES += [f"{_folder}/{path.name}" for path in sorted((ROOT / _folder).glob("*.py"))]
CALLS = ("compile", "sub", "search", "match", "fullmatch", "findall", "finditer", "split")
LENGTH = {"tasks/answers.py": 400}  # it meets no longer answers (LONGEST)
USUAL = 50_000
PIECES = 7  # of a pattern
SECONDS = 0.5  # of a processor for one text, where a linear pattern takes a hundredth, and a quadratic one several


def written_in(file: str) -> set[tuple[str, str]]:
    """The patterns in calls of `re` that can be read off the code, and those of the file's tables; and each with how it
    is called, since `search` tries every place of a text and `fullmatch` only the first."""
    names = dict(vars(importlib.import_module(file.removesuffix(".py").replace("/", "."))))
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        called = node.func if isinstance(node, ast.Call) else None
        if not isinstance(called, ast.Attribute) or ast.unparse(called.value) != "re" or called.attr not in CALLS:
            continue
        try:
            found.add((eval(ast.unparse(node.args[0]), names), called.attr))
        except NameError:
            assert ast.unparse(node.args[0]) == "pattern", f"{file} line {node.lineno}: it cannot be tried"
    for table in TABLES.get(file, ()):
        rows = names[table]
        for pattern in rows.values() if isinstance(rows, dict) else [row[0] for row in rows]:
            found.add((pattern, "search"))
    return found


PATTERNS = [(file, *one) for file in FILES for one in sorted(written_in(file))]


def worst_texts(pattern: str, length: int) -> list[str]:
    """Long texts of the words and signs that the pattern looks for, and of their beginnings; a last sign spoils it."""
    words = re.findall(r"\\\\[A-Za-z]*|(?<!\\)[A-Za-z]{2,}|\\[^A-Za-z0-9]|[^\\A-Za-z()\[\]?*+|]", pattern)
    pieces = ["1", "a", " "]
    for word in words:
        piece = "\\" + word[2:] if word.startswith("\\\\") else word.lstrip("\\")
        if piece and piece not in pieces:
            pieces.append(piece)
    texts = []
    for first, second in product(["", *pieces[:PIECES]], pieces[:PIECES]):
        texts.append((first + second * length)[:length] + "~")
        texts.append(((first + second) * length)[:length] + "~")
    return texts


def slowest(pattern: str, called: str, length: int) -> tuple[float, str]:
    """Processor seconds of the text that takes longest, and its beginning."""
    compiled = re.compile(pattern, re.DOTALL)
    called = called if called in ("fullmatch", "match") else "search"
    worst = (0.0, "")
    for text in worst_texts(pattern, length):
        begun = time.process_time()
        getattr(compiled, called)(text)
        worst = max(worst, (time.process_time() - begun, text[:40]))
        if worst[0] > SECONDS:
            break
    return worst


@pytest.mark.parametrize(("file", "pattern", "called"), PATTERNS)
def test_a_pattern_takes_linear_time(file, pattern, called):
    seconds, text = slowest(pattern, called, LENGTH.get(file, USUAL))
    assert seconds < SECONDS, f"{seconds} s of {text}"


def test_what_is_not_linear_is_noticed():
    assert slowest("a*b", "sub", USUAL)[0] > SECONDS


def test_patterns_of_all_parts_are_found():
    assert {file for file, *_ in PATTERNS} >= {"reward.py", "tasks/benchmarks.py", "tasks/data.py", "tasks/answers.py"}
    assert len(PATTERNS) > 80
