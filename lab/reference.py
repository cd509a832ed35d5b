"""A reference run of each method on the embedded task, to lay a run of one's own beside.

    python -m lab.reference                                  all of them anew: half an hour of a CPU core
    python -m lab.compare out/mine docs/reference/prompt     a table: a run of one's own against one of them
    python -m support.plot out/mine docs/reference/prompt    the curves of both in out/mine/curves.png

docs/reference/METHOD/ holds config.json with the command and the commit, curves.png, and metrics.jsonl with one row for
each `EVERY` steps. All have seed 0. A thinned row has the sums of optimiser steps, seconds and histograms over its
steps, counts so far as they were at its end, and the means of all else. Sets docs/figures/curves.png and lives.png too.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from lab import compare
from support import config, lives, log, plot

METHODS = ("none", "prompt", "prioritized", "rollout", "group", "dapo", "greso", "adaptive")
STEPS = 300
EVERY = 20  # steps of a thinned row; the run is evaluated at the end of each
SUMS = {"optimizer_steps", "seconds_total"}
SO_FAR = {"step", "rollouts", "tokens", "distinct_prompts", "prompt_uses", "eval_accuracy"}
LEFT_OUT = ("seconds_", "peak_memory_mb", "lr", "reward_", "gain_")  # beginnings of keys


@dataclass
class Flags:
    docs: str = str(config.ROOT / "docs")  # folder in which reference/ and figures/ are written
    runs: str = str(config.OUT / "reference")  # folder of the whole runs; a finished one is not run again
    methods: tuple[str, ...] = METHODS  # values of --replay
    steps: int = STEPS  # of each run, a multiple of 20
    jobs: int = field(default_factory=lambda: compare.Flags().jobs)  # runs side by side


def flags_of(method: str, steps: int) -> list[str]:
    return ["--replay", method, "--steps", str(steps)]


def keys_of(rows: list[dict]) -> list[str]:
    """All keys of `rows`, those of the rules after sync_error, as in each row."""
    first = {}
    rules = {}
    for row in rows:
        names = list(row)
        at = names.index("sync_error")
        first |= dict.fromkeys(names[:at])
        rules |= dict.fromkeys(names[at + 1 :])
    return [*first, "sync_error", *rules]


def thinned(rows: list[dict], every: int) -> list[dict]:
    """One row for each `every` of `rows`."""
    found = []
    for start in range(0, len(rows), every):
        some = rows[start : start + every]
        row = {}
        for key in keys_of(some):
            if key in SUMS or not key.startswith(LEFT_OUT):
                row[key] = together(key, [one[key] for one in some if key in one])
        found.append(row)
    return found


def together(key: str, values: list):
    """The one value that stands for those of some steps."""
    if key in SO_FAR:
        return values[-1]
    if isinstance(values[0], list):
        return [sum(column) for column in zip_longest(*values, fillvalue=0)]
    total = sum(values) if key in SUMS else float(np.mean(values))
    return float(f"{total:.4g}")


def write(run: Path, folder: Path, method: str, steps: int) -> None:
    """The reference in `folder`, made of the whole run in `run`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads((run / "config.json").read_text()) | {"out": "", "thinned": EVERY}
    settings["command"] = f"python train.py {' '.join(flags_of(method, steps))}"
    log.write_aside(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    rows = thinned(plot.read(run / "metrics.jsonl"), EVERY)
    log.write_aside(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(run / "curves.png", folder / "curves.png")


@config.exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    flags, _ = config.parse(Flags, argv, __doc__)
    if flags.steps % EVERY:
        raise ValueError(f"--steps {flags.steps} is no multiple of {EVERY}, by which runs are thinned")
    runs = {method: Path(flags.runs) / method for method in flags.methods}
    compare.run_all([(run, flags_of(method, flags.steps)) for method, run in runs.items()], flags.jobs)
    for method, run in runs.items():
        lives.figures(run)
        write(run, Path(flags.docs) / "reference" / method, method, flags.steps)
        print(Path(flags.docs) / "reference" / method)

    # the figures of docs/usage.md
    if {"none", "prompt"} <= runs.keys():
        shutil.copy(plot.curves(runs["prompt"], runs["none"]), Path(flags.docs) / "figures" / "curves.png")
        shutil.copy(runs["prompt"] / "lives.png", Path(flags.docs) / "figures" / "lives.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
