"""Prompts: the embedded task, local files, known data sets in their own shapes, and every way to be wrong."""

import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from support import limits
from tasks import data, tiny
from tasks import prompts as prompts_of


def test_embedded_task_is_right_and_without_repeats():
    pairs = tiny.arithmetic(2400)
    assert len({question for question, _ in pairs}) == 2400
    for question, answer in pairs:
        assert len(question) == 10 and question[4] in "+-" and question[9] == "="
        assert eval(f"{int(question[:4])}{question[4]}{int(question[5:9])}") == int(answer) >= 0
    assert pairs == tiny.arithmetic(2400) and pairs != tiny.arithmetic(2400, seed=1)


def test_more_problems_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(tiny, "SIZE_WEIGHTS", (1, 0, 0, 0))  # one digit: 100 sums and 55 differences
    assert len(tiny.arithmetic(150)) == 150
    with pytest.raises(ValueError, match="fewer"):
        tiny.arithmetic(160)


def test_pupil_errs_at_its_stated_rate_and_otherwise_is_right():
    pupil, rng = tiny.Pupil(), random.Random(0)
    for question, answer in tiny.arithmetic(30, seed=3):
        answers = [pupil.answer(question, rng) for _ in range(400)]
        assert all(len(a) + 1 == tiny.ANSWER_TOKENS for a in answers)
        right = sum(int(a.split("=")[1]) == int(answer) for a in answers) / 400
        assert abs(right - pupil.pass_rate(question)) < 0.1
    assert tiny.Pupil(7).error_rate == pupil.error_rate != tiny.Pupil(8).error_rate


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("problem", "answer"), [("problem", "answer"), ("prompt", "solution"), ("question", "answer")])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_files_with_the_usual_columns_are_read(tmp_path, kind, problem, answer):
    rows = [{problem: f"what is {i}?", answer: str(i), "other": "x"} for i in range(5)]
    path = str(tmp_path / f"file.{kind}")
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
        write(tmp_path, f"file.{kind}", text)
    assert data.from_rows(data.read_rows(path), path) == [(f"what is {i}?", str(i)) for i in range(5)]


def test_answers_of_mixed_type_and_named_columns(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"q": "x", "a": 5}\n\n{"q": "y", "a": "5/2"}\n{"q": "z", "a": 0}\n')
    rows = data.from_rows(data.read_rows(path), path, problem_column="q", answer_column="a")
    assert rows == [("x", "5"), ("y", "5/2"), ("z", "0")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "", "empty"),
        ("a.jsonl", '{"problem": "x", "answer": "1"}\n{oops\n', "line 2"),
        ("a.jsonl", '{"problem": "x", "answer": "1"}\n{"problem": "y", "answer": " "}\n', "row 2"),
        ("a.jsonl", '{"problem": "x", "answer": "1"}\n{"problem": "y"}\n', "row 2"),
        ("a.jsonl", '{"problem": "x", "answer": "1"}\n{"problem": "", "answer": "1"}\n', "row 2"),
        ("a.jsonl", '{"problem": "x", "gold": "1"}\n', "'answer' or 'solution'.*problem, gold.*--answer-column"),
        ("a.jsonl", '{"text": "x", "answer": "1"}\n', "--problem-column"),
        ("a.jsonl", "[1]\n", "row 1 is list"),
        ("a.jsonl", "[1]", "row 1 is list"),
        ("a.jsonl", '{"problem": "x", "answer": "1"}\nnull\n', "row 2 is null, not an object"),
        ("a.jsonl", '{"problem": "x", "answer": "1"}\n\n7\n', "row 2 is int, not an object"),
        ("a.json", "[null]", "row 1 is null, not an object"),
        ("a.json", "null", "row 1 is null, not an object"),
        ("a.json", '[{"problem": "x", "answer": "1"}, 2.5]', "row 2 is float, not an object"),
        ("a.json", "[" * 100_000 + "]" * 100_000, "more levels than can be read"),
        ("a.jsonl", '\n{"problem": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is JSON in more levels"),
        ("a.jsonl", '{"problem": ' + "[" * 600 + "]" * 600 + ', "answer": 1}', "row 1 has an empty 'problem'"),
        ("a.jsonl", '{"problem": "x", "answer": ' + "7" * 5000 + "}", "line 1 cannot be read.*4300 digits.*as text"),
        ("a.json", '{"problem": "x",\n"answer": 1}', "line 1 is not JSON"),
        ("a.jsonl", "\ufeff", "no rows"),
        ("a.json", "\ufeff", "no rows"),
        ("a.csv", "\ufeff", "no rows"),
        ("a.csv", "problem,answer\n", "no rows"),
        ("a.csv", "problem,answer,problem\nx,1,y\n", "several columns 'problem'"),
        ("a.csv", "problem,answer\n" + "x" * 200_000 + ",1\n", "cannot be read as csv: field larger"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.txt", "x", "not read"),
        ("a.parquet", "this is no parquet file", "parquet"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, text, words):
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError, match=words) as error:
        data.from_rows(data.read_rows(path), path)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_parquet_without_rows_or_with_a_column_twice(tmp_path):
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"problem": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ValueError, match="a.parquet has no rows"):
        data.read_rows(path)
    columns = [pyarrow.array([value]) for value in ("x", "1", "2")]
    parquet.write_table(pyarrow.table(columns, names=["problem", "answer", "answer"]), path)
    with pytest.raises(ValueError, match="a.parquet has several columns 'answer'; give each its own name"):
        data.read_rows(path)


