"""The samplers in other trainers: the two programs in docs/usage.md run as they stand there.

The one for TRL runs where trl is installed (pip install trl==1.16.0), and is skipped elsewhere.
"""

import os
import re
import subprocess
import sys

import pytest

import replay
import reward
from support.config import ROOT
from tasks import tiny


def programs() -> list[str]:
    text = (ROOT / "docs" / "usage.md").read_text()
    section = text.partition("\n## Other trainers\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_there_are_a_plain_loop_and_trl():
    plain, trl = programs()
    assert "for step in" in plain and "trl" not in plain and "GRPOTrainer" in trl


@pytest.mark.slow
def test_the_plain_loop_runs_alone_and_brings_prompts_back(tmp_path):
    # alone, outside of the project's folder, as its user would run it
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", programs()[0]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"\n?\{'buffer': \d+.*\} 24 of the last 32 came back\n$", done.stdout), done.stdout


@pytest.mark.slow
def test_trl_answers_the_prompts_that_the_sampler_drew_and_tells_it_how_they_turned_out(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs pip install trl==1.16.0")
    monkeypatch.chdir(tmp_path)  # its output folder
    drawn = []
    heard = []
    graded = []
    draw, observe, grade = replay.PromptReplay.draw, replay.PromptReplay.observe, reward.grade_equation

    def noted_draw(self, n, step):
        drawn.append(draw(self, n, step))
        return drawn[-1]

    def noted_observe(self, prompts, num_correct, num_answers, step):
        heard.append((list(prompts), list(num_correct), num_answers, step))
        observe(self, prompts, num_correct, num_answers, step)

    def noted_grade(responses, golds):
        graded.append((list(golds), grade(responses, golds)))
        return graded[-1][1]

    monkeypatch.setattr(replay.PromptReplay, "draw", noted_draw)
    monkeypatch.setattr(replay.PromptReplay, "observe", noted_observe)
    monkeypatch.setattr(reward, "grade_equation", noted_grade)
    program = programs()[1].replace("max_steps=20", "max_steps=6")
    assert program != programs()[1]
    names = {"__name__": "program"}
    exec(compile(program, "usage.md", "exec"), names)

    # Six steps of 16 prompts, each with 8 answers; what was graded is what was drawn, and what the sampler heard.
    assert len(drawn) == len(heard) == len(graded) == 6
    pairs, _ = tiny.problems("digits", tiny.HELD_OUT)
    for step, (numbers, (golds, rewards)) in enumerate(zip(drawn, graded, strict=True), 1):
        assert len(set(numbers)) == 16
        assert golds == [pairs[x][1] for x in numbers for _ in range(8)]
        correct = [sum(rewards[i : i + 8]) for i in range(0, 128, 8)]
        assert heard[step - 1] == (numbers, correct, 8, step)
    assert names["trainer"].sampler.uses.sum() > 0  # some came back
