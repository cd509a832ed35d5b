"""A rule in a user's file: what it gives back is checked, and a mistake is one line (support/own_rule.py)."""

import json

import numpy as np
import pytest
import torch

import train
from lab import simulate
from replay import Uniform
from support import config, limits
from support.own_rule import RuleBroken, guarded
from tests.helpers import group

BEGINNING = """
import numpy as np
import torch
from replay import ReplayStore, Uniform
"""


def built(folder, body: str, num_prompts: int = 50):
    """The rule `Mine` of a user's file, made as train.py makes it."""
    path = folder / "mine.py"
    path.write_text(BEGINNING + body)
    kind = config.load_class(f"{path}:Mine")
    return config.build(kind, train.Config(), *([num_prompts] if hasattr(kind, "draw") else []))


def sampler(folder, returned: str):
    return built(folder, f"class Mine(Uniform):\n    def draw(self, n, step):\n        return {returned}\n")


def store(folder, returned: str):
    body = f"class Mine(ReplayStore):\n    def complete(self, useful, places, step):\n        return {returned}\n"
    return built(folder, body)


def test_rules_of_the_project_are_left_as_they_are():
    assert guarded(Uniform) is Uniform


@pytest.mark.parametrize(
    "returned", ["[4, 2, 7]", "np.array([4, 2, 7])", "torch.tensor([4, 2, 7])", "(4, np.int64(2), 7)"]
)
def test_draws_are_lists_of_ints_whatever_they_were_and_are_in_the_batch(tmp_path, returned):
    rule = sampler(tmp_path, returned)
    drawn = rule.draw(3, 1)
    assert drawn == [4, 2, 7] and all(type(x) is int for x in drawn)
    assert rule.batch == {4, 2, 7} and rule.seen.sum() == 3
    json.dumps(drawn)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", "returned None, not a list"),
        ("7", "returned int, not a list"),
        ("[1, 1]", "prompt 1 was drawn twice in step 5"),
        ("[50]", "it drew 50; prompts are the whole numbers from 0 to 49"),
        ("[-1]", "it drew -1"),
        ("[1.5]", "it drew 1.5"),
        ("[True]", "it drew True"),
        ("list(range(9))", "9 prompts were drawn where 8 were asked for"),
        ("[]", "no prompt was drawn in step 5"),
        ("[1 // 0]", r"mine.py, line 7 \(ZeroDivisionError"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_what_is_no_draw_is_refused_in_one_line(tmp_path, returned, message):
    with pytest.raises(RuleBroken, match=message) as caught:
        sampler(tmp_path, returned).draw(8, 5)
    assert "\n" not in str(caught.value) and "mine.py" in str(caught.value)


def test_a_refill_may_not_repeat_a_prompt_and_may_be_empty(tmp_path):
    rule = sampler(tmp_path, "[] if step == 3 and self.batch else [2]")
    rule.draw(8, 1)
    with pytest.raises(RuleBroken, match="prompt 2 was drawn twice in step 1"):
        rule.draw(8, 1)
    assert rule.draw(8, 2) == [2]
    assert rule.draw(8, 3) == [2] and rule.draw(8, 3) == []


def test_draws_are_those_of_the_rule_without_its_checks(tmp_path):
    rule = built(tmp_path, "class Mine(Uniform):\n    pass\n")
    plain = Uniform(50)
    for step in range(20):
        for n in (7, 4):
            assert rule.draw(n, step) == plain.draw(n, step)
        assert rule.replays == plain.replays


def test_replays_are_of_the_batch_though_left_over_from_an_earlier_step(tmp_path):
    rule = built(
        tmp_path,
        "class Mine(Uniform):\n    def draw(self, n, step):\n        self.replays = {1, 2}\n        return [2]\n",
    )
    rule.draw(1, 1)
    assert rule.replays == {2}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", "returned None, not a list of groups"),
        ("useful + [useful[0].tokens]", "holds list, where replay.Group belongs"),
        ("[setattr(useful[0], 'truncated', []) or useful[0]]", "lists of different lengths"),
        ("useful[9]", "mine.py, line 7.*IndexError"),
    ],
)
def test_what_is_no_batch_is_refused_in_one_line(tmp_path, returned, message):
    with pytest.raises(RuleBroken, match=message):
        store(tmp_path, returned).complete([group(3)], 4, 1)


def test_a_store_needs_nothing_but_complete(tmp_path):
    rule = store(tmp_path, "tuple(useful)")
    useful = [group(3)]
    assert rule.complete(useful, 4, 1) == useful
    assert rule.figures(1) == {"stored": 0}


@pytest.mark.parametrize(
    ("figures", "found"),
    [
        ("{'a': torch.tensor(2.5), 'b': np.arange(3)}", {"a": 2.5, "b": [0, 1, 2]}),
        ("{'a': np.float32(1), 'b': float('nan'), 'c': [float('inf')]}", {"a": 1.0}),
        ("{'a': 'text'}", "'a' is str, neither a number"),
        ("{'a': object()}", "'a' is object"),
        ("{'step': 3}", "'step' is a figure of the loop"),
        ("None", "returned None, not a dict"),
    ],
)
def test_figures_are_numbers(tmp_path, figures, found):
    rule = built(tmp_path, f"class Mine(Uniform):\n    def figures(self):\n        return {figures}\n")
    if isinstance(found, dict):
        assert rule.figures() == found
        json.dumps(rule.figures())
    else:
        with pytest.raises(RuleBroken, match=found):
            rule.figures()