def test_a_file_that_unpacks_to_more_than_is_read_is_refused_before_it_does(tmp_path, monkeypatch):
    path = str(tmp_path / "a.parquet")
    columns = [pyarrow.array(["1+1="] * 30_000), pyarrow.array(["2"] * 30_000)]
    parquet.write_table(pyarrow.table(columns, names=["problem", "answer"]), path)
    assert len(data.read_rows(path)) == 30_000
    monkeypatch.setattr(data, "MOST_ROWS", 20_000)
    with pytest.raises(ValueError, match="a.parquet has 30,000 rows, of which at most 20,000 are read"):
        data.read_rows(path)

    # few rows, each of which is a megabyte, in a file of a few kilobytes
    parquet.write_table(pyarrow.table([pyarrow.array(["x" * 1_000_000] * 200)], names=["problem"]), path)
    assert Path(path).stat().st_size < 100_000
    monkeypatch.setattr(data, "LARGEST", 1 << 27)
    with pytest.raises(ValueError, match="a.parquet is of more than 0 GiB, which is not read"):
        data.read_rows(path)
    (tmp_path / "a.jsonl").touch()
    os.truncate(tmp_path / "a.jsonl", (1 << 27) + 1)
    with pytest.raises(ValueError, match="a.jsonl is of more than 0 GiB"):
        data.read_rows(str(tmp_path / "a.jsonl"))


def test_a_text_beyond_all_bounds_is_refused_or_left_out():
    long = {"problem": "x" * (data.LONGEST_TEXT + 1), "answer": "1"}
    rows = [{"problem": "x", "answer": "1"}, long]
    with pytest.raises(
        ValueError, match="a.jsonl row 2 has a text of 1,000,001 characters, of which at most 1,000,000"
    ):
        data.from_rows(rows, "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl row 1 has a text of 1,000,002 characters"):
        data.from_rows([{"problem": "x", "answer": [long["problem"], "1"]}], "a.jsonl")
    counts = Counter()
    assert data.from_rows(rows, "hub", left_out=counts) == [("x", "1")]
    assert counts == {"too long": 1}


HOSTILE = [
    "\\boxed{",
    "\\boxed ",
    "\\fbox{}\\boxed{",
    "{",
    "\\",
    "\\{",
    " ",
    "user: ",
    "Solve the following math problem step by step. The last line of your ",
    "reason step by step ",
    'Remember to put your answer on its own line after "Answer:"',
    "\\frac ",
    "\\frac1 ",
    "1, ",
    "1,000",
    "a-",
    "a!",
    "#### ",
    "\u0301\u0323",
    "½",
    "²",
]


