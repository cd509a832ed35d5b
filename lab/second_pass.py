"""Does storing beat a second pass? On exactly known pass rates, each arm at the learning rate that suits it.

    python -m lab.second_pass                     all cells, twelve matched seeds: a table, and its numbers as JSON
    python -m lab.second_pass --cells hard usual  some of them

A second pass over the fresh groups (`--epochs 2` of train.py) takes as many rollouts as POPO, and stores nothing. So
whatever POPO gains has to be more than what a second pass gains. Three arms on the policy of lab/simulate.py, on the
same prompts in the same order, with the same answers while they do not differ:

    plain   one update with the fresh useful groups
    twice   two updates with them, the second clipped around the policy before the first
    group   one update; stored useful groups, newest first, take the places of dead ones (replay.GroupReplay)

The objective is that of grpo.py, where a token is a skill that comes off or not: weights pi_old / mu up to 2 on what
was stored, PPO's clip around pi_old, the mean over all groups of the batch. An arm's learning rate for one half of the
seeds is the one that had the best mean accuracy on the other half, as in lab/compare.py.

The cells are those in which storing has most to give: few live groups in a batch, few useful prompts in many, and the
end of a long training. Every step moves other skills, too (--interference), without which no rate would be too large.
Accuracy is exact, and is the mean over the last fifth of a run.

Shapes: B groups of an update, G answers, K skills of a prompt, F skills in all, N prompts.
"""

import dataclasses
import itertools
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab import figures, simulate
from lab.simulate import Policy, Setting, sigmoid
from replay import Uniform
from support import log, stats
from support.config import OUT, exits, parse

ARMS = ("plain", "twice", "group")
RATES = (0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8)  # --visit of lab/simulate.py
POINTS = 50  # of an accuracy curve
CLIP_LOW, CLIP_HIGH, IS_CAP = 0.2, 0.272, 2.0  # those of train.py

USUAL = Setting(optimizer="adam", prompts=512, skills=1, steps=200, interference=0.5)
CELLS = {
    "usual": USUAL,
    "hard": dataclasses.replace(USUAL, difficulty=0.9),
    "hard, more interference": dataclasses.replace(USUAL, difficulty=0.9, interference=0.9),
    "hard, shared skills": dataclasses.replace(USUAL, difficulty=0.9, skills=2, sharing=0.9),
    "large batch, few useful prompts": dataclasses.replace(USUAL, difficulty=0.97, prompts_per_step=64, steps=100),
    "long": dataclasses.replace(USUAL, steps=400),
}


@dataclass
class Flags:
    cells: tuple[str, ...] = tuple(CELLS)  # which of the cells
    seeds: int = 12  # matched seeds
    first_seed: int = 0  # the first of them
    out: str = str(OUT / "second_pass.json")  # the numbers


@dataclass
class Group:
    """G answers to a prompt: its skills [K], which of them came off [G, K], the skills' logits at birth [K], and the
    advantages [G]."""

    skills: np.ndarray
    came_off: np.ndarray
    birth: np.ndarray
    advantage: np.ndarray


def generate(policy: Policy, prompts: list[int], rng: np.random.Generator) -> list[Group]:
    """One group for each of `prompts`."""
    skills = policy.skills[0, prompts]  # [B, K]
    logits = policy.theta[0, skills]
    uniforms = rng.random((len(prompts), policy.answers, skills.shape[1]), dtype=np.float32)
    came_off = uniforms < sigmoid(logits)[:, None]  # [B, G, K]
    right = came_off.all(2)
    advantage = right - right.mean(1, keepdims=True)
    return [Group(*parts) for parts in zip(skills, came_off, logits, advantage, strict=True)]


