"""Storing against a second pass, on exactly known pass rates: the three arms, and how they are judged."""

import dataclasses
import json

import numpy as np
import pytest

from lab import second_pass, simulate
from lab.second_pass import Group, generate, train, tuned, update
from lab.simulate import Policy, Setting
from replay import Uniform
from tests.helpers import code_of

SMALL = Setting(prompts=64, prompts_per_step=8, skills=2, steps=100, visit=0.5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("interference", [0.0, 0.5])
def test_the_plain_arm_is_the_simulators_uniform_sampling(optimizer, interference):
    # easy enough that every batch has a live group: the simulator's Adam moves without one, too
    setting = dataclasses.replace(SMALL, difficulty=0.1, visit=0.1, optimizer=optimizer, interference=interference)
    there = simulate.run(setting, Uniform, [3])["accuracy"][0]
    np.testing.assert_allclose(train(setting, "plain", 3), there[::2], rtol=1e-9)


def test_arms_part_where_they_differ_and_not_before():
    plain, twice, group = (train(SMALL, arm, 0) for arm in second_pass.ARMS)
    assert plain[0] == twice[0] == group[0]
    assert len({plain[-1], twice[-1], group[-1]}) == 3


def one_prompt(logit: float, **change) -> Policy:
    """512 prompts of one private skill each, all at `logit`; the step is the gradient itself."""
    policy = Policy(Setting(prompts=512, skills=1, **change), [0], salt=0)
    policy.theta[:] = logit
    policy.live[:] = 1.0
    policy.rate = 1.0
    return policy


def test_importance_weights_make_old_answers_worth_what_fresh_ones_are():
    """Answers sampled at logit -0.4, policy at 0: on average the gradient is that of fresh answers."""
    rng = np.random.default_rng(0)
    prompts = list(range(512)) * 40
    old = generate(one_prompt(-0.4), prompts, rng)
    fresh = generate(one_prompt(0.0), prompts, rng)
    moved = {}
    for name, groups in (("old", old), ("fresh", fresh)):
        # the baseline is that of the answers' own policy; an advantage by the exact pass rate leaves the weights alone
        rate = simulate.sigmoid(np.array(groups[0].birth))
        exact = [dataclasses.replace(group, advantage=group.came_off[:, 0] - rate) for group in groups]
        policy = one_prompt(0.0)
        update(policy, exact, passes=1)
        moved[name] = policy.theta.sum()
    assert moved["old"] == pytest.approx(moved["fresh"], rel=0.02)
    assert moved["fresh"] == pytest.approx(0.25, rel=0.02)  # p (1 - p)


def test_a_second_pass_stops_where_the_first_went_beyond_the_clip():
    groups = generate(one_prompt(0.0), list(range(512)), np.random.default_rng(0))
    useful = [group for group in groups if group.advantage.any()]
    far = [one_prompt(0.0) for _ in range(2)]
    near = [one_prompt(0.0) for _ in range(2)]
    for passes in (1, 2):
        far[passes - 1].rate = 5e4
        update(far[passes - 1], useful, passes)
        update(near[passes - 1], useful, passes)
    np.testing.assert_array_equal(far[0].theta, far[1].theta)
    assert near[1].theta.sum() == pytest.approx(2 * near[0].theta.sum(), rel=0.01)


def test_stored_groups_take_the_places_of_dead_ones_newest_first(monkeypatch):
    """Each group is named by its birth step; a step has one useful group for three places."""
    batches = []
    setting = dataclasses.replace(SMALL, prompts_per_step=3)

    def made(policy, prompts, rng):
        made.step += 1
        live = np.array([0.5, -0.5])
        return [Group(made.step, None, None, live if i == 0 else 0 * live) for i in range(3)]

    made.step = 0
    monkeypatch.setattr(second_pass, "generate", made)
    monkeypatch.setattr(second_pass, "update", lambda policy, batch, passes: batches.append([g.skills for g in batch]))
    train(setting, "group", 0)
    assert batches[:4] == [[1], [2, 1], [3, 2, 1], [4, 3, 2]]
    assert batches[-1] == [100, 99, 98]


def test_an_arm_is_judged_at_the_rate_that_was_best_on_the_other_half():
    points = second_pass.POINTS + 1
    good, bad = np.full(points, 0.9), np.full(points, 0.1)
    curves = {1.0: np.stack([good, bad, good, bad]), 2.0: np.stack([bad, good, bad, good])}
    ends, rates = tuned(curves)
    assert rates == [2.0, 1.0]
    np.testing.assert_allclose(ends, 0.1)


def test_the_whole_command_and_bad_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(second_pass, "RATES", (0.5, 2.0))
    monkeypatch.setitem(second_pass.CELLS, "usual", SMALL)
    out = tmp_path / "numbers.json"
    assert second_pass.main(["--cells", "usual", "--seeds", "4", "--out", str(out)]) == 0
    cell = json.loads(out.read_text())["cells"]["usual"]
    assert set(cell["tests"]) == {"group - twice", "group - plain", "twice - plain"}
    parts = cell["accuracy"]
    assert cell["tests"]["group - twice"]["mean"] == pytest.approx(parts["group"] - parts["twice"], abs=1e-3)
    assert "24 runs" in capsys.readouterr().out
    assert code_of(second_pass.main, ["--cells", "nowhere"]) == 2
    assert code_of(second_pass.main, ["--seeds", "3"]) == 2
