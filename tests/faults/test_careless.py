"""A careless user: wrong paths, folders for files, files of something else, and runs that are done. One line each."""

import json
import os
from pathlib import Path

import pytest

import eval as evaluation
import train
from lab import compare, reference, simulate
from support import plot
from tests.faults.harness import Child, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder, with a space and an umlaut in its name, with a finished run and much that is none."""
    place = tmp_path_factory.mktemp("careless") / "ein Ölfaß"
    place.mkdir()
    end = run(place / "run", "--steps", "2", "--eval-every", "2")
    assert end.code == 0, end.text
    (place / "empty").mkdir()
    (place / "file").write_text("")
    (place / "empty.jsonl").write_text("")
    (place / "page.html").write_text("<html>")
    (place / "none.py").write_text("")
    (place / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (place / "list.json").write_text("[1]")
    for name, text in (("list", "[1]"), ("null", "null"), ("torn", '{"replay": '), ("bare", "{}"), ("number", "7")):
        folder = place / f"{name} run"
        folder.mkdir()
        (folder / "config.json").write_text(text)
        (folder / "metrics.jsonl").write_bytes((place / "run" / "metrics.jsonl").read_bytes())
    for name, text in (("rowless", ""), ("strange", '{"step": 1}\n'), ("words", '{"step": 1, "reward": "much"}\n')):
        folder = place / f"{name} run"
        folder.mkdir()
        (folder / "config.json").write_bytes((place / "run" / "config.json").read_bytes())
        (folder / "metrics.jsonl").write_text(text)
    return place


RUNS = ["nowhere", "file", "empty", "list run", "null run", "torn run", "bare run", "number run", "rowless run"]
RUNS += ["strange run", "words run"]
CASES = [(plot.main, [name]) for name in RUNS]
CASES += [(plot.main, ["run", name]) for name in ("nowhere", "list run", "bare run", "strange run")]
CASES += [(plot.main, []), (plot.main, ["run", "run", "run"])]
CASES += [(compare.main, [name, "--out", "results"]) for name in RUNS]
CASES += [(compare.main, ["run", name, "--out", "results"]) for name in ("list run", "bare run", "strange run", "run")]
CASES += [
    (compare.main, ["run", "--out", "file"]),
    (compare.main, ["--methods", "none", "--out", "file", "--seeds", "1", "--jobs", "1"]),
    (compare.main, ["--methods", "none", "--arms", "a: '", "--out", "results"]),
    (compare.main, ["--methods", "none", "--seeds", "1", "--out", "results", "--", "--lr", "0"]),
    (simulate.main, ["--rules", "nosuch"]),
    (simulate.main, ["--rules", "nowhere.py:Class"]),
    (simulate.main, ["--seeds", "0"]),
    (simulate.main, ["--prompts", "0"]),
    (simulate.main, ["--visit", "nan"]),
    (reference.main, ["--methods", "nosuch", "--docs", "docs", "--runs", "runs"]),
    (reference.main, ["--methods", "none", "--docs", "file", "--runs", "file", "--steps", "20"]),
    (evaluation.main, ["--out", "file", "--samples", "1"]),
    (evaluation.main, ["--benchmarks", "empty"]),
    (evaluation.main, ["--benchmarks", "empty.jsonl"]),
    (evaluation.main, ["--benchmarks", "page.html"]),
    (evaluation.main, ["--benchmarks", "none.py"]),
    (evaluation.main, ["--benchmarks", "math500=empty.jsonl"]),
    (evaluation.main, ["--model", "file"]),
    (evaluation.main, ["--model", "run"]),
    (evaluation.main, ["--model", "empty", "--benchmarks", "embedded"]),
    (evaluation.main, ["--task", "empty"]),
    (evaluation.main, ["--baseline", "run", "--samples", "1"]),
    (evaluation.main, ["--baseline", "list.json", "--samples", "1"]),
    (evaluation.main, ["--baseline", "bytes.json", "--samples", "1"]),
    (evaluation.main, ["--compare", "run", "empty"]),
    (evaluation.main, ["--compare", "list.json", "list.json"]),
    (evaluation.main, ["--compare", "bytes.json", "bytes.json"]),
    (train.main, ["--out", "file"]),
    (train.main, ["--out", "file/run"]),
    (train.main, ["--out", "run"]),
    (train.main, ["--out", "empty", "--resume"]),
    (train.main, ["--out", "run", "--resume", "--replay"]),
    (train.main, ["--out", "run", "--resume", "--steps", "2"]),  # not as small as it was
    (train.main, ["--out", "new", "--data", "empty"]),
    (train.main, ["--out", "new", "--data", "file"]),
    (train.main, ["--out", "new", "--data", "polaris=empty.jsonl"]),
    (train.main, ["--out", "new", "--data", "polaris=nowhere.jsonl"]),
    (train.main, ["--out", "new", "--model", "file", "--data", "gsm8k"]),
    (train.main, ["--out", "new", "--model", "run", "--data", "gsm8k"]),
    (train.main, ["--out", "new", "--task", "empty"]),
    (train.main, ["--out", "new", "--task", "none.py"]),
    (train.main, ["--out", "new", "--reward", "empty:score"]),
    (train.main, ["--out", "new", "--reward", "none.py:score"]),
    (train.main, ["--out", "new", "--reward", "none.py"]),
    (train.main, ["--out", "new", "--replay", "none.py:Rule"]),
    (train.main, ["@file", "--out", "file"]),
    (train.main, ["@empty"]),
    (train.main, ["@bytes.json"]),
    (train.main, ["--out", "new", "--data-options", "[1]", "--data", "gsm8k"]),
    (train.main, ["--out", "new", "--vllm", "[1]", "--engine", "vllm"]),
]


def careless(main, argv: list[str], place: Path, console: Path):
    def work() -> int:
        os.chdir(place)
        return main(argv)

    return Child(work, console).end()


@pytest.mark.parametrize("program", [plot, compare, simulate, reference, evaluation, train])
def test_one_line_each(program, place, count, tmp_path):
    for i, (main, argv) in enumerate(CASES):
        if main is program.main:
            end = careless(main, argv, place, tmp_path / str(i))
            count(
                f"a careless user of {program.__name__}: one line",
                end.one_line,
                f"{argv}: {end.code} {end.text[-900:]}",
            )


def test_places_with_spaces_and_letters_of_all_kinds(place, count, tmp_path):
    for name, argv in (("plot", ["run"]), ("compare", ["run", "--out", "results"])):
        end = careless({"plot": plot.main, "compare": compare.main}[name], argv, place, tmp_path / name)
        count("a path with a space and an umlaut", end.code == 0, f"{name}: {end.text[-900:]}")
    small = ["--samples", "1", "--model", "run/model", "--out", "ausgewertet ☃"]
    end = careless(evaluation.main, small, place, tmp_path / "eval")
    count("a path with a space and an umlaut", end.code == 0, end.text[-900:])


def test_a_finished_run_is_resumed(place, count, tmp_path):
    end = run(place / "run", "--steps", "2", "--eval-every", "2", "--resume")
    count("a finished run that is resumed says so", end.code == 0 and "nothing left to do" in end.text, end.text)
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    count("... and is as it was", [row["step"] for row in rows] == [1, 2], str(len(rows)))


def test_without_a_home(place, count, tmp_path, monkeypatch):
    for home in (None, "/nowhere", "/proc"):
        monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
        end = run(tmp_path / f"run-{str(home).strip('/')}", "--steps", "1", "--eval-every", "0", curves=True)
        count("without a home that can be written", end.code == 0, f"{home}: {end.text[-900:]}")
