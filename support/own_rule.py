"""A rule in a user's file. What it gives back is checked at every call, so that a mistake ends in one line that names
file and line, and not steps later in somebody else's code.

The project's own rules are not checked here: the contract in tests/test_samplers.py and tests/test_stores.py holds
them, and a user's rule too (`--rule my_rule.py:Pace`).
"""

import contextlib
import io
import math
import pickle
from collections.abc import Iterator

import torch

from support import limits
from support.config import is_own, line_in
from support.epochs import Epochs

OF_THE_LOOP = ("step", "rollouts", "tokens", "lr", "reward", "eval_accuracy", "seconds_total")  # figures of its own


class RuleBroken(limits.UsersCodeBroken):
    """A user's rule does not do what it has to."""


def guarded(kind: type) -> type:
    """A class of a user's file with all that it returns checked; one of the project's as it is."""
    if not is_own(kind):
        return kind
    checks = CheckedSampler if hasattr(kind, "draw") else CheckedStore
    return type(kind.__name__, (checks, kind), {"__module__": kind.__module__})


def broken(rule, method: str, error: BaseException) -> RuleBroken:
    """What to raise for an `error` in a method of the rule: it names the user's line, if one was met."""
    path = type(rule).__module__.removeprefix("file ")
    line = line_in(path, error)
    where = f"{path}, line {line}" if line else path
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return RuleBroken(f"{type(rule).__name__}.{method} failed at {where} ({what})")


@contextlib.contextmanager
def blamed(rule, method: str) -> Iterator[None]:
    """What goes wrong in the block is the fault of this method of the rule."""
    try:
        with limits.within(limits.SECONDS):
            yield
    except RuleBroken:
        raise
    except (Exception, SystemExit, limits.TookTooLong) as error:  # it is the user's code
        raise broken(rule, method, error) from error


class Checked:
    """What is asked of samplers and of stores alike. It stands before the user's class, which `super` calls."""

    def __init__(self, *args, **settings):
        try:
            super().__init__(*args, **settings)
        except ValueError:
            raise  # the rule's own word on a setting
        except Exception as error:
            raise broken(self, "__init__", error) from error
        missing = [name for name in self.STATE if not hasattr(self, name)]
        if missing:
            raise RuleBroken(
                f"{type(self).__name__}.STATE names {', '.join(missing)}, which __init__ does not set; it has to call "
                "super().__init__, with num_prompts and seed if the rule chooses prompts"
            )
        self.state_dict()

    def state_dict(self) -> dict:
        """RuleBroken if it could not be read back as a checkpoint is: without code."""
        with blamed(self, "state_dict"):
            state = super().state_dict()
        for name, value in state.items():
            file = io.BytesIO()
            try:
                torch.save(value, file)
                file.seek(0)
                torch.load(file, weights_only=True)
            except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
                raise RuleBroken(
                    f"{type(self).__name__}.{name} is in STATE, but a checkpoint cannot keep it: take arrays and "
                    "generators of numpy, tensors, plain numbers and texts, and lists, sets and dicts of these"
                ) from error
        return state

    def attach(self, run) -> None:
        with blamed(self, "attach"):
            super().attach(run)

    def figures(self, *step) -> dict:
        """Numbers, and lists of numbers. One that is not finite is left out of the row."""
        with blamed(self, "figures"):
            found = super().figures(*step)
            if not isinstance(found, dict):
                raise TypeError(f"it returned {kind_of(found)}, not a dict of figures")
            checked = {}
            for name, value in found.items():
                if name in OF_THE_LOOP:
                    raise ValueError(f"{name!r} is a figure of the loop; give it another name")
                value = limits.plain(value)
                parts = value if isinstance(value, list) else [value]
                if not all(isinstance(part, int | float) for part in parts):
                    raise TypeError(f"{name!r} is {kind_of(value)}, neither a number nor a list of numbers")
                if all(map(math.isfinite, parts)):
                    checked[name] = value
        return checked


class CheckedSampler(Checked):
    """A rule that chooses prompts."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        if not isinstance(self, Epochs):
            raise RuleBroken(f"{type(self).__name__} chooses prompts: derive it from replay.Uniform")

    def draw(self, n: int, step: int) -> list[int]:
        """Different prompts, at most n, none of which was drawn before in this step. What the rule has not put into the
        batch itself, by `take`, is put there now."""
        self.begin(n, step)
        before = set(self.batch)  # of a refill: what was drawn earlier in this step
        with blamed(self, "draw"):
            numbers = self.numbers(super().draw(n, step), n)
            twice = {x for x in numbers if numbers.count(x) > 1} | (set(numbers) & before)
            if twice:
                raise ValueError(f"prompt {min(twice)} was drawn twice in step {step}")
            if not numbers and not before:
                raise ValueError(f"no prompt was drawn in step {step}; at least one is needed")
            self.take([x for x in numbers if x not in self.batch])
            self.replays = {int(x) for x in self.replays} & self.batch
        return numbers

    def numbers(self, drawn, n: int) -> list[int]:
        drawn = limits.plain(drawn)
        if not isinstance(drawn, list):
            raise TypeError(f"it returned {kind_of(drawn)}, not a list of prompts")
        if len(drawn) > n:
            raise ValueError(f"{len(drawn)} prompts were drawn where {n} were asked for")
        for x in drawn:
            if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < len(self.seen):
                raise ValueError(f"it drew {x!r}; prompts are the whole numbers from 0 to {len(self.seen) - 1}")
        return drawn

    def observe(self, prompts: list[int], num_correct: list[float], num_answers, step: int) -> None:
        with blamed(self, "observe"):
            super().observe(prompts, num_correct, num_answers, step)


class CheckedStore(Checked):
    """A rule that completes batches."""

    def watch(self, groups: list, step: int) -> None:
        with blamed(self, "watch"):
            super().watch(groups, step)

    def complete(self, useful: list, places: int, step: int) -> list:
        """Groups, each with as many advantages as answers."""
        with blamed(self, "complete"):
            batch = super().complete(useful, places, step)
            if not isinstance(batch, list | tuple):
                raise TypeError(f"it returned {kind_of(batch)}, not a list of groups")
            for group in batch:
                if not isinstance(group, self.stored.kind):
                    raise TypeError(f"the batch holds {kind_of(group)}, where replay.Group belongs")
                sizes = {len(group.tokens), len(group.logprobs), len(group.truncated), len(group.advantages)}
                if len(sizes) > 1:
                    raise ValueError(f"a group of prompt {group.prompt} has lists of different lengths; see Group.pick")
        return list(batch)

    def learn(self, trained: dict) -> None:
        with blamed(self, "learn"):
            super().learn(trained)


def kind_of(value) -> str:
    return "None" if value is None else type(value).__name__
