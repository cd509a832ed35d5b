"""Gates on a second pass: all rates and seeds at once do what lab/second_pass.py does one by one."""

import dataclasses
import json

import numpy as np
import pytest

from lab import gates, second_pass
from lab.gates import Batch, Stored, ess, gate, train
from lab.rules import OnPolicyGroupReplay
from lab.simulate import Setting
from tests.helpers import code_of

SMALL = Setting(
    prompts=64, prompts_per_step=8, skills=2, steps=100, visit=1.0, difficulty=0.3, optimizer="adam", interference=0.5
)
RATES = (0.5, 2.0)


@pytest.fixture(autouse=True)
def few_rates(monkeypatch):
    monkeypatch.setattr(gates, "RATES", RATES)


@pytest.mark.parametrize("arm", ["plain", "twice"])
def test_side_by_side_is_one_by_one(arm):
    found, _ = train(SMALL, arm, [3, 4])
    for r, rate in enumerate(RATES):
        for s, seed in enumerate((3, 4)):
            alone = second_pass.train(dataclasses.replace(SMALL, visit=rate), arm, seed)
            np.testing.assert_allclose(found[r, s], alone, rtol=1e-9)


def test_with_all_places_given_to_stored_groups_it_is_popo(monkeypatch):
    monkeypatch.setattr(gates.Stored, "learn", lambda *_: None)
    begin = gates.Stored.__init__

    def full(self, shape, places):
        begin(self, shape, places)
        self.fill[:] = 1.0

    monkeypatch.setattr(gates.Stored, "__init__", full)
    found, _ = train(SMALL, "adaptive", [3])
    alone = second_pass.train(dataclasses.replace(SMALL, visit=RATES[1]), "group", 3)
    np.testing.assert_allclose(found[1, 0], alone, rtol=1e-9)


def test_a_gate_shut_is_plain_and_open_is_twice():
    plain, twice, shut, wide = (train(SMALL, arm, [0]) for arm in ("plain", "twice", "ess 2", "norm 99"))
    np.testing.assert_array_equal(shut[0], plain[0])
    np.testing.assert_array_equal(wide[0], twice[0])
    assert plain[1].tolist() == [1, 1] and shut[1].tolist() == [1, 1] and (twice[1] > 1.9).all()
    some = train(SMALL, "ess 0.99", [0])[1]
    assert 1 < some[1] < some[0] <= 2  # at the larger rate the first pass goes further


def test_effective_sample_size_is_of_the_groups_that_are_used():
    weight = np.ones((1, 1, 3, 1, 1))
    weight[0, 0, :, 0, 0] = (1, 3, 50)
    assert ess(weight, np.array([[[True, True, False]]])) == pytest.approx(0.8)  # 16 / 20
    assert ess(weight, np.array([[[True, False, False]]])) == pytest.approx(1)


def test_gates_by_name():
    near, growth, chance = np.array([[0.8, 0.95]]), np.array([[1.1, 0.9]]), gates.Chance((1, 2))
    assert gate("ess 0.9", near, growth, chance).tolist() == [[False, True]]
    assert gate("norm 1", near, growth, chance).tolist() == [[False, True]]
    assert gate("twice", near, growth, chance).all()
    assert chance.fill.tolist() == [[0.1, 0.1]]
    for _ in range(60):
        gate("fill 0.9", near, growth, chance)
    assert chance.fill[0, 0] < 0.1 and chance.fill[0, 1] > 0.5
    # it is that of the rule which it stands for
    rule = OnPolicyGroupReplay()
    assert (rule.fill, rule.min_ess) == (0.1, gates.MIN_ESS)


def test_stored_groups_come_back_newest_first_and_dead_ones_never():
    """One run, two places; groups are known by their skill."""

    def batch(first: int, used: list[bool]) -> Batch:
        skills = np.array([[[[first], [first + 1]]]])
        none = np.zeros((1, 1, 2, 3, 1))
        return Batch(skills, none, np.zeros(skills.shape), none[..., 0], np.array([[used]]))

    store = Stored((1, 1), places=2)
    store.fill[:] = 1.0
    store.complete(batch(0, [True, True]), 2)
    store.complete(batch(2, [False, True]), 2)
    full = store.complete(batch(4, [False, False]), 2)
    assert full.skills[full.used].ravel().tolist() == [3, 1]


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(second_pass.CELLS, "usual", SMALL)
    out = tmp_path / "numbers.json"
    assert gates.main(["--cells", "usual", "--arms", "twice", "ess 0.99", "--seeds", "4", "--out", str(out)]) == 0
    arms = json.loads(out.read_text())["cells"]["usual"]["arms"]
    assert set(arms) == {"plain", "twice", "ess 0.99"} and arms["plain"]["tuned"]["mean"] == 0
    assert "of 2 rates" in capsys.readouterr().out
    assert code_of(gates.main, ["--arms", "ess"]) == 2
