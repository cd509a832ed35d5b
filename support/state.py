"""What a checkpoint keeps of samplers and stores, as `torch.load(weights_only=True)` reads it: no pickled
code."""

import copy
from collections import deque

import numpy as np
import torch


class Saved:
    """state_dict and load_state_dict for the attributes that a class names in STATE.

    KeyError if a state has other keys, ValueError if one of its arrays is of another length. An array that is empty in
    a new object may have any length later.
    """

    STATE: tuple[str, ...] = ()

    def state_dict(self) -> dict:
        return {name: packed(getattr(self, name)) for name in self.STATE}

    def load_state_dict(self, state: dict) -> None:
        wrong = set(state) ^ set(self.STATE)
        if wrong:
            names = ", ".join(sorted(wrong))
            raise KeyError(f"state of {type(self).__name__} has keys too many or too few: {names}")
        for name, value in state.items():
            now = getattr(self, name)
            if isinstance(now, np.ndarray):
                if now.size and value.shape[:1] != now.shape[:1]:
                    raise ValueError(f"state of {type(self).__name__} is of {len(value)} prompts, not {len(now)}")
                setattr(self, name, value.numpy().astype(now.dtype))
            elif isinstance(now, np.random.Generator):
                now.bit_generator.state = value
            elif hasattr(now, "load_state_dict"):
                now.load_state_dict(value)
            elif isinstance(now, set):
                setattr(self, name, set(value))
            else:
                setattr(self, name, copy.deepcopy(value))


def packed(value):
    """`value` as tensors and plain Python, independent of the original."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, set):
        return sorted(value)
    return copy.deepcopy(value)


class Store(deque):
    """Groups of answers, oldest first; the oldest fall out beyond `maxlen`. `kind` is the class of a group.

    Its state is a few flat tensors, 8 bytes a token, and not thousands of small ones: quick to write and to read.
    """

    def __init__(self, kind: type, maxlen: int | None = None):
        super().__init__(maxlen=maxlen)
        self.kind = kind

    def state_dict(self) -> dict[str, torch.Tensor]:
        tokens = [torch.zeros(0, dtype=torch.int32)]  # the empty ones: there may be no group
        logprobs = [torch.zeros(0)]
        rewards = [torch.zeros(0)]
        advantages = [torch.zeros(0)]
        truncated = []
        for group in self:
            tokens += group.tokens
            logprobs += group.logprobs
            rewards.append(group.rewards)
            advantages.append(group.advantages)
            truncated += group.truncated
        return {
            "prompt": torch.tensor([group.prompt for group in self], dtype=torch.int64),
            "birth": torch.tensor([group.birth for group in self], dtype=torch.int64),
            "uses": torch.tensor([group.uses for group in self], dtype=torch.int64),
            "size": torch.tensor([len(group.tokens) for group in self], dtype=torch.int64),
            "length": torch.tensor([len(answer) for answer in tokens[1:]], dtype=torch.int64),
            "tokens": torch.cat(tokens).int(),
            "logprobs": torch.cat(logprobs),
            "truncated": torch.tensor(truncated, dtype=torch.bool),
            "rewards": torch.cat(rewards),
            "advantages": torch.cat(advantages),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        lengths = state["length"].tolist()
        tokens = state["tokens"].split(lengths)
        logprobs = state["logprobs"].split(lengths)
        self.clear()
        start = 0
        for i, size in enumerate(state["size"].tolist()):
            rows = slice(start, start + size)
            group = self.kind(
                prompt=int(state["prompt"][i]),
                tokens=[answer.clone() for answer in tokens[rows]],
                logprobs=[answer.clone() for answer in logprobs[rows]],
                truncated=state["truncated"][rows].tolist(),
                birth=int(state["birth"][i]),
                rewards=state["rewards"][rows].clone(),
                advantages=state["advantages"][rows].clone(),
                uses=int(state["uses"][i]),
            )
            self.append(group)
            start += size
