"""When is a second pass over fresh groups worth its step? Gates on it, judged on exactly known pass rates.

    python -m lab.gates                                all arms in the cells of lab/second_pass.py, seeds 0 to 11
    python -m lab.gates --arms adaptive "ess 0.99"     some of them, beside plain

A second pass (`--epochs 2` of train.py) gains at small learning rates and costs at large ones, as stored groups do. So
it may pay to take it only where the first pass has moved the policy little:

    plain      one pass
    twice      always two
    ess E      the second one while the effective sample size of pi / pi_old over the batch is at least E of its number
    norm G     the second one while its gradient is at most G times as long as the first one's: the gate of DGG
               (2605.19425), whose stopping rule is said to be a surge of that norm
    adaptive   one pass, and the stored groups of lab/rules.py's OnPolicyGroupReplay, which has the first gate

An arm is compared with plain at every rate, and once with the rate tuned for each (as in lab/second_pass.py).
"""

import dataclasses
import json
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lab import second_pass, simulate
from lab.figures import markdown, points_of
from lab.rules import OnPolicyGroupReplay
from lab.second_pass import CELLS, POINTS, RATES, Group, logprob
from lab.simulate import Policy, Setting
from replay import Uniform
from support import log, stats
from support.config import OUT, exits, parse

ARMS = ("plain", "twice", "ess 0.999", "ess 0.99", "ess 0.97", "ess 0.9", "norm 1", "norm 0.9", "norm 0.7", "adaptive")


@dataclass
class Flags:
    arms: tuple[str, ...] = ARMS  # plain is always among them
    cells: tuple[str, ...] = tuple(CELLS)  # which of the cells
    seeds: int = 12  # matched seeds
    first_seed: int = 0  # the first of them
    out: str = str(OUT / "gates.json")  # the numbers


def ess(weight: np.ndarray) -> float:
    """Effective sample size as a share of the number."""
    return float(weight.sum() ** 2 / (weight.size * (weight**2).sum()))


def near(ratio: np.ndarray, growth: float, least: float) -> bool:
    return ess(ratio) >= least


def calm(ratio: np.ndarray, growth: float, most: float) -> bool:
    return growth <= most


def gate_of(arm: str):
    kind, _, number = arm.partition(" ")
    gates = {"ess": (near, "least"), "norm": (calm, "most")}
    if kind not in gates:
        return second_pass.goes_on
    gate, name = gates[kind]
    return partial(gate, **{name: float(number)})


def stale_ess(policy: Policy, groups: list[Group]) -> float:
    """Of the importance weights of stored groups."""
    came_off = np.stack([group.came_off for group in groups])
    now = np.stack([policy.theta[0, group.skills] for group in groups])
    birth = np.stack([group.birth for group in groups])
    return ess(np.exp(logprob(came_off, now) - logprob(came_off, birth)))


def train(setting: Setting, arm: str, seed: int) -> tuple[np.ndarray, float]:
    """Exact accuracy [POINTS + 1] on the way, and the mean number of passes over a batch."""
    policy = Policy(setting, [seed], salt=0)
    sampler = Uniform(setting.prompts, seed)
    rng = policy.rngs[0]
    places = setting.prompts_per_step
    store = OnPolicyGroupReplay(seed, prompts_per_step=places)
    stored: list[Group] = []  # oldest first, two steps' worth
    curve = [simulate.accuracy(policy.theta, policy.test)[0]]
    passes = []
    for step in range(1, setting.steps + 1):
        groups = second_pass.generate(policy, sampler.draw(places, step), rng)
        batch = [group for group in groups if group.advantage.any()]
        useful = list(batch)
        if arm == "adaptive":
            room = int(store.fill * (places - len(useful)) + (store.rng.random() if store.fill < 1 else 0))
            back = stored[::-1][:room]
            if back:
                store.learn({"ess_replayed": stale_ess(policy, back)})
            batch += back
            stored = (stored + useful)[-2 * places :]
        if batch:
            most = 1 if arm in ("plain", "adaptive") else 2
            passes.append(second_pass.update(policy, batch, most, gate_of(arm)))
        if step % (setting.steps // POINTS) == 0:
            curve.append(simulate.accuracy(policy.theta, policy.test)[0])
    return np.array(curve), float(np.mean(passes))


def judge(setting: Setting, arms: list[str], seeds: list[int]) -> dict:
    """Each arm against plain at every rate, and tuned; its mean passes at every rate."""
    started = time.process_time()
    curves = {}
    passes = {}
    for arm in arms:
        curves[arm] = {}
        passes[arm] = []
        for rate in RATES:
            cell = dataclasses.replace(setting, visit=rate)
            runs = [train(cell, arm, seed) for seed in seeds]
            curves[arm][rate] = np.stack([curve for curve, _ in runs])
            passes[arm].append(float(np.mean([count for _, count in runs])))
    tail = max(round(second_pass.WINDOW * POINTS), 1)
    found = {}
    tuned = {arm: second_pass.tuned(curves[arm]) for arm in arms}
    for arm in arms:
        by_rate = []
        for rate in RATES:
            gap = curves[arm][rate][:, -tail:].mean(1) - curves["plain"][rate][:, -tail:].mean(1)
            by_rate.append(stats.by_seed(gap.tolist()))
        difference = stats.by_seed((tuned[arm][0] - tuned["plain"][0]).tolist())
        found[arm] = {"by_rate": by_rate, "tuned": difference, "rates": tuned[arm][1], "passes": passes[arm]}
    return {
        "setting": dataclasses.asdict(setting),
        "seeds": len(seeds),
        "tried": RATES,
        "accuracy": float(tuned["plain"][0].mean()),
        "arms": found,
        "cpu_seconds": time.process_time() - started,
    }


def table(cells: dict[str, dict]) -> str:
    """A row for each arm: at how many of all fixed rates it is behind plain and ahead of it, and tuned, by cell."""
    rows = []
    for arm in next(iter(cells.values()))["arms"]:
        if arm == "plain":
            continue
        tests = [test for cell in cells.values() for test in cell["arms"][arm]["by_rate"]]
        behind = sum(test["high"] < 0 for test in tests)
        ahead = sum(test["low"] > 0 for test in tests)
        mean = 100 * np.mean([test["mean"] for test in tests])
        worst = 100 * min(test["mean"] for test in tests)
        tuned = [points_of(cell["arms"][arm]["tuned"]) for cell in cells.values()]
        rows.append([arm, f"{behind}, {ahead} of {len(tests)}", f"{mean:+.1f}, {worst:+.1f}", *tuned])
    return markdown(["arm", "behind, ahead", "mean, worst", *cells], rows)


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
        path.write_text(json.dumps(stats.rounded(result), indent=1) + "\n")
        print(f"{name}: {cells[name]['cpu_seconds']:.0f} CPU seconds", file=sys.stderr)
    print(table(cells))
    print(f"numbers: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
