"""The comparison of methods: curves, pairing, Holm's correction, and the whole command on a small budget."""

import json
import math
import shlex
import shutil
from pathlib import Path

import pandas as pd
import pytest

from lab import compare, figures
from support import plot, stats
from tests.helpers import code_of

HELD_OUT = {"measure": "held-out accuracy"}


def run_of(method: str, seed: int, accuracies: list[float], rollouts: int = 100) -> dict:
    rows = [
        {"accuracy": a, "rollouts": rollouts * i, "tokens": 10 * rollouts * i, "optimizer_steps": i, "seconds": 0.5 * i}
        for i, a in enumerate(accuracies)
    ]
    health = {"zero_variance": 0.5, "mean_abs_advantage": 0.2, "replayed": 0.0, "distinct_prompts": 10}
    return {
        "method": method,
        "seed": seed,
        "points": pd.DataFrame(rows),
        "health": health,
        "commit": "",
        "config": {"replay": method, "seed": seed},
        "load": None,
    }


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
    text = figures.results_table(compare.analyse(runs, ["none", "prompt"]) | HELD_OUT)
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
    text = figures.results_table(result | HELD_OUT)
    assert "| better | 6 |" in text and "*" in text and "+100%" in text


def test_arms_share_the_objective_of_the_first_unless_they_say_otherwise(capsys):
    """The papers' presets bring another advantage and other clips; the comparison takes them back."""
    arms = {
        "none": ["--replay", "none"],
        "group": ["--replay", "group"],
        "own": ["--replay", "group", "--clip-high", "0.3"],
    }
    shared = compare.equal_objective(arms, ["--dual-clip", "5"])
    assert "one objective for all arms, that of none: --advantage centred --clip-high 0.272 --dual-clip 5.0" in (
        capsys.readouterr().out
    )
    preset, _ = compare.settings_of(arms["group"])
    assert (preset.advantage, preset.clip_high, preset.dual_clip) == ("std", 0.28, 10.0)
    group, _ = compare.settings_of([*shared, *arms["group"]])
    assert (group.advantage, group.clip_high, group.dual_clip) == ("centred", 0.272, 5.0)
    own, _ = compare.settings_of([*shared, *arms["own"]])
    assert (own.advantage, own.clip_high) == ("centred", 0.3)


def test_every_setting_in_which_arms_differ_stands_under_the_table():
    runs = [run_of(method, seed, [0.1, 0.2]) for seed in (0, 1) for method in ("none", "prompt")]
    for run in runs:
        run["config"] |= {
            "model": "out/a-path",  # the same for all
            "lr": 1e-4,
            "mask_truncated": run["method"] == "prompt",
            "out": f"{run['method']}{run['seed']}",
        }
    methods = ["none", "prompt"]
    found = compare.differing_settings(runs, methods)
    assert found["mask_truncated"] == {"none": "False", "prompt": "True"} and set(found) == {"mask_truncated", "replay"}
    result = compare.analyse(runs, methods) | HELD_OUT | {"differences": found}
    assert figures.differences_list(result).endswith("- `mask_truncated`: False; Prompt Replay True")
    runs[0]["config"]["lr"] = 2e-4  # runs of one arm differ
    assert compare.differing_settings(runs, methods)["lr"]["none"] == "0.0001 / 0.0002"


def test_without_sharing_the_tables_speak_of_training_prompts():
    runs = [run_of("none", 0, [0.1, 0.2])]
    assert compare.measure_of(runs) == "held-out accuracy"
    runs[0]["config"]["sharing"] = "none"
    result = compare.analyse(runs, ["none"]) | {"measure": compare.measure_of(runs)}
    assert figures.results_table(result).startswith("Accuracy on the training prompts in points")
    assert "| seeds | accuracy on the training prompts |" in figures.results_table(result)
    runs[0]["config"]["model"] = "of/another"  # the knob is the embedded task's
    assert compare.measure_of(runs) == "held-out accuracy"


def test_equal_seconds_come_with_the_machines_load():
    runs = [run_of("none", seed, [0.1, 0.2]) for seed in (0, 1)]
    assert "is not known" in figures.load_line(compare.load_of(runs))
    runs[0]["load"], runs[1]["load"] = {"start": 1.0, "end": 2.0}, {"start": 2.0, "end": 4.0}
    assert "load was 1.5 when a run began and 3.0 when it ended" in figures.load_line(compare.load_of(runs))


def test_tables_say_how_many_cpu_hours_their_runs_took():
    """Measured where every run noted them; else the seconds in steps, which all share, are a lower bound. The tuned
    table has no runs of its own."""
    runs = [run_of(method, seed, [0.1, 0.2, 0.3]) for method in ("none", "prompt") for seed in (0, 1)]
    for run in runs:
        run["load"] = {"start": 1.0, "end": 2.0, "cpu_seconds": 450.0}
    noted = compare.analyse(runs, ["none", "prompt"]) | {"load": compare.load_of(runs)}
    assert figures.took({"lr 1": noted, "lr 2": noted, "tuned": noted}) == "8 runs, 1 CPU hours."
    runs[0]["load"] = {"start": 1.0, "end": 2.0}
    some = compare.analyse(runs, ["none", "prompt"]) | {"load": compare.load_of(runs)}
    for result in (some, noted | {"load": {"runs": 0}}):
        assert figures.took({"": result}).startswith("4 runs, at least 0.0011 CPU hours in steps")  # 4 x 1 second


