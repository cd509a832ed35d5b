"""The figure of a run, and the colours and labels that all figures share.

python -m support.plot out/RUN              out/RUN/curves.png, and lives.png (support/lives.py)
python -m support.plot out/RUN out/BASE     the same, with the curves of out/BASE beside those of out/RUN
"""

import io
import os
import sys
from numbers import Real
from pathlib import Path

import numpy as np

from support.rows import read_rows, read_settings, stage_keys

BLUE, ORANGE, GREY, GREEN = "#2a6f97", "#e07a1f", "#8d99ae", "#3a7d44"

# The colour and the label of a method are the same in every figure and table of the project.
COLOURS = {
    "none": "#222222",
    "uniform": "#222222",
    "prompt": "#0072b2",
    "prioritized": "#d55e00",
    "rollout": "#009e73",
    "group": "#c0508f",
    "popo": "#c0508f",
    "group-kl": "#882255",
    "group-oldest": "#cc99bb",
    "adaptive": "#6a51a3",
    "dapo": "#56b4e9",
    "greso": "#8c6d31",
    "beta": "#e377c2",
    "twice": "#e0a000",
    "fifo": "#5fc9a8",
    "fresh": "#b8b8b8",
    "placebo": "#8d99ae",
    "rare": "#332288",
    "cautious": "#88ccee",
}
SPARE = ("#999933", "#661100", "#117733", "#6699cc", "#aa4499")  # for arms that a user has named
LABELS = {
    "none": "plain GRPO",
    "uniform": "uniform",
    "prompt": "Prompt Replay",
    "prioritized": "Prioritized Replay",
    "rollout": "rollout-level",
    "group": "POPO",
    "popo": "POPO",
    "group-kl": "POPO, least drift first",
    "group-oldest": "POPO, oldest first",
    "adaptive": "adaptive (ours)",
    "dapo": "DAPO",
    "greso": "GRESO",
    "beta": "Beta posteriors",
}

LESSONS = {
    "figure.dpi": 72,
    "figure.constrained_layout.use": True,
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "lines.linewidth": 2,
}


def colours_of(methods: list[str]) -> dict[str, str]:
    """A colour for each method; unknown ones take the spare colours in turn."""
    colours = {}
    unknown = 0
    for method in methods:
        if method in COLOURS:
            colours[method] = COLOURS[method]
        else:
            colours[method] = SPARE[unknown % len(SPARE)]
            unknown += 1
    return colours


def label_of(method: str) -> str:
    """The paper's name of a method, or of several joined by +; an arm that a user has named keeps that
    name."""
    return " + ".join(LABELS.get(part, part) for part in method.split("+"))


def read(path: Path, needed: dict[str, type] | None = None) -> list[dict]:
    """ValueError, in one line, if it has no rows, or a line that is none, or that lacks what is `needed`."""
    rows = [row for _, row in read_rows(path, {"step": int, **(needed or {})})]
    if not rows:
        raise ValueError(f"{path} is empty: no step of that run was finished")
    return rows


def pyplot():
    """Slow to import, and never on a screen, whatever the environment asks for."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure, path: Path, colours: int = 128, dpi: int = 110) -> Path:
    """As a PNG of so many colours, which takes a third of the room. OSError, in one line, where it cannot be
    written."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=dpi)
    pyplot().close(figure)
    with Image.open(whole) as image:
        small = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        small.save(path, optimize=True)
    except OSError as error:
        raise OSError(
            f"{path} cannot be written ({error}); make room if the disk is full, and draw it again"
        ) from error
    return path


def series(rows: list[dict], key: str, smooth: int = 1) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have `key`; a trailing mean over `smooth` of them."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    values = [value for _, value in points]
    means = [sum(values[max(0, i - smooth + 1) : i + 1]) / min(i + 1, smooth) for i in range(len(values))]
    return [step for step, _ in points], means


def look_of_lessons() -> None:
    """Sets how the figures of a notebook look: letters that stay readable at half the width, and no box around."""
    import matplotlib

    matplotlib.rcParams.update(LESSONS)


# ---------------------------------------------------------------- the curves of a run

