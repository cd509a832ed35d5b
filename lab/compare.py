"""Does a method beat plain GRPO, and by how much? Methods x matched seeds on one budget of rollouts.

    python -m lab.compare --methods none prompt rollout group --seeds 12 --budget-rollouts 40000
    python -m lab.compare --arms "even: --replay rollout --priority-exponent 0" --methods none --seeds 12
    python -m lab.compare --methods none prompt --seeds 12 -- --lr 1e-4 --share 0.5     after --: flags for every run
    python -m lab.compare --methods none prompt --lrs 1e-4 5e-4 2e-3     each rate, and the best for each method
    python -m lab.compare out/run1 out/run2 ...                          runs that are there already
    python -m lab.compare out/mine docs/reference/prompt                 a run of one's own against a reference run
    python -m lab.compare --methods none prompt --keep runs.jsonl        a campaign over many sessions

Runs of one seed share initial model, prompt order, sampling noise of equal answers, and evaluation. The first method
is the baseline (of given folders: plain GRPO). Everything is read from the runs' config.json and metrics.jsonl; a
finished run is not run again. With --keep each finished run is also a line of a file, some kB long, and what is there
is not run again either, though its folder be gone. Whole seeds are finished first.

The arms share one objective: advantage, clip_high, dual_clip, normaliser and mask_truncated are the baseline's, unless
they are given after -- or by an arm itself. `rollout` keeps its clip around the birth policy. With --as-in-papers each
method brings its own. Every setting in which arms differ stands under the table.

Accuracy at a cost is the mean over the last fifth of it, by straight lines between evaluations: the same stretch for
all runs, however far apart their evaluations are. Differences are paired by seed, with Student's t intervals; p
values are Holm-corrected over the methods of a table. Writes results.md, results.json and results.png.
"""

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from tqdm import tqdm
from tyro.conf import Positional

import reward
from lab import figures
from lab.figures import COSTS
from support import checkpoint, config, log, plot, stats
from support.rows import read_rows, read_settings
from tasks import tiny

LEVELS = (0.4, 0.5, 0.6, 0.7)
POINTS = 41  # of a curve in results.json
OBJECTIVE = ("advantage", "clip_high", "dual_clip", "normaliser", "mask_truncated")  # equal over the arms
# settings that say where and how a run is kept, and do not make it another run
KEEPING = {
    "given",
    "command",
    "thinned",
    "commit",
    "seed",
    "out",
    "resume",
    "steps",
    "save_every",
    "wandb",
    "tensorboard",
}
COUNTED = ["rollouts", "tokens", "optimizer_steps", "seconds_total", "distinct_prompts", "eval_accuracy"]
HEALTH = ["zero_variance", "mean_abs_advantage", "replayed"]


@dataclass
class Flags:
    runs: Positional[tuple[str, ...]] = ()  # folders of runs to compare; without them --methods are run
    methods: tuple[str, ...] = ()  # values of --replay; the first is the baseline
    arms: tuple[str, ...] = ()  # further methods as 'NAME: flags of train.py'
    lrs: tuple[str, ...] = ()  # learning rates: a table for each, and one tuned per method
    as_in_papers: bool = False  # each method brings its paper's objective, instead of one for all
    seeds: int = 12  # matched seeds
    first_seed: int = 0  # the first of them
    budget_rollouts: int = 40_000  # answers a run may generate
    keep: str = ""  # a file that finished runs are added to, and read from
    cpu_seconds: bool = False  # seconds are the processor's, not the clock's: for a busy machine without a GPU
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)  # runs side by side; default: one a CPU
    out: str = str(config.OUT / "compare")  # folder of runs and results


def settings_of(argv: list[str]):
    """The configuration that train.py makes of `argv`, and the names of the settings that they give by
    hand."""
    from train import METHODS, Config

    return config.settings(argv, Config, METHODS, tiny.SETTINGS, "")


def check_run(cfg) -> None:
    """ValueError, in one line, for a run that train.py would refuse."""
    from train import METHODS

    config.check_training(cfg)
    config.check_rules(cfg, METHODS)


# ---------------------------------------------------------------- curves


