"""Tests of our own rule (adaptive.py); what every sampler owes the loop is in test_replay.py."""

import numpy as np
import pytest

from lab import rules
from lab.rules import GUESS, LEVELS, MARGIN, MEMORY, Adaptive, worth
from replay import Uniform

G = 8


def play(sampler, answer, steps, n=8) -> list[set[int]]:
    """Draws and observes; answer(prompts) gives their right answers of G. Which prompts each step brought back."""
    back = []
    for step in range(1, steps + 1):
        drawn = sampler.draw(n, step)
        assert len(set(drawn)) == n
        back.append(set(sampler.epochs.replays))
        sampler.observe(drawn, answer(np.array(drawn)), [G] * n, step)
    return back


def test_worth_is_spread_times_room_squared():
    assert worth(np.array([0, 0.25, 0.5, 1])).tolist() == [0, 0.25 * 0.75**3, 0.5**4, 0]
    assert worth(np.array([0.5]), [0.0]).tolist() == [0] and worth(np.array([0.5]), [0.1]).tolist() == [0.025]


def test_where_visits_move_nothing_the_best_levels_come_back():
    level = np.repeat([0, 1, 2, 4, 7, 8], 20)
    sampler = Adaptive(120, seed=1, share=0.5, cooldown=3)
    back = play(sampler, lambda x: level[x], 200)
    often = np.bincount([level[x] for step in back[60:] for x in step], minlength=9)
    assert often[[0, 7, 8]].sum() == 0 and often[2] > 0 and often[2] >= often[4]
    assert all(len(step) == 4 for step in back[60:])  # half of each batch
    last = {}
    for step, prompts in enumerate(back):
        assert all(step - last.get(x, -9) >= 3 for x in prompts)
        last |= dict.fromkeys(prompts, step)


def test_where_a_visit_solves_a_prompt_replay_all_but_ends():
    rng, visits = np.random.default_rng(0), np.zeros(4000, int)

    def answer(x):
        visits[x] += 1
        return np.where(x % 2, 0, np.where(visits[x] > 1, G, rng.binomial(G, 0.4, len(x))))

    back = play(Adaptive(4000, seed=0), answer, 400)
    assert sum(map(len, back[:40])) > 40 and max(map(len, back)) == 4
    assert sum(map(len, back[200:])) < 200  # of 1600; it looks again now and then, whether that is still so


def test_unsolved_prompts_are_retested_once_such_prompts_come_off():
    """All are unsolved in the first epoch, half no longer in the second: then unsolved ones are worth a return."""
    visits = np.zeros(400, int)

    def answer(x):
        visits[x] += 1
        return np.where(visits[x] > 1, np.where(x % 2 == 0, 3, 0), 0)

    sampler = Adaptive(400, seed=0, cooldown=1)
    first = play(sampler, answer, 50)
    assert not any(first)
    for step in range(51, 60):
        drawn = sampler.draw(8, step)
        sampler.observe(drawn, answer(np.array(drawn)), [G] * 8, step)
    assert sampler.better()[0] and sampler.epochs.replays


def test_the_averages_by_hand():
    sampler = Adaptive(10, seed=0, share=0)
    sampler.observe([0, 1], [4, 0], [G, G], 1)  # drawn by nobody: counts as the epochs'
    keep = (1 - 1 / MEMORY) ** 2
    assert sampler.fresh.tolist() == [2, 0.5**4] and not sampler.returns.any()
    sampler.observe([0, 2], [2, 8], [G, G], 2)
    at = LEVELS // 2
    assert sampler.returns[:, at].tolist() == [1, 0.25 * 0.75**3] and sampler.returns.sum(1)[0] == 1
    assert sampler.fresh == pytest.approx([2 * keep + 2, 0.5**4 * keep + 0.25 * 0.75**3])
    assert sampler.promise()[at] == pytest.approx((0.25 * 0.75**3 + GUESS * 0.5**4) / (1 + GUESS))
    bar = MARGIN * sampler.fresh[1] / sampler.fresh[0]
    assert (sampler.better() == (sampler.promise() > bar)).all() and sampler.better().any()


def test_late_results_count_as_what_brought_the_prompt():
    """Asynchronous: results of a replayed prompt come in when another batch has been drawn."""
    sampler = Adaptive(40, seed=0, cooldown=1)
    sampler.observe(sampler.draw(8, 1), [3, 0] * 4, [G] * 8, 1)
    drawn = sampler.draw(8, 2)
    back = set(sampler.epochs.replays)
    assert len(back) == 4
    sampler.draw(8, 3)
    before, keep = sampler.fresh.copy(), (1 - 1 / MEMORY) ** 8
    sampler.observe(drawn, [0] * 8, [G] * 8, 2)
    assert sampler.fresh[0] == pytest.approx(before[0] * keep + 8 - len(back))


def test_without_a_share_it_is_plain_grpo():
    ours, plain = Adaptive(50, seed=3, share=0), Uniform(50, seed=3)
    for step in range(1, 30):
        drawn = ours.draw(8, step)
        assert drawn == plain.draw(8, step)
        ours.observe(drawn, [3] * 8, [G] * 8, step)
        plain.observe(drawn, [3] * 8, [G] * 8, step)


def test_group_sizes_that_are_no_divisor_of_the_levels():
    sampler = Adaptive(20, seed=0)
    for size in (2, 3, 5, 7, 11, 64):
        drawn = sampler.draw(4, size)
        sampler.observe(drawn, [0, 1, size - 1, size], [size] * 4, size)
        assert sampler.level[drawn[0]] == 0 and sampler.level[drawn[3]] == LEVELS


@pytest.mark.parametrize("wrong", [{"share": 1.1}, {"share": -0.1}, {"cooldown": -1}])
def test_wrong_constants(wrong):
    with pytest.raises(ValueError, match="need share"):
        Adaptive(10, **wrong)


def test_constants_of_the_docstring():
    assert (rules.MARGIN, rules.MEMORY, rules.GUESS) == (1.25, 320, 8)
