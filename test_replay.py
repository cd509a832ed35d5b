"""Tests of the samplers (replay.py) and the stores (buffer.py) against what their papers ask for.

A name such as test_prompt_replay_03_... is point 3 of "what an implementation must get right" for that
paper:

    prompt_replay     Prompt Replay, 2603.21177: points 1 to 14
    prioritized       Prioritized Replay, 2601.02648: points 1 to 12
    rollout_replay    rollout-level replay, 2606.04560: points 1 to 6, 9, 10, 12, 13 (7, 8: test_grpo.py, 11:
                      test_rollout.py)
    popo              POPO, 2606.01281: points 1 to 5, 11, 12 (6 to 10: test_grpo.py)
    f2_a to f2_f      faults of the code published with Prompt Replay
    greso, surplus    GRESO, 2506.02177, and the surplus of dynamic sampling, 2503.14476
    contract, state   what every sampler owes the training loop, and what a checkpoint does
"""

import hashlib
import io
import json
from collections import Counter, deque
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from buffer import Group, GroupReplay, RolloutReplay, Surplus

from lab.rules import Adaptive
from replay import GRESO, Prioritized, PromptReplay, Uniform, smallest

SAMPLERS = {"uniform": Uniform, "prompt": PromptReplay, "prioritized": Prioritized, "greso": GRESO}
SAMPLERS["adaptive"] = Adaptive
G = 16  # answers per prompt
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)

# ---------------------------------------------------------------- a policy whose pass rates are known


@dataclass
class Step:
    """What was drawn for one step, by all its requests."""

    step: int
    batch: list[int]
    replays: set[int]

    @property
    def fresh(self) -> list[int]:
        return [x for x in self.batch if x not in self.replays]


def simulate(sampler, rates, steps, n=8, rng=None, lag=0, refills=()) -> list[Step]:
    """Draws `n` prompts for each of `steps`, and then as many more as `refills` say; prompt x is answered
    rightly with probability rates[x]. Results come in `lag` steps later; with lag 0 each request's before
    the next one."""
    rng, history, pending = rng or np.random.default_rng(0), [], deque()
    for step in steps:
        parts = []
        for count in (n, *refills):
            parts.append(sampler.draw(count, step))
            pending.append((step, parts[-1]))
            while pending and pending[0][0] + lag <= step:
                born, batch = pending.popleft()
                sampler.observe(batch, rng.binomial(G, rates[batch]).tolist(), [G] * len(batch), born)
        history.append(Step(step, sum(parts, []), sampler.epochs.replays))
    return history


def mixed_rates(num_prompts: int, rng=None) -> np.ndarray:
    """Hopeless, hard, medium, easy and solved prompts."""
    return (rng or np.random.default_rng(1)).choice([0.0, 0.05, 0.3, 0.5, 0.8, 1.0], num_prompts)


def know(sampler, correct: dict[int, int], step: int = 0, size: int = G) -> None:
    """Tells the sampler how many of `size` answers to some prompts were right."""
    sampler.observe(list(correct), list(correct.values()), [size] * len(correct), step)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restored(sampler, fresh):
    """`fresh`, with the state of `sampler` as a checkpoint would bring it back."""
    fresh.load_state_dict(through_a_file(sampler.state_dict()))
    return fresh


