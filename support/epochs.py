"""Shuffled epochs over a data set, and the batch of the current step."""

import numpy as np

from support.state import Saved


class Epochs(Saved):
    """What all samplers share: the order of this epoch, how far it has come, and which prompts are in the current batch.

    ValueError from `begin` if more different prompts are asked for than there are.
    """

    STATE = ("rng", "order", "position", "seen", "step", "size", "batch")

    def __init__(self, num_prompts: int, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(num_prompts)  # of this epoch
        self.position = 0  # how far this epoch has come
        self.seen = np.zeros(num_prompts, bool)  # prompts that were ever drawn
        self.step = -1  # of the current batch
        self.size = 0  # how many prompts were first asked for in it
        self.batch: dict[int, bool] = {}  # its prompts, and whether replay brought them back

    def begin(self, n: int, step: int) -> int:
        """Starts the batch of `step`. Where more prompts are asked for in the same step (a refill), the batch goes on,
        and none of its prompts is drawn twice. Returns how many of `n` prompts there is room for."""
        if step != self.step:
            if not 0 < n <= len(self.order):
                raise ValueError(f"{n} different prompts a step are asked for; there are {len(self.order)}")
            self.step = int(step)
            self.size = int(n)
            self.batch = {}
        return min(n, len(self.order) - len(self.batch))

    def take(self, prompts, replayed: bool = False) -> list[int]:
        """Puts `prompts` into the batch."""
        prompts = [int(x) for x in prompts]
        self.seen[prompts] = True
        self.batch.update(dict.fromkeys(prompts, replayed))
        return prompts

    def take_fresh(self, n: int) -> list[int]:
        """Puts the next n prompts of the epoch into the batch."""
        chosen: list[int] = []
        while len(chosen) < n:
            chosen += self.take([self.next()])
        return chosen

    def next(self) -> int:
        """The next prompt of the epoch that is not in the batch yet. One that is in it, because replay has brought it
        back, keeps its turn (but at the very end of an epoch), so that replay costs no prompt its visit."""
        while True:
            for ahead in range(self.position, len(self.order)):
                x = int(self.order[ahead])
                if x not in self.batch:
                    # those that were passed over come next
                    self.order[self.position + 1 : ahead + 1] = self.order[self.position : ahead]
                    self.order[self.position] = x
                    self.position += 1
                    return x
            self.order = self.rng.permutation(len(self.order))
            self.position = 0

    @property
    def replays(self) -> set[int]:
        """The prompts of the current batch that replay has brought back."""
        return {x for x, replayed in self.batch.items() if replayed}

    def figures(self) -> dict:
        return {"distinct_prompts": int(self.seen.sum())}
