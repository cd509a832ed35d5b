"""Figures and tables from results alone: of a comparison or a map just made, and of the documentation.

    python -m lab.figures     makes docs/figures/*.png, and the tables of README.md and docs/, anew in seconds

The documentation's numbers are those of lab/results/. Every table is written to docs/tables/NAME.md. A page shows
one by the two lines below, and what stands between them is replaced:

    <!-- table: none -->
    <!-- end of table -->

So a page stays in sync by running this again; a test fails where a table or a page is out of date.
"""

import json
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab import demo_figure, gpus
from support import costs, lives, plot, stats
from support.config import ROOT, exits, parse

COSTS = {"rollouts": "rollouts", "tokens": "sampled tokens", "optimizer_steps": "optimiser steps", "seconds": "seconds"}
LONG_COSTS = {"rollouts": "rollouts", "tokens": "tokens", "seconds": "CPU seconds"}  # of the campaign of long answers
LONG_SHARES = (0.6, 0.8)  # of plain GRPO's seconds that its rollouts might take on a machine where they are dearer
BAND_FROM = 4  # seeds; of fewer the figure draws the runs themselves
PANELS = 4  # a figure has no more
# In a figure of many methods these have their colours and stand first; eleven colours cannot be told apart.
IN_COLOUR = ("prompt", "prioritized", "rollout", "group", "popo", "twice")
OTHERS = "#8a8a8a"
WINDOW = 0.2  # share of a cost over whose end accuracy is averaged
DEMO_LEVEL = 0.7  # of accuracy, in the demo's table
# Comparisons of one objective in both tasks, with their figures' titles.
EQUAL = {
    "equal-none": "One objective, no shared facts: a gated second pass keeps up with POPO and stores nothing",
    "equal-digits": "One objective, shared digits: a second pass gains most, and no gate helps at 8e-4",
}
# Cells in which storing is held against a second pass, and the folders of their results.
STORING = {
    "usual": "equal-none",
    "digits": "equal-digits",
    "few live groups": "storing-hard",
    "few live groups, 64 prompts a step": "storing-large",
    "long": "storing-long",
}
SCALE = 10  # points of accuracy; the forest writes larger differences as a number
RESULTS = ROOT / "lab" / "results"
VISITS = RESULTS / "lives.npz"  # of the reference run of Prompt Replay (lab/reference.py)
DOCS = ROOT / "docs"


# ---------------------------------------------------------------- tables


def measure_of(result: dict) -> str:
    """What `accuracy` means in `result`. Where no prompt teaches another, none is held out that could be
    learnt."""
    if "measure" in result:
        return result["measure"]
    return "accuracy on the training prompts" if "--sharing none" in result["command"] else "held-out accuracy"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def points_of(test: dict) -> str:
    """A difference in points of per cent with its interval, and a star where Holm's p is below 0.05."""
    mean = f"{100 * test['mean']:+.1f}"
    if test["n"] < 2:
        return f"{mean} (one seed)"
    star = "*" if test.get("p_holm", 1) < 0.05 else ""
    return f"{mean} ({100 * test['low']:+.1f} to {100 * test['high']:+.1f}){star}"


def results_table(result: dict) -> str:
    """Everything about one comparison, in Markdown: accuracy, cost of an accuracy, settings that differ,
    load."""
    parts = [accuracy_table(result), reach_table(result)]
    if "differences" in result:
        parts.append(differences_list(result))
    if "load" in result:
        parts.append(load_line(result["load"]))
    parts.append(took({"": result}))
    return "\n\n".join(parts)


def accuracy_table(result: dict) -> str:
    base = result["baseline"]
    budgets = result["methods"][base]["budgets"]
    spent = ", ".join(f"{budgets[cost]:,.0f} {name}" for cost, name in COSTS.items())
    what = measure_of(result)
    columns = ["method", "seeds", what, *(f"at equal {name}" for name in COSTS.values()), "mean on the way"]
    rows = []
    for method, entry in result["methods"].items():
        row = [plot.label_of(method), str(entry["seeds"]), f"{100 * entry['accuracy']['rollouts']:.1f}"]
        if method == base:
            row += [""] * (len(COSTS) + 1)
        else:
            row += [points_of(entry["difference"][cost]) for cost in COSTS]
            row.append(points_of(entry["area"]["rollouts"]))
        rows.append(row)
    head = (
        f"{what[0].upper()}{what[1:]} in points against {plot.label_of(base)}, paired by seed, 95 % intervals, "
        f"* Holm-corrected p < 0.05, at the most that both spent ({plot.label_of(base)}: {spent})."
    )
    return f"{head}\n\n{markdown(columns, rows)}"


