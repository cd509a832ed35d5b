"""When does replay pay? The samplers of replay.py, unchanged, on a policy whose pass rates are known exactly.

    python -m lab.simulate                                   every rule against uniform sampling, in seconds
    python -m lab.simulate --visit 1.4 --sharing 0.975       change one number and look again
    python -m lab.simulate --rules prompt my_rule.py:Class   a rule of your own beside one of ours
    python -m lab.simulate --map                             rules over (step per visit x sharing): figures and numbers

The policy: a prompt needs all of its skills, and each skill comes off with probability sigmoid(its logit), so that a
prompt's pass rate is a product of sigmoids. Answers are drawn, a group's advantages are reward minus group mean, and
REINFORCE moves the logits: by the mean over the groups that have a gradient, as in grpo.py, so that no rule is
better for longer steps alone (`--normalise batch`: dead groups make a step shorter). The numbers that matter:

    --visit         logits by which one visit moves a prompt of one skill at pass rate one half: the learning rate
    --sharing       0: no two prompts share a skill; 0.5: each skill is in two prompts; 0.975: in forty
    --interference  share of each step that does not stay with the skills it is meant for. 0: none of it, and nothing is
                    ever forgotten; else it moves all skills, up or down, by how alike their random features are
    --difficulty    share of prompts with a skill that hardly ever comes off (0.03) at the start

Accuracy is exact: over new combinations of the skills trained on or, where nothing is shared, over the prompts
trained on. A rule's seeds are matched with uniform sampling's: same skills, same prompts, same order of epochs. What
it leaves out: answers' length and time (a rollout is a rollout), and all that a network's features do beyond random
overlap.

Shapes: S seeds side by side, F skills, N prompts of the data set, P prompts of a step, K skills of a prompt, G
answers.
"""

import dataclasses
import itertools
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from lab import figures
from lab.rules import GRESO, Adaptive, Beta
from replay import Prioritized, PromptReplay, Uniform
from support import log, stats
from support.config import OUT, decides, exits, load_class, meant, parse, with_value
from support.own_rule import guarded

RULES = {
    "uniform": Uniform,
    "placebo": Uniform,  # uniform sampling once more with other seeds: what a rule without effect looks like
    "prompt": PromptReplay,
    "prioritized": Prioritized,
    "greso": GRESO,
    "beta": Beta,
    "adaptive": Adaptive,
    "rare": partial(PromptReplay, band=(1e-6, 0.5), share=0.5, cooldown=5, max_reuse=5),
    "cautious": partial(PromptReplay, band=(1e-6, 0.25), share=0.5, cooldown=5, max_reuse=5),
}

USUAL = tuple(name for name in RULES if name != "placebo")

# the map: every combination of these
VISITS = (0.04, 0.14, 0.4, 1.4, 4.0)
SHARINGS = (0.0, 0.5, 0.9, 0.975)
INTERFERENCES = (0.0, 0.5)

# the task: pass rates of rare and of solved skills at the start, held-out prompts, random features of a skill
RARE = 0.03
SOLVED = 0.97
HELD_OUT = 500
FEATURES = 16

POINTS = 100  # of an accuracy curve
MOMENTUM = 0.9  # of --optimizer adam
MEMORY = 0.95  # of --optimizer adam: what is kept of the mean square of steps
FIGURES = ("dead", "replayed", "distinct", "moved_fresh", "moved_replayed")
SHARES = ("sharing", "difficulty", "interference")  # settings in [0, 1)
LEAST = {"skills": 1, "prompts": 1, "prompts_per_step": 1, "answers": 2, "steps": 2}


@dataclass
class Setting:
    """One cell of the map."""

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


@dataclass
class Flags(Setting):
    rules: tuple[str, ...] = USUAL  # of uniform, placebo, prompt, prioritized, greso, beta, adaptive, rare, cautious
    seeds: int = 16  # matched seeds
    first_seed: int = 0  # the first of them; rules were chosen on 0 to 11
    map: str = ""  # FILE.png: draw the map, its numbers beside it; alone: out/map.png


