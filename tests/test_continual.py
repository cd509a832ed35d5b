"""Continual Prompt Replay: stages in order, what of a batch comes from earlier ones, and the experiment with it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import train
from lab import continual, figures
from lab.continual import ContinualReplay
from replay import Uniform
from tasks import stages

P = 8


def staged(sizes=(40, 40), share=0.25, seed=0) -> ContinualReplay:
    sampler = ContinualReplay(sum(sizes), seed, share)
    sampler.stage = np.repeat(np.arange(len(sizes)), sizes)
    return sampler


def draw_all(sampler, steps: int) -> list[list[int]]:
    batches = []
    for step in range(1, steps + 1):
        sampler.progress = (step - 1) / steps
        batches.append(sampler.draw(P, step))
    return batches


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_with_one_stage_it_is_plain_grpo(share):
    plain = Uniform(50, seed=3)
    assert draw_all(ContinualReplay(50, 3, share), 30) == draw_all(plain, 30)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 2), (0.3, 2), (0.5, 4), (1.0, 8)])
def test_stages_come_in_order_and_earlier_ones_have_their_share_of_each_batch(share, count):
    sampler = staged((40, 40, 40), share)
    for step in range(1, 31):
        sampler.progress = (step - 1) / 30
        now = (step - 1) // 10
        stages = sampler.stage[sampler.draw(P, step)]
        back = sampler.stage[sorted(sampler.replays)]
        assert len(stages) == P and sampler.figures() == {"stage": now}
        assert (back < now).all() and len(back) == (count if now else 0)
        assert (stages == now).sum() == P - len(back)


def test_earlier_prompts_are_drawn_evenly_and_the_stage_goes_in_epochs():
    sampler = staged((20, 20), share=0.25)
    batches = draw_all(sampler, 4000)
    back = [x for batch in batches[2000:] for x in batch if x < 20]
    fresh = [x for batch in batches[2000:] for x in batch if x >= 20]
    assert len(back) == 4000 and np.abs(np.bincount(back) - 200).max() < 5 * np.sqrt(200)
    counts = np.bincount(fresh)[20:]
    assert counts.sum() == 12_000 and counts.max() - counts.min() <= 1


def test_a_refill_does_not_renew_the_budget_and_ends_with_the_stage():
    sampler = staged((40, 12), share=0.25)
    sampler.progress = 0.5
    batch = sampler.draw(P, 7) + sampler.draw(P, 7)
    assert len(sampler.replays) == 2 and len(set(batch)) == len(batch) == 2 + 12
    assert sampler.draw(P, 7) == []  # all of the stage are in the batch
    assert len(sampler.draw(P, 8)) == P


def test_progress_may_reach_one():
    sampler = staged()
    sampler.progress = 1.0
    assert sampler.advance() == 1


def test_a_run_resumed_for_longer_goes_on_in_the_stage_it_has_reached():
    sampler = staged()
    sampler.progress = 0.9
    sampler.draw(P, 9)
    longer = staged()
    longer.load_state_dict(sampler.state_dict())
    longer.progress = 0.3  # nine steps of thirty, which were nine of ten
    longer.draw(P, 10)
    assert longer.figures() == {"stage": 1}


def run_with(rows) -> SimpleNamespace:
    prompts = [SimpleNamespace(row=row) for row in rows]
    return SimpleNamespace(prompts=prompts, cfg=SimpleNamespace(prompts_per_step=2))


def test_stages_are_read_from_the_column_of_the_data():
    sampler = ContinualReplay(4)
    sampler.attach(run_with([{"stage": 1}, {"stage": 0}, {"stage": 1}, {"stage": 0}]))
    assert sampler.stage.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([None] * 4, "column `stage`"),
        ([{"problem": "x"}] * 4, "column `stage`"),
        ([{"stage": "0"}] * 4, "column `stage`"),
        ([{"stage": True}] * 4, "column `stage`"),
        ([{"stage": -1}] * 4, "column `stage`"),
        ([{"stage": 0}] * 3 + [{"stage": 1}], "stage 1 has 1 prompts, fewer than the 2"),
        ([{"stage": 0}] * 2 + [{"stage": 2}] * 2, "stage 1 has 0 prompts"),
        ([{"stage": 1}] * 4, "stage 0 has 0 prompts"),
    ],
)
def test_stages_that_cannot_be_are_one_line(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        ContinualReplay(4).attach(run_with(rows))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the experiment


def test_arms_share_the_first_stage_and_are_measured_three_times(tmp_path, capsys):
    out = tmp_path / "found.json"
    evaluate = train.evaluate
    assert continual.main(["--kinds", "keys", "--seeds", "1", "--steps", "4", "--out", str(out)]) == 0
    assert train.evaluate is evaluate  # as it was
    arms = json.loads(out.read_text())["runs"]["keys"]
    alone, replayed, together = (arms[name][0] for name in continual.ARMS)
    assert alone[0] == replayed[0] == together[0] and alone[1] == replayed[1]  # nothing to replay before
    assert np.array([alone, replayed, together]).shape == (3, 3, 2)
    assert "| keys | first stage, at its end |" in capsys.readouterr().out


def test_table_has_the_baseline_and_paired_differences():
    run = [[0.2, 0.2], [0.6, 0.2], [0.5, 0.6]]
    better = [[0.2, 0.2], [0.6, 0.2], [0.6, 0.5]]
    runs = {"keys": {"in sequence": [run, run], "with replay": [better, better]}}
    text = figures.continual_table({"runs": runs, "cpu_seconds": 720})
    assert "| keys | first stage, at its end | 60.0 | +0.0 (+0.0 to +0.0) |" in text
    assert "| keys | first stage, at the end | 50.0 | +10.0 (+10.0 to +10.0) |" in text
    assert "| keys | second stage, at the end | 60.0 | -10.0 (-10.0 to -10.0) |" in text
    assert "| keys | both, at the end | 55.0 | +0.0 (+0.0 to +0.0) |" in text
    assert "2 matched seeds" in text and "4 runs, 0.2 CPU hours" in text


# ---------------------------------------------------------------- in the loop

TASK = """
from reward import grade_equation as score
from tasks.tiny import arithmetic

