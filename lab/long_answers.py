"""A task of long answers, towards language models: a number is added to another, or taken from it, up to eight times.

    python -m lab.long_answers                          makes the model, in some ten minutes, and says what it is like
    python train.py @lab/recipes/long_answers.txt       trains it

What sets it apart from the embedded task (tasks/tiny.py), whose pupil and lessons it shares: answers of 60 to 200
tokens, of varying length for one prompt, too; an error can come at any of some twenty digits, and all that follows
builds on it; rollouts are about half of the cost; a visit moves a prompt little.

0317+0085*c= says: add 85 three times to 317. Its answer has a block for each time. It names the block, restates what is
added, works it out digit by digit with carries from the right, and now and then says the new total once more:

    a+008521014000=00402~0402b+00857...!0572

Only what stands behind the ! is judged.
"""

import math
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.config import OUT, exits, parse
from tasks import data, tiny

HOME = OUT / "long-model"
LETTERS = "abcdefgh"  # of the blocks
ALPHABET = f"{tiny.ALPHABET}*~!{LETTERS}"
BLOCK = 6 + tiny.ANSWER_TOKENS - 1  # its letter, what is added, the work
CHECK = 0.3  # chance that a block ends with its total once more
MOST_TOKENS = len(LETTERS) * (BLOCK + 5) + 6
TIMES_WEIGHTS = (0, 0, 5, 4, 3, 2, 1, 1)  # of one to eight times
SIZES, SIZE_WEIGHTS = (1, 2, 3), (0.2, 0.4, 0.4)  # digits of what is added
# With some twenty digits to an answer, few facts may be wrong for a prompt to come off at all.
ERRORS = ((0.0, 0.2, 0.5, 0.8), (0.86, 0.06, 0.04, 0.04))
ROWS = 1500
SHAPE = {
    "vocab_size": len(ALPHABET) + 2,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
LESSONS = (((1, 1), 600), ((3, 3, 2, 2, 1, 1, 1, 1), 400))  # weights of the times, steps: short answers first


class Chain:
    """Works out what a tiny.Pupil does one time of: a wrong digit goes into all that follows."""

    def __init__(self, times_weights=TIMES_WEIGHTS):
        self.pupil = tiny.Pupil(errors=ERRORS)
        self.times_weights = times_weights

    def questions(self, count: int, seed: int) -> list[str]:
        """As they come, with repeats."""
        rng = random.Random(seed)
        return [self.question(rng) for _ in range(count)]

    def question(self, rng: random.Random) -> str:
        (size,) = rng.choices(SIZES, SIZE_WEIGHTS)
        operand = rng.randrange(10 ** (size - 1), 10**size)
        (times,) = rng.choices(range(1, len(self.times_weights) + 1), self.times_weights)
        op = rng.choice("+-")
        start = rng.randrange(1000)
        if op == "-":
            start += times * operand  # so that no total is below zero
        return f"{start:04d}{op}{operand:04d}*{LETTERS[times - 1]}="

    def answer(self, question: str, rng: random.Random) -> str:
        total, rest, times = parts(question)
        text = ""
        for letter in LETTERS[:times]:
            work = self.pupil.answer(f"{total}{rest}=", rng)
            total = work[-tiny.WIDTH :]
            text += f"{letter}{rest}{work}"
            if rng.random() < CHECK:
                text += f"~{total}"
        return f"{text}!{total}"

    def pass_rate(self, question: str) -> float:
        """The chance that the pupil makes no error. Errors that make up for each other are left out."""
        total, rest, times = parts(question)
        rates = []
        for _ in range(times):
            rates.append(self.pupil.pass_rate(f"{total}{rest}="))
            total = f"{int(total) + int(rest):04d}"
        return math.prod(rates)


def parts(question: str) -> tuple[str, str, int]:
    """0317+0085*c= is 0317, +0085 and 3."""
    return question[:4], question[4:9], LETTERS.index(question[10]) + 1


def gold(question: str) -> str:
    total, rest, times = parts(question)
    return f"{int(total) + times * int(rest):04d}"


# ---------------------------------------------------------------- the task, as train.py takes it with --task


def rows() -> list[dict]:
    return [{"problem": question, "answer": gold(question)} for question in Chain().questions(ROWS, seed=0)]


def score(responses: list[str], golds: list[str]) -> list[float]:
    found = [re.fullmatch(r"[^!]*!(\d{4})", response) for response in responses]
    return [float(bool(match) and match[1] == gold) for match, gold in zip(found, golds, strict=True)]


# ---------------------------------------------------------------- the model


def taught() -> tuple:
    """The tokenizer, and a model that has learnt the pupil's habits."""
    tokenizer = tiny.make_tokenizer(ALPHABET)
    model = tiny.make_model(0, **SHAPE)
    for number, (times_weights, steps) in enumerate(LESSONS):
        loss = tiny.train(model, tokenizer, Chain(times_weights), seed=number, steps=steps)
        print(f"lesson {number + 1}: loss {loss:.4f}", flush=True)
    return tokenizer, model


@dataclass
class Flags:
    out: str = str(HOME)  # folder of the model; it is made unless it is there
    prompts: int = 256  # of those that a run trains on, answered to say what the model is like
    answers: int = 8  # to each of them


def properties(folder: Path, count: int, answers: int) -> str:
    """Parameters, lengths of answers and pass rates of the model in `folder`, measured on its first prompts."""
    from rollout import TransformersEngine
    from support.model import load_model

    pairs = [(row["problem"], row["answer"]) for row in rows()[:count]]
    model, tokenizer, stop_ids = load_model(str(folder))
    prompts, _ = data.encode(pairs, tokenizer, 2 * tiny.WIDTH + 4)
    started = time.process_time()
    groups = TransformersEngine(model, stop_ids, MOST_TOKENS).generate(prompts, answers, seed=0, step=0)
    seconds = time.process_time() - started

    # each figure with how it was meant to be
    rates = []
    for group, (_, answer) in zip(groups, pairs, strict=True):
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in group.tokens]
        rates.append(sum(score(texts, [answer] * answers)) / answers)
    meant = [Chain().pass_rate(question) for question, _ in pairs]
    lengths = [[len(tokens) for tokens in group.tokens] for group in groups]
    low, mid, high = np.quantile(lengths, (0.1, 0.5, 0.9))
    shares = np.histogram(rates, (0, 0.01, 0.25, 0.5, 0.75, 0.99, 1.01))[0] / count
    return (
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters\n"
        f"lengths: {np.min(lengths)} to {np.max(lengths)}, mean {np.mean(lengths):.0f}, tenths {low:.0f} {mid:.0f} "
        f"{high:.0f}; {np.ptp(lengths, axis=1).mean():.0f} from the shortest to the longest answer of a prompt\n"
        f"pass rates: mean {np.mean(rates):.3f}, the pupil's {np.mean(meant):.3f}, correlation "
        f"{np.corrcoef(rates, meant)[0, 1]:.2f}; shares at 0, below 1/4, 1/2, 3/4, 1, at 1: {shares.round(2)}\n"
        f"{np.sum(lengths) / seconds:,.0f} tokens a CPU second"
    )


@exits(2, ValueError, OSError)
def main(argv: list[str]) -> int:
    flags, _ = parse(Flags, argv, __doc__)
    folder = tiny.make_once(Path(flags.out), taught)
    print(f"the model is in {folder}")
    print(properties(folder, flags.prompts, flags.answers))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
