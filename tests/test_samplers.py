"""What every sampler owes the training loop, and more cases of the papers' checklists (test_replay.py).

The contract holds for a rule of your own too: python -m pytest tests/test_samplers.py --rule my_rule.py:Pace
(tests/conftest.py). The faults f2_a to f2_f are those of the code published with Prompt Replay.
"""

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab.continual import ContinualReplay
from lab.rules import GRESO, Adaptive, Beta
from replay import Prioritized, PromptReplay, Uniform
from support import config
from support.epochs import within_reach
from tests.conftest import rules
from tests.helpers import (
    G,
    group,
    know,
    mixed_rates,
    numbers,
    restored,
    simulate,
    tensors,
    through_a_file,
    visits,
)

SAMPLERS = {
    "uniform": Uniform,
    "prompt": PromptReplay,
    "prioritized": Prioritized,
    "greso": GRESO,
    "beta": Beta,
    "adaptive": Adaptive,
    "continual": ContinualReplay,
}
every_one_of_ours = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)

# ---------------------------------------------------------------- the contract: what every sampler owes the loop


@pytest.mark.parametrize(("size", "n"), [(1, 1), (8, 8), (9, 8), (10, 7), (64, 16), (500, 32)])
@pytest.mark.parametrize("start", [0, 1])
def test_contract_draws_are_different_python_ints_and_refills_repeat_none(make_sampler, size, n, start):
    sampler = make_sampler(size, seed=start)
    rng = np.random.default_rng(start)
    for row in simulate(sampler, mixed_rates(size, rng), range(start, start + 60), n, rng, refills=(n, n, 1)):
        assert len(row.batch) == min(3 * n + 1, size)  # fewer only where no more are left
        assert len(set(row.batch)) == len(row.batch)
        assert all(type(x) is int and 0 <= x < size for x in row.batch)
        assert row.replays <= set(row.batch)


def test_contract_too_large_a_batch_is_an_error(make_sampler):
    with pytest.raises(ValueError, match="9 different prompts.*there are 8"):
        make_sampler(8).draw(9, 0)
    with pytest.raises(ValueError, match="0 different prompts"):
        make_sampler(8).draw(0, 0)


def test_contract_results_may_be_lists_arrays_tensors_or_floats(make_sampler):
    forms = {
        "list": list,
        "array": np.array,
        "float32": lambda values: np.array(values, np.float32),
        "floats": lambda values: [float(x) for x in values],
        "tensor": torch.tensor,
        "one number for all": lambda values: values[0] if len(set(values)) == 1 else values,
    }
    histories = []
    for name, form in forms.items():
        sampler = make_sampler(60, seed=2)
        rng = np.random.default_rng(0)
        batches = []
        for step in range(50):
            batch = sampler.draw(8, np.int64(step))
            batches.append(batch)
            prompts = np.array(batch) if name == "array" else batch
            sampler.observe(prompts, form(rng.integers(0, 11, 8).tolist()), form([10] * 8), step)
        through_a_file(sampler.state_dict())  # no numpy number may have crept in
        histories.append(batches)
    assert all(history == histories[0] for history in histories)


def test_contract_an_empty_observation_changes_nothing(make_sampler):
    sampler = make_sampler(30)
    simulate(sampler, mixed_rates(30), range(20))
    before = sampler.figures()
    sampler.observe([], [], [], 20)
    assert sampler.figures() == before


def test_contract_figures_are_json(make_sampler):
    sampler = make_sampler(30)
    assert json.loads(json.dumps(sampler.figures())) == sampler.figures()
    history = simulate(sampler, mixed_rates(30), range(20), 3)
    assert json.loads(json.dumps(sampler.figures())) == sampler.figures()
    assert sampler.seen.sum() == len(visits(history))  # distinct_prompts in metrics.jsonl


def test_contract_the_same_seed_gives_the_same_batches(make_sampler):
    first = simulate(make_sampler(90, seed=3), mixed_rates(90), range(60))
    assert simulate(make_sampler(90, seed=3), mixed_rates(90), range(60)) == first
    assert simulate(make_sampler(90, seed=4), mixed_rates(90), range(60)) != first


