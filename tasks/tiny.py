"""The embedded model and task: a small Qwen3 in ordinary Hugging Face format, made in about a minute on a CPU.

    python -m tasks.tiny --out tiny-model
    python -m tasks.tiny --out tiny-model-none --sharing none

It is taught by an error-prone pupil, so that it stands where a pretrained language model stands before RL: it can do
the task, but not reliably. Each digit fact (op, a, b) has a fixed error rate, drawn once (half 0, some 0.5, a third
0.9), and a fixed wrong digit; the model learns both habits. A prompt's pass rate is then the product of (1 - error
rate) over its columns, which is U-shaped over prompts as it is for real models: many are never solved, some always.
GRPO has to turn the habits over.

A worked answer writes digit and carry of each column from the right, then the result: 2440+2914= 40503150=05354.

What one prompt teaches about others decides whether replay pays (lab/LOG.md), so it can be chosen, `--sharing`:

    digits   200 digit facts, each in some thirty of the 2,000 prompts: what one teaches, many need
    columns  the same facts with an error rate of their own in each column: 800, each in some eight prompts
    none     512 prompts to know by heart, 4071 =37: whatever is learnt on one is of no use to another
"""

import argparse
import fcntl
import functools
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from support.config import OUT
from tasks import data

ALPHABET = "0123456789+-="
STEPS = {"digits": 1600, "columns": 3000, "none": 1600}  # of its training, for each --sharing
LOOKUPS = 512  # prompts of --sharing none
HELD_OUT = 400  # problems
# What replaces the defaults of train.py, for a demo of minutes.
SETTINGS = {
    "prompts_per_step": 16,
    "answers_per_prompt": 8,
    "max_prompt_tokens": 32,
    "max_tokens": 15,
    "lr": 5e-4,
    "steps": 600,
    "eval_every": 20,
    "eval_prompts": 400,
    "save_every": 50,
    "reward": "equation",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "threads": 1,
}
# The embedded task: zero-padded operands of one to four digits, `0473+0292=`: a model this small does not learn to
# align digits of varying place. The mix of sizes gives the untrained model about 0.27.
WIDTH = 4
ANSWER_TOKENS = 3 * WIDTH + 3  # two a column, '=', the result with one digit more, end of text
SIZES, SIZE_WEIGHTS = (1, 2, 3, 4), (0.06, 0.44, 0.25, 0.25)


def arithmetic(count: int, seed: int = 0) -> list[data.Pair]:
    """`count` different (question, answer) pairs of the embedded task, e.g. ('0473+0292=', '765')."""
    rng = random.Random(seed)
    pairs: dict[str, str] = {}
    for _ in range(50 * count + 1000):
        if len(pairs) == count:
            return list(pairs.items())
        size = rng.choices(SIZES, SIZE_WEIGHTS)[0]
        a, b = (rng.randrange(10 ** (size - 1) if size > 1 else 0, 10**size) for _ in range(2))
        op = rng.choice("+-")
        if op == "-" and a < b:
            a, b = b, a
        pairs[f"{a:0{WIDTH}d}{op}{b:0{WIDTH}d}="] = str(a + b if op == "+" else a - b)
    raise ValueError(f"the embedded task has no {count} different problems of these sizes; ask for fewer")


