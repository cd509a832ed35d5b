"""What tests of samplers and stores share: a policy whose pass rates are known, made-up groups, and a checkpoint."""

import io
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from replay import Group

G = 16  # answers to a prompt


@dataclass
class Step:
    """What was drawn for one step, by all its requests."""

    step: int
    batch: list[int]
    replays: set[int]

    @property
    def fresh(self) -> list[int]:
        return [x for x in self.batch if x not in self.replays]


def simulate(sampler, rates, steps, n: int = 8, rng=None, refills=()) -> list[Step]:
    """Draws n prompts for each of `steps`, and then as many more as `refills` say; prompt x is answered rightly with
    probability rates[x]. The results of each request come before the next one."""
    rng = rng or np.random.default_rng(0)
    history = []
    for step in steps:
        batch = []
        for count in (n, *refills):
            drawn = sampler.draw(count, step)
            sampler.observe(drawn, rng.binomial(G, rates[drawn]).tolist(), [G] * len(drawn), step)
            batch += drawn
        history.append(Step(step, batch, sampler.replays))
    return history


def mixed_rates(num_prompts: int, rng=None) -> np.ndarray:
    """Hopeless, hard, medium, easy and solved prompts."""
    rng = rng or np.random.default_rng(1)
    return rng.choice([0.0, 0.05, 0.3, 0.5, 0.8, 1.0], num_prompts)


def know(sampler, correct: dict[int, int], step: int = 0, size: int = G) -> None:
    """Tells the sampler how many of `size` answers to some prompts were right."""
    sampler.observe(list(correct), list(correct.values()), [size] * len(correct), step)


def visits(history: list[Step]) -> Counter:
    """How often each prompt was drawn."""
    counts = Counter()
    for row in history:
        counts.update(row.batch)
    return counts


# ---------------------------------------------------------------- programs


def code_of(main, argv: list[str]) -> int:
    """The exit code of a program, whether its `main` returns it or ends with it."""
    try:
        return main(argv)
    except SystemExit as end:
        return end.code


# ---------------------------------------------------------------- groups


def group(prompt=0, rewards=(1, 0, 0, 1), birth=1, length=5) -> Group:
    """A group whose answers can be told apart by their tokens; the first of them is cut at the length limit."""
    rewards = torch.tensor(rewards, dtype=torch.float32)
    tokens = []
    logprobs = []
    for i in range(len(rewards)):
        tokens.append(torch.tensor([1000 * birth + prompt, i, *range(length - 2)], dtype=torch.int32))
        logprobs.append(-torch.rand(length, generator=torch.Generator().manual_seed(prompt + i)))
    truncated = [i == 0 for i in range(len(rewards))]
    return Group(prompt, tokens, logprobs, truncated, birth, rewards, rewards - rewards.mean())


def run_store(store, steps, per_step=3, places=6, lag=0, **kind) -> list[list[Group]]:
    """The batches of `steps`, where each step has `per_step` useful groups, born `lag` steps before."""
    batches = []
    for step in steps:
        useful = [group(i, birth=step - lag, **kind) for i in range(per_step)]
        store.watch(useful, step)
        batches.append(store.complete(useful, places, step))
    return batches


def content(one: Group) -> tuple:
    """All that must not change while a group is stored."""
    parts = [*one.tokens, *one.logprobs, one.rewards, one.advantages]
    return one.prompt, one.birth, one.truncated, [(part.dtype, part.numpy().tobytes()) for part in parts]


def names(groups) -> list[tuple]:
    """Birth, prompt and number of each answer."""
    return [(one.birth, one.prompt, int(tokens[1])) for one in groups for tokens in one.tokens]


def births(groups) -> set[int]:
    return {one.birth for one in groups}


# ---------------------------------------------------------------- checkpoints


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restored(saved, fresh):
    """`fresh`, with the state of `saved` as a checkpoint would bring it back."""
    fresh.load_state_dict(through_a_file(saved.state_dict()))
    return fresh


def tensors(state) -> list[torch.Tensor]:
    """All tensors in a state."""
    if isinstance(state, torch.Tensor):
        return [state]
    found = []
    if isinstance(state, dict):
        for value in state.values():
            found += tensors(value)
    return found


def numbers(state) -> int:
    """How many numbers a state holds."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    if isinstance(state, dict):
        return sum(1 + numbers(value) for value in state.values())
    if isinstance(state, list):
        return sum(numbers(value) for value in state)
    return 1
