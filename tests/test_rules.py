"""Tests of lab/rules.py: GRESO, our own rule, POPO's ablations. What every rule owes the loop is in test_samplers.py
and test_stores.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import beta

import train
from lab import rules
from lab.rules import (
    GRESO,
    GUESS,
    LEVELS,
    MARGIN,
    MEMORY,
    Adaptive,
    Beta,
    LeastDriftGroupReplay,
    OldestGroupReplay,
    OnPolicyGroupReplay,
    SecondPass,
    worth,
)
from replay import Uniform
from support import config, plot
from tests.helpers import G, group, know, restored, run_store, simulate, visits

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
    mean = 600 * (1 - passes) / passes
    spread = np.sqrt(600 * (1 - passes)) / passes
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
    assert sorted(sampler.draw(8, 1)) == list(range(8))
    assert sampler.figures()["skipped"] == 0


def test_greso_easy_and_hard_prompts_have_a_p_of_their_own_moved_towards_the_targets():
    sampler = GRESO(300, target=0.75)  # a quarter easy, a half hard
    easy = 0.5
    hard = 0.5
    assert (sampler.figures()["p_easy"], sampler.figures()["p_hard"]) == (easy, hard)
    for solved, unsolved in ((2, 3), (1, 4), (3, 5), (0, 0), (8, 0), (0, 8)):
        correct = [G] * solved + [0] * unsolved + [8] * (8 - solved - unsolved)
        know(sampler, dict(enumerate(correct)))
        easy += -0.01 if solved >= 2 else 0.01
        hard += -0.01 if unsolved >= 4 else 0.01
        figures = sampler.figures()
        assert [figures["p_easy"], figures["p_hard"]] == pytest.approx([easy, hard])


@pytest.mark.parametrize(("correct", "ends"), [(0, (0.95, 0.05)), (G, (0.05, 0.95)), (8, (0.95, 0.95))])
def test_greso_p_stays_between_its_bounds(correct, ends):
    sampler = GRESO(20)
    for step in range(120):
        know(sampler, dict.fromkeys(range(8), correct), step)
        assert min(sampler.chance) >= 0.05
        assert max(sampler.chance) <= 0.95
    assert (sampler.figures()["p_easy"], sampler.figures()["p_hard"]) == pytest.approx(ends)


def test_greso_a_prompt_passed_over_is_not_lost():
    rates = np.repeat([0.5, 0.0, 1.0], [20, 5, 5])
    history = simulate(GRESO(30, seed=1), rates, range(1, 4001), 4)
    late = visits(history[1000:])
    assert all(late[x] for x in range(30))
    assert max(late[x] for x in range(20, 30)) < 0.4 * min(late[x] for x in range(20))  # but visited less


def test_greso_all_dead_still_fills_the_batch():
    history = simulate(GRESO(32), np.zeros(32), range(1, 60), 32)
    assert all(sorted(row.batch) == list(range(32)) for row in history)


@pytest.mark.parametrize("wrong", [{"target": -0.1}, {"target": 1.1}, {"floor": 0}, {"floor": 1.1}])
def test_greso_refuses_what_cannot_be_meant(wrong):
    with pytest.raises(ValueError, match="need 0 <= target <= 1 and 0 < floor <= 1"):
        GRESO(8, **wrong)


# ---------------------------------------------------------------- Beta posteriors


def test_beta_adds_a_group_to_what_is_left_of_the_posterior_and_forgets_towards_the_prior():
    sampler = Beta(4, decay=0.5, prior=1.0)
    sampler.observe([0, 2], [3, 8], [8, 8], 1)
    assert (sampler.a.tolist(), sampler.b.tolist()) == ([4, 1, 9, 1], [6, 1, 1, 1])
    sampler.observe([0], [8], 8, 2)
    assert (sampler.a[0], sampler.b[0]) == (0.5 * 4 + 0.5 + 8, 0.5 * 6 + 0.5)
    # for ever the same group: what it adds is halved again and again, 8 + 4 + 2 ...
    for step in range(60):
        sampler.observe([1], [8], 8, step)
    assert (sampler.a[1], sampler.b[1]) == pytest.approx((17, 1))


@pytest.mark.parametrize(("decay", "expected"), [(0.0, (1, 9)), (1.0, (17, 9))])
def test_beta_without_memory_knows_the_latest_group_and_without_decay_all_of_them(decay, expected):
    sampler = Beta(1, decay=decay)
    for step, correct in enumerate((8, 8, 0)):
        sampler.observe([0], [correct], [8], step)
    assert (sampler.a[0], sampler.b[0]) == expected


def test_beta_draws_a_prompt_as_often_as_its_posterior_is_at_one_half():
    """One place and many prompts: the drawn rate nearest to one half goes with the densities there."""
    kinds = {"mixed": 4, "nearly solved": 7, "solved": 8}
    rights = np.repeat(list(kinds.values()), 200)
    sampler = Beta(600, seed=1)
    sampler.observe(range(600), rights, 8, 0)
    drawn = np.array([rights[sampler.draw(1, step)[0]] for step in range(1, 4001)])
    density = {right: beta.pdf(0.5, 1 + right, 9 - right) for right in kinds.values()}
    for right in kinds.values():
        share = density[right] / sum(density.values())
        assert abs((drawn == right).mean() - share) < 4 * np.sqrt(share / 4000)


def test_beta_tries_unseen_prompts_before_dead_ones_and_says_what_came_back():
    sampler = Beta(400, seed=2)
    dead = list(range(200))
    sampler.seen[dead] = True
    sampler.observe(dead, [0] * 100 + [8] * 100, 8, 0)
    chosen = sampler.draw(50, 1)
    assert np.mean([x < 200 for x in chosen]) < 0.2
    assert sampler.replays == {x for x in chosen if x < 200}
    again = sampler.draw(350, 1)  # a refill
    assert sorted(chosen + again) == list(range(400))
    assert sampler.replays == set(dead)


@pytest.mark.parametrize("wrong", [{"decay": -0.1}, {"decay": 1.1}, {"prior": 0}])
def test_beta_refuses_what_cannot_be_meant(wrong):
    with pytest.raises(ValueError, match="need decay in"):
        Beta(8, **wrong)


# ---------------------------------------------------------------- our own rule, of prompts

SIZE = 8  # answers to a prompt


def play(sampler, answer, steps, n=8) -> list[set[int]]:
    """Draws and observes; answer(prompts) gives their right answers of SIZE. Which prompts each step brought back."""
    back = []
    for step in range(1, steps + 1):
        drawn = sampler.draw(n, step)
        assert len(set(drawn)) == n
        back.append(sampler.replays)
        sampler.observe(drawn, answer(np.array(drawn)), [SIZE] * n, step)
    return back


def test_worth_is_spread_times_room_squared():
    assert worth(np.array([0, 0.25, 0.5, 1])).tolist() == [0, 0.25 * 0.75**3, 0.5**4, 0]


def test_where_visits_move_nothing_the_best_levels_come_back():
    level = np.repeat([0, 1, 2, 4, 7, 8], 20)
    sampler = Adaptive(120, seed=1, share=0.5, cooldown=3)
    back = play(sampler, lambda x: level[x], 200)
    often = np.zeros(9, int)
    for step in back[60:]:
        assert len(step) == 4  # half of each batch
        for x in step:
            often[level[x]] += 1
    assert often[[0, 7, 8]].sum() == 0
    assert often[2] > 0
    assert often[2] >= often[4]
    last = {}
    for step, prompts in enumerate(back):
        assert all(step - last.get(x, -9) >= 3 for x in prompts)
        last |= dict.fromkeys(prompts, step)


def test_where_a_visit_solves_a_prompt_replay_all_but_ends():
    rng = np.random.default_rng(0)
    count = np.zeros(4000, int)

    def answer(x):
        count[x] += 1
        first = rng.binomial(SIZE, 0.4, len(x))
        return np.where(x % 2, 0, np.where(count[x] > 1, SIZE, first))

    back = [len(step) for step in play(Adaptive(4000, seed=0), answer, 400)]
    assert sum(back[:40]) > 40
    assert max(back) == 4
    assert sum(back[200:]) < 200  # of 1600; it looks again now and then, whether that is still so


def test_unsolved_prompts_are_retested_once_such_prompts_come_off():
    """All are unsolved in the first epoch, half no longer in the second: then unsolved ones are worth a return."""
    count = np.zeros(400, int)

    def answer(x):
        count[x] += 1
        return np.where((count[x] > 1) & (x % 2 == 0), 3, 0)

    sampler = Adaptive(400, seed=0, cooldown=1)
    first = play(sampler, answer, 50)
    assert not any(first)
    for step in range(51, 60):
        drawn = sampler.draw(8, step)
        sampler.observe(drawn, answer(np.array(drawn)), [SIZE] * 8, step)
    assert sampler.better()[0]
    assert sampler.replays


def test_the_averages_by_hand():
    sampler = Adaptive(10, seed=0, share=0)
    sampler.observe([0, 1], [4, 0], [SIZE, SIZE], 1)  # drawn by nobody: counts as the epochs'
    keep = (1 - 1 / MEMORY) ** 2
    assert sampler.fresh.tolist() == [2, 0.5**4]
    assert not sampler.returns.any()
    sampler.observe([0, 2], [2, 8], [SIZE, SIZE], 2)
    at = LEVELS // 2
    assert sampler.returns[:, at].tolist() == [1, 0.25 * 0.75**3]
    assert sampler.returns.sum(1)[0] == 1
    assert sampler.fresh == pytest.approx([2 * keep + 2, 0.5**4 * keep + 0.25 * 0.75**3])
    assert sampler.promise()[at] == pytest.approx((0.25 * 0.75**3 + GUESS * 0.5**4) / (1 + GUESS))
    bar = MARGIN * sampler.fresh[1] / sampler.fresh[0]
    assert (sampler.better() == (sampler.promise() > bar)).all()
    assert sampler.better().any()


def test_a_return_visit_does_not_count_as_one_of_the_epochs():
    sampler = Adaptive(40, seed=0, cooldown=1)
    sampler.observe(sampler.draw(8, 1), [3, 0] * 4, [SIZE] * 8, 1)
    drawn = sampler.draw(8, 2)
    assert len(sampler.replays) == 4
    before = sampler.fresh.copy()
    keep = (1 - 1 / MEMORY) ** 8
    sampler.observe(drawn, [0] * 8, [SIZE] * 8, 2)
    assert sampler.fresh[0] == pytest.approx(before[0] * keep + 4)


def test_of_one_pass_rate_those_come_first_that_waited_longest():
    sampler = Adaptive(40, seed=0, cooldown=5, share=0.5)
    know(sampler, dict.fromkeys(range(20, 40), 0), step=0, size=SIZE)
    for x, step in ((3, 4), (1, 2), (2, 3), (0, 1), (4, 6)):
        know(sampler, {x: 2}, step=step, size=SIZE)
    assert sampler.draw(6, 9)[:3] == [0, 1, 2]
    know(sampler, dict.fromkeys([0, 1, 2], 2), step=9, size=SIZE)
    assert sampler.draw(6, 10)[0] == 3
    assert sampler.replays == {3}  # 4 and the others were visited less than five steps ago


def test_the_budget_is_the_steps_whatever_the_refills():
    sampler = Adaptive(100, seed=0, cooldown=1, share=0.5)
    know(sampler, dict.fromkeys(range(50, 100), 0), step=0, size=SIZE)
    know(sampler, dict.fromkeys(range(30), 2), step=0, size=SIZE)
    for step in range(2, 8):
        batch = sampler.draw(4, step) + sampler.draw(4, step)
        assert len(sampler.replays) == 2
        assert len(set(batch)) == 8


def test_without_a_share_it_is_plain_grpo():
    ours = Adaptive(50, seed=3, share=0)
    plain = Uniform(50, seed=3)
    for step in range(1, 30):
        drawn = ours.draw(8, step)
        assert drawn == plain.draw(8, step)
        ours.observe(drawn, [3] * 8, [SIZE] * 8, step)
        plain.observe(drawn, [3] * 8, [SIZE] * 8, step)


def test_group_sizes_that_are_no_divisor_of_the_levels():
    sampler = Adaptive(20, seed=0)
    for size in (2, 3, 5, 7, 11, 64):
        drawn = sampler.draw(4, size)
        sampler.observe(drawn, [0, 1, size - 1, size], [size] * 4, size)
        assert sampler.level[drawn[0]] == 0
        assert sampler.level[drawn[3]] == LEVELS


def test_adaptives_figures_for_the_log():
    sampler = Adaptive(10, seed=0)
    assert sampler.figures()["worth_fresh"] == 0
    assert sampler.figures()["buffer"] == 0
    know(sampler, {0: 0, 1: 0, 2: 2, 3: 8}, size=SIZE)
    figures = sampler.figures()
    assert figures["worth_fresh"] == pytest.approx(0.25 * 0.75**3 / 4)
    assert figures["levels_back"] == sampler.better().astype(int).tolist()
    assert figures["levels_back"][4] == 1
    assert figures["buffer"] == 1  # prompt 2; those never visited are not in it


@pytest.mark.parametrize("wrong", [{"share": 1.1}, {"share": -0.1}, {"cooldown": -1}])
def test_wrong_constants(wrong):
    with pytest.raises(ValueError, match="need share"):
        Adaptive(10, **wrong)


def test_constants_of_the_docstring():
    assert (rules.MARGIN, rules.MEMORY, rules.GUESS) == (1.25, 320, 8)


# ---------------------------------------------------------------- our own rule, of answers


def filled_by(store, ess, steps: int, places: int = 16) -> list[int]:
    """Places that `store` fills a step, where ess(number filled) is what each update finds."""
    counts = []
    for step in range(steps):
        (batch,) = run_store(store, [step], places // 2, places)
        filled = len(batch) - places // 2
        counts.append(filled)
        store.learn({"ess_replayed": ess(filled)} if filled else {})
    return counts


def test_adaptive_fills_as_many_places_as_stay_on_policy():
    near = filled_by(OnPolicyGroupReplay(group_capacity=100), lambda n: 1.0, 40)
    assert near[1] <= 2  # nothing is taken on trust
    assert near[-1] == 8
    far = filled_by(OnPolicyGroupReplay(group_capacity=100), lambda n: 0.9, 400)
    assert 0 < np.mean(far[-300:]) < 0.5  # a group now and then: it may come to do better
    middle = filled_by(OnPolicyGroupReplay(group_capacity=100), lambda n: 1 - 0.0025 * n, 400)  # four and no more
    assert 3 < np.mean(middle[-300:]) < 5
    halved = filled_by(OnPolicyGroupReplay(group_capacity=100, max_fill=0.5), lambda n: 1.0, 400)
    assert np.mean(halved[-300:]) == 4
    assert not any(filled_by(OnPolicyGroupReplay(group_capacity=100, max_fill=0.0), lambda n: 1.0, 40))


def test_the_share_of_places_by_hand():
    store = OnPolicyGroupReplay()
    assert store.fill == pytest.approx(0.1)
    for ess, fill in ((0.99, 0.12), (1.0, 0.144), (0.98, 0.1008), (None, 0.1008), (0.5, 0.07056)):
        store.learn({} if ess is None else {"ess_replayed": ess})
        assert store.fill == pytest.approx(fill)
    for _ in range(20):
        store.learn({"ess_replayed": 0.0})
    assert store.fill == pytest.approx(0.02)
    for _ in range(40):
        store.learn({"ess_replayed": 1.0})
    assert store.fill == 1


def test_adaptives_share_of_places_is_part_of_its_state():
    store = OnPolicyGroupReplay(seed=1, group_capacity=100)
    filled_by(store, lambda n: 1.0, 20)
    again = restored(store, OnPolicyGroupReplay(seed=1, group_capacity=100))
    assert again.fill == store.fill > 0.2
    assert filled_by(again, lambda n: 1.0, 5) == filled_by(store, lambda n: 1.0, 5)


def test_adaptive_cannot_join_rollout_level_replay():
    chosen = config.choose_rules("adaptive", train.METHODS)
    assert chosen["places"] is OnPolicyGroupReplay
    for names in ("adaptive+rollout", "rollout+adaptive", f"{rules.__file__}:OnPolicyGroupReplay+rollout"):
        with pytest.raises(ValueError, match="OnPolicyGroupReplay cannot join RolloutReplay; leave out one"):
            config.choose_rules(names, train.METHODS)


@pytest.mark.parametrize("wrong", [{"min_ess": 1.0}, {"min_ess": -0.1}, {"max_fill": 1.5}, {"max_fill": -0.1}])
def test_on_policy_group_replay_refuses_what_cannot_be_meant(wrong):
    with pytest.raises(ValueError, match="need min_ess"):
        OnPolicyGroupReplay(**wrong)


# ---------------------------------------------------------------- POPO's ablations


def test_oldest_first():
    store = OldestGroupReplay(group_capacity=20)
    run_store(store, [1, 2], 4, 4)
    batch = store.complete([group(0, birth=3)], 7, 3)
    assert [one.birth for one in batch] == [3, 1, 1, 1, 1, 2, 2]


def test_least_drift_first():
    asked = []

    def drift(groups):
        asked.append(len(groups))
        return [abs(one.prompt - 2.2) for one in groups]

    store = LeastDriftGroupReplay(group_capacity=20)
    store.drift = drift
    run_store(store, [1], 4, 4)
    assert not asked  # a pass of the model that nothing needs
    batch = store.complete([group(9, birth=2)], 4, 2)
    assert [one.prompt for one in batch] == [9, 2, 3, 1]
    assert asked == [4]  # not the group of this step
    run_store(store, [3], 4, 4)
    assert asked == [4]  # nor where no place is free


def test_drift_is_measured_with_the_runs_policy(monkeypatch):
    asked = []
    monkeypatch.setattr(rules, "drift_of", lambda *given: asked.append(given) or [0.0])
    store = LeastDriftGroupReplay(group_capacity=20)
    store.attach(SimpleNamespace(policy="policy", prompts="prompts", cfg="cfg"))
    run_store(store, [1], 1, 1)
    stored = list(store.stored)
    store.complete([], 1, 2)
    assert asked == [(stored, "policy", "prompts", "cfg")]


# ---------------------------------------------------------------- a second pass


def trained_by(folder, *flags: str) -> list[dict]:
    """The steps of a short run of the embedded model."""
    argv = [
        "--out",
        str(folder),
        "--steps",
        "4",
        "--prompts-per-step",
        "8",
        "--eval-every",
        "0",
        "--lr",
        "1e-3",
        *flags,
    ]
    assert train.main(argv) == 0
    return plot.read(folder / "metrics.jsonl")


@pytest.mark.parametrize(("bound", "plain"), [(0.0, ["--epochs", "2"]), (1.0, [])])
def test_a_gate_open_is_two_epochs_and_a_gate_shut_is_one(tmp_path, bound, plain):
    rule = tmp_path / "mine.py"
    rule.write_text(
        "from lab.rules import SecondPass\n\n\nclass Mine(SecondPass):\n    def __init__(self):\n"
        f"        super().__init__(min_ess={bound})\n"
    )
    ours = trained_by(tmp_path / "ours", "--replay", f"{rule}:Mine")
    usual = trained_by(tmp_path / "usual", *plain)
    for mine, theirs in zip(ours, usual, strict=True):
        assert mine["reward"] == theirs["reward"] and mine["optimizer_steps"] == theirs["optimizer_steps"]
        assert mine["entropy"] == pytest.approx(theirs["entropy"], rel=1e-4)  # of what the next policy samples
    assert {row["second_pass"] for row in ours} == {float(bound == 0)}
    assert all(row["ess_first_pass"] < 0.9999 for row in ours)


def test_a_second_pass_is_refused_where_there_are_several_steps_anyway():
    run = SimpleNamespace(cfg=train.Config(epochs=2))
    with pytest.raises(ValueError, match="needs --epochs 1 and --minibatches 1"):
        SecondPass().attach(run)
    with pytest.raises(ValueError, match="min_ess in"):
        SecondPass(min_ess=1.5)


def test_a_step_without_a_useful_group_has_no_second_pass():
    store = SecondPass()
    store.attach(SimpleNamespace(cfg=train.Config(), prompts=[], policy=None))
    assert store.complete([], 4, 1) == []
    trained = {"optimizer_steps": 1}
    store.learn(trained)
    assert trained == {"optimizer_steps": 1} and store.figures(1)["second_pass"] == 0
