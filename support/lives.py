"""Prompt lives: what each prompt of a run went through, visit by visit, and the figure of it.

A run appends one record a visit to visits.bin, 13 bytes, beside metrics.jsonl. To write the sixteen of a step takes 15
microseconds of CPU, 0.03 % of a step of the embedded task. A visit is a group of fresh answers to
a prompt, a dead one too. `replayed` is what the sampler said of it: 1 where the rule brought the prompt back, 0 where
its turn in the epochs had come. Prioritized Replay walks no epochs, and there 0 is a prompt's first visit. It retests
prompts whose latest group was dead, so that a visit by replay after a dead group is a retest (`retests`), or one of
its random batches. Stores (POPO, rollout-level replay) train again on answers that are there: that is no visit.

python -m support.plot out/RUN        draws out/RUN/lives.png again
"""

import os
from pathlib import Path

import numpy as np

from support import plot

VISIT = np.dtype(
    [
        ("step", "<u4"),
        ("prompt", "<u4"),  # number in the data set
        ("right", "<u2"),  # answers with a reward of at least 1
        ("answers", "<u2"),  # G
        ("replayed", "u1"),  # 0: by the epochs; 1: brought back by the rule
    ]
)
FILE = "visits.bin"

# Pass rates as the figure tells them apart; the middle one is Prompt Replay's band.
KINDS = ("all wrong", "below 1/4", "1/4 to 3/4", "above 3/4", "all right")
ROWS = 40  # prompts in the raster; more cannot be read
FEW = 10  # visits; a row of the matrix that has fewer stays empty


# ---------------------------------------------------------------- the file


def read(folder: str | Path) -> np.ndarray:
    """The visits of the run in `folder`, in the order of steps: an array [N] with the fields of VISIT.

    A record that a kill has torn at the end is left out. OSError without a file, ValueError, in one line, for one
    that is not of this form.
    """
    path = Path(folder) / FILE
    visits = np.fromfile(path, VISIT)
    if (visits["step"][1:] < visits["step"][:-1]).any() or (visits["right"] > visits["answers"]).any():
        raise ValueError(f"{path} is no record of visits; remove it, and the run goes on without what came before")
    return visits


def forget_after(path: Path, step: int) -> None:
    """Cuts off the visits after the checkpoint at `step`, which come again, and a torn record at the end."""
    if not path.exists():
        return
    visits = read(path.parent)
    kept = int(np.searchsorted(visits["step"], step, side="right"))
    # Steps rise, so that what is kept is the beginning of the file: to cut it is one call, whole or not at all.
    os.truncate(path, kept * VISIT.itemsize)


# ---------------------------------------------------------------- what can be told from it


def rates(visits: np.ndarray) -> np.ndarray:
    """Pass rates [N]."""
    return visits["right"] / visits["answers"]


def kinds(visits: np.ndarray) -> np.ndarray:
    """Which of KINDS each visit is [N]."""
    rate = rates(visits)
    return np.select([rate <= 0, rate < 0.25, rate <= 0.75, rate < 1], [0, 1, 2, 3], 4)


