"""What every store owes the training loop, and more cases of the papers' checklists (test_replay.py).

The contract holds for a rule of your own too: python -m pytest tests/test_stores.py --rule my_rule.py:Shelf
(tests/conftest.py).
"""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch

from lab.rules import OldestGroupReplay, OnPolicyGroupReplay
from replay import DynamicSampling, Group, GroupReplay, RolloutReplay
from support import log
from tests.helpers import births, content, group, names, restored, run_store, tensors

STORES = {
    "dapo": DynamicSampling,
    "group": GroupReplay,
    "rollout": RolloutReplay,
    "adaptive": OnPolicyGroupReplay,
    "group-oldest": OldestGroupReplay,
}

# ---------------------------------------------------------------- the contract: what every store owes the loop


@pytest.mark.parametrize("at", [0, 1, 7, 30])
def test_contract_a_restored_store_gives_the_same_batches(make_store, at):
    store = make_store()
    run_store(store, range(at), 3, 2)
    other = restored(store, make_store())
    ahead = run_store(store, range(at, at + 20), 3, 5)
    again = run_store(other, range(at, at + 20), 3, 5)
    for batch, same in zip(ahead, again, strict=True):
        assert [content(one) for one in batch] == [content(one) for one in same]
        assert [one.uses for one in batch] == [one.uses for one in same]


def test_contract_a_batch_holds_what_was_handed_in_unchanged_and_nothing_twice(make_store):
    store = make_store()
    handed_in = {}
    for step in range(40):
        useful = [group(i, birth=step) for i in range(step % 5)]
        for one in useful:
            for i in range(4):
                handed_in[(step, one.prompt, i)] = content(one.pick(i))
        batch = store.complete(useful, 4, step)
        assert len(set(names(batch))) == len(names(batch))
        for one in batch:
            assert not one.dead or len(one.tokens) == 1
            for i, name in enumerate(names([one])):
                assert content(one.pick(i)) == handed_in[name]


def test_contract_figures_are_json(make_store):
    store = make_store()
    assert json.loads(json.dumps(store.figures(0))) == store.figures(0)
    for step in range(30):
        run_store(store, [step])
        store.learn({"ess_replayed": 0.9})
        assert json.loads(json.dumps(store.figures(step))) == store.figures(step)


def test_contract_a_state_is_strict_about_keys(make_store):
    state = make_store().state_dict()
    for name in state:
        with pytest.raises(KeyError, match=name):
            make_store().load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(KeyError, match="surprise"):
        make_store().load_state_dict(state | {"surprise": 1})


def test_contract_a_state_is_not_shared(make_store):
    store = make_store()
    run_store(store, range(25), 3, 2)
    state = store.state_dict()
    run_store(store, range(25, 30), 3, 5)  # must not reach into the state, nor must that of `one`
    one = make_store()
    one.load_state_dict(state)
    ahead = [names(batch) for batch in run_store(one, range(25, 35), 3, 5)]
    two = make_store()
    two.load_state_dict(state)
    assert [names(batch) for batch in run_store(two, range(25, 35), 3, 5)] == ahead


# ---------------------------------------------------------------- a group


@pytest.mark.parametrize(
    ("rewards", "dead", "num_correct"),
    [
        ([1, 0, 0, 1], False, 2),
        ([1, 1, 1, 1], True, 4),
        ([0, 0, 0, 0], True, 0),
        ([0.5, 0.5, 0.5, 0.5], True, 0),  # no gradient: as good as all wrong
        ([-1, -1, -1, -1], True, 0),
        ([0.5, 0, 0.25, 1], False, 1.75),
    ],
)
def test_a_group_is_dead_when_its_rewards_are_equal(rewards, dead, num_correct):
    one = group(rewards=rewards)
    assert one.dead is dead
    assert one.num_correct == num_correct
    assert type(one.num_correct) is float


def test_the_sum_of_rewards_is_not_rounded_as_float32():
    one = group(rewards=[0.1] * 9 + [0.0])
    assert one.num_correct == pytest.approx(9 * float(torch.tensor(0.1)), abs=1e-12)


