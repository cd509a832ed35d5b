"""Which prompts to generate for: four samplers with one contract.

    Uniform        plain GRPO: shuffled epochs
    PromptReplay   2603.21177: prompts of medium pass rate come back after a while, with fresh answers
    Prioritized    2601.02648: the whole data set ordered by p(1-p), solved and unsolved prompts retested now and then
    GRESO          2506.02177: shuffled epochs that pass over prompts whose last groups were all right or all wrong

A sampler knows prompts by their index and keeps a few numbers for each, never an answer:

    draw(n, step) -> list[int]                          n different prompts; `epochs.replays` holds those brought back
    observe(indices, num_correct, num_answers, step)    how the groups of these prompts turned out, dead ones included
    state_dict(), load_state_dict(state)                everything, random generators included
    figures() -> dict                                   for the log

A second draw for the same step (a refill) repeats none of the first, and gives fewer than n where fewer are left.
Results are observed before the next draw, or later in an asynchronous trainer; a prompt whose answers are still out is
not brought back (`epochs.settle(indices)`: they are lost). Where rewards are not 0 or 1, observe takes their `variance`
[P] too: it is no longer p(1-p), and a group that is all one half has no gradient.
"""

import copy

import numpy as np
import torch

NEVER = np.float32(np.inf)
NO_SPREAD = 1e-9  # variance of rewards that differ by rounding only
IN_DOUBT, OUT = 1, 2  # IN_DOUBT: OUT when the state was saved; the answers may come yet, or died with that run
HEAP, SOLVED, UNSOLVED = range(3)  # where Prioritized has a prompt
KEPT = 8  # steps whose batches are remembered: an asynchronous trainer refills one after later ones were drawn


class Saved:
    """state_dict and load_state_dict for the attributes that a class names in STATE; strict about keys and sizes."""

    def state_dict(self) -> dict:
        state = {}
        for name in self.STATE:
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(value.copy())
            elif isinstance(value, np.random.Generator):
                value = value.bit_generator.state
            elif hasattr(value, "state_dict"):
                value = value.state_dict()
            state[name] = copy.deepcopy(value) if isinstance(value, list) else value
        return state

    def load_state_dict(self, state: dict) -> None:
        if set(state) != set(self.STATE):
            wrong = sorted(set(state) ^ set(self.STATE))
            raise KeyError(f"state of {type(self).__name__} has keys too many or too few: {', '.join(wrong)}")
        for name, value in state.items():
            now = getattr(self, name)
            if isinstance(now, np.ndarray):
                if len(value) != len(now):
                    raise ValueError(f"state of {type(self).__name__} is of {len(value)} prompts, not {len(now)}")
                now[:] = value.numpy()
            elif isinstance(now, np.random.Generator):
                now.bit_generator.state = value
            elif hasattr(now, "load_state_dict"):
                now.load_state_dict(value)
            else:
                setattr(self, name, copy.deepcopy(value))


def smallest(count: int, among: np.ndarray, key: np.ndarray, tie: np.ndarray) -> list[int]:
    """The `count` prompts of those masked by `among` that have the smallest keys, in ascending order, equal keys by
    `tie` (all different). A few comparisons of flat arrays; a heap would be full of entries gone stale."""
    if count <= 0:
        return []

    def bound(mask, values):  # the count-th smallest value of a sample: that of the whole is no larger
        sample = values[::64][mask[::64]]
        return np.partition(sample, count - 1)[count - 1] if len(sample) >= count else np.inf

    most = bound(among, key)
    level = among & (key == most)
    level &= tie <= bound(level, tie)
    x = np.flatnonzero(level | (among & (key < most)))
    return x[np.lexsort((tie[x], key[x]))][:count].tolist()


