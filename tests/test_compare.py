"""The comparison of methods: curves, pairing, Holm's correction, and the whole command on a small budget."""

import json
import math
import shlex

import pytest

from lab import compare
from support import plot, stats


def run_of(method: str, seed: int, accuracies: list[float], rollouts: int = 100) -> dict:
    points = [
        {"accuracy": a, "rollouts": rollouts * i, "tokens": 10 * rollouts * i, "optimizer_steps": i, "seconds": 0.5 * i}
        for i, a in enumerate(accuracies)
    ]
    health = {"zero_variance": 0.5, "mean_abs_advantage": 0.2, "replayed": 0.0, "distinct_prompts": 10}
    return {"method": method, "seed": seed, "points": points, "health": health, "commit": ""}


def test_accuracy_at_a_cost_is_the_mean_over_its_last_fifth():
    run = run_of("none", 0, [0.0, 0.3, 0.6, 0.9])
    assert compare.accuracy_at(run, "rollouts", 300) == pytest.approx(0.9 - 0.09)
    assert compare.accuracy_at(run, "rollouts", 100) == pytest.approx(0.3 - 0.03)
    assert compare.accuracy_at(run, "seconds", 0.5) == pytest.approx(0.3 - 0.03)
    assert compare.area(run, "rollouts", 300) == pytest.approx(0.45, abs=1e-3)


def test_how_far_apart_evaluations_are_makes_no_difference():
    fine, coarse = run_of("a", 0, [0.1 * i for i in range(9)], 50), run_of("b", 0, [0.0, 0.4, 0.8], 200)
    for budget in (100, 250, 330, 400):
        assert compare.accuracy_at(fine, "rollouts", budget) == pytest.approx(
            compare.accuracy_at(coarse, "rollouts", budget)
        )
        assert compare.area(fine, "rollouts", budget) == pytest.approx(compare.area(coarse, "rollouts", budget))
    assert compare.cost_to_reach(fine, 0.5) == pytest.approx(compare.cost_to_reach(coarse, 0.5))


def test_cost_to_reach_a_level_is_where_accuracy_at_reaches_it():
    run = run_of("none", 0, [0.0, 0.3, 0.6, 0.9])
    assert compare.accuracy_at(run, "rollouts", compare.cost_to_reach(run, 0.45)) == pytest.approx(0.45, abs=1e-4)
    assert compare.cost_to_reach(run, 0.0) == 0 and compare.cost_to_reach(run, 0.82) is None


def test_runs_that_cannot_be_paired_are_refused():
    runs = [run_of("none", 0, [0.1, 0.2]), run_of("prompt", 1, [0.1, 0.2])]
    with pytest.raises(ValueError, match="no run of prompt has a seed of those of none"):
        compare.analyse(runs, ["none", "prompt"])
    with pytest.raises(ValueError, match="same method and seed"):
        compare.analyse([*runs, run_of("prompt", 1, [0.1, 0.3])], ["none", "prompt"])


def test_one_seed_has_no_interval():
    runs = [run_of("none", 0, [0.1, 0.2]), run_of("prompt", 0, [0.1, 0.3])]
    text = compare.table(compare.analyse(runs, ["none", "prompt"]))
    assert "+9.0 (one seed)" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert widths[:4] == [widths[0]] * 4 and widths[4:] == [5] * 4  # no level was reached: no column for one


def test_paired_differences_have_students_interval():
    test = stats.by_seed([1.0, 2.0, 3.0])
    assert test["mean"] == 2 and test["high"] - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert test["p"] == pytest.approx(0.0742, abs=2e-4)
    assert stats.by_seed([0.0, 0.0])["p"] == 1 and stats.by_seed([1.0])["p"] == 1


def test_holm_is_stepwise_and_monotone():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0]) and stats.holm([]) == []


def test_a_better_method_is_found_and_an_equal_one_is_not():
    noise = [0.02, -0.01, 0.015, -0.02, 0.005, 0.0]
    runs = []
    for seed, n in enumerate(noise):
        base = [0.2, 0.3 + n, 0.4 + n, 0.5 + n, 0.6 + n]
        runs.append(run_of("none", seed, base))
        runs.append(run_of("better", seed, [0.2] + [a + 0.1 + n / 5 for a in base[1:]]))
        runs.append(run_of("equal", seed, [0.2] + [a + noise[seed - 1] / 3 for a in base[1:]]))
        runs.append(run_of("costly", seed, base, rollouts=200))
    result = compare.analyse(runs, ["none", "better", "equal", "costly"])
    better, equal, costly = (result["methods"][name] for name in ("better", "equal", "costly"))
    assert better["budgets"]["rollouts"] == 400 and better["seeds"] == 6
    assert better["difference"]["rollouts"]["low"] > 0.05 and better["difference"]["rollouts"]["p_holm"] < 0.05
    assert equal["difference"]["rollouts"]["low"] < 0 < equal["difference"]["rollouts"]["high"]
    assert costly["difference"]["rollouts"]["mean"] < -0.1 and costly["difference"]["optimizer_steps"]["mean"] == 0
    assert math.exp(costly["reach"]["0.4"]["mean"]) == pytest.approx(2)
    text = compare.table(result)
    assert "| better | 6 |" in text and "*" in text and "+100%" in text