def test_one_answer_of_a_group():
    whole = group(7, birth=3)
    whole.uses = 2
    one = whole.pick(3)
    assert names([one]) == [(3, 7, 3)]
    assert one.advantages.tolist() == [whole.advantages[3]]
    assert one.rewards.tolist() == [1]
    assert torch.equal(one.logprobs[0], whole.logprobs[3])
    assert one.truncated == [False]
    assert one.uses == 0
    assert (one.prompt, one.birth) == (7, 3)


def test_histograms_of_ages_and_uses():
    first = group(0, birth=3)
    second = group(1, birth=5)
    first.uses = 2
    second.uses = 1
    assert log.reuse("group", [first, second], 6) == {"group_ages": [0, 1, 0, 1], "group_uses": [0, 1, 1]}
    assert log.reuse("rollout", [], 6) == {"rollout_ages": [0], "rollout_uses": [0]}


# ---------------------------------------------------------------- rollout-level replay


@pytest.mark.parametrize("lag", [0, 4])
@pytest.mark.parametrize("max_age", [1, 10])
def test_rollout_replay_03_age_is_counted_from_birth(max_age, lag):
    store = RolloutReplay(max_age=max_age, replay_warmup=0, replay_ratio=100)
    for step, batch in enumerate(run_store(store, range(40), lag=lag)):
        ages = {step - birth for birth in births(batch[3:])}
        assert ages == {age for age in range(lag + 1, max_age + 1) if age <= step + lag}
        assert all(step - one.birth <= max(max_age, lag) for one in store.stored)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.45, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("per_step", [1, 2, 3, 5])
def test_rollout_replay_04_all_fresh_and_the_stated_number_of_stored(ratio, per_step):
    store = RolloutReplay(replay_ratio=ratio, replay_warmup=0)
    stored = 0
    for step, batch in enumerate(run_store(store, range(20), per_step)):
        assert names(batch[:per_step]) == [(step, i, k) for i in range(per_step) for k in range(4)]
        replayed = names(batch[per_step:])
        assert len(replayed) == len(set(replayed)) == min(round(ratio * 4 * per_step), stored)
        stored = min(stored + 4 * per_step, 40 * per_step)


def test_rollout_replay_04_without_useful_groups_nothing_is_replayed():
    store = RolloutReplay(replay_warmup=0)
    run_store(store, range(5))
    assert store.complete([], 8, 5) == []


def test_rollout_replay_05_what_is_stored_is_what_was_sampled():
    store = RolloutReplay(replay_warmup=0, replay_ratio=2.0)
    run_store(store, range(40))
    for one in store.stored:
        i = int(one.tokens[0][1])
        whole = group(one.prompt, birth=one.birth)
        assert content(one) == content(whole.pick(i))


def test_rollout_replay_06_the_floor_is_a_millionth():
    """With an exponent of 1/4 and |A| of 1 and 1e-6, the smaller one has (2e-6)^(1/4) = 0.0376 of the weight."""
    smaller = 0
    for seed in range(3000):
        store = RolloutReplay(seed=seed, priority_exponent=0.25, replay_warmup=0)
        two = group(0, rewards=(1, 0), birth=0)
        two.advantages = torch.tensor([1.0, 1e-6])
        store.complete([two], 8, 0)
        batch = store.complete([group(1, rewards=(1, 0), birth=1)], 8, 1)
        smaller += int(batch[1].tokens[0][1])
    assert smaller / 3000 == pytest.approx(0.0376 / 1.0376, abs=0.01)


def test_rollout_replay_06_the_floor_keeps_weights_positive():
    store = RolloutReplay(replay_ratio=1.0, replay_warmup=0)
    store.complete([group(0, rewards=(1.0, 0.5, 0.0), birth=0)], 8, 0)  # the middle one has no advantage
    batch = store.complete([group(1, rewards=(1, 0, 0))], 8, 1)
    assert sorted(names(batch[1:])) == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


def test_rollout_replay_09_answers_that_are_masked_are_neither_stored_nor_counted():
    store = RolloutReplay(replay_ratio=1.0, replay_warmup=0, mask_truncated=True)
    batches = run_store(store, range(4))  # of the four answers to a prompt the first is cut
    assert [len(batch) - 3 for batch in batches] == [0, 9, 9, 9]
    assert not any(one.truncated[0] for one in store.stored)
    assert len(store.stored) == 4 * 9


