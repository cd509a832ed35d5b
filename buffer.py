"""What a step trains on besides its own useful groups: the record of a group, and three stores of them.

    Surplus          dynamic sampling (DAPO, 2503.14476): generate again until the batch is full, carry what is over
    GroupReplay      POPO (2606.01281): the most recent useful groups stand in for dead ones
    RolloutReplay    2606.04560: single stored answers of large advantage are added, while they are young

A store is handed the useful groups of a step and gives back the batch, and remembers what it will need:

    complete(useful, places, step) -> list[Group]

A group is dead when its rewards are all equal: its advantages are zero, and it is dropped before it gets here.
"""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch

from replay import Saved


@dataclass
class Group:
    """Answers to one prompt, with the log-probs they were sampled with, their rewards, and when they were born."""

    prompt: int  # index into the data set
    tokens: list[torch.Tensor]  # G answers, int32 [T_g], end of text inside
    logprobs: list[torch.Tensor]  # G times float32 [T_g], log mu: the policy and temperature that sampled them
    truncated: list[bool]  # G; True: cut at the length limit, no end of text
    birth: int  # the step whose policy generated it
    rewards: torch.Tensor | None = None  # [G]
    advantages: torch.Tensor | None = None  # [G], frozen at birth
    uses: int = 0  # times it has been trained on again

    @property
    def dead(self) -> bool:
        """All rewards equal: no gradient."""
        return bool((self.rewards == self.rewards[0]).all())

    def pick(self, i: int) -> "Group":
        """Answer `i` alone, with the advantage it had in its group."""
        one = slice(i, i + 1)
        return replace(
            self, tokens=self.tokens[one], logprobs=self.logprobs[one], truncated=self.truncated[one],
            rewards=self.rewards[one], advantages=self.advantages[one], uses=0,
        )  # fmt: skip


def pack_groups(groups: list[Group]) -> dict[str, torch.Tensor]:
    """Groups as a few flat tensors, 8 bytes a token: small to write, quick to read."""
    answers = [tokens for group in groups for tokens in group.tokens]
    empty = torch.zeros(0)
    return {
        "prompt": torch.tensor([group.prompt for group in groups], dtype=torch.int64),
        "birth": torch.tensor([group.birth for group in groups], dtype=torch.int64),
        "uses": torch.tensor([group.uses for group in groups], dtype=torch.int64),
        "size": torch.tensor([len(group.tokens) for group in groups], dtype=torch.int64),
        "length": torch.tensor([len(tokens) for tokens in answers], dtype=torch.int64),
        "tokens": torch.cat([*answers, empty.int()]).int(),
        "logprobs": torch.cat([lp for group in groups for lp in group.logprobs] + [empty]),
        "truncated": torch.tensor([cut for group in groups for cut in group.truncated], dtype=torch.bool),
        "rewards": torch.cat([group.rewards for group in groups] + [empty]),
        "advantages": torch.cat([group.advantages for group in groups] + [empty]),
    }


def unpack_groups(state: dict[str, torch.Tensor]) -> list[Group]:
    """The groups that `pack_groups` has packed."""
    tokens, logprobs = (state[name].split(state["length"].tolist()) for name in ("tokens", "logprobs"))
    groups, start = [], 0
    for prompt, birth, uses, size in zip(
        *(state[n].tolist() for n in ("prompt", "birth", "uses", "size")), strict=True
    ):
        rows = slice(start, start + size)
        groups.append(
            Group(
                prompt, [t.clone() for t in tokens[rows]], [t.clone() for t in logprobs[rows]],
                state["truncated"][rows].tolist(), birth, state["rewards"][rows].clone(),
                state["advantages"][rows].clone(), uses,
            )
        )  # fmt: skip
        start += size
    return groups


