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

import random
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

from support.config import EACH, meant, scorer_of
from tasks import data, gym, own, stages
from tasks.answers import LONGEST, matching_braces
from tasks.grader import Grader, VerifierBroken  # noqa: F401 (the errors are for those who call these functions)
from tasks.own import RewardBroken  # noqa: F401

Reward = Callable[[list[str], list], list[float]]  # responses and golds -> a number for each; 1 is right, 0 wrong

GRADER = Grader()
counts = GRADER.counts  # what became of the responses since the last call
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


def start(*rewards: Reward) -> None:
    """Starts the children of `grade` if it is one of `rewards`: for the trainer, before CUDA is there. Without this
    the first answer starts them."""
    if grade in rewards:
        GRADER.start()


def of_groups(groups: list, prompts: list, tokenizer, function: Callable) -> list[list[float]]:
    """The rewards by `function` of all answers of each of `groups`; prompts: one for each group."""
    texts = []
    asked = []
    for group, prompt in zip(groups, prompts, strict=True):
        texts += [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in group.tokens]
        asked += [prompt] * len(group.tokens)
    if not texts:
        return []

    # A function of the user's may ask for more than the gold.
    if isinstance(function, own.Scorer):
        lengths = [len(tokens) for group in groups for tokens in group.tokens]
        truncated = [cut for group in groups for cut in group.truncated]
        rewards = iter(function.of_prompts(texts, asked, lengths, truncated))
    else:
        rewards = iter(function(texts, [prompt.answer for prompt in asked]))
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
GYM = Grader(script=gym.CHILD)  # its children have reasoning-gym's scorers
PARTIAL = {partial: gym.Scorer(GYM, GRADER.count, partial) for partial in (False, True)}
REWARDS = {"math": grade, "equation": grade_equation, "gym": PARTIAL[False]} | CONTROLS


# ---- by name


def load(name: str) -> Reward:
    """The reward called `name`, or the function in `path/to/file.py:function`. ValueError or FileNotFoundError if there
    is none."""
    if name in REWARDS:
        return REWARDS[name]
    if not own.is_own(name):
        choices = f"{', '.join(REWARDS)} or path/to/file.py:function"
        raise ValueError(f"no reward {name!r}: say {choices}{meant(name, REWARDS)}")
    return own.Scorer(name)


def choose(cfg) -> tuple[Reward, Reward]:
    """What a run is trained on, and what scores its held-out answers."""
    return of_run(cfg, cfg.reward, cfg.partial_credit), of_run(cfg, judge_of(cfg))


def of_run(cfg, name: str, partial: bool = False) -> Reward:
    """`load`, where the reward may be that of each task, or reasoning-gym's with partial credit."""
    if name == EACH and cfg.then:
        scores = [of_run(cfg, scorer_of(task), partial) for task in (cfg.task, *cfg.then)]
        return stages.Scorer(scores)
    return PARTIAL[partial] if name == "gym" else load(name)


def judge_of(cfg) -> str:
    """The name of what scores held-out answers: --judge, or the task's own verifier. Rows of a user's file have none of
    their own, so that they are judged by the reward that was named for them."""
    if cfg.judge:
        return cfg.judge
    if cfg.task:
        return scorer_of(cfg.task, cfg.then)
    if not cfg.data:
        return "equation"
    return "math" if data.source_of(cfg.data) or cfg.reward in CONTROLS else cfg.reward
