"""Does a method beat plain GRPO, and by how much? Methods x matched seeds on one budget of rollouts.

    python compare.py --methods none prompt rollout group --seeds 12 --budget-rollouts 40000
    python compare.py --arms "fifo: --replay rollout --priority-exponent 0" --methods none --seeds 12
    python compare.py --methods none prompt --seeds 12 -- --lr 1e-4 --share 0.5     after --: flags for every run
    python compare.py --methods none prompt --lrs 1e-4 5e-4 2e-3     at each rate, and at the best for each method
    python compare.py out/run1 out/run2 ...                                         runs that are there already

Runs of one seed share initial model, prompt order, sampling noise of equal answers, and evaluation. The first method is
the baseline (of given folders: plain GRPO). Everything is read from the runs' config.json and metrics.jsonl; a finished
run is not run again.

Accuracy at a cost is the mean over the last fifth of it, by straight lines between evaluations: the same stretch for
all runs, however far apart their evaluations are. Differences are paired by seed, with Student's t intervals; p values
are Holm-corrected over the methods of a table. Writes results.md, results.json and results.png.
"""

import argparse
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
from tqdm import tqdm

from support import config, plot, stats
from tasks import tiny

COSTS = {"rollouts": "rollouts", "tokens": "sampled tokens", "optimizer_steps": "optimiser steps", "seconds": "seconds"}
LEVELS = (0.4, 0.5, 0.6, 0.7)
WINDOW = 0.2  # share of a cost over whose end accuracy is averaged


# ---------------------------------------------------------------- curves


def read_run(folder: Path) -> dict:
    """One run as cumulative costs and held-out accuracy at its evaluations, and the means of its health figures."""
    config = json.loads((folder / "config.json").read_text())
    rows = plot.read(folder / "metrics.jsonl")
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"{folder / 'metrics.jsonl'} has not every step once; remove the folder and run it again")
    seconds = steps = 0.0
    points = [{"accuracy": rows[0].get("eval_accuracy_start"), **dict.fromkeys(COSTS, 0.0)}]
    for row in rows:
        seconds, steps = seconds + row["seconds_total"], steps + row["optimizer_steps"]
        if "eval_accuracy" in row:
            costs = {"rollouts": row["rollouts"], "tokens": row["tokens"], "optimizer_steps": steps, "seconds": seconds}
            points.append({"accuracy": row["eval_accuracy"], **costs})
    health = {name: fmean(row[name] for row in rows) for name in ("zero_variance", "mean_abs_advantage", "replayed")}
    health["distinct_prompts"] = rows[-1]["distinct_prompts"]
    points = [point for point in points if point["accuracy"] is not None]
    if len(points) < 2:
        raise ValueError(f"{folder} has no evaluations to compare; run it with --eval-every above 0")
    who = {"method": config["replay"], "seed": config["seed"], "commit": config.get("commit", ""), "config": config}
    return who | {"points": points, "health": health}


def curve(run: dict, cost: str) -> tuple:
    return tuple([point[what] for point in run["points"]] for what in (cost, "accuracy"))


def accuracy_at(run: dict, cost: str, budget: float) -> float:
    """Mean accuracy over the last fifth of `budget`."""
    return float(np.interp(np.linspace((1 - WINDOW) * budget, budget, 201), *curve(run, cost)).mean())


def area(run: dict, cost: str, budget: float) -> float:
    """Mean accuracy on the way to the budget."""
    return float(np.interp(np.linspace(0, budget, 501), *curve(run, cost)).mean())


def cost_to_reach(run: dict, level: float, cost: str = "rollouts") -> float | None:
    """The least cost at which `accuracy_at` reaches `level`."""
    costs = np.linspace(0, run["points"][-1][cost], 501)
    means = np.interp(np.outer(costs, np.linspace(1 - WINDOW, 1, 41)), *curve(run, cost)).mean(1)
    first = int(np.argmax(means >= level))
    if first == 0:
        return 0.0 if means[0] >= level else None
    return float(np.interp(level, means[first - 1 : first + 1], costs[first - 1 : first + 1]))


# ---------------------------------------------------------------- tables