class Store(deque):
    """Groups, oldest first; the oldest fall out beyond `maxlen`."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return pack_groups(list(self))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.clear()
        self.extend(unpack_groups(state))


class Surplus(Saved):
    """Dynamic sampling (DAPO): the loop generates again until the batch is full; useful groups beyond it are not thrown
    away but lead the next step's batch."""

    STATE = ("carried",)

    def __init__(self):
        self.carried = Store()

    def complete(self, useful: list[Group], places: int, step: int) -> list[Group]:
        ready = [*self.carried, *useful]
        self.carried = Store(ready[places:])
        return ready[:places]

    def figures(self, step: int) -> dict:
        return {"carried": len(self.carried)}


class GroupReplay(Saved):
    """POPO (2606.01281): the places of dead groups go to whole stored groups, most recent first; useful groups are
    stored after that, so that none stands in for itself. First in, first out beyond `capacity` groups.

    The paper's ablations take them in another `order`: "oldest" first, or "kl", those first that the policy has moved
    away from least, by drift(groups) -> one number a group (`grpo.drift`, a pass of the model over the whole store).

    Ours, in `--replay adaptive`, is `min_ess` above 0: a second use is right as long as the policy is nearly the one
    that sampled, and each update tells whether it is, by the effective sample size of the replayed tokens' importance
    weights as a share of their number. Where that falls below `min_ess` fewer places are filled, else more, up to
    `max_fill` of them. Where steps are large, and a second use harms, replay all but ends by itself.
    """

    STATE = ("stored", "rng", "fill")

    def __init__(
        self, capacity: int, seed: int = 0, order: str = "recent", drift=None, min_ess: float = 0.0, max_fill=1.0
    ):
        if capacity < 1 or not 0 <= min_ess < 1 or not 0 <= max_fill <= 1:
            raise ValueError(
                "need room for at least 1 group, min_ess in [0, 1) and max_fill in [0, 1], "
                f"got {capacity}, {min_ess} and {max_fill}"
            )
        self.min_ess, self.max_fill = min_ess, max_fill
        self.fill = max_fill * (0.1 if min_ess else 1)  # share of the places of dead groups that are filled
        self.stored = Store(maxlen=capacity)  # oldest first
        self.rng = np.random.default_rng([seed, 2])
        self.order, self.drift = order, drift
        self.drawn: list[Group] = []
        self.replaced = 0.0  # share of the latest batch's places

    def complete(self, useful: list[Group], places: int, step: int) -> list[Group]:
        room = self.fill * max(places - len(useful), 0)
        # the fractional part by chance: even a small `fill` replays a group now and then, to see how it does
        count = int(room + self.rng.random()) if self.fill < 1 else int(room)
        self.drawn = self.ranked()[:count] if count else []
        self.replaced = len(self.drawn) / places
        for group in self.drawn:
            group.uses += 1
        # groups of one step in random order, so that which are used again does not depend on their place in the batch
        self.stored.extend(useful[i] for i in self.rng.permutation(len(useful)))
        return useful + self.drawn

    def adjust(self, ess: float | None) -> None:
        """After each update, with the effective sample size of what was replayed; None where nothing was."""
        if ess is not None and self.min_ess:
            change = 1.2 if ess >= self.min_ess else 0.7
            self.fill = min(max(self.fill * change, 0.02 * self.max_fill), self.max_fill)

    def ranked(self) -> list[Group]:
        """All stored groups, those to use first in front."""
        groups = list(self.stored)[:: 1 if self.order == "oldest" else -1]
        if self.order == "kl" and groups:
            drift = self.drift(groups)
            groups = [groups[i] for i in sorted(range(len(groups)), key=drift.__getitem__)]
        return groups

    def figures(self, step: int) -> dict:
        return {"stored_groups": len(self.stored), "replaced": self.replaced} | reuse_figures("group", self.drawn, step)


