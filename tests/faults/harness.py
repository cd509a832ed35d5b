"""What the fault tests share: runs forked from one warm process, what a run left behind, and the count of faults."""

import hashlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from support import lives, plot

CPU_SECONDS = 60  # after which a child counts as hanging, however busy the machine is
WALL_SECONDS = 300
SMALL = ["--prompts-per-step", "4", "--answers-per-prompt", "4", "--eval-prompts", "6", "--eval-every", "4"]
# Constants small enough that every part of every method acts within a dozen steps.
QUICK = ["--cooldown", "2", "--replay-warmup", "2", "--retest-every", "3", "--max-rounds", "3", "--save-every", "3"]
plot.pyplot()  # imported here, so that no child has to
FORK = multiprocessing.get_context("fork")


@dataclass
class End:
    """How a child ended: its exit code (negative: the signal), and all that it printed."""

    code: int
    text: str

    def __post_init__(self):
        self.errors = [line for line in self.text.splitlines() if "error: " in line]

    @property
    def one_line(self) -> bool:
        """A user's mistake, or one of the machine's, as the project says it."""
        last = self.text.strip().splitlines()[-1:]
        return (
            self.code in (1, 2)
            and len(self.errors) == 1
            and self.errors == last
            and last[0].startswith("error: ")
            and "Traceback" not in self.text
        )


class Child:
    """A function of this process in a fork of it: no imports to wait for."""

    def __init__(self, function: Callable[[], int], log_file: Path):
        self.log = log_file
        self.process = FORK.Process(target=self.work, args=(function,), daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def work(self, function) -> None:
        with open(self.log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        torch.set_num_threads(1)
        sys.exit(function())

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """SIGKILL; then all is gone that it had not written."""
        self.process.kill()
        self.process.join()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, seconds: float = WALL_SECONDS) -> End:
        self.process.join(seconds)
        if self.process.is_alive():
            self.kill()
        return End(self.process.exitcode, self.log.read_text(errors="replace"))


def start(folder: Path, *flags: str, main: Callable = train.main, curves: bool = False) -> Child:
    """train.py, or eval.py, with --out `folder`; its console goes to a file beside the folder. Without `curves` no
    figure is drawn, which takes longer than such a run."""
    argv = ["--out", str(folder), *flags]
    if main is train.main:
        argv = [*SMALL, *QUICK, *argv]

    def work() -> int:
        if not curves:
            plot.curves = lambda folder, *_: folder / "curves.png"
            lives.draw = lambda _, path, *__: path
        return main(argv)

    return Child(work, folder.with_name(folder.name + ".console"))


def run(folder: Path, *flags: str, main: Callable = train.main, curves: bool = False) -> End:
    return start(folder, *flags, main=main, curves=curves).end()


def wait_until(condition: Callable[[], bool], child: Child) -> bool:
    """Polls without a pause, so that a moment of a thousandth of a second is not missed. False if the child has ended
    before."""
    end = time.monotonic() + WALL_SECONDS
    while not condition():
        if not child.alive:
            return False
        assert time.monotonic() < end, "what was waited for did not come"
    return True


def steps_of(folder: Path) -> int:
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def left_behind(folder: Path) -> tuple:
    """All that a run is judged by, without what is of the clock and the machine: its rows, answers and weights."""
    rows = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: row[name] for name in row if not name.startswith(("seconds_", "peak_memory"))})
    samples = (folder / "samples.jsonl").read_bytes()
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return rows, hashlib.sha256(samples).hexdigest(), hashlib.sha256(weights).hexdigest()


def evaluated(folder: Path) -> tuple:
    """What an evaluation is judged by: results and answers."""
    answers = sorted(path.read_bytes() for path in folder.glob("*@*.jsonl"))
    return json.loads((folder / "results.json").read_text()), answers