STYLES = ("-", "--", ":", "-.")
# What is drawn of every row. Numbers, and lists of them: zero may be written as 0 or 0.0.
DRAWN = {"reward": Real, "zero_variance": Real, "mean_abs_advantage": Real, "sync_error": Real}
DRAWN |= {"pass_rates_fresh": list, "pass_rates_replayed": list}


class Curves:
    """What a figure needs of one run: its rows, its colour and its name."""

    def __init__(self, folder: Path):
        settings = read_settings(folder)
        self.rows = read(folder / "metrics.jsonl", DRAWN)
        self.folder = folder
        self.method = settings["replay"]
        self.colour = colours_of([self.method])[self.method]
        self.label = label_of(self.method)
        # no prompt of that task teaches another: none is held out
        self.measure = "Held-out accuracy"
        if not settings.get("model") and settings.get("sharing") == "none":
            self.measure = "Accuracy on the training prompts"

    def smooth(self, key: str) -> tuple[list[int], list[float]]:
        return series(self.rows, key, max(len(self.rows) // 20, 1))

    def accuracy(self, of: str = "eval_accuracy") -> tuple[list[int], list[float]]:
        steps, values = series(self.rows, of)
        start = self.rows[0].get(f"{of}_start")
        return ([0, *steps], [start, *values]) if start is not None else (steps, values)

    def stages(self) -> list[str]:
        """Keys of the accuracy in each stage, where there are several."""
        return list(dict.fromkeys(key for row in self.rows for key in stage_keys(row)))

    def pass_rates(self, *keys: str) -> np.ndarray:
        """Share of groups with 0 .. G right answers over the whole run [G + 1]; empty where there were none."""
        totals = sum(np.array(row[key]) for row in self.rows for key in keys)
        return totals / totals.sum() if totals.sum() else np.zeros(0)

    def of_the_rule(self) -> dict[str, tuple[list[int], list[float]]]:
        """What its rules say of themselves: the keys that a row has after sync_error (train.record). Of a histogram
        the mean. What never changes says nothing."""
        found = {}
        for row in self.rows:
            keys = list(row)
            for key in keys[keys.index("sync_error") + 1 :]:
                value = row[key]
                if key.endswith(("_ages", "_uses")) and sum(value):
                    value = float(np.average(np.arange(len(value)), weights=value))
                if isinstance(value, int | float) and not key.startswith("eval_"):
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(row["step"])
                    values.append(value)
        return {key: points for key, points in found.items() if len(set(points[1])) > 1}


def draw_accuracy(axis, runs: list[Curves]) -> None:
    for run in runs:
        axis.plot(*run.smooth("reward"), color=run.colour, alpha=0.3, linewidth=1.5)
        steps, values = run.accuracy()
        if steps:
            label = f"{run.label}: {values[0]:.2f} to {values[-1]:.2f}"
            axis.plot(steps, values, color=run.colour, linewidth=2.2, marker="o", markersize=4, label=label)
    # of tasks one after another, each by itself; so many lines are for one run alone
    stages = runs[0].stages() if len(runs) == 1 else []
    for stage, name in enumerate(stages):
        style = STYLES[1 + stage % (len(STYLES) - 1)]
        axis.plot(*runs[0].accuracy(name), color="0.3", linestyle=style, linewidth=1.6, label=f"stage {stage}")
    axis.set(title=f"{runs[0].measure} (pale: reward)", ylim=(0, 1))
    axis.set_ylabel("share of right answers")


def draw_dead(axis, runs: list[Curves]) -> None:
    for run in runs:
        _, shares = series(run.rows, "zero_variance")
        label = f"{run.label}: {sum(shares) / len(shares):.0%} of all"
        axis.plot(*run.smooth("zero_variance"), color=run.colour, linewidth=2.2, label=label)
    # of replayed prompts there are few in a step
    rows = runs[0].rows
    steps, values = series(rows, "zero_variance_replayed", max(len(rows) // 12, 1))
    if steps:
        axis.plot(steps, values, color=runs[0].colour, linestyle=":", linewidth=2, label="of replayed prompts")
    axis.set(title="Dead groups: all right or all wrong, no gradient", ylabel="share of groups", ylim=(0, 1))


def draw_pass_rates(axis, runs: list[Curves]) -> None:
    """Fresh and replayed prompts of the first run side by side, and all prompts of a second one as a line."""
    run = runs[0]
    kinds = [("pass_rates_fresh", "fresh prompts", 0.35), ("pass_rates_replayed", "replayed prompts", 1.0)]
    kinds = [(run.pass_rates(key), label, alpha) for key, label, alpha in kinds if len(run.pass_rates(key))]
    for i, (shares, label, alpha) in enumerate(kinds):
        size = len(shares) - 1
        places = (np.arange(size + 1) + 0.42 * (i - (len(kinds) - 1) / 2)) / size
        axis.bar(places, shares, 0.8 / len(kinds) / size, color=run.colour, alpha=alpha, label=label)
    for other in runs[1:]:
        shares = other.pass_rates("pass_rates_fresh", "pass_rates_replayed")
        places = np.linspace(0, 1, len(shares))
        axis.plot(places, shares, color=other.colour, marker="_", markersize=12, linewidth=1, label=other.label)
    axis.set(title="Pass rates that visits found", xlabel="pass rate of a group", ylabel="share of groups")


def draw_rule(axis, run: Curves) -> None:
    """Up to four figures of a run's rules, each by its largest value; of a run whose rules say nothing none."""
    said = list(run.of_the_rule().items())[: len(STYLES)]
    for (key, (steps, values)), style in zip(said, STYLES, strict=False):
        top = max(map(abs, values)) or 1
        form = ",.0f" if top >= 10 else ".2g"
        window = max(len(values) // 20, 1)
        means = np.convolve(values, np.ones(window) / window, "valid") / top
        label = f"{key}, at most {top:{form}}"
        axis.plot(steps[window - 1 :], means, style, color=run.colour, linewidth=2, label=label)
    axis.set(title="What the rule says of itself", ylabel="share of the largest value")
    # Above the curves there is room for their names.
    axis.set(ylim=(0, 1.05 + 0.13 * len(said)), yticks=(0, 0.25, 0.5, 0.75, 1))


def draw_signal(axis, runs: list[Curves]) -> None:
    for run in runs:
        axis.plot(*run.smooth("mean_abs_advantage"), color=run.colour, linewidth=2.2, label=run.label)
    axis.set(title="Signal: distance of rewards from their mean", ylabel="mean |reward - mean|")
    axis.set_ylim(bottom=0)


def curves(folder: Path, beside: Path | None = None, path: Path | None = None) -> Path:
    """Draws accuracy, dead groups, pass rates at visits, and what the rule says of itself. beside: the folder of a run
    to lay beside it, as a baseline. path: the file to write, if not curves.png of the run."""
    runs = [Curves(Path(one)) for one in (folder, beside) if one]
    if len(runs) == 2 and runs[0].method == runs[1].method:
        runs[1].colour = GREY
        for run in runs:
            run.label = str(run.folder)
    plt = pyplot()
    with plt.rc_context({"font.size": 15, "axes.titlesize": 15, "legend.fontsize": 13}):
        figure, axes = plt.subplots(2, 2, figsize=(12, 8.4), layout="constrained")
        draw_accuracy(axes[0, 0], runs)
        draw_dead(axes[0, 1], runs)
        draw_pass_rates(axes[1, 0], runs)
        if runs[0].of_the_rule():
            draw_rule(axes[1, 1], runs[0])
        else:
            draw_signal(axes[1, 1], runs)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel(axis.get_xlabel() or "step")
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False)
        return save(figure, path or runs[0].folder / "curves.png", colours=48, dpi=90)


def main(folders: list[str]) -> int:
    from support import lives  # it draws with what stands here

    try:
        if not 1 <= len(folders) <= 2:
            raise ValueError(f"one or two folders of runs are drawn, got {len(folders)}")
        for path in lives.figures(*map(Path, folders)):
            print(path)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}; python -m support.plot out/RUN, or out/RUN out/BASELINE", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