def test_a_map_says_which_rules_noted_their_cpu_hours():
    row = {"cpu_seconds": 360.0}
    assert figures.took_map([{"seeds": 12, "rules": {"prompt": row, "beta": row}}]) == "24 runs, 0.2 CPU hours."
    some = figures.took_map([{"seeds": 12, "rules": {"prompt": {}, "beta": row}}])
    assert some == "24 runs; Beta posteriors: 0.1 CPU hours; others not noted."
    assert figures.took_map([{"seeds": 12, "rules": {"prompt": {}}}]).endswith("were not noted.")


@pytest.mark.parametrize(("seeds", "lines", "bands"), [(3, 3, 0), (4, 1, 1)])
def test_of_few_seeds_the_figure_shows_the_runs(seeds, lines, bands):
    curve = compare.curve([run_of("none", seed, [0.1, 0.2 + 0.1 * seed]) for seed in range(seeds)], "rollouts")
    _, axes = figures.new_figure(1, 1, (3, 3))
    figures.draw_curve(axes[0, 0], curve, "#222222", "plain GRPO")
    assert (len(axes[0, 0].lines), len(axes[0, 0].collections)) == (lines, bands)
    plot.pyplot().close()


def test_the_documentation_shows_the_shipped_results():
    made = figures.tables()
    for name, text in made.items():
        assert (figures.DOCS / "tables" / f"{name}.md").read_text() == text + "\n", "run python -m lab.figures"
    for page in (figures.ROOT / "README.md", *figures.DOCS.glob("*.md")):
        text = page.read_text()
        assert figures.filled(text, made) == text, f"{page} is out of date; run python -m lab.figures"


def test_a_table_is_filled_in_between_its_marks_and_an_unknown_one_is_refused():
    page = "before\n<!-- table: a -->\nold\nolder\n<!-- end of table -->\nafter"
    assert figures.filled(page, {"a": "| new |"}) == page.replace("old\nolder", "| new |")
    assert figures.filled(page.replace("old\nolder\n", ""), {"a": "| new |"}) == page.replace("old\nolder", "| new |")
    with pytest.raises(ValueError, match="no table called a; choose from b"):
        figures.filled(page, {"b": ""})


def test_all_figures_of_the_documentation_are_made_from_shipped_results(tmp_path):
    paths = figures.figures(tmp_path)
    shipped = {path.name for path in (figures.DOCS / "figures").glob("*.png")}
    assert len(paths) == 11 and {path.name for path in paths} == shipped
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_dear_rollouts_are_the_share_that_was_asked_for_and_at_their_own_price_what_was_measured():
    run = {"points": {"seconds": [0, 50, 100]}, "means": {"seconds_rollout": 3.0, "seconds_total": 10.0}}
    price = figures.price_of([run, run], 0.8)
    assert figures.priced(run, price) == pytest.approx([0, 175, 350])
    assert 30 * price / 350 == pytest.approx(0.8)
    results = figures.read_results("long")
    for rate, arms in figures.kept_arms(results, figures.RESULTS / "long" / "runs.jsonl").items():
        for method, test in figures.at_price(arms, 1.0).items():
            measured = results[rate]["methods"][method]["difference"]["seconds"]
            for name in ("mean", "low", "high", "p_holm"):
                assert test[name] == pytest.approx(measured[name], abs=2e-4)


def test_long_answers_have_bands_for_the_baseline_and_the_control_alone(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure) or path)
    figures.by_rate(figures.read_results("long"), tmp_path / "long.png")
    for axis in drawn[0].axes:
        assert len(axis.lines) == 7 and len(axis.collections) == 2


def test_a_figure_of_many_methods_has_the_papers_first_and_alone_in_colour(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure) or path)
    figures.forest({"lr 2e-4": figures.read_results("none")["lr 2e-4"]}, tmp_path / "none.png")
    axis = drawn[0].axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names[:5] == ["Prompt Replay", "Prioritized Replay", "rollout-level", "POPO", "twice"]
    marks = [line.get_color() for line in axis.lines if line.get_marker() == "o"]
    assert marks[3] == plot.COLOURS["group"] and set(marks[5:]) == {figures.OTHERS}
    plot.pyplot().close(drawn[0])