def check(flags: Flags) -> None:
    """ValueError, in one line, for numbers that cannot be meant."""
    for name in SHARES:
        if not 0 <= getattr(flags, name) < 1:
            raise ValueError(f"--{name} must be at least 0 and below 1, got {getattr(flags, name)}")
    for name, least in LEAST.items():
        if getattr(flags, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(flags, name)}")
    if not flags.visit > 0:
        raise ValueError(f"--visit must be above 0, got {flags.visit}")
    if flags.prompts_per_step > flags.prompts:
        raise ValueError(f"--prompts-per-step {flags.prompts_per_step} is more than the {flags.prompts} prompts")
    if flags.seeds < 2:
        raise ValueError(f"--seeds must be at least 2, for a standard error, got {flags.seeds}")
    unknown = [name for name in flags.rules if name not in RULES and ".py:" not in name]
    if unknown or not flags.rules:
        near = meant(" ".join(unknown), RULES)
        raise ValueError(f"--rules {' '.join(unknown)}: choose from {', '.join(RULES)}, or give file.py:Class{near}")
    for name in flags.rules:
        rule_of(name)


def rule_of(name: str):
    """What makes the samplers of a rule: one of RULES, or the class in a user's file.py:Class. ValueError or
    FileNotFoundError, in one line, where that is no sampler."""
    if name in RULES:
        return RULES[name]
    rule = load_class(name)
    if decides(rule) != "prompts":
        raise ValueError(f"--rules {name} decides {decides(rule)}; only rules that choose prompts are simulated")
    return guarded(rule)


# ---------------------------------------------------------------- the policy


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def pick(theta: np.ndarray, skills: np.ndarray) -> np.ndarray:
    """The logits of `skills` [S, N, K] out of `theta` [S, F]."""
    flat = skills.reshape(len(skills), -1)
    return np.take_along_axis(theta, flat, 1).reshape(skills.shape)


