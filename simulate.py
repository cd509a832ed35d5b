"""When does replay pay? The samplers of replay.py, unchanged, on a policy whose pass rates are known exactly.

    python simulate.py                                       every rule against uniform sampling, in seconds
    python simulate.py --visit 1.4 --sharing 0.975           change one number and look again
    python simulate.py --map                                 rules over (step per visit x sharing): figure and numbers

The policy: a prompt needs all of its skills, and each skill comes off with probability sigmoid(its logit), so that a
prompt's pass rate is a product of sigmoids. Answers are drawn, a group's advantages are reward minus group mean, and
REINFORCE moves the logits. The three numbers that matter:

    --visit       logits by which one visit moves a prompt of one skill at pass rate one half; the learning rate
    --sharing     1 - skills / skill slots: 0 no two prompts share a skill; 0.5 each is in two prompts; 0.975 in forty
    --difficulty  share of prompts with a skill that hardly ever comes off (0.03) at the start

Accuracy is exact: over held-out prompts made of the same skills or, where nothing is shared, over the prompts trained
on. A rule's seeds are matched with uniform sampling's: same prompts, same skills, same order of epochs. All errors are
standard errors over these pairs. What it leaves out: interference and generalisation other than by sharing, answers'
length and time (a rollout is a rollout), and anything a network's optimiser does beyond momentum and one global scale.
"""

import argparse
import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from replay import GRESO, Prioritized, PromptReplay, Uniform

HERE = Path(__file__).parent
RULES = {
    "uniform": Uniform,
    "placebo": Uniform,  # uniform sampling once more with other seeds: what a rule without effect looks like
    "prompt": PromptReplay,
    "prioritized": Prioritized,
    "greso": GRESO,
    "rare": partial(PromptReplay, band=(1e-6, 0.5), share=0.5, cooldown=5, max_reuse=5),
    "cautious": partial(PromptReplay, band=(1e-6, 0.25), share=0.5, cooldown=5, max_reuse=5),
}
VISITS, SHARINGS = (0.04, 0.14, 0.4, 1.4, 4.0), (0.0, 0.5, 0.9, 0.975)  # of the map
RARE, SOLVED, HELD_OUT, POINTS, FEATURES = 0.03, 0.97, 500, 100, 16
MOMENTUM, MEMORY = 0.9, 0.95  # of --optimizer adam


@dataclass
class Setting:
    """One cell of the map."""

    visit: float = 0.14
    sharing: float = 0.0
    difficulty: float = 0.5
    interference: float = 0.0
    skills: int = 2  # of a prompt, K
    prompts: int = 1000  # in the data set, N
    prompts_per_step: int = 16  # P
    answers: int = 8  # to a prompt, G
    steps: int = 600
    optimizer: str = "sgd"

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
    """Answers of prompts whose skills come off with `rate` [S, P, K], by random numbers [S, P, G, K]: how many are right
    [S, P], and the REINFORCE gradient of the skills' logits [S, P, K], centred advantages, mean over G."""
    came_off = uniforms < rate[:, :, None]  # [S, P, G, K]
    right = came_off.all(3)
    advantage = right - right.mean(2, keepdims=True)
    # d log-prob / d logit is came_off - rate, and the advantages of a group sum to zero
    return right.sum(2), np.einsum("spg,spgk->spk", advantage, came_off) / right.shape[2]


class Policy:
    """Logits [S, F] of S seeds, and the step that moves them."""

    def __init__(self, setting: Setting, seeds: list[int], salt: int):
        tasks = [make_task(setting, seed) for seed in seeds]
        self.theta, self.skills, self.test = (np.stack(part) for part in zip(*tasks, strict=True))
        self.rngs = [np.random.default_rng([seed, 1, salt]) for seed in seeds]
        self.rows = np.arange(len(seeds))[:, None]  # [S, 1]
        # at pass rate one half the expected gradient is p (1 - p) (1 - 1/G); the sum over prompts is not divided by P
        self.rate = setting.visit * 4 / (1 - 1 / setting.answers)
        self.mix, shape = setting.interference, (*self.theta.shape, FEATURES)
        if self.mix:
            features = np.stack([np.random.default_rng([seed, 2]).standard_normal(shape[1:]) for seed in seeds])
            self.features = features / np.linalg.norm(features, axis=2, keepdims=True)  # [S, F, features]
        self.answers, self.adam = setting.answers, setting.optimizer == "adam"
        if self.adam:
            # one scale for all logits, as for a network's shared weights; 1 at the start under uniform sampling
            gradient = self.answer(np.broadcast_to(np.arange(setting.prompts), (len(seeds), setting.prompts)))[1]
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


def run(setting: Setting, rule, seeds: list[int], salt: int = 0) -> dict[str, np.ndarray]:
    """One rule, all seeds side by side; `rule(num_prompts, seed)` makes a sampler. Accuracy [S, points + 1], first of
    the start, after the rollouts `cost` [points + 1]; and by seed [S] the shares of zero-variance groups and of replayed
    prompts, distinct prompts, and how far a prompt's pass rate was found to have moved since its last visit."""
    policy = Policy(setting, seeds, salt)
    samplers = [rule(setting.prompts, seed + 100_000 * salt) for seed in seeds]
    count, g = len(seeds), setting.answers
    every = max(setting.steps // POINTS, 1)
    curve, cost = [accuracy(policy.theta, policy.test)], [0]
    last = np.full((count, setting.prompts), np.nan)  # pass rate at the latest visit
    dead, moved, moves = np.zeros(count), np.zeros((2, count)), np.zeros((2, count))  # [fresh, replayed]
    replayed = np.zeros(count)
    for step in range(1, setting.steps + 1):
        chosen = np.array([sampler.draw(setting.prompts_per_step, step) for sampler in samplers])  # [S, P]
        correct = policy.step(chosen)
        for sampler, prompts, right in zip(samplers, chosen, correct, strict=True):
            sampler.observe(prompts, right, np.full(len(prompts), g), step)
        back = np.array([np.isin(row, list(s.epochs.replays)) for s, row in zip(samplers, chosen, strict=True)])
        change = correct / g - last[policy.rows, chosen]
        last[policy.rows, chosen] = correct / g
        for kind in (0, 1):
            known = (back == kind) & ~np.isnan(change)
            moved[kind] += np.where(known, change, 0).sum(1)
            moves[kind] += known.sum(1)
        dead += ((correct == 0) | (correct == g)).mean(1)
        replayed += back.mean(1)
        if step % every == 0:
            curve.append(accuracy(policy.theta, policy.test))
            cost.append(step * setting.prompts_per_step * g)
    with np.errstate(invalid="ignore"):
        gauge = moved / moves  # nan where nothing came again
    return {
        "accuracy": np.stack(curve, 1), "cost": np.array(cost), "dead": dead / setting.steps,
        "replayed": replayed / setting.steps, "distinct": (~np.isnan(last)).sum(1), "moved_fresh": gauge[0],
        "moved_replayed": gauge[1],
    }  # fmt: skip


def rollouts_to(level: float, curve: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Rollouts after which each seed's accuracy [S, points] first reaches `level`, between points by a straight line;
    infinite for seeds that never do."""
    level = np.broadcast_to(level, (len(curve), 1))[:, 0]
    above = curve >= level[:, None]
    at = above.argmax(1)
    rows, before = np.arange(len(curve)), np.maximum(at - 1, 0)
    rise = curve[rows, at] - curve[rows, before]
    part = np.where(at > 0, (level - curve[rows, before]) / np.where(rise > 0, rise, 1), 0)
    return np.where(above.any(1), cost[before] + part * (cost[at] - cost[before]), np.inf)
