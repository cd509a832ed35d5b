import json

import numpy as np
import pytest

from lab import simulate
from lab.rules import GRESO
from lab.simulate import Policy, Setting, against, compare_rules, make_task, reinforce, rollouts_to, run
from replay import Prioritized, PromptReplay, Uniform
from tests.helpers import code_of

SMALL = {"prompts": 60, "prompts_per_step": 4, "steps": 40}


def one_skill(rate: float, normalise="batch", **change) -> Policy:
    """2000 prompts of one private skill each, all at the same pass rate, in one seed."""
    setting = Setting(prompts=2000, skills=1, prompts_per_step=2000, normalise=normalise, **change)
    policy = Policy(setting, [0], salt=0)
    policy.theta[:] = np.log(rate / (1 - rate))
    return policy


def test_a_visit_at_one_half_moves_a_prompt_by_the_step_asked_for():
    policy = one_skill(0.5, visit=0.3)
    policy.step(np.arange(2000)[None])
    assert policy.theta.mean() == pytest.approx(0.3, abs=0.02)
    # and elsewhere in proportion to p (1 - p)
    policy = one_skill(0.1, visit=0.3)
    policy.step(np.arange(2000)[None])
    assert policy.theta.mean() == pytest.approx(np.log(0.1 / 0.9) + 0.3 * 4 * 0.09, abs=0.02)


def test_dead_groups_make_a_step_shorter_or_do_not():
    def moved(right: int, normalise: str) -> float:
        """How far the prompts that are alive move where `right` of 2000 are solved."""
        policy = one_skill(0.5, normalise=normalise)
        policy.live[:] = 2000 if normalise == "live" else 0
        policy.theta[0, :right] = 50.0
        before = policy.theta.copy()
        policy.step(np.arange(2000)[None])
        return (policy.theta - before)[0, right:].mean()

    assert moved(1500, "batch") == pytest.approx(moved(0, "batch"), rel=0.1)
    assert moved(1500, "live") == pytest.approx(4 * moved(0, "live"), rel=0.1)


def test_gradient_is_that_of_the_exact_pass_rate():
    rate = np.array([0.3, 0.8, 0.9])
    uniforms = np.random.default_rng(0).random((1, 40_000, 8, 3))
    correct, gradient = reinforce(np.broadcast_to(rate, (1, 40_000, 3)), uniforms)
    p = rate.prod()
    assert correct.mean() / 8 == pytest.approx(p, abs=0.005)
    # d p / d logit = p (1 - rate); centring on the group's own mean leaves 1 - 1/G of it
    np.testing.assert_allclose(gradient.mean((0, 1)), 7 / 8 * p * (1 - rate), atol=0.002)


def test_a_group_all_right_or_all_wrong_has_no_gradient():
    uniforms = np.concatenate([np.zeros((1, 1, 8, 2)), np.full((1, 1, 8, 2), 0.99)], axis=1)
    correct, gradient = reinforce(np.full((1, 2, 2), 0.5), uniforms)
    assert correct.tolist() == [[8, 0]] and not gradient.any()


@pytest.mark.parametrize(("sharing", "prompts_a_skill"), [(0.0, 1), (0.5, 2), (0.975, 40)])
def test_sharing_is_how_many_prompts_have_a_skill_in_common(sharing, prompts_a_skill):
    theta, skills, test = make_task(Setting(sharing=sharing, skills=2, prompts=1000), 0)
    assert (np.bincount(skills.ravel(), minlength=len(theta)) == prompts_a_skill).all()
    assert (test is skills) == (sharing == 0) and test.max() < len(theta)


@pytest.mark.parametrize("skills", [1, 2, 4])
@pytest.mark.parametrize("difficulty", [0.2, 0.85])
def test_difficulty_is_the_share_of_prompts_with_a_rare_skill_whatever_their_number(skills, difficulty):
    theta, of_prompt, _ = make_task(Setting(difficulty=difficulty, skills=skills, prompts=20_000), 0)
    rate = simulate.sigmoid(theta[of_prompt])
    assert (rate.min(1) < 0.05).mean() == pytest.approx(difficulty, abs=0.015)
    assert (rate.min(1) > 0.95).mean() == pytest.approx(0.4 * (1 - difficulty), abs=0.015)


def test_accuracy_is_the_mean_product_over_prompts():
    theta, test = np.array([[0.0, 1.0, -1.0]]), np.array([[[0, 1], [2, 2]]])
    s = simulate.sigmoid(theta[0])
    assert simulate.accuracy(theta, test) == pytest.approx([(s[0] * s[1] + s[2] ** 2) / 2])