def tensors(state) -> list[torch.Tensor]:
    if isinstance(state, dict):
        return [t for value in state.values() for t in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def numbers(state) -> int:
    """How many numbers a state holds."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    if isinstance(state, dict):
        return sum(1 + numbers(value) for value in state.values())
    return sum(map(numbers, state)) if isinstance(state, list) else 1


def uses_of(history: list[Step]) -> dict[int, list[int]]:
    """For each prompt the steps at which it was replayed."""
    steps: dict[int, list[int]] = {}
    for row in history:
        for x in row.replays:
            steps.setdefault(x, []).append(row.step)
    return steps


# ---------------------------------------------------------------- Prompt Replay


class ReferencePromptReplay:
    """The paper's rule, one prompt at a time, in exact fractions."""

    def __init__(self, num_prompts, seed, band, share, cooldown, max_reuse):
        self.rng, self.size = np.random.default_rng(seed), num_prompts
        self.queue = self.rng.permutation(num_prompts).tolist()
        self.band, self.share, self.cooldown, self.max_reuse = band, Fraction(str(share)), cooldown, max_reuse
        self.rate, self.last, self.uses, self.in_flight = {}, {}, Counter(), set()
        self.steps = {}

    def draw(self, n, step):
        asked, chosen, replays = self.steps.setdefault(step, (n, set(), set()))
        pool = [
            x for x, rate in self.rate.items()
            if self.uses[x] < self.max_reuse and step - self.last[x] >= self.cooldown and x not in self.in_flight
            and self.band[0] <= rate <= self.band[1] and x not in chosen
        ]  # fmt: skip
        pool.sort(key=lambda x: (abs(self.rate[x] - Fraction(1, 2)), self.rate[x], self.uses[x], x))
        n = min(n, self.size - len(chosen))
        batch = pool[: min(n, int(self.share * asked) - len(replays))]
        replays.update(batch)
        self.uses.update(batch)
        chosen.update(batch)
        while len(batch) < n:
            x = next((x for x in self.queue if x not in chosen), None)
            if x is None:
                self.queue = self.rng.permutation(self.size).tolist()
                continue
            self.queue.remove(x)
            batch.append(x)
            chosen.add(x)
        self.last.update({x: max(step, self.last.get(x, step)) for x in batch})
        self.in_flight.update(batch)
        return batch

    def observe(self, indices, num_correct, num_answers, step):
        for x, k, size in zip(indices, num_correct, num_answers, strict=True):
            self.rate[x] = Fraction(int(k), int(size))
            self.in_flight.discard(x)


@pytest.mark.parametrize(
    ("size", "n", "lag", "refills", "knobs"),
    [
        (300, 8, 0, (), {}),
        (300, 8, 4, (), {"cooldown": 2, "share": 0.9}),
        (120, 16, 0, (16, 5), {"cooldown": 3, "max_reuse": 4}),
        (40, 12, 1, (12,), {"cooldown": 1, "band": (0, 1), "max_reuse": 1000}),
        (12, 12, 0, (12,), {"cooldown": 5, "share": 0.5}),
        (64, 7, 0, (1, 1, 1), {"cooldown": 0, "share": 1.0, "band": (0.5, 1), "max_reuse": 3}),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_prompt_replay_draws_what_the_papers_rule_draws(size, n, lag, refills, knobs, seed):
    knobs = {"band": (0.25, 0.75), "share": 0.75, "cooldown": 10, "max_reuse": 15} | knobs
    sampler, reference = PromptReplay(size, seed=seed, **knobs), ReferencePromptReplay(size, seed, **knobs)
    rng, pending = np.random.default_rng(seed), deque()
    rates = mixed_rates(size, rng)
    for step in range(150):
        for count in (n, *refills):
            batch = sampler.draw(count, step)
            assert batch == reference.draw(count, step)
            pending.append((step, batch))
            while pending and pending[0][0] + lag <= step:
                born, batch = pending.popleft()
                result = (batch, rng.binomial(8, rates[batch]).tolist(), [8] * len(batch), born)
                sampler.observe(*result)
                reference.observe(*result)


@pytest.mark.parametrize("refills", [(), (8, 3)])
def test_prompt_replay_01_share_zero_is_the_baseline(refills):
    for size in (8, 9, 30, 200):
        rates = mixed_rates(size)
        off = simulate(PromptReplay(size, seed=5, share=0), rates, range(1, 80), refills=refills)
        baseline = simulate(Uniform(size, seed=5), rates, range(1, 80), refills=refills)
        assert [row.batch for row in off] == [row.batch for row in baseline]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("lag", [0, 4])
def test_prompt_replay_02_no_replay_during_the_first_cooldown(start, lag):
    for cooldown in (5, 10):
        sampler = PromptReplay(500, cooldown=cooldown)
        history = simulate(sampler, np.full(500, 0.5), range(start, start + 30), lag=lag)
        assert not any(row.replays for row in history[:cooldown])
        assert history[cooldown].replays  # and from then on there are


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 4, 32, 100])
def test_prompt_replay_03_never_more_than_the_budget_also_in_refills(share, n):
    sampler = PromptReplay(1000, share=share, cooldown=2)
    history = simulate(sampler, np.full(1000, 0.5), range(1, 25), n, refills=(n, 2 * n, 1))
    budget = int(Fraction(str(share)) * n)
    assert max(len(row.replays) for row in history) == budget
    assert all(len(row.batch) == 4 * n + 1 for row in history)


@pytest.mark.parametrize("lag", [0, 4])
@pytest.mark.parametrize("cooldown", [1, 3, 10])
def test_prompt_replay_04_uses_lie_a_cooldown_apart(cooldown, lag):
    sampler = PromptReplay(60, cooldown=cooldown, max_reuse=1000)
    history = simulate(sampler, np.full(60, 0.5), range(1, 300), lag=lag)
    gaps = [np.diff(steps).min() for steps in uses_of(history).values() if len(steps) > 1]
    assert len(gaps) > 40
    assert min(gaps) >= cooldown
    last: dict[int, int] = {}  # fresh uses start the cooldown too
    for row in history:
        assert all(row.step - last[x] >= cooldown for x in row.replays)
        last |= dict.fromkeys(row.batch, row.step)


def test_prompt_replay_04_answers_still_out_keep_a_prompt_away_whatever_the_cooldown():
    sampler = PromptReplay(50, cooldown=0, share=1.0)
    know(sampler, dict.fromkeys(range(4), 8))
    assert set(sampler.draw(4, 1)) == {0, 1, 2, 3}
    for step in range(2, 6):
        sampler.draw(4, step)
        assert not sampler.epochs.replays
    know(sampler, dict.fromkeys(range(4), 8), step=1)
    assert set(sampler.draw(4, 6)) == {0, 1, 2, 3}


@pytest.mark.parametrize("max_reuse", [0, 1, 3])
def test_prompt_replay_05_no_prompt_more_than_max_reuse_times_none_twice_in_a_batch(max_reuse):
    sampler = PromptReplay(40, cooldown=2, max_reuse=max_reuse)
    history = simulate(sampler, np.full(40, 0.5), range(1, 400), refills=(5,))
    counts = Counter(x for row in history for x in row.replays)
    assert all(counts[x] == max_reuse for x in range(40))  # reached by all, passed by none
    assert all(len(set(row.batch)) == len(row.batch) for row in history)


def test_prompt_replay_05_a_replay_counts_even_if_its_answers_are_lost():
    sampler = PromptReplay(40, cooldown=0, max_reuse=2)
    know(sampler, {3: 8})
    for step in range(4):
        sampler.draw(2, step)
        assert (3 in sampler.epochs.replays) == (step < 2)
        sampler.epochs.settle([3])


@pytest.mark.parametrize("size", [4, 8, 10, 16, 20, 48])
def test_prompt_replay_06_the_ends_of_the_band_are_in(size):
    for band in ((0.25, 0.75), (0.3, 0.7), (0.1, 0.6)):
        sampler = PromptReplay(size + 1, band=band, share=1.0, cooldown=0)
        know(sampler, {k: k for k in range(size + 1)}, size=size)
        inside = {k for k in range(size + 1) if Fraction(str(band[0])) <= Fraction(k, size) <= Fraction(str(band[1]))}
        sampler.draw(size + 1, 1)
        assert sampler.epochs.replays == inside
    assert size != 16 or PromptReplay(1).band == (0.25, 0.75)


def test_prompt_replay_07_out_of_band_it_leaves_at_once():
    sampler = PromptReplay(30, cooldown=1)
    know(sampler, {3: 8, 4: 9, 5: 7})
    assert set(sampler.draw(4, 1)) >= {3, 4, 5}
    know(sampler, {3: 3, 4: 13, 5: 4}, step=1)
    assert sampler.figures()["buffer"] == 1
    sampler.draw(4, 2)
    assert sampler.epochs.replays == {5}


@pytest.mark.parametrize("correct", [0, G])
def test_prompt_replay_08_dead_groups_count_too(correct):
    sampler = PromptReplay(30, cooldown=3, band=(0, 1))
    know(sampler, {3: 8}, step=0)
    know(sampler, {3: correct}, step=2)
    for step, back in ((3, False), (4, False), (5, True)):  # the cooldown runs from the dead group
        sampler.draw(4, step)
        assert (3 in sampler.epochs.replays) == back
    narrow = PromptReplay(30)
    know(narrow, {3: 8})
    know(narrow, {3: correct}, step=1)
    assert narrow.figures()["buffer"] == 0  # and so does its pass rate


@every_sampler
def test_prompt_replay_09_numbers_only(make):
    """A state is a few flat arrays with a number for each prompt, whatever G and however often it was
    visited."""
    sampler = make(100)
    simulate(sampler, mixed_rates(100), range(1, 60))
    assert all(tensor.numel() <= 100 for tensor in tensors(sampler.state_dict()))
    assert numbers(sampler.state_dict()) < 1500


@pytest.mark.parametrize("size", [8, 9, 100])
def test_prompt_replay_10_a_cooling_buffer_blocks_nothing(size):
    sampler = PromptReplay(size, cooldown=10**6)
    history = simulate(sampler, np.full(size, 0.5), range(1, 50))
    assert all(len(row.fresh) == 8 for row in history)
    assert sampler.figures()["buffer"] >= 0.8 * size


@pytest.mark.parametrize("seed", [0, 1])
def test_prompt_replay_11_replay_does_not_advance_the_epoch(seed):
    rates = mixed_rates(400)
    replayed = simulate(PromptReplay(400, seed=seed, cooldown=3), rates, range(1, 60))
    baseline = simulate(Uniform(400, seed=seed), rates, range(1, 60))
    fresh = [x for row in replayed for x in row.fresh]
    assert sum(len(row.replays) for row in replayed) > 150
    assert fresh == [x for row in baseline for x in row.batch][: len(fresh)]


def test_prompt_replay_11_passed_over_prompts_keep_their_turn():
    """Those that are in the batch as replays when their turn comes are next in the following batch, in
    order."""
    order = [x for step in range(5) for x in Uniform(20, seed=2).draw(20, step)][:20]
    sampler = PromptReplay(20, seed=2, share=0.5, cooldown=1)
    know(sampler, {order[0]: 8, order[2]: 8})
    assert sampler.draw(4, 1) == [*sorted([order[0], order[2]]), order[1], order[3]]
    know(sampler, dict.fromkeys(order[:4], 0), step=1)
    assert sampler.draw(4, 2) == [order[0], order[2], order[4], order[5]]


def test_prompt_replay_12_ties_are_settled_by_rule_and_seed():
    for correct in (4, 8, 11):
        sampler = PromptReplay(50, share=1.0, cooldown=1, max_reuse=99)
        know(sampler, dict.fromkeys(range(20), correct))
        assert sampler.draw(6, 1) == list(range(6))  # the smaller index
        know(sampler, dict.fromkeys(range(6), correct), step=1)
        assert sampler.draw(20, 2) == [*range(6, 20), *range(6)]  # the less reused first
    assert simulate(PromptReplay(90, seed=3), mixed_rates(90), range(60)) == simulate(
        PromptReplay(90, seed=3), mixed_rates(90), range(60)
    )
    assert simulate(PromptReplay(90, seed=3), mixed_rates(90), range(60)) != simulate(
        PromptReplay(90, seed=4), mixed_rates(90), range(60)
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prompt_replay_13_replays_are_of_higher_spread_and_rare_where_all_is_hard(seed):
    rng = np.random.default_rng(seed)
    rates = rng.beta(0.6, 0.6, 3000)
    history = simulate(PromptReplay(3000, seed=seed), rates, range(200), 32, rng)
    spread = rates * (1 - rates)
    replayed, fresh = (
        np.concatenate([spread[list(part)] for part in parts])
        for parts in ([row.replays for row in history], [row.fresh for row in history])
    )
    assert len(replayed) > 2000 and replayed.mean() > 1.5 * fresh.mean()
    # 4 to 12 of 16 right at p = 0.02 has a chance of 2.3e-4: of 6400 groups one or two
    hard = simulate(PromptReplay(3000, seed=seed), np.full(3000, 0.02), range(200), 32, rng)
    baseline = simulate(Uniform(3000, seed=seed), rates, range(200), 32)
    first = next((i for i, row in enumerate(hard) if row.replays), 200)
    assert sum(len(row.replays) for row in hard) <= 8
    assert first > 10 and [row.batch for row in hard[:first]] == [row.batch for row in baseline[:first]]


def test_prompt_replay_14_figures_for_the_log():
    sampler = PromptReplay(60, cooldown=2)
    history = simulate(sampler, np.full(60, 0.5), range(1, 40))
    uses = Counter(Counter(x for row in history for x in row.replays).values())
    figures = json.loads(json.dumps(sampler.figures()))
    assert figures["prompt_uses"] == [uses[i] for i in range(max(uses) + 1)]  # histogram of n(x), from 0
    assert figures["buffer"] == int((sampler.distance < np.inf).sum()) > 30
    assert sampler.epochs.seen.sum() == len({x for row in history for x in row.batch})  # distinct prompts so far


def test_prompt_replay_non_binary_rewards_without_spread_are_no_candidates():
    sampler = PromptReplay(9, share=1.0, cooldown=0)
    third = torch.full((10,), 0.3).var(unbiased=False).item()  # zero but for rounding
    sampler.observe([0, 1, 2, 3], [8.0, 8.0, 4.5, 3.0], [G, G, G, 10], 0, variance=[0.0, 0.2, 0.1, third])
    sampler.draw(4, 1)
    assert sampler.epochs.replays == {1, 2}


# ---------------------------------------------------------------- the published code of Prompt Replay, and its faults


def test_f2_a_the_cooldown_given_is_the_one_enforced():
    sampler = PromptReplay(200, cooldown=20, share=0.9)
    know(sampler, {7: 8}, step=4)
    returned = [step for step in range(5, 40) if sampler.draw(2, step) and 7 in sampler.epochs.replays]
    assert returned[0] == 24


@every_sampler
@pytest.mark.parametrize("size", [8, 9, 24])
def test_f2_b_prompts_lost_in_a_crash_come_back_after_resumption(make, size):
    sampler, rng = make(size, seed=1), np.random.default_rng(3)
    rates = np.full(size, 0.5)
    simulate(sampler, rates, range(1, 21), rng=rng)
    lost = sampler.draw(8, 21)  # saved while their answers were being generated
    sampler = restored(sampler, make(size))
    history = simulate(sampler, rates, range(22, 90), rng=rng)
    assert all(len(row.batch) == 8 for row in history)
    assert {x for row in history for x in row.batch} >= set(lost)


def test_f2_b_a_replay_lost_in_a_crash_is_replayed_again():
    sampler = PromptReplay(400, cooldown=3)
    know(sampler, {7: 8})
    assert 7 in sampler.draw(4, 5)
    sampler = restored(sampler, PromptReplay(400, cooldown=3))
    rates = np.zeros(400)
    history = simulate(sampler, rates, range(6, 20), 4)
    assert uses_of(history) == {7: [8]}


def test_f2_c_ties_go_to_the_harder_prompt():
    sampler = PromptReplay(20, share=1.0, cooldown=0)
    know(sampler, {0: 10, 1: 6, 2: 9, 3: 7, 4: 8, 5: 12, 6: 4})
    assert sampler.draw(7, 1) == [4, 3, 2, 1, 0, 6, 5]
    sampler = PromptReplay(20, share=1.0, cooldown=0)  # 3/8 and 6/16 are level, 5/8 is as far from one half
    sampler.observe([0, 1, 2], [10, 3, 6], [16, 8, 16], 0)
    assert sampler.draw(3, 1) == [1, 2, 0]


@pytest.mark.parametrize("lag", [0, 4])
def test_f2_d_a_refill_never_opens_the_budget_again(lag):
    """With a lag, the refill for a step is asked for when later steps have been drawn."""
    sampler = PromptReplay(300, share=0.5, cooldown=0)
    know(sampler, dict.fromkeys(range(250), 8))
    chosen: dict[int, list[int]] = {}
    replays: Counter[int] = Counter()
    for now in range(1, 30):
        for step in (now + lag, now, now):
            if step in chosen or step > lag:
                batch = sampler.draw(4, step)
                replays[step] += len(sampler.epochs.replays.intersection(batch))
                chosen.setdefault(step, []).extend(batch)
                know(sampler, dict.fromkeys(batch, 8), step)
    assert set(replays.values()) == {2}
    assert all(len(set(batch)) == len(batch) for batch in chosen.values())


@every_sampler
def test_f2_e_the_state_does_not_grow_with_visits(make):
    sampler = make(20)
    simulate(sampler, mixed_rates(20), range(20), 4, refills=(2,))
    before = numbers(sampler.state_dict())
    simulate(sampler, mixed_rates(20), range(20, 1020), 4, refills=(2,))
    assert numbers(sampler.state_dict()) == before


@pytest.mark.parametrize(("share", "n"), [(0.75, 32), (0.9, 32), (0.9, 30), (0.75, 7), (1.0, 5)])
def test_f2_f_the_whole_share_is_used(share, n):
    sampler = PromptReplay(2000, share=share)
    know(sampler, dict.fromkeys(range(1500), 8))
    sampler.draw(n, 10)
    assert len(sampler.epochs.replays) == int(Fraction(str(share)) * n)


def test_f2_f_a_band_from_zero_admits_prompts_never_solved():
    sampler = PromptReplay(20, band=(0, 0.75), share=1.0, cooldown=0)
    know(sampler, {3: 0, 4: 1, 5: 16})
    assert sampler.draw(2, 1) == [4, 3]


# ---------------------------------------------------------------- Prioritized Replay


class ReferencePrioritized:
    """The paper's rule without exploration, by sorting; equal keys in the order of the first epoch."""

    def __init__(self, num_prompts, seed, smoothing, initial_priority, retest_every):
        self.order = np.random.default_rng(seed).permutation(num_prompts).tolist()
        self.place = dict.fromkeys(range(num_prompts), "heap")
        self.omega = dict.fromkeys(range(num_prompts), initial_priority)
        self.tie = {x: i for i, x in enumerate(self.order)}
        self.smoothing, self.retest_every = smoothing, retest_every
        self.p, self.last, self.out, self.step, self.chosen = {}, {}, set(), None, set()

    def pop(self, place, count):
        pool = [x for x, at in self.place.items() if at == place and x not in self.out | self.chosen]
        pool.sort(key=lambda x: (-self.omega[x] if place == "heap" else self.last[x], self.tie[x]))
        self.out.update(pool[: max(count, 0)])
        self.chosen.update(pool[: max(count, 0)])
        return pool[: max(count, 0)]

    def draw(self, n, step):
        batch, first = [], step != self.step
        if first:
            self.step, self.chosen = step, set()
        if first and step % self.retest_every == 0:
            batch = self.pop("solved", n // 4) + self.pop("unsolved", n - n // 4)
        for place in ("heap", "unsolved", "solved"):
            batch += self.pop(place, n - len(batch))
        return batch

    def observe(self, indices, num_correct, num_answers, step):
        for x, k, size in zip(indices, num_correct, num_answers, strict=True):
            mu, a = k / size, self.smoothing
            self.p[x] = a * mu + (1 - a) * self.p[x] if x in self.p else mu
            self.omega[x] = self.p[x] * (1 - self.p[x]) + (1e-4 if self.p[x] >= 0.5 else 0)
            self.place[x], self.last[x] = "solved" if k == size else "unsolved" if k == 0 else "heap", step
            self.out.discard(x)


@pytest.mark.parametrize(
    ("size", "n", "lag", "refills", "initial"),
    [
        (200, 8, 0, (), 0.2),
        (200, 8, 4, (), 0.2),
        (60, 12, 0, (12, 3), float("inf")),
        (40, 8, 4, (), 0.0),
        (12, 12, 0, (4,), 0.2),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_prioritized_draws_what_the_papers_rule_draws(size, n, lag, refills, initial, seed):
    sampler = Prioritized(size, seed=seed, initial_priority=initial, explore=0)
    reference = ReferencePrioritized(size, seed, 0.8, initial, 10)
    rng, pending = np.random.default_rng(seed), deque()
    rates = mixed_rates(size, rng)
    for step in range(1, 150):
        for count in (n, *refills):
            batch = sampler.draw(count, step)
            assert batch == reference.draw(count, step)
            pending.append((step, batch))
            while pending and pending[0][0] + lag <= step:
                born, batch = pending.popleft()
                result = (batch, rng.binomial(8, rates[batch]).tolist(), [8] * len(batch), born)
                sampler.observe(*result)
                reference.observe(*result)


def test_prioritized_01_priority_is_the_mean_squared_advantage():
    rng, sampler = np.random.default_rng(0), Prioritized(50, smoothing=1.0, tie_bias=0)
    for step in range(3):
        rewards = torch.from_numpy(rng.integers(0, 2, (50, 8))).double()
        sampler.observe(range(50), rewards.sum(1).tolist(), [8] * 50, step)
        assert sampler.priority == pytest.approx(((rewards - rewards.mean(1, keepdim=True)) ** 2).mean(1).numpy())


def test_prioritized_01_smoothing_starts_with_the_first_visit():
    sampler = Prioritized(4, smoothing=0.8)
    for correct, rate in ((4, 0.5), (8, 0.8 * 1 + 0.2 * 0.5), (2, 0.8 * 0.25 + 0.2 * 0.9)):
        know(sampler, {2: correct}, size=8)
        assert sampler.rate[2] == pytest.approx(rate)
        assert sampler.priority[2] == pytest.approx(rate * (1 - rate) + (1e-4 if rate >= 0.5 else 0))


@pytest.mark.parametrize(("size", "n"), [(100, 8), (96, 8), (32, 32), (33, 32)])
def test_prioritized_02_infinite_initial_priority_sees_everything_once_first(size, n):
    sampler = Prioritized(size, initial_priority=float("inf"), explore=0, retest_every=0)
    history = simulate(sampler, np.full(size, 0.5), range(1, size // n + 2), n)
    visits = Counter(x for row in history[: size // n] for x in row.batch)
    assert set(visits.values()) == {1} and len(visits) == size // n * n
    assert {x for row in history for x in row.batch} == set(range(size))


@pytest.mark.parametrize("lag", [0, 4])
def test_prioritized_03_each_prompt_is_in_exactly_one_place(lag):
    sampler, rng, out = Prioritized(90), np.random.default_rng(0), deque()
    rates = mixed_rates(90)
    for step in range(1, 200):
        out.append(sampler.draw(8, step))
        if len(out) > lag:
            batch = out.popleft()
            know(sampler, dict(zip(batch, rng.binomial(G, rates[batch]).tolist(), strict=True)), step)
        figures = sampler.figures()
        assert sum(figures[name] for name in ("heap", "solved_pool", "unsolved_pool", "out")) == 90
        assert figures["out"] == len(out) * 8
    assert figures["solved_pool"] > 5 and figures["unsolved_pool"] > 5


def test_prioritized_04_pools_follow_the_latest_group_and_flips_are_counted():
    sampler = Prioritized(10, smoothing=0.1)
    pools = ("heap", "solved_pool", "unsolved_pool", "flips_solved", "flips_unsolved")
    for correct, expected in (
        (8, (10, 0, 0, 0, 0)), (16, (9, 1, 0, 0, 0)), (16, (9, 1, 0, 0, 0)), (15, (10, 0, 0, 1, 0)),
        (0, (9, 0, 1, 1, 0)), (1, (10, 0, 0, 1, 1)), (0, (9, 0, 1, 1, 1)), (16, (9, 1, 0, 1, 2)), (0, (9, 0, 1, 2, 2)),
    ):  # fmt: skip
        know(sampler, {3: correct})
        assert tuple(sampler.figures()[name] for name in pools) == expected


@pytest.mark.parametrize(("n", "solved", "unsolved"), [(4, 1, 3), (32, 8, 24), (8, 2, 6)])
def test_prioritized_05_a_retest_takes_the_longest_untested(n, solved, unsolved):
    sampler = Prioritized(300, explore=0)
    for i in range(50):  # solved 0 to 49 and unsolved 100 to 149, each at a step of its own
        know(sampler, {i: G, 100 + i: 0}, step=200 - i)
    batch = sampler.draw(n, 210)
    assert batch == [*range(49, 49 - solved, -1), *range(149, 149 - unsolved, -1)]
    assert sampler.epochs.replays == set(batch)
    assert all(x >= 200 or 50 <= x < 100 or x >= 150 for x in sampler.draw(n, 211))
    eager = Prioritized(300, explore=1)  # a retest comes before exploration
    know(eager, dict.fromkeys(range(50), G) | dict.fromkeys(range(100, 150), 0))
    assert [sum(x < 50 for x in eager.draw(n, 10)), sum(100 <= x < 150 for x in eager.draw(n, 20))] == [
        solved,
        unsolved,
    ]


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_prioritized_05_nothing_starves(n):
    """Every member of a pool is retested within pool size / quota retests, each ten steps apart."""
    sampler = Prioritized(n * 13, explore=0)
    rates = np.repeat([0.0, 1.0, 0.5], [n * 6, n * 2, n * 5])
    simulate(sampler, rates, range(1, 40), n)
    know(sampler, {x: G * int(rates[x]) for x in range(n * 8)}, step=40)
    history = simulate(sampler, rates, range(41, 41 + 400), n)
    retests = [row.batch for row in history if row.step % 10 == 0]
    for pool, share in ((range(n * 6), 0.75), (range(n * 6, n * 8), 0.25)):
        rounds = int(np.ceil(len(pool) / (share * n))) + 1
        for start in range(0, len(retests) - rounds, 3):
            assert set(pool) <= {x for batch in retests[start : start + rounds] for x in batch}


def test_prioritized_06_explore_one_is_uniform_within_a_batch_also_in_refills():
    size, steps = 40, 1500
    sampler = Prioritized(size, seed=2, explore=1, retest_every=0)
    history = simulate(sampler, mixed_rates(size), range(1, steps + 1), 8, refills=(4,))
    assert all(len(set(row.batch)) == 12 for row in history)
    for part in (slice(0, 8), slice(8, 12)):
        counts = np.bincount([x for row in history for x in row.batch[part]], minlength=size)
        mean = counts.sum() / size
        assert ((counts - mean) ** 2 / mean).sum() < 73.4  # chi-squared with 39 degrees of freedom, 0.1 %


def test_prioritized_06_explore_zero_without_retests_is_greedy():
    sampler = Prioritized(20, explore=0, retest_every=0, initial_priority=0.2)
    know(sampler, {0: 8, 1: 3, 2: 5, 3: 1, 4: 15, 5: 4, 6: 16, 7: 0})  # .25, .15, .21, .06, .06, .19, pools
    seen_first = sampler.draw(20, 1)
    assert seen_first[:2] == [0, 2] and seen_first[-6:] == [5, 1, 4, 3, 7, 6]  # 15 of 16 goes before 1 of 16


def test_prioritized_07_frequencies_match_the_rule():
    rates = np.full(300, 0.02)
    rates[:10] = 0.5
    sampler = Prioritized(300, seed=1)
    history = simulate(sampler, rates, range(1, 1001), 4)[400:]
    drawn = [sum(x < 10 for x in row.batch) for row in history if row.step % 10]
    # exploit (7 of 8 batches): nearly always all four from the ten; explore: 4 * 10 / 300 of them
    assert np.mean([count >= 3 for count in drawn]) == pytest.approx(0.875, abs=0.05)
    retests = [row.batch for row in history if row.step % 10 == 0]
    assert np.mean([sum(x < 10 for x in batch) for batch in retests]) < 1.5  # the pool of solved ones is empty


def test_prioritized_08_a_lost_batch_returns_unchanged():
    sampler = Prioritized(40, seed=3)
    simulate(sampler, mixed_rates(40), range(1, 40))
    names = ("rate", "priority", "key", "place", "visits")
    before, figures = {name: getattr(sampler, name).copy() for name in names}, sampler.figures()
    batch = sampler.draw(8, 41)
    assert sampler.figures()["out"] == 8
    sampler.epochs.settle(batch)
    assert sampler.figures() == figures
    for name in names:
        np.testing.assert_array_equal(getattr(sampler, name), before[name])


@pytest.mark.parametrize("at", range(1, 25))
def test_prioritized_09_a_restored_state_gives_the_same_batches(at):
    rates = mixed_rates(50)
    sampler = Prioritized(50, seed=4)
    simulate(sampler, rates, range(1, at), rng=np.random.default_rng(0))
    copy = restored(sampler, Prioritized(50, seed=9))
    ahead, again = (simulate(s, rates, range(at, at + 40), rng=np.random.default_rng(1)) for s in (sampler, copy))
    assert ahead == again


def test_prioritized_10_prompts_that_are_out_are_not_drawn_again():
    sampler, rng = Prioritized(50, seed=0, explore=0.3), np.random.default_rng(0)
    out: deque[list[int]] = deque()
    for step in range(1, 300):
        batch = sampler.draw(8, step + 4)
        assert len(batch) == 8 and not set(batch) & {x for other in out for x in other}
        out.append(batch)
        if len(out) > 4:
            done = out.popleft()
            sampler.observe(done, rng.integers(0, 9, 8), np.full(8, 8), step)
            assert sampler.figures()["out"] == 32


def test_prioritized_10_a_draw_uses_what_has_been_recorded():
    sampler = Prioritized(50, explore=0, initial_priority=0.0)
    first, second = sampler.draw(4, 5), sampler.draw(4, 6)
    know(sampler, dict.fromkeys(first, 8), step=5)
    assert set(sampler.draw(4, 7)) == set(first)
    know(sampler, dict.fromkeys(second, 7), step=6)
    assert set(sampler.draw(4, 8)) == set(second)


def test_prioritized_11_without_priority_the_batches_are_the_baselines():
    """Priority has no say as long as all have the same: in the first epoch, if the initial one is never
    outdone. After that no setting turns it off but `--replay none`."""
    for size, n in ((100, 10), (64, 16), (8, 8)):
        plain = Prioritized(size, seed=6, initial_priority=float("inf"), explore=0, retest_every=0)
        rates = mixed_rates(size)
        off = simulate(plain, rates, range(1, size // n + 1), n)
        assert [r.batch for r in off] == [
            r.batch for r in simulate(Uniform(size, seed=6), rates, range(1, size // n + 1), n)
        ]


def test_prioritized_12_non_binary_rewards():
    rewards = torch.tensor([[0.5] * 4, [0.0, 0.5, 0.5, 1.0], [0.1] * 4, [1.0] * 4, [-1.0, 1.0, 1.0, -1.0], [-1.0] * 4])
    sampler = Prioritized(10, smoothing=0.8, initial_priority=float("inf"), explore=0, retest_every=0, tie_bias=0)
    variance = rewards.var(1, unbiased=False)
    sampler.observe(range(6), rewards.sum(1).tolist(), [4] * 6, 1, variance=variance.tolist())
    assert sampler.priority[:6] == pytest.approx(variance.numpy(), abs=1e-7)
    figures = sampler.figures()
    assert (figures["heap"], figures["solved_pool"], figures["unsolved_pool"]) == (6, 1, 3)
    assert sampler.draw(6, 2)[4:] == [4, 1]  # after the four unseen ones: variance 1, then 1/8
    sampler.observe([4], [4.0], [4], 2, variance=[0.25])
    # rate 0.8, and what the variance is more than p(1-p): 1 before, 0.25 now
    assert sampler.priority[4] == pytest.approx(0.8 * 0.2 + 0.8 * 0.25 + 0.2 * 1.0)
    assert sampler.figures()["priority_mean"] == pytest.approx(sampler.priority[:6].mean())


def test_prioritized_12_a_prompts_priority_does_not_depend_on_the_others():
    """Nor does a single reward between 0 and 1 in a batch change the rule for all."""
    priorities = []
    for other in ([0.0, 1.0, 1.0, 0.0], [0.0, 0.4, 1.0, 0.0]):
        sampler = Prioritized(10, explore=0)
        for step, rewards in ((1, [1.0, 0.0, 0.0, 0.0]), (2, [1.0, 1.0, 0.0, 1.0])):
            both = torch.tensor([rewards, other], dtype=torch.float64)
            variance = both.var(1, unbiased=False).tolist() if 0.4 in other else None
            sampler.observe([0, 1], both.sum(1).tolist(), [4, 4], step, variance=variance)
        priorities.append(sampler.priority[0])
    rate = 0.8 * 0.75 + 0.2 * 0.25
    assert priorities[0] == priorities[1] == pytest.approx(rate * (1 - rate) + 1e-4)


# ---------------------------------------------------------------- GRESO


@pytest.mark.parametrize("correct", [0, G])
@pytest.mark.parametrize(
    ("zeros", "passes"), [(0, 1.0), (1, 0.5), (2, 0.25), (5, 0.5**5), (6, 0.5**6), (7, 0.01), (30, 0.01)]
)
def test_greso_skips_with_probability_one_minus_p_to_the_z(zeros, passes, correct):
    sampler = GRESO(2000, seed=zeros, pace=0)
    for step in range(zeros):
        know(sampler, dict.fromkeys(range(2000), correct), step)
    for step in range(4):
        assert len(sampler.draw(150, step)) == 150
    mean, spread = 600 * (1 - passes) / passes, np.sqrt(600 * (1 - passes)) / passes
    assert abs(sampler.figures()["skipped"] - mean) <= 4 * spread


@pytest.mark.parametrize("correct", [0, G])
def test_greso_each_kind_is_skipped_by_its_own_p(correct):
    sampler = GRESO(2000, pace=0.45)
    know(sampler, dict.fromkeys(range(2000), correct))  # takes this kind's p to 0.05, the other's to 0.95
    sampler.draw(100, 1)
    assert 1000 < sampler.figures()["skipped"] < 3500  # 1900 on average, or 5


def test_greso_a_useful_group_ends_the_run_of_dead_ones():
    sampler = GRESO(8, pace=0, start=0.05)
    for _ in range(9):
        know(sampler, dict.fromkeys(range(8), 0))
    know(sampler, dict.fromkeys(range(8), 1))
    assert sorted(sampler.draw(8, 1)) == list(range(8)) and sampler.figures()["skipped"] == 0


def test_greso_easy_and_hard_prompts_have_a_p_of_their_own_moved_towards_the_targets():
    sampler = GRESO(300, target=0.75)  # a quarter easy, a half hard
    p = [sampler.figures()["p_easy"], sampler.figures()["p_hard"]]
    assert p == [0.5, 0.5]
    for easy, hard in ((2, 3), (1, 4), (3, 5), (0, 0), (8, 0), (0, 8)):
        know(sampler, dict(enumerate([G] * easy + [0] * hard + [8] * (8 - easy - hard))))
        p[0] += -0.01 if easy >= 2 else 0.01
        p[1] += -0.01 if hard >= 4 else 0.01
        assert [sampler.figures()["p_easy"], sampler.figures()["p_hard"]] == pytest.approx(p)


@pytest.mark.parametrize(("correct", "ends"), [(0, (0.95, 0.05)), (G, (0.05, 0.95)), (8, (0.95, 0.95))])
def test_greso_p_stays_between_its_bounds(correct, ends):
    sampler = GRESO(20)
    for step in range(120):
        know(sampler, dict.fromkeys(range(8), correct), step)
        assert min(sampler.chance) >= 0.05 and max(sampler.chance) <= 0.95
    assert (sampler.figures()["p_easy"], sampler.figures()["p_hard"]) == pytest.approx(ends)


def test_greso_a_prompt_passed_over_is_not_lost():
    rates = np.repeat([0.5, 0.0, 1.0], [20, 5, 5])
    sampler = GRESO(30, seed=1)
    history = simulate(sampler, rates, range(1, 4001), 4)
    late = Counter(x for row in history[1000:] for x in row.batch)
    assert all(late[x] for x in range(30))
    assert max(late[x] for x in range(20, 30)) < 0.4 * min(late[x] for x in range(20))  # but visited less


def test_greso_all_dead_still_fills_the_batch():
    sampler = GRESO(32)
    history = simulate(sampler, np.zeros(32), range(1, 60), 32)
    assert all(sorted(row.batch) == list(range(32)) for row in history)


# ---------------------------------------------------------------- what every sampler owes the loop


@every_sampler
@pytest.mark.parametrize(("size", "n"), [(1, 1), (8, 8), (9, 8), (10, 7), (64, 16), (500, 32)])
@pytest.mark.parametrize("start", [0, 1])
def test_contract_draws_are_different_python_ints_and_refills_repeat_none(make, size, n, start):
    sampler, rng = make(size, seed=start), np.random.default_rng(start)
    rates = mixed_rates(size, rng)
    for row in simulate(sampler, rates, range(start, start + 120), n, rng, refills=(n, n, 1)):
        assert len(row.batch) == len(set(row.batch)) == min(3 * n + 1, size)  # fewer only where no more are left
        assert all(type(x) is int and 0 <= x < size for x in row.batch)
        assert row.replays <= set(row.batch)


@pytest.mark.parametrize("levels", [1, 5, 10**6])
@pytest.mark.parametrize("masked", [0.0, 0.5, 0.99])
def test_contract_the_smallest_keys_of_many_are_those_that_sorting_finds(levels, masked):
    rng = np.random.default_rng(levels)
    key, tie, among = rng.integers(0, levels, 20_000), rng.permutation(20_000), rng.random(20_000) >= masked
    order = sorted(np.flatnonzero(among).tolist(), key=lambda x: (key[x], tie[x]))
    for count in (0, 1, 3, 100, 300, 20_000):
        assert smallest(count, among, key, tie) == order[:count]


@every_sampler
def test_contract_too_large_a_batch_is_an_error(make):
    with pytest.raises(ValueError, match="9 different prompts.*there are 8"):
        make(8).draw(9, 0)
    with pytest.raises(ValueError, match="0 different prompts"):
        make(8).draw(0, 0)


BAD_KNOBS = [
    (PromptReplay, {"band": (0.8, 0.2)}), (PromptReplay, {"band": (-0.1, 0.5)}), (PromptReplay, {"share": 1.5}),
    (PromptReplay, {"cooldown": -1}), (PromptReplay, {"max_reuse": -1}), (Prioritized, {"smoothing": 0}),
    (Prioritized, {"explore": 2}), (Prioritized, {"retest_every": -1}), (Prioritized, {"retest_solved": 1.1}),
    (GRESO, {"target": -0.1}), (GRESO, {"floor": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("make", "knobs"), BAD_KNOBS)
def test_contract_knobs_that_cannot_be_meant_are_errors(make, knobs):
    with pytest.raises(ValueError, match="|".join(name.replace("_", ".") for name in knobs)):
        make(8, **knobs)


@every_sampler
def test_contract_results_may_be_lists_arrays_tensors_or_floats(make):
    forms = [list, np.array, lambda v: np.array(v, np.float32), lambda v: [float(x) for x in v], torch.tensor]
    histories = []
    for form in forms:
        sampler, rng, batches = make(60, seed=2), np.random.default_rng(0), []
        for step in range(50):
            batches.append(sampler.draw(8, np.int64(step)))
            indices = batches[-1] if form is not np.array else np.array(batches[-1])
            sampler.observe(indices, form(rng.integers(0, 9, 8).tolist()), form([8] * 8), step)
        through_a_file(sampler.state_dict())  # no numpy number may have crept in
        histories.append(batches)
    assert all(history == histories[0] for history in histories)


@every_sampler
def test_contract_an_empty_observation_changes_nothing(make):
    sampler = make(30)
    simulate(sampler, mixed_rates(30), range(20))
    before = sampler.figures()
    sampler.observe([], [], [], 20)
    assert sampler.figures() == before


@every_sampler
@pytest.mark.parametrize("n", [8, 32])
def test_contract_async_batches_are_full_and_every_prompt_gets_its_turn(make, n):
    rates = np.full(300, 0.5)
    history = simulate(make(300, seed=1), rates, range(400), n, lag=4)
    assert all(len(set(row.batch)) == n for row in history)
    if make is not Prioritized:  # which may well prefer some for ever
        assert {x for row in history for x in row.batch} == set(range(300))


def test_contract_uniform_visits_every_prompt_once_an_epoch():
    for size, n in ((40, 8), (45, 8), (10, 7), (8, 8)):
        drawn = [x for row in simulate(Uniform(size), np.zeros(size), range(200), n) for x in row.batch]
        assert max(Counter(drawn).values()) - min(Counter(drawn).values()) <= 1
        epochs = [drawn[i : i + size] for i in range(0, len(drawn) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(epochs) < 2 or size == n or epochs[0] != epochs[1]


# ---------------------------------------------------------------- checkpoints


def make_like(make, size, seed):
    return make(size, seed=seed, cooldown=3) if make is PromptReplay else make(size, seed=seed)


@every_sampler
@pytest.mark.parametrize("lag", [0, 4])
@pytest.mark.parametrize("point", ["before the draw", "before a refill", "before the results"])
def test_state_goes_on_as_if_never_stopped(make, lag, point):
    """Both go on with the same results, also with those of batches that were out when the state was saved."""
    rates, rng, pending = mixed_rates(120), np.random.default_rng(0), deque()
    samplers = [make_like(make, 120, 1)]
    for step in range(1, 90):
        for part, count in (("before the draw", 8), ("before a refill", 3), ("before the results", 0)):
            if (step, part) == (30, point):
                samplers.append(restored(samplers[0], make_like(make, 120, 77)))
            drawn = [sampler.draw(count, step) for sampler in samplers] if count else [[]]
            assert drawn[-1] == drawn[0] and samplers[-1].epochs.replays == samplers[0].epochs.replays
            pending.append((step, drawn[0]))
        while pending and pending[0][0] + lag <= step:
            born, batch = pending.popleft()
            correct = rng.binomial(G, rates[batch])
            for sampler in samplers:
                sampler.observe(batch, correct, [G] * len(batch), born)
    assert len(samplers) == 2


def test_state_answers_to_a_prompt_that_was_out_and_is_drawn_again_do_not_give_up_the_others():
    def all_out(seed):
        sampler = Uniform(4, seed=seed)
        return sampler, sampler.draw(2, 1), sampler.draw(2, 2), restored(sampler, Uniform(4))

    seed = next(seed for seed in range(100) if set((out := all_out(seed))[0].draw(2, 3)) == set(out[1]))
    original, first, second, copy = all_out(seed)
    for sampler in (original, copy):
        sampler.draw(2, 3)  # the first two again
        know(sampler, dict.fromkeys(first, 8))
        assert set(np.flatnonzero(sampler.epochs.out)) == set(second)


@every_sampler
def test_state_is_json_and_tensors_and_is_not_shared(make):
    sampler = make(40)
    simulate(sampler, mixed_rates(40), range(30), refills=(2,))
    sampler.draw(3, 30)
    state = sampler.state_dict()
    json.dumps(state, default=lambda tensor: tensor.tolist() if isinstance(tensor, torch.Tensor) else 1 / 0)
    saved = through_a_file(state)
    simulate(sampler, mixed_rates(40), range(30, 50), 3)  # must not reach into the state, nor that of `one`
    one, two = make(40, seed=5), make(40, seed=6)
    one.load_state_dict(state)
    ahead = simulate(one, mixed_rates(40), range(30, 60), 3)
    two.load_state_dict(state)
    assert simulate(two, mixed_rates(40), range(30, 60), 3) == ahead
    two.load_state_dict(saved)
    assert simulate(two, mixed_rates(40), range(30, 60), 3) == ahead


@every_sampler
def test_state_is_strict_about_keys_and_sizes(make):
    state = make(20).state_dict()
    for name in state:
        with pytest.raises(KeyError, match=name):
            make(20).load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(KeyError, match="surprise"):
        make(20).load_state_dict(state | {"surprise": 1})
    with pytest.raises(KeyError, match="order"):
        make(20).load_state_dict(state | {"epochs": {k: v for k, v in state["epochs"].items() if k != "order"}})
    with pytest.raises(ValueError, match="of 20 prompts, not 21"):
        make(21).load_state_dict(state)


# ---------------------------------------------------------------- stores


def group(prompt=0, rewards=(1, 0, 0, 1), birth=1, length=5, uses=0) -> Group:
    """A group whose answers can be told apart by their tokens."""
    rewards = torch.tensor(rewards, dtype=torch.float32)
    tokens = [
        torch.tensor([1000 * birth + prompt, i, *range(length - 2)], dtype=torch.int32) for i in range(len(rewards))
    ]
    logprobs = [-torch.rand(len(t), generator=torch.Generator().manual_seed(prompt + i)) for i, t in enumerate(tokens)]
    cut = [i == 0 for i in range(len(rewards))]
    return Group(prompt, tokens, logprobs, cut, birth, rewards, rewards - rewards.mean(), uses)


def fingerprint(one: Group) -> str:
    """Of all that must not change while it is stored."""
    parts = [*one.tokens, *one.logprobs, one.rewards, one.advantages]
    data = b"".join(part.numpy().tobytes() + str(part.dtype).encode() for part in parts)
    return hashlib.sha256(data + repr((one.prompt, one.birth, one.truncated)).encode()).hexdigest()


def names(groups: list[Group]) -> list[tuple]:
    """Birth, prompt and number of each answer."""
    return [(one.birth, one.prompt, int(t[1])) for one in groups for t in one.tokens]


def births(groups) -> set[int]:
    return {one.birth for one in groups}


def run_store(store, steps, per_step=3, places=6, lag=0, **kind) -> list[list[Group]]:
    """Hands the store `per_step` useful groups at each step."""
    return [store.complete([group(i, birth=s - lag, **kind) for i in range(per_step)], places, s) for s in steps]


def test_rollout_replay_01_ratio_zero_is_the_baseline():
    store = RolloutReplay(ratio=0, warmup=0)
    for step in range(30):
        useful = [group(i, birth=step) for i in range(4)]
        assert [id(one) for one in store.complete(useful, 8, step)] == [id(one) for one in useful]


@pytest.mark.parametrize("warmup", [0, 3, 20])
def test_rollout_replay_02_none_before_the_warm_up_and_none_of_this_steps_own(warmup):
    store = RolloutReplay(warmup=warmup)
    for step, batch in enumerate(run_store(store, range(30))):
        replayed = batch[3:]
        assert bool(replayed) == (step > warmup)  # steps are counted from 1
        assert step not in births(replayed)


@pytest.mark.parametrize("lag", [0, 4])
@pytest.mark.parametrize("max_age", [1, 10])
def test_rollout_replay_03_age_ten_present_age_eleven_absent(max_age, lag):
    store = RolloutReplay(max_age=max_age, warmup=0, ratio=100)
    for step, batch in enumerate(run_store(store, range(40), lag=lag)):
        ages = {step - birth for birth in births(batch[3:])}
        assert ages == {age for age in range(lag + 1, max_age + 1) if age <= step + lag}
        assert all(step - one.birth <= max(max_age, lag) for one in store.stored)


def test_rollout_replay_03_ages_out_of_order():
    """A group carried over from an earlier step is stored after younger ones, and still goes first."""
    store = RolloutReplay(max_age=5, warmup=0, ratio=100)
    store.complete([group(0, birth=10), group(1, birth=7), group(2, birth=9)], 8, 10)
    for step, left in ((12, {7, 9, 10}), (13, {9, 10}), (14, {9, 10}), (15, {10}), (16, set())):
        assert births(store.complete([group(3, birth=99)], 8, step)[1:]) - {99} == left


@pytest.mark.parametrize(("ratio", "per_step"), [(0.5, 3), (0.25, 3), (1.0, 5), (0.1, 1), (0.45, 1), (3.0, 2)])
def test_rollout_replay_04_all_fresh_and_the_stated_number_of_stored(ratio, per_step):
    store = RolloutReplay(ratio=ratio, warmup=0)
    stored = 0
    for step, batch in enumerate(run_store(store, range(20), per_step)):
        assert names(batch[:per_step]) == [(step, i, a) for i in range(per_step) for a in range(4)]
        replayed = names(batch[per_step:])
        assert len(replayed) == len(set(replayed)) == min(round(ratio * 4 * per_step), stored)
        stored = min(stored + 4 * per_step, 40 * per_step)


def test_rollout_replay_04_without_survivors_nothing_is_replayed():
    store = RolloutReplay(warmup=0)
    run_store(store, range(5))
    assert store.complete([], 8, 5) == []


def test_rollout_replay_05_what_is_stored_does_not_change():
    store, seen = RolloutReplay(warmup=0, ratio=2.0), {}
    for batch in run_store(store, range(40)):
        for one in [*store.stored, *batch[3:]]:
            assert seen.setdefault(names([one])[0], fingerprint(one)) == fingerprint(one)
    one = store.stored[0]
    whole = group(one.prompt, birth=one.birth)
    i = int(one.tokens[0][1])
    assert torch.equal(one.tokens[0], whole.tokens[i]) and torch.equal(one.logprobs[0], whole.logprobs[i])
    assert one.advantages.item() == whole.advantages[i].item()  # of its group, not of itself alone


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_rollout_replay_06_frequencies_follow_the_advantage(exponent):
    store = RolloutReplay(exponent=exponent, warmup=0, max_age=10**9, seed=3)
    run_store(store, [0], 1, rewards=(1, 0, 0, 0, 0, 0, 0, 0.3))
    state, drawn = store.stored.state_dict(), Counter()
    size = np.array([abs(one.advantages.item()) for one in store.stored])
    for _ in range(1500):
        store.stored.load_state_dict(state)
        drawn[names(store.complete([group(1, rewards=(1, 0), birth=1)], 8, 1)[1:])[0][2]] += 1
    expected = 1500 * (size + 1e-6) ** exponent / ((size + 1e-6) ** exponent).sum()
    counts = np.array([drawn[i] for i in range(8)])
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-squared with 7 degrees of freedom, 0.1 %


def test_rollout_replay_06_the_floor_is_a_millionth():
    """With an exponent of 1/4 and |A| of 1 and 1e-6: (2e-6)^(1/4) = 0.0376 of the weight of the larger."""
    draws = 0
    for seed in range(3000):
        store, two = RolloutReplay(seed=seed, exponent=0.25, warmup=0), group(0, rewards=(1, 0), birth=0)
        two.advantages = torch.tensor([1.0, 1e-6])
        store.complete([two], 8, 0)
        draws += names(store.complete([group(1, rewards=(1, 0), birth=1)], 8, 1)[1:])[0][2]
    assert draws / 3000 == pytest.approx(0.0376 / 1.0376, abs=0.01)


def test_rollout_replay_06_the_floor_keeps_weights_positive():
    store = RolloutReplay(ratio=1.0, warmup=0)
    run_store(store, [0], 1, rewards=(1.0, 0.5, 0.0))  # the middle one has no advantage
    batch = store.complete([group(1, rewards=(1, 0, 0), birth=1)], 8, 1)
    assert sorted(names(batch[1:])) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


def test_rollout_replay_09_truncated_answers_are_kept_as_such():
    store = RolloutReplay(warmup=0, ratio=9)
    for batch in run_store(store, range(3)):
        assert all(one.truncated == [int(one.tokens[0][1]) == 0] for one in batch[3:])
    assert all(len(t) == len(lp) for one in store.stored for t, lp in zip(one.tokens, one.logprobs, strict=True))


def test_rollout_replay_09_answers_that_are_masked_are_neither_stored_nor_counted():
    store = RolloutReplay(ratio=1.0, warmup=0, mask_truncated=True)
    batches = run_store(store, range(4))  # the first of four answers of each group is cut
    assert not any(one.truncated[0] for one in store.stored) and len(store.stored) == 4 * 9
    assert [len(batch) - 3 for batch in batches] == [0, 9, 9, 9]


def test_rollout_replay_10_age_starts_at_the_version_that_generated():
    store = RolloutReplay(warmup=0, ratio=100)
    history = run_store(store, range(4, 30), lag=4)
    assert births(history[10][3:]) == {4, 5, 6, 7, 8, 9}  # step 14: born at 4 (age 10) to 9 (trained at 13)


def test_rollout_replay_10_answers_of_a_carried_group_are_stored_but_those_of_a_replayed_one_are_not_again():
    fill, extra = GroupReplay(10), RolloutReplay(warmup=0, ratio=100)
    for step in range(1, 8):
        extra.complete(fill.complete([group(step, birth=step)], 3, step), 3, step)
    assert Counter(names(extra.stored)).most_common(1)[0][1] == 1 and len(extra.stored) == 28
    carried = Surplus()
    extra = RolloutReplay(warmup=0, ratio=100)
    for step in range(1, 6):
        extra.complete(carried.complete([group(i, birth=step) for i in range(3)], 2, step), 2, step)
    assert births(extra.stored) == {1, 2, 3, 4} and len(names(extra.stored)) == len(set(names(extra.stored))) == 40


@pytest.mark.parametrize("make", [RolloutReplay, lambda: GroupReplay(1000)])
def test_rollout_replay_12_ten_bytes_a_token(make):
    store = make()
    run_store(store, range(5), length=400)
    tokens = 5 * 3 * 4 * 400
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for one in store.stored
        for t in [*one.tokens, *one.logprobs]
    }
    assert sum(held.values()) <= 10 * tokens
    assert sum(t.numel() * t.element_size() for t in tensors(store.state_dict())) <= 10 * tokens
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    assert len(file.getvalue()) <= 10 * tokens


def test_rollout_replay_12_beyond_the_capacity_the_oldest_go():
    store = RolloutReplay(capacity=30, warmup=0, max_age=100)
    run_store(store, range(10))
    assert len(store.stored) == 30 and births(store.stored) == {7, 8, 9}
    assert births(restored(store, RolloutReplay(capacity=30)).complete([], 1, 10) or store.stored) == {7, 8, 9}


def test_rollout_replay_13_figures_for_the_log():
    store, uses = RolloutReplay(warmup=2), Counter()
    for step in range(12):
        batch = store.complete([group(i, rewards=(1, 0, 0, 0), birth=step) for i in range(3)], 6, step)
        figures = json.loads(json.dumps(store.figures(step)))
        replayed = batch[3:]
        ages = Counter(step - one.birth for one in replayed)
        assert figures["rollout_ages"] == [ages[i] for i in range(max(ages, default=0) + 1)]
        assert len(replayed) == (6 if step > 2 else 0)
        uses.update(names(replayed))
        counts = Counter(uses[name] for name in names(replayed))
        assert figures["rollout_uses"] == [counts[i] for i in range(max(counts, default=0) + 1)]
        assert figures["stored_rollouts"] == 12 * min(step + 1, 11)
        if replayed:
            assert figures["replayed_positive"] == pytest.approx(
                np.mean([one.advantages.item() > 0 for one in replayed])
            )


# ---------------------------------------------------------------- POPO


def test_popo_01_with_all_groups_useful_nothing_is_added():
    store = GroupReplay(20)
    for step in range(1, 10):
        useful = [group(i, birth=step) for i in range(6)]
        assert [id(one) for one in store.complete(useful, 6, step)] == [id(one) for one in useful]


@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_popo_02_dead_places_are_filled_as_far_as_the_store_reaches(capacity):
    store, rng, stored = GroupReplay(capacity), np.random.default_rng(0), 0
    for step in range(1, 60):
        useful = [group(i, birth=step) for i in range(rng.integers(0, 9))]
        batch = store.complete(useful, 8, step)
        assert len(batch) == min(8, len(useful) + stored) and not any(one.dead for one in batch)
        assert [id(one) for one in batch[: len(useful)]] == [id(one) for one in useful]
        assert len(set(names(batch))) == len(names(batch))  # none twice
        stored = min(stored + len(useful), capacity)


def test_popo_03_newest_first():
    store = GroupReplay(20)
    run_store(store, [1, 2], 4, 4)
    batch = store.complete([group(0, birth=3)], 4, 3)
    assert [one.birth for one in batch] == [3, 2, 2, 2]  # nothing of step 1 while step 2 has some
    batch = store.complete([], 8, 4)
    assert [one.birth for one in batch] == [3, 2, 2, 2, 2, 1, 1, 1]


def test_popo_03_groups_of_one_step_in_random_order():
    firsts = Counter()
    for seed in range(60):
        store = GroupReplay(20, seed=seed)
        run_store(store, [1], 4, 4)
        firsts[store.complete([], 1, 2)[0].prompt] += 1
    assert len(firsts) == 4 and max(firsts.values()) < 35


def test_popo_04_groups_stay_whole():
    store = GroupReplay(20)
    prints = {}
    for batch in run_store(store, range(1, 20), 2, 6):
        for one in batch:
            assert len(one.tokens) == len(one.logprobs) == len(one.rewards) == len(one.truncated) == 4
            assert one.advantages.sum().item() == pytest.approx(0, abs=1e-6)
            assert prints.setdefault((one.birth, one.prompt), fingerprint(one)) == fingerprint(one)


def test_popo_05_not_in_the_step_of_its_birth_not_stored_again_and_ageing_on():
    store = GroupReplay(4)
    for step in range(10):
        batch = store.complete([group(0, birth=step)], 3, step)
        assert step not in births(batch[1:])
        assert sorted(births(store.stored)) == list(range(max(step - 3, 0), step + 1))  # one place each
    for step in range(10, 14):  # nothing new: the same groups again, older each time
        assert [step - one.birth for one in store.complete([], 3, step)] == [step - 9, step - 8, step - 7]
        assert len(store.stored) == 4


def test_popo_ablations_oldest_first_and_least_drift_first():
    store = GroupReplay(20, order="oldest")
    run_store(store, [1, 2], 4, 4)
    assert [one.birth for one in store.complete([group(0, birth=3)], 7, 3)] == [3, 1, 1, 1, 1, 2, 2]

    asked = []

    def drift(groups):
        asked.append(len(groups))
        return [abs(one.prompt - 2.2) for one in groups]

    store = GroupReplay(20, order="kl", drift=drift)
    run_store(store, [1], 4, 4)
    assert not asked  # a pass of the model that nothing needs
    assert [one.prompt for one in store.complete([group(9, birth=2)], 4, 2)] == [9, 2, 3, 1]
    assert asked == [4]  # not the group of this step


def filled_by(store, ess, steps: int, places: int = 16) -> list[int]:
    """Places that `store` fills a step, where ess(number filled) is what each update finds."""
    counts = []
    for step in range(steps):
        batch = store.complete([group(i, birth=step) for i in range(places // 2)], places, step)
        counts.append(len(batch) - places // 2)
        store.adjust(ess(counts[-1]) if counts[-1] else None)
    return counts


def test_adaptive_fills_as_many_places_as_stay_on_policy():
    near = filled_by(GroupReplay(100, min_ess=0.99), lambda n: 1.0, 40)
    assert near[1] <= 2 and near[-1] == 8  # nothing is taken on trust
    far = filled_by(GroupReplay(100, min_ess=0.99), lambda n: 0.9, 400)
    assert 0 < np.mean(far[-300:]) < 0.5  # a group now and then: it may come to do better
    middle = filled_by(GroupReplay(100, min_ess=0.99), lambda n: 1 - 0.0025 * n, 400)  # four and no more
    assert 3 < np.mean(middle[-300:]) < 5
    halved = filled_by(GroupReplay(100, min_ess=0.99, max_fill=0.5), lambda n: 1.0, 400)
    assert np.mean(halved[-300:]) == 4
    assert not any(filled_by(GroupReplay(100, min_ess=0.99, max_fill=0.0), lambda n: 1.0, 40))


def test_adaptives_share_of_places_is_part_of_its_state():
    store, again = (GroupReplay(100, seed=1, min_ess=0.99) for _ in range(2))
    filled_by(store, lambda n: 1.0, 20)
    again.load_state_dict(store.state_dict())
    assert again.fill == store.fill > 0.2
    assert filled_by(again, lambda n: 1.0, 5) == filled_by(store, lambda n: 1.0, 5)


def test_popo_itself_fills_every_place_whatever_the_sample_size():
    assert set(filled_by(GroupReplay(100), lambda n: 0.1, 40)[2:]) == {8}


@pytest.mark.parametrize("wrong", [{"capacity": 0}, {"min_ess": 1.0}, {"max_fill": 1.5}])
def test_group_replay_refuses_what_cannot_be_meant(wrong):
    with pytest.raises(ValueError, match="need room"):
        GroupReplay(**{"capacity": 4} | wrong)


def test_popo_11_figures_for_the_log():
    store = GroupReplay(4)
    run_store(store, [1, 2], 2, 2)
    store.complete([group(0, birth=3)], 4, 3)
    assert json.loads(json.dumps(store.figures(3))) == {
        "stored_groups": 4,
        "replaced": 0.75,
        "group_ages": [0, 2, 1],
        "group_uses": [0, 3],
    }
    store.complete([], 1, 4)
    assert store.figures(4)["group_ages"] == [0, 1] and store.figures(4)["group_uses"] == [0, 1]
    store.complete([], 1, 6)
    assert store.figures(6)["group_ages"] == [0, 0, 0, 1] and store.figures(6)["group_uses"] == [0, 0, 1]


STORES = {"group": lambda seed: GroupReplay(9, seed=seed), "rollout": lambda seed: RolloutReplay(seed=seed, warmup=3)}


@pytest.mark.parametrize("make", [*STORES.values(), lambda seed: Surplus()], ids=[*STORES, "surplus"])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_popo_12_a_restored_store_gives_the_same_batches(make, at):
    store = make(1)
    run_store(store, range(at), 3, 2)
    copy = restored(store, make(2))
    ahead, again = (run_store(s, range(at, at + 20), 3, 5) for s in (store, copy))
    for one, two in zip(ahead, again, strict=True):
        assert [(fingerprint(g), g.uses) for g in one] == [(fingerprint(g), g.uses) for g in two]


@pytest.mark.parametrize("make", [GroupReplay, RolloutReplay])
def test_popo_store_knobs_that_cannot_be_meant_are_errors(make):
    with pytest.raises(ValueError, match="1 group|capacity"):
        make(capacity=0)


# ---------------------------------------------------------------- dynamic sampling


def test_surplus_throws_nothing_away_and_keeps_the_order():
    """What was handed in comes out once, in order, at the latest when the steps bring less than a batch."""
    store, rng, given, out = Surplus(), np.random.default_rng(0), [], []
    for step in range(1, 50):
        useful = [group(i, birth=step) for i in range(rng.integers(0, 12))]
        batch = store.complete(useful, 6, step)
        given, out = given + names(useful), out + names(batch)
        left = (len(given) - len(out)) // 4
        assert store.figures(step)["carried"] == left and (len(batch) == 6 or not left)
    assert out == given[: len(out)] and out + names(store.carried) == given
