"""Tasks of reasoning-gym, more than 100, each of which makes its rows and has a scorer: `pip install reasoning-gym`.

    --task gym:countdown                                 by its name; `python -m tasks.gym` lists them
    --task gym:countdown,min_numbers=3,max_value=20      with settings of its own; a value as in JSON
    --task gym:countdown,size=3000+chain_sum,size=1000   a mixture, by the sizes of its parts
    --task gym:mini_countdown                            three numbers up to 20, for which a small model is made

Every part takes `size` (rows to train on, 2,000 by default) and `seed` too. Held-out rows come from another seed. Rows
of isomorphic_strings, polynomial_multiplication and ransom_note change with PYTHONHASHSEED.

An answer is what stands between the last <answer> and </answer> of a response, behind any </think>. A scorer gives it a
number from 0 to 1, and few give 0 to a wrong one: Countdown gives 0.01 or 0.05. So the reward `gym` is 1 from RIGHT on,
and 0 below; else hardly a group would be dead, and 0.04 more than the others would be a full advantage. With
--partial-credit it is the number as it is.
"""

import base64
import dataclasses
import difflib
import importlib.metadata
import json
import pickle
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from support.config import GYM
from tasks import own

PACKAGE = "reasoning-gym==0.1.25"
RIGHT = 0.99
SIZE = 2000  # rows of a part to train on
# Row i of a seed s is in most tasks row 0 of the seed s + i. So the seed of held-out rows is far away.
FAR = 10**9
MOST_SHARE = 0.2  # held-out rows are at most so many of those to train on, and at most own.MOST_HELD_OUT
LONGEST = 20_000  # characters of an answer
CHILD = Path(__file__).with_name("gym_child.py")
INSTRUCTION = "\n\nReason step by step, and put the final answer alone between <answer> and </answer>."

# Our own names: a task of reasoning-gym with other defaults.
VARIATIONS = {
    "mini_countdown": (
        "countdown",
        {
            "min_numbers": 3,
            "max_numbers": 3,
            "max_value": 20,
            "min_target": 1,
            "max_target": 99,
            "operators": ["+", "-", "*"],
            "size": 1000,
        },
    )
}


def is_task(name: str) -> bool:
    return name.startswith(GYM)


def short(name: str) -> str:
    """A task's name, as a file may be called."""
    return re.sub(r"[^\w.+-]+", "-", name.removeprefix(GYM))


def library():
    """The modules reasoning_gym and reasoning_gym.factory. ValueError if they are not installed."""
    try:
        import reasoning_gym
        from reasoning_gym import factory
    except ImportError as error:
        raise ValueError(f"--task {GYM}NAME needs reasoning-gym: pip install {PACKAGE} ({error})") from error
    return reasoning_gym, factory


def names() -> list[str]:
    """Of all tasks."""
    _, factory = library()
    return sorted({*factory.DATASETS, *VARIATIONS} - {"composite"})  # which is a mixture


# ---------------------------------------------------------------- from a name to rows


@dataclasses.dataclass
class Part:
    """One task of a mixture: how it was named, its name in reasoning-gym, and all of its settings."""

    named: str
    name: str
    settings: dict
    size: int
    seed: int


def parts_of(task: str) -> list[Part]:
    """The parts of `gym:NAME,SETTING=VALUE+NAME`. ValueError, in one line, for an unknown task or setting."""
    _, factory = library()
    parts = []
    for text in re.split(r"\+(?=[a-z])", task.removeprefix(GYM)):
        named, *given = re.split(r",(?=\w*=)", text)
        if named not in names():
            near = difflib.get_close_matches(named, names(), n=3, cutoff=0.5)
            hint = f"the nearest are {', '.join(near)}" if near else "`python -m tasks.gym` lists them"
            raise ValueError(f"--task {task}: reasoning-gym has no task {named!r}; {hint}")
        name, settings = VARIATIONS.get(named, (named, {}))
        known = [field.name for field in dataclasses.fields(factory.DATASETS[name][1])]
        settings = dict(settings)
        for pair in given:
            setting, _, value = pair.partition("=")
            if setting not in known:
                raise ValueError(f"--task {task}: {named} has no setting {setting!r}; it has {', '.join(known)}")
            settings[setting] = as_json(value)
        size = settings.pop("size", SIZE)
        seed = settings.pop("seed", 0)
        if type(size) is not int or type(seed) is not int or not 1 <= size < FAR or not 0 <= seed < FAR:
            raise ValueError(f"--task {task}: size and seed are whole numbers, got {size!r} and {seed!r}")
        parts.append(Part(named, name, settings, size, seed))
    return parts


def as_json(text: str):
    try:
        return json.loads(text)
    except ValueError:  # a text without quotes
        return text