@pytest.mark.parametrize("start", ["", "1", "\\boxed", "\\frac1"])
@pytest.mark.parametrize("piece", HOSTILE)
def test_every_pattern_takes_linear_time(piece, start):
    text = start + piece * (100_000 // len(piece))
    begun = time.process_time()
    data.final_answer(text)
    data.normal(text)
    assert time.process_time() - begun < 5


def test_one_line_of_fifty_megabytes_is_refused_at_once(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"problem": "x", "answer": "\\boxed{" * 7_000_000}))
    begun = time.process_time()
    with pytest.raises(ValueError, match="row 1 has a text of 49,000,000 characters"):
        data.load_pairs(path)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "value", ["1e-99999999", "1e99999999", "9" * 1000, "1/0", "nan", True, [0.5], {}, "", "1_0", "½"]
)
def test_a_difficulty_that_is_no_pass_rate(tmp_path, value):
    path = write(tmp_path, "a.jsonl", json.dumps({"problem": "x", "answer": "1", "difficulty": value}))
    begun = time.process_time()
    with pytest.raises(ValueError, match="a.jsonl row 1: difficulty .* is no pass rate like 3/8 or 0.4") as caught:
        data.load_pairs(path, difficulty=(0, 0.9))
    assert time.process_time() - begun < 1 and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "rate"), [("3/8", 0.375), (" 0.25 ", 0.25), (".5", 0.5), (1, 1), (5e-1, 0.5), (1e-7, 0)]
)
def test_a_difficulty_in_any_dress(value, rate):
    assert float(data.pass_rate(value, "row 1")) == pytest.approx(rate, abs=1e-6)