def reach_table(result: dict) -> str:
    """Rollouts to reach levels of accuracy, for the levels that some method reached with two seeds, and
    health."""
    base = result["baseline"]
    entries = result["methods"]
    levels = [x for x in entries[base]["reach"] if any(e["reach"][x]["both"] > 1 for e in entries.values())]
    columns = ["method", *(f"{float(x):.0%}" for x in levels), "dead groups", "mean abs adv", "distinct prompts"]
    rows = []
    for method, entry in entries.items():
        row = [plot.label_of(method)]
        for level in levels:
            reach = entry["reach"][level]
            if method == base or reach["both"] < 2:
                row.append("")
                continue
            mean = 100 * math.expm1(reach["mean"])
            low = 100 * math.expm1(reach["low"])
            high = 100 * math.expm1(reach["high"])
            row.append(f"{mean:+.0f}% ({low:+.0f} to {high:+.0f}; {reach['both']})")
        health = entry["health"]
        row += [f"{health['zero_variance']:.3f}", f"{health['mean_abs_advantage']:.3f}"]
        row.append(f"{health['distinct_prompts']:.0f}")
        rows.append(row)
    head = f"Rollouts to reach an accuracy, relative to {plot.label_of(base)} (pairs that both reached it), and health:"
    return f"{head}\n\n{markdown(columns, rows)}"


def differences_list(result: dict) -> str:
    """Every setting in which the arms differ, the baseline's value first; not that a method is itself."""
    base = result["baseline"]
    lines = []
    for name, values in result["differences"].items():
        others = []
        for method, value in values.items():
            if value not in (values[base], method):
                others.append(f"{plot.label_of(method)} {value}")
        if others or " / " in values[base]:
            lines.append(f"- `{name}`: {'; '.join([values[base], *others])}")
    if not lines:
        return "The arms differ in no setting but the method."
    return "\n".join([f"Settings in which the arms differ, {plot.label_of(base)} first:", "", *lines])


def load_line(load: dict) -> str:
    if load["runs"] == 0:
        return "Equal seconds: the load of the machine during these runs is not known."
    if load.get("in_cpu_seconds"):
        return "Equal seconds: the processor's, in steps, to which other work on the machine adds little."
    return (
        f"Equal seconds: the machine's load was {load['start']:.1f} when a run began and {load['end']:.1f} when it "
        f"ended, on {load['cores']} cores (one-minute load averages, means over {load['runs']} runs)."
    )


def took(results: dict[str, dict]) -> str:
    """How many runs these results are made of, and their CPU hours. Results that have no CPU seconds have the seconds
    that each run spent in steps at least, on one thread. What is tuned was chosen among the other runs."""
    runs = 0
    seconds = 0.0
    measured = True
    for name, result in results.items():
        if name == "tuned":
            continue
        count = sum(entry["seeds"] for entry in result["methods"].values())
        runs += count
        load = result.get("load", {"runs": 0})
        if load["runs"] == count and "cpu_seconds" in load:
            seconds += load["cpu_seconds"]
        else:
            measured = False
            seconds += sum(entry["seeds"] * entry["budgets"]["seconds"] for entry in result["methods"].values())
    if measured:
        return f"{runs} runs, {seconds / 3600:.2g} CPU hours."
    return f"{runs} runs, at least {seconds / 3600:.2g} CPU hours in steps (starts and evaluations not counted)."


def took_map(cells: list[dict]) -> str:
    """The CPU hours of a map, as far as its rules noted them."""
    rules = list(cells[0]["rules"])
    noted = [rule for rule in rules if "cpu_seconds" in cells[0]["rules"][rule]]
    seconds = 0.0
    count = 0
    for cell in cells:
        count += cell["seeds"] * len(cell["rules"])
        seconds += sum(cell["rules"][rule]["cpu_seconds"] for rule in noted if rule in cell["rules"])
    runs = f"{count} runs"
    hours = seconds / 3600
    if not noted:
        return f"{runs}; their CPU hours were not noted."
    if len(noted) < len(rules):
        return f"{runs}; {' and '.join(map(plot.label_of, noted))}: {hours:.2g} CPU hours; others not noted."
    return f"{runs}, {hours:.2g} CPU hours."


def overview_table(results: dict[str, dict], cost: str = "rollouts") -> str:
    """The baseline's accuracy and differences to it at equal `cost`, a column for each learning rate."""
    first = next(iter(results.values()))
    rows = []
    for method in first["methods"]:
        row = [plot.label_of(method)]
        for result in results.values():
            entry = result["methods"][method]
            if method == result["baseline"]:
                row.append(f"{100 * entry['accuracy'][cost]:.1f}")
            else:
                row.append(points_of(entry["difference"][cost]))
        rows.append(row)
    head = (
        f"{plot.label_of(first['baseline'])}: {measure_of(first)} in per cent; others: points against it at equal "
        f"{COSTS[cost]}, 95 % intervals, * Holm-corrected p < 0.05. {took(results)}"
    )
    return f"{head}\n\n{markdown(['method', *results], rows)}"


