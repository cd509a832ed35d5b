"""Held-out accuracy. (The benchmarks come next.)"""

from collections.abc import Callable

from data import Prompt


def accuracy(
    engine,
    prompts: list[Prompt],
    tokenizer,
    reward: Callable,
    samples: int,
    seed: int,
    temperature: float | None = None,
) -> float:
    """Mean reward of `samples` answers to each prompt. The noise of each answer is the same at every evaluation, so
    that two evaluations differ by the policy and not by luck."""
    groups = engine.generate(prompts, samples, seed, step=-1, temperature=temperature)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for group in groups for tokens in group.tokens]
    scores = reward(texts, [prompt.answer for prompt in prompts for _ in range(samples)])
    return sum(scores) / max(len(scores), 1)