def test_missing_file_and_wrong_encoding(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        data.read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        data.read_rows(str(tmp_path / "latin.jsonl"))


def test_held_out_problems_are_never_trained_on():
    pairs = [(f"problem {i}", str(i)) for i in range(90)]
    training, held_out = data.split(pairs, 10)
    assert len(training) == 80 and len(held_out) == 10 and sorted(training + held_out) == sorted(pairs)
    assert training == sorted(training, key=pairs.index)
    assert data.split(pairs, 10) == (training, held_out) != data.split(pairs, 10, seed=1)


def test_long_prompts_are_left_out_and_counted_never_cut():
    tokenizer = tiny.make_tokenizer()
    prompts, skipped = data.encode([("12+3=", "15"), ("0012+0003=", "15"), ("1+1=", "2")], tokenizer, 5)
    assert skipped == 1 and [p.text for p in prompts] == ["12+3=", "1+1="]
    assert [p.index for p in prompts] == [0, 1] and len(prompts[0].ids) == 5


# ---------------------------------------------------------------- known data sets

THINK = " Let's think step by step and output the final answer within \\boxed{}."
DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def prepared(name: str, evaluation: dict, missing=()) -> tuple[list, str]:
    return data.clean(Namespace(data=name, difficulty=(0.0, 1.0)), lambda: (evaluation, missing))


class Namespace(SimpleNamespace):
    """A configuration whose other fields are not set."""

    def __getattr__(self, _):
        return None


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# name, rows as the data set has them, what becomes of them
SHAPES = [
    (
        "polaris",
        [
            {"problem": "What is $1+1$?" + THINK, "answer": "2", "difficulty": "7/8"},
            {"problem": "Find $x$.", "answer": "\\frac{1}{2}", "difficulty": "0/8"},
            {"problem": "Prove it.", "answer": "", "difficulty": "1/8"},
        ],
        [("What is $1+1$?", "2"), ("Find $x$.", "\\frac{1}{2}")],
    ),
    (
        "dolci",
        [
            {"messages": user("one"), "ground_truth": "1", "dataset": "math", "prompt": "user: one"},
            {"messages": user("user: two"), "ground_truth": "2", "dataset": "math", "prompt": "user: two"},
        ],
        [("one", "1"), ("two", "2")],
    ),
    (
        "dolci",
        [{"messages": user("three"), "ground_truth": ["3"], "dataset": ["math"], "prompt": "user: three"}],
        [("three", "3")],
    ),
    (
        "dolci-think",
        [
            {"messages": user("write a poem"), "ground_truth": ["x"], "dataset": ["general-quality"]},
            {"messages": user("sort"), "ground_truth": ["assert f"], "dataset": ["code"]},
            {"messages": user("three"), "ground_truth": ["{rule}", "3"], "dataset": ["ifeval", "math"]},
        ],
        [("three", "3")],
    ),
    ("dolci", [{"prompt": "user: four", "ground_truth": "4", "dataset": "math"}], [("four", "4")]),
    (
        "dapo",
        [{"prompt": "What is 5?", "solution": "5", "data_source": "math_dapo", "ability": "MATH"}],
        [("What is 5?", "5")],
    ),
    (
        "dapo-raw",
        [
            {
                "data_source": "math_dapo",
                "prompt": user(f"{DAPO_BEFORE}What is {i}?{DAPO_AFTER}"),
                "ability": "MATH",
                "reward_model": {"ground_truth": str(i), "style": "rule-lighteval/MATH_v2"},
                "extra_info": {"index": f"{i}-abc"},
            }
            for i in (34, 35, 34, 34)
        ],
        [("What is 34?", "34"), ("What is 35?", "35")],
    ),
    (
        "gsm8k",
        [{"question": "How many?", "answer": "He has 2*600=<<2*600=1200>>1200.\nSo\n#### 1,200"}],
        [("How many?", "1200")],
    ),
    (
        "math",
        [
            {
                "problem": "a",
                "level": "Level 5",
                "type": "Algebra",
                "solution": "So $\\boxed{x}$, or \\boxed{\\frac{1}{2}}.",
            },
            {"problem": "b", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed 5$."},
            {
                "problem": "c",
                "level": "Level 1",
                "type": "Algebra",
                "solution": "Unclosed: \\boxed{",
            },
        ],
        [("a", "\\frac{1}{2}"), ("b", "5")],
    ),
    ("math", [{"problem": "a", "answer": "7", "solution": "\\boxed{8}"}], [("a", "7")]),
]


@pytest.mark.parametrize("hub", [True, False], ids=["hub", "copy"])
@pytest.mark.parametrize(("name", "rows", "expected"), SHAPES, ids=[f"{s[0]}{i}" for i, s in enumerate(SHAPES)])
def test_known_data_sets_in_their_own_shapes(tmp_path, monkeypatch, name, rows, expected, hub):
    asked = []
    if hub:
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *args, **kw: asked.append((args, kw)) or datasets.Dataset.from_list(rows)
        )
    else:
        name = f"{name}={write(tmp_path, 'copy.jsonl', chr(10).join(map(json.dumps, rows)))}"
    pairs, line = prepared(name, {})
    assert pairs == expected
    assert f"{len(rows)} rows" in line and data.fingerprint(expected)[:16] in line
    if hub:
        source = data.SOURCES[name]
        assert asked == [((source.hub, source.config), {"split": "train", "revision": source.revision})]


def test_what_was_left_out_is_counted():
    rows = [{"problem": p, "answer": a} for p, a in [("x", "1"), ("X.", "1"), ("x!!", "1"), ("x ", "2"), ("y", None)]]
    counts = Counter()
    assert len(data.from_rows(rows, "hub", left_out=counts)) == 4
    assert counts == {"without problem or answer": 1}


def test_repeats_and_overlap_are_left_out_and_counted(tmp_path):
    problems = [
        ("What is $2^{10}$?", "1024"),
        ("what is 2^10", "1024"),
        ("What is  $2^{10}$ ?", "1,024"),
        ("AIME one!", "3"),
    ]
    problems += [("aime\nOne", "3"), ("A MATH-500 one", "4"), ("new", "5")]
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps({"problem": p, "answer": a}) for p, a in problems))
    tests = {"aime24": ["AIME  one."], "math500": ["other", user("a math-500 one" + THINK)]}
    pairs, line = prepared(path, tests, ["amc23", "minerva"])
    assert pairs == [("What is $2^{10}$?", "1024"), ("new", "5")]
    for part in (
        "7 rows",
        "2 repeated",
        "1 of these with another answer",
        "2 in aime24",
        "1 in math500",
        "left 2 problems",
        "not compared with amc23, minerva",
    ):
        assert part in line
    with pytest.raises(ValueError, match="no problem is left: 7 rows, 6 in x, 1 in y"):
        prepared(path, {"x": ["what is 2^10", "aime one", "a math-500 one"], "y": ["new"]})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is $\\dfrac{1}{2}$?", "what is \\( \\frac12 \\)", True),
        ("Let $\\left(x, y\\right)$ be", "let (x,y) be", True),
        ("a non-negative integer\u2014odd", "A nonnegative integer odd", True),
        ("user: How?" + THINK, "How?", True),
        (DAPO_BEFORE + "How?" + DAPO_AFTER, "how", True),
        ("3\u22124", "3-4", True),
        ("3+4=", "3-4=", False),
        ("1.5", "15", False),
        ("(1+2)*3", "1+(2*3)", False),
        ("x < 3", "x > 3", False),
        ("Find n!", "find n", False),
        ("Good luck!", "good luck", True),
        ("\u6c42 x", "\u6c42 y", False),
        ("?", "!?!", False),
        ("gcd(12, 3)", "gcd(1, 23)", False),
        (r"\frac{12}{3}+1", r"\frac{1}{23}+1", False),
        ("Use [1, 23, 4]", "Use [12, 3, 4]", False),
        ("1,000 apples and 10{,}000", "1000 apples, and 10\\,000", True),
        ("(1, 200)", "(1,200)", False),
        ("2²+1", "22+1", False),
        ("2²+1", "2^2 + 1", True),
        ("10⁻³", "10^{-3}", True),
        ("10⁶", "106", False),
        ("x₁₂ + 1", "x_{12}+1", True),
        ("x₁ + 1", "x1+1", False),
        ("½ of it", r"\frac12 of it", True),
        ("2½", "21/2", False),
    ],
)
def test_which_problems_are_the_same(one, other, same):
    assert (data.normal(one) == data.normal(other)) == same