def long_table(results: dict[str, dict]) -> str:
    """The baseline's accuracy, and differences to it at equal rollouts, tokens and CPU seconds, for each learning
    rate."""
    first = next(iter(results.values()))
    base = first["baseline"]
    columns = ["method", "seeds"]
    for name in results:
        columns += [f"{name}, equal {cost}" for cost in LONG_COSTS.values()]
    rows = []
    for method in first["methods"]:
        entries = [result["methods"][method] for result in results.values()]
        row = [plot.label_of(method), "/".join(sorted({str(entry["seeds"]) for entry in entries}))]
        for entry in entries:
            if method == base:
                row += [f"{100 * entry['accuracy'][cost]:.1f}" for cost in LONG_COSTS]
            else:
                row += [points_of(entry["difference"][cost]) for cost in LONG_COSTS]
        rows.append(row)
    fewest = min(entry["seeds"] for result in results.values() for entry in result["methods"].values())
    word = "" if fewest >= 6 else " **Fewer than six seeds: not yet a result.**"
    head = (
        f"{plot.label_of(base)}: {measure_of(first)} in per cent; others: points against it, paired by seed, "
        f"95 % intervals, * Holm-corrected p < 0.05.{word} {took(results)}"
    )
    return f"{head}\n\n{markdown(columns, rows)}"


def priced(run: dict, price: float) -> list[float]:
    """The seconds of a kept run at its evaluations [N], if its rollouts had taken `price` times as long. What is kept
    is their mean share, so that it is taken for that of every step."""
    share = run["means"]["seconds_rollout"] / run["means"]["seconds_total"]
    return [seconds * (1 + (price - 1) * share) for seconds in run["points"]["seconds"]]


def price_of(runs: list[dict], share: float) -> float:
    """How many times as long the rollouts of `runs` would have to take, to be `share` of all their seconds."""
    rollouts = sum(run["means"]["seconds_rollout"] for run in runs)
    others = sum(run["means"]["seconds_total"] for run in runs) - rollouts
    return share / (1 - share) * others / rollouts


def end_at_price(run: dict, price: float, budget: float) -> float:
    return end_accuracy(priced(run, price), run["points"]["accuracy"], budget)


def at_price(arms: dict[str, dict[str, dict]], price: float) -> dict[str, dict]:
    """Each of `arms` (runs by method and seed) against the first, at equal seconds with rollouts at `price`."""
    base, *others = arms
    tests = {}
    for method in others:
        runs = [*arms[base].values(), *arms[method].values()]
        budget = min(priced(run, price)[-1] for run in runs)
        differences = []
        for seed, other in arms[base].items():
            ours = end_at_price(arms[method][seed], price, budget)
            differences.append(ours - end_at_price(other, price, budget))
        tests[method] = stats.by_seed(differences)
    stats.correct(list(tests.values()))
    return tests


