"""The papers' checklists: what an implementation of replay must get right, one test a point.

The number in a test's name is that of the point in its paper's list:

    prompt_replay     Prompt Replay, 2603.21177: points 1 to 14
    prioritized       Prioritized Replay, 2601.02648: points 1 to 12
    rollout_replay    rollout-level replay, 2606.04560: points 1 to 13
    popo              POPO, 2606.01281: points 1 to 12

Points about the objective and the engine are tested with these:

    rollout_replay 7, 8     ratio one at theta = mu; a token mean over fresh and replayed: tests/test_grpo.py
    rollout_replay 11       log-probs at the sampling temperature, in float32: tests/test_rollout.py
    popo 6 to 10            w, rho, their gradients, the negative control, truncated weights: tests/test_grpo.py

What is left out, and why:

    prioritized 8, 10       They are about several batches that are out at once, in an asynchronous trainer. This loop
                            observes a batch before it draws the next. What remains of 8: a draw alone changes nothing.
    prioritized 12          It asks for the mean squared advantage of graded rewards. The samplers see the mean p only,
                            and p(1-p) stands in for it. What remains: a group of equal rewards goes into a pool.
    prioritized 5           Shares of a retest are rounded to whole prompts: a batch of one tests no solved prompt.

What every sampler and store owes the loop, and more cases, are in tests/test_samplers.py and tests/test_stores.py.
The policy with known pass rates, and the groups of made-up answers, are in tests/helpers.py.
"""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch

from replay import DynamicSampling, GroupReplay, Prioritized, PromptReplay, RolloutReplay, Uniform
from tests.helpers import G, births, content, group, know, mixed_rates, names, restored, run_store, simulate

# ---------------------------------------------------------------- Prompt Replay


@pytest.mark.parametrize("size", [8, 9, 30, 200])
@pytest.mark.parametrize("refills", [(), (8, 3)])
def test_prompt_replay_01_share_zero_is_the_baseline(size, refills):
    off = PromptReplay(size, seed=5, share=0)
    baseline = Uniform(size, seed=5)
    expected = simulate(baseline, mixed_rates(size), range(1, 80), refills=refills)
    assert simulate(off, mixed_rates(size), range(1, 80), refills=refills) == expected


@pytest.mark.parametrize("cooldown", [5, 10])
@pytest.mark.parametrize("start", [0, 1])
def test_prompt_replay_02_no_replay_during_the_first_cooldown(cooldown, start):
    history = simulate(PromptReplay(500, cooldown=cooldown), np.full(500, 0.5), range(start, start + 30))
    assert not any(row.replays for row in history[:cooldown])
    assert history[cooldown].replays


@pytest.mark.parametrize(("share", "n", "budget"), [(0.75, 32, 24), (0.75, 7, 5), (0.29, 100, 29), (0.1, 4, 0)])
def test_prompt_replay_03_never_more_than_the_budget_also_in_refills(share, n, budget):
    sampler = PromptReplay(1000, share=share, cooldown=2)
    history = simulate(sampler, np.full(1000, 0.5), range(1, 25), n, refills=(n, n))
    assert max(len(row.replays) for row in history) == budget
    assert all(len(row.batch) == 3 * n for row in history)


@pytest.mark.parametrize("cooldown", [1, 3, 10])
def test_prompt_replay_04_uses_lie_a_cooldown_apart(cooldown):
    history = simulate(PromptReplay(60, cooldown=cooldown, max_reuse=1000), np.full(60, 0.5), range(1, 300))
    last = {}
    gaps = Counter()
    for row in history:
        for x in row.replays:
            gaps[row.step - last[x]] += 1
        for x in row.batch:
            last[x] = row.step  # fresh uses start the cooldown too
    assert min(gaps) == cooldown
    assert gaps.total() > 1000


@pytest.mark.parametrize("max_reuse", [0, 1, 3])
def test_prompt_replay_05_no_prompt_more_than_max_reuse_times_none_twice_in_a_batch(max_reuse):
    sampler = PromptReplay(40, cooldown=2, max_reuse=max_reuse)
    counts = Counter()
    for row in simulate(sampler, np.full(40, 0.5), range(1, 400), refills=(5,)):
        counts.update(row.replays)
        assert len(set(row.batch)) == len(row.batch)
    assert all(counts[x] == max_reuse for x in range(40))