class Epochs(Saved):
    """What all samplers share: the shuffled order over the data set, and which prompts are in which step's batch."""

    STATE = ("rng", "order", "position", "seen", "out", "batches")

    def __init__(self, num_prompts: int, seed: int):
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(num_prompts).astype(np.int32)
        self.position = 0  # how far this epoch has come
        self.seen = np.zeros(num_prompts, bool)  # ever drawn
        self.out = np.zeros(num_prompts, np.int8)  # OUT: drawn, and the answers are not in yet
        self.batches: list[dict] = []  # of the last few steps, the one last asked for at the end
        self.chosen: dict[int, bool] = {}  # that batch: prompt, and whether the sampler brought it back

    @property
    def replays(self) -> set[int]:
        return {x for x, back in self.chosen.items() if back}

    def begin(self, n: int, step: int) -> int:
        """Opens the batch of `step`, or takes it up again for a refill; how many of `n` prompts it has room for."""
        known = [batch for batch in self.batches if batch["step"] == step]
        if not known and not 0 < n <= len(self.order):
            raise ValueError(f"{n} different prompts a step are asked for; there are {len(self.order)}")
        batch = known[0] if known else {"step": int(step), "asked": int(n), "chosen": {}}
        others = sorted((other for other in self.batches if other is not batch), key=lambda other: other["step"])
        self.batches = [*others, batch][-KEPT:]
        self.chosen = batch["chosen"]
        return min(n, len(self.order) - len(self.chosen))

    def take(self, x: int, replay: bool = False) -> int:
        self.chosen[x] = bool(replay)
        self.seen[x], self.out[x] = True, self.out[x] or OUT
        return x

    def next(self) -> int:
        """The next prompt of the epoch that is not in this step's batch yet. One that is passed over keeps its turn
        (but for the last of an epoch), so that replay costs no fresh prompt its visit."""
        while True:
            for ahead in range(self.position, len(self.order)):
                x = int(self.order[ahead])
                if x not in self.chosen:
                    self.order[self.position + 1 : ahead + 1] = self.order[self.position : ahead]
                    self.order[self.position] = x
                    self.position += 1
                    return x
            self.order[:] = self.rng.permutation(len(self.order))
            self.position = 0

    def free(self, least: int = 0) -> np.ndarray:
        """Which prompts are neither out nor in this step's batch; if they are too few, those IN_DOUBT as well."""
        for most in (0, IN_DOUBT):
            free = self.out <= most
            free[list(self.chosen)] = False
            if np.count_nonzero(free) >= least:
                break
        return free

    def settle(self, indices) -> np.ndarray:
        """Answers to these prompts are in, or known to be lost. So are those IN_DOUBT, if these were drawn later."""
        x = np.asarray(indices, np.int64)
        if len(x) and (self.out[x] == OUT).all():
            self.out[self.out == IN_DOUBT] = 0
        self.out[x] = 0
        return x

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.out[self.out == OUT] = IN_DOUBT
        self.chosen = self.batches[-1]["chosen"] if self.batches else {}


class Uniform(Saved):
    """Plain GRPO: shuffled epochs over all prompts."""

    STATE = ("epochs",)

    def __init__(self, num_prompts: int, seed: int = 0):
        self.epochs = Epochs(num_prompts, seed)

    def draw(self, n: int, step: int) -> list[int]:
        return [self.epochs.take(self.epochs.next()) for _ in range(self.epochs.begin(n, step))]

    def observe(self, indices, num_correct, num_answers, step, variance=None) -> None:
        self.epochs.settle(indices)

    def figures(self) -> dict:
        return {}


class PromptReplay(Saved):
    """Prompt Replay (2603.21177): prompts whose latest pass rate is in `band` come back with fresh answers, nearest one
    half first, then the harder, the less reused, the smaller index; at most floor(share * n) a step, after `cooldown`
    steps, `max_reuse` times. All else in a batch comes from the shuffled epochs, which replay does not advance."""

    STATE = ("epochs", "correct", "total", "last", "uses")

    def __init__(self, num_prompts: int, seed: int = 0, band=(0.25, 0.75), share=0.75, cooldown=10, max_reuse=15):
        low, high = band
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the band must be two pass rates with 0 <= low <= high <= 1, got {low} {high}")
        if not 0 <= share <= 1 or cooldown < 0 or max_reuse < 0:
            raise ValueError(f"need share in [0, 1], cooldown and max reuse >= 0: {share}, {cooldown}, {max_reuse}")
        self.band, self.share, self.cooldown, self.max_reuse = (low, high), share, cooldown, max_reuse
        self.epochs = Epochs(num_prompts, seed)
        self.correct = np.zeros(num_prompts)  # of the latest group
        self.total = np.zeros(num_prompts, np.int32)  # 0: never observed
        self.last = np.full(num_prompts, -(10**9), np.int32)  # the step of the latest use
        self.uses = np.zeros(num_prompts, np.int32)  # times it was replayed
        self.distance = np.full(num_prompts, NEVER)  # of the pass rate to one half; NEVER: it may not come back
        self.tie = np.arange(num_prompts)  # the order among equal distances; both are derived from the counts

    def _rank(self, x: np.ndarray) -> None:
        correct, total, uses = self.correct[x], self.total[x].clip(1), self.uses[x]
        rate = correct / total
        inside = (self.total[x] > 0) & (self.band[0] <= rate) & (rate <= self.band[1]) & (uses < self.max_reuse)
        # |2k - G| is an exact integer: 3/8 and 5/8 must tie, and |3/8 - .5| would not be safe for every G
        self.distance[x] = np.where(inside, np.abs(2 * correct - total) / (2 * total), NEVER)
        self.tie[x] = (2 * correct > total).astype(np.int64) << 56 | uses.astype(np.int64) << 32 | x  # harder first

    def draw(self, n: int, step: int) -> list[int]:
        n = self.epochs.begin(n, step)
        asked = self.epochs.batches[-1]["asked"]
        budget = int(self.share * asked + 1e-9) - len(self.epochs.replays)  # 0.29 * 100 is 28.999...
        ready = self.epochs.free() & (self.last <= step - self.cooldown) & (self.distance < NEVER)
        replays = smallest(min(budget, n), ready, self.distance, self.tie)
        self.uses[replays] += 1  # when issued, not when the answers arrive
        self._rank(np.array(replays, np.int64))
        chosen = [self.epochs.take(x, replay=True) for x in replays]
        chosen += [self.epochs.take(self.epochs.next()) for _ in range(n - len(chosen))]
        self.last[chosen] = np.maximum(self.last[chosen], step)  # from the draw on, not only when the answers are in
        return chosen

    def observe(self, indices, num_correct, num_answers, step, variance=None) -> None:
        x = self.epochs.settle(indices)
        self.correct[x], self.total[x] = num_correct, num_answers
        if variance is not None:
            self.total[x[np.asarray(variance) < NO_SPREAD]] = 0
        self.last[x] = np.maximum(self.last[x], step)
        self._rank(x)

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._rank(np.arange(len(self.total)))

    def figures(self) -> dict:
        uses = np.bincount(self.uses[self.uses > 0], minlength=1).tolist()
        return {"buffer": int((self.distance < NEVER).sum()), "prompt_uses": uses}