def test_without_interference_other_skills_stay_and_with_it_they_move():
    for interference in (0.0, 0.5):
        policy = Policy(Setting(interference=interference, prompts=200), [0, 1], salt=0)
        before = policy.theta.copy()
        policy.step(np.tile(np.arange(16), (2, 1)))
        others = np.setdiff1d(np.arange(400), policy.skills[0, :16])
        assert (policy.theta[0] != before[0])[others].any() == bool(interference)


@pytest.mark.parametrize(("optimizer", "kept"), [("sgd", 0.1), ("adam", 1.0)])
def test_adam_keeps_the_size_of_steps_when_gradients_shrink_and_sgd_does_not(optimizer, kept):
    def late_steps(scale):
        policy = Policy(Setting(prompts=400, skills=1, visit=0.001, optimizer=optimizer), [0], salt=0)
        policy.theta[:] = 0.0
        answer = policy.answer

        def scaled(chosen):
            correct, gradient, skills = answer(chosen)
            return correct, scale * gradient, skills

        policy.answer = scaled
        thetas = [policy.theta[0, policy.skills[0, :16, 0]].mean() for _ in range(400) if any(policy.step(batch)[0])]
        return thetas[-1] - thetas[200]

    batch = np.arange(16)[None]
    assert late_steps(0.1) == pytest.approx(kept * late_steps(1.0), rel=0.2)


@pytest.mark.parametrize("name", ["uniform", "prompt", "prioritized", "greso", "beta", "rare", "cautious"])
def test_a_seed_gives_the_same_run_alone_and_beside_others_and_all_learn(name):
    setting = Setting(visit=1.0, **SMALL)
    alone, beside = run(setting, simulate.RULES[name], [3]), run(setting, simulate.RULES[name], [5, 3])
    np.testing.assert_allclose(alone["accuracy"][0], beside["accuracy"][1], rtol=1e-12)
    assert (beside["accuracy"][:, -1] > beside["accuracy"][:, 0] + 0.05).all()
    assert not np.allclose(beside["accuracy"][0], beside["accuracy"][1])


def test_seeds_are_matched_across_rules_and_the_placebo_differs_only_in_sampling():
    setting = Setting(**SMALL)
    uniform, prompt = run(setting, Uniform, [0, 1]), run(setting, PromptReplay, [0, 1])
    np.testing.assert_array_equal(uniform["accuracy"][:, 0], prompt["accuracy"][:, 0])
    # no replay within the cooldown: the same order, the same answers, until it begins
    np.testing.assert_allclose(uniform["accuracy"][:, :10], prompt["accuracy"][:, :10])
    placebo = run(setting, Uniform, [0, 1], salt=1)
    np.testing.assert_array_equal(uniform["accuracy"][:, 0], placebo["accuracy"][:, 0])
    assert (uniform["accuracy"][:, -1] != placebo["accuracy"][:, -1]).all()


def test_the_samplers_are_those_of_training_with_their_papers_constants():
    made = {name: rule(100, 7) for name, rule in simulate.RULES.items()}
    assert [type(made[name]) for name in ("prompt", "prioritized", "greso")] == [PromptReplay, Prioritized, GRESO]
    assert (made["prompt"].band, made["prompt"].share, made["prompt"].cooldown) == ((0.25, 0.75), 0.75, 10)
    assert (made["prompt"].order == made["uniform"].order).all()


def test_rollouts_to_a_level():
    curve, cost = np.array([[0.1, 0.3, 0.5], [0.1, 0.1, 0.2], [0.4, 0.3, 0.5]]), np.array([0, 100, 200])
    assert rollouts_to(np.array([0.4, 0.4, 0.4]), curve, cost).tolist() == [150, np.inf, 0]


def test_against_uniform_itself_is_nothing_and_a_faster_curve_is_fewer_rollouts():
    cost, line = np.arange(0, 101, 10), np.linspace(0, 0.5, 11)[None].repeat(3, 0)
    rest = dict.fromkeys(simulate.FIGURES, np.zeros(3))
    base = {"accuracy": line, "cost": cost, **rest}
    same = against(base, base)
    assert (same["early"]["mean"], same["late"]["mean"], same["area"]["mean"]) == pytest.approx((0, 0, 0))
    fast = against(base, base | {"accuracy": np.minimum(2 * line, 0.5)})
    assert fast["late"]["mean"] == pytest.approx(-0.5) and fast["area"]["mean"] > 0 and fast["late"]["reached"] == 3
    slow = against(base, base | {"accuracy": line / 2})
    assert slow["late"]["mean"] == pytest.approx(0.5) and slow["late"]["reached"] == 0  # the run's length, a bound