def rows():
    return [{"problem": p, "answer": a, "stage": int("-" in p)STAGE} for p, a in arithmetic(200)]
"""


def flags(folder, task: str = TASK.replace("STAGE", "")) -> list[str]:
    (folder / "tasks_in_order.py").write_text(task)
    given = ["--task", str(folder / "tasks_in_order.py"), "--replay", "continual", "--steps", "8", "--seed", "5"]
    return [*given, "--prompts-per-step", "8", "--answers-per-prompt", "2", "--eval-every", "0", "--save-every", "5"]


def test_a_run_goes_through_its_stages_and_resumes_in_the_second(tmp_path):
    whole = tmp_path / "whole"
    assert train.main([*flags(tmp_path), "--out", str(whole)]) == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["replayed"] for row in rows] == [0] * 4 + [0.25] * 4

    # As if it had been killed after the checkpoint of step 5.
    parts = shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(parts / "checkpoints" / "step-00000008")
    shutil.rmtree(parts / "model")
    assert train.main([*flags(tmp_path), "--out", str(parts), "--resume"]) == 0
    again = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    for name in ("step", "reward", "pass_rates_fresh", "pass_rates_replayed", "stage", "loss"):
        assert [row.get(name) for row in again] == [row.get(name) for row in rows]


@pytest.mark.parametrize(
    ("stage", "message"),
    [(', "stage": None', "column `stage`"), (', "stage": int(p < "0003")', "prompts, fewer than the 8 of one step")],
)
def test_a_run_without_whole_stages_ends_in_one_line(tmp_path, capsys, stage, message):
    with pytest.raises(SystemExit) as stop:
        train.main([*flags(tmp_path, TASK.replace("STAGE", stage)), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")


# ---------------------------------------------------------------- --task A --then B

EASY = """
def rows():
    return [{"problem": f"000{i % 10}+00{i // 10 + 10}=", "worth": 1.0, "stage": "none of its own"} for i in range(60)]

def score(responses, golds, worth):
    assert all(gold is None for gold in golds)
    return worth
"""
HARD = """
def rows():
    return [{"problem": f"{i:04d}-0001=", "answer": str(i - 1), "left": i} for i in range(1, 61)]

def score(responses, golds, left, prompts):
    assert all("-" in prompt for prompt in prompts) and [int(gold) + 1 for gold in golds] == left
    return [0.5 for _ in responses]
