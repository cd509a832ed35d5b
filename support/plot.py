"""Figures of a run, from its metrics.jsonl alone.

python plot.py out/RUN        writes out/RUN/curves.png
"""

import json
import sys
from pathlib import Path

BLUE, ORANGE, GREY, GREEN = "#2a6f97", "#e07a1f", "#8d99ae", "#3a7d44"


def read(path: Path) -> list[dict]:
    """ValueError if it has no rows, or one that is not JSON."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if not rows:
        raise ValueError(f"{path} is empty: no step of that run was finished")
    return rows


def pyplot():
    """Slow to import, and never on a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
    return path


def series(rows: list[dict], key: str, smooth: int = 1) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have `key`; a trailing mean over `smooth` of them."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    values = [value for _, value in points]
    means = [sum(values[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(values))]
    return [step for step, _ in points], means


def pass_rate_bars(axis, rows: list[dict]) -> None:
    """Share of groups at each pass rate over the whole run, fresh and replayed prompts side by side."""
    for shift, (key, label, colour) in enumerate(
        [("pass_rates_fresh", "fresh prompts", BLUE), ("pass_rates_replayed", "replayed prompts", ORANGE)]
    ):
        totals = [sum(column) for column in zip(*(row[key] for row in rows), strict=True)]
        if not sum(totals):
            continue
        size = len(totals) - 1
        places = [(k + 0.42 * shift - 0.21) / size for k in range(size + 1)]
        axis.bar(places, [n / sum(totals) for n in totals], 0.4 / size, color=colour, label=label)
    axis.set(title="pass rates of groups", xlabel="share of right answers", ylabel="share of groups")


def what_replay_did(axis, rows: list[dict]) -> None:
    """How often prompts came back, or how old the replayed answers were, whichever the method has."""
    kinds = [kind for kind in ("group", "rollout") if any(sum(row.get(f"{kind}_ages", [])) for row in rows)]
    for i, kind in enumerate(kinds):
        ages = [row[f"{kind}_ages"] for row in rows]
        totals = [sum(row[age] for row in ages if age < len(row)) for age in range(max(map(len, ages)))]
        places = [age + 0.4 * (i - (len(kinds) - 1) / 2) for age in range(1, len(totals))]
        shares = [total / sum(totals) for total in totals[1:]]
        axis.bar(places, shares, 0.8 / len(kinds), color=(ORANGE, GREEN)[i], label=f"{kind}s")
    if kinds:
        axis.set(title="age of what was replayed", xlabel="steps since it was sampled", ylabel="share")
    elif any(rows[-1].get("prompt_uses", [])):
        uses = rows[-1]["prompt_uses"]
        first = 1 if uses[0] == 0 else 0
        axis.bar(range(first, len(uses)), uses[first:], color=ORANGE)
        axis.set(title="how often prompts came back", xlabel="times replayed", ylabel="prompts")
    else:
        axis.plot(*series(rows, "distinct_prompts"), color=BLUE, label="distinct prompts")
        axis.set(title="distinct prompts seen", xlabel="step")


def gauge(axis, rows: list[dict]) -> None:
    """How far a visit has moved a prompt so far, with a standard error either way."""
    for name, label, colour in (("epochs", "visits by the epochs", BLUE), ("replay", "visits by replay", ORANGE)):
        known = [row for row in rows if row.get(f"gain_{name}_n", 0) >= 20]
        steps, mean = series(known, f"gain_{name}")
        _, error = series(known, f"gain_{name}_se")
        if steps:
            axis.plot(steps, mean, color=colour, label=label)
            low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set(title="change of pass rate from visit to visit", xlabel="step")


def where_time_went(axis, rows: list[dict], smooth: int) -> None:
    parts = [series(rows, f"seconds_{name}", smooth)[1] for name in ("rollout", "reward", "update", "sync")]
    steps, colours = [row["step"] for row in rows], (BLUE, GREEN, ORANGE, GREY)
    axis.stackplot(steps, parts, labels=("rollout", "reward", "update", "sync"), colors=colours, linewidth=0)
    axis.set(title="seconds of a step", xlabel="step")


def curves(folder: Path) -> Path:
    """Eight panels: accuracy, dead groups, |advantage|, the gauge; pass rates, what replay did, entropy, time."""
    rows = read(folder / "metrics.jsonl")
    smooth = max(len(rows) // 40, 1)
    figure, axes = pyplot().subplots(2, 4, figsize=(17, 7), layout="constrained")
    (accuracy, dead, advantage, moved), (rates, replay, entropy, time) = axes

    steps, values = series(rows, "eval_accuracy")
    if rows[0].get("eval_accuracy_start") is not None:
        steps, values = [0, *steps], [rows[0]["eval_accuracy_start"], *values]
    accuracy.plot(*series(rows, "reward", smooth), color=GREY, label="reward in training")
    accuracy.plot(steps, values, color=BLUE, marker="o", markersize=3, label="held-out accuracy")
    accuracy.set(title="accuracy", xlabel="step", ylim=(0, 1))

    dead.plot(*series(rows, "zero_variance", smooth), color=GREY, label="all")
    dead.plot(*series(rows, "zero_variance_fresh", smooth), color=BLUE, label="fresh prompts")
    dead.plot(*series(rows, "zero_variance_replayed", smooth), color=ORANGE, label="replayed prompts")
    dead.set(title="zero-variance share of groups", xlabel="step", ylim=(0, 1))

    advantage.plot(*series(rows, "mean_abs_advantage", smooth), color=BLUE, label="mean |reward - group mean|")
    advantage.plot(*series(rows, "replayed", smooth), color=ORANGE, label="share of prompts replayed")
    advantage.set(title="signal per answer, and replay", xlabel="step", ylim=(0, None))

    gauge(moved, rows)
    pass_rate_bars(rates, rows)
    what_replay_did(replay, rows)
    entropy.plot(*series(rows, "entropy", smooth), color=GREEN, label="nats per token")
    entropy.set(title="entropy", xlabel="step", ylim=(0, None))
    where_time_went(time, rows, smooth)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    return save(figure, folder / "curves.png")


def bands(axis, runs: list[dict], methods: list[str], cost: str) -> None:
    """Held-out accuracy over `cost`: mean over seeds with its 95 % band (compare.py's runs)."""
    import numpy as np

    from support import stats

    for i, method in enumerate(methods):
        arm = [run["points"] for run in runs if run["method"] == method]
        grid = np.linspace(0, min(points[-1][cost] for points in arm), 60)
        curves = np.array(
            [np.interp(grid, [p[cost] for p in points], [p["accuracy"] for p in points]) for points in arm]
        )
        mean, colour = curves.mean(0), "#222222" if i == 0 else f"C{i - 1}"
        axis.plot(grid, mean, color=colour, linewidth=2 if i == 0 else 1.4, label=f"{method} (n={len(arm)})")
        if len(arm) > 1:
            half = stats.t_quantile(len(arm) - 1) * curves.std(0, ddof=1) / len(arm) ** 0.5
            axis.fill_between(grid, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    axis.set(xlim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)


def comparison(runs: list[dict], methods: list[str], path: Path) -> Path:
    """Accuracy over rollouts, and over seconds."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10.5, 4.2), layout="constrained", sharey=True)
    for axis, cost, label in zip(axes, ("rollouts", "seconds"), ("rollouts", "seconds in steps"), strict=True):
        bands(axis, runs, methods, cost)
        axis.set(xlabel=label)
    axes[0].set(ylabel="held-out accuracy")
    axes[0].legend(frameon=False, fontsize=8)
    return save(figure, path)


def forest(results: dict[str, dict], methods: list[str], path: Path) -> Path:
    """Differences to the baseline at equal rollouts in points, with 95 % intervals: a panel for each learning rate, a
    row for each method (compare.py's tables). Grey where Holm's p is not below 0.05."""
    size = (1.5 + 2.4 * len(results), 1.1 + 0.28 * len(methods))
    figure, axes = pyplot().subplots(1, len(results), figsize=size, layout="constrained", sharey=True)
    for axis, (title, result) in zip(axes, results.items(), strict=True):
        base = result["methods"][methods[0]]["accuracy"]["rollouts"]
        axis.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
        for i, method in enumerate(methods[1:]):
            test = result["methods"][method]["difference"]["rollouts"]
            mean, low, high = (100 * test[key] for key in ("mean", "low", "high"))
            colour = GREY if test["p_holm"] >= 0.05 else BLUE if mean > 0 else ORANGE
            if abs(mean) > 9:  # off the scale that suits the others
                axis.text(9.8 if mean > 0 else -9.8, i, f"{mean:+.0f}", color=colour, ha="center", va="center")
                continue
            axis.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, markersize=4, capsize=2)
        axis.set_title(f"{title}\n{methods[0]}: {100 * base:.1f} %", fontsize=9)
        axis.set(xlim=(-11, 11), ylim=(len(methods) - 1.5, -0.5))
        axis.set_yticks(range(len(methods) - 1), methods[1:], fontsize=9)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.supxlabel(f"points of accuracy against {methods[0]}, at equal rollouts", fontsize=9)
    return save(figure, path)


def regimes(cells: list[dict], path: Path) -> Path:
    """Rollouts to two thirds of uniform sampling's gain, relative to it, over (step per visit x sharing): one column of
    panels for each rule, one row for each interference (simulate.py's cells). Grey: less than two standard errors."""
    from matplotlib.colors import LinearSegmentedColormap

    rules = list(cells[0]["rules"])
    visits, sharings, rows = (
        sorted({cell["setting"][key] for cell in cells}) for key in ("visit", "sharing", "interference")
    )
    size = (1 + 0.62 * len(visits) * len(rules), 1.2 + 0.52 * len(sharings) * len(rows))
    figure, axes = pyplot().subplots(len(rows), len(rules), figsize=size, layout="constrained", squeeze=False)
    colours = LinearSegmentedColormap.from_list("", [BLUE, "white", ORANGE])
    for cell in cells:
        setting = cell["setting"]
        at = visits.index(setting["visit"]), sharings.index(setting["sharing"])
        for rule, axis in zip(rules, axes[rows.index(setting["interference"])], strict=True):
            value = cell["rules"][rule]["late"]
            bound, clear = value["reached"] < cell["seeds"], abs(value["mean"]) > 2 * value["se"]
            shade = colours(0.5 + max(-0.5, min(0.5, value["mean"]))) if clear or bound else "#eeeeee"
            axis.add_patch(pyplot().Rectangle((at[0] - 0.5, at[1] - 0.5), 1, 1, facecolor=shade, edgecolor="white"))
            text = f"{'>' if bound else ''}{100 * value['mean']:+.0f}"
            axis.text(*at, text, ha="center", va="center", fontsize=8, color="black" if clear or bound else "#888888")
    for i, row in enumerate(axes):
        for rule, axis in zip(rules, row, strict=True):
            axis.set(xlim=(-0.5, len(visits) - 0.5), ylim=(-0.5, len(sharings) - 0.5), title="" if i else rule)
            axis.set_xticks(range(len(visits)), [f"{v:g}" for v in visits], fontsize=8)
            axis.set_yticks(range(len(sharings)), [f"{v:g}" for v in sharings] if rule == rules[0] else [], fontsize=8)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(f"interference {rows[i]:g}\nsharing")
    figure.supxlabel("step per visit (logits)", fontsize=10)
    figure.suptitle(
        "rollouts to two thirds of uniform sampling's gain, % more or fewer than uniform sampling needs", fontsize=11
    )
    return save(figure, path)


if __name__ == "__main__":
    try:
        if not sys.argv[1:]:
            raise ValueError("no folder of a run given")
        for name in sys.argv[1:]:
            print(curves(Path(name)))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}; give folders of runs, python plot.py out/RUN", file=sys.stderr)
        sys.exit(2)
