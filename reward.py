r"""Is this answer right? `grade(responses, golds)` says 1.0 or 0.0 for each.

1. If the response contains `</think>`, only the text after the last one is scored. A `<think>` left open scores 0.
2. The answer is the content of the last `\boxed{...}`, braces matched; unclosed or empty scores 0.
3. No box scores 0.
4. Equality is mathematical and exact: 0.5 is 1/2, 0.333 is not 1/3. Lists are unordered, tuples ordered, [2,5) is not
   [2,5], and all that is in the box counts: `5 \text{ or } 6` is not 5, nor is `7=5`.
5. Units, degree, percent and currency signs may be there or not (5 cm is 5, though not 5 km). So may the name in
   `x = 5` (though x = 5 is not y = 5) and the braces of a set.
6. No response makes `grade` raise, costs more than 3 seconds and 1 GB, or costs another response its score.

What is equal is decided in `answers.py`, in child processes, which are killed when they take too long: sympy cannot be
stopped in any other way. Plain numbers and known pairs need no child.
"""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from multiprocessing.connection import wait

from tasks import answers
from tasks.answers import LONGEST

SECONDS = 1.7  # for one answer, from the moment a child takes it
START_SECONDS = 60.0  # for a child to import sympy; 0.5 on a quiet machine
CACHED = 100_000  # verdicts kept
BROKEN = 0.2  # more than this share of the answers that need a child fail: the verifier is broken, not the answers


def boxed(response: str) -> str | None:
    """The content of the last box (rules 1 to 3), or None."""
    text = response.rpartition("</think>")[2] if isinstance(response, str) else ""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    if "<think>" in text or not starts:
        return None
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[starts[-1] :], re.DOTALL):  # "\\." steps over \{ and \}
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return text[starts[-1] :][: match.start()].strip() or None
    return None


def gold_text(gold) -> str:
    """The gold answer without its box; "" if there is none."""
    try:
        text = "" if gold is None else str(gold)
    except Exception:  # for example an int of 5000 digits
        return ""
    return (boxed(text) or "") if "\\boxed" in text else text.strip()


class VerifierBroken(RuntimeError):
    """Too many answers could not be judged at all: their zeros would be no verdicts."""


class RewardBroken(ValueError):
    """A user's reward function does not do what it has to."""


# ---- the children, one for each thread of a pool

_mine, _lock, _pools, _cache, _counts = threading.local(), threading.Lock(), {}, {}, Counter()


def start(workers: int = 2) -> ThreadPoolExecutor:
    """Start the children (`grade` does so if need be)."""
    with _lock:
        if os.getpid() not in _pools:  # threads do not survive a fork
            _pools[os.getpid()] = ThreadPoolExecutor(workers, "reward")
            for _ in range(workers):
                _pools[os.getpid()].submit(ask, "x", "x")
    return _pools[os.getpid()]


def spawn() -> None:
    """A new child for this thread."""
    # not multiprocessing, which would import the trainer's __main__ once more
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LD_PRELOAD": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "bufsize": 0}
    command = [sys.executable, "-P", os.path.abspath(answers.__file__)]
    _mine.child, _mine.ready = subprocess.Popen(command, env=environ, start_new_session=True, **pipes), False


def hear(seconds: float) -> str:
    """The child's next word. TimeoutError if it takes longer than `seconds`, EOFError if it is dead."""
    if not wait([_mine.child.stdout], seconds):
        raise TimeoutError
    if not (word := _mine.child.stdout.readline()):
        raise EOFError
    return word.decode().strip()


def ask(gold: str, answer: str) -> str:
    """The verdict of this thread's child: right, wrong, timeouts, kills, or failed if it cannot even start."""
    if not hasattr(_mine, "child"):
        spawn()
    for _ in range(3):  # more than once only if someone else killed the child
        try:
            _mine.ready = _mine.ready or hear(START_SECONDS) == "ready"
            _mine.child.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            return hear(SECONDS)
        except TimeoutError:
            verdict, again = "timeouts", False
            _mine.child.kill()
        except (EOFError, OSError):
            verdict, again = "kills", _mine.child.wait() in (0, -signal.SIGKILL, -signal.SIGTERM)
        was_ready = _mine.ready
        _mine.child.wait()
        spawn()  # at once, so that the next answer need not wait
        if not again:
            return verdict if was_ready else "failed"
    return "failed"  # three children lost to something else than this answer