def analyse(runs: list[dict], methods: list[str]) -> dict:
    """Every figure of the table. `runs` of `methods`, the first of which is the baseline, paired by seed."""
    by = {method: {run["seed"]: run for run in runs if run["method"] == method} for method in methods}
    if len(runs) > sum(map(len, by.values())):
        raise ValueError("two of the runs have the same method and seed; give one of each, at the same other settings")
    base, result = by[methods[0]], {"baseline": methods[0], "methods": {}}
    for method, arm in by.items():
        seeds = sorted(base.keys() & arm.keys())
        if not seeds:
            raise ValueError(f"no run of {method} has a seed of those of {methods[0]}, by which runs are paired")
        # what all runs of the pair spent: one method's few optimiser steps do not cut the others' comparison short
        budgets = {cost: min(run[s]["points"][-1][cost] for run in (arm, base) for s in seeds) for cost in COSTS}
        entry = {"seeds": len(seeds), "budgets": budgets, "accuracy": {}, "difference": {}, "area": {}, "reach": {}}
        for cost, budget in budgets.items():
            entry["accuracy"][cost] = fmean(accuracy_at(arm[s], cost, budget) for s in seeds)
            if method != methods[0]:
                for name, measure in (("difference", accuracy_at), ("area", area)):
                    values = [measure(arm[s], cost, budget) - measure(base[s], cost, budget) for s in seeds]
                    entry[name][cost] = stats.by_seed(values)
        for level in LEVELS:
            pairs = [(cost_to_reach(base[s], level), cost_to_reach(arm[s], level)) for s in seeds]
            logs = [math.log(b / a) for a, b in pairs if a and b]
            entry["reach"][str(level)] = stats.by_seed(logs) | {"both": len(logs)} if logs else {"both": 0}
        names = arm[seeds[0]]["health"]
        entry["health"] = {name: fmean(arm[s]["health"][name] for s in seeds) for name in names}
        result["methods"][method] = entry
    for table in ("difference", "area"):
        for cost in COSTS:
            tests = [entry[table][cost] for entry in result["methods"].values() if cost in entry[table]]
            for test, p in zip(tests, stats.holm([test["p"] for test in tests]), strict=True):
                test["p_holm"] = p
    return result


def points_of(test: dict) -> str:
    """A difference in points of per cent with interval; a star where Holm's p is below 0.05."""
    if test["n"] < 2:
        return f"{100 * test['mean']:+.1f} (one seed)"
    star = "*" if test.get("p_holm", 1) < 0.05 else ""
    return f"{100 * test['mean']:+.1f} ({100 * test['low']:+.1f} to {100 * test['high']:+.1f}){star}"