def pairs(visits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places in `visits` of each visit that had one before it, and of the one before: two arrays [M]."""
    order = np.argsort(visits["prompt"], kind="stable")  # by prompt, and of one prompt by step
    prompt = visits["prompt"][order]
    again = np.flatnonzero(prompt[1:] == prompt[:-1]) + 1
    return order[again], order[again - 1]


def retests(visits: np.ndarray) -> np.ndarray:
    """Which visits are by replay, to a prompt whose visit before was dead [N]."""
    later, before = pairs(visits)
    dead = np.isin(kinds(visits)[before], (0, 4))
    found = np.zeros(len(visits), bool)
    found[later] = dead & (visits["replayed"][later] > 0)
    return found


def moves(visits: np.ndarray, replayed: bool) -> np.ndarray:
    """How often a visit of one kind was followed by a visit of another [5 before, 5 after], of those next visits
    that were by replay, or that were by the epochs."""
    later, before = pairs(visits)
    chosen = (visits["replayed"][later] > 0) == replayed
    kind = kinds(visits)
    counts = np.zeros((len(KINDS), len(KINDS)), int)
    np.add.at(counts, (kind[before[chosen]], kind[later[chosen]]), 1)
    return counts


def chosen(visits: np.ndarray, count: int) -> tuple[np.ndarray, int]:
    """At most `count` prompts whose lives are worth a look, most visited first: an even sample of those visited more
    than once, or of all where too few were. Returns them, and how many they were sampled from."""
    prompts, number = np.unique(visits["prompt"], return_counts=True)
    first = np.full(len(prompts), np.inf)
    np.minimum.at(first, np.searchsorted(prompts, visits["prompt"]), visits["step"])
    order = np.lexsort((prompts, first, -number))
    again = int((number > 1).sum())
    if again >= count:
        order = order[:again]
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return prompts[order[places]], len(order)


# ---------------------------------------------------------------- the figure


def shades():
    """Of a pass rate: red for all wrong, yellow in the middle, blue for all right; told apart by the colour-blind."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("", ["#b2182b", "#f4945f", "#ffd84d", "#7fbfe0", "#1f5fa8"])


def raster(axis, visits: np.ndarray, prompts: np.ndarray):
    """A row for each of `prompts`, a mark for each visit in the colour of its pass rate; replays have a ring. Returns
    the marks, for a colour bar."""
    row = np.full(int(visits["prompt"].max()) + 1, -1)
    row[prompts] = np.arange(len(prompts))
    shown = visits[row[visits["prompt"]] >= 0]
    y = row[shown["prompt"]]
    back = shown["replayed"] > 0
    # a thin line from the first visit to the last one makes a life of the marks
    for number in range(len(prompts)):
        steps = shown["step"][y == number]
        axis.plot([steps.min(), steps.max()], [number, number], color="#dddddd", linewidth=1, zorder=1)
    look = {"cmap": shades(), "vmin": 0, "vmax": 1, "s": 52, "zorder": 2}
    marks = axis.scatter(shown["step"][~back], y[~back], c=rates(shown[~back]), marker="s", linewidths=0, **look)
    axis.scatter(shown["step"][back], y[back], c=rates(shown[back]), edgecolors="black", linewidths=1.3, **look)
    axis.set(xlabel="step", xlim=(0, None), ylim=(len(prompts) - 0.3, -0.7), yticks=[])
    axis.spines[["top", "right", "left"]].set_visible(False)
    return marks


def matrix(axis, counts: np.ndarray, title: str) -> None:
    """`counts` as shares in per cent of each row; the row's name has the number that it is of. A row of
    fewer than FEW stays empty."""
    total = counts.sum(1)
    share = np.where(total < FEW, 0, 1)[:, None] * counts / np.maximum(total, 1)[:, None]
    axis.imshow(share, cmap="Greys", vmin=0, vmax=1.25, aspect="auto")
    for before in range(len(KINDS)):
        for after in range(len(KINDS)):
            ink = "white" if share[before, after] > 0.65 else "black"
            if total[before] >= FEW:
                axis.text(after, before, f"{100 * share[before, after]:.0f}", ha="center", va="center", color=ink)
    if not total.sum():
        axis.text(2, 2, "none", ha="center", va="center", color="#777777")
    axis.set_yticks(range(len(KINDS)), [f"{name} ({n:,})" for name, n in zip(KINDS, total, strict=True)])
    axis.set_xticks(range(len(KINDS)), ["all\nwrong", "below\n1/4", "1/4 to\n3/4", "above\n3/4", "all\nright"])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(title, loc="right")


def draw(visits: np.ndarray, path: str | Path, rows: int = ROWS) -> Path:
    """Draws lives.png: a raster of prompts over steps, and where a next visit finds a prompt, by the epochs and by
    replay. Returns its path. ValueError if there is no visit."""
    if not len(visits):
        raise ValueError(f"there is no visit to draw in {path}")
    pyplot = plot.pyplot()
    with pyplot.rc_context({"font.size": 15, "axes.titlesize": 16}):
        figure = pyplot.figure(figsize=(13.5, 7.6), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1), wspace=0.02)
        prompts, among = chosen(visits, rows)
        axis = left.subplots()
        marks = raster(axis, visits, prompts)
        more = "visited more than once" if among < len(np.unique(visits["prompt"])) else "that were visited"
        few = f"an even sample of {among:,}" if len(prompts) < among else "all"
        axis.set_title(f"Lives of {len(prompts)} prompts (black ring: by replay),\n{few} {more}")
        bar = left.colorbar(marks, ax=axis, location="bottom", shrink=0.7, aspect=40, label="pass rate at the visit")
        bar.outline.set_visible(False)
        axes = right.subplots(2, 1)
        for axis, name, replayed in zip(axes, ("the epochs", "replay"), (False, True), strict=True):
            counts = moves(visits, replayed)
            matrix(axis, counts, f"{counts.sum():,} returns by {name}, % of each row")
            axis.set_ylabel("visit before (number)")
        axes[1].set_xlabel("pass rate at the return visit")
        return plot.save(figure, Path(path), dpi=100)


def figures(folder: Path, beside: Path | None = None) -> list[Path]:
    """Draws all figures of the run in `folder`, its curves beside those of another. A run that was begun by an
    earlier version has no lives.png."""
    drawn = []
    if (folder / FILE).exists():
        drawn.append(draw(read(folder), folder / "lives.png"))
    return [*drawn, plot.curves(folder, beside)]