def test_difficulty_keeps_pass_rates_within_the_range_and_counts_the_others(tmp_path):
    rows = [{"problem": f"p{i}", "answer": "1", "difficulty": f"{i}/8"} for i in range(9)]
    rows += [{"problem": "p9", "answer": "1", "difficulty": None}, {"problem": "p10", "answer": "1", "difficulty": 0.5}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    for name in (path, f"polaris={path}"):
        pairs, counts = data.load_pairs(name, difficulty=(0.125, 0.5))
        assert [problem for problem, _ in pairs] == ["p1", "p2", "p3", "p4", "p10"]
        assert counts["outside --difficulty"] == 6
        with pytest.raises(ValueError, match="no row is left"):
            data.load_pairs(name, difficulty=(0.9, 0.95))
    path = write(tmp_path, "b.jsonl", '{"problem": "x", "answer": "1", "difficulty": "hard"}')
    with pytest.raises(ValueError, match="row 1: difficulty 'hard' is no pass rate"):
        data.load_pairs(path, difficulty=(0, 0.9))
    path = write(tmp_path, "c.jsonl", '{"problem": "x", "answer": "1"}')
    with pytest.raises(ValueError, match="lacks difficulty.*it has problem, answer"):
        data.load_pairs(path, difficulty=(0, 0.9))
    with pytest.raises(ValueError, match="lacks dataset.*it has problem, answer"):
        data.load_pairs(f"dolci={path}")


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (5, "5"),
        (0, "0"),
        (None, ""),
        ("  ", ""),
        ([], ""),
        ([["1"]], ""),
        (["1", "2"], "1"),
        ({"ground_truth": "3"}, "3"),
        ({"gold": "3"}, ""),
        ("\\boxed{\\frac{1}{2}} then \\boxed{3", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{2\\} then", ""),
        ("\\boxed{1", ""),
        ("\\boxed{1} \\boxed{}", ""),
        ("\\fbox{7}", "7"),
        ("\\boxed{6} \\boxed 7.", "7"),
        ("a #### b #### -1,234", "-1234"),
        ("1,234", "1,234"),
        ("word " * 100, ""),
        ("\\boxed{\\text{(C)}}", "\\text{(C)}"),
    ],
)
def test_final_answer(value, answer):
    assert data.final_answer(value) == answer