class RolloutReplay(Saved):
    """Rollout-level replay (2606.04560): on top of all useful fresh answers, round(ratio * their number) single stored
    ones, drawn without replacement with probability proportional to (|A| + 1e-6)^exponent, at most `max_age` steps old;
    none in the first `warmup` steps. Tokens, log-probs and advantages stay as they were at birth. What is added takes
    no group's place, so that `places` do not matter here."""

    STATE = ("stored", "rng")

    def __init__(
        self, seed: int = 0, ratio=0.5, exponent=0.5, max_age=10, warmup=20, capacity=30_000, mask_truncated=False
    ):
        if ratio < 0 or exponent < 0 or max_age < 1 or warmup < 0 or capacity < 1:
            raise ValueError("need ratio, exponent and warm-up >= 0, and max age and capacity >= 1")
        self.ratio, self.exponent, self.max_age, self.warmup = ratio, exponent, max_age, warmup
        self.stored = Store(maxlen=capacity)  # one answer each, oldest first
        self.rng = np.random.default_rng([seed, 3])
        # answers cut at the limit are then not trained on, so neither stored nor counted
        self.mask_truncated = mask_truncated
        self.drawn: list[Group] = []

    def complete(self, useful: list[Group], places: int, step: int) -> list[Group]:
        # births are in no order where surplus groups are carried over or an asynchronous trainer lags behind
        self.stored = Store((one for one in self.stored if step - one.birth <= self.max_age), self.stored.maxlen)
        # not trained on before: replayed groups (GroupReplay) may be among them, and their answers are here already
        own = [group for group in useful if not group.uses]
        fresh = [g.pick(i) for g in own for i, cut in enumerate(g.truncated) if not (cut and self.mask_truncated)]
        count = min(round(self.ratio * len(fresh)), len(self.stored)) if step > self.warmup else 0
        self.drawn = []
        if count:
            size = torch.cat([one.advantages for one in self.stored]).abs().double().numpy()
            weight = (size + 1e-6) ** self.exponent
            found = self.rng.choice(len(self.stored), count, replace=False, p=weight / weight.sum())
            self.drawn = [self.stored[i] for i in found]
        for one in self.drawn:
            one.uses += 1
        self.stored.extend(fresh)  # after the draw: nothing is replayed in the step of its birth
        return useful + self.drawn

    def figures(self, step: int) -> dict:
        figures = {"stored_rollouts": len(self.stored)} | reuse_figures("rollout", self.drawn, step)
        if self.drawn:
            figures["replayed_positive"] = sum(float(one.advantages[0]) > 0 for one in self.drawn) / len(self.drawn)
        return figures


def reuse_figures(kind: str, drawn: list[Group], step: int) -> dict:
    """How old, and how often used, what was replayed is; histograms from 0 up."""
    return {
        f"{kind}_ages": np.bincount([step - group.birth for group in drawn], minlength=1).tolist(),
        f"{kind}_uses": np.bincount([group.uses for group in drawn], minlength=1).tolist(),
    }


def make_stores(switches: dict[str, str], cfg, drift=None) -> dict:
    """The stores that the batch passes through, in this order: fill dead places first, then add stored answers.
    ValueError for settings that cannot be meant."""
    stores = {}
    if cfg.min_ess and {"fill", "extra"} <= set(switches):
        raise ValueError(
            "--min-ess judges stored groups by all that is replayed, single answers too: with rollout set --min-ess 0, "
            "and --max-fill by hand"
        )
    if switches.get("fill") == "dapo":
        stores["dapo"] = Surplus()
    if switches.get("fill") in ("group", "adaptive"):
        capacity = cfg.group_capacity or 2 * cfg.prompts_per_step
        stores["group"] = GroupReplay(capacity, cfg.seed, cfg.group_order, drift, cfg.min_ess, cfg.max_fill)
    if switches.get("extra") == "rollout":
        stores["rollout"] = RolloutReplay(
            cfg.seed, cfg.replay_ratio, cfg.priority_exponent, cfg.max_age, cfg.replay_warmup, cfg.rollout_capacity,
            cfg.mask_truncated,
        )  # fmt: skip
    return stores
