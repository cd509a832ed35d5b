"""Two processes where one is meant: in the folder of a run, and at the embedded model."""

import json
import signal
import subprocess
import sys
import time

import pytest

from support import checkpoint, config
from tasks import tiny
from tests.faults.harness import WALL_SECONDS, Child, left_behind, run, start, steps_of, wait_until

pytestmark = pytest.mark.slow

FLAGS = ["--replay", "prompt", "--steps", "9"]


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "new"])
def test_in_one_folder(resumed, count, tmp_path):
    assert run(tmp_path / "whole", *FLAGS).code == 0
    folder = tmp_path / "run"
    first = start(folder, *FLAGS)
    wait_until(lambda: steps_of(folder) >= 1, first)
    more = ["--resume"] if resumed else []
    first.signal(signal.SIGSTOP)  # or its few steps may be over before the second looks
    second = Child(lambda: start_again(folder, more), tmp_path / "second").end()
    first.signal(signal.SIGCONT)
    count("a second process in a run's folder: one line", second.one_line, second.text)
    end = first.end()
    count(
        "... and the first goes on", end.code == 0 and left_behind(folder) == left_behind(tmp_path / "whole"), end.text
    )


def start_again(folder, more: list[str]) -> int:
    import train
    from tests.faults.harness import QUICK, SMALL

    return train.main([*SMALL, *QUICK, *FLAGS, "--out", str(folder), *more])


def make(place) -> int:
    return 0 if tiny.make(place, steps=60).is_dir() else 1


def test_at_the_embedded_model(count, tmp_path):
    place = tmp_path / "tiny-model"
    both = [Child(lambda: make(place), tmp_path / f"log{i}") for i in range(2)]
    ends = [child.end() for child in both]
    waited = sum("waiting" in end.text for end in ends)
    held = [end.code for end in ends] == [0, 0] and waited == 1
    count("two that make the embedded model", held, "\n".join(end.text for end in ends))


def test_a_killed_maker_is_followed(count, tmp_path):
    place = tmp_path / "tiny-model"
    first = Child(lambda: make(place), tmp_path / "first")
    wait_until(lambda: place.with_name("tiny-model.lock").exists(), first)
    second = Child(lambda: make(place), tmp_path / "second")
    log = tmp_path / "second"
    wait_until(lambda: log.exists() and "waiting" in log.read_text(), second)
    first.kill()
    end = second.end()
    whole = (place / "config.json").exists() and not place.with_name("tiny-model.partial").exists()
    count("a maker of the embedded model that is killed", end.code == 0 and whole, end.text)


def test_a_comparison_that_is_killed_takes_its_runs_with_it(count, tmp_path):
    """Else the same command, given again, would meet them at work."""
    run_folder = tmp_path / "out" / "none-s0"
    command = [sys.executable, "-m", "lab.compare", "--methods", "none", "--seeds", "1", "--out", str(tmp_path / "out")]
    command += ["--jobs", "1", "--budget-rollouts", "400", "--", "--prompts-per-step", "4", "--answers-per-prompt", "4"]
    command += ["--eval-every", "20", "--eval-prompts", "6"]
    first = subprocess.Popen(command, cwd=config.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while steps_of(run_folder) < 5:
        assert first.poll() is None
    first.kill()
    first.wait()
    end = time.monotonic() + WALL_SECONDS
    while checkpoint.in_use(run_folder) and time.monotonic() < end:
        time.sleep(0.1)
    done = steps_of(run_folder)
    count("a comparison that is killed: its run saves and leaves", 5 <= done < 25, f"{done} steps")
    second = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True)
    steps = [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    held = second.returncode == 0 and steps == list(range(1, 26))
    count("a comparison that is killed: the same command goes on", held, second.stderr[-900:])