def read_run(folder: Path) -> dict:
    """One run: `points`, with cumulative costs and accuracy at each evaluation, and the means of its health
    figures."""
    settings = read_settings(folder)
    rows = pd.DataFrame(plot.read(folder / "metrics.jsonl"))
    every = settings.get("thinned", 1)  # a reference run has one row for so many steps (lab/reference.py)
    if rows["step"].tolist() != [every * number for number in range(1, len(rows) + 1)]:
        raise ValueError(f"{folder / 'metrics.jsonl'} has not every step once; remove the folder and run it again")
    if "eval_accuracy" not in rows:
        raise ValueError(f"{folder} has no evaluations to compare; run it with --eval-every above 0")

    lacking = {*COUNTED, *HEALTH} - set(rows)
    if lacking or not all(pd.api.types.is_numeric_dtype(rows[name]) for name in [*COUNTED, *HEALTH]):
        raise ValueError(f"{folder / 'metrics.jsonl'} lacks {', '.join(sorted(lacking)) or 'numbers'}; run it again")

    # costs add up over steps; the evaluation before the first step cost nothing
    points = rows[["rollouts", "tokens"]].copy()
    points["optimizer_steps"] = rows["optimizer_steps"].cumsum()
    points["seconds"] = rows["seconds_total"].cumsum()
    points["accuracy"] = rows["eval_accuracy"]
    if "eval_accuracy_start" in rows:
        start = dict.fromkeys(COSTS, 0.0) | {"accuracy": rows["eval_accuracy_start"][0]}
        points = pd.concat([pd.DataFrame([start]), points], ignore_index=True)
    points = points.dropna()
    if len(points) < 2:
        raise ValueError(f"{folder} has no evaluations to compare; run it with --eval-every above 0")

    health = rows[HEALTH].mean().to_dict() | {"distinct_prompts": int(rows["distinct_prompts"].iloc[-1])}
    load = folder / "load.json"
    return {
        "method": settings["replay"],
        "seed": settings["seed"],
        "commit": settings.get("commit", ""),
        "config": settings,
        "points": points,
        "health": health,
        "load": json.loads(load.read_text()) if load.exists() else None,
    }


def accuracies(run: dict, cost: str, at) -> np.ndarray:
    """Accuracy at each cost of `at`, by straight lines between evaluations."""
    return np.interp(at, run["points"][cost], run["points"]["accuracy"])


def spent(run: dict, cost: str) -> float:
    return float(run["points"][cost].iloc[-1])


def accuracy_at(run: dict, cost: str, budget: float) -> float:
    """Mean accuracy over the last fifth of `budget`."""
    return figures.end_accuracy(run["points"][cost], run["points"]["accuracy"], budget)


def area(run: dict, cost: str, budget: float) -> float:
    """Mean accuracy on the way to the budget."""
    return float(accuracies(run, cost, np.linspace(0, budget, 501)).mean())


def cost_to_reach(run: dict, level: float, cost: str = "rollouts") -> float | None:
    """The least cost at which `accuracy_at` reaches `level`; None where it never does."""
    costs = np.linspace(0, spent(run, cost), 501)
    windows = np.outer(costs, np.linspace(1 - figures.WINDOW, 1, 41))
    means = accuracies(run, cost, windows).mean(1)
    first = int(np.argmax(means >= level))
    if first == 0:
        return 0.0 if means[0] >= level else None
    return float(np.interp(level, means[first - 1 : first + 1], costs[first - 1 : first + 1]))


# ---------------------------------------------------------------- analysis


def check_judges(judges: set) -> None:
    """ValueError unless one judge scored the held-out answers of all runs. None: of a run that did not note it."""
    names = sorted(judges - {None})
    if len(names) > 1:
        raise ValueError(
            f"held-out answers are judged by {' and by '.join(names)}, and cannot be compared; give all one --judge"
        )


def analyse(runs: list[dict], methods: list[str]) -> dict:
    """Every figure of the table. `runs` of `methods`, the first of which is the baseline, paired by seed.
    ValueError where they cannot be paired."""
    check_judges({run.get("config", {}).get("judge") for run in runs})
    by_method = {method: {run["seed"]: run for run in runs if run["method"] == method} for method in methods}
    if len(runs) > sum(len(arm) for arm in by_method.values()):
        raise ValueError("two of the runs have the same method and seed; give one of each, at the same other settings")
    base = by_method[methods[0]]
    entries = {}
    for method, arm in by_method.items():
        seeds = sorted(base.keys() & arm.keys())
        if not seeds:
            raise ValueError(f"no run of {method} has a seed of those of {methods[0]}, by which runs are paired")
        ours = [arm[seed] for seed in seeds]
        theirs = [base[seed] for seed in seeds]
        entries[method] = compare_arm(ours, theirs, is_base=method == methods[0])

    # p values are corrected over the methods of one column
    for column in ("difference", "area"):
        for cost in COSTS:
            stats.correct([entry[column][cost] for entry in entries.values() if cost in entry[column]])
    return {"baseline": methods[0], "methods": entries}