def kept_arms(results: dict[str, dict], path: Path) -> dict[str, dict[str, dict[str, dict]]]:
    """The runs that `results` were made of, by rate, method and seed, from the file of kept runs at `path`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    runs = {row["folder"]: row for row in rows}
    kept = {}
    for rate, result in results.items():
        kept[rate] = {}
        for method, entry in result["methods"].items():
            folder = f"{rate.replace(' ', '-')}/{method}"
            kept[rate][method] = {seed: runs[f"{folder}-s{seed}"] for seed in entry["ends"]}
    return kept


def dear_table(kept: dict[str, dict[str, dict[str, dict]]]) -> str:
    """Comparisons at equal seconds, if rollouts were more of a step than they are here. `kept`: runs by rate, method
    and seed, the baseline first."""
    columns = ["method"]
    tests = []
    for rate, arms in kept.items():
        plain = list(next(iter(arms.values())).values())
        for share in LONG_SHARES:
            price = price_of(plain, share)
            columns.append(f"{rate}, share {share:.1f} (x {price:.1f})")
            tests.append(at_price(arms, price))
    rows = []
    for method in tests[0]:
        rows.append([plot.label_of(method), *(points_of(test[method]) for test in tests)])
    head = (
        "Points against plain GRPO at equal seconds, if rollouts took so many times (x) as long that they made up this "
        "share of plain GRPO's seconds: computed from the same runs. Paired by seed, 95 % intervals, "
        "* Holm-corrected p < 0.05."
    )
    return f"{head}\n\n{markdown(columns, rows)}"


def map_table(cells: list[dict]) -> str:
    """Every cell of the map with every rule."""
    rules = list(cells[0]["rules"])
    rows = []
    for cell in cells:
        setting = cell["setting"]
        row = [f"{setting[name]:g}" for name in ("interference", "sharing", "visit")]
        for rule in rules:
            if rule not in cell["rules"]:
                row.append("not run")
                continue
            late = cell["rules"][rule]["late"]
            row.append(f"{bound_sign(cell, rule)}{100 * late['mean']:+.0f} ± {100 * late['se']:.0f}")
        rows.append(row)
    head = (
        "Rollouts to two thirds of uniform sampling's gain, in % more or fewer than uniform sampling needs, with "
        f"standard errors over {cells[0]['seeds']} matched seeds; > a lower bound, as some seed never got there. "
        f"{took_map(cells)}"
    )
    columns = ["interference", "sharing", "step per visit", *(plot.label_of(rule) for rule in rules)]
    return f"{head}\n\n{markdown(columns, rows)}"


def second_pass_table(cells: dict[str, dict]) -> str:
    """Every cell of lab/second_pass.py: accuracy with a tuned rate, and what storing has more than the others."""
    rows = []
    for name, cell in cells.items():
        accuracy = [f"{100 * value:.1f}" for value in cell["accuracy"].values()]
        tests = [points_of(test) for test in cell["tests"].values()]
        rows.append([name, *accuracy, *tests])
    some = next(iter(cells.values()))
    runs = len(cells) * some["seeds"] * len(some["accuracy"]) * len(some["tried"])
    hours = sum(cell["cpu_seconds"] for cell in cells.values()) / 3600
    head = (
        f"Exact accuracy in per cent with the learning rate tuned for each arm, and differences in points, "
        f"{some['seeds']} matched seeds, 95 % intervals, * Holm-corrected p < 0.05 over the cells. "
        f"{runs} runs, {hours:.2g} CPU hours."
    )
    return f"{head}\n\n{markdown(['cell', *some['accuracy'], *some['tests']], rows)}"


def between(result: dict, method: str, other: str) -> dict:
    """What `method` has more than `other` at equal rollouts, paired by seed."""
    ours = result["methods"][method]["ends"]
    theirs = result["methods"][other]["ends"]
    return stats.by_seed([ours[seed] - theirs[seed] for seed in ours])


def all_rates(cells: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """The results of all cells and rates, those of tuned rates left out, which are chosen among them."""
    found = {}
    for cell, results in cells.items():
        found |= {f"{cell} {rate}": result for rate, result in results.items() if rate != "tuned"}
    return found


def storing_table(cells: dict[str, dict[str, dict]]) -> str:
    """Storing against a second pass in the network: the tuned results of each cell, as in second_pass_table."""
    pairs = [("group", "twice"), ("group", "none"), ("twice", "none")]
    tests = {pair: [between(results["tuned"], *pair) for results in cells.values()] for pair in pairs}
    for column in tests.values():
        stats.correct(column)
    rows = []
    for i, (cell, results) in enumerate(cells.items()):
        methods = results["tuned"]["methods"]
        accuracy = [f"{100 * methods[method]['accuracy']['rollouts']:.1f}" for method in ("none", "twice", "group")]
        rows.append([cell, *accuracy, *(points_of(column[i]) for column in tests.values())])
    seeds = {entry["seeds"] for results in cells.values() for entry in results["tuned"]["methods"].values()}
    head = (
        "Accuracy in per cent with the learning rate tuned for each arm, and differences in points at equal rollouts, "
        f"{'/'.join(map(str, sorted(seeds)))} matched seeds, 95 % intervals, * Holm-corrected p < 0.05 over the cells. "
        f"With the other arms of the first two cells: {took(all_rates(cells))}"
    )
    columns = ["cell", "plain GRPO", "twice", "POPO", "POPO - twice", "POPO - plain", "twice - plain"]
    return f"{head}\n\n{markdown(columns, rows)}"


def gates_table(cells: dict[str, dict]) -> str:
    """Every arm of lab/gates.py: at how many of all rates it is behind one pass and ahead of it, and tuned, by cell."""
    some = next(iter(cells.values()))
    rows = []
    for arm in some["arms"]:
        if arm == "plain":
            continue
        tests = [test for cell in cells.values() for test in cell["arms"][arm]["by_rate"]]
        behind = sum(test["high"] < 0 for test in tests)
        ahead = sum(test["low"] > 0 for test in tests)
        mean = 100 * np.mean([test["mean"] for test in tests])
        worst = 100 * min(test["mean"] for test in tests)
        tuned = [points_of(cell["arms"][arm]["tuned"]) for cell in cells.values()]
        rows.append([arm, str(behind), str(ahead), f"{mean:+.1f}", f"{worst:+.1f}", *tuned])
    runs = len(cells) * some["seeds"] * len(some["arms"]) * len(some["tried"])
    hours = sum(cell["cpu_seconds"] for cell in cells.values()) / 3600
    head = (
        f"Exact accuracy in points against one pass, {some['seeds']} matched seeds, 95 % intervals without correction. "
        f"Behind, ahead: at how many of {len(cells) * len(some['tried'])} rates (of all cells) the interval excludes "
        f"zero; mean, worst: over these. By cell: tuned for each arm. {runs} runs, {hours:.2g} CPU hours."
    )
    return f"{head}\n\n{markdown(['arm', 'behind', 'ahead', 'mean', 'worst', *cells], rows)}"


def end_accuracy(costs, accuracies, budget: float) -> float:
    """Mean accuracy over the last fifth of `budget`, by straight lines between evaluations: [N] and [N]."""
    return float(np.interp(np.linspace((1 - WINDOW) * budget, budget, 201), costs, accuracies).mean())


def demo_table(result: dict) -> str:
    """The README's runs against plain GRPO: points of accuracy at the end, and rollouts to DEMO_LEVEL in %."""
    rollouts = result["curves"]["none"]["rollouts"]
    ends = {}
    reached = {}
    for method, curve in result["curves"].items():
        runs = curve["seeds"].values()
        ends[method] = np.array([end_accuracy(rollouts, run, rollouts[-1]) for run in runs])
        reached[method] = np.log([rollouts_to(DEMO_LEVEL, rollouts, run) for run in runs])
    rows = []
    for method, name in (("group", "POPO"), ("twice", "`twice`")):
        points = stats.by_seed((ends[method] - ends["none"]).tolist())
        ratio = stats.by_seed((reached[method] - reached["none"]).tolist())
        mean, low, high = (100 * math.expm1(ratio[key]) for key in ("mean", "low", "high"))
        rows.append([name, points_of(points), f"{mean:+.0f} % ({low:+.0f} to {high:+.0f})"])
    points = f"points at {rollouts[-1]:,} rollouts, by the measure above"
    return markdown(["against plain GRPO", points, f"rollouts to {DEMO_LEVEL:.0%}"], rows)


