"""The draws of samplers and stores, prompt for prompt, against those of the first version (tests/draws.json).

A change that is meant to change no draw must pass here. One that is meant to changes every published seed.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.rules import GRESO, Adaptive
from replay import DynamicSampling, Group, GroupReplay, Prioritized, PromptReplay, RolloutReplay, Uniform

EXPECTED = json.loads((Path(__file__).parent / "draws.json").read_text())

SAMPLERS = {
    "uniform": (Uniform, {}),
    "prompt": (PromptReplay, {}),
    "prompt_small": (PromptReplay, {"band": (0.1, 0.9), "share": 0.5, "cooldown": 2, "max_reuse": 3}),
    "prioritized": (Prioritized, {}),
    "prioritized_small": (
        Prioritized,
        {"smoothing": 0.5, "explore": 0.3, "retest_every": 3, "retest_solved": 0.5},
    ),
    "greso": (GRESO, {}),
    "adaptive": (Adaptive, {}),
}
STORES = {
    "group": (GroupReplay, {"group_capacity": 12}),
    "rollout": (RolloutReplay, {"max_age": 3, "replay_warmup": 2, "rollout_capacity": 40}),
    "rollout_masked": (
        RolloutReplay,
        {"mask_truncated": True, "replay_warmup": 0, "replay_ratio": 1.0, "priority_exponent": 2.0},
    ),
    "dapo": (DynamicSampling, {}),
}


def settings(case: str) -> tuple[str, dict[str, int]]:
    """The name and the numbers of a case such as "prompt seed=0 prompts=64 batch=8 refill=1"."""
    name, *parts = case.split()
    numbers = {}
    for part in parts:
        key, _, value = part.partition("=")
        numbers[key] = int(value)
    return name, numbers


def digest(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def draws(sampler, seed: int, prompts: int, batch: int, refill: int) -> list:
    """80 steps, with a second request in each where `refill` is 1. Every visit makes a prompt a little easier."""
    rng = np.random.default_rng([seed, 99])
    rates = rng.beta(0.5, 0.5, prompts)
    rows = []
    for step in range(1, 81):
        row = []
        for _ in range(1 + refill):
            drawn = sampler.draw(batch, step)
            if drawn:
                sampler.observe(drawn, rng.binomial(8, rates[drawn]).tolist(), [8] * len(drawn), step)
                rates[drawn] += 0.05 * (1 - rates[drawn])
            row.append(drawn)
        rows.append(row)
    return rows


def groups(rng: np.random.Generator, step: int, count: int) -> list[Group]:
    """Groups of four answers, none of them dead."""
    made = []
    for i in range(count):
        rewards = torch.tensor(rng.integers(0, 2, 4).astype(np.float32))
        if (rewards == rewards[0]).all():
            rewards[0] = 1 - rewards[0]
        prompt = int(rng.integers(1000))
        tokens = [torch.tensor([step, i, k], dtype=torch.int32) for k in range(4)]
        truncated = (rng.random(4) < 0.1).tolist()
        logprobs = [torch.zeros(3)] * 4
        made.append(Group(prompt, tokens, logprobs, truncated, step, rewards, rewards - rewards.mean()))
    return made


def batches(store, seed: int, most: int) -> list:
    """40 steps with fewer than `most` useful groups each, for eight places."""
    rng = np.random.default_rng([seed, 7])
    rows = []
    for step in range(1, 41):
        useful = groups(rng, step, int(rng.integers(0, most)))
        row = []
        for group in store.complete(useful, 8, step):
            answers = [int(tokens[2]) for tokens in group.tokens]
            row.append([group.prompt, group.birth, len(group.tokens), answers])
        rows.append(row)
    return rows


@pytest.mark.parametrize("case", EXPECTED["samplers"])
def test_samplers_draw_what_the_first_version_drew(case):
    name, numbers = settings(case)
    kind, knobs = SAMPLERS[name]
    sampler = kind(numbers["prompts"], seed=numbers["seed"], **knobs)
    rows = draws(sampler, **numbers)
    expected = EXPECTED["samplers"][case]
    if expected["first"]:
        assert rows[:3] == expected["first"]
    assert rows[-1] == expected["last"]
    assert digest(rows) == expected["sha"]


@pytest.mark.parametrize("case", EXPECTED["stores"])
def test_stores_complete_batches_as_the_first_version_did(case):
    name, numbers = settings(case)
    kind, knobs = STORES[name]
    if kind is DynamicSampling:
        store = kind()
        most = 12
    else:
        store = kind(seed=numbers["seed"], **knobs)
        most = 9
    rows = batches(store, numbers["seed"], most)
    assert rows[-1][:3] == EXPECTED["stores"][case]["last"]
    assert digest(rows) == EXPECTED["stores"][case]["sha"]


def test_every_case_is_there():
    assert len(EXPECTED["samplers"]) == 126
    assert len(EXPECTED["stores"]) == 12