def compare_arm(arm: list[dict], base: list[dict], is_base: bool) -> dict:
    """One method against the baseline, run by run."""
    # what all runs of the pair spent: one method's few optimiser steps do not cut the others' comparison short
    budgets = {cost: min(spent(run, cost) for run in arm + base) for cost in COSTS}
    entry = {"seeds": len(arm), "budgets": budgets, "accuracy": {}, "difference": {}, "area": {}, "reach": {}}
    entry["ends"] = {}  # of each seed at equal rollouts: other pairs of arms can be compared by them
    for run in arm:
        entry["ends"][str(run["seed"])] = accuracy_at(run, "rollouts", budgets["rollouts"])
    for cost, budget in budgets.items():
        entry["accuracy"][cost] = fmean(accuracy_at(run, cost, budget) for run in arm)
        if not is_base:
            entry["difference"][cost] = paired(accuracy_at, arm, base, cost, budget)
            entry["area"][cost] = paired(area, arm, base, cost, budget)
    for level in LEVELS:
        entry["reach"][str(level)] = reach(arm, base, level)
    entry["health"] = pd.DataFrame([run["health"] for run in arm]).mean().to_dict()
    entry["curves"] = {cost: curve(arm, cost) for cost in ("rollouts", "seconds")}
    return entry


def paired(measure, arm: list[dict], base: list[dict], cost: str, budget: float) -> dict:
    """What the arm has more of `measure` than the baseline: mean over seeds, interval and p value."""
    differences = []
    for run, other in zip(arm, base, strict=True):
        differences.append(measure(run, cost, budget) - measure(other, cost, budget))
    return stats.by_seed(differences)


def reach(arm: list[dict], base: list[dict], level: float) -> dict:
    """Log of the rollouts to `level` relative to the baseline's, over the `both` seeds in which both
    reached it."""
    logs = []
    for run, other in zip(arm, base, strict=True):
        ours = cost_to_reach(run, level)
        theirs = cost_to_reach(other, level)
        if ours and theirs:
            logs.append(math.log(ours / theirs))
    if not logs:
        return {"both": 0}
    return stats.by_seed(logs) | {"both": len(logs)}


def curve(arm: list[dict], cost: str) -> dict:
    """The runs' accuracies on one grid of costs, for the figure."""
    grid = np.linspace(0, min(spent(run, cost) for run in arm), POINTS)
    seeds = {str(run["seed"]): accuracies(run, cost, grid).round(4).tolist() for run in arm}
    return {"grid": grid.round(2).tolist(), "seeds": seeds}


def differing_settings(runs: list[dict], methods: list[str]) -> dict[str, dict[str, str]]:
    """Each method's value of every setting that is not the same for all; a / b where runs of one method
    differ. A setting that some run does not know, as it is of an earlier version, is left out."""
    names = sorted(set.intersection(*(set(run["config"]) for run in runs)) - KEEPING)
    found = {}
    for name in names:
        values = {}
        for method in methods:
            own = {str(run["config"].get(name)) for run in runs if run["method"] == method}
            values[method] = " / ".join(sorted(own))
        if len(set(values.values())) > 1 or any(" / " in value for value in values.values()):
            found[name] = values
    return found


def measure_of(runs: list[dict]) -> str:
    """What was evaluated. Without sharing no prompt teaches another, and training prompts stand for
    held-out ones."""
    unshared = any(not run["config"].get("model") and run["config"].get("sharing") == "none" for run in runs)
    return "accuracy on the training prompts" if unshared else "held-out accuracy"


def load_of(runs: list[dict]) -> dict:
    """The machine's load, and the CPU seconds of all, over those of `runs` that noted them."""
    loads = pd.DataFrame([run["load"] for run in runs if run["load"]])
    if loads.empty:
        return {"runs": 0}
    found = loads[["start", "end"]].mean().to_dict() | {"runs": len(loads), "cores": os.cpu_count()}
    found["in_cpu_seconds"] = all(run["load"].get("in_cpu_seconds") for run in runs if run["load"])
    if "cpu_seconds" in loads and loads["cpu_seconds"].notna().all():
        found["cpu_seconds"] = float(loads["cpu_seconds"].sum())
    return found