def with_state(value: str) -> str:
    return f"""
class Mine(Uniform):
    STATE = (*Uniform.STATE, "mine")

    def __init__(self, num_prompts, seed=0):
        super().__init__(num_prompts, seed)
        self.mine = {value}
"""


@pytest.mark.parametrize(
    "value", ["{1: 2.0}", "[1, 'a', None]", "{3, 4}", "np.ones(3)", "torch.ones(2)", "np.random.default_rng(1)"]
)
def test_a_state_that_can_be_kept_comes_back(tmp_path, value):
    rule = built(tmp_path, with_state(value))
    state = rule.state_dict()
    other = built(tmp_path, with_state(value))
    other.load_state_dict(state)
    again = other.state_dict()["mine"]
    assert torch.equal(again, state["mine"]) if torch.is_tensor(again) else again == state["mine"]


def test_an_array_that_is_empty_at_first_may_have_any_length_later(tmp_path):
    rule = built(tmp_path, with_state("np.zeros(0, int)"))
    rule.mine = np.array([3, 1, 4])
    other = built(tmp_path, with_state("np.zeros(0, int)"))
    other.load_state_dict(rule.state_dict())
    assert other.mine.tolist() == [3, 1, 4] and other.mine.dtype == int
    with pytest.raises(ValueError, match="is of 2 prompts, not 3"):
        other.load_state_dict(rule.state_dict() | {"mine": torch.tensor([1, 2])})


def test_a_rule_may_need_to_know_how_many_prompts_there_are(tmp_path):
    body = "class Mine(Uniform):\n    def __init__(self, num_prompts, seed=0):\n"
    built(tmp_path, f"{body}        assert num_prompts == 50\n        super().__init__(num_prompts, seed)\n")
    config.check_rules(train.Config(replay=f"{tmp_path / 'mine.py'}:Mine"), train.METHODS)
    with pytest.raises(ValueError, match="need share in"):
        config.check_rules(train.Config(replay="prompt", share=2.0), train.METHODS)


@pytest.mark.parametrize(
    "value", ["object()", "__import__('collections').Counter({np.int64(3): np.float64(1)})", "lambda: 1"]
)
def test_a_state_that_no_checkpoint_can_keep_is_refused_before_the_first_step(tmp_path, value):
    with pytest.raises(RuleBroken, match="Mine.mine is in STATE, but a checkpoint cannot keep it"):
        built(tmp_path, with_state(value))


def test_a_rule_that_does_not_call_its_parent_is_told_to(tmp_path):
    with pytest.raises(RuleBroken, match="rng.*has to call super"):
        built(tmp_path, "class Mine(Uniform):\n    def __init__(self, num_prompts, seed=0):\n        self.x = 1\n")


def test_a_settings_error_of_the_rule_is_its_own_word(tmp_path):
    body = (
        "class Mine(Uniform):\n    def __init__(self, num_prompts, seed=0):\n        raise ValueError('share of 2')\n"
    )
    with pytest.raises(ValueError, match="^share of 2$"):
        built(tmp_path, body)


def test_a_rule_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    rule = built(
        tmp_path, "class Mine(Uniform):\n    def observe(self, *results):\n        while True:\n            pass\n"
    )
    with pytest.raises(RuleBroken, match=r"Mine.observe failed at .*mine.py, line [67] \(TookTooLong"):
        rule.observe([1], [2], 4, 1)


def test_a_class_that_is_no_sampler_of_ours_is_told_what_to_derive_from(tmp_path):
    with pytest.raises(ValueError, match="derive it from replay.Uniform"):
        config.decides(config.load_class(f"{written(tmp_path)}:Mine"))


def written(folder):
    path = folder / "bare.py"
    path.write_text("class Mine:\n    def draw(self, n, step):\n        return [1]\n")
    return path


def test_counts_of_right_answers_reach_the_rule_as_the_loop_gave_them(tmp_path):
    body = "class Mine(Uniform):\n    def observe(self, *given):\n        self.heard = given\n"
    rule = built(tmp_path, body)
    rule.observe([1, 2], np.array([3.0, 4.0]), 8, 6)
    assert rule.heard[0] == [1, 2] and rule.heard[2:] == (8, 6)


def test_the_simulator_tells_a_rule_that_draws_too_few(tmp_path, capsys):
    path = tmp_path / "few.py"
    path.write_text(BEGINNING + "class Few(Uniform):\n    def draw(self, n, step):\n        return [3]\n")
    with pytest.raises(SystemExit):
        simulate.main(["--rules", f"{path}:Few", "--seeds", "2", "--steps", "3"])
    assert "Few drew 1 prompts; the simulator needs a full batch" in capsys.readouterr().err