def rollouts_to(level: float, rollouts: list[int], accuracies: list[float]) -> float:
    """Where a run first reaches `level`, by straight lines between evaluations; nan if it never does."""
    places = np.linspace(0, rollouts[-1], 2001)
    above = np.interp(places, rollouts, accuracies) >= level
    return float(places[above.argmax()]) if above.any() else math.nan


def continual_table(result: dict) -> str:
    """Tasks one after another (lab/continual.py): accuracy on each stage, by arm. result["runs"]: kind -> arm -> the
    accuracies at the start, between the stages and at the end, of both stages [3][2], of each seed."""
    measures = {
        "first stage, at its end": lambda run: run[1][0],
        "first stage, at the end": lambda run: run[2][0],
        "second stage, at the end": lambda run: run[2][1],
        "both, at the end": lambda run: sum(run[2]) / 2,
    }
    columns = ["task", "accuracy", *next(iter(result["runs"].values()))]
    rows = []
    count = 0
    for kind, arms in result["runs"].items():
        count += sum(len(runs) for runs in arms.values())
        for name, measure in measures.items():
            base, *others = [[measure(run) for run in runs] for runs in arms.values()]
            tests = [stats.by_seed([b - a for a, b in zip(base, other, strict=True)]) for other in others]
            rows.append([kind, name, f"{100 * sum(base) / len(base):.1f}", *map(points_of, tests)])
    head = (
        f"Without replay in per cent; others: points against it, {len(base)} matched seeds, 95 % intervals without "
        f"correction. {count} runs, {result['cpu_seconds'] / 3600:.2g} CPU hours."
    )
    return f"{head}\n\n{markdown(columns, rows)}"


def bound_sign(cell: dict, rule: str) -> str:
    return ">" if cell["rules"][rule]["late"]["reached"] < cell["seeds"] else ""


# ---------------------------------------------------------------- figures


def new_figure(rows: int, columns: int, size: tuple[float, float], **more):
    """Letters of a size that stays readable where a page shows the figure at half its width."""
    pyplot = plot.pyplot()
    pyplot.rcParams.update({"font.size": 12, "axes.titlesize": 12})
    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **more)


def tidy(axis, *sides: str) -> None:
    axis.spines[["top", "right", *sides]].set_visible(False)