def test_contract_a_state_holds_numbers_only(make_sampler):
    """A few flat arrays with a number for each prompt, whatever G and however often it was visited."""
    sampler = make_sampler(100)
    simulate(sampler, mixed_rates(100), range(1, 60))
    state = sampler.state_dict()
    assert all(tensor.numel() <= 100 for tensor in tensors(state))
    assert numbers(state) < 1500


def test_f2_e_the_state_does_not_grow_with_visits(make_sampler):
    sampler = make_sampler(20)
    simulate(sampler, mixed_rates(20), range(20), 4, refills=(2,))
    before = numbers(sampler.state_dict())
    simulate(sampler, mixed_rates(20), range(20, 1020), 4, refills=(2,))
    # The latest batch may differ, and how much of it replay brought; a number for each visit would be thousands.
    assert numbers(sampler.state_dict()) < before + 20


@pytest.mark.parametrize("point", ["before the draw", "before a refill", "before the results"])
def test_state_goes_on_as_if_never_stopped(make_sampler, point):
    """Both go on with the same results, also with those of a batch that was out when the state was saved."""
    rates = mixed_rates(120)
    rng = np.random.default_rng(0)
    samplers = [make_sampler(120, seed=1)]
    for step in range(1, 90):
        batch = []
        for part, count in (("before the draw", 8), ("before a refill", 3), ("before the results", 0)):
            if step == 30 and part == point:
                samplers.append(restored(samplers[0], make_sampler(120, seed=77)))
            if count:
                drawn = [sampler.draw(count, step) for sampler in samplers]
                assert drawn[-1] == drawn[0]
                assert samplers[-1].replays == samplers[0].replays
                batch += drawn[0]
        correct = rng.binomial(G, rates[batch])
        for sampler in samplers:
            sampler.observe(batch, correct, [G] * len(batch), step)
    assert len(samplers) == 2
    assert samplers[1].figures() == samplers[0].figures()


def test_state_is_json_and_tensors_and_is_not_shared(make_sampler):
    sampler = make_sampler(40)
    simulate(sampler, mixed_rates(40), range(30), refills=(2,))
    sampler.draw(3, 30)
    state = sampler.state_dict()
    json.dumps(state, default=lambda tensor: tensor.tolist() if isinstance(tensor, torch.Tensor) else 1 / 0)
    saved = through_a_file(state)
    simulate(sampler, mixed_rates(40), range(30, 50), 3)  # must not reach into the state, nor that of `one`
    one = make_sampler(40, seed=5)
    one.load_state_dict(state)
    ahead = simulate(one, mixed_rates(40), range(30, 60), 3)
    two = make_sampler(40, seed=6)
    two.load_state_dict(state)
    assert simulate(two, mixed_rates(40), range(30, 60), 3) == ahead
    two.load_state_dict(saved)
    assert simulate(two, mixed_rates(40), range(30, 60), 3) == ahead


def test_state_is_strict_about_keys_and_sizes(make_sampler):
    state = make_sampler(20).state_dict()
    for name in state:
        with pytest.raises(KeyError, match=name):
            make_sampler(20).load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(KeyError, match="surprise"):
        make_sampler(20).load_state_dict(state | {"surprise": 1})
    with pytest.raises(ValueError, match="of 20 prompts, not 21"):
        make_sampler(21).load_state_dict(state)


# ---------------------------------------------------------------- a rule of one's own

PACE = """
from replay import Uniform

class Pace(Uniform):
    STATE = (*Uniform.STATE, "visits")
    def __init__(self, num_prompts, seed=0):
        super().__init__(num_prompts, seed)
        self.visits = 0
    def draw(self, n, step):
        self.visits += n
        return self.take_fresh(self.begin(n, step))
"""