def choose_rates(by_lr: dict[str, list[dict]], methods: list[str]) -> tuple[list[dict], dict]:
    """Each method's runs at a learning rate of its own, by one rule: seeds of one half of all are taken at the rate
    whose mean accuracy on the way to the budget was best in the other half. Returns them and the rates chosen."""
    everything = [run for runs in by_lr.values() for run in runs]
    seeds = sorted({run["seed"] for run in everything})
    budget = min(spent(run, "rollouts") for run in everything)
    chosen = []
    rates = {}
    for method in methods:
        rates[method] = []
        for half in (seeds[::2], seeds[1::2]):
            on_the_other_half = {}
            for lr, runs in by_lr.items():
                arm = [run for run in runs if run["method"] == method and run["seed"] not in half]
                on_the_other_half[lr] = fmean(area(run, "rollouts", budget) for run in arm)
            best = max(on_the_other_half, key=on_the_other_half.get)
            rates[method].append(best)
            chosen += [run for run in by_lr[best] if run["method"] == method and run["seed"] in half]
    return chosen, rates


# ---------------------------------------------------------------- running


class Kept:
    """Finished runs in one file, by their folders' names below `out`: as `read_run` has them, and the mean of every
    figure of a run's steps. Without a path there are none."""

    def __init__(self, path: str = "", out: str = ""):
        self.path = Path(path) if path else None
        self.out = out
        self.runs = {}
        if self.path and self.path.exists():
            for _, row in read_rows(self.path, {"folder": str, "config": dict, "points": dict}):
                self.runs[row["folder"]] = row

    def name(self, folder: Path) -> str:
        return folder.relative_to(self.out).as_posix()

    def add(self, folder: Path) -> None:
        if self.path is None or self.name(folder) in self.runs:
            return
        run = read_run(folder)
        means = pd.DataFrame(plot.read(folder / "metrics.jsonl")).mean(numeric_only=True).to_dict()
        points = run["points"].round(4).to_dict("list")
        row = {"folder": self.name(folder)} | run | {"points": points, "means": stats.rounded(means)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.runs[row["folder"]] = row
        log.write_aside(self.path, "".join(json.dumps(kept) + "\n" for kept in self.runs.values()))

    def read(self, folder: Path) -> dict:
        """A run that is kept, or else that of `folder`."""
        if self.path is None or self.name(folder) not in self.runs:
            return read_run(folder)
        row = self.runs[self.name(folder)]
        return row | {"points": pd.DataFrame(row["points"])}


def is_complete(folder: Path, flags: list[str], kept: Kept) -> bool:
    """Whether this run is finished, here or among `kept`. ValueError if what is finished is another run than `flags`
    ask for."""
    if kept.path and kept.name(folder) in kept.runs:
        check_same(kept.runs[kept.name(folder)]["config"], flags, f"{kept.path}, {kept.name(folder)},")
        return True
    if (folder / "curves.png").exists():
        check_same(read_settings(folder), flags, str(folder))
        return True
    return False


def check_same(there: dict, flags: list[str], place: str) -> None:
    """ValueError if a run with the settings `there` is another one than `flags` ask for."""
    cfg, given = settings_of(flags)
    asked = json.loads(json.dumps(vars(cfg)))  # tuples become lists, as in the file
    changed = []
    for name in {*given, *there.get("given", [])} - {"out", "resume"}:
        if there.get(name) != asked.get(name):
            changed.append(f"--{name.replace('_', '-')} {there.get(name)}, not {asked.get(name)}")
    if changed:
        raise ValueError(f"{place} holds a run with {'; '.join(changed)}; give another --out, or remove that run")


def one_run(folder: Path, flags: list[str], cpu_seconds: bool) -> None:
    """In a process of its own, with its console in log.txt. load.json has the machine's load before and after, the CPU
    seconds, those before an interruption included, and whether the run's own seconds are such."""
    os.setsid()  # Ctrl-C is for the parent, which ends its runs once; twice would be at once, with nothing saved
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with open(folder / "log.txt", "w") as console:
        os.dup2(console.fileno(), 1)
        os.dup2(console.fileno(), 2)
    import train

    if cpu_seconds:
        train.perf_counter = time.process_time
    file = folder / "load.json"
    before = json.loads(file.read_text()).get("cpu_seconds", 0.0) if file.exists() else 0.0
    load = {"start": os.getloadavg()[0], "in_cpu_seconds": cpu_seconds}
    code = train.main(["--out", str(folder), *flags])
    load["end"] = os.getloadavg()[0]
    load["cpu_seconds"] = before + time.process_time()
    file.write_text(json.dumps(load) + "\n")
    sys.exit(code)


def leave_with_parent() -> None:
    """A run does not outlive a comparison that is killed: it saves and leaves."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def start_run(processes, folder: Path, flags: list[str], cpu_seconds: bool):
    """Begins a run, or goes on with one that was interrupted. Returns its process."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = checkpoint.in_use(folder)
    if taken:
        raise ValueError(taken)
    if checkpoint.is_run(folder):
        flags = [*flags, "--resume"]  # without a checkpoint it begins anew
    process = processes.Process(target=one_run, args=(folder, flags, cpu_seconds))
    process.start()
    return process


def run_all(jobs: list[tuple[Path, list[str]]], at_once: int, kept: Kept | None = None, cpu_seconds=False) -> None:
    """Trains what is not there yet, `at_once` side by side, one thread each. A failure ends the comparison."""
    kept = kept or Kept()
    waiting = []
    for folder, flags in jobs:
        if is_complete(folder, flags, kept):
            kept.add(folder)
        else:
            waiting.append((folder, flags))
    configs = [settings_of(flags)[0] for _, flags in waiting]
    for cfg in configs:  # a mistake is met before the first run begins
        check_run(cfg)
    check_judges({reward.judge_of(cfg) for cfg in configs})
    for sharing in {tiny.kind_of(cfg.task, cfg.sharing) for cfg in configs if not cfg.model}:
        tiny.make(tiny.home(sharing), sharing=sharing)  # once, before two runs begin to make it

    # each run is a fork of a process that has the imports behind it: they take as long as a short run
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(config.ROOT), os.environ.get("PYTHONPATH", "")])
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train", "transformers.models.qwen3.modeling_qwen3", "matplotlib.pyplot"])

    running = {}
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run", disable=None) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    folder, flags = waiting.pop(0)
                    running[folder] = start_run(processes, folder, flags, cpu_seconds)
                multiprocessing.connection.wait([process.sentinel for process in running.values()])
                for folder in [folder for folder, process in running.items() if process.exitcode is not None]:
                    process = running.pop(folder)
                    progress.update()
                    if process.exitcode:
                        last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
                        raise ValueError(f"the run in {folder} failed: {' '.join(last)}")
                    kept.add(folder)
        finally:
            for process in running.values():
                process.terminate()  # they save and leave; the same command may be given again at once
            for process in running.values():
                process.join()


