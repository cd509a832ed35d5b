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

In the same way a small model is made for `--task gym:mini_countdown` of reasoning-gym (gym.py): a pupil who sees a
solution of most problems, but writes a wrong sign into it at a rate of its own for each kind of them.
"""

import argparse
import fcntl
import functools
import itertools
import json
import math
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from support.config import GYM, OUT
from tasks import data, gym

ALPHABET = "0123456789+-="
STEPS = {"digits": 1600, "columns": 3000, "none": 1600}  # of its training, for each --sharing
GYM_STEPS = {"mini_countdown": 2000}  # the same for tasks of reasoning-gym
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


def make_tokenizer(alphabet=ALPHABET, split: str = "."):
    """Text is cut into what matches `split` and what stands between: one token a character, unless said otherwise.
    Padded on the left, as the rollout engines want it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(split), "isolated")
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


WHOLE = r"\d+|</?answer>"  # what is one token in a gym task; so is what stands between two of them


class Solver:
    """Countdown of three numbers, as reasoning-gym asks it: finds a solution, but writes another second sign at a rate
    of its own for each pair of signs and each last digit of the target, always alike."""

    SIGNS = "+-*"
    MOST = 99  # largest target

    split = WHOLE

    def __init__(self, seed: int = 7):
        rng = random.Random(seed)
        kinds = list(itertools.product(self.SIGNS, self.SIGNS, range(10)))
        self.error_rate = {kind: rng.choices((0.0, 0.5, 0.9), (0.45, 0.2, 0.35))[0] for kind in kinds}
        self.wrong = {kind: rng.choice([sign for sign in self.SIGNS if sign != kind[1]]) for kind in kinds}

        # The words of the questions are reasoning-gym's. Large targets are nowhere else in them.
        self.templates = set()
        (part,) = gym.parts_of(f"{GYM}mini_countdown")
        for entry in gym.entries(part, seed, 200):
            numbers, target = entry["metadata"]["numbers"], str(entry["metadata"]["target"])
            text = gym.text_of(entry).replace(", ".join(map(str, numbers)), "NUMBERS")
            if int(target) > 20 and text.count(target) == 1:
                self.templates.add(text.replace(target, "TARGET"))
        self.templates = sorted(self.templates)
        pieces = {"(", "+", "-", "*", ")*"}
        for text in self.templates:
            text = text.replace("NUMBERS", "1, 1, 1").replace("TARGET", "1")
            pieces |= set(re.split(f"({WHOLE})", text)) - {""}
        self.tokens = sorted(pieces | {str(number) for number in range(self.MOST + 1)})

    def questions(self, count: int, seed: int) -> list[str]:
        """Made as reasoning-gym makes them, which takes too long for as many."""
        rng = random.Random(seed)
        made = []
        while len(made) < count:
            numbers = [rng.randint(1, 20) for _ in range(3)]
            target = value(*numbers, rng.choice(self.SIGNS), rng.choice(self.SIGNS))
            if 1 <= target <= self.MOST:
                rng.shuffle(numbers)
                text = rng.choice(self.templates)
                made.append(text.replace("NUMBERS", ", ".join(map(str, numbers))).replace("TARGET", str(target)))
        return made

    def solution(self, question: str) -> tuple[list[int], int, str, str]:
        """Numbers in their order, target and signs of the first solution."""
        listed = re.search(r"(?<!\d)\d+, \d+, \d+", question)[0]
        target = int(re.search(r"\d+", question.replace(listed, ""))[0])
        for numbers in itertools.permutations(map(int, listed.split(", "))):
            for first, second in itertools.product(self.SIGNS, self.SIGNS):
                if value(*numbers, first, second) == target:
                    return numbers, target, first, second
        raise ValueError(f"no solution to {question!r}")

    def pass_rate(self, question: str) -> float:
        _, target, first, second = self.solution(question)
        return 1 - self.error_rate[first, second, target % 10]

    def answer(self, question: str, rng: random.Random) -> str:
        (a, b, c), target, first, second = self.solution(question)
        kind = first, second, target % 10
        if rng.random() < self.error_rate[kind]:
            second = self.wrong[kind]
        inner = f"({a}{first}{b})" if second == "*" and first != "*" else f"{a}{first}{b}"
        return f"<answer>{inner}{second}{c}</answer>"