def test_prompt_replay_06_the_ends_of_the_band_are_in():
    sampler = PromptReplay(17, share=1.0, cooldown=0)
    know(sampler, {k: k for k in range(17)})  # of 16 answers to prompt k, k are right
    sampler.draw(17, 1)
    assert sampler.replays == set(range(4, 13))  # the band is 4/16 to 12/16


def test_prompt_replay_07_out_of_band_it_leaves_at_once():
    sampler = PromptReplay(30, cooldown=1)
    know(sampler, {3: 8, 4: 9, 5: 7})
    assert {3, 4, 5} <= set(sampler.draw(4, 1))
    know(sampler, {3: 3, 4: 13, 5: 4}, step=1)
    sampler.draw(4, 2)
    assert sampler.replays == {5}


@pytest.mark.parametrize("correct", [0, G])
def test_prompt_replay_08_dead_groups_count_too(correct):
    # The cooldown runs from the dead group.
    sampler = PromptReplay(30, cooldown=3, band=(0, 1))
    know(sampler, {3: 8}, step=0)
    know(sampler, {3: correct}, step=2)
    came_back = []
    for step in (3, 4, 5):
        sampler.draw(4, step)
        came_back.append(3 in sampler.replays)
    assert came_back == [False, False, True]

    # So does its pass rate.
    narrow = PromptReplay(30)
    know(narrow, {3: 8})
    know(narrow, {3: correct}, step=1)
    assert narrow.figures()["buffer"] == 0


def test_prompt_replay_09_numbers_only():
    sampler = PromptReplay(100)
    simulate(sampler, mixed_rates(100), range(1, 60))
    state = sampler.state_dict()
    for name in ("rate", "last", "uses"):
        assert state.pop(name).shape == (100,)
    assert list(state) == ["rng", "order", "position", "seen", "step", "size", "batch", "replays"]


def test_prompt_replay_10_a_cooling_buffer_blocks_nothing():
    sampler = PromptReplay(100, cooldown=10**6)
    history = simulate(sampler, np.full(100, 0.5), range(1, 50))
    assert all(len(row.fresh) == 8 for row in history)
    assert sampler.figures()["buffer"] >= 80


def test_prompt_replay_11_replay_does_not_advance_the_epoch():
    fresh = []
    for row in simulate(PromptReplay(400, cooldown=3), mixed_rates(400), range(1, 60)):
        fresh += row.fresh
    baseline = []
    for row in simulate(Uniform(400), mixed_rates(400), range(1, 60)):
        baseline += row.batch
    assert 59 * 8 - len(fresh) > 150
    assert fresh == baseline[: len(fresh)]


def test_prompt_replay_11_state_survives_save_and_load():
    sampler = PromptReplay(90, seed=3)
    simulate(sampler, mixed_rates(90), range(30))
    other = restored(sampler, PromptReplay(90, seed=4))
    assert simulate(other, mixed_rates(90), range(30, 60)) == simulate(sampler, mixed_rates(90), range(30, 60))


@pytest.mark.parametrize("correct", [4, 8, 11])
def test_prompt_replay_12_ties_are_settled_by_rule_and_seed(correct):
    sampler = PromptReplay(50, share=1.0, cooldown=1, max_reuse=99)
    know(sampler, dict.fromkeys(range(20), correct))
    assert sampler.draw(6, 1) == list(range(6))  # the smaller number
    know(sampler, dict.fromkeys(range(6), correct), step=1)
    assert sampler.draw(20, 2) == [*range(6, 20), *range(6)]  # the less reused first


def test_prompt_replay_13_replays_are_of_higher_spread_and_rare_where_all_is_hard():
    rates = np.random.default_rng(0).beta(0.6, 0.6, 3000)
    spread = rates * (1 - rates)
    fresh = []
    replayed = []
    for row in simulate(PromptReplay(3000), rates, range(200), 32):
        fresh += [spread[x] for x in row.fresh]
        replayed += [spread[x] for x in row.replays]
    assert len(replayed) > 2000
    assert np.mean(replayed) > 1.5 * np.mean(fresh)

    # 4 to 12 of 16 right has a chance of 2.3e-4 at p = 0.02: one or two groups of 6,400.
    hard = simulate(PromptReplay(3000), np.full(3000, 0.02), range(200), 32)
    assert sum(len(row.replays) for row in hard) <= 8