def test_a_rule_of_ones_own_is_run_through_the_contract(tmp_path):
    good = tmp_path / "good.py"
    good.write_text(PACE)
    bad = tmp_path / "bad.py"  # it begins a new batch where a refill is asked for, and repeats prompts
    bad.write_text(PACE.replace("Pace", "Hasty").replace("begin(n, step)", "begin(n, self.step + 1)"))
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_samplers.py", "-k", "different and (Pace or Hasty)"]
    command += ["--rule", f"{good}:Pace", "--rule", f"{bad}:Hasty"]
    done = subprocess.run(command, cwd=config.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "12 failed, 12 passed" in done.stdout
    assert "FAILED tests/test_samplers.py::test_contract_draws_are_different" in done.stdout
    assert "[Pace" not in done.stdout.partition("short test summary")[2]


def test_rules_are_sorted_by_what_they_decide(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PACE + "class Shelf:\n    DECIDES = 'extra'\n")
    named = SimpleNamespace(getoption=lambda option: [f"{file}:Pace", f"{file}:Shelf"])
    assert list(rules(named, stores=False)) == ["Pace"]
    assert list(rules(named, stores=True)) == ["Shelf"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:Pace", "mine.py has no class 'Pace'"),
        ("mine.py:Other", 'DECIDES must be "prompts", "places" or "extra", got None'),
        ("nowhere.py:Pace", "there is no file"),
        ("nowhere:Pace", "No module named 'nowhere'"),
    ],
)
def test_a_rule_that_is_none_ends_in_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("class Other:\n    pass\n")
    with pytest.raises(pytest.UsageError, match=message):
        rules(SimpleNamespace(getoption=lambda option: [name]), stores=False)


# ---------------------------------------------------------------- Prompt Replay


class ReferencePromptReplay:
    """The paper's rule, one prompt at a time, in exact fractions."""

    def __init__(self, num_prompts, seed, band, share, cooldown, max_reuse):
        self.rng = np.random.default_rng(seed)
        self.num_prompts = num_prompts
        self.queue = self.rng.permutation(num_prompts).tolist()
        self.band = band
        self.share = Fraction(str(share))
        self.cooldown = cooldown
        self.max_reuse = max_reuse
        self.rate = {}
        self.last = {}
        self.uses = Counter()
        self.step = None

    def draw(self, n, step):
        if step != self.step:
            self.step = step
            self.budget = int(self.share * n)
            self.chosen = set()
        n = min(n, self.num_prompts - len(self.chosen))
        pool = [x for x in self.rate if self.may_return(x, step)]
        pool.sort(key=lambda x: (abs(self.rate[x] - Fraction(1, 2)), self.rate[x], self.uses[x], x))
        batch = pool[: min(n, self.budget)]
        self.budget -= len(batch)
        self.uses.update(batch)
        self.chosen.update(batch)
        while len(batch) < n:
            left = [x for x in self.queue if x not in self.chosen]
            if left:
                self.queue.remove(left[0])
                self.chosen.add(left[0])
                batch.append(left[0])
            else:
                self.queue = self.rng.permutation(self.num_prompts).tolist()
        self.last.update(dict.fromkeys(batch, step))
        return batch

    def may_return(self, x, step):
        low, high = self.band
        cool = step - self.last[x] >= self.cooldown
        return x not in self.chosen and cool and self.uses[x] < self.max_reuse and low <= self.rate[x] <= high

    def observe(self, prompts, num_correct, num_answers, step):
        for x, k, size in zip(prompts, num_correct, num_answers, strict=True):
            self.rate[x] = Fraction(int(k), int(size))


def same_draws(sampler, reference, rates, steps, n, refills, seed):
    """Draws from both, and checks that they agree."""
    rng = np.random.default_rng(seed)
    for step in steps:
        for count in (n, *refills):
            batch = sampler.draw(count, step)
            assert batch == reference.draw(count, step)
            correct = rng.binomial(8, rates[batch]).tolist()
            sampler.observe(batch, correct, [8] * len(batch), step)
            reference.observe(batch, correct, [8] * len(batch), step)