def make_tokenizer(alphabet: str = ALPHABET):
    """One token a character, padded on the left, as the rollout engines want it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_config(**changes):
    from transformers import Qwen3Config

    settings = {
        "vocab_size": len(ALPHABET) + 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM knows
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0},  # 10,000 cannot tell places this close apart
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return Qwen3Config(**settings | changes)


def make_model(seed: int, **changes):
    """Of random weights. changes: of its configuration."""
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(make_config(**changes))


class Pupil:
    """Knows every digit fact, but some of them wrongly, with a fixed error rate and a fixed wrong digit each.

    errors: error rates, and the share of facts that has each."""

    def __init__(self, seed: int = 7, by_column: bool = False, errors=((0.0, 0.5, 0.9), (0.50, 0.15, 0.35))):
        rng = random.Random(seed)
        self.by_column = by_column
        columns = range(WIDTH if by_column else 1)
        facts = [(op, a, b, c) for c in columns for op in "+-" for a in range(10) for b in range(10)]
        self.error_rate = {fact: rng.choices(*errors)[0] for fact in facts}
        self.shift = {fact: rng.randrange(1, 10) for fact in facts}
        for fact in facts:
            if fact[1:3] == (0, 0):
                self.error_rate[fact] = 0.0  # the padding columns; wrong here would mean wrong everywhere

    def facts(self, question: str) -> list[tuple[str, int, int, int]]:
        """(op, a, b, column) from the right; column 0 where all columns share their facts."""
        op, a, b = question[WIDTH], question[:WIDTH], question[WIDTH + 1 : -1]
        digits = enumerate(zip(reversed(a), reversed(b), strict=True))
        return [(op, int(x), int(y), column * self.by_column) for column, (x, y) in digits]

    def pass_rate(self, question: str) -> float:
        """The exact chance that the pupil answers `question` rightly."""
        return math.prod(1 - self.error_rate[fact] for fact in self.facts(question))

    def questions(self, count: int, seed: int) -> list[str]:
        """With repeats: the model should know the whole task as badly as the pupil does, held-out problems
        included."""
        return [question for question, _ in arithmetic(count, seed)]

    def answer(self, question: str, rng: random.Random) -> str:
        """A worked answer. Carries are always right; a wrong digit is copied into the result."""
        work, result, carry = "", "", 0
        for fact in self.facts(question):
            op, x, y, _ = fact
            total = x + y + carry if op == "+" else x - y - carry
            carry, digit = (total // 10, total % 10) if op == "+" else (int(total < 0), total % 10)
            if rng.random() < self.error_rate[fact]:
                digit = (digit + self.shift[fact]) % 10
            work, result = f"{work}{digit}{carry}", f"{digit}{result}"
        return f"{work}={carry}{result}"


class Rote:
    """Knows a number for each of LOOKUPS keys; its first digit is wrong at a rate of that key's own, always
    alike."""

    def __init__(self, seed: int = 7):
        rng = random.Random(seed)
        keys = [f"{key:04d}" for key in rng.sample(range(10_000), LOOKUPS)]
        self.gold = {key: f"{rng.randrange(10, 100)}" for key in keys}
        self.error_rate = {key: rng.choices((0.03, rng.uniform(0.2, 0.8), 0.97), (0.2, 0.3, 0.5))[0] for key in keys}
        self.wrong = {key: str((int(self.gold[key][0]) + rng.randrange(1, 10)) % 10) for key in keys}

    def pass_rate(self, question: str) -> float:
        return 1 - self.error_rate[question]

    def questions(self, count: int, seed: int) -> list[str]:
        return random.Random(seed).choices(list(self.gold), k=count)

    def answer(self, question: str, rng: random.Random) -> str:
        first, second = self.gold[question]
        return f"={self.wrong[question] if rng.random() < self.error_rate[question] else first}{second}"


def make_pupil(sharing: str) -> Pupil | Rote:
    return Rote() if sharing == "none" else Pupil(by_column=sharing == "columns")


def problems(sharing: str, held_out: int, difficulty=(0.0, 1.0), most: int = 0) -> tuple[list, list]:
    """Training and held-out (question, answer) pairs of the embedded task: those whose pass rate under the pupil,
    about the model's at the start, is within `difficulty`; at most 2000 to train on, or `most`. Where no prompt
    teaches another nothing can be held out: there the second list is part of the first."""
    pupil, (low, high) = make_pupil(sharing), difficulty
    if sharing == "none":
        pairs = [pair for pair in pupil.gold.items() if low <= pupil.pass_rate(pair[0]) <= high][: most or None]
        return pairs, pairs[:held_out]
    kept = max(held_out, HELD_OUT)  # never trained on, however few of them are asked for: eval.py takes them all
    pairs = arithmetic(2000 + kept if (low, high) == (0, 1) else 20_000)
    pairs = [pair for pair in pairs if low <= pupil.pass_rate(pair[0]) <= high]
    return pairs[kept:][: most or 2000], pairs[:held_out]


def train(model, tokenizer, pupil, seed: int, steps: int, batch: int = 32, lr: float = 3e-3) -> float:
    """Supervised training on the pupil's answers; loss on the answer only. Returns the last loss."""
    import torch

    rng, eos = random.Random(seed), tokenizer.eos_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = min(40, steps)

    def factor(step):
        return min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loss = torch.tensor(0.0)
    for _ in tqdm(range(steps), desc="making the embedded model", unit="step", disable=None):
        questions = pupil.questions(batch, rng.getrandbits(32))
        texts = [question + pupil.answer(question, rng) + eos for question in questions]
        # Padding on the right needs no mask: no token looks ahead.
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]  # [batch, T]
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        labels[:, : len(questions[0])] = -100  # questions are of one length
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss.item()


def home(sharing: str = "digits") -> Path:
    """The folder of the embedded model."""
    return OUT / ("tiny-model" if sharing == "digits" else f"tiny-model-{sharing}")


def is_made(out: Path) -> bool:
    """ValueError if something else is in the place of the embedded model."""
    if (out / "config.json").exists():
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is in the place of the embedded model, and is no model; move it away")
    return False


def sharing_of(path: str) -> str:
    """Which embedded task a model's folder is of, as --sharing names it; "" for any other model."""
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return ""
    own = make_config()
    if any(config.get(name) != getattr(own, name) for name in ("model_type", "vocab_size", "hidden_size")):
        return ""

    # A trained one lies in its run's folder. One that was only made says it by its name.
    run = folder.parent / "config.json"
    if run.exists():
        return json.loads(run.read_text()).get("sharing", "digits")
    return next((sharing for sharing in STEPS if folder.name.endswith(f"-{sharing}")), "digits")


def make(out: str | Path, seed: int = 0, steps: int = 0, sharing: str = "digits") -> Path:
    """Trains the embedded model into folder `out`, or returns at once if it is there already. steps 0: as
    STEPS has."""
    return make_once(Path(out), functools.partial(taught, seed, steps or STEPS[sharing], sharing))


def make_once(out: Path, teach: Callable) -> Path:
    """Writes the tokenizer and the model that `teach()` returns into folder `out`, unless a model is there already. A
    second process that comes while one is at it waits, and takes what that one has made."""
    if is_made(out):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(out.name + ".lock"), "w") as file:
        # The system drops a record lock when the process dies, however it dies.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            print(f"another process is making {out}: waiting for it", file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:  # of a file system without locks: two at once are unlikely
            pass
        if not is_made(out):
            write(out, *teach())
    return out


def taught(seed: int, steps: int, sharing: str) -> tuple:
    """The tokenizer and the embedded model."""
    tokenizer, model = make_tokenizer(), make_model(seed)
    train(model, tokenizer, make_pupil(sharing), seed, steps)
    return tokenizer, model


def write(out: Path, tokenizer, model) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()  # of saving, which takes no time
    aside = out.with_name(out.name + ".partial")  # renamed when whole, so that a torn folder is never reused
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="tiny-model", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and lessons (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="training steps (default: as STEPS has)")
    parser.add_argument("--sharing", choices=STEPS, default="digits", help="of facts (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"the embedded model is in {make(arguments.out, arguments.seed, arguments.steps, arguments.sharing)}")
