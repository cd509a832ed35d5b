"""When does replay pay? The samplers of replay.py, unchanged, on a policy whose pass rates are known exactly.

    python simulate.py                                       every rule against uniform sampling, in seconds
    python simulate.py --visit 1.4 --sharing 0.975           change one number and look again
    python simulate.py --map                                 rules over (step per visit x sharing): figure and numbers

The policy: a prompt needs all of its skills, and each skill comes off with probability sigmoid(its logit), so that a
prompt's pass rate is a product of sigmoids. Answers are drawn, a group's advantages are reward minus group mean, and
REINFORCE moves the logits: by the mean over the groups that have a gradient, as in grpo.py, so that no rule is better
for longer steps alone (`--normalise batch`: dead groups make a step shorter). The numbers that matter:

    --visit         logits by which one visit moves a prompt of one skill at pass rate one half: the learning rate
    --sharing       0: no two prompts share a skill; 0.5: each skill is in two prompts; 0.975: in forty
    --interference  share of each step that does not stay with the skills it is meant for. 0: none of it, and nothing is
                    ever forgotten; else it moves all skills, up or down, by how alike their random features are
    --difficulty    share of prompts with a skill that hardly ever comes off (0.03) at the start

Accuracy is exact: over new combinations of the skills trained on or, where nothing is shared, over the prompts trained
on. A rule's seeds are matched with uniform sampling's: same skills, same prompts, same order of epochs. What it leaves
out: answers' length and time (a rollout is a rollout), and all that a network's features do beyond random overlap.
"""

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from lab.rules import Adaptive
from replay import GRESO, Prioritized, PromptReplay, Uniform
from support import plot, stats
from support.config import OUT, comments_of, fail

RULES = {
    "uniform": Uniform,
    "placebo": Uniform,  # uniform sampling once more with other seeds: what a rule without effect looks like
    "prompt": PromptReplay,
    "prioritized": Prioritized,
    "greso": GRESO,
    "adaptive": Adaptive,
    "rare": partial(PromptReplay, band=(1e-6, 0.5), share=0.5, cooldown=5, max_reuse=5),
    "cautious": partial(PromptReplay, band=(1e-6, 0.25), share=0.5, cooldown=5, max_reuse=5),
}
VISITS, SHARINGS, INTERFERENCES = (0.04, 0.14, 0.4, 1.4, 4.0), (0.0, 0.5, 0.9, 0.975), (0.0, 0.5)  # of the map
RARE, SOLVED, HELD_OUT, POINTS, FEATURES = 0.03, 0.97, 500, 100, 16
MOMENTUM, MEMORY = 0.9, 0.95  # of --optimizer adam
FIGURES = ("dead", "replayed", "distinct", "moved_fresh", "moved_replayed")