@pytest.mark.parametrize(
    ("size", "n", "refills", "knobs"),
    [
        (300, 8, (), {}),
        (300, 8, (), {"cooldown": 2, "share": 0.9}),
        (120, 16, (16, 5), {"cooldown": 3, "max_reuse": 4}),
        (40, 12, (12,), {"cooldown": 1, "band": (0, 1), "max_reuse": 1000}),
        (12, 12, (12,), {"cooldown": 5, "share": 0.5}),
        (64, 7, (1, 1, 1), {"cooldown": 0, "share": 1.0, "band": (0.5, 1), "max_reuse": 3}),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_prompt_replay_draws_what_the_papers_rule_draws(size, n, refills, knobs, seed):
    knobs = {"band": (0.25, 0.75), "share": 0.75, "cooldown": 10, "max_reuse": 15} | knobs
    sampler = PromptReplay(size, seed=seed, **knobs)
    reference = ReferencePromptReplay(size, seed, **knobs)
    rates = mixed_rates(size, np.random.default_rng([seed, 1]))
    same_draws(sampler, reference, rates, range(150), n, refills, seed)


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 4, 32, 100])
def test_prompt_replay_03_the_budget_of_any_share_and_batch(share, n):
    sampler = PromptReplay(1000, share=share, cooldown=2)
    history = simulate(sampler, np.full(1000, 0.5), range(1, 25), n, refills=(n, 2 * n, 1))
    assert max(len(row.replays) for row in history) == int(Fraction(str(share)) * n)
    assert all(len(row.batch) == 4 * n + 1 for row in history)


def test_prompt_replay_05_a_replay_counts_even_if_its_answers_are_lost():
    sampler = PromptReplay(40, cooldown=0, max_reuse=2)
    know(sampler, {3: 8})
    came_back = []
    for step in range(4):
        sampler.draw(2, step)
        came_back.append(3 in sampler.replays)
    assert came_back == [True, True, False, False]


@pytest.mark.parametrize("size", [4, 8, 10, 16, 20, 48])
@pytest.mark.parametrize("band", [(0.25, 0.75), (0.3, 0.7), (0.1, 0.6)])
def test_prompt_replay_06_the_ends_of_any_band_are_in(size, band):
    sampler = PromptReplay(size + 1, band=band, share=1.0, cooldown=0)
    know(sampler, {k: k for k in range(size + 1)}, size=size)
    low, high = (Fraction(str(end)) for end in band)
    inside = {k for k in range(size + 1) if low <= Fraction(k, size) <= high}
    sampler.draw(size + 1, 1)
    assert sampler.replays == inside


@pytest.mark.parametrize("size", [8, 9])
def test_prompt_replay_10_a_cooling_buffer_blocks_nothing_in_a_small_set(size):
    sampler = PromptReplay(size, cooldown=10**6)
    history = simulate(sampler, np.full(size, 0.5), range(1, 50))
    assert all(len(row.fresh) == 8 for row in history)
    assert sampler.figures()["buffer"] >= 0.8 * size


@pytest.mark.parametrize("seed", [0, 1])
def test_prompt_replay_11_replay_does_not_advance_the_epoch_of_any_seed(seed):
    rates = mixed_rates(400)
    fresh = []
    for row in simulate(PromptReplay(400, seed=seed, cooldown=3), rates, range(1, 60)):
        fresh += row.fresh
    baseline = []
    for row in simulate(Uniform(400, seed=seed), rates, range(1, 60)):
        baseline += row.batch
    assert len(fresh) < 59 * 8 - 150
    assert fresh == baseline[: len(fresh)]


def test_prompt_replay_11_passed_over_prompts_keep_their_turn():
    """Those that are in the batch as replays when their turn comes are next in the following batch, in order."""
    order = Uniform(20, seed=2).draw(20, 0)
    sampler = PromptReplay(20, seed=2, share=0.5, cooldown=1)
    know(sampler, {order[0]: 8, order[2]: 8})
    assert sampler.draw(4, 1) == [*sorted([order[0], order[2]]), order[1], order[3]]
    know(sampler, dict.fromkeys(order[:4], 0), step=1)
    assert sampler.draw(4, 2) == [order[0], order[2], order[4], order[5]]


