"""Continual Prompt Replay: stages in order, what of a batch comes from earlier ones, and the experiment with it."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import train
from lab import continual
from lab.continual import ContinualReplay
from replay import Uniform

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
    assert sampler.current() == 1


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
    assert "| first stage, at its end |" in capsys.readouterr().out


def test_table_has_the_baseline_and_paired_differences():
    run = [[0.2, 0.2], [0.6, 0.2], [0.5, 0.6]]
    better = [[0.2, 0.2], [0.6, 0.2], [0.6, 0.5]]
    text = continual.table({"keys": {"in sequence": [run, run], "with replay": [better, better]}})
    assert "| first stage, at its end | 60.0 | +0.0 (+0.0 to +0.0) |" in text
    assert "| first stage, at the end | 50.0 | +10.0 (+10.0 to +10.0) |" in text
    assert "| second stage, at the end | 60.0 | -10.0 (-10.0 to -10.0) |" in text
    assert "| both, at the end | 55.0 | +0.0 (+0.0 to +0.0) |" in text


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