def value(a: int, b: int, c: int, first: str, second: str) -> int:
    """Of (a first b) second c, signs among + - *."""
    inner = {"+": a + b, "-": a - b, "*": a * b}[first]
    return {"+": inner + c, "-": inner - c, "*": inner * c}[second]


def make_pupil(sharing: str) -> Pupil | Rote | Solver:
    """sharing: as `kind_of` names it. ValueError as for `steps_of`."""
    if sharing in GYM_STEPS:
        return Solver()
    steps_of(sharing)
    return Rote() if sharing == "none" else Pupil(by_column=sharing == "columns")


def steps_of(sharing: str) -> int:
    """Of a small model's training. ValueError for a task of reasoning-gym for which none is made, or that is none."""
    steps = STEPS | GYM_STEPS
    if sharing not in steps:
        gym.parts_of(GYM + sharing)
        made = ", ".join(GYM + name for name in GYM_STEPS)
        raise ValueError(f"--task {GYM}{sharing} needs a --model; a small one is made for {made} alone")
    return steps[sharing]


def kind_of(task: str, sharing: str = "digits") -> str:
    """Which small model is made: for a task of reasoning-gym the one of its name, else that of --sharing."""
    return task.removeprefix(GYM).partition(",")[0] if gym.is_task(task) else sharing


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


def shape(sharing: str):
    """Config and tokenizer of an embedded model."""
    pupil = make_pupil(sharing)
    return make_model(0, **settings_of(pupil)).config, tokenizer_of(pupil)


def tokenizer_of(pupil):
    return make_tokenizer(pupil.tokens, pupil.split) if isinstance(pupil, Solver) else make_tokenizer()


def settings_of(pupil) -> dict:
    """What is another than the embedded model's in the configuration of the model that `pupil` teaches."""
    if not isinstance(pupil, Solver):
        return {}
    return {"vocab_size": len(pupil.tokens) + 2, "gym_task": "mini_countdown"}  # by which `sharing_of` knows it


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
        asked = len(tokenizer(questions[0])["input_ids"])  # questions are of one length
        labels[:, :asked] = -100
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
    """Which embedded task a model's folder is of, as `kind_of` names it; "" for any other model."""
    folder = Path(path)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return ""
    if config.get("gym_task") in GYM_STEPS:
        return config["gym_task"]
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
    STEPS has. ValueError as for `steps_of`."""
    return make_once(Path(out), functools.partial(taught, seed, steps or steps_of(sharing), sharing))


def path_of(cfg) -> str:
    """Name or folder of the model that a run begins with. ValueError for an unknown task of reasoning-gym: it should
    show before the model is loaded."""
    if gym.is_task(cfg.task):
        gym.parts_of(cfg.task)
    return cfg.model or str(home(kind_of(cfg.task, cfg.sharing)))


def made(sharing: str) -> Path:
    """The folder of an embedded model, which is made if it is not there."""
    return make(home(sharing), sharing=sharing)


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
    pupil = make_pupil(sharing)
    tokenizer, model = tokenizer_of(pupil), make_model(seed, **settings_of(pupil))
    train(model, tokenizer, pupil, seed, steps)
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
    kinds = [*STEPS, *GYM_STEPS]
    parser.add_argument("--sharing", choices=kinds, default="digits", help="of facts, or a task of reasoning-gym")
    arguments = parser.parse_args()
    print(f"the embedded model is in {make(arguments.out, arguments.seed, arguments.steps, arguments.sharing)}")