def test_rollout_replay_09_every_answer_has_as_many_log_probs_as_tokens():
    store = RolloutReplay(replay_warmup=0)
    run_store(store, range(3))
    for one in store.stored:
        assert len(one.tokens[0]) == len(one.logprobs[0])


def test_rollout_replay_10_age_starts_at_the_version_that_generated():
    store = RolloutReplay(replay_warmup=0, replay_ratio=100)
    batches = run_store(store, range(4, 30), lag=4)
    assert births(batches[10][3:]) == {4, 5, 6, 7, 8, 9}  # step 14: from age 10 to what was trained on at 13


def test_rollout_replay_10_answers_of_a_group_that_popo_brought_back_are_not_stored_again():
    places = GroupReplay(group_capacity=10)
    extra = RolloutReplay(replay_warmup=0, replay_ratio=100)
    for step in range(1, 8):
        batch = places.complete([group(step, birth=step)], 3, step)
        extra.complete(batch, 3, step)
    assert len(extra.stored) == 28
    assert len(set(names(extra.stored))) == 28


def test_rollout_replay_10_answers_of_a_carried_group_are_stored_once():
    carried = DynamicSampling()
    extra = RolloutReplay(replay_warmup=0, replay_ratio=100)
    for step in range(1, 6):
        batch = carried.complete([group(i, birth=step) for i in range(3)], 2, step)
        extra.complete(batch, 2, step)
    assert births(extra.stored) == {1, 2, 3, 4}
    assert len(extra.stored) == len(set(names(extra.stored))) == 40


def test_rollout_replay_12_beyond_the_capacity_the_oldest_go():
    store = RolloutReplay(rollout_capacity=30, replay_warmup=0, max_age=100)
    run_store(store, range(10))
    assert len(store.stored) == 30
    assert births(store.stored) == {7, 8, 9}
    other = restored(store, RolloutReplay(rollout_capacity=30))
    other.complete([], 1, 10)
    assert births(other.stored) == {7, 8, 9}


@pytest.mark.parametrize("make", [RolloutReplay, lambda: GroupReplay(group_capacity=1000)], ids=["rollout", "group"])
def test_rollout_replay_12_ten_bytes_a_token_in_memory_and_on_disk(make):
    store = make()
    run_store(store, range(5), length=400)
    tokens = 5 * 3 * 4 * 400
    held = {}
    for one in store.stored:
        for tensor in [*one.tokens, *one.logprobs]:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert 8 * tokens <= sum(held.values()) <= 10 * tokens
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors(store.state_dict())) <= 10 * tokens
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    assert len(file.getvalue()) <= 10 * tokens


def test_rollout_replay_13_uses_are_counted_over_all_steps():
    store = RolloutReplay(replay_warmup=2)
    uses = Counter()
    for step in range(12):
        (batch,) = run_store(store, [step], rewards=(1, 0, 0, 0))
        replayed = names(batch[3:])
        assert len(replayed) == (6 if step > 2 else 0)
        uses.update(replayed)
        counts = Counter(uses[name] for name in replayed)
        figures = store.figures(step)
        assert figures["rollout_uses"] == [counts[i] for i in range(max(counts, default=0) + 1)]
        assert ("replayed_positive" in figures) == bool(replayed)


def test_rollout_replay_13_an_answer_without_advantage_is_not_positive():
    store = RolloutReplay(replay_ratio=1.0, replay_warmup=0)
    store.complete([group(rewards=(1.0, 0.5, 0.0), birth=0)], 8, 0)
    store.complete([group(rewards=(1, 0, 0))], 8, 1)
    assert store.figures(1)["replayed_positive"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", [GroupReplay, RolloutReplay])
def test_seeds_draw_differently_and_the_same_seed_alike(kind):
    drawn = []
    for seed in (0, 1, 1):
        drawn.append([names(batch) for batch in run_store(kind(seed=seed), range(30), 3, 4)])
    assert drawn[0] != drawn[1]
    assert drawn[1] == drawn[2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"replay_ratio": -0.1},
        {"priority_exponent": -1},
        {"max_age": 0},
        {"replay_warmup": -1},
        {"rollout_capacity": 0},
    ],
)
def test_rollout_replay_refuses_what_cannot_be_meant(wrong):
    with pytest.raises(ValueError, match="need ratio, exponent and warm-up >= 0, and max age and capacity >= 1"):
        RolloutReplay(**wrong)


