"""The README's figure: held-out accuracy over rollouts, plain GRPO, POPO and a control, from lab/results/demo.json.

    python -m lab.demo_figure                   draws docs/figures/demo.png
    python -m lab.demo_figure out/demo/*        first makes lab/results/demo.json anew from these runs

The file holds the commands of the runs. All have one objective. POPO differs from plain GRPO in its store alone, the
control `twice` in a second pass over the fresh answers alone.
"""

import json
import sys
from pathlib import Path

import numpy as np

from support import plot
from support.config import ROOT
from support.rows import read_settings

RESULTS = ROOT / "lab" / "results" / "demo.json"
FIGURE = ROOT / "docs" / "figures" / "demo.png"
LABELS = {
    "none": "plain GRPO",
    "group": "POPO: stored groups in place of dead ones",
    "twice": "control: a second pass, nothing stored",
}
PLAIN = "python train.py --advantage std --clip-high 0.28 --dual-clip 10 --lr 2e-4 --steps 300 --seed SEED"
COMMANDS = {
    "none": PLAIN,
    "group": "python train.py --replay popo --lr 2e-4 --steps 300 --seed SEED",
    "twice": f"{PLAIN} --epochs 2",
}
SAME = ("lr", "steps", "advantage", "clip_high", "dual_clip", "normaliser", "prompts_per_step", "eval_every")


def collect(folders: list[str]) -> dict:
    """Accuracy at each evaluation of these runs, by method and seed. ValueError for runs that cannot stand together."""
    curves = {method: {"rollouts": [], "seeds": {}} for method in COMMANDS}
    settings = []
    for folder in map(Path, folders):
        config = read_settings(folder)
        method = config["replay"].replace("popo", "group")
        if config["epochs"] == 2:
            method = {"none": "twice"}.get(method, method)
        if method not in curves:
            raise ValueError(f"{folder} is a run with --replay {method}; the figure shows none and popo")
        rollouts = []
        accuracies = []
        for row in plot.read(folder / "metrics.jsonl"):
            # the evaluation before the first step stands in the first row
            if "eval_accuracy_start" in row:
                rollouts.append(0)
                accuracies.append(row["eval_accuracy_start"])
            if "eval_accuracy" in row:
                rollouts.append(row["rollouts"])
                accuracies.append(row["eval_accuracy"])
        curves[method]["rollouts"] = rollouts
        curves[method]["seeds"][str(config["seed"])] = accuracies
        settings.append([config[name] for name in SAME])

    # runs that differ in more than the store and the seed would show something else
    if any(other != settings[0] for other in settings):
        raise ValueError(f"these runs differ in one of {', '.join(SAME)}")
    if any(curve["seeds"].keys() != curves["none"]["seeds"].keys() for curve in curves.values()):
        raise ValueError("all methods need runs of the same seeds")
    return {"commands": COMMANDS, "commit": config.get("commit", ""), "curves": curves}


def demo(result: dict, path: Path) -> Path:
    """A thin line for each run, a thick one for the mean over seeds; of the control the mean alone."""
    pyplot = plot.pyplot()
    pyplot.rcParams.update({"font.size": 15})
    figure, axis = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for method, curve in result["curves"].items():
        thousands = np.array(curve["rollouts"]) / 1000
        runs = 100 * np.array(list(curve["seeds"].values()))  # [S, N]
        if method == "twice":
            style = {"linewidth": 2, "linestyle": "--"}
        else:
            axis.plot(thousands, runs.T, color=plot.COLOURS[method], linewidth=0.8, alpha=0.35)
            style = {"linewidth": 3}
        axis.plot(thousands, runs.mean(0), color=plot.COLOURS[method], label=LABELS[method], **style)
    seeds = len(result["curves"]["none"]["seeds"])
    axis.set(xlim=(0, None), ylim=(20, 90))
    axis.set_xlabel(f"rollouts (answers generated), thousands\n{took(result, len(result['curves']) * seeds)}")
    axis.set_ylabel("held-out accuracy, %")
    axis.set_title(f"The same rollouts, the same objective, {seeds} matched seeds (thick: mean)", fontsize=14)
    lines, labels = axis.get_legend_handles_labels()
    axis.legend(lines[::-1], labels[::-1], loc="lower right", frameon=False)  # as the lines stand, the upper one first
    axis.grid(color="#eeeeee")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return plot.save(figure, path)


def took(result: dict, runs: int) -> str:
    """How many runs these were, and their CPU hours, if the file has their `seconds` of a processor."""
    if "seconds" not in result:
        return f"{runs} runs; their CPU hours were not noted"
    return f"{runs} runs, {result['seconds'] / 3600:.2g} CPU hours"


def rounded(value):
    """Accuracies of 400 problems have four digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [round(item, 4) for item in value]
    return value


def main(argv: list[str]) -> int:
    try:
        if argv:
            RESULTS.write_text(json.dumps(rounded(collect(argv))) + "\n")
            print(RESULTS)
        print(demo(json.loads(RESULTS.read_text()), FIGURE))
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {error}; give folders of runs of the commands in {RESULTS}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
