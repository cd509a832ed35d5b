"""Continual Prompt Replay: tasks come one after another, and prompts of earlier ones come back with fresh answers.

    python -m lab.continual --seeds 12      what is forgotten with and without it, on embedded tasks in two stages

Each run has three arms: the stages in sequence, the same with replay, and both stages mixed from the start. Prompts are
sorted into stages by what they ask:

    keys    --sharing none: numbers to know by heart, those of even keys, then those of odd ones
    digits  sums, then differences; they share the model, but no digit fact

Accuracy is measured on each stage's held-out prompts (of keys: on its training prompts) before the first step, between
the stages and at the end. Prints a table with paired intervals, and writes its numbers. Those that are shipped are in
lab/results/continual.json.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from lab.figures import continual_table
from replay import Uniform
from support import config, plot
from support.config import OUT
from support.log import commit
from tasks import tiny


class ContinualReplay(Uniform):
    """Continual Prompt Replay (2608.18574). Of the paper only a digest was found: it replays prompts of earlier tasks,
    answered anew, and reaches what training on all tasks at once does. Ours is how many, which, and when:

    1. Prompts have a stage, 0, 1, ... The stages come in this order, and each has the same share of the run.
    2. floor(share * P) of a batch are prompts of earlier stages, drawn evenly, with fresh answers.
    3. All other places go to the next prompts of the stage's epochs.

    With one stage it is plain GRPO.
    """

    STATE = (*Uniform.STATE, "choice_rng", "reached")

    def __init__(self, num_prompts: int, seed: int = 0, share: float = 0.25):
        if not 0 <= share <= 1:
            raise ValueError(f"need share in [0, 1], got {share}")
        super().__init__(num_prompts, seed)
        self.share = share
        self.choice_rng = np.random.default_rng([seed, 1])
        self.stage = np.zeros(num_prompts, int)  # of each prompt
        self.reached = 0  # the stage that the run is in

    def attach(self, run) -> None:
        """Reads the stages of the prompts of `run`. ValueError for such as cannot be trained on one after another."""
        found = [(prompt.row or {}).get("stage") for prompt in run.prompts]
        if not all(type(stage) is int and stage >= 0 for stage in found):
            raise ValueError("--replay continual needs rows with a column `stage`, 0, 1, ...: --task FILE.py has rows")
        self.stage = np.array(found)
        least = run.cfg.prompts_per_step
        for stage, count in enumerate(np.bincount(self.stage)):
            if count < least:
                raise ValueError(f"stage {stage} has {count} prompts, fewer than the {least} of one step; give it more")

    def draw(self, n: int, step: int) -> list[int]:
        room = self.begin(n, step)
        free = np.ones(len(self.stage), bool)
        free[list(self.batch)] = False
        now = self.advance()

        # The budget is the step's, and a refill does not renew it.
        earlier = np.flatnonzero(free & (self.stage < now))
        budget = int(self.share * self.size + 1e-9) - len(self.replays)
        count = max(min(budget, room, len(earlier)), 0)
        back = self.take(self.choice_rng.choice(earlier, count, replace=False), replayed=True) if count else []

        # A refill may find that all prompts of the stage are in the batch.
        left = int((free & (self.stage == now)).sum())
        return back + self.take_fresh(min(room - count, left), lambda x: self.stage[x] != now)

    def advance(self) -> int:
        """The stage that the run is in. It never goes back, as the run's progress does that is resumed for longer."""
        stages = int(self.stage.max()) + 1
        self.reached = max(self.reached, min(int(self.progress * stages), stages - 1))
        return self.reached

    def figures(self) -> dict:
        return {"stage": self.reached}


# ---------------------------------------------------------------- the experiment

ARMS = {"in sequence": 0.0, "with replay": 0.25, "together": None}  # share of earlier stages; None: no stages
KINDS = {  # flags of a run, and the stage of a prompt
    "keys": (["--sharing", "none", "--lr", "8e-4", "--eval-prompts", "512"], lambda prompt: prompt.index % 2),
    "digits": (["--sharing", "digits", "--lr", "5e-4"], lambda prompt: int("-" in prompt.text)),
}


@dataclass
class Flags:
    kinds: tuple[Literal["keys", "digits"], ...] = ("keys", "digits")  # embedded tasks
    seeds: int = 12  # matched seeds
    steps: int = 120  # of a run, over both stages
    out: str = str(OUT / "continual.json")  # file to write


def accuracies(kind: str, arm: str, seed: int, steps: int) -> list[list[float]]:
    """Accuracy of both stages at the start, between the stages and at the end [3][2]."""
    import train

    given, stage_of = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        argv = [*given, "--seed", str(seed), "--steps", str(steps), "--out", f"{folder}/run"]
        argv += ["--eval-every", str(steps // 2), "--eval-samples", "2", "--save-every", "1000000"]
        run = train.Run(config.settings(argv, train.Config, train.METHODS, tiny.SETTINGS, "")[0])
        # The rows have no stage of their own; with one the run measures each stage by itself.
        for prompts in (run.prompts, run.held_out):
            prompts[:] = [replace(prompt, row={"stage": stage_of(prompt)}) for prompt in prompts]
        if ARMS[arm] is not None:
            run.sampler = ContinualReplay(len(run.prompts), seed, ARMS[arm])
            run.sampler.attach(run)
        run.folder.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            train.train(run)
        rows = plot.read(run.folder / "metrics.jsonl")
    between, end = (row for row in rows if "eval_accuracy" in row)
    found = []
    for row, when in ((rows[0], "_start"), (between, ""), (end, "")):
        found.append([row[f"eval_accuracy_stage_{stage}{when}"] for stage in (0, 1)])
    return found


def main(argv: list[str]) -> int:
    flags, _ = config.parse(Flags, argv, __doc__)
    result = {"command": " ".join(["python -m lab.continual", *argv]), "commit": commit(), "steps": flags.steps}
    for kind in flags.kinds:
        tiny.made(kind if kind != "keys" else "none")  # its CPU seconds are not those of the runs
    path = Path(flags.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    result["runs"] = {kind: {arm: [] for arm in ARMS} for kind in flags.kinds}
    for seed in tqdm(range(flags.seeds), disable=None):
        for kind, arms in result["runs"].items():
            for arm, runs in arms.items():
                found = accuracies(kind, arm, seed, flags.steps)
                runs.append([[round(value, 4) for value in pair] for pair in found])
        result["cpu_seconds"] = round(time.process_time() - started)
        path.write_text(json.dumps(result) + "\n")
    print(continual_table(result))
    print(f"numbers: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
