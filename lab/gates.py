"""When is a second pass over fresh groups worth its step? Gates on it, judged on exactly known pass rates.

    python -m lab.gates                                all arms in the cells of lab/second_pass.py, seeds 0 to 11
    python -m lab.gates --arms adaptive "ess 0.99"     some of them, beside plain

A second pass (`--epochs 2` of train.py) gains at small learning rates and costs at large ones, as stored groups do. So
it may pay to take it only where the first pass has moved the policy little:

    plain      one pass
    twice      always two
    ess E      the second one while the effective sample size of pi / pi_old over the batch is at least E of its number
    fill E     the second one with a chance that grows by a fifth after each whose effective sample size is at least E,
               and falls by three tenths else: what a rule can do that hears of an update when it is over
    norm G     the second one while its gradient is at most G times as long as the first one's: the gate of DGG
               (2605.19425), whose stopping rule is said to be a surge of that norm
    adaptive   one pass, and the stored groups of lab/rules.py's OnPolicyGroupReplay, which has the first gate

The policy, the objective and the cells are those of lab/second_pass.py; here all seeds and rates go side by side. An
arm is compared with plain at every rate, and once with the rate tuned for each.

Shapes: R rates, S seeds, B groups of a batch, G answers, K skills of a prompt, F skills in all.
"""

import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab import figures, second_pass, simulate
from lab.figures import gates_table
from lab.second_pass import CELLS, CLIP_HIGH, CLIP_LOW, IS_CAP, POINTS, RATES
from lab.simulate import MEMORY, MOMENTUM, Policy, Setting, sigmoid
from replay import Uniform
from support import log, stats
from support.config import OUT, exits, parse

ARMS = ("plain", "twice", "ess 0.999", "ess 0.99", "ess 0.97", "ess 0.9", "fill 0.99", "fill 0.97", "fill 0.9")
ARMS += ("norm 1", "norm 0.9", "norm 0.7", "adaptive")
MIN_ESS = 0.99  # of the stored groups: OnPolicyGroupReplay's
HISTORY = 60  # steps whose groups are at hand for the stored ones


@dataclass
class Flags:
    arms: tuple[str, ...] = ARMS  # plain is always among them
    cells: tuple[str, ...] = tuple(CELLS)  # which of the cells
    seeds: int = 12  # matched seeds
    first_seed: int = 0  # the first of them
    out: str = str(OUT / "gates.json")  # the numbers


# ---------------------------------------------------------------- the policy, for all rates and seeds at once


@dataclass
class Batch:
    """Groups of R x S runs: their skills [R, S, B, K], which of these came off [R, S, B, G, K], the skills' logits at
    birth [R, S, B, K], advantages [R, S, B, G], and which of the groups are in the batch [R, S, B]."""

    skills: np.ndarray
    came_off: np.ndarray
    birth: np.ndarray
    advantage: np.ndarray
    used: np.ndarray


class Chance:
    """A share of R x S runs, as OnPolicyGroupReplay's `fill`."""

    def __init__(self, shape: tuple[int, int]):
        self.fill = np.full(shape, 0.1)
        self.rng = np.random.default_rng(2)

    def draw(self) -> np.ndarray:
        """Uniform random numbers [R, S]."""
        return self.rng.random(self.fill.shape)

    def learn(self, near: np.ndarray, least: float, some: np.ndarray) -> None:
        """near: effective sample sizes; some: the runs that have one. Both [R, S]."""
        change = np.where(near >= least, 1.2, 0.7)
        self.fill = np.where(some, np.clip(self.fill * change, 0.02, 1.0), self.fill)


class Runs:
    """The logits `theta` [R, S, F] of one arm at all rates, with the optimiser of lab/simulate.py."""

    def __init__(self, setting: Setting, seeds: list[int]):
        self.one = Policy(setting, seeds, salt=0)  # its tasks, its random numbers, and what scales its steps
        self.theta = np.repeat(self.one.theta[None], len(RATES), 0)
        self.rate = np.array(RATES)[:, None, None] * self.one.rate / setting.visit
        self.square = np.repeat(self.one.usual[None], len(RATES), 0)  # [R, S]
        self.momentum = np.zeros_like(self.theta)
        self.chance = Chance(self.square.shape)  # of a second pass, for the arms that have one

    def logits(self, skills: np.ndarray) -> np.ndarray:
        """Of `skills` [R, S, B, K]."""
        flat = skills.reshape(*skills.shape[:2], -1)
        return np.take_along_axis(self.theta, flat, 2).reshape(skills.shape)

    def accuracy(self) -> np.ndarray:
        """Exact, [R, S]."""
        return np.stack([simulate.accuracy(theta, self.one.test) for theta in self.theta])

    def move(self, total: np.ndarray, which: np.ndarray) -> None:
        """The step of lab/simulate.Policy.move along `total` [R, S, F], for the runs `which` [R, S]."""
        mix = self.one.mix
        if mix:
            along = np.einsum("rsf,sfd->rsd", total, self.one.features)
            total = (1 - mix) * total + mix * np.einsum("rsd,sfd->rsf", along, self.one.features)
        square = MEMORY * self.square + (1 - MEMORY) * ((total**2).sum(2) + 1e-12)
        momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * total
        step = self.rate * momentum * np.sqrt(self.one.usual / square)[:, :, None]
        self.square = np.where(which, square, self.square)
        self.momentum = np.where(which[:, :, None], momentum, self.momentum)
        self.theta = np.where(which[:, :, None], self.theta + step, self.theta)


