"""Replay for GRPO: the record of a group, and one class for each paper's rule.

A sampler decides which prompts to generate for. It knows prompts by their number, and keeps figures, never answers:

    Uniform          plain GRPO: shuffled epochs
    PromptReplay     2603.21177: prompts of medium pass rate come back after a while, with fresh answers
    Prioritized      2601.02648: the prompts of largest p(1-p) first, solved and unsolved ones retested now and then

    draw(n, step) -> list[int]                          n different prompts; `replays` are those brought back
    observe(prompts, num_correct, num_answers, step)    how their groups turned out, dead ones too, before the next draw

A store decides what is trained on besides the useful groups of a step. It keeps answers, and changes none of them:

    DynamicSampling  DAPO, 2503.14476: useful groups beyond a full batch lead the next one
    GroupReplay      POPO, 2606.01281: recent useful groups, each whole, stand in for dead ones
    RolloutReplay    2606.04560: single stored answers of large advantage are added, while they are young

    watch(groups, step)                                 all groups of a step, dead ones too, before `complete`
    complete(useful, places, step) -> list[Group]       the batch; `places`: how many groups it is meant to have
    learn(trained)                                      the figures of the update that followed

All have `figures` for the log, and `state_dict` and `load_state_dict`, random generators included. The loop sets their
`progress` before each step: the share of the run's budget that is done, in steps or in answers, from 0 to 1. Their
keyword arguments are set from the flags of the same names. Baselines, ablations and our own rules: lab/rules.py.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from support.epochs import Epochs, within_reach
from support.log import pool_figures, reuse
from support.state import Saved, Store


@dataclass
class Group:
    """G answers to one prompt, with the log-probs they were sampled with, their rewards, and their time of birth.

    A group is dead when all its rewards are equal: its advantages are zero, and it teaches nothing.
    """

    prompt: int  # the number of the prompt in the data set
    tokens: list[torch.Tensor]  # G answers, int32 [T_g]; the end-of-text token is inside
    logprobs: list[torch.Tensor]  # G times float32 [T_g]: log mu, of the policy and temperature that sampled them
    truncated: list[bool]  # G; True: cut at the length limit, without end of text
    birth: int  # the step whose policy generated it
    rewards: torch.Tensor | None = None  # [G]
    advantages: torch.Tensor | None = None  # [G], as they were at birth
    uses: int = 0  # how often it has been trained on again

    @property
    def dead(self) -> bool:
        return bool((self.rewards == self.rewards[0]).all())

    @property
    def num_correct(self) -> float:
        """How many answers are right: of reward 1 or more. One between 0 and 1 counts as that part of a right one,
        and less than 0 as wrong. A dead group whose rewards are below 1 counts as all wrong."""
        if self.dead and self.rewards[0] < 1:
            return 0.0
        return float(self.rewards.double().clamp(0, 1).sum())

    def pick(self, i: int) -> "Group":
        """Answer `i` alone, with the advantage that it had in its group."""
        names = ("tokens", "logprobs", "truncated", "rewards", "advantages")
        one = {name: getattr(self, name)[i : i + 1] for name in names}
        return replace(self, **one, uses=0)


# ---------------------------------------------------------------- which prompts to generate for


class Uniform(Epochs):
    """Plain GRPO: every prompt once an epoch, in an order shuffled anew. `begin` and `take`: support/epochs.py."""

    DECIDES = "prompts"  # which prompts to generate for
    progress = 0.0

    def draw(self, n: int, step: int) -> list[int]:
        return self.take_fresh(self.begin(n, step))

    def observe(self, prompts: list[int], num_correct: list[float], num_answers, step: int) -> None:
        """num_correct: right answers to each of `prompts`. num_answers: G, or one number for each prompt."""


class PromptReplay(Uniform):
    """Prompt Replay (2603.21177). Prompts of medium pass rate come back, with fresh answers:

    1. Up to floor(share * P) prompts of a batch may be prompts whose latest pass rate lies in `band`, ends included,
    2. which were last used `cooldown` steps ago or more, and have come back fewer than `max_reuse` times.
    3. The nearest to one half come first; ties (as in the authors' code): harder, less reused, smaller number.
    4. All other places go to the next prompts of the epoch.

    Why one half: the expected squared gradient of a prompt goes with p(1-p), which is largest there.
    Known from the abstract, descriptions, and the authors' code. Ours: a prompt that came back keeps its turn in the
    epoch, a refill does not renew the budget, and none is retired for good.
    """

    STATE = (*Uniform.STATE, "rate", "last", "uses")

    def __init__(self, num_prompts: int, seed: int = 0, band=(0.25, 0.75), share=0.75, cooldown=10, max_reuse=15):
        if not 0 <= band[0] <= band[1] <= 1:
            raise ValueError(f"the band must be two pass rates with 0 <= low <= high <= 1, got {band[0]} {band[1]}")
        if not 0 <= share <= 1 or cooldown < 0 or max_reuse < 0:
            raise ValueError(f"need share in [0, 1], cooldown and max reuse >= 0: {share}, {cooldown}, {max_reuse}")
        super().__init__(num_prompts, seed)
        self.band = band
        self.share = share
        self.cooldown = cooldown
        self.max_reuse = max_reuse
        self.rate = np.full(num_prompts, np.nan)  # pass rate of the latest group; nan: none yet
        self.last = np.full(num_prompts, -np.inf)  # step of the latest use
        self.uses = np.zeros(num_prompts, int)  # how often it came back

    def draw(self, n: int, step: int) -> list[int]:
        room = self.begin(n, step)
        # The budget is the step's: a refill does not renew it. 1e-9: 0.29 * 100 is 28.999...
        budget = int(self.share * self.size + 1e-9) - len(self.replays)
        back = self.candidates(step)[: max(min(budget, room), 0)]
        self.uses[back] += 1
        chosen = self.take(back, replayed=True) + self.take_fresh(room - len(back))
        self.last[chosen] = step
        return chosen

    def candidates(self, step: int) -> np.ndarray:
        """The prompts that may come back at `step`, best first."""
        ready = self.in_band() & (self.last <= step - self.cooldown)
        ready[list(self.batch)] = False
        x = np.flatnonzero(ready)
        # Rounded, so that 3/10 and 7/10 are equally near.
        distance = np.abs(self.rate - 0.5).round(9)
        x = within_reach(x, distance, self.size)
        return x[np.lexsort((self.uses[x], self.rate[x], distance[x]))]  # the last key counts most

    def in_band(self) -> np.ndarray:
        low, high = self.band
        return (low <= self.rate) & (self.rate <= high) & (self.uses < self.max_reuse)

    def observe(self, prompts: list[int], num_correct: list[float], num_answers, step: int) -> None:
        self.rate[prompts] = np.array(num_correct, float) / np.array(num_answers)
        self.last[prompts] = step

    def figures(self) -> dict:
        uses = np.bincount(self.uses[self.uses > 0], minlength=1).tolist()
        return {"buffer": int(self.in_band().sum()), "prompt_uses": uses}


class Prioritized(Uniform):
    """Prioritized Replay (2601.02648). The whole data set in order of p(1-p), with retests:

    1. A prompt has a smoothed pass rate p: smoothing * newest + (1 - smoothing) * before; the first group sets it.
    2. A batch is the prompts of largest p(1-p), where one never seen counts as `initial_priority`.
    3. A prompt whose latest group is all right or all wrong waits in a pool, the solved or the unsolved one.
    4. Every `retest_every` steps a batch is made of the pools, longest untested first: `retest_solved` of it from
       the solved ones (the paper's 1 of 4), the rest from the unsolved; a mixed group brings a prompt back.
    5. In any other step a whole batch is drawn at random, with chance `explore`.

    Known from the paper's opening and the author's code: there too p >= 1/2 goes first of equal priorities, and where
    one source runs short the others fill the batch. Ours: further ties go by a random order fixed at the start; each
    refill decides anew on rule 5.
    """

    STATE = (*Uniform.STATE, "explore_rng", "rate", "priority", "place", "tested", "visits", "flips")
    HEAP, SOLVED, UNSOLVED = range(3)  # where a prompt is
    TIE_BIAS = 1e-4  # head start of p >= 1/2: of 3/8 and 5/8 the one that is nearly learnt goes first

    def __init__(
        self,
        num_prompts,
        seed=0,
        smoothing=0.8,
        initial_priority=0.2,
        explore=0.125,
        retest_every=10,
        retest_solved=0.25,
    ):
        if not 0 < smoothing <= 1 or not 0 <= explore <= 1 or not 0 <= retest_solved <= 1 or retest_every < 0:
            raise ValueError("need 0 < smoothing <= 1, explore and retest-solved in [0, 1], and retest-every >= 0")
        super().__init__(num_prompts, seed)
        self.smoothing = smoothing
        self.explore = explore
        self.retest_every = retest_every  # 0: no retests
        self.retest_solved = retest_solved
        self.explore_rng = np.random.default_rng([seed, 1])
        self.rate = np.zeros(num_prompts)  # p, smoothed
        self.priority = np.full(num_prompts, float(initial_priority))  # inf: all are seen once before one returns
        self.place = np.full(num_prompts, self.HEAP)
        self.tested = np.zeros(num_prompts)  # step of the latest group
        self.visits = np.zeros(num_prompts, int)
        self.flips = np.zeros(2, int)  # prompts that left the solved pool, and the unsolved one

    def draw(self, n: int, step: int) -> list[int]:
        room = self.begin(n, step)
        retest = self.retest_every > 0 and step % self.retest_every == 0
        chosen: list[int] = []
        # Retests and exploration choose first; what they leave open goes by priority.
        if retest and not self.batch:
            solved = int(self.retest_solved * room + 0.5)
            chosen += self.first(self.SOLVED, self.tested, solved)
            chosen += self.first(self.UNSOLVED, self.tested, room - solved)
        elif not retest and self.explore_rng.random() < self.explore:
            free = np.ones(len(self.rate), bool)
            free[list(self.batch)] = False
            chosen += self.put(self.explore_rng.choice(np.flatnonzero(free), room, replace=False))
        chosen += self.first(self.HEAP, -self.priority, room - len(chosen))
        chosen += self.first(self.UNSOLVED, self.tested, room - len(chosen))
        chosen += self.first(self.SOLVED, self.tested, room - len(chosen))
        return chosen

    def first(self, place: int, key: np.ndarray, n: int) -> list[int]:
        """Puts the n prompts at `place` that have the smallest `key` into the batch, or all there are."""
        if n == 0:
            return []
        ready = self.place == place
        ready[list(self.batch)] = False
        x = self.order[ready[self.order]]  # in the order that decides between equal ones
        x = within_reach(x, key, n)
        return self.put(x[np.argsort(key[x], kind="stable")][:n])

    def put(self, prompts) -> list[int]:
        for x in prompts:
            self.take([x], replayed=bool(self.visits[x]))
        return [int(x) for x in prompts]

    def observe(self, prompts: list[int], num_correct: list[float], num_answers, step: int) -> None:
        for x, newest in zip(prompts, np.array(num_correct, float) / np.array(num_answers), strict=True):
            # The pass rate is smoothed, but where the prompt goes is decided by its newest group alone.
            weight = self.smoothing if self.visits[x] else 1.0
            p = weight * newest + (1 - weight) * self.rate[x]
            place = self.HEAP
            if newest >= 1:
                place = self.SOLVED
            elif newest <= 0:
                place = self.UNSOLVED
            if self.place[x] not in (self.HEAP, place):
                self.flips[self.place[x] - 1] += 1
            self.rate[x] = p
            self.priority[x] = p * (1 - p) + self.TIE_BIAS * (p >= 0.5)
            self.place[x] = place
            self.tested[x] = step
            self.visits[x] += 1

    def figures(self) -> dict:
        return pool_figures(self)


# ---------------------------------------------------------------- what a step trains on besides its useful groups


class ReplayStore(Saved):
    """What stores share: groups in `stored`, oldest first, and those that the latest batch drew."""

    STATE = ("stored",)
    progress = 0.0

    def __init__(self, capacity: int | None = None):
        self.stored = Store(Group, capacity)
        self.drawn: list[Group] = []

    def attach(self, run) -> None:
        """The run that begins (train.Run), for a rule that needs more of it. The papers' rules do not."""

    def watch(self, groups: list[Group], step: int) -> None:
        """All groups of the step, dead ones too. The papers' rules take no notice."""

    def learn(self, trained: dict) -> None:
        """The figures of the update that followed. Nor of these."""

    def figures(self, step: int) -> dict:
        return {"stored": len(self.stored)}


class DynamicSampling(ReplayStore):
    """DAPO (2503.14476), a baseline. The loop generates again until the batch is full. Ours: useful groups that are
    left over lead the next batch; its released code throws them away."""

    DECIDES = "places"  # what fills the places of dead groups
    FLAGS = ("max_rounds",)  # that the loop reads for this rule alone

    def complete(self, useful: list[Group], places: int, step: int) -> list[Group]:
        ready = [*self.stored, *useful]
        self.stored.clear()
        self.stored.extend(ready[places:])
        return ready[:places]

    def figures(self, step: int) -> dict:
        return {"carried": len(self.stored)}


class GroupReplay(ReplayStore):
    """POPO (2606.01281). Whole groups stand in for dead ones:

    1. The places of dead groups go to the stored useful groups, newest first, each of them whole.
    2. Then this step's useful groups are stored; beyond `group_capacity` groups the oldest go first.

    What makes this right is the objective: weights pi_old / mu, and one clip around pi_old for fresh and stored
    tokens alike (grpo.policy_loss). Known from the abstract and a digest by the authors, without numbers. Ours: weights
    per token with a cap, two steps' worth of groups, random order within a step; the clips are those of MoPPS.
    """

    DECIDES = "places"
    STATE = (*ReplayStore.STATE, "rng")

    def __init__(self, seed: int = 0, group_capacity: int = 0, prompts_per_step: int = 32):
        if group_capacity < 0:
            raise ValueError(f"--group-capacity must be at least 0, got {group_capacity}")
        super().__init__(group_capacity or 2 * prompts_per_step)
        self.rng = np.random.default_rng([seed, 2])
        self.replaced = 0.0  # share of the latest batch's places that went to stored groups

    def complete(self, useful: list[Group], places: int, step: int) -> list[Group]:
        self.drawn = self.choose(max(places - len(useful), 0))
        for group in self.drawn:
            group.uses += 1
        self.replaced = len(self.drawn) / max(places, 1)
        # After the draw, so that no group stands in for itself.
        self.stored.extend(useful[i] for i in self.rng.permutation(len(useful)))
        return useful + self.drawn

    def choose(self, dead: int) -> list[Group]:
        """The groups that take the places of `dead` dead ones."""
        return list(reversed(self.stored))[:dead]

    def figures(self, step: int) -> dict:
        return {"stored_groups": len(self.stored), "replaced": self.replaced} | reuse("group", self.drawn, step)


class RolloutReplay(ReplayStore):
    """Rollout-level replay (2606.04560). Single answers are trained on again, while they are young:

    1. After `replay_warmup` steps, round(replay_ratio * B) stored answers join the B useful fresh ones,
    2. drawn without replacement, with chances that go with (|A| + 1e-6)^priority_exponent;
    3. an answer leaves when it is older than `max_age` steps; beyond `rollout_capacity` the oldest go first.
    4. Tokens, log-probs and advantage stay as they were at birth; the clip is around the birth policy.

    Known from the abstract, and from a re-implementation that quotes the paper's constants. Ours: no answer is drawn
    twice in a step; `mask_truncated` keeps truncated answers out of store and B.
    """

    DECIDES = "extra"  # what is added to the batch
    STATE = (*ReplayStore.STATE, "rng")

    def __init__(
        self,
        seed: int = 0,
        replay_ratio=0.5,
        priority_exponent=0.5,
        max_age=10,
        replay_warmup=20,
        rollout_capacity=30_000,
        mask_truncated=False,
    ):
        if replay_ratio < 0 or priority_exponent < 0 or max_age < 1 or replay_warmup < 0 or rollout_capacity < 1:
            raise ValueError("need ratio, exponent and warm-up >= 0, and max age and capacity >= 1")
        super().__init__(rollout_capacity)
        self.rng = np.random.default_rng([seed, 3])
        self.replay_ratio = replay_ratio
        self.priority_exponent = priority_exponent
        self.max_age = max_age
        self.replay_warmup = replay_warmup
        self.mask_truncated = mask_truncated

    def complete(self, useful: list[Group], places: int, step: int) -> list[Group]:
        # Which stored answers are young enough, and how many of them there is a place for.
        young = [answer for answer in self.stored if step - answer.birth <= self.max_age]
        fresh = self.answers_of(useful)
        count = 0
        if step > self.replay_warmup:
            count = min(round(self.replay_ratio * len(fresh)), len(young))
        # The draw.
        self.drawn = []
        if count:
            size = np.array([abs(float(answer.advantages[0])) for answer in young])
            chance = (size + 1e-6) ** self.priority_exponent
            found = self.rng.choice(len(young), count, replace=False, p=chance / chance.sum())
            self.drawn = [young[i] for i in found]
        for answer in self.drawn:
            answer.uses += 1
        # After the draw, so that nothing is replayed in the step of its birth.
        self.stored.clear()
        self.stored.extend(young + fresh)
        return useful + self.drawn

    def answers_of(self, groups: list[Group]) -> list[Group]:
        """The fresh answers of `groups`, one by one. Groups that POPO has brought back are here already."""
        answers = []
        for group in groups:
            for i, truncated in enumerate(group.truncated):
                if not group.uses and not (truncated and self.mask_truncated):
                    answers.append(group.pick(i))
        return answers

    def figures(self, step: int) -> dict:
        figures = {"stored_rollouts": len(self.stored)} | reuse("rollout", self.drawn, step)
        if self.drawn:
            positive = sum(float(answer.advantages[0]) > 0 for answer in self.drawn)
            figures["replayed_positive"] = positive / len(self.drawn)
        return figures