def entries(part: Part, seed: int, count: int) -> list[dict]:
    """What reasoning-gym makes: dicts of question, answer and metadata. ValueError if it refuses the settings."""
    gym, _ = library()
    try:
        made = gym.create_dataset(part.name, **part.settings, seed=seed, size=count)
        return [made[i] for i in tqdm(range(count), desc=f"rows of {part.named}", leave=False, disable=None)]
    except Exception as error:  # asserts, wrong types, and ranges in which there is no row
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{GYM}{part.named} with {part.settings} cannot be made ({what})") from error


def text_of(entry: dict) -> str:
    """What the model is asked."""
    return entry["question"].strip() + INSTRUCTION


def rows_of(parts: list[Part], shift: int, share: float) -> list[tuple]:
    """(problem, answer, entry, row) of all parts, no problem twice: `share` of their sizes, from seeds moved by
    `shift`. They are shuffled, as --max-prompts and --eval-prompts take the first."""
    rows = {}
    for stage, part in enumerate(parts):
        for entry in entries(part, part.seed + shift, max(int(share * part.size), 1)):
            row = {"task": part.named, "stage": stage, "settings": part.settings}
            rows.setdefault(text_of(entry), (text_of(entry), str(entry["answer"]), entry, row))
    shuffled = list(rows.values())
    random.Random(0).shuffle(shuffled)
    return shuffled


def held_out(task: str) -> list[tuple]:
    """The rows of a task that are never trained on (problem, answer, entry, row). ValueError in one line."""
    parts = parts_of(task)
    total = sum(part.size for part in parts)
    return rows_of(parts, FAR, min(own.MOST_HELD_OUT / total, MOST_SHARE))


def problems(task: str) -> tuple[list[tuple], list[tuple], str]:
    """Rows to train on and held-out ones, and a line about them; no problem is in both. ValueError in one line."""
    parts = parts_of(task)
    never = held_out(task)
    asked = {row[0] for row in never}
    training = [row for row in rows_of(parts, 0, 1.0) if row[0] not in asked]
    total = sum(part.size for part in parts)
    version = importlib.metadata.version("reasoning-gym")
    line = f"task: {task}: reasoning-gym {version}: {total:,} rows, {total - len(training):,} repeated or held out"
    return training, never, f"{line}; {len(never):,} held out"


# ---------------------------------------------------------------- rewards


def answer_in(response: str) -> str | None:
    """What stands in the last answer's tags, or None; an open <think> has no answer."""
    text = response.rpartition("</think>")[2]
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if "<think>" in text or not found:
        return None
    return found[-1].strip() or None


def packed(settings: dict, entry: dict) -> str:
    """Text for a child (gym_child.py). Pickled: as JSON an entry of ARC would have lists for tuples, and all answers to
    it would be wrong. Equal texts are one object, as the grader keeps one for each answer."""
    return sys.intern(base64.b64encode(pickle.dumps((settings, entry))).decode())


class Scorer(own.Scorer):
    """The reward `gym`. grader: has children that run CHILD. count: a function that takes the list of what became of
    the responses. partial: the score as it is, where else it is 1 from RIGHT on, and 0 below."""

    def __init__(self, grader, count: Callable, partial: bool):
        self.partial = partial
        self.grader = grader
        self.count = count

    def check(self, prompts: list) -> None:
        """ValueError unless all `prompts` come from reasoning-gym."""
        if not all(isinstance(prompt.gold, dict) and "metadata" in prompt.gold for prompt in prompts):
            raise ValueError(f"--reward gym scores tasks of reasoning-gym; give --task {GYM}NAME")

    def of_prompts(self, responses: list[str], prompts: list, lengths: list[int], truncated: list[bool]) -> list[float]:
        """The score of each response to the prompt (with gold and row) at its place. VerifierBroken as for maths."""
        pairs = []
        for response, prompt in zip(responses, prompts, strict=True):
            pairs.append((packed(prompt.row["settings"], prompt.gold), answer_in(response)))
        verdicts = {pair: quick(pair[1]) for pair in pairs}
        verdicts |= self.grader.judge(Counter(pair for pair in pairs if verdicts[pair] is None))

        # A child's word is a score, or what became of the child.
        rewards = []
        kinds = []
        for pair in pairs:
            scored = verdicts[pair][0].isdigit()
            score = float(verdicts[pair]) if scored else 0.0
            kinds.append(("right" if score >= RIGHT else "wrong") if scored else verdicts[pair])
            rewards.append(score if self.partial else float(score >= RIGHT))
        self.count(kinds)
        return rewards


def quick(answer: str | None) -> str | None:
    """A verdict that needs no child, else None."""
    if answer is None:
        return "no_box"
    return "too_long" if len(answer) > LONGEST else None


if __name__ == "__main__":
    print("\n".join(names()))