# ---------------------------------------------------------------- the hub and its errors


def hub(tmp_path, rows):
    """A folder that `datasets` reads as it reads a data set of the hub."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", "train.jsonl", "\n".join(map(json.dumps, rows)))
    return str(tmp_path / "set")


def test_other_data_sets_by_their_columns(tmp_path, monkeypatch):
    folder, load = hub(tmp_path, [{"q": "1+1" + THINK, "gold": 2}]), datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *args, **kw: load({"a/b-1.5": folder}[name], *args, **kw)
    )
    assert data.load_pairs("a/b-1.5", "q", "gold")[0] == [("1+1", "2")]
    with pytest.raises(
        ValueError, match=r"^a/b-1.5 has no column 'problem' or .*; it has q, gold: .*--problem-column$"
    ):
        data.load_pairs("a/b-1.5")
    with pytest.raises(ValueError, match=r"has no column 'answer' or 'solution'; it has q, gold: .*--answer-column$"):
        data.load_pairs("a/b-1.5", "q")
    with pytest.raises(
        ValueError, match=r"a/b-1.5 cannot be loaded \(Unknown split .*train.*--data-options.*FILE.parquet"
    ):
        data.load_pairs("a/b-1.5", "q", "gold", split="test")
    with pytest.raises(ValueError, match=r"BuilderConfig 'en' not found. Available: .*--data-options"):
        data.load_pairs("a/b-1.5", "q", "gold", config="en")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'x' on the Hub"), ": go online, or .* give --data gsm8k=FILE.parquet"),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."),
            "gated.*hf auth login",
        ),
        (datasets.exceptions.DatasetNotFoundError("Revision 'y' doesn't exist"), "Revision 'y'.*--data-options"),
        (
            ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']"),
            "socratic.*--data-options",
        ),
    ],
)
def test_errors_of_the_hub_are_one_line_that_says_how_to_go_on(monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=words) as caught:
        data.load_pairs("gsm8k", revision="y")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("openai/gsm8k cannot be loaded")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("polariss", {}, "no data 'polariss': say polaris, dolci, dapo, gsm8k, math"),
        ("/nowhere/x.jsonl", {}, "no data file at /nowhere/x.jsonl"),
        ("polaris=/nowhere/x.jsonl", {}, "no data file at /nowhere/x.jsonl"),
        ("x.jsonl", {"revision": "abc"}, "--data-options are for the hub, and x.jsonl is a file"),
    ],
)
def test_names_that_mean_nothing(name, options, words):
    with pytest.raises((ValueError, OSError), match=words):
        data.load_pairs(name, **options)


def test_benchmarks_that_cannot_be_had_are_named_and_without_network_not_all_tried():
    def broken(name):
        if name == "b":
            raise ValueError("b is broken")
        return [f"{name} problem"]

    assert data.evaluation_problems(["a", "b", "c"], broken) == ({"a": ["a problem"], "c": ["c problem"]}, ["b"])
    tried = []

    def unreachable(name):
        tried.append(name)
        if name == "a":
            return []
        raise ValueError("no network") from ConnectionError()

    assert data.evaluation_problems(["a", "b", "c", "d"], unreachable) == ({"a": []}, ["b", "c", "d"])
    assert tried == ["a", "b"]


def test_fingerprint_is_of_problems_answers_and_their_order():
    pairs = [("a", "1"), (user("b"), "2")]
    assert data.fingerprint(pairs) == data.fingerprint(list(pairs)) and len(data.fingerprint(pairs)) == 64
    for other in ([("a", "1"), (user("b"), "3")], [("a", "1"), (user("c"), "2")], pairs[::-1], pairs[:1]):
        assert data.fingerprint(other) != data.fingerprint(pairs)


# ---------------------------------------------------------------- what the model sees


def words_tokenizer(bos: bool = False):
    """One token a word; with `bos` one is put before plain text, as Llama's tokenizer does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    text = "<s> user assistant system x " + data.INSTRUCTION + THINK + " think off on"
    vocabulary = {word: i for i, word in enumerate(["<unk>", *dict.fromkeys(text.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)
THINKING_CHAT = PLAIN_CHAT + "{% if enable_thinking is defined and enable_thinking is false %} think off{% endif %}"


def seen(tokenizer, problem, **options) -> str:
    (prompt,), skipped = data.encode([(problem, "1")], tokenizer, 100, **options)
    assert skipped == 0
    return tokenizer.decode(prompt.ids)


def test_chat_models_are_asked_for_a_box_exactly_once():
    tokenizer = words_tokenizer()
    tokenizer.chat_template = PLAIN_CHAT
    asked = " ".join(data.INSTRUCTION.split())
    assert seen(tokenizer, "x") == f"user x {asked} assistant"
    assert seen(tokenizer, "x" + THINK) == f"user x{THINK} assistant"
    assert seen(tokenizer, "x" + data.INSTRUCTION) == f"user x {asked} assistant"
    assert seen(tokenizer, "x \\boxed{}").endswith(f"{asked} assistant")  # a blank to fill in is not an instruction
    messages = [{"role": "system", "content": "on"}, {"role": "user", "content": "x"}]
    assert seen(tokenizer, messages) == "system on user x assistant"


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "x"}], 3])
def test_messages_need_a_role_and_a_text(content):
    good, bad = ([{"role": "user", "content": c}] for c in ("x", content))
    rows = [{"problem": problem, "answer": "1"} for problem in (good, bad, ["x"], [])]
    counts = Counter()
    assert data.from_rows(rows, "hub", left_out=counts) == [("x", "1")]
    assert counts == {"without problem or answer": 3}
    for row in rows[1:]:
        with pytest.raises(ValueError, match="a.jsonl row 2 has an empty 'problem' .*messages with a role and a text"):
            data.from_rows([rows[0], row], "a.jsonl")


