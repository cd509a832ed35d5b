"""Several ranks over gloo, of which one is killed, stopped, or makes a mistake: all of them end, with one exit code and
one line, and `--resume` goes on. What torchrun makes of that is in tests/test_ranks.py."""

import os
import signal
import time
from datetime import timedelta

import pytest

import train
from support import config, ranks
from tests.faults.harness import QUICK, SMALL, Child, End, run, steps_of, wait_until
from tests.test_ranks import free_port

pytestmark = pytest.mark.slow

FLAGS = ["--replay", "prompt+group", "--steps", "9"]


def start_ranks(folder, *flags: str, patience: float = 60) -> list[Child]:
    """Two ranks as torchrun would start them, whose consoles are apart."""
    port = str(free_port())

    def work(rank: int) -> int:
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.PATIENCE = timedelta(seconds=patience)
        config.ALONE = 3
        return train.main([*SMALL, *QUICK, *FLAGS, "--out", str(folder), *flags])

    found = []
    for rank in range(2):
        found.append(Child(lambda rank=rank: work(rank), folder.with_name(f"{folder.name}.console{rank}")))
    return found


def end_of(children: list[Child]) -> list[End]:
    return [child.end() for child in children]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed(rank, count, tmp_path):
    folder = tmp_path / "run"
    children = start_ranks(folder)
    wait_until(lambda: steps_of(folder) >= 4, children[0])
    children[rank].kill()
    other = children[1 - rank].end()
    count("a rank that is killed: the other ends in one line", other.one_line, other.text)
    count("a rank that is killed: it says how to go on", f"--resume --out {folder}" in other.text, other.text)
    again = run(folder, *FLAGS, "--resume")
    count("a rank that is killed: then on", again.code == 0 and steps_of(folder) == 9, again.text)


def test_one_that_is_stopped_and_goes_on(count, tmp_path):
    folder = tmp_path / "run"
    children = start_ranks(folder)
    wait_until(lambda: steps_of(folder) >= 2, children[0])
    children[1].signal(signal.SIGSTOP)
    time.sleep(3)
    before = steps_of(folder)
    children[1].signal(signal.SIGCONT)
    ends = end_of(children)
    held = [end.code for end in ends] == [0, 0] and before < 9 and steps_of(folder) == 9
    count("a rank that is stopped for a while: nothing is lost", held, "\n".join(end.text for end in ends))


def test_one_that_is_stopped_for_good(count, tmp_path):
    folder = tmp_path / "run"
    children = start_ranks(folder, patience=4)
    wait_until(lambda: steps_of(folder) >= 4, children[0])
    children[1].signal(signal.SIGSTOP)
    other = children[0].end()
    children[1].kill()
    count("a rank that is stopped for good: the other ends in one line", other.one_line, other.text)
    again = run(folder, *FLAGS, "--resume")
    count("a rank that is stopped for good: then on", again.code == 0 and steps_of(folder) == 9, again.text)


TASK = """import os

listed = [{{"problem": f"0001+{{i:04d}}="}} for i in range(60)]


def rows():
    {mistake}
    return listed


def score(responses, golds):
    return [float(len(one) % 2) for one in responses]
"""
MISTAKES = {
    "in another order": "if os.environ['RANK'] == '1': listed.reverse()",
    "fewer": "if os.environ['RANK'] == '1': listed.pop()",
    "none on one": "if os.environ['RANK'] == '1': raise OSError('it is not there')",
    "none on both": "raise OSError('it is not there')",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_copies_of_the_data_that_differ(mistake, count, tmp_path):
    (tmp_path / "task.py").write_text(TASK.format(mistake=MISTAKES[mistake]))
    ends = end_of(start_ranks(tmp_path / "run", "--task", str(tmp_path / "task.py")))
    text = "\n".join(end.text for end in ends)
    count("ranks with other data: one line", all(end.one_line for end in ends), f"{mistake}: {text}")
    count("ranks with other data: one exit code", [end.code for end in ends] == [2, 2], f"{mistake}: {text}")
