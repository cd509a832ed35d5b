"""What is the user's own: a function that scores answers, a task in a file, and what a rule is told by the loop."""

import json
from pathlib import Path

import pytest

import eval
import reward
import train
from lab import compare
from replay import Group
from support import config, plot
from tasks import benchmarks, data, own, tiny
from tests.helpers import group

TINY = str(tiny.home())
SMALL = ["--prompts-per-step", "6", "--answers-per-prompt", "4", "--eval-prompts", "20", "--eval-every", "4"]


@pytest.fixture(scope="session", autouse=True)
def embedded_model():
    tiny.make(TINY)


def run(out: Path, *flags: str) -> list[dict]:
    assert train.main([*SMALL, "--out", str(out), *flags]) == 0
    return plot.read(out / "metrics.jsonl")


def refused(capsys, *words: str, program=train) -> str:
    """The one line that a mistake ends in."""
    with pytest.raises(SystemExit) as stop:
        program.main([*(SMALL if program is train else []), *words])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: "), lines
    assert sum("error: " in line for line in lines) == 1 and "Traceback" not in "".join(lines)
    return lines[-1]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------- a row reaches its reward


def prompt(text: str, gold, **row) -> data.Prompt:
    return data.Prompt(0, text, str(gold), (1,), gold, row)


PROMPTS = [prompt("one?", {"n": 1}, level=3, kind="a"), prompt("two?", {"n": 2}, level=5, kind="b")]


def told(tmp_path, signature: str) -> dict:
    """What a function of these arguments is called with."""
    code = f"calls = []\ndef score({signature}):\n    calls.append(locals())\n    return [1.0] * len(responses)\n"
    path = write(tmp_path / "mine.py", code)
    scorer = own.Scorer(f"{path}:score")
    scorer.check(PROMPTS)
    assert scorer.of_prompts(["x", "y"], PROMPTS, [7, 8], [False, True]) == [1.0, 1.0]
    return own.module_of(path).calls[0]


def test_further_arguments_are_columns_prompts_lengths_and_cuts(tmp_path):
    found = told(tmp_path, "responses, golds, level, truncated, prompts, lengths")
    assert found == {
        "responses": ["x", "y"],
        "golds": [{"n": 1}, {"n": 2}],
        "level": [3, 5],
        "truncated": [False, True],
        "prompts": ["one?", "two?"],
        "lengths": [7, 8],
    }


def test_the_first_two_arguments_go_by_place_and_a_default_makes_a_column_optional(tmp_path):
    found = told(tmp_path, "responses, answers, *, kind, absent=9, level=None")
    assert found["answers"] == [{"n": 1}, {"n": 2}] and found["absent"] == 9
    assert (found["kind"], found["level"]) == (["a", "b"], [3, 5])


def test_two_stars_take_everything(tmp_path):
    found = told(tmp_path, "responses, golds, level, **more")
    assert set(found["more"]) == {"kind", "prompts", "lengths", "truncated"}


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path):
    scorer = own.Scorer(write(tmp_path / "a.py", "def score(responses, golds, hard):\n    return golds\n") + ":score")
    with pytest.raises(ValueError, match="'hard' that is not there; there is level, kind, prompts, lengths, truncated"):
        scorer.check(PROMPTS)
    with pytest.raises(ValueError, match="'hard' that is not there in 2 of 3 rows"):
        scorer.check([*PROMPTS, prompt("three?", 3, hard=1)])
    with pytest.raises(ValueError, match="'hard' that is not there; there is prompts, lengths, truncated"):
        scorer.check([data.Prompt(0, "1+1=", "2")])
    assert scorer.check([prompt("three?", 3, hard=1)]) is None


@pytest.mark.parametrize("signature", ["", "responses", "*, responses, golds", "responses, *golds"])
def test_a_function_takes_responses_and_golds(tmp_path, signature):
    with pytest.raises(ValueError, match="must take the responses and the golds first"):
        own.Scorer(write(tmp_path / "a.py", f"def score({signature}):\n    return []\n") + ":score")


def test_an_error_names_the_line_in_the_users_file_and_not_the_librarys(tmp_path):
    text = (
        "import json\n\ndef score(responses, golds):\n    return inner(golds)\n\ndef inner(x):\n    json.loads('{')\n"
    )
    path = write(tmp_path / "a.py", text)
    with pytest.raises(reward.RewardBroken, match=rf"{path}, line 7 \(JSONDecodeError: "):
        own.Scorer(f"{path}:score")(["x"], ["y"])