def test_thinking_reaches_templates_that_know_it_and_is_refused_by_others():
    tokenizer = words_tokenizer()
    tokenizer.chat_template = THINKING_CHAT
    assert seen(tokenizer, "x", thinking=False).endswith("assistant think off")
    assert seen(tokenizer, "x", thinking=True).endswith("assistant") and seen(tokenizer, "x").endswith("assistant")
    tokenizer.chat_template = PLAIN_CHAT
    for thinking in (True, False):
        with pytest.raises(ValueError, match="--thinking.*chat template does not know enable_thinking"):
            seen(tokenizer, "x", thinking=thinking)
    with pytest.raises(ValueError, match="--thinking.*no chat template"):
        seen(words_tokenizer(), "x", thinking=True)


TEMPLATES = {
    "{{ raise_exception('only one system message') }}": "only one system message",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{% for m in messages %": "TemplateSyntaxError",
    "{{ messages[0].content.nothing.more }}": "UndefinedError",
    "{{ 'x' * 3000000 }}": "it adds 3,000,000 characters",
    "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}": "more than 1 seconds",
    "": "the model knows no sign of 'x'",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_that_fails_is_one_line(template, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 1)
    tokenizer = words_tokenizer()
    tokenizer.chat_template = template or "{# nothing #}"
    with pytest.raises(ValueError, match=TEMPLATES[template]) as error:
        data.encode([("x", "1")], tokenizer, 100)
    assert "\n" not in str(error.value)


def test_prompts_are_the_same_however_many_are_read_at_once(monkeypatch):
    tokenizer = words_tokenizer(bos=True)
    pairs = [(word, "1") for word in ("x", "user x", "on", "off on", "x x x")]
    for template in (None, "<s> " + PLAIN_CHAT):
        tokenizer.chat_template = template
        whole, skipped = data.encode(pairs, tokenizer, 60)
        monkeypatch.setattr(data, "AT_ONCE", 2)
        assert data.encode(pairs, tokenizer, 60) == (whole, skipped) and len(whole) == 5 and skipped == 0
        singly = [data.encode([pair], tokenizer, 60)[0][0].ids for pair in pairs]
        assert [prompt.ids for prompt in whole] == singly
        monkeypatch.undo()


def test_a_problem_that_cannot_be_read_is_named_among_many():
    with pytest.raises(ValueError, match="the tokenizer cannot read 'What is it"):
        data.encode([("1+1=", "2"), ("What is it?", "3"), ("2+2=", "4")], tiny.make_tokenizer(), 100)


def test_tokens_that_the_model_does_not_know_are_refused():
    prompts, _ = data.encode([("1+1=", "2")], tiny.make_tokenizer(), 100)
    data.check_ids(prompts, 15)
    with pytest.raises(ValueError, match="makes token 14 of '1.1=', and the model has 14"):
        data.check_ids(prompts, 14)


def test_data_that_is_not_there_is_met_before_benchmarks_are_asked_for(monkeypatch):
    def asked(*_):
        raise AssertionError("it asked")

    monkeypatch.setattr(data, "evaluation_problems", asked)
    cfg = Namespace(data="nosuch", difficulty=(0.0, 1.0), keep_overlap=False, data_options="")
    cfg.problem_column = cfg.answer_column = None
    with pytest.raises(ValueError, match="no data 'nosuch'"):
        prompts_of.clean_pairs(cfg)


@pytest.mark.parametrize("bos", [True, False])
def test_one_bos_at_most(bos):
    tokenizer = words_tokenizer(bos)
    start = "<s> " if bos else ""
    assert seen(tokenizer, "x") == start + "x"  # without a chat template: plain text, and no instruction
    assert seen(tokenizer, "<s> x") == "<s> x"
    tokenizer.chat_template = "<s> " + PLAIN_CHAT
    assert seen(tokenizer, user("x")) == "<s> user x assistant"
    tokenizer.chat_template = "<s> <s> " + PLAIN_CHAT
    assert seen(tokenizer, user("x")) == "<s> user x assistant"


def test_chat_template_is_applied_once_as_ids():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}={{ m.content[:3] }}={% endfor %}{% if add_generation_prompt %}+{% endif %}"
    )
    (prompt,), _ = data.encode([("123456", "1")], tokenizer, 100)
    assert tokenizer.decode(prompt.ids) == "=123=+" and isinstance(prompt.ids[0], int)
    (prompt,), _ = data.encode([([{"role": "user", "content": "42"}], "1")], tokenizer, 100)
    assert tokenizer.decode(prompt.ids) == "=42=+"


def test_csv_is_text_and_its_rows_are_whole(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('\ufeffproblem,answer\r\n"What is 1, plus 2?",007\r\n"two\nlines",0.50\r\nthree,None\r\n')
    rows = [("What is 1, plus 2?", "007"), ("two\nlines", "0.50"), ("three", "None")]
    assert data.from_rows(data.read_rows(str(path)), str(path)) == rows
    for line in ("What is 1, plus 2?,3", "no answer"):
        path.write_text(f"problem,answer\na,1\n{line}\n")
        with pytest.raises(ValueError, match="row 2 has not as many fields"):
            data.read_rows(str(path))


def test_json_lines_may_hold_any_character_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('\ufeff{"problem": "a\u2028b\x85c", "answer": 1}\r\n{"problem": "d", "answer": "2"}\n', newline="")
    assert data.from_rows(data.read_rows(str(path)), "x") == [("a\u2028b\x85c", "1"), ("d", "2")]