@dataclass
class Setting:
    """One cell of the map. Fields and comments are the flags and their help."""

    visit: float = 0.14  # logits by which one visit moves a prompt of one skill at pass rate one half
    sharing: float = 0.0  # 1 - skills / skill slots; 0: each prompt its own; 0.5: each skill in two; 0.975: in forty
    difficulty: float = 0.5  # share of prompts with a skill that hardly ever comes off at the start
    interference: float = 0.0  # share of each step that goes along features that all skills have at random
    skills: int = 2  # skills of a prompt, K
    prompts: int = 1000  # prompts in the data set, N
    prompts_per_step: int = 16  # prompts of a step, P
    answers: int = 8  # answers to a prompt, G
    steps: int = 600  # steps at most; fewer where uniform sampling gets four fifths of the way sooner
    optimizer: Literal["sgd", "adam"] = "sgd"  # adam: momentum and one scale for all logits
    normalise: Literal["live", "batch"] = "live"  # live: dead groups do not make a step shorter (as in grpo.py)

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if name in ("sharing", "difficulty", "interference") and not 0 <= value < 1:
                raise ValueError(f"--{name} must be at least 0 and below 1, got {value}")
        for name, least in {"skills": 1, "prompts": 1, "prompts_per_step": 1, "answers": 2, "steps": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if not self.visit > 0:
            raise ValueError(f"--visit must be above 0, got {self.visit}")
        if self.prompts_per_step > self.prompts:
            raise ValueError(f"--prompts-per-step {self.prompts_per_step} is more than the {self.prompts} prompts")


# ---------------------------------------------------------------- the policy: S seeds side by side, F skills


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def make_task(setting: Setting, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start logits [F], the skills of each training prompt [N, K], and those of the prompts that accuracy is over."""
    rng = np.random.default_rng([seed, 0])
    n, k = setting.prompts, setting.skills
    count = max(round(n * k * (1 - setting.sharing)), k)
    skills = rng.permutation(np.arange(n * k) % count).reshape(n, k)  # every skill in as many prompts, give or take one
    # Shares of prompts, whatever K: `difficulty` have a rare skill; two fifths of the others are all but solved.
    easy, no_rare = (0.4 * (1 - setting.difficulty)) ** (1 / k), (1 - setting.difficulty) ** (1 / k)
    kind, middling = rng.random(count), rng.uniform(0.2, 0.8, count)
    rate = np.where(kind < easy, SOLVED, np.where(kind < no_rare, middling, RARE))
    test = skills if setting.sharing == 0 else rng.integers(0, count, (HELD_OUT, k))
    return np.log(rate / (1 - rate)), skills, test


def accuracy(theta: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Exact mean pass rate [S] of prompts with skills `test` [S, N, K] under logits `theta` [S, F]."""
    return sigmoid(np.take_along_axis(theta, test.reshape(len(test), -1), 1)).reshape(test.shape).prod(2).mean(1)


def reinforce(rate: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Answers of prompts whose skills come off with `rate` [S, P, K], by random numbers [S, P, G, K]: how many are
    right [S, P], and the REINFORCE gradient of the skills' logits [S, P, K], centred advantages, mean over G."""
    came_off = uniforms < rate[:, :, None]  # [S, P, G, K]
    right = came_off.all(3)
    advantage = right - right.mean(2, keepdims=True)
    # d log-prob / d logit is came_off - rate, and the advantages of a group sum to zero
    return right.sum(2), np.einsum("spg,spgk->spk", advantage, came_off) / right.shape[2]


def alive(correct: np.ndarray, answers: int) -> np.ndarray:
    """How many groups have a gradient, of those with `correct` [S, P] right `answers`: [S]."""
    return ((correct > 0) & (correct < answers)).sum(1)


class Policy:
    """Logits [S, F] of S seeds, and the step that moves them."""

    def __init__(self, setting: Setting, seeds: list[int], salt: int):
        tasks = [make_task(setting, seed) for seed in seeds]
        self.theta, self.skills, self.test = (np.stack(part) for part in zip(*tasks, strict=True))
        self.rngs = [np.random.default_rng([seed, 1, salt]) for seed in seeds]
        self.rows = np.arange(len(seeds))[:, None]  # [S, 1]
        # at pass rate one half the expected gradient is p (1 - p) (1 - 1/G); a step is a sum over prompts
        self.rate = setting.visit * 4 / (1 - 1 / setting.answers)
        self.mix, shape = setting.interference, (*self.theta.shape, FEATURES)
        if self.mix:
            features = np.stack([np.random.default_rng([seed, 2]).standard_normal(shape[1:]) for seed in seeds])
            self.features = features / np.linalg.norm(features, axis=2, keepdims=True)  # [S, F, features]
        self.answers, self.adam = setting.answers, setting.optimizer == "adam"
        self.live = np.zeros(len(seeds))  # [S], groups with a gradient in a batch at the start; 0: they do not matter
        everything = np.broadcast_to(np.arange(setting.prompts), (len(seeds), setting.prompts))
        if setting.normalise == "live":
            self.live = alive(self.answer(everything)[0], self.answers) / setting.prompts * setting.prompts_per_step
        if self.adam:
            # one scale for all logits, as for a network's shared weights; 1 at the start under uniform sampling
            gradient = self.answer(everything)[1]
            self.usual = (gradient**2).sum(2).mean(1) * setting.prompts_per_step + 1e-12  # [S], of a batch
            self.square, self.momentum = self.usual.copy(), np.zeros_like(self.theta)

    def answer(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """G answers to prompts `chosen` [S, P]: right ones [S, P], gradient and skills [S, P, K]."""
        skills = self.skills[self.rows, chosen]
        shape = (chosen.shape[1], self.answers, skills.shape[2])
        uniforms = np.stack([rng.random(shape, dtype=np.float32) for rng in self.rngs])
        rate = sigmoid(np.take_along_axis(self.theta, skills.reshape(len(skills), -1), 1)).reshape(skills.shape)
        return *reinforce(rate, uniforms), skills

    def step(self, chosen: np.ndarray) -> np.ndarray:
        """Answers and one update. How many of the G answers to each prompt are right [S, P]."""
        correct, gradient, skills = self.answer(chosen)
        total = np.zeros_like(self.theta)
        np.add.at(total, (self.rows[:, :, None], skills), gradient)
        if self.live.any():
            total *= (self.live / np.maximum(alive(correct, self.answers), 1))[:, None]
        if self.mix:
            along = np.einsum("sf,sfd->sd", total, self.features)
            total = (1 - self.mix) * total + self.mix * np.einsum("sd,sfd->sf", along, self.features)
        if self.adam:
            self.square = MEMORY * self.square + (1 - MEMORY) * ((total**2).sum(1) + 1e-12)
            self.momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * total
            total = self.momentum * np.sqrt(self.usual / self.square)[:, None]
        self.theta += self.rate * total
        return correct


# ---------------------------------------------------------------- runs


def run(setting: Setting, rule, seeds: list[int], salt: int = 0, until: float = 1.0) -> dict[str, np.ndarray]:
    """One rule, all seeds side by side; `rule(num_prompts, seed)` makes a sampler. Ends early when the share `until` of
    what was wrong at the start is right, on average. Returns accuracy [S, points], first of the start, after `cost`
    rollouts [points]; and by seed [S] the shares of zero-variance groups and of replayed prompts, distinct prompts, and
    the mean change of a prompt's pass rate since its last visit, where an epoch and where replay brought it back."""
    policy = Policy(setting, seeds, salt)
    samplers = [rule(setting.prompts, seed + 100_000 * salt) for seed in seeds]
    g, shape = setting.answers, (2, len(seeds))
    curve, cost = [accuracy(policy.theta, policy.test)], [0]
    last = np.full((len(seeds), setting.prompts), np.nan)  # pass rate at the latest visit
    dead, replayed, moved, moves = np.zeros(shape[1]), np.zeros(shape[1]), np.zeros(shape), np.zeros(shape)
    for step in range(1, setting.steps + 1):
        batches = [sampler.draw(setting.prompts_per_step, step) for sampler in samplers]
        replays = [sampler.epochs.replays for sampler in samplers]
        back = np.array([[x in again for x in batch] for batch, again in zip(batches, replays, strict=True)])
        chosen = np.array(batches)  # [S, P]
        correct = policy.step(chosen)
        for sampler, prompts, right in zip(samplers, chosen, correct, strict=True):
            sampler.observe(prompts, right, np.full(len(prompts), g), step)
        change = correct / g - last[policy.rows, chosen]
        last[policy.rows, chosen] = correct / g
        for kind in (0, 1):
            known = (back == kind) & ~np.isnan(change)
            moved[kind] += np.where(known, change, 0).sum(1)
            moves[kind] += known.sum(1)
        dead += 1 - alive(correct, g) / setting.prompts_per_step
        replayed += back.mean(1)
        if step % max(setting.steps // POINTS, 1) == 0:
            curve.append(accuracy(policy.theta, policy.test))
            cost.append(step * setting.prompts_per_step * g)
            if (curve[-1] - curve[0]).mean() >= until * (1 - curve[0]).mean():
                break
    with np.errstate(invalid="ignore"):
        fresh, again = moved / moves  # nan where nothing came again
    return {
        "accuracy": np.stack(curve, 1), "cost": np.array(cost), "dead": dead / step, "replayed": replayed / step,
        "distinct": (~np.isnan(last)).sum(1), "moved_fresh": fresh, "moved_replayed": again,
    }  # fmt: skip


def rollouts_to(level: np.ndarray, curve: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Rollouts after which each seed's accuracy [S, points] first reaches its `level` [S], between points by a straight
    line; infinite for seeds that never do."""
    above = curve >= level[:, None]
    at = above.argmax(1)
    rows, before = np.arange(len(curve)), np.maximum(at - 1, 0)
    rise = curve[rows, at] - curve[rows, before]
    part = np.where(at > 0, (level - curve[rows, before]) / np.where(rise > 0, rise, 1), 0)
    return np.where(above.any(1), cost[before] + part * (cost[at] - cost[before]), np.inf)


def mean(values: np.ndarray) -> dict:
    """Mean over seeds and its standard error."""
    return {"mean": float(values.mean()), "se": float(values.std(ddof=1) / math.sqrt(len(values)))}


def against(base: dict, arm: dict) -> dict:
    """A rule's run against uniform sampling's, seed by seed: rollouts relative to it for a third and for two thirds of
    what it gains in the run, and differences of the mean and of the last accuracy. Where a seed never gets there, the
    run's length stands for it, `reached` counts the others, and the mean is a lower bound."""
    start, gain = base["accuracy"][:, 0], base["accuracy"][:, -1] - base["accuracy"][:, 0]
    result = {}
    for name, part in (("early", 1 / 3), ("late", 2 / 3)):
        level = start + part * gain
        needed = rollouts_to(level, arm["accuracy"], arm["cost"])
        usual = rollouts_to(level, base["accuracy"], base["cost"])
        ratio = np.clip(needed, base["cost"][1], base["cost"][-1]) / np.maximum(usual, base["cost"][1])
        logs = mean(np.log(ratio))
        factor = math.exp(logs["mean"])
        result[name] = {"mean": factor - 1, "se": factor * logs["se"], "reached": int(np.isfinite(needed).sum())}
    gap = arm["accuracy"] - base["accuracy"]
    return result | {"area": mean(gap.mean(1)), "end": mean(gap[:, -1])} | {k: float(arm[k].mean()) for k in FIGURES}


def compare(setting: Setting, rules: list[str], seeds: list[int]) -> dict:
    """All rules in one setting. The budget: --steps, or as many as take uniform sampling four fifths of the way."""
    pilot = run(setting, Uniform, seeds[:8], until=0.8)
    least = min(setting.steps, 20)
    steps = max(int(pilot["cost"][-1]) // (setting.prompts_per_step * setting.answers), least)
    setting = dataclasses.replace(setting, steps=steps)
    base = run(setting, Uniform, seeds)
    result = {"setting": dataclasses.asdict(setting), "seeds": len(seeds), "rules": {}}
    result |= {"start": float(base["accuracy"][:, 0].mean()), "end": float(base["accuracy"][:, -1].mean())}
    for name in rules:
        arm = base if name == "uniform" else run(setting, RULES[name], seeds, salt=int(name == "placebo"))
        result["rules"][name] = against(base, arm)
    return result


# ---------------------------------------------------------------- what comes out


def shown(value: dict, seeds: int, scale: float = 100) -> str:
    few = "" if value.get("reached", seeds) == seeds else ">"
    return f"{few}{scale * value['mean']:+.1f} ±{scale * value['se']:.1f}".rjust(15)


def table(result: dict) -> str:
    cell, n = result["setting"], result["seeds"]
    lines = [", ".join(f"{name.replace('_', ' ')} {value}" for name, value in cell.items())]
    rollouts = cell["steps"] * cell["prompts_per_step"] * cell["answers"]
    lines += [f"uniform sampling: accuracy {result['start']:.3f} to {result['end']:.3f} in {rollouts:,} rollouts"]
    lines += [f"against it, standard errors over {n} matched seeds; rollouts in %, accuracy in points; > a lower bound"]
    lines += ["", f"{'':12}" + "".join(
        text.rjust(15) for text in ("to 1/3 of gain", "to 2/3 of gain", "mean accuracy", "last accuracy",
                                    "zero variance", "replayed", "moved, epochs", "moved, replay"))]  # fmt: skip
    for name, row in result["rules"].items():
        parts = [shown(row[key], n) for key in ("early", "late", "area", "end")]
        parts += [f"{row[key]:15.2f}" for key in ("dead", "replayed")]
        parts += [("-" if math.isnan(row[k]) else f"{row[k]:+.3f}").rjust(15) for k in FIGURES if k.startswith("moved")]
        lines.append(f"{name:12}" + "".join(parts))
    return "\n".join(lines)


def draw_map(setting: Setting, rules: list[str], seeds: list[int], path: Path, grid=None, command: str = "") -> Path:
    """Rules over (step per visit x sharing), without and with interference; numbers beside the figure, in a .json."""
    visits, sharings, interferences = grid or (VISITS, SHARINGS, INTERFERENCES)
    cells = []
    for interference, sharing, visit in itertools.product(interferences, sharings, visits):
        cell = dataclasses.replace(setting, visit=visit, sharing=sharing, interference=interference)
        cells.append(compare(cell, rules, seeds))
        print(f"{len(cells)}: visit {visit}, sharing {sharing}, interference {interference}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"command": command, "commit": stats.commit()})[1:-1]
    text = ",\n".join(json.dumps(stats.rounded(cell)) for cell in cells)
    path.with_suffix(".json").write_text(f'{{{head}, "cells": [\n{text}\n]}}\n')
    return plot.regimes(cells, path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    comments = comments_of(Setting)
    for field in dataclasses.fields(Setting):
        choices = get_args(field.type) or None
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=str if choices else field.type, default=field.default,
            choices=choices, help=f"{comments[field.name]} ({field.default})",
        )  # fmt: skip
    usual = [name for name in RULES if name != "placebo"]
    parser.add_argument("--rules", nargs="+", choices=RULES, default=usual, metavar="RULE", help=", ".join(RULES))
    parser.add_argument("--seeds", type=int, default=16, help="matched seeds (16)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them; rules were chosen on 0 to 11 (0)")
    parser.add_argument("--map", nargs="?", type=Path, const=OUT / "map.png", metavar="FILE.png",
                        help="draw the map; its numbers go beside it (out/map.png)")  # fmt: skip
    args = vars(parser.parse_args(argv))
    rules, path, first = args.pop("rules"), args.pop("map"), args.pop("first_seed")
    seeds = list(range(first, first + args.pop("seeds")))
    try:
        setting = Setting(**args)
        if len(seeds) < 2:
            raise ValueError(f"--seeds must be at least 2, for a standard error, got {len(seeds)}")
        command = "python simulate.py " + shlex.join(argv)
        print(draw_map(setting, rules, seeds, path, command=command) if path else table(compare(setting, rules, seeds)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
