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

A second draw for the same step (a refill) repeats none of the first. Results are observed before the next draw, or
later in an asynchronous trainer; a prompt whose answers are still out is not drawn again. Where a paper keeps a heap,
a partition over flat arrays gives the same order and has nothing that can go stale (a million prompts: milliseconds).
"""

import numpy as np
import torch

NEVER = np.float32(np.inf)


class Saved:
    """state_dict and load_state_dict for the attributes that a class names in STATE; strict about keys and sizes."""

    STATE: tuple[str, ...] = ()

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
            elif isinstance(value, set):
                value = sorted(value)
            state[name] = value
        return state

    def load_state_dict(self, state: dict) -> None:
        if set(state) != set(self.STATE):
            missing, extra = set(self.STATE) - set(state), set(state) - set(self.STATE)
            raise KeyError(f"state of {type(self).__name__}: missing {sorted(missing)}, unexpected {sorted(extra)}")
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
            elif isinstance(now, set):
                now.clear()
                now.update(value)
            else:
                setattr(self, name, value)


def smallest(count: int, key: np.ndarray, tie: np.ndarray) -> list[int]:
    """Indices of the `count` smallest finite keys in ascending order, equal keys by `tie`; linear in len(key)."""
    count = min(count, len(key))
    if count <= 0:
        return []
    bound = np.partition(key, count - 1)[count - 1]
    found = np.flatnonzero(key < bound)
    if bound < NEVER:
        level = np.flatnonzero(key == bound)
        missing = count - len(found)
        found = np.concatenate([found, level[np.argpartition(tie[level], missing - 1)[:missing]]])
    return found[np.lexsort((tie[found], key[found]))].tolist()


class Epochs(Saved):
    """The shuffled order over the data set that all samplers share, and what has been drawn for the current step."""

    STATE = ("rng", "order", "position", "step", "chosen", "replays", "seen")

    def __init__(self, num_prompts: int, seed: int):
        if num_prompts < 1:
            raise ValueError("a sampler needs at least one prompt")
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(num_prompts).astype(np.int32)
        self.position = 0  # how far this epoch has come
        self.step = -1
        self.chosen: set[int] = set()  # drawn for this step, by all requests
        self.replays: set[int] = set()  # those of them that the sampler brought back
        self.seen = np.zeros(num_prompts, bool)  # ever drawn

    def begin(self, n: int, step: int) -> tuple[int, bool]:
        """How many of `n` prompts are left for `step`, and whether this is its first request."""
        first = step != self.step
        if first:
            self.step, self.chosen, self.replays = step, set(), set()
            if not 0 < n <= len(self.order):
                raise ValueError(f"{n} different prompts a step are asked for; there are {len(self.order)}")
        return min(n, len(self.order) - len(self.chosen)), first

    def take(self, x: int, replay: bool = False) -> int:
        self.chosen.add(x)
        self.seen[x] = True
        if replay:
            self.replays.add(x)
        return x

    def next(self) -> int:
        """The next prompt of the epoch that is not in this step's batch yet. One that is passed over keeps its turn,
        so that replay costs no fresh prompt its visit."""
        while True:
            for ahead in range(self.position, len(self.order)):
                x = int(self.order[ahead])
                if x not in self.chosen:
                    self.order[ahead], self.order[self.position] = self.order[self.position], x
                    self.position += 1
                    return x
            self.order[:] = self.rng.permutation(len(self.order))
            self.position = 0


class Uniform(Saved):
    """Plain GRPO: shuffled epochs over all prompts."""

    STATE = ("epochs",)

    def __init__(self, num_prompts: int, seed: int = 0):
        self.epochs = Epochs(num_prompts, seed)

    def draw(self, n: int, step: int) -> list[int]:
        n, _ = self.epochs.begin(n, step)
        return [self.epochs.take(self.epochs.next()) for _ in range(n)]

    def observe(self, indices, num_correct, num_answers, step, variance=None) -> None:
        pass

    def figures(self) -> dict:
        return {}


class PromptReplay(Saved):
    """Prompt Replay (2603.21177): prompts whose latest pass rate is in `band` come back with fresh answers, nearest one
    half first, then the harder, the less reused, the smaller index; at most floor(share * n) a step, after `cooldown`
    steps, `max_reuse` times. Everything else in a batch comes from the shuffled epochs, which replay does not advance.
    """

    STATE = ("epochs", "correct", "total", "last", "uses", "budget")

    def __init__(self, num_prompts: int, seed: int = 0, band=(0.25, 0.75), share=0.75, cooldown=10, max_reuse=15):
        low, high = band
        if not 0 <= low <= high <= 1:
            raise ValueError(f"the band must be two pass rates with 0 <= low <= high <= 1, got {low} {high}")
        if not 0 <= share <= 1:
            raise ValueError(f"the replay share must be between 0 and 1, got {share}")
        if cooldown < 0 or max_reuse < 0:
            raise ValueError(f"cooldown and max reuse must not be negative, got {cooldown} and {max_reuse}")
        self.band, self.share, self.cooldown, self.max_reuse = (low, high), share, cooldown, max_reuse
        self.epochs = Epochs(num_prompts, seed)
        self.correct = np.zeros(num_prompts, np.int32)  # of the latest group
        self.total = np.zeros(num_prompts, np.int32)  # 0: never observed
        self.last = np.full(num_prompts, -(10**9), np.int32)  # the step of the latest use
        self.uses = np.zeros(num_prompts, np.int32)  # times it was replayed
        self.budget = 0  # replays left for this step, also for refills
        self._rank(np.arange(num_prompts))

    def _rank(self, x: np.ndarray) -> None:
        """Order among candidates, derived from the counts: distance to one half (never: not a candidate), then tie."""
        if len(x) == len(self.total):
            self.distance, self.tie = np.empty(len(x), np.float32), np.empty(len(x), np.int64)
        correct, total, uses = self.correct[x], self.total[x].clip(1), self.uses[x]
        rate = correct / total
        inside = (self.total[x] > 0) & (self.band[0] <= rate) & (rate <= self.band[1]) & (uses < self.max_reuse)
        # |2k - G| is an exact integer: 3/8 and 5/8 must tie, and |3/8 - .5| would not be safe for every G
        self.distance[x] = np.where(inside, np.abs(2 * correct - total) / (2 * total), NEVER)
        self.tie[x] = (2 * correct > total).astype(np.int64) << 56 | uses.astype(np.int64) << 32 | x

    def draw(self, n: int, step: int) -> list[int]:
        n, first = self.epochs.begin(n, step)
        if first:
            self.budget = int(self.share * n + 1e-9)  # 0.29 * 100 is 28.999...
        chosen = self._replays(min(self.budget, n), step) if self.budget else []
        self.budget -= len(chosen)
        chosen = [self.epochs.take(x, replay=True) for x in chosen]
        chosen += [self.epochs.take(self.epochs.next()) for _ in range(n - len(chosen))]
        self.last[chosen] = step  # counted from the draw, so that a prompt whose answers are not in yet stays away
        return chosen

    def _replays(self, count: int, step: int) -> list[int]:
        key = np.where(self.last <= step - self.cooldown, self.distance, NEVER)
        key[list(self.epochs.chosen)] = NEVER
        found = smallest(count, key, self.tie)
        self.uses[found] += 1  # when issued, not when the answers arrive
        self._rank(np.array(found, np.int64))
        return found

    def observe(self, indices, num_correct, num_answers, step, variance=None) -> None:
        """Counts of this step's groups, dead ones included. `variance` (of the rewards, [P]) only where rewards are not
        0 or 1: a group that is all one half has no gradient, whatever its pass rate."""
        x = np.asarray(indices, np.int64)
        self.correct[x], self.total[x] = num_correct, num_answers
        if variance is not None:
            self.total[x[np.asarray(variance) == 0]] = 0
        self.last[x] = np.maximum(self.last[x], step)
        self._rank(x)

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._rank(np.arange(len(self.total)))

    def figures(self) -> dict:
        return {
            "buffer": int((self.distance < NEVER).sum()),
            "prompt_uses": np.bincount(self.uses[self.uses > 0], minlength=1).tolist(),
        }


HEAP, SOLVED, UNSOLVED, OUT = range(4)


class Prioritized(Saved):
    """Prioritized Replay (2601.02648): the prompts of largest p(1-p) first, p smoothed; all-right and all-wrong ones
    wait in two pools and are retested, longest-untested first, every `retest_every` steps (a quarter of the batch from
    the solved, the rest from the unsolved: the paper's 1 and 3 of 4); now and then a whole batch is drawn at random.
    """

    STATE = ("epochs", "rng", "rate", "priority", "last", "place", "origin", "visits", "flips", "tie")

    def __init__(
        self, num_prompts: int, seed: int = 0, smoothing=0.8, initial_priority=0.2, explore=0.125, retest_every=10,
        retest_solved=0.25, tie_bias=1e-4,
    ):  # fmt: skip
        if not 0 < smoothing <= 1 or not 0 <= explore <= 1 or not 0 <= retest_solved <= 1 or retest_every < 0:
            raise ValueError("need 0 < smoothing <= 1, explore and retest-solved in [0, 1], and retest-every >= 0")
        self.smoothing, self.explore, self.tie_bias = smoothing, explore, tie_bias
        self.retest_every, self.retest_solved = retest_every, retest_solved  # 0: no retests
        self.epochs = Epochs(num_prompts, seed)  # its order is never walked: it breaks ties, at random but for good
        self.rng = np.random.default_rng([seed, 1])
        self.rate = np.zeros(num_prompts)  # smoothed pass rate
        self.priority = np.full(
            num_prompts, min(initial_priority, 1e9)
        )  # infinity: all are seen once before any returns
        self.last = np.full(num_prompts, -1, np.int64)
        self.place = np.full(num_prompts, HEAP, np.int8)
        self.origin = np.full(num_prompts, HEAP, np.int8)  # where a prompt that is out was drawn from
        self.visits = np.zeros(num_prompts, np.int32)
        self.flips = np.zeros(2, np.int64)  # left the solved pool, left the unsolved pool
        self.tie = np.argsort(self.epochs.order).astype(np.int64)

    def draw(self, n: int, step: int) -> list[int]:
        n, first = self.epochs.begin(n, step)
        n = min(n, int((self.place != OUT).sum()))
        chosen: list[int] = []
        if first and self.retest_every and step > 0 and step % self.retest_every == 0:
            solved = int(self.retest_solved * n + 0.5)
            chosen += self._take(SOLVED, solved) + self._take(UNSOLVED, n - solved)
        elif first and self.rng.random() < self.explore:
            return self._mark(self.rng.choice(np.flatnonzero(self.place != OUT), n, replace=False).tolist())
        for place in (HEAP, UNSOLVED, SOLVED):
            chosen += self._take(place, n - len(chosen))
        return chosen

    def _take(self, place: int, count: int) -> list[int]:
        if count <= 0:
            return []
        order = -self.priority if place == HEAP else self.last  # largest priority, or longest untested
        key = np.where(self.place == place, order, np.inf)
        key[list(self.epochs.chosen)] = np.inf
        return self._mark(smallest(count, key, self.tie))

    def _mark(self, chosen: list[int]) -> list[int]:
        self.origin[chosen] = self.place[chosen]
        self.place[chosen] = OUT
        return [self.epochs.take(x, replay=self.visits[x] > 0) for x in chosen]

    def release(self, indices) -> None:
        """Drawn, but the answers were lost: back to where they were."""
        self.place[indices] = self.origin[indices]

    def observe(self, indices, num_correct, num_answers, step, variance=None) -> None:
        """As in the contract. `variance` ([P], mean squared centred advantage) takes the place of p(1-p) where rewards
        are not 0 or 1, because the two differ there."""
        for i, x in enumerate(indices):
            mean = num_correct[i] / num_answers[i]
            alpha = self.smoothing if self.visits[x] else 1.0  # the first visit overwrites the guess
            self.rate[x] += alpha * (mean - self.rate[x])
            if variance is None:
                bias = self.tie_bias if self.rate[x] >= 0.5 else 0.0  # 5 of 8 right goes before 3 of 8
                self.priority[x] = self.rate[x] * (1 - self.rate[x]) + bias
            else:
                self.priority[x] += alpha * (variance[i] - self.priority[x])
            # the pools follow the latest group, not the smoothed rate: one mixed group brings a prompt back
            place = SOLVED if mean >= 1 else UNSOLVED if mean <= 0 else HEAP
            before = self.origin[x] if self.place[x] == OUT else self.place[x]
            if self.visits[x] and before != place and before != HEAP:
                self.flips[before - SOLVED] += 1
            self.place[x], self.last[x] = place, step
            self.visits[x] += 1

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        out = np.flatnonzero(self.place == OUT)  # their answers died with the run that was generating them
        self.place[out] = self.origin[out]

    def figures(self) -> dict:
        heap, solved, unsolved, out = np.bincount(self.place, minlength=4).tolist()
        seen = self.visits > 0
        rate = self.rate[seen]
        return {
            "heap": heap,
            "solved_pool": solved,
            "unsolved_pool": unsolved,
            "out": out,
            "flips_solved": int(self.flips[0]),
            "flips_unsolved": int(self.flips[1]),
            "rate_mean": float(rate.mean()) if len(rate) else 0.0,
            "rate_spread": float(rate.std()) if len(rate) else 0.0,
            "prompt_uses": np.bincount(self.visits[seen] - 1, minlength=1).tolist(),
        }


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
        n, _ = self.epochs.begin(n, step)
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
        x, correct, total = np.asarray(indices, np.int64), np.asarray(num_correct), np.asarray(num_answers)
        easy, hard = correct >= total, correct <= 0
        run = np.abs(self.dead[x]) + 1
        self.dead[x] = np.where(easy, run, np.where(hard, -run, 0))
        for i, share in enumerate((easy.mean(), hard.mean())):
            step_ = -self.pace if share >= self.targets[i] else self.pace
            self.chance[i] = np.clip(self.chance[i] + step_, 0.05, 0.95)

    def figures(self) -> dict:
        return {"p_easy": float(self.chance[0]), "p_hard": float(self.chance[1]), "skipped": self.skipped}