"""


def in_order(folder) -> list[str]:
    (folder / "easy.py").write_text(EASY)
    (folder / "hard.py").write_text(HARD)
    return ["--task", str(folder / "easy.py"), "--then", str(folder / "hard.py")]


def small(folder, *more: str) -> list[str]:
    given = [*in_order(folder), "--replay", "continual", "--prompts-per-step", "8", "--answers-per-prompt", "2"]
    return [*given, "--save-every", "2", "--eval-every", "2", "--out", str(folder / "run"), *more]


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_tasks_one_after_another_have_their_own_scores_and_accuracies(tmp_path, capsys):
    assert train.main(small(tmp_path, "--steps", "4")) == 0
    rows = rows_of(tmp_path)
    assert [row["stage"] for row in rows] == [0, 0, 1, 1] and [row["replayed"] for row in rows] == [0, 0, 0.25, 0.25]
    assert [row["reward"] for row in rows] == [1.0, 1.0, 0.625, 0.625]  # two of eight prompts are easy ones

    # Only a whole one is right.
    for row, end in ((rows[0], "_start"), (rows[1], ""), (rows[3], "")):
        assert row[f"eval_accuracy{end}"] == 0.5
        assert (row[f"eval_accuracy_stage_0{end}"], row[f"eval_accuracy_stage_1{end}"]) == (1.0, 0.0)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["reward"] == settings["judge"] == "tasks"
    printed = capsys.readouterr().out
    assert "stage 0: " in printed and "stage 1: " in printed and "held-out 0.500 (stages 1.000 0.000)" in printed


def test_they_are_resumed_and_another_order_is_another_run(tmp_path, capsys):
    assert train.main(small(tmp_path, "--steps", "4", "--max-rollouts", "32")) == 0
    assert train.main(small(tmp_path, "--steps", "4", "--resume")) == 0
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    with pytest.raises(SystemExit) as stop:
        train.main([*small(tmp_path, "--steps", "6", "--resume"), "--then", str(tmp_path / "easy.py")])
    assert stop.value.code == 2 and "then" in capsys.readouterr().err


def test_most_prompts_are_of_each_task_and_none_is_held_out_elsewhere(tmp_path):
    tasks = in_order(tmp_path)[1::2]
    training, held_out, notes = stages.problems((tasks[0], tasks[1], tasks[0]), 20, 3)
    assert [pair[3]["stage"] for pair in held_out] == [0] * 3 + [1] * 3 + [2] * 3 and len(notes) == 3
    counts = np.bincount([pair[3]["stage"] for pair in training])
    assert counts.tolist() == [20, 20, 20]

    # What one task has held out, another may have for training.
    other = tmp_path / "other.py"
    other.write_text(EASY.replace("range(60)", "range(59)"))
    training, _, _ = stages.problems((tasks[0], str(other)), 0, 3)
    never = [pair[0] for name in (tasks[0], str(other)) for pair in stages.problems_of(name)[1]]
    assert not {pair[0] for pair in training} & set(never) and len(training) > 100 - len(never)


def test_one_task_keeps_the_stages_of_its_rows(tmp_path):
    task = in_order(tmp_path)[1]
    training, held_out, notes = stages.problems((task,), 0, 100)
    assert (training, held_out, notes) == (*stages.problems_of(task)[:2], [stages.problems_of(task)[2]])
    assert training[0][3]["stage"] == "none of its own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--replay", "none"], "--replay none does not train tasks one after another, as --then asks"),
        (["--replay", "prompt+group"], "--replay prompt+group does not train tasks one after another"),
        (["--then", "elsewhere"], "--then elsewhere: give path/to/task.py"),
        (["--then", "nowhere.py"], "there is no file "),
        (["--task", ""], "--then says what comes after --task; give --task too"),
        (["--data", "gsm8k"], "--task has rows of its own"),
        (["--reward", "gym"], "--reward gym scores tasks of reasoning-gym"),
        (["--prompts-per-step", "60"], "stage 0 has 54 prompts, fewer than the 60 of one step"),
    ],
)
def test_tasks_that_cannot_follow_one_another_are_one_line(tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as stop:
        train.main([*small(tmp_path, "--steps", "4"), *change])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and message in error and error.startswith("error: ")


def test_a_column_that_one_task_asks_for_must_be_in_its_rows(tmp_path, capsys):
    flags = small(tmp_path, "--steps", "4")
    (tmp_path / "hard.py").write_text(HARD.replace('"left": i', '"right": i'))
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2 and "hard.py:score asks for a column 'left'" in capsys.readouterr().err


def test_a_rule_of_the_users_own_may_know_stages(tmp_path):
    (tmp_path / "rule.py").write_text(
        "from lab.continual import ContinualReplay\n\n\nclass Mine(ContinualReplay): pass\n"
    )
    assert train.main(small(tmp_path, "--steps", "2", "--replay", f"{tmp_path / 'rule.py'}:Mine")) == 0
    assert [row["stage"] for row in rows_of(tmp_path)] == [0, 1]


def test_the_reward_of_each_task_needs_several(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*in_order(tmp_path)[:2], "--reward", "tasks", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2 and "no reward 'tasks'" in capsys.readouterr().err
