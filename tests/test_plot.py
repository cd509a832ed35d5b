"""The curves of a run: what stands in each panel, in which colour, alone and beside a baseline."""

import json

import pytest

from support import plot


def make_run(folder, method: str, rule: dict, steps: int = 40, **settings):
    """A run's folder with the files that a figure reads. rule: keys of metrics.jsonl, with a value or one for each
    step."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"replay": method, "seed": 0, "model": ""} | settings))
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "reward": 0.5, "zero_variance": 0.25, "mean_abs_advantage": step / 100}
        row |= {"pass_rates_fresh": [3, 1, 0], "pass_rates_replayed": [0, 0, 0 if method == "none" else 4]}
        row |= {"loss": 0.1, "sync_error": 0.0}
        row |= {key: value[step - 1] if isinstance(value, list) else value for key, value in rule.items()}
        row |= {"eval_accuracy_start": 0.1} if step == 1 else {}
        row |= {"eval_accuracy": 0.1 + step / 100} if step % 10 == 0 else {}
        rows.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figure that is drawn, in place of a file."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path, **more: figures.append(figure) or path)
    yield figures
    for figure in figures:
        plot.pyplot().close(figure)


def lines(axis) -> dict[str, list]:
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def test_stages_are_drawn_of_a_run_alone_though_its_last_step_was_not_evaluated(tmp_path, drawn):
    stages = {f"eval_accuracy_stage_{stage}": [0.1 * (stage + 1)] * 40 for stage in (0, 1)}
    folder = make_run(tmp_path / "a", "continual", stages)
    path = folder / "metrics.jsonl"
    *rows, last = map(json.loads, path.read_text().splitlines())
    last = {key: value for key, value in last.items() if not key.startswith("eval_")}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]))
    plot.curves(folder)
    found = lines(drawn[0].axes[0])
    assert [list(found[f"stage {stage}"].get_ydata())[-1] for stage in (0, 1)] == [0.1, 0.2]

    plot.curves(folder, make_run(tmp_path / "b", "none", {}))
    assert not any(label.startswith("stage") for label in lines(drawn[1].axes[0]))


def test_a_run_has_four_panels_in_the_colour_of_its_method(tmp_path, drawn):
    ages = [[0, step % 3, 2] for step in range(1, 41)]
    rule = {"pace": list(range(40)), "always": 3, "group_ages": ages, "words": "no number"}
    plot.curves(make_run(tmp_path / "a", "prompt", rule))
    accuracy, dead, rates, said = drawn[0].axes
    line = lines(accuracy)["Prompt Replay: 0.10 to 0.50"]
    assert line.get_xdata().tolist() == [0, 10, 20, 30, 40] and line.get_color() == plot.COLOURS["prompt"]
    assert "Prompt Replay: 25% of all" in lines(dead)
    bars = [bar.get_height() for bar in rates.patches]
    assert bars == [0.75, 0.25, 0, 0, 0, 1]
    # what never changes, and what is no number, is not drawn; of a histogram the mean is
    assert set(lines(said)) == {"pace, at most 39", "group_ages, at most 2"}
    top = lines(said)["pace, at most 39"].get_ydata()
    assert top[-1] == pytest.approx(38.5 / 39)


def test_a_baseline_stands_beside_the_run_in_its_own_colour(tmp_path, drawn):
    run = make_run(tmp_path / "a", "popo", {})
    plot.curves(run, make_run(tmp_path / "b", "none", {}, steps=60))
    accuracy, dead, rates, signal = drawn[0].axes
    assert [line.get_color() for line in lines(accuracy).values()] == [plot.COLOURS["popo"], plot.COLOURS["none"]]
    assert set(lines(accuracy)) == {"POPO: 0.10 to 0.50", "plain GRPO: 0.10 to 0.70"}
    assert lines(rates)["plain GRPO"].get_ydata().tolist() == [0.75, 0.25, 0]
    assert "Signal" in signal.get_title() and set(lines(signal)) == {"POPO", "plain GRPO"}  # no rule says anything


def test_two_runs_of_one_method_are_told_apart_by_folder_and_grey(tmp_path, drawn):
    plot.curves(make_run(tmp_path / "a", "none", {}, sharing="none"), make_run(tmp_path / "b", "none", {}))
    accuracy = drawn[0].axes[0]
    first, second = lines(accuracy).items()
    assert str(tmp_path / "a") in first[0] and first[1].get_color() == plot.COLOURS["none"]
    assert str(tmp_path / "b") in second[0] and second[1].get_color() == plot.GREY
    assert "training prompts" in accuracy.get_title()


def test_the_command_draws_one_run_or_two_and_refuses_others_in_one_line(tmp_path, capsys):
    first = make_run(tmp_path / "a", "prompt", {})
    second = make_run(tmp_path / "b", "none", {})
    assert plot.main([str(first)]) == 0
    alone = (first / "curves.png").read_bytes()
    assert alone[:4] == b"\x89PNG" and len(alone) < 60_000 and not (first / "lives.png").exists()
    assert plot.main([str(first), str(second)]) == 0
    assert (first / "curves.png").read_bytes() != alone and not (second / "curves.png").exists()
    capsys.readouterr()
    for folders in ([], [str(first)] * 3, [str(tmp_path / "none")]):
        assert plot.main(folders) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error and "support.plot out/RUN" in error