def logprob(came_off: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Log-probability of what happened to each skill [..., B, G, K], by the skills' `logits` [..., B, K]."""
    logits = logits[..., None, :]
    return -np.logaddexp(0, np.where(came_off, -logits, logits))


def update(policy: Policy, batch: list[Group], passes: int) -> None:
    """`passes` optimiser steps on the decoupled clipped objective over `batch`."""
    skills = np.stack([group.skills for group in batch])  # [B, K]
    came_off = np.stack([group.came_off for group in batch])  # [B, G, K]
    birth = np.stack([group.birth for group in batch])  # [B, K]
    advantage = np.stack([group.advantage for group in batch])[:, :, None]  # [B, G, 1]
    old = logprob(came_off, policy.theta[0, skills])  # log pi_old
    weight = np.minimum(np.exp(old - logprob(came_off, birth)), IS_CAP)
    for _ in range(passes):
        logits = policy.theta[0, skills]
        ratio = np.exp(logprob(came_off, logits) - old)
        # where the clip binds, the objective is flat
        high = (advantage > 0) & (ratio > 1 + CLIP_HIGH)
        low = (advantage < 0) & (ratio < 1 - CLIP_LOW)
        pull = np.where(high | low, 0.0, weight * advantage * ratio)  # [B, G, K]
        slope = pull * (came_off - sigmoid(logits)[:, None])
        total = np.zeros_like(policy.theta)
        np.add.at(total[0], skills, slope.mean(1))
        policy.move(total * policy.live[0] / len(batch))


def train(setting: Setting, arm: str, seed: int) -> np.ndarray:
    """Exact accuracy [POINTS + 1] on the way, the first that of the start."""
    policy = Policy(setting, [seed], salt=0)
    sampler = Uniform(setting.prompts, seed)
    rng = policy.rngs[0]
    places = setting.prompts_per_step
    stored: list[Group] = []  # oldest first, two steps' worth
    curve = [simulate.accuracy(policy.theta, policy.test)[0]]
    for step in range(1, setting.steps + 1):
        groups = generate(policy, sampler.draw(places, step), rng)
        useful = [group for group in groups if group.advantage.any()]
        batch = useful
        if arm == "group":
            batch = useful + stored[::-1][: places - len(useful)]
            stored = (stored + useful)[-2 * places :]
        if batch:  # else no weight moves, as in grpo.update
            update(policy, batch, passes=2 if arm == "twice" else 1)
        if step % (setting.steps // POINTS) == 0:
            curve.append(simulate.accuracy(policy.theta, policy.test)[0])
    return np.array(curve)


def tuned(curves: dict[float, np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """Accuracy at the end of each seed at the rate that was best on the way for the other half, and the rates of even
    and of odd seeds. `curves`: by rate [S, POINTS + 1]."""
    tail = max(round(figures.WINDOW * POINTS), 1)
    ends = {rate: runs[:, -tail:].mean(1) for rate, runs in curves.items()}
    found = np.zeros(len(next(iter(ends.values()))))
    rates = []
    for half in (0, 1):
        best = max(curves, key=lambda rate: curves[rate][1 - half :: 2].mean())
        found[half::2] = ends[best][half::2]
        rates.append(best)
    return found, rates


def judge(setting: Setting, seeds: list[int]) -> dict:
    """All arms at all rates in one cell: accuracy of each arm, tuned, and differences paired by seed."""
    started = time.process_time()
    ends = {}
    rates = {}
    for arm in ARMS:
        curves = {}
        for rate in RATES:
            cell = dataclasses.replace(setting, visit=rate)
            curves[rate] = np.stack([train(cell, arm, seed) for seed in seeds])
        ends[arm], rates[arm] = tuned(curves)
    tests = {}
    for arm, other in itertools.combinations(reversed(ARMS), 2):
        tests[f"{arm} - {other}"] = stats.by_seed((ends[arm] - ends[other]).tolist())
    return {
        "setting": dataclasses.asdict(setting),
        "seeds": len(seeds),
        "accuracy": {arm: float(ends[arm].mean()) for arm in ARMS},
        "tried": RATES,
        "rates": rates,
        "tests": tests,
        "cpu_seconds": time.process_time() - started,
    }


def correct(cells: dict[str, dict]) -> None:
    """Holm's correction over the cells, for each difference apart."""
    for name in next(iter(cells.values()))["tests"]:
        stats.correct([cell["tests"][name] for cell in cells.values()])


@exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    flags, _ = parse(Flags, argv, __doc__)
    unknown = [name for name in flags.cells if name not in CELLS]
    if unknown or not flags.cells or flags.seeds < 4:
        raise ValueError(f"--cells: some of {', '.join(CELLS)}; --seeds at least 4, for two halves")
    seeds = list(range(flags.first_seed, flags.first_seed + flags.seeds))
    cells = {}
    result = {"command": "python -m lab.second_pass " + shlex.join(argv), "commit": log.commit(), "cells": cells}
    path = Path(flags.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in flags.cells:
        cells[name] = judge(CELLS[name], seeds)
        correct(cells)
        path.write_text(json.dumps(stats.rounded(result), indent=1) + "\n")  # a cell that is done is not lost
        print(f"{name}: {cells[name]['cpu_seconds']:.0f} CPU seconds", file=sys.stderr)
    print(figures.second_pass_table(cells))
    print(f"numbers: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