def quick(gold: str, answer: str) -> str | None:
    """A verdict that needs no child, else None."""
    if not answer:
        return "no_box"
    if max(len(gold), len(answer)) > LONGEST:
        return "too_long" if len(answer) > LONGEST else "wrong"
    if answer == gold:
        return "right"
    plain = r"[-+]?(?:\d+(?:/0*[1-9]\d*)?|\d+\.\d*|\.\d+)"
    if re.fullmatch(plain, gold) and re.fullmatch(plain, answer):
        return "right" if Fraction(gold) == Fraction(answer) else "wrong"
    return _cache.get((gold, answer))


def grade(responses: list[str], golds: list) -> list[float]:
    """1.0 for each response that is right, else 0.0. VerifierBroken if more than BROKEN of them cannot be judged."""
    pairs = [(gold_text(gold), boxed(response)) for response, gold in zip(responses, golds, strict=True)]
    verdicts = {pair: quick(*pair) for pair in pairs}
    hard = Counter(pair for pair in pairs if verdicts[pair] is None)
    jobs, failed = {pair: start().submit(ask, *pair) for pair in hard}, 0
    try:
        for pair, job in jobs.items():
            verdicts[pair] = "failed" if job.exception() else job.result()
            failed += hard[pair] * (verdicts[pair] == "failed")
            if hard.total() >= 20 and failed > BROKEN * hard.total():
                why = f"the verifier failed on {failed} of {hard.total()} answers, so scores would mean nothing"
                raise VerifierBroken(f"{why}; `{sys.executable} {answers.__file__}` shows the error")
    finally:
        for job in jobs.values():
            job.cancel()
    with _lock:
        for pair in verdicts:
            if verdicts[pair] in ("right", "wrong"):
                _cache[pair] = _cache.pop(pair, verdicts[pair])  # the latest used comes last
        while len(_cache) > CACHED:
            del _cache[next(iter(_cache))]
        _counts.update(verdicts[pair] for pair in pairs)
    return [float(verdicts[pair] == "right") for pair in pairs]


def counts() -> dict[str, int]:
    """What became of the responses since the last call: each is counted once."""
    with _lock:
        _counts["graded"] = _counts.pop("right", 0) + _counts.pop("wrong", 0)
        names = ("graded", "no_box", "too_long", "timeouts", "kills", "failed")
        return {f"reward_{name}": _counts.pop(name, 0) for name in names}


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
    """For the embedded arithmetic task: `40503150=05354` is right for 5354. One `=`, then digits and nothing else."""
    found = [re.fullmatch(r"[^=]*=([0-9]+)", text) if isinstance(text, str) else None for text in responses]
    wanted = [re.fullmatch(r"([0-9]+)", gold_text(gold)) for gold in golds]
    return [float(bool(a and b) and a[1].lstrip("0") == b[1].lstrip("0")) for a, b in zip(found, wanted, strict=True)]


def grade_random(responses: list[str], golds: list) -> list[float]:
    """A coin for each response, equal ones too. The same call gets the same coins, so that a run can be repeated."""
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


def load(name: str) -> Callable[[list[str], list], list[float]]:
    """The reward called `name`, or the function in `path/to/file.py:function`, checked at every call (RewardBroken).
    ValueError or FileNotFoundError if there is none."""
    if name in REWARDS:
        return REWARDS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"--reward {name}: say {', '.join(REWARDS)} or path/to/file.py:function")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--reward {name}: there is no file {os.path.abspath(path)}")
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code
        raise ValueError(f"--reward {name}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    user = getattr(module, function, None)
    if not callable(user):
        raise ValueError(f"--reward {name}: define a function {function}(responses, golds) in {path}")

    def checked(responses, golds):
        try:
            rewards = user(responses, golds)
        except Exception as error:  # it is the user's code
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            what = f"{type(error).__name__}: {error}, line {line}"
            raise RewardBroken(f"--reward {name} failed ({what}); mend it, and go on with --resume") from error
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards  # numpy, torch
        if not isinstance(rewards, list | tuple) or len(rewards) != len(responses):
            raise RewardBroken(f"--reward {name}: return a list of {len(responses)} rewards, one for each response")
        rewards = [reward.item() if hasattr(reward, "item") else reward for reward in rewards]
        for reward in rewards:
            if not isinstance(reward, int | float) or not 0 <= reward <= 1:
                raise RewardBroken(f"--reward {name}: return numbers from 0 to 1, not {reward!r}")
        return [float(reward) for reward in rewards]

    return checked