# ---------------------------------------------------------------- the command


def arms_of(flags: Flags) -> dict[str, list[str]]:
    """The flags of each arm by its name: --methods first, then --arms."""
    arms = {method: ["--replay", method] for method in flags.methods}
    for arm in flags.arms:
        name, _, own = arm.partition(":")
        name = name.strip()
        if name in arms or not re.fullmatch(r"[\w+.-]*\w[\w+.-]*", name):
            raise ValueError(f"--arms {name!r}: give it a name of its own, of letters, digits and - + . _")
        arms[name] = shlex.split(own)
    return arms


def equal_objective(arms: dict[str, list[str]], extra: list[str]) -> list[str]:
    """Flags that give every arm the baseline's objective; those after -- may have set it. Says so in one
    line."""
    baseline = next(iter(arms))
    cfg, _ = settings_of([*extra, *arms[baseline]])
    flags = [config.as_flag(name, getattr(cfg, name)) for name in OBJECTIVE]
    print(f"one objective for all arms, that of {baseline}: {' '.join(flags)} (--as-in-papers: each its own)")
    return " ".join(flags).split()


def run_or_read(flags: Flags, arms: dict[str, list[str]], extra: list[str]) -> dict[str, list[dict]]:
    """The runs of each learning rate; "" where none is asked for."""
    if bool(flags.runs) == bool(arms):
        raise ValueError("give folders of runs, or --methods (and --arms) to run")
    if flags.runs:
        return {"": named_apart([read_run(Path(folder)) for folder in flags.runs], flags.runs)}
    if min(flags.seeds, flags.jobs, flags.budget_rollouts) < 1:
        raise ValueError("--seeds, --jobs and --budget-rollouts must be at least 1")

    # what stands later wins: an arm's own flags over the objective of all
    shared = ["--steps", "1000000", "--max-rollouts", str(flags.budget_rollouts), "--save-every", "100", *extra]
    if not flags.as_in_papers:
        shared += equal_objective(arms, extra)
    jobs = []
    folders = {lr: [] for lr in flags.lrs or ("",)}
    for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
        for lr in folders:
            place = Path(flags.out) / f"lr-{lr}" if lr else Path(flags.out)
            rate = ["--lr", lr] if lr else []
            for method, own in arms.items():
                folder = place / f"{method}-s{seed}"
                folders[lr].append((method, folder))
                jobs.append((folder, [*shared, *rate, *own, "--seed", str(seed)]))
    kept = Kept(flags.keep, flags.out)
    run_all(jobs, flags.jobs, kept, flags.cpu_seconds)
    return {lr: [kept.read(folder) | {"method": method} for method, folder in some] for lr, some in folders.items()}