def comparison(result: dict, path: Path) -> Path:
    """Accuracy over rollouts and over seconds. With four seeds or more: the mean and its 95 % band; else
    the runs."""
    figure, axes = new_figure(1, 2, (10, 5.2), sharey=True)
    colours = plot.colours_of(list(result["methods"]))
    for axis, cost in zip(axes[0], ("rollouts", "seconds"), strict=True):
        for method, entry in result["methods"].items():
            draw_curve(axis, entry["curves"][cost], colours[method], f"{plot.label_of(method)} (n={entry['seeds']})")
        axis.set(xlim=(0, None), xlabel="rollouts" if cost == "rollouts" else "seconds in steps")
        axis.set_title(f"over {COSTS[cost]}")
        tidy(axis)
    axes[0, 0].set_ylabel(measure_of(result))
    axes[0, 0].yaxis.set_major_formatter("{x:.0%}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return plot.save(figure, path)


def by_rate(results: dict[str, dict], path: Path) -> Path:
    """Accuracy over rollouts and over CPU seconds, a row for each learning rate. Of seven arms two have bands, or
    nothing could be seen: the baseline and `twice`."""
    figure, axes = new_figure(len(results), 2, (10, 1 + 4.2 * len(results)), sharey=True)
    colours = plot.colours_of(list(next(iter(results.values()))["methods"]))
    for row, (name, result) in zip(axes, results.items(), strict=True):
        seeds = max(entry["seeds"] for entry in result["methods"].values())
        for axis, cost in zip(row, ("rollouts", "seconds"), strict=True):
            for method, entry in result["methods"].items():
                band = method in (result["baseline"], "twice")
                draw_curve(axis, entry["curves"][cost], colours[method], plot.label_of(method), band)
            axis.set(xlim=(0, None), xlabel=LONG_COSTS[cost])
            axis.set_title(f"{name}, {seeds} seed{'s' if seeds > 1 else ''}, over {LONG_COSTS[cost]}")
            tidy(axis)
        row[0].set_ylabel(measure_of(result))
        row[0].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Bands: 95 % intervals of the mean, of plain GRPO and the control twice", fontsize=12)
    return plot.save(figure, path)


def draw_curve(axis, curve: dict, colour: str, label: str, band: bool = True) -> None:
    """One method: `grid` of costs [N], and under `seeds` the accuracies of each run there [N]."""
    runs = np.array(list(curve["seeds"].values()))  # [S, N]
    if len(runs) < BAND_FROM:
        for i, run in enumerate(runs):
            axis.plot(curve["grid"], run, color=colour, linewidth=1.4, label=label if i == 0 else None)
        return
    axis.plot(curve["grid"], runs.mean(0), color=colour, linewidth=2, label=label)
    if band:
        points = [stats.by_seed(column.tolist()) for column in runs.T]
        low = [point["low"] for point in points]
        high = [point["high"] for point in points]
        axis.fill_between(curve["grid"], low, high, color=colour, alpha=0.15, linewidth=0)


def at_most_four(results: dict[str, dict]) -> dict[str, dict]:
    """The last of them, which is the tuned one, and three others spread over the rest."""
    names = list(results)
    if len(names) > PANELS:
        spread = np.linspace(0, len(names) - 2, PANELS - 1).round().astype(int)
        names = [names[i] for i in spread] + names[-1:]
    return {name: results[name] for name in names}


def forest(results: dict[str, dict], path: Path, title: str = "") -> Path:
    """Differences to the baseline at equal rollouts with 95 % intervals: a panel for each learning rate, a
    row for each method, the papers' first. A hollow mark: Holm's p is not below 0.05."""
    first = next(iter(results.values()))
    base = first["baseline"]
    methods = [method for method in first["methods"] if method != base]
    methods.sort(key=lambda method: method not in IN_COLOUR)
    colours = plot.colours_of(methods)
    if len(methods) > len(IN_COLOUR):
        colours |= {method: OTHERS for method in methods if method not in IN_COLOUR}
    figure, axes = new_figure(1, len(results), (2.4 + 1.6 * len(results), 2.0 + 0.34 * len(methods)), sharey=True)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        axis.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
        for i, method in enumerate(methods):
            draw_difference(axis, i, result["methods"][method]["difference"]["rollouts"], colours[method])
        accuracy = result["methods"][base]["accuracy"]["rollouts"]
        axis.set_title(f"{name}\n{plot.label_of(base)}: {100 * accuracy:.0f} %")
        axis.set(xlim=(-SCALE - 1, SCALE + 1), ylim=(len(methods) - 0.5, -0.5), xticks=(-8, -4, 0, 4, 8))
        axis.set_yticks(range(len(methods)), [plot.label_of(method) for method in methods])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", color="#eeeeee", zorder=-1)
        axis.set_axisbelow(True)
        tidy(axis, "left")
    what = f"{measure_of(first)}, points against {plot.label_of(base)} at equal rollouts (hollow: not significant)"
    figure.supxlabel(f"{what}\n{took(results)}", fontsize=12)
    figure.suptitle(title, fontsize=13)
    return plot.save(figure, path)


def draw_difference(axis, row: int, test: dict, colour: str) -> None:
    """One mark with its interval; a number at the edge where it is off the scale that suits the others."""
    mean = 100 * test["mean"]
    clear = test.get("p_holm", 1) < 0.05
    if abs(mean) > SCALE:
        edge = math.copysign(SCALE + 0.8, mean)
        side = "left" if mean < 0 else "right"
        arrow = "◂ " if mean < 0 else "▸ "
        axis.text(edge, row, f"{arrow}{mean:+.0f}", color=colour, ha=side, va="center", fontsize=11)
        return
    if test["n"] > 1:
        axis.plot([100 * test["low"], 100 * test["high"]], [row, row], color=colour, linewidth=2)
    axis.plot(mean, row, "o", color=colour, markersize=7, markerfacecolor=colour if clear else "white")


def storing(cells: dict[str, dict[str, dict]], path: Path) -> Path:
    """What storing has more than a second pass, with 95 % intervals: a panel for each cell, a mark for each learning
    rate and one for the tuned ones."""
    widths = [len(results) for results in cells.values()]
    figure, axes = new_figure(1, len(cells), (13, 4.2), sharey=True, width_ratios=widths)
    for axis, (name, results) in zip(axes[0], cells.items(), strict=True):
        axis.axhline(0, color="#bbbbbb", linewidth=1, zorder=0)
        for x, (rate, result) in enumerate(results.items()):
            test = between(result, "group", "twice")
            colour = OTHERS if rate == "tuned" else plot.COLOURS["group"]
            axis.plot([x, x], [100 * test["low"], 100 * test["high"]], color=colour, linewidth=2)
            axis.plot(x, 100 * test["mean"], "o", color=colour, markersize=7)
        axis.set_xticks(range(len(results)), [rate.removeprefix("lr ") for rate in results], rotation=60)
        axis.set(xlim=(-0.5, len(results) - 0.5))
        axis.set_title(textwrap.fill(name, 20))
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
        tidy(axis)
    axes[0, 0].set_ylabel("points of accuracy")
    about = f"learning rate, the same for both; tuned: for each its own\n{took(all_rates(cells))}"
    figure.supxlabel(about, fontsize=12)
    figure.suptitle("POPO against a second pass over fresh answers, at equal rollouts (above 0: storing is ahead)")
    return plot.save(figure, path)


def regimes(cells: list[dict], path: Path, rules: list[str], interference: float) -> Path:
    """Rollouts to two thirds of uniform sampling's gain, relative to it, over step per visit and sharing: a panel
    for each of at most four rules, at one interference. Grey: less than two standard errors from no difference."""
    from matplotlib.colors import LinearSegmentedColormap

    rules = rules[:PANELS]
    cells = [cell for cell in cells if cell["setting"]["interference"] == interference]
    shown = [cell | {"rules": {rule: cell["rules"][rule] for rule in rules}} for cell in cells]
    visits = sorted({cell["setting"]["visit"] for cell in cells})
    sharings = sorted({cell["setting"]["sharing"] for cell in cells})
    columns = min(len(rules), 2)
    rows = math.ceil(len(rules) / columns)
    size = (1 + 0.68 * len(visits) * columns, 1.8 + (0.45 + 0.45 * len(sharings)) * rows)
    figure, axes = new_figure(rows, columns, size, sharex=True, sharey=True)
    for axis in axes.flat[len(rules) :]:
        axis.set_visible(False)

    # a square for each cell, its shade and number the rollouts saved or lost
    shades = LinearSegmentedColormap.from_list("", [plot.BLUE, "white", plot.ORANGE])
    for axis, rule in zip(axes.flat, rules, strict=False):
        for cell in cells:
            x = visits.index(cell["setting"]["visit"])
            y = sharings.index(cell["setting"]["sharing"])
            draw_cell(axis, x, y, cell, rule, shades)
        axis.set(xlim=(-0.5, len(visits) - 0.5), ylim=(-0.5, len(sharings) - 0.5), title=plot.label_of(rule))
        axis.set_xticks(range(len(visits)), [f"{value:g}" for value in visits])
        axis.set_yticks(range(len(sharings)), [f"{value:g}" for value in sharings])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)

    figure.supxlabel(f"step per visit (logits)\n{took_map(shown)}", fontsize=12)
    for axis in axes[:, 0]:
        axis.set_ylabel("sharing of skills")
    what = "with interference" if interference else "without interference"
    figure.suptitle(
        f"Rollouts to a level in %, against uniform sampling, {what}\n"
        "blue: fewer, orange: more, grey: within two standard errors",
        fontsize=13,
    )
    return plot.save(figure, path)