def table(result: dict) -> str:
    """Markdown."""
    base = result["baseline"]
    spent = ", ".join(f"{budget:,.0f} {COSTS[cost]}" for cost, budget in result["methods"][base]["budgets"].items())
    columns = ["method", "seeds", "accuracy", *(f"at equal {name}" for name in COSTS.values()), "mean on the way"]
    lines = [
        f"Held-out accuracy in points against {base}, paired by seed, 95 % intervals, * Holm-corrected p < 0.05, at "
        f"the most that both spent ({base}: {spent}).",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for method, entry in result["methods"].items():
        cells = [points_of(entry["difference"][cost]) if entry["difference"] else "" for cost in COSTS]
        cells.append(points_of(entry["area"]["rollouts"]) if entry["area"] else "")
        accuracy = f"{100 * entry['accuracy']['rollouts']:.1f}"
        lines.append(f"| {method} | {entry['seeds']} | {accuracy} | " + " | ".join(cells) + " |")
    levels = [x for x in LEVELS if any(e["reach"][str(x)]["both"] > 1 for e in result["methods"].values())]
    what = f"Rollouts to reach an accuracy, relative to {base} (pairs that both reached it), and health figures:"
    columns = ["method", *(f"{x:.0%}" for x in levels), "dead groups", "mean abs adv", "distinct prompts"]
    lines += ["", what, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for method, entry in result["methods"].items():
        cells = []
        for level in levels:
            reach, text = entry["reach"][str(level)], ""
            if method != base and reach["both"] > 1:
                low, mean, high = (100 * math.expm1(reach[k]) for k in ("low", "mean", "high"))
                text = f"{mean:+.0f}% ({low:+.0f} to {high:+.0f}; {reach['both']})"
            cells.append(text)
        health = entry["health"]
        cells += [f"{health['zero_variance']:.3f}", f"{health['mean_abs_advantage']:.3f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {health['distinct_prompts']:.0f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- running


def finished(folder: Path, flags: list[str]) -> bool:
    """ValueError if what is finished there is another run than `flags` ask for."""
    if not (folder / "curves.png").exists():
        return False
    cfg, given = config.parse(flags, "")
    asked, there = (json.loads(text) for text in (json.dumps(vars(cfg)), (folder / "config.json").read_text()))
    names = {*given, *there.get("given", [])} - {"out", "resume"}
    changed = [f"--{k.replace('_', '-')} {there.get(k)}, not {asked[k]}" for k in names if there.get(k) != asked[k]]
    if changed:
        raise ValueError(f"{folder} holds a run with {'; '.join(changed)}; give another --out, or remove that folder")
    return True


def one_run(folder: Path, flags: list[str]) -> None:
    """In a process of its own, with its console in log.txt."""
    os.setsid()  # Ctrl-C is for the parent, which ends its runs once; twice would be at once, with nothing saved
    with open(folder / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    import train

    sys.exit(train.main(["--out", str(folder), *flags]))


def run_all(jobs: list[tuple[Path, list[str]]], at_once: int) -> None:
    """Trains what is not there yet, `at_once` side by side, one thread each. A failure ends the comparison."""
    waiting, running = [job for job in jobs if not finished(*job)], {}
    for cfg in [config.parse(flags, "")[0] for _, flags in waiting]:
        config.validate(cfg)
        if not cfg.model:  # once, before two runs begin to make it
            tiny.make(tiny.home(cfg.sharing), sharing=cfg.sharing)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(config.ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    processes = multiprocessing.get_context("forkserver")  # what a run imports takes as long as a short run
    processes.set_forkserver_preload(["train", "transformers.models.qwen3.modeling_qwen3", "matplotlib.pyplot"])
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run", disable=None) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    folder, flags = waiting.pop(0)
                    folder.mkdir(parents=True, exist_ok=True)
                    if not (resume := ["--resume"] * any(folder.glob("checkpoints/step-*/state.pt"))):
                        (folder / "metrics.jsonl").unlink(missing_ok=True)
                    running[folder] = processes.Process(target=one_run, args=(folder, [*flags, *resume]))
                    running[folder].start()
                multiprocessing.connection.wait([process.sentinel for process in running.values()])
                for folder, process in list(running.items()):
                    if process.exitcode is not None:
                        del running[folder]
                        progress.update()
                        if process.exitcode:
                            last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
                            raise ValueError(f"the run in {folder} failed: {' '.join(last)}")
        finally:
            for process in running.values():
                process.terminate()  # they save and leave; the same command may be given again at once
            for process in running.values():
                process.join()


def tuned(by_lr: dict[str, list[dict]], methods: list[str]) -> tuple[list[dict], dict]:
    """Each method's runs at a learning rate of its own, by one rule: seeds of one half of all are taken at the rate
    whose mean accuracy on the way to the budget was best in the other half. Returns them and the rates chosen."""
    everything = [run for runs in by_lr.values() for run in runs]
    seeds = sorted({run["seed"] for run in everything})
    budget = min(run["points"][-1]["rollouts"] for run in everything)
    chosen, rates = [], {}
    for method in methods:
        rates[method] = []
        for half in (seeds[::2], seeds[1::2]):

            def on_the_other_half(lr, method=method, half=half):
                arm = [run for run in by_lr[lr] if run["method"] == method and run["seed"] not in half]
                return fmean(area(run, "rollouts", budget) for run in arm)

            rates[method].append(max(by_lr, key=on_the_other_half))
            chosen += [r for r in by_lr[rates[method][-1]] if r["method"] == method and r["seed"] in half]
    return chosen, rates


def overview(results: dict[str, dict], methods: list[str]) -> str:
    """Markdown: accuracy of the baseline and differences to it at equal rollouts, a column for each learning rate."""
    lines = ["| method | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for i, method in enumerate(methods):
        entries = [result["methods"][method] for result in results.values()]
        cells = [
            points_of(e["difference"]["rollouts"]) if i else f"{100 * e['accuracy']['rollouts']:.1f}" for e in entries
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(out: Path, name: str, runs: list[dict], methods: list[str], command: str, **more) -> dict:
    """Prints the table; writes it, its numbers and the figure as `name`.md, .json and .png. Returns the numbers."""
    made = sorted({run["commit"] for run in runs})
    result = analyse(runs, methods) | more | {"command": command, "commit": stats.commit(), "commits_of_runs": made}
    (out / f"{name}.json").write_text(json.dumps(stats.rounded(result), indent=1) + "\n")
    (out / f"{name}.md").write_text(table(result) + "\n")
    print(table(result))
    print(f"numbers: {out / f'{name}.json'}, figure: {plot.comparison(runs, methods, out / f'{name}.png')}\n")
    return result


def run_or_read(args, arms: dict[str, list[str]], extra: list[str], out: Path) -> dict[str, list[dict]]:
    """The runs of each learning rate; "" where none is asked for."""
    if bool(args.runs) == bool(arms):
        raise ValueError("give folders of runs, or --methods (and --arms) to run")
    if args.runs:
        runs = [read_run(Path(folder)) for folder in args.runs]
        for name in ("model", "prompts_sha256", "lr", "prompts_per_step", "answers_per_prompt", "max_tokens", "reward"):
            if len(values := {str(run["config"].get(name)) for run in runs}) > 1:
                print(f"note: the runs differ in {name}: {', '.join(sorted(values))}")
        return {"": runs}
    if min(args.seeds, args.jobs, args.budget_rollouts) < 1:
        raise ValueError("--seeds, --jobs and --budget-rollouts must be at least 1")
    if args.seeds < 4 and args.lrs:
        raise ValueError(f"--lrs chooses on half of the seeds and judges on the other: at least 4, got {args.seeds}")
    base = ["--steps", "1000000", "--max-rollouts", str(args.budget_rollouts), "--save-every", "100", *extra]
    folders, jobs, seeds = {}, [], range(args.first_seed, args.first_seed + args.seeds)
    for lr in args.lrs or [""]:
        rate, place = (["--lr", lr], out / f"lr-{lr}") if lr else ([], out)
        folders[lr] = {(m, s): place / f"{m}-s{s}" for s in seeds for m in arms}
        jobs += [(f, [*base, *rate, *arms[m], "--seed", str(s)]) for (m, s), f in folders[lr].items()]
    run_all(jobs, args.jobs)
    return {lr: [read_run(f) | {"method": m} for (m, _), f in some.items()] for lr, some in folders.items()}


def main(argv: list[str]) -> int:
    command = "python compare.py " + shlex.join(argv)
    argv, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = config.fail, parser.add_argument
    add("runs", nargs="*", help="folders of runs to compare; without them --methods are run")
    add("--methods", nargs="+", default=[], help="values of --replay; the first is the baseline")
    add("--arms", nargs="+", default=[], help="further methods as 'NAME: flags of train.py'")
    add("--lrs", nargs="+", default=[], help="learning rates: a table for each, and one tuned per method")
    add("--seeds", type=int, default=12, help="matched seeds (%(default)s)")
    add("--first-seed", type=int, default=0, help="the first of them (%(default)s)")
    add("--budget-rollouts", type=int, default=40_000, help="answers a run may generate (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs side by side (%(default)s)")
    add("--out", default=str(config.OUT / "compare"), help="folder of runs and results (%(default)s)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    arms = {method: ["--replay", method] for method in args.methods}
    try:
        for name, _, flags in (arm.partition(":") for arm in args.arms):
            if name.strip() in arms or not re.fullmatch(r"[\w+.-]*\w[\w+.-]*", name.strip()):
                raise ValueError(f"--arms {name!r}: give it a name of its own, of letters, digits and - + . _")
            arms[name.strip()] = shlex.split(flags)
        by_lr = run_or_read(args, arms, extra, out)
        names = sorted({run["method"] for run in by_lr.get("", [])}, key=lambda method: (method != "none", method))
        methods = list(arms) or names
        out.mkdir(parents=True, exist_ok=True)
        results = {}
        for lr, runs in by_lr.items():
            print(f"learning rate {lr} for all\n" if lr else "")
            results[f"lr {lr}"] = write(out, f"lr-{lr}" if lr else "results", runs, methods, command)
        if len(args.lrs) > 1:
            by_lr["tuned"], rates = tuned(by_lr, methods)
            print(f"learning rate tuned for each method (for even and for odd seeds, on the others): {rates}\n")
            results["tuned"] = write(out, "tuned", by_lr["tuned"], methods, command, rates=rates)
            (out / "overview.md").write_text(overview(results, methods) + "\n")
            print(overview(results, methods))
            print(f"figure: {plot.forest(results, methods, out / 'overview.png')}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