def test_replay_pays_at_a_small_step_per_visit_and_its_gain_goes_at_a_large_one():
    """The map's main finding, small: significant at the left end of it, and gone or turned over at the right."""
    small = compare_rules(Setting(visit=0.14, steps=200), ["prompt", "adaptive", "placebo"], list(range(6)))["rules"]
    large = compare_rules(Setting(visit=4.0, steps=400), ["prompt", "adaptive"], list(range(6)))["rules"]
    assert small["prompt"]["late"]["mean"] < -0.2 and small["prompt"]["area"]["mean"] > 0.003
    assert abs(small["placebo"]["late"]["mean"]) < 0.1
    assert large["prompt"]["late"]["mean"] > -0.1
    assert small["adaptive"]["late"]["mean"] < -0.15 and large["adaptive"]["late"]["mean"] < -0.05
    longer = compare_rules(Setting(visit=0.14, steps=200, normalise="batch"), ["prompt"], list(range(6)))["rules"]
    assert longer["prompt"]["late"]["mean"] < small["prompt"]["late"]["mean"] - 0.1  # half of it would be longer steps
    for cell in (small, large):  # whichever way it went
        assert cell["prompt"]["dead"] < 0.75 and cell["prompt"]["moved_replayed"] > cell["prompt"]["moved_fresh"]


def test_the_command_prints_a_table_and_one_number_changes_it(capsys):
    flags = [
        "--steps",
        "30",
        "--prompts",
        "60",
        "--prompts-per-step",
        "4",
        "--seeds",
        "3",
        "--rules",
        "uniform",
        "rare",
    ]
    assert simulate.main(flags) == 0
    first = capsys.readouterr().out
    assert first.count("\n") == 7 and "visit 0.14" in first
    uniform = next(line for line in first.splitlines() if line.startswith("uniform  "))
    assert uniform.split()[1:9] == ["+0.0", "±0.0"] * 4
    assert simulate.main([*flags, "--visit", "1.4"]) == 0
    assert capsys.readouterr().out != first


def test_the_map_is_a_figure_and_its_numbers(tmp_path, capsys):
    rules, seeds = ["prompt", "rare"], [0, 1]
    setting = Setting(prompts=40, prompts_per_step=4, steps=20)
    path = simulate.draw_map(setting, rules, seeds, tmp_path / "new" / "map.png", ((0.2, 2.0), (0.0, 0.5), (0.0, 0.5)))
    assert path.stat().st_size > 10_000
    cells = json.loads(path.with_suffix(".json").read_text())["cells"]
    assert len(cells) == 8 and list(cells[0]["rules"]) == rules
    assert {(c["setting"]["visit"], c["setting"]["sharing"], c["setting"]["interference"]) for c in cells} == {
        (v, s, i) for v in (0.2, 2.0) for s in (0.0, 0.5) for i in (0.0, 0.5)
    }
    assert {"mean", "se", "reached"} == set(cells[0]["rules"]["rare"]["late"])


@pytest.mark.parametrize(
    "flags",
    ["--visit 0", "--sharing 1", "--difficulty -0.1", "--answers 1", "--prompts 8", "--seeds 1", "--steps 1"],
)
def test_bad_numbers_end_in_one_line_and_exit_code_2(flags, capsys):
    assert code_of(simulate.main, flags.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") and error.count("\n") == 1


OWN = """
from replay import ReplayStore, Uniform

class Same(Uniform):
    pass

class Shelf(ReplayStore):
    DECIDES = "extra"
    def complete(self, useful, places, step):
        return useful
    def figures(self, step):
        return {}
"""


def test_a_rule_of_ones_own_is_simulated_beside_ours(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    flags = ["--seeds", "2", "--steps", "20", "--prompts", "60", "--prompts-per-step", "4"]
    assert simulate.main([*flags, "--rules", "prompt", f"{file}:Same"]) == 0
    prompt, same = capsys.readouterr().out.splitlines()[-2:]
    assert prompt.startswith("prompt ")
    assert same.startswith("Same ")
    assert same.split()[1:5] == ["+0.0", "±0.0", "+0.0", "±0.0"]  # it is uniform sampling

    for name, message in (
        (f"{file}:Shelf", "decides extra; only rules that choose prompts"),
        (f"{file}:Other", "has no class 'Other'"),
        (f"{tmp_path}/no.py:Same", "there is no file"),
        ("Same", "or give file.py:Class"),
        ("pompt", "or give file.py:Class; did you mean prompt?"),
    ):
        assert code_of(simulate.main, [*flags, "--rules", name]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
