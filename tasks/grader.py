"""Child processes that judge answers: `Grader.judge`. They run answers.py or gym_child.py, and they can be killed.

sympy may need an hour for a short formula, and no thread and no exception can stop it. So a child judges each
answer. A child counts its own processor time and dies when an answer has had its share (answers.py), however busy
the machine.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

from support import ranks
from support.config import ROOT

ANSWERS = Path(__file__).resolve().with_name("answers.py")
START_SECONDS = 60.0  # for a child to import sympy, which takes 0.5 on a quiet machine
WALL_SECONDS = 60.0  # for a child that no longer runs at all; its own limit counts processor time
TRIES = 3  # how many children one answer may lose to something else than itself
CACHED = 100_000  # how many verdicts are remembered
LOST = ("timeouts", "kills", "failed")  # no verdicts, but what became of a child
BROKEN = 0.2  # if more than this share of the new answers fails, the verifier is broken, not the answers

# What ended a child. An exit without an error is its own wish for a successor; these signals come from
# outside.
DEATHS = {0: "lost", -signal.SIGKILL: "lost", -signal.SIGTERM: "lost", -signal.SIGPROF: "timeouts"}


class VerifierBroken(RuntimeError):
    """Too many answers could not be judged at all: their zeros would be no verdicts."""


class Child:
    """A process that runs `script` and judges one answer at a time. Only one thread at a time may use it."""

    def __init__(self, script: Path):
        self.script = script
        self.process = None
        self.start()

    def start(self) -> None:
        # Why not a pool of processes: those of the standard library that do not fork import the trainer's
        # __main__ in every child, and torch with it; so do libraries built on them (pebble). A fork would
        # copy CUDA's state.
        environment = dict(os.environ)
        environment["OMP_NUM_THREADS"] = "1"
        environment["PYTHONHASHSEED"] = "0"  # the same verdict in every child
        environment["LD_PRELOAD"] = ""
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        self.ready = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(self.script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the trainer, which lets its children finish
        )

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()
        self.start()

    def close(self) -> None:
        """Lets the process go: it ends when nobody can ask it any more."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def __del__(self):
        # A Popen that is given up keeps itself, and its pipes, until its process has ended.
        self.close()

    def judge(self, gold: str, answer: str) -> str:
        """The verdict, which is the script's word (`right` or `wrong`, or a score); `timeouts` or `kills` if the answer
        cost the child its life; `failed` if no child could be started, or if several were killed from outside."""
        if self.process is None:  # the latest attempt to start one did not succeed
            self.start()
        question = json.dumps([gold, answer]).encode() + b"\n"
        for _ in range(TRIES):
            verdict = self.ask(question)
            if verdict != "lost":
                return verdict
        return "failed"

    def ask(self, question: bytes) -> str:
        """As `judge`, but `lost` if something else than the answer ended the child."""
        try:
            if not self.ready:
                self.ready = self.hear(START_SECONDS) == "ready"
            self.process.stdin.write(question)
            return self.hear(WALL_SECONDS)
        except TimeoutError:
            verdict = "timeouts"
        except (EOFError, OSError):
            verdict = DEATHS.get(self.process.wait(), "kills")

        # A child that dies before its first question cannot work at all. The next one starts at once, so that
        # the next answer need not wait for it.
        if verdict != "lost" and not self.ready:
            verdict = "failed"
        self.restart()
        return verdict

    def hear(self, seconds: float) -> str:
        """The child's next word. TimeoutError if it takes longer than `seconds`, EOFError if the child is
        dead."""
        if not wait([self.process.stdout], seconds):
            raise TimeoutError
        word = self.process.stdout.readline()
        if not word:
            raise EOFError
        return word.decode().strip()


class Grader:
    """Judges pairs (gold, answer) in `workers` children that run `script`, and remembers the verdicts. Any thread may
    use it."""

    def __init__(self, workers: int = 2, script: Path = ANSWERS):
        self.workers = workers
        self.script = script
        self.forget()
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Begins anew. After a fork there are no threads, and the children belong to the parent."""
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self.verdicts: OrderedDict[tuple[str, str], str] = OrderedDict()  # the latest used comes last
        self.counted: Counter[str] = Counter()

    def start(self) -> None:
        """Starts the children, if they do not run yet."""
        with self.lock:
            if self.pool is None:
                for _ in range(self.workers):
                    self.idle.put(Child(self.script))
                self.pool = ThreadPoolExecutor(self.workers, "grader")

    def judge(self, pairs: Counter) -> dict[tuple[str, str], str]:
        """The verdict on each pair, where `pairs` says how many responses gave it. VerifierBroken if the children
        fail on more than the share BROKEN of the responses that need one, and these are 20 or more."""
        verdicts = self.recall(pairs)
        new = Counter({pair: count for pair, count in pairs.items() if pair not in verdicts})
        if not new:
            return verdicts
        self.start()
        jobs = {pair: self.pool.submit(self.ask, *pair) for pair in new}
        failed = 0
        try:
            for pair, job in jobs.items():
                verdicts[pair] = "failed" if job.exception() else job.result()
                if verdicts[pair] == "failed":
                    failed += new[pair]
                if new.total() >= 20 and failed > BROKEN * new.total():
                    raise VerifierBroken(
                        f"the verifier failed on {failed} of {new.total()} answers, so scores would mean nothing; "
                        f"`{sys.executable} -m tasks.{self.script.stem}` shows the error"
                    )
        finally:
            for job in jobs.values():
                job.cancel()
        self.remember(verdicts)
        return verdicts

    def ask(self, gold: str, answer: str) -> str:
        # There are as many threads as children, so that one is always idle.
        idle = self.idle
        child = idle.get()
        try:
            return child.judge(gold, answer)
        finally:
            idle.put(child)

    def recall(self, pairs: Counter) -> dict[tuple[str, str], str]:
        found = {}
        with self.lock:
            for pair in pairs:
                if pair in self.verdicts:
                    self.verdicts.move_to_end(pair)
                    found[pair] = self.verdicts[pair]
        return found

    def remember(self, verdicts: dict[tuple[str, str], str]) -> None:
        """Verdicts are for ever; what cost a child its life is tried anew."""
        with self.lock:
            for pair, verdict in verdicts.items():
                if verdict not in LOST:
                    self.verdicts[pair] = verdict
            while len(self.verdicts) > CACHED:
                self.verdicts.popitem(last=False)

    def count(self, verdicts: list[str]) -> None:
        with self.lock:
            self.counted.update(verdicts)

    def counts(self) -> dict[str, int]:
        """What became of the responses of all ranks since the last call, for the log. Each is counted once."""
        with self.lock:
            counted = self.counted
            self.counted = Counter()
        named = {"reward_graded": counted["right"] + counted["wrong"]}
        for verdict in ("no_box", "too_long", "timeouts", "kills", "failed"):
            named[f"reward_{verdict}"] = counted[verdict]
        if ranks.WORLD > 1:
            totals = ranks.total(list(named.values()))
            named = {name: int(value) for name, value in zip(named, totals, strict=True)}
        return named
