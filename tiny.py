"""The embedded model: a small Qwen3 in ordinary Hugging Face format, made in about a minute on a CPU.

    python tiny.py --out tiny-model

It is taught by an error-prone pupil, so that it stands where a pretrained language model stands before RL: it can do
the task, but not reliably. Each digit fact (op, a, b) has a fixed error rate, drawn once (half 0, some 0.5, a third
0.9), and a fixed wrong digit; the model learns both habits. A prompt's pass rate is then the product of (1 - error
rate) over its columns, which is U-shaped over prompts as it is for real models: many are never solved, some always.
GRPO has to turn the habits over.

A worked answer writes digit and carry of each column from the right, then the result: 2440+2914= 40503150=05354.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from tqdm import tqdm

import data

ALPHABET = "0123456789+-="
ANSWER_TOKENS = 3 * data.WIDTH + 3  # two a column, '=', the result with one digit more, end of text


def make_tokenizer():
    """One token a character, padded on the left, as the rollout engines want it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(seed: int):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(ALPHABET) + 2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM knows
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 20.0},  # 10,000 cannot tell places this close apart
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


class Pupil:
    """Knows every digit fact, but some of them wrongly, with a fixed error rate and a fixed wrong digit each."""

    def __init__(self, seed: int = 7):
        rng = random.Random(seed)
        facts = [(op, a, b) for op in "+-" for a in range(10) for b in range(10)]
        self.error_rate = {fact: rng.choices((0.0, 0.5, 0.9), (0.50, 0.15, 0.35))[0] for fact in facts}
        self.shift = {fact: rng.randrange(1, 10) for fact in facts}
        for op in "+-":
            self.error_rate[op, 0, 0] = 0.0  # the padding columns; wrong here would mean wrong everywhere

    def columns(self, question: str) -> list[tuple[str, int, int]]:
        op, a, b = question[data.WIDTH], question[: data.WIDTH], question[data.WIDTH + 1 : -1]
        return [(op, int(x), int(y)) for x, y in zip(reversed(a), reversed(b), strict=True)]

    def pass_rate(self, question: str) -> float:
        """The exact chance that the pupil answers `question` rightly."""
        return math.prod(1 - self.error_rate[fact] for fact in self.columns(question))

    def answer(self, question: str, rng: random.Random) -> str:
        """A worked answer. Carries are always right; a wrong digit is copied into the result."""
        work, result, carry = "", "", 0
        for op, x, y in self.columns(question):
            total = x + y + carry if op == "+" else x - y - carry
            carry, digit = (total // 10, total % 10) if op == "+" else (int(total < 0), total % 10)
            if rng.random() < self.error_rate[op, x, y]:
                digit = (digit + self.shift[op, x, y]) % 10
            work, result = f"{work}{digit}{carry}", f"{digit}{result}"
        return f"{work}={carry}{result}"


def train(model, tokenizer, seed: int, steps: int, batch: int = 32, lr: float = 3e-3) -> float:
    """Supervised training on the pupil's answers; loss on the answer only. Returns the last loss."""
    rng, pupil, eos = random.Random(seed), Pupil(), tokenizer.eos_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = min(40, steps)

    def factor(step):
        return min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    loss = torch.tensor(0.0)
    for _ in tqdm(range(steps), desc="making the embedded model", unit="step", disable=None):
        # With repeats: the model should know the whole task as badly as the pupil does, held-out problems included.
        questions = [question for question, _ in data.arithmetic(batch, rng.getrandbits(32))]
        texts = [question + pupil.answer(question, rng) + eos for question in questions]
        ids = torch.tensor(tokenizer(texts)["input_ids"])  # [batch, T], all of one length
        labels = ids.clone()
        labels[:, : len(questions[0])] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss.item()


def make(out: str | Path, seed: int = 0, steps: int = 1600) -> Path:
    """Trains the embedded model into folder `out`, or returns at once if it is there already."""
    out = Path(out)
    if (out / "config.json").exists():
        return out
    from transformers.utils import logging

    logging.disable_progress_bar()  # of saving, which takes no time
    tokenizer, model = make_tokenizer(), make_model(seed)
    train(model, tokenizer, seed, steps)
    aside = out.with_name(out.name + ".partial")  # renamed when whole, so that a torn folder is never reused
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(out)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="tiny-model", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and lessons (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1600, help="training steps (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"the embedded model is in {make(arguments.out, arguments.seed, arguments.steps)}")