def named_apart(runs: list[dict], folders: tuple[str, ...]) -> list[dict]:
    """Two runs of one method and seed, such as one's own and the reference run, bear the names of their folders."""
    same = len({(run["method"], run["seed"]) for run in runs}) == 1
    if len(runs) == 2 and same and len(set(folders)) == 2:
        return [run | {"method": folder} for run, folder in zip(runs, folders, strict=True)]
    return runs


def write_results(out: Path, name: str, runs: list[dict], methods: list[str], command: str, **more) -> dict:
    """Prints the table; writes it, its numbers and the figure as `name`.md, .json and .png. Returns the
    numbers."""
    result = analyse(runs, methods) | more
    result["measure"] = measure_of(runs)
    result["differences"] = differing_settings(runs, methods)
    result["load"] = load_of(runs)
    result["command"] = command
    result["commit"] = log.commit()
    result["commits_of_runs"] = sorted({run["commit"] for run in runs})
    text = figures.results_table(result)
    (out / f"{name}.json").write_text(json.dumps(stats.rounded(result), indent=1) + "\n")
    (out / f"{name}.md").write_text(text + "\n")
    print(text)
    print(f"numbers: {out / f'{name}.json'}, figure: {figures.comparison(result, out / f'{name}.png')}\n")
    return result


def write_overview(out: Path, results: dict[str, dict]) -> None:
    """One table and one figure over all learning rates."""
    text = figures.overview_table(results)
    (out / "overview.md").write_text(text + "\n")
    print(text)
    print(f"figure: {figures.forest(figures.at_most_four(results), out / 'overview.png')}")


def compare(flags: Flags, extra: list[str], command: str) -> None:
    """Runs or reads, and writes a table for each learning rate; for several, the tuned one and an overview
    too."""
    arms = arms_of(flags)
    by_lr = run_or_read(flags, arms, extra)
    methods = list(arms)
    if not methods:  # of given folders: plain GRPO first; of two runs of one method the second one
        last = by_lr[""][-1]["method"] if by_lr[""][-1]["method"] in flags.runs else "none"
        methods = sorted({run["method"] for run in by_lr[""]}, key=lambda method: (method != last, method))
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for lr, runs in by_lr.items():
        if lr:
            print(f"learning rate {lr} for all\n")
        results[f"lr {lr}"] = write_results(out, f"lr-{lr}" if lr else "results", runs, methods, command)
    if len(flags.lrs) > 1 and flags.seeds < 4:
        print("no rate is tuned: that is chosen on half of the seeds and judged on the other, and needs at least 4")
    elif len(flags.lrs) > 1:
        chosen, rates = choose_rates(by_lr, methods)
        print(f"learning rate tuned for each method (for even and for odd seeds, on the others): {rates}\n")
        results["tuned"] = write_results(out, "tuned", chosen, methods, command, rates=rates)
    if len(flags.lrs) > 1:
        write_overview(out, results)


@config.exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    command = "python -m lab.compare " + shlex.join(argv)
    extra = []
    if "--" in argv:
        at = argv.index("--")
        extra = argv[at + 1 :]
        argv = argv[:at]
    flags, _ = config.parse(Flags, argv, __doc__)
    try:
        compare(flags, extra, command)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
