"""Prompts: the embedded task, local files, and every way in which a file can be wrong."""

import json
import random

import pytest

import data
import tiny


def test_embedded_task_is_right_and_without_repeats():
    pairs = data.arithmetic(2400)
    assert len({question for question, _ in pairs}) == 2400
    for question, answer in pairs:
        assert len(question) == 10 and question[4] in "+-" and question[9] == "="
        assert eval(f"{int(question[:4])}{question[4]}{int(question[5:9])}") == int(answer) >= 0
    assert pairs == data.arithmetic(2400) and pairs != data.arithmetic(2400, seed=1)


def test_more_problems_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(data, "SIZE_WEIGHTS", (1, 0, 0, 0))  # one digit: 100 sums and 55 differences
    assert len(data.arithmetic(150)) == 150
    with pytest.raises(ValueError, match="fewer"):
        data.arithmetic(160)


def test_pupil_errs_at_its_stated_rate_and_otherwise_is_right():
    pupil, rng = tiny.Pupil(), random.Random(0)
    for question, answer in data.arithmetic(30, seed=3):
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
    import datasets

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


def test_missing_file_and_wrong_encoding(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file"):
        data.read_rows(str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        data.read_rows(str(tmp_path / "latin.jsonl"))


def test_held_out_problems_are_never_trained_on():
    pairs = [(f"problem {i % 30}", str(i)) for i in range(90)]  # each problem three times
    training, held_out = data.split(pairs, 10)
    assert len(held_out) == 10 and not {p for p, _ in training} & {p for p, _ in held_out}
    assert len(training) == 60
    assert data.split(pairs, 10) == (training, held_out)


def test_long_prompts_are_left_out_and_counted_never_cut():
    tokenizer = tiny.make_tokenizer()
    prompts, skipped = data.encode([("12+3=", "15"), ("0012+0003=", "15"), ("1+1=", "2")], tokenizer, 5)
    assert skipped == 1 and [p.text for p in prompts] == ["12+3=", "1+1="]
    assert [p.index for p in prompts] == [0, 1] and len(prompts[0].ids) == 5


def test_chat_template_is_applied_once_as_ids():
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}={{ m.content[:3] }}={% endfor %}{% if add_generation_prompt %}+{% endif %}"
    )
    (prompt,), _ = data.encode([("123456", "1")], tokenizer, 100)
    assert tokenizer.decode(prompt.ids) == "=123=+" and isinstance(prompt.ids[0], int)
    (prompt,), _ = data.encode([([{"role": "user", "content": "42"}], "1")], tokenizer, 100)
    assert tokenizer.decode(prompt.ids) == "=42=+"