def draw_cell(axis, x: int, y: int, cell: dict, rule: str, shades) -> None:
    late = cell["rules"][rule]["late"]
    bound = bound_sign(cell, rule)
    clear = bound or abs(late["mean"]) > 2 * late["se"]
    shade = shades(0.5 + np.clip(late["mean"], -0.5, 0.5)) if clear else "#eeeeee"
    dark = clear and abs(late["mean"]) > 0.35
    ink = "white" if dark else "black" if clear else "#777777"
    axis.add_patch(plot.pyplot().Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor="white"))
    axis.text(x, y, f"{bound}{100 * late['mean']:+.0f}", ha="center", va="center", fontsize=12, color=ink)


# ---------------------------------------------------------------- the documentation


@dataclass
class Flags:
    docs: str = str(DOCS)  # folder of the documentation
    readme: str = str(ROOT / "README.md")  # the other page whose tables are filled in


def read_results(name: str) -> dict[str, dict]:
    """The shipped comparisons called `name`: by learning rate, the smallest first, then the tuned one."""
    found = {}
    for path in (RESULTS / name).glob("lr-*.json"):
        found[float(path.stem.removeprefix("lr-"))] = path
    results = {}
    for rate in sorted(found):
        results[found[rate].stem.replace("lr-", "lr ")] = json.loads(found[rate].read_text())
    tuned = RESULTS / name / "tuned.json"
    if tuned.exists():
        results["tuned"] = json.loads(tuned.read_text())
    return results