def test_prompt_replay_14_figures_for_the_log():
    sampler = PromptReplay(60, cooldown=2)
    seen = set()
    uses = Counter()
    for row in simulate(sampler, np.full(60, 0.5), range(1, 40)):
        seen.update(row.batch)
        uses.update(row.replays)
    histogram = Counter(uses.values())
    figures = json.loads(json.dumps(sampler.figures()))
    assert figures["prompt_uses"] == [histogram[i] for i in range(max(histogram) + 1)]
    assert sampler.seen.sum() == len(seen)  # distinct_prompts in metrics.jsonl
    assert figures["buffer"] > 30


# ---------------------------------------------------------------- Prioritized Replay


def test_prioritized_01_priority_is_the_mean_squared_advantage():
    sampler = Prioritized(17, smoothing=1.0)
    for k in range(17):
        rewards = np.repeat([1.0, 0.0], [k, G - k])
        advantages = rewards - rewards.mean()
        know(sampler, {k: k})
        head_start = 1e-4 * (k >= 8)  # of 3/8 and 5/8 the one that is nearly learnt goes first
        assert sampler.priority[k] == pytest.approx((advantages**2).mean() + head_start)


def test_prioritized_02_infinite_initial_priority_sees_everything_once_first():
    for size, n in ((100, 8), (96, 8), (32, 32), (33, 32)):
        sampler = Prioritized(size, initial_priority=float("inf"), explore=0, retest_every=0)
        history = simulate(sampler, np.full(size, 0.5), range(1, size // n + 2), n)
        visits = Counter()
        for row in history[: size // n]:
            visits.update(row.batch)
        assert set(visits.values()) == {1}
        visits.update(history[-1].batch)
        assert set(visits) == set(range(size))


def test_prioritized_03_each_prompt_is_in_exactly_one_place():
    sampler = Prioritized(90)
    for step in range(1, 200):
        simulate(sampler, mixed_rates(90), [step])
        figures = sampler.figures()
        assert figures["heap"] + figures["solved_pool"] + figures["unsolved_pool"] == 90
    assert figures["solved_pool"] > 5
    assert figures["unsolved_pool"] > 5


def test_prioritized_04_pools_follow_the_latest_group_and_flips_are_counted():
    sampler = Prioritized(10, smoothing=0.1)
    rows = [  # right answers; then in the heap, solved, unsolved, left the solved pool, left the unsolved pool
        (8, 10, 0, 0, 0, 0),
        (16, 9, 1, 0, 0, 0),
        (16, 9, 1, 0, 0, 0),
        (15, 10, 0, 0, 1, 0),
        (0, 9, 0, 1, 1, 0),
        (1, 10, 0, 0, 1, 1),
        (0, 9, 0, 1, 1, 1),
        (16, 9, 1, 0, 1, 2),
        (0, 9, 0, 1, 2, 2),
    ]
    for correct, *expected in rows:
        know(sampler, {3: correct})
        figures = sampler.figures()
        names = ("heap", "solved_pool", "unsolved_pool", "flips_solved", "flips_unsolved")
        assert [figures[name] for name in names] == expected


@pytest.mark.parametrize(("n", "solved", "unsolved"), [(4, 1, 3), (32, 8, 24), (8, 2, 6)])
def test_prioritized_05_a_retest_takes_the_longest_untested(n, solved, unsolved):
    sampler = Prioritized(300, explore=0)
    for i in range(50):  # 0 to 49 are solved and 100 to 149 unsolved, each tested at a step of its own
        know(sampler, {i: G, 100 + i: 0}, step=200 - i)
    batch = sampler.draw(n, 210)
    assert batch == [*range(49, 49 - solved, -1), *range(149, 149 - unsolved, -1)]
    assert sampler.replays == set(batch)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_prioritized_05_nothing_starves(n):
    """Every prompt of a pool is retested within pool size / places retests."""
    sampler = Prioritized(12 * n, explore=0)
    know(sampler, dict.fromkeys(range(4 * n), G) | dict.fromkeys(range(4 * n, 8 * n), 0))
    rates = np.repeat([1.0, 0.0, 0.5], 4 * n)
    retests = []
    for row in simulate(sampler, rates, range(1, 400), n):
        if row.step % 10 == 0:
            retests.append(row.batch)
    solved = max(n // 4, 1)
    for pool, places in ((range(4 * n), solved), (range(4 * n, 8 * n), n - solved)):
        rounds = -(-len(pool) // places)
        for start in range(len(retests) - rounds):
            tested = set(sum(retests[start : start + rounds], []))
            assert set(pool) <= tested


def test_prioritized_06_explore_one_is_uniform_without_replacement():
    sampler = Prioritized(40, seed=2, explore=1, retest_every=0)
    counts = Counter()
    for row in simulate(sampler, mixed_rates(40), range(1, 1501)):
        assert len(set(row.batch)) == 8
        counts.update(row.batch)
    chi_squared = sum((counts[x] - 300) ** 2 / 300 for x in range(40))
    assert chi_squared < 73.4  # 39 degrees of freedom, 0.1 %


def test_prioritized_06_explore_zero_without_retests_is_greedy():
    sampler = Prioritized(20, explore=0, retest_every=0, initial_priority=0.2)
    # p(1-p) is .25, .15, .21, .06, .06, .19; the last two are in the pools.
    know(sampler, {0: 8, 1: 3, 2: 5, 3: 1, 4: 15, 5: 4, 6: 16, 7: 0})
    batch = sampler.draw(20, 1)
    assert batch[:2] == [0, 2]
    assert batch[-6:] == [5, 1, 4, 3, 7, 6]  # 15 of 16 goes before 1 of 16


def test_prioritized_07_frequencies_match_the_rule():
    rates = np.full(300, 0.02)
    rates[:10] = 0.5
    medium = []
    for row in simulate(Prioritized(300, seed=1), rates, range(1, 1001), 4)[400:]:
        if row.step % 10:
            medium.append(sum(x < 10 for x in row.batch))
    # Seven of eight batches exploit, and nearly always take all four from the ten; one explores.
    assert np.mean([count >= 3 for count in medium]) == pytest.approx(0.875, abs=0.05)


def test_prioritized_08_a_draw_alone_changes_nothing():
    sampler = Prioritized(40, seed=3)
    simulate(sampler, mixed_rates(40), range(1, 40))
    before = sampler.state_dict()
    sampler.draw(8, 41)
    for name in ("rate", "priority", "place", "tested", "visits", "flips"):
        assert torch.equal(sampler.state_dict()[name], before[name])


@pytest.mark.parametrize("at", range(1, 25, 4))
def test_prioritized_09_a_restored_state_gives_the_same_batches(at):
    sampler = Prioritized(50, seed=4)
    simulate(sampler, mixed_rates(50), range(1, at))
    other = restored(sampler, Prioritized(50, seed=9))
    steps = range(at, at + 40)
    assert simulate(other, mixed_rates(50), steps) == simulate(sampler, mixed_rates(50), steps)


def test_prioritized_11_without_priority_the_batches_are_the_baselines():
    """That is so as long as all priorities are equal: in the first epoch, where the initial one is never outdone."""
    for size, n in ((100, 10), (64, 16), (8, 8)):
        sampler = Prioritized(size, seed=6, initial_priority=float("inf"), explore=0, retest_every=0)
        baseline = Uniform(size, seed=6)
        steps = range(1, size // n + 1)
        assert simulate(sampler, mixed_rates(size), steps, n) == simulate(baseline, mixed_rates(size), steps, n)


def test_prioritized_12_graded_rewards_that_are_all_equal_go_into_a_pool():
    sampler = Prioritized(10)
    for x, rewards in enumerate(([0.5] * 4, [-1.0] * 4, [1.0] * 4, [0.0, 0.5, 0.5, 1.0])):
        know(sampler, {x: group(x, rewards).num_correct}, size=4)
    assert sampler.place[:4].tolist() == [sampler.UNSOLVED, sampler.UNSOLVED, sampler.SOLVED, sampler.HEAP]
    assert sampler.rate[:4].tolist() == [0, 0, 1, 0.5]


# ---------------------------------------------------------------- rollout-level replay


def test_rollout_replay_01_ratio_zero_is_the_baseline():
    store = RolloutReplay(replay_ratio=0, replay_warmup=0)
    for step in range(30):
        useful = [group(i, birth=step) for i in range(4)]
        batch = store.complete(useful, 8, step)
        assert len(batch) == 4
        assert all(one is other for one, other in zip(batch, useful, strict=True))


@pytest.mark.parametrize("warmup", [0, 3, 20])
def test_rollout_replay_02_none_before_the_warm_up_and_none_of_this_steps_own(warmup):
    for step, batch in enumerate(run_store(RolloutReplay(replay_warmup=warmup), range(30))):
        assert (len(batch) > 3) == (step > warmup)  # steps are counted from 1
        assert step not in births(batch[3:])


@pytest.mark.parametrize("max_age", [1, 10])
def test_rollout_replay_03_age_ten_present_age_eleven_absent(max_age):
    store = RolloutReplay(max_age=max_age, replay_warmup=0, replay_ratio=100)  # all that is stored is drawn
    for step, batch in enumerate(run_store(store, range(40))):
        assert births(batch[3:]) == set(range(max(step - max_age, 0), step))


@pytest.mark.parametrize(("ratio", "per_step", "added"), [(0.5, 3, 6), (1.0, 5, 20), (0.1, 1, 0), (0.45, 1, 2)])
def test_rollout_replay_04_all_fresh_and_the_stated_number_of_stored(ratio, per_step, added):
    batches = run_store(RolloutReplay(replay_ratio=ratio, replay_warmup=0), range(20), per_step)
    for step, batch in enumerate(batches[1:], 1):
        assert names(batch[:per_step]) == [(step, i, k) for i in range(per_step) for k in range(4)]
        replayed = names(batch[per_step:])
        assert len(replayed) == added
        assert len(set(replayed)) == added  # none twice


def test_rollout_replay_05_what_is_stored_does_not_change():
    store = RolloutReplay(replay_warmup=0, replay_ratio=2.0)
    seen = {}
    for batch in run_store(store, range(40)):
        for one in [*store.stored, *batch[3:]]:
            name = names([one])[0]
            assert seen.setdefault(name, content(one)) == content(one)
    # An answer keeps the advantage that it had in its group.
    for i in range(4):
        assert group().pick(i).advantages.item() == group().advantages[i].item()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_rollout_replay_06_frequencies_follow_the_advantage(exponent):
    store = RolloutReplay(priority_exponent=exponent, replay_warmup=0, max_age=10**9, seed=3)
    whole = group(rewards=(1, 0, 0, 0, 0, 0, 0, 0.3), birth=0)
    store.complete([whole], 8, 0)
    state = store.stored.state_dict()
    drawn = Counter()
    for _ in range(1500):
        store.stored.load_state_dict(state)
        batch = store.complete([group(rewards=(1, 0))], 8, 1)
        drawn[int(batch[1].tokens[0][1])] += 1

    weight = (whole.advantages.abs().double() + 1e-6) ** exponent
    expected = 1500 * weight / weight.sum()
    chi_squared = sum((drawn[i] - expected[i]) ** 2 / expected[i] for i in range(8))
    assert chi_squared < 24.3  # 7 degrees of freedom, 0.1 %


def test_rollout_replay_09_truncated_answers_are_kept_as_such():
    for batch in run_store(RolloutReplay(replay_warmup=0, replay_ratio=9), range(3)):
        for one in batch[3:]:
            first = int(one.tokens[0][1]) == 0
            assert one.truncated == [first]


def test_rollout_replay_10_age_starts_at_the_version_that_generated():
    """A group that dynamic sampling carried over is as old as its answers, and not as its first use."""
    store = RolloutReplay(max_age=5, replay_warmup=0, replay_ratio=100)
    store.complete([group(0, birth=10), group(1, birth=7), group(2, birth=9)], 8, 10)
    for step, left in ((12, {7, 9, 10}), (13, {9, 10}), (14, {9, 10}), (15, {10}), (16, set())):
        batch = store.complete([group(3, birth=99)], 8, step)
        assert births(batch[1:]) - {99} == left


def test_rollout_replay_12_ten_bytes_a_token():
    store = RolloutReplay()
    run_store(store, range(5), length=400)
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    assert len(file.getvalue()) <= 10 * (5 * 3 * 4 * 400)


def test_rollout_replay_13_figures_for_the_log():
    store = RolloutReplay(replay_warmup=2)
    for step in range(12):
        batch = run_store(store, [step])[0]
        figures = json.loads(json.dumps(store.figures(step)))
        assert figures["stored_rollouts"] == 12 * min(step + 1, 11)
        ages = Counter(step - one.birth for one in batch[3:])
        uses = Counter(one.uses for one in batch[3:])
        assert figures["rollout_ages"] == [ages[i] for i in range(max(ages, default=0) + 1)]
        assert figures["rollout_uses"] == [uses[i] for i in range(max(uses, default=0) + 1)]
        positive = [float(one.advantages[0]) > 0 for one in batch[3:]]
        if positive:
            assert figures["replayed_positive"] == np.mean(positive)


# ---------------------------------------------------------------- POPO


def test_popo_01_with_all_groups_useful_nothing_is_added():
    store = GroupReplay(group_capacity=20)
    for step in range(1, 10):
        useful = [group(i, birth=step) for i in range(6)]
        batch = store.complete(useful, 6, step)
        assert len(batch) == 6
        assert all(one is other for one, other in zip(batch, useful, strict=True))


@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_popo_02_dead_places_are_filled_as_far_as_the_store_reaches(capacity):
    store = GroupReplay(group_capacity=capacity)
    stored = 0
    for step, count in enumerate((0, 1, 0, 8, 3, 3, 0, 0, 5), 1):
        useful = [group(i, birth=step) for i in range(count)]
        batch = store.complete(useful, 8, step)
        assert len(batch) == min(8, count + stored)
        assert not any(one.dead for one in batch)
        stored = min(stored + count, capacity)


def test_popo_03_newest_first():
    store = GroupReplay(group_capacity=20)
    run_store(store, [1, 2], 4, 4)
    batch = store.complete([group(birth=3)], 4, 3)
    assert [one.birth for one in batch] == [3, 2, 2, 2]  # none of step 1 while step 2 has some
    batch = store.complete([], 8, 4)
    assert [one.birth for one in batch] == [3, 2, 2, 2, 2, 1, 1, 1]


def test_popo_04_groups_stay_whole():
    seen = {}
    for batch in run_store(GroupReplay(group_capacity=20), range(1, 20), 2, 6):
        for one in batch:
            assert len(one.tokens) == len(one.logprobs) == len(one.rewards) == len(one.truncated) == 4
            assert one.advantages.sum().item() == pytest.approx(0, abs=1e-6)
            assert seen.setdefault((one.birth, one.prompt), content(one)) == content(one)


def test_popo_05_not_in_the_step_of_its_birth_not_stored_again_and_ageing_on():
    store = GroupReplay(group_capacity=4)
    for step in range(10):
        batch = store.complete([group(birth=step)], 3, step)
        assert step not in births(batch[1:])
        assert [one.birth for one in store.stored] == list(range(max(step - 3, 0), step + 1))  # one place each
    for step in range(10, 14):  # nothing new: the same groups come again, older each time
        batch = store.complete([], 3, step)
        assert [one.birth for one in batch] == [9, 8, 7]
        assert len(store.stored) == 4


def test_popo_11_figures_for_the_log():
    store = GroupReplay(group_capacity=4)
    run_store(store, [1, 2], 2, 2)
    store.complete([group(birth=3)], 4, 3)
    expected = {"stored_groups": 4, "replaced": 0.75, "group_ages": [0, 2, 1], "group_uses": [0, 3]}
    assert json.loads(json.dumps(store.figures(3))) == expected
    store.complete([], 1, 6)
    assert store.figures(6)["group_ages"] == [0, 0, 0, 1]
    assert store.figures(6)["replaced"] == 1


@pytest.mark.parametrize("kind", [GroupReplay, RolloutReplay, DynamicSampling])
def test_popo_12_a_restored_store_gives_the_same_batches(kind):
    store = kind()
    run_store(store, range(1, 30), 3, 2)
    other = restored(store, kind())
    ahead = run_store(store, range(30, 40), 3, 5)
    again = run_store(other, range(30, 40), 3, 5)
    for batch, same in zip(ahead, again, strict=True):
        assert [content(one) for one in batch] == [content(one) for one in same]
        assert [one.uses for one in batch] == [one.uses for one in same]