def test_a_torn_run_is_one_line(tmp_path, capsys):
    rows = [{"step": step, "rollouts": 8 * step} for step in (1, 2, 2, 3)]  # two processes wrote it
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text('{"replay": "none", "seed": 0}')
    assert compare.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has not every step once; remove the folder" in capsys.readouterr().err


BAD = ["", "--methods none out/run", "/nowhere", "--methods none nonsense --seeds 1", "--methods none --jobs 0"]
BAD += [
    "--methods none --seeds 0",
    "--methods none --arms 'none: --epochs 2'",
    "--methods none --arms '../x: --epochs 2'",
]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, capsys, tmp_path):
    assert compare.main([*shlex.split(flags), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_the_whole_command_and_again_without_running(tmp_path, capsys):
    out = tmp_path / "cmp"
    command = ["--methods", "none", "prompt", "--arms", "fifo: --replay rollout --priority-exponent 0", "--seeds", "2"]
    command += ["--budget-rollouts", "400", "--out", str(out)]
    flags = ["--", "--eval-every", "2", "--prompts-per-step", "8", "--eval-prompts", "20"]
    assert compare.main([*command, *flags]) == 0
    result = json.loads((out / "results.json").read_text())
    assert (
        set(result["methods"]) == {"none", "prompt", "fifo"} and result["methods"]["none"]["budgets"]["rollouts"] >= 400
    )
    assert (out / "results.png").stat().st_size > 10_000 and "| fifo | 2 |" in (out / "results.md").read_text()
    assert {row["rollouts"] for row in plot.read(out / "fifo-s1" / "metrics.jsonl")} >= {64, 448}
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/metrics.jsonl")}
    assert compare.main([*command, *flags]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/metrics.jsonl")}
    assert compare.main([*command, *flags, "--lr", "1e-3"]) == 2 and "holds a run with --lr 0.0005, not 0.001" in (
        capsys.readouterr().err
    )
    assert compare.main(command + flags[:3]) == 2  # one that was given is missing
    assert "holds a run with --" in capsys.readouterr().err
    folders = [str(p.parent) for p in before if not p.parent.name.startswith("fifo")]
    assert compare.main([*folders, "--out", str(tmp_path / "again")]) == 0
    assert "| prompt | 2 |" in capsys.readouterr().out


def test_each_method_is_judged_at_the_rate_that_was_best_on_the_other_half():
    """Rate "b" suits the method on even seeds and "a" on odd ones: chosen by the other half, it gets the wrong one."""

    def at(rate):
        runs = []
        for seed in range(6):
            good = {"none": rate == "a", "fickle": (rate == "b") == (seed % 2 == 0)}
            runs += [run_of(method, seed, [0.2, 0.6 if good[method] else 0.4]) for method in good]
        return runs

    chosen, rates = compare.tuned({"a": at("a"), "b": at("b")}, ["none", "fickle"])
    assert rates == {"none": ["a", "a"], "fickle": ["a", "b"]} and len(chosen) == 12
    last = {(run["method"], run["seed"]): run["points"][-1]["accuracy"] for run in chosen}
    assert {last["none", seed] for seed in range(6)} == {0.6} and {last["fickle", seed] for seed in range(6)} == {0.4}


@pytest.mark.slow
def test_several_learning_rates(tmp_path, capsys):
    command = ["--methods", "none", "adaptive", "--seeds", "4", "--lrs", "1e-4", "1e-3", "--budget-rollouts", "300"]
    flags = ["--", "--sharing", "none", "--eval-every", "2", "--prompts-per-step", "8", "--eval-prompts", "20"]
    assert compare.main([*command, "--out", str(tmp_path), *flags]) == 0
    assert json.loads((tmp_path / "lr-1e-3" / "adaptive-s2" / "config.json").read_text())["lr"] == 1e-3
    result = json.loads((tmp_path / "tuned.json").read_text())
    assert set(result["rates"]) == {"none", "adaptive"} and result["methods"]["adaptive"]["seeds"] == 4
    assert {path.name for path in tmp_path.glob("*.png")} == {"lr-1e-4.png", "lr-1e-3.png", "tuned.png", "overview.png"}
    assert "learning rate tuned" in capsys.readouterr().out