def test_any_finite_number_is_a_reward_and_right_is_one_or_more(tmp_path):
    scorer = own.Scorer(write(tmp_path / "a.py", "def score(responses, golds):\n    return golds\n") + ":score")
    assert scorer(["x"] * 4, [-7, 0.5, True, 40.25]) == [-7.0, 0.5, 1.0, 40.25]
    assert group(rewards=(-7, 0, 0.5, 40)).num_correct == 1.5
    assert group(rewards=(-1, -2, -3, -4)).num_correct == 0.0 and not group(rewards=(-1, -2, -3, -4)).dead
    for equal, correct in ((-2.0, 0.0), (0.0, 0.0), (0.5, 0.0), (1.0, 4.0), (3.0, 4.0)):
        one: Group = group(rewards=(equal,) * 4)
        assert one.dead and one.num_correct == correct


def test_rewards_of_any_size_train_and_are_logged(tmp_path):
    text = """def score(responses, golds, lengths):
    return [n - 20 * (r[-1] == g[-1]) for r, g, n in zip(responses, golds, lengths)]
"""
    rows = run(tmp_path / "run", "--reward", write(tmp_path / "a.py", text) + ":score", "--steps", "4", "--replay")
    assert min(row["reward"] for row in rows) < 10 and all(sum(row["pass_rates_fresh"]) >= 3 for row in rows)
    assert 0 < rows[-1]["eval_accuracy"] < 0.9  # judged by the task, which knows nothing of lengths


# ---------------------------------------------------------------- who judges


@pytest.mark.parametrize(
    ("settings", "judge"),
    [
        ({"reward": "equation"}, "equation"),
        ({"reward": "a.py:f"}, "equation"),
        ({"reward": "always"}, "equation"),
        ({"reward": "a.py:f", "data": "polaris"}, "math"),
        ({"reward": "a.py:f", "data": "gsm8k=copy.parquet"}, "math"),
        ({"reward": "a.py:f", "data": "openai/gsm8k"}, "math"),
        ({"reward": "a.py:f", "data": "mine.jsonl"}, "a.py:f"),
        ({"reward": "random", "data": "mine.jsonl"}, "math"),
        ({"reward": "math", "data": "mine.jsonl"}, "math"),
        ({"reward": "a.py:f", "data": "mine.jsonl", "judge": "b.py:g"}, "b.py:g"),
        ({"reward": "a.py:f", "task": "t.py"}, "t.py:score"),
        ({"reward": "a.py:f", "task": "t.py", "then": ("u.py",)}, "tasks"),
    ],
)
def test_held_out_answers_are_judged_by_the_tasks_own_verifier_where_there_is_one(settings, judge):
    assert reward.judge_of(train.Config(**settings)) == judge


def test_a_judge_of_ones_own_scores_held_out_answers_and_is_in_the_settings(tmp_path):
    never = (
        write(tmp_path / "never.py", "def right(responses, golds):\n    return [0.9 for _ in responses]\n") + ":right"
    )
    rows = run(tmp_path / "run", "--judge", never, "--steps", "4")
    assert rows[-1]["eval_accuracy"] == 0 < rows[-1]["reward"]  # only a whole one is right
    assert json.loads((tmp_path / "run" / "config.json").read_text())["judge"] == never


def test_compare_refuses_runs_that_were_judged_differently():
    compare.check_judges({"math", None})
    with pytest.raises(ValueError, match="judged by a.py:f and by math, and cannot be compared; give all one --judge"):
        compare.check_judges({"math", "a.py:f", None})


# ---------------------------------------------------------------- data with a reward of one's own


