r"""Is this answer right? `grade(responses, golds)` says 1.0 or 0.0 for each.

1. If the response contains `</think>`, only the text after the last one is scored. An open `<think>` scores 0.
2. The answer is the content of the last `\boxed{...}`, braces matched; unclosed or empty scores 0.
3. No box scores 0.
4. Equality is mathematical and exact: 0.5 is 1/2, 0.333 is not 1/3. Lists are unordered, tuples ordered, [2,5) is
   not [2,5], and all that is in the box counts: `5 \text{ or } 6` is not 5, nor is `7=5`.
5. Units, degree, percent and currency signs may be there or not (5 cm is 5, though not 5 km). So may the name in `x
   = 5` (though x = 5 is not y = 5) and the braces of a set.
6. No response makes `grade` raise, costs more than 3 seconds of a processor and 1 GB, or costs another response its
   score. A busy machine changes no score.

What is equal is decided in tasks/answers.py, in child processes that tasks/grader.py can kill. Plain numbers and
known pairs need no child.
"""

import importlib.util
import os
import random
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from tasks.answers import LONGEST, matching_braces
from tasks.grader import Grader, VerifierBroken  # noqa: F401 (the error is for those who call `grade`)

Reward = Callable[[list[str], list], list[float]]  # responses and golds -> a reward from 0 to 1 for each

GRADER = Grader()
counts = GRADER.counts  # what became of the responses since the last call
start = GRADER.start  # for the trainer, before CUDA is there; `grade` starts the children if need be
BOX = re.compile(r"\\boxed\s*\{")
PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+(?:/0*[1-9]\d*)?|\d+\.\d*|\.\d+)")


def boxed(response: str) -> str | None:
    """The content of the last box (rules 1 to 3), or None."""
    text = response.rpartition("</think>")[2] if isinstance(response, str) else ""
    openings = [match.end() - 1 for match in BOX.finditer(text)]
    if "<think>" in text or not openings:
        return None
    # The last box counts, though it is never closed: what stands before it was no final answer.
    closing = matching_braces(text, openings[-1]).get(openings[-1])
    if closing is None:
        return None
    return text[openings[-1] + 1 : closing].strip() or None


def gold_text(gold) -> str:
    """The gold answer without its box; "" if there is none."""
    try:
        text = "" if gold is None else str(gold)
    except Exception:  # for example an int of 5000 digits
        return ""
    return (boxed(text) or "") if r"\boxed" in text else text.strip()


def quick(gold: str, answer: str | None) -> str | None:
    """A verdict that needs no child, else None."""
    if not answer:
        return "no_box"
    if len(answer) > LONGEST:
        return "too_long"
    if len(gold) > LONGEST:
        return "wrong"
    if answer == gold:
        return "right"
    # Most answers are plain numbers; their length is bounded by now, and they have no exponents.
    if PLAIN_NUMBER.fullmatch(gold) and PLAIN_NUMBER.fullmatch(answer):
        return "right" if Fraction(gold) == Fraction(answer) else "wrong"
    return None


def grade(responses: list[str], golds: list) -> list[float]:
    """1.0 for each response that is right, else 0.0. Any thread may call it. VerifierBroken if too many of
    the answers cannot be judged at all (grader.BROKEN)."""
    # Equal pairs are judged once: the answers of a group often are.
    pairs = []
    for response, gold in zip(responses, golds, strict=True):
        pairs.append((gold_text(gold), boxed(response)))
    verdicts = {pair: quick(*pair) for pair in pairs}

    # What is left needs a child.
    hard = Counter(pair for pair in pairs if verdicts[pair] is None)
    verdicts |= GRADER.judge(hard)

    GRADER.count([verdicts[pair] for pair in pairs])
    return [float(verdicts[pair] == "right") for pair in pairs]


def of_groups(groups: list, golds: list, tokenizer, function: Callable) -> list[list[float]]:
    """The rewards by `function` of all answers of each of `groups`; golds: one for each group."""
    texts = []
    wanted = []
    for group, gold in zip(groups, golds, strict=True):
        texts += [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in group.tokens]
        wanted += [gold] * len(group.tokens)
    rewards = iter(function(texts, wanted) if texts else [])
    return [[next(rewards) for _ in group.tokens] for group in groups]


# ---- other rewards


def grade_equation(responses: list[str], golds: list) -> list[float]:
    """For the embedded arithmetic task: `40503150=05354` is right for 5354. Only digits may follow `=`."""
    rewards = []
    for response, gold in zip(responses, golds, strict=True):
        text = response if isinstance(response, str) else ""
        found = re.fullmatch(r"[^=]*=([0-9]+)", text)
        wanted = re.fullmatch(r"[0-9]+", str(gold).strip())
        right = bool(found and wanted) and found[1].lstrip("0") == wanted[0].lstrip("0")
        rewards.append(float(right))
    return rewards


def grade_random(responses: list[str], golds: list) -> list[float]:
    """A coin for each response, equal ones too. The same call gets the same coins: a run can be repeated."""
    coins = random.Random(ascii((responses, golds)))
    return [float(coins.random() < 0.5) for _ in responses]


def grade_format(responses: list[str], golds: list) -> list[float]:
    """A box with something in it."""
    return [float(boxed(response) is not None) for response in responses]


def grade_always(responses: list[str], golds: list) -> list[float]:
    """Every group is dead, so that the model never changes: the noise of the evaluation."""
    return [1.0 for _ in responses]


CONTROLS = {"random": grade_random, "always": grade_always, "format": grade_format}  # they do not look at the gold
REWARDS = {"math": grade, "equation": grade_equation} | CONTROLS


# ---- a reward of the user's own


class RewardBroken(ValueError):
    """A user's reward function does not do what it has to."""


def load(name: str) -> Reward:
    """The reward called `name`, or the function in `path/to/file.py:function`, checked at every call
    (RewardBroken). ValueError or FileNotFoundError if there is none."""
    if name in REWARDS:
        return REWARDS[name]
    function = load_function(name)

    def checked(responses: list[str], golds: list) -> list[float]:
        try:
            rewards = function(responses, golds)
        except Exception as error:  # it is the user's code
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            what = f"{type(error).__name__}: {error}, line {line}"
            raise RewardBroken(f"--reward {name} failed ({what}); mend it, and go on with --resume") from error
        return check_rewards(name, rewards, len(responses))

    return checked


def load_function(name: str) -> Callable:
    """The function in `path/to/file.py:function`."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"--reward {name}: say {', '.join(REWARDS)} or path/to/file.py:function")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--reward {name}: there is no file {os.path.abspath(path)}")

    # The file becomes a module, wherever it lies.
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code
        raise ValueError(f"--reward {name}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"--reward {name}: define a function {function}(responses, golds) in {path}")
    return found


def check_rewards(name: str, rewards, count: int) -> list[float]:
    """The rewards as floats. RewardBroken unless they are `count` numbers from 0 to 1."""
    if hasattr(rewards, "tolist"):  # numpy's and torch's
        rewards = rewards.tolist()
    if not isinstance(rewards, list | tuple) or len(rewards) != count:
        raise RewardBroken(f"--reward {name}: return a list of {count} rewards, one for each response")

    # Each must be a number from 0 to 1, and no nan.
    checked = []
    for reward in rewards:
        if hasattr(reward, "item"):
            reward = reward.item()
        if not isinstance(reward, int | float) or not 0 <= reward <= 1:
            raise RewardBroken(f"--reward {name}: return numbers from 0 to 1, not {reward!r}")
        checked.append(float(reward))
    return checked