def test_a_torn_run_is_one_line(tmp_path, capsys):
    rows = [{"step": step, "rollouts": 8 * step} for step in (1, 2, 2, 3)]  # two processes wrote it
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text('{"replay": "none", "seed": 0}')
    assert code_of(compare.main, [str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has not every step once; remove the folder" in capsys.readouterr().err


def finished(folder: Path, flags: list[str]) -> None:
    """A run of two steps, as train.py leaves it."""
    cfg, given = compare.settings_of(flags)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(vars(cfg) | {"given": given}))
    health = {"zero_variance": 0.5, "mean_abs_advantage": 0.2, "replayed": 0.0, "distinct_prompts": 10}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in (1, 2):
            costs = {"rollouts": 8 * step, "tokens": 80 * step, "optimizer_steps": 1, "seconds_total": 0.25}
            row = {"step": step, "eval_accuracy": 0.1 * step, "pass_rates": [1, 2]} | costs | health
            file.write(json.dumps(row) + "\n")
    (folder / "curves.png").touch()


def test_a_kept_run_is_not_run_again_though_its_folder_is_gone(tmp_path):
    out = tmp_path / "out"
    folder = out / "lr-1e-4" / "none-s0"
    flags = ["--replay", "none", "--lr", "1e-4", "--seed", "0"]
    finished(folder, flags)
    path = tmp_path / "kept" / "runs.jsonl"
    compare.run_all([(folder, flags)], 1, compare.Kept(str(path), str(out)))
    compare.run_all([(folder, flags)], 1, compare.Kept(str(path), str(out)))
    assert path.read_text().count("\n") == 1  # once, however often it is asked for

    here = compare.read_run(folder)
    shutil.rmtree(out)
    kept = compare.Kept(str(path), str(out))
    compare.run_all([(folder, flags)], 1, kept)
    there = kept.read(folder)
    pd.testing.assert_frame_equal(there["points"], here["points"], check_dtype=False)
    assert {name: there[name] for name in ("config", "seed", "health")} == {
        name: here[name] for name in ("config", "seed", "health")
    }
    assert there["means"]["distinct_prompts"] == 10 and not out.exists()
    with pytest.raises(ValueError, match=r"runs.jsonl, lr-1e-4/none-s0, holds a run with --lr 0.0001, not 0.0002"):
        compare.run_all([(folder, [*flags, "--lr", "2e-4"])], 1, kept)


def test_whole_seeds_are_finished_first_and_few_of_them_tune_nothing(tmp_path, monkeypatch, capsys):
    asked = []

    def all_done(jobs, at_once, kept, cpu_seconds):
        for folder, flags in jobs:
            asked.append(folder.relative_to(tmp_path).as_posix())
            finished(folder, flags)

    monkeypatch.setattr(compare, "run_all", all_done)
    command = ["--methods", "none", "prompt", "--lrs", "1e-4", "2e-4", "--seeds", "2", "--out", str(tmp_path)]
    assert compare.main([*command, "--cpu-seconds"]) == 0
    assert asked == [f"lr-{lr}/{arm}-s{s}" for s in (0, 1) for lr in ("1e-4", "2e-4") for arm in ("none", "prompt")]
    assert "needs at least 4" in capsys.readouterr().out
    assert (tmp_path / "overview.md").exists() and not (tmp_path / "tuned.json").exists()


BAD = ["", "--methods none out/run", "/nowhere", "--methods none nonsense --seeds 1", "--methods none --jobs 0"]
BAD += [
    "--methods none --seeds 0",
    "--methods none --arms 'none: --epochs 2'",
    "--methods none --arms '../x: --epochs 2'",
]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line(flags, capsys, tmp_path):
    assert code_of(compare.main, [*shlex.split(flags), "--out", str(tmp_path)]) == 2
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
    assert code_of(compare.main, [*command, *flags, "--lr", "1e-3"]) == 2
    assert "holds a run with --lr 0.0005, not 0.001" in capsys.readouterr().err
    assert code_of(compare.main, command + flags[:3]) == 2  # one that was given is missing
    assert "holds a run with --" in capsys.readouterr().err
    folders = [str(p.parent) for p in before if not p.parent.name.startswith("fifo")]
    assert compare.main([*folders, "--out", str(tmp_path / "again")]) == 0
    assert "| Prompt Replay | 2 |" in capsys.readouterr().out


def test_each_method_is_judged_at_the_rate_that_was_best_on_the_other_half():
    """Rate "b" suits the method on even seeds and "a" on odd ones: chosen by the other half, it gets the wrong one."""

    def at(rate):
        runs = []
        for seed in range(6):
            good = {"none": rate == "a", "fickle": (rate == "b") == (seed % 2 == 0)}
            runs += [run_of(method, seed, [0.2, 0.6 if good[method] else 0.4]) for method in good]
        return runs

    chosen, rates = compare.choose_rates({"a": at("a"), "b": at("b")}, ["none", "fickle"])
    assert rates == {"none": ["a", "a"], "fickle": ["a", "b"]} and len(chosen) == 12
    last = {(run["method"], run["seed"]): run["points"]["accuracy"].iloc[-1] for run in chosen}
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
