"""A reference run of each method on the embedded task, to lay a run of one's own beside.

    python -m lab.reference                                  all of them anew: minutes of a CPU core
    python -m lab.compare out/mine docs/reference/prompt     a table: a run of one's own against one of them
    python -m support.plot out/mine docs/reference/prompt    the curves of both in out/mine/curves.png

docs/reference/METHOD/ holds config.json with the command and the commit, curves.png, and metrics.jsonl with one row for
each `EVERY` steps. All have seed 0. A thinned row has the sums of optimiser steps, seconds and histograms over its
steps, counts so far as they were at its end, and means of what the curves show and of what the rules say. The curves
are drawn from those rows, so that they can be drawn again without the run. lab/results/lives.npz gets the visits of
`prompt`, from which `python -m lab.figures` draws docs/figures/lives.png.
"""

import json
import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import numpy as np

from lab import compare, figures
from support import config, lives, log, plot

METHODS = ("none", "prompt", "prioritized", "rollout", "group", "dapo", "greso", "adaptive")
STEPS = 300
EVERY = 20  # steps of a thinned row; the run is evaluated at the end of each
SUMS = {"optimizer_steps", "seconds_total"}
SO_FAR = {"step", "rollouts", "tokens", "distinct_prompts", "prompt_uses", "eval_accuracy", "eval_accuracy_start"}
# What is kept besides, of what stands before sync_error. Of what rules say of themselves, after it, all is kept.
MEANS = {"reward", "zero_variance", "zero_variance_replayed", "mean_abs_advantage", "replayed", "entropy", "grad_norm"}
MEANS |= {"ess_replayed", "pass_rates_fresh", "pass_rates_replayed", "sync_error"}
DIGITS = 3


@dataclass
class Flags:
    docs: str = str(config.ROOT / "docs")  # folder in which reference/ is written
    visits: str = str(figures.VISITS)  # file of the visits of `prompt`
    runs: str = str(config.OUT / "reference")  # folder of the whole runs; a finished one is not run again
    methods: tuple[str, ...] = METHODS  # values of --replay
    steps: int = STEPS  # of each run, a multiple of 20
    jobs: int = field(default_factory=lambda: compare.Flags().jobs)  # runs side by side


def flags_of(method: str, steps: int) -> list[str]:
    return ["--replay", method, "--steps", str(steps)]


def keys_of(rows: list[dict]) -> list[str]:
    """The keys of `rows` that are kept, those of the rules after sync_error, as in each row."""
    first = {}
    rules = {}
    for row in rows:
        names = list(row)
        at = names.index("sync_error")
        first |= dict.fromkeys(name for name in names[:at] if name in SUMS | SO_FAR | MEANS)
        rules |= dict.fromkeys(names[at + 1 :])
    return [*first, "sync_error", *rules]


def thinned(rows: list[dict], every: int) -> list[dict]:
    """One row for each `every` of `rows`."""
    found = []
    for start in range(0, len(rows), every):
        some = rows[start : start + every]
        row = {}
        for key in keys_of(some):
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
    return float(f"{total:.{DIGITS}g}")


def write(run: Path, folder: Path, method: str, steps: int) -> None:
    """The reference in `folder`, made of the whole run in `run`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads((run / "config.json").read_text()) | {"out": "", "thinned": EVERY}
    settings["command"] = f"python train.py {' '.join(flags_of(method, steps))}"
    log.write_aside(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    rows = thinned(plot.read(run / "metrics.jsonl"), EVERY)
    lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
    log.write_aside(folder / "metrics.jsonl", "".join(lines))
    plot.curves(folder)


@config.exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    flags, _ = config.parse(Flags, argv, __doc__)
    if flags.steps % EVERY:
        raise ValueError(f"--steps {flags.steps} is no multiple of {EVERY}, by which runs are thinned")
    runs = {method: Path(flags.runs) / method for method in flags.methods}
    compare.run_all([(run, flags_of(method, flags.steps)) for method, run in runs.items()], flags.jobs)
    for method, run in runs.items():
        write(run, Path(flags.docs) / "reference" / method, method, flags.steps)
        print(Path(flags.docs) / "reference" / method)

    # what docs/usage.md shows of prompts
    if "prompt" in runs:
        np.savez_compressed(flags.visits, visits=lives.read(runs["prompt"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