def read_storing() -> dict[str, dict[str, dict]]:
    return {cell: read_results(name) for cell, name in STORING.items()}


def read_map() -> list[dict]:
    return json.loads((RESULTS / "map.json").read_text())["cells"]


def tables() -> dict[str, str]:
    """Every table of the documentation by its name."""
    made = {}
    for name in ("none", "digits", "hard", "refilled", "draw", "popo", "claims", "countdown", *EQUAL):
        made[name] = overview_table(read_results(name))
    made["storing"] = storing_table(read_storing())
    long = read_results("long")
    made["long"] = long_table(long)
    made["long-dear"] = dear_table(kept_arms(long, RESULTS / "long" / "runs.jsonl"))
    made["seconds"] = overview_table(read_results("seconds"), "seconds")
    made["second-pass"] = second_pass_table(json.loads((RESULTS / "second-pass.json").read_text())["cells"])
    made["gates"] = gates_table(json.loads((RESULTS / "gates.json").read_text())["cells"])
    made["demo"] = demo_table(json.loads(demo_figure.RESULTS.read_text()))
    made["continual"] = continual_table(json.loads((RESULTS / "continual.json").read_text()))
    made["map"] = map_table(read_map())
    made["gpus"] = gpus.table()
    made["gpus-8b"] = gpus.table(gpus.ROWS[:4])
    made["cards"] = costs.cards_table()
    return made


def filled(page: str, made: dict[str, str]) -> str:
    """`page` with what stands between the marks of each table replaced. ValueError for a name that is not
    known."""

    def table(match: re.Match) -> str:
        name = match[1]
        if name not in made:
            raise ValueError(f"there is no table called {name}; choose from {', '.join(made)}")
        return f"<!-- table: {name} -->\n{made[name]}\n<!-- end of table -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end of table -->", table, page, flags=re.S)


def figures(folder: Path) -> list[Path]:
    """Every figure of the documentation that is made from shipped results."""
    none = read_results("none")
    digits = read_results("digits")
    cells = read_map()
    shown = {name: none[name] for name in ("lr 5e-5", "lr 2e-4", "lr 8e-4", "tuned")}
    rules = ["prompt", "prioritized", "greso", "adaptive"]
    pays = "No shared facts: replay pays at small learning rates, little at the best"
    shrinks = "Shared digits: POPO and rollout-level replay gain, less at the best learning rate"
    demo = json.loads(demo_figure.RESULTS.read_text())
    reference = DOCS / "reference"
    with np.load(VISITS) as file:
        visits = file["visits"]
    return [
        by_rate(read_results("long"), folder / "long.png"),
        plot.curves(reference / "prompt", reference / "none", folder / "curves.png"),
        lives.draw(visits, folder / "lives.png"),
        demo_figure.demo(demo, folder / "demo.png"),
        forest(shown, folder / "none.png", pays),
        forest(digits, folder / "digits.png", shrinks),
        *(forest(read_results(name), folder / f"{name}.png", title) for name, title in EQUAL.items()),
        storing(read_storing(), folder / "storing.png"),
        regimes(cells, folder / "map.png", rules, interference=0.0),
        regimes(cells, folder / "map-interference.png", rules, interference=0.5),
    ]


@exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    flags, _ = parse(Flags, argv, __doc__)
    docs = Path(flags.docs)
    made = tables()
    (docs / "tables").mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (docs / "tables" / f"{name}.md").write_text(text + "\n")
    for page in (Path(flags.readme), *docs.glob("*.md")):
        before = page.read_text()
        after = filled(before, made)
        if after != before:
            page.write_text(after)
            print(page)
    for path in figures(docs / "figures"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