def test_golds_of_any_kind_reach_a_reward_of_the_users_own(tmp_path):
    rows = [
        {"problem": "1+1=", "answer": {"a": [1, 2]}, "level": 1},
        {"problem": "1+2=", "answer": "x" * 5000, "level": 2},
        {"problem": "1+3=", "answer": "work #### 1,234", "level": 3},
        {"problem": "1+4=", "answer": None, "level": 4},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    pairs, _ = data.load_pairs(path, keep="any gold")
    assert [pair[2] for pair in pairs] == [row["answer"] for row in rows] and [pair[3] for pair in pairs] == rows
    with pytest.raises(ValueError, match="row 1 has no final answer"):
        data.load_pairs(path)
    pairs, _ = data.load_pairs(write(tmp_path / "b.jsonl", json.dumps(rows[2])), keep="row")
    assert pairs == [("1+3=", "1234", "work #### 1,234", rows[2])]


def test_a_file_needs_no_answer_column_where_the_reward_takes_others(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"problem": "1+1=", "target": 2}')
    assert data.load_pairs(path, keep="any gold")[0] == [("1+1=", "", None, {"problem": "1+1=", "target": 2})]
    with pytest.raises(ValueError, match="no column 'gold'"):
        data.load_pairs(path, answer_column="gold", keep="any gold")


def test_the_golds_of_known_sets_come_both_ways(tmp_path):
    row = {"question": "1+1", "answer": "so 2 #### 2"}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    assert data.load_pairs(f"gsm8k={path}", keep="any gold")[0] == [("1+1", "2", "so 2 #### 2", row)]


def test_another_row_is_another_fingerprint():
    one = data.fingerprint([("a", "b", {"level": 1})])
    assert one != data.fingerprint([("a", "b", {"level": 2})]) != data.fingerprint([("a", "b")])


# ---------------------------------------------------------------- a task in a file

TASK = """
import random

asked = []


def rows():
    rng = random.Random(1)
    made = []
    for _ in range({count}):
        a, b = rng.randrange(10), rng.randrange(10, 100)
        made.append({{"problem": f"{{b:04d}}+{{a:04d}}=", "sum": a + b}})
        asked.append(a)
    return made


def score(responses, golds, sum, prompts):
    assert asked and golds[0] is None and prompts[0].endswith("=")
    return [float(response.rpartition("=")[2].lstrip("0") == str(right)) for response, right in zip(responses, sum)]
"""


def test_a_task_in_a_file_is_trained_judged_and_resumed(tmp_path, capsys):
    task = write(tmp_path / "task.py", TASK.format(count=300))
    rows = run(tmp_path / "run", "--task", task, "--steps", "4", "--replay")
    assert 0 < rows[-1]["eval_accuracy"] < 1 and "300 rows, " in capsys.readouterr().out
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["reward"] == settings["judge"] == f"{task}:score" and settings["data"] == ""
    more = run(tmp_path / "run", "--task", task, "--steps", "6", "--replay", "--resume")
    assert len(more) == 6
    write(tmp_path / "task.py", TASK.format(count=299))
    assert "the data has changed" in refused(
        capsys, "--out", str(tmp_path / "run"), "--task", task, "--steps", "8", "--replay", "--resume"
    )


def example(beginning: str) -> str:
    """The first example of docs/usage.md with these words in it."""
    usage = (config.ROOT / "docs" / "usage.md").read_text()
    texts = [part.removeprefix("python") for part in usage.split("```") if part.startswith("python")]
    return next(text for text in texts if beginning in text)


def test_the_task_of_the_documentation_scores_its_own_words(tmp_path):
    path = write(tmp_path / "my_task.py", example("def rows()"))
    training, held_out, _ = own.problems(path)
    prompts = [data.Prompt(i, *pair[:2], (1,), *pair[2:]) for i, pair in enumerate(training[:2])]
    scorer = own.Scorer(config.scorer_of(path))
    scorer.check(prompts)
    answers = [prompts[0].row["word"][::-1], "no"]
    assert scorer.of_prompts(answers, prompts, [5, 2], [False] * 2) == [1.0, 0.0] and len(held_out) > 100


def test_a_tenth_of_a_task_is_held_out_and_repeats_are_dropped(tmp_path):
    path = write(tmp_path / "t.py", TASK.format(count=800))
    training, held_out, note = own.problems(path)
    texts = [pair[0] for pair in training + held_out]
    assert len(texts) == len(set(texts)) < 800 and len(held_out) == len(texts) // 10
    assert f"800 rows, {800 - len(texts)} repeated" in note
    assert own.problems(path) == (training, held_out, note)


def test_eval_asks_what_training_has_held_out_of_a_task(tmp_path, capsys):
    task = write(tmp_path / "task.py", TASK.format(count=300))
    assert eval.main(["--task", task, "--samples", "2", "--out", str(tmp_path / "eval")]) == 0
    found = json.loads((tmp_path / "eval" / "results.json").read_text())["benchmarks"]["task"]
    held_out = own.problems(task)[1]
    assert len(found["ids"]) == len(held_out) and found["reward"] == f"{task}:score"
    asked = [json.loads(line) for line in (tmp_path / "eval" / "task@2.jsonl").read_text().splitlines()]
    for row in asked:
        right = row["response"].rpartition("=")[2].lstrip("0") == str(held_out[row["problem"]][3]["sum"])
        assert row["score"] == right
    assert 0 < found["avg"]["mean"] < 1
    assert "leave out --task or --benchmarks" in refused(capsys, "--task", task, "--benchmarks", "x", program=eval)
    few = write(tmp_path / "few.py", TASK.format(count=8))
    assert "too few rows to hold any out" in refused(capsys, "--task", few, program=eval)


def test_a_reward_of_the_users_own_has_the_columns_of_a_file_in_eval(tmp_path, capsys):
    rows = [{"problem": f"{a:04d}+0011=", "answer": [a, {"sum": a + 11}], "level": a} for a in range(10, 30)]
    path = write(tmp_path / "mine.jsonl", "\n".join(map(json.dumps, rows)))
    code = """def right(responses, golds, level, lengths):
    assert all(gold[0] == a and n > 0 for gold, a, n in zip(golds, level, lengths))
    return [r.endswith(str(gold[1]["sum"])) for r, gold in zip(responses, golds)]
"""
    flags = ["--benchmarks", path, "--samples", "1", "--out", str(tmp_path / "eval")]
    mine = write(tmp_path / "mine.py", code)
    assert eval.main([*flags, "--reward", f"{mine}:right"]) == 0
    assert 0 < json.loads((tmp_path / "eval" / "results.json").read_text())["benchmarks"]["mine"]["avg"]["mean"] < 1
    write(tmp_path / "mine.py", code.replace("level", "depth"))
    error = refused(capsys, *flags, "--reward", f"{mine}:right", program=eval)
    assert "asks for a column 'depth' that is not there; there is problem, answer, level" in error


@pytest.mark.parametrize(
    ("place", "sharing"), [("tiny-model", "digits"), ("tiny-model-none", "none"), ("run", "columns"), ("other", "")]
)
def test_eval_knows_the_embedded_model_when_it_sees_it(tmp_path, place, sharing):
    folder = tmp_path / place
    if place == "run":
        folder.mkdir()
        write(folder / "config.json", '{"sharing": "columns"}')
        folder = folder / "model"
    config = tiny.make_config()
    config.hidden_size = 256 if place == "other" else config.hidden_size
    config.save_pretrained(folder)
    assert tiny.sharing_of(str(folder)) == sharing
    cfg = eval.settled(eval.Config(model=str(folder)), [])
    names = {"digits": ("embedded",), "": tuple(benchmarks.BENCHMARKS)}
    assert cfg.benchmarks == names.get(sharing, (f"embedded-{sharing}",))
    assert cfg.max_tokens == (15 if sharing else 7168) and tiny.sharing_of(str(tmp_path / "nowhere")) == ""


BAD_TASKS = {
    "rows = []\ndef score(responses, golds): ...": "lacks 'rows'",
    "def rows(): return []": "lacks 'score'",
    "def rows(): return []\ndef score(responses, golds): ...": "has no rows",
    "def rows(): ...\ndef score(responses): ...": "must take the responses and the golds first",
    "def rows(): return [5]\ndef score(responses, golds): ...": "row 1 is int; return dicts, each with a `problem`",
    "def rows(): return None\ndef score(responses, golds): ...": "failed",
    "def rows():\n    1 / 0\ndef score(responses, golds): ...": "failed at line 2 (ZeroDivisionError: ",
    "def rows(): return [{'x': 1}]\ndef score(responses, golds): ...": "has no column 'problem'",
    "def rows(): return [{'problem': '1+1='}] * 9\ndef score(responses, golds, sum): ...": "asks for a column 'sum'",
    "def rows(": "cannot be imported",
}


@pytest.mark.parametrize("text", BAD_TASKS)
def test_a_task_that_is_none_is_one_line(tmp_path, capsys, text):
    task = write(tmp_path / "task.py", text)
    error = refused(capsys, "--out", str(tmp_path / "run"), "--task", task)
    assert BAD_TASKS[text] in error and not (tmp_path / "run").exists()


def test_a_task_that_is_no_file(tmp_path, capsys):
    assert "there is no file /nowhere/t.py" in refused(capsys, "--task", "/nowhere/t.py")
    assert "give path/to/task.py" in refused(capsys, "--task", "countdown")
    assert "leave out --data or --task" in refused(capsys, "--task", "t.py", "--data", "x.jsonl")


def test_go_on_is_said_only_where_there_is_a_checkpoint(tmp_path, capsys):
    text = "n = 0\ndef score(responses, golds):\n    global n\n    n += 1\n    return [1 / (n < 4)] * len(responses)\n"
    flags = ["--reward", write(tmp_path / "a.py", text) + ":score", "--out", str(tmp_path / "run")]
    assert "line 5 (ZeroDivisionError" in (first := refused(capsys, *flags)) and "--resume" not in first
    write(tmp_path / "a.py", text + "# again\n")
    again = refused(capsys, *flags[:2], "--save-every", "2", "--out", str(tmp_path / "other"))
    assert f"go on with --resume --out {tmp_path / 'other'}" in again


# ---------------------------------------------------------------- what an instruction is


def test_an_instruction_of_ones_own_or_none():
    assert data.as_messages("x")[0]["content"] == "x" + data.INSTRUCTION
    assert data.as_messages("x", "none")[0]["content"] == "x"
    assert data.as_messages("x", "Say yes.")[0]["content"] == "x\n\nSay yes."
    messages = [{"role": "user", "content": "x"}]
    assert data.as_messages(messages, "Say yes.") == messages


def test_a_tokenizer_without_a_template_gets_an_instruction_that_was_asked_for():
    tokenizer = tiny.make_tokenizer()
    seen = {}
    for instruction in ("auto", "none", "9"):
        try:
            (one,), _ = data.encode([("12", "1")], tokenizer, 100, instruction=instruction)
            seen[instruction] = tokenizer.decode(one.ids)
        except ValueError as error:  # it knows no line break
            seen[instruction] = str(error)
    assert seen["auto"] == seen["none"] == "12" and "12\\n\\n9" in seen["9"]


# ---------------------------------------------------------------- what the loop tells a rule

NOTES = """
import json
from replay import ReplayStore, Uniform


def note(*what):
    with open("{file}", "a") as file:
        file.write(json.dumps(what) + chr(10))


class Clock(Uniform):
    def draw(self, n, step):
        note("draw", step, self.progress)
        return super().draw(n, step)


class Watcher(ReplayStore):
    def watch(self, groups, step):
        note("watch", step, self.progress, len(groups), sum(group.dead for group in groups))

    def complete(self, useful, places, step):
        note("complete", step, len(useful))
        return useful

    def figures(self, step):
        return {{"watched": step}}
"""


def test_a_rule_hears_of_all_groups_and_how_far_the_run_is_at_a_resume_too(tmp_path):
    path = write(tmp_path / "rule.py", NOTES.format(file=tmp_path / "notes"))
    for flags in ("--steps 3", "--steps 6 --resume", "--steps 1000 --max-rollouts 240 --resume"):
        run(tmp_path / "run", "--replay", f"{path}:Clock+{path}:Watcher", *flags.split())
    seen = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]

    # by steps, and where answers run out before, by answers: 24 a step
    draws = {entry[1]: entry[2] for entry in seen if entry[0] == "draw"}
    assert [draws[step] for step in (1, 2, 3)] == [0, 1 / 3, 2 / 3] and [draws[4], draws[6]] == [3 / 6, 5 / 6]
    assert [draws[7], draws[10]] == [144 / 240, 216 / 240] and len(draws) == 10

    watched = [entry for entry in seen if entry[0] == "watch"]
    useful = {entry[1]: entry[2] for entry in seen if entry[0] == "complete"}
    assert [entry[1] for entry in watched] == list(range(1, 11)) and any(entry[4] for entry in watched)
    for _, step, progress, count, dead in watched:
        assert count == 6 and count - dead == useful[step] and progress == draws[step]