def test_rollout_replay_takes_the_least_that_can_be_meant():
    store = RolloutReplay(replay_ratio=0, priority_exponent=0, max_age=1, replay_warmup=0, rollout_capacity=1)
    run_store(store, range(3))
    assert len(store.stored) == 1


# ---------------------------------------------------------------- POPO


@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_popo_02_dead_places_are_filled_as_far_as_the_store_reaches(capacity):
    store = GroupReplay(group_capacity=capacity)
    rng = np.random.default_rng(0)
    stored = 0
    for step in range(1, 60):
        useful = [group(i, birth=step) for i in range(rng.integers(0, 9))]
        batch = store.complete(useful, 8, step)
        assert len(batch) == min(8, len(useful) + stored)
        assert not any(one.dead for one in batch)
        assert [id(one) for one in batch[: len(useful)]] == [id(one) for one in useful]
        assert len(set(names(batch))) == len(names(batch))  # none twice
        stored = min(stored + len(useful), capacity)


def test_popo_03_groups_of_one_step_in_random_order():
    firsts = Counter()
    for seed in range(60):
        store = GroupReplay(seed, group_capacity=20)
        run_store(store, [1], 4, 4)
        batch = store.complete([], 1, 2)
        firsts[batch[0].prompt] += 1
    assert len(firsts) == 4
    assert max(firsts.values()) < 35


def test_popo_05_places_beyond_the_useful_groups_only():
    """More useful groups than places, as in a refill: nothing is replayed, and all are stored."""
    store = GroupReplay(group_capacity=20)
    run_store(store, [1], 4, 4)
    (batch,) = run_store(store, [2], 6, 4)
    assert len(batch) == 6
    assert len(store.stored) == 10
    assert store.figures(2)["replaced"] == 0


def test_popo_11_uses_are_counted_over_all_steps():
    store = GroupReplay(group_capacity=4)
    run_store(store, [1, 2], 2, 2)
    run_store(store, [3], 1, 4)
    store.complete([], 1, 4)
    assert store.figures(4)["group_ages"] == [0, 1]
    assert store.figures(4)["group_uses"] == [0, 1]
    store.complete([], 1, 6)
    assert store.figures(6)["group_ages"] == [0, 0, 0, 1]
    assert store.figures(6)["group_uses"] == [0, 0, 1]


def test_popo_fills_every_place_whatever_the_sample_size():
    store = GroupReplay(group_capacity=100)
    run_store(store, [1, 2], 8, 8)
    for step in range(3, 40):
        (batch,) = run_store(store, [step], 8, 16)
        assert len(batch) == 16
        store.learn({"ess_replayed": 0.1})


def test_popo_stores_two_steps_unless_told_otherwise():
    assert GroupReplay(prompts_per_step=16).stored.maxlen == 32
    assert GroupReplay(group_capacity=5, prompts_per_step=16).stored.maxlen == 5
    with pytest.raises(ValueError, match="--group-capacity must be at least 0, got -1"):
        GroupReplay(group_capacity=-1)


# ---------------------------------------------------------------- dynamic sampling


def test_dynamic_sampling_throws_nothing_away_and_keeps_the_order():
    """What was handed in comes out once, in order, at the latest when the steps bring less than a batch."""
    store = DynamicSampling()
    rng = np.random.default_rng(0)
    given: list[Group] = []
    out: list[Group] = []
    for step in range(1, 50):
        useful = [group(i, birth=step) for i in range(rng.integers(0, 12))]
        batch = store.complete(useful, 6, step)
        given += useful
        out += batch
        left = len(given) - len(out)
        assert store.figures(step) == {"carried": left}
        assert len(batch) == 6 or not left
    assert [id(one) for one in [*out, *store.stored]] == [id(one) for one in given]