def test_prompt_replay_graded_rewards_that_are_all_equal_make_no_candidate():
    sampler = PromptReplay(9, share=1.0, cooldown=0)
    for x, rewards in enumerate(([0.5] * 4, [0.3] * 4, [0.0, 0.5, 0.5, 1.0], [0.2, 0.4, 0.5, 0.3])):
        know(sampler, {x: group(x, rewards).num_correct}, size=4)
    sampler.draw(4, 1)
    assert sampler.replays == {2, 3}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prompt_replay_13_rare_where_all_is_hard_and_till_then_the_baseline(seed):
    rng = np.random.default_rng(seed)
    rates = np.full(3000, 0.02)
    hard = simulate(PromptReplay(3000, seed=seed), rates, range(200), 32, rng)
    baseline = simulate(Uniform(3000, seed=seed), rates, range(200), 32)
    replayed = [len(row.replays) for row in hard]
    assert sum(replayed) <= 8  # 4 to 12 of 16 right at p = 0.02 has a chance of 2.3e-4
    first = next((i for i, count in enumerate(replayed) if count), 200)
    assert first > 10
    assert [row.batch for row in hard[:first]] == [row.batch for row in baseline[:first]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prompt_replay_13_replays_are_of_higher_spread_for_any_seed(seed):
    rng = np.random.default_rng(seed)
    rates = rng.beta(0.6, 0.6, 3000)
    spread = rates * (1 - rates)
    replayed = []
    fresh = []
    for row in simulate(PromptReplay(3000, seed=seed), rates, range(200), 32, rng):
        replayed += [spread[x] for x in row.replays]
        fresh += [spread[x] for x in row.fresh]
    assert len(replayed) > 2000
    assert np.mean(replayed) > 1.5 * np.mean(fresh)


def test_prompt_replay_14_the_buffer_is_what_may_come_back_after_its_cooldown():
    sampler = PromptReplay(60, cooldown=2, share=0.0)
    know(sampler, {0: 4, 1: 12, 2: 3, 3: 13, 4: 8})
    assert sampler.figures() == {"buffer": 3, "prompt_uses": [0]}


# ---------------------------------------------------------------- the published code of Prompt Replay, and its faults


def test_f2_a_the_cooldown_given_is_the_one_enforced():
    sampler = PromptReplay(200, cooldown=20, share=0.9)
    know(sampler, {7: 8}, step=4)
    came_back = []
    for step in range(5, 40):
        sampler.draw(2, step)
        if 7 in sampler.replays:
            came_back.append(step)
    assert came_back[0] == 24


@every_one_of_ours
@pytest.mark.parametrize("size", [8, 9, 24])
def test_f2_b_prompts_lost_in_a_crash_come_back_after_resumption(make, size):
    sampler = make(size, seed=1)
    rng = np.random.default_rng(3)
    rates = np.full(size, 0.5)
    simulate(sampler, rates, range(1, 21), rng=rng)
    lost = sampler.draw(8, 21)  # saved while their answers were being generated
    sampler = restored(sampler, make(size))
    history = simulate(sampler, rates, range(22, 90), rng=rng)
    assert all(len(row.batch) == 8 for row in history)
    assert set(visits(history)) >= set(lost)


def test_f2_b_a_replay_lost_in_a_crash_is_replayed_again():
    sampler = PromptReplay(400, cooldown=3)
    know(sampler, {7: 8})
    assert 7 in sampler.draw(4, 5)
    sampler = restored(sampler, PromptReplay(400, cooldown=3))
    history = simulate(sampler, np.zeros(400), range(6, 20), 4)
    assert [(row.step, row.replays) for row in history if row.replays] == [(8, {7})]


def test_f2_c_ties_go_to_the_harder_prompt():
    sampler = PromptReplay(20, share=1.0, cooldown=0)
    know(sampler, {0: 10, 1: 6, 2: 9, 3: 7, 4: 8, 5: 12, 6: 4})
    assert sampler.draw(7, 1) == [4, 3, 2, 1, 0, 6, 5]
    sampler = PromptReplay(20, share=1.0, cooldown=0)
    sampler.observe([0, 1, 2], [10, 3, 6], [16, 8, 16], 0)  # 3/8 and 6/16 are level, 5/8 is as far from one half
    assert sampler.draw(3, 1) == [1, 2, 0]
    for correct in (3, 1, 4):  # k/10 and 1 - k/10 are equally far from one half, whatever their rounding
        sampler = PromptReplay(20, band=(0, 1), share=1.0, cooldown=0)
        know(sampler, {0: 10 - correct, 1: correct}, size=10)
        assert sampler.draw(2, 1) == [1, 0]


def test_f2_d_a_refill_never_opens_the_budget_again():
    sampler = PromptReplay(300, share=0.5, cooldown=0)
    know(sampler, dict.fromkeys(range(250), 8))
    for step in range(1, 30):
        batch = sampler.draw(4, step)
        know(sampler, dict.fromkeys(batch, 8), step)
        batch += sampler.draw(4, step)
        assert len(sampler.replays) == 2
        assert len(set(batch)) == 8
        know(sampler, dict.fromkeys(batch, 8), step)


@pytest.mark.parametrize(("share", "n"), [(0.75, 32), (0.9, 32), (0.9, 30), (0.75, 7), (1.0, 5)])
def test_f2_f_the_whole_share_is_used(share, n):
    sampler = PromptReplay(2000, share=share)
    know(sampler, dict.fromkeys(range(1500), 8))
    sampler.draw(n, 10)
    assert len(sampler.replays) == int(Fraction(str(share)) * n)


def test_f2_f_a_band_from_zero_admits_prompts_never_solved():
    sampler = PromptReplay(20, band=(0, 0.75), share=1.0, cooldown=0)
    know(sampler, {3: 0, 4: 1, 5: 16})
    assert sampler.draw(2, 1) == [4, 3]


# ---------------------------------------------------------------- Prioritized Replay


class ReferencePrioritized:
    """The paper's rule without exploration, by sorting; equal keys in the order of the first epoch."""

    def __init__(self, num_prompts, seed, smoothing, initial_priority, retest_every):
        order = np.random.default_rng(seed).permutation(num_prompts).tolist()
        self.tie = {x: i for i, x in enumerate(order)}
        self.place = dict.fromkeys(range(num_prompts), "heap")
        self.priority = dict.fromkeys(range(num_prompts), initial_priority)
        self.smoothing = smoothing
        self.retest_every = retest_every
        self.rate = {}
        self.last = {}
        self.step = None

    def pop(self, place, count):
        pool = [x for x, at in self.place.items() if at == place and x not in self.chosen]
        if place == "heap":
            pool.sort(key=lambda x: (-self.priority[x], self.tie[x]))
        else:
            pool.sort(key=lambda x: (self.last[x], self.tie[x]))
        self.chosen.update(pool[:count])
        return pool[:count]

    def draw(self, n, step):
        batch = []
        if step != self.step:
            self.step = step
            self.chosen = set()
            if step % self.retest_every == 0:
                batch += self.pop("solved", n // 4)
                batch += self.pop("unsolved", n - n // 4)
        for place in ("heap", "unsolved", "solved"):
            batch += self.pop(place, n - len(batch))
        return batch

    def observe(self, prompts, num_correct, num_answers, step):
        for x, k, size in zip(prompts, num_correct, num_answers, strict=True):
            mean = k / size
            before = self.rate.get(x, mean)
            self.rate[x] = self.smoothing * mean + (1 - self.smoothing) * before
            self.priority[x] = self.rate[x] * (1 - self.rate[x])
            if self.rate[x] >= 0.5:
                self.priority[x] += 1e-4
            self.place[x] = {0: "unsolved", size: "solved"}.get(k, "heap")
            self.last[x] = step


@pytest.mark.parametrize(
    ("size", "n", "refills", "initial"),
    [
        (200, 8, (), 0.2),
        (60, 12, (12, 3), float("inf")),
        (40, 8, (), 0.0),
        (12, 12, (4,), 0.2),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_prioritized_draws_what_the_papers_rule_draws(size, n, refills, initial, seed):
    sampler = Prioritized(size, seed=seed, initial_priority=initial, explore=0)
    reference = ReferencePrioritized(size, seed, 0.8, initial, 10)
    rates = mixed_rates(size, np.random.default_rng([seed, 1]))
    same_draws(sampler, reference, rates, range(1, 150), n, refills, seed)


def test_prioritized_01_smoothing_starts_with_the_first_visit():
    sampler = Prioritized(4, smoothing=0.8)
    for correct, rate in ((4, 0.5), (8, 0.8 * 1 + 0.2 * 0.5), (2, 0.8 * 0.25 + 0.2 * 0.9)):
        know(sampler, {2: correct}, size=8)
        assert sampler.rate[2] == pytest.approx(rate)
        assert sampler.priority[2] == pytest.approx(rate * (1 - rate) + (1e-4 if rate >= 0.5 else 0))


@pytest.mark.parametrize(("n", "solved", "unsolved"), [(4, 1, 3), (32, 8, 24), (8, 2, 6), (2, 1, 1), (1, 0, 1)])
def test_prioritized_05_a_retest_comes_before_exploration_and_is_over_after_its_step(n, solved, unsolved):
    eager = Prioritized(300, explore=1)
    know(eager, dict.fromkeys(range(50), G) | dict.fromkeys(range(100, 150), 0))
    for step in (10, 20):
        batch = eager.draw(n, step)
        assert sum(x < 50 for x in batch) == solved
        assert sum(100 <= x < 150 for x in batch) == unsolved
    sampler = Prioritized(300, explore=0)
    know(sampler, dict.fromkeys(range(50), G) | dict.fromkeys(range(100, 150), 0))
    sampler.draw(n, 210)
    assert all(x >= 150 or 50 <= x < 100 for x in sampler.draw(n, 211))


def test_prioritized_05_a_refill_of_a_retest_is_no_retest():
    sampler = Prioritized(300, explore=1)  # nor is it explored
    know(sampler, dict.fromkeys(range(50), G) | dict.fromkeys(range(100, 150), 0) | {200: 8})
    assert all(x < 150 for x in sampler.draw(4, 10))
    refill = sampler.draw(4, 10)
    assert refill[0] == 200
    assert all(x >= 150 or 50 <= x < 100 for x in refill)


def test_prioritized_05_where_one_source_runs_short_the_others_fill_the_batch():
    sampler = Prioritized(20, explore=0)
    know(sampler, dict.fromkeys(range(10), G) | {10: 0} | dict.fromkeys(range(11, 20), 8))
    batch = sampler.draw(4, 10)  # three places for unsolved ones, of which there is one
    assert batch[0] < 10
    assert batch[1] == 10
    assert min(batch[2:]) > 10
    drawn = sampler.draw(14, 11)
    assert set(drawn[:9]) == set(range(11, 20))
    assert drawn[9] == 10  # the unsolved before the solved


def test_prioritized_06_explore_one_is_uniform_within_a_batch_also_in_refills():
    size = 40
    sampler = Prioritized(size, seed=2, explore=1, retest_every=0)
    history = simulate(sampler, mixed_rates(size), range(1, 1501), 8, refills=(4,))
    assert all(len(set(row.batch)) == 12 for row in history)
    for part in (slice(0, 8), slice(8, 12)):
        drawn = []
        for row in history:
            drawn += row.batch[part]
        counts = np.bincount(drawn, minlength=size)
        mean = counts.sum() / size
        assert ((counts - mean) ** 2 / mean).sum() < 73.4  # chi-squared with 39 degrees of freedom, 0.1 %


def test_prioritized_07_a_retest_with_an_empty_pool_takes_the_other_one():
    rates = np.full(300, 0.02)
    rates[:10] = 0.5
    medium = []
    for row in simulate(Prioritized(300, seed=1), rates, range(1, 1001), 4)[400:]:
        if row.step % 10 == 0:
            medium.append(sum(x < 10 for x in row.batch))
    assert np.mean(medium) < 1.5  # one place in four: the pool of solved ones is empty


@pytest.mark.parametrize("at", range(1, 25))
def test_prioritized_09_a_state_restored_at_any_step_gives_the_same_batches(at):
    rates = mixed_rates(50)
    sampler = Prioritized(50, seed=4)
    simulate(sampler, rates, range(1, at), rng=np.random.default_rng(0))
    other = restored(sampler, Prioritized(50, seed=9))
    ahead = simulate(sampler, rates, range(at, at + 40), rng=np.random.default_rng(1))
    assert simulate(other, rates, range(at, at + 40), rng=np.random.default_rng(1)) == ahead


def test_prioritized_10_a_draw_uses_what_has_been_recorded():
    sampler = Prioritized(50, explore=0, initial_priority=0.0)
    first = sampler.draw(4, 5)
    know(sampler, dict.fromkeys(first, 8), step=5)
    assert set(sampler.draw(4, 6)) == set(first)
    know(sampler, dict.fromkeys(first, 0), step=6)
    assert not set(sampler.draw(4, 7)) & set(first)


def test_prioritized_12_a_prompts_priority_does_not_depend_on_the_others():
    priorities = []
    for other in ([2, 2], [1.4, 1.4]):
        sampler = Prioritized(10, explore=0)
        sampler.observe([0, 1], [1, other[0]], [4, 4], 1)
        sampler.observe([0, 1], [3, other[1]], [4, 4], 2)
        priorities.append(sampler.priority[0])
    rate = 0.8 * 0.75 + 0.2 * 0.25
    assert priorities[0] == priorities[1] == pytest.approx(rate * (1 - rate) + 1e-4)


def test_prioritized_figures_for_the_log():
    sampler = Prioritized(10)
    assert sampler.figures()["priority_mean"] == sampler.figures()["rate_mean"] == 0
    know(sampler, {0: 4, 1: 12, 2: 16, 3: 0})
    know(sampler, {0: 4})
    sampler.draw(3, 1)
    figures = sampler.figures()
    assert figures.pop("prompt_uses") == [3, 1]  # three prompts visited once, one twice
    assert figures == pytest.approx(
        {
            "heap": 8,
            "solved_pool": 1,
            "unsolved_pool": 1,
            "flips_solved": 0,
            "flips_unsolved": 0,
            "rate_mean": 0.5,
            "rate_spread": np.std([0.25, 0.75, 1, 0]),
            "priority_mean": np.mean([0.1875, 0.1876, 0.0001, 0]),
        }
    )


# ---------------------------------------------------------------- all of them


BAD_KNOBS = [
    (PromptReplay, {"band": (0.8, 0.2)}),
    (PromptReplay, {"band": (-0.1, 0.5)}),
    (PromptReplay, {"band": (0.5, 1.1)}),
    (PromptReplay, {"share": 1.5}),
    (PromptReplay, {"share": -0.1}),
    (PromptReplay, {"cooldown": -1}),
    (PromptReplay, {"max_reuse": -1}),
    (Prioritized, {"smoothing": 0}),
    (Prioritized, {"smoothing": 1.1}),
    (Prioritized, {"explore": 2}),
    (Prioritized, {"retest_every": -1}),
    (Prioritized, {"retest_solved": 1.1}),
]


@pytest.mark.parametrize(("make", "knobs"), BAD_KNOBS)
def test_knobs_that_cannot_be_meant_are_errors(make, knobs):
    with pytest.raises(ValueError, match="|".join(name.replace("_", ".") for name in knobs)):
        make(8, **knobs)


@every_one_of_ours
@pytest.mark.parametrize("n", [8, 32])
def test_batches_are_full_and_every_prompt_gets_its_turn(make, n):
    sampler = make(300, seed=1)
    history = simulate(sampler, np.full(300, 0.5), range(400), n)
    assert all(len(set(row.batch)) == n for row in history)
    if make not in (Prioritized, Beta):  # which may well prefer some for ever
        assert set(visits(history)) == set(range(300))


@pytest.mark.parametrize(("size", "n"), [(40, 8), (45, 8), (10, 7), (8, 8)])
def test_uniform_visits_every_prompt_once_an_epoch(size, n):
    history = simulate(Uniform(size), np.zeros(size), range(200), n)
    counts = visits(history)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert not any(row.replays for row in history)
    drawn = []
    for row in history:
        drawn += row.batch
    epochs = [drawn[i : i + size] for i in range(0, len(drawn) - size, size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len(epochs) < 2 or size == n or epochs[0] != epochs[1]


@pytest.mark.parametrize("levels", [1, 5, 10**6])
@pytest.mark.parametrize("masked", [0.0, 0.5, 0.99])
def test_within_reach_keeps_all_that_sorting_could_choose(levels, masked):
    rng = np.random.default_rng(levels)
    key = rng.integers(0, levels, 20_000)
    x = np.flatnonzero(rng.random(20_000) >= masked)
    order = x[np.argsort(key[x], kind="stable")]
    for count in (0, 1, 3, 100, 300, 20_000):
        kept = within_reach(x, key, count)
        assert kept[np.argsort(key[kept], kind="stable")][:count].tolist() == order[:count].tolist()
        if levels == 10**6 and 0 < count < len(x):
            assert len(kept) <= count + 50  # else it would spare no time