def make_task(setting: Setting, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start logits [F], the skills of each training prompt [N, K], and those of the prompts that accuracy
    is over."""
    rng = np.random.default_rng([seed, 0])
    n = setting.prompts
    k = setting.skills
    # every skill is in as many prompts as every other, or in one more
    count = max(round(n * k * (1 - setting.sharing)), k)
    skills = rng.permutation(np.arange(n * k) % count).reshape(n, k)
    # shares of prompts, whatever K: `difficulty` have a rare skill; two fifths of the others are all but solved
    easy = (0.4 * (1 - setting.difficulty)) ** (1 / k)
    no_rare = (1 - setting.difficulty) ** (1 / k)
    kind = rng.random(count)
    rate = rng.uniform(0.2, 0.8, count)
    rate[kind < easy] = SOLVED
    rate[kind >= no_rare] = RARE
    test = skills if setting.sharing == 0 else rng.integers(0, count, (HELD_OUT, k))
    return np.log(rate / (1 - rate)), skills, test


def accuracy(theta: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Exact mean pass rate [S] of prompts with skills `test` [S, N, K] under logits `theta` [S, F]."""
    return sigmoid(pick(theta, test)).prod(2).mean(1)


def reinforce(rate: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Answers of prompts whose skills come off with `rate` [S, P, K], by random numbers [S, P, G, K]: how many are
    right [S, P], and the REINFORCE gradient of the skills' logits [S, P, K], centred advantages, mean over G."""
    came_off = uniforms < rate[:, :, None]  # [S, P, G, K]
    right = came_off.all(3)
    advantage = right - right.mean(2, keepdims=True)
    # d log-prob / d logit is came_off - rate, and the advantages of a group sum to zero
    gradient = np.einsum("spg,spgk->spk", advantage, came_off) / right.shape[2]
    return right.sum(2), gradient


def alive(correct: np.ndarray, answers: int) -> np.ndarray:
    """How many groups have a gradient, of those with `correct` [S, P] right `answers`: [S]."""
    return ((correct > 0) & (correct < answers)).sum(1)


class Policy:
    """Logits `theta` [S, F] of S seeds, and the step that moves them."""

    def __init__(self, setting: Setting, seeds: list[int], salt: int):
        tasks = [make_task(setting, seed) for seed in seeds]
        self.theta = np.stack([start for start, _, _ in tasks])
        self.skills = np.stack([skills for _, skills, _ in tasks])
        self.test = np.stack([test for _, _, test in tasks])
        self.rngs = [np.random.default_rng([seed, 1, salt]) for seed in seeds]
        self.rows = np.arange(len(seeds))[:, None]  # [S, 1]
        self.answers = setting.answers
        # at pass rate one half the expected gradient is p (1 - p) (1 - 1/G); a step is a sum over prompts
        self.rate = setting.visit * 4 / (1 - 1 / setting.answers)

        # interference: random features of each skill, of length one
        self.mix = setting.interference
        if self.mix:
            shape = (self.theta.shape[1], FEATURES)
            features = np.stack([np.random.default_rng([seed, 2]).standard_normal(shape) for seed in seeds])
            self.features = features / np.linalg.norm(features, axis=2, keepdims=True)  # [S, F, FEATURES]

        # how many groups of a batch have a gradient at the start [S]; 0: dead groups make a step shorter
        everything = np.broadcast_to(np.arange(setting.prompts), (len(seeds), setting.prompts))
        self.live = np.zeros(len(seeds))
        if setting.normalise == "live":
            correct, _, _ = self.answer(everything)
            self.live = alive(correct, self.answers) / setting.prompts * setting.prompts_per_step

        # adam: one scale for all logits, as for a network's shared weights; 1 at the start under uniform sampling
        self.adam = setting.optimizer == "adam"
        if self.adam:
            _, gradient, _ = self.answer(everything)
            self.usual = (gradient**2).sum(2).mean(1) * setting.prompts_per_step + 1e-12  # [S], of a batch
            self.square = self.usual.copy()
            self.momentum = np.zeros_like(self.theta)

    def answer(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """G answers to prompts `chosen` [S, P]: right ones [S, P], gradient and skills [S, P, K]."""
        skills = self.skills[self.rows, chosen]
        shape = (chosen.shape[1], self.answers, skills.shape[2])
        uniforms = np.stack([rng.random(shape, dtype=np.float32) for rng in self.rngs])
        correct, gradient = reinforce(sigmoid(pick(self.theta, skills)), uniforms)
        return correct, gradient, skills

    def step(self, chosen: np.ndarray) -> np.ndarray:
        """Answers and one update. How many of the G answers to each prompt are right [S, P]."""
        correct, gradient, skills = self.answer(chosen)
        total = np.zeros_like(self.theta)
        np.add.at(total, (self.rows[:, :, None], skills), gradient)
        if self.live.any():
            total *= (self.live / np.maximum(alive(correct, self.answers), 1))[:, None]
        self.move(total)
        return correct

    def move(self, total: np.ndarray) -> None:
        """The optimiser's step along the summed gradient `total` [S, F]."""
        if self.mix:
            along = np.einsum("sf,sfd->sd", total, self.features)
            total = (1 - self.mix) * total + self.mix * np.einsum("sd,sfd->sf", along, self.features)
        if self.adam:
            self.square = MEMORY * self.square + (1 - MEMORY) * ((total**2).sum(1) + 1e-12)
            self.momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * total
            total = self.momentum * np.sqrt(self.usual / self.square)[:, None]
        self.theta += self.rate * total


# ---------------------------------------------------------------- runs


def full_batch(sampler, n: int, step: int) -> list[int]:
    """The n prompts that a sampler draws. ValueError, in one line, if it draws fewer."""
    drawn = sampler.draw(n, step)
    if len(drawn) < n:
        raise ValueError(f"{type(sampler).__name__} drew {len(drawn)} prompts; the simulator needs a full batch")
    return drawn


def run(setting: Setting, rule, seeds: list[int], salt: int = 0, until: float = 1.0) -> dict[str, np.ndarray]:
    """One rule, all seeds side by side; `rule(num_prompts, seed)` makes a sampler.

    It ends early when the share `until` of what was wrong at the start is right, on average over seeds. Returns
    `accuracy` [S, points], the first that of the start, after `cost` rollouts [points]. By seed [S] it returns the
    shares of zero-variance groups (`dead`) and of `replayed` prompts, how many `distinct` prompts were seen, and the
    mean change of a prompt's pass rate since its last visit, where an epoch (`moved_fresh`) and where replay
    (`moved_replayed`) brought it back.
    """
    policy = Policy(setting, seeds, salt)
    samplers = [rule(setting.prompts, seed + 100_000 * salt) for seed in seeds]
    curve = [accuracy(policy.theta, policy.test)]
    cost = [0]
    last = np.full((len(seeds), setting.prompts), np.nan)  # pass rate at the latest visit
    dead = np.zeros(len(seeds))
    replayed = np.zeros(len(seeds))
    moved = np.zeros((2, len(seeds)))  # sums of changes: of visits by epochs, and by replay
    moves = np.zeros((2, len(seeds)))  # how many there were

    for step in range(1, setting.steps + 1):
        # each seed's sampler draws; `back` says which prompts replay brought
        chosen = np.zeros((len(seeds), setting.prompts_per_step), int)
        back = np.zeros(chosen.shape, bool)
        for i, sampler in enumerate(samplers):
            sampler.progress = (step - 1) / setting.steps
            chosen[i] = full_batch(sampler, setting.prompts_per_step, step)
            back[i] = np.isin(chosen[i], list(sampler.replays))

        # answers, update, and what the samplers are told
        correct = policy.step(chosen)
        for i, sampler in enumerate(samplers):
            sampler.observe(chosen[i], correct[i], np.full(setting.prompts_per_step, setting.answers), step)

        # how far prompts have moved since their last visit
        change = correct / setting.answers - last[policy.rows, chosen]
        last[policy.rows, chosen] = correct / setting.answers
        for kind in (0, 1):
            known = (back == kind) & ~np.isnan(change)
            moved[kind] += np.where(known, change, 0).sum(1)
            moves[kind] += known.sum(1)
        dead += 1 - alive(correct, setting.answers) / setting.prompts_per_step
        replayed += back.mean(1)

        if step % max(setting.steps // POINTS, 1) == 0:
            curve.append(accuracy(policy.theta, policy.test))
            cost.append(step * setting.prompts_per_step * setting.answers)
            if (curve[-1] - curve[0]).mean() >= until * (1 - curve[0]).mean():
                break

    with np.errstate(invalid="ignore"):
        fresh, again = moved / moves  # nan where nothing came again
    return {
        "accuracy": np.stack(curve, 1),
        "cost": np.array(cost),
        "dead": dead / step,
        "replayed": replayed / step,
        "distinct": (~np.isnan(last)).sum(1),
        "moved_fresh": fresh,
        "moved_replayed": again,
    }


def rollouts_to(level: np.ndarray, curve: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Rollouts after which each seed's accuracy [S, points] first reaches its `level` [S], between points
    by a straight line; infinite for seeds that never do."""
    needed = np.full(len(curve), np.inf)
    for seed, accuracies in enumerate(curve):
        above = np.flatnonzero(accuracies >= level[seed])
        if len(above):
            first = above[0]
            before = max(first - 1, 0)
            rise = accuracies[first] - accuracies[before]
            part = (level[seed] - accuracies[before]) / rise if rise > 0 else 0
            needed[seed] = cost[before] + part * (cost[first] - cost[before])
    return needed


def mean_and_error(values: np.ndarray) -> dict:
    """Mean over seeds and its standard error."""
    return {"mean": float(values.mean()), "se": float(values.std(ddof=1) / math.sqrt(len(values)))}


def against(base: dict, arm: dict) -> dict:
    """A rule's run against uniform sampling's, seed by seed.

    `early` and `late`: rollouts relative to it, for a third and for two thirds of what it gains in the run. `area`
    and `end`: differences of the mean and of the last accuracy. Where a seed never gets there, the run's length
    stands for it, `reached` counts the others, and the mean is a lower bound.
    """
    start = base["accuracy"][:, 0]
    gain = base["accuracy"][:, -1] - start
    result = {}
    for name, part in (("early", 1 / 3), ("late", 2 / 3)):
        level = start + part * gain
        needed = rollouts_to(level, arm["accuracy"], arm["cost"])
        usual = rollouts_to(level, base["accuracy"], base["cost"])
        shortest = base["cost"][1]
        ratio = np.clip(needed, shortest, base["cost"][-1]) / np.maximum(usual, shortest)
        logs = mean_and_error(np.log(ratio))
        factor = math.exp(logs["mean"])
        result[name] = {"mean": factor - 1, "se": factor * logs["se"], "reached": int(np.isfinite(needed).sum())}
    gap = arm["accuracy"] - base["accuracy"]
    result["area"] = mean_and_error(gap.mean(1))
    result["end"] = mean_and_error(gap[:, -1])
    for name in FIGURES:
        result[name] = float(arm[name].mean())
    return result


def compare_rules(setting: Setting, rules: list[str], seeds: list[int]) -> dict:
    """All rules in one setting. The budget: --steps, or as many as take uniform sampling four fifths of the
    way."""
    pilot = run(setting, Uniform, seeds[:8], until=0.8)
    taken = int(pilot["cost"][-1]) // (setting.prompts_per_step * setting.answers)
    setting = dataclasses.replace(setting, steps=max(taken, min(setting.steps, 20)))
    base = run(setting, Uniform, seeds)
    found = {}
    for name in rules:
        arm = base
        started = time.process_time()
        if name != "uniform":
            arm = run(setting, rule_of(name), seeds, salt=int(name == "placebo"))
        found[name] = against(base, arm) | {"cpu_seconds": time.process_time() - started}
    start = float(base["accuracy"][:, 0].mean())
    end = float(base["accuracy"][:, -1].mean())
    cell = {"setting": dataclasses.asdict(setting), "seeds": len(seeds), "rules": found}
    return cell | {"start": start, "end": end}


# ---------------------------------------------------------------- what comes out

COLUMNS = {
    "early": "to 1/3 of gain",
    "late": "to 2/3 of gain",
    "area": "mean accuracy",
    "end": "last accuracy",
    "dead": "zero variance",
    "replayed": "replayed",
    "moved_fresh": "moved, epochs",
    "moved_replayed": "moved, replay",
}


def shown(name: str, value, seeds: int) -> str:
    """One figure of a rule, 15 characters wide."""
    if name in ("dead", "replayed"):
        text = f"{value:.2f}"
    elif name.startswith("moved"):
        text = "-" if math.isnan(value) else f"{value:+.3f}"
    else:
        bound = ">" if value.get("reached", seeds) < seeds else ""
        text = f"{bound}{100 * value['mean']:+.1f} ±{100 * value['se']:.1f}"
    return text.rjust(15)


def cell_table(cell: dict) -> str:
    setting = cell["setting"]
    rollouts = setting["steps"] * setting["prompts_per_step"] * setting["answers"]
    lines = [
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in setting.items()),
        f"uniform sampling: accuracy {cell['start']:.3f} to {cell['end']:.3f} in {rollouts:,} rollouts",
        f"against it, standard errors over {cell['seeds']} matched seeds; rollouts in %, accuracy in points; "
        "> a lower bound",
        "",
        f"{'':12}" + "".join(text.rjust(15) for text in COLUMNS.values()),
    ]
    for rule, row in cell["rules"].items():
        own = rule.rpartition(":")[2]  # of file.py:Class the class
        lines.append(f"{own:12}" + "".join(shown(name, row[name], cell["seeds"]) for name in COLUMNS))
    return "\n".join(lines)


def draw_map(setting: Setting, rules: list[str], seeds: list[int], path: Path, grid=None, command: str = "") -> Path:
    """Rules over (step per visit x sharing): a figure of the first four for each interference, the first of
    them at `path`, and the numbers of all rules beside it in a .json."""
    visits, sharings, interferences = grid or (VISITS, SHARINGS, INTERFERENCES)
    cells = []
    for interference, sharing, visit in itertools.product(interferences, sharings, visits):
        cell = dataclasses.replace(setting, visit=visit, sharing=sharing, interference=interference)
        cells.append(compare_rules(cell, rules, seeds))
        print(f"{len(cells)}: visit {visit}, sharing {sharing}, interference {interference}", file=sys.stderr)

    # one cell a line, so that two maps can be compared line by line
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"command": command, "commit": log.commit()})[1:-1]
    lines = ",\n".join(json.dumps(stats.rounded(cell)) for cell in cells)
    path.with_suffix(".json").write_text(f'{{{head}, "cells": [\n{lines}\n]}}\n')

    for interference in interferences:
        own = path
        if interference != interferences[0]:
            own = path.with_name(f"{path.stem}-interference-{interference:g}{path.suffix}")
        figures.regimes(cells, own, rules, interference)
    return path


@exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    command = "python -m lab.simulate " + shlex.join(argv)
    argv = with_value(argv, "map", str(OUT / "map.png"))  # --map alone
    flags, _ = parse(Flags, argv, __doc__)
    check(flags)
    setting = Setting(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Setting)})
    rules = list(flags.rules)
    seeds = list(range(flags.first_seed, flags.first_seed + flags.seeds))
    if flags.map:
        print(draw_map(setting, rules, seeds, Path(flags.map), command=command))
    else:
        print(cell_table(compare_rules(setting, rules, seeds)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