def generate(runs: Runs, prompts: np.ndarray) -> Batch:
    """A group for each of `prompts` [S, B], at all rates with the same random numbers."""
    one = runs.one
    skills = np.repeat(one.skills[one.rows, prompts][None], len(RATES), 0)
    logits = runs.logits(skills)
    shape = (prompts.shape[1], one.answers, skills.shape[3])
    uniforms = np.stack([rng.random(shape, dtype=np.float32) for rng in one.rngs])  # [S, B, G, K]
    came_off = uniforms < sigmoid(logits)[:, :, :, None]
    right = came_off.all(4)
    advantage = right - right.mean(3, keepdims=True)
    return Batch(skills, came_off, logits, advantage, advantage.any(3))


def ess(weight: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Effective sample size of `weight` [R, S, B, G, K] over the groups `used` [R, S, B], as a share of the number."""
    weight = weight * used[:, :, :, None, None]
    number = used.sum(2) * weight.shape[3] * weight.shape[4]
    squares = (weight**2).sum((2, 3, 4))
    return weight.sum((2, 3, 4)) ** 2 / np.maximum(number * squares, 1e-12)


def update(runs: Runs, batch: Batch, arm: str) -> np.ndarray:
    """One pass over `batch`, and a second one where the arm has it and its gate lets it. Which runs took it [R, S]."""
    old = second_pass.logprob(batch.came_off, runs.logits(batch.skills))
    birth = second_pass.logprob(batch.came_off, batch.birth)
    weight = np.minimum(np.exp(old - birth), IS_CAP) * batch.used[:, :, :, None, None]
    advantage = batch.advantage[:, :, :, :, None]
    count = np.maximum(batch.used.sum(2), 1)[:, :, None]
    which = batch.used.any(2)  # else no weight moves, as in grpo.update
    lanes = np.ogrid[: which.shape[0], : which.shape[1], :1, :1][:2]
    first = np.zeros(which.shape)
    for taken in range(1 if arm in ("plain", "adaptive") else 2):
        logits = runs.logits(batch.skills)
        ratio = np.exp(second_pass.logprob(batch.came_off, logits) - old)
        # where the clip binds, the objective is flat
        flat = ((advantage > 0) & (ratio > 1 + CLIP_HIGH)) | ((advantage < 0) & (ratio < 1 - CLIP_LOW))
        pull = np.where(flat, 0.0, weight * advantage * ratio)
        slope = (pull * (batch.came_off - sigmoid(logits)[:, :, :, None])).mean(3)  # [R, S, B, K]
        total = np.zeros_like(runs.theta)
        np.add.at(total, (*lanes, batch.skills), slope)
        norm = np.linalg.norm(total, axis=2)
        if taken:
            which = which & gate(arm, ess(ratio, batch.used), norm / np.maximum(first, 1e-12), runs.chance)
        first = norm
        runs.move(total * runs.one.live[None, :, None] / count, which)
    return which


def gate(arm: str, near: np.ndarray, growth: np.ndarray, chance: Chance) -> np.ndarray:
    """Which runs may go on to the second pass [R, S]. near: the effective sample size after the first; growth: the
    norm of the next gradient over the first one's; chance: of arms that hear of `near` when it is over."""
    kind, _, number = arm.partition(" ")
    if kind == "ess":
        return near >= float(number)
    if kind == "norm":
        return growth <= float(number)
    if kind == "fill":
        which = chance.draw() < chance.fill
        chance.learn(near, float(number), which)
        return which
    return np.ones(near.shape, bool)


class Stored(Chance):
    """The stored groups of all runs, and how many of them come back: OnPolicyGroupReplay for R x S runs."""

    def __init__(self, shape: tuple[int, int], places: int):
        super().__init__(shape)
        self.capacity = 2 * places
        self.steps: list[Batch] = []  # newest first

    def complete(self, fresh: Batch, places: int) -> Batch:
        """`fresh`, and behind it stored groups for its dead ones, newest first."""
        dead = places - fresh.used.sum(2)
        room = np.floor(self.fill * dead + np.where(self.fill < 1, self.draw(), 0))
        batch = fresh
        if self.steps:
            old = joined(self.steps)
            rank = old.used.cumsum(2)
            back = old.used & (rank <= np.minimum(room, self.capacity)[:, :, None])
            batch = joined([fresh, picked(old, back, places)])
        self.steps = [turned(fresh), *self.steps][:HISTORY]
        return batch


def turned(batch: Batch) -> Batch:
    """The last group first."""
    return Batch(*(values[:, :, ::-1] for values in vars(batch).values()))


def joined(batches: list[Batch]) -> Batch:
    columns = zip(*(vars(batch).values() for batch in batches), strict=True)
    return Batch(*(np.concatenate(column, 2) for column in columns))


def picked(batch: Batch, back: np.ndarray, most: int) -> Batch:
    """The groups `back` [R, S, B] of `batch`, at most `most` of each run."""
    order = np.argsort(~back, 2, kind="stable")[:, :, :most]
    lanes = np.ogrid[: back.shape[0], : back.shape[1], :1][:2]
    some = np.take_along_axis(back, order, 2)
    at = (*lanes, order)
    return Batch(batch.skills[at], batch.came_off[at], batch.birth[at], batch.advantage[at], some)


def train(setting: Setting, arm: str, seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Exact accuracy on the way [R, S, POINTS + 1], and the mean number of passes over a batch [R]."""
    runs = Runs(setting, seeds)
    samplers = [Uniform(setting.prompts, seed) for seed in seeds]
    places = setting.prompts_per_step
    stored = Stored(runs.square.shape, places)
    curve = [runs.accuracy()]
    second = np.zeros(len(RATES))
    for step in range(1, setting.steps + 1):
        prompts = np.array([sampler.draw(places, step) for sampler in samplers])
        batch = generate(runs, prompts)
        if arm == "adaptive":
            batch = stored.complete(batch, places)
            back = batch.used.copy()
            back[:, :, :places] = False
            old = second_pass.logprob(batch.came_off, runs.logits(batch.skills))
            near = ess(np.exp(old - second_pass.logprob(batch.came_off, batch.birth)), back)
            stored.learn(near, MIN_ESS, back.any(2))
        took = update(runs, batch, arm)
        if arm not in ("plain", "adaptive"):
            second += took.mean(1)
        if step % (setting.steps // POINTS) == 0:
            curve.append(runs.accuracy())
    return np.stack(curve, 2), 1 + second / setting.steps


def judge(setting: Setting, arms: list[str], seeds: list[int]) -> dict:
    """Each arm against plain at every rate, and tuned; its mean passes at every rate."""
    started = time.process_time()
    curves = {}
    passes = {}
    for arm in arms:
        runs, passes[arm] = train(dataclasses.replace(setting, visit=1.0), arm, seeds)
        curves[arm] = dict(zip(RATES, runs, strict=True))
    tail = max(round(figures.WINDOW * POINTS), 1)
    found = {}
    tuned = {arm: second_pass.tuned(curves[arm]) for arm in arms}
    for arm in arms:
        by_rate = []
        for rate in RATES:
            gap = curves[arm][rate][:, -tail:].mean(1) - curves["plain"][rate][:, -tail:].mean(1)
            by_rate.append(stats.by_seed(gap.tolist()))
        difference = stats.by_seed((tuned[arm][0] - tuned["plain"][0]).tolist())
        found[arm] = {"by_rate": by_rate, "tuned": difference, "rates": tuned[arm][1], "passes": passes[arm].tolist()}
    return {
        "setting": dataclasses.asdict(setting),
        "seeds": len(seeds),
        "tried": RATES,
        "accuracy": float(tuned["plain"][0].mean()),
        "arms": found,
        "cpu_seconds": time.process_time() - started,
    }


@exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    flags, _ = parse(Flags, argv, __doc__)
    unknown = [name for name in flags.cells if name not in CELLS] + [name for name in flags.arms if name not in ARMS]
    if unknown or not flags.cells or flags.seeds < 4:
        choices = f"--cells: some of {', '.join(CELLS)}; --arms: some of {', '.join(ARMS)}"
        raise ValueError(f"{choices}; --seeds at least 4, for two halves")
    arms = ["plain", *(arm for arm in flags.arms if arm != "plain")]
    seeds = list(range(flags.first_seed, flags.first_seed + flags.seeds))
    cells = {}
    result = {"command": "python -m lab.gates " + shlex.join(argv), "commit": log.commit(), "cells": cells}
    path = Path(flags.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in flags.cells:
        cells[name] = judge(CELLS[name], arms, seeds)
        path.write_text(json.dumps(stats.rounded(result)) + "\n")
        print(f"{name}: {cells[name]['cpu_seconds']:.0f} CPU seconds", file=sys.stderr)
    print(gates_table(cells))
    print(f"numbers: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
