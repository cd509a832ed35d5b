"""Our own rule for prompts to bring back: those that have lately been worth more than the next prompts of the epoch.

(Half of `--replay adaptive`. The other half, `min_ess` of buffer.GroupReplay, is about answers: recent useful groups
take the places of dead ones as far as they are still nearly on-policy. `--max-fill 0` leaves that half out, `--share 0`
this one.)

The four papers fix beforehand which pass rates are worth another visit, and whether that saves rollouts then depends on
how far one visit moves a prompt (README, "Does replay help?"). Here the run itself tells. A visit to a prompt that
turns out to stand at pass rate p counts as

    worth = p (1 - p) * (1 - p)^2        the spread of its rewards, which is what it teaches, times what is left to gain

and two averages are kept, over the latest visits: of visits by the epochs, and of return visits to prompts whose group
before was at a given pass rate. Prompts return if return visits at their pass rate have been worth at least 1.25 times
a visit by the epochs, the best first; if none have, none returns. Where a visit moves a prompt little, prompts last
seen near one third stay worth a visit, and are visited until they do not. Where a visit all but solves a prompt, they
return solved, are worth nothing, and replay all but ends by itself. All-wrong prompts are retested just when such
prompts have begun to come off. The power and the constants were chosen with simulate.py; LOG.md has what was tried, and
how it did on cells not used to choose.
"""

import numpy as np

from replay import Epochs, Saved, smallest

LEVELS = 16  # pass rates 0, 1/16 .. 1
MEMORY = 320  # visits that an average goes back, or so
MARGIN = 1.25  # by which return visits must beat those by the epochs
GUESS = 8  # visits that the first guess, that a prompt has not moved, counts for


def worth(mean: np.ndarray, variance: np.ndarray | None = None) -> np.ndarray:
    """What visits taught whose rewards had this `mean` [P] and `variance` [P] (of 0s and 1s by default)."""
    variance = mean * (1 - mean) if variance is None else np.asarray(variance)
    return variance * (1 - mean) ** 2


class Adaptive(Saved):
    """A sampler like those of replay.py: at most floor(share * n) prompts a step come back, after `cooldown` steps."""

    STATE = ("epochs", "level", "last", "back", "returns", "fresh")

    def __init__(self, num_prompts: int, seed: int = 0, share: float = 0.5, cooldown: int = 10):
        if not 0 <= share <= 1 or cooldown < 0:
            raise ValueError(f"need share in [0, 1] and cooldown >= 0, got {share} and {cooldown}")
        self.share, self.cooldown = share, cooldown
        self.epochs = Epochs(num_prompts, seed)
        self.level = np.full(num_prompts, -1, np.int8)  # pass rate of the latest group, in LEVELS; -1: never observed
        self.last = np.full(num_prompts, -(10**9), np.int32)  # the step of the latest use
        self.tie = np.arange(num_prompts)
        self.back = np.zeros(num_prompts, bool)  # whether it was replay that brought it
        self.returns = np.zeros((2, LEVELS + 1))  # by the level before: number and worth of return visits
        self.fresh = np.zeros(2)  # number and worth of visits by the epochs

    def promise(self) -> np.ndarray:
        """What a visit to a prompt of each level will be worth [LEVELS + 1]."""
        number, total = self.returns
        return (total + GUESS * worth(np.arange(LEVELS + 1) / LEVELS)) / (number + GUESS)

    def better(self) -> np.ndarray:
        """Which levels' prompts come back [LEVELS + 1]; none before there was a visit by the epochs to compare with."""
        number, total = self.fresh
        return self.promise() > (MARGIN * total / number if number else np.inf)

    def draw(self, n: int, step: int) -> list[int]:
        n = self.epochs.begin(n, step)
        budget = int(self.share * self.epochs.batches[-1]["asked"] + 1e-9) - len(self.epochs.replays)
        ready = self.epochs.free() & (self.last <= step - self.cooldown)
        replays: list[int] = []
        for level in np.argsort(-self.promise(), kind="stable")[: self.better().sum()]:  # `better` comes first
            room = min(budget, n) - len(replays)
            replays += smallest(room, ready & (self.level == level), self.last, self.tie)  # longest not visited first
        chosen = [self.epochs.take(x, replay=True) for x in replays]
        chosen += [self.epochs.take(self.epochs.next()) for _ in range(n - len(chosen))]
        self.last[chosen], self.back[chosen] = np.maximum(self.last[chosen], step), False
        self.back[replays] = True
        return chosen

    def observe(self, indices, num_correct, num_answers, step, variance=None) -> None:
        x = self.epochs.settle(indices)
        mean = np.asarray(num_correct) / np.asarray(num_answers)
        value, before = worth(mean, variance), self.level[x]
        keep = (1 - 1 / MEMORY) ** len(x)
        self.returns, self.fresh = self.returns * keep, self.fresh * keep
        again, fresh = before >= 0, ~self.back[x]
        np.add.at(self.returns, (slice(None), before[again]), np.stack([np.ones(again.sum()), value[again]]))
        self.fresh += fresh.sum(), value[fresh].sum()
        self.level[x] = np.round(mean * LEVELS)
        self.last[x] = np.maximum(self.last[x], step)

    def figures(self) -> dict:
        number, total = self.fresh
        better = self.better()
        return {"worth_fresh": float(total / number) if number else 0.0, "levels_back": better.astype(int).tolist(),
                "buffer": int((better[self.level] & (self.level >= 0)).sum())}  # fmt: skip
