"""Shuffled epochs over a data set, the batch of the current step, and choosing a few prompts among a
million."""

import numpy as np

from support.state import Saved


class Epochs(Saved):
    """What all samplers share: the order of this epoch, how far it has come, and which prompts are in the current
    batch.

    ValueError from `begin` if more different prompts are asked for than there are.
    """

    STATE = ("rng", "order", "position", "seen", "step", "size", "batch", "replays")

    def __init__(self, num_prompts: int, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(num_prompts)  # of this epoch
        self.position = 0  # how far this epoch has come
        self.seen = np.zeros(num_prompts, bool)  # prompts that were ever drawn
        self.step = -1  # of the current batch
        self.size = 0  # how many prompts were first asked for in it
        self.batch: set[int] = set()  # its prompts
        self.replays: set[int] = set()  # those of them that replay brought back

    def begin(self, n: int, step: int) -> int:
        """Starts the batch of `step`. Where more prompts are asked for in the same step (a refill), the batch goes
        on, and none of its prompts is drawn twice. Returns how many of `n` prompts there is room for."""
        if step != self.step:
            if not 0 < n <= len(self.order):
                raise ValueError(f"{n} different prompts a step are asked for; there are {len(self.order)}")
            self.step = int(step)
            self.size = int(n)
            self.batch = set()
            self.replays = set()
        return min(n, len(self.order) - len(self.batch))

    def take(self, prompts, replayed: bool = False) -> list[int]:
        """Puts `prompts` into the batch."""
        prompts = [int(x) for x in prompts]
        self.seen[prompts] = True
        self.batch.update(prompts)
        if replayed:
            self.replays.update(prompts)
        return prompts

    def take_fresh(self, n: int, passes_over=None) -> list[int]:
        """Puts the next n prompts of the epoch into the batch. One that is in it already, because replay has brought
        it back, keeps its turn, unless the epoch ends first. So replay costs no other prompt its visit.

        passes_over: a function that says of a prompt whose turn it is whether it is left out this time."""
        chosen: list[int] = []
        ahead = self.position
        while len(chosen) < n:
            if ahead == len(self.order):  # the epoch is over
                self.order = self.rng.permutation(len(self.order))
                self.position = 0
                ahead = 0
                continue
            x = int(self.order[ahead])
            if x not in self.batch:
                # Those that are in the batch, and were met on the way, come next.
                self.order[self.position + 1 : ahead + 1] = self.order[self.position : ahead]
                self.order[self.position] = x
                self.position += 1
                if passes_over is None or not passes_over(x):
                    chosen.append(x)
                    self.batch.add(x)
            ahead += 1
        self.seen[chosen] = True
        return chosen

    def attach(self, run) -> None:
        """The run that begins (train.Run), for a rule that needs its prompts. The papers' rules do not."""

    def figures(self) -> dict:
        """For the log. The rules that have something to say of themselves do."""
        return {}


def within_reach(x: np.ndarray, key: np.ndarray, n: int) -> np.ndarray:
    """Those of prompts `x` whose `key` is among the n smallest, ties included. It changes no draw: it only
    spares sorting a million candidates for a batch of 32."""
    if not 0 < n < len(x):
        return x
    return x[key[x] <= np.partition(key[x], n - 1)[n - 1]]