class Prioritized(Saved):
    """Prioritized Replay (2601.02648): the prompts of largest p(1-p) first, p smoothed; all-right and all-wrong ones
    wait in two pools and are retested, longest-untested first, every `retest_every` steps (a quarter of the batch from
    the solved, the rest from the unsolved: the paper's 1 and 3 of 4); now and then a whole batch is drawn at random."""

    STATE = ("epochs", "rng", "rate", "excess", "priority", "key", "place", "visits", "flips", "tie")

    def __init__(self, num_prompts: int, seed: int = 0, smoothing=0.8, initial_priority=0.2, explore=0.125,
                 retest_every=10, retest_solved=0.25, tie_bias=1e-4):  # fmt: skip
        if not 0 < smoothing <= 1 or not 0 <= explore <= 1 or not 0 <= retest_solved <= 1 or retest_every < 0:
            raise ValueError("need 0 < smoothing <= 1, explore and retest-solved in [0, 1], and retest-every >= 0")
        self.smoothing, self.explore, self.tie_bias = smoothing, explore, tie_bias
        self.retest_every, self.retest_solved = retest_every, retest_solved  # 0: no retests
        self.epochs = Epochs(num_prompts, seed)  # its order is a random tie-break, fixed for good; never walked
        self.rng = np.random.default_rng([seed, 1])
        self.rate = np.zeros(num_prompts)  # smoothed pass rate
        self.excess = np.zeros(num_prompts)  # smoothed variance minus p(1-p): 0 but for rewards between 0 and 1
        self.priority = np.full(num_prompts, min(initial_priority, 1e9))  # infinity: all are seen once before a return
        self.key = -self.priority  # smallest first; in the pools it is the step of the latest result
        self.place = np.full(num_prompts, HEAP, np.int8)  # where it is, or will be back when its answers are lost
        self.visits = np.zeros(num_prompts, np.int32)
        self.flips = np.zeros(2, np.int64)  # left the solved pool, left the unsolved pool
        self.tie = np.argsort(self.epochs.order)

    def draw(self, n: int, step: int) -> list[int]:
        n = self.epochs.begin(n, step)
        free = self.epochs.free(n)
        n = min(n, np.count_nonzero(free))
        chosen: list[int] = []
        places = [(HEAP, n), (UNSOLVED, n), (SOLVED, n)]
        if self.retest_every and step % self.retest_every == 0:
            # in whole prompts over all retests so far, so that even batches of one get to both pools
            due, after = (int(self.retest_solved * n * (step // self.retest_every + i)) for i in (0, 1))
            if not self.epochs.chosen:
                places = [(SOLVED, after - due), (UNSOLVED, n - after + due), *places]
        elif self.rng.random() < self.explore:
            chosen = self.rng.choice(np.flatnonzero(free), n, replace=False).tolist()
        for place, most in places:
            if count := min(most, n - len(chosen)):
                found = smallest(count, free & (self.place == place), self.key, self.tie)
                free[found] = False
                chosen += found
        return [self.epochs.take(x, replay=self.visits[x] > 0) for x in chosen]

    def observe(self, indices, num_correct, num_answers, step, variance=None) -> None:
        x = self.epochs.settle(indices)
        mean = np.asarray(num_correct) / np.asarray(num_answers)
        dead = (mean <= 0) | (mean >= 1) if variance is None else np.asarray(variance) < NO_SPREAD
        alpha = np.where(self.visits[x] > 0, self.smoothing, 1.0)  # the first visit overwrites the guess
        rate = self.rate[x] = alpha * mean + (1 - alpha) * self.rate[x]
        excess = 0 * mean if variance is None else np.asarray(variance) - mean * (1 - mean)
        excess[np.abs(excess) < NO_SPREAD] = 0  # rounding must not part equal priorities
        self.excess[x] = alpha * excess + (1 - alpha) * self.excess[x]
        self.priority[x] = rate * (1 - rate) + self.excess[x] + self.tie_bias * (rate >= 0.5)  # 5 of 8 before 3 of 8
        # the pools follow the latest group, not the smoothed rate: one mixed group brings a prompt back
        place = np.where(dead, np.where(mean >= 1, SOLVED, UNSOLVED), HEAP)
        for i, pool in enumerate((SOLVED, UNSOLVED)):
            self.flips[i] += ((self.place[x] == pool) & (place != pool)).sum()
        self.place[x], self.key[x] = place, np.where(dead, step, -self.priority[x])
        self.visits[x] += 1

    def figures(self) -> dict:
        seen, out = self.visits > 0, self.epochs.out > 0
        heap, solved, unsolved = np.bincount(self.place[~out], minlength=3).tolist()
        rate = self.rate[seen] if seen.any() else np.zeros(1)
        return {
            "heap": heap, "solved_pool": solved, "unsolved_pool": unsolved, "out": int(out.sum()),
            "flips_solved": int(self.flips[0]), "flips_unsolved": int(self.flips[1]),
            "rate_mean": float(rate.mean()), "rate_spread": float(rate.std()),
            "priority_mean": float(self.priority[seen].mean()) if seen.any() else 0.0,
            "prompt_uses": np.bincount(self.visits[seen] - 1, minlength=1).tolist(),
        }  # fmt: skip


class GRESO(Saved):
    """GRESO (2506.02177), a baseline: walk the epochs, but pass over a prompt with probability 1 - max(p^z, floor), z
    its latest zero-variance groups in a row. p is kept apart for all-right and all-wrong prompts, and moves by `pace`
    towards the target share of such groups (a third easy, two thirds hard).
    """

    STATE = ("epochs", "rng", "dead", "chance", "skipped")

    def __init__(self, num_prompts: int, seed: int = 0, target=0.25, floor=0.01, pace=0.01, start=0.5):
        if not 0 <= target <= 1 or not 0 < floor <= 1:
            raise ValueError(f"need 0 <= target <= 1 and 0 < floor <= 1, got {target} and {floor}")
        self.targets, self.floor, self.pace = (target / 3, target * 2 / 3), floor, pace
        self.epochs = Epochs(num_prompts, seed)
        self.rng = np.random.default_rng([seed, 1])
        self.dead = np.zeros(num_prompts, np.int32)  # zero-variance groups in a row: +z all right, -z all wrong
        self.chance = np.array([start, start])  # p of easy and of hard prompts
        self.skipped = 0

    def draw(self, n: int, step: int) -> list[int]:
        n = self.epochs.begin(n, step)
        chosen: list[int] = []
        while len(chosen) < n:
            x = self.epochs.next()
            z = int(self.dead[x])
            if z and self.rng.random() >= max(self.chance[int(z < 0)] ** abs(z), self.floor):
                self.skipped += 1
            else:
                chosen.append(self.epochs.take(x))
        return chosen

    def observe(self, indices, num_correct, num_answers, step, variance=None) -> None:
        if not len(x := self.epochs.settle(indices)):
            return
        mean = np.asarray(num_correct) / np.asarray(num_answers)
        dead = (mean <= 0) | (mean >= 1) if variance is None else np.asarray(variance) < NO_SPREAD
        sign = np.where(dead, np.where(mean >= 1, 1, -1), 0)  # all right, all wrong, or of use
        self.dead[x] = sign * (np.abs(self.dead[x]) + 1)
        for i, share in enumerate(((sign > 0).mean(), (sign < 0).mean())):
            change = -self.pace if share >= self.targets[i] else self.pace
            self.chance[i] = np.clip(self.chance[i] + change, 0.05, 0.95)

    def figures(self) -> dict:
        return {"p_easy": float(self.chance[0]), "p_hard": float(self.chance[1]), "skipped": self.skipped}
