"""A user's own file: a function that scores answers, or a task, which is its rows and their score.

    --reward my_reward.py:short     a function (responses, golds, ...) -> one number for each response
    --judge my_judge.py:right       the same, for held-out answers
    --task my_task.py               rows() -> list of dicts, each with a `problem`; and score(responses, golds, ...)

The first two arguments are the responses and their golds, as these stand in the data. Every further argument is asked
for by name: a column of the data, or one of OFFERED. One with a default may be missing there, and `**more` takes all.
"""

import functools
import inspect
import json
import math
import os
import random
from collections.abc import Callable

from support import limits
from support.config import line_in, load_file
from tasks import data

OFFERED = ("prompts", "lengths", "truncated")  # text or messages, tokens of the response, whether it was cut
MOST_HELD_OUT = 400  # problems of a task; at most a tenth of them


class RewardBroken(limits.UsersCodeBroken):
    """A user's function does not do what it has to."""


def is_own(name: str) -> bool:
    """Whether `name` is a function in a user's file."""
    return ".py:" in name


def module_of(path: str):
    """The module that a file is, loaded once: what its rows() leaves there its score() finds."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.path.abspath(path)}")
    return load_once(path, os.path.getmtime(path))


@functools.cache
def load_once(path: str, _changed: float):
    return load_file(path)


def function_of(path: str, name: str, arguments: str) -> Callable:
    found = getattr(module_of(path), name, None)
    if not callable(found):
        raise ValueError(f"{path} lacks {name!r}: define a function {name}({arguments})")
    return found


class Scorer:
    """A function of a user's, `path/to/file.py:function`, checked at every call. ValueError or FileNotFoundError, in
    one line, where it cannot be had."""

    def __init__(self, name: str):
        self.name = name
        self.path, _, function = name.rpartition(":")
        self.function = function_of(self.path, function, "responses, golds")
        try:
            parameters = list(inspect.signature(self.function).parameters.values())
        except ValueError as error:  # something built in
            raise ValueError(f"{name} has no signature to read; define it with def") from error

        # Two arguments by their place. Which others there have to be, and which there may be.
        first = [one for one in parameters[:2] if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        if len(first) < 2:
            raise ValueError(f"{name} must take the responses and the golds first: def {function}(responses, golds)")
        further = parameters[2:]
        self.takes_all = any(one.kind == one.VAR_KEYWORD for one in further)
        named = [one for one in further if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        self.needed = [one.name for one in named if one.default is one.empty]
        self.wanted = [one.name for one in named]

    def check(self, prompts: list) -> None:
        """ValueError unless each of `prompts` has the columns that the function needs."""
        for name in self.needed:
            lacking = [prompt for prompt in prompts if name not in OFFERED and name not in (prompt.row or {})]
            if lacking:
                there = ", ".join([*(lacking[0].row or {}), *OFFERED])
                where = "" if len(lacking) == len(prompts) else f" in {len(lacking)} of {len(prompts)} rows"
                raise ValueError(f"{self.name} asks for a column {name!r} that is not there{where}; there is {there}")

    def __call__(self, responses: list[str], golds: list, **columns: list) -> list[float]:
        """One reward for each response. RewardBroken for anything else."""
        try:
            with limits.within(limits.SECONDS):
                rewards = self.function(responses, golds, **columns)
        except (Exception, SystemExit, limits.TookTooLong) as error:  # it is the user's code
            what = " ".join(f"{type(error).__name__}: {error}".split())
            line = line_in(self.path, error) or inspect.unwrap(self.function).__code__.co_firstlineno
            raise RewardBroken(f"{self.name} failed at {self.path}, line {line} ({what})") from error
        return check_rewards(self.name, rewards, len(responses))

    def of_prompts(self, responses: list[str], prompts: list, lengths: list[int], truncated: list[bool]) -> list[float]:
        """One reward for each response to the prompt (with text, gold and row) at its place."""
        offered = {"prompts": [prompt.text for prompt in prompts], "lengths": lengths, "truncated": truncated}
        names = list(self.wanted)
        if self.takes_all and prompts:
            names += [name for name in [*OFFERED, *(prompts[0].row or {})] if name not in names]
        columns = {}
        for name in names:
            if name in OFFERED:
                columns[name] = offered[name]
            elif all(name in (prompt.row or {}) for prompt in prompts):
                columns[name] = [prompt.row[name] for prompt in prompts]
        return self(responses, [prompt.gold for prompt in prompts], **columns)


def check_rewards(name: str, rewards, count: int) -> list[float]:
    """The rewards as floats. RewardBroken unless they are `count` finite numbers."""
    rewards = limits.plain(rewards)
    if not isinstance(rewards, list):
        raise RewardBroken(
            f"{name}: return a list of {count} rewards, one for each response, not {type(rewards).__name__}"
        )
    if len(rewards) != count:
        raise RewardBroken(f"{name}: return a list of {count} rewards, one for each response, not of {len(rewards)}")
    checked = []
    for reward in rewards:
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise RewardBroken(f"{name}: return finite numbers, not {reward!r}")
        checked.append(float(reward))
    return checked


# ---- a task


def is_task(name: str) -> bool:
    return name.endswith(".py")


def problems(task: str) -> tuple[list[tuple], list[tuple], str]:
    """Rows to train on and held-out ones (problem, answer, gold, row) of a task in a file, and a line about them. The
    split depends on the rows alone, so that eval.py asks what training has held out. ValueError or FileNotFoundError,
    in one line."""
    make = function_of(task, "rows", "")
    function_of(task, "score", "responses, golds")
    try:
        with limits.within(limits.SECONDS):
            rows = list(make())
    except (Exception, SystemExit, limits.TookTooLong) as error:  # it is the user's code
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"rows() of {task} failed at line {line_in(task, error)} ({what})") from error
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"rows() of {task}: row {n} is {type(row).__name__}; return dicts, each with a `problem`")

    # Rows are as the file made them; only what is asked twice goes, as one of the two might be held out.
    kept = {}
    for pair in data.from_rows(rows, f"rows() of {task}", keep="any gold"):
        kept.setdefault(json.dumps(pair[0]), pair)
    pairs = list(kept.values())
    held = random.Random(0).sample(range(len(pairs)), min(MOST_HELD_OUT, len(pairs) // 10))
    training = [pair for i, pair in enumerate(pairs) if i not in set(held)]
    line = f"task: {task}: {len(rows):,} rows, {len(rows) - len(pairs):,} repeated; {len(held):,} held out"
    return training, [pairs[i] for i in held], line
