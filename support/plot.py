"""Figures of a run, from its metrics.jsonl alone, and the colours and labels that all figures share.

python -m support.plot out/RUN        writes out/RUN/curves.png, and lives.png (support/lives.py)
"""

import io
import os
import sys
from pathlib import Path

from support.rows import read_rows

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
    "adaptive": "#e0a000",
    "dapo": "#56b4e9",
    "greso": "#8c6d31",
    "beta": "#e377c2",
    "twice": "#7f7f7f",
    "fifo": "#5fc9a8",
    "fresh": "#b8b8b8",
    "rare": "#332288",
    "cautious": "#88ccee",
}
SPARE = ("#117733", "#aa4499", "#6699cc", "#999933", "#661100")  # for arms that a user has named
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


def read(path: Path) -> list[dict]:
    """ValueError, in one line, if it has no rows, or a line that is none."""
    rows = [row for _, row in read_rows(path, {"step": int})]
    if not rows:
        raise ValueError(f"{path} is empty: no step of that run was finished")
    return rows


def pyplot():
    """Slow to import, and never on a screen, whatever the environment asks for."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot

    return matplotlib.pyplot


def save(figure, path: Path) -> Path:
    """As a PNG of 128 colours, which takes a third of the room. OSError, in one line, where it cannot be written."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=110)
    pyplot().close(figure)
    with Image.open(whole) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
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
    """Eight panels: accuracy, dead groups, |advantage|, the gauge; pass rates, what replay did, entropy,
    time."""
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


if __name__ == "__main__":
    try:
        if not sys.argv[1:]:
            raise ValueError("no folder of a run given")
        from support import lives  # it draws with what stands here

        for name in sys.argv[1:]:
            print(*lives.figures(Path(name)))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}; give folders of runs: python -m support.plot out/RUN", file=sys.stderr)
        sys.exit(2)
